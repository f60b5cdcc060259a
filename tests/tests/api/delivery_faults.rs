//! What goes wrong on the way to a bucket. In the end every segment is there, once and whole, or the
//! capture says which are not, and they can be sent again.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::symlink,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use serde_json::{Value, json};
use tapline_tests::{
    capture::number,
    daemon::{Client, Daemon, OTHER_ACCOUNT},
    disk::SmallDisk,
    generator::{Generator, Template},
    needs,
    netns::Namespace,
    process::wait_until,
    proxy::{Act, Proxy, Request, Seen},
    store::{Moto, Objects, S3Fs, objects_in},
    veth::Veth,
};

use super::{
    buckets::{BUCKET, Keys, PROXY, STORE, own, s3},
    delivered,
    delivery::arrive,
};

/// Longer than any step takes, on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);

/// Small segments, which are sent soon.
const SMALL: &str = "[upload]\nsegment_seconds = 1\n[buffers]\nsegment_bytes = 262144\n\
                     bytes = 131072\nper_queue = 64\n";

/// Segments of several parts.
const LONG: &str = "[buffers]\nbytes = 131072\nper_queue = 256\n";

/// A daemon whose account owns a directory of a bucket, behind a proxy.
struct Scene<'a> {
    veth: &'a Veth<'a>,
    store: S3Fs<'a>,
    proxy: Proxy,
    daemon: Daemon<'a>,
    generator: Generator<'a>,
}

