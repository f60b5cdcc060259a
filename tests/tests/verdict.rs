//! What the kernel program does with a frame, through `BPF_PROG_TEST_RUN`: named frames times
//! filters, and what is counted.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
    os::fd::AsRawFd as _,
    time::Duration,
};

use capture_ebpf::{
    CAPTURE,
    abi::{Counters, DIRECTION_IN, MAX_JOBS, Outcome},
};
use capture_user::{
    filter::{Filter, Prefix, Protocol, Rule},
    program::Program,
};
use nix::time::{ClockId, clock_gettime};
use rustix::net::{AddressFamily, SocketType, socket};
use tapline_tests::{
    frames::{Frame, OLD_QINQ, QINQ, VLAN},
    kernel::{Action, SHORTEST, repeat, rings, run},
    privileged,
};

const SRC4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const DST4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const SRC6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 1);
const DST6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 2, 0, 0, 0, 2);
const SPORT: u16 = 1000;
const DPORT: u16 = 53;

/// The jobs of the table, by name.
pub(crate) fn filters() -> Vec<(&'static str, Filter)> {
    let any = Filter::default();
    let prefix = |text: &str| Some(text.parse::<Prefix>().unwrap());
    let protocol = |number| Some(Protocol(number));
    let src4 = Filter { src: prefix("10.0.0.1"), ..any };
    let src6 = Filter { src: prefix("2001:db8:0:1::1"), ..any };
    vec![
        ("any", any),
        ("v4", Filter { src: prefix("0.0.0.0/0"), ..any }),
        ("src4", src4),
        ("src4 net", Filter { src: prefix("10.0.0.0/24"), ..any }),
        ("dst4", Filter { dst: prefix("10.0.0.2"), ..any }),
        ("dst4 net", Filter { dst: prefix("10.0.0.0/8"), ..any }),
        ("src4 dst4", Filter { dst: prefix("10.0.0.2"), ..src4 }),
        ("src4 dport", Filter { dport: Some(DPORT), ..src4 }),
        ("src4 tcp", Filter { protocol: protocol(6), ..src4 }),
        ("src4 udp", Filter { protocol: protocol(17), ..src4 }),
        ("v6", Filter { dst: prefix("::/0"), ..any }),
        ("src6", src6),
        ("src6 net", Filter { src: prefix("2001:db8:0:1::/64"), ..any }),
        ("dst6", Filter { dst: prefix("2001:db8:0:2::2"), ..any }),
        ("dst6 net", Filter { dst: prefix("2001:db8::/32"), ..any }),
        ("src6 dst6", Filter { dst: prefix("2001:db8:0:2::2"), ..src6 }),
        ("src6 dport", Filter { dport: Some(DPORT), ..src6 }),
        ("src6 tcp", Filter { protocol: protocol(6), ..src6 }),
        ("src6 udp", Filter { protocol: protocol(17), ..src6 }),
        ("sport", Filter { sport: Some(SPORT), ..any }),
        ("dport", Filter { dport: Some(DPORT), ..any }),
        ("sport dport", Filter { sport: Some(SPORT), dport: Some(DPORT), ..any }),
        ("tcp", Filter { protocol: protocol(6), ..any }),
        ("udp", Filter { protocol: protocol(17), ..any }),
        ("udp dport", Filter { dport: Some(DPORT), protocol: protocol(17), ..any }),
        ("dccp", Filter { protocol: protocol(33), ..any }),
        ("sctp", Filter { protocol: protocol(132), ..any }),
        ("udplite", Filter { protocol: protocol(136), ..any }),
        ("icmp", Filter { protocol: protocol(1), ..any }),
        ("icmp6", Filter { protocol: protocol(58), ..any }),
        ("esp", Filter { protocol: protocol(50), ..any }),
        ("ah", Filter { protocol: protocol(51), ..any }),
        ("gre", Filter { protocol: protocol(47), ..any }),
        ("ipip", Filter { protocol: protocol(4), ..any }),
        ("no next header", Filter { protocol: protocol(59), ..any }),
        ("hop-by-hop", Filter { protocol: protocol(0), ..any }),
        ("fragment header", Filter { protocol: protocol(44), ..any }),
        // Each a little beside what the frames hold.
        ("another src4", Filter { src: prefix("10.0.0.2"), ..any }),
        ("another dst4", Filter { dst: prefix("10.0.0.1"), ..any }),
        ("another net", Filter { src: prefix("10.0.1.0/24"), ..any }),
        ("another src6", Filter { src: prefix("2001:db8:0:2::2"), ..any }),
        ("another dst6", Filter { dst: prefix("2001:db8:0:1::1"), ..any }),
        ("another sport", Filter { sport: Some(DPORT), ..any }),
        ("another dport", Filter { dport: Some(SPORT), ..any }),
        ("ports the other way", Filter { sport: Some(DPORT), dport: Some(SPORT), ..any }),
        ("src4 another dst4", Filter { dst: prefix("10.0.0.3"), ..src4 }),
        ("src4 another dport", Filter { dport: Some(54), ..src4 }),
        ("another src4 dport", Filter { src: prefix("10.0.0.9"), dport: Some(DPORT), ..any }),
    ]
}

