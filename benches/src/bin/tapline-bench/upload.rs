//! Whether what is captured leaves this host as fast as it comes: `taplined` captures at rates that rise,
//! to a folder and to an S3 server on this host (`s3s-fs`), and what waits is watched.
//!
//! What waits is what has been sealed and is not where it belongs, hashed and confirmed; with a bucket it
//! is in the spool. As long as delivery keeps up, it is a segment or two however long the capture lasts.

use std::{
    fmt::Write as _,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tapline_tests::{
    daemon::{ACCOUNT, Client, Daemon},
    generator::{Generator, Template},
    netns::Namespace,
    store::{ACCESS_KEY, S3Fs, SECRET_KEY},
    veth::Veth,
};

use crate::{results::Spread, run::as_f64};

/// Captured bytes a second.
const RATES: [u64; 3] = [125_000_000, 250_000_000, 500_000_000];

const LENGTH: usize = 1500;

/// How long a delivery may take after its capture has ended.
const PATIENCE: Duration = Duration::from_mins(2);

const BUCKET: &str = "captures";
const PORT: u16 = 9000;

const CONFIG: &str = "[recorder]\nenabled = false\n[limits]\nrequest_seconds = 60\n\
    [buffers]\nper_queue = 64\nbytes = 1048576\nbpf_ring_bytes = 67108864\nsegment_bytes = 67108864\n\
    [spool]\nbytes = 8589934592\ncapture_bytes = 8589934592\n";

/// What came of one capture.
struct Outcome {
    captured: f64,
    lost: f64,
    most: u64,
    last: u64,
    rest: Duration,
}

/// Runs them; gives a table and its values.
pub(crate) fn measure(repeats: usize, duration: Duration) -> (String, Value) {
    let stores: &[&str] = match S3Fs::available() {
        Ok(()) => &["folder", "S3"],
        Err(error) => {
            println!("no S3 server: {error}");
            &["folder"]
        }
    };
    let mut text = format!(
        "\ndelivery, {LENGTH} bytes a packet, {repeats} rounds of {} s\n{:<8} {:>8} {:>18} {:>12} {:>20} {:>18} {:>18}\n",
        duration.as_secs_f64(),
        "to",
        "MB/s",
        "captured, MB/s",
        "lost, %",
        "most waiting, MB",
        "at the end, MB",
        "rest took, s",
    );
    let mut values = Vec::new();
    for store in stores {
        for rate in RATES {
            let runs: Vec<_> =
                (0..repeats).map(|_| capture(*store == "S3", rate, duration)).collect();
            let of = |value: fn(&Outcome) -> f64| {
                Spread::of(runs.iter().map(value).collect::<Vec<f64>>()).unwrap()
            };
            let captured = of(|run| run.captured / 1e6);
            let lost = of(|run| run.lost * 100.0);
            let most = of(|run| as_f64(run.most) / 1e6);
            let at_end = of(|run| as_f64(run.last) / 1e6);
            let rest = of(|run| run.rest.as_secs_f64());
            writeln!(
                text,
                "{store:<8} {:>8} {:>18} {:>12} {:>20} {:>18} {:>18}",
                rate / 1_000_000,
                captured.show(1.0, 0),
                lost.show(1.0, 2),
                most.show(1.0, 0),
                at_end.show(1.0, 0),
                rest.show(1.0, 2),
            )
            .unwrap();
            values.push(json!({
                "store": store, "rate": rate, "captured_mb_s": captured.json(), "lost_percent": lost.json(),
                "most_waiting_mb": most.json(), "waiting_at_end_mb": at_end.json(), "rest_seconds": rest.json(),
            }));
        }
    }
    (text, Value::Array(values))
}

fn capture(to_bucket: bool, rate: u64, duration: Duration) -> Outcome {
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = to_bucket.then(|| S3Fs::start(&right, PORT, &[BUCKET]));
    let keys = tempfile::NamedTempFile::new().unwrap();
    let mut config = CONFIG.to_owned();
    if to_bucket {
        let text = format!(
            "[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        );
        std::fs::write(keys.path(), text).unwrap();
        let endpoint = format!("http://127.0.0.1:{PORT}");
        write!(
            config,
            "[destinations]\nendpoints = [\"{endpoint}\"]\n[[destinations.s3_credentials]]\n\
             endpoint = \"{endpoint}\"\nfile = \"{}\"\n",
            keys.path().display()
        )
        .unwrap();
    }
    let daemon = Daemon::start(&veth.right, "log = \"warn\"", &config);
    let mut client = daemon.client();
    let destination = match &store {
        None => daemon.destination(),
        Some(store) => own(&mut client, store),
    };
    let created = client.create(&daemon.full(&json!({ "destination_conf": destination })));
    let id = created["id"].as_str().unwrap();
    let generator =
        Generator::new(&veth.left, Template { length: LENGTH, ..Template::default() }).pinned(0);

    let done = AtomicBool::new(false);
    let (took, waiting) = thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut client = daemon.client();
            let mut waiting = Vec::new();
            while !done.load(Relaxed) {
                waiting.push(unsent(&mut client, id));
                thread::sleep(Duration::from_millis(50));
            }
            waiting
        });
        let start = Instant::now();
        generator.send_paced(rate / LENGTH as u64, duration);
        let took = start.elapsed();
        done.store(true, Relaxed);
        (took, watcher.join().unwrap())
    });
    // The one from before has been idle for too long.
    let mut client = daemon.client();
    client.stop(id);
    let start = Instant::now();
    while !matches!(client.get(id)["status"].as_str(), Some("success" | "failed")) {
        assert!(start.elapsed() < PATIENCE, "{}", client.get(id));
        thread::sleep(Duration::from_millis(10));
    }
    let rest = start.elapsed();
    let ended = client.get(id);
    assert_eq!(ended["status"], "success", "{ended}");
    let stats = client.call("GET", &format!("/{id}/stats"), None).result();
    let law = &stats["summary"]["law"];
    let packets = |name: &str| law[name]["packets"].as_u64().unwrap();
    let (hits, written) = (packets("hits"), packets("written"));
    let drops = law["drops"].as_object().unwrap().values();
    assert_eq!(hits, written + drops.map(|count| count.as_u64().unwrap()).sum::<u64>(), "{law}");
    assert_eq!(stats["upload"]["unstored"], 0);
    Outcome {
        captured: as_f64(written) * as_f64(LENGTH as u64) / took.as_secs_f64(),
        lost: as_f64(hits - written) / as_f64(hits),
        most: waiting.iter().copied().max().unwrap_or(0),
        last: waiting.last().copied().unwrap_or(0),
        rest,
    }
}

/// Bytes that have been sealed and are not where they belong.
fn unsent(client: &mut Client, id: &str) -> u64 {
    let stats = client.call("GET", &format!("/{id}/stats"), None).result();
    let segments = stats["upload"]["segments"].as_array().unwrap();
    let waiting = segments.iter().filter(|segment| segment["state"] != "stored");
    waiting.map(|segment| segment["size"].as_u64().unwrap()).sum()
}

/// Proves that the bucket is the account's own.
fn own(client: &mut Client, store: &S3Fs<'_>) -> String {
    let destination = format!("s3://{BUCKET}/dir?endpoint=http://127.0.0.1:{PORT}");
    let body = json!({ "destination_conf": destination });
    let added = client.call("POST", "/ownership", Some(&body)).result();
    let name = format!("dir/{}", added["filename"].as_str().unwrap());
    let challenge = String::from_utf8(store.objects(BUCKET)[&name].clone()).unwrap();
    let body = json!({ "destination_conf": destination, "ownership_challenge": challenge });
    let proved = client.call("POST", "/ownership/validate", Some(&body)).result();
    assert_eq!(proved["status"], "success", "account {ACCOUNT}: {proved}");
    destination
}
