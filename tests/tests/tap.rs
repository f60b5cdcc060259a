//! End to end on the `tap` path: what both directions hold, at every hook, and what is counted when
//! not all of it can be kept.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::net::UnixStream,
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use capture_user::{
    engine::{
        CapturePath, Engine, EngineConfig, InterfaceConfig, Job, JobSpec, MIN_BUFFER,
        Summary as Ended,
    },
    filter::Filter,
    segment::Target,
};
use nix::{
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use tapline_tests::{
    capture::{Capture, Summary, command, exclusive, number},
    frames::{Frame, OLD_QINQ, QINQ, VLAN},
    generator::{Generator, Template},
    inject::Injector,
    netns::{Namespace, unique_name},
    pcapng::{Contents, Packet, accepted, read},
    privilege::{require, test_name},
    privileged,
    process::{tool, wait_until},
    tap::{attached, cpu_time, tap, wait_until_refused},
    veth::{End, Options, Veth},
};
use tempfile::tempdir;

const SECOND: Duration = Duration::from_secs(1);

/// Directions, in `epb_flags`.
const IN: u32 = 1;
const OUT: u32 = 2;

const LEFT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const RIGHT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

/// Of no protocol that tshark looks into.
const PORT: u16 = 29_999;

/// Rings and buffers that hold all that these tests send, so that nothing is lost however late the
/// readers get to run.
const ROOMY: [&str; 4] = ["--bpf-ring-size", "64M", "--buffers", "64"];

/// A UDP frame that tells one from another.
fn frame(number: u16, length: usize) -> Vec<u8> {
    Frame::new().ipv4(LEFT, RIGHT).udp(20_000 + number, PORT).fill(length).build()
}

/// Packets of one direction, oldest first. Each CPU's packets come to the file a buffer at a time.
fn packets(contents: &Contents, direction: u32) -> Vec<&Packet> {
    let mut packets: Vec<_> =
        contents.packets.iter().filter(|packet| packet.direction() == Some(direction)).collect();
    packets.sort_by_key(|packet| packet.time);
    packets
}

fn frames(contents: &Contents, direction: u32) -> Vec<Vec<u8>> {
    let packets = packets(contents, direction);
    for packet in &packets {
        assert_eq!(packet.original_len as usize, packet.data.len(), "whole");
    }
    packets.into_iter().map(|packet| packet.data.clone()).collect()
}

/// Checks that the law in the file is the one in the summary; that each adds up has been checked.
fn check_law(contents: &Contents, summary: &Summary) {
    let statistics = contents.statistics();
    assert_eq!(statistics.received, Some(summary.seen()));
    assert_eq!(statistics.accepted, Some(summary.hits()));
    assert_eq!(statistics.delivered, Some(summary.written()));
    assert_eq!(statistics.os_dropped, Some(summary.dropped()));
    assert_eq!(statistics.interface_dropped, Some(0));
    assert_eq!(contents.packets.len() as u64, summary.written());
    let bytes: u64 = contents.packets.iter().map(|packet| packet.data.len() as u64).sum();
    assert_eq!(bytes, summary.written_bytes());
}

/// Sends frames both ways, told apart by their length; gives those that come in and go out at the
/// right end.
fn both_ways(veth: &Veth<'_>, count: u16) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let (mut outside, mut inside) = (Injector::new(&veth.left), Injector::new(&veth.right));
    let mut sent = (Vec::new(), Vec::new());
    for number in 0..count {
        sent.0.push(frame(number, 60 + usize::from(number % 1400)));
        outside.send(sent.0.last().unwrap());
        sent.1.push(frame(number, 61 + usize::from(number % 1400)));
        inside.send(sent.1.last().unwrap());
    }
    wait_until_refused(&veth.right, count.into());
    sent
}

#[test]
fn without_a_flag_both_directions_are_captured_and_told_apart() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("both.pcapng");

    let capture = Capture::start(tap(&veth.right, &file, &[]));
    assert_eq!(attached(&veth.right), ["tcx/ingress tap_ingress", "tcx/egress tap_egress"]);
    let (received, sent) = both_ways(&veth, 300);
    let summary = capture.stop().success();

    assert_eq!(attached(&veth.right), [""; 0], "nothing stays");
    let interface = &summary.interfaces()[0];
    assert_eq!((&interface["mode"], &interface["hook"]), (&"tap".into(), &"tcx".into()));
    assert_eq!((summary.seen(), summary.hits(), summary.written()), (600, 600, 600));
    let contents = accepted(&file);
    check_law(&contents, &summary);
    assert_eq!(frames(&contents, IN), received);
    assert_eq!(frames(&contents, OUT), sent);
}

