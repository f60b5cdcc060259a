//! What a job asks for, and the lookup tables that the kernel answers it with.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
    str::FromStr,
};

use capture_ebpf::{
    abi::{MAX_JOBS, MAX_SNAPLEN},
    classify::{Ports, RANGES, Ranges, Tables, dimension},
    parse::{Headers, Ipv6, Network},
};
use serde::Serialize;
use thiserror::Error;

/// A filter, or a part of one, that cannot be.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FilterError {
    /// Neither an address nor an address with a prefix length.
    #[error("`{0}` is not an IPv4 or IPv6 address, with or without /LENGTH")]
    Address(String),
    /// The prefix length is not a number in range.
    #[error("`{value}`: the prefix length must be a whole number from 0 to {limit}")]
    PrefixLength {
        /// What was given.
        value: String,
        /// 32 or 128.
        limit: u8,
    },
    /// Neither a known protocol name nor a number.
    #[error("`{0}` is not a protocol: give a number from 0 to 255 or one of {names}", names = protocol_names())]
    Protocol(String),
    /// No packet has a source of one family and a destination of the other.
    #[error(
        "source {src} and destination {dst} are of different address families: no packet has both"
    )]
    Families {
        /// The source asked for.
        src: Prefix,
        /// The destination asked for.
        dst: Prefix,
    },
    /// Ports asked of a protocol that has none.
    #[error("protocol {0} has no ports; those that do are tcp, udp, dccp, sctp and udplite")]
    NoPorts(Protocol),
}

/// An address with a prefix length; host bits are cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    /// The prefix of that length that `address` lies in; `None` when the family has no such length.
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(v4) => {
                let host = u32::MAX.checked_shr(length.into()).unwrap_or(0);
                (length <= 32).then(|| IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & !host)))
            }
            IpAddr::V6(v6) => {
                let host = u128::MAX.checked_shr(length.into()).unwrap_or(0);
                (length <= 128).then(|| IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !host)))
            }
        }?;
        Some(Self { address, length })
    }

    /// The lowest address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The prefix length, bits.
    pub fn length(&self) -> u8 {
        self.length
    }

    /// Whether it names one address only.
    pub fn is_host(&self) -> bool {
        self.length == if self.address.is_ipv4() { 32 } else { 128 }
    }

    /// Whether an address lies in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::new(address, self.length).is_some_and(|other| other == *self)
    }

    /// First and last IPv4 address.
    pub(crate) fn span4(&self) -> Option<(u32, u32)> {
        let IpAddr::V4(first) = self.address else { return None };
        let host = u32::MAX.checked_shr(self.length.into()).unwrap_or(0);
        Some((first.to_bits(), first.to_bits() | host))
    }

    /// First and last IPv6 address.
    pub(crate) fn span6(&self) -> Option<(u128, u128)> {
        let IpAddr::V6(first) = self.address else { return None };
        let host = u128::MAX.checked_shr(self.length.into()).unwrap_or(0);
        Some((first.to_bits(), first.to_bits() | host))
    }
}

impl FromStr for Prefix {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let Ok(address) = address.parse::<IpAddr>() else {
            return Err(FilterError::Address(text.into()));
        };
        let limit = if address.is_ipv4() { 32 } else { 128 };
        length
            .map_or(Some(limit), |length| length.parse().ok())
            .and_then(|length| Self::new(address, length))
            .ok_or_else(|| FilterError::PrefixLength { value: text.into(), limit })
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_host() {
            write!(f, "{}", self.address)
        } else {
            write!(f, "{}/{}", self.address, self.length)
        }
    }
}

/// An upper-layer protocol number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Protocol(pub u8);

const PROTOCOLS: [(&str, u8); 16] = [
    ("ah", 51),
    ("dccp", 33),
    ("eigrp", 88),
    ("esp", 50),
    ("gre", 47),
    ("icmp", 1),
    ("icmp6", 58),
    ("igmp", 2),
    ("ipip", 4),
    ("ipv6", 41),
    ("ospf", 89),
    ("sctp", 132),
    ("tcp", 6),
    ("udp", 17),
    ("udplite", 136),
    ("vrrp", 112),
];

fn protocol_names() -> String {
    PROTOCOLS.map(|(name, _)| name).join(", ")
}