// What a frame tells, and so which jobs get it.
const ANY: &[&str] = &["any"];
const ADDRESS4: &[&str] = &["any", "v4", "src4", "src4 net", "dst4", "dst4 net", "src4 dst4"];
const ADDRESS6: &[&str] = &["any", "v6", "src6", "src6 net", "dst6", "dst6 net", "src6 dst6"];
const PORTS: &[&str] = &["sport", "dport", "sport dport"];
const PORTS4: &[&str] = &["sport", "dport", "sport dport", "src4 dport"];
const PORTS6: &[&str] = &["sport", "dport", "sport dport", "src6 dport"];
const TCP4: &[&str] = &["tcp", "src4 tcp"];
const TCP6: &[&str] = &["tcp", "src6 tcp"];
const UDP4: &[&str] = &["udp", "src4 udp"];
const UDP6: &[&str] = &["udp", "src6 udp"];
const UDP_DPORT: &[&str] = &["udp dport"];
const OTHER4: &[&str] = &["any", "v4", "dst4 net"];

/// A named frame, and the jobs that it is a hit of.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) frame: Vec<u8>,
    pub(crate) expected: BTreeSet<&'static str>,
}

fn case(name: &'static str, frame: Vec<u8>, expected: &[&[&'static str]]) -> Case {
    Case { name, frame, expected: expected.iter().copied().flatten().copied().collect() }
}

fn v4() -> Frame {
    Frame::new().ipv4(SRC4, DST4)
}

fn v6() -> Frame {
    Frame::new().ipv6(SRC6, DST6)
}

fn udp(frame: Frame) -> Frame {
    frame.udp(SPORT, DPORT).payload(b"payload")
}

fn tcp(frame: Frame) -> Frame {
    frame.tcp(SPORT, DPORT).payload(b"payload")
}

/// A frame with one byte changed.
fn with(mut frame: Vec<u8>, at: usize, byte: u8) -> Vec<u8> {
    frame[at] = byte;
    frame
}

fn ipv4_cases() -> Vec<Case> {
    let full: &[&[&str]] = &[ADDRESS4, PORTS4, UDP4, UDP_DPORT];
    vec![
        case("v4 udp", udp(v4()).build(), full),
        case("v4 tcp", tcp(v4()).build(), &[ADDRESS4, PORTS4, TCP4]),
        case("v4 sctp", v4().upper(132, SPORT, DPORT).build(), &[ADDRESS4, PORTS4, &["sctp"]]),
        case("v4 dccp", v4().upper(33, SPORT, DPORT).build(), &[ADDRESS4, PORTS4, &["dccp"]]),
        case(
            "v4 udp-lite",
            v4().upper(136, SPORT, DPORT).build(),
            &[ADDRESS4, PORTS4, &["udplite"]],
        ),
        case("v4 icmp", v4().protocol(1, &[8, 0, 0, 0]).build(), &[ADDRESS4, &["icmp"]]),
        case(
            "v4 icmp whose first bytes look like ports",
            v4().protocol(1, &[0x03, 0xe8, 0, 53]).build(),
            &[ADDRESS4, &["icmp"]],
        ),
        case("v4 esp", v4().protocol(50, &[0x03, 0xe8, 0, 53]).build(), &[ADDRESS4, &["esp"]]),
        // The chain of headers is IPv6's; in IPv4 the authentication header is the protocol.
        case("v4 ah before udp", udp(v4().authentication(4)).build(), &[ADDRESS4, &["ah"]]),
        case("v4 gre", v4().protocol(47, &[0; 8]).build(), &[ADDRESS4, &["gre"]]),
        case("v4 in v4", udp(v4().ipv4(DST4, SRC4)).build(), &[ADDRESS4, &["ipip"]]),
        case("v4 protocol 0", v4().protocol(0, &[0; 8]).build(), &[ADDRESS4, &["hop-by-hop"]]),
        case(
            "v4 protocol 44",
            v4().protocol(44, &[0; 8]).build(),
            &[ADDRESS4, &["fragment header"]],
        ),
        case("v4 protocol 255", v4().protocol(255, &[0; 8]).build(), &[ADDRESS4]),
        case(
            "v4 of others",
            udp(Frame::new().ipv4(DST4, SRC4)).build(),
            &[
                ANY,
                &["v4", "src4 net", "dst4 net", "another src4", "another dst4"],
                PORTS,
                &["udp"],
                UDP_DPORT,
            ],
        ),
        case(
            "v4 next to the network",
            udp(Frame::new().ipv4(Ipv4Addr::new(10, 0, 1, 0), Ipv4Addr::new(11, 0, 0, 0))).build(),
            &[ANY, &["v4", "another net"], PORTS, &["udp"], UDP_DPORT],
        ),
        case(
            "v4 answer",
            Frame::new().ipv4(SRC4, DST4).udp(DPORT, SPORT).build(),
            &[ADDRESS4, UDP4, &["another sport", "another dport", "ports the other way"]],
        ),
        case(
            "v4 port one off",
            v4().udp(SPORT + 1, DPORT + 1).build(),
            &[ADDRESS4, UDP4, &["src4 another dport"]],
        ),
        case("v4 one option", udp(v4().options(1)).build(), full),
        case("v4 all ten options", udp(v4().options(10)).build(), full),
        case("v4 first fragment", udp(v4().fragment(0, true)).build(), full),
        case("v4 middle fragment", udp(v4().fragment(185, true)).build(), &[ADDRESS4, UDP4]),
        case("v4 last fragment", udp(v4().fragment(185, false)).build(), &[ADDRESS4, UDP4]),
        case(
            "v4 fragment at the lowest offset",
            udp(v4().fragment(1, false)).build(),
            &[ADDRESS4, UDP4],
        ),
        case(
            "v4 fragment at the highest offset",
            udp(v4().fragment(0x1fff, false)).build(),
            &[ADDRESS4, UDP4],
        ),
        // The two bits above the offset are flags, the lower of them "don't fragment".
        case("v4 that may not be fragmented", with(udp(v4()).build(), 20, 0x40), full),
        case("v4 with the reserved flag", with(udp(v4()).build(), 20, 0x80), full),
        case(
            "v4 options and a fragment",
            udp(v4().options(2).fragment(3, false)).build(),
            &[ADDRESS4, UDP4],
        ),
        case("v4 version 6", with(udp(v4()).build(), 14, 0x65), &[ANY]),
        case("v4 version 0", with(udp(v4()).build(), 14, 0x05), &[ANY]),
        case("v4 header length of 16", with(udp(v4()).build(), 14, 0x44), &[ANY]),
        case("v4 header length of 0", with(udp(v4()).build(), 14, 0x40), &[ANY]),
        case(
            "v4 header longer than the frame",
            with(udp(v4()).build(), 14, 0x4f),
            &[ADDRESS4, UDP4],
        ),
        case("v4 total length too small", with(with(udp(v4()).build(), 16, 0), 17, 0), full),
        case("v4 cut after the ethernet header", udp(v4()).cut(14), &[ANY]),
        case("v4 cut inside the header", udp(v4()).cut(30), &[ANY]),
        case("v4 cut before the last byte of the header", udp(v4()).cut(33), &[ANY]),
        case("v4 cut after the header", udp(v4()).cut(34), &[ADDRESS4, UDP4]),
        case("v4 cut after the source port", udp(v4()).cut(36), &[ADDRESS4, UDP4]),
        case("v4 cut inside the destination port", udp(v4()).cut(37), &[ADDRESS4, UDP4]),
        case("v4 cut after the ports", udp(v4()).cut(38), full),
        case("v4 cut inside the options", udp(v4().options(3)).cut(40), &[ADDRESS4, UDP4]),
        case("v4 cut after options and ports", udp(v4().options(3)).cut(50), full),
        case("v4 that ends in trailing bytes", udp(v4()).payload(&[0; 100]).build(), full),
    ]
}

