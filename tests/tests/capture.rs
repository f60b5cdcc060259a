//! End to end on the `exclusive` path: frames into a veth pair, `tapline` or the engine at its other
//! end, and the files read back with others' software.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, SystemTime},
};

use capture_user::{
    engine::{
        self, CapturePath, Engine, EngineConfig, InterfaceConfig, Job, JobSpec, MIN_BUFFER,
        RING_BYTES, StartError, Transport,
    },
    filter::Filter,
    program::XdpMode,
    segment::Target,
    socket::SocketConfig,
};
use nix::{
    libc::{SCHED_FIFO, SCHED_OTHER},
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use pcap_file::pcapng::{Block, PcapNgReader};
use tapline_tests::{
    capture::{Capture, Summary, exclusive, number},
    frames::{Frame, QINQ, VLAN},
    generator::{Generator, Template},
    inject::Injector,
    netns::Namespace,
    pcapng::{Contents, accepted, counted, read},
    privileged,
    veth::{Options, Veth},
};
use tempfile::tempdir;

use crate::tap::ip_counter;

const SECOND: Duration = Duration::from_secs(1);

/// A ring that holds all that these tests send at once, so that nothing is lost however late the
/// reader gets to run.
const ROOMY: [&str; 2] = ["--ring-size", "16384"];

/// Inbound, in `epb_flags`.
const INBOUND: u32 = 1;

/// Stamps by source.
type Stamps = BTreeMap<u64, BTreeSet<u64>>;

/// Checks every packet of a file of stamped frames, sent between two points in time; gives the
/// stamps, of which none may be there twice.
fn check_packets(contents: &Contents, template: &Template, sent: [SystemTime; 2]) -> Stamps {
    let [from, to] = [sent[0] - SECOND, sent[1] + SECOND]
        .map(|time| time.duration_since(SystemTime::UNIX_EPOCH).unwrap());
    let wall = from..to;
    let mut stamps = Stamps::new();
    let mut times = BTreeMap::new();
    for packet in &contents.packets {
        let stamp = template.stamp(&packet.data);
        assert_eq!(packet.data, template.expected(stamp), "{stamp:?}");
        assert_eq!(packet.original_len as usize, packet.data.len(), "{stamp:?}");
        assert_eq!(packet.flags, Some(INBOUND), "{stamp:?}");
        assert!(stamps.entry(stamp.source).or_default().insert(stamp.sequence), "{stamp:?} twice");

        assert!(wall.contains(&packet.time), "{stamp:?}: {:?} is not in {wall:?}", packet.time);
        let last = times.insert((packet.interface, packet.queue.unwrap()), packet.time);
        assert!(last <= Some(packet.time), "{stamp:?}: {last:?} is later than {:?}", packet.time);
    }
    stamps
}

/// Checks that a file's statistics are the summary's.
fn check_statistics(contents: &Contents, summary: &Summary) {
    assert_eq!(contents.interfaces.len(), summary.interfaces().len());
    for (interface, said) in contents.interfaces.iter().zip(summary.interfaces()) {
        assert_eq!(interface.name.as_deref(), said["name"].as_str());
        let [statistics] = interface.statistics.as_slice() else {
            panic!("not one statistics block: {interface:?}")
        };
        let law = &said["law"];
        let hits = number(&law["hits"]["packets"]);
        let written = number(&law["written"]["packets"]);
        assert_eq!(statistics.received, Some(number(&said["seen"])));
        assert_eq!(statistics.accepted, Some(hits));
        assert_eq!(statistics.os_dropped, Some(hits - written));
        assert_eq!(statistics.interface_dropped, Some(0));
        assert_eq!(statistics.delivered, Some(written));
        let words = format!("hits {hits} = written {written}");
        assert!(statistics.comments.iter().any(|comment| comment.starts_with(&words)));
    }
    assert_eq!(contents.packets.len() as u64, summary.written());
    let bytes: u64 = contents.packets.iter().map(|packet| packet.data.len() as u64).sum();
    assert_eq!(bytes, summary.written_bytes());
}

/// Numbered packets through one capture: each queue has a generator on a CPU of its own.
fn numbered_packets(queues: u32, xdp: &str, flags: &[&str]) {
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options { queues, ..Options::default() });
    let folder = tempdir().unwrap();
    let file = folder.path().join("numbered.pcapng");
    let template = Template { length: 100, source: 70, ..Template::default() };
    let generators: Vec<_> = (0..queues as usize)
        .map(|cpu| Generator::new(&veth.left, template.clone()).pinned(cpu))
        .collect();

    let capture = Capture::start(exclusive(&veth.right, &file, &[&["--xdp", xdp], flags].concat()));
    let began = SystemTime::now();
    let sent: u64 = thread::scope(|scope| {
        let threads: Vec<_> = generators
            .iter()
            .map(|generator| scope.spawn(|| generator.send_paced(20_000, SECOND / 2)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum::<u64>()
    });
    assert_eq!(sent, 10_000 * u64::from(queues));
    let arrived = veth.settle(sent);
    let summary = capture.stop().success();

    assert_eq!(summary.ending(), "stopped");
    assert_eq!(summary.interfaces()[0]["xdp"], xdp);
    assert_eq!(summary.interfaces()[0]["queues"], queues);
    assert_eq!((summary.seen(), summary.hits()), (arrived, arrived));
    assert_eq!(summary.dropped(), 0, "{summary:?}");
    let contents = accepted(&file);
    check_statistics(&contents, &summary);
    assert_eq!(contents.interfaces[0].filter, None);
    let stamps = check_packets(&contents, &template, [began, SystemTime::now()]);
    assert_eq!(stamps.len(), queues as usize);
    if arrived == sent {
        let all: BTreeSet<u64> = (0..10_000).collect();
        assert!(stamps.values().all(|sequences| *sequences == all));
    }
    for packet in &contents.packets {
        let cpu = template.stamp(&packet.data).source - 70;
        let queue = if queues == 1 { 0 } else { cpu };
        assert_eq!(packet.queue.map(u64::from), Some(queue));
    }
}

#[test]
fn numbered_packets_on_one_queue_are_each_in_the_file_once() {
    privileged!();
    numbered_packets(1, "native", &ROOMY);
}

#[test]
fn numbered_packets_on_two_queues_are_each_in_the_file_once() {
    privileged!();
    numbered_packets(2, "native", &ROOMY);
}

#[test]
fn numbered_packets_in_generic_mode_are_each_in_the_file_once() {
    privileged!();
    numbered_packets(1, "generic", &ROOMY);
}

#[test]
fn numbered_packets_through_rings_are_each_in_the_file_once_under_their_queue() {
    privileged!();
    for (queues, xdp) in [(1, "native"), (2, "native"), (1, "generic")] {
        numbered_packets(queues, xdp, &["--transport", "bpf-ring"]);
    }
}

#[test]
fn what_finds_a_ring_full_is_dropped_and_counted_and_the_host_gets_no_hit() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("full.pcapng");
    let template = Template { length: 200, ..Template::default() };
    let generator = Generator::new(&veth.left, template.clone()).pinned(0);
    let received = || ip_counter(&right, "InReceives");
    let before = received();

    let capture = Capture::start(exclusive(&veth.right, &file, &["--bpf-ring-size", "1M"]));
    let mut sent = generator.send_paced(50_000, SECOND / 10);
    // While the reader is stopped, the ring fills up.
    capture.signal(Signal::SIGSTOP);
    sent += generator.send_paced(50_000, SECOND / 2);
    capture.signal(Signal::SIGCONT);
    let arrived = veth.settle(sent);
    let summary = capture.stop().success();

    assert_eq!(summary.interfaces()[0]["transport"], "bpf_ring");
    assert_eq!(summary.hits(), arrived);
    let lost = summary.dropped_by("bpf_ring_full");
    assert!(lost > 0 && summary.written() > 5000, "{summary:?}");
    assert_eq!(lost, summary.dropped(), "no other cause: {summary:?}");
    let contents = accepted(&file);
    check_statistics(&contents, &summary);
    let stamps: BTreeSet<_> =
        contents.packets.iter().map(|packet| template.stamp(&packet.data).sequence).collect();
    assert_eq!(stamps.len() as u64, summary.written(), "each once");
    assert_eq!(received(), before, "none reached the host's own stack");
}

/// Injects frames in round after round, and waits until they have been taken in at the other end.
fn inject(veth: &Veth<'_>, frames: &[Vec<u8>], round: usize) {
    let mut injector = Injector::new(&veth.left);
    for frame in frames {
        injector.send(frame);
    }
    veth.settle(((round + 1) * frames.len()) as u64);
}

#[test]
fn each_of_64_jobs_gets_just_its_packets_while_some_come_and_go() {
    const JOBS: u16 = 64;
    const STAYING: u16 = 56;
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let template = Template { length: 80, flows: JOBS.into(), ..Template::default() };
    let generator = Generator::new(&veth.left, template.clone()).pinned(0);
    let folder = tempdir().unwrap();
    let spec = |flow: u16, run: &str| JobSpec {
        filter: Filter { sport: Some(1000 + flow), ..Filter::default() },
        buffers: 4,
        buffer_size: MIN_BUFFER,
        ..JobSpec::new(Target::Directory {
            path: folder.path().join(format!("{flow}-{run}")),
            prefix: "job".into(),
        })
    };
    let socket = SocketConfig { ring_size: 32768, frames: 65536, ..SocketConfig::default() };
    let config = EngineConfig {
        interfaces: vec![InterfaceConfig {
            name: veth.right.name.clone(),
            path: CapturePath::Exclusive {
                xdp: XdpMode::Auto,
                mirror_port: false,
                transport: Transport::AfXdp,
                socket,
                ring_bytes: RING_BYTES,
            },
            promiscuous: true,
        }],
        ..EngineConfig::default()
    };

    let began = SystemTime::now();
    let (sent, arrived, staying, coming_and_going) = right.enter(|| {
        let engine = Engine::open(&config).unwrap();
        let start = |flow, run| engine.start(spec(flow, run)).unwrap();
        let mut jobs: Vec<_> = (0..JOBS).map(|flow| (flow, start(flow, "first"))).collect();
        let error = engine.start(spec(0, "too many")).unwrap_err();
        assert!(matches!(error, StartError::NoSlot { .. }), "{error}");

        let leaving = jobs.split_off(STAYING.into());
        let mut others = Vec::new();
        let sent = thread::scope(|scope| {
            let sender = scope.spawn(|| generator.send_paced(16_000, SECOND));
            let mut back = Vec::new();
            for (flow, job) in leaving {
                job.stop();
                others.push((flow, job.wait().unwrap()));
                back.push((flow, start(flow, "second")));
            }
            let sent = sender.join().unwrap();
            veth.settle(sent);
            for (flow, job) in back {
                job.stop();
                others.push((flow, job.wait().unwrap()));
            }
            sent
        });
        let stop = |(flow, job): (u16, Job)| {
            job.stop();
            (flow, job.wait().unwrap())
        };
        let staying: Vec<_> = jobs.into_iter().map(stop).collect();
        (sent, veth.settle(sent), staying, others)
    });

    for (flow, summary) in staying.iter().chain(&coming_and_going) {
        assert!(summary.law.holds(), "{flow}: {:?}", summary.law);
        assert_eq!(summary.law.drops.total(), 0, "{flow}: {:?}", summary.law);
        let [segment] = summary.segments.as_slice() else { panic!("{flow}: {summary:?}") };
        let contents = read(&segment.path);
        assert_eq!(contents.packets.len() as u64, summary.law.hits.packets, "{flow}");
        let filter = format!("src port {}", 1000 + flow);
        assert_eq!(contents.interfaces[0].filter.as_deref(), Some(filter.as_str()));
        let stamps = check_packets(&contents, &template, [began, SystemTime::now()]);
        let sequences = stamps.get(&0).cloned().unwrap_or_default();
        let own = |sequence: &u64| sequence % u64::from(JOBS) == u64::from(*flow);
        assert!(sequences.iter().all(own), "{flow} has another's packets");
        if *flow < STAYING && arrived == sent {
            let all: BTreeSet<u64> = (0..sent).filter(own).collect();
            assert_eq!(sequences, all, "{flow} was there all the time");
        }
    }
    let hits = |summary: &engine::Summary| summary.law.hits.packets;
    let hits: u64 = staying.iter().map(|(_, summary)| hits(summary)).sum();
    if arrived == sent {
        assert_eq!(hits, sent / u64::from(JOBS) * u64::from(STAYING));
    }
    let moved: u64 = coming_and_going.iter().map(|(_, summary)| summary.law.hits.packets).sum();
    assert!(moved > 0, "those that came and went were there, too");
}

#[test]
fn jumbo_frames_arrive_whole() {
    privileged!();
    let lengths = [60, 1500, 1514, 1792, 1793, 1800, 2048, 4000, 4096, 8999, 9000, 9014];
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options { mtu: 9000, ..Options::default() });
    let addresses = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
    let headers = Frame::new().ipv4(addresses.0, addresses.1).udp(1, 2);
    let frames = lengths.map(|length| headers.clone().fill(length).build());
    let folder = tempdir().unwrap();
    // A snaplen falls into each part of a frame, and between two.
    let cases = [
        ("native", "2048", 0),
        ("native", "4096", 0),
        ("generic", "2048", 0),
        ("native", "2048", 1792),
        ("native", "2048", 5000),
    ];
    for (round, (xdp, frame_size, snaplen)) in cases.into_iter().enumerate() {
        let file = folder.path().join("jumbo.pcapng");
        let limit = snaplen.to_string();
        let flags = ["--xdp", xdp, "--frame-size", frame_size, "--snaplen", &limit];
        let capture = Capture::start(exclusive(&veth.right, &file, &flags));
        inject(&veth, &frames, round);
        let summary = capture.stop().success();
        let case = format!("{xdp} {frame_size} {snaplen}: {summary:?}");
        assert_eq!(summary.hits(), frames.len() as u64, "{case}");
        assert_eq!(summary.dropped(), 0, "{case}");
        let contents = accepted(&file);
        check_statistics(&contents, &summary);
        for (packet, frame) in contents.packets.iter().zip(&frames) {
            let kept = if snaplen == 0 { frame.len() } else { frame.len().min(snaplen) };
            assert_eq!(packet.original_len as usize, frame.len(), "{case}");
            assert!(packet.data == frame[..kept], "{case}: {} bytes", frame.len());
        }
    }
}