/// Plays a scene with this configuration.
fn play(config: &str, scene: impl FnOnce(&mut Scene<'_>)) {
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = S3Fs::start(&right, STORE, &[BUCKET]);
    let proxy = Proxy::start(&right, PROXY, STORE);
    let keys = Keys::new();
    let daemon = Daemon::start(&veth.right, "", &[config, &keys.config(&[PROXY])].concat());
    own(&mut daemon.client(), &s3(PROXY, "dir"), "dir", || store.objects(BUCKET));
    let template = Template { length: 1000, ..Template::default() };
    let generator = Generator::new(&veth.left, template);
    scene(&mut Scene { veth: &veth, store, proxy, daemon, generator });
}

impl Scene<'_> {
    /// A client on a connection of its own, which has not been idle for long.
    fn client(&self) -> Client {
        self.daemon.client()
    }

    /// Starts a capture to the bucket.
    fn start(&self) -> String {
        let to_bucket = json!({ "destination_conf": s3(PROXY, "dir") });
        let capture = self.client().create(&self.daemon.full(&to_bucket));
        capture["id"].as_str().unwrap().to_owned()
    }

    /// Sends frames, and waits until the capture has those that arrive.
    fn send(&self, id: &str, count: u64) {
        let (mut there, mut rest) = (self.captured(id), count);
        while rest > 0 {
            // Not more at once than its rings hold.
            let now = rest.min(1000);
            there += arrive(self.veth, &self.generator, now);
            wait_until("the packets", PATIENCE, || self.captured(id) == there);
            rest -= now;
        }
    }

    fn captured(&self, id: &str) -> u64 {
        number(&self.client().get(id)["packets_captured"])
    }

    /// How far each segment has come.
    fn upload(&self, id: &str) -> Value {
        self.client().call("GET", &format!("/{id}/stats"), None).result()["upload"].clone()
    }

    /// Waits until this many segments are where they belong.
    fn wait_until_stored(&self, id: &str, least: u64) {
        wait_until("segments in the bucket", PATIENCE, || {
            number(&self.upload(id)["stored"]) >= least
        });
    }

    /// Waits until the store has been asked for something that it did not do.
    fn wait_until_failing(&self, id: &str) {
        wait_until("attempts that fail", PATIENCE, || {
            let upload = self.upload(id);
            let segments = upload["segments"].as_array().unwrap();
            segments.iter().any(|segment| segment["retries"] != 0)
        });
    }

    /// Stops a capture, and waits for its end, which must be this.
    fn end(&self, id: &str, status: &str) -> Value {
        self.client().stop(id);
        self.wait(id, status)
    }

    fn wait(&self, id: &str, status: &str) -> Value {
        let ended = self.client().wait(id);
        assert_eq!(ended["status"], status, "{ended}");
        ended
    }

    fn objects(&self) -> Objects {
        self.store.objects(BUCKET)
    }

    fn retry(&self, id: &str) {
        let again = self.client().call("POST", &format!("/{id}/retry"), None).result();
        assert_eq!(again["status"], "conversion_pending", "{again}");
        assert!(again["error_message"].is_null(), "{again}");
    }

    /// All of it is in the bucket, and nothing of it is anywhere else.
    fn check(&self, ended: &Value) -> Value {
        let manifest = delivered::check(&self.objects(), "dir", ended);
        let upload = self.upload(ended["id"].as_str().unwrap());
        assert_eq!(upload["unstored"], 0, "{upload}");
        let count = manifest["objects"].as_array().unwrap().len();
        assert_eq!(number(&upload["stored"]), count as u64);
        assert_eq!(self.store.unfinished(), 0);
        assert!(self.spool().is_empty(), "{:?}", self.spool().keys());
        manifest
    }

    /// Bytes in the spool while it changes.
    fn spool_bytes(&self) -> u64 {
        let spool = self.daemon.folder().join("data/spool");
        let line = ["--apparent-size", "--block-size=1", "--summarize", spool.to_str().unwrap()];
        // It fails when a file goes away while it looks, and still says what it has found.
        let output = Command::new("du").args(line).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        said.split('\t').next().unwrap().parse().unwrap()
    }

    fn spool(&self) -> Objects {
        objects_in(&self.daemon.folder().join("data/spool"))
    }

    /// A capture that failed because of this says so, and which of its segments are missing; they are
    /// in the spool, whole, and arrive when they are sent again.
    fn check_failed(&self, ended: &Value, said: &str) {
        let message = ended["error_message"].as_str().unwrap();
        assert!(message.contains(said) && message.contains("retry"), "{message}");
        let id = ended["id"].as_str().unwrap();
        let upload = self.upload(id);
        let segments = upload["segments"].as_array().unwrap();
        let lacking: Vec<_> = segments.iter().filter(|one| one["state"] != "stored").collect();
        assert!(!lacking.is_empty(), "{upload}");
        assert_eq!(number(&upload["unstored"]), lacking.len() as u64);
        let first = lacking[0]["name"].as_str().unwrap();
        assert!(message.contains(first), "{first} is not in: {message}");
        let (spool, objects) = (self.spool(), self.objects());
        for segment in segments {
            let name = format!("pcap_{id}/{}", segment["name"].as_str().unwrap());
            let is_stored = segment["state"] == "stored";
            let (here, there) = (spool.get(&name), objects.get(&format!("dir/{name}")));
            let size = here.map(|bytes| bytes.len() as u64);
            assert_eq!(size, (!is_stored).then(|| number(&segment["size"])), "{segment}");
            // A store may have taken one and not lived to say so.
            let whole = if is_stored { there.is_some() } else { there.is_none() || there == here };
            assert!(whole, "{segment}");
        }
        assert!(!objects.contains_key(&format!("dir/pcap_{id}/manifest.json")));
    }
}

fn is_segment(request: &Request) -> bool {
    request.is_upload() && request.path.contains("pcapng")
}

#[test]
fn a_store_that_is_down_when_a_capture_starts_gets_everything_when_it_is_up() {
    needs!(S3Fs::available);
    play(SMALL, |scene| {
        scene.store.kill();
        let id = scene.start();
        scene.send(&id, 2000);
        scene.wait_until_failing(&id);
        let upload = scene.upload(&id);
        assert_eq!(upload["stored"], 0);
        assert!(upload.to_string().contains("the connection"), "{upload}");
        scene.client().stop(&id);
        wait_until("the capture to wait for its store", PATIENCE, || {
            let status = scene.client().get(&id)["status"].clone();
            status.as_str().unwrap().starts_with("conversion_")
        });
        scene.store.restart();
        let ended = scene.wait(&id, "success");
        scene.check(&ended);
    });
}

