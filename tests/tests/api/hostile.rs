//! Requests that nobody means well with.

use std::{
    fs,
    io::{Read as _, Write as _},
    thread,
    time::{Duration, Instant},
};

use fastrand::Rng;
use serde_json::{Value, json};
use tapline_tests::{
    daemon::{ACCOUNT, Client, Daemon, OTHER_ACCOUNT},
    netns::Namespace,
    privileged,
    veth::Veth,
};

/// All of them together.
const REQUESTS: usize = 100_000;

/// At once.
const CLIENTS: usize = 8;

const LIMITS: &str = "[limits]\nauth_failures_per_minute = 1000000\nheader_seconds = 2\n\
                      request_seconds = 3\nbody_bytes = 20000";

/// Bytes that have meant trouble somewhere.
const NASTY: [&str; 24] = [
    "",
    "..",
    "%2e%2e%2f",
    "%00",
    "%ff%fe",
    "%",
    "%zz",
    "\u{0}",
    "é",
    "🦀",
    "'",
    "\"",
    "\\",
    "{}",
    "[[[[",
    "null",
    "-1",
    "1e999",
    "NaN",
    "99999999999999999999",
    "0x10",
    " ",
    "\t",
    "/",
];

fn pick<'a, T: ?Sized>(rng: &mut Rng, from: &[&'a T]) -> &'a T {
    from[rng.usize(..from.len())]
}

fn word(rng: &mut Rng) -> String {
    match rng.u8(..4) {
        0 => pick(rng, &NASTY).repeat(rng.usize(1..4)),
        1 => format!("{:032x}", rng.u128(..)),
        2 => (0..rng.usize(..40)).map(|_| rng.char(' '..='\u{2fff}')).collect(),
        _ => rng.u64(..).to_string(),
    }
}

fn value(rng: &mut Rng, depth: usize) -> Value {
    match rng.u8(..if depth > 3 { 6 } else { 8 }) {
        0 => Value::Null,
        1 => json!(rng.bool()),
        2 => json!(rng.i64(..)),
        3 => json!(rng.f64() * 1e6),
        4 => json!(rng.u32(..400)),
        5 => json!(word(rng)),
        6 => (0..rng.usize(..4)).map(|_| value(rng, depth + 1)).collect(),
        _ => {
            Value::Object((0..rng.usize(..4)).map(|_| (word(rng), value(rng, depth + 1))).collect())
        }
    }
}

/// A body that is nearly right: one that is right would start a capture.
fn body(rng: &mut Rng, right: &Value) -> Vec<u8> {
    let mut body = right.clone();
    for _ in 0..rng.usize(1..4) {
        let keys = [
            "type",
            "system",
            "colo_name",
            "colo",
            "destination_conf",
            "time_limit",
            "packet_limit",
            "byte_limit",
            "filter_v1",
            "offset_time",
            "x",
        ];
        body[pick(rng, &keys)] = value(rng, 0);
    }
    if rng.bool() {
        let keys = [
            "source_address",
            "destination_address",
            "source_port",
            "destination_port",
            "protocol",
        ];
        body["filter_v1"] = json!({ pick(rng, &keys): value(rng, 1) });
    }
    // Never right by chance.
    body["fuzzed"] = json!(1);
    let mut bytes = body.to_string().into_bytes();
    match rng.u8(..6) {
        0 => bytes.truncate(rng.usize(..bytes.len())),
        1 => (0..4).for_each(|_| {
            let at = rng.usize(..bytes.len());
            bytes[at] = rng.u8(..);
        }),
        2 => bytes = (0..rng.usize(..2000)).map(|_| rng.u8(..)).collect(),
        _ => {}
    }
    bytes
}

fn path(rng: &mut Rng) -> String {
    let account = match rng.u8(..6) {
        0 => OTHER_ACCOUNT.to_owned(),
        1 => encode(rng),
        _ => ACCOUNT.to_owned(),
    };
    let prefix = pick(rng, &["/client/v4", "", "/client/v4/client/v4", "/client"]);
    let tail = match rng.u8(..9) {
        0 | 1 => String::new(),
        2 => "/ownership".into(),
        3 => "/ownership/validate".into(),
        4 => format!("/ownership/{}", encode(rng)),
        5 => format!("/{:032x}", rng.u128(..)),
        6 => {
            format!("/{}/{}", encode(rng), pick(rng, &["stop", "download", "stats", "events", "x"]))
        }
        7 => format!("/{}", encode(rng)),
        _ => format!("/../../{}", encode(rng)),
    };
    let query =
        if rng.u8(..4) == 0 { format!("?{}={}", encode(rng), encode(rng)) } else { String::new() };
    if rng.u8(..20) == 0 {
        return format!(
            "/{}{query}",
            pick(rng, &["healthz", "readyz", "metrics", "openapi.json", "*"])
        );
    }
    format!("{prefix}/accounts/{account}/pcaps{tail}{query}")
}

