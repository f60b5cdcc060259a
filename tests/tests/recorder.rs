//! The recorder on a live interface, and what is found in it afterwards.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr},
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::Output,
    sync::Arc,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use capture_user::{
    engine::{CapturePath, Engine, EngineConfig, InterfaceConfig, JobSpec},
    filter::Filter,
    recorder::{
        Answer, Query, Recorder, RecorderConfig, RecorderError, RecorderStats, Sampling, Store,
    },
};
use fastrand::Rng;
use pcap::{Capture, Linktype, Precision};
use tapline_tests::{
    daemon::Daemon,
    disk::{SmallDisk, names},
    frames::Frame,
    generator::{Generator, Template},
    inject::Injector,
    netns::Namespace,
    pcapng::{Contents, Packet, accepted, read},
    privileged,
    process::{checked, tapline, tool, wait_until},
    veth::{End, Veth},
};
use tempfile::tempdir;

use crate::property::{Made, Oracle, chain, filter, made, pick};

const SECOND: Duration = Duration::from_secs(1);

/// An engine on one end of a pair.
fn engine(end: &End<'_>) -> Arc<Engine> {
    let interface =
        InterfaceConfig { name: end.name.clone(), path: CapturePath::TAP, promiscuous: false };
    let config = EngineConfig { interfaces: vec![interface], ..EngineConfig::default() };
    Arc::new(end.namespace.enter(|| Engine::open(&config).unwrap()))
}

fn start(engine: &Arc<Engine>, config: RecorderConfig) -> Result<Recorder, RecorderError> {
    let engine = Arc::clone(engine);
    Recorder::start(
        config,
        Box::new(move |spec: &dyn Fn() -> JobSpec| engine.start(spec()).map_err(Into::into)),
    )
}

/// Every packet, in a small budget.
fn everything(folder: &Path) -> RecorderConfig {
    RecorderConfig {
        bytes: 32 << 20,
        reserve: 0,
        sampling: Sampling::Fixed(NonZeroU32::MIN),
        ..RecorderConfig::new(folder.to_path_buf())
    }
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}

fn all() -> Query {
    Query { from_ns: 0, to_ns: u64::MAX, filter: Filter::default(), limit: None }
}

/// Asks; tshark, capinfos and pcap-file read the answer alike.
fn ask(folder: &Path, query: &Query) -> (Contents, Answer) {
    let target = folder.with_extension("answer.pcapng");
    let answer = Store::open(folder).unwrap().query(query, &target).unwrap();
    let contents = accepted(&target);
    assert_eq!(contents.packets.len() as u64, answer.packets);
    (contents, answer)
}

/// A UDP frame with a number in it.
fn numbered(number: u32, length: usize) -> Vec<u8> {
    let (src, dst) = (Ipv4Addr::new(10, 0, 0, number as u8), Ipv4Addr::new(192, 0, 2, 1));
    let mut payload = number.to_be_bytes().to_vec();
    payload.resize(length, 0x5a);
    Frame::new().ip(IpAddr::V4(src), IpAddr::V4(dst)).udp(1000, 53).payload(&payload).build()
}

fn number(data: &[u8]) -> u32 {
    u32::from_be_bytes(*data[42..].first_chunk().unwrap())
}

