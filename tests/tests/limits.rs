//! Limits are exact, and whatever ends a capture ends it well: rings drained, files complete, counts
//! that add up.

use std::{
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::Duration,
};

use nix::{
    sys::{signal::Signal, stat::Mode},
    unistd::mkfifo,
};
use tapline_tests::{
    capture::{Capture, Summary, exclusive},
    generator::{Generator, Template},
    netns::Namespace,
    pcapng::{counted, read},
    privileged,
    process::{tapline, tapline_path, wait_until},
    veth::{Options, Veth},
};
use tempfile::tempdir;

const SECOND: Duration = Duration::from_secs(1);

/// Stops the load when a test is over, also when it fails.
struct Load<'a>(&'a AtomicBool);

impl Drop for Load<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Runs a capture from its start to its end while every generator sends as fast as it can.
fn flooded(generators: &[Generator<'_>], command: Command) -> Summary {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for generator in generators {
            scope.spawn(|| generator.flood_while(|| !over.load(Relaxed)));
        }
        let _load = Load(&over);
        wait_until("load", 10 * SECOND, || generators.iter().all(|generator| generator.sent() > 0));
        Capture::start(command).wait().success()
    })
}

/// Generators at the left end, on CPUs 0 and up.
fn generators<'a>(veth: &Veth<'a>, lengths: &[usize]) -> Vec<Generator<'a>> {
    let generator = |(cpu, length): (usize, &usize)| {
        let template = Template { length: *length, ..Template::default() };
        Generator::new(&veth.left, template).pinned(cpu)
    };
    lengths.iter().enumerate().map(generator).collect()
}

/// The captured bytes of a file's packets.
fn bytes(file: &Path) -> u64 {
    read(file).packets.iter().map(|packet| packet.data.len() as u64).sum()
}

fn packet_limits(queues: usize) {
    let (left, right) = (Namespace::new(), Namespace::new());
    let options = Options { queues: queues as u32, ..Options::default() };
    let veth = Veth::with(&left, &right, options);
    let generators = generators(&veth, &[60, 60][..queues]);
    let folder = tempdir().unwrap();
    let file = folder.path().join("limited.pcapng");
    for limit in [1, 63, 1000, 50_000] {
        let flags = ["--packets", &limit.to_string()];
        let summary = flooded(&generators, exclusive(&veth.right, &file, &flags));
        assert_eq!(summary.ending(), "limit", "{limit}");
        assert_eq!(summary.written(), limit, "{limit}: {summary:?}");
        assert_eq!(counted(&file), limit);
        assert_eq!(read(&file).statistics().accepted, Some(summary.hits()));
    }
}

#[test]
fn a_packet_limit_is_met_exactly_under_a_flood() {
    privileged!();
    packet_limits(1);
}

#[test]
fn a_packet_limit_is_met_exactly_by_two_queues_that_race_for_it() {
    privileged!();
    packet_limits(2);
}

#[test]
fn a_byte_limit_ends_at_the_first_packet_that_does_not_fit() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("limited.pcapng");
    for (length, limit, more) in [
        (60, "59", &[] as &[&str]),
        (60, "60", &[]),
        (60, "10000", &[]),
        (1500, "64K", &[]),
        (1500, "3M", &[]),
        // What is kept of a packet is what counts.
        (1500, "10000", &["--snaplen", "64"]),
    ] {
        let flags = [&["--bytes", limit], more].concat();
        let summary = flooded(&generators(&veth, &[length]), exclusive(&veth.right, &file, &flags));
        let limit = match limit {
            "64K" => 64 << 10,
            "3M" => 3 << 20,
            plain => plain.parse::<u64>().unwrap(),
        };
        let kept = if more.is_empty() { length as u64 } else { 64 };
        assert_eq!(summary.ending(), "limit");
        assert_eq!(summary.written_bytes(), limit / kept * kept, "{length}, {limit}");
        assert_eq!(bytes(&file), summary.written_bytes());
    }
}

#[test]
fn a_byte_limit_is_never_exceeded_by_two_queues() {
    // Most that a queue may have set aside for its batch when the other finds nothing left.
    const HELD: u64 = 128 * 1024;
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options { queues: 2, ..Options::default() });
    let generators = generators(&veth, &[60, 1500]);
    let folder = tempdir().unwrap();
    let file = folder.path().join("limited.pcapng");
    for limit in [59, 1000, 99_999, 1_000_000, 20_000_000] {
        let flags = ["--bytes", &limit.to_string()];
        let summary = flooded(&generators, exclusive(&veth.right, &file, &flags));
        assert_eq!(summary.ending(), "limit", "{limit}");
        let written = bytes(&file);
        assert_eq!(written, summary.written_bytes());
        assert!(written <= limit, "{written} of {limit}");
        assert!(written + HELD + 1500 > limit, "{written} of {limit}: ended too early");
    }
}

