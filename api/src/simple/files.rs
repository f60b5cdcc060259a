//! The folder of what was found: a file for each capture, by its id.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Weak,
    time::{Duration, SystemTime},
};

use super::Simples;
use crate::{config::SimpleSettings, id};

/// Between two looks for what has been kept for long enough.
const EVERY: Duration = Duration::from_mins(1);

/// Makes the folder if it is not there, and removes what a crash left half written.
pub(super) fn open(folder: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        if name.starts_with(b".") && name.ends_with(b".part") {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Where a capture's file is.
pub(super) fn path(folder: &Path, id: u128) -> PathBuf {
    folder.join(format!("{}.pcapng", id::show(id)))
}

/// A file that was found.
struct Kept {
    written: SystemTime,
    bytes: u64,
    path: PathBuf,
}

/// The files, oldest first.
fn list(folder: &Path) -> io::Result<Vec<Kept>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        if stem.and_then(id::parse).is_none() || path.extension().is_none_or(|end| end != "pcapng")
        {
            continue;
        }
        // One may go meanwhile.
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        files.push(Kept { written: metadata.modified()?, bytes: metadata.len(), path });
    }
    files.sort_by_key(|file| file.written);
    Ok(files)
}

/// Removes what is too old, and the oldest while there are too many, or too large ones. The newest stays
/// in any case.
pub(super) fn sweep(folder: &Path, settings: &SimpleSettings) {
    let files = match list(folder) {
        Ok(files) => files,
        Err(error) => {
            tracing::error!(%error, path = %folder.display(), "the files of simple captures");
            return;
        }
    };
    let keep = Duration::from_hours(settings.keep_hours.into());
    let mut count = files.len();
    let mut bytes: u64 = files.iter().map(|file| file.bytes).sum();
    for file in files {
        // One of the future is as new as any.
        let is_old = file.written.elapsed().is_ok_and(|age| age >= keep);
        let no_room = count > 1 && (count > settings.files || bytes > settings.bytes);
        if !is_old && !no_room {
            continue;
        }
        count -= 1;
        bytes -= file.bytes;
        match fs::remove_file(&file.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(%error, path = %file.path.display(), "removing");
            }
            _ => {}
        }
    }
}

/// As long as there are simple captures.
pub(super) async fn sweep_now_and_then(simples: Weak<Simples>) {
    loop {
        tokio::time::sleep(EVERY).await;
        let Some(simples) = simples.upgrade() else { return };
        // It is done before the next one.
        drop(tokio::task::spawn_blocking(move || simples.sweep()).await);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    /// A file of 100 bytes that was written so long ago.
    fn file(folder: &Path, ago: Duration) -> PathBuf {
        let path = path(folder, id::new());
        fs::write(&path, [0; 100]).unwrap();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(SystemTime::now() - ago)
            .unwrap();
        path
    }

    fn left(folder: &Path, settings: &SimpleSettings) -> usize {
        sweep(folder, settings);
        list(folder).unwrap().len()
    }

    #[test]
    fn what_is_old_goes_and_the_oldest_where_there_is_no_room() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("simple");
        open(&folder).unwrap();
        let files: Vec<_> = (0..5).map(|at| file(&folder, HOUR * at)).collect();
        let settings = SimpleSettings { keep_hours: 4, ..SimpleSettings::default() };
        assert_eq!(left(&folder, &settings), 4, "one is four hours old");
        assert_eq!(left(&folder, &SimpleSettings { files: 3, ..settings.clone() }), 3);
        assert_eq!(left(&folder, &SimpleSettings { bytes: 299, ..settings.clone() }), 2);
        assert!(files[0].exists() && files[1].exists());
        assert_eq!(left(&folder, &SimpleSettings { bytes: 1, ..settings }), 1, "the newest stays");
        assert!(files[0].exists());
    }

    #[test]
    fn what_was_half_written_goes_and_what_is_not_ours_stays() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("simple");
        open(&folder).unwrap();
        let half = folder.join(format!(".{}.pcapng.part", id::show(id::new())));
        let other = folder.join("other");
        for path in [&half, &other] {
            fs::write(path, [0; 100]).unwrap();
        }
        let kept = file(&folder, HOUR);
        open(&folder).unwrap();
        sweep(&folder, &SimpleSettings { keep_hours: 1, ..SimpleSettings::default() });
        assert!(!half.exists() && !kept.exists() && other.exists());
    }
}