fn ipv6_cases() -> Vec<Case> {
    let full: &[&[&str]] = &[ADDRESS6, PORTS6, UDP6, UDP_DPORT];
    let no_ports: &[&[&str]] = &[ADDRESS6, UDP6];
    let chain = |kinds: &[u8]| kinds.iter().fold(v6(), |frame, kind| frame.extension(*kind, 0));
    vec![
        case("v6 udp", udp(v6()).build(), full),
        case("v6 tcp", tcp(v6()).build(), &[ADDRESS6, PORTS6, TCP6]),
        case("v6 sctp", v6().upper(132, SPORT, DPORT).build(), &[ADDRESS6, PORTS6, &["sctp"]]),
        case("v6 dccp", v6().upper(33, SPORT, DPORT).build(), &[ADDRESS6, PORTS6, &["dccp"]]),
        case(
            "v6 udp-lite",
            v6().upper(136, SPORT, DPORT).build(),
            &[ADDRESS6, PORTS6, &["udplite"]],
        ),
        case("v6 icmp6", v6().protocol(58, &[128, 0, 0, 0]).build(), &[ADDRESS6, &["icmp6"]]),
        case("v6 esp", v6().protocol(50, &[0x03, 0xe8, 0, 53]).build(), &[ADDRESS6, &["esp"]]),
        case("v6 no next header", v6().protocol(59, &[]).build(), &[ADDRESS6, &["no next header"]]),
        case("v4 in v6", udp(v6().ipv4(SRC4, DST4)).build(), &[ADDRESS6, &["ipip"]]),
        case(
            "v6 of others",
            udp(Frame::new().ipv6(DST6, SRC6)).build(),
            &[ANY, &["v6", "dst6 net", "another src6", "another dst6"], PORTS, &["udp"], UDP_DPORT],
        ),
        case("v6 hop-by-hop", udp(v6().extension(0, 0)).build(), full),
        case("v6 routing", udp(v6().extension(43, 2)).build(), full),
        case("v6 destination options", udp(v6().extension(60, 1)).build(), full),
        case("v6 mobility", udp(v6().extension(135, 0)).build(), full),
        case("v6 host identity", udp(v6().extension(139, 4)).build(), full),
        case("v6 shim6", udp(v6().extension(140, 0)).build(), full),
        case("v6 ah", udp(v6().authentication(4)).build(), full),
        case(
            "v6 ah that is not a multiple of eight",
            tcp(v6().authentication(3)).build(),
            &[ADDRESS6, PORTS6, TCP6],
        ),
        case("v6 the longest extension", udp(v6().extension(60, 255)).build(), full),
        case("v6 first fragment", udp(v6().extension_fragment(0, true)).build(), full),
        case("v6 whole in one fragment", udp(v6().extension_fragment(0, false)).build(), full),
        case("v6 middle fragment", udp(v6().extension_fragment(181, true)).build(), no_ports),
        case("v6 last fragment", udp(v6().extension_fragment(181, false)).build(), no_ports),
        case(
            "v6 fragment at the lowest offset",
            udp(v6().extension_fragment(1, false)).build(),
            no_ports,
        ),
        case(
            "v6 first fragment with reserved bits",
            with(udp(v6().extension_fragment(0, true)).build(), 14 + 40 + 3, 0x07),
            full,
        ),
        case(
            "v6 fragment header with a reserved byte",
            with(udp(v6().extension_fragment(0, true)).build(), 14 + 40 + 1, 0xff),
            full,
        ),
        // What would tell the protocol is in the first fragment.
        case(
            "v6 later fragment of a chain that goes on",
            udp(v6().extension_fragment(181, false).extension(60, 0)).build(),
            &[ADDRESS6],
        ),
        case(
            "v6 first fragment of a chain that goes on",
            udp(v6().extension_fragment(0, true).extension(60, 0)).build(),
            full,
        ),
        case(
            "v6 every kind",
            udp(chain(&[0, 60, 43])
                .extension_fragment(0, true)
                .authentication(4)
                .extension(60, 0)
                .extension(135, 0))
            .build(),
            full,
        ),
        case("v6 chain of eight", udp(chain(&[60; 8])).build(), full),
        case("v6 chain of nine", udp(chain(&[60; 9])).build(), &[ADDRESS6]),
        case(
            "v6 chain of eight of every kind",
            udp(chain(&[0, 43, 60, 135, 139, 140]).authentication(1).extension_fragment(0, true))
                .build(),
            full,
        ),
        case("v6 chain of twenty", udp(chain(&[60; 20])).build(), &[ADDRESS6]),
        case(
            "v6 chain of eight before a fragment header",
            udp(chain(&[60; 8]).extension_fragment(0, true)).build(),
            &[ADDRESS6],
        ),
        case(
            "v6 chain of eight of the longest",
            udp((0..8).fold(v6(), |frame, _| frame.extension(60, 255))).build(),
            full,
        ),
        case(
            "v6 chain that ends in nothing",
            chain(&[0, 43]).protocol(59, &[]).build(),
            &[ADDRESS6, &["no next header"]],
        ),
        case("v6 version 4", with(udp(v6()).build(), 14, 0x40), &[ANY]),
        case("v6 version 15", with(udp(v6()).build(), 14, 0xf0), &[ANY]),
        case("v6 traffic class", with(udp(v6()).build(), 14, 0x6f), full),
        case("v6 cut inside the header", udp(v6()).cut(53), &[ANY]),
        case("v6 cut after the header", udp(v6()).cut(54), no_ports),
        case("v6 cut inside the destination port", udp(v6()).cut(57), no_ports),
        case("v6 cut after the ports", udp(v6()).cut(58), full),
        case(
            "v6 cut after the header before an extension",
            udp(v6().extension(0, 0)).cut(54),
            &[ADDRESS6],
        ),
        case(
            "v6 cut inside the first bytes of an extension",
            udp(v6().extension(0, 0)).cut(57),
            &[ADDRESS6],
        ),
        case("v6 cut inside an extension", udp(v6().extension(0, 0)).cut(58), no_ports),
        case("v6 cut after an extension", udp(v6().extension(0, 0)).cut(62), no_ports),
        case("v6 cut after extension and ports", udp(v6().extension(0, 0)).cut(66), full),
        case("v6 cut inside a second extension", udp(chain(&[0, 60])).cut(64), &[ADDRESS6]),
        case(
            "v6 extension longer than the frame",
            with(udp(v6().extension(0, 0)).build(), 55, 200),
            no_ports,
        ),
    ]
}

