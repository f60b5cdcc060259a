//! Opens, fills, rotates and seals segments.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek as _, SeekFrom, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::Serialize;
use thiserror::Error;

use super::pcapng::{
    self, InterfaceInfo, InterfaceStatistics, LINKTYPE_ETHERNET, LINKTYPE_RAW, SectionInfo,
    whole_prefix,
};
use crate::{buffer::Buffer, clock::utc_ns, stats::Law};

/// Room kept for the statistics blocks when a segment is limited in size, bytes per interface.
const STATISTICS_ROOM: u64 = 1024;

/// A segment could not be opened, written or sealed.
#[derive(Debug, Error)]
#[error("{operation} {}", path.display())]
pub struct SegmentError {
    /// What was tried.
    pub operation: &'static str,
    /// On which file.
    pub path: PathBuf,
    /// What the operating system said.
    #[source]
    pub source: io::Error,
}

/// Where a job's packets go.
pub enum Target {
    /// One file for all queues; with rotation, `STEM_00001.EXT` and so on.
    File(PathBuf),
    /// A folder with a series of files per queue, named `PREFIX_INTERFACE_qQUEUE_00001.pcapng`.
    Directory {
        /// The folder; made if it is not there.
        path: PathBuf,
        /// What all names start with.
        prefix: String,
    },
    /// A pipe.
    Stream(Box<dyn Write + Send>),
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Directory { path, prefix } => {
                f.debug_struct("Directory").field("path", path).field("prefix", prefix).finish()
            }
            Self::Stream(_) => f.write_str("Stream"),
        }
    }
}

/// When a segment is sealed and the next begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rotation {
    /// Before the file would grow beyond this many bytes.
    pub bytes: Option<u64>,
    /// When it is this old.
    pub every: Option<Duration>,
}

impl Rotation {
    fn is_on(&self) -> bool {
        self.bytes.is_some() || self.every.is_some()
    }
}

/// What a file says of an interface.
#[derive(Clone, Debug, Default)]
pub struct InterfaceLabel {
    /// Its name.
    pub name: String,
    /// Driver and the like.
    pub hardware: String,
    /// The job's filter.
    pub filter: String,
    /// Most bytes kept of a packet; 0 is all.
    pub snaplen: u32,
    /// How it is captured.
    pub comment: String,
    /// Whether packets begin with an IP header and not with an Ethernet header.
    pub raw_ip: bool,
}

/// A sealed segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SegmentInfo {
    /// Where it is.
    pub path: PathBuf,
    /// File size, bytes.
    pub size: u64,
    /// Packets in it.
    pub packets: u64,
    /// Their captured lengths, bytes.
    pub captured_bytes: u64,
    /// Earliest packet, UTC nanoseconds; 0 without packets.
    pub first_ns: u64,
    /// Latest packet, UTC nanoseconds; 0 without packets.
    pub last_ns: u64,
}

/// What is known of one interface, or one queue of it, when the job is over.
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamTotals {
    /// Packets that reached the kernel program.
    pub seen: u64,
    /// What became of the hits.
    pub law: Law,
}

/// Packets of one stream that stand one after the other in a buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// Index of the stream among the job's.
    pub stream: usize,
    /// Index of the interface in the file.
    pub interface: usize,
    /// Length of their blocks.
    pub bytes: usize,
    /// How many.
    pub packets: u64,
    /// Their captured lengths, bytes.
    pub captured_bytes: u64,
}

/// What became of a run of packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteOutcome {
    /// Packets written.
    pub packets: u64,
    /// Their captured lengths, bytes.
    pub captured_bytes: u64,
    /// Packets lost.
    pub lost: u64,
}

enum Sink {
    File { file: File, hidden: PathBuf },
    Stream,
}

/// A segment that is being written.
struct Open {
    sink: Sink,
    info: SegmentInfo,
    since: Instant,
    since_ns: u64,
    /// Packets per interface.
    packets: Vec<u64>,
}

