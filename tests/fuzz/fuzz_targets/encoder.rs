//! Any blocks, written and read back by `pcap-file`: every field comes back, every buffer that is
//! too small is left alone.

#![no_main]

use std::borrow::Cow;

use arbitrary::Arbitrary;
use capture_user::segment::pcapng::{
    self, Direction, InterfaceInfo, InterfaceStatistics, LINKTYPE_ETHERNET, Packet, Prefix,
    SectionInfo, packet_len, whole_prefix,
};
use libfuzzer_sys::fuzz_target;
use pcap_file::pcapng::{
    Block, PcapNgParser,
    blocks::{
        enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption},
        interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption},
        interface_statistics::{InterfaceStatisticsBlock, InterfaceStatisticsOption},
        section_header::SectionHeaderOption,
    },
};

/// What the longest option can hold.
const MAX_TEXT: usize = 65_535;
/// More than a jumbo frame.
const MAX_PACKET: usize = 9_216;
/// What a buffer is full of before something is written to it.
const DIRT: u8 = 0xa5;
/// As much of it as the longest packet's block needs. Slices are compared, never single bytes: a
/// loop is slow when each turn is counted as coverage.
static DIRTY: [u8; packet_len(MAX_PACKET) + 1] = [DIRT; packet_len(MAX_PACKET) + 1];

/// Bytes of packets longer than the fuzzer's input, different at each place.
static NOISE: [u8; MAX_PACKET + 256] = {
    let mut noise = [0; MAX_PACKET + 256];
    let mut at = 0;
    while at < noise.len() {
        noise[at] = (at * 31 >> 3) as u8;
        at += 1;
    }
    noise
};

#[derive(Arbitrary, Debug)]
struct File<'a> {
    hardware: &'a str,
    os: &'a str,
    application: &'a str,
    comment: &'a str,
    /// A text about as long as an option can be, as the first interface's description and filter.
    long: Long,
    cut: u16,
    blocks: Vec<Body<'a>>,
}

#[derive(Arbitrary, Debug)]
struct Long {
    /// Rarely yes, because it takes as much time as a hundred packets.
    wanted: u8,
    of: char,
    more: u8,
}

#[derive(Arbitrary, Debug)]
enum Body<'a> {
    Packet(PacketBody<'a>),
    Interface(InterfaceBody<'a>),
    Statistics(StatisticsBody<'a>),
}

#[derive(Arbitrary, Debug)]
struct InterfaceBody<'a> {
    name: &'a str,
    description: &'a str,
    filter: &'a str,
    os: &'a str,
    hardware: &'a str,
    comment: &'a str,
    snaplen: u32,
}

#[derive(Arbitrary, Debug)]
struct StatisticsBody<'a> {
    interface: u32,
    timestamp_ns: u64,
    start_ns: u64,
    end_ns: u64,
    counts: [Option<u64>; 5],
    comment: &'a str,
}

#[derive(Arbitrary, Debug)]
struct PacketBody<'a> {
    interface: u32,
    queue: u32,
    direction: u8,
    timestamp_ns: u64,
    original_len: u32,
    data: Data<'a>,
    /// Where it is cut for `packet_parts`.
    cuts: [u16; 2],
    snaplen: Option<u16>,
    /// How much too small the small buffer is.
    missing: u16,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Data<'a> {
    Given(&'a [u8]),
    Noise { from: u8, len: u16 },
}

fuzz_target!(|file: File<'_>| {
    let mut out = Vec::with_capacity(4096);
    let mut ends = vec![Prefix::default()];
    let long = file.long.text();
    let mut long_for = long.as_deref();

    pcapng::section_header(
        &mut out,
        &SectionInfo {
            hardware: file.hardware,
            os: file.os,
            application: file.application,
            comment: file.comment,
        },
    );
    ends.push(Prefix { bytes: out.len(), ..Prefix::default() });
    for body in &file.blocks {
        let mut end = ends[ends.len() - 1];
        match body {
            Body::Packet(body) => {
                let captured = write_packet(&mut out, body);
                end.packets += 1;
                end.captured_bytes += captured as u64;
            }
            Body::Interface(body) => {
                pcapng::interface_description(&mut out, &body.info(long_for.take()));
            }
            Body::Statistics(body) => pcapng::interface_statistics(&mut out, &body.statistics()),
        }
        end.bytes = out.len();
        ends.push(end);
    }

    read_back(&file, long.as_deref(), &out);

    assert_eq!(whole_prefix(&out), ends[ends.len() - 1]);
    let cut = usize::from(file.cut).min(out.len());
    let end = ends.iter().rfind(|end| end.bytes <= cut).expect("the empty prefix at least");
    assert_eq!(whole_prefix(&out[..cut]), *end);
});

