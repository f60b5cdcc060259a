//! The recorder in the daemon, and simple captures out of it.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    path::Path,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use pcap::{Capture, Linktype, Precision};
use serde_json::{Value, json};
use tapline_tests::{
    daemon::{ACCOUNT, Answer, Client, Daemon, OTHER_ACCOUNT},
    fetch,
    generator::{Generator, Template},
    needs,
    netns::Namespace,
    pcapng, privileged,
    process::{checked, tapline, tool, wait_until},
    veth::Veth,
};

use super::{NO_RECORDER, clients::as_client};

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
    let names = fs::read_dir(daemon.folder().join("data/recorder")).unwrap();
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
    wait_until("the recorder to notice", 30 * SECOND, || {
        metric(&daemon, "tapline_recorder_recording") == 0.0
    });
    assert!(daemon.log().contains("recorder's job has ended"), "{}", daemon.log());
    right.run(&["ip", "link", "add", &name, "type", "veth", "peer", "name", "peer0"]);
    right.run(&["ip", "link", "set", &name, "up"]);
    let ready = plain(&daemon, "/readyz").json()["recorder"].as_str().unwrap().to_owned();
    assert!(ready.starts_with("not recording: ") && ready.contains(&name), "{ready}");
    wait_until("the recorder to record again", 60 * SECOND, || {
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

/// A simple capture, with some fields of its own.
pub(super) fn simple(more: &Value) -> Value {
    let mut body = json!({
        "type": "simple", "system": "magic-transit", "time_limit": 300, "packet_limit": 10000,
    });
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// Asks, waits for the answer, and gives the capture's id.
fn ask(client: &mut Client, more: &Value) -> String {
    let created = client.create(&simple(more));
    assert_eq!(created["status"], "pending", "{created}");
    let id = created["id"].as_str().unwrap();
    let ended = client.wait(id);
    assert_eq!(ended["status"], "success", "{ended}");
    id.to_owned()
}

/// A classic pcap file as libpcap has it: each packet's time, true length, and what was kept.
fn read(path: &Path) -> Vec<(Duration, u32, Vec<u8>)> {
    let mut capture = Capture::from_file_with_precision(path, Precision::Nano).unwrap();
    assert_eq!(capture.get_datalink(), Linktype::ETHERNET);
    let mut packets = Vec::new();
    while let Ok(packet) = capture.next_packet() {
        let time = packet.header.ts;
        let time = Duration::new(time.tv_sec.cast_unsigned(), time.tv_usec.cast_unsigned() as u32);
        packets.push((time, packet.header.len, packet.data.to_vec()));
    }
    assert!(packets.is_sorted_by_key(|(time, ..)| *time), "not in order");
    packets
}

/// The download of a capture in a file, which tshark, capinfos and libpcap read alike.
pub(super) fn downloaded(daemon: &Daemon<'_>, id: &str) -> Vec<(Duration, u32, Vec<u8>)> {
    let answer = daemon.client().call("GET", &format!("/{id}/download"), None);
    assert_eq!(answer.status, 200, "{answer:?}");
    let path = daemon.folder().join(format!("{id}.pcap"));
    fs::write(&path, answer.body).unwrap();
    let packets = read(&path);
    assert_eq!(pcapng::counted(&path), packets.len() as u64);
    let name = path.to_str().unwrap();
    let fields = ["-e", "frame.len", "-e", "frame.cap_len", "-e", "frame.time_epoch"];
    let output = tool(&[&["tshark", "-n", "-r", name, "-T", "fields"], &fields[..]].concat());
    let want = packets.iter().map(|(time, length, data)| {
        let (seconds, nanos) = (time.as_secs(), time.subsec_nanos());
        format!("{length}\t{}\t{seconds}.{nanos:09}", data.len())
    });
    assert!(output.lines().eq(want), "tshark reads something else");
    packets
}

/// Waits until the recorder has had this many packets.
fn recorded(daemon: &Daemon<'_>, count: u32) {
    wait_until("packets", 5 * SECOND, || {
        metric(daemon, "tapline_recorder_packets_total") >= f64::from(count)
    });
}

fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()
}

#[test]
fn the_python_client_gets_what_passed_before_it_asked_and_just_that() {
    let python = || fetch::python("cloudflare", &["cloudflare==5.9.0"]);
    needs!(|| python().map(drop));
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", EVERYTHING);
    let template = Template { length: 400, flows: 2, ..Template::default() };
    let generator = Generator::new(&veth.left, template.clone()).pinned(0);
    generator.send(100);
    recorded(&daemon, 100);
    let between = now_us();
    generator.send(60);
    recorded(&daemon, 160);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/api/simple.py");
    let args = [script.to_str().unwrap()];
    let mut script = as_client(&daemon, &veth.right.name, &python().unwrap(), &args);
    script.env("BETWEEN", between.to_string()).env("FOLDER", daemon.folder());
    let output = checked(&mut script);
    let ids: Value = serde_json::from_slice(&output.stdout).unwrap();
    let file = |name: &str| {
        let path = daemon.folder().join(name);
        let packets = read(&path);
        // What the client wrote is what anyone gets.
        assert_eq!(downloaded(&daemon, ids[name].as_str().unwrap()), packets, "{name}");
        packets
    };
    let stamps = |packets: &[(Duration, u32, Vec<u8>)]| -> BTreeSet<u64> {
        packets.iter().map(|(.., data)| template.stamp(data).sequence).collect()
    };
    let before = file("window");
    assert_eq!(stamps(&before), (0..100).collect());
    assert!(before.iter().all(|(time, ..)| time.as_micros() <= between));
    assert!(before.iter().all(|(_, length, data)| (*length, data.len()) == (400, 160)));
    assert_eq!(before[0].2, template.expected(template.stamp(&before[0].2))[..160]);
    let filtered = file("filter");
    assert_eq!(filtered.len(), 80);
    assert!(filtered.iter().all(|(.., data)| template.flow(data) == 1001));
    assert_eq!(stamps(&file("newest")), (130..160).collect());
    assert_eq!(file("nothing"), []);
}

#[test]
fn what_was_asked_before_sigkill_is_answered_after_it_with_what_passed_before() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let more = format!("{EVERYTHING}\n[simple]\nat_once = 1");
    let mut daemon = Daemon::start(&veth.right, "", &more);
    let generator = Generator::new(&veth.left, Template::default());
    generator.send(20);
    wait_until("packets in the file", 5 * SECOND, || found(&daemon) == 20);
    let mut ids = Vec::new();
    for _ in 0..10 {
        for _ in 0..40 {
            let created = daemon.client().create(&simple(&json!({})));
            ids.push(created["id"].as_str().unwrap().to_owned());
        }
        daemon.kill();
        daemon.restart();
        if daemon.log().contains("answering what was asked before") {
            break;
        }
    }
    assert!(daemon.log().contains("answering what was asked before"), "none was pending");
    let mut client = daemon.client();
    for id in &ids {
        assert_eq!(client.wait(id)["status"], "success");
    }
    for id in ids.iter().rev().take(40) {
        assert_eq!(downloaded(&daemon, id).len(), 20);
    }
    let files = fs::read_dir(daemon.folder().join("data/simple")).unwrap();
    assert_eq!(files.count(), ids.len(), "nothing half written");
}

/// The last that is told of a capture.
fn last_event(daemon: &Daemon<'_>, id: &str) -> Value {
    let mut stream = daemon.connect().unwrap();
    let request = format!(
        "GET /accounts/{ACCOUNT}/pcaps/{id}/events HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         authorization: Bearer {}\r\n\r\n",
        daemon.token
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let last = text.lines().filter_map(|line| line.strip_prefix("data: ")).next_back();
    serde_json::from_str(last.unwrap_or_else(|| panic!("{text}"))).unwrap()
}

/// Every key that a simple capture may have.
const KEYS: [&str; 8] =
    ["filter_v1", "id", "offset_time", "status", "submitted", "system", "time_limit", "type"];

#[test]
fn both_kinds_are_listed_and_a_simple_one_has_its_keys_and_is_not_stopped() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", EVERYTHING);
    let mut client = daemon.client();
    let first = ask(&mut client, &json!({ "filter_v1": { "protocol": 6.0 } }));
    let full = client.create(&daemon.full(&json!({})));
    let full = full["id"].as_str().unwrap();
    let last = ask(&mut client, &json!({ "offset_time": "" }));
    let watched = client.create(&simple(&json!({})))["id"].as_str().unwrap().to_owned();
    assert_eq!(
        last_event(&daemon, &watched)["status"],
        "success",
        "the stream ends with the capture"
    );
    let listed = client.call("GET", "", None).result();
    let ids: Vec<_> = listed.as_array().unwrap().iter().map(|one| &one["id"]).collect();
    assert_eq!(ids, [&json!(watched), &json!(last), &json!(full), &json!(first)], "newest first");
    let capture = client.get(&first);
    assert!(capture.as_object().unwrap().keys().eq(KEYS), "{capture}");
    assert_eq!(capture["filter_v1"], json!({ "protocol": 6 }));
    let refused = client.call("PUT", &format!("/{first}/stop"), None);
    assert_eq!((refused.status, refused.codes()), (400, vec![1145]));
    client.stop(full);
    for _ in 0..60 {
        client.create(&simple(&json!({ "time_limit": 1, "packet_limit": 1 })));
    }
    let listed = client.call("GET", "", None).result();
    assert_eq!(listed.as_array().unwrap().len(), 50);
    for (offset, limits) in [
        (json!("2020-01-01T08:00:00Z"), "last 24 hours"),
        (json!("2100-01-01T08:00:00"), "last 24 hours"),
        (json!("soon"), "without a zone is UTC"),
    ] {
        let body = simple(&json!({ "offset_time": offset }));
        let refused = client.call("POST", "", Some(&body));
        assert_eq!((refused.status, refused.codes()), (400, vec![1103]), "{offset}");
        let message = refused.json()["errors"][0]["message"].to_string();
        assert!(message.contains(limits), "{message}");
    }
}

#[test]
fn where_the_recorder_is_off_a_simple_capture_is_refused_with_the_line_that_turns_it_on() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", NO_RECORDER);
    let refused = daemon.client().call("POST", "", Some(&simple(&json!({}))));
    assert_eq!((refused.status, refused.codes()), (400, vec![1150]));
    let error = &refused.json()["errors"][0];
    assert_eq!(error["source"]["pointer"], "/type");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("`enabled = true` in [recorder]"), "{message}");
}

