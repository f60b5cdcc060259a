//! Do no harm: what a capture on a live interface does to that interface's traffic.
//!
//! Only what must never happen is asserted here. How fast traffic is beside a capture is measured, by
//! the bench of the same name.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use tapline_tests::{
    capture::Capture,
    netns::Namespace,
    privileged,
    process::{checked, wait_until},
    tap::{attached, promiscuity, tap},
    traffic::{SERVER, addresses, iperf3, nginx, requests},
    veth::{End, Veth},
};
use tempfile::tempdir;

const SECOND: Duration = Duration::from_secs(1);

/// Who watches the server's interface.
const WATCHERS: [&str; 4] = ["nobody", "no match", "everything", "tcpdump"];

/// A watcher at work.
enum Watcher {
    Nobody,
    Tapline(Box<Capture>),
    Tcpdump(Child),
}

impl Watcher {
    fn start(name: &str, end: &End<'_>, file: &Path) -> Self {
        match name {
            "nobody" => Self::Nobody,
            "no match" => {
                Self::Tapline(Box::new(Capture::start(tap(end, file, &["--dport", "9"]))))
            }
            "everything" => Self::Tapline(Box::new(Capture::start(tap(end, file, &[])))),
            _ => {
                let file = file.to_str().unwrap();
                let child = end.namespace.spawn(&["tcpdump", "-ni", &end.name, "-w", file]);
                // It writes the file's header when it captures.
                wait_until("tcpdump", SECOND * 10, || fs::metadata(file).is_ok());
                Self::Tcpdump(child)
            }
        }
    }

    fn stop(self) {
        match self {
            Self::Nobody => {}
            Self::Tapline(capture) => {
                let summary = capture.stop().success();
                assert_eq!(summary.hits(), summary.written() + summary.dropped());
            }
            Self::Tcpdump(mut child) => {
                kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
                child.wait().unwrap();
            }
        }
    }
}

#[test]
fn a_tcp_stream_runs_through_a_capture_without_a_retransmission_storm() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    addresses(&veth);
    let _server = iperf3(&right);
    for name in WATCHERS {
        let folder = tempdir().unwrap();
        let watcher = Watcher::start(name, &veth.right, &folder.path().join("file"));
        // Exits with an error when the connection is lost.
        let client = ["iperf3", "--client", SERVER, "--time", "2", "--json"];
        let output = left.run(&client);
        watcher.stop();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let number = |side: &str, name: &str| report["end"][side][name].as_f64().unwrap();
        let (sent, received) = (number("sum_sent", "bytes"), number("sum_received", "bytes"));
        let retransmits = number("sum_sent", "retransmits");
        println!("{name}: {:.1} Gbit/s, {retransmits} retransmits", received * 8.0 / 2e9);
        assert!(received > 1e6, "{name}: {received} bytes in two seconds");
        // Of segments as they would be on a wire.
        assert!(retransmits * 1448.0 < sent / 100.0, "{name}: {retransmits} in {sent} bytes");
    }
}

#[test]
fn a_request_load_on_a_web_server_loses_no_connection_beside_a_capture() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    addresses(&veth);
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("page"), vec![b'x'; 4000]).unwrap();
    let _server = nginx(&right, folder.path());
    for name in WATCHERS {
        let out = tempdir().unwrap();
        let watcher = Watcher::start(name, &veth.right, &out.path().join("file"));
        let kept = requests(&left, "page", 2, true);
        let renewed = requests(&left, "page", 1, false);
        watcher.stop();
        for answered in [kept.answered, renewed.answered] {
            println!("{name}: {answered} requests");
            assert!(answered > 100, "{name}: {answered} requests");
        }
    }
}

fn sha256(path: &Path) -> String {
    let output = checked(Command::new("sha256sum").arg(path));
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

#[test]
fn a_file_arrives_whole_while_captures_start_stop_and_are_killed() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    addresses(&veth);
    let folder = tempdir().unwrap();
    let original = folder.path().join("file");
    let mut rng = fastrand::Rng::new();
    let bytes: Vec<u8> = (0..160_000_000 / 8).flat_map(|_| rng.u64(..).to_ne_bytes()).collect();
    fs::write(&original, bytes).unwrap();
    let _server = nginx(&right, folder.path());

    let copy = folder.path().join("copy");
    let limit = ["curl", "--silent", "--show-error", "--fail", "--limit-rate", "20M"];
    let to = ["--output", copy.to_str().unwrap(), "http://10.0.0.2/file"];
    let mut transfer = left
        .command(limit[0], [&limit[1..], &to].concat())
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut starts = 0;
    let began = Instant::now();
    // Stopped, killed and stopped again, on either side, as often as the transfer lasts.
    for (at, end) in [&veth.right, &veth.left].into_iter().cycle().enumerate() {
        if transfer.try_wait().unwrap().is_some() {
            break;
        }
        let name = format!("{at}.pcapng");
        let capture = Capture::start(tap(end, &folder.path().join(&name), &[]));
        assert_eq!(attached(end), ["tcx/ingress tap_ingress", "tcx/egress tap_egress"]);
        assert_eq!(promiscuity(end), 1);
        // More than the file's head: packets of the transfer.
        let hidden = folder.path().join(format!(".{name}.part"));
        wait_until("packets", SECOND * 10, || {
            fs::metadata(&hidden).unwrap().len() > 1000 || transfer.try_wait().unwrap().is_some()
        });
        if at % 2 == 0 {
            capture.signal(Signal::SIGKILL);
            drop(capture);
        } else {
            capture.stop().success();
        }
        assert_eq!(attached(end), [""; 0], "nothing stays, however it ended");
        assert_eq!(promiscuity(end), 0);
        starts += 1;
    }
    let output = transfer.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    println!("{starts} captures in {:?}", began.elapsed());
    assert!(starts >= 3, "{starts} captures");
    assert_eq!(sha256(&original), sha256(&copy));
    // What a killed capture had written is hidden.
    let visible = fs::read_dir(folder.path()).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name().into_string().unwrap();
        name.ends_with(".pcapng")
    });
    assert_eq!(visible.count(), starts / 2, "one in two was stopped");
}