#[test]
fn each_direction_can_be_had_alone_and_captures_side_by_side_see_the_same() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = |name| folder.path().join(name);

    let start = |name| Capture::spawn(tap(&veth.right, &file(name), &["--direction", name]));
    let mut captures = ["in", "out", "both"].map(start);
    captures.iter_mut().for_each(Capture::wait_until_ready);
    let programs = attached(&veth.right);
    assert_eq!(programs.iter().filter(|program| program.starts_with("tcx/ingress")).count(), 2);
    assert_eq!(programs.iter().filter(|program| program.starts_with("tcx/egress")).count(), 2);
    let (received, sent) = both_ways(&veth, 200);
    let summaries = captures.map(|capture| capture.stop().success());

    let none = Vec::<Vec<u8>>::new();
    for (at, (name, incoming, outgoing)) in
        [("in", &received, &none), ("out", &none, &sent), ("both", &received, &sent)]
            .into_iter()
            .enumerate()
    {
        let contents = accepted(&file(name));
        check_law(&contents, &summaries[at]);
        assert_eq!(frames(&contents, IN), *incoming, "{name}");
        assert_eq!(frames(&contents, OUT), *outgoing, "{name}");
        let all = (incoming.len() + outgoing.len()) as u64;
        assert_eq!((summaries[at].seen(), summaries[at].hits()), (all, all), "{name}");
    }
}

#[test]
fn every_hook_captures_the_same_packets() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = |name| folder.path().join(name);

    let hooks = ["tcx", "tc", "xdp"];
    let start = |name| Capture::spawn(tap(&veth.right, &file(name), &["--tap-hook", name]));
    let mut captures = hooks.map(start);
    captures.iter_mut().for_each(Capture::wait_until_ready);
    let mut programs = attached(&veth.right);
    programs.sort();
    let expected = [
        "tc/egress tap_egress",
        "tc/ingress tap_ingress",
        "tcx/egress tap_egress",
        "tcx/egress tap_egress",
        "tcx/ingress tap_ingress",
        "xdp tap_xdp",
    ];
    assert_eq!(programs, expected);
    let (received, sent) = both_ways(&veth, 200);
    let summaries = captures.map(|capture| capture.stop().success());

    assert_eq!(attached(&veth.right), [""; 0], "nothing stays");
    for (name, summary) in hooks.iter().zip(&summaries) {
        let contents = accepted(&file(name));
        check_law(&contents, summary);
        assert_eq!(summary.interfaces()[0]["hook"], **name);
        assert_eq!(frames(&contents, IN), received, "{name}");
        assert_eq!(frames(&contents, OUT), sent, "{name}");
    }
    assert_eq!(summaries[2].interfaces()[0]["xdp"], "native");
}

#[test]
fn the_xdp_hook_is_never_taken_from_another_program_and_tcx_works_beside_it() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = |name| folder.path().join(name);

    // The holder asks for what nobody sends, so it passes everything on.
    let holder = Capture::start(exclusive(&veth.right, &file("holder"), &["--dport", "9"]));
    let refused = Capture::spawn(tap(&veth.right, &file("refused"), &["--tap-hook", "xdp"])).wait();
    let words = format!("{} already runs the XDP program `exclusive_copy`", veth.right.name);
    assert!(refused.failure().contains(&words), "{}", refused.stderr);
    let mut beside = ["auto", "tcx"]
        .map(|hook| Capture::spawn(tap(&veth.right, &file(hook), &["--tap-hook", hook])));
    beside.iter_mut().for_each(Capture::wait_until_ready);
    assert!(attached(&veth.right).contains(&"xdp exclusive_copy".into()));

    let (received, sent) = both_ways(&veth, 100);
    assert_eq!(holder.stop().success().hits(), 0);
    for (capture, hook) in beside.into_iter().zip(["auto", "tcx"]) {
        let summary = capture.stop().success();
        assert_eq!(summary.interfaces()[0]["hook"], "tcx");
        let contents = accepted(&file(hook));
        assert_eq!(frames(&contents, IN), received, "{hook}");
        assert_eq!(frames(&contents, OUT), sent, "{hook}");
    }
    assert_eq!(attached(&veth.right), [""; 0], "nothing stays");
}

