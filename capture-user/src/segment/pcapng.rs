//! The pcapng encoder: pure, into a buffer of the caller's.
//!
//! # Invariants
//!
//! - Everything is little-endian, whatever the host is.
//! - A block's length is a multiple of 4 and stands at both of its ends, so that blocks can be
//!   walked in either direction.
//! - An encoder writes a whole block or nothing. A buffer that holds only what encoders said they
//!   wrote is a run of whole blocks.
//! - A list of options ends with `opt_endofopt`; a block without options has no list at all. An
//!   empty text is not written.
//! - Padding is zeros: no byte of an earlier use of the buffer reaches the file.
//! - Time is UTC nanoseconds since 1970 (`if_tsresol` 9), the upper 32 bits first, as the format
//!   wants it.
//! - Every packet block carries the same options, so its length depends on the captured length
//!   alone, [`packet_len`], until it gets a [comment] or is [padded](pad): the last one of a buffer may
//!   be, so that what follows begins where direct I/O can write.
//!
//! # Format
//!
//! [draft-ietf-opsawg-pcapng](https://datatracker.ietf.org/doc/draft-ietf-opsawg-pcapng/). A file
//! is one section header block, one interface description block for each interface, packets, and
//! one interface statistics block for each interface. The block that matters for speed is the
//! enhanced packet block, here with its offsets:
//!
//! ```text
//!  0  block type, 6               28    the captured bytes, and zeros up to a multiple of 4: n
//!  4  block length, 52 + n        28+n  epb_flags (2), 4 bytes: direction in bits 0 and 1
//!  8  interface                   36+n  epb_queue (6), 4 bytes
//! 12  time, upper 32 bits         44+n  opt_endofopt (0), 0 bytes
//! 16  time, lower 32 bits         48+n  block length
//! 20  captured length
//! 24  original length
//! ```
//!
//! # Verbs
//!
//! [`section_header`], [`interface_description`] and [`interface_statistics`] run once a file and
//! append to a `Vec`. [`packet`] and [`packet_parts`] run once a packet and fill the front of a
//! slice. [`pad`] runs once a buffer. [`whole_prefix`] finds where the whole blocks of a torn file end.

use std::iter;

pub(super) const SECTION_HEADER: u32 = 0x0a0d_0d0a;
pub(super) const INTERFACE_DESCRIPTION: u32 = 1;
pub(super) const INTERFACE_STATISTICS: u32 = 5;
pub(super) const ENHANCED_PACKET: u32 = 6;

/// As it reads in the byte order of the section.
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;

/// A type and two lengths: no block is shorter.
const MIN_BLOCK: usize = 12;

pub(super) const OPT_ENDOFOPT: u16 = 0;
pub(super) const OPT_COMMENT: u16 = 1;
const SHB_HARDWARE: u16 = 2;
const SHB_OS: u16 = 3;
const SHB_USERAPPL: u16 = 4;
pub(super) const IF_NAME: u16 = 2;
const IF_DESCRIPTION: u16 = 3;
const IF_TSRESOL: u16 = 9;
pub(super) const IF_FILTER: u16 = 11;
const IF_OS: u16 = 12;
const IF_HARDWARE: u16 = 15;
const ISB_STARTTIME: u16 = 2;
const ISB_ENDTIME: u16 = 3;
const ISB_IFRECV: u16 = 4;
const ISB_IFDROP: u16 = 5;
const ISB_FILTERACCEPT: u16 = 6;
const ISB_OSDROP: u16 = 7;
const ISB_USRDELIV: u16 = 8;
pub(super) const EPB_FLAGS: u16 = 2;
pub(super) const EPB_QUEUE: u16 = 6;
/// Zeros that mean nothing. Option codes with the highest bit set are for local use, and a reader skips
/// those it does not know.
const EPB_PADDING: u16 = 0xff00;

/// `if_tsresol`: a timestamp counts 10⁻⁹ seconds.
const NANOSECONDS: u8 = 9;

/// `if_filter` starts with what kind of filter follows: 0 is a text.
const FILTER_IS_TEXT: u8 = 0;

/// What an option's 16-bit length can say.
const MAX_OPTION: usize = u16::MAX as usize;

/// The link type of Ethernet frames.
pub const LINKTYPE_ETHERNET: u16 = 1;

/// The link type of packets that begin with an IPv4 or IPv6 header.
pub const LINKTYPE_RAW: u16 = 101;

/// What a packet block holds in front of the packet.
pub(super) const PACKET_HEAD: usize = 28;
/// What a packet block holds behind the packet and its padding.
const PACKET_TAIL: usize = 24;
/// What of that is behind the options: their end, and the block's length.
const PACKET_END: usize = 8;