#[test]
fn standard_output_streams_into_tshark() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let flags = [&ROOMY as &[_], &["--packets", "1000"]].concat();
    let (mut capture, stdout) = Capture::streaming(exclusive(&veth.right, Path::new("-"), &flags));
    let tshark = Command::new("tshark")
        .args(["-n", "-r", "-", "-T", "fields", "-e", "udp.srcport"])
        .stdin(stdout)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    capture.wait_until_ready();
    // Flows are taken in turn on each CPU.
    let template = Template { flows: 2, ..Template::default() };
    let generator = Generator::new(&veth.left, template).pinned(0);
    generator.send_paced(10_000, SECOND / 5);
    let ended = capture.wait();
    let read = tshark.wait_with_output().unwrap();

    assert_eq!(ended.success().written(), 1000);
    assert!(ended.stdout.is_empty());
    let stderr = String::from_utf8(read.stderr).unwrap();
    assert!(read.status.success() && !stderr.to_lowercase().contains("warning"), "{stderr}");
    let ports = String::from_utf8(read.stdout).unwrap();
    assert!(ports.lines().eq(["1000", "1001"].into_iter().cycle().take(1000)), "{ports}");
}

#[test]
fn packets_reach_the_reader_of_a_pipe_while_the_capture_runs() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    mkfifo(&pipe, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let mut capture = Capture::spawn(exclusive(&veth.right, &pipe, &ROOMY));
    let mut reader = PcapNgReader::new(File::open(&pipe).unwrap()).unwrap();
    capture.wait_until_ready();
    let generator = Generator::new(&veth.left, Template::default());
    let mut packets = 0;
    for sent in [1, 2, 3, 103] {
        generator.send(sent - packets);
        while packets < sent {
            let block = reader.next_block().unwrap().unwrap();
            packets += u64::from(matches!(block, Block::EnhancedPacket(_)));
        }
    }
    let rest = thread::spawn(move || {
        let mut statistics = 0;
        while let Some(block) = reader.next_block() {
            statistics += u64::from(matches!(block.unwrap(), Block::InterfaceStatistics(_)));
        }
        statistics
    });
    assert_eq!(capture.stop().success().written(), 103);
    assert_eq!(rest.join().unwrap(), 1, "the end of the file arrives, too");
}

