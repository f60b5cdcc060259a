use serde_json::json;

use super::*;
use crate::config::{Config, Root};

fn rules(folder: &std::path::Path) -> Rules {
    let roots = vec![Root { path: folder.into(), trusted: true }];
    let config = Config { colo: "ord02".into(), roots, ..Config::default() };
    Rules { colo: Colo::new(&config), destinations: Arc::new(Destinations::new(&config)) }
}

fn full(folder: &std::path::Path) -> Value {
    json!({
        "type": "full",
        "system": "magic-transit",
        "time_limit": 300,
        "colo_name": "ord02",
        "destination_conf": format!("file://{}/a", folder.display()),
    })
}

fn read(body: &Value) -> Result<FullRequest, Vec<Violation>> {
    let folder = tempfile::tempdir().unwrap();
    read_in(folder.path(), body)
}

fn read_in(folder: &std::path::Path, body: &Value) -> Result<FullRequest, Vec<Violation>> {
    match rules(folder).read(&serde_json::to_vec(body).unwrap())? {
        Request::Full(request) => Ok(*request),
        Request::Simple(request) => panic!("{request:?}"),
    }
}

/// A simple request, read at this time.
fn simple_at(now_us: i64, body: &Value) -> Result<SimpleRequest, Vec<Violation>> {
    let mut fields = Fields::new(body.as_object().unwrap(), "");
    fields.choice("type", &["simple"]);
    fields.choice("system", &["magic-transit"]);
    simple(fields, now_us)
}

fn pointers(violations: &[Violation]) -> Vec<(&str, Problem)> {
    violations.iter().map(|violation| (violation.pointer.as_str(), violation.problem)).collect()
}

/// A full request with one field set otherwise, or taken out by a null.
fn with(key: &str, value: Value) -> Result<FullRequest, Vec<Violation>> {
    let folder = tempfile::tempdir().unwrap();
    let mut body = full(folder.path());
    body[key] = value;
    read_in(folder.path(), &body)
}

#[test]
fn a_full_request_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut body = full(folder.path());
    body["byte_limit"] = json!(1_000_000_000.0);
    body["packet_limit"] = json!(10_000);
    body["filter_v1"] = json!({
        "source_address": "10.0.0.0/8", "destination_port": 80.0, "protocol": 6, "source_port": null
    });
    let request = read_in(folder.path(), &body).unwrap();
    assert_eq!((request.byte_limit, request.packet_limit), (Some(1_000_000_000), Some(10_000)));
    assert_eq!(
        request.filter.to_string(),
        "src net 10.0.0.0/8 and dst port 80 and (ip proto 6 or ip6 proto 6)"
    );
    assert_eq!(request.destination.folder(), Some(folder.path().join("a").as_path()));
    let echoed = serde_json::to_value(&request.filter_v1).unwrap();
    let want = json!({ "source_address": "10.0.0.0/8", "destination_port": 80, "protocol": 6 });
    assert_eq!(echoed, want);
}

#[test]
fn everything_that_is_wrong_is_told_at_once_with_its_place() {
    let violations = read(&json!({
        "type": "full",
        "system": "other",
        "time_limit": 0,
        "packet_limit": "10",
        "byte_limit": 1.5,
        "colo_name": "ams01",
        "destination_conf": "s3://bucket",
        "filter_v1": { "source_address": "x", "destination_port": 65536, "protocl": 6 },
        "a/b~c": 1,
        "offset_time": "2020-01-01T08:00:00Z",
    }))
    .unwrap_err();
    let mut found = pointers(&violations);
    found.sort_by_key(|(pointer, _)| *pointer);
    assert_eq!(
        found,
        [
            ("/a~1b~0c", Problem::Unknown),
            ("/byte_limit", Problem::Value),
            ("/colo_name", Problem::Colo),
            ("/destination_conf", Problem::Destination),
            ("/filter_v1/destination_port", Problem::Value),
            ("/filter_v1/protocl", Problem::Unknown),
            ("/filter_v1/source_address", Problem::Value),
            ("/offset_time", Problem::Unknown),
            ("/packet_limit", Problem::Type),
            ("/system", Problem::Value),
            ("/time_limit", Problem::Value),
        ]
    );
    let colo = violations.iter().find(|violation| violation.pointer == "/colo_name").unwrap();
    assert!(colo.message.contains("ord02, ORD"), "{}", colo.message);
}

#[test]
fn what_is_required_is_named_when_it_is_missing() {
    let violations = read(&json!({ "type": "full" })).unwrap_err();
    let wanted = ["/system", "/time_limit", "/colo_name", "/destination_conf"];
    assert_eq!(pointers(&violations), wanted.map(|pointer| (pointer, Problem::Missing)));
    let violations = read(&json!({})).unwrap_err();
    assert_eq!(pointers(&violations), ["/type", "/system"].map(|at| (at, Problem::Missing)));
}

#[test]
fn limits_hold_to_the_number() {
    for (key, good, bad) in [
        ("time_limit", [1.0, 86400.0], [0.0, 86401.0]),
        ("packet_limit", [1.0, 10_000.0], [0.0, 10_001.0]),
        ("byte_limit", [1.0, 1e9], [-1.0, 1e9 + 1.0]),
    ] {
        for value in good {
            assert!(with(key, json!(value)).is_ok(), "{key} {value}");
        }
        for value in bad {
            let violations = with(key, json!(value)).unwrap_err();
            assert_eq!(violations.len(), 1, "{key} {value}");
        }
    }
    assert!(with("packet_limit", Value::Null).is_ok());
}

