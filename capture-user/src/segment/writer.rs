//! Opens, fills, rotates and seals segments.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ring::digest::Digest;
use serde::Serialize;
use thiserror::Error;

use super::{
    blocks::{InterfaceLabel, STATISTICS_ROOM, StreamTotals, head, statistics},
    file::{self, Output, Written},
    io::Io,
    pcapng::whole_prefix,
    recover::survey,
};
use crate::{
    buffer::{ALIGNMENT, Buffer},
    clock::utc_ns,
    error::with_causes,
};

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
    /// Nowhere: what is written is thrown away, to see how fast all but the disk is.
    Nowhere,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Directory { path, prefix } => {
                f.debug_struct("Directory").field("path", path).field("prefix", prefix).finish()
            }
            Self::Stream(_) => f.write_str("Stream"),
            Self::Nowhere => f.write_str("Nowhere"),
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
    /// SHA-256 of the file in hexadecimal digits, if it was taken while the file was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// Packets of one stream that stand one after the other in a buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Run {
    /// Index of the stream among the job's.
    pub(crate) stream: usize,
    /// Index of the interface in the file.
    pub(crate) interface: usize,
    /// Length of their blocks.
    pub(crate) bytes: usize,
    /// How many.
    pub(crate) packets: u64,
    /// Their captured lengths, bytes.
    pub(crate) captured_bytes: u64,
}

/// What became of packets of one stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WriteOutcome {
    /// Index of the stream among the job's.
    pub(crate) stream: usize,
    /// Packets written.
    pub(crate) packets: u64,
    /// Their captured lengths, bytes.
    pub(crate) captured_bytes: u64,
    /// Packets lost.
    pub(crate) lost: u64,
}

enum Sink {
    File(Box<Output>),
    Stream,
    Nowhere,
}

/// A segment that is being written.
struct Open {
    sink: Sink,
    /// As far as buffers have been written.
    info: SegmentInfo,
    since: Instant,
    since_ns: u64,
    /// Packets per interface.
    packets: Vec<u64>,
}

/// Writes the segments of one file series, or one stream.
pub(crate) struct Writer {
    target: Target,
    rotation: Rotation,
    /// Files are hashed as they are written.
    hashed: bool,
    /// In a folder: what tells this series from the others.
    series: String,
    interfaces: Vec<InterfaceLabel>,
    head: Vec<u8>,
    sequence: u32,
    open: Option<Open>,
    sealed: Vec<SegmentInfo>,
    /// What became of runs, until somebody asks.
    outcomes: Vec<WriteOutcome>,
    /// Memory for runs.
    spare: Vec<Vec<Run>>,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SegmentError {
    move |source| SegmentError { operation, path: path.to_path_buf(), source }
}

impl Writer {
    /// A writer for a job; `comment` says which. In a folder, `series` tells this series of files
    /// from the job's others. Opens the first segment, so that what is wrong with the place is
    /// found before packets are.
    pub(crate) fn create(
        target: Target,
        series: &str,
        rotation: Rotation,
        hashed: bool,
        comment: &str,
        interfaces: Vec<InterfaceLabel>,
    ) -> Result<Self, SegmentError> {
        let head = head(comment, &interfaces);
        let mut writer = Self {
            target,
            rotation,
            hashed,
            series: series.into(),
            interfaces,
            head,
            sequence: 0,
            open: None,
            sealed: Vec::new(),
            outcomes: Vec::new(),
            spare: Vec::new(),
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
            Target::File(_) | Target::Stream(_) | Target::Nowhere => writer.begin()?,
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
            Target::Nowhere => "nowhere".into(),
        }
    }

    fn folder(&self) -> &Path {
        match &self.target {
            Target::Directory { path, .. } => path,
            Target::File(path) => match path.parent() {
                Some(folder) if !folder.as_os_str().is_empty() => folder,
                _ => Path::new("."),
            },
            Target::Stream(_) | Target::Nowhere => Path::new(""),
        }
    }

    /// Bytes that a buffer may hold so that it fits in a segment with its head, its padding and statistics.
    pub(crate) fn room(&self) -> Option<u64> {
        let statistics = STATISTICS_ROOM * self.interfaces.len() as u64;
        let own = self.head.len() as u64 + statistics + ALIGNMENT as u64;
        self.rotation.bytes.map(|bytes| bytes.saturating_sub(own))
    }

