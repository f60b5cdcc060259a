//! Full captures to buckets, from adding the bucket to the last object in it.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use tapline_tests::{
    capture::number,
    daemon::Daemon,
    fetch,
    generator::{Generator, Template},
    needs,
    netns::Namespace,
    process::wait_until,
    proxy::{Act, Proxy},
    store::{Moto, Objects, S3Fs, objects_in},
    veth::Veth,
};

use super::{
    buckets::{BUCKET, Keys, PROXY, R2_ACCOUNT, STORE, own, s3, text},
    clients::as_client,
    delivered,
    google::ServiceAccount,
};

/// Small segments, so that there are several.
const SMALL: &str = "[buffers]\nsegment_bytes = 262144\nbytes = 131072\n";

/// Room for all that these tests send at once.
const ROOMY: &str = "[buffers]\nper_queue = 256\nbytes = 131072\n";

/// What the tests send.
const PACKETS: u64 = 2000;

/// A place for captures, and how what is in it is read.
struct Place<'a> {
    /// As it is added.
    destination: String,
    /// As it is named from then on.
    known_as: String,
    objects: &'a dyn Fn() -> Objects,
    directory: &'a str,
}

fn python() -> Result<std::path::PathBuf, String> {
    fetch::python("cloudflare", &["cloudflare==5.9.0"])
}

/// Runs an official client's script that adds a place, proves it and captures to it; checks what has
/// arrived, and gives the manifest.
fn drive(daemon: &Daemon<'_>, veth: &Veth<'_>, place: &Place<'_>, script: Command) -> Value {
    let generator = Generator::new(&veth.left, Template { length: 1000, ..Template::default() });
    let mut script = script;
    script.env("DESTINATION", &place.destination).env("KNOWN_AS", &place.known_as);
    let mut child = script
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{script:?}: {error}"));
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut stdin = child.stdin.take().unwrap();
    let (mut last, mut arrived) = (String::new(), 0);
    while let Some(Ok(line)) = lines.next() {
        match line.split_once(' ') {
            Some(("challenge", filename)) => {
                let name = format!("{}/{filename}", place.directory);
                writeln!(stdin, "{}", text(&(place.objects)(), &name)).unwrap();
            }
            Some(("created", _)) => {
                arrived = arrive(veth, &generator, PACKETS);
                writeln!(stdin, "sent {arrived}").unwrap();
            }
            _ => last = line,
        }
    }
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(child.wait().unwrap().success(), "{last}{stderr}");
    let id = last.strip_prefix("done ").unwrap();
    let capture = daemon.client().get(id);
    assert_eq!(capture["status"], "success", "{capture}");
    assert_eq!(capture["packets_captured"], arrived);
    delivered::check(&(place.objects)(), place.directory, &capture)
}

/// The official Python client, which adds, proves, captures, and waits.
fn by_python(daemon: &Daemon<'_>, veth: &Veth<'_>, place: &Place<'_>) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/api/buckets.py");
    let python = python().unwrap();
    let script = as_client(daemon, &veth.right.name, &python, &[script.to_str().unwrap()]);
    drive(daemon, veth, place, script)
}

/// Several objects, each within the size that was configured.
fn has_several(manifest: &Value) {
    let objects = manifest["objects"].as_array().unwrap();
    assert!(objects.len() > 3, "{manifest}");
    assert!(objects.iter().all(|object| number(&object["uncompressed_size"]) <= 262_144));
}

#[test]
fn a_capture_to_an_s3_store_arrives_whole_as_its_manifest_says() {
    needs!(|| S3Fs::available().and_then(|()| python().map(drop)));
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = S3Fs::start(&right, STORE, &[BUCKET]);
    let keys = Keys::new();
    let daemon = Daemon::start(&veth.right, "", &[SMALL, &keys.config(&[STORE])].concat());
    let destination = s3(STORE, "a/b");
    let place = Place {
        known_as: destination.replace('?', "?region=us-east-1&"),
        destination,
        objects: &|| store.objects(BUCKET),
        directory: "a/b",
    };
    let manifest = by_python(&daemon, &veth, &place);
    has_several(&manifest);
    for object in manifest["objects"].as_array().unwrap() {
        let name = object["name"].as_str().unwrap();
        let begin = format!("pcap_{}/ord02_test_{}_q", name_id(&manifest), veth.right.name);
        assert!(name.starts_with(&begin) && name.ends_with(".pcapng"), "{name}");
    }
    assert_eq!(store.unfinished(), 0);
    assert!(objects_in(&daemon.folder().join("data/spool")).is_empty(), "the spool is empty again");
}

