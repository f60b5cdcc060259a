//! SIGKILL at ten moments of a capture's life.

use std::{fs, thread, time::Duration};

use aya::programs::{SchedClassifier, TcAttachType};
use serde_json::{Value, json};
use tapline_tests::{
    daemon::Daemon,
    generator::{Generator, Template},
    netns::Namespace,
    privileged,
    process::{tool, wait_until},
    store::objects_in,
    veth::{End, Veth},
};

use super::{delivered, packets};

const SECOND: Duration = Duration::from_secs(1);

/// Small segments, so that some are sealed before the kill.
const SMALL: &str = "[buffers]\nsegment_bytes = 262144\nbytes = 131072";

/// No program of ours is on the interface.
fn is_clean(end: &End<'_>) -> bool {
    end.namespace.enter(|| {
        let xdp = fs::read_to_string(format!("/sys/class/net/{}/xdp", end.name));
        assert!(xdp.is_err(), "{xdp:?}");
        [TcAttachType::Ingress, TcAttachType::Egress].into_iter().all(|side| {
            let (_, programs) = SchedClassifier::query_tcx(&end.name, side).unwrap();
            programs.is_empty()
        })
    }) && !String::from_utf8(end.namespace.run(&["ip", "link", "show", &end.name]).stdout)
        .unwrap()
        .contains("xdp")
}

/// What must hold after a restart, whatever was killed when. Returns the captures.
fn check(daemon: &Daemon<'_>) -> Vec<Value> {
    let mut client = daemon.client();
    let listed = client.call("GET", "", None).result();
    let ids = listed.as_array().unwrap().iter().map(|capture| capture["id"].as_str().unwrap());
    let captures: Vec<Value> = ids.map(|id| client.wait(id)).collect();
    for capture in &captures {
        let id = capture["id"].as_str().unwrap();
        let status = capture["status"].as_str().unwrap();
        let files = daemon.files(id);
        let hidden = files.iter().any(|file| file.extension().is_none_or(|end| end != "pcapng"));
        assert!(!hidden, "{files:?}");
        assert_eq!(capture["packets_captured"], packets(&files), "{capture}");
        for file in &files {
            // Complains of a file that is cut short.
            tool(&["capinfos", "-c", file.to_str().unwrap()]);
        }
        assert_eq!(status == "success", packets(&files) > 0, "{capture}");
        if status == "success" {
            delivered::check(&objects_in(&daemon.folder().join("data")), "captures", capture);
        }
    }
    captures
}

/// Kills the daemon at a moment, starts it again, and looks at what there is; then captures once more.
fn killed_when(moment: &str, act: impl FnOnce(&mut Daemon<'_>, &Generator<'_>)) -> Vec<Value> {
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let generator = Generator::new(&veth.left, Template { length: 1000, ..Template::default() });
    let mut daemon = Daemon::start(&veth.right, "", SMALL);
    act(&mut daemon, &generator);
    daemon.kill();
    wait_until(&format!("no program left: {moment}"), 5 * SECOND, || is_clean(&veth.right));
    daemon.restart();
    let captures = check(&daemon);

    let mut client = daemon.client();
    let next = client.create(&daemon.full(&json!({ "packet_limit": 5 })));
    generator.send(10);
    let next = client.wait(next["id"].as_str().unwrap());
    assert_eq!(next["packets_captured"], 5, "{moment}: {next}");
    assert!(daemon.stop().success());
    wait_until("no program left after a stop", 5 * SECOND, || is_clean(&veth.right));
    captures
}

fn create(daemon: &Daemon<'_>) -> String {
    daemon.client().create(&daemon.full(&json!({})))["id"].as_str().unwrap().to_owned()
}

fn captured(daemon: &Daemon<'_>, id: &str) -> u64 {
    daemon.client().get(id)["packets_captured"].as_u64().unwrap()
}

fn count(captures: &[Value]) -> u64 {
    captures.iter().map(|capture| capture["packets_captured"].as_u64().unwrap()).sum()
}

#[test]
fn killed_before_any_capture() {
    privileged!();
    assert!(killed_when("idle", |_, _| ()).is_empty());
}

