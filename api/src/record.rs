//! A capture as it is remembered, and as the API shows it.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::{
    id,
    request::{FilterV1, FullRequest},
    simple::{PcapSimple, SimpleRecord},
};

/// Where a capture stands. The API knows more states; these are the ones that occur here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Not yet started.
    Pending,
    /// It captures.
    Running,
    /// It has ended, and files of it wait for their bucket.
    ConversionPending,
    /// Its last files are on their way.
    ConversionRunning,
    /// Done, and its files are whole, where they belong.
    Success,
    /// It has nothing, or not all.
    Failed,
}

/// A file of a capture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Segment {
    /// Its name in the capture's folder.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Packets.
    pub packets: u64,
    /// Their captured lengths, bytes.
    pub captured_bytes: u64,
    /// Earliest packet time, UTC nanoseconds.
    pub first_ns: u64,
    /// Latest packet time, UTC nanoseconds.
    pub last_ns: u64,
    /// SHA-256 in hexadecimal digits, if it was taken while the segment was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

impl From<&capture_user::segment::SegmentInfo> for Segment {
    fn from(info: &capture_user::segment::SegmentInfo) -> Self {
        let name = info.path.file_name().unwrap_or_default();
        Self {
            name: name.to_string_lossy().into_owned(),
            size: info.size,
            packets: info.packets,
            captured_bytes: info.captured_bytes,
            first_ns: info.first_ns,
            last_ns: info.last_ns,
            sha256: info.sha256.clone(),
        }
    }
}

/// A full capture, as the database has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: u128,
    /// Whose it is.
    pub account: u128,
    /// As asked for.
    pub filter_v1: FilterV1,
    /// As asked for.
    pub colo_name: String,
    /// What was asked for, without credentials: the identity of its destination.
    pub destination_conf: String,
    /// Where its files are written; those for a bucket are taken from there.
    pub folder: PathBuf,
    /// Seconds.
    pub time_limit: u32,
    /// Packets.
    pub packet_limit: Option<u32>,
    /// Bytes.
    pub byte_limit: Option<u64>,
    /// UTC microseconds; no two captures of this host have the same.
    pub submitted_us: i64,
    /// Where it stands.
    pub status: Status,
    /// What became of the capturing itself, when that is over.
    #[serde(default)]
    pub outcome: Option<Status>,
    /// Why it failed, or is not all.
    pub error_message: Option<String>,
    /// Why its files are not all where they belong.
    #[serde(default)]
    pub upload_error: Option<String>,
    /// When it became final, UTC microseconds.
    #[serde(default)]
    pub final_us: Option<i64>,
    /// UTC microseconds.
    pub stop_requested_us: Option<i64>,
    /// Packets in its files.
    pub packets_captured: u64,
    /// Its files, wherever they are now.
    pub segments: Vec<Segment>,
    /// The engine's summary: the law, per interface and queue.
    pub summary: Option<Value>,
}

impl Record {
    /// A capture that has yet to start.
    pub fn new(account: u128, request: &FullRequest, submitted_us: i64) -> Self {
        let id = id::new();
        let folder = request.destination.folder().unwrap_or(Path::new(""));
        Self {
            id,
            account,
            filter_v1: request.filter_v1.clone(),
            colo_name: request.colo_name.clone(),
            destination_conf: request.destination.identity(),
            folder: folder.join(format!("pcap_{}", id::show(id))),
            time_limit: request.time_limit,
            packet_limit: request.packet_limit,
            byte_limit: request.byte_limit,
            submitted_us,
            status: Status::Pending,
            outcome: None,
            error_message: None,
            upload_error: None,
            final_us: None,
            stop_requested_us: None,
            packets_captured: 0,
            segments: Vec::new(),
            summary: None,
        }
    }

    /// Whether nothing more will happen to it.
    pub fn is_final(&self) -> bool {
        matches!(self.status, Status::Success | Status::Failed)
    }

    /// Whether its files go elsewhere from where they are written.
    pub fn is_uploaded(&self) -> bool {
        !self.destination_conf.starts_with("file:")
    }

    /// What its files are put into, at its destination.
    pub fn folder_name(&self) -> String {
        format!("pcap_{}", id::show(self.id))
    }

    /// Everything that went wrong.
    fn told(&self) -> Option<String> {
        match (&self.error_message, &self.upload_error) {
            (Some(one), Some(other)) => {
                Some(format!("{}. {other}", one.strip_suffix('.').unwrap_or(one)))
            }
            (one, other) => one.clone().or_else(|| other.clone()),
        }
    }