/// The bytes of a packet block that are neither packet nor padding.
pub const PACKET_OVERHEAD: usize = PACKET_HEAD + PACKET_TAIL;

/// What a section header says of the capture as a whole. An empty text is left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct SectionInfo<'a> {
    /// The machine.
    pub hardware: &'a str,
    /// The operating system.
    pub os: &'a str,
    /// The program that captured.
    pub application: &'a str,
    /// Anything else.
    pub comment: &'a str,
}

/// What an interface description says of one interface. An empty text is left out.
#[derive(Clone, Copy, Debug)]
pub struct InterfaceInfo<'a> {
    /// The name that the kernel knows it by.
    pub name: &'a str,
    /// What it is for.
    pub description: &'a str,
    /// The filter that packets had to pass.
    pub filter: &'a str,
    /// The operating system of the machine that it is in.
    pub os: &'a str,
    /// The network card and its driver.
    pub hardware: &'a str,
    /// Anything else.
    pub comment: &'a str,
    /// The most that is kept of a packet, in bytes; 0 is everything.
    pub snaplen: u32,
    /// What a packet starts with, from the registry of link types.
    pub linktype: u16,
}

impl Default for InterfaceInfo<'_> {
    /// An Ethernet interface that nothing else is known of.
    fn default() -> Self {
        Self {
            name: "",
            description: "",
            filter: "",
            os: "",
            hardware: "",
            comment: "",
            snaplen: 0,
            linktype: LINKTYPE_ETHERNET,
        }
    }
}

/// What was counted on one interface between two instants. A count that nobody made is left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct InterfaceStatistics<'a> {
    /// Index of the interface in the section.
    pub interface: u32,
    /// When this was counted.
    pub timestamp_ns: u64,
    /// When the capture started.
    pub start_ns: u64,
    /// When the capture ended.
    pub end_ns: u64,
    /// `isb_ifrecv`: packets that the interface received.
    pub received: Option<u64>,
    /// `isb_ifdrop`: packets that the interface dropped.
    pub dropped_by_interface: Option<u64>,
    /// `isb_filteraccept`: packets that the filter accepted.
    pub filter_accepted: Option<u64>,
    /// `isb_osdrop`: accepted packets that were dropped before they could be written.
    pub dropped_by_os: Option<u64>,
    /// `isb_usrdeliv`: packets that were written.
    pub delivered: Option<u64>,
    /// Anything else. An empty text is left out.
    pub comment: &'a str,
}

/// Which way a packet went through its interface, as `epb_flags` has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Direction {
    /// Nobody knows.
    #[default]
    Unknown = 0,
    /// Received.
    Inbound = 1,
    /// Sent.
    Outbound = 2,
}

/// One packet, and what its block says of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Packet<'a> {
    /// Index of the interface in the section.
    pub interface: u32,
    /// The queue of the interface that it came through.
    pub queue: u32,
    /// Which way it went.
    pub direction: Direction,
    /// When, in UTC nanoseconds.
    pub timestamp_ns: u64,
    /// Its length on the wire.
    pub original_len: u32,
    /// What was captured of it.
    pub data: &'a [u8],
}

/// The whole blocks at the front of a buffer, as [`whole_prefix`] found them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefix {
    /// How far they reach.
    pub bytes: usize,
    /// How many of them are packets.
    pub packets: u64,
    /// How many bytes of packets they hold, without headers, options and padding.
    pub captured_bytes: u64,
}

/// Appends a section header block. The section's length is left open (−1): readers go by the
/// blocks.
pub fn section_header(out: &mut Vec<u8>, info: &SectionInfo<'_>) {
    block(out, SECTION_HEADER, |out| {
        put_u32(out, BYTE_ORDER_MAGIC);
        put_u16(out, 1);
        put_u16(out, 0);
        put_u64(out, u64::MAX);
        options(out, |out| {
            text_option(out, OPT_COMMENT, info.comment);
            text_option(out, SHB_HARDWARE, info.hardware);
            text_option(out, SHB_OS, info.os);
            text_option(out, SHB_USERAPPL, info.application);
        });
    });
}

/// Appends an interface description block. The interface's index is the number of such blocks
/// before it in the section.
pub fn interface_description(out: &mut Vec<u8>, info: &InterfaceInfo<'_>) {
    block(out, INTERFACE_DESCRIPTION, |out| {
        put_u16(out, info.linktype);
        put_u16(out, 0);
        put_u32(out, info.snaplen);
        options(out, |out| {
            text_option(out, OPT_COMMENT, info.comment);
            text_option(out, IF_NAME, info.name);
            text_option(out, IF_DESCRIPTION, info.description);
            option(out, IF_TSRESOL, &[NANOSECONDS]);
            if !info.filter.is_empty() {
                let text = cut(info.filter, MAX_OPTION - 1);
                option(out, IF_FILTER, &[&[FILTER_IS_TEXT], text.as_bytes()].concat());
            }
            text_option(out, IF_OS, info.os);
            text_option(out, IF_HARDWARE, info.hardware);
        });
    });
}