#[test]
fn a_folder_gets_a_file_for_each_queue_that_had_packets() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options { queues: 3, ..Options::default() });
    let folder = tempdir().unwrap();
    // A name that ends in a slash makes the folder.
    let place = format!("{}/new/", folder.path().display());
    let capture = Capture::start(exclusive(&veth.right, Path::new(&place), &ROOMY));
    let counts = [1000, 2000];
    for (cpu, count) in counts.iter().enumerate() {
        let generator = Generator::new(&veth.left, Template::default()).pinned(cpu);
        generator.send_paced(10 * count, SECOND / 10);
    }
    let arrived = veth.settle(counts.iter().sum());
    let summary = capture.stop().success();

    assert_eq!((summary.hits(), summary.dropped()), (arrived, 0));
    assert_eq!(summary.segments().len(), 2);
    let mut accepted_by_filter = 0;
    for (queue, segment) in summary.segments().iter().enumerate() {
        let path = Path::new(segment["path"].as_str().unwrap());
        let name = path.file_name().unwrap().to_str().unwrap();
        let end = format!("_{}_q{queue}_00001.pcapng", veth.right.name);
        assert!(name.starts_with("tapline_") && name.ends_with(&end), "{name}");
        let contents = accepted(path);
        assert_eq!(contents.packets.len() as u64, number(&segment["packets"]));
        assert!(contents.packets.iter().all(|packet| packet.queue == Some(queue as u32)));
        accepted_by_filter += contents.statistics().accepted.unwrap();
    }
    assert_eq!(accepted_by_filter, summary.hits(), "the files' hits are the job's");
    assert_eq!(fs::read_dir(&place).unwrap().count(), 2, "nothing else is left there");
}

