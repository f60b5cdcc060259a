//! The daemon as those see it who run it: its log, its metrics, and how it stops.

use std::{
    io::Write as _,
    process::{Command, Stdio},
    time::Duration,
};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use tapline_tests::{
    daemon::{ACCOUNT, Client, Daemon},
    fetch,
    generator::{Generator, Template},
    needs,
    netns::Namespace,
    privileged,
    process::wait_until,
    veth::Veth,
};

use super::{NO_RECORDER, delivery::arrive};

#[test]
fn each_answer_has_an_id_under_which_its_request_is_logged() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", "");
    let mut client = daemon.client();
    let mut wanted = Vec::new();
    for (method, path) in [("GET", ""), ("GET", "/nobody"), ("PUT", ""), ("POST", "/ownership")] {
        let answer = client.call(method, path, None);
        wanted.push((answer.header("x-request-id").unwrap().to_owned(), method, answer.status));
    }
    let log = daemon.log();
    // JSON lines, all of them.
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (id, method, status) in wanted {
        let mut found = lines.iter().filter(|line| line["request_id"] == id);
        let line = found.next().unwrap_or_else(|| panic!("{id} is not in:\n{log}"));
        assert_eq!((&line["method"], &line["status"]), (&json!(method), &json!(status)));
        assert_eq!((&line["message"], &line["peer"]), (&json!("request"), &json!("127.0.0.1")));
        assert!(line["milliseconds"].is_number() && line["timestamp"].is_string(), "{line}");
        assert!(found.next().is_none(), "{id} is another one's, too");
    }
}

#[test]
fn a_request_on_its_way_is_answered_when_the_daemon_is_told_to_stop() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let mut daemon = Daemon::start(&veth.right, "", "");
    let idle = daemon.client();
    let mut stream = daemon.connect().unwrap();
    let head = format!(
        "POST /accounts/{ACCOUNT}/pcaps HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
         content-length: 2\r\n\r\n{{",
        daemon.token
    );
    stream.write_all(head.as_bytes()).unwrap();
    // On a connection of its own, and after it.
    daemon.client().call("GET", "", None).result();
    kill(daemon.pid(), Signal::SIGTERM).unwrap();
    wait_until("the daemon to stop listening", Duration::from_secs(10), || {
        daemon.connect().is_err()
    });
    stream.write_all(b"}").unwrap();
    let answer = Client::new(stream, "").answer(false).expect("an answer");
    assert_eq!((answer.status, answer.codes()), (400, vec![1101, 1101]), "{}", answer.json());
    assert!(daemon.stop().success(), "an idle connection keeps nothing: {idle:?}");
}

#[test]
fn the_fifty_newest_captures_are_listed() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", NO_RECORDER);
    let mut client = daemon.client();
    let mut ids = Vec::new();
    for _ in 0..52 {
        let created = client.create(&daemon.full(&json!({})));
        ids.push(created["id"].clone());
        client.stop(created["id"].as_str().unwrap());
    }
    let listed = client.call("GET", "", None).result();
    let listed: Vec<_> = listed.as_array().unwrap().iter().map(|one| one["id"].clone()).collect();
    let newest: Vec<_> = ids.iter().rev().take(50).cloned().collect();
    assert_eq!(listed, newest);
    assert_eq!(client.get(ids[0].as_str().unwrap())["id"], ids[0], "older ones are still there");
}

/// Reads a page of metrics from standard input as Prometheus' own client does.
const PARSE: &str = "
import json, sys
from prometheus_client.parser import text_string_to_metric_families as families
print(json.dumps([
    {'family': f.name, 'kind': f.type, 'help': f.documentation, 'name': s.name, 'labels': s.labels, 'value': s.value}
    for f in families(sys.stdin.read()) for s in f.samples
]))
";

#[test]
fn metrics_are_read_by_others_and_obey_the_law() {
    let packages = ["prometheus_client==0.22.1"];
    needs!(|| fetch::python("prometheus", &packages).map(drop));
    let python = fetch::python("prometheus", &packages).unwrap();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "open = [\"/metrics\"]", "");
    let mut client = daemon.client();
    let capture = client.create(&daemon.full(&json!({ "packet_limit": 100 })));
    let arrived = arrive(&veth, &Generator::new(&veth.left, Template::default()), 1000);
    assert_eq!(client.wait(capture["id"].as_str().unwrap())["packets_captured"], 100);
    assert_eq!(client.call("GET", "/nobody", None).status, 404);

    // Open, so without credentials.
    let mut get = || client.raw(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    wait_until("the end to be counted", Duration::from_secs(5), || {
        let page = String::from_utf8(get().body).unwrap();
        page.contains("tapline_captures_ended_total{status=\"success\"} 1\n")
    });
    let page = get();
    let kind = page.header("content-type").unwrap();
    assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
    let mut parser = Command::new(python)
        .args(["-c", PARSE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    parser.stdin.take().unwrap().write_all(&page.body).unwrap();
    let output = parser.wait_with_output().unwrap();
    assert!(output.status.success());
    let samples: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let of = |name: &str, label: &str, value: &str| -> f64 {
        let all = samples.iter().filter(|sample| sample["name"] == name);
        let ours = all.filter(|sample| value.is_empty() || sample["labels"][label] == value);
        let values: Vec<_> = ours.map(|sample| sample["value"].as_f64().unwrap()).collect();
        assert!(!values.is_empty(), "no {name}");
        values.iter().sum()
    };
    let total = |name| of(name, "", "");
    for sample in &samples {
        let help = sample["help"].as_str().unwrap();
        assert!(help.ends_with('.') && sample["kind"] != "unknown", "{sample}");
    }
    let exact = |value: f64, want: u64| assert_eq!(format!("{value}"), want.to_string());
    exact(total("tapline_written_packets_total"), 100);
    let hits = total("tapline_hits_packets_total");
    let dropped = total("tapline_dropped_packets_total");
    exact(hits - dropped, 100);
    // Those that it was still given when it had enough.
    assert!((100.0..=1000.0).contains(&hits), "{hits} of {arrived}");
    exact(of("tapline_captures_ended_total", "status", "success"), 1);
    exact(of("http_requests_total", "code", "404"), 1);
    // Each request is in the histogram, and in its last bucket.
    let count = total("http_request_duration_seconds_count");
    exact(of("http_request_duration_seconds_bucket", "le", "+Inf") - count, 0);
    assert!(total("process_resident_memory_bytes") > 1e6);
    exact(total("tapline_build_info"), 1);
}