/// Random bytes over TCP both ways at once, no faster than the slowest machine can capture it.
fn converse(veth: &Veth<'_>, up: &[u8], down: &[u8]) {
    const CHUNK: usize = 256 * 1024;
    const PAUSE: Duration = Duration::from_millis(20);
    fn exchange(mut stream: &TcpStream, send: &[u8]) -> Vec<u8> {
        thread::scope(|scope| {
            let reader = scope.spawn(move || {
                let (mut stream, mut received) = (stream, Vec::new());
                stream.read_to_end(&mut received).unwrap();
                received
            });
            for chunk in send.chunks(CHUNK) {
                stream.write_all(chunk).unwrap();
                thread::sleep(PAUSE);
            }
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            reader.join().unwrap()
        })
    }
    let address = SocketAddr::from((RIGHT, 4000));
    let listener = veth.right.namespace.enter(|| TcpListener::bind(address).unwrap());
    thread::scope(|scope| {
        let server = scope.spawn(|| exchange(&listener.accept().unwrap().0, down));
        let client = veth.left.namespace.enter(|| TcpStream::connect(address).unwrap());
        let arrived = exchange(&client, up);
        assert!(arrived == down, "{} bytes of {}", arrived.len(), down.len());
        let arrived = server.join().unwrap();
        assert!(arrived == up, "{} bytes of {}", arrived.len(), up.len());
    });
}

/// Both sides of the only TCP stream, the client's first, as tshark puts them together.
fn followed(file: &str) -> [Vec<u8>; 2] {
    let text = tool(&["tshark", "-n", "-q", "-r", file, "-z", "follow,tcp,raw,0"]);
    let mut sides = [Vec::new(), Vec::new()];
    let lines = text.lines().skip_while(|line| !line.starts_with("Node 1:")).skip(1);
    for line in lines.take_while(|line| !line.starts_with("===")) {
        // The other side's lines are indented.
        let side = &mut sides[usize::from(line.starts_with('\t'))];
        let (pairs, _) = line.trim_start().as_bytes().as_chunks::<2>();
        let digit = |digit: u8| char::from(digit).to_digit(16).unwrap() as u8;
        side.extend(pairs.iter().map(|[high, low]| digit(*high) << 4 | digit(*low)));
    }
    sides
}

#[test]
fn a_tcp_conversation_is_complete_with_super_packets_whole() {
    const SNAPLEN: usize = 100;
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    veth.left.add_address("10.0.0.1/24");
    veth.right.add_address("10.0.0.2/24");
    let folder = tempdir().unwrap();
    let file = |name| folder.path().join(name);
    let mut rng = fastrand::Rng::with_seed(3);
    let mut random = |length| (0..length).map(|_| rng.u8(..)).collect::<Vec<_>>();
    let (up, down) = (random(6_000_000), random(4_000_000));

    let mut whole = Capture::spawn(tap(&veth.right, &file("whole"), &ROOMY));
    let snaplen = SNAPLEN.to_string();
    let mut cut = Capture::spawn(tap(&veth.right, &file("cut"), &["--snaplen", &snaplen]));
    whole.wait_until_ready();
    cut.wait_until_ready();
    converse(&veth, &up, &down);
    let [whole, cut] = [whole, cut].map(|capture| capture.stop().success());
    assert_eq!((whole.dropped(), cut.dropped()), (0, 0));

    let contents = accepted(&file("whole"));
    check_law(&contents, &whole);
    for direction in [IN, OUT] {
        let longer_than_mtu = packets(&contents, direction)
            .iter()
            .filter(|packet| packet.data.len() > 1514)
            .inspect(|packet| assert_eq!(packet.data.len(), packet.original_len as usize))
            .count();
        assert!(longer_than_mtu > 0, "direction {direction}");
    }

    // The other capture began and ended with other packets (ARP), but shared the conversation.
    let short = accepted(&file("cut"));
    let tcp = |contents: &Contents, direction| -> Vec<(u32, Vec<u8>)> {
        let tcp = |packet: &&&Packet| packet.data[12..14] == [8, 0] && packet.data[23] == 6;
        let packets = packets(contents, direction);
        let cut = |packet: &&Packet| {
            let kept = packet.data.len().min(SNAPLEN);
            (packet.original_len, packet.data[..kept].to_vec())
        };
        let mut packets: Vec<_> = packets.iter().filter(tcp).map(cut).collect();
        // Two that two CPUs have at the same moment may each be the first, in one capture or the other.
        packets.sort();
        packets
    };
    assert_eq!(short.interfaces[0].snaplen as usize, SNAPLEN);
    assert!(short.packets.iter().all(|packet| packet.data.len() <= SNAPLEN));
    for direction in [IN, OUT] {
        assert_eq!(tcp(&contents, direction), tcp(&short, direction), "direction {direction}");
    }

    let whole = file("whole");
    let path = whole.to_str().unwrap();
    let lost = "tcp.analysis.lost_segment || tcp.analysis.ack_lost_segment";
    assert_eq!(tool(&["tshark", "-n", "-r", path, "-Y", lost]), "");
    // What the network card would have completed is kept as it was, and the file says so.
    let unfinished =
        ["-o", "tcp.check_checksum:TRUE", "-Y", "tcp.checksum.status == 0 && ip.src == 10.0.0.2"];
    assert_ne!(tool(&[&["tshark", "-n", "-r", path][..], &unfinished].concat()), "");
    let said = b"sent packets may have unfinished checksums";
    let bytes = fs::read(path).unwrap();
    assert!(bytes.windows(said.len()).any(|window| window == said));
    let [from_client, from_server] = followed(path);
    assert!(from_client == up, "{} bytes of {}", from_client.len(), up.len());
    assert!(from_server == down, "{} bytes of {}", from_server.len(), down.len());
}