#[test]
fn a_store_that_goes_down_while_a_capture_runs_gets_the_rest_when_it_is_back() {
    needs!(S3Fs::available);
    play(SMALL, |scene| {
        let id = scene.start();
        scene.send(&id, 1000);
        scene.wait_until_stored(&id, 2);
        scene.store.kill();
        scene.send(&id, 1000);
        scene.wait_until_failing(&id);
        scene.store.restart();
        scene.send(&id, 1000);
        let ended = scene.end(&id, "success");
        scene.check(&ended);
    });
}

#[test]
fn a_store_that_is_too_slow_costs_packets_that_are_counted_and_nothing_else() {
    const LIMIT: u64 = 4 << 20;
    needs!(S3Fs::available);
    let config = format!("{SMALL}[spool]\nbytes = {LIMIT}\n");
    play(&config, |scene| {
        scene.proxy.rule(|_| Act::Slow(1_000_000));
        let id = scene.start();
        // What goes elsewhere meanwhile.
        let beside = scene.client().create(&scene.daemon.full(&json!({})));
        let beside = beside["id"].as_str().unwrap();
        let mut most = 0;
        let mut arrived = 0;
        while arrived < 16_000 {
            arrived += arrive(scene.veth, &scene.generator, 2000);
            most = most.max(scene.spool_bytes());
        }
        // A segment's first and last blocks come on top, when there is no room for more.
        assert!(most > LIMIT / 2 && most < LIMIT + LIMIT / 8, "{most}");
        scene.client().stop(beside);
        let whole = scene.wait(beside, "success");
        let stats = scene.client().call("GET", &format!("/{beside}/stats"), None).result();
        let law = &stats["summary"]["law"];
        assert_eq!(number(&law["hits"]["packets"]), arrived);
        assert_eq!(law["drops"]["spool_full"], 0, "{law}");
        assert!(number(&whole["packets_captured"]) > arrived / 2);

        scene.client().stop(&id);
        scene.proxy.rule(|_| Act::Pass);
        let ended = scene.wait(&id, "success");
        // The law holds in it.
        let manifest = scene.check(&ended);
        let law = &manifest["law"];
        assert_eq!(number(&law["hits"]["packets"]), arrived);
        assert!(number(&law["drops"]["spool_full"]) > 0, "{law}");
    });
}

#[test]
fn a_store_that_denies_access_for_a_while_gets_everything() {
    needs!(S3Fs::available);
    play(SMALL, |scene| {
        scene.proxy.rule(|_| Act::refuse(403));
        let id = scene.start();
        scene.send(&id, 1000);
        scene.wait_until_failing(&id);
        scene.proxy.rule(|_| Act::Pass);
        let ended = scene.end(&id, "success");
        scene.check(&ended);
    });
}

#[test]
fn a_store_that_denies_access_fails_the_capture_which_can_be_sent_again() {
    needs!(S3Fs::available);
    play(SMALL, |scene| {
        let id = scene.start();
        scene.send(&id, 1000);
        scene.wait_until_stored(&id, 1);
        scene.proxy.rule(|_| Act::refuse(403));
        scene.send(&id, 1000);
        let ended = scene.end(&id, "failed");
        scene.check_failed(&ended, "403");

        // Of no use as long as nothing has changed, nor to others.
        scene.retry(&id);
        let ended = scene.wait(&id, "failed");
        scene.check_failed(&ended, "403");
        let token = scene.daemon.new_token(OTHER_ACCOUNT, "write");
        let mut other = Client::new(scene.daemon.connect().unwrap(), &token).of(OTHER_ACCOUNT);
        let path = format!("/{id}/retry");
        assert_eq!(other.call("POST", &path, None).status, 404);

        // What waits is remembered.
        assert!(scene.daemon.stop().success());
        scene.daemon.restart();
        scene.proxy.rule(|_| Act::Pass);
        scene.retry(&id);
        let ended = scene.wait(&id, "success");
        assert!(ended["error_message"].is_null(), "{ended}");
        scene.check(&ended);
        let again = scene.client().call("POST", &path, None);
        assert_eq!((again.status, again.codes()), (409, vec![1144]));
        assert_eq!(again.header("x-should-retry"), Some("false"));
    });
}

