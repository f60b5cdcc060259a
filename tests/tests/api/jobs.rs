//! Captures from beginning to end.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::fs::PermissionsExt as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tapline_tests::{
    daemon::{ACCOUNT, Client, Daemon, OTHER_ACCOUNT},
    generator::{Generator, Template},
    netns::Namespace,
    pcapng, privileged,
    process::wait_until,
    veth::Veth,
};

use super::{NO_RECORDER, packets, tshark_count};

const SECOND: Duration = Duration::from_secs(1);

fn captured(client: &mut Client, id: &str) -> u64 {
    client.get(id)["packets_captured"].as_u64().unwrap()
}

/// Hits of a capture that has ended; each was written, or lost to a named cause.
fn hits_by_the_law(client: &mut Client, id: &str) -> u64 {
    let stats = client.call("GET", &format!("/{id}/stats"), None).result();
    let dropped = stats["dropped"].as_object().unwrap().values();
    let dropped: u64 = dropped.map(|count| count.as_u64().unwrap()).sum();
    let of = |name: &str| stats[name]["packets"].as_u64().unwrap();
    assert_eq!(of("hits"), of("captured") + dropped, "the law: {stats}");
    let written = stats["latency"]["written"]["samples"].as_u64().unwrap();
    assert_eq!(written > 0, of("captured") > 0, "{stats}");
    of("hits")
}

fn id(capture: &Value) -> String {
    capture["id"].as_str().unwrap().to_owned()
}

/// Every key that a full capture may have.
const KEYS: [&str; 13] = [
    "byte_limit",
    "colo_name",
    "destination_conf",
    "error_message",
    "filter_v1",
    "id",
    "packets_captured",
    "status",
    "stop_requested",
    "submitted",
    "system",
    "time_limit",
    "type",
];

#[test]
fn a_capture_holds_just_the_packets_that_match_until_it_is_stopped() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", "");
    let mut client = daemon.client();
    let generator = Generator::new(&veth.left, Template { flows: 4, ..Template::default() });
    generator.send(100);
    let body = daemon.full(&json!({
        "filter_v1": { "source_port": 1001.0, "protocol": 17, "destination_address": "10.0.0.2" },
    }));
    let created = client.create(&body);
    assert_eq!(created["status"], "running");
    assert!(created.as_object().unwrap().keys().all(|key| KEYS.contains(&key.as_str())));
    let id = id(&created);
    generator.send(400);
    wait_until("live counts", 5 * SECOND, || captured(&mut client, &id) == 100);
    let stats = client.call("GET", &format!("/{id}/stats"), None).result();
    assert_eq!(stats["hits"]["packets"], 100);
    assert!(stats["latency"]["encoded"]["samples"].as_u64().unwrap() > 0, "{stats}");

    client.stop(&id);
    let ended = client.wait(&id);
    assert_eq!((&ended["status"], &ended["packets_captured"]), (&json!("success"), &json!(100)));
    assert!(ended["stop_requested"].is_string());
    generator.send(400);
    let files = daemon.files(&id);
    let name = files[0].file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with(&format!("ord02_test_{}_q", veth.right.name)), "{name}");
    let total: u64 = files.iter().map(|file| tshark_count(file, "udp.srcport == 1001")).sum();
    assert_eq!((total, packets(&files)), (100, 100));

    assert_eq!(hits_by_the_law(&mut client, &id), 100);
    // Once more changes nothing.
    client.stop(&id);
    assert_eq!(client.get(&id), ended);
}

#[test]
fn an_exclusive_interface_is_captured_by_the_transport_of_its_configuration() {
    privileged!();
    for (transport, said) in [("auto", "BPF rings"), ("af-xdp", "copy"), ("bpf-ring", "BPF rings")]
    {
        let (left, right) = (Namespace::new(), Namespace::new());
        let veth = Veth::new(&left, &right);
        let more = format!("mode = \"exclusive\"\ntransport = \"{transport}\"");
        let daemon = Daemon::start(&veth.right, "", &more);
        let opened = format!("exclusive, native XDP, {said}, 1 queue");
        assert!(daemon.log().contains(&opened), "{transport}: {}", daemon.log());
        let mut client = daemon.client();
        let id = id(&client.create(&daemon.full(&json!({}))));
        Generator::new(&veth.left, Template::default()).send(1000);
        wait_until("live counts", 5 * SECOND, || captured(&mut client, &id) == 1000);
        client.stop(&id);
        assert_eq!(client.wait(&id)["status"], "success");
        assert_eq!(packets(&daemon.files(&id)), 1000);
        assert_eq!(hits_by_the_law(&mut client, &id), 1000);
    }
}

