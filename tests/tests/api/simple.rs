//! The recorder in the daemon, and simple captures out of it.

use std::time::Duration;

use serde_json::Value;
use tapline_tests::{
    daemon::{Answer, Daemon},
    generator::{Generator, Template},
    netns::Namespace,
    privileged,
    process::{checked, tapline, wait_until},
    veth::Veth,
};

use super::NO_RECORDER;

const SECOND: Duration = Duration::from_secs(1);

/// Every packet is recorded, in a small budget.
pub(super) const EVERYTHING: &str = "[recorder]\nsample = 1\nbytes = 33554432\nreserve_bytes = 0";

/// What is behind a path that needs no account.
fn plain(daemon: &Daemon<'_>, path: &str) -> Answer {
    let request =
        format!("GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\r\n", daemon.token);
    daemon.client().raw(request.as_bytes()).unwrap()
}

/// A number in `/metrics`, or the sum over its causes.
fn metric(daemon: &Daemon<'_>, name: &str) -> f64 {
    let page = String::from_utf8(plain(daemon, "/metrics").body).unwrap();
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    let values = lines.filter_map(|line| {
        let (key, value) = line.rsplit_once(' ')?;
        let is_it = key.split('{').next() == Some(name);
        is_it.then(|| value.parse::<f64>().unwrap())
    });
    let values: Vec<_> = values.collect();
    assert!(!values.is_empty(), "no {name} in {page}");
    values.iter().sum()
}

/// Packets that `tapline query` finds in the data folder of the daemon.
fn found(daemon: &Daemon<'_>) -> u64 {
    let target = daemon.folder().join("query.pcapng");
    let data = daemon.folder().join("data");
    let args =
        ["query", "--data", data.to_str().unwrap(), "--from", "-1h", "--to", "now", "--json"];
    let output = checked(tapline(&args).arg("-w").arg(target));
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    answer["packets"].as_u64().unwrap()
}

#[test]
fn the_recorder_records_from_the_start_and_what_it_has_survives_sigkill_and_sigterm() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let mut daemon = Daemon::start(&veth.right, "", EVERYTHING);
    let generator = Generator::new(&veth.left, Template::default());
    generator.send(100);
    wait_until("packets", 5 * SECOND, || found(&daemon) == 100);
    daemon.kill();
    daemon.restart();
    assert_eq!(found(&daemon), 100, "what had reached the file is kept");
    generator.send(50);
    wait_until("the law", 5 * SECOND, || metric(&daemon, "tapline_recorder_packets_total") >= 50.0);
    let of = |name: &str| metric(&daemon, &format!("tapline_recorder_{name}"));
    let dropped = of("dropped_packets_total");
    assert_eq!((of("hits_packets_total"), of("packets_total") + dropped), (50.0, 50.0), "the law");
    assert_eq!(
        (of("recording"), of("damaged_total"), of("removed_segments_total")),
        (1.0, 0.0, 0.0)
    );
    assert!(of("disk_bytes") > 0.0 && of("disk_bytes") <= of("disk_limit_bytes"));
    assert!(of("disk_limit_bytes") <= 33_554_432.0);
    assert!(of("oldest_timestamp_seconds") > 1e9);
    let ready = plain(&daemon, "/readyz").json();
    assert_eq!(ready["recorder"], "recording", "{ready}");
    assert!(daemon.stop().success(), "{}", daemon.log());
    assert_eq!(found(&daemon), 150, "what was open is sealed");
    let names = std::fs::read_dir(daemon.folder().join("data/recorder")).unwrap();
    let hidden =
        names.filter(|name| name.as_ref().unwrap().file_name().as_encoded_bytes()[0] == b'.');
    assert_eq!(hidden.count(), 0);
}

#[test]
fn a_recorder_whose_interface_goes_and_comes_back_records_again() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let name = veth.right.name.clone();
    let daemon = Daemon::start(&veth.right, "", EVERYTHING);
    right.run(&["ip", "link", "del", &name]);
    wait_until("the recorder to notice", 10 * SECOND, || {
        metric(&daemon, "tapline_recorder_recording") == 0.0
    });
    assert!(daemon.log().contains("recorder's job has ended"), "{}", daemon.log());
    right.run(&["ip", "link", "add", &name, "type", "veth", "peer", "name", "peer0"]);
    right.run(&["ip", "link", "set", &name, "up"]);
    let ready = plain(&daemon, "/readyz").json()["recorder"].as_str().unwrap().to_owned();
    assert!(ready.starts_with("not recording: ") && ready.contains(&name), "{ready}");
    wait_until("the recorder to record again", 20 * SECOND, || {
        plain(&daemon, "/readyz").json()["recorder"] == "recording"
    });
}

#[test]
fn a_recorder_that_is_off_says_so_and_leaves_no_trace() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", NO_RECORDER);
    assert_eq!(plain(&daemon, "/readyz").json()["recorder"], "off");
    assert!(daemon.log().contains("not recording"), "{}", daemon.log());
    assert!(!daemon.folder().join("data/recorder").exists());
}