#[test]
fn what_waits_to_be_sent_again_needs_a_bucket_that_is_still_the_accounts_own() {
    needs!(S3Fs::available);
    play(SMALL, |scene| {
        let id = scene.start();
        scene.proxy.rule(|_| Act::refuse(403));
        scene.send(&id, 1000);
        scene.end(&id, "failed");
        scene.proxy.rule(|_| Act::Pass);
        let owned = scene.client().call("GET", "/ownership", None).result();
        let path = format!("/ownership/{}", owned[0]["id"].as_str().unwrap());
        assert_eq!(scene.client().call("DELETE", &path, None).status, 204);
        let refused = scene.client().call("POST", &format!("/{id}/retry"), None);
        assert_eq!((refused.status, refused.codes()), (400, vec![1111]));
        own(&mut scene.client(), &s3(PROXY, "dir"), "dir", || scene.store.objects(BUCKET));
        scene.retry(&id);
        let ended = scene.wait(&id, "success");
        scene.check(&ended);
    });
}

#[test]
fn a_bucket_that_has_been_deleted_is_named_and_gets_everything_when_it_is_there_again() {
    needs!(Moto::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = Moto::start(&right, STORE, &[BUCKET]);
    let keys = Keys::new();
    let daemon = Daemon::start(&veth.right, "", &[SMALL, &keys.config(&[STORE])].concat());
    let mut client = daemon.client();
    let destination = s3(STORE, "dir");
    own(&mut client, &destination, "dir", || store.objects(BUCKET));
    store.delete(BUCKET);
    let capture = client.create(&daemon.full(&json!({ "destination_conf": destination })));
    let id = capture["id"].as_str().unwrap();
    let generator = Generator::new(&veth.left, Template::default());
    let arrived = arrive(&veth, &generator, 100);
    wait_until("the packets", PATIENCE, || number(&client.get(id)["packets_captured"]) == arrived);
    client.stop(id);
    let ended = client.wait(id);
    assert_eq!(ended["status"], "failed");
    let message = ended["error_message"].as_str().unwrap();
    assert!(message.contains("no such bucket (404 NoSuchBucket)"), "{message}");
    store.make(BUCKET);
    client.call("POST", &format!("/{id}/retry"), None).result();
    let ended = client.wait(id);
    assert_eq!(ended["status"], "success", "{ended}");
    delivered::check(&store.objects(BUCKET), "dir", &ended);
}

#[test]
fn a_storm_of_503_is_waited_out() {
    needs!(S3Fs::available);
    play(SMALL, |scene| {
        let left = AtomicU32::new(20);
        scene.proxy.rule(move |_| {
            let one_less = |left: u32| left.checked_sub(1);
            let busy = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok();
            if busy { Act::refuse(503) } else { Act::Pass }
        });
        let id = scene.start();
        scene.send(&id, 2000);
        let ended = scene.end(&id, "success");
        scene.check(&ended);
        let seen = scene.proxy.seen();
        assert_eq!(seen.iter().filter(|seen| seen.status == Some(503)).count(), 20);
        // Nothing that was taken is sent again.
        let mut taken = HashMap::new();
        for seen in seen.iter().filter(|seen| seen.status == Some(200)) {
            *taken.entry(&seen.request.path).or_insert(0) += 1;
        }
        assert!(taken.values().all(|count| *count == 1), "{taken:?}");
    });
}

/// Of every multipart upload that was completed, each part had been taken.
fn no_failed_part_was_completed(seen: &[Seen]) {
    let id = |query: &str| {
        let pair = query.split('&').find(|pair| pair.starts_with("uploadId="));
        pair.unwrap().to_owned()
    };
    for (at, done) in seen.iter().enumerate().filter(|(_, seen)| seen.request.is_completion()) {
        let upload = id(&done.request.query);
        let mut parts = HashMap::new();
        for part in &seen[..at] {
            if part.request.is_part() && id(&part.request.query) == upload {
                let taken = parts.entry(part.request.query.clone()).or_insert(false);
                *taken |= part.status == Some(200);
            }
        }
        assert!(parts.len() > 1 && parts.values().all(|taken| *taken), "{parts:?}");
    }
}

#[test]
fn a_connection_that_is_reset_in_a_part_completes_nothing_that_is_not_whole() {
    needs!(S3Fs::available);
    play(LONG, |scene| {
        // More often than the client of the store tries by itself.
        let left = AtomicU32::new(5);
        scene.proxy.rule(move |request| {
            let second = request.is_part() && request.query.contains("partNumber=2");
            let one_less = |left: u32| left.checked_sub(1);
            if second && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
                Act::Reset(1 << 20)
            } else {
                Act::Pass
            }
        });
        let id = scene.start();
        scene.send(&id, 25_000);
        let ended = scene.end(&id, "success");
        scene.check(&ended);
        let seen = scene.proxy.seen();
        assert_eq!(seen.iter().filter(|seen| seen.act == Act::Reset(1 << 20)).count(), 5);
        no_failed_part_was_completed(&seen);
        let aborts = seen.iter().filter(|seen| seen.request.method == "DELETE").count();
        assert!(aborts > 0, "what came to nothing is cleared away in the store: {seen:?}");
    });
}