#[test]
fn limits_end_a_capture_and_one_without_packets_fails_as_documented() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", "");
    let mut client = daemon.client();
    let generator = Generator::new(&veth.left, Template { length: 100, ..Template::default() });
    let by_packets = id(&client.create(&daemon.full(&json!({ "packet_limit": 10 }))));
    let by_bytes = id(&client.create(&daemon.full(&json!({ "byte_limit": 1050 }))));
    let by_time = id(&client.create(&daemon.full(&json!({ "time_limit": 5 }))));
    let nothing = daemon.full(&json!({ "time_limit": 5, "filter_v1": { "protocol": 6 } }));
    let nothing = id(&client.create(&nothing));
    generator.send(1000);
    for (id, count) in [(&by_packets, 10), (&by_bytes, 10), (&by_time, 1000)] {
        let ended = client.wait(id);
        assert_eq!(ended["status"], "success", "{ended}");
        assert_eq!(ended["packets_captured"], count, "{ended}");
        assert!(hits_by_the_law(&mut client, id) >= count);
        assert!(ended.get("stop_requested").is_none());
        assert_eq!(packets(&daemon.files(id)), count);
    }
    let failed = client.wait(&nothing);
    assert_eq!(failed["status"], "failed");
    assert_eq!(
        failed["error_message"],
        "No packets matched the filter in the time limit given. Please modify the filter or try again."
    );
    let listed = client.call("GET", "", None).result();
    let ids: Vec<_> = listed.as_array().unwrap().iter().map(id_of).collect();
    assert_eq!(ids, [nothing, by_time, by_bytes, by_packets], "newest first");
}

fn id_of(capture: &Value) -> String {
    id(capture)
}

#[test]
fn an_account_sees_its_own_captures_only_and_a_reader_cannot_write() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", "");
    let mut client = daemon.client();
    let id = id(&client.create(&daemon.full(&json!({}))));
    let reader = daemon.new_token(ACCOUNT, "read");
    let mut reader = Client::new(daemon.connect().unwrap(), &reader);
    assert_eq!(reader.get(&id)["id"], json!(id));
    assert_eq!(reader.call("PUT", &format!("/{id}/stop"), None).status, 403);

    let other = daemon.new_token(OTHER_ACCOUNT, "write");
    let mut other_client = Client::new(daemon.connect().unwrap(), &other);
    let refused = other_client.call("GET", &format!("/{id}"), None);
    assert_eq!((refused.status, refused.codes()), (403, vec![10000]));
    // In its own account the id is unknown, whatever it is asked.
    for (method, path) in
        [("GET", ""), ("PUT", "/stop"), ("GET", "/stats"), ("GET", "/events"), ("GET", "/download")]
    {
        let request = format!(
            "{method} /accounts/{OTHER_ACCOUNT}/pcaps/{id}{path} HTTP/1.1\r\nhost: x\r\n\
             authorization: Bearer {other}\r\ncontent-length: 0\r\n\r\n"
        );
        let answer = other_client.raw(request.as_bytes()).unwrap();
        assert_eq!((answer.status, answer.codes()), (404, vec![1130]), "{method} {path}");
    }
    assert_eq!(client.get(&id)["status"], "running");
}

#[test]
fn beyond_the_limit_a_create_is_refused_and_told_not_to_be_repeated() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "max_jobs = 1", "");
    let mut client = daemon.client();
    let first = id(&client.create(&daemon.full(&json!({}))));
    let refused = client.call("POST", "", Some(&daemon.full(&json!({}))));
    assert_eq!((refused.status, refused.codes()), (409, vec![1140]));
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    client.stop(&first);
    client.wait(&first);
    wait_until("a free slot", SECOND, || {
        client.call("POST", "", Some(&daemon.full(&json!({})))).status == 200
    });
    let listed = client.call("GET", "", None).result();
    assert_eq!(listed.as_array().unwrap().len(), 2, "a refused one is not listed");
}

