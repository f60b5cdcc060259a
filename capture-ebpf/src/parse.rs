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

use core::mem::MaybeUninit;

/// Extension headers that are followed before the protocol counts as unknown. Real traffic has at
/// most three or four; a bound is what lets the verifier accept the loop.
pub const MAX_EXTENSIONS: usize = 8;

/// Where bytes are put that do not lie in one piece: room for the longest header, aligned so that its words
/// are, too, as the verifier asks of the stack.
pub type Scratch = MaybeUninit<[u64; 5]>;

/// Where the bytes of a frame are read from.
pub trait Buffer {
    /// The `N` bytes at `offset`, where they are or in `scratch`; `None` when the frame ends before. Not by
    /// value: of bytes that have been moved one by one, no word is read at once.
    fn load<'a, const N: usize>(
        &'a self,
        offset: usize,
        scratch: &'a mut Scratch,
    ) -> Option<&'a [u8; N]>;

    /// Whether the first VLAN tag is not among the bytes: the kernel keeps it beside an skb.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "a constant, but for an skb")]
    fn tag_aside(&self) -> bool {
        false
    }
}

impl Buffer for [u8] {
    #[inline]
    fn load<'a, const N: usize>(
        &'a self,
        offset: usize,
        _scratch: &'a mut Scratch,
    ) -> Option<&'a [u8; N]> {
        self.get(offset..)?.first_chunk()
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
    fn from_header(header: &[u8; 40], offset: usize) -> Self {
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

/// The same as plain numbers. The kernel programs work with these: a variant or an option has bytes that mean
/// nothing, which the compiler may keep without ever having set them, and the verifier refuses that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields {
    /// IP version: 4 or 6, and 0 where addresses are unknown.
    pub version: u32,
    /// IPv4 source address, host order.
    pub src4: u32,
    /// IPv4 destination address, host order.
    pub dst4: u32,
    /// IPv6 source address.
    pub src6: Ipv6,
    /// IPv6 destination address.
    pub dst6: Ipv6,
    /// Upper-layer protocol number, or [`NO_PROTOCOL`].
    pub protocol: u32,
    /// Source port, or [`NO_PORT`].
    pub sport: u32,
    /// Destination port, or [`NO_PORT`].
    pub dport: u32,
}

/// [`Fields::protocol`] of a packet whose protocol is unknown.
pub const NO_PROTOCOL: u32 = 1 << 8;

/// [`Fields::sport`] and [`Fields::dport`] of a packet whose ports are unknown.
pub const NO_PORT: u32 = 1 << 16;

impl Fields {
    const UNKNOWN: Self = Self {
        version: 0,
        src4: 0,
        dst4: 0,
        src6: Ipv6 { high: 0, low: 0 },
        dst6: Ipv6 { high: 0, low: 0 },
        protocol: NO_PROTOCOL,
        sport: NO_PORT,
        dport: NO_PORT,
    };
}

impl From<Fields> for Headers {
    fn from(fields: Fields) -> Self {
        let port = |port: u32| u16::try_from(port).ok();
        Self {
            network: match fields.version {
                4 => Network::V4 { src: fields.src4, dst: fields.dst4 },
                6 => Network::V6 { src: fields.src6, dst: fields.dst6 },
                _ => Network::Unknown,
            },
            protocol: u8::try_from(fields.protocol).ok(),
            ports: port(fields.sport).zip(port(fields.dport)),
        }
    }
}

impl From<Headers> for Fields {
    fn from(headers: Headers) -> Self {
        let (sport, dport) =
            headers.ports.map_or((NO_PORT, NO_PORT), |(sport, dport)| (sport.into(), dport.into()));
        let protocol = headers.protocol.map_or(NO_PROTOCOL, u32::from);
        let fields = Self { protocol, sport, dport, ..Self::UNKNOWN };
        match headers.network {
            Network::Unknown => fields,
            Network::V4 { src, dst } => Self { version: 4, src4: src, dst4: dst, ..fields },
            Network::V6 { src, dst } => Self { version: 6, src6: src, dst6: dst, ..fields },
        }
    }
}

const ETHERNET_LEN: usize = 14;
const VLAN_LEN: usize = 4;
const IPV6_LEN: usize = 40;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;

const fn is_vlan(ethertype: u16) -> bool {
    matches!(ethertype, 0x8100 | 0x88a8 | 0x9100)
}

const fn has_ports(protocol: u32) -> bool {
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

/// The `N` bytes at a constant offset of a header. They are always there, which the compiler sees; the
/// verifier refuses a program that could panic if they were not.
#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "constant offsets must stay constants in the kernel program"
)]
fn at<const N: usize>(header: &[u8], offset: usize) -> [u8; N] {
    header.get(offset..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "see `at`")]
fn be16(header: &[u8], offset: usize) -> u16 {
    u16::from_be_bytes(at(header, offset))
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "see `at`")]
fn be32(header: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(at(header, offset))
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "see `at`")]
fn be64(header: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(at(header, offset))
}