impl Protocol {
    fn has_ports(self) -> bool {
        matches!(self.0, 6 | 17 | 33 | 132 | 136)
    }
}

impl FromStr for Protocol {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let lower = text.to_ascii_lowercase();
        PROTOCOLS
            .iter()
            .find(|(name, _)| *name == lower || (*name == "icmp6" && lower == "icmpv6"))
            .map(|(_, number)| *number)
            .or_else(|| text.parse().ok())
            .map(Self)
            .ok_or_else(|| FilterError::Protocol(text.into()))
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match PROTOCOLS.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Which packets a job wants: those that agree with every field that is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Filter {
    /// Source address or network.
    pub src: Option<Prefix>,
    /// Destination address or network.
    pub dst: Option<Prefix>,
    /// Source port.
    pub sport: Option<u16>,
    /// Destination port.
    pub dport: Option<u16>,
    /// Upper-layer protocol.
    pub protocol: Option<Protocol>,
}

impl Filter {
    /// Whether some packet can agree with all fields.
    pub fn check(&self) -> Result<(), FilterError> {
        if let (Some(src), Some(dst)) = (self.src, self.dst)
            && src.address.is_ipv4() != dst.address.is_ipv4()
        {
            return Err(FilterError::Families { src, dst });
        }
        if let Some(protocol) = self.protocol
            && !protocol.has_ports()
            && (self.sport.is_some() || self.dport.is_some())
        {
            return Err(FilterError::NoPorts(protocol));
        }
        Ok(())
    }

    /// Whether a packet with these headers agrees with all fields. What is unknown of it agrees with no
    /// field that is set.
    pub fn accepts(&self, headers: &Headers) -> bool {
        let (src, dst) = match headers.network {
            Network::Unknown => (None, None),
            Network::V4 { src, dst } => {
                let address = |bits| IpAddr::V4(Ipv4Addr::from_bits(bits));
                (Some(address(src)), Some(address(dst)))
            }
            Network::V6 { src, dst } => {
                let bits = |address: Ipv6| u128::from(address.high) << 64 | u128::from(address.low);
                let address = |one| IpAddr::V6(Ipv6Addr::from_bits(bits(one)));
                (Some(address(src)), Some(address(dst)))
            }
        };
        let within = |prefix: Option<Prefix>, address: Option<IpAddr>| {
            prefix.is_none_or(|prefix| address.is_some_and(|address| prefix.contains(address)))
        };
        let (sport, dport) = headers.ports.unzip();
        within(self.src, src)
            && within(self.dst, dst)
            && self.sport.is_none_or(|port| sport == Some(port))
            && self.dport.is_none_or(|port| dport == Some(port))
            && self.protocol.is_none_or(|Protocol(number)| headers.protocol == Some(number))
    }
}

/// In the language of libpcap filters, as `if_filter` has it; empty for a filter that accepts all.
impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut terms = Vec::new();
        for (side, prefix) in [("src", self.src), ("dst", self.dst)] {
            if let Some(prefix) = prefix {
                let kind = if prefix.is_host() { "host" } else { "net" };
                terms.push(format!("{side} {kind} {prefix}"));
            }
        }
        for (side, port) in [("src", self.sport), ("dst", self.dport)] {
            if let Some(port) = port {
                terms.push(format!("{side} port {port}"));
            }
        }
        if let Some(Protocol(number)) = self.protocol {
            let mut term = String::new();
            write!(term, "(ip proto {number} or ip6 proto {number})")?;
            terms.push(term);
        }
        f.write_str(&terms.join(" and "))
    }
}

/// Which way packets go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Received by the interface
    In,
    /// Sent by it
    Out,
    /// Either
    #[default]
    Both,
}

impl Direction {
    /// Whether received packets are wanted.
    pub fn inbound(self) -> bool {
        self != Self::Out
    }

    /// Whether sent packets are wanted.
    pub fn outbound(self) -> bool {
        self != Self::In
    }
}

/// What the kernel has to know of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Which packets match.
    pub filter: Filter,
    /// One in this many of them is a hit.
    pub sample: NonZeroU32,
    /// Which way they go.
    pub direction: Direction,
    /// Most bytes kept of a packet; 0 is all.
    pub snaplen: u32,
}