fn other_cases() -> Vec<Case> {
    let full4: &[&[&str]] = &[ADDRESS4, PORTS4, UDP4, UDP_DPORT];
    let full6: &[&[&str]] = &[ADDRESS6, PORTS6, UDP6, UDP_DPORT];
    let tags = |tpids: &[u16]| tpids.iter().fold(Frame::new(), |frame, tpid| frame.vlan(*tpid));
    let arp: &[u8] =
        &[0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2];
    vec![
        case("vlan v4", udp(tags(&[VLAN]).ipv4(SRC4, DST4)).build(), full4),
        case("vlan v6", udp(tags(&[VLAN]).ipv6(SRC6, DST6)).build(), full6),
        case("provider tag v4", udp(tags(&[QINQ]).ipv4(SRC4, DST4)).build(), full4),
        case("old provider tag v4", udp(tags(&[OLD_QINQ]).ipv4(SRC4, DST4)).build(), full4),
        case("qinq v4", udp(tags(&[QINQ, VLAN]).ipv4(SRC4, DST4)).build(), full4),
        case("qinq v6", udp(tags(&[QINQ, VLAN]).ipv6(SRC6, DST6)).build(), full6),
        case("vlan in vlan v4", udp(tags(&[VLAN, VLAN]).ipv4(SRC4, DST4)).build(), full4),
        case("old qinq v4", udp(tags(&[OLD_QINQ, VLAN]).ipv4(SRC4, DST4)).build(), full4),
        case(
            "qinq with options",
            udp(tags(&[QINQ, VLAN]).ipv4(SRC4, DST4).options(10)).build(),
            full4,
        ),
        case(
            "qinq with extensions",
            udp(tags(&[QINQ, VLAN]).ipv6(SRC6, DST6).extension(0, 1)).build(),
            full6,
        ),
        case(
            "qinq with a fragment",
            udp(tags(&[QINQ, VLAN]).ipv4(SRC4, DST4).fragment(9, true)).build(),
            &[ADDRESS4, UDP4],
        ),
        case("three tags", udp(tags(&[QINQ, VLAN, VLAN]).ipv4(SRC4, DST4)).build(), &[ANY]),
        case("vlan arp", tags(&[VLAN]).ethertype(0x0806, arp).build(), &[ANY]),
        case("vlan cut inside the tag", udp(tags(&[VLAN]).ipv4(SRC4, DST4)).cut(17), &[ANY]),
        case("vlan cut after the tag", udp(tags(&[VLAN]).ipv4(SRC4, DST4)).cut(18), &[ANY]),
        case(
            "qinq cut inside the second tag",
            udp(tags(&[QINQ, VLAN]).ipv4(SRC4, DST4)).cut(20),
            &[ANY],
        ),
        case(
            "qinq cut after the header",
            udp(tags(&[QINQ, VLAN]).ipv4(SRC4, DST4)).cut(42),
            &[ADDRESS4, UDP4],
        ),
        case("arp", Frame::new().ethertype(0x0806, arp).build(), &[ANY]),
        case(
            "mpls",
            udp(Frame::new().ethertype(0x8847, &[0, 1, 1, 64]).ipv4(SRC4, DST4)).build(),
            &[ANY],
        ),
        case(
            "pppoe",
            Frame::new().ethertype(0x8864, &[0x11, 0, 0, 1, 0, 30, 0, 0x21]).build(),
            &[ANY],
        ),
        case("lldp", Frame::new().ethertype(0x88cc, &[2, 7, 4, 2, 0, 0, 0, 0, 1]).build(), &[ANY]),
        case("macsec", Frame::new().ethertype(0x88e5, &[0; 20]).build(), &[ANY]),
        case("llc", Frame::new().ethertype(38, &[0x42, 0x42, 3, 0, 0, 0]).build(), &[ANY]),
        case(
            "llc snap with an IPv4 type",
            {
                let snap = [0xaa, 0xaa, 3, 0, 0, 0, 8, 0];
                Frame::new().ethertype(46, &snap).payload(&udp(v4()).build()[14..]).build()
            },
            &[ANY],
        ),
        case("v4 type on a v6 packet", with(with(udp(v6()).build(), 12, 8), 13, 0), &[ANY]),
        case(
            "v6 type on a v4 packet",
            with(with(tcp(v4()).fill(100).build(), 12, 0x86), 13, 0xdd),
            &[ANY],
        ),
        case("ethernet header only", vec![0; 14], &[ANY]),
        case("zeros", vec![0; 64], &[ANY]),
        case("ones", vec![0xff; 64], &[ANY]),
        case(
            "garbage behind an IPv4 type",
            Frame::new().ethertype(0x0800, &[0xa5; 50]).build(),
            &[ANY],
        ),
        case(
            "garbage behind an IPv6 type",
            Frame::new().ethertype(0x86dd, &[0x5a; 90]).build(),
            &[ANY],
        ),
        case(
            "v4 addresses and nothing else that is known",
            Frame::new()
                .ipv4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::new(10, 255, 255, 255))
                .protocol(255, &[])
                .build(),
            &[OTHER4],
        ),
    ]
}

