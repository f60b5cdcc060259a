//! What the engine and the command line need to know of a network interface.
//!
//! Everything is asked of the kernel by netlink and ethtool, in the network namespace of the calling
//! thread. `/sys/class/net` is not: it shows the namespace of whoever mounted it.

mod netdev;
mod netlink;
mod rtnetlink;
mod survey;

use std::{collections::HashMap, fmt, io, net::IpAddr};

use netlink_sys::protocols::NETLINK_ROUTE;
use serde::{Serialize, Serializer};
use thiserror::Error;

use self::{netdev::Netdev, netlink::Netlink, survey::Survey};

pub(crate) use self::netdev::Napi;
pub use self::netdev::XdpFeatures;

/// The longest name that Linux lets an interface have, bytes.
pub const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// How many things of a kind an error or a reason names before it says "and N more".
const NAMED: usize = 8;

/// An interface could not be looked up.
#[derive(Debug, Error)]
pub enum NicError {
    /// No interface can have this name.
    #[error("`{name}` is no interface: it is {} bytes long, and a name has at most {MAX_NAME}", .name.len())]
    NameTooLong {
        /// The name asked for.
        name: String,
    },
    /// There is none of this name.
    #[error("no interface `{name}` in this network namespace, which has {}", and(.known))]
    NoSuchInterface {
        /// The name asked for.
        name: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// The kernel did not answer.
    #[error("asking the kernel for {what}")]
    Netlink {
        /// What it was asked for.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

/// An interface, as it was when it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not one state")]
pub struct Interface {
    /// Its name, which may change.
    pub name: String,
    /// Its index, which stays until it is deleted or moved to another network namespace.
    pub index: u32,
    /// The longest packet it sends, without the Ethernet header, bytes.
    pub mtu: u32,
    /// Switched on.
    pub up: bool,
    /// There is a link.
    pub carrier: bool,
    /// Takes frames that are addressed to others, as a mirror port must.
    pub promiscuous: bool,
    /// Its Ethernet address.
    #[serde(serialize_with = "serialize_mac")]
    pub mac: Option<[u8; 6]>,
    /// What its packets begin with.
    pub link_type: LinkType,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// A default route, IPv4 or IPv6, in any routing table, leaves through it.
    pub default_route: bool,
    /// The bridge, bond or other interface that it is a port of.
    pub master: Option<String>,
    /// The VLAN and macvlan interfaces on top of it, in this network namespace.
    pub uppers: Vec<String>,
    /// Its receive queues.
    pub rx_queues: u32,
    /// Its driver.
    pub driver: Option<String>,
    /// Where its device is on the bus; none for a virtual interface.
    pub bus: Option<String>,
    /// The speed of the link, Mb/s.
    pub speed: Option<u32>,
    /// The XDP program that it runs.
    pub xdp: Option<XdpHolder>,
    /// What its driver can do for XDP; `None` when this kernel (before 6.3) cannot say.
    pub features: Option<XdpFeatures>,
}

/// What the packets of an interface begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkType {
    /// An Ethernet header.
    Ethernet,
    /// An Ethernet header of zeros: the loopback interface.
    Loopback,
    /// An IP header: tunnels, `WireGuard`, PPP.
    RawIp,
    /// Something else, by its `ARPHRD_` number.
    Other(u16),
}

/// An address of an interface and the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address itself.
    pub ip: IpAddr,
    /// The length of the prefix, bits.
    pub prefix: u8,
}

/// The XDP program that an interface runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct XdpHolder {
    /// Where it runs.
    pub mode: XdpHook,
    /// The kernel's number for it.
    pub program_id: u32,
    /// Its name, where we may know it.
    pub program_name: Option<String>,
}

/// Where an interface runs an XDP program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum XdpHook {
    /// In the stack.
    Generic,
    /// In the driver.
    Native,
    /// On the NIC.
    Offload,
}

