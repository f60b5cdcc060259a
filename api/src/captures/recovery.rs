//! After a crash: every capture that was running is closed as what it captured.
//!
//! - Whole segments are kept and listed; a hidden one becomes visible up to its last whole packet, or
//!   goes if it has none.
//! - Packets that were still in memory are gone with the process, and nobody counted them: there is no
//!   law for such a capture, and its message says that it was cut short.

use std::path::Path;

use capture_user::{
    error::with_causes,
    segment::{SegmentError, SegmentInfo, recover_folder},
};

use super::CaptureError;
use crate::{
    id,
    record::{Record, Status},
    store::Store,
};

/// What a capture that the crash cut short has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// These packets, in this many files.
    Kept {
        /// Packets.
        packets: u64,
        /// Files.
        files: usize,
    },
    /// Nothing.
    Nothing,
    /// Its folder cannot be read.
    Unreadable,
}

/// Closes every capture that is not final.
pub(super) fn recover(store: &Store) -> Result<(), CaptureError> {
    for mut record in store.unfinished()? {
        let recovered = close(&mut record);
        tracing::warn!(
            pcap_id = id::show(record.id),
            ?recovered,
            "closed a capture that was running when the service ended"
        );
        store.put(&record)?;
    }
    Ok(())
}

fn close(record: &mut Record) -> Recovered {
    match segments(&record.folder) {
        Ok(segments) => {
            record.packets_captured = segments.iter().map(|segment| segment.packets).sum();
            record.segments = segments.iter().map(Into::into).collect();
            let found = record.packets_captured > 0;
            record.status = if found { Status::Success } else { Status::Failed };
            record.error_message = Some(if found {
                "The service ended unexpectedly: the files have what was written until then.".into()
            } else {
                "The service ended unexpectedly before a packet was written.".into()
            });
            if found {
                Recovered::Kept { packets: record.packets_captured, files: segments.len() }
            } else {
                Recovered::Nothing
            }
        }
        Err(error) => {
            record.status = Status::Failed;
            record.error_message = Some(
                "The service ended unexpectedly, and the files could not be put in order.".into(),
            );
            tracing::error!(pcap_id = id::show(record.id), error = with_causes(&error), "files");
            Recovered::Unreadable
        }
    }
}

fn segments(folder: &Path) -> Result<Vec<SegmentInfo>, SegmentError> {
    match recover_folder(folder) {
        Err(error) if error.source.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        segments => segments,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        destination::Destination,
        request::{FilterV1, FullRequest},
    };

    #[test]
    fn a_capture_without_a_folder_is_closed_as_failed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("data")).unwrap();
        let request = FullRequest {
            filter_v1: FilterV1::default(),
            filter: capture_user::filter::Filter::default(),
            colo_name: "local01".into(),
            destination: Destination::in_folder(folder.path().join("captures")),
            time_limit: 1,
            packet_limit: None,
            byte_limit: None,
        };
        let record = Record::new(1, &request, 1);
        store.put(&record).unwrap();
        recover(&store).unwrap();
        let closed = store.get(1, record.id).unwrap().unwrap();
        assert_eq!(closed.status, Status::Failed);
        assert!(closed.error_message.unwrap().contains("unexpectedly"));
        assert_eq!(store.unfinished().unwrap(), []);
    }
}