/// The whole table.
pub(crate) fn cases() -> Vec<Case> {
    [ipv4_cases(), ipv6_cases(), other_cases()].into_iter().flatten().collect()
}

/// A program with these jobs in the first slots, all active.
pub(crate) fn program(filters: impl IntoIterator<Item = Filter>) -> Program {
    let mut program = Program::load(CAPTURE, Some(rings())).unwrap();
    for (slot, filter) in filters.into_iter().enumerate() {
        program.insert(slot, Rule::new(filter)).unwrap();
        program.activate(slot).unwrap();
    }
    program
}

/// Asserts that each packet has one outcome, and gives how many have this one.
pub(crate) fn outcome(counters: &Counters, outcome: Outcome) -> u64 {
    assert_eq!(counters.packets, counters.outcomes.iter().sum::<u64>(), "{counters:?}");
    counters.outcomes[outcome as usize]
}

fn monotonic() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap().into()
}

#[test]
fn each_named_frame_is_a_hit_of_just_the_jobs_that_ask_for_it() {
    privileged!();
    let filters = filters();
    assert!(filters.len() <= MAX_JOBS);
    let cases = cases();
    let names: BTreeSet<_> = cases.iter().map(|case| case.name).collect();
    assert_eq!(names.len(), cases.len(), "names are unique");
    assert!(cases.len() >= 60, "{} frames", cases.len());

    let mut program = program(filters.iter().map(|(_, filter)| *filter));
    let mut hits = [0; MAX_JOBS];
    let mut bytes = [0; MAX_JOBS];
    let mut wrong = Vec::new();
    for Case { name, frame, expected } in &cases {
        let unknown: Vec<_> = expected
            .iter()
            .filter(|name| !filters.iter().any(|(known, _)| known == *name))
            .collect();
        assert!(unknown.is_empty(), "{name}: {unknown:?}");
        let before = monotonic();
        let verdict = run(program.exclusive().unwrap(), frame);
        let jobs = (0..filters.len()).filter(|slot| verdict.jobs() >> slot & 1 != 0);
        let got: BTreeSet<_> = jobs.map(|slot| filters[slot].0).collect();
        if got != *expected {
            let missing: Vec<_> = expected.difference(&got).collect();
            let extra: Vec<_> = got.difference(expected).collect();
            wrong.push(format!("{name}: missing {missing:?}, too many {extra:?}"));
        }
        // Every frame is a hit of the job that takes any; no queue has a socket.
        assert_eq!(verdict.action, Action::Pass, "{name}");
        assert_eq!(verdict.frame, *frame, "{name}: the frame itself is left alone");
        let header = verdict.header.unwrap();
        assert_eq!(header.original_len as usize, frame.len(), "{name}");
        assert_eq!((header.queue, header.direction), (0, DIRECTION_IN), "{name}");
        let time = Duration::from_nanos(header.time_ns);
        assert!(before <= time && time <= monotonic(), "{name}: {time:?}");
        for slot in (0..filters.len()).filter(|slot| expected.contains(filters[*slot].0)) {
            hits[slot] += 1;
            bytes[slot] += frame.len() as u64;
        }
    }
    assert!(wrong.is_empty(), "{} frames:\n{}", wrong.len(), wrong.join("\n"));

    let counters = program.counters().unwrap();
    assert_eq!(counters.packets, cases.len() as u64);
    assert_eq!(outcome(&counters, Outcome::NoSocket), cases.len() as u64);
    for (slot, (name, _)) in filters.iter().enumerate() {
        let job = counters.jobs[slot];
        assert_eq!((job.hits, job.bytes), (hits[slot], bytes[slot]), "{name}");
        assert_eq!((job.no_socket, job.no_header), (job.hits, 0), "{name}");
    }
    println!(
        "{} frames × {} filters, {} hits",
        cases.len(),
        filters.len(),
        hits.iter().sum::<u64>()
    );
}