#[test]
fn one_simple_capture_per_minute_and_account_where_the_operator_wants_it() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let more = format!("{EVERYTHING}\n[simple]\none_per_minute = true");
    let daemon = Daemon::start(&veth.right, "", &more);
    let mut client = daemon.client();
    ask(&mut client, &json!({}));
    let refused = client.call("POST", "", Some(&simple(&json!({}))));
    assert_eq!((refused.status, refused.codes()), (429, vec![1146]));
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    let token = daemon.new_token(OTHER_ACCOUNT, "write");
    let mut other = Client::new(daemon.connect().unwrap(), &token).of(OTHER_ACCOUNT);
    ask(&mut other, &json!({}));
    let listed = client.call("GET", "", None).result();
    assert_eq!(listed.as_array().unwrap().len(), 1, "a refused one is not remembered");
}

#[test]
fn a_file_expires_and_the_capture_is_remembered() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let more = format!("{EVERYTHING}\n[simple]\nfiles = 1");
    let daemon = Daemon::start(&veth.right, "", &more);
    let mut client = daemon.client();
    let first = ask(&mut client, &json!({}));
    assert_eq!(downloaded(&daemon, &first), []);
    let second = ask(&mut client, &json!({}));
    wait_until("the first to go", 5 * SECOND, || {
        client.call("GET", &format!("/{first}/download"), None).status != 200
    });
    let gone = client.call("GET", &format!("/{first}/download"), None);
    assert_eq!((gone.status, gone.codes()), (410, vec![1153]));
    assert_eq!(gone.header("x-should-retry"), Some("false"));
    assert_eq!(client.get(&first)["status"], "success");
    assert_eq!(downloaded(&daemon, &second), []);
}

