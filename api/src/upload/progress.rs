//! How far the files of a capture have come.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;
use utoipa::ToSchema;

use super::Object;
use crate::{
    destination::Cause,
    record::{Record, Segment},
};

/// Where a segment stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SegmentState {
    /// It waits for its turn, or for the store.
    Waiting,
    /// It is on its way.
    Sending,
    /// The store has confirmed it.
    Stored,
    /// It was lost on this host before it could be sent.
    Missing,
}

/// How far one segment has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct SegmentUpload {
    /// Its name where it belongs.
    pub name: String,
    /// Where it stands.
    pub state: SegmentState,
    /// Bytes of the pcapng file.
    pub size: u64,
    /// Bytes that the store has confirmed; of an object that is compressed, when it is stored.
    pub sent: u64,
    /// Times that it has been tried again.
    pub retries: u32,
    /// Of the object, when it is stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub sha256: Option<String>,
    /// Why it has not been taken yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<String>,
}

impl SegmentUpload {
    fn new(segment: &Segment) -> Self {
        Self {
            name: segment.name.clone(),
            state: SegmentState::Waiting,
            size: segment.size,
            sent: 0,
            retries: 0,
            sha256: None,
            error: None,
        }
    }

    fn store(&mut self, object: &Object) {
        self.name.clone_from(&object.name);
        self.state = SegmentState::Stored;
        self.sent = object.size;
        self.sha256 = Some(object.sha256.clone());
        self.error = None;
    }
}

/// How far a capture's files have come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct UploadStats {
    /// Files that are where they belong.
    pub stored: u64,
    /// Files that are not.
    pub unstored: u64,
    /// Each of them.
    pub segments: Vec<SegmentUpload>,
}

impl UploadStats {
    fn new(segments: Vec<SegmentUpload>) -> Self {
        let all = segments.len() as u64;
        let is_stored = |one: &&SegmentUpload| one.state == SegmentState::Stored;
        let stored = segments.iter().filter(is_stored).count() as u64;
        Self { stored, unstored: all - stored, segments }
    }

    /// Of a capture that nobody works on.
    pub(super) fn of_record(record: &Record, objects: &[Object]) -> Self {
        let mut progress = Progress::default();
        for segment in &record.segments {
            progress.add(segment);
        }
        for object in objects {
            progress.store(object);
        }
        progress.stats()
    }
}

/// The same while it changes.
#[derive(Debug, Default)]
pub(super) struct Progress {
    segments: BTreeMap<String, SegmentUpload>,
    /// Most bytes that were ever taken of a segment that is not stored yet.
    furthest: HashMap<String, u64>,
}

impl Progress {
    pub(super) fn add(&mut self, segment: &Segment) {
        let name = segment.name.clone();
        self.segments.entry(name).or_insert_with(|| SegmentUpload::new(segment));
    }

    pub(super) fn store(&mut self, object: &Object) {
        self.add(&object.segment);
        self.furthest.remove(&object.segment.name);
        self.change(&object.segment.name, |segment| segment.store(object));
    }

    pub(super) fn begin(&mut self, name: &str) {
        self.change(name, |segment| {
            segment.state = SegmentState::Sending;
            segment.sent = 0;
        });
    }

    /// Whether it has come further than ever before.
    pub(super) fn sent(&mut self, name: &str, bytes: u64) -> bool {
        let Some(segment) = self.segments.get_mut(name) else { return false };
        segment.sent += bytes;
        let furthest = self.furthest.entry(name.to_owned()).or_default();
        let further = segment.sent > *furthest;
        *furthest = segment.sent.max(*furthest);
        further
    }

    pub(super) fn fail(&mut self, name: &str, cause: &Cause) {
        self.change(name, |segment| {
            segment.state = SegmentState::Waiting;
            segment.sent = 0;
            segment.retries += 1;
            segment.error = Some(cause.to_string());
        });
    }

    pub(super) fn lose(&mut self, name: &str) {
        self.change(name, |segment| segment.state = SegmentState::Missing);
    }

    fn change(&mut self, name: &str, enter: impl FnOnce(&mut SegmentUpload)) {
        if let Some(segment) = self.segments.get_mut(name) {
            enter(segment);
        }
    }

    pub(super) fn unsent(&self) -> Vec<String> {
        let waits = |state| matches!(state, SegmentState::Waiting | SegmentState::Sending);
        let unsent = self.segments.iter().filter(|(_, segment)| waits(segment.state));
        unsent.map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn stats(&self) -> UploadStats {
        UploadStats::new(self.segments.values().cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_again_is_no_progress_until_it_is_more() {
        let segment = Segment { name: "a".into(), size: 30, ..Segment::default() };
        let mut progress = Progress::default();
        progress.add(&segment);
        progress.begin("a");
        assert!(progress.sent("a", 10) && progress.sent("a", 10));
        progress.fail("a", &Cause::own("x"));
        assert_eq!(progress.stats().segments[0].error.as_deref(), Some("x"));
        progress.begin("a");
        assert!(!progress.sent("a", 10));
        assert!(!progress.sent("a", 10));
        assert!(progress.sent("a", 10));
        assert_eq!(progress.unsent(), ["a"]);
        let (name, sha256) = ("a.zst".into(), "00".into());
        progress.store(&Object { segment, name, size: 20, sha256 });
        let stats = progress.stats();
        assert_eq!((stats.stored, stats.unstored), (1, 0));
        assert_eq!((stats.segments[0].name.as_str(), stats.segments[0].sent), ("a.zst", 20));
        assert!(progress.unsent().is_empty());
    }
}
