//! After a crash: every capture that was running is closed as what it captured.
//!
//! - Whole segments are kept and listed; a hidden one becomes visible up to its last whole packet, or
//!   goes if it has none.
//! - What was on its way to a bucket goes on. Segments that it has are not looked for here.
//! - Packets that were still in memory are gone with the process, and nobody counted them: there is no
//!   law for such a capture, and its message says that it was cut short.

use std::{collections::BTreeMap, path::Path};

use capture_user::{
    error::with_causes,
    segment::{SegmentError, SegmentInfo, recover_folder},
};

use super::CaptureError;
use crate::{
    id,
    record::{Record, Segment, Status, now_us},
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

/// Closes every capture that was running; those whose files have to be delivered.
pub(super) fn recover(store: &Store) -> Result<Vec<Record>, CaptureError> {
    let mut undelivered = Vec::new();
    for mut record in store.unfinished()? {
        if record.outcome.is_some() {
            undelivered.push(record);
            continue;
        }
        let sent = store.objects(record.id)?.into_iter().map(|object| object.segment);
        let recovered = close(&mut record, sent.collect());
        tracing::warn!(
            pcap_id = id::show(record.id),
            ?recovered,
            "closed a capture that was running when the service ended"
        );
        store.put(&record)?;
        if !record.is_final() {
            undelivered.push(record);
        }
    }
    Ok(undelivered)
}

fn close(record: &mut Record, sent: Vec<Segment>) -> Recovered {
    let here = segments(&record.folder);
    let all: BTreeMap<String, Segment> = here
        .iter()
        .flatten()
        .map(Segment::from)
        .chain(sent)
        .map(|segment| (segment.name.clone(), segment))
        .collect();
    record.segments = all.into_values().collect();
    record.packets_captured = record.segments.iter().map(|segment| segment.packets).sum();
    let found = record.packets_captured > 0;
    let (outcome, text) = match (&here, found) {
        (Err(error), _) => {
            tracing::error!(pcap_id = id::show(record.id), error = with_causes(error), "files");
            let text = "The service ended unexpectedly, and the files could not be put in order.";
            (Status::Failed, text)
        }
        (Ok(_), true) => {
            let text =
                "The service ended unexpectedly: the files have what was written until then.";
            (Status::Success, text)
        }
        (Ok(_), false) => {
            (Status::Failed, "The service ended unexpectedly before a packet was written.")
        }
    };
    record.outcome = Some(outcome);
    record.error_message = Some(text.into());
    if record.segments.is_empty() {
        // There is nothing to deliver.
        record.status = outcome;
        record.final_us = Some(now_us());
    } else {
        record.status = Status::ConversionPending;
    }
    match here {
        Err(_) => Recovered::Unreadable,
        Ok(_) if found => {
            Recovered::Kept { packets: record.packets_captured, files: record.segments.len() }
        }
        Ok(_) => Recovered::Nothing,
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
        assert_eq!(recover(&store).unwrap(), []);
        let closed = store.get(1, record.id).unwrap().unwrap();
        assert_eq!(closed.status, Status::Failed);
        assert!(closed.error_message.unwrap().contains("unexpectedly"));
        assert_eq!(store.unfinished().unwrap(), []);
    }
}