/// Appends an interface statistics block.
pub fn interface_statistics(out: &mut Vec<u8>, statistics: &InterfaceStatistics<'_>) {
    block(out, INTERFACE_STATISTICS, |out| {
        put_u32(out, statistics.interface);
        put_u64(out, upper_half_first(statistics.timestamp_ns));
        options(out, |out| {
            text_option(out, OPT_COMMENT, statistics.comment);
            for (code, time) in
                [(ISB_STARTTIME, statistics.start_ns), (ISB_ENDTIME, statistics.end_ns)]
            {
                option(out, code, &upper_half_first(time).to_le_bytes());
            }
            for (code, count) in [
                (ISB_IFRECV, statistics.received),
                (ISB_IFDROP, statistics.dropped_by_interface),
                (ISB_FILTERACCEPT, statistics.filter_accepted),
                (ISB_OSDROP, statistics.dropped_by_os),
                (ISB_USRDELIV, statistics.delivered),
            ] {
                if let Some(count) = count {
                    option(out, code, &count.to_le_bytes());
                }
            }
        });
    });
}

/// The length of the block of a packet of which `captured` bytes were kept.
#[inline]
pub const fn packet_len(captured: usize) -> usize {
    // Saturating, so that an absurd length is too long for every buffer and never wraps to a short
    // one.
    (captured.saturating_add(3) & !3).saturating_add(PACKET_OVERHEAD)
}

/// Writes one packet's block at the front of `out` and returns its length, or writes nothing and
/// returns `None` if it does not fit.
#[inline]
pub fn packet(out: &mut [u8], packet: &Packet<'_>) -> Option<usize> {
    let (body, length) = frame(out, packet, packet.data.len())?;
    body.copy_from_slice(packet.data);
    Some(length)
}

/// Like [`packet`], for a packet that lies in several buffers: `packet.data` is its first part, and
/// `rest` has the others in order. At most `snaplen` bytes are kept.
pub fn packet_parts<'p>(
    out: &mut [u8],
    packet: &Packet<'p>,
    snaplen: usize,
    rest: impl Iterator<Item = &'p [u8]> + Clone,
) -> Option<usize> {
    let whole = rest.clone().fold(packet.data.len(), |sum, part| sum.saturating_add(part.len()));
    let (mut body, length) = frame(out, packet, whole.min(snaplen))?;
    for part in iter::once(packet.data).chain(rest) {
        let (front, back) = body.split_at_mut(part.len().min(body.len()));
        front.copy_from_slice(&part[..front.len()]);
        body = back;
    }
    Some(length)
}

/// Writes a packet block around `captured` bytes and returns the place for them, and the block's
/// length.
#[inline]
fn frame<'o>(
    out: &'o mut [u8],
    packet: &Packet<'_>,
    captured: usize,
) -> Option<(&'o mut [u8], usize)> {
    let length = packet_len(captured);
    // A longer block than its length can say fits nowhere.
    let length_field = u32::try_from(length).ok()?;
    let block = out.get_mut(..length)?;

    let (head, rest) = block.split_first_chunk_mut::<PACKET_HEAD>()?;
    let (body, tail) = rest.split_last_chunk_mut::<PACKET_TAIL>()?;
    // The padding, and maybe the packet's last bytes, which are written later.
    if let Some(last) = body.last_chunk_mut::<4>() {
        *last = [0; 4];
    }
    words(
        head,
        [
            ENHANCED_PACKET,
            length_field,
            packet.interface,
            (packet.timestamp_ns >> 32) as u32,
            packet.timestamp_ns as u32,
            captured as u32,
            packet.original_len,
        ],
    );
    words(
        tail,
        [
            option_head(EPB_FLAGS, 4),
            packet.direction as u32,
            option_head(EPB_QUEUE, 4),
            packet.queue,
            option_head(OPT_ENDOFOPT, 0),
            length_field,
        ],
    );
    Some((&mut body[..captured], length))
}

/// Makes the packet block that `blocks` ends with longer by `by` bytes, a multiple of 4 and at most
/// 64 KiB; `blocks` has that many behind it already. The bytes become an option of the packet's.
pub(crate) fn pad(blocks: &mut [u8], by: usize) {
    if by > 0 {
        widen(blocks, by, option_head(EPB_PADDING, (by - 4) as u16));
    }
}

