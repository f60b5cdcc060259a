//! What the tests of buckets have in common.

use std::{fmt::Write as _, fs};

use serde_json::{Value, json};
use tapline_tests::{
    daemon::{Answer, Client},
    store::{ACCESS_KEY, Objects, SECRET_KEY},
};
use tempfile::TempDir;

/// Where a store listens.
pub(super) const STORE: u16 = 9000;

/// Where a proxy listens.
pub(super) const PROXY: u16 = 9001;

/// An account at R2.
pub(super) const R2_ACCOUNT: &str = "0123456789abcdef0123456789abcdef";

/// The bucket of most tests.
pub(super) const BUCKET: &str = "captures";

/// The operator's keys, in a file.
pub(super) struct Keys(TempDir);

impl Keys {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        );
        fs::write(folder.path().join("keys"), text).unwrap();
        Self(folder)
    }

    /// The configuration in which the endpoints at these ports are allowed, with these keys for them.
    pub(super) fn config(&self, ports: &[u16]) -> String {
        let endpoints: Vec<_> = ports.iter().map(|port| endpoint(*port)).collect();
        let mut config = format!("[destinations]\nendpoints = {}\n", json!(endpoints));
        let file = self.0.path().join("keys");
        for endpoint in endpoints {
            let file = file.display();
            let table = "[[destinations.s3_credentials]]";
            writeln!(config, "{table}\nendpoint = \"{endpoint}\"\nfile = \"{file}\"").unwrap();
        }
        config
    }
}

fn endpoint(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

/// A directory in the bucket, at the endpoint of a port.
pub(super) fn s3(port: u16, directory: &str) -> String {
    format!("s3://{BUCKET}/{directory}?endpoint={}", endpoint(port))
}

/// Asks to add a destination.
pub(super) fn add(client: &mut Client, destination: &str) -> Answer {
    client.call("POST", "/ownership", Some(&json!({ "destination_conf": destination })))
}

/// Sends what is said to be a challenge.
pub(super) fn validate(client: &mut Client, destination: &str, challenge: &str) -> Answer {
    let body = json!({ "destination_conf": destination, "ownership_challenge": challenge });
    client.call("POST", "/ownership/validate", Some(&body))
}

/// Adds a destination in a directory of a store, and proves that it is the account's own.
pub(super) fn own(
    client: &mut Client,
    destination: &str,
    directory: &str,
    objects: impl FnOnce() -> Objects,
) -> Value {
    let added = add(client, destination).result();
    let name = format!("{directory}/{}", added["filename"].as_str().unwrap());
    let challenge = text(&objects(), &name);
    let proved = validate(client, destination, &challenge).result();
    assert_eq!((&proved["id"], &proved["status"]), (&added["id"], &json!("success")));
    proved
}

/// An object that is a text.
pub(super) fn text(objects: &Objects, name: &str) -> String {
    let found = objects.get(name).unwrap_or_else(|| panic!("no {name}: {:?}", objects.keys()));
    String::from_utf8(found.clone()).unwrap()
}
