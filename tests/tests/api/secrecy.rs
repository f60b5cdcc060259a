//! What the daemon is told in confidence is in none of its files, logs, answers and metrics.

use serde_json::{Value, json};
use tapline_tests::{
    daemon::{Client, Daemon},
    generator::{Generator, Template},
    needs,
    netns::Namespace,
    process::tool,
    proxy::{Act, Proxy},
    store::{Moto, Objects, SECRET_KEY, objects_in},
    veth::Veth,
};

use super::{
    buckets::{BUCKET, Keys, PROXY, R2_ACCOUNT, STORE, add, own, s3, text, validate},
    delivery::arrive,
};

/// The key of an R2 bucket, which comes with a request.
const R2_KEY: &str = "r2+Hidden/Key=4f1c";

/// The key of a user, for `X-Auth-Key`.
const USER_KEY: &str = "user-hidden-key-77ab";

/// Keys that do not belong where they are put.
const MISPLACED: &str = "misplaced-hidden-9d3e";

/// A client that keeps what it is answered.
struct Listener {
    client: Client,
    heard: Vec<u8>,
}

impl Listener {
    fn call(&mut self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let answer = self.client.call(method, path, body);
        self.heard.extend(format!("{:?}", answer.headers).into_bytes());
        self.heard.extend(&answer.body);
        serde_json::from_slice::<Value>(&answer.body).unwrap_or_default()["result"].clone()
    }

    fn post(&mut self, path: &str, body: &Value) -> Value {
        self.call("POST", path, Some(body))
    }
}

/// A secret as it is, and as encodings that are in use here would hide it.
fn forms(secret: &str) -> Vec<Vec<u8>> {
    let percent = |upper: bool| -> String {
        let one = |byte: u8| match byte {
            _ if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) => {
                char::from(byte).to_string()
            }
            _ if upper => format!("%{byte:02X}"),
            _ => format!("%{byte:02x}"),
        };
        secret.bytes().map(one).collect()
    };
    let hex = secret.bytes().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    let list = secret.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(", ");
    let forms = [secret.to_owned(), percent(true), percent(false), hex, list];
    forms.into_iter().map(String::into_bytes).collect()
}

