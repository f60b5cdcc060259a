//! The index of a segment: what lies where in it, so that a query reads only what can match.
//!
//! - A segment is divided into blocks of whole packets, about [`BLOCK`] bytes each. Of each the index
//!   says where it is, its checksum, its first and last time, and which addresses, ports and protocols
//!   occur in it, as sorted sets. A set that would become too large is left out: then anything may occur.
//! - It is derived data. One that is missing, torn, damaged or of another size than its segment's is not
//!   used, and made again from the segment.
//! - It says of no block that something is not in it that is.
//! - All numbers are little-endian.
//!
//! Sets and not Bloom filters: they answer for a prefix as they do for an address, they never name a
//! block in vain, and most blocks have few distinct values. They take 1 to 2 % of the segment; the bounds
//! keep it under an eighth whatever the traffic.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    path::Path,
};

use capture_ebpf::parse::{Headers, Ipv6, Network, ethernet, raw_ip};
use crc32fast::Hasher;

use crate::{
    filter::{Filter, Prefix},
    segment::{
        SegmentError,
        pcapng::{LINKTYPE_ETHERNET, LINKTYPE_RAW},
        read::{Packet, Reader},
    },
};

/// Bytes of a block at which it ends. Smaller, and the index grows; larger, and a query for few packets
/// reads more.
const BLOCK: u64 = 128 << 10;

/// Most values in a set of IPv4 addresses or ports: a block of the shortest packets has fewer.
const MOST: usize = 1280;

/// Most values in a set of IPv6 networks, which are twice as long.
const MOST_6: usize = 512;

/// Says that a set is left out.
const ANYTHING: u16 = u16::MAX;

const MAGIC: [u8; 8] = *b"TLINDEX1";

/// Length of what the file begins with.
const HEAD: usize = 64;

/// Length of what an entry begins with; the sets follow.
const ENTRY: usize = 84;

/// What a packet's headers say, as far as its interface's link type is known.
pub(super) fn headers(link_type: u16, data: &[u8]) -> Headers {
    match link_type {
        LINKTYPE_ETHERNET => ethernet(data),
        LINKTYPE_RAW => raw_ip(data),
        _ => Headers { network: Network::Unknown, protocol: None, ports: None },
    }
}

/// What the file begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Summary {
    /// Size of the segment, bytes.
    pub(super) size: u64,
    /// Earliest packet.
    pub(super) first_ns: u64,
    /// Latest packet.
    pub(super) last_ns: u64,
    /// Packets.
    pub(super) packets: u64,
    /// Damaged places that were found when the index was made.
    pub(super) gaps: u64,
}

/// The index of one segment.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) summary: Summary,
    body: Vec<u8>,
}

/// A block of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) crc: u32,
    pub(super) packets: u32,
    pub(super) first_ns: u64,
    pub(super) last_ns: u64,
    protocols: &'a [u8],
    /// Source and destination of IPv4, of IPv6, ports; `None` is anything.
    sets: [Option<&'a [u8]>; 6],
}

/// Lengths of the values in [`Entry::sets`].
const WIDTHS: [usize; 6] = [4, 4, 8, 8, 2, 2];

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

/// Whether a sorted set of values of this width has one from `first` to `last`.
fn has(set: &[u8], width: usize, first: u64, last: u64) -> bool {
    let value = |at: usize| {
        let bytes = &set[at * width..][..width];
        bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let (mut low, mut high) = (0, set.len() / width);
    while low < high {
        let middle = low.midpoint(high);
        if value(middle) < first { low = middle + 1 } else { high = middle }
    }
    low < set.len() / width && value(low) <= last
}

impl Entry<'_> {
    /// Whether some packet in the block may agree with the filter.
    pub(super) fn may_match(&self, filter: &Filter) -> bool {
        let has = |set: usize, first: u64, last: u64| {
            self.sets[set].is_none_or(|values| has(values, WIDTHS[set], first, last))
        };
        let address = |prefix: Option<Prefix>, side: usize| {
            prefix.is_none_or(|prefix| match (prefix.span4(), prefix.span6()) {
                (Some((first, last)), _) => has(side, first.into(), last.into()),
                (_, Some((first, last))) => {
                    has(2 + side, (first >> 64) as u64, (last >> 64) as u64)
                }
                _ => true,
            })
        };
        let port = |port: Option<u16>, side: usize| {
            port.is_none_or(|port| has(4 + side, port.into(), port.into()))
        };
        let protocol = filter.protocol.is_none_or(|protocol| {
            let number = usize::from(protocol.0);
            self.protocols[number / 8] >> (number % 8) & 1 != 0
        });
        protocol
            && port(filter.sport, 0)
            && port(filter.dport, 1)
            && address(filter.src, 0)
            && address(filter.dst, 1)
    }
}

