use std::{collections::BTreeMap, fs};

use capture_user::filter::Filter;
use futures_util::TryStreamExt as _;
use object_store::{ObjectStore, ObjectStoreExt as _, memory::InMemory, path};
use serde_json::{Value, json};

use super::*;
use crate::{
    id,
    request::{FilterV1, FullRequest},
    secrets::Secrets,
};

const ACCOUNT: u128 = 7;

struct World {
    runtime: tokio::runtime::Runtime,
    folder: tempfile::TempDir,
    store: Arc<Store>,
    config: Config,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config { data_dir: folder.path().join("data"), ..Config::default() };
        config.upload.patience_seconds = 0;
        // Nobody is there; keys are.
        config.destinations.endpoints = vec!["http://127.0.0.1:9".into()];
        let file = folder.path().join("keys");
        fs::write(&file, "[default]\naws_access_key_id = a\naws_secret_access_key = b\n").unwrap();
        config.destinations.s3_credentials = vec![crate::config::S3Credentials {
            endpoint: "http://127.0.0.1:9".into(),
            file,
            profile: "default".into(),
        }];
        let store = Arc::new(Store::open(&config.data_dir).unwrap());
        Self { runtime: tokio::runtime::Runtime::new().unwrap(), folder, store, config }
    }

    fn uploads(&self) -> (Arc<Uploads>, Arc<Destinations>) {
        let destinations = Arc::new(Destinations::new(&self.config));
        let runtime = self.runtime.handle().clone();
        let ownerships = Arc::new(Ownerships::new(
            &self.config,
            Arc::clone(&self.store),
            Secrets::new(&[1; 32]),
            Arc::clone(&destinations),
            runtime.clone(),
        ));
        let means = Means {
            store: Arc::clone(&self.store),
            ownerships,
            destinations: Arc::clone(&destinations),
            counters: Arc::default(),
            runtime,
        };
        (Uploads::open(&self.config, means).unwrap(), destinations)
    }

    /// A record of a capture to this destination, with its folder.
    fn record(&self, uploads: &Uploads, destinations: &Destinations, conf: &str) -> Record {
        let request = FullRequest {
            filter_v1: FilterV1::default(),
            filter: Filter::default(),
            colo_name: "local01".into(),
            destination: destinations.parse(conf).unwrap().0,
            time_limit: 1,
            packet_limit: None,
            byte_limit: None,
        };
        let mut record = Record::new(ACCOUNT, &request, 1);
        if record.is_uploaded() {
            record.folder = uploads.spool().join(record.folder_name());
        }
        fs::create_dir_all(&record.folder).unwrap();
        record.packets_captured = 2;
        record.outcome = Some(Status::Success);
        record.status = Status::ConversionPending;
        record.summary = Some(json!({ "law": { "hits": { "packets": 2 } } }));
        self.store.put(&record).unwrap();
        record
    }

    fn wait(&self, delivery: &Delivery) {
        let mut delivered = delivery.delivered();
        self.runtime.block_on(async { drop(delivered.wait_for(|delivered| *delivered).await) });
    }

    fn end(&self, record: &Record) -> Record {
        self.store.get(ACCOUNT, record.id).unwrap().unwrap()
    }
}

fn segment(record: &Record, name: &str, text: &str) -> Segment {
    fs::write(record.folder.join(name), text).unwrap();
    Segment {
        name: name.into(),
        size: text.len() as u64,
        packets: 1,
        captured_bytes: 60,
        first_ns: 1_500_000_000_123_456_789,
        last_ns: 1_500_000_001_000_000_000,
        sha256: None,
    }
}

const BUCKET: &str = "s3://bucket/dir?endpoint=http://127.0.0.1:9";

/// What is in a bucket.
fn objects(world: &World, store: &InMemory) -> BTreeMap<String, Vec<u8>> {
    world.runtime.block_on(async {
        let listed: Vec<_> = store.list(None).try_collect().await.unwrap();
        let mut found = BTreeMap::new();
        for one in listed {
            let bytes = store.get(&one.location).await.unwrap().bytes().await.unwrap();
            found.insert(one.location.to_string(), bytes.to_vec());
        }
        found
    })
}

#[test]
fn segments_go_as_they_are_sealed_and_the_manifest_at_last() {
    let world = World::new();
    let (uploads, destinations) = world.uploads();
    let mut record = world.record(&uploads, &destinations, BUCKET);
    let store = Arc::new(InMemory::new());
    let bucket = Bucket { store: Arc::<InMemory>::clone(&store), prefix: path::Path::from("dir") };
    let delivery = uploads.begin(&record, Some(bucket));
    let folder = format!("dir/{}", record.folder_name());
    let one = segment(&record, "a_00001.pcapng", "one");
    delivery.tell(Told::Sealed(one.clone()));
    while objects(&world, &store).is_empty() {}
    let two = segment(&record, "a_00002.pcapng", "two");
    delivery.tell(Told::Sealed(two.clone()));
    record.segments = vec![one, two];
    delivery.tell(Told::Ended(Box::new(record.clone())));
    world.wait(&delivery);
    let found = objects(&world, &store);
    let names: Vec<_> = found.keys().cloned().collect();
    let name = |name: &str| format!("{folder}/{name}");
    assert_eq!(names, [name("a_00001.pcapng"), name("a_00002.pcapng"), name("manifest.json")]);
    assert_eq!(found[&name("a_00002.pcapng")], b"two");
    let manifest: Value = serde_json::from_slice(&found[&name("manifest.json")]).unwrap();
    assert_eq!(manifest["law"]["hits"]["packets"], 2);
    let first = &manifest["objects"][0];
    assert_eq!(first["name"], format!("{}/a_00001.pcapng", record.folder_name()));
    assert_eq!(first["sha256"], id::hex(&id::sha256(b"one")));
    assert_eq!((&first["size"], &first["packets"]), (&json!(3), &json!(1)));
    assert_eq!(first["first"], "2017-07-14T02:40:00.123456789Z");
    let ended = world.end(&record);
    assert_eq!((ended.status, ended.upload_error), (Status::Success, None));
    assert!(!record.folder.exists(), "nothing stays in the spool");
    assert!(uploads.find(ACCOUNT, record.id).is_none());
    assert_eq!(uploads.stats_of(&record).unwrap().stored, 2);
}