#[test]
fn two_interfaces_are_in_one_file_each_with_its_description_and_statistics() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veths = [Veth::new(&left, &right), Veth::new(&left, &right)];
    let folder = tempdir().unwrap();
    let file = folder.path().join("both.pcapng");
    let other = ["-i", &veths[1].right.name, "--dport", "2000"];
    let flags = [&ROOMY as &[_], &other].concat();
    let capture = Capture::start(exclusive(&veths[0].right, &file, &flags));
    let template = |source| Template { source, ..Template::default() };
    let arrived = [(0, 1000), (1, 3000)].map(|(at, count)| {
        let generator = Generator::new(&veths[at].left, template(100 * at as u32)).pinned(at);
        generator.send_paced(10 * count, SECOND / 10);
        veths[at].settle(count)
    });
    let ended = capture.stop();
    let summary = ended.success();

    for veth in &veths {
        assert!(ended.stderr.contains(&format!("capturing on {}: exclusive", veth.right.name)));
    }
    assert_eq!(summary.interfaces().len(), 2);
    let contents = accepted(&file);
    check_statistics(&contents, &summary);
    for (at, arrived) in arrived.into_iter().enumerate() {
        let interface = &contents.interfaces[at];
        assert_eq!(interface.name.as_ref(), Some(&veths[at].right.name));
        assert_eq!(interface.filter.as_deref(), Some("dst port 2000"));
        let mine = contents.packets.iter().filter(|packet| packet.interface == at as u32);
        let sources = mine.map(|packet| template(0).stamp(&packet.data).source);
        assert!(sources.clone().all(|source| source == 101 * at as u64));
        assert_eq!(sources.count() as u64, arrived);
    }
}

