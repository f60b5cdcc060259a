//! Reads segments of ours back: packet by packet, one file or several as one.
//!
//! - A file is walked in pieces, and of several files only those are open whose turn it is: memory does
//!   not grow with what is read.
//! - What was damaged is skipped up to the next whole block and counted. It never ends the reading.
//! - What is torn off at the end, or not written yet, is counted by itself: a segment that is still open
//!   always ends so.
//! - Only what [`pcapng`] writes is understood: little-endian, one section, nanoseconds.
//!
//! The blocks are walked by hand. A general reader stops at the first block that is damaged, allocates
//! for every option, and does not say where in the file a packet lies, which an index has to know.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use super::{
    SegmentError,
    pcapng::{
        self, Direction, ENHANCED_PACKET, EPB_FLAGS, EPB_QUEUE, IF_FILTER, IF_NAME,
        INTERFACE_DESCRIPTION, INTERFACE_STATISTICS, OPT_COMMENT, OPT_ENDOFOPT, PACKET_HEAD,
        SECTION_HEADER, SectionInfo, captured_len, first_block, u32_at,
    },
};

/// Read at a time, bytes: more than the longest block that is ever written.
const PIECE: usize = 1 << 20;

/// What stands in front of the number in the comment of a sampled packet, or of a sampled interface.
pub(crate) const SAMPLED: &str = "sampled 1 in ";

/// An interface of a segment.
#[derive(Clone, Debug, PartialEq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// What its packets begin with, from the registry of link types.
    pub link_type: u16,
    /// Most bytes kept of a packet; 0 is all.
    pub snaplen: u32,
    /// The filter that its packets had to pass.
    pub filter: String,
    /// How it was captured.
    pub comment: String,
    /// How many packets each of its packets stands for, unless the packet says otherwise.
    pub weight: f64,
    /// Its block.
    block: Vec<u8>,
}

/// A packet of a segment.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Index of its interface.
    pub interface: u32,
    /// The queue of the interface that it came through.
    pub queue: u32,
    /// Which way it went.
    pub direction: Direction,
    /// When, in UTC nanoseconds.
    pub timestamp_ns: u64,
    /// Its length on the wire.
    pub original_len: u32,
    /// What was kept of it.
    pub data: &'a [u8],
    /// How many packets it stands for: it was sampled 1 in this many. 1 where nothing says otherwise.
    pub weight: f64,
    pub(crate) block: &'a [u8],
}

/// What a segment lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// Places where damaged bytes were skipped.
    pub gaps: u64,
    /// How many bytes.
    pub bytes: u64,
    /// Bytes behind the last whole block.
    pub torn: u64,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_le_bytes(*bytes))
}

/// The options of a block, from where they start. Ends at the first that is damaged.
fn options(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let code = u16_at(bytes, 0).filter(|code| *code != OPT_ENDOFOPT)?;
        let length = usize::from(u16_at(bytes, 2)?);
        let value = bytes.get(4..4 + length)?;
        bytes = bytes.get(4 + length.next_multiple_of(4)..).unwrap_or_default();
        Some((code, value))
    })
}

/// How many packets one stands for whose comment says so.
fn weight(comment: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(comment).ok()?;
    let (_, number) = text.split_once(SAMPLED)?;
    let end = number.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(number.len());
    // A full stop may end a sentence.
    number[..end].trim_end_matches('.').parse().ok().filter(|weight| *weight >= 1.0)
}

impl Interface {
    /// Reads an interface description block.
    fn parse(block: &[u8]) -> Option<Self> {
        let mut interface = Self {
            name: String::new(),
            link_type: u16_at(block, 8)?,
            snaplen: u32_at(block, 12)?,
            filter: String::new(),
            comment: String::new(),
            weight: 1.0,
            block: block.to_vec(),
        };
        for (code, value) in options(block.get(16..block.len() - 4)?) {
            let text = |value| String::from_utf8_lossy(value).into_owned();
            match code {
                OPT_COMMENT => {
                    interface.weight = weight(value).unwrap_or(1.0);
                    interface.comment = text(value);
                }
                IF_NAME => interface.name = text(value),
                // A zero byte first: the filter is text.
                IF_FILTER => interface.filter = text(value.get(1..).unwrap_or_default()),
                _ => {}
            }
        }
        Some(interface)
    }
}

