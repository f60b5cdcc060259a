//! A segment that is read once, from its beginning to its end, by who sends it away.
//!
//! - What is long is read past the page cache, as it was written: through the cache each page costs
//!   memory that must be found first, which can take longer than to hash it, and drives out what others
//!   will read again.
//! - Past the cache, reads begin at whole pages. Where a file system refuses that, and behind a read
//!   that stopped elsewhere, it goes on through the cache.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    ops::Range,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use crate::buffer::{ALIGNMENT, Pages};

/// Least length that is read past the cache: what is shorter has probably just been written through it.
const LONG: u64 = 1 << 20;

/// Read at a time, bytes.
const PIECE: usize = 1 << 20;

/// The file.
#[derive(Debug)]
pub struct Once {
    file: File,
    /// The same, past the cache.
    direct: Option<File>,
    pages: Pages,
    /// What of the pages has been read and not been given out.
    ready: Range<usize>,
    /// Where the next read begins.
    at: u64,
    size: u64,
}

impl Once {
    /// Opens it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let direct = if size >= LONG {
            OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).ok()
        } else {
            None
        };
        let pages = Pages::several(1, usize::try_from(size).unwrap_or(PIECE).min(PIECE)).remove(0);
        Ok(Self { file, direct, pages, ready: 0..0, at: 0, size })
    }

    /// Its length when it was opened, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    #[expect(clippy::disallowed_methods, reason = "how much of it was read is what we want")]
    fn fill(&mut self) -> io::Result<()> {
        let aligned = self.at.is_multiple_of(ALIGNMENT as u64);
        let read = match self.direct.as_ref().filter(|_| aligned) {
            Some(direct) => direct.read_at(self.pages.bytes_mut(), self.at),
            None => self.file.read_at(self.pages.bytes_mut(), self.at),
        };
        let read = match read {
            Err(error) if aligned && error.raw_os_error() == Some(libc::EINVAL) => {
                self.direct = None;
                self.file.read_at(self.pages.bytes_mut(), self.at)?
            }
            read => read?,
        };
        self.at += read as u64;
        self.ready = 0..read;
        Ok(())
    }
}

impl Read for Once {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.ready.is_empty() {
            self.fill()?;
        }
        let ready = &self.pages.bytes()[self.ready.clone()];
        let count = ready.len().min(out.len());
        out[..count].copy_from_slice(&ready[..count]);
        self.ready.start += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_of_any_length_reads_as_it_is_past_the_cache_or_through_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let long = LONG as usize;
        for length in [0, 1, 4096, long - 1, long, long + 1, 2 * long, 3 * long + 4097] {
            let bytes: Vec<u8> = (0..length).map(|at| (at * 31 % 251) as u8).collect();
            fs::write(&path, &bytes).unwrap();
            for refused in [false, true] {
                let mut once = Once::open(&path).unwrap();
                assert_eq!(once.size(), length as u64);
                if refused {
                    once.direct = None;
                }
                let mut read = vec![0; 1000.min(length)];
                once.read_exact(&mut read).unwrap();
                once.read_to_end(&mut read).unwrap();
                assert!(read == bytes, "{length} {refused}");
            }
        }
    }

    #[test]
    fn what_is_cut_short_meanwhile_ends_where_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::write(&path, vec![7; 5 << 20]).unwrap();
        let mut once = Once::open(&path).unwrap();
        once.read_exact(&mut [0; 10]).unwrap();
        File::options().write(true).open(&path).unwrap().set_len((2 << 20) + 3).unwrap();
        let mut rest = Vec::new();
        once.read_to_end(&mut rest).unwrap();
        assert_eq!(rest.len(), (2 << 20) + 3 - 10);
    }
}