#[test]
fn with_a_budget_of_packets_each_one_found_says_how_many_it_stands_for() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let more = "[recorder]\npackets_per_second = 200\nbytes = 33554432\nreserve_bytes = 0";
    let daemon = Daemon::start(&veth.right, "", more);
    let generator = Generator::new(&veth.left, Template::default());
    let sent = generator.send_paced(5000, 3 * SECOND);
    let passed = veth.settle(sent);
    let mut client = daemon.client();
    let id = ask(&mut client, &json!({}));
    let answer = client.call("GET", &format!("/{id}/download?format=pcapng"), None);
    let path = daemon.folder().join("sampled.pcapng");
    fs::write(&path, answer.body).unwrap();
    let line =
        ["tshark", "-n", "-r", path.to_str().unwrap(), "-T", "fields", "-e", "frame.comment"];
    let comments = tool(&line);
    let stands_for = |comment: &str| -> f64 {
        let number = comment.strip_prefix("sampled 1 in ");
        number.unwrap_or_else(|| panic!("{comment}")).parse().unwrap()
    };
    let weights: Vec<f64> = comments.lines().map(stands_for).collect();
    let (kept, estimate) = (weights.len(), weights.iter().sum::<f64>());
    assert!(kept < 1500, "{kept} of {passed} are far above the budget");
    let ratio = estimate / f64::from(u32::try_from(passed).unwrap());
    assert!((0.7..1.3).contains(&ratio), "{kept} stand for {estimate} of {passed}");
}