impl<'a> Packet<'a> {
    /// Reads an enhanced packet block of one of these interfaces.
    pub(crate) fn parse(block: &'a [u8], interfaces: &[Interface]) -> Option<Self> {
        let interface = u32_at(block, 8)?;
        let captured = captured_len(block)? as usize;
        let mut packet = Self {
            interface,
            queue: 0,
            direction: Direction::Unknown,
            timestamp_ns: u64::from(u32_at(block, 12)?) << 32 | u64::from(u32_at(block, 16)?),
            original_len: u32_at(block, 24)?,
            data: block.get(PACKET_HEAD..PACKET_HEAD + captured)?,
            weight: interfaces.get(interface as usize)?.weight,
            block,
        };
        let from = PACKET_HEAD + captured.next_multiple_of(4);
        for (code, value) in options(block.get(from..block.len() - 4).unwrap_or_default()) {
            match code {
                EPB_FLAGS => {
                    packet.direction = match u32_at(value, 0)? & 3 {
                        1 => Direction::Inbound,
                        2 => Direction::Outbound,
                        _ => Direction::Unknown,
                    };
                }
                EPB_QUEUE => packet.queue = u32_at(value, 0)?,
                OPT_COMMENT => packet.weight = weight(value).unwrap_or(packet.weight),
                _ => {}
            }
        }
        Some(packet)
    }

    /// Appends its block, as it is but for the index of its interface, which is `self.interface`.
    pub fn append_to(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(self.block);
        out[start + 8..start + 12].copy_from_slice(&self.interface.to_le_bytes());
    }
}

/// Appends the blocks that a file of these interfaces begins with.
pub fn head(out: &mut Vec<u8>, comment: &str, interfaces: &[Interface]) {
    let application = concat!("Tapline ", env!("CARGO_PKG_VERSION"));
    pcapng::section_header(out, &SectionInfo { application, comment, ..SectionInfo::default() });
    for interface in interfaces {
        out.extend_from_slice(&interface.block);
    }
}

/// What a walk over bytes finds next.
enum Step {
    /// A whole block of this length.
    Block(usize),
    /// Nothing whole in these bytes.
    Nothing,
}

/// Reads one segment.
#[derive(Debug)]
pub struct Reader {
    file: File,
    path: PathBuf,
    piece: Vec<u8>,
    /// Start of the piece, in the file.
    base: u64,
    /// Start of what has not been read, in the piece.
    at: usize,
    /// Whether the file has been read to its end.
    ended: bool,
    /// Length of the packet's block that ends at `at`.
    block: usize,
    /// Bytes skipped since the last whole block.
    skipped: u64,
    interfaces: Vec<Interface>,
    /// Where the blocks behind the interfaces begin, in the file.
    head: u64,
    /// The statistics blocks read so far.
    statistics: Vec<u8>,
    damage: Damage,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SegmentError {
    move |source| SegmentError { operation, path: path.to_path_buf(), source }
}

/// Whether a block is of a type that is written behind the interfaces.
fn is_expected(block: &[u8]) -> bool {
    matches!(u32_at(block, 0), Some(ENHANCED_PACKET | INTERFACE_STATISTICS))
}

impl Reader {
    /// Opens a segment, visible or hidden, and reads its interfaces.
    pub fn open(path: &Path) -> Result<Self, SegmentError> {
        Self::of(File::open(path).map_err(failed("opening", path))?, path)
    }

    /// The same for one that is open already.
    pub(crate) fn of(file: File, path: &Path) -> Result<Self, SegmentError> {
        let mut reader = Self {
            file,
            path: path.to_path_buf(),
            piece: Vec::with_capacity(PIECE),
            base: 0,
            at: 0,
            ended: false,
            block: 0,
            skipped: 0,
            interfaces: Vec::new(),
            head: 0,
            statistics: Vec::new(),
            damage: Damage::default(),
        };
        reader.fill()?;
        // All interfaces stand in front of the first packet.
        while let Step::Block(length) = reader.look() {
            let block = &reader.piece[reader.at..reader.at + length];
            match u32_at(block, 0) {
                Some(SECTION_HEADER) => {}
                Some(INTERFACE_DESCRIPTION) => {
                    reader.interfaces.extend(Interface::parse(block));
                }
                _ => break,
            }
            reader.at += length;
        }
        reader.head = reader.at as u64;
        Ok(reader)
    }

    /// Its interfaces.
    pub fn interfaces(&self) -> &[Interface] {
        &self.interfaces
    }