#[test]
fn sixty_four_captures_from_sixteen_clients_hold_just_their_packets() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "max_jobs = 64", NO_RECORDER);
    let generator = Generator::new(&veth.left, Template { flows: 64, ..Template::default() });
    let done = AtomicBool::new(false);
    let barrier = std::sync::Barrier::new(16);
    let client = |number: u64| {
        let mut client = daemon.client();
        let ports: Vec<u64> = (0..4).map(|at| 1000 + number * 4 + at).collect();
        let create = |port: &u64| {
            let filter = json!({ "filter_v1": { "source_port": port } });
            id(&client.create(&daemon.full(&filter)))
        };
        let ids: Vec<String> = ports.iter().map(create).collect();
        // All 64 run before the first is stopped.
        barrier.wait();
        for id in &ids {
            wait_until("packets", 20 * SECOND, || captured(&mut client, id) > 10);
        }
        barrier.wait();
        for id in &ids {
            client.stop(id);
        }
        let ended: Vec<_> = ports.into_iter().zip(ids.iter().map(|id| client.wait(id))).collect();
        ended
    };
    let client = &client;
    let results: Vec<(u64, Value)> = thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                generator.send_paced(20_000, SECOND / 4);
            }
        });
        let threads: Vec<_> = (0..16).map(|number| scope.spawn(move || client(number))).collect();
        let results = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        done.store(true, Ordering::Relaxed);
        results
    });
    assert_eq!(results.len(), 64);
    let mut client = daemon.client();
    for (port, capture) in results {
        assert_eq!(capture["status"], "success", "{capture}");
        let hits = hits_by_the_law(&mut client, &id(&capture));
        assert!(hits >= capture["packets_captured"].as_u64().unwrap(), "{capture}");
        let mut count = 0;
        for file in daemon.files(&id(&capture)) {
            for packet in pcapng::read(&file).packets {
                assert_eq!(u64::from(u16::from_be_bytes([packet.data[34], packet.data[35]])), port);
                count += 1;
            }
        }
        assert_eq!(capture["packets_captured"], count);
    }
}

#[test]
fn sigterm_seals_what_runs_and_the_next_start_has_it() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let mut daemon = Daemon::start(&veth.right, "", "");
    let mut client = daemon.client();
    let with = id(&client.create(&daemon.full(&json!({}))));
    let filter = json!({ "filter_v1": { "protocol": 132 } });
    let without = id(&client.create(&daemon.full(&filter)));
    Generator::new(&veth.left, Template::default()).send(500);
    wait_until("packets", 5 * SECOND, || captured(&mut client, &with) == 500);
    assert!(daemon.stop().success(), "{}", daemon.log());
    assert_eq!(packets(&daemon.files(&with)), 500);
    let mode = fs::metadata(daemon.folder().join("data")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "nobody else reads the data folder");
    daemon.restart();
    let mut client = daemon.client();
    let ended = client.get(&with);
    assert_eq!((&ended["status"], &ended["packets_captured"]), (&json!("success"), &json!(500)));
    let ended = client.get(&without);
    assert_eq!(ended["status"], "failed");
    assert!(ended["error_message"].as_str().unwrap().contains("stopped"), "{ended}");
}

#[test]
fn events_come_while_a_capture_runs_and_end_with_it() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", "");
    let id = id(&daemon.client().create(&daemon.full(&json!({ "time_limit": 2 }))));
    Generator::new(&veth.left, Template::default()).send(10);
    let mut stream = daemon.connect().unwrap();
    let request = format!(
        "GET /accounts/{ACCOUNT}/pcaps/{id}/events HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         authorization: Bearer {}\r\n\r\n",
        daemon.token
    );
    stream.write_all(request.as_bytes()).unwrap();
    let lines: Vec<String> = BufReader::new(stream).lines().map(Result::unwrap).collect();
    assert!(lines[0].contains("200"), "{lines:?}");
    assert!(lines.iter().any(|line| line == "content-type: text/event-stream"), "{lines:?}");
    let events: Vec<_> = lines.iter().filter_map(|line| line.strip_prefix("event: ")).collect();
    assert_eq!(events.first(), Some(&"capture"));
    assert!(events.contains(&"stats"), "{events:?}");
    assert_eq!(events.last(), Some(&"capture"));
    let data: Vec<Value> = lines
        .iter()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap())
        .collect();
    assert_eq!(data[0]["status"], "running");
    let last = data.last().unwrap();
    assert_eq!((&last["status"], &last["packets_captured"]), (&json!("success"), &json!(10)));
}

#[test]
fn an_interface_that_goes_away_fails_its_captures_and_one_that_comes_back_serves_again() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let name = veth.right.name.clone();
    let daemon = Daemon::start(&veth.right, "", "");
    let mut client = daemon.client();
    let id = id(&client.create(&daemon.full(&json!({}))));
    right.run(&["ip", "link", "del", &name]);
    let ended = client.wait(&id);
    assert_eq!(ended["status"], "failed");
    assert!(ended["error_message"].as_str().unwrap().contains("gone"), "{ended}");
    let refused = client.call("POST", "", Some(&daemon.full(&json!({}))));
    assert_eq!((refused.status, refused.codes()), (503, vec![1171]));
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    let ready = b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n";
    assert_eq!(client.raw(ready).unwrap().status, 503);
    right.run(&["ip", "link", "add", &name, "type", "veth", "peer", "name", "peer0"]);
    right.run(&["ip", "link", "set", &name, "up"]);
    assert_eq!(client.raw(ready).unwrap().status, 200);
    assert_eq!(client.create(&daemon.full(&json!({})))["status"], "running");
}