    fn begin(&mut self) -> Result<(), SegmentError> {
        let name = self.name(self.sequence + 1);
        let path = match &self.target {
            Target::File(path) => path.with_file_name(&name),
            Target::Directory { path, .. } => path.join(&name),
            Target::Stream(_) | Target::Nowhere => PathBuf::from(&name),
        };
        let sink = match &mut self.target {
            Target::Stream(stream) => {
                stream
                    .write_all(&self.head)
                    .and_then(|()| stream.flush())
                    .map_err(failed("writing to", &path))?;
                Sink::Stream
            }
            Target::Nowhere => Sink::Nowhere,
            Target::File(_) | Target::Directory { .. } => {
                let hidden = path.with_file_name(format!(".{name}.part"));
                let most = self.rotation.bytes;
                let output = Output::create(hidden.clone(), &self.head, most, self.hashed);
                Sink::File(Box::new(output.map_err(failed("creating", &hidden))?))
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
                sha256: None,
            },
            since: Instant::now(),
            since_ns: utc_ns(),
            packets: vec![0; self.interfaces.len()],
        });
        Ok(())
    }

    /// Begins to write a buffer that consists of these runs, which are taken out; rotates first if it
    /// is time. What became of them, [`outcomes`](Self::outcomes) tells, also on an error.
    pub(crate) fn write(
        &mut self,
        io: &mut Io,
        buffer: Buffer,
        runs: &mut Vec<Run>,
    ) -> Result<(), SegmentError> {
        let begun = self.rotate(io, buffer.len() as u64).and_then(|()| match self.open {
            None => self.begin(),
            Some(_) => Ok(()),
        });
        let (Ok(()), Some(open)) = (&begun, &mut self.open) else {
            self.outcomes.extend(runs.drain(..).map(lost));
            buffer.recycle();
            return begun;
        };
        let runs = std::mem::replace(runs, self.spare.pop().unwrap_or_default());
        match (&mut open.sink, &mut self.target) {
            (Sink::File(output), _) => output.write(io, buffer, runs),
            (Sink::Stream, Target::Stream(stream)) => {
                let bytes = buffer.filled();
                let (put, result) = file::put(bytes, |rest, _done| write_some(stream, rest));
                let result = result.and_then(|()| stream.flush());
                return self.account(io, Written { buffer, runs, put, result });
            }
            (Sink::Stream, _) => {}
            (Sink::Nowhere, _) => {
                let put = buffer.len();
                io.used.discarded_bytes += put as u64;
                return self.account(io, Written { buffer, runs, put, result: Ok(()) });
            }
        }
        self.settle(io)
    }

