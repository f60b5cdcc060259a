use std::{os::unix::fs::MetadataExt as _, process::Command, sync::Arc};

use super::*;
use crate::{
    buffer::Pool,
    segment::{
        InterfaceLabel, Rotation, SegmentInfo, Target, Writer,
        pcapng::{self, Packet},
        recover, survey,
    },
};

/// A writer of one file, and what it needs.
struct Bench {
    folder: tempfile::TempDir,
    pool: Arc<Pool>,
    writer: Writer,
    io: Io,
    /// Packets that were given to it.
    sent: u64,
    written: u64,
}

impl Bench {
    fn new(rotation: Rotation) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let target = Target::File(folder.path().join("x.pcapng"));
        let label = InterfaceLabel { name: "eth0".into(), ..InterfaceLabel::default() };
        let writer = Writer::create(target, "", rotation, true, "", vec![label]).unwrap();
        let pool = Pool::new(8, 1 << 18);
        let mut io = Io::default();
        io.prepare(1, vec![Arc::clone(&pool)]);
        Self { folder, pool, writer, io, sent: 0, written: 0 }
    }

    /// Writes a buffer with as many packets as take at most this many bytes.
    fn write(&mut self, bytes: usize) {
        let mut buffer = loop {
            match self.pool.take() {
                Some(buffer) => break buffer,
                None => self.io.wait(),
            }
            self.settle();
        };
        loop {
            let data = self.sent.to_le_bytes();
            let length = 8 * (1 + self.sent as usize % 90);
            if !buffer.is_empty() && buffer.len() + pcapng::packet_len(length) > bytes {
                break;
            }
            let data = data.repeat(length / 8);
            let one = Packet { timestamp_ns: 1 + self.sent, data: &data, ..Packet::default() };
            let block = pcapng::packet(buffer.free(), &one).unwrap();
            buffer.commit(block, length, one.timestamp_ns);
            self.sent += 1;
        }
        let run = Run {
            bytes: buffer.len(),
            packets: buffer.packets,
            captured_bytes: buffer.captured_bytes,
            ..Run::default()
        };
        self.writer.write(&mut self.io, buffer, &mut vec![run]).unwrap();
        self.settle();
    }

    fn settle(&mut self) {
        self.writer.settle(&mut self.io).unwrap();
        self.written += self.writer.outcomes().map(|outcome| outcome.packets).sum::<u64>();
    }

    /// The segments, each of which must be whole and go on where the one before ended.
    fn finish(mut self) -> (Vec<SegmentInfo>, Io) {
        self.writer.drain(&mut self.io).unwrap();
        self.settle();
        assert_eq!(self.written, self.sent);
        let (segments, result) = self.writer.finish(&mut self.io, &[]);
        result.unwrap();
        let mut next = 0;
        for segment in &segments {
            let metadata = fs::metadata(&segment.path).unwrap();
            assert_eq!(metadata.len(), segment.size);
            let preallocated = (metadata.blocks() * 512).saturating_sub(segment.size);
            assert!(preallocated < 100_000, "{segment:?}: {preallocated}");
            let sha256 = segment.sha256.clone();
            assert_eq!(SegmentInfo { sha256, ..survey(&segment.path).unwrap() }, *segment);
            if let Some(sha256) = &segment.sha256 {
                assert_eq!(*sha256, sha256sum(&segment.path));
            }
            next = packets_from(&fs::read(&segment.path).unwrap(), next);
        }
        assert_eq!(next, self.sent);
        assert!(self.pool.places().len() == 8 && (0..8).all(|_| self.pool.take().is_some()));
        (segments, self.io)
    }
}

