//! Whose a bucket is.

use std::{collections::BTreeSet, slice::from_ref};

use serde_json::{Value, json};
use tapline_tests::{
    daemon::{ACCOUNT, Answer, Client, Daemon, OTHER_ACCOUNT},
    needs,
    netns::Namespace,
    privileged,
    store::{Moto, S3Fs, objects_in},
    veth::Veth,
};

use super::buckets::{BUCKET, Keys, R2_ACCOUNT, STORE, add, own, s3, text, validate};

fn list(client: &mut Client) -> Vec<Value> {
    client.call("GET", "/ownership", None).result().as_array().unwrap().clone()
}

fn status(client: &mut Client, id: &Value) -> Value {
    let all = list(client);
    let found = all.iter().find(|one| one["id"] == *id);
    found.unwrap_or_else(|| panic!("no {id}: {all:?}"))["status"].clone()
}

/// The one thing that a refusal says, which points at what it is about.
fn refusal(answer: &Answer, code: u64, pointer: &str) -> String {
    assert_eq!((answer.status, answer.codes()), (400, vec![code]), "{}", answer.json());
    assert_eq!(answer.header("x-should-retry"), Some("false"));
    let error = answer.json()["errors"][0].clone();
    assert_eq!(error["source"]["pointer"], pointer);
    error["message"].as_str().unwrap().to_owned()
}

