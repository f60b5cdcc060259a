//! A simple capture as it is remembered, and as the API shows it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    id,
    record::{Status, System, time},
    request::{FilterV1, SimpleRequest},
};

/// A simple capture, as the database has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SimpleRecord {
    /// Its id.
    pub id: u128,
    /// Whose it is.
    pub account: u128,
    /// Which packets, as asked.
    pub filter_v1: FilterV1,
    /// The end of the time that is asked for, UTC microseconds.
    pub offset_us: i64,
    /// Seconds before that.
    pub time_limit: u32,
    /// Packets.
    pub packet_limit: u32,
    /// UTC microseconds; no two captures of this host have the same.
    pub submitted_us: i64,
    /// Where it stands.
    pub status: Status,
    /// Why it failed.
    pub error_message: Option<String>,
    /// Packets in its file.
    pub packets: u64,
    /// Their captured lengths, bytes.
    pub captured_bytes: u64,
}

impl SimpleRecord {
    /// A capture that has yet to be looked for.
    pub fn new(account: u128, request: &SimpleRequest, submitted_us: i64) -> Self {
        Self {
            id: id::new(),
            account,
            filter_v1: request.filter_v1.clone(),
            offset_us: request.offset_us,
            time_limit: request.time_limit,
            packet_limit: request.packet_limit,
            submitted_us,
            status: Status::Pending,
            error_message: None,
            packets: 0,
            captured_bytes: 0,
        }
    }

    /// Whether nothing more will happen to it.
    pub fn is_final(&self) -> bool {
        matches!(self.status, Status::Success | Status::Failed)
    }

    /// As the API shows it.
    pub fn result(&self) -> PcapSimple {
        PcapSimple {
            id: id::show(self.id),
            filter_v1: self.filter_v1.clone(),
            offset_time: time(self.offset_us),
            status: self.status,
            submitted: time(self.submitted_us),
            system: System::MagicTransit,
            time_limit: self.time_limit,
            kind: SimpleKind::Simple,
        }
    }
}

/// The one value of `type` of a simple capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SimpleKind {
    /// Packets that passed.
    Simple,
}

/// A simple capture. It has these keys and no other: some clients tell by the keys which kind of
/// capture it is, so why one failed stands in the answer to its download.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct PcapSimple {
    /// The capture's id.
    #[schema(min_length = 32, max_length = 32, example = "66802ca5668e47a2b82c2e6746e45037")]
    pub id: String,
    /// Which packets; all if it is empty.
    pub filter_v1: FilterV1,
    /// The end of the time that was asked for.
    #[schema(format = DateTime)]
    pub offset_time: String,
    /// Where it stands.
    pub status: Status,
    /// When it was created.
    #[schema(format = DateTime)]
    pub submitted: String,
    /// Always `magic-transit`.
    pub system: System,
    /// Seconds before `offset_time`.
    #[schema(minimum = 1, maximum = 300)]
    pub time_limit: u32,
    /// Always `simple`.
    #[serde(rename = "type")]
    pub kind: SimpleKind,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_result_has_the_documented_keys_and_no_other() {
        let request = SimpleRequest {
            filter_v1: FilterV1 { destination_port: Some(80), ..FilterV1::default() },
            offset_us: 1_577_865_600_000_000,
            time_limit: 300,
            packet_limit: 10_000,
        };
        let mut record = SimpleRecord::new(7, &request, 1_654_195_102_269_047);
        record.id = 1;
        record.error_message = Some("x".into());
        assert_eq!(
            serde_json::to_value(record.result()).unwrap(),
            json!({
                "id": "00000000000000000000000000000001",
                "filter_v1": { "destination_port": 80 },
                "offset_time": "2020-01-01T08:00:00Z",
                "status": "pending",
                "submitted": "2022-06-02T18:38:22.269047Z",
                "system": "magic-transit",
                "time_limit": 300,
                "type": "simple",
            })
        );
        let bytes = serde_json::to_vec(&record).unwrap();
        assert_eq!(serde_json::from_slice::<SimpleRecord>(&bytes).unwrap(), record);
    }
}