    /// The next packet; `None` at the end.
    pub fn packet(&mut self) -> Result<Option<Packet<'_>>, SegmentError> {
        if !self.advance()? {
            return Ok(None);
        }
        Ok(self.current())
    }

    /// Where the block of the packet begins that was read last; at the end, the size of the file.
    pub(crate) fn offset(&self) -> u64 {
        self.base + (self.at - self.block) as u64
    }

    /// What could not be read so far.
    pub fn damage(&self) -> Damage {
        self.damage
    }

    /// The packet that [`advance`](Self::advance) found.
    pub(crate) fn current(&self) -> Option<Packet<'_>> {
        Packet::parse(self.piece.get(self.at - self.block..self.at)?, &self.interfaces)
    }

    /// Goes to the next packet; false at the end.
    pub(crate) fn advance(&mut self) -> Result<bool, SegmentError> {
        self.block = 0;
        loop {
            match self.look() {
                Step::Block(length) => {
                    let block = &self.piece[self.at..self.at + length];
                    let packet = u32_at(block, 0) == Some(ENHANCED_PACKET);
                    if packet && Packet::parse(block, &self.interfaces).is_none()
                        || !is_expected(block)
                    {
                        self.skip(length);
                        continue;
                    }
                    self.at += length;
                    if let gap @ 1.. = std::mem::take(&mut self.skipped) {
                        self.damage.gaps += 1;
                        self.damage.bytes += gap;
                    }
                    if packet {
                        self.block = length;
                        return Ok(true);
                    }
                    self.statistics.extend_from_slice(&self.piece[self.at - length..self.at]);
                }
                Step::Nothing if !self.ended && self.piece.len() - self.at < PIECE => {
                    self.fill()?;
                }
                // Damaged here, or torn: a block may begin at any multiple of 4.
                Step::Nothing => {
                    let rest = self.piece.len() - self.at;
                    if rest == 0 {
                        self.damage.torn += std::mem::take(&mut self.skipped);
                        return Ok(false);
                    }
                    self.skip(rest.min(4));
                }
            }
        }
    }

    fn skip(&mut self, bytes: usize) {
        self.at += bytes;
        self.skipped += bytes as u64;
    }

    fn look(&self) -> Step {
        let rest = &self.piece[self.at..];
        match first_block(rest) {
            // Among damaged bytes, only what is surely a block is taken for one.
            Some(block) if self.skipped == 0 || is_expected(block) => Step::Block(block.len()),
            _ => Step::Nothing,
        }
    }

    fn fill(&mut self) -> Result<(), SegmentError> {
        self.piece.drain(..self.at);
        self.base += self.at as u64;
        self.at = 0;
        let room = (PIECE - self.piece.len()) as u64;
        let more = (&mut self.file)
            .take(room)
            .read_to_end(&mut self.piece)
            .map_err(failed("reading", &self.path))?;
        self.ended = (more as u64) < room;
        Ok(())
    }
}

/// A segment whose turn it is, or will be.
struct Source {
    path: PathBuf,
    /// Its interfaces among those of all.
    interfaces: Vec<u32>,
    reader: Option<Reader>,
}

/// Reads several segments as one, in the order of time as far as each of them is in order.
pub struct Merged {
    sources: Vec<Source>,
    interfaces: Vec<Interface>,
    /// Bytes of all that stands behind the interfaces in the segments.
    body: u64,
    /// The statistics blocks of the segments that have been read to their end.
    statistics: Vec<u8>,
    /// By the time of its next packet, each segment that has one.
    heads: BinaryHeap<Reverse<(u64, usize)>>,
    /// The segment whose packet was given last.
    last: Option<usize>,
    damage: Damage,
}

impl Merged {
    /// Looks at each segment; those are open at once whose times overlap.
    pub fn open(paths: &[PathBuf]) -> Result<Self, SegmentError> {
        let mut merged = Self {
            sources: Vec::new(),
            interfaces: Vec::new(),
            body: 0,
            statistics: Vec::new(),
            heads: BinaryHeap::new(),
            last: None,
            damage: Damage::default(),
        };
        for path in paths {
            let mut reader = Reader::open(path)?;
            let size = reader.file.metadata().map_err(failed("reading", path))?.len();
            merged.body += size.saturating_sub(reader.head);
            let interfaces = reader
                .interfaces
                .iter()
                .map(|interface| index_of(&mut merged.interfaces, interface))
                .collect();
            let at = merged.sources.len();
            merged.sources.push(Source { path: path.clone(), interfaces, reader: None });
            if let Some(first) = reader.packet()? {
                merged.heads.push(Reverse((first.timestamp_ns, at)));
            } else {
                merged.end(at, &reader);
            }
        }
        Ok(merged)
    }