/// Adds a comment to the packet block that `blocks` ends with; `blocks` has [`option_len`] bytes behind it
/// already.
pub(crate) fn comment(blocks: &mut [u8], text: &[u8]) {
    let by = option_len(text.len());
    let value = widen(blocks, by, option_head(OPT_COMMENT, text.len() as u16));
    value[..text.len()].copy_from_slice(text);
}

/// The length of an option of so many bytes.
pub(crate) const fn option_len(value: usize) -> usize {
    4 + value.next_multiple_of(4)
}

/// Makes the packet block that `blocks` ends with longer by `by` bytes, which become an option; gives the
/// place of its value, filled with zeros.
fn widen(blocks: &mut [u8], by: usize, head: u32) -> &mut [u8] {
    let old_end = blocks.len() - by;
    let Some(old) = u32_at(blocks, old_end - 4) else { return &mut [] };
    let length = old + by as u32;
    let start = old_end - old as usize;
    blocks[start + 4..start + 8].copy_from_slice(&length.to_le_bytes());
    let (option, end) = blocks[old_end - PACKET_END..].split_at_mut(by);
    option.fill(0);
    option[..4].copy_from_slice(&head.to_le_bytes());
    end[..4].copy_from_slice(&option_head(OPT_ENDOFOPT, 0).to_le_bytes());
    end[4..].copy_from_slice(&length.to_le_bytes());
    &mut option[4..]
}

/// What [`peek`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peeked {
    /// Length of the packet's block.
    pub block_len: usize,
    /// When, in UTC nanoseconds.
    pub timestamp_ns: u64,
    /// Bytes captured of it.
    pub captured: u32,
}

/// Reads the head of the packet block that `blocks` starts with. Only for blocks of our own making:
/// it is not checked that they are whole. `None` at the end.
#[inline]
pub fn peek(blocks: &[u8]) -> Option<Peeked> {
    let head = blocks.first_chunk::<PACKET_HEAD>()?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    Some(Peeked {
        block_len: word(4) as usize,
        timestamp_ns: u64::from(word(12)) << 32 | u64::from(word(16)),
        captured: word(20),
    })
}

/// Finds the whole blocks at the front of `buf`: what may stay of a file that was torn by a full
/// disk or a crash.
///
/// It stops in front of the first block that is cut off, whose two lengths differ or make no sense,
/// or that is a packet longer than its block. A large file can be walked piece by piece, each from
/// where the last prefix ended.
pub fn whole_prefix(buf: &[u8]) -> Prefix {
    let mut prefix = Prefix::default();
    while let Some(block) = buf.get(prefix.bytes..).and_then(first_block) {
        if u32_at(block, 0) == Some(ENHANCED_PACKET) {
            let Some(captured) = captured_len(block) else { break };
            prefix.packets += 1;
            prefix.captured_bytes += u64::from(captured);
        }
        prefix.bytes += block.len();
    }
    prefix
}

/// The block that `buf` starts with, if it is whole.
pub(crate) fn first_block(buf: &[u8]) -> Option<&[u8]> {
    let length = u32_at(buf, 4)? as usize;
    if length < MIN_BLOCK || !length.is_multiple_of(4) {
        return None;
    }
    let block = buf.get(..length)?;
    (u32_at(block, length - 4)? as usize == length).then_some(block)
}

/// The captured length of an enhanced packet block of anybody's, if the block has room for it.
pub(super) fn captured_len(block: &[u8]) -> Option<u32> {
    let captured = u32_at(block, 20)?;
    let room = block.len().checked_sub(PACKET_HEAD + size_of::<u32>())?;
    (captured as usize <= room).then_some(captured)
}

/// Appends one block: `body` appends what stands between its two lengths, in whole 32-bit words.
fn block(out: &mut Vec<u8>, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    put_u32(out, kind);
    put_u32(out, 0);
    body(out);
    // A handful of options of at most 64 KiB: far from 32 bits.
    let length = (out.len() - start + 4) as u32;
    out[start + 4..start + 8].copy_from_slice(&length.to_le_bytes());
    put_u32(out, length);
}

/// Appends a list of options, and its end if `list` appended any.
fn options(out: &mut Vec<u8>, list: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    list(out);
    if out.len() > start {
        put_u32(out, option_head(OPT_ENDOFOPT, 0));
    }
}

/// Appends one option. `value` has at most [`MAX_OPTION`] bytes.
fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    put_u32(out, option_head(code, value.len() as u16));
    out.extend_from_slice(value);
    let padding = value.len().next_multiple_of(4) - value.len();
    out.extend_from_slice(&[0; 3][..padding]);
}

