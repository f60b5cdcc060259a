//! What must hold of a capture that has been delivered, wherever to, held against the tools that people
//! read captures with.

use std::{fs, path::Path};

use serde_json::{Value, json};
use tapline_tests::{capture::number, process::tool, store::Objects};

use super::{buckets::text, tshark_count};

/// Checks all that there is of a capture in a directory of a bucket; gives its manifest.
pub(super) fn check(objects: &Objects, directory: &str, capture: &Value) -> Value {
    let id = capture["id"].as_str().unwrap();
    let under = |name: &str| format!("{directory}/{name}");
    let manifest = text(objects, &under(&format!("pcap_{id}/manifest.json")));
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["pcap_id"], json!(id));
    assert_eq!(manifest["destination_conf"], capture["destination_conf"]);
    assert_eq!(manifest["packets_captured"], capture["packets_captured"]);
    assert_eq!(manifest["missing"], json!([]));
    let law = &manifest["law"];
    if !law.is_null() {
        let drops = law["drops"].as_object().unwrap().values().map(number).sum::<u64>();
        let written = number(&law["written"]["packets"]);
        assert_eq!(number(&law["hits"]["packets"]), written + drops, "{law}");
        assert_eq!(json!(written), capture["packets_captured"]);
    }

    let folder = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    let mut names = vec![under(&format!("pcap_{id}/manifest.json"))];
    let mut packets = 0;
    for object in manifest["objects"].as_array().unwrap() {
        let name = under(object["name"].as_str().unwrap());
        let bytes = objects.get(&name).unwrap_or_else(|| panic!("no {name}"));
        let file = folder.path().join(name.rsplit('/').next().unwrap());
        fs::write(&file, bytes).unwrap();
        check_object(&file, object);
        packets += number(&object["packets"]);
        names.push(name);
        files.push(file.into_os_string().into_string().unwrap());
    }
    names.sort();
    let inside = under(&format!("pcap_{id}/"));
    let there: Vec<_> = objects.keys().filter(|name| name.starts_with(&inside)).collect();
    assert_eq!(there, names.iter().collect::<Vec<_>>(), "those of the manifest, and no others");
    assert_eq!(json!(packets), capture["packets_captured"]);

    let merged = folder.path().join("merged.pcapng");
    let mut line = vec!["mergecap", "-w", merged.to_str().unwrap()];
    line.extend(files.iter().map(String::as_str));
    tool(&line);
    assert_eq!(tshark_count(&merged, "udp"), packets, "merged, tshark finds all of them");
    manifest
}

/// Holds an object against what the manifest says of it.
fn check_object(file: &Path, said: &Value) {
    let path = file.to_str().unwrap();
    assert_eq!(number(&said["size"]), fs::metadata(file).unwrap().len(), "{said}");
    let sum = tool(&["sha256sum", path]);
    assert_eq!(sum.split(' ').next(), said["sha256"].as_str(), "{said}");
    // Count, earliest and latest time; it complains of a file that is cut short.
    let line = tool(&["capinfos", "-TrMS", "-c", "-a", "-e", path]);
    let found: Vec<_> = line.trim_end().split('\t').skip(1).collect();
    // What ends a capture may hold its totals alone.
    let seconds = |field: &str| match said[field].as_str() {
        Some(text) => tool(&["date", "--date", text, "+%s.%N"]).trim_end().to_owned(),
        None => "n/a".to_owned(),
    };
    let packets = number(&said["packets"]).to_string();
    assert_eq!(found, [packets, seconds("first"), seconds("last")], "{said}");
    // As it is read by those who have only the object.
    let fields = ["-T", "fields", "-e", "frame.number"];
    let read = tool(&[&["tshark", "-r", path], &fields[..]].concat());
    assert_eq!(read.lines().count() as u64, number(&said["packets"]), "{said}");
}
