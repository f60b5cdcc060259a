//! The files of a capture on their way to a client: which there are, and as what they are given.
//!
//! - What is read lies in the daemon's data folder, or in a folder that captures may be written to. A file
//!   that has become a link to elsewhere is refused, and so is one that is not as it was captured.
//! - How long the answer is, and its tag, is known before a byte of it is read.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use capture_user::segment::{
    SegmentError,
    export::{Export, ExportError, Format, Holds},
};
use thiserror::Error;

use crate::{
    id,
    record::{Record, Segment},
};

/// A capture cannot be downloaded.
#[derive(Debug, Error)]
pub enum DownloadError {
    /// It goes on.
    #[error("the capture is not finished yet: ask again when it is")]
    NotFinished,
    /// There is no file, and never was.
    #[error("the capture has no packets to download: {reason}")]
    Nothing {
        /// Why.
        reason: String,
    },
    /// There was a file.
    #[error(
        "the capture's file has expired: this host keeps them for {hours} hours, and the newest {files} \
         with {bytes} bytes at most"
    )]
    Expired {
        /// How long.
        hours: u32,
        /// How many.
        files: usize,
        /// Of which size together.
        bytes: u64,
    },
    /// A bucket has it.
    #[error(
        "{missing} of the capture's {all} files are not on this host any more: they are at {place}, in \
         {folder}"
    )]
    Elsewhere {
        /// How many.
        missing: usize,
        /// Of how many.
        all: usize,
        /// Where they are.
        place: String,
        /// What they are in there.
        folder: String,
    },
    /// Somebody has removed it.
    #[error(
        "{missing} of the capture's {all} files are not in {place} any more, where they were written"
    )]
    Removed {
        /// How many.
        missing: usize,
        /// Of how many.
        all: usize,
        /// Where they were.
        place: String,
    },
    /// Somebody has changed it.
    #[error("the capture's file {name} is not as it was captured")]
    Changed {
        /// Which.
        name: String,
    },
    /// A file cannot be read.
    #[error("a file of the capture cannot be read")]
    Read(#[source] io::Error),
    /// They cannot be made one.
    #[error(transparent)]
    Export(#[from] ExportError),
}

/// Files of one capture, which are on this host.
#[derive(Clone, Debug)]
pub struct Files {
    id: u128,
    paths: Vec<PathBuf>,
    holds: Holds,
}

/// They are one file, of this format.
#[derive(Debug)]
pub struct Download {
    /// What it is called.
    pub name: String,
    /// Its strong entity tag, with quotation marks.
    pub tag: String,
    /// Its bytes.
    pub export: Export,
}

impl Files {
    /// What a simple capture has.
    pub(crate) fn of_simple(id: u128, path: PathBuf, holds: Holds) -> Self {
        Self { id, paths: vec![path], holds }
    }

    /// What a full capture that has ended has, in its folder in this one.
    pub(crate) fn of_full(record: &Record, base: &Path) -> Result<Self, DownloadError> {
        let segments: Vec<_> = record.segments.iter().filter(|one| one.packets > 0).collect();
        if segments.is_empty() {
            let reason = record.error_message.clone();
            let reason = reason.unwrap_or_else(|| crate::captures::NO_PACKETS.into());
            return Err(DownloadError::Nothing { reason });
        }
        let mut paths = Vec::new();
        for segment in &segments {
            paths.extend(find(record, base, segment)?);
        }
        let (missing, all) = (segments.len() - paths.len(), segments.len());
        if missing > 0 {
            let place = record.destination_conf.clone();
            return Err(if record.is_uploaded() {
                DownloadError::Elsewhere { missing, all, place, folder: record.folder_name() }
            } else {
                DownloadError::Removed { missing, all, place }
            });
        }
        let holds = Holds {
            packets: segments.iter().map(|segment| segment.packets).sum(),
            captured_bytes: segments.iter().map(|segment| segment.captured_bytes).sum(),
        };
        Ok(Self { id: record.id, paths, holds })
    }

    /// Makes them one file. Blocks.
    pub fn open(&self, format: Format) -> Result<Download, DownloadError> {
        let id = id::show(self.id);
        let tag = self.tag(format).map_err(DownloadError::Read)?;
        let export = Export::open(&self.paths, self.holds, format, &format!("capture {id}"))?;
        Ok(Download { name: format!("pcap_{id}.{}", extension(format)), tag, export })
    }

    /// Changes with whatever can change a byte.
    fn tag(&self, format: Format) -> io::Result<String> {
        let version = env!("CARGO_PKG_VERSION");
        let mut all = format!("{version} {format:?} {:?}", self.holds);
        for path in &self.paths {
            let metadata = fs::metadata(path)?;
            let (seconds, nanoseconds) = (metadata.mtime(), metadata.mtime_nsec());
            let size = metadata.len();
            all += &format!(" {} {size} {seconds}.{nanoseconds}", path.display());
        }
        Ok(format!("\"{}\"", &id::hex(&id::sha256(all.as_bytes()))[..32]))
    }
}

fn extension(format: Format) -> &'static str {
    match format {
        Format::Pcap => "pcap",
        Format::Pcapng => "pcapng",
    }
}