/// What must be true of the files of a capture that rotates; gives their contents.
fn check_rotation(folder: &Path, summary: &Summary) -> Vec<Contents> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let segments = summary.segments();
    let said = segments.iter().map(|segment| PathBuf::from(segment["path"].as_str().unwrap()));
    assert!(names.iter().eq(&said.collect::<Vec<_>>()), "{names:?}: {summary:?}");
    for (at, name) in names.iter().enumerate() {
        let want = format!("cap_{:05}.pcapng", at + 1);
        assert_eq!(name.file_name().unwrap().to_str(), Some(want.as_str()));
    }
    let contents: Vec<_> = names.iter().map(|name| accepted(name)).collect();
    for (at, (contents, segment)) in contents.iter().zip(segments).enumerate() {
        let packets = contents.packets.len() as u64;
        assert_eq!(packets, number(&segment["packets"]));
        // The last file's statistics are the whole job's.
        let last = at + 1 == segments.len();
        let delivered = if last { summary.written() } else { packets };
        assert_eq!(contents.statistics().delivered, Some(delivered));
    }
    let packets: usize = contents.iter().map(|contents| contents.packets.len()).sum();
    assert_eq!(packets as u64, summary.written());
    contents
}

#[test]
fn rotation_by_bytes_keeps_each_file_whole_and_within_its_size() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("cap.pcapng");
    let flags = [&ROOMY as &[_], &["--rotate-bytes", "256K"]].concat();
    let capture = Capture::start(exclusive(&veth.right, &file, &flags));
    let template = Template { length: 1000, ..Template::default() };
    let generator = Generator::new(&veth.left, template.clone()).pinned(0);
    let began = SystemTime::now();
    generator.send_paced(10_000, SECOND / 5);
    let arrived = veth.settle(2000);
    let summary = capture.stop().success();

    assert_eq!((summary.hits(), summary.dropped()), (arrived, 0));
    let files = check_rotation(folder.path(), &summary);
    assert!(files.len() >= 8, "{} files for 2 MB", files.len());
    for segment in summary.segments() {
        let size = fs::metadata(segment["path"].as_str().unwrap()).unwrap().len();
        assert_eq!(size, number(&segment["size"]));
        assert!(size <= 256 * 1024, "{size}");
    }
    let last = files.last().unwrap().statistics();
    assert_eq!(last.accepted, Some(arrived), "the last file has the job's totals");
    let packets = files.into_iter().flat_map(|contents| contents.packets).collect();
    let all = Contents { packets, ..Contents::default() };
    check_packets(&all, &template, [began, SystemTime::now()]);
}

