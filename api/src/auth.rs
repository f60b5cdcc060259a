//! Who asks: tokens and keys, what they may do, and how often one may guess.

mod limiter;
mod tokens;

use std::{net::IpAddr, time::Duration};

use axum::http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;
use thiserror::Error;

use self::limiter::Limiter;
pub use self::tokens::{NewToken, TokenError, Tokens};
use crate::{config::Config, id};

/// What a credential may do.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Permission {
    /// List, get, watch
    Read,
    /// Also create, stop, delete
    Write,
}

/// Why a request is not let in.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AuthError {
    /// No credentials.
    #[error("Missing X-Auth-Key, X-Auth-Email or Authorization headers")]
    Missing,
    /// A header that cannot be one.
    #[error("Invalid format for {header} header")]
    Malformed {
        /// Which.
        header: &'static str,
    },
    /// Nobody's credentials.
    #[error("Authentication error")]
    Wrong,
    /// Someone else's account.
    #[error("Authentication error: these credentials are not for account {account}")]
    OtherAccount {
        /// Which.
        account: String,
    },
    /// May only read.
    #[error("Authentication error: these credentials may only read; this request needs `write`")]
    ReadOnly,
    /// Too many wrong guesses from there.
    #[error("too many failed authentications from your address: try again in {} s", wait.as_secs())]
    Limited {
        /// Until the next one may be made.
        wait: Duration,
    },
}

/// Whose credentials they were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Their accounts.
    pub accounts: Vec<u128>,
    /// What they may do.
    pub permission: Permission,
}

impl Identity {
    /// Whether it may do that to that account.
    pub fn allows(&self, account: u128, needed: Permission) -> Result<(), AuthError> {
        if !self.accounts.contains(&account) {
            return Err(AuthError::OtherAccount { account: id::show(account) });
        }
        if self.permission < needed { Err(AuthError::ReadOnly) } else { Ok(()) }
    }
}

struct Key {
    email: String,
    digest: [u8; 32],
    identity: Identity,
}

/// Everybody that there is.
pub struct Auth {
    tokens: Tokens,
    keys: Vec<Key>,
    limiter: Limiter,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth").finish_non_exhaustive()
    }
}

/// What a request carries.
enum Credential<'a> {
    Token(&'a str),
    Key { email: &'a str, key: &'a str },
}

impl Auth {
    /// As configured, with the tokens of the data folder.
    pub fn new(config: &Config) -> Self {
        let keys = config.keys.iter().filter_map(|key| {
            Some(Key {
                email: key.email.clone(),
                digest: id::parse_digest(&key.key_sha256)?,
                identity: Identity {
                    accounts: key
                        .accounts
                        .iter()
                        .filter_map(|account| id::parse(account))
                        .collect(),
                    permission: key.permission,
                },
            })
        });
        Self {
            tokens: Tokens::new(&config.data_dir),
            keys: keys.collect(),
            limiter: Limiter::new(config.limits.auth_failures_per_minute),
        }
    }

    /// Whose credentials a request carries. When there are several, as some clients send, the token
    /// counts.
    pub fn identify(&self, headers: &HeaderMap, peer: IpAddr) -> Result<Identity, AuthError> {
        let credential = credential(headers)?;
        self.limiter.check(peer).map_err(|wait| AuthError::Limited { wait })?;
        let found = match credential {
            Credential::Token(token) => self.tokens.find(token),
            Credential::Key { email, key } => self.find_key(email, key),
        };
        found.ok_or_else(|| {
            self.limiter.failed(peer);
            AuthError::Wrong
        })
    }

    fn find_key(&self, email: &str, key: &str) -> Option<Identity> {
        let digest = id::sha256(key.as_bytes());
        let mut found = None;
        // All of them, so that the time says nothing of which came close.
        for known in &self.keys {
            let same = known.digest.ct_eq(&digest) & known.email.as_bytes().ct_eq(email.as_bytes());
            if bool::from(same) {
                found = Some(&known.identity);
            }
        }
        found.cloned()
    }
}

