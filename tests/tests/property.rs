//! Random frames and filters, on which four answers agree: the classifier on the host, the kernel
//! program, libpcap's filter where its language can say what ours means, and what the frame was
//! built from where nothing happened to it since.

use std::{
    env,
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use capture_ebpf::{
    abi::MAX_JOBS,
    classify::classify,
    parse::{Headers, Ipv6, MAX_EXTENSIONS, Network, ethernet},
};
use capture_user::filter::{Filter, HostPorts, Prefix, Protocol, Rule, Rules, tables};
use fastrand::Rng;
use pcap::{BpfProgram, Capture, Dead, Linktype};
use tapline_tests::{
    frames::{Frame, OLD_QINQ, QINQ, VLAN},
    kernel::{Kernel, SHORTEST, run},
    privileged,
};

/// Sets of rules that are tried, unless `TAPLINE_RULE_SETS` says how many.
const RULE_SETS: usize = 4000;
/// Frames that each set is tried with.
const FRAMES: usize = 50;
/// Filters that the sets are drawn from: compiling one for libpcap costs more than running it.
const FILTERS: usize = 4000;

// Small pools, so that frames and filters meet. Neighbours, so that prefixes tell them apart.
const V4: [Ipv4Addr; 8] = [
    Ipv4Addr::new(10, 0, 0, 1),
    Ipv4Addr::new(10, 0, 0, 2),
    Ipv4Addr::new(10, 0, 0, 3),
    Ipv4Addr::new(10, 0, 1, 0),
    Ipv4Addr::new(10, 255, 255, 255),
    Ipv4Addr::new(192, 168, 0, 1),
    Ipv4Addr::UNSPECIFIED,
    Ipv4Addr::BROADCAST,
];
const V6: [Ipv6Addr; 8] = [
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2),
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0xffff, 0, 0, 1),
    Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0x0a00, 1),
    Ipv6Addr::UNSPECIFIED,
    Ipv6Addr::new(0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff, 0xffff),
];
const PORTS: [u16; 6] = [0, 53, 80, 443, 0x3500, 65535];
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];
const PROTOCOLS: [u8; 20] =
    [6, 6, 6, 17, 17, 17, 33, 132, 136, 1, 2, 4, 41, 47, 50, 58, 59, 0, 44, 51];
/// Every IPv6 extension header that is followed but the two below.
const EXTENSIONS: [u8; 6] = [0, 43, 60, 135, 139, 140];
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;

fn is_extension(number: u8) -> bool {
    EXTENSIONS.contains(&number) || number == FRAGMENT || number == AUTHENTICATION
}

pub(crate) fn pick<T: Copy>(rng: &mut Rng, pool: &[T]) -> T {
    pool[rng.usize(..pool.len())]
}

/// True this many times in a hundred.
fn chance(rng: &mut Rng, percent: u32) -> bool {
    rng.u32(..100) < percent
}

fn prefix(rng: &mut Rng, v4: bool) -> Prefix {
    let whole = chance(rng, 40);
    let (address, limit) =
        if v4 { (IpAddr::V4(pick(rng, &V4)), 32) } else { (IpAddr::V6(pick(rng, &V6)), 128) };
    let length = if whole { limit } else { rng.u8(..=limit) };
    Prefix::new(address, length).unwrap()
}

/// A filter of the pools' values.
pub(crate) fn filter(rng: &mut Rng) -> Filter {
    loop {
        let v4 = rng.bool();
        let filter = Filter {
            src: chance(rng, 35).then(|| prefix(rng, v4)),
            dst: chance(rng, 35).then(|| prefix(rng, v4)),
            sport: chance(rng, 25).then(|| pick(rng, &PORTS)),
            dport: chance(rng, 25).then(|| pick(rng, &PORTS)),
            protocol: chance(rng, 35).then(|| Protocol(pick(rng, &PROTOCOLS))),
        };
        if filter.check().is_ok() {
            return filter;
        }
    }
}

/// A frame, and what a parser must find in it if that is known without one.
pub(crate) struct Made {
    pub(crate) bytes: Vec<u8>,
    headers: Option<Headers>,
}

