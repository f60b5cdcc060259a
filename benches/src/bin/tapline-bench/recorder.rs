//! The recorder: what it costs the machine while it records, and how long it takes to be asked.
//!
//! - Cost: CPU time of the whole machine per packet that came by, with and without it, in turn.
//! - Questions: of a recording of 24 hours and 1 GiB that is made up, indexed by the recorder itself, and
//!   asked beside tcpdump, which has to read all of it. Both must find as many packets.

use std::{
    fs::{self, File},
    net::Ipv4Addr,
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use capture_user::{
    engine::{CapturePath, Engine, EngineConfig, InterfaceConfig, JobSpec},
    filter::{Filter, Prefix},
    recorder::{Query, Recorder, RecorderConfig, Sampling, Store},
    segment::pcapng::{self, InterfaceInfo, Packet, SectionInfo},
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::{Value, json};
use tapline_tests::{
    frames::Frame,
    generator::{Generator, Template},
    netns::Namespace,
    process::{checked, wait_until},
    veth::{End, Veth},
};

use crate::{machine::Busy, results::Spread, run::as_f64};

const SECOND: u64 = 1_000_000_000;

/// Bytes of the recording.
const RECORDED: u64 = 1 << 30;

/// A segment gets at most five minutes old.
const SEGMENTS: u64 = 24 * 12;

/// What the recorder keeps of a packet, bytes.
const KEPT: usize = 160;

/// Who passes by once in all the hours.
const VISITOR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

/// The segments of the visit.
const VISIT: std::ops::Range<u64> = 150..152;

fn open(end: &End<'_>) -> Arc<Engine> {
    let interface =
        InterfaceConfig { name: end.name.clone(), path: CapturePath::TAP, promiscuous: false };
    let config = EngineConfig { interfaces: vec![interface], ..EngineConfig::default() };
    Arc::new(end.namespace.enter(|| Engine::open(&config).unwrap()))
}

fn record(engine: &Arc<Engine>, config: RecorderConfig) -> Recorder {
    let engine = Arc::clone(engine);
    let start = move |spec: &dyn Fn() -> JobSpec| engine.start(spec()).map_err(Into::into);
    Recorder::start(config, Box::new(start)).unwrap()
}

/// Who looks on while packets pass.
#[derive(Clone, Copy)]
enum Watcher {
    Off,
    Engine,
    Recorder(Sampling),
}

/// Runs the rounds; gives a table and its values.
pub(crate) fn cost(
    folder: &Path,
    repeats: usize,
    rate: u64,
    duration: Duration,
) -> (String, Value) {
    let hundred = NonZeroU32::MIN.saturating_add(99);
    let watchers = [
        ("off", Watcher::Off),
        ("attached, nothing recorded", Watcher::Engine),
        ("recorder, 1 in 100", Watcher::Recorder(Sampling::Fixed(hundred))),
        (
            "recorder, 1000 a second (adaptive)",
            Watcher::Recorder(Sampling::Adaptive { packets_per_second: 1000 }),
        ),
    ];
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let generator = Generator::new(&veth.left, Template::default()).pinned(0);
    let mut spent = [const { Vec::new() }; 4];
    let mut more = [const { Vec::new() }; 4];
    for round in 0..repeats {
        let mut now = [0.0; 4];
        for turn in 0..watchers.len() {
            let at = (round + turn) % watchers.len();
            let own = folder.join(format!("recorder{round}-{at}"));
            let engine = match watchers[at].1 {
                Watcher::Off => None,
                _ => Some(open(&veth.right)),
            };
            let recorder = match (watchers[at].1, &engine) {
                (Watcher::Recorder(sampling), Some(engine)) => Some(record(
                    engine,
                    RecorderConfig { sampling, reserve: 0, ..RecorderConfig::new(own.clone()) },
                )),
                _ => None,
            };
            let before = veth.settle(generator.sent());
            let busy = Busy::now();
            generator.send_paced(rate, duration);
            if let Some(recorder) = &recorder {
                recorder.flush();
            }
            let busy = busy.since();
            let arrived = veth.settle(generator.sent()) - before;
            now[at] = as_f64(busy.as_nanos() as u64) / as_f64(arrived);
            drop(recorder);
            drop(engine);
            drop(fs::remove_dir_all(own));
        }
        for at in 0..watchers.len() {
            spent[at].push(now[at]);
            more[at].push(now[at] - now[0]);
        }
    }
    let mut text = format!(
        "\nrecorder: CPU of the machine, ms per million packets, {rate} a second, {repeats} rounds of {} s\n",
        duration.as_secs_f64()
    );
    text += &format!("{:<36} {:>22} {:>22}\n", "", "all, sending included", "more than off");
    let mut values = Vec::new();
    for (at, (name, _)) in watchers.iter().enumerate() {
        let [spent, more] = [&spent, &more].map(|all| Spread::of(all[at].clone()).unwrap());
        text += &format!("{name:<36} {:>22} {:>22}\n", spent.show(1.0, 0), more.show(1.0, 0));
        values.push(json!({
            "watcher": name, "machine_ns_per_packet": spent.json(), "more_ns_per_packet": more.json(),
        }));
    }
    (text, Value::Array(values))
}

/// Random numbers that are the same in each run.
struct Rng(u64);

impl Rng {
    fn below(&mut self, end: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// A frame between one of some thousand hosts and one of some hundred servers; the visitor's now and then
/// during the visit.
fn frame(rng: &mut Rng, segment: u64) -> Vec<u8> {
    let host = rng.below(4096) as u16;
    let [high, low] = host.to_be_bytes();
    let visits = VISIT.contains(&segment) && rng.below(100) == 0;
    let src = if visits { VISITOR } else { Ipv4Addr::new(10, 1, high, low) };
    let dst = Ipv4Addr::new(10, 2, 0, rng.below(200) as u8);
    let sport = 32768 + rng.below(28000) as u16;
    let frame = Frame::new().ip(src.into(), dst.into());
    let dport = [443, 443, 443, 443, 80, 22, 5432][rng.below(7) as usize];
    let frame = if rng.below(20) == 0 { frame.udp(sport, 53) } else { frame.tcp(sport, dport) };
    frame.fill(KEPT).build()
}

/// Writes the segments of a day that ended a moment ago.
fn make(folder: &Path) -> Vec<PathBuf> {
    fs::create_dir(folder).unwrap();
    let rng = &mut Rng(1);
    let frames: Vec<Vec<Vec<u8>>> =
        [0, VISIT.start].map(|segment| (0..20_000).map(|_| frame(rng, segment)).collect()).into();
    let now_ns = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    // A minute short of a day, so that nothing has expired yet.
    let length_ns = 24 * 3600 * SECOND - 120 * SECOND;
    let per_segment = RECORDED / SEGMENTS / pcapng::packet_len(KEPT) as u64;
    let step_ns = length_ns / SEGMENTS / per_segment;
    let mut time_ns = now_ns - length_ns - 60 * SECOND;
    let segments = (0..SEGMENTS).map(|segment| {
        let mut out = Vec::new();
        pcapng::section_header(&mut out, &SectionInfo::default());
        let comment = "sampled 1 in 100";
        let info = InterfaceInfo {
            name: "eth0",
            comment,
            snaplen: KEPT as u32,
            ..InterfaceInfo::default()
        };
        pcapng::interface_description(&mut out, &info);
        let frames = &frames[usize::from(VISIT.contains(&segment))];
        for _ in 0..per_segment {
            time_ns += step_ns;
            let data = &frames[rng.below(frames.len() as u64) as usize];
            let packet =
                Packet { timestamp_ns: time_ns, original_len: 1000, data, ..Packet::default() };
            let start = out.len();
            out.resize(start + pcapng::packet_len(data.len()), 0);
            pcapng::packet(&mut out[start..], &packet).unwrap();
        }
        let path = folder.join(format!("000001_{:05}.pcapng", segment + 1));
        fs::write(&path, out).unwrap();
        path
    });
    segments.collect()
}

/// Lets the recorder take the folder over and make what indices it needs.
fn index(folder: &Path) {
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let engine = open(&veth.right);
    let config =
        RecorderConfig { bytes: 2 * RECORDED, reserve: 0, ..RecorderConfig::new(folder.into()) };
    let _recorder = record(&engine, config);
    wait_until("the indices", Duration::from_mins(2), || {
        let files = fs::read_dir(folder).unwrap();
        let indices = files.filter(|file| {
            file.as_ref().unwrap().path().extension().is_some_and(|extension| extension == "index")
        });
        indices.count() as u64 == SEGMENTS
    });
}

/// Makes the page cache forget a folder.
fn forget(folder: &Path) {
    for file in fs::read_dir(folder).unwrap() {
        let file = File::open(file.unwrap().path()).unwrap();
        file.sync_all().unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    }
}

fn size(folder: &Path) -> u64 {
    fs::read_dir(folder).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum()
}

/// How many packets a file has that libpcap reads.
fn count(path: &Path) -> u64 {
    let mut capture = pcap::Capture::from_file(path).unwrap();
    let mut packets = 0;
    while capture.next_packet().is_ok() {
        packets += 1;
    }
    packets
}

/// Asks, and lets tcpdump scan; gives a table and its values.
pub(crate) fn questions(folder: &Path, repeats: usize) -> (String, Value) {
    let recorded = folder.join("recorded");
    let segments = make(&recorded);
    index(&recorded);
    let list = folder.join("segments");
    let names: Vec<_> = segments.iter().map(|path| path.to_str().unwrap()).collect();
    fs::write(&list, names.join("\n") + "\n").unwrap();
    let target = folder.join("answer");

    let host =
        |address: Ipv4Addr| Filter { src: Prefix::new(address.into(), 32), ..Filter::default() };
    let asked = [
        ("a host that was there for minutes", host(VISITOR)),
        ("a host that never was", host(Ipv4Addr::new(203, 0, 113, 1))),
        ("one of 4096 hosts that are always there", host(Ipv4Addr::new(10, 1, 7, 7))),
    ];
    let mut text = format!(
        "\nrecorder: questions to {:.2} GiB of 24 hours, indices included, {repeats} rounds\n",
        as_f64(size(&recorded)) / as_f64(1 << 30)
    );
    text += &format!(
        "{:<40} {:>8} {:>7} {:>20} {:>20} {:>20} {:>8}\n",
        "", "packets", "blocks", "from the disk, ms", "in memory, ms", "tcpdump, s", "ratio"
    );
    let mut values = Vec::new();
    for (name, filter) in asked {
        let query = Query { from_ns: 0, to_ns: u64::MAX, filter, limit: None };
        let (mut cold, mut warm, mut scan) = (Vec::new(), Vec::new(), Vec::new());
        let mut answer = None;
        for _ in 0..repeats {
            forget(&recorded);
            for times in [&mut cold, &mut warm] {
                let start = Instant::now();
                answer = Some(Store::open(&recorded).unwrap().query(&query, &target).unwrap());
                times.push(start.elapsed().as_secs_f64());
            }
            let found = count(&target);
            let mut tcpdump = Command::new("tcpdump");
            tcpdump.arg("-V").arg(&list).arg("-w").arg(&target).arg(filter.to_string());
            let start = Instant::now();
            checked(&mut tcpdump);
            scan.push(start.elapsed().as_secs_f64());
            assert_eq!(found, count(&target), "{name}: tcpdump finds something else");
        }
        let answer = answer.unwrap();
        let [cold, warm, scan] = [cold, warm, scan].map(|times| Spread::of(times).unwrap());
        let ratio = scan.median / warm.median;
        text += &format!(
            "{name:<40} {:>8} {:>7} {:>20} {:>20} {:>20} {ratio:>8.0}\n",
            answer.packets,
            answer.blocks.read,
            cold.show(1e-3, 1),
            warm.show(1e-3, 1),
            scan.show(1.0, 2),
        );
        values.push(json!({
            "question": name, "packets": answer.packets, "blocks_read": answer.blocks.read,
            "blocks_skipped": answer.blocks.skipped, "cold_seconds": cold.json(),
            "warm_seconds": warm.json(), "tcpdump_seconds": scan.json(), "ratio": ratio,
        }));
    }
    fs::remove_dir_all(&recorded).unwrap();
    (text, Value::Array(values))
}