/// Appends an option that is a text, cut to what fits, unless it is empty.
fn text_option(out: &mut Vec<u8>, code: u16, text: &str) {
    if !text.is_empty() {
        option(out, code, cut(text, MAX_OPTION).as_bytes());
    }
}

/// As much of `text` as fits `max` bytes without a torn character.
fn cut(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

/// A time as the format has it, which is not how it has any other 64-bit number.
const fn upper_half_first(time_ns: u64) -> u64 {
    time_ns.rotate_left(32)
}

/// The word that an option starts with.
const fn option_head(code: u16, length: u16) -> u32 {
    (length as u32) << 16 | code as u32
}

fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Fills `out` with `N` words; `BYTES` is four times `N`. All of it folds into a few stores.
#[inline]
fn words<const BYTES: usize, const N: usize>(out: &mut [u8; BYTES], values: [u32; N]) {
    const { assert!(BYTES == 4 * N) };
    out.copy_from_slice(values.map(u32::to_le_bytes).as_flattened());
}

pub(super) fn u32_at(buf: &[u8], at: usize) -> Option<u32> {
    buf.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use pcap_file::pcapng::{
        Block, PcapNgParser,
        blocks::{
            enhanced_packet::EnhancedPacketOption,
            interface_description::InterfaceDescriptionOption,
            interface_statistics::InterfaceStatisticsOption, section_header::SectionHeaderOption,
        },
    };
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const TIME_NS: u64 = 0x0102_0304_0506_0708;

    /// The bytes of hexadecimal text; `|` and white space are for the reader.
    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u32> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
        digits.chunks_exact(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()
    }

    fn sample(data: &[u8]) -> Packet<'_> {
        Packet {
            interface: 1,
            queue: 7,
            direction: Direction::Outbound,
            timestamp_ns: TIME_NS,
            original_len: 1514,
            data,
        }
    }

    /// The packet's block, out of a buffer that fits it exactly and was full of something else.
    fn encode(one: &Packet<'_>) -> Vec<u8> {
        let mut out = vec![0xff; packet_len(one.data.len())];
        assert_eq!(packet(&mut out, one), Some(out.len()));
        out
    }

    /// Parses a file and returns its blocks behind the section header.
    fn read_back(file: &[u8]) -> Vec<Block<'_>> {
        let (mut rest, mut parser) = PcapNgParser::new(file).unwrap();
        let mut blocks = Vec::new();
        while !rest.is_empty() {
            let (after, block) = parser.next_block(rest).unwrap();
            blocks.push(block);
            rest = after;
        }
        blocks
    }

    /// What every file starts with.
    fn section() -> Vec<u8> {
        let mut out = Vec::new();
        section_header(&mut out, &SectionInfo::default());
        out
    }

    /// A file with one of each block and packets of every padding, and where each block ends.
    fn file() -> (Vec<u8>, Vec<Prefix>) {
        let mut out = section();
        let mut ends = vec![Prefix { bytes: out.len(), packets: 0, captured_bytes: 0 }];
        interface_description(&mut out, &InterfaceInfo { name: "eth0", ..Default::default() });
        let mut end = Prefix { bytes: out.len(), packets: 0, captured_bytes: 0 };
        ends.push(end);
        for size in 0..9 {
            out.extend(encode(&sample(&vec![0xaa; size])));
            end = Prefix {
                bytes: out.len(),
                packets: end.packets + 1,
                captured_bytes: end.captured_bytes + size as u64,
            };
            ends.push(end);
        }
        interface_statistics(&mut out, &InterfaceStatistics::default());
        ends.push(Prefix { bytes: out.len(), ..end });
        (out, ends)
    }

    #[test]
    fn section_header_is_byte_exact() {
        let mut out = Vec::new();
        let info = SectionInfo { hardware: "x86", os: "Linux", application: "tapl", comment: "" };
        section_header(&mut out, &info);
        let expected = hex("0a0d0d0a | 3c000000 | 4d3c2b1a | 0100 0000 | ffffffffffffffff
             0200 0300 78383600 | 0300 0500 4c696e7578000000 | 0400 0400 7461706c | 0000 0000
             3c000000");
        assert_eq!(out, expected);
    }

    #[test]
    fn section_header_without_texts_has_no_options() {
        let expected = hex("0a0d0d0a 1c000000 4d3c2b1a 0100 0000 ffffffffffffffff 1c000000");
        assert_eq!(section(), expected);
    }

    #[test]
    fn interface_description_is_byte_exact() {
        let mut out = Vec::new();
        let info =
            InterfaceInfo { name: "eth0", filter: "tcp", snaplen: 160, ..Default::default() };
        interface_description(&mut out, &info);
        let expected = hex("01000000 | 30000000 | 0100 0000 | a0000000
             0200 0400 65746830 | 0900 0100 09000000 | 0b00 0400 00746370 | 0000 0000
             30000000");
        assert_eq!(out, expected);
    }

    #[test]
    fn interface_statistics_are_byte_exact() {
        let mut out = Vec::new();
        let statistics = InterfaceStatistics {
            interface: 1,
            timestamp_ns: TIME_NS,
            start_ns: 0x1112_1314_1516_1718,
            end_ns: TIME_NS,
            received: Some(5),
            dropped_by_os: Some(0),
            ..Default::default()
        };
        interface_statistics(&mut out, &statistics);
        let expected = hex("05000000 | 4c000000 | 01000000 | 04030201 08070605
             0200 0800 14131211 18171615 | 0300 0800 04030201 08070605
             0400 0800 0500000000000000 | 0700 0800 0000000000000000 | 0000 0000
             4c000000");
        assert_eq!(out, expected);
    }

    #[test]
    fn packet_is_byte_exact() {
        let expected = hex("06000000 | 3c000000 | 01000000 | 04030201 08070605
             05000000 | ea050000 | 6162636465 000000
             0200 0400 02000000 | 0600 0400 07000000 | 0000 0000
             3c000000");
        assert_eq!(encode(&sample(b"abcde")), expected);
    }

    #[test]
    fn a_padded_packet_is_byte_exact_and_reads_as_before() {
        let expected = hex("06000000 | 44000000 | 01000000 | 04030201 08070605
             05000000 | ea050000 | 6162636465 000000
             0200 0400 02000000 | 0600 0400 07000000 | 00ff 0400 00000000 | 0000 0000
             44000000");
        let mut block = encode(&sample(b"abcde"));
        block.extend([0xff; 8]);
        pad(&mut block, 8);
        assert_eq!(block, expected);

        let plain = [section(), encode(&sample(b"")), encode(&sample(b"abcde"))].concat();
        for by in [0, 4, 8, 4092, 65_536] {
            let mut file = plain.clone();
            file.resize(plain.len() + by, 0xff);
            pad(&mut file, by);
            let prefix = whole_prefix(&file);
            assert_eq!((prefix.bytes, prefix.packets), (file.len(), 2), "{by}");
            let blocks = read_back(&file);
            let Some(Block::EnhancedPacket(packet)) = blocks.last() else { panic!("{blocks:?}") };
            assert_eq!((&*packet.data, packet.original_len), (&b"abcde"[..], 1514), "{by}");
        }
    }

    #[test]
    fn packet_of_nothing_is_all_overhead() {
        let block = encode(&sample(b""));
        assert_eq!(block.len(), PACKET_OVERHEAD);
        assert_eq!(whole_prefix(&block), Prefix { bytes: 52, packets: 1, captured_bytes: 0 });
    }

    #[test]
    fn every_text_and_count_reads_back() {
        let mut out = Vec::new();
        let info = SectionInfo { hardware: "h", os: "oß", application: "app", comment: "note" };
        section_header(&mut out, &info);
        let info = InterfaceInfo {
            name: "eth0",
            description: "uplink",
            filter: "tcp port 80",
            os: "Linux",
            hardware: "ice",
            comment: "note",
            snaplen: 9000,
            linktype: LINKTYPE_ETHERNET,
        };
        interface_description(&mut out, &info);
        let statistics = InterfaceStatistics {
            interface: 0,
            timestamp_ns: TIME_NS,
            start_ns: TIME_NS - 2,
            end_ns: TIME_NS - 1,
            received: Some(1),
            dropped_by_interface: Some(2),
            filter_accepted: Some(3),
            dropped_by_os: Some(4),
            delivered: Some(u64::MAX),
            comment: "job",
        };
        interface_statistics(&mut out, &statistics);

        let (_, parser) = PcapNgParser::new(&out).unwrap();
        assert_eq!(parser.section().section_length, -1);
        assert_eq!((parser.section().major_version, parser.section().minor_version), (1, 0));
        assert_eq!(
            parser.section().options,
            [
                SectionHeaderOption::Comment("note".into()),
                SectionHeaderOption::Hardware("h".into()),
                SectionHeaderOption::OS("oß".into()),
                SectionHeaderOption::UserApplication("app".into()),
            ]
        );

        let [Block::InterfaceDescription(interface), Block::InterfaceStatistics(counts)] =
            &read_back(&out)[..]
        else {
            panic!("not an interface and its statistics")
        };
        assert_eq!((u32::from(interface.linktype), interface.snaplen), (1, 9000));
        assert_eq!(
            interface.options,
            [
                InterfaceDescriptionOption::Comment("note".into()),
                InterfaceDescriptionOption::IfName("eth0".into()),
                InterfaceDescriptionOption::IfDescription("uplink".into()),
                InterfaceDescriptionOption::IfTsResol(9),
                InterfaceDescriptionOption::IfFilter(b"\0tcp port 80".into()),
                InterfaceDescriptionOption::IfOs("Linux".into()),
                InterfaceDescriptionOption::IfHardware("ice".into()),
            ]
        );
        // This reader takes the three times for plain 64-bit numbers.
        assert_eq!(counts.timestamp.rotate_left(32), TIME_NS);
        assert_eq!(
            counts.options,
            [
                InterfaceStatisticsOption::Comment("job".into()),
                InterfaceStatisticsOption::IsbStartTime((TIME_NS - 2).rotate_left(32)),
                InterfaceStatisticsOption::IsbEndTime((TIME_NS - 1).rotate_left(32)),
                InterfaceStatisticsOption::IsbIfRecv(1),
                InterfaceStatisticsOption::IsbIfDrop(2),
                InterfaceStatisticsOption::IsbFilterAccept(3),
                InterfaceStatisticsOption::IsbOsDrop(4),
                InterfaceStatisticsOption::IsbUsrDeliv(u64::MAX),
            ]
        );
    }

    #[test]
    fn blocks_append_to_a_buffer_of_any_length() {
        // Padding goes by the option's own length, not by where the buffer happens to end.
        let mut out = vec![0xff; 3];
        interface_description(&mut out, &InterfaceInfo { name: "lo", ..Default::default() });
        let mut alone = Vec::new();
        interface_description(&mut alone, &InterfaceInfo { name: "lo", ..Default::default() });
        assert_eq!(out[3..], alone);
    }

    #[test]
    fn a_text_too_long_is_cut_between_characters() {
        let text = "é".repeat(40_000);
        let mut out = section();
        let info = InterfaceInfo { description: &text, filter: &text, ..Default::default() };
        interface_description(&mut out, &info);
        let [Block::InterfaceDescription(interface)] = &read_back(&out)[..] else {
            panic!("not an interface")
        };
        let (
            InterfaceDescriptionOption::IfDescription(description),
            InterfaceDescriptionOption::IfFilter(filter),
        ) = (&interface.options[0], &interface.options[2])
        else {
            panic!("not a description and a filter")
        };
        assert_eq!(**description, text[..65_534]);
        assert_eq!(filter[1..], text.as_bytes()[..65_534]);
    }

    #[test]
    fn a_text_that_just_fits_is_whole() {
        let text = "e".repeat(65_535);
        let mut out = Vec::new();
        section_header(&mut out, &SectionInfo { comment: &text, ..Default::default() });
        // A filter has one byte less, for what kind it is.
        interface_description(&mut out, &InterfaceInfo { filter: &text, ..Default::default() });
        let [Block::InterfaceDescription(interface)] = &read_back(&out)[..] else {
            panic!("not an interface")
        };
        let filter = format!("\0{}", &text[1..]).into_bytes();
        assert_eq!(interface.options[1], InterfaceDescriptionOption::IfFilter(filter.into()));
        let (_, parser) = PcapNgParser::new(&out).unwrap();
        assert_eq!(parser.section().options, [SectionHeaderOption::Comment(text.into())]);
    }

    #[test]
    fn an_absurd_length_fits_nowhere() {
        assert_eq!(packet_len(usize::MAX), usize::MAX);
        assert_eq!(packet_len(u32::MAX as usize), (1 << 32) + PACKET_OVERHEAD);
    }

    #[test]
    fn whole_prefix_of_any_truncation_ends_at_a_block() {
        let (file, ends) = file();
        for cut in 0..=file.len() {
            let expected = ends.iter().rfind(|end| end.bytes <= cut).copied().unwrap_or_default();
            assert_eq!(whole_prefix(&file[..cut]), expected, "cut at {cut}");
        }
    }

    #[test]
    fn whole_prefix_stops_at_garbage() {
        let (file, ends) = file();
        let whole = ends[ends.len() - 1];
        for (what, garbage) in [
            ("zeros, as a lost page has them", hex("00000000 00000000 00000000 00000000")),
            ("a length below 12, its own trailer", hex("adde0000 08000000")),
            ("a length that is no multiple of 4", hex("adde0000 0e000000 0000 0e000000")),
            ("two lengths that differ", hex("adde0000 10000000 00000000 14000000")),
            ("a length beyond the end", hex("adde0000 14000000 00000000 14000000")),
            ("the longest length", hex("adde0000 ffffffff 00000000 ffffffff")),
            ("a packet block without a captured length", hex("06000000 0c000000 0c000000")),
            (
                "a packet longer than its block",
                hex("06000000 24000000 00000000 0000000000000000 05000000 05000000
                     00000000 24000000"),
            ),
        ] {
            assert_eq!(whole_prefix(&garbage), Prefix::default(), "{what}");
            assert_eq!(whole_prefix(&[&file[..], &garbage].concat()), whole, "{what}");
        }
    }

    #[test]
    fn whole_prefix_takes_blocks_of_other_writers() {
        let without_options =
            hex("06000000 24000000 00000000 0000000000000000 04000000 04000000 61626364 24000000");
        let unknown = hex("adde0000 0c000000 0c000000");
        let prefix = whole_prefix(&[without_options, unknown].concat());
        assert_eq!(prefix, Prefix { bytes: 48, packets: 1, captured_bytes: 4 });
    }

    fn direction() -> impl Strategy<Value = Direction> {
        prop_oneof![Just(Direction::Unknown), Just(Direction::Inbound), Just(Direction::Outbound)]
    }

    proptest! {
        #[test]
        fn any_packet_reads_back(
            (interface, queue, original_len, timestamp_ns) in any::<(u32, u32, u32, u64)>(),
            direction in direction(),
            data in vec(any::<u8>(), 0..=9100),
        ) {
            let data = &data[..];
            let one = Packet { interface, queue, direction, timestamp_ns, original_len, data };
            let file = [section(), encode(&one)].concat();
            let blocks = read_back(&file);
            let [Block::EnhancedPacket(read)] = &blocks[..] else { panic!("not a packet") };
            prop_assert_eq!(read.interface_id, interface);
            prop_assert_eq!(read.timestamp.as_nanos(), u128::from(timestamp_ns));
            prop_assert_eq!(read.original_len, original_len);
            prop_assert_eq!(&read.data[..], data);
            let [EnhancedPacketOption::Flags(flags), EnhancedPacketOption::Unknown(option)] =
                &read.options[..]
            else {
                panic!("not flags and one more option")
            };
            prop_assert_eq!(*flags, direction as u32);
            prop_assert_eq!((option.code, &option.value[..]), (6, &queue.to_le_bytes()[..]));

            let behind_data = &encode(&one)[PACKET_HEAD + data.len()..];
            let padding = &behind_data[..behind_data.len() - PACKET_TAIL];
            prop_assert!(padding.len() < 4);
            prop_assert!(padding.iter().all(|byte| *byte == 0));
        }

        #[test]
        fn a_buffer_too_small_by_any_number_is_left_alone(
            data in vec(any::<u8>(), 0..=9100),
            missing in prop_oneof![Just(1), any::<usize>()],
        ) {
            let room = packet_len(data.len());
            let mut out = vec![0xff; room - missing.min(room)];
            if missing > 0 {
                prop_assert_eq!(packet(&mut out, &sample(&data)), None);
                prop_assert_eq!(packet_parts(&mut out, &sample(&data), 9100, iter::empty()), None);
                prop_assert!(out.iter().all(|byte| *byte == 0xff));
            }
        }

        #[test]
        fn a_packet_in_parts_is_the_packet(
            parts in vec(vec(any::<u8>(), 0..=3000), 1..=4),
            snaplen in prop_oneof![0..=12_000_usize, Just(usize::MAX)],
        ) {
            let data = parts.concat();
            let whole = encode(&sample(&data[..data.len().min(snaplen)]));
            let mut out = vec![0xff; whole.len() + 1];
            let rest = parts[1..].iter().map(Vec::as_slice);
            let written = packet_parts(&mut out, &sample(&parts[0]), snaplen, rest);
            prop_assert_eq!(written, Some(whole.len()));
            prop_assert_eq!(&out[..whole.len()], &whole[..]);
            prop_assert_eq!(out[whole.len()], 0xff);
        }

        #[test]
        fn whole_prefix_of_a_damaged_file_is_a_prefix(
            at in any::<prop::sample::Index>(),
            noise in vec(any::<u8>(), 1..=16),
        ) {
            let (mut file, ends) = file();
            let at = at.index(file.len());
            for (byte, noise) in file[at..].iter_mut().zip(noise) {
                *byte = noise;
            }
            let prefix = whole_prefix(&file);
            prop_assert!(prefix.bytes <= file.len());
            prop_assert_eq!(whole_prefix(&file[..prefix.bytes]), prefix);
            // What lies in front of the damage stays.
            let before = ends.iter().rfind(|end| end.bytes <= at).copied().unwrap_or_default();
            prop_assert!(prefix.bytes >= before.bytes && prefix.packets >= before.packets);
        }
    }
}