/// A frame of the pools' values, well-formed or not.
pub(crate) fn made(rng: &mut Rng) -> Made {
    if chance(rng, 3) {
        // The Ethertype leads on, and nothing behind it makes sense.
        let mut bytes: Vec<u8> = (0..rng.usize(..120)).map(|_| rng.u8(..)).collect();
        if bytes.len() >= SHORTEST {
            let ethertype = pick(rng, &[0x0800_u16, 0x86dd, VLAN, QINQ, 0x0806]);
            bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
        }
        return Made { bytes, headers: None };
    }
    let tags = pick(rng, &[0, 0, 0, 0, 0, 1, 1, 2, 2, 3]);
    let mut frame = Frame::new();
    for _ in 0..tags {
        frame = frame.vlan(pick(rng, &[VLAN, QINQ, OLD_QINQ]));
    }
    let mut headers = Headers { network: Network::Unknown, protocol: None, ports: None };
    frame = match rng.u32(..100) {
        0..45 => ipv4(rng, frame, &mut headers),
        45..95 => ipv6(rng, frame, &mut headers),
        _ => frame.ethertype(pick(rng, &[0x0806, 0x8847, 46, 0x88cc]), &[1; 46]),
    };
    if tags > 2 {
        headers = Headers { network: Network::Unknown, protocol: None, ports: None };
    }
    let payload = rng.usize(..40);
    frame = frame.payload(&vec![0x35; payload]);
    let mut bytes = frame.build();
    if chance(rng, 2) && bytes.len() < 9018 {
        // In several buffers.
        bytes.resize(rng.usize(bytes.len()..=9018), 0xee);
    }
    // Some of `PROTOCOLS` make an extension header of what was meant for the payload.
    let odd =
        matches!(headers.network, Network::V6 { .. }) && headers.protocol.is_some_and(is_extension);
    let mut headers = (!odd).then_some(headers);
    if chance(rng, 15) {
        bytes.truncate(rng.usize(..bytes.len()));
        headers = None;
    }
    if chance(rng, 10) && !bytes.is_empty() {
        for _ in 0..=rng.usize(..3) {
            let at = rng.usize(..bytes.len().min(100));
            bytes[at] = rng.u8(..);
        }
        headers = None;
    }
    Made { bytes, headers }
}

fn ipv4(rng: &mut Rng, frame: Frame, headers: &mut Headers) -> Frame {
    let (src, dst) = (pick(rng, &V4), pick(rng, &V4));
    headers.network = Network::V4 { src: src.to_bits(), dst: dst.to_bits() };
    let mut frame = frame.ipv4(src, dst);
    if chance(rng, 30) {
        frame = frame.options(rng.u8(1..=10));
    }
    let offset = if chance(rng, 15) { rng.u16(1..0x2000) } else { 0 };
    if offset != 0 || chance(rng, 10) {
        frame = frame.fragment(offset, rng.bool());
    }
    upper(rng, frame, headers, offset == 0)
}

fn ipv6(rng: &mut Rng, frame: Frame, headers: &mut Headers) -> Frame {
    let octets = |address: Ipv6Addr| Ipv6::from_octets(address.octets());
    let (src, dst) = (pick(rng, &V6), pick(rng, &V6));
    headers.network = Network::V6 { src: octets(src), dst: octets(dst) };
    let mut frame = frame.ipv6(src, dst);
    let count = pick(rng, &[0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 7, 8, 9, 10]);
    // Where the first fragment header with an offset is: there the fields end.
    let mut later = None;
    for at in 0..count {
        // In half of the chains, only what libpcap follows too.
        let kind = if rng.bool() {
            pick(rng, &[0, 43, 60, FRAGMENT, AUTHENTICATION])
        } else {
            pick(rng, &[0, 43, 60, 135, 139, 140, FRAGMENT, AUTHENTICATION])
        };
        frame = match kind {
            FRAGMENT => {
                let offset = if chance(rng, 25) { rng.u16(1..0x2000) } else { 0 };
                if offset != 0 {
                    later = later.or(Some(at));
                }
                frame.extension_fragment(offset, rng.bool())
            }
            AUTHENTICATION => frame.authentication(rng.u8(..6)),
            kind => frame.extension(kind, pick(rng, &[0, 0, 0, 1, 3])),
        };
    }
    let frame = upper(rng, frame, headers, later.is_none());
    if count > MAX_EXTENSIONS || later.is_some_and(|at| at + 1 != count) {
        headers.protocol = None;
        headers.ports = None;
    }
    frame
}

fn upper(rng: &mut Rng, frame: Frame, headers: &mut Headers, first: bool) -> Frame {
    let protocol = pick(rng, &PROTOCOLS);
    let ports = (pick(rng, &PORTS), pick(rng, &PORTS));
    headers.protocol = Some(protocol);
    headers.ports = (first && WITH_PORTS.contains(&protocol)).then_some(ports);
    frame.upper(protocol, ports.0, ports.1)
}