#[test]
fn the_limit_that_is_reached_first_counts() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let generators = generators(&veth, &[100]);
    let folder = tempdir().unwrap();
    let file = folder.path().join("limited.pcapng");
    for (packets, bytes, written) in [("20", "10000", 20), ("200", "10000", 100)] {
        let flags = ["--packets", packets, "--bytes", bytes, "--duration", "1h"];
        let summary = flooded(&generators, exclusive(&veth.right, &file, &flags));
        assert_eq!(summary.ending(), "limit");
        assert_eq!((summary.written(), counted(&file)), (written, written));
    }
}

#[test]
fn a_duration_ends_a_capture_with_and_without_traffic() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("limited.pcapng");
    for load in [&[] as &[usize], &[60]] {
        let command = exclusive(&veth.right, &file, &["--duration", "500ms"]);
        let summary = flooded(&generators(&veth, load), command);
        assert_eq!(summary.ending(), "duration");
        let seconds = summary.0["seconds"].as_f64().unwrap();
        assert!((0.5..3.0).contains(&seconds), "{seconds} s");
        assert_eq!(summary.written(), counted(&file));
        assert_eq!(summary.hits() > 0, !load.is_empty());
    }
}

#[test]
fn a_signal_ends_a_capture_like_a_limit_with_its_rings_drained() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options { queues: 2, ..Options::default() });
    let generators = generators(&veth, &[60, 60]);
    let folder = tempdir().unwrap();
    let file = folder.path().join("stopped.pcapng");
    let mut before = 0;
    let mut sent = 0;
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let capture = Capture::start(exclusive(&veth.right, &file, &["--ring-size", "4096"]));
        // All of it lies on the rings when the signal comes.
        capture.signal(Signal::SIGSTOP);
        for generator in &generators {
            sent += generator.send_paced(20_000, SECOND / 10);
        }
        let taken = veth.settle(sent);
        capture.signal(signal);
        capture.signal(Signal::SIGCONT);
        let summary = capture.wait().success();
        assert_eq!(summary.ending(), "stopped", "{signal}");
        assert_eq!(summary.hits(), taken - before, "{signal}");
        assert_eq!((summary.dropped(), counted(&file)), (0, taken - before), "{signal}");
        before = taken;
    }
}

#[test]
fn a_second_signal_ends_a_capture_whose_reader_does_not_read() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let (mut capture, stdout) =
        Capture::streaming(exclusive(&veth.right, Path::new("-"), &["--buffer-size", "128K"]));
    capture.wait_until_ready();
    generators(&veth, &[1500])[0].send_paced(10_000, SECOND / 10);
    capture.signal(Signal::SIGINT);
    // The disk thread waits for room in the pipe.
    thread::sleep(SECOND / 2);
    assert!(!capture.has_ended(), "{}", capture.said());
    // Not SIGINT, which a shell has its background jobs ignore.
    wait_until("the end", 10 * SECOND, || {
        capture.signal(Signal::SIGTERM);
        capture.has_ended()
    });
    drop(stdout);
}

#[test]
fn waiting_for_the_reader_of_a_named_pipe_ends_with_a_signal() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    mkfifo(&pipe, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    let mut capture = Capture::spawn(exclusive(&veth.right, &pipe, &[]));
    // Long enough to come to the pipe.
    thread::sleep(SECOND / 2);
    assert!(!capture.has_ended(), "{}", capture.said());
    capture.signal(Signal::SIGTERM);
    assert_eq!(capture.wait().status.signal(), Some(Signal::SIGTERM as i32));
}

#[test]
fn a_capture_under_nohup_goes_on_when_its_terminal_hangs_up() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("kept.pcapng");
    let args = ["capture", "--json", "-i", &veth.right.name, "-w", file.to_str().unwrap()];
    let mut command = right.command("nohup", [tapline_path().as_os_str()]);
    command.args(args);
    let capture = Capture::start(command);
    capture.signal(Signal::SIGHUP);
    let sent = Generator::new(&veth.left, Template::default()).send_paced(1000, SECOND / 10);
    let arrived = veth.settle(sent);
    let summary = capture.stop().success();
    assert_eq!(summary.ending(), "stopped");
    assert_eq!(summary.written(), arrived);
}

#[test]
fn the_exit_status_tells_done_failed_and_usage() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let file = folder.path().join("status.pcapng");
    let code = |flags: &[&str]| Capture::spawn(exclusive(&veth.right, &file, flags)).wait().code();
    assert_eq!(code(&["--duration", "10ms"]), 0);
    assert_eq!(code(&["--duration", "10ms", "-i", "missing"]), 1);
    assert_eq!(code(&["--duration", "10ms", "--src", "10.0.0.0/33"]), 2);
    assert_eq!(tapline(&["--help"]).output().unwrap().status.code(), Some(0));
    assert_eq!(tapline(&[]).output().unwrap().status.code(), Some(2));
}