    /// Takes note of what has been written since.
    pub(crate) fn settle(&mut self, io: &mut Io) -> Result<(), SegmentError> {
        while let Some(Open { sink: Sink::File(output), .. }) = &mut self.open
            && let Some(written) = output.next(io)
        {
            if let Err(error) = self.account(io, written) {
                self.abandon(io);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Waits until all that was given to it has been written.
    pub(crate) fn drain(&mut self, io: &mut Io) -> Result<(), SegmentError> {
        loop {
            self.settle(io)?;
            match &self.open {
                Some(Open { sink: Sink::File(output), .. }) if output.is_busy() => io.wait(),
                _ => return Ok(()),
            }
        }
    }

    /// What became of runs since it was last asked.
    pub(crate) fn outcomes(&mut self) -> impl Iterator<Item = WriteOutcome> {
        self.outcomes.drain(..)
    }

    /// Takes note of what became of a buffer: what is whole stays.
    fn account(&mut self, io: &Io, written: Written) -> Result<(), SegmentError> {
        let Some(open) = &mut self.open else { return Ok(()) };
        let Written { buffer, mut runs, put, result } = written;
        let mut rest = &buffer.filled()[..put];
        for run in runs.drain(..) {
            let (bytes, packets, captured_bytes) = if run.bytes <= rest.len() {
                (run.bytes, run.packets, run.captured_bytes)
            } else {
                let whole = whole_prefix(rest);
                (whole.bytes, whole.packets, whole.captured_bytes)
            };
            let lost = run.packets - packets;
            let outcome = WriteOutcome { stream: run.stream, packets, captured_bytes, lost };
            open.account(run.interface, bytes as u64, &outcome, &buffer);
            self.outcomes.push(outcome);
            rest = rest.get(run.bytes..).unwrap_or_default();
        }
        self.spare.push(runs);
        if result.is_ok() {
            io.note(&buffer);
        }
        buffer.recycle();
        let path = &open.info.path;
        result.map_err(|source| failed("writing", path)(source))
    }

    /// After a failure: the file ends behind the last whole block.
    fn abandon(&mut self, io: &mut Io) {
        let Some(Open { sink: Sink::File(output), info, .. }) = &mut self.open else { return };
        self.outcomes.extend(output.abandon(io).into_iter().map(lost));
        if let Err(error) = output.cut(info.size) {
            log::error!("cutting {} to whole blocks: {error}", info.path.display());
        }
        // Its times are those of whole buffers, and the last one is not.
        match survey(output.hidden()) {
            Ok(whole) => (info.first_ns, info.last_ns) = (whole.first_ns, whole.last_ns),
            Err(error) => log::error!("{}", with_causes(&error)),
        }
    }

    fn rotate(&mut self, io: &mut Io, more: u64) -> Result<(), SegmentError> {
        let Some(open) = &self.open else { return Ok(()) };
        let end = open.end();
        let room = STATISTICS_ROOM * self.interfaces.len() as u64;
        // A buffer may be padded to the next page.
        let full = |limit: u64| (end + more).next_multiple_of(ALIGNMENT as u64) + room > limit;
        let full = end > self.head.len() as u64 && self.rotation.bytes.is_some_and(full);
        let old = self.rotation.every.is_some_and(|every| open.since.elapsed() >= every);
        if !full && !old {
            return Ok(());
        }
        self.seal(io, None)?;
        self.begin()
    }

    /// Seals a segment that is old enough, also without a packet to write.
    pub(crate) fn tick(&mut self, io: &mut Io) -> Result<(), SegmentError> {
        if self.has_packets() { self.rotate(io, 0) } else { Ok(()) }
    }

    /// Whether packets were given to the open segment.
    fn has_packets(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.end() > self.head.len() as u64)
    }

    /// Seals what is open, if it has packets and another segment may follow.
    pub(crate) fn rotate_now(&mut self, io: &mut Io) -> Result<(), SegmentError> {
        let may_follow = matches!(self.target, Target::Directory { .. }) || self.rotation.is_on();
        if self.has_packets() && may_follow { self.seal(io, None) } else { Ok(()) }
    }

    /// When [`tick`](Self::tick) has something to do.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        Some(self.open.as_ref()?.since + self.rotation.every?)
    }

    /// Completes the open segment: statistics, sync, rename. `totals` are the whole job's, per
    /// interface; a segment that is not the last has only what is in it.
    fn seal(&mut self, io: &mut Io, totals: Option<&[StreamTotals]>) -> Result<(), SegmentError> {
        // What is whole is sealed also when the rest was lost.
        let drained = self.drain(io);
        let Some(mut open) = self.open.take() else { return drained };
        let statistics = statistics(&open.packets, open.since_ns, totals);
        let path = open.info.path.clone();
        match (&mut open.sink, &mut self.target) {
            (Sink::File(output), _) => {
                let hidden = output.hidden().to_path_buf();
                // A full disk may have no room for them; the packets are whole all the same.
                let mut result =
                    output.finish(io, &statistics).map_err(failed("cutting", &hidden))?;
                if result.is_ok() {
                    open.info.size += statistics.len() as u64;
                }
                if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::StorageFull) {
                    log::warn!("{}: no room for the statistics block", path.display());
                    result = Ok(());
                }
                output.sync().map_err(failed("syncing", &hidden))?;
                fs::rename(&hidden, &path).map_err(failed("renaming", &hidden))?;
                sync_folder(self.folder())?;
                open.info.sha256 = output.digest().as_ref().map(hex);
                self.sealed.push(open.info);
                drained.and(result.map_err(failed("writing", &path)))
            }
            (Sink::Stream, Target::Stream(stream)) => {
                open.info.size += statistics.len() as u64;
                self.sealed.push(open.info);
                stream
                    .write_all(&statistics)
                    .and_then(|()| stream.flush())
                    .map_err(failed("writing to", &path))
            }
            (Sink::Stream | Sink::Nowhere, _) => Ok(()),
        }
    }

    /// Seals what is open with the job's totals; a job that rotated away its last segment, or never
    /// had one, gets one that holds the totals alone.
    pub(crate) fn finish(
        mut self,
        io: &mut Io,
        totals: &[StreamTotals],
    ) -> (Vec<SegmentInfo>, Result<(), SegmentError>) {
        let result = match self.open {
            None => self.begin(),
            Some(_) => Ok(()),
        };
        let result = result.and_then(|()| self.seal(io, Some(totals)));
        (self.sealed, result)
    }

    /// What has been sealed so far.
    pub(crate) fn sealed(&self) -> &[SegmentInfo] {
        &self.sealed
    }

    /// Whether a segment was ever begun.
    pub(crate) fn is_used(&self) -> bool {
        self.sequence > 0
    }
}

/// In hexadecimal digits.
fn hex(digest: &Digest) -> String {
    digest.as_ref().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// A run that is not in a file.
fn lost(run: Run) -> WriteOutcome {
    WriteOutcome { stream: run.stream, lost: run.packets, ..WriteOutcome::default() }
}

impl Open {
    /// Where the next buffer goes.
    fn end(&self) -> u64 {
        match &self.sink {
            Sink::File(output) => output.end(),
            Sink::Stream | Sink::Nowhere => self.info.size,
        }
    }

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

#[expect(clippy::disallowed_methods, reason = "how much of it was written is what we want")]
fn write_some(stream: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
    stream.write(bytes)
}

fn sync_folder(folder: &Path) -> Result<(), SegmentError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed("syncing the folder", folder))
}
