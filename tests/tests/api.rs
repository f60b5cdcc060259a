//! `taplined`, from outside: what its clients see, and what is on the disk.

mod buckets;
mod clients;
mod crash;
mod credentials;
mod delivered;
mod delivery;
mod delivery_faults;
mod download;
mod google;
mod hostile;
mod jobs;
mod latency;
mod ownership;
mod reach;
mod secrecy;
mod service;
mod simple;
mod tls;

use std::path::Path;

use tapline_tests::{pcapng, process::tool};

/// Leaves all 64 places to captures.
const NO_RECORDER: &str = "[recorder]\nenabled = false";

/// Packets in files, as another's reader has them.
fn packets(files: &[impl AsRef<Path>]) -> u64 {
    files.iter().map(|file| pcapng::read(file.as_ref()).packets.len() as u64).sum()
}

/// Packets in a file, as tshark counts them.
fn tshark_count(file: &Path, filter: &str) -> u64 {
    let file = file.to_str().unwrap();
    let fields = ["-T", "fields", "-e", "frame.number"];
    let output = tool(&[&["tshark", "-r", file, "-Y", filter], &fields[..]].concat());
    output.lines().count() as u64
}
