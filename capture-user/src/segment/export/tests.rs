use std::fs;

use super::*;
use crate::segment::pcapng::{
    self, InterfaceInfo, InterfaceStatistics, LINKTYPE_ETHERNET, LINKTYPE_RAW, SectionInfo,
};

/// A segment with packets of these times on each interface, and statistics.
fn segment(folder: &Path, name: &str, links: &[u16], packets: &[(u32, u64)]) -> (PathBuf, Holds) {
    let mut bytes = Vec::new();
    pcapng::section_header(&mut bytes, &SectionInfo { comment: name, ..SectionInfo::default() });
    for linktype in links {
        let info = InterfaceInfo {
            name: "eth0",
            linktype: *linktype,
            snaplen: 160,
            ..InterfaceInfo::default()
        };
        pcapng::interface_description(&mut bytes, &info);
    }
    let mut holds = Holds::default();
    for (interface, timestamp_ns) in packets {
        let data = vec![*timestamp_ns as u8; 20 + (*timestamp_ns % 90) as usize];
        let one = pcapng::Packet {
            interface: *interface,
            timestamp_ns: *timestamp_ns,
            original_len: 1500,
            data: &data,
            ..pcapng::Packet::default()
        };
        let start = bytes.len();
        bytes.resize(start + pcapng::packet_len(data.len()), 0);
        pcapng::packet(&mut bytes[start..], &one).unwrap();
        holds.packets += 1;
        holds.captured_bytes += data.len() as u64;
    }
    for interface in 0..links.len() {
        let statistics = InterfaceStatistics {
            interface: interface as u32,
            delivered: Some(holds.packets),
            ..InterfaceStatistics::default()
        };
        pcapng::interface_statistics(&mut bytes, &statistics);
    }
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    (path, holds)
}

/// Two segments whose times overlap, and what they hold together.
fn two(folder: &Path, links: [u16; 2], count: u64) -> (Vec<PathBuf>, Holds) {
    let times = |odd: u64| (0..count).map(|at| (0, 2 * at + odd)).collect::<Vec<_>>();
    let (one, first) = segment(folder, "a.pcapng", &[links[0]], &times(0));
    let (other, second) = segment(folder, "b.pcapng", &[links[1]], &times(1));
    let holds = Holds {
        packets: first.packets + second.packets,
        captured_bytes: first.captured_bytes + second.captured_bytes,
    };
    (vec![one, other], holds)
}

fn all(export: Export, bytes: Range<u64>) -> Result<Vec<u8>, ExportError> {
    let mut part = export.part(bytes);
    let mut all = Vec::new();
    while let Some(chunk) = part.chunk()? {
        assert!(!chunk.is_empty() && chunk.len() < CHUNK + 65536);
        all.extend(chunk);
    }
    Ok(all)
}

#[test]
fn a_file_is_as_long_as_was_said_and_its_parts_are_its_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, holds) = two(folder.path(), [LINKTYPE_ETHERNET; 2], 5_000);
    for format in [Format::Pcap, Format::Pcapng] {
        let open = || Export::open(&paths, holds, format, "both").unwrap();
        let length = open().len();
        let whole = all(open(), 0..u64::MAX).unwrap();
        assert_eq!(whole.len() as u64, length);
        for (start, end) in [
            (0, 1),
            (0, 24),
            (23, 25),
            (100_000, 100_001),
            (CHUNK as u64 - 1, CHUNK as u64 + 1),
            (12_345, 400_000),
            (length - 1, length),
            (1, length + 100),
        ] {
            let part = all(open(), start..end).unwrap();
            assert_eq!(part, whole[start as usize..end.min(length) as usize], "{format:?} {start}");
        }
        assert!(all(open(), length..length + 1).unwrap().is_empty());
    }
}