#[test]
fn answers_that_are_lost_on_the_way_back_make_nothing_double() {
    needs!(S3Fs::available);
    play(LONG, |scene| {
        let (whole, complete) = (AtomicU32::new(1), AtomicU32::new(1));
        scene.proxy.rule(move |request| {
            let lose = if request.is_completion() {
                &complete
            } else if is_segment(request) {
                &whole
            } else {
                return Act::Pass;
            };
            let one_less = |left: u32| left.checked_sub(1);
            let is_lost = lose.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok();
            if is_lost { Act::Lose } else { Act::Pass }
        });
        let id = scene.start();
        scene.send(&id, 25_000);
        let ended = scene.end(&id, "success");
        scene.check(&ended);
        let seen = scene.proxy.seen();
        assert_eq!(seen.iter().filter(|seen| seen.act == Act::Lose).count(), 2, "{seen:?}");
        no_failed_part_was_completed(&seen);
    });
}

#[test]
fn a_spool_whose_disk_is_full_fails_the_capture_with_all_that_it_has() {
    needs!(S3Fs::available);
    play(SMALL, |scene| {
        let small = SmallDisk::new(2048);
        let spool = scene.daemon.folder().join("data/spool");
        assert!(scene.daemon.stop().success());
        fs::remove_dir(&spool).unwrap();
        symlink(small.path(), &spool).unwrap();
        scene.daemon.restart();
        scene.store.kill();
        let id = scene.start();
        for _ in 0..3 {
            arrive(scene.veth, &scene.generator, 1500);
        }
        wait_until("the disk to be full", PATIENCE, || {
            scene.client().get(&id)["status"] != "running"
        });
        scene.store.restart();
        let ended = scene.wait(&id, "failed");
        let message = ended["error_message"].as_str().unwrap();
        assert!(message.contains("No space left on device"), "{message}");
        assert!(number(&ended["packets_captured"]) > 500, "{ended}");
        let manifest = scene.check(&ended);
        assert_eq!(manifest["status"], "failed");
        assert_eq!(manifest["error_message"], ended["error_message"]);
        // There is room again.
        let id = scene.start();
        scene.send(&id, 100);
        let ended = scene.end(&id, "success");
        scene.check(&ended);
    });
}