    /// As the API shows it.
    pub fn result(&self) -> PcapFull {
        PcapFull {
            id: id::show(self.id),
            byte_limit: self.byte_limit,
            colo_name: self.colo_name.clone(),
            destination_conf: self.destination_conf.clone(),
            error_message: self.told(),
            filter_v1: self.filter_v1.clone(),
            packets_captured: self.packets_captured,
            status: self.status,
            stop_requested: self.stop_requested_us.map(time),
            submitted: time(self.submitted_us),
            system: System::MagicTransit,
            time_limit: self.time_limit,
            kind: Kind::Full,
        }
    }
}

/// A capture of either kind, as the database has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Capture {
    /// Packets to come.
    Full(Record),
    /// Packets that passed.
    Simple(SimpleRecord),
}

impl Capture {
    /// When it was created, UTC microseconds.
    pub fn submitted_us(&self) -> i64 {
        match self {
            Self::Full(record) => record.submitted_us,
            Self::Simple(record) => record.submitted_us,
        }
    }

    /// Whether nothing more will happen to it.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Full(record) => record.is_final(),
            Self::Simple(record) => record.is_final(),
        }
    }

    /// As the API shows it.
    pub fn result(&self) -> Pcap {
        match self {
            Self::Full(record) => Pcap::Full(record.result()),
            Self::Simple(record) => Pcap::Simple(record.result()),
        }
    }
}

/// Microseconds since 1970 as RFC 3339.
pub(crate) fn time(microseconds: i64) -> String {
    // The clock would have to be off by thousands of years.
    Timestamp::from_microsecond(microseconds).unwrap_or_default().to_string()
}

/// Now, in UTC microseconds.
pub fn now_us() -> i64 {
    Timestamp::now().as_microsecond()
}

/// The one value of `system`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum System {
    /// What the clients send.
    MagicTransit,
}

/// The one value of `type` of a full capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Every matching packet, whole.
    Full,
}

/// A capture, by `type`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Pcap {
    /// Packets to come.
    Full(PcapFull),
    /// Packets that passed.
    Simple(PcapSimple),
}

/// A full capture. It has these keys and no other: some clients tell by the keys which kind of capture
/// it is. What has no value is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct PcapFull {
    /// The capture's id.
    #[schema(min_length = 32, max_length = 32, example = "66802ca5668e47a2b82c2e6746e45037")]
    pub id: String,
    /// Most bytes to capture.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1_000_000_000, nullable = false)]
    pub byte_limit: Option<u64>,
    /// The site or region that it was asked of.
    pub colo_name: String,
    /// Where its files go.
    pub destination_conf: String,
    /// Why it failed, or is not all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error_message: Option<String>,
    /// Which packets; all if it is empty.
    pub filter_v1: FilterV1,
    /// Packets so far.
    pub packets_captured: u64,
    /// Where it stands.
    pub status: Status,
    /// When it was told to stop.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime, nullable = false)]
    pub stop_requested: Option<String>,
    /// When it was created.
    #[schema(format = DateTime)]
    pub submitted: String,
    /// Always `magic-transit`.
    pub system: System,
    /// Seconds.
    #[schema(minimum = 1, maximum = 86400)]
    pub time_limit: u32,
    /// Always `full`.
    #[serde(rename = "type")]
    pub kind: Kind,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::destination::Destination;

    fn record() -> Record {
        let request = FullRequest {
            filter_v1: FilterV1 { protocol: Some(6), ..FilterV1::default() },
            filter: capture_user::filter::Filter::default(),
            colo_name: "ord02".into(),
            destination: Destination::in_folder("/captures"),
            time_limit: 300,
            packet_limit: Some(10),
            byte_limit: None,
        };
        Record::new(7, &request, 1_654_195_102_269_047)
    }

    #[test]
    fn a_result_has_the_documented_keys_and_no_other() {
        let mut record = record();
        record.id = 1;
        assert_eq!(
            serde_json::to_value(record.result()).unwrap(),
            json!({
                "id": "00000000000000000000000000000001",
                "colo_name": "ord02",
                "destination_conf": "file:///captures",
                "filter_v1": { "protocol": 6 },
                "packets_captured": 0,
                "status": "pending",
                "submitted": "2022-06-02T18:38:22.269047Z",
                "system": "magic-transit",
                "time_limit": 300,
                "type": "full",
            })
        );
        record.byte_limit = Some(1);
        record.error_message = Some("x".into());
        record.stop_requested_us = Some(0);
        let Value::Object(all) = serde_json::to_value(record.result()).unwrap() else { panic!() };
        assert_eq!(all.len(), 13);
        assert!(!all.contains_key("packet_limit"));
        assert_eq!(all["stop_requested"], "1970-01-01T00:00:00Z");
    }

    #[test]
    fn a_record_survives_its_way_through_the_database() {
        let mut record = record();
        record.summary = Some(json!({ "law": { "hits": 1 } }));
        let bytes = serde_json::to_vec(&record).unwrap();
        assert_eq!(serde_json::from_slice::<Record>(&bytes).unwrap(), record);
    }
}
