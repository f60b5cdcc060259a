//! The HTTP client of one destination: it reaches the hosts that it is for, and no other.
//!
//! - A request to another scheme, host or port fails before a name is looked up.
//! - Redirects are answers, not orders; proxies of the environment are not used.
//! - A name that leads to a link-local or metadata address leads nowhere; the name of a vendor does
//!   not lead to this host either. An operator can allow such an address by writing it down.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    },
};
use reqwest::{
    dns::{Addrs, Name, Resolve, Resolving},
    redirect::Policy,
};

/// For a connection to be made.
const CONNECT: Duration = Duration::from_secs(5);

/// For an answer, from the first byte of the request to the last of the answer: a part of an upload
/// has to be through by then.
const REQUEST: Duration = Duration::from_mins(2);

/// Where clouds keep the credentials of their machines, beside the link-local addresses.
const METADATA: [IpAddr; 3] = [
    // Amazon, IPv6
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    // Alibaba
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    // Oracle
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

/// A scheme, a host and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Origin {
    scheme: &'static str,
    host: String,
    port: u16,
}

impl Origin {
    /// Reads `http://HOST[:PORT]` or `https://…`, and nothing that has more to it.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let url = reqwest::Url::parse(text).ok()?;
        let scheme = match url.scheme() {
            "http" => "http",
            "https" => "https",
            _ => return None,
        };
        let bare = url.username().is_empty()
            && url.password().is_none()
            && matches!(url.path(), "" | "/")
            && url.query().is_none()
            && url.fragment().is_none()
            && !text.contains('@');
        let host = url.host_str().filter(|_| bare)?.to_owned();
        Some(Self { scheme, host, port: url.port_or_known_default()? })
    }

    pub(crate) fn authority(&self) -> String {
        let default = if self.scheme == "https" { 443 } else { 80 };
        if self.port == default {
            self.host.clone()
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    pub(super) fn is_plain(&self) -> bool {
        self.scheme == "http"
    }

    fn is_of(&self, uri: &http::Uri) -> bool {
        let default = if uri.scheme_str() == Some("https") { 443 } else { 80 };
        uri.scheme_str() == Some(self.scheme)
            && uri.host().is_some_and(|host| host.eq_ignore_ascii_case(&self.host))
            && uri.port_u16().unwrap_or(default) == self.port
            && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority())
    }
}

/// Makes clients that reach these hosts.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    allowed: Arc<[Origin]>,
    /// The operator wrote the host down: its name may lead to this host.
    own: bool,
    /// So may it to the metadata service.
    metadata: bool,
}

impl Connector {
    pub(super) fn new(allowed: Vec<Origin>, own: bool, metadata: bool) -> Self {
        Self { allowed: allowed.into(), own, metadata }
    }
}

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        // The first one is as good as any later one.
        drop(rustls::crypto::ring::default_provider().install_default());
        let plain = self.allowed.iter().any(Origin::is_plain);
        let client = reqwest::Client::builder()
            .user_agent(concat!("tapline/", env!("CARGO_PKG_VERSION")))
            .redirect(Policy::none())
            .referer(false)
            .no_proxy()
            .https_only(!plain)
            .http1_only()
            .connect_timeout(CONNECT)
            .timeout(REQUEST)
            .dns_resolver(Arc::new(Resolver { own: self.own, metadata: self.metadata }))
            .build()
            .map_err(|error| object_store::Error::Generic {
                store: "HTTP client",
                source: Box::new(error),
            })?;
        Ok(HttpClient::new(Guarded { allowed: Arc::clone(&self.allowed), client }))
    }
}

#[derive(Debug)]
struct Guarded {
    allowed: Arc<[Origin]>,
    client: reqwest::Client,
}

#[derive(Debug, thiserror::Error)]
#[error("requests to {0} are not allowed")]
struct Refused(String);

#[async_trait::async_trait]
impl HttpService for Guarded {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if !self.allowed.iter().any(|origin| origin.is_of(request.uri())) {
            let host = request.uri().host().unwrap_or_default().to_owned();
            return Err(HttpError::new(HttpErrorKind::Unknown, Refused(host)));
        }
        self.client.call(request).await
    }
}

struct Resolver {
    own: bool,
    metadata: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("{name} leads to no address that is allowed")]
struct NoAddress {
    name: String,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (own, metadata) = (self.own, self.metadata);
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let allowed: Vec<SocketAddr> =
                found.filter(|address| may_reach(address.ip(), own, metadata)).collect();
            if allowed.is_empty() {
                return Err(NoAddress { name: name.as_str().to_owned() }.into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

/// Whether a name may lead to this address.
fn may_reach(address: IpAddr, own: bool, metadata: bool) -> bool {
    let address = embedded(address);
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if metadata && link_local {
        return true;
    }
    let nowhere = address.is_unspecified()
        || address.is_multicast()
        || matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    !link_local && !nowhere && !METADATA.contains(&address) && (own || !address.is_loopback())
}

/// The IPv4 address that an IPv6 one stands for (RFC 4291, RFC 6052), or itself.
fn embedded(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => match v6.segments() {
            [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
                IpAddr::V4(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)))
            }
            _ => IpAddr::V6(v6),
        },
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_no_metadata_and_those_of_vendors_not_to_this_host() {
        for (address, own, metadata, may) in [
            ("52.216.0.1", false, false, true),
            ("10.0.0.1", false, false, true),
            ("127.0.0.1", false, false, false),
            ("::1", false, false, false),
            ("::ffff:127.0.0.1", false, false, false),
            ("127.0.0.1", true, false, true),
            ("169.254.169.254", true, false, false),
            ("::ffff:169.254.169.254", true, false, false),
            ("64:ff9b::a9fe:a9fe", true, false, false),
            ("169.254.169.254", false, true, true),
            ("fe80::1", true, false, false),
            ("fd00:ec2::254", true, false, false),
            ("100.100.100.200", true, false, false),
            ("0.0.0.0", true, true, false),
            ("255.255.255.255", true, true, false),
            ("ff02::1", true, true, false),
        ] {
            assert_eq!(may_reach(address.parse().unwrap(), own, metadata), may, "{address}");
        }
    }

    #[test]
    fn an_origin_is_a_scheme_a_host_and_a_port() {
        for (text, shown) in [
            ("https://Store.Example:443/", "https://store.example"),
            ("http://127.0.0.1:9000", "http://127.0.0.1:9000"),
            ("http://[::1]:9000", "http://[::1]:9000"),
        ] {
            let origin = Origin::parse(text).unwrap();
            assert_eq!(origin.to_string(), shown);
            assert!(origin.is_of(&format!("{shown}/bucket/key?x").parse().unwrap()));
        }
        for text in [
            "store.example",
            "ftp://store.example",
            "https://user@store.example",
            "https://@store.example",
            "https://store.example/path",
            "https://store.example?x",
            "https://store.example#x",
            "file:///etc",
        ] {
            assert_eq!(Origin::parse(text), None, "{text}");
        }
        let origin = Origin::parse("https://store.example").unwrap();
        for other in [
            "http://store.example/",
            "https://store.example:444/",
            "https://store.example.evil.example/",
            "https://evil.example/store.example",
            "https://store.example@evil.example/",
            "https://x@store.example/",
        ] {
            assert!(!origin.is_of(&other.parse().unwrap()), "{other}");
        }
    }
}
