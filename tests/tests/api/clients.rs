//! The clients that people have: the official ones for Python and Node, curl, and schemathesis, which
//! makes requests of its own from the description.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Map, Value, json};
use tapline_tests::{
    daemon::{ACCOUNT, BASE_URL, Daemon},
    fetch::{node, python},
    generator::{Generator, Template},
    netns::Namespace,
    pcapng::counted,
    privilege::{require, test_name},
    privileged,
    process::checked,
    veth::Veth,
};

use super::{simple::EVERYTHING, tshark_count};

/// `printf %s secret | sha256sum`
const KEYS: &str = "[limits]\nauth_failures_per_minute = 3\n[[keys]]\nemail = \"user@example.com\"\n\
    key_sha256 = \"2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b\"\n\
    accounts = [\"023e105f4ecef8ad9ca31a8372d0c353\"]\npermission = \"write\"";

/// A command that talks to the daemon as an official client does.
pub(super) fn as_client(
    daemon: &Daemon<'_>,
    interface: &str,
    program: &Path,
    args: &[&str],
) -> Command {
    let mut command = daemon.command(program, args);
    command
        .env("CLOUDFLARE_BASE_URL", BASE_URL)
        .env("ACCOUNT", ACCOUNT)
        .env("TOKEN", &daemon.token)
        .env("READER", daemon.new_token(ACCOUNT, "read"))
        .env("DESTINATION", daemon.destination())
        .env("DAEMON_LOG", daemon.folder().join("log"))
        .env("INTERFACE", interface);
    command
}

/// Runs a script that creates a capture, waits for the packets, and goes on.
fn drive(script: impl FnOnce(&Daemon<'_>, &str) -> Command) {
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "max_jobs = 1", &format!("{KEYS}\n{EVERYTHING}"));
    let generator = Generator::new(&veth.left, Template::default());
    let mut child = script(&daemon, &veth.right.name)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    if line.starts_with("created ") {
        generator.send(100);
        child.stdin.take().unwrap().write_all(b"sent\n").unwrap();
    }
    let (mut rest, mut stderr) = (String::new(), String::new());
    stdout.read_to_string(&mut rest).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(child.wait().unwrap().success(), "{line}{rest}{stderr}");
    assert_eq!(rest, "done\n");
    let id = line.trim_end().strip_prefix("created ").unwrap();
    let files = daemon.files(id);
    let total: u64 = files.iter().map(|file| tshark_count(file, "udp.dstport == 2000")).sum();
    assert_eq!(total, 100);
}

#[test]
fn the_official_python_client_works_by_base_url_only() {
    privileged!();
    let packages = ["cloudflare==5.9.0"];
    if !require(test_name(|| {}), &|| python("cloudflare", &packages).map(drop)) {
        return;
    }
    let python = python("cloudflare", &packages).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/api/clients.py");
    drive(|daemon, interface| as_client(daemon, interface, &python, &[script.to_str().unwrap()]));
}

#[test]
fn the_official_node_client_works_by_base_url_only() {
    privileged!();
    let packages = ["cloudflare@7.3.0"];
    if !require(test_name(|| {}), &|| node("cloudflare-node", &packages).map(drop)) {
        return;
    }
    let folder = node("cloudflare-node", &packages).unwrap();
    // Node looks for packages beside the script.
    let script = folder.join("clients.mjs");
    fs::write(&script, include_str!("clients.mjs")).unwrap();
    drive(|daemon, interface| {
        as_client(daemon, interface, Path::new("node"), &[script.to_str().unwrap()])
    });
}

/// A description in which ids, names and places are those of the test, so that requests get somewhere.
fn pinned(description: &[u8], daemon: &Daemon<'_>, pcap: &str) -> Value {
    let mut description: Value = serde_json::from_slice(description).unwrap();
    let paths = description["paths"].as_object_mut().unwrap().values_mut();
    for operation in paths.flat_map(|path| path.as_object_mut().unwrap().values_mut()) {
        let parameters = operation.get_mut("parameters").and_then(Value::as_array_mut);
        for parameter in parameters.into_iter().flatten() {
            match parameter["name"].as_str() {
                Some("account_id") => parameter["schema"] = json!({ "enum": [ACCOUNT] }),
                Some("pcap_id") => parameter["schema"] = json!({ "enum": [pcap] }),
                _ => {}
            }
        }
    }
    let schemas = description["components"]["schemas"].as_object_mut().unwrap();
    for (name, schema) in schemas {
        // Of the published one: what is null is nothing, as some clients send it; and an empty time is one,
        // as the vendor says in words only.
        if name.ends_with("_offset_time") || name.ends_with("_filter_v1") {
            schema["nullable"] = json!(true);
            schema.as_object_mut().unwrap().remove("format");
            let fields = schema.get_mut("properties").and_then(Value::as_object_mut);
            for field in fields.into_iter().flat_map(Map::values_mut) {
                field["nullable"] = json!(true);
            }
        }
        let fields = schema.get_mut("properties").and_then(Value::as_object_mut);
        let Some(fields) = fields else { continue };
        // Of requests, not of answers.
        if fields.contains_key("colo_name") && !fields.contains_key("id") {
            fields.insert("colo_name".into(), json!({ "enum": ["ord02", "ORD"] }));
            fields.insert("destination_conf".into(), json!({ "enum": [daemon.destination()] }));
        }
    }
    description
}