#[test]
fn what_passed_a_moment_ago_is_found_with_its_true_length() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let data = tempdir().unwrap();
    let folder = data.path().join("recorder");
    let engine = engine(&veth.right);
    let recorder = start(&engine, everything(&folder)).unwrap();
    let mut injector = Injector::new(&veth.left);
    let mut sent = 0;
    for round in 0..20_u32 {
        let from_ns = now_ns();
        for number in 0..10 {
            injector.send(&numbered(round * 10 + number, 600));
            sent += 1;
        }
        veth.settle(sent);
        recorder.flush();
        let (contents, _) = ask(&folder, &Query { from_ns, ..all() });
        let found: Vec<_> = contents.packets.iter().map(|packet| number(&packet.data)).collect();
        assert_eq!(found, (round * 10..round * 10 + 10).collect::<Vec<_>>());
        let frame = numbered(round * 10, 600);
        let first = &contents.packets[0];
        assert_eq!((first.data.as_slice(), first.original_len), (&frame[..160], 642));
    }
    // It is not sealed for that.
    assert_eq!(recorder.stats().segments, 0);
    // From another process, without being asked to flush.
    for number in 200..300 {
        injector.send(&numbered(number, 20));
    }
    let target = data.path().join("out.pcapng");
    let src = "10.0.0.250".parse().unwrap();
    wait_until("a packet to reach the open segment", 10 * SECOND, || {
        let args = ["--from", "-1m", "--src", "10.0.0.250"];
        query(data.path(), &target, &args).packets.len() == 1
    });
    recorder.flush();
    // The newest three of them, and one by its address.
    let contents = query(data.path(), &target, &["--packets", "3"]);
    assert_eq!(contents.packets.iter().map(|one| number(&one.data)).min(), Some(297));
    let filter = Filter { src: Some(src), ..Filter::default() };
    let (by_library, _) = ask(&folder, &Query { filter, ..all() });
    assert_eq!(by_library.packets.len(), 1);
    // Of a recorder that has ended all is sealed, and all is there.
    let stats = recorder.stats();
    assert!(stats.recording && stats.error.is_none(), "{stats:?}");
    assert_eq!(stats.progress.hits.packets, stats.progress.captured.packets);
    drop(recorder);
    let mut files: Vec<_> = names(&folder);
    files.retain(|name| name != "lock");
    assert_eq!(files, ["000001_00001.index", "000001_00001.pcapng"].map(PathBuf::from));
    let contents = query(data.path(), &target, &[]);
    let found: Vec<_> = contents.packets.iter().map(|packet| number(&packet.data)).collect();
    assert_eq!(found, (0..300).collect::<Vec<_>>());
    // The next run adds to it.
    let recorder = start(&engine, everything(&folder)).unwrap();
    injector.send(&numbered(300, 20));
    veth.settle(301);
    recorder.flush();
    assert_eq!(query(data.path(), &target, &[]).packets.len(), 301);
}

/// `tapline query`, and what it wrote.
fn query(data: &Path, target: &Path, args: &[&str]) -> Contents {
    let fixed = ["query", "-q", "--data", data.to_str().unwrap(), "-w", target.to_str().unwrap()];
    checked(&mut tapline(&[&fixed, args].concat()));
    accepted(target)
}

#[test]
fn one_folder_has_one_recorder() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let engine = engine(&veth.right);
    let recorder = start(&engine, everything(folder.path())).unwrap();
    let error = start(&engine, everything(folder.path())).unwrap_err();
    assert!(matches!(error, RecorderError::Taken(_)), "{error}");
    drop(recorder);
    start(&engine, everything(folder.path())).unwrap();
}

