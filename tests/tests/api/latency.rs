//! How long a client waits.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use hdrhistogram::Histogram;
use serde_json::json;
use tapline_tests::{
    daemon::Daemon,
    generator::{Generator, Template},
    netns::Namespace,
    privileged,
    process::wait_until,
    veth::Veth,
};

const ROUNDS: usize = 100;

/// Microseconds, up to a minute.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).unwrap()
}

fn utc_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}

#[test]
fn captures_start_and_end_without_delay() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "log = \"warn\"", "");
    let generator = Generator::new(&veth.left, Template::default());
    let done = AtomicBool::new(false);
    let (mut answered, mut first, mut sealed) = (histogram(), histogram(), histogram());
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                generator.send_paced(5000, Duration::from_secs(2));
            }
        });
        let mut client = daemon.client();
        for _ in 0..ROUNDS {
            let start = Instant::now();
            let capture = client.create(&daemon.full(&json!({})));
            answered.record(start.elapsed().as_micros() as u64).unwrap();
            let told = utc_ns();
            let id = capture["id"].as_str().unwrap();
            wait_until("packets", Duration::from_secs(5), || {
                client.get(id)["packets_captured"].as_u64().unwrap() > 20
            });
            let start = Instant::now();
            client.stop(id);
            let ended = client.wait(id);
            sealed.record(start.elapsed().as_micros() as u64).unwrap();
            assert_eq!(ended["status"], "success");
            let stats = client.call("GET", &format!("/{id}/stats"), None).result();
            let segments = stats["segments"].as_array().unwrap();
            let times = segments.iter().map(|segment| segment["first_ns"].as_u64().unwrap());
            // Often before the answer arrives: the job runs when it is sent.
            let late = times.min().unwrap().saturating_sub(told) / 1000;
            first.record(late.max(1)).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    for (what, histogram) in [
        ("POST sent to answered", &answered),
        ("POST answered to first packet", &first),
        ("stop sent to sealed and remembered", &sealed),
    ] {
        let at = |quantile| Duration::from_micros(histogram.value_at_quantile(quantile));
        println!("{what}: p50 {:.2?}, p99 {:.2?}, {ROUNDS} times", at(0.5), at(0.99));
    }
    // Loose, as other tests run beside: the point is the printed figures.
    assert!(first.value_at_quantile(0.5) < 50_000);
    assert!(sealed.value_at_quantile(0.5) < 100_000);
}