/// Reads the headers of an Ethernet frame.
pub fn ethernet<B: Buffer + ?Sized>(frame: &B) -> Headers {
    Fields::of_ethernet(frame).into()
}

/// Reads the headers of a packet without a link layer, as tunnels have them.
pub fn raw_ip<B: Buffer + ?Sized>(packet: &B) -> Headers {
    Fields::of_raw_ip(packet).into()
}

impl Fields {
    /// Reads the headers of an Ethernet frame.
    #[inline(always)]
    #[allow(
        clippy::inline_always,
        reason = "one program, no calls: the verifier follows it in one go"
    )]
    pub fn of_ethernet<B: Buffer + ?Sized>(frame: &B) -> Self {
        let mut fields = Self::UNKNOWN;
        let scratch = &mut Scratch::uninit();
        let Some(header) = frame.load::<ETHERNET_LEN>(0, scratch) else {
            return fields;
        };
        let mut ethertype = be16(header, 12);
        let mut offset = ETHERNET_LEN;
        if is_vlan(ethertype) {
            let Some(tag) = frame.load::<VLAN_LEN>(offset, scratch) else {
                return fields;
            };
            ethertype = be16(tag, 2);
            offset += VLAN_LEN;
            if is_vlan(ethertype) && !frame.tag_aside() {
                let Some(tag) = frame.load::<VLAN_LEN>(offset, scratch) else {
                    return fields;
                };
                ethertype = be16(tag, 2);
                offset += VLAN_LEN;
            }
        }
        match ethertype {
            ETHERTYPE_IPV4 => fields.add_ipv4(frame, offset, scratch),
            ETHERTYPE_IPV6 => fields.add_ipv6(frame, offset, scratch),
            _ => {}
        }
        fields
    }

    /// Reads the headers of a packet without a link layer.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "see `of_ethernet`")]
    pub fn of_raw_ip<B: Buffer + ?Sized>(packet: &B) -> Self {
        let mut fields = Self::UNKNOWN;
        let scratch = &mut Scratch::uninit();
        // Four bytes, not one: of "starts before the end" the verifier learns nothing.
        match packet.load::<4>(0, scratch).map(|[first, ..]| first >> 4) {
            Some(4) => fields.add_ipv4(packet, 0, scratch),
            Some(6) => fields.add_ipv6(packet, 0, scratch),
            _ => {}
        }
        fields
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "see `of_ethernet`")]
    fn add_ipv4<B: Buffer + ?Sized>(&mut self, frame: &B, offset: usize, scratch: &mut Scratch) {
        let Some(header) = frame.load::<20>(offset, scratch) else { return };
        let header_len = usize::from(header[0] & 0x0f) * 4;
        if header[0] >> 4 != 4 || header_len < 20 {
            return;
        }
        self.version = 4;
        self.src4 = be32(header, 12);
        self.dst4 = be32(header, 16);
        self.protocol = header[9].into();
        let fragment_offset = be16(header, 6) & 0x1fff;
        if fragment_offset == 0 {
            self.add_ports(frame, offset + header_len, scratch);
        }
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "see `of_ethernet`")]
    fn add_ipv6<B: Buffer + ?Sized>(&mut self, frame: &B, offset: usize, scratch: &mut Scratch) {
        let Some(header) = frame.load::<IPV6_LEN>(offset, scratch) else { return };
        if header[0] >> 4 != 6 {
            return;
        }
        self.version = 6;
        self.src6 = Ipv6::from_header(header, 8);
        self.dst6 = Ipv6::from_header(header, 24);
        let next = header[6];
        self.add_upper_layer(frame, next, offset + IPV6_LEN, scratch);
    }

    /// Follows the chain of extension headers to the protocol and, if it has any, its ports.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "see `of_ethernet`")]
    fn add_upper_layer<B: Buffer + ?Sized>(
        &mut self,
        frame: &B,
        mut next: u8,
        mut offset: usize,
        scratch: &mut Scratch,
    ) {
        for _ in 0..MAX_EXTENSIONS {
            if !is_extension(next) {
                break;
            }
            let Some(header) = frame.load::<4>(offset, scratch) else { return };
            if next == FRAGMENT {
                next = header[0];
                offset += 8;
                if be16(header, 2) >> 3 != 0 {
                    if !is_extension(next) {
                        self.protocol = next.into();
                    }
                    return;
                }
            } else {
                let unit = if next == AUTHENTICATION { 4 } else { 8 };
                next = header[0];
                offset += 8 + usize::from(header[1]) * unit;
            }
        }
        if !is_extension(next) {
            self.protocol = next.into();
            self.add_ports(frame, offset, scratch);
        }
    }

    /// Reads the ports at `offset`, if the protocol has any.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "see `of_ethernet`")]
    fn add_ports<B: Buffer + ?Sized>(&mut self, frame: &B, offset: usize, scratch: &mut Scratch) {
        if has_ports(self.protocol)
            && let Some(header) = frame.load::<4>(offset, scratch)
        {
            self.sport = be16(header, 0).into();
            self.dport = be16(header, 2).into();
        }
    }
}
