//! What rtnetlink says of interfaces, addresses and routes.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::{
    Address, LinkType, XdpHolder, XdpHook,
    netlink::{Netlink, attributes, push, text_of, u32_of},
};

/// What the kernel says of an interface in one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) name: String,
    pub(super) index: u32,
    pub(super) kind: Option<String>,
    pub(super) framing: LinkType,
    pub(super) up: bool,
    pub(super) carrier: bool,
    pub(super) promiscuous: bool,
    pub(super) mtu: u32,
    pub(super) mac: Option<[u8; 6]>,
    pub(super) master: Option<u32>,
    /// The interface that this one lives on top of, or is otherwise related to.
    pub(super) lower: Option<u32>,
    pub(super) rx_queues: u32,
    /// Without the program's name.
    pub(super) xdp: Option<XdpHolder>,
}

impl Link {
    /// Reads `struct ifinfomsg` and its attributes.
    fn parse(body: &[u8]) -> Option<Self> {
        let (header, rest) = body.split_at_checked(16)?;
        let flags = u32_of(&header[8..])?;
        let mut link = Self {
            name: String::new(),
            index: u32_of(&header[4..])?,
            kind: None,
            framing: LinkType::of(u16::from_ne_bytes([header[2], header[3]])),
            up: flags & libc::IFF_UP as u32 != 0,
            carrier: false,
            promiscuous: false,
            mtu: 0,
            mac: None,
            master: None,
            lower: None,
            rx_queues: 1,
            xdp: None,
        };
        let mut lower_is_here = true;
        for (kind, value) in attributes(rest) {
            let number = u32_of(value);
            match kind {
                libc::IFLA_IFNAME => link.name = text_of(value),
                libc::IFLA_ADDRESS => link.mac = value.try_into().ok(),
                libc::IFLA_MTU => link.mtu = number.unwrap_or(0),
                libc::IFLA_LINK => link.lower = number,
                libc::IFLA_LINK_NETNSID => lower_is_here = false,
                libc::IFLA_MASTER => link.master = number,
                libc::IFLA_CARRIER => link.carrier = value.first() == Some(&1),
                libc::IFLA_PROMISCUITY => link.promiscuous = number != Some(0),
                libc::IFLA_NUM_RX_QUEUES => link.rx_queues = number.unwrap_or(1),
                libc::IFLA_LINKINFO => {
                    link.kind = attributes(value)
                        .find(|(kind, _)| *kind == libc::IFLA_INFO_KIND)
                        .map(|(_, value)| text_of(value));
                }
                libc::IFLA_XDP => link.xdp = xdp_holder(value),
                _ => {}
            }
        }
        // An index of another network namespace means nothing here.
        link.lower = link.lower.filter(|_| lower_is_here);
        Some(link)
    }

    /// The interface that this one lives on top of. For other kinds (a veth, a tunnel) the relation
    /// is another one.
    pub(super) fn upper_of(&self) -> Option<u32> {
        match self.kind.as_deref()? {
            "ipvlan" | "ipvtap" | "macvlan" | "macvtap" | "vlan" => self.lower,
            _ => None,
        }
    }
}

/// Reads `IFLA_XDP`. An interface may run one program of each mode; the first that a packet meets is
/// the one that counts.
///
/// <https://github.com/gregkh/linux/blob/v6.12.117/net/core/rtnetlink.c#L1642-L1684>
fn xdp_holder(value: &[u8]) -> Option<XdpHolder> {
    const DRV_PROG_ID: u16 = 5;
    const SKB_PROG_ID: u16 = 6;
    const HW_PROG_ID: u16 = 7;
    let program = |wanted, mode| {
        let (_, value) = attributes(value).find(|(kind, _)| *kind == wanted)?;
        Some(XdpHolder { mode, program_id: u32_of(value)?, program_name: None })
    };
    program(HW_PROG_ID, XdpHook::Offload)
        .or_else(|| program(DRV_PROG_ID, XdpHook::Native))
        .or_else(|| program(SKB_PROG_ID, XdpHook::Generic))
}