/// How far libpcap can follow a frame's IPv6 extension headers as our documentation says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chain {
    /// There are none.
    Absent,
    /// All the way, to the protocol.
    Followed,
    /// Not all the way: it does not know all kinds, does not count them, and reads on where we stop.
    Lost,
}

/// A walk of its own along the headers. If it is wrong, libpcap is asked something else than we are,
/// and disagrees.
pub(crate) fn chain(frame: &[u8]) -> Chain {
    let tpids = [VLAN, QINQ, OLD_QINQ];
    let word = |at: usize| frame.get(at..at + 2).map(|two| u16::from_be_bytes([two[0], two[1]]));
    let mut at = 12;
    while at < 20 && word(at).is_some_and(|ethertype| tpids.contains(&ethertype)) {
        at += 4;
    }
    if word(at) != Some(0x86dd) || frame.len() < at + 42 || !is_extension(frame[at + 8]) {
        return Chain::Absent;
    }
    let mut next = frame[at + 8];
    at += 42;
    for _ in 0..MAX_EXTENSIONS {
        let Some(header) = frame.get(at..at + 4) else { return Chain::Lost };
        match next {
            0 | 43 | 60 => at += 8 + 8 * usize::from(header[1]),
            // Behind it libpcap 1.10 goes on at the wrong place: it forgets where the header began.
            AUTHENTICATION if !is_extension(header[0]) => return Chain::Followed,
            // To libpcap its second byte is a length.
            FRAGMENT if header[1] == 0 => at += 8,
            _ => return Chain::Lost,
        }
        let later = next == FRAGMENT && u16::from_be_bytes([header[2], header[3]]) >> 3 != 0;
        next = header[0];
        if !is_extension(next) {
            return Chain::Followed;
        }
        if later {
            return Chain::Lost;
        }
    }
    Chain::Lost
}

/// One filter in libpcap's language: a program for each number of VLAN tags, since `vlan` moves the
/// offsets of whatever comes after it.
pub(crate) struct Oracle {
    v4: Vec<BpfProgram>,
    v6: Vec<BpfProgram>,
    /// The same for frames with extension headers; `None` where the language has no words for it.
    v6_chain: Option<Vec<BpfProgram>>,
    takes_any: bool,
    addresses_only: bool,
}

impl Oracle {
    pub(crate) fn new(pcap: &Capture<Dead>, filter: &Filter) -> Self {
        let compile = |expressions: Vec<String>| -> Vec<BpfProgram> {
            let programs = expressions.iter().map(|expression| {
                // Not optimized: the optimizer is no part of the language.
                let program = pcap.compile(expression, false);
                program.unwrap_or_else(|error| panic!("{expression}: {error}"))
            });
            programs.collect()
        };
        Self {
            v4: compile(expressions_v4(filter)),
            v6: compile(expressions_v6(filter, false)),
            v6_chain: can_say_with_chain(filter).then(|| compile(expressions_v6(filter, true))),
            takes_any: *filter == Filter::default(),
            addresses_only: [filter.sport, filter.dport] == [None; 2] && filter.protocol.is_none(),
        }
    }

    /// Whether libpcap accepts the frame; `None` when it cannot be asked.
    pub(crate) fn accepts(&self, frame: &[u8], chain: Chain) -> Option<bool> {
        let v6 = match chain {
            Chain::Absent => &self.v6,
            Chain::Followed => self.v6_chain.as_ref()?,
            // Addresses do not depend on the chain, and only they can be asked for here.
            Chain::Lost if self.addresses_only => &self.v6,
            Chain::Lost => return None,
        };
        let accepted =
            |programs: &[BpfProgram]| programs.iter().any(|program| program.filter(frame));
        Some(self.takes_any || accepted(&self.v4) || accepted(v6))
    }
}

fn can_say_with_chain(filter: &Filter) -> bool {
    filter.sport.is_none()
        && filter.dport.is_none()
        && !filter.protocol.is_some_and(|Protocol(number)| is_extension(number))
}

/// Whether packets of a family can match at all.
fn has_family(filter: &Filter, v4: bool) -> bool {
    [filter.src, filter.dst].iter().flatten().all(|prefix| prefix.address().is_ipv4() == v4)
}