#[test]
fn vlan_tags_that_the_kernel_keeps_aside_stand_in_the_file_where_they_stood() {
    privileged!();
    let (left, right, far) = (Namespace::new(), Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let behind = Veth::new(&right, &far);
    let folder = tempdir().unwrap();
    let file = |name| folder.path().join(name);
    let tags: [&[u16]; 7] =
        [&[], &[VLAN], &[QINQ], &[QINQ, VLAN], &[VLAN, VLAN], &[OLD_QINQ], &[VLAN, VLAN, VLAN]];
    let frames_sent: Vec<_> = tags
        .iter()
        .map(|tags| {
            let frame = tags.iter().fold(Frame::new(), |frame, tpid| frame.vlan(*tpid));
            frame.ipv4(LEFT, RIGHT).udp(1, PORT).fill(200).build()
        })
        .collect();
    // What comes in goes out again next door, with its tag still aside.
    right.run(&["tc", "qdisc", "add", "dev", &veth.right.name, "clsact"]);
    let redirect = ["action", "mirred", "egress", "redirect", "dev", &behind.left.name];
    let all = ["protocol", "all", "u32", "match", "u32", "0", "0"];
    let filter = ["tc", "filter", "add", "dev", &veth.right.name, "ingress"];
    right.run(&[&filter[..], &all, &redirect].concat());

    let port = PORT.to_string();
    let starts: [(&str, &End<'_>, &[&str]); 6] = [
        ("in", &veth.right, &[]),
        ("out", &behind.left, &[]),
        ("filter in", &veth.right, &["--dport", &port]),
        ("filter out", &behind.left, &["--dport", &port]),
        ("snaplen 15", &veth.right, &["--snaplen", "15"]),
        ("snaplen 8", &veth.right, &["--snaplen", "8"]),
    ];
    let mut captures = starts.map(|(name, end, args)| Capture::spawn(tap(end, &file(name), args)));
    captures.iter_mut().for_each(Capture::wait_until_ready);
    let mut injector = Injector::new(&veth.left);
    for frame in &frames_sent {
        injector.send(frame);
    }
    wait_until_refused(&behind.right, frames_sent.len() as u64);
    let [incoming, outgoing, some_in, some_out, fifteen, eight] =
        captures.map(|capture| capture.stop().success());

    let bytes: usize = frames_sent.iter().map(Vec::len).sum();
    for (name, summary, direction) in [("in", &incoming, IN), ("out", &outgoing, OUT)] {
        let contents = accepted(&file(name));
        check_law(&contents, summary);
        assert_eq!(frames(&contents, direction), frames_sent, "{name}");
        assert_eq!(number(&summary.0["law"]["hits"]["bytes"]), bytes as u64, "{name}");
    }
    // Behind a third tag nothing is known, wherever the first is kept.
    for (name, summary, direction) in [("filter in", some_in, IN), ("filter out", some_out, OUT)] {
        assert_eq!(frames(&accepted(&file(name)), direction), frames_sent[..6], "{name}");
        assert_eq!(summary.seen(), 7);
    }
    for (name, summary, snaplen) in [("snaplen 15", fifteen, 15), ("snaplen 8", eight, 8)] {
        let contents = read(&file(name));
        check_law(&contents, &summary);
        let cut: Vec<_> = packets(&contents, IN)
            .iter()
            .map(|packet| (packet.original_len as usize, packet.data.clone()))
            .collect();
        let expected: Vec<_> =
            frames_sent.iter().map(|frame| (frame.len(), frame[..snaplen].to_vec())).collect();
        assert_eq!(cut, expected, "{name}");
    }
    let name = file("in");
    let ids =
        tool(&["tshark", "-n", "-r", name.to_str().unwrap(), "-T", "fields", "-e", "vlan.id"]);
    let ids: Vec<_> =
        ids.lines().map(|line| line.split(',').filter(|id| *id == "7").count()).collect();
    // Frame::vlan numbers every VLAN 7; to tshark a lone provider's tag is one of another kind.
    assert_eq!((ids[0], ids[1], ids[4]), (0, 1, 2));
}

/// One of the host's IP counters.
pub(crate) fn ip_counter(namespace: &Namespace, name: &str) -> u64 {
    let text = namespace.enter(|| fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Ip: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|known| known == name).unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}

#[test]
fn what_a_slow_disk_and_a_stopped_reader_lose_is_counted_and_the_host_gets_everything() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    // Frames that are addressed to this host.
    let address = ["address", "02:00:00:00:00:02"];
    right.run(&[&["ip", "link", "set", "dev", &veth.right.name], &address[..]].concat());
    veth.right.add_address("10.0.0.2/24");
    let template = Template { length: 500, ..Template::default() };
    let _receiver = right.enter(|| UdpSocket::bind((RIGHT, template.dport)).unwrap());
    let generator = Generator::new(&veth.left, template.clone());
    let folder = tempdir().unwrap();
    let (fifo, file) = (folder.path().join("fifo"), folder.path().join("read"));
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();

    let (done, slow) = (AtomicBool::new(false), Duration::from_millis(20));
    let (sent, summary) = thread::scope(|scope| {
        scope.spawn(|| {
            let (mut from, mut to) = (File::open(&fifo).unwrap(), File::create(&file).unwrap());
            let mut bytes = vec![0; 32 * 1024];
            loop {
                match from.read(&mut bytes).unwrap() {
                    0 => return,
                    length => to.write_all(&bytes[..length]).unwrap(),
                }
                if !done.load(Relaxed) {
                    thread::sleep(slow);
                }
            }
        });
        let tiny = ["--bpf-ring-size", "1M", "--buffers", "2", "--buffer-size", "128K"];
        let capture = Capture::start(tap(&veth.right, &fifo, &tiny));
        // A megabyte a second can be written, and fifty come.
        let mut sent = generator.send_paced(100_000, SECOND / 2);
        capture.signal(Signal::SIGSTOP);
        sent += generator.send_paced(100_000, SECOND / 2);
        capture.signal(Signal::SIGCONT);
        sent += generator.send_paced(100_000, SECOND / 10);
        let arrived = veth.settle(sent);
        wait_until("the host's own stack", SECOND * 10, || {
            ip_counter(&right, "InDelivers") >= arrived
        });
        done.store(true, Relaxed);
        (arrived, capture.stop().success())
    });

    assert_eq!((summary.seen(), summary.hits()), (sent, sent));
    assert_eq!(ip_counter(&right, "InDelivers"), sent, "the host got everything");
    let [ring, buffer] = ["bpf_ring_full", "buffer_full"].map(|cause| summary.dropped_by(cause));
    println!("{sent} hits = {} written + {ring} ring + {buffer} buffer", summary.written());
    assert!(ring > 0 && summary.written() > 0);
    // What no buffer is free for stays on the ring, and what the ring has no room for is not copied.
    assert_eq!((buffer, ring), (0, summary.dropped()), "no other cause");
    let contents = read(&file);
    check_law(&contents, &summary);
    let mut stamps = BTreeSet::new();
    for packet in &contents.packets {
        let stamp = template.stamp(&packet.data);
        assert_eq!(packet.data, template.expected(stamp));
        assert!(stamps.insert((stamp.source, stamp.sequence)), "{stamp:?} twice");
    }
}

#[test]
fn packets_of_two_cpus_are_each_in_the_file_once_and_in_the_order_of_time() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options { queues: 2, ..Options::default() });
    let folder = tempdir().unwrap();
    let file = folder.path().join("file");
    let template = Template { length: 200, ..Template::default() };
    let generators = [0, 1].map(|cpu| Generator::new(&veth.left, template.clone()).pinned(cpu));
    let capture = Capture::start(tap(&veth.right, &file, &ROOMY));
    let sent: u64 = thread::scope(|scope| {
        let send =
            |generator| scope.spawn(move || Generator::send_paced(generator, 50_000, SECOND));
        generators.each_ref().map(send).map(|sending| sending.join().unwrap()).iter().sum()
    });
    let arrived = veth.settle(sent);
    let summary = capture.stop().success();
    assert_eq!((summary.hits(), summary.written(), summary.dropped()), (arrived, arrived, 0));
    // Looks at the order, too.
    let contents = accepted(&file);
    check_law(&contents, &summary);
    let mut stamps = BTreeMap::new();
    for packet in &contents.packets {
        let stamp = template.stamp(&packet.data);
        let before = stamps.insert((stamp.source, stamp.sequence), packet.queue);
        assert_eq!(before, None, "{stamp:?} twice");
    }
    assert_eq!(stamps.len() as u64, arrived);
    let cpus: BTreeSet<_> = stamps.values().copied().collect();
    assert_eq!(cpus, BTreeSet::from([Some(0), Some(1)]), "each says which CPU it came on");
}