impl Rule {
    /// Every packet that the filter accepts is a hit, and whole.
    pub fn new(filter: Filter) -> Self {
        Self { filter, sample: NonZeroU32::MIN, direction: Direction::Both, snaplen: 0 }
    }

    /// Most bytes that the kernel is to copy.
    fn kept(&self) -> u32 {
        if self.snaplen == 0 { MAX_SNAPLEN } else { self.snaplen.min(MAX_SNAPLEN) }
    }

    /// A hit is a match whose random draw lies below this.
    fn threshold(&self) -> u64 {
        let n = u64::from(self.sample.get());
        ((1 << 32) + n / 2) / n
    }
}

/// The rules of an interface's jobs, by slot.
pub type Rules = [Option<Rule>; MAX_JOBS];

/// Slots of the rules for which `accepts` holds, as a set.
fn set_of(rules: &Rules, accepts: impl Fn(&Rule) -> bool) -> u64 {
    rules
        .iter()
        .enumerate()
        .filter_map(|(slot, rule)| rule.as_ref().filter(|rule| accepts(rule)).map(|_| 1 << slot))
        .sum()
}

/// Cuts a space into ranges at `cuts` and asks for the set of each range's first value.
fn ranges<K: Copy + Ord>(
    lowest: K,
    highest: K,
    cuts: impl Iterator<Item = K>,
    set: impl Fn(K) -> u64,
) -> Ranges<K> {
    let mut starts: Vec<K> = std::iter::once(lowest).chain(cuts).collect();
    starts.sort_unstable();
    starts.dedup();
    assert!(starts.len() <= RANGES, "64 prefixes make at most 129 ranges");
    let mut table = Ranges { start: [highest; RANGES], set: [0; RANGES] };
    for (at, start) in starts.iter().enumerate() {
        table.start[at] = *start;
        table.set[at] = set(*start);
    }
    let last = starts.len() - 1;
    for at in last + 1..RANGES {
        table.set[at] = table.set[last];
    }
    table
}

fn ranges4(rules: &Rules, side: impl Fn(&Filter) -> Option<Prefix>) -> Ranges<u32> {
    let span = |rule: &Rule| side(&rule.filter).and_then(|prefix| prefix.span4());
    let cuts = rules.iter().flatten().filter_map(span);
    let cuts = cuts.flat_map(|(first, last)| [Some(first), last.checked_add(1)]).flatten();
    ranges(0, u32::MAX, cuts, |value| {
        set_of(rules, |rule| match side(&rule.filter) {
            None => true,
            Some(_) => span(rule).is_some_and(|(first, last)| first <= value && value <= last),
        })
    })
}

fn ranges6(rules: &Rules, side: impl Fn(&Filter) -> Option<Prefix>) -> Ranges<Ipv6> {
    let span = |rule: &Rule| side(&rule.filter).and_then(|prefix| prefix.span6());
    let cuts = rules.iter().flatten().filter_map(span);
    let cuts = cuts.flat_map(|(first, last)| [Some(first), last.checked_add(1)]).flatten();
    let key = |bits: u128| Ipv6::from_octets(bits.to_be_bytes());
    let highest = key(u128::MAX);
    ranges(key(0), highest, cuts.map(key), |value| {
        let value = u128::from(value.high) << 64 | u128::from(value.low);
        set_of(rules, |rule| match side(&rule.filter) {
            None => true,
            Some(_) => span(rule).is_some_and(|(first, last)| first <= value && value <= last),
        })
    })
}