fn credential(headers: &HeaderMap) -> Result<Credential<'_>, AuthError> {
    if let Some(value) = headers.get(AUTHORIZATION) {
        let malformed = AuthError::Malformed { header: "Authorization" };
        let value = text(value).ok_or_else(|| malformed.clone())?;
        let (scheme, token) = value.split_once(' ').ok_or_else(|| malformed.clone())?;
        let token = token.trim();
        if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() || token.contains(' ') {
            return Err(malformed);
        }
        return Ok(Credential::Token(token));
    }
    match (headers.get("x-auth-email"), headers.get("x-auth-key")) {
        (Some(email), Some(key)) => {
            let malformed = |header| AuthError::Malformed { header };
            let email = text(email).ok_or_else(|| malformed("X-Auth-Email"))?;
            let key = text(key).ok_or_else(|| malformed("X-Auth-Key"))?;
            Ok(Credential::Key { email, key })
        }
        _ => Err(AuthError::Missing),
    }
}

/// A value that can be a credential.
fn text(value: &HeaderValue) -> Option<&str> {
    value.to_str().ok().filter(|text| !text.trim().is_empty() && text.len() <= 512)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    const ACCOUNT: u128 = 0x023e_105f_4ece_f8ad_9ca3_1a83_72d0_c353;
    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn auth(folder: &std::path::Path) -> Auth {
        let key = config::Key {
            email: "user@example.com".into(),
            key_sha256: id::hex(&id::sha256(b"secret")),
            accounts: vec![id::show(ACCOUNT)],
            permission: Permission::Write,
        };
        let mut config = Config { data_dir: folder.into(), keys: vec![key], ..Config::default() };
        config.limits.auth_failures_per_minute = 5;
        Auth::new(&config)
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| ((*name).parse().unwrap(), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn keys_and_tokens_are_known_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let auth = auth(folder.path());
        let new = NewToken { accounts: vec![ACCOUNT], permission: Permission::Read };
        let token = tokens::create(folder.path(), &new).unwrap();
        let bearer = format!("Bearer {token}");
        let found = auth.identify(&headers(&[("authorization", &bearer)]), PEER).unwrap();
        assert_eq!(found.allows(ACCOUNT, Permission::Read), Ok(()));
        assert_eq!(found.allows(ACCOUNT, Permission::Write), Err(AuthError::ReadOnly));
        assert!(found.allows(1, Permission::Read).is_err());

        let key = [("x-auth-email", "user@example.com"), ("x-auth-key", "secret")];
        assert!(auth.identify(&headers(&key), PEER).unwrap().permission == Permission::Write);
        let both = [key[0], key[1], ("authorization", &*bearer)];
        assert!(auth.identify(&headers(&both), PEER).unwrap().permission == Permission::Read);

        let mut other = bearer.clone();
        other.pop();
        other.push(if bearer.ends_with('0') { '1' } else { '0' });
        for wrong in [
            vec![("authorization", &*other)],
            vec![("authorization", "Bearer x")],
            vec![("x-auth-email", "user@example.com"), ("x-auth-key", "Secret")],
            vec![("x-auth-email", "other@example.com"), ("x-auth-key", "secret")],
        ] {
            assert_eq!(auth.identify(&headers(&wrong), PEER), Err(AuthError::Wrong), "{wrong:?}");
        }
    }

    #[test]
    fn missing_and_malformed_credentials_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let auth = auth(folder.path());
        assert_eq!(auth.identify(&headers(&[]), PEER), Err(AuthError::Missing));
        let half = headers(&[("x-auth-key", "secret")]);
        assert_eq!(auth.identify(&half, PEER), Err(AuthError::Missing));
        for value in ["Bearer", "Bearer ", "Basic abc", "abc", "Bearer a b"] {
            let result = auth.identify(&headers(&[("authorization", value)]), PEER);
            assert_eq!(result, Err(AuthError::Malformed { header: "Authorization" }), "{value}");
        }
    }

    #[test]
    fn guessing_is_cut_off_even_when_the_last_guess_is_right() {
        let folder = tempfile::tempdir().unwrap();
        let auth = auth(folder.path());
        let wrong = headers(&[("authorization", "Bearer x")]);
        for _ in 0..5 {
            assert_eq!(auth.identify(&wrong, PEER), Err(AuthError::Wrong));
        }
        let right = [("x-auth-email", "user@example.com"), ("x-auth-key", "secret")];
        assert!(matches!(auth.identify(&headers(&right), PEER), Err(AuthError::Limited { .. })));
        let elsewhere = IpAddr::from([192, 0, 2, 1]);
        assert!(auth.identify(&headers(&right), elsewhere).is_ok());
    }
}