#[test]
fn a_simple_capture_has_what_passed_on_every_interface_in_the_order_of_time() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let (one, other) = (Veth::new(&left, &right), Veth::new(&left, &right));
    let more = format!("[[interfaces]]\nname = \"{}\"\n{EVERYTHING}", other.right.name);
    let daemon = Daemon::start(&one.right, "", &more);
    let generators = [&one, &other].map(|veth| Generator::new(&veth.left, Template::default()));
    for round in 0..10 {
        generators[round % 2].send(10);
    }
    recorded(&daemon, 100);
    let mut client = daemon.client();
    let id = ask(&mut client, &json!({}));
    assert_eq!(downloaded(&daemon, &id).len(), 100);
    let answer = client.call("GET", &format!("/{id}/download?format=pcapng"), None);
    let path = daemon.folder().join("both.pcapng");
    fs::write(&path, answer.body).unwrap();
    let contents = pcapng::accepted(&path);
    for name in [&one.right.name, &other.right.name] {
        let named = |interface: u32| contents.interfaces[interface as usize].name.as_ref();
        let of = contents.packets.iter().filter(|packet| named(packet.interface) == Some(name));
        assert_eq!(of.count(), 50, "{name}");
    }
}

#[test]
fn a_simple_capture_that_cannot_be_answered_fails_and_its_download_says_why() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", EVERYTHING);
    let folder = daemon.folder().join("data/simple");
    fs::remove_dir(&folder).unwrap();
    fs::write(&folder, "in the way").unwrap();
    let mut client = daemon.client();
    let id = client.create(&simple(&json!({})))["id"].as_str().unwrap().to_owned();
    let failed = client.wait(&id);
    assert_eq!(failed["status"], "failed");
    assert!(failed.as_object().unwrap().keys().eq(KEYS), "{failed}");
    let refused = client.call("GET", &format!("/{id}/download"), None);
    assert_eq!((refused.status, refused.codes()), (409, vec![1152]));
    let message = refused.json()["errors"][0]["message"].to_string();
    assert!(message.contains("Not a directory") && !message.contains("data/simple"), "{message}");
    fs::remove_file(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    ask(&mut client, &json!({}));
}

#[test]
fn more_simple_captures_than_may_wait_are_refused_and_the_others_are_answered() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let more = format!("{EVERYTHING}\n[simple]\nat_once = 1\nwaiting = 1");
    let daemon = Daemon::start(&veth.right, "", &more);
    let ask_some = || -> Vec<Answer> {
        let mut client = daemon.client();
        (0..10).map(|_| client.call("POST", "", Some(&simple(&json!({}))))).collect()
    };
    let answers: Vec<Answer> = thread::scope(|scope| {
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(ask_some)).collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    let (taken, refused): (Vec<_>, Vec<_>) =
        answers.into_iter().partition(|answer| answer.status == 200);
    assert!(!taken.is_empty() && !refused.is_empty(), "{} taken", taken.len());
    for answer in refused {
        assert_eq!((answer.status, answer.codes()), (429, vec![1147]));
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert_eq!(answer.header("x-should-retry"), Some("false"));
    }
    let mut client = daemon.client();
    for answer in taken {
        let ended = client.wait(answer.result()["id"].as_str().unwrap());
        assert_eq!(ended["status"], "success");
    }
}