#[test]
fn killed_while_a_capture_is_created() {
    privileged!();
    for delay in [1, 4, 8] {
        killed_when("create", |daemon, _| {
            let daemon = &*daemon;
            let mut client = daemon.client();
            let body = daemon.full(&json!({})).to_string();
            let request = format!(
                "POST /accounts/{}/pcaps HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
                 content-length: {}\r\n\r\n{body}",
                tapline_tests::daemon::ACCOUNT,
                daemon.token,
                body.len()
            );
            thread::scope(|scope| {
                scope.spawn(move || client.raw(request.as_bytes()));
                thread::sleep(Duration::from_millis(delay));
                nix::sys::signal::kill(daemon.pid(), nix::sys::signal::SIGKILL).unwrap();
            });
        });
    }
}

#[test]
fn killed_right_after_a_capture_was_created() {
    privileged!();
    let captures = killed_when("created", |daemon, _| drop(create(daemon)));
    assert_eq!(captures.len(), 1, "what was answered is remembered");
    assert_eq!(captures[0]["status"], "failed");
}

#[test]
fn killed_with_packets_in_memory_only() {
    privileged!();
    let captures = killed_when("in memory", |daemon, generator| {
        let id = create(daemon);
        generator.send(20);
        wait_until("packets", 5 * SECOND, || captured(daemon, &id) == 20);
    });
    assert_eq!(captures.len(), 1);
}

#[test]
fn killed_with_a_hidden_segment() {
    privileged!();
    let captures = killed_when("hidden", |daemon, generator| {
        let id = create(daemon);
        generator.send(200);
        wait_until("packets", 5 * SECOND, || captured(daemon, &id) == 200);
        // The first buffer is in it, not only room for it.
        wait_until("a hidden segment", 5 * SECOND, || {
            let has_packets = |file| {
                fs::read(file).is_ok_and(|bytes| {
                    bytes.len() > 110_000 && bytes[100_000..110_000] != [0; 10_000]
                })
            };
            daemon.files(&id).iter().any(has_packets)
        });
    });
    assert!((100..=200).contains(&count(&captures)), "{captures:?}");
}

#[test]
fn killed_with_sealed_segments() {
    privileged!();
    let captures = killed_when("sealed", |daemon, generator| {
        let id = create(daemon);
        for _ in 0..10 {
            generator.send(200);
            thread::sleep(SECOND / 20);
        }
        wait_until("segments", 5 * SECOND, || daemon.files(&id).len() > 3);
    });
    assert!((1000..=2000).contains(&count(&captures)), "{captures:?}");
}

#[test]
fn killed_under_load() {
    privileged!();
    let captures = killed_when("load", |daemon, generator| {
        create(daemon);
        let daemon = &*daemon;
        thread::scope(|scope| {
            scope.spawn(|| generator.send_paced(50_000, SECOND));
            thread::sleep(SECOND / 2);
            nix::sys::signal::kill(daemon.pid(), nix::sys::signal::SIGKILL).unwrap();
        });
    });
    assert!(count(&captures) > 0);
}

#[test]
fn killed_right_after_a_stop_was_asked_for() {
    privileged!();
    let captures = killed_when("stop", |daemon, generator| {
        let id = create(daemon);
        generator.send(500);
        wait_until("packets", 5 * SECOND, || captured(daemon, &id) == 500);
        daemon.client().stop(&id);
    });
    assert!(count(&captures) > 0);
    assert!(captures[0]["stop_requested"].is_string(), "{captures:?}");
}

#[test]
fn killed_right_after_a_capture_was_sealed() {
    privileged!();
    let captures = killed_when("done", |daemon, generator| {
        let id = create(daemon);
        generator.send(500);
        wait_until("packets", 5 * SECOND, || captured(daemon, &id) == 500);
        daemon.client().stop(&id);
        daemon.client().wait(&id);
    });
    assert_eq!(count(&captures), 500, "what was told is true");
    assert!(captures[0].get("error_message").is_none());
}

#[test]
fn killed_while_it_recovers_from_being_killed() {
    privileged!();
    let captures = killed_when("recovery", |daemon, generator| {
        let id = create(daemon);
        generator.send(1000);
        wait_until("packets", 5 * SECOND, || captured(daemon, &id) == 1000);
        daemon.kill();
        for delay in [2, 5, 10, 20, 40] {
            daemon.spawn();
            thread::sleep(Duration::from_millis(delay));
            daemon.kill();
        }
        daemon.spawn();
    });
    assert!(count(&captures) > 0, "{captures:?}");
}
