//! The folder of a recorder, without an engine: what is found in it, whatever happened to it.

use std::{
    cell::Cell,
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use super::{
    Answer, Query, Store,
    index::{self, Index},
    keeper::{Bounds, Keeper, World},
    store::Name,
};
use crate::{
    filter::Filter,
    segment::{
        SegmentInfo,
        pcapng::{self, InterfaceInfo, SectionInfo, packet_len},
        read::Reader,
        survey,
    },
};

const SECOND: u64 = 1_000_000_000;

/// A packet of the trace: its time and its number, by which it is known.
type One = (u64, u32);

/// A frame from 10.0.x.y port 1000 + x to 192.0.2.1 port 53, with its number in it; every third is TCP.
fn frame(number: u32) -> Vec<u8> {
    let mut frame = vec![0; 60];
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    frame[14] = 0x45;
    frame[23] = if number.is_multiple_of(3) { 6 } else { 17 };
    let [.., x, y] = number.to_be_bytes();
    frame[26..30].copy_from_slice(&[10, 0, x % 8, y]);
    frame[30..34].copy_from_slice(&[192, 0, 2, 1]);
    frame[34..36].copy_from_slice(&(1000 + u16::from(x % 8)).to_be_bytes());
    frame[36..38].copy_from_slice(&53_u16.to_be_bytes());
    frame[42..46].copy_from_slice(&number.to_be_bytes());
    frame
}

/// The bytes of a segment.
fn bytes(packets: &[One]) -> Vec<u8> {
    let mut out = Vec::new();
    pcapng::section_header(&mut out, &SectionInfo::default());
    let comment = "sampled 1 in 100";
    let label = InterfaceInfo { name: "eth0", comment, ..InterfaceInfo::default() };
    pcapng::interface_description(&mut out, &label);
    for (timestamp_ns, number) in packets {
        let data = frame(*number);
        let one = pcapng::Packet {
            timestamp_ns: *timestamp_ns,
            original_len: 1500,
            data: &data,
            ..pcapng::Packet::default()
        };
        let start = out.len();
        out.resize(start + packet_len(data.len()), 0);
        pcapng::packet(&mut out[start..], &one).unwrap();
    }
    out
}

fn name(sequence: u32) -> Name {
    Name { run: 1, sequence }
}

/// Writes a sealed segment, as the engine's disk thread does, and says of it what that says.
fn seal(folder: &Path, sequence: u32, packets: &[One]) -> SegmentInfo {
    let path = name(sequence).segment(folder);
    fs::write(&path, bytes(packets)).unwrap();
    survey(&path).unwrap()
}

/// Writes its index, too.
fn indexed(folder: &Path, sequence: u32, packets: &[One]) {
    let info = seal(folder, sequence, packets);
    let index = Index::build(&mut Reader::open(&info.path).unwrap(), false).unwrap();
    index::write(&name(sequence).index(folder), &index.to_bytes()).unwrap();
}

fn all() -> Query {
    Query { from_ns: 0, to_ns: u64::MAX, filter: Filter::default(), limit: None }
}

/// Asks; gives the packets, which are in the order of time, and the answer.
#[expect(clippy::cast_precision_loss, reason = "a few thousand")]
fn ask(folder: &Path, query: &Query) -> (Vec<One>, Answer) {
    let target = folder.join("answer.tmp");
    let answer = Store::open(folder).unwrap().query(query, &target).unwrap();
    assert_eq!(fs::metadata(&target).unwrap().len(), answer.size);
    let mut reader = Reader::open(&target).unwrap();
    assert_eq!(reader.interfaces().len(), 1, "what was recorded");
    let mut found = Vec::new();
    while let Some(packet) = reader.packet().unwrap() {
        assert_eq!(packet.original_len, 1500);
        let number = u32::from_be_bytes(*packet.data[42..].first_chunk().unwrap());
        assert_eq!(packet.data, frame(number));
        found.push((packet.timestamp_ns, number));
    }
    fs::remove_file(&target).unwrap();
    assert!(found.is_sorted_by_key(|(time, _)| *time));
    assert_eq!(found.len() as u64, answer.packets);
    assert!((answer.estimated / 100.0 - found.len() as f64).abs() < 0.5);
    (found, answer)
}

/// So many packets, a millisecond apart.
fn trace(first: u32, count: u32) -> Vec<One> {
    (first..first + count).map(|number| (SECOND + u64::from(number) * 1_000_000, number)).collect()
}

#[test]
fn a_query_reads_only_what_can_match() {
    let folder = tempfile::tempdir().unwrap();
    for sequence in 1..=4 {
        indexed(folder.path(), sequence, &trace(sequence * 10_000, 10_000));
    }
    let (found, answer) = ask(folder.path(), &all());
    assert_eq!(found.len(), 40_000);
    assert_eq!(answer.blocks.skipped, 0);
    let blocks = answer.blocks.read;
    assert!(blocks > 30, "{answer:?}");

    // One address, in one run of 256 packets.
    let src = "10.0.7.9".parse().unwrap();
    let filter = Filter { src: Some(src), ..Filter::default() };
    let (found, answer) = ask(folder.path(), &Query { filter, ..all() });
    let want = trace(10_000, 40_000).into_iter().filter(|(_, number)| number & 0x7ff == 0x709);
    assert_eq!(found, want.collect::<Vec<_>>());
    assert!(answer.blocks.read <= 2 * found.len() as u64, "{answer:?}");
    assert_eq!(answer.blocks.read + answer.blocks.skipped, blocks);

    // A window within one segment: the others' blocks are not even looked at.
    let (from_ns, to_ns) = (SECOND + 25_000 * 1_000_000, SECOND + 25_099 * 1_000_000);
    let (found, answer) = ask(folder.path(), &Query { from_ns, to_ns, ..all() });
    assert_eq!(found, trace(25_000, 100));
    assert!(answer.blocks.read <= 2 && answer.blocks.skipped < blocks / 3, "{answer:?}");

    // The newest few.
    let (found, answer) = ask(folder.path(), &Query { limit: Some(7), ..all() });
    assert_eq!(found, trace(49_993, 7));
    assert!(answer.blocks.read <= 2, "{answer:?}");
    let (found, _) = ask(folder.path(), &Query { limit: Some(7), filter, ..all() });
    assert_eq!(found.len(), 7);
    assert!(found[0].1 > 30_000);

    // Nothing.
    let dport = Filter { dport: Some(54), ..Filter::default() };
    for query in [
        Query { filter: dport, ..all() },
        Query { filter: dport, limit: Some(5), ..all() },
        Query { to_ns: 5, ..all() },
    ] {
        let (found, answer) = ask(folder.path(), &query);
        assert!(found.is_empty() && answer.blocks.read == 0, "{answer:?}");
    }
}

#[test]
fn a_torn_tail_costs_nothing_in_front_of_it() {
    let folder = tempfile::tempdir().unwrap();
    indexed(folder.path(), 1, &trace(0, 3000));
    let whole = bytes(&trace(3000, 3000));
    let hidden = name(2).hidden(folder.path());
    for (torn, room) in [(0, 0), (1, 0), (50, 1 << 20), (2000, 4096), (100_000, 0)] {
        // What the open segment ends with: half a packet, or room that is preallocated.
        let mut left = whole[..whole.len() - torn].to_vec();
        left.resize(left.len() + room, 0);
        fs::write(&hidden, left).unwrap();
        let (found, answer) = ask(folder.path(), &all());
        let lost = torn.div_ceil(packet_len(60));
        assert_eq!(found, trace(0, 6000 - lost as u32), "{torn}");
        assert_eq!(answer.blocks.corrupt, 0);
    }
    // A hole is where another write is still on its way; what lies behind it comes later.
    let mut left = whole.clone();
    left[100_000..150_000].fill(0);
    fs::write(&hidden, left).unwrap();
    let (found, _) = ask(folder.path(), &all());
    assert!(found.len() > 3800 && found.len() < 4000, "{}", found.len());
    assert_eq!(found, trace(0, found.len() as u32));
}

#[test]
fn flipped_bytes_cost_their_block_and_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    indexed(folder.path(), 1, &trace(0, 6000));
    let (_, answer) = ask(folder.path(), &all());
    let (blocks, path) = (answer.blocks.read, name(1).segment(folder.path()));
    let clean = fs::read(&path).unwrap();
    let per_block = (128 << 10) / packet_len(60);
    for at in [400, 140_000, 300_000, clean.len() - 1] {
        let mut damaged = clean.clone();
        damaged[at] ^= 0x10;
        fs::write(&path, damaged).unwrap();
        for limit in [None, Some(100_000)] {
            let (found, answer) = ask(folder.path(), &Query { limit, ..all() });
            assert_eq!((answer.blocks.corrupt, answer.blocks.read), (1, blocks - 1), "{at}");
            assert!(found.len() >= 6000 - per_block, "{at}: {}", found.len());
        }
    }
}