fn name_id(manifest: &Value) -> &str {
    manifest["pcap_id"].as_str().unwrap()
}

#[test]
fn a_capture_to_amazon_as_moto_plays_it_arrives_by_the_node_client() {
    let node = || fetch::node("cloudflare-node", &["cloudflare@7.3.0"]);
    needs!(|| Moto::available().and_then(|()| node().map(drop)));
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = Moto::start(&right, STORE, &[BUCKET]);
    let keys = Keys::new();
    let daemon = Daemon::start(&veth.right, "", &[SMALL, &keys.config(&[STORE])].concat());
    let destination = format!("{}&region=eu-west-1", s3(STORE, "dir"));
    let place = Place {
        known_as: format!("s3://{BUCKET}/dir?region=eu-west-1&endpoint=http://127.0.0.1:{STORE}"),
        destination,
        objects: &|| store.objects(BUCKET),
        directory: "dir",
    };
    let folder = node().unwrap();
    // Node looks for packages beside the script.
    let script = folder.join("buckets.mjs");
    fs::write(&script, include_str!("buckets.mjs")).unwrap();
    let arguments = [script.to_str().unwrap()];
    let script = as_client(&daemon, &veth.right.name, Path::new("node"), &arguments);
    has_several(&drive(&daemon, &veth, &place, script));
    assert_eq!(store.unfinished(BUCKET), 0);
}

#[test]
fn a_capture_to_r2_arrives_with_keys_that_were_sent_once() {
    needs!(|| Moto::available().and_then(|()| python().map(drop)));
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = Moto::start(&right, STORE, &[BUCKET]);
    let config = format!("{SMALL}[destinations]\nr2_endpoint = \"http://127.0.0.1:{STORE}\"");
    let mut daemon = Daemon::start(&veth.right, "", &config);
    let known_as = format!("r2://{BUCKET}/dir?account-id={R2_ACCOUNT}");
    let place = Place {
        destination: format!("{known_as}&access-key-id=name&secret-access-key=a%2Bkey"),
        known_as: known_as.clone(),
        objects: &|| store.objects(BUCKET),
        directory: "dir",
    };
    has_several(&by_python(&daemon, &veth, &place));

    // After a restart, too.
    assert!(daemon.stop().success());
    daemon.restart();
    let again = Place { destination: known_as, ..place };
    by_python(&daemon, &veth, &again);
}

#[test]
fn a_capture_to_google_is_signed_for_and_arrives_whole_also_in_parts() {
    needs!(|| Moto::available().and_then(|()| python().map(drop)));
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    // Google's XML API is much as Amazon's, but for who may use it, which the proxy sees to.
    let store = Moto::start(&right, STORE, &[BUCKET]);
    let proxy = Proxy::start(&right, PROXY, STORE);
    let account = ServiceAccount::new();
    let config = format!(
        "{ROOMY}[destinations]\ngs_endpoint = \"http://127.0.0.1:{PROXY}\"\n\
         gs_credentials_file = \"{}\"",
        account.file().display()
    );
    let daemon = Daemon::start(&veth.right, "", &config);
    let checks = account.clone();
    proxy.rule(move |request| {
        let bearer = request.header("authorization").and_then(|text| text.strip_prefix("Bearer "));
        if bearer.is_some_and(|token| checks.signed(token)) { Act::Pass } else { Act::refuse(401) }
    });
    let destination = format!("gs://{BUCKET}/deep/er");
    let place = Place {
        known_as: destination.clone(),
        destination: destination.clone(),
        objects: &|| store.objects(BUCKET),
        directory: "deep/er",
    };
    by_python(&daemon, &veth, &place);

    // Long enough for parts, which have to be 5 MiB at least.
    let mut client = daemon.client();
    let capture = client.create(&daemon.full(&json!({ "destination_conf": destination })));
    let id = capture["id"].as_str().unwrap();
    send_long(&veth, || number(&client.get(id)["packets_captured"]));
    client.stop(id);
    let ended = client.wait(id);
    let seen = proxy.seen();
    assert_eq!(ended["status"], "success", "{ended} {seen:?}");
    delivered::check(&store.objects(BUCKET), "deep/er", &ended);
    assert!(seen.iter().filter(|seen| seen.request.is_part()).count() > 1);
    assert!(seen.iter().all(|seen| seen.status == Some(200)), "{seen:?}");
    assert_eq!(store.unfinished(BUCKET), 0);
}

/// Sends frames, and waits until those that the pair has room for are at its other end; how many.
pub(super) fn arrive(veth: &Veth<'_>, generator: &Generator<'_>, count: u64) -> u64 {
    let before = veth.right.counter("rx_packets");
    let out = before + veth.left.counter("tx_dropped");
    generator.send(count);
    veth.settle(out + count) - before
}