/// What libpcap reads in a file: time and bytes.
fn scan(path: &Path) -> Vec<(u64, Vec<u8>)> {
    let mut capture = Capture::from_file_with_precision(path, Precision::Nano).unwrap();
    let mut packets = Vec::new();
    loop {
        match capture.next_packet() {
            Ok(packet) => {
                let time = packet.header.ts;
                // With nanoseconds in the place of microseconds.
                let time_ns =
                    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_usec.cast_unsigned();
                packets.push((time_ns, packet.data.to_vec()));
            }
            Err(pcap::Error::NoMorePackets) => return packets,
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
}

#[test]
fn over_random_windows_and_filters_a_query_equals_a_plain_scan_by_libpcap() {
    const PACKETS: usize = 30_000;
    const QUERIES: usize = 1500;
    privileged!();
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let rng = &mut Rng::with_seed(seed);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let engine = engine(&veth.right);
    let recorder = start(&engine, everything(folder.path())).unwrap();
    let mut injector = Injector::new(&veth.left);
    let mut sent = 0;
    while sent < PACKETS {
        let Made { bytes, .. } = made(rng);
        if !(60..=1500).contains(&bytes.len()) {
            continue;
        }
        injector.send(&bytes);
        sent += 1;
        // Fewer than the pair's ring has room for.
        if sent % 100 == 0 || sent == PACKETS {
            assert_eq!(veth.settle(sent as u64), sent as u64, "all arrive");
        }
        if sent % 1000 == 0 {
            recorder.flush();
        }
    }
    drop(recorder);

    let mut segments: Vec<_> = names(folder.path());
    segments.retain(|name| name.extension().is_some_and(|extension| extension == "pcapng"));
    assert!(segments.len() > 5, "{segments:?}");
    let mut trace: Vec<_> =
        segments.iter().flat_map(|name| scan(&folder.path().join(name))).collect();
    assert_eq!(trace.len(), PACKETS);
    trace.sort_by_key(|(time, _)| *time);

    let dead = Capture::dead(Linktype::ETHERNET).unwrap();
    let store = Store::open(folder.path()).unwrap();
    let answers = tempdir().unwrap();
    let target = answers.path().join("answer.pcapng");
    let (mut found_any, mut limited, mut passed_over) = (0, 0, 0);
    for _ in 0..QUERIES {
        let filter = filter(rng);
        let oracle = Oracle::new(&dead, &filter);
        // Within the trace, at its ends and beyond.
        let mut time = || pick(rng, &trace.iter().map(|(time, _)| *time).collect::<Vec<_>>());
        let (mut from_ns, mut to_ns) = (time(), time());
        if from_ns > to_ns {
            (from_ns, to_ns) = (to_ns, from_ns);
        }
        match rng.u32(..10) {
            0 => from_ns = 0,
            1 => to_ns = u64::MAX,
            2 => to_ns = from_ns,
            _ => {}
        }
        let limit = rng.bool().then(|| rng.u64(1..60));
        let mut unknown = BTreeSet::new();
        let mut want: Vec<_> = trace
            .iter()
            .filter(|(time, _)| (from_ns..=to_ns).contains(time))
            .filter(|(time, bytes)| {
                let accepts = oracle.accepts(bytes, chain(bytes));
                if accepts.is_none() {
                    unknown.insert(*time);
                }
                accepts == Some(true)
            })
            .cloned()
            .collect();
        // Which are the newest cannot be said without knowing all.
        let limit = limit.filter(|_| unknown.is_empty());
        if let Some(limit) = limit {
            limited += 1;
            want.drain(..want.len().saturating_sub(limit as usize));
        }
        let answer = store.query(&Query { from_ns, to_ns, filter, limit }, &target).unwrap();
        let mut found = scan(&target);
        assert_eq!(found.len() as u64, answer.packets);
        assert!(found.is_sorted_by_key(|(time, _)| *time));
        found.retain(|(time, _)| !unknown.contains(time));
        want.retain(|(time, _)| !unknown.contains(time));
        assert!(
            found == want,
            "seed {seed}, {filter:?}, {limit:?}: {} of {}",
            found.len(),
            want.len()
        );
        found_any += u32::from(!found.is_empty());
        passed_over += u32::from(answer.blocks.skipped > 0);
        assert_eq!((answer.blocks.corrupt, answer.blocks.expired), (0, 0));
    }
    println!(
        "{QUERIES} queries: {found_any} found packets, {limited} had a limit, {passed_over} passed blocks over"
    );
    assert!(found_any > QUERIES as u32 / 4 && limited > QUERIES as u32 / 8);
    assert!(passed_over > QUERIES as u32 / 4);
}

#[test]
fn a_disk_that_others_fill_stops_the_recorder_and_not_the_host_and_it_goes_on_when_there_is_room() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let disk = SmallDisk::new(48 << 10);
    let folder = disk.path().join("recorder");
    let engine = engine(&veth.right);
    let config = RecorderConfig { reserve: 12 << 20, ..everything(&folder) };
    let recorder = start(&engine, config).unwrap();
    let template = Template { length: 300, ..Template::default() };
    let generator = Generator::new(&veth.left, template).pinned(0);
    // More than the budget: the oldest go.
    generator.send_paced(60_000, 4 * SECOND);
    wait_until("the budget to be used", 10 * SECOND, || recorder.stats().removed.budget > 0);
    assert!(usage(&folder) <= 32 << 20);
    // Others fill the disk, and take what gets free: all that is sealed goes, and then nothing is
    // recorded.
    let mut others = 0;
    wait_until("the recorder to give way", 20 * SECOND, || {
        disk.fill(&format!("others{others}"));
        others += 1;
        generator.send_paced(10_000, SECOND / 10);
        let stats = recorder.stats();
        stats.removed.reserve > 0
            && stats.segments == 0
            && (has_dropped(&stats) || !stats.recording)
    });
    for number in 0..others {
        fs::remove_file(disk.path().join(format!("others{number}"))).unwrap();
    }
    let from_ns = now_ns();
    wait_until("it to record again", 20 * SECOND, || {
        generator.send_paced(10_000, SECOND / 10);
        recorder.flush();
        Store::open(&folder)
            .unwrap()
            .query_into(&Query { from_ns, ..all() }, &mut std::io::sink())
            .unwrap()
            .packets
            > 0
    });
    assert!(usage(&folder) <= 32 << 20);
    drop(recorder);
    let (contents, answer) = ask(&folder, &all());
    assert!(!contents.packets.is_empty() && answer.blocks.corrupt == 0, "{answer:?}");
}

fn has_dropped(stats: &RecorderStats) -> bool {
    stats.progress.drops.spool_full > 0
}

/// What a folder's files take.
fn usage(folder: &Path) -> u64 {
    // One may go meanwhile.
    let files = fs::read_dir(folder).unwrap().flatten();
    files.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
}

#[test]
fn questions_are_answered_while_segments_come_and_go() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let engine = engine(&veth.right);
    let recorder = start(&engine, everything(folder.path())).unwrap();
    let template = Template { length: 300, ..Template::default() };
    let generator = Generator::new(&veth.left, template.clone()).pinned(0);
    let answers = tempdir().unwrap();
    thread::scope(|scope| {
        let traffic = scope.spawn(|| generator.send_paced(50_000, 8 * SECOND));
        let mut asked = 0;
        while !traffic.is_finished() {
            let target = answers.path().join("answer.pcapng");
            let from_ns = now_ns() - 500_000_000;
            let store = Store::open(folder.path()).unwrap();
            for query in [all(), Query { from_ns, ..all() }, Query { limit: Some(100), ..all() }] {
                let answer = store.query(&query, &target).unwrap();
                assert_eq!(answer.blocks.corrupt, 0, "{answer:?}");
                let packets = read(&target).packets;
                assert!(packets.is_sorted_by_key(|packet| packet.time));
                // One flow, one CPU: what is found has no holes but where the oldest expired.
                if query.limit.is_some() && !packets.is_empty() {
                    assert!(packets.len() == 100 || generator.sent() < 20_000);
                    let sequence = |packet: &Packet| template.stamp(&packet.data).sequence;
                    let (first, last) = (sequence(&packets[0]), packets.last().map(sequence));
                    assert!(last.unwrap() - first < 200, "{first} to {last:?}");
                }
                asked += 1;
            }
        }
        assert!(asked >= 9, "{asked}");
        traffic.join().unwrap();
    });
    let stats = recorder.stats();
    assert!(stats.removed.budget > 0, "{stats:?}");
    assert!(usage(folder.path()) <= 32 << 20);
}

