//! Downloads: what is given, in which parts, and what is refused.

use std::{collections::BTreeSet, fs, io::Write as _, time::Duration};

use serde_json::json;
use tapline_tests::{
    daemon::{ACCOUNT, Answer, BASE_URL, Client, Daemon, OTHER_ACCOUNT},
    generator::{Generator, Template},
    needs,
    netns::Namespace,
    pcapng::accepted,
    privileged,
    process::{checked, wait_until},
    store::S3Fs,
    veth::Veth,
};

use super::{
    NO_RECORDER,
    buckets::{BUCKET, Keys, STORE, own, s3},
    simple::{EVERYTHING, downloaded, simple},
};

const SECOND: Duration = Duration::from_secs(1);

/// Small segments, so that there are several, and room for all while the disk is busy.
const SMALL: &str = "[buffers]\nsegment_bytes = 262144\nbytes = 131072\nper_queue = 256\n";

/// The answer to a download with these headers.
fn get(daemon: &Daemon<'_>, method: &str, id: &str, query: &str, headers: &str) -> Answer {
    let request = format!(
        "{method} /accounts/{ACCOUNT}/pcaps/{id}/download{query} HTTP/1.1\r\nhost: x\r\n\
         authorization: Bearer {}\r\n{headers}\r\n",
        daemon.token
    );
    daemon.client().raw(request.as_bytes()).unwrap()
}

fn refused(daemon: &Daemon<'_>, id: &str, query: &str) -> (u16, u64, String) {
    let answer = get(daemon, "GET", id, query, "");
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    let message = answer.json()["errors"][0]["message"].as_str().unwrap().to_owned();
    (answer.status, answer.codes()[0], message)
}

/// A full capture of this many packets, which has ended.
fn full(daemon: &Daemon<'_>, generator: &Generator<'_>, count: u64) -> String {
    let mut client = daemon.client();
    let id = client.create(&daemon.full(&json!({})))["id"].as_str().unwrap().to_owned();
    let mut sent = 0;
    while sent < count {
        generator.send(100);
        sent += 100;
        wait_until("packets", 5 * SECOND, || client.get(&id)["packets_captured"] == sent);
    }
    client.stop(&id);
    assert_eq!(client.wait(&id)["status"], "success");
    id
}

#[test]
fn a_full_capture_is_one_file_in_the_order_of_time_as_pcap_and_as_pcapng() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", &format!("{SMALL}{NO_RECORDER}"));
    let template = Template { length: 1000, ..Template::default() };
    let generator = Generator::new(&veth.left, template.clone()).pinned(0);
    let id = full(&daemon, &generator, 1500);
    assert!(daemon.files(&id).len() > 3, "several files");
    let packets = downloaded(&daemon, &id);
    let stamps = |packets: &mut dyn Iterator<Item = &[u8]>| -> BTreeSet<u64> {
        packets.map(|data| template.stamp(data).sequence).collect()
    };
    assert_eq!(packets.len(), 1500);
    assert_eq!(stamps(&mut packets.iter().map(|(.., data)| &data[..])), (0..1500).collect());
    assert!(packets.iter().all(|(_, length, data)| (*length, data.len()) == (1000, 1000)));

    let answer = get(&daemon, "GET", &id, "?format=pcapng", "");
    assert_eq!(answer.header("content-type"), Some("application/x-pcapng"));
    let disposition = format!("attachment; filename=\"pcap_{id}.pcapng\"");
    assert_eq!(answer.header("content-disposition"), Some(disposition.as_str()));
    let path = daemon.folder().join("merged.pcapng");
    fs::write(&path, answer.body).unwrap();
    // tshark and capinfos read it alike, and in order.
    let merged = accepted(&path);
    assert_eq!(merged.packets.len(), 1500);
    assert_eq!(stamps(&mut merged.packets.iter().map(|one| &one.data[..])), (0..1500).collect());
    let statistics: usize = merged.interfaces.iter().map(|one| one.statistics.len()).sum();
    assert!(statistics > 3, "those of each file");
}