/// Sends about 20 MB, all of them from one CPU and so to one segment, and waits until they have been
/// captured.
fn send_long(veth: &Veth<'_>, mut captured: impl FnMut() -> u64) {
    let template = Template { length: 1400, ..Template::default() };
    let arrived = arrive(veth, &Generator::new(&veth.left, template).pinned(0), 15_000);
    wait_until("the packets", Duration::from_secs(20), || captured() == arrived);
}

#[test]
fn a_long_segment_goes_in_parts_and_arrives_as_one_object() {
    needs!(S3Fs::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = S3Fs::start(&right, STORE, &[BUCKET]);
    let proxy = Proxy::start(&right, PROXY, STORE);
    let keys = Keys::new();
    let daemon = Daemon::start(&veth.right, "", &[ROOMY, &keys.config(&[PROXY])].concat());
    let mut client = daemon.client();
    let destination = s3(PROXY, "dir");
    own(&mut client, &destination, "dir", || store.objects(BUCKET));
    let capture = client.create(&daemon.full(&json!({ "destination_conf": destination })));
    let id = capture["id"].as_str().unwrap();
    send_long(&veth, || number(&client.get(id)["packets_captured"]));
    client.stop(id);
    let ended = client.wait(id);
    assert_eq!(ended["status"], "success", "{ended}");
    let manifest = delivered::check(&store.objects(BUCKET), "dir", &ended);
    let longest = manifest["objects"].as_array().unwrap().iter();
    assert!(longest.map(|object| number(&object["size"])).max().unwrap() > 10_000_000);
    let seen = proxy.seen();
    let parts: Vec<_> = seen.iter().filter(|seen| seen.request.is_part()).collect();
    assert!(parts.len() > 1, "{seen:?}");
    assert_eq!(seen.iter().filter(|seen| seen.request.is_completion()).count(), 1);
    assert_eq!(store.unfinished(), 0);
}

#[test]
fn compressed_segments_arrive_and_are_read_as_they_are() {
    needs!(S3Fs::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = S3Fs::start(&right, STORE, &[BUCKET]);
    let keys = Keys::new();
    let zstd = "[upload]\nzstd = true\nzstd_frame_bytes = 65536\n";
    let daemon = Daemon::start(&veth.right, "", &[SMALL, zstd, &keys.config(&[STORE])].concat());
    let mut client = daemon.client();
    let destination = s3(STORE, "dir");
    own(&mut client, &destination, "dir", || store.objects(BUCKET));
    let capture = client.create(&daemon.full(&json!({ "destination_conf": destination })));
    let id = capture["id"].as_str().unwrap();
    let template = Template { length: 1000, ..Template::default() };
    let arrived = arrive(&veth, &Generator::new(&veth.left, template), PACKETS);
    wait_until("the packets", Duration::from_secs(20), || {
        number(&client.get(id)["packets_captured"]) == arrived
    });
    client.stop(id);
    let ended = client.wait(id);
    assert_eq!(
        (&ended["status"], number(&ended["packets_captured"])),
        (&json!("success"), arrived)
    );
    let objects = store.objects(BUCKET);
    let manifest = delivered::check(&objects, "dir", &ended);
    has_several(&manifest);
    for object in manifest["objects"].as_array().unwrap() {
        let name = object["name"].as_str().unwrap();
        assert!(name.ends_with(".pcapng.zst"), "{name}");
        let (size, whole) = (number(&object["size"]), number(&object["uncompressed_size"]));
        assert!(size < whole, "{object}");
        // Frames of their own: a reader can begin at each.
        let bytes = &objects[&format!("dir/{name}")];
        let frames = bytes.windows(4).filter(|four| *four == [0x28, 0xb5, 0x2f, 0xfd]).count();
        assert_eq!(frames as u64, whole.div_ceil(65536), "{object}");
    }
}

#[test]
fn a_capture_to_a_folder_that_was_proved_ends_in_the_same_files_and_manifest() {
    needs!(|| python().map(drop));
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempfile::tempdir().unwrap();
    let root = format!("{SMALL}[[roots]]\npath = \"{}\"", folder.path().display());
    let daemon = Daemon::start(&veth.right, "", &root);
    let destination = format!("file://{}/dir", folder.path().display());
    let place = Place {
        known_as: destination.clone(),
        destination,
        objects: &|| objects_in(folder.path()),
        directory: "dir",
    };
    has_several(&by_python(&daemon, &veth, &place));
}