/// The interface of this name.
pub fn find(name: &str) -> Result<Interface, NicError> {
    if name.len() > MAX_NAME {
        return Err(NicError::NameTooLong { name: name.into() });
    }
    let mut netlink = open()?;
    let links = rtnetlink::links(&mut netlink).map_err(asking("interfaces"))?;
    let Some(link) = links.iter().find(|link| link.name == name) else {
        let known = links.into_iter().map(|link| link.name).collect();
        return Err(NicError::NoSuchInterface { name: name.into(), known });
    };
    Ok(Survey::take(&mut netlink, &links, Some(link.index))?.interface(link))
}

/// Every interface, in the order of their indexes.
pub fn list() -> Result<Vec<Interface>, NicError> {
    let mut netlink = open()?;
    let mut links = rtnetlink::links(&mut netlink).map_err(asking("interfaces"))?;
    links.sort_by_key(|link| link.index);
    let survey = Survey::take(&mut netlink, &links, None)?;
    Ok(links.iter().map(|link| survey.interface(link)).collect())
}

/// Whether this network namespace has an interface of this index. One system call.
pub fn exists(index: u32) -> bool {
    // nix 0.31 takes the null pointer that says "no" for an empty name.
    nix::net::if_::if_indextoname(index).is_ok_and(|name| !name.is_empty())
}

/// The XDP program that the interface of this index runs.
pub fn xdp_holder(index: u32) -> Result<Option<XdpHolder>, NicError> {
    let link = rtnetlink::link(&mut open()?, index).map_err(asking("an interface"))?;
    Ok(link.xdp.map(|holder| holder.named(&program_names())))
}

/// The polling contexts of an interface; none when it is down or the kernel (before 6.8) or the
/// driver does not tell.
pub(crate) fn napis(index: u32) -> Vec<Napi> {
    let napis = Netdev::open().and_then(|netdev| match netdev {
        Some(mut netdev) => netdev.napis(index),
        None => Ok(Vec::new()),
    });
    napis.unwrap_or_else(|error| {
        log::debug!("interface {index}: no list of NAPI contexts: {error}");
        Vec::new()
    })
}

impl Interface {
    /// Whether its packets begin with an Ethernet header.
    pub fn is_ethernet(&self) -> bool {
        matches!(self.link_type, LinkType::Ethernet | LinkType::Loopback)
    }

    /// Why `exclusive` on this interface would cut off the host, or something on it; `None` when it
    /// looks like a mirror port.
    ///
    /// What counts is an address, a default route, being a port of a bridge or bond, and VLAN or
    /// macvlan interfaces on top. An IPv6 link-local address alone does not: every interface that
    /// is up has one, a mirror port too. Users of the interface in other network namespaces (a
    /// container's macvlan) and programs that read it raw are not seen.
    pub fn exclusive_would_cut(&self) -> Option<String> {
        let addresses = self.addresses.iter().filter(|address| !address.is_ipv6_link_local());
        let mut carried: Vec<_> = addresses.map(Address::to_string).collect();
        if self.default_route {
            carried.insert(carried.len().min(NAMED - 1), "the default route".into());
        }
        carried.extend(self.uppers.iter().cloned());
        let name = &self.name;
        let use_of = match (&self.master, carried.is_empty()) {
            (None, true) => return None,
            (None, false) => format!("{name} carries {}", and(&carried)),
            (Some(master), true) => format!("{name} is a port of {master}"),
            (Some(master), false) => {
                format!("{name} is a port of {master} and carries {}", and(&carried))
            }
        };
        Some(format!(
            "{use_of}: `exclusive` takes every matching packet away from this host, which would cut \
             it off"
        ))
    }

    /// The largest MTU with which the driver runs an XDP program that wants each frame in one
    /// buffer, on machines with 4 KiB pages; `None` when it is not known.
    ///
    /// It limits drivers that do not have [`XdpFeatures::rx_sg`]: Tapline's own program takes
    /// frames that span buffers.
    pub fn single_buffer_mtu(&self) -> Option<u32> {
        // https://github.com/isovalent/ebpf-docs/blob/18ec5e9/docs/linux/program-type/BPF_PROG_TYPE_XDP.md
        Some(match self.driver.as_deref()? {
            "veth" => 3520,
            "virtio_net" => 3506,
            "ena" | "mlx5_core" => 3498,
            "ixgbe" => 3050,
            "i40e" | "ice" | "igb" => 3046,
            "gve" => 2032,
            "igc" | "tun" => 1500,
            _ => return None,
        })
    }
}