#[test]
fn what_cannot_be_delivered_is_failed_and_kept_until_it_has_been_long_enough() {
    let mut world = World::new();
    let (uploads, destinations) = world.uploads();
    let mut record = world.record(&uploads, &destinations, BUCKET);
    record.segments = vec![segment(&record, "a_00001.pcapng", "one")];
    uploads.resume(record.clone());
    let delivery = uploads.find(ACCOUNT, record.id).unwrap();
    world.wait(&delivery);
    let ended = world.end(&record);
    assert_eq!(ended.status, Status::Failed);
    let told = ended.result().error_message.unwrap();
    assert!(told.contains("1 of its files (a_00001.pcapng)"), "{told}");
    assert!(told.contains("cannot be reached (Connection refused)"), "{told}");
    assert!(record.folder.join("a_00001.pcapng").exists());
    assert_eq!(uploads.cannot_retry(&ended), None);
    assert!(matches!(uploads.may_send(&ended), Err(OwnershipError::NotProved { .. })));
    drop(uploads);
    world.config.spool.retention_hours = 0;
    let (uploads, _) = world.uploads();
    assert!(!record.folder.exists());
    assert_eq!(uploads.spool_bytes().0, 0);
    assert!(uploads.cannot_retry(&ended).unwrap().contains("0 hours"));
}

#[test]
fn after_a_crash_what_the_store_has_is_not_sent_again_and_what_is_lost_is_named() {
    let world = World::new();
    let (uploads, destinations) = world.uploads();
    let mut record = world.record(&uploads, &destinations, BUCKET);
    let stored = segment(&record, "a_00001.pcapng", "one");
    let waiting = segment(&record, "a_00002.pcapng", "two");
    let lost = segment(&record, "a_00003.pcapng", "three");
    fs::remove_file(record.folder.join(&lost.name)).unwrap();
    record.segments = vec![stored.clone(), waiting, lost];
    let object =
        Object { name: stored.name.clone(), segment: stored, size: 3, sha256: "00".into() };
    world.store.put_object(record.id, &object).unwrap();
    let store = Arc::new(InMemory::new());
    let bucket = Bucket { store: Arc::<InMemory>::clone(&store), prefix: path::Path::default() };
    let delivery = uploads.begin(&record, Some(bucket));
    delivery.tell(Told::Ended(Box::new(record.clone())));
    world.wait(&delivery);
    let folder = record.folder_name();
    let found = objects(&world, &store);
    let names: Vec<_> = found.keys().map(String::as_str).collect();
    assert_eq!(names, [format!("{folder}/a_00002.pcapng"), format!("{folder}/manifest.json")]);
    let manifest: Value =
        serde_json::from_slice(&found[&format!("{folder}/manifest.json")]).unwrap();
    assert_eq!(manifest["missing"], json!(["a_00003.pcapng"]));
    assert_eq!(manifest["objects"].as_array().unwrap().len(), 2);
    let ended = world.end(&record);
    assert_eq!(ended.status, Status::Failed);
    assert!(ended.upload_error.unwrap().contains("(a_00003.pcapng) were lost"));
    assert!(!record.folder.join("a_00001.pcapng").exists(), "what is stored is not kept");
}

#[test]
fn a_capture_in_a_folder_gets_its_manifest_beside_its_files() {
    let world = World::new();
    let mut config = world.config.clone();
    let root = world.folder.path().join("root");
    config.roots = vec![crate::config::Root { path: root.clone(), trusted: true }];
    let world = World { config, ..world };
    fs::create_dir(&root).unwrap();
    let (uploads, destinations) = world.uploads();
    let conf = format!("file://{}/x", root.display());
    let mut record = world.record(&uploads, &destinations, &conf);
    record.segments = vec![segment(&record, "a_00001.pcapng", "one")];
    assert!(uploads.rotation(&record, 1 << 20).every.is_none());
    let delivery = uploads.begin(&record, None);
    assert!(delivery.budget().is_none());
    delivery.tell(Told::Ended(Box::new(record.clone())));
    world.wait(&delivery);
    assert_eq!(world.end(&record).status, Status::Success);
    let files: Vec<_> =
        fs::read_dir(&record.folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(files.len(), 2, "{files:?}");
    let manifest = fs::read(record.folder.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!(manifest["objects"][0]["sha256"], id::hex(&id::sha256(b"one")));
}

#[test]
fn what_is_on_its_way_when_the_daemon_stops_is_left_for_the_next_start() {
    let mut world = World::new();
    world.config.upload.patience_seconds = 3600;
    let (uploads, destinations) = world.uploads();
    let mut record = world.record(&uploads, &destinations, BUCKET);
    record.segments = vec![segment(&record, "a_00001.pcapng", "one")];
    uploads.resume(record.clone());
    let start = Instant::now();
    while !uploads.find(ACCOUNT, record.id).unwrap().is_stuck() {}
    uploads.shutdown();
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(uploads.find(ACCOUNT, record.id).is_none());
    assert_eq!(world.end(&record).status, Status::ConversionPending);
    assert!(record.folder.join("a_00001.pcapng").exists());
}