/// `struct ifinfomsg`, and the wish for no statistics.
fn link_request(index: u32) -> Vec<u8> {
    let mut request = vec![0; 16];
    request[4..8].copy_from_slice(&index.to_ne_bytes());
    push(&mut request, libc::IFLA_EXT_MASK, &libc::RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    request
}

/// Every interface.
pub(super) fn links(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    netlink.dump(libc::RTM_GETLINK, &link_request(0), Link::parse)
}

/// The interface of this index.
pub(super) fn link(netlink: &mut Netlink, index: u32) -> io::Result<Link> {
    let answer = netlink.get(libc::RTM_GETLINK, &link_request(index))?;
    Link::parse(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The addresses of every interface, by index.
pub(super) fn addresses(netlink: &mut Netlink) -> io::Result<HashMap<u32, Vec<Address>>> {
    let mut addresses: HashMap<_, Vec<_>> = HashMap::new();
    for (index, address) in netlink.dump(libc::RTM_GETADDR, &[0; 8], address)? {
        addresses.entry(index).or_default().push(address);
    }
    Ok(addresses)
}

/// The indexes of the interfaces that a default route leaves through. With `only`, routes of other
/// interfaces are not sent: a router may have a million.
pub(super) fn default_routes(netlink: &mut Netlink, only: Option<u32>) -> io::Result<HashSet<u32>> {
    let mut indexes = HashSet::new();
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        let mut request = vec![0; 12];
        request[0] = family;
        if let Some(index) = only {
            push(&mut request, libc::RTA_OIF, &index.to_ne_bytes());
        }
        let routes = netlink.dump(libc::RTM_GETROUTE, &request, default_route)?;
        indexes.extend(routes.into_iter().flatten());
    }
    Ok(indexes)
}

/// Reads `struct rtmsg` and its attributes: the interfaces of a default route, of which there are
/// several when it is multipath.
fn default_route(body: &[u8]) -> Option<Vec<u32>> {
    let (header, rest) = body.split_at_checked(12)?;
    let (destination_len, kind) = (header[1], header[7]);
    let cloned = u32_of(&header[8..])? & libc::RTM_F_CLONED != 0;
    if destination_len != 0 || kind != libc::RTN_UNICAST || cloned {
        return None;
    }
    let mut indexes = Vec::new();
    for (kind, value) in attributes(rest) {
        match kind {
            libc::RTA_OIF => indexes.extend(u32_of(value)),
            libc::RTA_MULTIPATH => {
                // A list of `struct rtnexthop`: its length in the first two bytes, the interface in
                // the last four of eight.
                let mut hops = value;
                while let Some(hop) = hops.first_chunk::<8>() {
                    indexes.extend(u32_of(&hop[4..]));
                    let length = usize::from(u16::from_ne_bytes([hop[0], hop[1]]));
                    let next = length.max(8).next_multiple_of(4);
                    hops = hops.get(next..).unwrap_or_default();
                }
            }
            _ => {}
        }
    }
    Some(indexes)
}

/// Reads `struct ifaddrmsg` and its attributes.
fn address(body: &[u8]) -> Option<(u32, Address)> {
    let header: [u8; 8] = *body.first_chunk()?;
    let [_, prefix, _, _, index @ ..] = header;
    // On a point-to-point link `IFA_ADDRESS` is the other end's.
    let value = |wanted| attributes(&body[8..]).find(|(kind, _)| *kind == wanted);
    let (_, value) = value(libc::IFA_LOCAL).or_else(|| value(libc::IFA_ADDRESS))?;
    let ip = match value.len() {
        4 => IpAddr::V4(Ipv4Addr::from(*value.first_chunk::<4>()?)),
        _ => IpAddr::V6(Ipv6Addr::from(*value.first_chunk::<16>()?)),
    };
    Some((u32::from_ne_bytes(index), Address { ip, prefix }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link_message(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = vec![0, 0];
        body.extend(libc::ARPHRD_ETHER.to_ne_bytes());
        body.extend(7_u32.to_ne_bytes());
        body.extend((libc::IFF_UP as u32).to_ne_bytes());
        body.extend([0; 4]);
        for (kind, value) in attributes {
            push(&mut body, *kind, value);
        }
        body
    }

    fn holder(mode: XdpHook, program_id: u32) -> XdpHolder {
        XdpHolder { mode, program_id, program_name: None }
    }

    fn nested(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (kind, value) in attributes {
            push(&mut body, *kind, value);
        }
        body
    }

    #[test]
    fn a_link_is_read_from_its_message() {
        let xdp = nested(&[(2, &[1]), (5, &42_u32.to_ne_bytes()), (4, &42_u32.to_ne_bytes())]);
        let info = nested(&[(libc::IFLA_INFO_KIND, b"vlan"), (2, b"data")]);
        let mut message = link_message(&[
            (libc::IFLA_IFNAME, b"eth0.100\0"),
            (libc::IFLA_MTU, &9000_u32.to_ne_bytes()),
            (libc::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1]),
            (libc::IFLA_LINK, &3_u32.to_ne_bytes()),
            (libc::IFLA_MASTER, &5_u32.to_ne_bytes()),
            (libc::IFLA_CARRIER, &[1]),
            (libc::IFLA_PROMISCUITY, &2_u32.to_ne_bytes()),
            (libc::IFLA_NUM_RX_QUEUES, &8_u32.to_ne_bytes()),
            (libc::IFLA_LINKINFO, &info),
            (libc::IFLA_XDP, &xdp),
            (0x3fff, b"of a kernel to come"),
        ]);
        let link = Link::parse(&message).unwrap();
        let expected = Link {
            name: "eth0.100".into(),
            index: 7,
            kind: Some("vlan".into()),
            framing: LinkType::Ethernet,
            up: true,
            carrier: true,
            promiscuous: true,
            mtu: 9000,
            mac: Some([2, 0, 0, 0, 0, 1]),
            master: Some(5),
            lower: Some(3),
            rx_queues: 8,
            xdp: Some(holder(XdpHook::Native, 42)),
        };
        assert_eq!(link, expected);
        assert_eq!(link.upper_of(), Some(3));
        assert_eq!(Link { kind: Some("veth".into()), ..link }.upper_of(), None);
        push(&mut message, libc::IFLA_LINK_NETNSID, &0_u32.to_ne_bytes());
        assert_eq!(Link::parse(&message).unwrap().upper_of(), None);
        assert_eq!(Link::parse(&message[..15]), None);
    }

    #[test]
    fn of_two_xdp_programs_the_first_in_the_way_counts() {
        assert_eq!(xdp_holder(&nested(&[(2, &[0])])), None);
        let both = nested(&[(6, &3_u32.to_ne_bytes()), (5, &4_u32.to_ne_bytes()), (2, &[4])]);
        assert_eq!(xdp_holder(&both), Some(holder(XdpHook::Native, 4)));
        assert_eq!(xdp_holder(&both[..8]), Some(holder(XdpHook::Generic, 3)));
    }

    #[test]
    fn a_point_to_point_address_is_our_end_of_it() {
        let mut body = vec![libc::AF_INET as u8, 32, 0, 0];
        body.extend(7_u32.to_ne_bytes());
        push(&mut body, libc::IFA_ADDRESS, &[192, 0, 2, 2]);
        let far = Address { ip: [192, 0, 2, 2].into(), prefix: 32 };
        assert_eq!(address(&body), Some((7, far)));
        push(&mut body, libc::IFA_LOCAL, &[192, 0, 2, 1]);
        let near = Address { ip: [192, 0, 2, 1].into(), prefix: 32 };
        assert_eq!(address(&body), Some((7, near)));
        assert_eq!(address(&body[..8]), None);
    }

    #[test]
    fn only_unicast_routes_to_everywhere_are_default_routes() {
        let route = |destination_len, kind, attributes: &[(u16, &[u8])]| {
            let mut body = vec![2, destination_len, 0, 0, 254, 3, 0, kind, 0, 0, 0, 0];
            body.extend(nested(attributes));
            body
        };
        let through = 7_u32.to_ne_bytes();
        let oif: &[(u16, &[u8])] = &[(libc::RTA_OIF, &through)];
        assert_eq!(default_route(&route(0, libc::RTN_UNICAST, oif)), Some(vec![7]));
        assert_eq!(default_route(&route(24, libc::RTN_UNICAST, oif)), None);
        assert_eq!(default_route(&route(0, libc::RTN_UNREACHABLE, oif)), None);

        let gateway = nested(&[(libc::RTA_GATEWAY, &[192, 0, 2, 1])]);
        let mut hops = Vec::new();
        for index in [3_u32, 9] {
            hops.extend((8 + gateway.len() as u16).to_ne_bytes());
            hops.extend([0, 0]);
            hops.extend(index.to_ne_bytes());
            hops.extend(&gateway);
        }
        let multipath = route(0, libc::RTN_UNICAST, &[(libc::RTA_MULTIPATH, &hops)]);
        assert_eq!(default_route(&multipath), Some(vec![3, 9]));
    }
}