#[test]
fn a_missing_or_damaged_index_is_made_again_from_the_segment() {
    let folder = tempfile::tempdir().unwrap();
    let packets = trace(0, 3000);
    indexed(folder.path(), 1, &packets);
    let path = name(1).index(folder.path());
    let clean = fs::read(&path).unwrap();
    let (_, before) = ask(folder.path(), &all());
    let mut cases = vec![Vec::new(), clean[..63].to_vec(), clean[..clean.len() - 1].to_vec()];
    for at in (0..clean.len()).step_by(331) {
        let mut damaged = clean.clone();
        damaged[at] ^= 0x04;
        cases.push(damaged);
    }
    for case in cases {
        fs::write(&path, case).unwrap();
        assert!(
            Index::load(&path, fs::metadata(name(1).segment(folder.path())).unwrap().len())
                .is_none()
        );
        assert_eq!(ask(folder.path(), &all()), (packets.clone(), before));
    }
    // Of another segment.
    fs::write(&path, &clean).unwrap();
    let more = trace(0, 3001);
    seal(folder.path(), 1, &more);
    assert_eq!(ask(folder.path(), &all()).0, more);
    // Whoever records writes it again; who asks does not.
    fs::remove_file(&path).unwrap();
    assert_eq!(ask(folder.path(), &all()).0, more);
    assert!(!path.exists());
    let world = Planet::default();
    let mut keeper = Keeper::open(folder.path(), bounds(64 << 20), world.world()).unwrap();
    assert!(keeper.index_one() && !keeper.index_one());
    assert!(path.exists());
    assert_eq!(ask(folder.path(), &all()).0, more);
}