#[test]
fn a_bucket_is_proved_by_what_is_in_its_challenge_and_stays_so_until_it_is_deleted() {
    needs!(S3Fs::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = S3Fs::start(&right, STORE, &[BUCKET]);
    let keys = Keys::new();
    let mut daemon = Daemon::start(&veth.right, "", &keys.config(&[STORE]));
    let mut client = daemon.client();
    let destination = s3(STORE, "deep/er");

    let added = add(&mut client, &destination).result();
    let known: BTreeSet<_> = added.as_object().unwrap().keys().map(String::as_str).collect();
    let fields = ["destination_conf", "filename", "id", "status", "submitted", "validated"];
    assert_eq!(known, BTreeSet::from(fields));
    assert_eq!((&added["status"], &added["validated"]), (&json!("pending"), &json!("")));
    let (id, filename) = (added["id"].as_str().unwrap(), added["filename"].as_str().unwrap());
    assert_eq!(filename, format!("ownership-challenge-{id}.txt"));
    let name = format!("deep/er/{filename}");
    let objects = store.objects(BUCKET);
    assert_eq!(objects.keys().collect::<Vec<_>>(), [&name], "nothing else is written");
    let challenge = text(&objects, &name);
    assert!(!challenge.contains(ACCOUNT), "it says nothing to whoever finds it: {challenge}");

    // The same destination in other words is the same record; an editor adds a line's end.
    let words = s3(STORE, "deep/er/").replace("s3:", "S3:").replace("http://", "");
    let again = add(&mut client, &words).result();
    assert_eq!((&again["id"], &again["filename"]), (&added["id"], &added["filename"]));
    let proved = validate(&mut client, &words, &format!("{challenge}\r\n")).result();
    assert_eq!((&proved["id"], &proved["status"]), (&added["id"], &json!("success")));
    assert!(proved["validated"].as_str().unwrap() >= added["submitted"].as_str().unwrap());

    // Once more of either changes nothing, and needs no bucket.
    drop(store);
    assert_eq!(add(&mut client, &destination).result(), proved);
    assert_eq!(validate(&mut client, &destination, &challenge).result(), proved);
    assert_eq!(list(&mut client).as_slice(), from_ref(&proved));
    assert!(daemon.stop().success());
    daemon.restart();
    let mut client = daemon.client();
    assert_eq!(list(&mut client), [proved]);

    assert_eq!(client.call("DELETE", &format!("/ownership/{id}"), None).status, 204);
    assert!(list(&mut client).is_empty());
    let gone = client.call("DELETE", &format!("/ownership/{id}"), None);
    assert_eq!((gone.status, gone.codes()), (404, vec![1131]));
    let late = validate(&mut client, &destination, &challenge);
    assert!(refusal(&late, 1111, "/destination_conf").contains("…/pcaps/ownership first"));
}

#[test]
fn what_is_not_in_the_challenge_proves_nothing_and_is_told_what_it_is() {
    needs!(S3Fs::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = S3Fs::start(&right, STORE, &[BUCKET]);
    let keys = Keys::new();
    let daemon = Daemon::start(&veth.right, "", &keys.config(&[STORE]));
    let mut client = daemon.client();
    let token = daemon.new_token(OTHER_ACCOUNT, "write");
    let mut other = Client::new(daemon.connect().unwrap(), &token).of(OTHER_ACCOUNT);
    let (one, two) = (s3(STORE, "one"), s3(STORE, "two"));

    let challenge_of = |client: &mut Client, destination: &str, directory: &str| {
        let added = add(client, destination).result();
        let filename = added["filename"].as_str().unwrap().to_owned();
        let challenge = text(&store.objects(BUCKET), &format!("{directory}/{filename}"));
        (added["id"].clone(), filename, challenge)
    };
    let (id, filename, right_one) = challenge_of(&mut client, &one, "one");
    let (_, _, of_two) = challenge_of(&mut client, &two, "two");
    let (_, _, of_other) = challenge_of(&mut other, &one, "one");
    assert_ne!(right_one, of_other);

    // One digit of its last part, which is the signature.
    let last = if right_one.ends_with('0') { "1" } else { "0" };
    let forged = format!("{}{last}", &right_one[..right_one.len() - 1]);
    for (sent, code, said) in [
        ("x", 1112, filename.as_str()),
        (forged.as_str(), 1112, &filename),
        (&right_one[..right_one.len() - 8], 1112, "whole line"),
        (&of_two, 1112, "/two?"),
        (&of_other, 1112, &filename),
        (&filename, 1114, "send what is in"),
        (&format!("one/{filename}"), 1114, "send what is in"),
    ] {
        let refused = validate(&mut client, &one, sent);
        let message = refusal(&refused, code, "/ownership_challenge");
        assert!(message.contains(said), "{sent}: {message}");
        assert!(!message.contains(&right_one), "{message}");
        assert_eq!(status(&mut client, &id), "pending", "{sent}");
    }
    let refused = validate(&mut other, &two, &of_two);
    assert!(refusal(&refused, 1111, "/destination_conf").contains("/two?"));
    let missing =
        client.call("POST", "/ownership/validate", Some(&json!({ "destination_conf": one })));
    assert_eq!((missing.status, missing.codes()), (400, vec![1101]));

    // Each account has its own; what is another's is not seen and not deleted.
    assert_eq!(validate(&mut client, &one, &right_one).result()["status"], "success");
    assert_eq!(list(&mut other).len(), 1);
    assert_eq!(list(&mut other)[0]["status"], "pending");
    let path = format!("/ownership/{}", id.as_str().unwrap());
    assert_eq!(other.call("DELETE", &path, None).status, 404);
    assert_eq!(status(&mut client, &id), "success");
}

#[test]
fn a_challenge_that_has_expired_is_named_and_replaced_by_adding_the_bucket_again() {
    needs!(S3Fs::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let mut store = S3Fs::start(&right, STORE, &[BUCKET]);
    let keys = Keys::new();
    let hour = "[destinations]\nchallenge_hours = 1";
    let config = keys.config(&[STORE]).replace("[destinations]", hour);
    let mut daemon = Daemon::start(&veth.right, "", &config);
    let destination = s3(STORE, "dir");
    let added = add(&mut daemon.client(), &destination).result();
    let name = format!("dir/{}", added["filename"].as_str().unwrap());
    let old = text(&store.objects(BUCKET), &name);

    assert!(daemon.stop().success());
    daemon.restart_ahead("+2h");
    store.restart_ahead("+2h");
    let mut client = daemon.client();
    assert_eq!(status(&mut client, &added["id"]), "failed", "nobody can prove it any more");
    let refused = validate(&mut client, &destination, &old);
    let message = refusal(&refused, 1113, "/ownership_challenge");
    assert!(message.contains("expired at 20") && message.contains("again"), "{message}");

    let again = add(&mut client, &destination).result();
    assert_eq!((&again["id"], &again["status"]), (&added["id"], &json!("pending")));
    let new = text(&store.objects(BUCKET), &name);
    assert_ne!(new, old);
    assert_eq!(validate(&mut client, &destination, &new).result()["status"], "success");
}

#[test]
fn a_bucket_that_takes_no_challenge_says_why_and_can_be_added_when_it_does() {
    needs!(S3Fs::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let mut store = S3Fs::start(&right, STORE, &[BUCKET]);
    store.kill();
    let keys = Keys::new();
    let daemon = Daemon::start(&veth.right, "", &keys.config(&[STORE]));
    let mut client = daemon.client();
    let destination = s3(STORE, "dir");
    let refused = refusal(&add(&mut client, &destination), 1108, "/destination_conf");
    assert!(refused.contains("Connection refused"), "{refused}");
    let listed = list(&mut client);
    assert_eq!((listed.len(), &listed[0]["status"]), (1, &json!("failed")));

    // One whose clock is an hour off.
    store.restart_ahead("+1h");
    let refused = refusal(&add(&mut client, &destination), 1108, "/destination_conf");
    assert!(refused.contains("clocks") && refused.contains("RequestTimeTooSkewed"), "{refused}");
    store.restart();
    let proved = own(&mut client, &destination, "dir", || store.objects(BUCKET));
    assert_eq!(proved["id"], listed[0]["id"]);
    assert_eq!(list(&mut client), [proved]);
}

#[test]
fn the_keys_of_an_r2_bucket_are_sent_once_and_are_no_part_of_its_name() {
    needs!(Moto::available);
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let store = Moto::start(&right, STORE, &[BUCKET]);
    let config = format!("[destinations]\nr2_endpoint = \"http://127.0.0.1:{STORE}\"");
    let daemon = Daemon::start(&veth.right, "", &config);
    let mut client = daemon.client();
    let bare = format!("r2://{BUCKET}/dir?account-id={R2_ACCOUNT}");
    let with = |key: &str| format!("{bare}&access-key-id=name&secret-access-key={key}");

    let refused = refusal(&add(&mut client, &bare), 1107, "/destination_conf");
    assert!(refused.contains("secret-access-key"), "{refused}");
    let added = add(&mut client, &with("first%2Fkey")).result();
    assert_eq!(added["destination_conf"], json!(bare));
    // Also with other keys, or with none: it has some now.
    for destination in [with("second"), bare.clone()] {
        assert_eq!(add(&mut client, &destination).result()["id"], added["id"]);
    }
    let name = format!("dir/{}", added["filename"].as_str().unwrap());
    let challenge = text(&store.objects(BUCKET), &name);
    let proved = validate(&mut client, &bare, &challenge).result();
    assert_eq!((&proved["id"], &proved["destination_conf"]), (&added["id"], &json!(bare)));
    assert_eq!(list(&mut client).len(), 1);

    // They go with the record.
    let path = format!("/ownership/{}", added["id"].as_str().unwrap());
    assert_eq!(client.call("DELETE", &path, None).status, 204);
    let refused = refusal(&add(&mut client, &bare), 1107, "/destination_conf");
    assert!(refused.contains("secret-access-key"), "{refused}");
}

#[test]
fn a_full_capture_needs_a_destination_that_its_account_has_proved_to_own() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempfile::tempdir().unwrap();
    let root = format!("[[roots]]\npath = \"{}\"", folder.path().display());
    let daemon = Daemon::start(&veth.right, "", &root);
    let destination = format!("file://{}/dir", folder.path().display());
    let mut client = daemon.client();
    let token = daemon.new_token(OTHER_ACCOUNT, "write");
    let mut other = Client::new(daemon.connect().unwrap(), &token).of(OTHER_ACCOUNT);
    let body = daemon.full(&json!({ "destination_conf": destination, "time_limit": 1 }));
    let refused = |client: &mut Client| {
        let message = refusal(&client.call("POST", "", Some(&body)), 1111, "/destination_conf");
        for step in
            [&destination, "…/pcaps/ownership,", "/ownership/validate", "what is in the file"]
        {
            assert!(message.contains(step), "{message}");
        }
    };

    refused(&mut client);
    let added = add(&mut client, &destination).result();
    refused(&mut client);
    let name = added["filename"].as_str().unwrap();
    let challenge = text(&objects_in(&folder.path().join("dir")), name);
    assert_eq!(validate(&mut client, &destination, &challenge).result()["status"], "success");
    // It is another account's, and another place.
    refused(&mut other);
    let beside = daemon.full(&json!({ "destination_conf": format!("{destination}/sub") }));
    refusal(&client.call("POST", "", Some(&beside)), 1111, "/destination_conf");
    assert!(client.call("GET", "", None).result().as_array().unwrap().is_empty());

    assert_eq!(client.create(&body)["destination_conf"], json!(destination));
    let path = format!("/ownership/{}", added["id"].as_str().unwrap());
    assert_eq!(client.call("DELETE", &path, None).status, 204);
    refused(&mut client);
}

#[test]
fn an_account_has_as_many_buckets_as_the_operator_allows() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    let config = format!("[destinations]\nper_account = 2\n[[roots]]\npath = \"{path}\"");
    let daemon = Daemon::start(&veth.right, "", &config);
    let mut client = daemon.client();
    let mut try_add = |name: &str| add(&mut client, &format!("file://{path}/{name}"));
    let first = try_add("one").result();
    try_add("two").result();
    let refused = try_add("three");
    assert_eq!((refused.status, refused.codes()), (409, vec![1143]));
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    assert_eq!(try_add("one").result()["id"], first["id"], "it is there already");
    let path = format!("/ownership/{}", first["id"].as_str().unwrap());
    assert_eq!(daemon.client().call("DELETE", &path, None).status, 204);
    try_add("three").result();
}