/// Writes the segments of one file series, or one stream.
pub struct Writer {
    target: Target,
    rotation: Rotation,
    /// In a folder: what tells this series from the others.
    series: String,
    interfaces: Vec<InterfaceLabel>,
    head: Vec<u8>,
    sequence: u32,
    open: Option<Open>,
    sealed: Vec<SegmentInfo>,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SegmentError {
    move |source| SegmentError { operation, path: path.to_path_buf(), source }
}

/// The first blocks of every segment.
fn head(comment: &str, interfaces: &[InterfaceLabel]) -> Vec<u8> {
    let name = nix::sys::utsname::uname().ok();
    let field = |value: Option<&std::ffi::OsStr>| {
        value.map(|value| value.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let os = format!(
        "{} {}",
        field(name.as_ref().map(nix::sys::utsname::UtsName::sysname)),
        field(name.as_ref().map(nix::sys::utsname::UtsName::release))
    );
    let mut out = Vec::new();
    pcapng::section_header(
        &mut out,
        &SectionInfo {
            hardware: &field(name.as_ref().map(nix::sys::utsname::UtsName::machine)),
            os: &os,
            application: concat!("Tapline ", env!("CARGO_PKG_VERSION")),
            comment,
        },
    );
    for interface in interfaces {
        pcapng::interface_description(
            &mut out,
            &InterfaceInfo {
                name: &interface.name,
                description: "",
                filter: &interface.filter,
                os: &os,
                hardware: &interface.hardware,
                comment: &interface.comment,
                snaplen: interface.snaplen,
                linktype: if interface.raw_ip { LINKTYPE_RAW } else { LINKTYPE_ETHERNET },
            },
        );
    }
    out
}

impl Writer {
    /// A writer for a job; `comment` says which. In a folder, `series` tells this series of files
    /// from the job's others. Opens the first segment, so that what is wrong with the place is
    /// found before packets are.
    pub fn create(
        target: Target,
        series: &str,
        rotation: Rotation,
        comment: &str,
        interfaces: Vec<InterfaceLabel>,
    ) -> Result<Self, SegmentError> {
        let head = head(comment, &interfaces);
        let mut writer = Self {
            target,
            rotation,
            series: series.into(),
            interfaces,
            head,
            sequence: 0,
            open: None,
            sealed: Vec::new(),
        };
        match &writer.target {
            Target::Directory { path, .. } => {
                fs::create_dir_all(path).map_err(failed("creating the folder", path))?;
                // Files in a folder are made when their queue has packets; that it can be written
                // is tried now.
                let probe = path.join(format!(".{}.part", writer.name(1)));
                File::create(&probe).map_err(failed("creating", &probe))?;
                fs::remove_file(&probe).map_err(failed("removing", &probe))?;
            }
            Target::File(_) | Target::Stream(_) => writer.begin()?,
        }
        Ok(writer)
    }

    fn name(&self, sequence: u32) -> String {
        match &self.target {
            Target::Directory { prefix, .. } => {
                format!("{prefix}_{}_{sequence:05}.pcapng", self.series)
            }
            Target::File(path) => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if !self.rotation.is_on() {
                    return name.into_owned();
                }
                match name.rsplit_once('.') {
                    Some((stem, extension)) => format!("{stem}_{sequence:05}.{extension}"),
                    None => format!("{name}_{sequence:05}"),
                }
            }
            Target::Stream(_) => "the output stream".into(),
        }
    }

    fn folder(&self) -> &Path {
        match &self.target {
            Target::Directory { path, .. } => path,
            Target::File(path) => match path.parent() {
                Some(folder) if !folder.as_os_str().is_empty() => folder,
                _ => Path::new("."),
            },
            Target::Stream(_) => Path::new(""),
        }
    }

    /// Bytes that a buffer may hold so that it fits in a segment with its head and statistics.
    pub fn room(&self) -> Option<u64> {
        let own = self.head.len() as u64 + STATISTICS_ROOM * self.interfaces.len() as u64;
        self.rotation.bytes.map(|bytes| bytes.saturating_sub(own))
    }

    fn begin(&mut self) -> Result<(), SegmentError> {
        let name = self.name(self.sequence + 1);
        let path = match &self.target {
            Target::File(path) => path.with_file_name(&name),
            Target::Directory { path, .. } => path.join(&name),
            Target::Stream(_) => PathBuf::from(&name),
        };
        let sink = match &mut self.target {
            Target::Stream(stream) => {
                stream
                    .write_all(&self.head)
                    .and_then(|()| stream.flush())
                    .map_err(failed("writing to", &path))?;
                Sink::Stream
            }
            Target::File(_) | Target::Directory { .. } => {
                let hidden = path.with_file_name(format!(".{name}.part"));
                let mut file = OpenOptions::new()
                    .create(true)
                    .truncate(true)
                    .read(true)
                    .write(true)
                    .open(&hidden)
                    .map_err(failed("creating", &hidden))?;
                if let Err(error) = file.write_all(&self.head) {
                    drop(fs::remove_file(&hidden));
                    return Err(failed("writing", &hidden)(error));
                }
                Sink::File { file, hidden }
            }
        };
        self.sequence += 1;
        self.open = Some(Open {
            sink,
            info: SegmentInfo {
                path,
                size: self.head.len() as u64,
                packets: 0,
                captured_bytes: 0,
                first_ns: 0,
                last_ns: 0,
            },
            since: Instant::now(),
            since_ns: utc_ns(),
            packets: vec![0; self.interfaces.len()],
        });
        Ok(())
    }

    /// Writes a buffer that consists of these runs; rotates first if it is time. Tells `became` what
    /// became of each run, also on an error.
    pub fn write(
        &mut self,
        buffer: &Buffer,
        runs: &[Run],
        mut became: impl FnMut(&Run, WriteOutcome),
    ) -> Result<(), SegmentError> {
        let begun = self.rotate(buffer.len() as u64).and_then(|()| match self.open {
            None => self.begin(),
            Some(_) => Ok(()),
        });
        let (Ok(()), Some(open)) = (&begun, &mut self.open) else {
            for run in runs {
                became(run, WriteOutcome { lost: run.packets, ..WriteOutcome::default() });
            }
            return begun;
        };
        let (put, result) = match (&mut open.sink, &mut self.target) {
            (Sink::File { file, .. }, _) => put(file, buffer.filled()),
            (Sink::Stream, Target::Stream(stream)) => {
                let (put, result) = put(stream, buffer.filled());
                (put, result.and_then(|()| stream.flush()))
            }
            (Sink::Stream, _) => (0, Err(io::Error::other("the stream is closed"))),
        };
        // What is whole stays.
        let mut rest = &buffer.filled()[..put];
        for run in runs {
            let (bytes, packets, captured_bytes) = if run.bytes <= rest.len() {
                (run.bytes, run.packets, run.captured_bytes)
            } else {
                let whole = whole_prefix(rest);
                (whole.bytes, whole.packets, whole.captured_bytes)
            };
            let outcome = WriteOutcome { packets, captured_bytes, lost: run.packets - packets };
            open.account(run.interface, bytes as u64, &outcome, buffer);
            became(run, outcome);
            rest = if run.bytes <= rest.len() { &rest[run.bytes..] } else { &[] };
        }
        if result.is_err()
            && let Sink::File { file, .. } = &mut open.sink
            && let Err(error) = cut(file, open.info.size)
        {
            log::error!("cutting {} to whole blocks: {error}", open.info.path.display());
        }
        let path = &open.info.path;
        result.map_err(|source| failed("writing", path)(source))
    }

    fn rotate(&mut self, more: u64) -> Result<(), SegmentError> {
        let Some(open) = &self.open else { return Ok(()) };
        let room = STATISTICS_ROOM * self.interfaces.len() as u64;
        let full = self
            .rotation
            .bytes
            .is_some_and(|limit| open.info.packets > 0 && open.info.size + more + room > limit);
        let old = self.rotation.every.is_some_and(|every| open.since.elapsed() >= every);
        if !full && !old {
            return Ok(());
        }
        self.seal(None)?;
        self.begin()
    }

    /// Seals a segment that is old enough, also without a packet to write.
    pub fn tick(&mut self) -> Result<(), SegmentError> {
        let due = self.open.as_ref().is_some_and(|open| open.info.packets > 0);
        if due { self.rotate(0) } else { Ok(()) }
    }

    /// Seals what is open, if it has packets and another segment may follow.
    pub fn rotate_now(&mut self) -> Result<(), SegmentError> {
        let has_packets = self.open.as_ref().is_some_and(|open| open.info.packets > 0);
        let may_follow = matches!(self.target, Target::Directory { .. }) || self.rotation.is_on();
        if has_packets && may_follow { self.seal(None) } else { Ok(()) }
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn next_tick(&self) -> Option<Instant> {
        Some(self.open.as_ref()?.since + self.rotation.every?)
    }

    /// Completes the open segment: statistics, sync, rename. `totals` are the whole job's, per
    /// interface; a segment that is not the last has only what is in it.
    pub fn seal(&mut self, totals: Option<&[StreamTotals]>) -> Result<(), SegmentError> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        let statistics = statistics(&open, totals);
        let path = open.info.path.clone();
        match (&mut open.sink, &mut self.target) {
            (Sink::File { file, hidden }, _) => {
                // A full disk may have no room for them; the packets are whole all the same.
                let mut result = file.write_all(&statistics);
                match &result {
                    Ok(()) => open.info.size += statistics.len() as u64,
                    Err(_) => {
                        cut(file, open.info.size).map_err(failed("cutting", hidden))?;
                    }
                }
                if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::StorageFull) {
                    log::warn!("{}: no room for the statistics block", path.display());
                    result = Ok(());
                }
                file.sync_all().map_err(failed("syncing", hidden))?;
                fs::rename(&*hidden, &path).map_err(failed("renaming", hidden))?;
                sync_folder(self.folder())?;
                self.sealed.push(open.info);
                result.map_err(failed("writing", &path))
            }
            (Sink::Stream, Target::Stream(stream)) => {
                open.info.size += statistics.len() as u64;
                self.sealed.push(open.info);
                stream
                    .write_all(&statistics)
                    .and_then(|()| stream.flush())
                    .map_err(failed("writing to", &path))
            }
            (Sink::Stream, _) => Ok(()),
        }
    }

    /// Seals what is open with the job's totals; a job that rotated away its last segment, or never
    /// had one, gets one that holds the totals alone.
    pub fn finish(
        mut self,
        totals: &[StreamTotals],
    ) -> (Vec<SegmentInfo>, Result<(), SegmentError>) {
        let result = match self.open {
            None => self.begin(),
            Some(_) => Ok(()),
        };
        let result = result.and_then(|()| self.seal(Some(totals)));
        (self.sealed, result)
    }

    /// What has been sealed so far.
    pub fn sealed(&self) -> &[SegmentInfo] {
        &self.sealed
    }

    /// Whether a segment was ever begun.
    pub fn is_used(&self) -> bool {
        self.sequence > 0
    }
}

/// The statistics blocks of a segment, one per interface.
fn statistics(open: &Open, totals: Option<&[StreamTotals]>) -> Vec<u8> {
    let mut out = Vec::new();
    let now = utc_ns();
    for (at, packets) in open.packets.iter().enumerate() {
        let mut statistics = InterfaceStatistics {
            interface: at as u32,
            timestamp_ns: now,
            start_ns: open.since_ns,
            end_ns: now,
            received: None,
            dropped_by_interface: None,
            filter_accepted: None,
            dropped_by_os: None,
            delivered: Some(*packets),
            comment: "",
        };
        let comment;
        if let Some(totals) = totals.and_then(|totals| totals.get(at)) {
            let law = &totals.law;
            statistics.received = Some(totals.seen);
            statistics.filter_accepted = Some(law.hits.packets);
            statistics.dropped_by_interface = Some(0);
            statistics.dropped_by_os = Some(law.drops.total());
            statistics.delivered = Some(law.written.packets);
            comment = law_in_words(law);
            statistics.comment = &comment;
        }
        pcapng::interface_statistics(&mut out, &statistics);
    }
    out
}

/// `hits 10 = written 8 + rx_ring_full 2`.
fn law_in_words(law: &Law) -> String {
    let mut words = format!("hits {} = written {}", law.hits.packets, law.written.packets);
    for (name, count, _) in law.drops.named() {
        if count > 0 {
            words += &format!(" + {name} {count}");
        }
    }
    words
}

impl Open {
    fn account(&mut self, interface: usize, bytes: u64, outcome: &WriteOutcome, buffer: &Buffer) {
        self.info.size += bytes;
        self.packets[interface] += outcome.packets;
        if outcome.packets > 0 {
            if self.info.packets == 0 {
                self.info.first_ns = buffer.first_ns;
            }
            self.info.first_ns = self.info.first_ns.min(buffer.first_ns);
            self.info.last_ns = self.info.last_ns.max(buffer.last_ns);
        }
        self.info.packets += outcome.packets;
        self.info.captured_bytes += outcome.captured_bytes;
    }
}

/// Writes all bytes, or says how many it wrote before it failed.
fn put(out: &mut impl Write, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut done = 0;
    while done < bytes.len() {
        #[expect(clippy::disallowed_methods, reason = "how much of it was written is what we want")]
        match out.write(&bytes[done..]) {
            Ok(0) => return (done, Err(io::ErrorKind::WriteZero.into())),
            Ok(more) => done += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (done, Err(error)),
        }
    }
    (done, Ok(()))
}

/// Cuts a file and goes on writing at its end.
fn cut(file: &mut File, size: u64) -> io::Result<()> {
    file.set_len(size)?;
    file.seek(SeekFrom::Start(size)).map(drop)
}

fn sync_folder(folder: &Path) -> Result<(), SegmentError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed("syncing the folder", folder))
}
