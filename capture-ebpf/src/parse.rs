//! From a frame to the fields that a filter can ask for.
//!
//! Understood: Ethernet; up to two VLAN tags (0x8100, 0x88a8, 0x9100); IPv4 with options; IPv6 with
//! up to [`MAX_EXTENSIONS`] extension headers; the ports of TCP, UDP, DCCP, SCTP and UDP-Lite.
//!
//! A field is known or it is not, and a filter that asks for an unknown field does not match:
//! - Addresses are known when the whole fixed IP header is there, with the right version and, for
//!   IPv4, a header length of at least 20 bytes.
//! - The protocol is the upper-layer one: for IPv6 what the chain of extension headers ends in. It is
//!   unknown when the chain is cut short, is longer than [`MAX_EXTENSIONS`], or goes on behind the
//!   header of a non-first fragment.
//! - Ports are known when the protocol has ports, the packet is not a non-first fragment, and the
//!   four bytes are there.

/// Extension headers that are followed before the protocol counts as unknown. Real traffic has at
/// most three or four; a bound is what lets the verifier accept the loop.
pub const MAX_EXTENSIONS: usize = 8;

/// Where the bytes of a frame are read from.
pub trait Buffer {
    /// The `N` bytes at `offset`, or `None` when the frame ends before.
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;

    /// Whether the first VLAN tag is not among the bytes: the kernel keeps it beside an skb.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "a constant, but for an skb")]
    fn tag_aside(&self) -> bool {
        false
    }
}

impl Buffer for [u8] {
    #[inline]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
    }
}

/// An IPv6 address as two words in host order, so that addresses compare as numbers do.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ipv6 {
    /// The first 64 bits.
    pub high: u64,
    /// The last 64 bits.
    pub low: u64,
}

impl Ipv6 {
    /// From the 16 bytes of an address at `offset` in an IPv6 header.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "a call would cost the kernel program a stack copy")]
    const fn from_header(header: &[u8; 40], offset: usize) -> Self {
        Self { high: be64(header, offset), low: be64(header, offset + 8) }
    }

    /// From the address's bytes in network order.
    pub const fn from_octets(octets: [u8; 16]) -> Self {
        let bits = u128::from_be_bytes(octets);
        Self { high: (bits >> 64) as u64, low: bits as u64 }
    }
}

/// The network layer's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Not IP, or not enough of it.
    Unknown,
    /// IPv4, host order.
    V4 {
        /// Source address.
        src: u32,
        /// Destination address.
        dst: u32,
    },
    /// IPv6.
    V6 {
        /// Source address.
        src: Ipv6,
        /// Destination address.
        dst: Ipv6,
    },
}

/// What a filter can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Addresses.
    pub network: Network,
    /// Upper-layer protocol number.
    pub protocol: Option<u8>,
    /// Source and destination port.
    pub ports: Option<(u16, u16)>,
}

impl Headers {
    const UNKNOWN: Self = Self { network: Network::Unknown, protocol: None, ports: None };
}

const ETHERNET_LEN: usize = 14;
const VLAN_LEN: usize = 4;
const IPV6_LEN: usize = 40;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;

const fn is_vlan(ethertype: u16) -> bool {
    matches!(ethertype, 0x8100 | 0x88a8 | 0x9100)
}

const fn has_ports(protocol: u8) -> bool {
    // TCP, UDP, DCCP, SCTP, UDP-Lite
    matches!(protocol, 6 | 17 | 33 | 132 | 136)
}

/// IPv6 extension headers of the common form: next header, length in 8-byte units less one.
/// Hop-by-hop, routing, destination options, mobility, HIP, Shim6.
const fn is_plain_extension(next: u8) -> bool {
    matches!(next, 0 | 43 | 60 | 135 | 139 | 140)
}

const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;

const fn is_extension(next: u8) -> bool {
    is_plain_extension(next) || next == FRAGMENT || next == AUTHENTICATION
}

#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "constant offsets must stay constants in the kernel program"
)]
const fn be16(bytes: &[u8], offset: usize) -> u16 {
    u16::from_be_bytes([bytes[offset], bytes[offset + 1]])
}

#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "constant offsets must stay constants in the kernel program"
)]
const fn be32(bytes: &[u8], offset: usize) -> u32 {
    (be16(bytes, offset) as u32) << 16 | be16(bytes, offset + 2) as u32
}

#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "constant offsets must stay constants in the kernel program"
)]
const fn be64(bytes: &[u8], offset: usize) -> u64 {
    (be32(bytes, offset) as u64) << 32 | be32(bytes, offset + 4) as u64
}