/// A segment where it was written; `None` if it is not there any more.
fn find(record: &Record, base: &Path, segment: &Segment) -> Result<Option<PathBuf>, DownloadError> {
    let changed = || DownloadError::Changed { name: segment.name.clone() };
    let is_gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let folder = match base.canonicalize() {
        Ok(base) => base.join(record.folder_name()),
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(DownloadError::Read(error)),
    };
    let path = folder.join(&segment.name);
    match path.canonicalize() {
        // No link in it leads anywhere else.
        Ok(actual) if actual == path => {}
        Ok(_) => return Err(changed()),
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(DownloadError::Read(error)),
    }
    let metadata = fs::symlink_metadata(&path).map_err(DownloadError::Read)?;
    if !metadata.is_file() || metadata.len() != segment.size {
        return Err(changed());
    }
    Ok(Some(path))
}

impl From<SegmentError> for DownloadError {
    fn from(error: SegmentError) -> Self {
        Self::Export(error.into())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::{
        destination::Destination,
        request::{FilterV1, FullRequest},
    };

    fn record(folder: &Path, names: &[&str]) -> Record {
        let request = FullRequest {
            filter_v1: FilterV1::default(),
            filter: capture_user::filter::Filter::default(),
            colo_name: "local01".into(),
            destination: Destination::in_folder(folder),
            time_limit: 1,
            packet_limit: None,
            byte_limit: None,
        };
        let mut record = Record::new(1, &request, 1);
        fs::create_dir_all(&record.folder).unwrap();
        for name in names {
            fs::write(record.folder.join(name), [0; 10]).unwrap();
            let name = (*name).into();
            record.segments.push(Segment { name, size: 10, packets: 1, ..Segment::default() });
        }
        record
    }

    #[test]
    fn files_are_found_where_they_were_written_or_missed_by_number() {
        let folder = tempfile::tempdir().unwrap();
        let mut record = record(folder.path(), &["a.pcapng", "b.pcapng"]);
        let files = Files::of_full(&record, folder.path()).unwrap();
        assert_eq!((files.paths.len(), files.holds.packets), (2, 2));
        let tag = files.tag(Format::Pcap).unwrap();
        assert_eq!((tag.len(), files.tag(Format::Pcap).unwrap()), (34, tag.clone()));
        assert_ne!(files.tag(Format::Pcapng).unwrap(), tag);
        fs::remove_file(record.folder.join("a.pcapng")).unwrap();
        let error = Files::of_full(&record, folder.path()).unwrap_err();
        assert!(matches!(error, DownloadError::Removed { missing: 1, all: 2, .. }), "{error}");
        record.destination_conf = "s3://bucket/x?region=us-east-1".into();
        let error = Files::of_full(&record, folder.path()).unwrap_err().to_string();
        assert!(error.contains("1 of") && error.contains("s3://bucket/x"), "{error}");
        record.segments.clear();
        let error = Files::of_full(&record, folder.path()).unwrap_err().to_string();
        assert!(error.contains(crate::captures::NO_PACKETS), "{error}");
    }

    #[test]
    fn links_and_files_that_were_changed_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        fs::write(&outside, [0; 10]).unwrap();
        let base = folder.path().join("base");
        for change in [
            &|path: &Path| symlink(&outside, path).unwrap(),
            &|path: &Path| fs::write(path, [0; 11]).unwrap(),
            &|path: &Path| fs::create_dir(path).unwrap(),
        ] as [&dyn Fn(&Path); 3]
        {
            let record = record(&base, &["a.pcapng"]);
            let path = record.folder.join("a.pcapng");
            fs::remove_file(&path).unwrap();
            change(&path);
            let error = Files::of_full(&record, &base).unwrap_err();
            assert!(matches!(error, DownloadError::Changed { .. }), "{error}");
        }
        // The folder itself leads elsewhere.
        let record = record(&base, &["a.pcapng"]);
        let moved = folder.path().join("moved");
        fs::rename(&record.folder, &moved).unwrap();
        symlink(&moved, &record.folder).unwrap();
        let error = Files::of_full(&record, &base).unwrap_err();
        assert!(matches!(error, DownloadError::Changed { .. }), "{error}");
    }
}