#[test]
fn colo_is_another_name_of_colo_name_but_not_besides_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut body = full(folder.path());
    body["colo"] = json!("ORD");
    let violations = read_in(folder.path(), &body).unwrap_err();
    assert_eq!(pointers(&violations), [("/colo", Problem::Contradiction)]);
    body.as_object_mut().unwrap().remove("colo_name");
    assert_eq!(read_in(folder.path(), &body).unwrap().colo_name, "ORD");
}

#[test]
fn filters_that_no_packet_can_match_are_refused() {
    for (filter, pointer) in [
        (
            json!({ "source_address": "1.2.3.4", "destination_address": "::1" }),
            "/filter_v1/destination_address",
        ),
        (json!({ "source_port": 1, "protocol": 1 }), "/filter_v1/protocol"),
        (json!([]), "/filter_v1"),
        (json!({ "protocol": 256 }), "/filter_v1/protocol"),
        (json!({ "protocol": "tcp" }), "/filter_v1/protocol"),
        (json!({ "source_address": "1.2.3.4/33" }), "/filter_v1/source_address"),
        (json!({ "source_address": "" }), "/filter_v1/source_address"),
    ] {
        let violations = with("filter_v1", filter.clone()).unwrap_err();
        let found: Vec<_> = violations.iter().map(|violation| &violation.pointer).collect();
        assert_eq!(found, [pointer], "{filter}");
    }
}

#[test]
fn a_mapped_address_means_the_ipv4_address() {
    let request = with("filter_v1", json!({ "source_address": "::ffff:192.0.2.1" })).unwrap();
    assert_eq!(request.filter.to_string(), "src host 192.0.2.1");
}

#[test]
fn everything_that_is_wrong_with_a_simple_request_is_told() {
    let body = json!({
        "type": "simple", "system": "magic-transit", "time_limit": 301, "offset_time": "yesterday",
        "colo_name": "ord02",
    });
    let violations = read(&body).unwrap_err();
    assert_eq!(
        pointers(&violations),
        [
            ("/time_limit", Problem::Value),
            ("/packet_limit", Problem::Missing),
            ("/offset_time", Problem::Value),
            ("/colo_name", Problem::Unknown),
        ]
    );
}

#[test]
fn an_offset_time_is_read_as_clients_write_it_and_lies_in_the_last_day() {
    let now: Timestamp = "2026-01-02T08:00:00Z".parse().unwrap();
    let body = |offset: Value| {
        json!({
            "type": "simple", "system": "magic-transit", "time_limit": 300.0, "packet_limit": 10000.0,
            "filter_v1": { "protocol": 6.0 }, "offset_time": offset,
        })
    };
    let read = |offset: Value| simple_at(now.as_microsecond(), &body(offset));
    for (text, want) in [
        ("", "2026-01-02T08:00:00Z"),
        ("2026-01-02T08:00:00Z", "2026-01-02T08:00:00Z"),
        ("2026-01-02T07:00:00", "2026-01-02T07:00:00Z"),
        ("2026-01-02T07:00:00.123456+01:00", "2026-01-02T06:00:00.123456Z"),
        ("2026-01-01T08:00:00Z", "2026-01-01T08:00:00Z"),
    ] {
        let request = read(json!(text)).unwrap();
        assert_eq!(crate::record::time(request.offset_us), want, "{text}");
        assert_eq!((request.time_limit, request.packet_limit), (300, 10_000));
    }
    assert_eq!(read(Value::Null).unwrap().offset_us, now.as_microsecond());
    for text in
        ["2026-01-02T08:00:00.000001Z", "2026-01-01T07:59:59.999999", "2020-01-01T08:00:00Z"]
    {
        let violations = read(json!(text)).unwrap_err();
        assert_eq!(pointers(&violations), [("/offset_time", Problem::Value)], "{text}");
        let limits = "from 2026-01-01T08:00:00Z to 2026-01-02T08:00:00Z";
        assert!(violations[0].message.contains(limits), "{}", violations[0].message);
    }
    for value in [json!("noon"), json!("2026-13-01T00:00:00Z"), json!(5)] {
        let violations = read(value.clone()).unwrap_err();
        assert_eq!(violations[0].pointer, "/offset_time", "{value}");
    }
}

#[test]
fn a_filter_reads_the_same_from_a_record_as_from_a_request() {
    let filter = json!({
        "source_address": "::ffff:192.0.2.1", "destination_address": "10.0.0.0/8", "source_port": 1,
        "destination_port": 2, "protocol": 17,
    });
    let request = with("filter_v1", filter).unwrap();
    assert_eq!(request.filter_v1.filter().unwrap(), request.filter);
}

#[test]
fn a_body_that_is_no_object_is_one_violation() {
    let folder = tempfile::tempdir().unwrap();
    let deep = "[".repeat(100_000);
    for body in ["", "{", "[]", "null", "\"x\"", "\u{feff}{}", &deep] {
        let violations = rules(folder.path()).read(body.as_bytes()).unwrap_err();
        assert_eq!(pointers(&violations), [("", Problem::Body)]);
    }
}

#[test]
fn thousands_of_unknown_keys_do_not_make_a_long_answer() {
    let mut body = full(std::path::Path::new("/"));
    for key in 0..5000 {
        body[format!("key{key}{}", "x".repeat(1000))] = json!(1);
    }
    let violations = read(&body).unwrap_err();
    assert!(violations.len() < 100);
    assert!(violations.iter().all(|violation| violation.message.len() < 500));
}