/// Lets schemathesis loose on the daemon with a description.
fn schemathesis(daemon: &Daemon<'_>, python: &Path, description: &Value) {
    let file = daemon.folder().join("openapi.json");
    fs::write(&file, description.to_string()).unwrap();
    let header = format!("Authorization: Bearer {}", daemon.token);
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,\
                  response_schema_conformance,negative_data_rejection,unsupported_method";
    let mut args = vec!["run", file.to_str().unwrap(), "--url", BASE_URL, "--header", &header];
    args.extend(["--checks", checks, "--max-examples", "40", "--seed", "1"]);
    args.extend(["--phases", "examples,coverage,fuzzing"]);
    // Streams until the capture ends.
    args.extend(["--exclude-path-regex", "/events$"]);
    let mut command = daemon.command(python.with_file_name("schemathesis"), &args);
    let output = command.current_dir(daemon.folder()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains(" passed"), "{said}");
}

#[test]
fn requests_made_from_the_descriptions_are_answered_as_they_say() {
    privileged!();
    let packages = ["schemathesis==4.32.5"];
    if !require(test_name(|| {}), &|| python("schemathesis", &packages).map(drop)) {
        return;
    }
    let python = python("schemathesis", &packages).unwrap();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "log = \"error\"\nmax_jobs = 63", "");
    let mut client = daemon.client();
    let pcap = client.create(&daemon.full(&json!({})))["id"].as_str().unwrap().to_owned();
    let request = format!(
        "GET /openapi.json HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\r\n",
        daemon.token
    );
    let own = client.raw(request.as_bytes()).unwrap().body;
    schemathesis(&daemon, &python, &pinned(&own, &daemon, &pcap));
    // The one that the vendor publishes.
    let published = include_bytes!("../../data/pcaps-openapi.json");
    schemathesis(&daemon, &python, &pinned(published, &daemon, &pcap));
}

/// As the vendor's documentation prints them, but for the URL, the bucket and the account.
#[test]
fn the_curl_lines_of_the_documentation_work_as_printed() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let daemon = Daemon::start(&veth.right, "", KEYS);
    let url = format!("{BASE_URL}/accounts/{ACCOUNT}/pcaps");
    let curl = |line: &str| -> Value {
        let output = checked(&mut daemon.command("sh", &["-c", line]));
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
    };
    let key = "--header 'X-Auth-Email: user@example.com' --header 'X-Auth-Key: secret'";
    let destination = daemon.destination();
    let created = curl(&format!(
        "curl --silent {url} {key} --header 'Content-Type: application/json' --data '{{
  \"filter_v1\": {{
    \"source_address\": \"1.2.3.4\",
    \"source_port\": 123,
    \"destination_address\": \"5.6.7.8\",
    \"destination_port\": 80,
    \"protocol\": 6
  }},
  \"time_limit\": 300,
  \"packet_limit\": 10000,
  \"byte_limit\": 100000000,
  \"type\": \"full\",
  \"colo\": \"ORD\",
  \"system\": \"magic-transit\",
  \"destination_conf\": \"{destination}\"
}}'"
    ));
    assert_eq!(created["success"], true, "{created}");
    assert_eq!(created["result"]["colo_name"], "ORD");
    let id = created["result"]["id"].as_str().unwrap();
    let got = curl(&format!("curl --silent {url}/{id} {key}"));
    assert_eq!(got["result"]["status"], "running", "{got}");
    let listed = curl(&format!("curl --silent {url} {key}"));
    assert_eq!(listed["result"].as_array().unwrap().len(), 1, "{listed}");
    let bearer = format!("-H \"Authorization: Bearer {}\"", daemon.token);
    let stop = format!("curl --silent {url}/{id}/stop -X PUT {bearer} -w '%{{http_code}}'");
    assert_eq!(curl(&stop), json!(204));
    let simple = curl(&format!(
        "curl --silent {url} {key} --data '{{\"filter_v1\":{{}},\"time_limit\":300,\
         \"packet_limit\":10000,\"type\":\"simple\",\"system\":\"magic-transit\"}}'"
    ));
    assert_eq!(simple["result"]["status"], "pending", "{simple}");
    let simple = simple["result"]["id"].as_str().unwrap();
    daemon.client().wait(simple);
    let file = daemon.folder().join("download.pcap");
    let output = file.display();
    curl(&format!("curl --silent {url}/{simple}/download {key} --output {output}"));
    assert_eq!(counted(&file), 0, "nothing passed, and the file is whole");
}