fn has(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn no_secret_is_in_the_data_folder_the_log_an_answer_or_a_metric() {
    needs!(Moto::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = Moto::start(&right, STORE, &[BUCKET]);
    let proxy = Proxy::start(&right, PROXY, STORE);
    let digest = tool(&["sh", "-c", &format!("printf %s {USER_KEY} | sha256sum")]);
    let digest = digest.split(' ').next().unwrap();
    let keys = Keys::new();
    let allowed = keys.config(&[PROXY]).replace(
        "[destinations]",
        &format!("[destinations]\nr2_endpoint = \"http://127.0.0.1:{PROXY}\""),
    );
    let config = format!(
        "{allowed}[upload]\nsegment_seconds = 1\n[[keys]]\nemail = \"user@example.com\"\n\
         key_sha256 = \"{digest}\"\naccounts = [\"{}\"]\npermission = \"write\"",
        tapline_tests::daemon::ACCOUNT
    );
    // All that it can be made to say, its libraries too.
    let mut daemon = Daemon::start(&veth.right, "log = \"trace\"", &config);
    let mut listener = Listener { client: daemon.client(), heard: Vec::new() };
    let bare = format!("r2://{BUCKET}/dir?account-id={R2_ACCOUNT}");
    let encoded = R2_KEY.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
    let with_keys = format!("{bare}&access-key-id=name&secret-access-key={encoded}");
    let objects = || store.objects(BUCKET);

    // Refused, added, not proved, proved.
    proxy.rule(|_| Act::refuse(403));
    listener.post("/ownership", &json!({ "destination_conf": with_keys }));
    proxy.rule(|_| Act::Pass);
    let added = listener.post("/ownership", &json!({ "destination_conf": with_keys }));
    let challenge = text(&objects(), &format!("dir/{}", added["filename"].as_str().unwrap()));
    let wrong = format!("{}00", &challenge[..challenge.len() - 2]);
    for sent in [&wrong, added["filename"].as_str().unwrap(), &challenge] {
        let body = json!({ "destination_conf": with_keys, "ownership_challenge": sent });
        listener.post("/ownership/validate", &body);
    }
    let own_keys = own(&mut daemon.client(), &s3(PROXY, "own"), "own", objects);
    assert_eq!(own_keys["status"], "success");
    listener.call("GET", "/ownership", None);

    // Where no key belongs.
    for destination in [
        format!("s3://user:{MISPLACED}@{BUCKET}?region=us-east-1"),
        format!("s3://{BUCKET}?region=us-east-1&secret-access-key={MISPLACED}"),
        format!("s3://{BUCKET}?endpoint=http://x:{MISPLACED}@127.0.0.1:{PROXY}"),
        format!("r2://{BUCKET}?account-id={R2_ACCOUNT}&secret-access-key={MISPLACED}"),
        format!("https://user:{MISPLACED}@store.example/"),
    ] {
        assert_eq!(add(&mut listener.client, &destination).status, 400);
        listener.post("/ownership", &json!({ "destination_conf": destination }));
        listener.post("", &daemon.full(&json!({ "destination_conf": destination })));
        let answer = validate(&mut listener.client, &destination, MISPLACED);
        assert_eq!(answer.status, 400, "{destination}");
    }
    // By key, by a wrong key, and by a token that is wrong at its end.
    for key in [USER_KEY, MISPLACED] {
        let request = format!(
            "GET /accounts/{}/pcaps HTTP/1.1\r\nhost: x\r\nx-auth-email: user@example.com\r\n\
             x-auth-key: {key}\r\n\r\n",
            tapline_tests::daemon::ACCOUNT
        );
        let answer = listener.client.raw(request.as_bytes()).unwrap();
        assert_eq!(answer.status, if key == USER_KEY { 200 } else { 401 });
        listener.heard.extend(&answer.body);
    }
    let guess = format!("{}_{MISPLACED}", daemon.token.rsplit_once('_').unwrap().0);
    assert_eq!(Client::new(daemon.connect().unwrap(), &guess).call("GET", "", None).status, 401);

    // Captures that fail on their way, and arrive.
    let generator = Generator::new(&veth.left, Template::default());
    for destination in [&with_keys, &s3(PROXY, "own")] {
        proxy.rule(|_| Act::refuse(403));
        let body = daemon.full(&json!({ "destination_conf": destination }));
        let created = listener.post("", &body);
        let id = created["id"].as_str().unwrap_or_else(|| panic!("{destination}: {created}"));
        arrive(&veth, &generator, 100);
        listener.client.stop(id);
        assert_eq!(listener.client.wait(id)["status"], "failed");
        for path in [format!("/{id}"), format!("/{id}/stats"), format!("/{id}/download")] {
            listener.call("GET", &path, None);
        }
        proxy.rule(|_| Act::Pass);
        listener.post(&format!("/{id}/retry"), &json!({}));
        assert_eq!(listener.client.wait(id)["status"], "success");
        listener.call("GET", "", None);
    }
    for path in ["/metrics", "/openapi.json", "/healthz", "/readyz"] {
        let token = &daemon.token;
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n\r\n");
        let answer = listener.client.raw(request.as_bytes()).unwrap();
        assert_eq!(answer.status, 200, "{path}");
        listener.heard.extend(&answer.body);
    }
    assert!(daemon.stop().success());

    let token = daemon.token.rsplit_once('_').unwrap().1.to_owned();
    let mut places: Objects = objects_in(&daemon.folder().join("data"));
    let delivered = objects().into_iter().filter(|(name, _)| !name.contains("ownership-challenge"));
    places.extend(delivered.map(|(name, bytes)| (format!("bucket: {name}"), bytes)));
    places.insert("the log".into(), daemon.log().into_bytes());
    places.insert("an answer".into(), listener.heard);
    assert!(places.contains_key("taplined.redb"), "{:?}", places.keys());
    assert!(has(&places["the log"], b"not sent"), "failures are logged");
    for (what, secret) in [
        ("the key of R2", R2_KEY),
        ("the operator's key", SECRET_KEY),
        ("a user's key", USER_KEY),
        ("a token", &token),
        ("a misplaced key", MISPLACED),
        ("a challenge", challenge.trim()),
    ] {
        for form in forms(secret) {
            for (place, bytes) in &places {
                let shown = String::from_utf8_lossy(&form);
                assert!(!has(bytes, &form), "{what} is in {place}, as {shown}");
            }
        }
    }
}