#[test]
fn parts_of_a_download_are_its_bytes_and_tags_tell_what_is_known() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", EVERYTHING);
    let generator = Generator::new(&veth.left, Template { length: 500, ..Template::default() });
    generator.send(500);
    let mut client = daemon.client();
    let mut id = String::new();
    wait_until("packets", 5 * SECOND, || {
        id = client.create(&simple(&json!({})))["id"].as_str().unwrap().to_owned();
        client.wait(&id);
        downloaded(&daemon, &id).len() == 500
    });
    let whole = get(&daemon, "GET", &id, "", "");
    let length = whole.body.len();
    assert_eq!(length, 24 + 500 * (16 + 160));
    assert_eq!(whole.header("content-type"), Some("application/vnd.tcpdump.pcap"));
    let disposition = format!("attachment; filename=\"pcap_{id}.pcap\"");
    assert_eq!(whole.header("content-disposition"), Some(disposition.as_str()));
    assert_eq!(whole.header("accept-ranges"), Some("bytes"));
    let tag = whole.header("etag").unwrap().to_owned();
    assert!(tag.starts_with('"') && tag.len() > 20, "a strong one: {tag}");

    // curl gets the same, at once and in parts.
    let url = format!("{BASE_URL}/accounts/{ACCOUNT}/pcaps/{id}/download");
    let bearer = format!("Authorization: Bearer {}", daemon.token);
    let curl = |more: &[&str]| {
        let line = [&["--silent", "--fail", "-H", &bearer, &url], more].concat();
        checked(&mut daemon.command("curl", &line)).stdout
    };
    assert_eq!(curl(&[]), whole.body);
    let parts = ["0-999", "1000-49999", "50000-"].map(|range| curl(&["--range", range]));
    assert_eq!(parts.concat(), whole.body);
    let path = daemon.folder().join("resumed.pcap");
    fs::write(&path, &whole.body[..12_345]).unwrap();
    curl(&["--continue-at", "-", "--output", path.to_str().unwrap()]);
    assert_eq!(fs::read(&path).unwrap(), whole.body);

    let part = get(&daemon, "GET", &id, "", "range: bytes=-100\r\n");
    let range = format!("bytes {}-{}/{length}", length - 100, length - 1);
    assert_eq!((part.status, part.header("content-range")), (206, Some(range.as_str())));
    assert_eq!(part.body, whole.body[length - 100..]);
    let beyond = get(&daemon, "GET", &id, "", &format!("range: bytes={length}-\r\n"));
    assert_eq!((beyond.status, beyond.codes()), (416, vec![1159]));
    assert_eq!(beyond.header("content-range"), Some(format!("bytes */{length}").as_str()));
    for (known, status) in [(tag.as_str(), 206), ("\"other\"", 200)] {
        let headers = format!("if-range: {known}\r\nrange: bytes=0-9\r\n");
        assert_eq!(get(&daemon, "GET", &id, "", &headers).status, status, "{known}");
    }
    let head = get(&daemon, "HEAD", &id, "", "");
    assert_eq!((head.status, head.body.len()), (200, 0));
    for name in ["content-length", "content-type", "etag"] {
        assert_eq!(head.header(name), whole.header(name), "{name}");
    }
    let known = get(&daemon, "GET", &id, "", &format!("if-none-match: {tag}\r\n"));
    assert_eq!((known.status, known.header("etag")), (304, Some(tag.as_str())));
    let richer = get(&daemon, "GET", &id, "?format=pcapng", &format!("if-none-match: {tag}\r\n"));
    assert_eq!(richer.status, 200, "another file has another tag");
    let path = daemon.folder().join("simple.pcapng");
    fs::write(&path, richer.body).unwrap();
    assert_eq!(accepted(&path).packets.len(), 500);
}