#[test]
fn rotation_by_time_keeps_each_file_whole() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("cap.pcapng");
    let flags = [&ROOMY as &[_], &["--rotate-every", "300ms"]].concat();
    let capture = Capture::start(exclusive(&veth.right, &file, &flags));
    let generator = Generator::new(&veth.left, Template::default()).pinned(0);
    let sent = generator.send_paced(2000, 3 * SECOND / 2);
    let arrived = veth.settle(sent);
    let summary = capture.stop().success();

    assert_eq!((summary.hits(), summary.dropped()), (arrived, 0));
    let files = check_rotation(folder.path(), &summary);
    assert!((3..=8).contains(&files.len()), "{} files in 1.5 s", files.len());
}

/// Scheduling policies of a process's threads, by name.
/// <https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html>
fn policies(capture: &Capture) -> Vec<(String, String)> {
    let threads = fs::read_dir(format!("/proc/{}/task", capture.pid())).unwrap();
    let policy = |thread: std::io::Result<fs::DirEntry>| {
        let stat = fs::read_to_string(thread.unwrap().path().join("stat")).unwrap();
        let (front, back) = stat.rsplit_once(") ").unwrap();
        let name = front.split_once('(').unwrap().1.to_owned();
        (name, back.split(' ').nth(38).unwrap().to_owned())
    };
    threads.map(policy).collect()
}

#[test]
fn workers_and_they_alone_are_real_time_threads_where_it_is_asked_for() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    for (round, flag, policy) in [(1, None, SCHED_OTHER), (2, Some("--realtime"), SCHED_FIFO)] {
        let file = folder.path().join(format!("{policy}.pcapng"));
        let flags: Vec<_> = ROOMY.into_iter().chain(flag).collect();
        let capture = Capture::start(exclusive(&veth.right, &file, &flags));
        Generator::new(&veth.left, Template::default()).send(1000);
        // The kernel keeps 15 bytes of a name.
        let start: String = format!("tl-{}", veth.right.name).chars().take(15).collect();
        let (workers, others): (Vec<_>, Vec<_>) =
            policies(&capture).into_iter().partition(|(name, _)| name.starts_with(&start));
        assert_eq!(workers.len(), 1, "{workers:?} {others:?}");
        assert_eq!(workers[0].1, policy.to_string());
        assert!(others.iter().all(|(_, policy)| policy == "0"), "{others:?}");
        veth.settle(round * 1000);
        let summary = capture.stop().success();
        let contents = accepted(&file);
        check_statistics(&contents, &summary);
        assert_eq!(contents.packets.len(), 1000);
    }
}

