//! Where the daemon's own requests lead: to the hosts that the operator allows, and nowhere else,
//! whatever a client asks for and whatever a store answers.

use std::{io::ErrorKind, net::TcpListener};

use serde_json::json;
use tapline_tests::{
    daemon::Daemon,
    needs,
    netns::Namespace,
    privileged,
    proxy::{Act, Proxy},
    store::S3Fs,
    veth::Veth,
};

use super::buckets::{BUCKET, Keys, PROXY, STORE, add, own, s3, validate};

/// Where clouds keep the credentials of their machines.
const METADATA: &str = "169.254.169.254";

/// A port of this host that is nobody's store.
const OWN: u16 = 9002;

/// Listens where nobody may come.
struct Sentinels(Vec<TcpListener>);

impl Sentinels {
    fn start(namespace: &Namespace) -> Self {
        namespace.run(&["ip", "address", "add", &format!("{METADATA}/32"), "dev", "lo"]);
        let listen = |address: String| {
            let listener = namespace.enter(|| TcpListener::bind(&address).unwrap());
            listener.set_nonblocking(true).unwrap();
            listener
        };
        Self(vec![listen(format!("{METADATA}:80")), listen(format!("127.0.0.1:{OWN}"))])
    }

    fn check(&self, after: &str) {
        for listener in &self.0 {
            match listener.accept() {
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{after}"),
                Ok(_) => panic!("{after}: {} was reached", listener.local_addr().unwrap()),
            }
        }
    }
}

#[test]
fn no_destination_leads_to_a_host_that_the_operator_did_not_allow() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let sentinels = Sentinels::start(&right);
    let keys = Keys::new();
    let daemon = Daemon::start(&veth.right, "", &keys.config(&[PROXY]));
    let mut client = daemon.client();
    let own_port = format!("127.0.0.1:{OWN}");
    let mut destinations: Vec<String> =
        [METADATA, &own_port, "[::ffff:169.254.169.254]", "localhost"]
            .into_iter()
            .flat_map(|host| {
                [
                    format!("s3://{BUCKET}?endpoint=http://{host}"),
                    format!("s3://{BUCKET}?endpoint=https://{host}"),
                    format!("s3://{BUCKET}?endpoint=http://127.0.0.1:{PROXY}@{host}"),
                    format!("s3://{BUCKET}?region=us-east-1&endpoint=http%3a%2f%2f{host}"),
                    format!("s3://{BUCKET}@{host}/x?region=us-east-1"),
                    format!("gs://{BUCKET}?endpoint=http://{host}"),
                    format!("r2://{BUCKET}?account-id={host}&access-key-id=a&secret-access-key=b"),
                    format!("file://{host}/etc"),
                    format!("http://{host}/latest/meta-data"),
                ]
            })
            .collect();
    let allowed = format!("endpoint=http://127.0.0.1:{PROXY}");
    destinations.extend([
        format!("s3://{BUCKET}?{allowed}&allow_http=true"),
        format!("s3://{BUCKET}?{allowed}&skip_signature=true"),
        format!("s3://{BUCKET}?{allowed}&proxy_url=http://{own_port}"),
        format!("s3://user:word@{BUCKET}?{allowed}"),
        format!("s3://{BUCKET}?region={METADATA}"),
        format!("s3://{BUCKET}?region={own_port}/"),
        "file:///etc".to_owned(),
        "file:///proc/self".to_owned(),
    ]);
    for destination in destinations {
        let body = daemon.full(&json!({ "destination_conf": destination }));
        for answer in [
            add(&mut client, &destination),
            validate(&mut client, &destination, "x"),
            client.call("POST", "", Some(&body)),
        ] {
            assert_eq!((answer.status, answer.codes()), (400, vec![1107]), "{destination}");
            assert_eq!(answer.json()["errors"][0]["source"]["pointer"], "/destination_conf");
        }
        sentinels.check(&destination);
    }
    assert_eq!(client.call("GET", "/ownership", None).result(), json!([]));
}

#[test]
fn a_store_that_redirects_is_not_followed() {
    needs!(S3Fs::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let sentinels = Sentinels::start(&right);
    let store = S3Fs::start(&right, STORE, &[BUCKET]);
    let proxy = Proxy::start(&right, PROXY, STORE);
    let keys = Keys::new();
    let daemon = Daemon::start(&veth.right, "", &keys.config(&[PROXY]));
    let mut client = daemon.client();
    for status in [301, 302, 303, 307, 308] {
        for place in [format!("http://{METADATA}/"), format!("http://127.0.0.1:{OWN}/x")] {
            let location = format!("location: {place}\r\n");
            proxy.rule(move |_| Act::Answer(status, location.clone()));
            let refused = add(&mut client, &s3(PROXY, "dir"));
            assert_eq!((refused.status, refused.codes()), (400, vec![1108]), "{status} {place}");
            let message = refused.json()["errors"][0]["message"].as_str().unwrap().to_owned();
            assert!(message.contains(&status.to_string()), "{message}");
            sentinels.check(&message);
        }
    }
    proxy.rule(|_| Act::Pass);
    own(&mut client, &s3(PROXY, "dir"), "dir", || store.objects(BUCKET));
}