impl Index {
    /// The blocks, in the segment's order.
    pub(super) fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        let mut rest = self.body.as_slice();
        std::iter::from_fn(move || {
            let length = u32_at(rest, 0)? as usize;
            let entry = rest.get(..length)?;
            rest = &rest[length..];
            parse(entry)
        })
    }

    /// Makes the index of a segment; of one that is still being written, as far as it is whole.
    pub(super) fn build(reader: &mut Reader, open: bool) -> Result<Self, SegmentError> {
        let mut builder = Builder::default();
        let links: Vec<u16> = reader.interfaces().iter().map(|one| one.link_type).collect();
        loop {
            let gaps = reader.damage().gaps;
            if !reader.advance()? {
                break;
            }
            // Where others are still in flight, what lies behind them may come twice.
            if open && reader.damage().gaps > 0 {
                break;
            }
            if reader.damage().gaps > gaps {
                builder.close();
            }
            let offset = reader.offset();
            let Some(packet) = reader.current() else { break };
            let link = links.get(packet.interface as usize).copied().unwrap_or_default();
            builder.add(offset, &packet, &headers(link, packet.data));
        }
        builder.close();
        builder.summary.size = reader.offset();
        builder.summary.gaps = if open { 0 } else { reader.damage().gaps };
        Ok(Self { summary: builder.summary, body: builder.body })
    }

    /// Reads an index; `None` when it cannot be used for a segment of this size.
    pub(super) fn load(path: &Path, size: u64) -> Option<Self> {
        let bytes = fs::read(path).ok()?;
        let (summary, crc, length) = head(bytes.first_chunk()?)?;
        let body = bytes.get(HEAD..)?;
        let usable =
            summary.size == size && body.len() as u64 == length && crc32fast::hash(body) == crc;
        usable.then(|| Self { summary, body: body.to_vec() })
    }

    /// Reads only what the file begins with.
    pub(super) fn peek(path: &Path, size: u64) -> Option<Summary> {
        let mut bytes = [0; HEAD];
        fs::File::open(path).ok()?.read_exact(&mut bytes).ok()?;
        head(&bytes).map(|(summary, ..)| summary).filter(|summary| summary.size == size)
    }

    /// The bytes of its file.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let summary = &self.summary;
        let mut numbers = Vec::with_capacity(HEAD);
        for number in [
            self.body.len() as u64,
            summary.size,
            summary.first_ns,
            summary.last_ns,
            summary.packets,
            summary.gaps,
        ] {
            numbers.extend(number.to_le_bytes());
        }
        let crc = crc32fast::hash(&self.body).to_le_bytes();
        let mut hasher = Hasher::new();
        hasher.update(&crc);
        hasher.update(&numbers);
        let head = hasher.finalize().to_le_bytes();
        [&MAGIC[..], &head, &crc, &numbers, &self.body].concat()
    }
}

/// Writes the file of an index. It is not synced: one that a crash tears is made again.
pub(super) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let hidden = path.with_extension("index.part");
    let written = fs::File::create(&hidden)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&hidden, path));
    if written.is_err() {
        drop(fs::remove_file(&hidden));
    }
    written
}

/// Reads the head: the summary, and the checksum and length of the body.
fn head(bytes: &[u8; HEAD]) -> Option<(Summary, u32, u64)> {
    let whole = bytes[..8] == MAGIC && u32_at(bytes, 8)? == crc32fast::hash(&bytes[12..]);
    let number = |at: usize| u64_at(bytes, at);
    let summary = Summary {
        size: number(24)?,
        first_ns: number(32)?,
        last_ns: number(40)?,
        packets: number(48)?,
        gaps: number(56)?,
    };
    whole.then_some((summary, u32_at(bytes, 12)?, number(16)?))
}

