//! The kernel's own word for what a driver can do: the generic netlink family `netdev`.

use std::{collections::HashMap, io};

use netlink_sys::protocols::NETLINK_GENERIC;
use serde::Serialize;

use super::netlink::{Netlink, attributes, push, u32_of, uint_of};

/// What a driver can do for XDP.
///
/// # Minimum kernel version
///
/// 6.3; `zc_max_segs` 6.6, VLAN tags 6.8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "the kernel's flags, under the kernel's names")]
pub struct XdpFeatures {
    /// Runs XDP programs in native mode.
    pub basic: bool,
    /// Can redirect from them, as `exclusive` does.
    pub redirect: bool,
    /// Takes frames that others redirect to it.
    pub ndo_xmit: bool,
    /// Lets `AF_XDP` sockets receive without a copy.
    pub zero_copy: bool,
    /// Gives programs frames that span buffers, so that jumbo frames arrive whole.
    pub rx_sg: bool,
    /// Buffers that a zero-copy frame may span.
    pub zc_max_segs: u32,
    /// Can tell when the NIC received a packet.
    pub rx_timestamp: bool,
    /// Can tell the NIC's hash of a packet.
    pub rx_hash: bool,
    /// Can tell the VLAN tag that the NIC took out of a packet.
    pub rx_vlan_tag: bool,
}

/// A driver's polling context, one per queue or pair of queues.
///
/// # Minimum kernel version
///
/// 6.8; its settings 6.13. A driver need not tell its interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Napi {
    pub(crate) irq: Option<u32>,
    pub(crate) defer_hard_irqs: Option<u64>,
    pub(crate) gro_flush_timeout: Option<u64>,
}

// https://github.com/torvalds/linux/blob/0137891e74576f77a7901718dc0ce08ca074ae74/include/uapi/linux/netdev.h
const CMD_DEV_GET: u8 = 1;
const CMD_NAPI_GET: u8 = 11;
const DEV_IFINDEX: u16 = 1;
const DEV_XDP_FEATURES: u16 = 3;
const DEV_XDP_ZC_MAX_SEGS: u16 = 4;
const DEV_XDP_RX_METADATA: u16 = 5;
const NAPI_IFINDEX: u16 = 1;
const NAPI_IRQ: u16 = 3;
const NAPI_DEFER_HARD_IRQS: u16 = 5;
const NAPI_GRO_FLUSH_TIMEOUT: u16 = 6;

/// `struct genlmsghdr`: command, version, two reserved bytes.
const HEADER: usize = 4;

/// A connection to the family.
#[derive(Debug)]
pub(super) struct Netdev {
    netlink: Netlink,
    family: u16,
}

impl Netdev {
    /// `None` where the kernel lacks the family.
    pub(super) fn open() -> io::Result<Option<Self>> {
        let mut netlink = Netlink::open(NETLINK_GENERIC)?;
        let mut request = vec![libc::CTRL_CMD_GETFAMILY as u8, 1, 0, 0];
        push(&mut request, libc::CTRL_ATTR_FAMILY_NAME as u16, b"netdev\0");
        let answer = match netlink.get(libc::GENL_ID_CTRL as u16, &request) {
            Ok(answer) => answer,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        };
        let family = attributes(answer.get(HEADER..).unwrap_or_default())
            .find(|(kind, _)| *kind == libc::CTRL_ATTR_FAMILY_ID as u16)
            .and_then(|(_, value)| value.first_chunk().copied())
            .map(u16::from_ne_bytes);
        Ok(family.map(|family| Self { netlink, family }))
    }

    /// The features of every interface, by index.
    pub(super) fn features(&mut self) -> io::Result<HashMap<u32, XdpFeatures>> {
        let request = [CMD_DEV_GET, 1, 0, 0];
        let features =
            self.netlink.dump(self.family, &request, |answer| features(answer.get(HEADER..)?))?;
        Ok(features.into_iter().collect())
    }

    /// The polling contexts of one interface; none when it is down.
    pub(super) fn napis(&mut self, index: u32) -> io::Result<Vec<Napi>> {
        let mut request = vec![CMD_NAPI_GET, 1, 0, 0];
        push(&mut request, NAPI_IFINDEX, &index.to_ne_bytes());
        self.netlink.dump(self.family, &request, |answer| napi(answer.get(HEADER..)?, index))
    }
}

fn features(body: &[u8]) -> Option<(u32, XdpFeatures)> {
    let mut index = None;
    let mut features = XdpFeatures::default();
    for (kind, value) in attributes(body) {
        let number = uint_of(value).unwrap_or(0);
        let bit = |bit: u32| number >> bit & 1 == 1;
        match kind {
            DEV_IFINDEX => index = u32_of(value),
            DEV_XDP_FEATURES => {
                features.basic = bit(0);
                features.redirect = bit(1);
                features.ndo_xmit = bit(2);
                features.zero_copy = bit(3);
                features.rx_sg = bit(5);
            }
            DEV_XDP_ZC_MAX_SEGS => features.zc_max_segs = number as u32,
            DEV_XDP_RX_METADATA => {
                features.rx_timestamp = bit(0);
                features.rx_hash = bit(1);
                features.rx_vlan_tag = bit(2);
            }
            _ => {}
        }
    }
    Some((index?, features))
}

fn napi(body: &[u8], index: u32) -> Option<Napi> {
    let mut found = None;
    let mut napi = Napi::default();
    for (kind, value) in attributes(body) {
        match kind {
            NAPI_IFINDEX => found = u32_of(value),
            NAPI_IRQ => napi.irq = u32_of(value),
            NAPI_DEFER_HARD_IRQS => napi.defer_hard_irqs = uint_of(value),
            NAPI_GRO_FLUSH_TIMEOUT => napi.gro_flush_timeout = uint_of(value),
            _ => {}
        }
    }
    (found == Some(index)).then_some(napi)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_the_bits_the_kernel_gives_them() {
        let mut body = Vec::new();
        push(&mut body, DEV_IFINDEX, &4_u32.to_ne_bytes());
        push(&mut body, DEV_XDP_FEATURES, &0b10_1011_u64.to_ne_bytes());
        push(&mut body, DEV_XDP_ZC_MAX_SEGS, &17_u32.to_ne_bytes());
        push(&mut body, DEV_XDP_RX_METADATA, &0b101_u64.to_ne_bytes());
        push(&mut body, 99, &[0xff; 16]);
        let expected = XdpFeatures {
            basic: true,
            redirect: true,
            ndo_xmit: false,
            zero_copy: true,
            rx_sg: true,
            zc_max_segs: 17,
            rx_timestamp: true,
            rx_hash: false,
            rx_vlan_tag: true,
        };
        assert_eq!(features(&body), Some((4, expected)));
        assert_eq!(features(&body[8..]), None);
    }

    #[test]
    fn a_napi_of_another_interface_is_not_taken() {
        let mut body = Vec::new();
        push(&mut body, NAPI_IFINDEX, &4_u32.to_ne_bytes());
        push(&mut body, NAPI_IRQ, &41_u32.to_ne_bytes());
        push(&mut body, NAPI_GRO_FLUSH_TIMEOUT, &200_000_u32.to_ne_bytes());
        let expected =
            Napi { irq: Some(41), defer_hard_irqs: None, gro_flush_timeout: Some(200_000) };
        assert_eq!(napi(&body, 4), Some(expected));
        assert_eq!(napi(&body, 5), None);
    }
}