#[test]
fn a_frame_that_no_job_asks_for_comes_out_as_it_went_in() {
    privileged!();
    // The same table, one job at a time, without the job that takes any: now there are misses.
    let filters: Vec<_> = filters().into_iter().skip(1).collect();
    let mut program = program(filters.iter().map(|(_, filter)| *filter));
    let cases = cases();
    let mut missed = 0;
    for Case { name, frame, expected } in &cases {
        let verdict = run(program.exclusive().unwrap(), frame);
        assert_eq!(verdict.header.is_none(), expected.len() == 1, "{name}");
        assert_eq!(verdict.frame, *frame, "{name}");
        assert_eq!(verdict.action, Action::Pass, "{name}");
        missed += u64::from(verdict.header.is_none());
    }
    assert!(missed > 20, "{missed} missed");
    let counters = program.counters().unwrap();
    assert_eq!(outcome(&counters, Outcome::NoMatch), missed);
    assert_eq!(outcome(&counters, Outcome::NoSocket), cases.len() as u64 - missed);
}

#[test]
fn without_a_job_every_frame_is_idle() {
    privileged!();
    let mut program = program([]);
    for case in ipv4_cases() {
        let verdict = run(program.exclusive().unwrap(), &case.frame);
        assert_eq!((verdict.action, verdict.header), (Action::Pass, None), "{}", case.name);
        assert_eq!(verdict.frame, case.frame, "{}", case.name);
    }
    let counters = program.counters().unwrap();
    assert_eq!(outcome(&counters, Outcome::Idle), ipv4_cases().len() as u64);
}

#[test]
fn the_host_classifies_frames_too_short_for_the_kernel_as_unknown() {
    use capture_ebpf::parse::{Headers, Network, ethernet};

    for length in 0..SHORTEST {
        let headers = ethernet(&udp(v4()).build()[..length]);
        let unknown = Headers { network: Network::Unknown, protocol: None, ports: None };
        assert_eq!(headers, unknown, "{length} bytes");
    }
}

#[test]
fn a_frame_in_several_buffers_is_parsed_and_measured_whole() {
    privileged!();
    let filters = filters();
    let mut program = program(filters.iter().map(|(_, filter)| *filter));
    let slot = |name| filters.iter().position(|(known, _)| *known == name).unwrap();
    let (any, dport) = (1 << slot("any"), 1 << slot("dport"));
    // The first buffer holds what a page has left; a few lengths around that, up to a jumbo frame.
    for length in (3000..4200).step_by(7).chain([8000, 8999, 9000, 9014, 9018]) {
        let frame = udp(v4()).fill(length).build();
        let verdict = run(program.exclusive().unwrap(), &frame);
        assert_eq!(verdict.header.unwrap().original_len as usize, length);
        assert_eq!(verdict.jobs() & (any | dport), any | dport, "{length} bytes");
        assert_eq!(verdict.frame, frame, "{length} bytes");
    }
    // The ports move through the end of the first buffer, byte by byte of the chain's length.
    for extra in 0..255 {
        let frame =
            udp(v6().extension(60, 200).extension(60, extra).authentication(extra)).fill(9000);
        let frame = frame.build();
        let verdict = run(program.exclusive().unwrap(), &frame);
        assert_eq!(verdict.jobs() & (any | dport), any | dport, "extra {extra}");
        assert_eq!(verdict.frame, frame, "extra {extra}");
    }
}

