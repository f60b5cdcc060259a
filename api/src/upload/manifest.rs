//! `manifest.json`, the last file of a capture: what there is, and what there is not.
//!
//! It stands beside the files that it lists. Who has all of them, with these sizes and digests, has all
//! that was captured; whoever wants to know what was not finds it under `law`.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use super::Object;
use crate::{
    id,
    record::{Record, Status, time},
    request::FilterV1,
};

/// Its name.
pub(super) const NAME: &str = "manifest.json";

/// What it says.
#[derive(Serialize)]
struct Manifest<'a> {
    /// Which of these there are, if ever there is another.
    version: u32,
    pcap_id: String,
    destination_conf: &'a str,
    colo_name: &'a str,
    filter_v1: &'a FilterV1,
    submitted: String,
    /// Of the capturing.
    status: Status,
    error_message: Option<&'a str>,
    packets_captured: u64,
    objects: Vec<Entry<'a>>,
    /// Segments that were lost on this host before they could be sent.
    missing: &'a [String],
    /// Hits, written and each cause of drops; null if a crash cut the capture short.
    law: Option<&'a Value>,
}

#[derive(Serialize)]
struct Entry<'a> {
    /// Under the destination's directory.
    name: String,
    /// Of the object, as the digest is.
    size: u64,
    sha256: &'a str,
    /// Of the pcapng file: another one if the object is compressed.
    uncompressed_size: u64,
    packets: u64,
    captured_bytes: u64,
    /// Null without packets.
    first: Option<String>,
    last: Option<String>,
}

impl<'a> Entry<'a> {
    fn new(folder: &str, object: &'a Object) -> Self {
        let Object { segment, name, size, sha256 } = object;
        Self {
            name: format!("{folder}/{name}"),
            size: *size,
            sha256,
            uncompressed_size: segment.size,
            packets: segment.packets,
            captured_bytes: segment.captured_bytes,
            first: instant(segment.first_ns),
            last: instant(segment.last_ns),
        }
    }
}

/// The text.
pub(super) fn text(
    record: &Record,
    objects: &[Object],
    missing: &[String],
) -> serde_json::Result<String> {
    let folder = record.folder_name();
    let manifest = Manifest {
        version: 1,
        pcap_id: id::show(record.id),
        destination_conf: &record.destination_conf,
        colo_name: &record.colo_name,
        filter_v1: &record.filter_v1,
        submitted: time(record.submitted_us),
        status: record.outcome.unwrap_or(record.status),
        error_message: record.error_message.as_deref(),
        packets_captured: record.packets_captured,
        objects: objects.iter().map(|object| Entry::new(&folder, object)).collect(),
        missing,
        law: record.summary.as_ref().map(|summary| &summary["law"]),
    };
    serde_json::to_string_pretty(&manifest)
}

/// Nanoseconds since 1970 as RFC 3339; none for 0.
fn instant(nanoseconds: u64) -> Option<String> {
    let time = Timestamp::from_nanosecond(i128::from(nanoseconds)).ok()?;
    (nanoseconds > 0).then(|| time.to_string())
}

/// Writes it into a folder: hidden until it is whole, as segments are.
pub(super) fn write(folder: &Path, text: &str) -> io::Result<()> {
    let hidden = folder.join(format!(".{NAME}.part"));
    let mut file = File::create(&hidden)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&hidden, folder.join(NAME))?;
    File::open(folder)?.sync_all()
}
