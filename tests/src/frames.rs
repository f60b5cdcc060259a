//! Frames, well-formed and not, built from the outside in: each layer writes its own number into the
//! layer before it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Where the number of the next layer goes.
#[derive(Clone, Copy, Debug)]
enum Next {
    Ethertype(usize),
    Protocol(usize),
}

/// Lengths and checksums that are filled in at the end.
#[derive(Clone, Copy, Debug)]
enum Fix {
    Ipv4(usize),
    Ipv6(usize),
    Udp(usize),
}

/// A frame being built.
#[derive(Clone, Debug)]
pub struct Frame {
    bytes: Vec<u8>,
    next: Next,
    fixes: Vec<Fix>,
}

/// TPID of a customer's VLAN tag.
pub const VLAN: u16 = 0x8100;
/// TPID of a provider's VLAN tag.
pub const QINQ: u16 = 0x88a8;
/// TPID of provider's tags before there was a standard.
pub const OLD_QINQ: u16 = 0x9100;

impl Default for Frame {
    fn default() -> Self {
        Self::new()
    }
}

impl Frame {
    /// An Ethernet header, with made-up local addresses.
    pub fn new() -> Self {
        let bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0, 0];
        Self { bytes, next: Next::Ethertype(12), fixes: Vec::new() }
    }

    fn number(&mut self, ethertype: u16, protocol: u8) {
        match self.next {
            Next::Ethertype(at) => {
                self.bytes[at..at + 2].copy_from_slice(&ethertype.to_be_bytes());
            }
            Next::Protocol(at) => self.bytes[at] = protocol,
        }
    }

    /// Anything else that has an Ethertype.
    #[must_use]
    pub fn ethertype(mut self, ethertype: u16, content: &[u8]) -> Self {
        self.number(ethertype, 0);
        self.payload(content)
    }

    /// A VLAN tag.
    #[must_use]
    pub fn vlan(mut self, tpid: u16) -> Self {
        self.number(tpid, 0);
        self.next = Next::Ethertype(self.bytes.len() + 2);
        self.bytes.extend([0x20, 7, 0, 0]);
        self
    }

    /// An IP header of the addresses' family.
    #[must_use]
    pub fn ip(self, src: IpAddr, dst: IpAddr) -> Self {
        match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.ipv4(src, dst),
            (IpAddr::V6(src), IpAddr::V6(dst)) => self.ipv6(src, dst),
            _ => panic!("{src} and {dst} are of different families"),
        }
    }

    /// An IPv4 header.
    #[must_use]
    pub fn ipv4(mut self, src: Ipv4Addr, dst: Ipv4Addr) -> Self {
        self.number(0x0800, 4);
        let at = self.bytes.len();
        self.bytes.extend([0x45, 0, 0, 0, 0, 0, 0, 0, 64, 0xfd, 0, 0]);
        self.bytes.extend(src.octets());
        self.bytes.extend(dst.octets());
        self.next = Next::Protocol(at + 9);
        self.fixes.push(Fix::Ipv4(at));
        self
    }

    fn last_ipv4(&self) -> usize {
        let last = self.fixes.iter().rev().find_map(|fix| match fix {
            Fix::Ipv4(at) => Some(*at),
            _ => None,
        });
        last.expect("an IPv4 header comes first")
    }

    /// Options of the IPv4 header just added, in words of four bytes.
    #[must_use]
    pub fn options(mut self, words: u8) -> Self {
        let at = self.last_ipv4();
        self.bytes[at] += words;
        // No-operation, which may be repeated.
        self.bytes.extend(std::iter::repeat_n(1, usize::from(words) * 4));
        self
    }

    /// Makes the last IPv4 header that of a fragment; `offset` is in units of eight bytes.
    #[must_use]
    pub fn fragment(mut self, offset: u16, more: bool) -> Self {
        let at = self.last_ipv4() + 6;
        let field = u16::from(more) << 13 | offset;
        self.bytes[at..at + 2].copy_from_slice(&field.to_be_bytes());
        self
    }

    /// An IPv6 header.
    #[must_use]
    pub fn ipv6(mut self, src: Ipv6Addr, dst: Ipv6Addr) -> Self {
        self.number(0x86dd, 41);
        let at = self.bytes.len();
        self.bytes.extend([0x60, 0, 0, 0, 0, 0, 0xfd, 64]);
        self.bytes.extend(src.octets());
        self.bytes.extend(dst.octets());
        self.next = Next::Protocol(at + 6);
        self.fixes.push(Fix::Ipv6(at));
        self
    }

    /// An IPv6 extension header of the common form, of `8 + 8 × extra` bytes.
    #[must_use]
    pub fn extension(mut self, kind: u8, extra: u8) -> Self {
        self.number(0, kind);
        let at = self.bytes.len();
        self.next = Next::Protocol(at);
        // Filled with one-byte pads: an option that may be repeated.
        self.bytes.extend([0xfd, extra]);
        self.bytes.resize(at + 8 + 8 * usize::from(extra), 0);
        self
    }

    /// An IPv6 fragment header; `offset` is in units of eight bytes.
    #[must_use]
    pub fn extension_fragment(mut self, offset: u16, more: bool) -> Self {
        self.number(0, 44);
        self.next = Next::Protocol(self.bytes.len());
        let field = (offset << 3 | u16::from(more)).to_be_bytes();
        self.bytes.extend([0xfd, 0, field[0], field[1], 0, 0, 0, 1]);
        self
    }

    /// An authentication header of `8 + 4 × extra` bytes, in IPv4 or IPv6.
    #[must_use]
    pub fn authentication(mut self, extra: u8) -> Self {
        self.number(0, 51);
        let at = self.bytes.len();
        self.next = Next::Protocol(at);
        self.bytes.extend([0xfd, extra]);
        self.bytes.resize(at + 8 + 4 * usize::from(extra), 0);
        self
    }

    /// An upper-layer header whose first four bytes are the ports, if it has any.
    #[must_use]
    pub fn upper(mut self, protocol: u8, sport: u16, dport: u16) -> Self {
        self.number(0, protocol);
        let at = self.bytes.len();
        let length = match protocol {
            6 => 20,
            33 | 132 => 12,
            _ => 8,
        };
        self.bytes.extend(sport.to_be_bytes());
        self.bytes.extend(dport.to_be_bytes());
        self.bytes.resize(at + length, 0);
        match protocol {
            // Data offset and ACK.
            6 => self.bytes[at + 12..at + 14].copy_from_slice(&[0x50, 0x10]),
            17 => self.fixes.push(Fix::Udp(at)),
            _ => {}
        }
        self
    }

    /// A TCP header.
    #[must_use]
    pub fn tcp(self, sport: u16, dport: u16) -> Self {
        self.upper(6, sport, dport)
    }

    /// A UDP header, without a checksum.
    #[must_use]
    pub fn udp(self, sport: u16, dport: u16) -> Self {
        self.upper(17, sport, dport)
    }

    /// A protocol that has no ports, with bytes that would be.
    #[must_use]
    pub fn protocol(mut self, protocol: u8, content: &[u8]) -> Self {
        self.number(0, protocol);
        self.payload(content)
    }

    /// Bytes.
    #[must_use]
    pub fn payload(mut self, content: &[u8]) -> Self {
        self.bytes.extend(content);
        self
    }

    /// Fills up to this length with a pattern that tells one place from another.
    #[must_use]
    pub fn fill(mut self, length: usize) -> Self {
        assert!(self.bytes.len() <= length, "the headers alone take {}", self.bytes.len());
        let from = self.bytes.len();
        self.bytes.extend((from..length).map(|at| (at ^ at >> 8) as u8));
        self
    }

    /// The frame as it is, with its lengths and checksums filled in.
    pub fn build(mut self) -> Vec<u8> {
        let end = self.bytes.len();
        for fix in &self.fixes {
            match *fix {
                Fix::Ipv4(at) => {
                    self.bytes[at + 2..at + 4].copy_from_slice(&((end - at) as u16).to_be_bytes());
                    let header = &self.bytes[at..at + usize::from(self.bytes[at] & 15) * 4];
                    let sum = checksum(header);
                    self.bytes[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
                }
                Fix::Ipv6(at) => {
                    let length = (end - at - 40) as u16;
                    self.bytes[at + 4..at + 6].copy_from_slice(&length.to_be_bytes());
                }
                Fix::Udp(at) => {
                    let length = (end - at) as u16;
                    self.bytes[at + 4..at + 6].copy_from_slice(&length.to_be_bytes());
                }
            }
        }
        self.bytes
    }

    /// The first bytes of the whole frame, as if the rest had been cut off on its way.
    pub fn cut(self, length: usize) -> Vec<u8> {
        let mut bytes = self.build();
        assert!(length < bytes.len(), "there is nothing to cut off at {length}");
        bytes.truncate(length);
        bytes
    }
}

/// The internet checksum of a header whose checksum field is zero.
fn checksum(header: &[u8]) -> u16 {
    let (pairs, _) = header.as_chunks::<2>();
    let mut sum: u32 = pairs.iter().map(|pair| u32::from(u16::from_be_bytes(*pair))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