#[test]
fn a_segment_that_is_damaged_when_it_is_indexed_loses_only_what_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let packets = trace(0, 3000);
    let info = seal(folder.path(), 1, &packets);
    let mut damaged = fs::read(&info.path).unwrap();
    damaged[100_000..101_000].fill(0xa5);
    fs::write(&info.path, damaged).unwrap();
    let (found, answer) = ask(folder.path(), &all());
    assert_eq!(answer.blocks.corrupt, 1);
    let lost: BTreeSet<_> = packets.iter().filter(|one| !found.contains(one)).collect();
    assert!(lost.len() <= 1000 / packet_len(60) + 2, "{lost:?}");
}

#[test]
fn when_the_clock_steps_back_a_query_goes_by_time_and_room_by_order() {
    let folder = tempfile::tempdir().unwrap();
    let world = Planet::default();
    let hour = 3600 * SECOND;
    let at = |start: u64, first: u32| -> Vec<One> {
        (0..1000).map(|n| (start + u64::from(n) * 1_000_000, first + n)).collect()
    };
    // From 10:00 on; then the clock is set back by half a second in the middle of a segment, and then by
    // an hour between two.
    let mut second = at(10 * hour + SECOND, 1000);
    for (time, _) in &mut second[500..] {
        *time -= SECOND / 2;
    }
    let third = at(9 * hour, 2000);
    let mut keeper = Keeper::open(folder.path(), bounds(64 << 20), world.world()).unwrap();
    world.set(10 * hour);
    for (sequence, packets) in [(1, at(10 * hour, 0)), (2, second.clone()), (3, third.clone())] {
        let info = seal(folder.path(), sequence, &packets);
        keeper.budget().add(info.size);
        keeper.sealed(&info);
    }
    world.set(9 * hour);
    keeper.tidy();
    let (found, _) = ask(folder.path(), &all());
    assert_eq!(found.len(), 3000, "all is there");
    assert_eq!(found[..1000], third, "in the order of time");
    let window = Query { from_ns: 10 * hour + SECOND, to_ns: 11 * hour, ..all() };
    let (found, _) = ask(folder.path(), &window);
    let want: BTreeSet<_> = second.iter().copied().collect();
    assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), want);
    // The newest are those with the latest time, not those that were recorded last.
    let (found, _) = ask(folder.path(), &Query { limit: Some(1), ..all() });
    assert_eq!(found[0].0, second.iter().map(|(time, _)| *time).max().unwrap());
    // A day after by the clock, what has the earlier time goes, though it was recorded last.
    world.set(33 * hour + 2 * SECOND);
    keeper.tidy();
    let (found, _) = ask(folder.path(), &all());
    assert!(found.len() == 2000 && found[0].0 == 10 * hour, "{}", found.len());
    assert_eq!(keeper.removed.age, 1);
}

