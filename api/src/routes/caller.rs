//! Who calls, for which account and capture: what comes before every handler.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{FromRequestParts, RawPathParams},
    http::{Method, request::Parts},
};

use super::App;
use crate::{auth::Permission, error::ApiError, http::Peer, id};

/// A caller with an account in the path who may do what the method needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) account: u128,
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let identity = app.auth.identify(&parts.headers, peer(parts))?;
        let account = parameter(parts, app, "account_id").await?;
        let account =
            id::parse(&account).ok_or_else(|| ApiError::Route(parts.uri.path().to_owned()))?;
        let reads = parts.method == Method::GET || parts.method == Method::HEAD;
        identity.allows(account, if reads { Permission::Read } else { Permission::Write })?;
        Ok(Self { account })
    }
}

/// A caller and the capture in the path.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) account: u128,
    pub(super) pcap: u128,
}

impl FromRequestParts<Arc<App>> for Target {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let Caller { account } = Caller::from_request_parts(parts, app).await?;
        let pcap = parameter(parts, app, "pcap_id").await?;
        let pcap = id::parse(&pcap).ok_or(ApiError::Id(pcap))?;
        Ok(Self { account, pcap })
    }
}

/// A caller and the ownership in the path.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnershipTarget {
    pub(super) account: u128,
    pub(super) ownership: u128,
}

impl FromRequestParts<Arc<App>> for OwnershipTarget {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let Caller { account } = Caller::from_request_parts(parts, app).await?;
        let ownership = parameter(parts, app, "ownership_id").await?;
        let ownership = id::parse(&ownership).ok_or(ApiError::OwnershipId(ownership))?;
        Ok(Self { account, ownership })
    }
}

/// A caller of what belongs to no account, unless the configuration has it open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Anyone;

impl FromRequestParts<Arc<App>> for Anyone {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let path = parts.uri.path();
        if app.config.open.iter().any(|open| path.ends_with(open.as_str())) {
            return Ok(Self);
        }
        app.auth.identify(&parts.headers, peer(parts))?;
        Ok(Self)
    }
}

fn peer(parts: &Parts) -> IpAddr {
    // Whoever serves the router says who it is for.
    parts.extensions.get::<Peer>().map_or(IpAddr::from([0, 0, 0, 0]), |peer| peer.0)
}

async fn parameter(parts: &mut Parts, app: &Arc<App>, name: &str) -> Result<String, ApiError> {
    let route = || ApiError::Route(parts.uri.path().to_owned());
    let route = route();
    let Ok(parameters) = RawPathParams::from_request_parts(parts, app).await else {
        return Err(route);
    };
    let found = parameters.iter().find(|(key, _)| *key == name);
    found.map(|(_, value)| value.to_owned()).ok_or(route)
}