#[test]
fn a_prefix_matches_its_first_and_last_address_and_neither_neighbour() {
    privileged!();
    let v4 = |bits: u32| IpAddr::V4(Ipv4Addr::from_bits(bits));
    let v6 = |bits: u128| IpAddr::V6(Ipv6Addr::from_bits(bits));
    let base4 = 0xac10_aaaa_u32;
    let base6 = 0x2001_0db8_5555_aaaa_5555_aaaa_5555_aaaa_u128;
    let prefixes: Vec<_> = (0..=32)
        .map(|length| Prefix::new(v4(base4), length).unwrap())
        .chain((8..=128).step_by(4).map(|length| Prefix::new(v6(base6), length).unwrap()))
        .collect();
    assert_eq!(prefixes.len(), MAX_JOBS);
    let by_src = |prefix: &Prefix| Filter { src: Some(*prefix), ..Filter::default() };
    let by_dst = |prefix: &Prefix| Filter { dst: Some(*prefix), ..Filter::default() };

    let mut edges = Vec::new();
    for prefix in &prefixes {
        match prefix.address() {
            IpAddr::V4(first) => {
                let host = u32::MAX.checked_shr(prefix.length().into()).unwrap_or(0);
                let (first, last) = (first.to_bits(), first.to_bits() | host);
                edges.extend([first, last, first.wrapping_sub(1), last.wrapping_add(1)].map(v4));
            }
            IpAddr::V6(first) => {
                let host = u128::MAX.checked_shr(prefix.length().into()).unwrap_or(0);
                let (first, last) = (first.to_bits(), first.to_bits() | host);
                edges.extend([first, last, first.wrapping_sub(1), last.wrapping_add(1)].map(v6));
            }
        }
    }
    let contains = |prefix: &Prefix, address: IpAddr| {
        address.is_ipv4() == prefix.address().is_ipv4()
            && Prefix::new(address, prefix.length()) == Some(*prefix)
    };
    let mut sources = program(prefixes.iter().map(by_src));
    let mut destinations = program(prefixes.iter().map(by_dst));
    for edge in edges {
        let want = (0..MAX_JOBS).filter(|slot| contains(&prefixes[*slot], edge));
        let want = want.map(|slot| 1 << slot).sum::<u64>();
        let other = if edge.is_ipv4() { v4(1) } else { v6(1) };
        let frame = Frame::new().ip(edge, other).udp(1, 2).build();
        assert_eq!(run(sources.exclusive().unwrap(), &frame).jobs(), want, "from {edge}");
        let frame = Frame::new().ip(other, edge).udp(1, 2).build();
        assert_eq!(run(destinations.exclusive().unwrap(), &frame).jobs(), want, "to {edge}");
    }
}

#[test]
fn inserting_and_removing_a_job_never_changes_anothers_answers() {
    privileged!();
    let filters: Vec<_> = filters().into_iter().map(|(_, filter)| filter).collect();
    let cases = cases();
    // What each job says when all are there is what it must say in any company.
    let mut full = program(filters.iter().copied());
    let answers: Vec<_> =
        cases.iter().map(|case| run(full.exclusive().unwrap(), &case.frame).jobs()).collect();

    let mut program = Program::load(CAPTURE, None).unwrap();
    let mut present = 0_u64;
    // Every slot comes and goes, in an order that mixes low and high ones.
    let order = (0..filters.len()).map(|n| n * 29 % filters.len());
    let steps = order.clone().map(|slot| (slot, true)).chain(order.map(|slot| (slot, false)));
    for (slot, insert) in steps {
        if insert {
            program.insert(slot, Rule::new(filters[slot])).unwrap();
            let verdict = run(program.exclusive().unwrap(), &cases[0].frame);
            assert_eq!(verdict.jobs(), answers[0] & present, "slot {slot} is not active yet");
            program.activate(slot).unwrap();
            present |= 1 << slot;
        } else {
            program.deactivate(slot).unwrap();
            present &= !(1 << slot);
            let verdict = run(program.exclusive().unwrap(), &cases[0].frame);
            assert_eq!(verdict.jobs(), answers[0] & present, "slot {slot} is no longer active");
            program.remove(slot).unwrap();
        }
        for (case, answer) in cases.iter().zip(&answers) {
            let verdict = run(program.exclusive().unwrap(), &case.frame);
            assert_eq!(verdict.jobs(), answer & present, "{}, slot {slot} changed", case.name);
        }
    }
    assert_eq!(present, 0);
    let slot = program.free_slot();
    assert_eq!(slot, Some(0), "all slots are free again");
}

#[test]
fn a_slot_that_is_used_again_answers_for_its_new_job() {
    privileged!();
    let frame = udp(v4()).build();
    let any = Filter::default();
    let mut program = program([any, any]);
    let changes = [
        (Filter { dport: Some(DPORT), ..any }, 0b11),
        (Filter { dport: Some(DPORT + 1), ..any }, 0b01),
        (Filter { sport: Some(SPORT), ..any }, 0b11),
        (Filter { src: Some("10.0.0.9".parse().unwrap()), ..any }, 0b01),
        (Filter { protocol: Some(Protocol(6)), ..any }, 0b01),
        (any, 0b11),
    ];
    for (filter, expected) in changes {
        program.deactivate(1).unwrap();
        program.remove(1).unwrap();
        program.insert(1, Rule::new(filter)).unwrap();
        program.activate(1).unwrap();
        assert_eq!(run(program.exclusive().unwrap(), &frame).jobs(), expected, "{filter}");
    }
}

/// Packets of each sampling test.
const DRAWS: u32 = 100_000;

/// The 99.9999th percentile of the chi-square distribution with one degree of freedom: a sampling
/// that is right fails once in a million runs.
const CHI_SQUARE: f64 = 23.9;

/// Whether that many of [`DRAWS`] is what 1 in `n` gives.
fn plausible(kept: u64, n: u32) -> bool {
    let expected = f64::from(DRAWS) / f64::from(n);
    let rest = f64::from(DRAWS) - expected;
    let off = f64::from(u32::try_from(kept).unwrap()) - expected;
    off * off / expected + off * off / rest < CHI_SQUARE
}