/// A word as far as it can stand in a request line; now and then percent signs stay as they are.
fn encode(rng: &mut Rng) -> String {
    let mut out = String::new();
    for byte in word(rng).into_bytes() {
        match byte {
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'.' | b'%' | b'-' => {
                out.push(char::from(byte));
            }
            _ => out += &format!("%{byte:02x}"),
        }
    }
    out
}

fn request(rng: &mut Rng, token: &str, right: &Value) -> Vec<u8> {
    let method = pick(
        rng,
        &[
            "GET", "GET", "POST", "POST", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS",
            "TRACE", "X",
        ],
    );
    let mut head = format!("{method} {} HTTP/1.1\r\nhost: x\r\n", path(rng));
    head += &match rng.u8(..10) {
        0 => String::new(),
        1 => format!("authorization: {}\r\n", encode(rng)),
        2 => format!("authorization: Bearer {}\r\n", encode(rng)),
        3 => format!("x-auth-email: {}\r\nx-auth-key: {}\r\n", encode(rng), encode(rng)),
        _ => format!("authorization: Bearer {token}\r\n"),
    };
    for _ in 0..rng.usize(..3) {
        let name = pick(
            rng,
            &["accept", "content-type", "x-forwarded-for", "range", "expect-ct", "cookie"],
        );
        head += &format!("{name}: {}\r\n", encode(rng));
    }
    let body =
        if matches!(method, "POST" | "PUT" | "PATCH") { body(rng, right) } else { Vec::new() };
    head += &format!("content-length: {}\r\n\r\n", body.len());
    [head.into_bytes(), body].concat()
}

#[test]
fn a_hundred_thousand_fuzzed_requests_are_answered_without_a_fault() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "log = \"error\"", LIMITS);
    let body = daemon.full(&json!({}));
    let memory = || {
        let path = format!("/proc/{}/statm", daemon.pid());
        fs::read_to_string(path).unwrap().split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    let before = (memory(), descriptors());
    let fuzz = |seed: u64| {
        let mut rng = Rng::with_seed(seed);
        let mut client = daemon.client();
        for _ in 0..REQUESTS / CLIENTS {
            let bytes = request(&mut rng, &daemon.token, &body);
            let shown = || String::from_utf8_lossy(&bytes).into_owned();
            // A request that is no HTTP is answered, too, and the connection closed.
            let Some(answer) = client.raw(&bytes) else {
                client = daemon.client();
                continue;
            };
            assert!(answer.status < 500, "{answer:?}\n{}", shown());
            if answer.status >= 300 && answer.header("content-type") == Some("application/json") {
                let head = bytes.starts_with(b"HEAD");
                assert!(head || !answer.codes().is_empty(), "{}", shown());
                assert_eq!(answer.header("x-should-retry"), Some("false"));
            }
            if answer.header("connection") == Some("close")
                || answer.status == 400 && answer.body.is_empty()
            {
                client = daemon.client();
            }
        }
    };
    thread::scope(|scope| {
        let fuzz = &fuzz;
        for seed in 0..CLIENTS {
            scope.spawn(move || fuzz(seed as u64));
        }
    });
    let log = daemon.log();
    assert!(log.is_empty(), "{}", log.chars().take(4000).collect::<String>());
    let mut client = daemon.client();
    assert_eq!(client.call("GET", "", None).result(), json!([]));
    assert_eq!(client.create(&body)["status"], "running");
    let after = (memory(), descriptors());
    println!("memory and descriptors before {before:?}, after {after:?}");
    assert!(after.0 < before.0 + (64 << 20), "{before:?} {after:?}");
    assert!(after.1 < before.1 + 16, "{before:?} {after:?}");
    let made: Vec<_> = fs::read_dir(daemon.captures()).unwrap().collect();
    assert_eq!(made.len(), 1, "only what was asked for well was made: {made:?}");
}