#[test]
fn a_daemon_that_is_killed_while_it_sends_goes_on_when_it_is_back() {
    needs!(S3Fs::available);
    play(LONG, |scene| {
        scene.proxy.rule(|_| Act::Slow(4_000_000));
        let id = scene.start();
        scene.send(&id, 25_000);
        scene.client().stop(&id);
        // In the middle of a part.
        wait_until("a segment on its way", PATIENCE, || {
            scene.upload(&id).to_string().contains("\"sending\"")
        });
        let captured = scene.captured(&id);
        std::thread::sleep(Duration::from_millis(500));
        scene.daemon.kill();
        scene.daemon.restart();
        let status = scene.client().get(&id)["status"].clone();
        assert!(status.as_str().unwrap().starts_with("conversion_"), "{status}");
        scene.proxy.rule(|_| Act::Pass);
        let ended = scene.wait(&id, "success");
        assert_eq!(number(&ended["packets_captured"]), captured);
        delivered::check(&scene.objects(), "dir", &ended);
        assert!(scene.spool().is_empty());
        no_failed_part_was_completed(&scene.proxy.seen());
    });
}

#[test]
fn a_daemon_that_is_killed_while_it_captures_delivers_what_was_sealed() {
    needs!(S3Fs::available);
    play(SMALL, |scene| {
        scene.proxy.rule(|_| Act::Slow(500_000));
        let id = scene.start();
        scene.send(&id, 2000);
        scene.wait_until_stored(&id, 1);
        scene.daemon.kill();
        scene.daemon.restart();
        scene.proxy.rule(|_| Act::Pass);
        let ended = scene.client().wait(&id);
        let captured = number(&ended["packets_captured"]);
        assert!((500..=2000).contains(&captured), "{ended}");
        scene.check(&ended);
    });
}

#[test]
fn a_daemon_that_is_told_to_stop_sends_the_rest_when_it_is_back() {
    needs!(S3Fs::available);
    play(LONG, |scene| {
        let id = scene.start();
        scene.send(&id, 25_000);
        scene.proxy.rule(|_| Act::Slow(1_000_000));
        assert!(scene.daemon.stop().success());
        assert_eq!(scene.store.unfinished(), 0, "it clears away what it leaves");
        scene.daemon.restart();
        scene.proxy.rule(|_| Act::Pass);
        let ended = scene.wait(&id, "success");
        scene.check(&ended);
        no_failed_part_was_completed(&scene.proxy.seen());
    });
}

#[test]
fn clocks_that_are_far_apart_are_named_and_everything_arrives_when_they_are_set() {
    needs!(S3Fs::available);
    play(SMALL, |scene| {
        let id = scene.start();
        scene.store.restart_ahead("+1h");
        scene.send(&id, 1000);
        let ended = scene.end(&id, "failed");
        scene.check_failed(&ended, "clocks");
        scene.store.restart();
        scene.retry(&id);
        let ended = scene.wait(&id, "success");
        scene.check(&ended);
    });
}

#[test]
fn a_store_that_stays_away_for_longer_than_the_patience_fails_the_capture() {
    needs!(S3Fs::available);
    let config = SMALL.replace("[upload]", "[upload]\npatience_seconds = 2");
    play(&config, |scene| {
        let id = scene.start();
        scene.send(&id, 1000);
        scene.wait_until_stored(&id, 1);
        // It neither refuses nor answers.
        scene.store.freeze();
        scene.send(&id, 1000);
        scene.store.kill();
        let ended = scene.end(&id, "failed");
        scene.check_failed(&ended, "the connection");
        scene.store.restart();
        scene.retry(&id);
        let ended = scene.wait(&id, "success");
        scene.check(&ended);
    });
}
