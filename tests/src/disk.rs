//! Small disks.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use tempfile::{NamedTempFile, TempDir, tempdir};

use crate::process::tool;

/// A file system of a few KiB; gone when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    folder: TempDir,
    /// What a disk of blocks is made of.
    _image: Option<NamedTempFile>,
}

impl SmallDisk {
    /// One that has room for this many KiB.
    pub fn new(kib: u32) -> Self {
        let folder = tempdir().unwrap();
        let (kind, size) = (Some("tmpfs"), format!("size={kib}k"));
        mount(kind, folder.path(), kind, MsFlags::empty(), Some(size.as_str())).unwrap();
        Self { folder, _image: None }
    }

    /// A disk of blocks with ext4, of this size in KiB, not all of which is for files.
    pub fn ext4(kib: u32) -> Self {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(u64::from(kib) * 1024).unwrap();
        let folder = tempdir().unwrap();
        let (from, to) = (image.path().to_str().unwrap(), folder.path().to_str().unwrap());
        tool(&["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", from]);
        tool(&["mount", "-o", "loop", from, to]);
        fs::remove_dir(folder.path().join("lost+found")).unwrap();
        Self { folder, _image: Some(image) }
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