impl Address {
    /// Every interface that is up gives itself one of these.
    fn is_ipv6_link_local(&self) -> bool {
        matches!(self.ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for XdpHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Generic => "generic",
            Self::Native => "native",
            Self::Offload => "offload",
        })
    }
}

impl XdpHolder {
    fn named(self, names: &HashMap<u32, String>) -> Self {
        Self { program_name: names.get(&self.program_id).cloned(), ..self }
    }
}

impl fmt::Display for XdpHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, program_id, program_name } = self;
        match program_name {
            Some(name) => write!(f, "{name} (id {program_id}, {mode})"),
            None => write!(f, "id {program_id} ({mode})"),
        }
    }
}

impl LinkType {
    fn of(arphrd: u16) -> Self {
        // Not in the libc crate.
        const ARPHRD_RAWIP: u16 = 519;
        match arphrd {
            libc::ARPHRD_ETHER => Self::Ethernet,
            libc::ARPHRD_LOOPBACK => Self::Loopback,
            ARPHRD_RAWIP
            | libc::ARPHRD_NONE
            | libc::ARPHRD_PPP
            | libc::ARPHRD_SIT
            | libc::ARPHRD_TUNNEL
            | libc::ARPHRD_TUNNEL6 => Self::RawIp,
            other => Self::Other(other),
        }
    }
}

fn open() -> Result<Netlink, NicError> {
    Netlink::open(NETLINK_ROUTE).map_err(asking("a netlink socket"))
}

fn asking(what: &'static str) -> impl FnOnce(io::Error) -> NicError {
    move |source| NicError::Netlink { what, source }
}

/// The names of all loaded programs, by id; none without the privilege.
fn program_names() -> HashMap<u32, String> {
    let programs = aya::programs::loaded_programs().filter_map(|program| {
        program.inspect_err(|error| log::debug!("no name of a program: {error}")).ok()
    });
    programs
        .filter_map(|program| Some((program.id(), program.name_as_str()?.to_owned())))
        .filter(|(_, name)| !name.is_empty())
        .collect()
}

#[expect(clippy::ref_option, clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn serialize_mac<S: Serializer>(mac: &Option<[u8; 6]>, serializer: S) -> Result<S::Ok, S::Error> {
    mac.map(mac_text).serialize(serializer)
}