#[test]
fn a_job_whose_output_stands_still_loses_its_own_packets_and_no_other_jobs() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let template = Template { length: 500, ..Template::default() };
    let generator = Generator::new(&veth.left, template.clone());
    let interface = InterfaceConfig {
        name: veth.right.name.clone(),
        path: CapturePath::TAP,
        promiscuous: false,
    };
    let config = EngineConfig { interfaces: vec![interface], ..EngineConfig::default() };
    let engine = right.enter(|| Engine::open(&config).unwrap());
    let (output, mut reader) = UnixStream::pair().unwrap();
    let stuck = JobSpec {
        buffers: 2,
        buffer_size: MIN_BUFFER,
        ..JobSpec::new(Target::Stream(Box::new(output)))
    };
    let stuck = engine.start(stuck).unwrap();
    let free = engine.start(JobSpec::new(Target::File(folder.path().join("free")))).unwrap();
    let sent = generator.send_paced(100_000, SECOND / 2);
    assert_eq!(veth.settle(sent), sent);
    stuck.stop();
    free.stop();
    let mut bytes = Vec::new();
    let [stuck, free] = thread::scope(|scope| {
        scope.spawn(|| reader.read_to_end(&mut bytes).unwrap());
        [stuck, free].map(|job| job.wait_for(SECOND * 20).unwrap().law)
    });
    drop(engine);
    assert!(stuck.holds() && free.holds(), "{stuck:?} {free:?}");
    assert_eq!((stuck.hits.packets, free.hits.packets), (sent, sent));
    assert_eq!((free.written.packets, free.drops.total()), (sent, 0));
    assert!(stuck.drops.buffer_full > 0, "{stuck:?}");
    assert_eq!(stuck.drops.buffer_full, stuck.drops.total(), "no other cause");
    assert_eq!(accepted(&folder.path().join("free")).packets.len() as u64, sent);
    let file = folder.path().join("stuck");
    fs::write(&file, &bytes).unwrap();
    let written = accepted(&file).packets.len() as u64;
    assert!(written > 0 && written == stuck.written.packets, "{written} packets, {stuck:?}");
}