    /// The interfaces of all segments; those that are described alike are one.
    pub fn interfaces(&self) -> &[Interface] {
        &self.interfaces
    }

    /// What could not be read of the segments that have been read to their end.
    pub fn damage(&self) -> Damage {
        self.damage
    }

    /// Bytes of all that stands behind the interfaces in the segments.
    pub(crate) fn body(&self) -> u64 {
        self.body
    }

    /// At the end, the statistics blocks of all segments, of these interfaces.
    pub(crate) fn statistics(&self) -> &[u8] {
        &self.statistics
    }

    /// The next packet; `None` at the end.
    pub fn packet(&mut self) -> Result<Option<Packet<'_>>, SegmentError> {
        if let Some(last) = self.last.take() {
            self.advance(last)?;
        }
        let Some(Reverse((_, at))) = self.heads.pop() else { return Ok(None) };
        self.last = Some(at);
        let source = &mut self.sources[at];
        if source.reader.is_none() {
            let mut reader = Reader::open(&source.path)?;
            reader.advance()?;
            source.reader = Some(reader);
        }
        let packet = source.reader.as_ref().and_then(Reader::current);
        Ok(packet.map(|packet| Packet {
            interface: source.interfaces[packet.interface as usize],
            ..packet
        }))
    }

    fn advance(&mut self, at: usize) -> Result<(), SegmentError> {
        let Some(reader) = &mut self.sources[at].reader else { return Ok(()) };
        if reader.advance()?
            && let Some(packet) = reader.current()
        {
            self.heads.push(Reverse((packet.timestamp_ns, at)));
        } else if let Some(reader) = self.sources[at].reader.take() {
            self.end(at, &reader);
        }
        Ok(())
    }

    /// A segment has been read to its end.
    fn end(&mut self, at: usize, reader: &Reader) {
        self.damage += reader.damage;
        let mut rest = reader.statistics.as_slice();
        while let Some(block) = first_block(rest) {
            let start = self.statistics.len();
            self.statistics.extend_from_slice(block);
            // One of an interface that the segment does not have stays as it is.
            let own = u32_at(block, 8).unwrap_or_default() as usize;
            if let Some(interface) = self.sources[at].interfaces.get(own) {
                self.statistics[start + 8..start + 12].copy_from_slice(&interface.to_le_bytes());
            }
            rest = &rest[block.len()..];
        }
    }
}

impl std::fmt::Debug for Merged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Merged").field("segments", &self.sources.len()).finish_non_exhaustive()
    }
}

impl std::ops::AddAssign for Damage {
    fn add_assign(&mut self, other: Self) {
        self.gaps += other.gaps;
        self.bytes += other.bytes;
        self.torn += other.torn;
    }
}