#[test]
fn a_snaplen_cuts_packets_and_keeps_their_length_on_the_wire() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("short.pcapng");
    let flags = [&ROOMY as &[_], &["--snaplen", "99"]].concat();
    let capture = Capture::start(exclusive(&veth.right, &file, &flags));
    let templates =
        [60, 98, 99, 100, 1500].map(|length| Template { length, ..Template::default() });
    for template in &templates {
        Generator::new(&veth.left, template.clone()).send(10);
    }
    veth.settle(50);
    let summary = capture.stop().success();

    let contents = accepted(&file);
    check_statistics(&contents, &summary);
    assert_eq!(contents.interfaces[0].snaplen, 99);
    assert_eq!(contents.packets.len(), 50);
    for (packet, template) in contents.packets.iter().zip(templates.iter().flat_map(|t| [t; 10])) {
        let frame = template.expected(template.stamp(&packet.data));
        assert_eq!(packet.original_len as usize, template.length);
        assert_eq!(packet.data, frame[..template.length.min(99)]);
    }
    assert_eq!(summary.0["law"]["hits"]["bytes"], 10 * (60 + 98 + 99 + 100 + 1500));
}

#[test]
fn one_in_ten_is_about_a_tenth() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("sampled.pcapng");
    let flags = [&ROOMY as &[_], &["--sample", "10"]].concat();
    let capture = Capture::start(exclusive(&veth.right, &file, &flags));
    let generator = Generator::new(&veth.left, Template::default()).pinned(0);
    let arrived = veth.settle(generator.send_paced(80_000, SECOND / 2));
    let summary = capture.stop().success();

    assert_eq!((summary.seen(), summary.dropped()), (arrived, 0));
    assert_eq!(summary.written(), counted(&file));
    // Six standard deviations of a binomial distribution: once in 500 million runs.
    let expected = arrived / 10;
    let tolerance = 6 * (arrived * 9 / 100).isqrt();
    let range = expected - tolerance..=expected + tolerance;
    assert!(range.contains(&summary.hits()), "{} is not in {range:?}", summary.hits());
    let left_out = &summary.interfaces()[0]["outcomes"];
    let left_out = left_out.as_array().unwrap().iter().find(|pair| pair[0] == "sampled_out");
    assert_eq!(number(&left_out.unwrap()[1]), arrived - summary.hits());
}