#[test]
fn limits_are_exact_under_load() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options { queues: 2, ..Options::default() });
    let folder = tempdir().unwrap();
    let file = |name| folder.path().join(name);
    let template = Template { length: 300, ..Template::default() };
    let generators = [0, 1].map(|cpu| Generator::new(&veth.left, template.clone()).pinned(cpu));
    let limits = [("packets", "1000"), ("bytes", "100000"), ("packets", "1")];
    let mut captures = limits.map(|(what, limit)| {
        Capture::spawn(tap(&veth.right, &file(limit), &[&format!("--{what}"), limit]))
    });
    captures.iter_mut().for_each(Capture::wait_until_ready);
    // Both CPUs' packets race for what is left.
    thread::scope(|scope| {
        for generator in &generators {
            scope.spawn(|| generator.flood(SECOND / 4));
        }
    });
    for (capture, (what, limit)) in captures.into_iter().zip(limits) {
        let summary = capture.wait().success();
        assert_eq!(summary.ending(), "limit");
        let limit_number: u64 = limit.parse().unwrap();
        if what == "packets" {
            assert_eq!(summary.written(), limit_number);
        } else {
            // Never above; what is left may be too little for a packet.
            let least = limit_number - 3 * template.length as u64;
            assert!((least..=limit_number).contains(&summary.written_bytes()), "{summary:?}");
        }
        check_law(&read(&file(limit)), &summary);
    }
}

/// A job of the engine's test: one flow of those that the generator sends.
struct Flow {
    job: Job,
    /// Which.
    number: u64,
    /// Frames that had been sent before it was started.
    before: u64,
    /// Frames that had been sent when it was told to end.
    after: u64,
}