#[test]
fn a_job_that_keeps_one_in_n_keeps_that_many() {
    privileged!();
    let frame = udp(v4()).build();
    let any = Filter::default();
    let tcp = Filter { protocol: Some(Protocol(6)), ..any };
    let mut program = Program::load(CAPTURE, None).unwrap();
    let jobs = [(any, 1), (any, 2), (any, 10), (any, 1000), (tcp, 2), (any, u32::MAX)];
    for (slot, (filter, n)) in jobs.into_iter().enumerate() {
        let rule = Rule { sample: NonZeroU32::new(n).unwrap(), ..Rule::new(filter) };
        program.insert(slot, rule).unwrap();
        program.activate(slot).unwrap();
    }
    repeat(program.exclusive().unwrap(), &frame, DRAWS);
    let counters = program.counters().unwrap();
    assert_eq!(counters.packets, u64::from(DRAWS));
    let hits: Vec<_> = counters.jobs.iter().map(|job| job.hits).collect();
    println!("kept of {DRAWS}: {:?}", &hits[..jobs.len()]);
    assert_eq!(hits[0], u64::from(DRAWS), "1 in 1 keeps all");
    for (slot, n) in [(1, 2), (2, 10), (3, 1000)] {
        assert!(plausible(hits[slot], n), "1 in {n}: {} kept of {DRAWS}", hits[slot]);
    }
    assert_eq!(hits[4], 0, "sampling never adds a packet that the filter refuses");
    assert!(hits[5] <= 3, "1 in 2³² − 1: {} kept of {DRAWS}", hits[5]);
}

#[test]
fn a_packet_that_sampling_leaves_out_for_each_of_its_jobs_is_counted_as_such() {
    privileged!();
    let frame = udp(v4()).build();
    let mut program = Program::load(CAPTURE, None).unwrap();
    for (slot, filter) in [Filter::default(), Filter { dport: Some(DPORT), ..Filter::default() }]
        .into_iter()
        .enumerate()
    {
        let rule = Rule { sample: NonZeroU32::new(10).unwrap(), ..Rule::new(filter) };
        program.insert(slot, rule).unwrap();
        program.activate(slot).unwrap();
    }
    let mut kept = 0;
    for _ in 0..DRAWS / 10 {
        let verdict = run(program.exclusive().unwrap(), &frame);
        kept += u64::from(verdict.header.is_some());
        // One draw serves all jobs of a packet, so those that sample alike keep the same ones.
        assert!(matches!(verdict.jobs(), 0 | 0b11), "{:b}", verdict.jobs());
    }
    let counters = program.counters().unwrap();
    assert_eq!(outcome(&counters, Outcome::NoSocket), kept);
    assert_eq!(outcome(&counters, Outcome::SampledOut), u64::from(DRAWS / 10) - kept);
    assert_eq!([counters.jobs[0].hits, counters.jobs[1].hits], [kept; 2]);
    assert!(kept > 700 && kept < 1300, "{kept} kept of {}", DRAWS / 10);
}

#[test]
fn a_hit_whose_queue_has_a_socket_is_redirected_and_nothing_else_is() {
    privileged!();
    let mut program = program([Filter { dport: Some(DPORT), ..Filter::default() }]);
    // It need not be bound: what a program answers depends on the map alone.
    let socket = socket(AddressFamily::XDP, SocketType::RAW, None).unwrap();
    program.set_socket(0, socket.as_raw_fd()).unwrap();
    for case in ipv4_cases() {
        let verdict = run(program.exclusive().unwrap(), &case.frame);
        let hit = case.expected.contains("dport");
        let expected = if hit { Action::Redirect } else { Action::Pass };
        assert_eq!((verdict.action, verdict.header.is_some()), (expected, hit), "{}", case.name);
        assert_eq!(verdict.frame, case.frame, "{}", case.name);
    }
    let counters = program.counters().unwrap();
    let redirected = outcome(&counters, Outcome::Redirected);
    assert!(redirected > 5, "{redirected}");
    assert_eq!(outcome(&counters, Outcome::NoMatch), ipv4_cases().len() as u64 - redirected);
    assert_eq!(counters.jobs[0].hits, redirected);
    assert_eq!((counters.jobs[0].no_socket, counters.jobs[0].no_header), (0, 0));
}

#[test]
fn a_hit_without_room_for_its_header_is_passed_on_and_counted() {
    privileged!();
    let frame = udp(v4()).build();
    let mut program = program([Filter::default()]);
    // Nothing takes the metadata away between the runs of one call, so it piles up until there is
    // no room for more.
    let times = 100;
    repeat(program.exclusive().unwrap(), &frame, times);
    let counters = program.counters().unwrap();
    let no_header = outcome(&counters, Outcome::NoHeader);
    assert!(no_header > 0);
    assert_eq!(outcome(&counters, Outcome::NoSocket) + no_header, u64::from(times));
    assert_eq!(counters.jobs[0].hits, u64::from(times));
    assert_eq!(counters.jobs[0].no_header, no_header);
    assert_eq!(counters.jobs[0].no_socket, u64::from(times) - no_header);
}

#[test]
fn frames_of_every_short_length_are_handed_over_whole() {
    privileged!();
    let mut program = program([Filter::default()]);
    for length in SHORTEST..200 {
        let frame = vec![0xa5; length];
        let verdict = run(program.exclusive().unwrap(), &frame);
        assert_eq!(verdict.header.unwrap().original_len as usize, length);
        assert_eq!(verdict.frame.len(), length);
    }
}
