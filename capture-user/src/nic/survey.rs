//! Everything that there is to know of the interfaces, asked for at once.

use std::collections::{HashMap, HashSet};

use super::{
    Address, Interface, NicError, XdpFeatures, asking,
    netdev::Netdev,
    netlink::Netlink,
    program_names,
    rtnetlink::{self, Link},
};
use crate::ethtool;

/// What there is to know of the interfaces besides the links themselves.
#[derive(Debug)]
pub(super) struct Survey {
    names: HashMap<u32, String>,
    uppers: HashMap<u32, Vec<String>>,
    addresses: HashMap<u32, Vec<Address>>,
    default_routes: HashSet<u32>,
    features: Option<HashMap<u32, XdpFeatures>>,
    programs: HashMap<u32, String>,
}

impl Survey {
    /// Asks for all interfaces, or for what may be asked of one alone.
    pub(super) fn take(
        netlink: &mut Netlink,
        links: &[Link],
        only: Option<u32>,
    ) -> Result<Self, NicError> {
        // Only advice is lost without them.
        let features = Netdev::open()
            .and_then(|netdev| netdev.map(|mut netdev| netdev.features()).transpose())
            .inspect_err(|error| log::debug!("no XDP features: {error}"))
            .unwrap_or_default();
        let mut uppers: HashMap<_, Vec<_>> = HashMap::new();
        for link in links {
            if let Some(lower) = link.upper_of() {
                uppers.entry(lower).or_default().push(link.name.clone());
            }
        }
        let asked = |link: &Link| only.is_none_or(|index| index == link.index);
        let held = links.iter().any(|link| asked(link) && link.xdp.is_some());
        Ok(Self {
            names: links.iter().map(|link| (link.index, link.name.clone())).collect(),
            uppers,
            addresses: rtnetlink::addresses(netlink).map_err(asking("addresses"))?,
            default_routes: rtnetlink::default_routes(netlink, only).map_err(asking("routes"))?,
            features,
            programs: if held { program_names() } else { HashMap::new() },
        })
    }

    pub(super) fn interface(&self, link: &Link) -> Interface {
        let Link { ref name, index, .. } = *link;
        let driver = ethtool::driver(name).ok();
        let channels = ethtool::channels(name).ok().map(|channels| channels.rx);
        Interface {
            name: name.clone(),
            index,
            mtu: link.mtu,
            up: link.up,
            carrier: link.carrier,
            promiscuous: link.promiscuous,
            mac: link.mac,
            link_type: link.framing,
            addresses: self.addresses.get(&index).cloned().unwrap_or_default(),
            default_route: self.default_routes.contains(&index),
            master: link.master.and_then(|master| self.names.get(&master)).cloned(),
            uppers: self.uppers.get(&index).cloned().unwrap_or_default(),
            // Some virtual drivers answer 0.
            rx_queues: channels.filter(|queues| *queues > 0).unwrap_or(link.rx_queues),
            bus: driver.as_ref().map(|driver| driver.bus.clone()).filter(|bus| is_address(bus)),
            driver: driver.map(|driver| driver.name).or_else(|| link.kind.clone()),
            speed: ethtool::speed(name).ok().flatten(),
            xdp: link.xdp.clone().map(|holder| holder.named(&self.programs)),
            features: self
                .features
                .as_ref()
                .map(|features| features.get(&index).copied().unwrap_or_default()),
        }
    }
}

/// Whether a driver's word for its bus is one. Virtual drivers say nothing, or one of these.
fn is_address(bus: &str) -> bool {
    !matches!(bus, "" | "N/A" | "tap" | "tun")
}