#[test]
fn several_segments_are_one_pcapng_with_the_statistics_of_each() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, holds) = two(folder.path(), [LINKTYPE_ETHERNET, LINKTYPE_RAW], 300);
    let export = Export::open(&paths, holds, Format::Pcapng, "both").unwrap();
    let path = folder.path().join("merged.pcapng");
    fs::write(&path, all(export, 0..u64::MAX).unwrap()).unwrap();
    let mut merged = Merged::open(&[path]).unwrap();
    let mut times = Vec::new();
    while let Some(packet) = merged.packet().unwrap() {
        assert_eq!(u64::from(packet.interface), packet.timestamp_ns % 2);
        times.push(packet.timestamp_ns);
    }
    assert_eq!(times, (0..600).collect::<Vec<_>>());
    assert_eq!(merged.damage(), read::Damage::default());
    let statistics = merged.statistics();
    let first = pcapng::first_block(statistics).unwrap().len();
    assert_eq!((statistics[8], statistics[first + 8]), (0, 1), "each of its own interface");
}

#[test]
fn one_segment_is_given_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let times: Vec<_> = (0..100).map(|time| (0, time)).collect();
    let (path, holds) = segment(folder.path(), "a.pcapng", &[LINKTYPE_ETHERNET], &times);
    let paths = [path.clone()];
    let export = Export::open(&paths, holds, Format::Pcapng, "").unwrap();
    assert_eq!(all(export, 0..u64::MAX).unwrap(), fs::read(&path).unwrap());
}

#[test]
fn a_pcap_file_has_the_one_link_type_that_packets_have() {
    let folder = tempfile::tempdir().unwrap();
    let links = [LINKTYPE_ETHERNET, LINKTYPE_RAW];
    let (path, holds) = segment(folder.path(), "raw.pcapng", &links, &[(1, 7), (1, 8)]);
    let export = Export::open(&[path], holds, Format::Pcap, "").unwrap();
    let bytes = all(export, 0..u64::MAX).unwrap();
    assert_eq!(bytes[..4], [0x4d, 0x3c, 0xb2, 0xa1]);
    assert_eq!((bytes[16], bytes[20]), (160, 101));
    let record = |at: usize| u32::from_le_bytes(*bytes[24 + at..].first_chunk().unwrap());
    assert_eq!((record(0), record(4), record(8), record(12)), (0, 7, 27, 1500));
    let (path, holds) = segment(folder.path(), "both.pcapng", &links, &[(0, 7), (1, 8)]);
    let error = Export::open(&[path], holds, Format::Pcap, "").unwrap_err();
    assert!(error.to_string().contains("2 link types"), "{error}");
    let (path, holds) = segment(folder.path(), "none.pcapng", &links, &[]);
    let export = Export::open(&[path], holds, Format::Pcap, "").unwrap();
    assert_eq!(export.len(), 24);
}

#[test]
fn what_does_not_hold_what_was_counted_is_never_given_as_whole() {
    let folder = tempfile::tempdir().unwrap();
    let (paths, holds) = two(folder.path(), [LINKTYPE_ETHERNET; 2], 100);
    for (packets, more) in [(holds.packets + 1, false), (holds.packets - 1, true)] {
        let holds = Holds { packets, ..holds };
        let export = Export::open(&paths, holds, Format::Pcap, "").unwrap();
        let error = all(export, 0..u64::MAX).unwrap_err();
        assert!(matches!(error, ExportError::Length { more: told } if told == more), "{error}");
    }
    // A block that is damaged in the middle.
    let mut bytes = fs::read(&paths[0]).unwrap();
    let at = (bytes.len() / 2) & !3;
    bytes[at..at + 64].fill(0xff);
    fs::write(&paths[0], bytes).unwrap();
    for format in [Format::Pcap, Format::Pcapng] {
        let export = Export::open(&paths, holds, format, "").unwrap();
        let error = all(export, 0..u64::MAX).unwrap_err();
        assert!(matches!(error, ExportError::Length { more: false }), "{error}");
    }
}