#[test]
fn what_cannot_be_downloaded_says_why() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", NO_RECORDER);
    let generator = Generator::new(&veth.left, Template::default());
    let mut client = daemon.client();
    let unknown = "0".repeat(32);
    assert_eq!(refused(&daemon, &unknown, "").1, 1130);

    let running = client.create(&daemon.full(&json!({})))["id"].as_str().unwrap().to_owned();
    let (status, code, message) = refused(&daemon, &running, "");
    assert_eq!((status, code), (409, 1151));
    assert!(message.contains("not finished"), "{message}");
    client.stop(&running);
    client.wait(&running);
    let (status, code, message) = refused(&daemon, &running, "");
    assert_eq!((status, code), (409, 1152));
    assert!(message.contains("No packets matched the filter"), "{message}");

    let id = full(&daemon, &generator, 100);
    let (status, code, message) = refused(&daemon, &id, "?format=cap");
    assert_eq!((status, code), (400, 1158));
    assert!(message.contains("pcap or pcapng"), "{message}");
    let token = daemon.new_token(OTHER_ACCOUNT, "write");
    let mut other = Client::new(daemon.connect().unwrap(), &token).of(OTHER_ACCOUNT);
    assert_eq!(other.call("GET", &format!("/{id}/download"), None).status, 404);

    // Somebody tampers with what was written.
    let file = daemon.files(&id).remove(0);
    let saved = daemon.folder().join("saved");
    fs::rename(&file, &saved).unwrap();
    let (status, code, message) = refused(&daemon, &id, "");
    assert_eq!((status, code), (410, 1155));
    assert!(message.contains("1 of the capture's"), "{message}");
    std::os::unix::fs::symlink(&saved, &file).unwrap();
    let (status, code, _) = refused(&daemon, &id, "");
    assert_eq!((status, code), (409, 1156), "a link that leads out of the folder");
    fs::remove_file(&file).unwrap();
    fs::rename(&saved, &file).unwrap();
    assert_eq!(downloaded(&daemon, &id).len(), 100);
}

#[test]
fn no_more_downloads_than_allowed_are_on_their_way_and_a_slow_one_ends_whole() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    // Sockets that hold far less than what is sent, and still several segments of loopback's 64 KiB:
    // with room for less than one, TCP waits for a timer each time the reader has made some.
    for buffers in ["net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem"] {
        right.sysctl(buffers, "4096 524288 1048576");
    }
    let more = format!("{SMALL}{NO_RECORDER}\n[limits]\ndownloads = 1");
    let daemon = Daemon::start(&veth.right, "", &more);
    let generator = Generator::new(&veth.left, Template { length: 1400, ..Template::default() });
    let id = full(&daemon, &generator, 10_000);
    // What comes is not read: the daemon waits.
    let mut slow = daemon.connect().unwrap();
    let request = format!(
        "GET /accounts/{ACCOUNT}/pcaps/{id}/download HTTP/1.1\r\nhost: x\r\n\
         authorization: Bearer {}\r\n\r\n",
        daemon.token
    );
    slow.write_all(request.as_bytes()).unwrap();
    // Until it has begun to come, another download may take the only place.
    assert_eq!(slow.peek(&mut [0]).unwrap(), 1);
    let (status, code, _) = refused(&daemon, &id, "");
    assert_eq!((status, code), (429, 1148));
    let answer = Client::new(slow, &daemon.token).answer(false).unwrap();
    assert_eq!(answer.body.len(), 24 + 10_000 * (16 + 1400));
    wait_until("the place to be free", 5 * SECOND, || {
        get(&daemon, "GET", &id, "", "").status == 200
    });
}

#[test]
fn a_capture_on_its_way_to_a_bucket_is_downloaded_and_one_that_is_there_says_where() {
    needs!(S3Fs::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let mut store = S3Fs::start(&right, STORE, &[BUCKET]);
    let keys = Keys::new();
    let daemon = Daemon::start(&veth.right, "", &[&keys.config(&[STORE]), NO_RECORDER].concat());
    let mut client = daemon.client();
    let destination = s3(STORE, "a");
    own(&mut client, &destination, "a", || store.objects(BUCKET));
    store.kill();
    let body = daemon.full(&json!({ "destination_conf": destination, "packet_limit": 10 }));
    let id = client.create(&body)["id"].as_str().unwrap().to_owned();
    Generator::new(&veth.left, Template::default()).send(10);
    wait_until("the capture to end", 5 * SECOND, || {
        client.get(&id)["status"].as_str().unwrap().starts_with("conversion")
    });
    assert_eq!(downloaded(&daemon, &id).len(), 10, "out of the spool");
    store.restart();
    let capture = client.wait(&id);
    assert_eq!(capture["status"], "success", "{capture}");
    let (status, code, message) = refused(&daemon, &id, "");
    assert_eq!((status, code), (410, 1154));
    let place = capture["destination_conf"].as_str().unwrap();
    assert!(message.contains(place) && message.contains(&format!("pcap_{id}")), "{message}");
}
