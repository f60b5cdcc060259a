//! A small disk.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use tempfile::{TempDir, tempdir};

/// A file system of a few KiB; gone when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// One that has room for this many KiB.
    pub fn new(kib: u32) -> Self {
        let folder = tempdir().unwrap();
        let (kind, size) = (Some("tmpfs"), format!("size={kib}k"));
        mount(kind, folder.path(), kind, MsFlags::empty(), Some(size.as_str())).unwrap();
        Self { folder }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Leaves no room on it, by a file of this name.
    pub fn fill(&self, name: &str) {
        let mut file = File::create(self.path().join(name)).unwrap();
        let error = loop {
            if let Err(error) = file.write_all(&[0; 4096]) {
                break error;
            }
        };
        assert_eq!(error.raw_os_error(), Some(Errno::ENOSPC as i32), "{error}");
    }

    /// The names of all its files, in order.
    pub fn names(&self) -> Vec<PathBuf> {
        names(self.path())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a program that was killed may still be on its way out.
        if let Err(error) = umount2(self.path(), MntFlags::MNT_DETACH) {
            eprintln!("unmounting {}: {error}", self.path().display());
        }
    }
}

/// The names of a folder's files, in order.
pub fn names(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<PathBuf> = entries.map(|entry| entry.unwrap().file_name().into()).collect();
    names.sort();
    names
}