/// Appends a packet, both ways, and returns how much of it was captured.
fn write_packet(out: &mut Vec<u8>, body: &PacketBody<'_>) -> usize {
    let packet = body.packet();
    let length = packet_len(packet.data.len());
    let start = out.len();

    let room = length - 1 - usize::from(body.missing) % length;
    out.extend_from_slice(&DIRTY[..room]);
    let small = &mut out[start..];
    assert_eq!(pcapng::packet(small, &packet), None);
    assert_eq!(pcapng::packet_parts(small, &packet, usize::MAX, [].into_iter()), None);
    assert!(*small == DIRTY[..room]);

    // One byte more than it needs: that one stays.
    out.extend_from_slice(&DIRTY[room..=length]);
    assert_eq!(pcapng::packet(&mut out[start..], &packet), Some(length));
    assert_eq!(out.pop(), Some(DIRT));

    let whole = body.data();
    let [first, second] = body.cuts.map(|cut| usize::from(cut) % (whole.len() + 1));
    let (head, tail) = whole.split_at(first.max(second));
    let (head, middle) = head.split_at(first.min(second));
    let mut parts = DIRTY[..length].to_vec();
    let written = pcapng::packet_parts(
        &mut parts,
        &Packet { data: head, ..packet },
        body.snaplen(),
        [middle, tail].into_iter(),
    );
    assert_eq!(written, Some(length));
    assert!(parts == out[start..]);
    packet.data.len()
}

/// Reads the file as a stranger would and compares every field.
fn read_back(file: &File<'_>, mut long: Option<&str>, out: &[u8]) {
    let (mut rest, mut parser) = PcapNgParser::new(out).expect("a section header");
    let section = parser.section();
    assert_eq!((section.major_version, section.minor_version, section.section_length), (1, 0, -1));
    let mut expected = Vec::new();
    add(&mut expected, file.comment, SectionHeaderOption::Comment);
    add(&mut expected, file.hardware, SectionHeaderOption::Hardware);
    add(&mut expected, file.os, SectionHeaderOption::OS);
    add(&mut expected, file.application, SectionHeaderOption::UserApplication);
    assert_eq!(section.options, expected);

    for body in &file.blocks {
        let (after, block) = parser.next_block(rest).expect("a whole block");
        rest = after;
        match (body, block) {
            (Body::Packet(body), Block::EnhancedPacket(read)) => body.compare(&read),
            (Body::Interface(body), Block::InterfaceDescription(read)) => {
                body.compare(long.take(), &read);
            }
            (Body::Statistics(body), Block::InterfaceStatistics(read)) => body.compare(&read),
            (body, block) => panic!("{body:?} came back as {block:?}"),
        }
    }
    assert!(rest.is_empty());
}

impl Long {
    fn text(&self) -> Option<String> {
        let bytes = MAX_TEXT - 128 + usize::from(self.more);
        (self.wanted == 1).then(|| String::from(self.of).repeat(bytes / self.of.len_utf8()))
    }
}

