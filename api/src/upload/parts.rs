//! A segment on its way out: read in parts, compressed if that is asked for, hashed as it goes.
//!
//! - All parts but the last have the same size, as some stores want it.
//! - Compressed, it is a series of zstd frames that each stand for the same number of bytes: a reader
//!   can begin at any of them, and one that is damaged costs no more than itself.
//!   <https://www.rfc-editor.org/rfc/rfc8878.html#section-3>
//! - Memory is one part and one frame, however long the segment is.

use std::{
    io::{self, Read as _},
    path::Path,
};

use capture_user::segment::Once;
use ring::digest::{Context, SHA256};
use zstd::{bulk::Compressor, zstd_safe::CParameter};

use crate::{config::UploadSettings, id};

/// Smallest part, bytes. Stores ask for 5 MiB; one that is much longer holds more memory, and takes
/// longer to send again.
const PART: u64 = 8 << 20;

/// Most parts, fewer than the 10,000 that S3 allows, for compressing can make a file longer by a bit.
const PARTS: u64 = 9_000;

/// Bytes of a part of a segment of this size.
pub(super) fn part_bytes(size: u64) -> usize {
    let even = size.div_ceil(PARTS).next_multiple_of(1 << 20);
    usize::try_from(even.max(PART)).unwrap_or(usize::MAX)
}

/// How segments are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Compression {
    level: i32,
    frame: usize,
}

impl Compression {
    pub(super) fn new(settings: &UploadSettings) -> Option<Self> {
        let Self { level, frame } =
            Self { level: settings.zstd_level, frame: settings.zstd_frame_bytes };
        settings.zstd.then_some(Self { level, frame })
    }
}

/// The parts of one segment.
pub(super) struct Parts {
    file: Once,
    part: usize,
    compressor: Option<(Compressor<'static>, usize)>,
    /// Read, or compressed, and not yet part of a part.
    ready: Vec<u8>,
    /// Bytes taken from the file.
    taken: u64,
    /// Bytes given out.
    given: u64,
    digest: Context,
}

/// What has gone through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Passed {
    /// Bytes of the file.
    pub(super) taken: u64,
    /// Bytes of the object.
    pub(super) given: u64,
    /// Of the object, in hexadecimal digits.
    pub(super) sha256: String,
}

impl Parts {
    pub(super) fn open(
        path: &Path,
        part: usize,
        compression: Option<Compression>,
    ) -> io::Result<Self> {
        let compressor = match compression {
            None => None,
            Some(Compression { level, frame }) => {
                let mut compressor = Compressor::new(level)?;
                compressor.set_parameter(CParameter::ChecksumFlag(true))?;
                Some((compressor, frame))
            }
        };
        let (file, digest) = (Once::open(path)?, Context::new(&SHA256));
        Ok(Self { file, part, compressor, ready: Vec::new(), taken: 0, given: 0, digest })
    }

    /// The length of the file, bytes.
    pub(super) fn size(&self) -> u64 {
        self.file.size()
    }

    /// The next part; none behind the last.
    pub(super) fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        while self.ready.len() < self.part && self.fill()? {}
        let rest = self.ready.split_off(self.part.min(self.ready.len()));
        let part = std::mem::replace(&mut self.ready, rest);
        if part.is_empty() {
            return Ok(None);
        }
        self.digest.update(&part);
        self.given += part.len() as u64;
        Ok(Some(part))
    }

    /// Takes more from the file; false at its end.
    fn fill(&mut self) -> io::Result<bool> {
        let Some((compressor, frame)) = &mut self.compressor else {
            let room = self.part - self.ready.len();
            self.ready.reserve_exact(room);
            let read = (&mut self.file).take(room as u64).read_to_end(&mut self.ready)?;
            self.taken += read as u64;
            return Ok(read > 0);
        };
        let mut raw = Vec::with_capacity(*frame);
        let read = (&mut self.file).take(*frame as u64).read_to_end(&mut raw)?;
        if read == 0 {
            return Ok(false);
        }
        self.taken += read as u64;
        self.ready.extend(compressor.compress(&raw)?);
        Ok(true)
    }

    pub(super) fn passed(self) -> Passed {
        let sha256 = id::hex(self.digest.finish().as_ref());
        Passed { taken: self.taken, given: self.given, sha256 }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn all(mut parts: Parts) -> (Vec<Vec<u8>>, Passed) {
        let mut all = Vec::new();
        while let Some(part) = parts.next().unwrap() {
            all.push(part);
        }
        (all, parts.passed())
    }

    /// Bytes that compress, but not to nothing.
    fn text(length: u32) -> Vec<u8> {
        (0..length).flat_map(|at| (at * at % 251).to_le_bytes()).collect()
    }

    #[test]
    fn parts_are_of_one_size_and_are_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        for length in [0, 1, 25, 50, 100, 1000] {
            let text = text(length);
            fs::write(&path, &text).unwrap();
            let (parts, passed) = all(Parts::open(&path, 100, None).unwrap());
            assert_eq!(parts.concat(), text);
            assert!(parts.iter().rev().skip(1).all(|part| part.len() == 100));
            assert_eq!((passed.taken, passed.given), (text.len() as u64, text.len() as u64));
            assert_eq!(passed.sha256, id::hex(&id::sha256(&text)));
        }
    }

    #[test]
    fn compressed_parts_are_frames_that_each_stand_for_themselves() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let text = text(10_000);
        fs::write(&path, &text).unwrap();
        let compression = Compression { level: 3, frame: 4096 };
        let (parts, passed) = all(Parts::open(&path, 1000, Some(compression)).unwrap());
        assert!(parts.iter().rev().skip(1).all(|part| part.len() == 1000));
        let object = parts.concat();
        assert!(object.len() < text.len());
        assert_eq!((passed.taken, passed.given), (text.len() as u64, object.len() as u64));
        assert_eq!(passed.sha256, id::hex(&id::sha256(&object)));
        assert_eq!(zstd::decode_all(object.as_slice()).unwrap(), text);
        let magic = 0xfd2f_b528_u32.to_le_bytes();
        let starts: Vec<usize> =
            (0..object.len() - 3).filter(|at| object[*at..*at + 4] == magic).collect();
        assert_eq!(starts.len(), text.len().div_ceil(4096));
        let second = zstd::decode_all(&object[starts[1]..starts[2]]).unwrap();
        assert_eq!(second, text[4096..8192]);
    }

    #[test]
    fn no_segment_has_more_parts_than_a_store_takes() {
        assert_eq!(part_bytes(0), 8 << 20);
        assert_eq!(part_bytes(256 << 20), 8 << 20);
        let part = part_bytes(1 << 40) as u64;
        assert!((1_u64 << 40).div_ceil(part) <= PARTS);
    }
}