#[test]
fn bodies_and_headers_that_are_too_long_are_cut_off() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", LIMITS);
    let post = format!(
        "POST /accounts/{ACCOUNT}/pcaps HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n",
        daemon.token
    );
    // Said to be too long: refused before a byte of it is sent.
    let told = daemon.client().raw(format!("{post}content-length: 1000000000\r\n\r\n").as_bytes());
    let told = told.unwrap();
    assert_eq!((told.status, told.codes()), (413, vec![1160]));
    // Not said: refused when it is.
    let chunk = format!("2710\r\n{}\r\n", "x".repeat(10_000));
    let chunked = format!("{post}transfer-encoding: chunked\r\n\r\n{}", chunk.repeat(4));
    let chunked = daemon.client().raw(chunked.as_bytes()).unwrap();
    assert_eq!((chunked.status, chunked.codes()), (413, vec![1160]));

    let many = "x: y\r\n".repeat(200);
    let many = daemon.client().raw(format!("{post}{many}\r\n").as_bytes()).unwrap();
    assert_eq!(many.status, 431);
    let long = daemon.client().raw(format!("{post}x: {}\r\n\r\n", "y".repeat(100_000)).as_bytes());
    assert!(long.is_none_or(|long| long.status == 431));
    assert_eq!(daemon.client().call("GET", "", None).status, 200);
}

#[test]
fn those_who_dawdle_are_cut_off_and_nobody_else_waits() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", LIMITS);
    let head = format!("GET /accounts/{ACCOUNT}/pcaps HTTP/1.1\r\nhost: x\r\n");
    let mut slow: Vec<_> = (0..200).map(|_| daemon.connect().unwrap()).collect();
    let start = Instant::now();
    for stream in &mut slow {
        stream.write_all(head.as_bytes()).unwrap();
    }
    // A header line now and then buys no time.
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(500));
        for stream in &mut slow {
            drop(stream.write_all(b"x: y\r\n"));
        }
        let asked = Instant::now();
        assert_eq!(daemon.client().call("GET", "", None).status, 200);
        assert!(asked.elapsed() < Duration::from_secs(1), "others wait");
    }
    for mut stream in slow {
        let mut rest = Vec::new();
        // Closed, with or without a word.
        let _ = stream.read_to_end(&mut rest);
    }
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());

    // A body that does not come.
    let request = format!(
        "POST /accounts/{ACCOUNT}/pcaps HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
         content-length: 100\r\n\r\n{{",
        daemon.token
    );
    let mut client = daemon.client();
    let answer = client.raw(request.as_bytes()).unwrap();
    assert_eq!((answer.status, answer.codes()), (408, vec![1161]));
    assert_eq!(answer.header("x-should-retry"), Some("false"));
}

#[test]
fn paths_lead_nowhere_but_to_captures() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", LIMITS);
    let mut client = daemon.client();
    for id in [
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e",
        "x",
        "%00",
        "0",
        "g0000000000000000000000000000000",
        "000000000000000000000000000000000",
        "%30",
        "%ff",
        "é",
    ] {
        for path in ["", "/stop", "/download", "/stats", "/events"] {
            let method = if path == "/stop" { "PUT" } else { "GET" };
            let answer = client.call(method, &format!("/{id}{path}"), None);
            assert!(matches!(answer.status, 400 | 404), "{id}{path}: {answer:?}");
            client = Client::new(daemon.connect().unwrap(), &daemon.token);
        }
    }
    let captures = daemon.captures();
    std::os::unix::fs::symlink("/tmp", captures.join("link")).unwrap();
    let root = daemon.destination();
    for destination in [
        "file:///etc".to_owned(),
        "file:///".to_owned(),
        format!("{root}/../../escaped"),
        format!("{root}/%2e%2e/%2e%2e/escaped"),
        format!("{root}/link/escaped"),
        format!("{root}x"),
        root.replace("file://", "file://evil.example"),
        "http://169.254.169.254/latest".to_owned(),
    ] {
        let body = daemon.full(&json!({ "destination_conf": destination }));
        let answer = client.call("POST", "", Some(&body));
        assert_eq!((answer.status, answer.codes()), (400, vec![1107]), "{destination}");
    }
    let made: Vec<_> = fs::read_dir(captures).unwrap().collect();
    assert_eq!(made.len(), 1, "{made:?}");
}

#[test]
fn guesses_are_counted_and_cut_off() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", "[limits]\nauth_failures_per_minute = 5");
    let mut guesser = Client::new(daemon.connect().unwrap(), "tapline_0123456789abcdef_00");
    for _ in 0..5 {
        let refused = guesser.call("GET", "", None);
        assert_eq!((refused.status, refused.codes()), (401, vec![10000]));
    }
    let limited = guesser.call("GET", "", None);
    assert_eq!((limited.status, limited.codes()), (429, vec![1141]));
    assert_eq!(limited.header("x-should-retry"), Some("false"));
    let wait: u64 = limited.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=61).contains(&wait));
    // What needs no credentials is not in their way.
    assert_eq!(guesser.raw(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").unwrap().status, 200);
    let missing = format!("GET /accounts/{ACCOUNT}/pcaps HTTP/1.1\r\nhost: x\r\n\r\n");
    let missing = guesser.raw(missing.as_bytes()).unwrap();
    assert_eq!((missing.status, missing.codes()), (400, vec![9106]));
}