impl<'a> PacketBody<'a> {
    fn data(&self) -> &'a [u8] {
        match self.data {
            Data::Given(bytes) => bytes,
            Data::Noise { from, len } => {
                &NOISE[usize::from(from)..][..usize::from(len) % (MAX_PACKET + 1)]
            }
        }
    }

    fn snaplen(&self) -> usize {
        self.snaplen.map_or(usize::MAX, usize::from)
    }

    /// The packet as it is captured: no longer than the snaplen.
    fn packet(&self) -> Packet<'a> {
        Packet {
            interface: self.interface,
            queue: self.queue,
            direction: match self.direction % 3 {
                0 => Direction::Unknown,
                1 => Direction::Inbound,
                _ => Direction::Outbound,
            },
            timestamp_ns: self.timestamp_ns,
            original_len: self.original_len,
            data: &self.data()[..self.data().len().min(self.snaplen())],
        }
    }

    fn compare(&self, read: &EnhancedPacketBlock<'_>) {
        let packet = self.packet();
        assert_eq!(read.interface_id, packet.interface);
        assert_eq!(read.timestamp.as_nanos(), u128::from(packet.timestamp_ns));
        assert_eq!(read.original_len, packet.original_len);
        assert!(*read.data == *packet.data);
        let [EnhancedPacketOption::Flags(flags), EnhancedPacketOption::Unknown(queue)] =
            &read.options[..]
        else {
            panic!("not flags and a queue: {:?}", read.options)
        };
        assert_eq!(*flags, u32::from(self.direction % 3));
        assert_eq!((queue.code, &queue.value[..]), (6, &packet.queue.to_le_bytes()[..]));
    }
}

impl<'a> InterfaceBody<'a> {
    fn info(&self, long: Option<&'a str>) -> InterfaceInfo<'a> {
        InterfaceInfo {
            name: self.name,
            description: long.unwrap_or(self.description),
            filter: long.unwrap_or(self.filter),
            os: self.os,
            hardware: self.hardware,
            comment: self.comment,
            snaplen: self.snaplen,
            linktype: LINKTYPE_ETHERNET,
        }
    }

    fn compare(&self, long: Option<&str>, read: &InterfaceDescriptionBlock<'_>) {
        use InterfaceDescriptionOption as Read;

        assert_eq!(u32::from(read.linktype), u32::from(LINKTYPE_ETHERNET));
        assert_eq!(read.snaplen, self.snaplen);
        let description = cut(long.unwrap_or(self.description), MAX_TEXT);
        let filter = cut(long.unwrap_or(self.filter), MAX_TEXT - 1);
        let mut expected = Vec::new();
        add(&mut expected, self.comment, Read::Comment);
        add(&mut expected, self.name, Read::IfName);
        add(&mut expected, description, Read::IfDescription);
        expected.push(Read::IfTsResol(9));
        if !filter.is_empty() {
            expected.push(Read::IfFilter([b"\0", filter.as_bytes()].concat().into()));
        }
        add(&mut expected, self.os, Read::IfOs);
        add(&mut expected, self.hardware, Read::IfHardware);
        assert!(read.options == expected);
    }
}

impl<'a> StatisticsBody<'a> {
    fn statistics(&self) -> InterfaceStatistics<'a> {
        let [received, dropped_by_interface, filter_accepted, dropped_by_os, delivered] =
            self.counts;
        InterfaceStatistics {
            interface: self.interface,
            timestamp_ns: self.timestamp_ns,
            start_ns: self.start_ns,
            end_ns: self.end_ns,
            received,
            dropped_by_interface,
            filter_accepted,
            dropped_by_os,
            delivered,
            comment: self.comment,
        }
    }

    fn compare(&self, read: &InterfaceStatisticsBlock<'_>) {
        use InterfaceStatisticsOption as Read;

        assert_eq!(read.interface_id, self.interface);
        // The reader takes a time for a plain 64-bit number, but its upper half comes first.
        assert_eq!(read.timestamp.rotate_left(32), self.timestamp_ns);
        let mut expected = Vec::new();
        add(&mut expected, self.comment, Read::Comment);
        expected.push(Read::IsbStartTime(self.start_ns.rotate_left(32)));
        expected.push(Read::IsbEndTime(self.end_ns.rotate_left(32)));
        let options: [fn(u64) -> Read<'a>; 5] = [
            Read::IsbIfRecv,
            Read::IsbIfDrop,
            Read::IsbFilterAccept,
            Read::IsbOsDrop,
            Read::IsbUsrDeliv,
        ];
        for (option, count) in options.iter().zip(self.counts) {
            expected.extend(count.map(option));
        }
        assert_eq!(read.options, expected);
    }
}

/// A text that is not empty is an option.
fn add<'t, T>(expected: &mut Vec<T>, text: &'t str, option: impl FnOnce(Cow<'t, str>) -> T) {
    if !text.is_empty() {
        expected.push(option(text.into()));
    }
}

/// The most of a text that fits, found the slow way.
fn cut(text: &str, max: usize) -> &str {
    let end = (0..=text.len().min(max)).rfind(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}
