//! Where the keys for Amazon and Google come from, beside a file: the environment, and the machine's
//! metadata.

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
    proxy::{Act, Proxy},
    store::{ACCESS_KEY, Moto, S3Fs, SECRET_KEY},
    veth::Veth,
};

use super::buckets::{BUCKET, PROXY, STORE, add, own};

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

/// Stands where the metadata service of a cloud's machines does, answers, and notes what it was asked;
/// gone when dropped.
struct Metadata {
    listener: TcpListener,
    asked: Arc<Mutex<Vec<String>>>,
}

/// What a service says to a method, a path and headers; nothing if there is no such thing.
type Service = fn(&str, &str, &[String]) -> Option<String>;

impl Metadata {
    fn start(namespace: &Namespace, service: Service) -> Self {
        namespace.run(&["ip", "address", "add", "169.254.169.254/32", "dev", "lo"]);
        let listener = namespace.enter(|| TcpListener::bind("169.254.169.254:80").unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (accepting, noted) = (listener.try_clone().unwrap(), Arc::clone(&asked));
        thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                // One whose connection is gone has been told enough.
                drop(answer(stream, service, &noted));
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

fn answer(mut stream: TcpStream, service: Service, asked: &Mutex<Vec<String>>) -> io::Result<()> {
    let lines = BufReader::new(stream.try_clone()?).lines();
    let head: Vec<_> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let mut first = head.first().map(|line| line.split(' ')).into_iter().flatten();
    let (method, path) = (first.next().unwrap_or_default(), first.next().unwrap_or_default());
    asked.lock().unwrap().push(format!("{method} {path}"));
    let found = service(method, path, &head);
    let (status, body) = (if found.is_some() { 200 } else { 404 }, found.unwrap_or_default());
    let length = body.len();
    let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\nconnection: close");
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes())
}

/// Amazon's, version 2.
/// <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html>
fn amazon(method: &str, path: &str, head: &[String]) -> Option<String> {
    const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
    let has_session = head.iter().any(|line| line.ends_with(": session"));
    match (method, path.strip_prefix(ROLES)) {
        ("PUT", None) if path == "/latest/api/token" => Some("session".into()),
        ("GET", Some("")) if has_session => Some("captures".into()),
        ("GET", Some("captures")) if has_session => {
            let keys = json!({
                "Code": "Success",
                "Type": "AWS-HMAC",
                "LastUpdated": "2026-01-01T00:00:00Z",
                "AccessKeyId": ACCESS_KEY,
                "SecretAccessKey": SECRET_KEY,
                "Token": "passing",
                "Expiration": "2099-01-01T00:00:00Z",
            });
            Some(keys.to_string())
        }
        _ => None,
    }
}

/// What Google's gives to whoever says that he knows whom he asks.
const TOKEN: &str = "ya29.passing";

/// Google's. <https://cloud.google.com/compute/docs/metadata/querying-metadata>
fn google(method: &str, path: &str, head: &[String]) -> Option<String> {
    let flavored = head.iter().any(|line| line.eq_ignore_ascii_case("metadata-flavor: google"));
    let path = path.split('?').next().unwrap_or_default();
    let token = "/computeMetadata/v1/instance/service-accounts/default/token";
    let answer = json!({ "access_token": TOKEN, "expires_in": 3599, "token_type": "Bearer" });
    (flavored && method == "GET" && path == token).then(|| answer.to_string())
}

#[test]
fn keys_of_the_instance_are_asked_for_only_where_the_operator_says_so() {
    needs!(S3Fs::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = S3Fs::start(&right, STORE, &[BUCKET]);
    let metadata = Metadata::start(&right, amazon);
    let daemon = Daemon::start(&veth.right, "", &config(""));
    assert_eq!(add(&mut daemon.client(), &destination()).codes(), [1107]);
    assert_eq!(metadata.asked(), [""; 0]);
    drop(daemon);

    let daemon = Daemon::start(&veth.right, "", &config("instance_metadata = true"));
    own(&mut daemon.client(), &destination(), "dir", || store.objects(BUCKET));
    assert_eq!(metadata.asked()[0], "PUT /latest/api/token");
}

#[test]
fn so_is_the_token_of_an_instance_at_google_and_no_host_of_the_environment() {
    needs!(Moto::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    // Google's XML API is much as Amazon's, but for who may use it, which the proxy sees to.
    let store = Moto::start(&right, STORE, &[BUCKET]);
    let proxy = Proxy::start(&right, PROXY, STORE);
    proxy.rule(|request| {
        let bearer = request.header("authorization").and_then(|text| text.strip_prefix("Bearer "));
        if bearer == Some(TOKEN) { Act::Pass } else { Act::refuse(401) }
    });
    let metadata = Metadata::start(&right, google);
    let config =
        |more| format!("[destinations]\ngs_endpoint = \"http://127.0.0.1:{PROXY}\"\n{more}");
    let destination = format!("gs://{BUCKET}/dir");
    let daemon = Daemon::start(&veth.right, "", &config(""));
    let refused = add(&mut daemon.client(), &destination);
    assert_eq!((refused.status, refused.codes()), (400, vec![1107]), "{}", refused.json());
    assert_eq!(metadata.asked(), [""; 0]);
    drop(daemon);

    let mut daemon = Daemon::start(&veth.right, "", &config("instance_metadata = true"));
    assert!(daemon.stop().success());
    // The library would ask these; they are not what the operator has allowed.
    let elsewhere = right.enter(|| TcpListener::bind("127.0.0.1:9999").unwrap());
    elsewhere.set_nonblocking(true).unwrap();
    daemon.restart_with(&[("GCE_METADATA_HOST", "127.0.0.1:9999")]);
    own(&mut daemon.client(), &destination, "dir", || store.objects(BUCKET));
    assert_eq!(elsewhere.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert!(metadata.asked().iter().all(|asked| asked.contains("/default/token")));
    assert!(proxy.seen().iter().all(|seen| seen.status == Some(200)), "{:?}", proxy.seen());
}