/// An Ethernet address as people and the kernel write it.
pub(crate) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// "a", "a and b", "a, b and c", "a, b and 17 more".
fn and(items: &[String]) -> String {
    let (named, more) = items.split_at(items.len().min(NAMED));
    let more = (!more.is_empty()).then(|| format!("{} more", more.len()));
    let words: Vec<_> = named.iter().map(String::as_str).chain(more.as_deref()).collect();
    match words.split_last() {
        None => "none".into(),
        Some((only, [])) => (*only).into(),
        Some((last, first)) => format!("{} and {last}", first.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK_LOCAL: &str = "fe80::1";

    fn interface(name: &str, addresses: &[(&str, u8)]) -> Interface {
        let address =
            |(ip, prefix): &(&str, u8)| Address { ip: ip.parse().unwrap(), prefix: *prefix };
        Interface {
            name: name.into(),
            index: 2,
            mtu: 1500,
            up: true,
            carrier: true,
            promiscuous: false,
            mac: Some([2, 0, 0, 0, 0, 0x1a]),
            link_type: LinkType::Ethernet,
            addresses: addresses.iter().map(address).collect(),
            default_route: false,
            master: None,
            uppers: Vec::new(),
            rx_queues: 4,
            driver: Some("ice".into()),
            bus: Some("0000:03:00.0".into()),
            speed: Some(25_000),
            xdp: None,
            features: None,
        }
    }

    #[test]
    fn a_mirror_port_may_be_taken() {
        assert_eq!(interface("eth1", &[]).exclusive_would_cut(), None);
        assert_eq!(interface("eth1", &[(LINK_LOCAL, 64)]).exclusive_would_cut(), None);
    }

    #[test]
    fn an_interface_in_use_is_not_taken_and_the_use_is_named() {
        let reason = |interface: &Interface| {
            let reason = interface.exclusive_would_cut().expect("refused");
            let (use_of, rest) = reason.split_once(": ").expect("what it is used for");
            assert_eq!(
                rest,
                "`exclusive` takes every matching packet away from this host, which would cut it off"
            );
            use_of.to_owned()
        };
        let mut eth0 = interface("eth0", &[(LINK_LOCAL, 64), ("192.0.2.10", 24)]);
        assert_eq!(reason(&eth0), "eth0 carries 192.0.2.10/24");
        eth0.default_route = true;
        assert_eq!(reason(&eth0), "eth0 carries 192.0.2.10/24 and the default route");
        eth0.uppers.push("eth0.100".into());
        assert_eq!(reason(&eth0), "eth0 carries 192.0.2.10/24, the default route and eth0.100");

        assert_eq!(
            reason(&interface("eth0", &[("169.254.1.1", 16)])),
            "eth0 carries 169.254.1.1/16"
        );
        assert_eq!(
            reason(&interface("eth0", &[("2001:db8::1", 64)])),
            "eth0 carries 2001:db8::1/64"
        );

        let mut port = interface("eth1", &[(LINK_LOCAL, 64)]);
        port.master = Some("bond0".into());
        assert_eq!(reason(&port), "eth1 is a port of bond0");
        port.default_route = true;
        assert_eq!(reason(&port), "eth1 is a port of bond0 and carries the default route");
    }

    #[test]
    fn a_reason_stays_short_and_still_names_the_default_route() {
        let addresses: Vec<_> = (0..40).map(|_| ("192.0.2.1", 32)).collect();
        let mut eth0 = interface("eth0", &addresses);
        eth0.default_route = true;
        let reason = eth0.exclusive_would_cut().expect("refused");
        assert!(reason.contains("the default route and 33 more: "), "{reason}");
    }

    #[test]
    fn json_has_addresses_as_people_write_them() {
        let mut eth0 = interface("eth0", &[("192.0.2.10", 24)]);
        eth0.link_type = LinkType::Other(24);
        let json = serde_json::to_value(&eth0).unwrap();
        assert_eq!(json["mac"], "02:00:00:00:00:1a");
        assert_eq!(json["addresses"][0], "192.0.2.10/24");
        assert_eq!(json["link_type"]["other"], 24);
        assert_eq!(json["features"], serde_json::Value::Null);
    }

    #[test]
    fn a_program_without_a_name_still_has_its_number() {
        let names = HashMap::from([(4, "filter".to_owned())]);
        let holder = |program_id| {
            let mode = XdpHook::Native;
            XdpHolder { mode, program_id, program_name: None }.named(&names).to_string()
        };
        assert_eq!(holder(4), "filter (id 4, native)");
        assert_eq!(holder(3), "id 3 (native)");
    }

    #[test]
    fn a_name_that_no_interface_has_is_an_error_that_says_so() {
        let error = find("a-name-of-16-byte").unwrap_err();
        assert_eq!(
            error.to_string(),
            "`a-name-of-16-byte` is no interface: it is 17 bytes long, and a name has at most 15"
        );
        let error = find("no/such").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("no interface `no/such` in this network namespace, which has "),
            "{error}"
        );
        let NicError::NoSuchInterface { known, .. } = error else { panic!("{error:?}") };
        assert!(known.contains(&"lo".into()), "{known:?}");
    }

    #[test]
    fn the_loopback_interface_is_found_and_in_use() {
        let lo = find("lo").unwrap();
        assert_eq!((lo.index, lo.link_type), (1, LinkType::Loopback));
        assert!(lo.rx_queues >= 1 && lo.mtu > 0);
        assert!(exists(lo.index) && !exists(u32::MAX));
        assert!(list().unwrap().iter().any(|interface| interface.name == "lo"));
        assert_eq!(xdp_holder(lo.index).unwrap(), lo.xdp);
    }
}
