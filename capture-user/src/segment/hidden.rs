//! Files that are hidden until they are whole.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use super::SegmentError;

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SegmentError {
    move |source| SegmentError { operation, path: path.to_path_buf(), source }
}

/// Creates the hidden file (`.NAME.part`) of a file to be.
pub(crate) fn create(target: &Path) -> Result<(File, PathBuf), SegmentError> {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let hidden = target.with_file_name(format!(".{name}.part"));
    let file = File::create(&hidden).map_err(failed("creating", &hidden))?;
    Ok((file, hidden))
}

/// Makes it visible, for good.
pub(crate) fn reveal(file: &File, hidden: &Path, target: &Path) -> Result<(), SegmentError> {
    file.sync_all().map_err(failed("syncing", hidden))?;
    fs::rename(hidden, target).map_err(failed("renaming", hidden))?;
    let folder = match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed("syncing the folder", folder))
}