fn addresses(filter: &Filter, family: &str) -> String {
    let mut expression = String::new();
    for (side, prefix) in [("src", filter.src), ("dst", filter.dst)] {
        let Some(prefix) = prefix else { continue };
        let kind = if prefix.is_host() { "host" } else { "net" };
        // libpcap takes 0.0.0.0/0 without its length for a host.
        let text = format!("{}/{}", prefix.address(), prefix.length());
        let text = if prefix.is_host() { prefix.address().to_string() } else { text };
        write!(expression, " and {family} {side} {kind} {text}").unwrap();
    }
    expression
}

/// What our documentation says of IPv4: the whole fixed header is there, of the right version and
/// length; ports are known in a first fragment that has all four of their bytes.
fn expressions_v4(filter: &Filter) -> Vec<String> {
    if !has_family(filter, true) || *filter == Filter::default() {
        return Vec::new();
    }
    let expression = |tags: usize| {
        let at = 14 + 4 * tags;
        let mut text = "vlan and ".repeat(tags);
        write!(text, "ip and len >= {} and ip[0] & 0xf0 = 0x40 and ip[0] & 0xf >= 5", at + 20)
            .unwrap();
        text += &addresses(filter, "ip");
        if let Some(Protocol(number)) = filter.protocol {
            write!(text, " and ip proto {number}").unwrap();
        }
        if filter.sport.is_some() || filter.dport.is_some() {
            write!(text, " and ip[6:2] & 0x1fff = 0 and len >= ((ip[0] & 0xf) << 2) + {}", at + 4)
                .unwrap();
        }
        for (side, port, offset) in [("src", filter.sport, 0), ("dst", filter.dport, 2)] {
            let Some(port) = port else { continue };
            // `port` means TCP, UDP and SCTP; the other two have to be spelled out.
            write!(
                text,
                " and ({side} port {port} or ((ip proto 33 or ip proto 136) and \
                 ip[((ip[0] & 0xf) << 2) + {offset}:2] = {port}))"
            )
            .unwrap();
        }
        text
    };
    (0..=2).map(expression).collect()
}

/// The same of IPv6. `protochain` follows extension headers; nothing finds the ports behind them.
fn expressions_v6(filter: &Filter, chain: bool) -> Vec<String> {
    if !has_family(filter, false) || *filter == Filter::default() {
        return Vec::new();
    }
    let expression = |tags: usize| {
        let at = 14 + 4 * tags;
        let mut text = "vlan and ".repeat(tags);
        write!(text, "ip6 and len >= {} and ip6[0] & 0xf0 = 0x60", at + 40).unwrap();
        text += &addresses(filter, "ip6");
        if let Some(Protocol(number)) = filter.protocol {
            let word = if chain { "protochain" } else { "proto" };
            write!(text, " and ip6 {word} {number}").unwrap();
        }
        if filter.sport.is_some() || filter.dport.is_some() {
            write!(text, " and len >= {}", at + 44).unwrap();
        }
        for (side, port, offset) in [("src", filter.sport, 40), ("dst", filter.dport, 42)] {
            let Some(port) = port else { continue };
            write!(
                text,
                " and ({side} port {port} or \
                 ((ip6[6] = 33 or ip6[6] = 136) and ip6[{offset}:2] = {port}))"
            )
            .unwrap();
        }
        text
    };
    (0..=2).map(expression).collect()
}

/// What a filter means, one field after the other.
fn matches(filter: &Filter, headers: &Headers) -> bool {
    let inside = |prefix: Prefix, pick: fn(u32, u32) -> u32, pick6: fn(Ipv6, Ipv6) -> Ipv6| {
        let address = match headers.network {
            Network::Unknown => return false,
            Network::V4 { src, dst } => IpAddr::V4(Ipv4Addr::from_bits(pick(src, dst))),
            Network::V6 { src, dst } => {
                let Ipv6 { high, low } = pick6(src, dst);
                IpAddr::V6(Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low)))
            }
        };
        Prefix::new(address, prefix.length()) == Some(prefix)
    };
    filter.src.is_none_or(|prefix| inside(prefix, |src, _| src, |src, _| src))
        && filter.dst.is_none_or(|prefix| inside(prefix, |_, dst| dst, |_, dst| dst))
        && filter.sport.is_none_or(|port| headers.ports.is_some_and(|(sport, _)| sport == port))
        && filter.dport.is_none_or(|port| headers.ports.is_some_and(|(_, dport)| dport == port))
        && filter.protocol.is_none_or(|Protocol(number)| headers.protocol == Some(number))
}