/// Where an interface stands among others; it is added if it does not.
pub(crate) fn index_of(all: &mut Vec<Interface>, interface: &Interface) -> u32 {
    let known = all.iter().position(|known| known.block == interface.block);
    known.unwrap_or_else(|| {
        all.push(interface.clone());
        all.len() - 1
    }) as u32
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::segment::pcapng::{InterfaceInfo, interface_description, packet, packet_len};

    /// What a file with these interfaces begins with.
    fn begin(names: &[&str]) -> Vec<u8> {
        let mut out = Vec::new();
        pcapng::section_header(&mut out, &SectionInfo::default());
        for name in names {
            let comment = "tap, tcx, 2 CPUs, sampled 1 in 100. As it was.";
            interface_description(
                &mut out,
                &InterfaceInfo { name, comment, snaplen: 160, ..InterfaceInfo::default() },
            );
        }
        out
    }

    fn add(out: &mut Vec<u8>, interface: u32, timestamp_ns: u64, data: &[u8]) {
        let one = pcapng::Packet {
            interface,
            queue: 3,
            direction: Direction::Outbound,
            timestamp_ns,
            original_len: 1500,
            data,
        };
        let start = out.len();
        out.resize(start + packet_len(data.len()), 0);
        packet(&mut out[start..], &one).unwrap();
    }

    fn times(reader: &mut Reader) -> Vec<u64> {
        let mut times = Vec::new();
        while let Some(packet) = reader.packet().unwrap() {
            times.push(packet.timestamp_ns);
        }
        times
    }

    #[test]
    fn a_packet_reads_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pcapng");
        let mut bytes = begin(&["eth0", "eth1"]);
        add(&mut bytes, 1, 0x0102_0304_0506_0708, b"hello");
        fs::write(&path, &bytes).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        assert_eq!(reader.interfaces()[1].name, "eth1");
        assert_eq!(reader.interfaces()[1].snaplen, 160);
        let packet = reader.packet().unwrap().unwrap();
        assert_eq!((packet.interface, packet.queue, packet.original_len), (1, 3, 1500));
        assert_eq!((packet.timestamp_ns, packet.data), (0x0102_0304_0506_0708, &b"hello"[..]));
        assert_eq!(packet.direction, Direction::Outbound);
        assert!((packet.weight - 100.0).abs() < 1e-9, "the interface says so");
        assert!(reader.packet().unwrap().is_none());
        assert_eq!(reader.damage(), Damage::default());
    }

    #[test]
    fn a_flipped_byte_costs_at_most_two_packets_and_is_counted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pcapng");
        let mut bytes = begin(&["eth0"]);
        let start = bytes.len();
        for time in 1..=300 {
            add(&mut bytes, 0, time, &[0; 40]);
        }
        let clean = bytes.clone();
        for at in (start..bytes.len()).step_by(241) {
            for flip in [0x01, 0x80, 0xff] {
                bytes[at] ^= flip;
                fs::write(&path, &bytes).unwrap();
                let mut reader = Reader::open(&path).unwrap();
                let read = times(&mut reader);
                assert!(read.len() >= 298, "{at}: {}", read.len());
                let damage = reader.damage();
                assert_eq!(damage.gaps + damage.torn.min(1), (300 - read.len() as u64).min(1));
                bytes.clone_from(&clean);
            }
        }
    }

    #[test]
    fn a_hole_longer_than_a_piece_is_one_gap() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pcapng");
        let mut bytes = begin(&["eth0"]);
        add(&mut bytes, 0, 1, &[1; 60]);
        bytes.resize(bytes.len() + 2 * PIECE + 8, 0);
        add(&mut bytes, 0, 2, &[2; 60]);
        // A packet of an interface that there is not.
        add(&mut bytes, 7, 3, &[3; 60]);
        add(&mut bytes, 0, 4, &[4; 60]);
        let whole = bytes.len();
        add(&mut bytes, 0, 5, &[5; 60]);
        bytes.truncate(bytes.len() - 4);
        fs::write(&path, &bytes).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        assert_eq!(times(&mut reader), [1, 2, 4]);
        let lost = 2 * PIECE as u64 + 8 + packet_len(60) as u64;
        let torn = (bytes.len() - whole) as u64;
        assert_eq!(reader.damage(), Damage { gaps: 2, bytes: lost, torn });
    }

    #[test]
    fn several_segments_read_as_one_in_the_order_of_time() {
        let folder = tempfile::tempdir().unwrap();
        let files = [(&["eth0", "eth1"], [1, 4, 9]), (&["eth1", "eth2"], [2, 3, 10])];
        let mut paths = Vec::new();
        for (at, (names, times)) in files.into_iter().enumerate() {
            let mut bytes = begin(names);
            for time in times {
                add(&mut bytes, 1, time, &[at as u8; 60]);
            }
            paths.push(folder.path().join(format!("{at}.pcapng")));
            fs::write(&paths[at], bytes).unwrap();
        }
        let mut merged = Merged::open(&paths).unwrap();
        let names: Vec<_> = merged.interfaces().iter().map(|one| one.name.clone()).collect();
        assert_eq!(names, ["eth0", "eth1", "eth2"]);
        let mut read = Vec::new();
        let mut copy = Vec::new();
        head(&mut copy, "a copy", merged.interfaces());
        while let Some(packet) = merged.packet().unwrap() {
            read.push((packet.timestamp_ns, packet.interface, packet.data[0]));
            packet.append_to(&mut copy);
        }
        assert_eq!(read, [(1, 1, 0), (2, 2, 1), (3, 2, 1), (4, 1, 0), (9, 1, 0), (10, 2, 1)]);
        // The copy has all of them.
        let path = folder.path().join("copy.pcapng");
        fs::write(&path, copy).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        assert_eq!(reader.interfaces().len(), 3);
        assert_eq!(times(&mut reader), [1, 2, 3, 4, 9, 10]);
    }
}