#[test]
fn each_filter_flag_takes_just_what_it_names() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let near = [ip("10.0.0.1"), ip("10.0.255.2")];
    let far = ip("192.0.2.3");
    let six = [ip("2001:db8::1"), ip("2001:db8:ff::2")];
    let frames = [
        Frame::new().ip(near[0], near[1]).udp(1000, 53),
        Frame::new().ip(near[1], near[0]).tcp(53, 1000),
        Frame::new().ip(far, near[0]).udp(1000, 443),
        Frame::new().ip(six[0], six[1]).udp(1000, 53),
        Frame::new().ip(six[1], six[0]).tcp(443, 1000),
        Frame::new().ip(near[0], far).protocol(1, &[8, 0, 0, 0, 0, 0, 0, 0]),
        Frame::new().ip(six[0], six[1]).protocol(58, &[128, 0, 0, 0, 0, 0, 0, 0]),
        Frame::new().vlan(QINQ).vlan(VLAN).ip(near[0], near[1]).udp(1000, 53),
        Frame::new().ethertype(0x0806, &[0; 28]),
    ]
    .map(|frame| frame.fill(100).build());
    let folder = tempdir().unwrap();
    let file = folder.path().join("filtered.pcapng");
    let udp = "(ip proto 17 or ip6 proto 17)";
    let cases = [
        ("", "", &[0_usize, 1, 2, 3, 4, 5, 6, 7, 8] as &[_]),
        ("--src 10.0.0.1", "src host 10.0.0.1", &[0, 5, 7]),
        ("--src 10.0.0.0/16", "src net 10.0.0.0/16", &[0, 1, 5, 7]),
        ("--src 0.0.0.0/0", "src net 0.0.0.0/0", &[0, 1, 2, 5, 7]),
        ("--dst 10.0.255.2/17", "dst net 10.0.128.0/17", &[0, 7]),
        ("--src 2001:db8::/33", "src net 2001:db8::/33", &[3, 4, 6]),
        ("--dst 2001:db8::1", "dst host 2001:db8::1", &[4]),
        ("--sport 1000", "src port 1000", &[0, 2, 3, 7]),
        ("--dport 53 --proto udp", &format!("dst port 53 and {udp}"), &[0, 3, 7]),
        ("--proto icmp6", "(ip proto 58 or ip6 proto 58)", &[6]),
        (
            "--src 10.0.0.0/8 --dst 10.0.0.0/8 --sport 1000 --dport 53 --proto 17",
            &format!(
                "src net 10.0.0.0/8 and dst net 10.0.0.0/8 and src port 1000 and dst port 53 and {udp}"
            ),
            &[0, 7],
        ),
        ("--src 198.51.100.0/24", "src net 198.51.100.0/24", &[]),
    ];
    for (round, (flags, filter, want)) in cases.into_iter().enumerate() {
        let flags: Vec<_> = flags.split_ascii_whitespace().collect();
        let capture = Capture::start(exclusive(&veth.right, &file, &flags));
        inject(&veth, &frames, round);
        let summary = capture.stop().success();
        let contents = read(&file);
        let taken: Vec<_> = contents
            .packets
            .iter()
            .map(|packet| frames.iter().position(|frame| *frame == packet.data).unwrap())
            .collect();
        assert_eq!(taken, want, "{flags:?}");
        assert_eq!(summary.seen(), frames.len() as u64, "{flags:?}");
        assert_eq!(contents.interfaces[0].filter.as_deref().unwrap_or_default(), filter);
    }
}

#[test]
fn what_a_full_ring_loses_is_counted_under_its_cause() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options { queues: 2, ..Options::default() });
    let folder = tempdir().unwrap();
    let mut before = 0;
    for (round, (xdp, frames)) in
        [("native", "128"), ("native", "1024"), ("generic", "128")].into_iter().enumerate()
    {
        let file = folder.path().join("lossy.pcapng");
        let flags = ["--xdp", xdp, "--ring-size", "64", "--umem-frames", frames];
        let capture = Capture::start(exclusive(&veth.right, &file, &flags));
        // While the reader is stopped, the rings fill up.
        capture.signal(Signal::SIGSTOP);
        for cpu in 0..2 {
            let generator = Generator::new(&veth.left, Template::default()).pinned(cpu);
            generator.send_paced(10_000, SECOND / 10);
        }
        let now = veth.settle(2000 * (round as u64 + 1));
        let arrived = now - before;
        before = now;
        capture.signal(Signal::SIGCONT);
        let summary = capture.stop().success();

        let case = format!("{xdp}, {frames} frames: {summary:?}");
        assert_eq!(summary.hits(), arrived, "{case}");
        assert!(summary.written() >= 64, "{case}");
        let counted_by_cause =
            summary.dropped_by("rx_ring_full") + summary.dropped_by("rx_dropped");
        assert_eq!(counted_by_cause, arrived - summary.written(), "{case}");
        check_statistics(&accepted(&file), &summary);
    }
}

#[test]
fn an_interface_may_be_down_at_first_and_go_down_meanwhile() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("flap.pcapng");
    let name = &veth.right.name;
    let set = |state| right.run(&["ip", "link", "set", name, state]);
    set("down");
    let capture = Capture::start(exclusive(&veth.right, &file, &ROOMY));
    let warning = format!("{name} is down: packets come once it is up");
    assert!(capture.said().contains(&warning), "{}", capture.said());
    let generator = Generator::new(&veth.left, Template::default());
    for round in 1..=2 {
        set("up");
        generator.send(100);
        veth.settle(100 * round);
        set("down");
    }
    let arrived = veth.settle(200);
    let summary = capture.stop().success();
    assert!(arrived > 100, "both rounds arrive: {arrived}");
    assert_eq!((summary.hits(), summary.written()), (arrived, arrived));
}