/// What others' software says of a file.
fn sha256sum(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

/// Reads packets with another's software; the number of the next after the last.
fn packets_from(file: &[u8], mut next: u64) -> u64 {
    use pcap_file::pcapng::{Block, PcapNgParser};
    let (mut rest, mut parser) = PcapNgParser::new(file).unwrap();
    while !rest.is_empty() {
        let (after, block) = parser.next_block(rest).unwrap();
        if let Block::EnhancedPacket(packet) = block {
            assert_eq!(packet.data.first_chunk(), Some(&next.to_le_bytes()));
            next += 1;
        }
        rest = after;
    }
    next
}

/// Whether the folder for temporary files is on a file system that takes direct writes.
fn takes_direct(io: &Io) -> bool {
    if let Some(why) = &io.used.refused {
        eprintln!("skipped: {why}");
    }
    io.used.refused.is_none()
}

#[test]
fn large_buffers_go_past_the_cache_and_small_ones_through_it() {
    let mut bench = Bench::new(Rotation::default());
    let sizes = [200, 70_000, 250_000, 250_000, 1_000, 250_000, 65_536, 90_000, 60, 250_000];
    for round in 0..20 {
        bench.write(sizes[round % sizes.len()] + round);
    }
    let (segments, io) = bench.finish();
    assert_eq!(segments.len(), 1);
    if takes_direct(&io) {
        assert!(io.used.direct_bytes > 10 * 65_536, "{:?}", io.used);
        assert!(io.used.cached_bytes > 1_200, "{:?}", io.used);
    }
    let both = io.used.direct_bytes + io.used.cached_bytes;
    assert!(both < segments[0].size && both > segments[0].size - 2_000);
}

#[test]
fn small_buffers_need_no_ring_and_are_not_padded() {
    let mut bench = Bench::new(Rotation::default());
    for _ in 0..10 {
        bench.write(DIRECT_FROM - 1);
    }
    let before = bench.writer.room();
    let (segments, io) = bench.finish();
    assert_eq!((before, io.used.direct_bytes), (None, 0));
    let packets = (0..segments[0].packets).map(|at| 8 * (1 + at as usize % 90));
    let blocks: usize = packets.map(pcapng::packet_len).sum();
    assert_eq!(io.used.cached_bytes, blocks as u64);
}

#[test]
fn what_is_refused_goes_through_the_cache() {
    let mut bench = Bench::new(Rotation::default());
    bench.write(250_000);
    bench.write(250_000);
    bench.io.refuse("refused".into());
    bench.write(250_000);
    bench.write(70_000);
    let (_, io) = bench.finish();
    assert_eq!(io.used.refused.as_deref(), Some("refused"));
    assert!(io.used.cached_bytes > 250_000);
}

#[test]
fn segments_that_rotate_stay_within_their_size_and_keep_nothing_preallocated() {
    let mut bench = Bench::new(Rotation { bytes: Some(1_000_000), ..Rotation::default() });
    for _ in 0..40 {
        bench.write(240_000);
    }
    let (segments, _) = bench.finish();
    assert!(segments.len() >= 10);
    for segment in &segments {
        assert!(segment.size <= 1_000_000, "{segment:?}");
    }
}

#[test]
fn what_is_written_is_hashed_unless_buffers_run_short() {
    let mut bench = Bench::new(Rotation { bytes: Some(1_000_000), ..Rotation::default() });
    let sizes = [240_000, 300, 240_000, 90_000];
    for round in 0..24 {
        // Of the second dozen, some are written while nobody else could have a buffer.
        let held: Vec<_> =
            (0..if round == 14 { 7 } else { 0 }).map_while(|_| bench.pool.take()).collect();
        bench.write(sizes[round % sizes.len()]);
        bench.writer.drain(&mut bench.io).unwrap();
        bench.settle();
        held.into_iter().for_each(Buffer::recycle);
    }
    let (segments, _) = bench.finish();
    let unknown = segments.iter().filter(|segment| segment.sha256.is_none()).count();
    assert!(segments.len() > 2 && unknown == 1, "{segments:?}");
}

#[test]
fn a_crash_leaves_zeros_that_are_cut_off() {
    let mut bench = Bench::new(Rotation::default());
    for _ in 0..12 {
        bench.write(250_000);
    }
    let hidden = bench.folder.path().join(".x.pcapng.part");
    let (sent, direct) = (bench.sent, takes_direct(&bench.io));
    bench.writer.drain(&mut bench.io).unwrap();
    drop(bench.writer);
    drop(bench.io);
    let length = fs::metadata(&hidden).unwrap().len();
    assert!(!direct || length > ALLOCATE, "{length}");
    let info = recover(&hidden).unwrap().unwrap();
    assert_eq!(info.packets, sent);
    assert_eq!(fs::metadata(&info.path).unwrap().len(), info.size);
    assert_eq!(packets_from(&fs::read(&info.path).unwrap(), 0), sent);
}