/// Reads the headers of an Ethernet frame.
#[inline(always)]
#[allow(clippy::inline_always, reason = "one program, no calls: the verifier follows it in one go")]
pub fn ethernet<B: Buffer + ?Sized>(frame: &B) -> Headers {
    let Some(header) = frame.load::<ETHERNET_LEN>(0) else {
        return Headers::UNKNOWN;
    };
    let mut ethertype = be16(&header, 12);
    let mut offset = ETHERNET_LEN;
    if is_vlan(ethertype) {
        let Some(tag) = frame.load::<VLAN_LEN>(offset) else {
            return Headers::UNKNOWN;
        };
        ethertype = be16(&tag, 2);
        offset += VLAN_LEN;
        if is_vlan(ethertype) && !frame.tag_aside() {
            let Some(tag) = frame.load::<VLAN_LEN>(offset) else {
                return Headers::UNKNOWN;
            };
            ethertype = be16(&tag, 2);
            offset += VLAN_LEN;
        }
    }
    match ethertype {
        ETHERTYPE_IPV4 => ipv4(frame, offset),
        ETHERTYPE_IPV6 => ipv6(frame, offset),
        _ => Headers::UNKNOWN,
    }
}

/// Reads the headers of a packet without a link layer, as tunnels have them.
#[inline(always)]
#[allow(clippy::inline_always, reason = "see `ethernet`")]
pub fn raw_ip<B: Buffer + ?Sized>(packet: &B) -> Headers {
    // Four bytes, not one: of "starts before the end" the verifier learns nothing.
    match packet.load::<4>(0) {
        Some([first, ..]) if first >> 4 == 4 => ipv4(packet, 0),
        Some([first, ..]) if first >> 4 == 6 => ipv6(packet, 0),
        _ => Headers::UNKNOWN,
    }
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "see `ethernet`")]
fn ipv4<B: Buffer + ?Sized>(frame: &B, offset: usize) -> Headers {
    let Some(header) = frame.load::<20>(offset) else {
        return Headers::UNKNOWN;
    };
    let header_len = usize::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || header_len < 20 {
        return Headers::UNKNOWN;
    }
    let protocol = header[9];
    let fragment_offset = be16(&header, 6) & 0x1fff;
    let ports =
        if fragment_offset == 0 { ports(frame, protocol, offset + header_len) } else { None };
    Headers {
        network: Network::V4 { src: be32(&header, 12), dst: be32(&header, 16) },
        protocol: Some(protocol),
        ports,
    }
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "see `ethernet`")]
fn ipv6<B: Buffer + ?Sized>(frame: &B, offset: usize) -> Headers {
    let Some(header) = frame.load::<IPV6_LEN>(offset) else {
        return Headers::UNKNOWN;
    };
    if header[0] >> 4 != 6 {
        return Headers::UNKNOWN;
    }
    let network =
        Network::V6 { src: Ipv6::from_header(&header, 8), dst: Ipv6::from_header(&header, 24) };
    let (protocol, ports) = upper_layer(frame, header[6], offset + IPV6_LEN);
    Headers { network, protocol, ports }
}

/// Follows the chain of extension headers to the protocol and, if it has any, its ports.
#[inline(always)]
#[allow(clippy::inline_always, reason = "see `ethernet`")]
fn upper_layer<B: Buffer + ?Sized>(
    frame: &B,
    mut next: u8,
    mut offset: usize,
) -> (Option<u8>, Option<(u16, u16)>) {
    for _ in 0..MAX_EXTENSIONS {
        if !is_extension(next) {
            break;
        }
        let Some(header) = frame.load::<4>(offset) else {
            return (None, None);
        };
        if next == FRAGMENT {
            next = header[0];
            offset += 8;
            if be16(&header, 2) >> 3 != 0 {
                return (if is_extension(next) { None } else { Some(next) }, None);
            }
        } else {
            let unit = if next == AUTHENTICATION { 4 } else { 8 };
            next = header[0];
            offset += 8 + usize::from(header[1]) * unit;
        }
    }
    if is_extension(next) {
        return (None, None);
    }
    (Some(next), ports(frame, next, offset))
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "see `ethernet`")]
fn ports<B: Buffer + ?Sized>(frame: &B, protocol: u8, offset: usize) -> Option<(u16, u16)> {
    if !has_ports(protocol) {
        return None;
    }
    let header = frame.load::<4>(offset)?;
    Some((be16(&header, 0), be16(&header, 2)))
}