/// The tables that answer for these rules.
pub fn tables(rules: &Rules) -> Box<Tables> {
    let mut unconstrained = [0; dimension::COUNT];
    unconstrained[dimension::SRC] = set_of(rules, |rule| rule.filter.src.is_none());
    unconstrained[dimension::DST] = set_of(rules, |rule| rule.filter.dst.is_none());
    unconstrained[dimension::SPORT] = set_of(rules, |rule| rule.filter.sport.is_none());
    unconstrained[dimension::DPORT] = set_of(rules, |rule| rule.filter.dport.is_none());
    unconstrained[dimension::PROTOCOL] = set_of(rules, |rule| rule.filter.protocol.is_none());
    let all = set_of(rules, |_| true);
    let constrained = (0..dimension::COUNT)
        .filter(|dimension| unconstrained[*dimension] != all)
        .map(|dimension| 1 << dimension)
        .sum();

    let mut protocol = [unconstrained[dimension::PROTOCOL]; 256];
    for (slot, rule) in rules.iter().enumerate() {
        if let Some(Protocol(wanted)) = rule.as_ref().and_then(|rule| rule.filter.protocol) {
            protocol[usize::from(wanted)] |= 1 << slot;
        }
    }
    let cuts = rules.iter().flatten().filter_map(|rule| u32::try_from(rule.threshold()).ok());
    Box::new(Tables {
        constrained,
        sampled: set_of(rules, |rule| rule.sample.get() > 1),
        inbound: set_of(rules, |rule| rule.direction.inbound()),
        outbound: set_of(rules, |rule| rule.direction.outbound()),
        raw_ip: 0,
        unconstrained,
        protocol,
        src4: ranges4(rules, |filter| filter.src),
        dst4: ranges4(rules, |filter| filter.dst),
        src6: ranges6(rules, |filter| filter.src),
        dst6: ranges6(rules, |filter| filter.dst),
        draw: ranges(0, u32::MAX, cuts, |draw| {
            set_of(rules, |rule| u64::from(draw) < rule.threshold())
        }),
        snaplen: std::array::from_fn(|slot| rules[slot].as_ref().map_or(0, Rule::kept)),
    })
}

/// The port tables in host memory, for running the classifier without a kernel.
pub struct HostPorts {
    sports: Vec<u64>,
    dports: Vec<u64>,
}

impl HostPorts {
    /// The port tables of these rules.
    pub fn new(rules: &Rules) -> Self {
        let mut tables = Self { sports: vec![0; 65536], dports: vec![0; 65536] };
        for (slot, rule) in rules.iter().enumerate() {
            let Some(rule) = rule else { continue };
            if let Some(port) = rule.filter.sport {
                tables.sports[usize::from(port)] |= 1 << slot;
            }
            if let Some(port) = rule.filter.dport {
                tables.dports[usize::from(port)] |= 1 << slot;
            }
        }
        tables
    }
}

impl Ports for HostPorts {
    fn sport(&self, port: u16) -> u64 {
        self.sports[usize::from(port)]
    }

    fn dport(&self, port: u16) -> u64 {
        self.dports[usize::from(port)]
    }
}

#[cfg(test)]
mod tests {
    use capture_ebpf::classify::sample;
    use proptest::prelude::*;

    use super::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    #[test]
    fn prefixes_are_read_and_their_host_bits_cleared() {
        assert_eq!(prefix("10.1.2.3/8").to_string(), "10.0.0.0/8");
        assert_eq!(prefix("10.1.2.3").to_string(), "10.1.2.3");
        assert_eq!(prefix("0.0.0.0/0").to_string(), "0.0.0.0/0");
        assert_eq!(prefix("2001:db8::1/32").to_string(), "2001:db8::/32");
        assert_eq!(prefix("::1").to_string(), "::1");
    }

    #[test]
    fn what_is_wrong_with_a_prefix_is_said_with_its_limit() {
        let error = "10.0.0.0/33".parse::<Prefix>().unwrap_err().to_string();
        assert_eq!(error, "`10.0.0.0/33`: the prefix length must be a whole number from 0 to 32");
        let error = "::/x".parse::<Prefix>().unwrap_err().to_string();
        assert_eq!(error, "`::/x`: the prefix length must be a whole number from 0 to 128");
        assert!("10.0.0".parse::<Prefix>().is_err());
    }

    #[test]
    fn filters_that_no_packet_can_match_are_refused() {
        let families =
            Filter { src: Some(prefix("10.0.0.1")), dst: Some(prefix("::1")), ..Filter::default() };
        assert!(matches!(families.check(), Err(FilterError::Families { .. })));
        let ports = Filter { protocol: Some(Protocol(1)), dport: Some(80), ..Filter::default() };
        assert_eq!(ports.check(), Err(FilterError::NoPorts(Protocol(1))));
    }