/// What `tapline query` says when it is refused, or fails.
fn refused(args: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = tapline(args).output().unwrap();
    assert!(stdout.is_empty());
    (status.code(), String::from_utf8(stderr).unwrap())
}

#[test]
fn a_query_is_refused_with_the_flag_the_value_and_the_limit() {
    let folder = tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    let target = folder.path().join("x");
    let target = target.to_str().unwrap();
    for (args, wants) in [
        (
            &["--from", "yesterday"] as &[&str],
            &["--from", "yesterday", "without a zone: UTC"] as &[&str],
        ),
        (&["--to", "2024-13-01T00:00:00Z"], &["--to", "2024-13-01", "like -5m"]),
        (&["--from", "now", "--to", "-5m"], &["--from is", "not be later than --to"]),
        (&["--packets", "0"], &["--packets", "from 1 to"]),
        (&["--src", "10.0.0.0/33"], &["--src", "from 0 to 32"]),
        (&["--proto", "icmp", "--dport", "1"], &["--proto", "icmp", "tcp, udp"]),
        (&[], &["--data", data, "no recorder", "data_dir"]),
    ] {
        let line = [&["query", "--data", data, "-w", target], args].concat();
        let (status, said) = refused(&line);
        assert_eq!(status, Some(2), "{args:?}: {said}");
        for want in wants {
            assert!(said.contains(want), "{args:?}: {want} is not in: {said}");
        }
    }
    let (status, said) = refused(&["query", "--data", "/nonexistent", "-w", target]);
    assert_eq!(status, Some(1));
    assert!(said.contains("/nonexistent") && said.contains("No such file"), "{said}");
    assert_eq!(names(folder.path()), [""; 0].map(PathBuf::from));
}