/// A clock and a disk.
#[derive(Clone, Default)]
struct Planet {
    now_ns: Arc<AtomicU64>,
    /// Bytes that others take of the disk's 100 MiB.
    others: Arc<AtomicU64>,
}

impl Planet {
    fn set(&self, now_ns: u64) {
        self.now_ns.store(now_ns, Relaxed);
    }

    fn world(&self) -> World {
        let (clock, others) = (Arc::clone(&self.now_ns), Arc::clone(&self.others));
        World {
            now_ns: Box::new(move || clock.load(Relaxed)),
            free: Box::new(move |folder| {
                Ok((100_u64 << 20).saturating_sub(others.load(Relaxed) + usage(folder)))
            }),
        }
    }
}

fn bounds(bytes: u64) -> Bounds {
    Bounds { bytes, reserve: 10 << 20, keep: Duration::from_hours(24), segment_bytes: bytes / 64 }
}

/// What a folder's files take on the disk.
fn usage(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).unwrap().flatten();
    files.map(|file| file.metadata().unwrap().len().next_multiple_of(4096)).sum()
}

fn sequences(folder: &Path) -> Vec<u32> {
    let listing = super::store::list(folder).unwrap();
    assert!(listing.indices.iter().all(|name| listing.segments.contains_key(name)));
    listing.segments.keys().map(|name| name.sequence).collect()
}

#[test]
fn a_recording_never_exceeds_its_budget_and_the_oldest_goes_first() {
    let folder = tempfile::tempdir().unwrap();
    let answers = tempfile::tempdir().unwrap();
    let world = Planet::default();
    let budget = 32 << 20;
    let mut keeper = Keeper::open(folder.path(), bounds(budget), world.world()).unwrap();
    let store = Store::open(folder.path()).unwrap();
    let mut expired = 0;
    for sequence in 1..=120 {
        // Half a MiB, which the job takes from the budget before it writes.
        let packets = trace(sequence * 4600, 4600);
        world.set(packets[0].0);
        let size = bytes(&packets).len() as u64;
        assert!(keeper.budget().take(size), "there is always room for the next segment");
        let info = seal(folder.path(), sequence, &packets);
        // A question that was asked before the keeper removes what is in its way.
        if sequence % 10 == 0 {
            let mut work = store.prepare(&all()).unwrap();
            let seen = sequences(folder.path());
            keeper.sealed(&info);
            let mut out = Vec::new();
            let answer = work.answer(&mut out).unwrap();
            expired += seen.len() - sequences(folder.path()).len();
            assert_eq!(answer.packets, seen.len() as u64 * 4600, "{answer:?}");
        } else {
            keeper.sealed(&info);
        }
        let left = sequences(folder.path());
        assert!(usage(folder.path()) <= budget, "{} bytes", usage(folder.path()));
        let first = sequence + 1 - left.len() as u32;
        assert!(left.iter().copied().eq(first..=sequence), "the oldest go first: {left:?}");
        let held = keeper.budget().used();
        assert_eq!(held, usage(folder.path()), "what is taken of the budget is on the disk");
    }
    assert!(expired > 5 && keeper.removed.budget > 50, "{:?}", keeper.removed);
    assert!(usage(folder.path()) > budget / 10 * 8, "the budget is used");

    // A reader that is not quick enough misses what has expired, and says so.
    let target = answers.path().join("late.pcapng");
    let mut work = store.prepare(&all()).unwrap();
    for segment in &mut work.segments {
        segment.file = None;
    }
    let before = sequences(folder.path()).len() as u64;
    world.set(world.now_ns.load(Relaxed) + 24 * 3600 * SECOND - 5 * SECOND);
    keeper.tidy();
    let left = sequences(folder.path()).len() as u64;
    assert!(left > 0 && left < before, "{left} of {before}");
    let mut out = Vec::new();
    let answer = work.answer(&mut out).unwrap();
    assert_eq!(answer.packets, left * 4600);
    assert!(answer.blocks.expired >= before - left);
    fs::write(&target, out).unwrap();
    assert_eq!(survey(&target).unwrap().packets, answer.packets);

    // All is gone a day later.
    world.set(world.now_ns.load(Relaxed) + 25 * 3600 * SECOND);
    keeper.tidy();
    assert_eq!((usage(folder.path()), keeper.budget().used()), (0, 0));
}