#[derive(Debug, Default)]
struct Counts {
    frames: u64,
    /// Of them, those too short for the kernel.
    runts: u64,
    pairs: u64,
    matches: u64,
    kernel_pairs: u64,
    libpcap_pairs: u64,
    libpcap_matches: u64,
    /// Pairs that libpcap's language has no words for.
    libpcap_skipped: u64,
    built_pairs: u64,
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

#[test]
fn host_kernel_and_libpcap_agree_on_random_frames_and_filters() {
    privileged!();
    let seed =
        env::var("TAPLINE_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("TAPLINE_SEED={seed} repeats this run");
    let sets = env::var("TAPLINE_RULE_SETS").map_or(RULE_SETS, |sets| sets.parse().unwrap());
    let rng = &mut Rng::with_seed(seed);

    let pcap = Capture::dead(Linktype::ETHERNET).unwrap();
    let filters: Vec<_> = (0..FILTERS)
        .map(|_| {
            let filter = filter(rng);
            let oracle = Oracle::new(&pcap, &filter);
            (filter, oracle)
        })
        .collect();
    let mut kernel = Kernel::load();
    let mut counts = Counts::default();
    let mut frames_run = 0;
    for _ in 0..sets {
        let size = pick(rng, &[1, 2, 8, 63, 64]);
        let mut chosen: [Option<usize>; MAX_JOBS] = [None; MAX_JOBS];
        for _ in 0..size {
            chosen[rng.usize(..MAX_JOBS)] = Some(rng.usize(..FILTERS));
        }
        let rules: Rules = chosen.map(|chosen| chosen.map(|at| Rule::new(filters[at].0)));
        let active =
            (0..MAX_JOBS).filter(|slot| rules[*slot].is_some()).map(|slot| 1 << slot).sum();
        let (tables, ports) = (tables(&rules), HostPorts::new(&rules));
        kernel.set_rules(&rules);
        for _ in 0..FRAMES {
            let Made { bytes, headers: built } = made(rng);
            let parsed = ethernet(bytes.as_slice());
            let host = classify(&parsed.into(), &tables, &ports, active);
            counts.frames += 1;
            counts.pairs += u64::from(u64::count_ones(active));
            counts.matches += u64::from(host.count_ones());

            if let Some(built) = built {
                assert_eq!(parsed, built, "seed {seed}, frame {}", hex(&bytes));
                counts.built_pairs += u64::from(u64::count_ones(active));
            }
            if bytes.len() < SHORTEST {
                counts.runts += 1;
            } else {
                let verdict = run(kernel.program(), &bytes);
                assert_eq!(verdict.jobs(), host, "seed {seed}, {rules:?}, frame {}", hex(&bytes));
                assert_eq!(verdict.header.is_some(), host != 0, "seed {seed}");
                assert_eq!(verdict.frame, bytes, "seed {seed}: the frame itself is left alone");
                frames_run += 1;
                counts.kernel_pairs += u64::from(u64::count_ones(active));
            }
            let chain = chain(&bytes);
            for (slot, chosen) in chosen.iter().enumerate() {
                let Some(chosen) = chosen else { continue };
                let (filter, oracle) = &filters[*chosen];
                let accepted = host >> slot & 1 != 0;
                let context =
                    || format!("seed {seed}, {filter:?}, {chain:?}, frame {}", hex(&bytes));
                assert_eq!(accepted, matches(filter, &parsed), "{}", context());
                let Some(libpcap) = oracle.accepts(&bytes, chain) else {
                    counts.libpcap_skipped += 1;
                    continue;
                };
                counts.libpcap_pairs += 1;
                counts.libpcap_matches += u64::from(libpcap);
                assert_eq!(accepted, libpcap, "libpcap: {}", context());
            }
        }
    }
    println!("{counts:#?}");

    assert!(counts.pairs >= 100_000);
    assert!(counts.libpcap_pairs >= 100_000 && counts.kernel_pairs >= 100_000);
    assert!(counts.libpcap_matches * 50 > counts.libpcap_pairs, "matches are frequent enough");
    assert!(counts.libpcap_skipped * 4 < counts.pairs, "libpcap is asked most of the time");
    let mut packets = 0;
    for cpu in kernel.counters() {
        assert_eq!(cpu.packets, cpu.outcomes.iter().sum::<u64>());
        packets += cpu.packets;
    }
    assert_eq!(packets, frames_run);
}