#[test]
fn a_query_writes_to_standard_output_and_says_what_it_found() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let engine = engine(&veth.right);
    let config = RecorderConfig {
        sampling: Sampling::Fixed(NonZeroU32::new(4).unwrap()),
        ..everything(folder.path())
    };
    let recorder = start(&engine, config).unwrap();
    let generator = Generator::new(&veth.left, Template::default());
    generator.send(20_000);
    veth.settle(20_000);
    drop(recorder);
    let data = folder.path().to_str().unwrap();
    let output = checked(&mut tapline(&["query", "--data", data, "-w", "-"]));
    let said = String::from_utf8(output.stderr).unwrap();
    let file = folder.path().join("copy.pcapng");
    fs::write(&file, &output.stdout).unwrap();
    let packets = accepted(&file).packets.len();
    assert!(said.starts_with(&format!("{packets} packets found, from ")), "{said}");
    assert!(said.contains(&format!("about {} passed", 4 * packets)), "{said}");
    assert!((4500..5500).contains(&packets), "{packets}");
    fs::remove_file(file).unwrap();
    // As JSON, and with nothing found.
    let target = folder.path().join("none.pcapng");
    let line =
        ["query", "--data", data, "--json", "--to", "2001-01-01", "--from", "2000-01-01T00:00"];
    let output =
        checked(&mut tapline(&[&line, &["-w", target.to_str().unwrap()] as &[&str]].concat()));
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["packets"], 0);
    assert_eq!(answer["blocks"]["read"], 0);
    let contents = accepted(&target);
    assert_eq!((contents.packets.len(), contents.interfaces.len()), (0, 1));
    assert_eq!(contents.interfaces[0].name.as_deref(), Some(veth.right.name.as_str()));
}

/// What each packet of a file says that it stands for, as tshark reads its comment.
fn weights(path: &Path) -> Vec<f64> {
    let comments = tool(&[
        "tshark",
        "-n",
        "-r",
        path.to_str().unwrap(),
        "-T",
        "fields",
        "-e",
        "frame.comment",
    ]);
    let number = |line: &str| line.strip_prefix("sampled 1 in ").unwrap().parse().unwrap();
    comments.lines().map(number).collect()
}

