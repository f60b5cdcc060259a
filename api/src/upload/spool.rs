//! The folder that captures for buckets are written to: one of its own in it for each capture, with the
//! same name as in the bucket.

use std::{fs, io, os::unix::fs::DirBuilderExt as _, path::Path, sync::Weak, time::Duration};

use super::{Uploads, is_gone};
use crate::id;

/// Between two looks for what has been kept for long enough.
const EVERY: Duration = Duration::from_mins(1);

/// Makes the spool if it is not there; how many bytes are in it.
pub(super) fn open(spool: &Path) -> io::Result<u64> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(spool)?;
    let mut used = 0;
    for entry in fs::read_dir(spool)? {
        used += size(&entry?.path());
    }
    Ok(used)
}

/// Bytes in a capture's folder. What cannot be read counts as nothing: it cannot be sent, either.
fn size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries.filter_map(|entry| entry.ok()?.metadata().ok()).map(|file| file.len()).sum()
}

/// Removes the folders of captures that this says are over; the bytes that each had.
pub(super) fn remove(spool: &Path, is_over: impl Fn(u128) -> bool) -> Vec<u64> {
    let mut freed = Vec::new();
    for entry in fs::read_dir(spool).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| id::parse(name.strip_prefix("pcap_")?));
        let Some(id) = id.filter(|id| is_over(*id)) else { continue };
        let bytes = size(&entry.path());
        match fs::remove_dir_all(entry.path()) {
            Ok(()) => {
                tracing::info!(pcap_id = id::show(id), bytes, "removed from the spool");
                freed.push(bytes);
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => tracing::error!(%error, path = %entry.path().display(), "the spool"),
        }
    }
    freed
}

/// As long as there are uploads.
pub(super) async fn sweep_now_and_then(uploads: Weak<Uploads>) {
    loop {
        tokio::time::sleep(EVERY).await;
        let Some(uploads) = uploads.upgrade() else { return };
        // It is done before the next one.
        drop(tokio::task::spawn_blocking(move || uploads.sweep()).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_goes_and_everything_else_stays() {
        let folder = tempfile::tempdir().unwrap();
        let spool = folder.path().join("spool");
        assert_eq!(open(&spool).unwrap(), 0);
        let (over, kept) = (id::new(), id::new());
        for (name, bytes) in [(over, 100), (kept, 10)] {
            let folder = spool.join(format!("pcap_{}", id::show(name)));
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("a.pcapng"), vec![0; bytes]).unwrap();
        }
        fs::create_dir(spool.join("other")).unwrap();
        assert_eq!(open(&spool).unwrap(), 110);
        assert_eq!(remove(&spool, |id| id == over), [100]);
        assert_eq!(open(&spool).unwrap(), 10);
        assert!(spool.join("other").exists());
    }
}