#[test]
fn jobs_that_start_and_end_disturb_no_other_and_share_programs_and_rings() {
    const FLOWS: u32 = 16;
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let template = Template { length: 100, flows: FLOWS, ..Template::default() };
    let generator = Generator::new(&veth.left, template.clone()).pinned(0);
    let interface = InterfaceConfig {
        name: veth.right.name.clone(),
        path: CapturePath::TAP,
        promiscuous: false,
    };
    let config = EngineConfig { interfaces: vec![interface], ..EngineConfig::default() };
    let engine = right.enter(|| Engine::open(&config).unwrap());
    let before = rings();
    let file = |number: u64| folder.path().join(number.to_string());
    let start = |number: u64| {
        let filter = Filter { sport: Some(template.sport + number as u16), ..Filter::default() };
        let spec = JobSpec { filter, ..JobSpec::new(Target::File(file(number))) };
        Flow { job: engine.start(spec).unwrap(), number, before: generator.sent(), after: 0 }
    };
    let end = |mut flow: Flow| {
        flow.after = generator.sent();
        flow.job.stop();
        let summary = flow.job.wait_for(SECOND * 20).unwrap();
        (flow, summary)
    };

    let mut ended: Vec<(Flow, Ended)> = Vec::new();
    let sent = thread::scope(|scope| {
        // Some run all the time, some begin or end meanwhile, and some do both.
        let mut early: VecDeque<_> = (0..6).map(&start).collect();
        let traffic = scope.spawn(|| generator.send_paced(20_000, SECOND * 3));
        wait_until("traffic", SECOND * 10, || generator.sent() > 1000);
        let mut late: VecDeque<_> = (6..12).map(&start).collect();
        assert_eq!(attached(&veth.right), ["tcx/ingress tap_ingress", "tcx/egress tap_egress"]);
        assert_eq!(rings(), before, "no job has rings of its own");
        for _ in 0..3 {
            ended.push(end(early.pop_front().unwrap()));
            ended.push(end(late.pop_front().unwrap()));
        }
        late.extend((12..15).map(&start));
        assert!(!traffic.is_finished(), "jobs came and went while traffic ran");
        let sent = traffic.join().unwrap();
        assert_eq!(veth.settle(sent), sent);
        ended.extend(early.into_iter().chain(late).map(&end));
        sent
    });
    drop(engine);
    assert_eq!(attached(&veth.right), [""; 0], "nothing stays");

    assert_eq!((ended.len(), sent), (15, 60_000));
    for (flow, summary) in ended {
        let number = flow.number;
        assert_eq!(summary.law.drops.total(), 0, "flow {number}: {:?}", summary.law);
        assert!(summary.law.holds());
        let contents = accepted(&file(number));
        assert_eq!(contents.packets.len() as u64, summary.law.hits.packets, "flow {number}");
        let sequences: Vec<u64> = contents
            .packets
            .iter()
            .map(|packet| template.stamp(&packet.data).sequence)
            .inspect(|sequence| assert_eq!(sequence % u64::from(FLOWS), number, "its own only"))
            .collect();
        // None is missing between the first and the last, and those are where they must be.
        let steps = sequences.windows(2).all(|pair| pair[1] - pair[0] == u64::from(FLOWS));
        assert!(steps, "flow {number}: a gap");
        let (first, last) = (sequences[0], *sequences.last().unwrap());
        assert!(first < flow.before + 2 * u64::from(FLOWS), "flow {number}: {first}");
        assert!(last + 2 * u64::from(FLOWS) > flow.after.min(sent), "flow {number}: {last}");
    }
}

/// BPF rings that this process has open.
fn rings() -> usize {
    let infos = fs::read_dir("/proc/self/fdinfo").unwrap();
    let infos = infos.filter_map(|info| fs::read_to_string(info.unwrap().path()).ok());
    // BPF_MAP_TYPE_RINGBUF
    infos.filter(|info| info.lines().any(|line| line == "map_type:\t27")).count()
}

#[test]
fn an_idle_capture_takes_less_than_one_hundredth_of_a_cpu() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let folder = tempdir().unwrap();
    let file = |name| folder.path().join(name);
    let veths = [Veth::new(&left, &right), Veth::new(&left, &right), Veth::new(&left, &right)];
    let [live, quiet, mirror] = &veths;
    let captures = [
        ("tap", Capture::start(tap(&live.right, &file("tap"), &[]))),
        // Its programs run, and find nothing.
        ("no match", Capture::start(tap(&quiet.right, &file("quiet"), &["--dport", "9"]))),
        ("exclusive", Capture::start(exclusive(&mirror.right, &file("exclusive"), &[]))),
    ];
    // A reader is at its quickest just after traffic; what it then does to wind down is not idle.
    for end in [&live.left, &mirror.left] {
        let mut injector = Injector::new(end);
        (0..100).for_each(|number| injector.send(&frame(number, 100)));
    }
    thread::sleep(SECOND);
    let (start, window) = (Instant::now(), SECOND * 5);
    let before = captures.each_ref().map(|(_, capture)| cpu_time(capture.pid()));
    let mut injector = Injector::new(&quiet.left);
    while start.elapsed() < window {
        injector.send(&frame(0, 100));
        thread::sleep(SECOND / 1000);
    }
    for ((name, capture), before) in captures.iter().zip(before) {
        let used = cpu_time(capture.pid()).saturating_sub(before);
        println!("{name}: {used:?} in {:?}", start.elapsed());
        assert!(used * 100 < start.elapsed(), "{name}: {used:?} in {:?}", start.elapsed());
    }
    for (name, capture) in captures {
        let summary = capture.stop().success();
        assert_eq!(summary.hits(), if name == "no match" { 0 } else { 100 }, "{name}");
    }
}