    #[test]
    fn protocols_are_read_by_name_and_by_number() {
        assert_eq!("TCP".parse(), Ok(Protocol(6)));
        assert_eq!("47".parse(), Ok(Protocol(47)));
        assert!("256".parse::<Protocol>().is_err());
    }

    #[test]
    fn a_job_of_one_in_n_keeps_just_the_draws_below_its_threshold() {
        let mut rules: Rules = [None; MAX_JOBS];
        for (slot, n) in [1, 2, 10, 1000, u32::MAX].into_iter().enumerate() {
            let sample = NonZeroU32::new(n).unwrap();
            rules[slot] = Some(Rule { sample, ..Rule::new(Filter::default()) });
        }
        let tables = tables(&rules);
        for draw in [0, 1, 4_294_966, 4_294_967, 429_496_729, 429_496_730, 1 << 31, u32::MAX] {
            let want = set_of(&rules, |rule| u64::from(draw) < rule.threshold());
            assert_eq!(sample(&tables, 0b11111, || draw), want, "draw {draw}");
        }
    }

    #[test]
    fn a_protocol_is_answered_with_the_jobs_that_ask_for_it_or_for_none() {
        let mut rules: Rules = [None; MAX_JOBS];
        for (slot, number) in [(0, Some(6)), (1, None), (40, Some(6)), (63, Some(255))] {
            let protocol = number.map(Protocol);
            rules[slot] = Some(Rule::new(Filter { protocol, ..Filter::default() }));
        }
        let tables = tables(&rules);
        for (number, set) in tables.protocol.iter().enumerate() {
            let asked = match number {
                6 => 1 | 1 << 40,
                255 => 1 << 63,
                _ => 0,
            };
            assert_eq!(*set, 1 << 1 | asked, "protocol {number}");
        }
    }

    fn any_prefix4() -> impl Strategy<Value = Prefix> {
        // Few distinct high bits, so that prefixes nest and touch.
        (0u32..4, any::<u32>(), 0u8..=32).prop_map(|(top, low, length)| {
            let bits = top << 30 | (low & 0x8000_00ff);
            Prefix::new(IpAddr::V4(Ipv4Addr::from_bits(bits)), length).unwrap()
        })
    }

    fn any_prefix6() -> impl Strategy<Value = Prefix> {
        (0u128..4, any::<u128>(), 0u8..=128).prop_map(|(top, low, length)| {
            let bits = top << 126 | (low & 0x8000_0000_0000_0001_8000_0000_0000_00ff);
            Prefix::new(IpAddr::V6(Ipv6Addr::from_bits(bits)), length).unwrap()
        })
    }

    proptest! {
        #[test]
        fn ranges_answer_as_64_prefixes_compared_one_by_one(
            fours in prop::collection::vec(any_prefix4(), 64),
            sixes in prop::collection::vec(any_prefix6(), 64),
            probes in prop::collection::vec(any::<(u32, u128)>(), 32),
        ) {
            let rules = |prefixes: &[Prefix]| -> Rules {
                std::array::from_fn(|slot| {
                    Some(Rule::new(Filter { src: Some(prefixes[slot]), ..Filter::default() }))
                })
            };
            let four = tables(&rules(&fours));
            let edges = fours.iter().filter_map(Prefix::span4).flat_map(|(a, b)| {
                [a, b, a.wrapping_sub(1), b.wrapping_add(1)]
            });
            for value in edges.chain(probes.iter().map(|(four, _)| *four)) {
                let want: u64 = (0..64).filter(|slot| {
                    fours[*slot].span4().is_some_and(|(a, b)| a <= value && value <= b)
                }).map(|slot| 1 << slot).sum();
                prop_assert_eq!(four.src4.find(value), want);
            }
            let six = tables(&rules(&sixes));
            let edges = sixes.iter().filter_map(Prefix::span6).flat_map(|(a, b)| {
                [a, b, a.wrapping_sub(1), b.wrapping_add(1)]
            });
            for value in edges.chain(probes.iter().map(|(_, six)| *six)) {
                let want: u64 = (0..64).filter(|slot| {
                    sixes[*slot].span6().is_some_and(|(a, b)| a <= value && value <= b)
                }).map(|slot| 1 << slot).sum();
                prop_assert_eq!(six.src6.find(Ipv6::from_octets(value.to_be_bytes())), want);
            }
        }
    }
}