fn parse(entry: &[u8]) -> Option<Entry<'_>> {
    let mut at = ENTRY;
    let mut sets = [None; 6];
    for (index, (set, width)) in sets.iter_mut().zip(WIDTHS).enumerate() {
        let count = u16::from_le_bytes(*entry.get(72 + 2 * index..)?.first_chunk()?);
        if count != ANYTHING {
            let length = usize::from(count) * width;
            *set = Some(entry.get(at..at + length)?);
            at += length;
        }
    }
    Some(Entry {
        packets: u32_at(entry, 4)?,
        offset: u64_at(entry, 8)?,
        length: u32_at(entry, 16)?,
        crc: u32_at(entry, 20)?,
        first_ns: u64_at(entry, 24)?,
        last_ns: u64_at(entry, 32)?,
        protocols: entry.get(40..72)?,
        sets,
    })
}

/// A block that is being filled.
#[derive(Default)]
struct Block {
    offset: u64,
    length: u64,
    crc: Hasher,
    packets: u32,
    first_ns: u64,
    last_ns: u64,
    protocols: [u8; 32],
    sets: [Vec<u64>; 6],
}

#[derive(Default)]
struct Builder {
    summary: Summary,
    body: Vec<u8>,
    block: Option<Block>,
}

impl Builder {
    fn add(&mut self, offset: u64, packet: &Packet<'_>, headers: &Headers) {
        let length = packet.block.len() as u64;
        let goes_on =
            |block: &Block| block.offset + block.length == offset && block.length + length <= BLOCK;
        if self.block.as_ref().is_some_and(|block| !goes_on(block)) {
            self.close();
        }
        let time = packet.timestamp_ns;
        let block = self.block.get_or_insert_with(|| Block {
            offset,
            first_ns: time,
            last_ns: time,
            ..Block::default()
        });
        block.length += length;
        block.crc.update(packet.block);
        block.packets += 1;
        block.first_ns = block.first_ns.min(time);
        block.last_ns = block.last_ns.max(time);
        if let Some(number) = headers.protocol {
            block.protocols[usize::from(number / 8)] |= 1 << (number % 8);
        }
        let sets = &mut block.sets;
        match headers.network {
            Network::Unknown => {}
            Network::V4 { src, dst } => {
                sets[0].push(src.into());
                sets[1].push(dst.into());
            }
            Network::V6 { src: Ipv6 { high: src, .. }, dst: Ipv6 { high: dst, .. } } => {
                sets[2].push(src);
                sets[3].push(dst);
            }
        }
        if let Some((sport, dport)) = headers.ports {
            sets[4].push(sport.into());
            sets[5].push(dport.into());
        }
    }

    /// Ends the block.
    fn close(&mut self) {
        let Some(mut block) = self.block.take() else { return };
        let summary = &mut self.summary;
        if summary.packets == 0 {
            summary.first_ns = block.first_ns;
        }
        summary.first_ns = summary.first_ns.min(block.first_ns);
        summary.last_ns = summary.last_ns.max(block.last_ns);
        summary.packets += u64::from(block.packets);

        let out = &mut self.body;
        let start = out.len();
        out.extend([0; 4]);
        out.extend(block.packets.to_le_bytes());
        out.extend(block.offset.to_le_bytes());
        out.extend((block.length as u32).to_le_bytes());
        out.extend(block.crc.finalize().to_le_bytes());
        out.extend(block.first_ns.to_le_bytes());
        out.extend(block.last_ns.to_le_bytes());
        out.extend(block.protocols);
        for (set, width) in block.sets.iter_mut().zip(WIDTHS) {
            set.sort_unstable();
            set.dedup();
            let most = if width == 8 { MOST_6 } else { MOST };
            let count = if set.len() > most { ANYTHING } else { set.len() as u16 };
            out.extend(count.to_le_bytes());
        }
        for (set, width) in block.sets.iter().zip(WIDTHS) {
            let most = if width == 8 { MOST_6 } else { MOST };
            if set.len() <= most {
                out.extend(
                    set.iter().flat_map(|value| value.to_le_bytes().into_iter().take(width)),
                );
            }
        }
        let length = (out.len() - start) as u32;
        out[start..start + 4].copy_from_slice(&length.to_le_bytes());
    }
}
