//! Segments as one file, as long as is known before the first byte of it is made: what a download is.
//!
//! - Packets are in the order of time, as far as each segment is in order.
//! - pcapng has everything: each packet's block as it is, then the statistics of each segment. One
//!   segment is given byte for byte.
//! - Classic pcap has nanoseconds, and one link type for all:
//!   <https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-04.html>.
//! - A part of the file is made by making what is in front of it, too, and throwing that away: memory does
//!   not grow with what is asked for.
//! - What is made is as long as was said, or the making ends with an error. The same segments give the
//!   same bytes.

use std::{
    fs::File,
    io::{self, Read as _},
    ops::Range,
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::{
    SegmentError,
    read::{self, Merged, Packet},
};

/// Bytes that are made at a time.
const CHUNK: usize = 256 << 10;

/// The magic number of classic pcap with nanoseconds.
const NANOSECONDS: u32 = 0xa1b2_3c4d;

/// Length of the header of a classic pcap file, bytes.
const PCAP_HEAD: u64 = 24;

/// Length of the header of each of its packets.
const PCAP_RECORD: u64 = 16;

/// What libpcap takes for no limit: <https://github.com/the-tcpdump-group/libpcap/blob/libpcap-1.10.4/pcap-int.h#L107>.
const MAX_SNAPLEN: u32 = 262_144;

/// A kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Classic pcap with nanoseconds.
    Pcap,
    /// pcapng.
    Pcapng,
}

/// What segments hold, as it was counted when they were sealed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holds {
    /// Packets.
    pub packets: u64,
    /// What was kept of them, bytes.
    pub captured_bytes: u64,
}

/// Segments cannot be made one file.
#[derive(Debug, Error)]
pub enum ExportError {
    /// A segment cannot be read.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// Packets begin in more than one way.
    #[error(
        "the packets have {count} link types, and a classic pcap file can have one: ask for pcapng"
    )]
    LinkTypes {
        /// How many.
        count: usize,
    },
    /// The segments do not hold what was counted.
    #[error("the segments have {} bytes than was counted", if *.more { "more" } else { "fewer" })]
    Length {
        /// Or fewer.
        more: bool,
    },
}

/// Segments that are to be one file.
#[derive(Debug)]
pub struct Export {
    merged: Merged,
    format: Format,
    head: Vec<u8>,
    length: u64,
}

impl Export {
    /// Looks at the segments. The comment is for the file as a whole, if they are several.
    pub fn open(
        paths: &[PathBuf],
        holds: Holds,
        format: Format,
        comment: &str,
    ) -> Result<Self, ExportError> {
        let merged = Merged::open(paths)?;
        let (head, length) = match format {
            Format::Pcap => {
                let head = pcap_head(&merged, link_type(paths, &merged)?);
                (head, PCAP_HEAD + PCAP_RECORD * holds.packets + holds.captured_bytes)
            }
            Format::Pcapng => {
                let head = pcapng_head(paths, &merged, comment)?;
                let length = head.len() as u64 + merged.body();
                (head, length)
            }
        };
        Ok(Self { merged, format, head, length })
    }

    /// Length of the file, bytes.
    #[expect(clippy::len_without_is_empty, reason = "a file has a header at least")]
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Begins to make a part of the file, or all of it: bytes beyond its end are none.
    pub fn part(self, bytes: Range<u64>) -> Part {
        let end = bytes.end.min(self.length);
        Part {
            skip: bytes.start.min(end),
            left: end.saturating_sub(bytes.start),
            to_the_end: end == self.length,
            made: self.head,
            merged: self.merged,
            format: self.format,
            ended: false,
        }
    }
}

/// A part of the file on its way.
#[derive(Debug)]
pub struct Part {
    merged: Merged,
    format: Format,
    /// Bytes of the file to throw away before the part begins.
    skip: u64,
    /// Bytes of the part that have not been given.
    left: u64,
    /// Whether the part ends where the file does.
    to_the_end: bool,
    made: Vec<u8>,
    /// Whether all of the file has been made.
    ended: bool,
}