#[test]
fn adaptive_sampling_holds_its_budget_over_a_swing_of_the_load_and_packets_say_what_they_stand_for()
{
    const BUDGET: u32 = 1000;
    const LENGTH: Duration = Duration::from_secs(8);
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let data = tempdir().unwrap();
    let folder = data.path().join("recorder");
    let engine = engine(&veth.right);
    let sampling = Sampling::Adaptive { packets_per_second: BUDGET };
    let recorder = start(&engine, RecorderConfig { sampling, ..everything(&folder) }).unwrap();
    let generator = Generator::new(&veth.left, Template::default()).pinned(0);
    let mut phases = Vec::new();
    for rate in [200, 2_000, 200_000, 2_000] {
        let from_ns = now_ns();
        let sent = generator.send_paced(rate, LENGTH);
        phases.push((rate, Query { from_ns, to_ns: now_ns(), ..all() }, sent));
    }
    veth.settle(generator.sent());
    recorder.flush();
    let progress = recorder.stats().progress;
    assert_eq!(progress.hits.packets, progress.captured.packets + progress.drops.thinned);
    assert!(progress.drops.thinned > 0 && progress.hits.packets < generator.sent() / 10);
    drop(recorder);
    for (rate, query, sent) in phases {
        let (contents, answer) = ask(&folder, &query);
        let (kept, all) = (f64::from(answer.packets as u32), f64::from(sent as u32));
        println!("{rate}/s: {sent} sent, {kept} kept, {:.0} estimated", answer.estimated);
        // By the packets' own times; a generator that was held up has sent less for a while.
        let seconds = Duration::from_nanos(query.to_ns - query.from_ns).as_secs_f64();
        let budget = f64::from(BUDGET) * seconds;
        if rate < BUDGET.into() {
            // A generator that was held up makes up for it in bursts, which are thinned.
            assert!(kept > all / 2.0 && answer.packets <= sent, "{rate}/s: {kept} of {sent}");
        } else {
            assert!((kept / budget - 1.0).abs() < 0.1, "{rate}/s: {kept} for {budget}");
        }
        assert!((answer.estimated / all - 1.0).abs() < 0.1, "{} for {sent}", answer.estimated);
        let weights = weights(&folder.with_extension("answer.pcapng"));
        assert_eq!(weights.len(), contents.packets.len());
        let sum: f64 = weights.iter().sum();
        assert!((sum / answer.estimated - 1.0).abs() < 1e-9);
    }
}

#[test]
fn sigkill_under_load_costs_only_what_had_not_reached_the_open_segment() {
    const RATE: u64 = 20_000;
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let everything = "[recorder]\nsample = 1\nbytes = 33554432\nreserve_bytes = 0";
    let mut daemon = Daemon::start(&veth.right, "", everything);
    let template = Template::default();
    let generator = Generator::new(&veth.left, template.clone()).pinned(0);
    let passed = thread::scope(|scope| {
        let traffic = scope.spawn(|| generator.send_paced(RATE, 6 * SECOND));
        thread::sleep(4 * SECOND);
        let passed = generator.sent();
        daemon.kill();
        traffic.join().unwrap();
        passed
    });
    let data = daemon.folder().join("data");
    let target = daemon.folder().join("found.pcapng");
    let found = || -> Vec<u64> {
        let packets = query(&data, &target, &[]).packets;
        packets.iter().map(|packet| template.stamp(&packet.data).sequence).collect()
    };
    // Several segments are sealed, and the open one is as it was left.
    let files = names(&data.join("recorder"));
    let with =
        |end: &str| files.iter().filter(|name| name.to_str().unwrap().ends_with(end)).count();
    assert!(with(".pcapng") > 3 && with(".pcapng.part") == 1, "{files:?}");
    let left_behind = found();
    let count = left_behind.len() as u64;
    assert!(left_behind.iter().copied().eq(0..count), "without a hole");
    // By itself it gets there within half a second; this machine may have much else to do.
    assert!(count + RATE * 2 > passed, "{count} of {passed}");
    // Nothing more is lost when the next run takes over.
    daemon.restart();
    assert!(found().iter().copied().eq(0..count));
    generator.send(100);
    wait_until("the next run", 10 * SECOND, || found().len() as u64 == count + 100);
    assert!(daemon.stop().success(), "{}", daemon.log());
    let files = names(&data.join("recorder"));
    assert!(files.iter().all(|name| name.to_str().unwrap().as_bytes()[0] != b'.'), "{files:?}");
}
