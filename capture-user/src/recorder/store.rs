//! The files of a recorder: their names, and how they are found and read.
//!
//! - `RUN_SEQUENCE.pcapng` is a segment, `RUN_SEQUENCE.index` its index, `.RUN_SEQUENCE.pcapng.part` the
//!   segment that is being written. A run is one start of the recorder's job.
//! - Runs and segments are numbered in the order in which they were recorded, whatever the clock said.
//! - A reader takes what it finds: segments come and go while it reads, and a hidden one may become
//!   visible. It writes nothing.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use super::index::Index;
use crate::segment::{SegmentError, read::Reader};

/// A segment, in the order of recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    pub(super) run: u32,
    pub(super) sequence: u32,
}

impl Name {
    fn parse(stem: &str) -> Option<Self> {
        let (run, sequence) = stem.split_once('_')?;
        Some(Self { run: run.parse().ok()?, sequence: sequence.parse().ok()? })
    }

    /// The segment that a path names, as far as it is one of a recorder.
    pub(super) fn of(path: &Path) -> Option<Self> {
        Self::parse(path.file_name()?.to_str()?.strip_suffix(".pcapng")?)
    }

    fn stem(self) -> String {
        format!("{:06}_{:05}", self.run, self.sequence)
    }

    pub(super) fn segment(self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.pcapng", self.stem()))
    }

    pub(super) fn hidden(self, folder: &Path) -> PathBuf {
        folder.join(format!(".{}.pcapng.part", self.stem()))
    }

    pub(super) fn index(self, folder: &Path) -> PathBuf {
        folder.join(format!("{}.index", self.stem()))
    }

    /// What the engine is given so that it names the segments of a run so.
    pub(super) fn run(folder: &Path, run: u32) -> PathBuf {
        folder.join(format!("{run:06}.pcapng"))
    }
}

/// What a folder of a recorder holds.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// Segments, and whether each is visible.
    pub(super) segments: BTreeMap<Name, bool>,
    /// Indices.
    pub(super) indices: Vec<Name>,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SegmentError {
    move |source| SegmentError { operation, path: path.to_path_buf(), source }
}

/// Lists a folder; other files in it are left out.
pub(super) fn list(folder: &Path) -> Result<Listing, SegmentError> {
    let mut listing = Listing::default();
    for entry in fs::read_dir(folder).map_err(failed("listing", folder))? {
        let name = entry.map_err(failed("listing", folder))?.file_name();
        let Some(name) = name.to_str() else { continue };
        let hidden = name.strip_prefix('.').and_then(|name| name.strip_suffix(".pcapng.part"));
        if let Some(name) = hidden.and_then(Name::parse) {
            // It may have become visible in between, and be listed as both.
            listing.segments.entry(name).or_insert(false);
        } else if let Some(name) = name.strip_suffix(".pcapng").and_then(Name::parse) {
            listing.segments.insert(name, true);
        } else if let Some(name) = name.strip_suffix(".index").and_then(Name::parse) {
            listing.indices.push(name);
        }
    }
    Ok(listing)
}

/// Opens a segment under the name that it has now; `None` when it is gone.
pub(super) fn open(folder: &Path, name: Name) -> Result<Option<(File, PathBuf)>, SegmentError> {
    // Hidden first: it can become visible, and not the other way round.
    for path in [name.hidden(folder), name.segment(folder)] {
        match File::open(&path) {
            Ok(file) => return Ok(Some((file, path))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("opening", &path)(error)),
        }
    }
    Ok(None)
}

/// The index of a segment as it is on the disk, or made of the segment; of one that is hidden, as far as
/// it is whole. `None` when the segment is gone.
pub(super) fn index(folder: &Path, name: Name) -> Result<Option<Index>, SegmentError> {
    let Some((file, path)) = open(folder, name)? else { return Ok(None) };
    let size = file.metadata().map_err(failed("reading", &path))?.len();
    let hidden = path.extension() == Some(OsStr::new("part"));
    if !hidden && let Some(index) = Index::load(&name.index(folder), size) {
        return Ok(Some(index));
    }
    Index::build(&mut Reader::of(file, &path)?, hidden).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_the_order_of_recording_and_others_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "000002_00001.pcapng",
            "000001_100000.pcapng",
            "000001_99999.pcapng",
            "000001_99999.index",
            ".000002_00002.pcapng.part",
            "notes.txt",
            "x_00001.pcapng",
            "000001_00001.pcapng.old",
            "lock",
        ] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let listing = list(folder.path()).unwrap();
        let found: Vec<_> = listing
            .segments
            .iter()
            .map(|(name, visible)| (name.run, name.sequence, *visible))
            .collect();
        assert_eq!(found, [(1, 99_999, true), (1, 100_000, true), (2, 1, true), (2, 2, false)]);
        assert_eq!(listing.indices, [Name { run: 1, sequence: 99_999 }]);
        for name in listing.segments.keys() {
            assert_eq!(Name::of(&name.segment(folder.path())), Some(*name));
        }
    }
}