impl Part {
    /// The next bytes; `None` at the end of the part.
    pub fn chunk(&mut self) -> Result<Option<Vec<u8>>, ExportError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.make()?;
        let mut chunk = std::mem::take(&mut self.made);
        let length = chunk.len() as u64;
        if length > self.left && self.to_the_end {
            return Err(ExportError::Length { more: true });
        }
        chunk.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= chunk.len() as u64;
        if self.left == 0 && self.to_the_end && !self.is_over()? {
            return Err(ExportError::Length { more: true });
        }
        Ok(Some(chunk))
    }

    /// Makes what comes next, at least a byte of the part.
    fn make(&mut self) -> Result<(), ExportError> {
        loop {
            let thrown = self.skip.min(self.made.len() as u64);
            self.made.drain(..thrown as usize);
            self.skip -= thrown;
            let enough = (CHUNK as u64).min(self.left);
            if self.skip == 0 && self.made.len() as u64 >= enough {
                return Ok(());
            }
            if self.ended {
                let none = self.skip > 0 || self.made.is_empty();
                return if none { Err(ExportError::Length { more: false }) } else { Ok(()) };
            }
            self.advance()?;
        }
    }

    /// Makes what a chunk has, or the rest.
    fn advance(&mut self) -> Result<(), ExportError> {
        while self.made.len() < CHUNK {
            match (self.merged.packet()?, self.format) {
                (Some(packet), Format::Pcapng) => packet.append_to(&mut self.made),
                (Some(packet), Format::Pcap) => pcap_record(&mut self.made, &packet),
                (None, format) => {
                    if format == Format::Pcapng {
                        self.made.extend_from_slice(self.merged.statistics());
                    }
                    self.ended = true;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Whether nothing is left to make.
    fn is_over(&mut self) -> Result<bool, ExportError> {
        if !self.ended {
            self.advance()?;
        }
        Ok(self.ended && self.made.is_empty())
    }
}

/// The link type of all packets.
fn link_type(paths: &[PathBuf], merged: &Merged) -> Result<u16, ExportError> {
    let mut links: Vec<u16> = merged.interfaces().iter().map(|one| one.link_type).collect();
    links.sort_unstable();
    links.dedup();
    if links.len() > 1 {
        // Not all may have packets.
        links = links_of_packets(paths)?;
    }
    match links.as_slice() {
        [] => Ok(super::pcapng::LINKTYPE_ETHERNET),
        [one] => Ok(*one),
        several => Err(ExportError::LinkTypes { count: several.len() }),
    }
}

fn links_of_packets(paths: &[PathBuf]) -> Result<Vec<u16>, ExportError> {
    let mut merged = Merged::open(paths)?;
    let all: Vec<u16> = merged.interfaces().iter().map(|one| one.link_type).collect();
    let mut links = Vec::new();
    while let Some(packet) = merged.packet()? {
        let link = all[packet.interface as usize];
        if !links.contains(&link) {
            links.push(link);
        }
    }
    Ok(links)
}

fn pcap_head(merged: &Merged, link_type: u16) -> Vec<u8> {
    let longest = |snaplen| if snaplen == 0 { MAX_SNAPLEN } else { snaplen };
    let snaplen = merged.interfaces().iter().map(|one| longest(one.snaplen)).max();
    let mut head = Vec::new();
    head.extend(NANOSECONDS.to_le_bytes());
    // Version 2.4, and two fields that are zero.
    head.extend([2, 0, 4, 0]);
    head.extend([0; 8]);
    head.extend(snaplen.unwrap_or(MAX_SNAPLEN).to_le_bytes());
    head.extend(u32::from(link_type).to_le_bytes());
    head
}

fn pcap_record(out: &mut Vec<u8>, packet: &Packet<'_>) {
    // In 32 bits until 2106.
    let seconds = (packet.timestamp_ns / 1_000_000_000) as u32;
    let nanoseconds = (packet.timestamp_ns % 1_000_000_000) as u32;
    for field in [seconds, nanoseconds, packet.data.len() as u32, packet.original_len] {
        out.extend(field.to_le_bytes());
    }
    out.extend_from_slice(packet.data);
}

fn pcapng_head(paths: &[PathBuf], merged: &Merged, comment: &str) -> Result<Vec<u8>, SegmentError> {
    let mut head = Vec::new();
    match paths {
        [one] => {
            let failed = |source| SegmentError { operation: "reading", path: one.clone(), source };
            head_of(one, merged.body(), &mut head).map_err(failed)?;
        }
        _ => read::head(&mut head, comment, merged.interfaces()),
    }
    Ok(head)
}

/// What stands in front of the body of a segment.
fn head_of(path: &Path, body: u64, head: &mut Vec<u8>) -> io::Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len().saturating_sub(body);
    (&mut file).take(length).read_to_end(head).map(drop)
}

#[cfg(test)]
mod tests;