#[test]
fn a_full_disk_is_left_its_reserve() {
    let folder = tempfile::tempdir().unwrap();
    let world = Planet::default();
    let mut keeper = Keeper::open(folder.path(), bounds(64 << 20), world.world()).unwrap();
    let next = Cell::new(0);
    let record = |keeper: &mut Keeper| {
        next.set(next.get() + 1);
        let packets = trace(next.get() * 4600, 4600);
        if !keeper.budget().take(bytes(&packets).len() as u64) {
            return false;
        }
        keeper.sealed(&seal(folder.path(), next.get(), &packets));
        true
    };
    while usage(folder.path()) < 40 << 20 {
        assert!(record(&mut keeper));
    }
    // Others take nearly all of the rest: 9 MiB and a bit have to go.
    world.others.store(59 << 20, Relaxed);
    keeper.tidy();
    let left = usage(folder.path());
    assert!(left <= 31 << 20 && left > 30 << 20, "{left} bytes");
    assert!(keeper.removed.reserve > 0 && keeper.removed.budget == 0);
    assert!(record(&mut keeper));
    keeper.tidy();
    assert!(usage(folder.path()) <= 31 << 20);
    // Others take everything: nothing is left, and nothing is written.
    world.others.store(95 << 20, Relaxed);
    for _ in 0..4 {
        // What gets free is taken at once.
        keeper.tidy();
    }
    assert_eq!((usage(folder.path()), keeper.bytes()), (0, 0));
    assert!(!record(&mut keeper));
    // And give it back.
    world.others.store(0, Relaxed);
    keeper.tidy();
    assert!(record(&mut keeper));
    assert_eq!(keeper.budget().used(), usage(folder.path()));
}

#[test]
fn a_folder_is_taken_over_as_it_was_left() {
    let folder = tempfile::tempdir().unwrap();
    let world = Planet::default();
    indexed(folder.path(), 1, &trace(0, 1000));
    seal(folder.path(), 2, &trace(1000, 1000));
    let torn = bytes(&trace(2000, 1000));
    fs::write(name(3).hidden(folder.path()), &torn[..torn.len() - 1]).unwrap();
    fs::write(name(4).hidden(folder.path()), bytes(&[])).unwrap();
    fs::write(name(9).index(folder.path()), "of a segment that is gone").unwrap();
    let keeper = Keeper::open(folder.path(), bounds(64 << 20), world.world()).unwrap();
    assert_eq!(sequences(folder.path()), [1, 2, 3]);
    assert_eq!(keeper.budget().used(), usage(folder.path()));
    assert_eq!(keeper.next_run(), 2);
    assert_eq!(ask(folder.path(), &all()).0, trace(0, 2999));
    // With a smaller budget, the oldest go at once.
    drop(keeper);
    for sequence in 4..100 {
        seal(folder.path(), sequence, &trace(sequence * 4600, 4600));
    }
    let keeper = Keeper::open(folder.path(), bounds(32 << 20), world.world()).unwrap();
    assert!(usage(folder.path()) <= 32 << 20);
    assert_eq!(sequences(folder.path()).last(), Some(&99));
    assert_eq!(keeper.budget().used(), usage(folder.path()));
}

#[test]
fn addresses_are_found_by_prefix_in_both_families() {
    let v4 = Ipv4Addr::new(10, 0, 3, 7);
    let folder = tempfile::tempdir().unwrap();
    indexed(folder.path(), 1, &trace(0, 4096));
    for length in [8, 16, 22, 24, 31, 32] {
        let src = format!("{v4}/{length}").parse().unwrap();
        let filter = Filter { src: Some(src), ..Filter::default() };
        let (found, _) = ask(folder.path(), &Query { filter, ..all() });
        let want = trace(0, 4096).into_iter().filter(|(_, number)| {
            let address = u32::from(Ipv4Addr::new(10, 0, (number >> 8) as u8 % 8, *number as u8));
            (address ^ u32::from(v4)) >> (32 - length) == 0
        });
        assert_eq!(found, want.collect::<Vec<_>>(), "/{length}");
    }
    for none in ["10.0.8.0/24", "11.0.0.0/8", "2001:db8::/32"] {
        let filter = Filter { src: Some(none.parse().unwrap()), ..Filter::default() };
        let (found, answer) = ask(folder.path(), &Query { filter, ..all() });
        assert!(found.is_empty() && answer.blocks.read == 0, "{none}");
    }
}
