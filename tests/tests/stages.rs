//! The stages of the path measured one by one, and how late packets are.

use std::{fs, path::Path, time::Duration};

use serde_json::Value;
use tapline_tests::{
    capture::{Capture, Summary, command, exclusive, number},
    disk::names,
    generator::{Generator, Template},
    netns::Namespace,
    pcapng::accepted,
    privileged,
    process::tapline,
    tap::tap,
    veth::Veth,
};
use tempfile::tempdir;

const SECOND: Duration = Duration::from_secs(1);

/// Percentiles that were recorded must grow; gives the shortest and the longest, nanoseconds.
fn range(percentiles: &Value) -> (u64, u64) {
    assert!(number(&percentiles["samples"]) > 0, "{percentiles}");
    let keys = ["min_ns", "p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns"];
    let times = keys.map(|key| number(&percentiles[key]));
    assert!(times.is_sorted(), "{percentiles}");
    (times[0], times[5])
}

#[test]
fn without_writing_every_packet_is_encoded_and_thrown_away_and_the_law_adds_up() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    for mode in ["exclusive", "tap"] {
        let veth = Veth::new(&left, &right);
        let args = ["-i", &veth.right.name, "--mode", mode, "--no-write", "--json"];
        let capture = Capture::start(command(&right, &args));
        let generator = Generator::new(&veth.left, Template::default()).pinned(0);
        let arrived = veth.settle(generator.send_paced(20_000, SECOND / 2));
        let summary = capture.stop().success();
        assert_eq!(summary.hits(), arrived, "{mode}: {summary:?}");
        assert!(summary.written() > 0 && summary.segments().is_empty(), "{mode}: {summary:?}");
        let disk = &summary.0["disk"];
        assert!(number(&disk["discarded_bytes"]) > summary.written_bytes(), "{mode}: {disk}");
        assert_eq!(number(&disk["cached_bytes"]) + number(&disk["direct_bytes"]), 0, "{mode}");
    }
}

#[test]
fn without_capturing_the_disk_gets_packets_of_the_length_asked_for() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("made-up.pcapng");
    let write = file.to_str().unwrap();
    let output = tapline(&["capture", "--no-capture", "-w", write, "-s", "200", "-c", "30000"])
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("30000 packets made up in "), "{stderr}");
    assert!(stderr.contains("= 30000 written, 6000000 bytes"), "{stderr}");
    let rate = stderr.lines().find(|line| line.contains("the page cache")).unwrap();
    assert!(rate.contains("B/s, "), "{stderr}");
    let packets = accepted(&file).packets;
    assert_eq!(packets.len(), 30_000);
    assert!(packets.iter().all(|packet| packet.data.len() == 200 && packet.original_len == 200));

    let json = tapline(&["capture", "--no-capture", "--no-write", "--json"]).output().unwrap();
    assert_eq!(json.status.code(), Some(2), "both leave nothing to measure");
    let args = ["--no-capture", "--json", "--duration", "200ms", "--rotate-bytes", "1M"];
    let output = tapline(&[&["capture", "-w", write], &args as &[_]].concat()).output().unwrap();
    let summary = Summary(serde_json::from_slice(&output.stdout).unwrap());
    assert_eq!(summary.ending(), "duration");
    assert_eq!(summary.hits(), summary.written() + summary.dropped());
    assert_eq!(names(folder.path()).len(), 1 + summary.segments().len());
    for segment in summary.segments() {
        let path = Path::new(segment["path"].as_str().unwrap());
        assert_eq!(accepted(path).packets.len() as u64, number(&segment["packets"]));
        assert!(fs::metadata(path).unwrap().len() <= 1 << 20);
    }
}

#[test]
fn latency_is_told_for_encoding_and_for_writing() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let folder = tempdir().unwrap();
    for name in ["exclusive", "tap"] {
        let veth = Veth::new(&left, &right);
        let file = folder.path().join(format!("{name}.pcapng"));
        let make = if name == "tap" { tap } else { exclusive };
        let capture = Capture::start(make(&veth.right, &file, &[]));
        let begun = std::time::Instant::now();
        let generator = Generator::new(&veth.left, Template::default()).pinned(0);
        let arrived = veth.settle(generator.send_paced(1_000, SECOND / 2));
        let summary = capture.stop().success();
        let most = begun.elapsed().as_nanos() as u64;
        assert_eq!(summary.written(), arrived);
        let latency = &summary.0["latency"];
        let (encoded, written) = (range(&latency["encoded"]), range(&latency["written"]));
        assert!(encoded.1 < most && written.1 < most, "{name}: {most} {latency}");
        // A packet is written after it is encoded; what trickles in waits in its buffer meanwhile.
        assert!(encoded.1 < written.1, "{name}: {latency}");
        assert!(written.1 > 50_000_000, "{name}: {latency}");
    }
}