/// Attaches to a tunnel device and puts the packets of its standard input into it, a line each.
const TUNNEL: &str = r#"
import fcntl, os, struct, sys
tun = os.open("/dev/net/tun", os.O_RDWR)
# TUNSETIFF with IFF_TUN | IFF_NO_PI
fcntl.ioctl(tun, 0x400454ca, struct.pack("16sH22x", sys.argv[1].encode(), 0x1001))
print("attached", flush=True)
for line in sys.stdin:
    os.write(tun, bytes.fromhex(line))
"#;

#[test]
fn a_tunnel_is_captured_as_raw_ip_and_filters_work_there() {
    if !require(test_name(|| {}), &|| {
        let tun = Path::new("/dev/net/tun");
        if tun.exists() { Ok(()) } else { Err("this kernel has no /dev/net/tun".into()) }
    }) {
        return;
    }
    privileged!();
    let namespace = Namespace::with_ipv6();
    let name = unique_name("t");
    namespace.run(&["ip", "tuntap", "add", "dev", &name, "mode", "tun"]);
    namespace.sysctl(&format!("net/ipv6/conf/{name}/addr_gen_mode"), "1");
    namespace.run(&["ip", "link", "set", &name, "up"]);
    let mut tunnel = namespace
        .command("python3", ["-c", TUNNEL, &name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut attached = [0; 9];
    tunnel.stdout.as_mut().unwrap().read_exact(&mut attached).unwrap();
    let folder = tempdir().unwrap();
    let file = |name| folder.path().join(name);
    let start = |to: &'static str, filter: &[&str]| {
        let file = file(to);
        let args = ["-i", &name, "-w", file.to_str().unwrap(), "--json"];
        Capture::start(command(&namespace, &[&args, filter].concat()))
    };
    let filters: [(&'static str, &[&str]); 4] = [
        ("all", &[]),
        ("v4 port", &["--dport", "29999"]),
        ("v6", &["--src", "2001:db8::/32"]),
        ("out", &["--direction", "out", "--dst", "10.9.0.0/16"]),
    ];
    let captures = filters.map(|(name, filter)| (name, start(name, filter)));

    let v4 = |port| Frame::new().ipv4(LEFT, RIGHT).udp(1, port).fill(150).build().split_off(14);
    let v6 = |port| {
        let [src, dst] = ["2001:db8::1", "2001:db8::2"].map(|text| text.parse().unwrap());
        Frame::new().ipv6(src, dst).udp(1, port).fill(150).build().split_off(14)
    };
    let sent = [v4(PORT), v4(PORT + 1), v6(PORT), v6(PORT + 1)];
    {
        // Closed, it ends.
        let mut stdin = tunnel.stdin.take().unwrap();
        for packet in &sent {
            for byte in packet {
                write!(stdin, "{byte:02x}").unwrap();
            }
            writeln!(stdin).unwrap();
        }
        // One that the host sends.
        namespace.run(&["ip", "address", "add", "10.9.0.1/16", "dev", &name]);
        let out = namespace.enter(|| UdpSocket::bind("10.9.0.1:1").unwrap());
        out.send_to(&[7; 100], "10.9.0.2:2").unwrap();
    }
    assert!(tunnel.wait().unwrap().success());
    let found: BTreeMap<_, _> = captures
        .into_iter()
        .map(|(name, capture)| {
            let summary = capture.stop().success();
            assert_eq!(summary.interfaces()[0]["raw_ip"], true);
            let contents = accepted(&file(name));
            check_law(&contents, &summary);
            (name, contents)
        })
        .collect();
    let [a, b, c, d] = sent;
    assert_eq!(frames(&found["all"], IN), [&a, &b, &c, &d].map(Vec::clone));
    assert_eq!(frames(&found["v4 port"], IN), [&a, &c].map(Vec::clone));
    assert_eq!(frames(&found["v6"], IN), [&c, &d].map(Vec::clone));
    assert_eq!(frames(&found["all"], OUT).len(), 1);
    assert_eq!(frames(&found["out"], OUT), frames(&found["all"], OUT));
    assert_eq!(frames(&found["out"], OUT)[0].len(), 128);
    let infos = tool(&["capinfos", "-E", file("all").to_str().unwrap()]);
    assert!(infos.contains("Raw IP"), "{infos}");
}
