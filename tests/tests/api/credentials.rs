//! Where the keys for Amazon come from, beside a file: the environment, and the machine's metadata.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    sync::{Arc, Mutex},
    thread,
};

use nix::sys::socket::{self, Shutdown};
use serde_json::json;
use tapline_tests::{
    daemon::Daemon,
    needs,
    netns::Namespace,
    store::{ACCESS_KEY, S3Fs, SECRET_KEY},
    veth::Veth,
};

use super::buckets::{BUCKET, STORE, add, own};

/// The store of the tests, which checks signatures, in Amazon's place.
fn config(more: &str) -> String {
    format!("[destinations]\ns3_endpoint = \"http://127.0.0.1:{STORE}\"\n{more}")
}

fn destination() -> String {
    format!("s3://{BUCKET}/dir?region=us-east-1")
}

#[test]
fn keys_of_the_environment_sign_requests_and_without_any_it_is_said_who_gives_them() {
    needs!(S3Fs::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = S3Fs::start(&right, STORE, &[BUCKET]);
    let mut daemon = Daemon::start(&veth.right, "", &config(""));
    let refused = add(&mut daemon.client(), &destination());
    assert_eq!((refused.status, refused.codes()), (400, vec![1107]), "{}", refused.json());
    let message = refused.json()["errors"][0]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("AWS_ACCESS_KEY_ID"), "{message}");

    assert!(daemon.stop().success());
    daemon
        .restart_with(&[("AWS_ACCESS_KEY_ID", ACCESS_KEY), ("AWS_SECRET_ACCESS_KEY", SECRET_KEY)]);
    own(&mut daemon.client(), &destination(), "dir", || store.objects(BUCKET));
}

/// Answers as the metadata service of Amazon's machines, version 2, and notes what it was asked; gone
/// when dropped.
/// <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html>
struct Metadata {
    listener: TcpListener,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Metadata {
    fn start(namespace: &Namespace) -> Self {
        namespace.run(&["ip", "address", "add", "169.254.169.254/32", "dev", "lo"]);
        let listener = namespace.enter(|| TcpListener::bind("169.254.169.254:80").unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (accepting, noted) = (listener.try_clone().unwrap(), Arc::clone(&asked));
        thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                // One whose connection is gone has been told enough.
                drop(answer(stream, &noted));
            }
        });
        Self { listener, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Metadata {
    fn drop(&mut self) {
        // Wakes the thread that waits for a connection.
        let _ = socket::shutdown(self.listener.as_raw_fd(), Shutdown::Both);
    }
}

fn answer(mut stream: TcpStream, asked: &Mutex<Vec<String>>) -> io::Result<()> {
    const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
    let lines = BufReader::new(stream.try_clone()?).lines();
    let head: Vec<_> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let mut first = head.first().map(|line| line.split(' ')).into_iter().flatten();
    let (method, path) = (first.next().unwrap_or_default(), first.next().unwrap_or_default());
    asked.lock().unwrap().push(format!("{method} {path}"));
    let has_session = head.iter().any(|line| line.ends_with(": session"));
    let body = match (method, path.strip_prefix(ROLES)) {
        ("PUT", None) if path == "/latest/api/token" => "session".to_owned(),
        ("GET", Some("")) if has_session => "captures".to_owned(),
        ("GET", Some("captures")) if has_session => json!({
            "Code": "Success",
            "Type": "AWS-HMAC",
            "LastUpdated": "2026-01-01T00:00:00Z",
            "AccessKeyId": ACCESS_KEY,
            "SecretAccessKey": SECRET_KEY,
            "Token": "passing",
            "Expiration": "2099-01-01T00:00:00Z",
        })
        .to_string(),
        _ => String::new(),
    };
    let (status, length) = (if body.is_empty() { 404 } else { 200 }, body.len());
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close");
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes())
}

#[test]
fn keys_of_the_instance_are_asked_for_only_where_the_operator_says_so() {
    needs!(S3Fs::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = S3Fs::start(&right, STORE, &[BUCKET]);
    let metadata = Metadata::start(&right);
    let daemon = Daemon::start(&veth.right, "", &config(""));
    assert_eq!(add(&mut daemon.client(), &destination()).codes(), [1107]);
    assert_eq!(metadata.asked(), [""; 0]);
    drop(daemon);

    let daemon = Daemon::start(&veth.right, "", &config("instance_metadata = true"));
    own(&mut daemon.client(), &destination(), "dir", || store.objects(BUCKET));
    assert_eq!(metadata.asked()[0], "PUT /latest/api/token");
}
