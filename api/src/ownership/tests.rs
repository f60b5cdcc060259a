use std::{fs, path::Path};

use super::*;
use crate::config::Root;

const ACCOUNT: u128 = 7;
const OTHER: u128 = 8;

struct World {
    runtime: tokio::runtime::Runtime,
    folder: tempfile::TempDir,
    store: Arc<Store>,
    destinations: Arc<Destinations>,
    config: Config,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = Root { path: folder.path().join("root"), trusted: false };
        let mut config = Config { roots: vec![root], ..Config::default() };
        config.destinations.per_account = 2;
        // Nobody is there.
        config.destinations.r2_endpoint = "http://127.0.0.1:9".into();
        let destinations = Arc::new(Destinations::new(&config));
        destinations.create_roots().unwrap();
        Self {
            runtime: tokio::runtime::Runtime::new().unwrap(),
            store: Arc::new(Store::open(&folder.path().join("data")).unwrap()),
            folder,
            destinations,
            config,
        }
    }

    fn ownerships(&self) -> Ownerships {
        Ownerships::new(
            &self.config,
            Arc::clone(&self.store),
            Secrets::new(&[3; 32]),
            Arc::clone(&self.destinations),
            self.runtime.handle().clone(),
        )
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join("root").join(name)
    }

    fn destination(&self, name: &str) -> Destination {
        let uri = format!("file://{}", self.path(name).display());
        self.destinations.parse(&uri).unwrap().0
    }
}

fn challenge(folder: &Path, record: &Record) -> String {
    fs::read_to_string(folder.join(record.filename())).unwrap()
}

#[test]
fn what_is_in_the_file_proves_a_destination_for_its_account_only() {
    let world = World::new();
    let ownerships = world.ownerships();
    let destination = world.destination("a");
    let record = ownerships.add(ACCOUNT, &destination, None).unwrap();
    let shown = record.result();
    assert_eq!((shown.status, shown.validated.as_str()), (Status::Pending, ""));
    assert_eq!(shown.filename, format!("ownership-challenge-{}.txt", shown.id));
    assert!(matches!(
        ownerships.open(ACCOUNT, &destination),
        Err(OwnershipError::NotProved { .. })
    ));
    let text = challenge(&world.path("a"), &record);
    let proved = ownerships.validate(ACCOUNT, &destination, &format!("{text}\n")).unwrap();
    assert_eq!((proved.id, proved.status), (record.id, Status::Success));
    assert!(!proved.result().validated.is_empty());
    assert!(ownerships.open(ACCOUNT, &destination).is_ok());
    assert!(ownerships.open(OTHER, &destination).is_err());
    let not_added = ownerships.validate(OTHER, &destination, &text);
    assert!(matches!(not_added, Err(OwnershipError::NotAdded { .. })));
    // A second account has a challenge of its own, and the first one's is none for it.
    ownerships.add(OTHER, &destination, None).unwrap();
    let wrong = ownerships.validate(OTHER, &destination, &text);
    assert!(matches!(wrong, Err(OwnershipError::Wrong { .. })));
    // It is remembered.
    assert!(world.ownerships().open(ACCOUNT, &destination).is_ok());
    ownerships.remove(ACCOUNT, record.id).unwrap();
    assert!(ownerships.open(ACCOUNT, &destination).is_err());
    assert!(matches!(ownerships.remove(ACCOUNT, record.id), Err(OwnershipError::Unknown(_))));
}

#[test]
fn a_challenge_that_is_not_the_right_one_is_told_what_it_is_and_changes_nothing() {
    let world = World::new();
    let ownerships = world.ownerships();
    let (a, b) = (world.destination("a"), world.destination("b"));
    let of_a = ownerships.add(ACCOUNT, &a, None).unwrap();
    let of_b = ownerships.add(ACCOUNT, &b, None).unwrap();
    let told = |text: &str| ownerships.validate(ACCOUNT, &a, text).unwrap_err();
    assert!(matches!(told(&of_a.filename()), OwnershipError::Filename { .. }));
    assert!(matches!(told("hello"), OwnershipError::Wrong { .. }));
    let of_other = told(&challenge(&world.path("b"), &of_b));
    assert!(matches!(of_other, OwnershipError::Other { other, .. } if other == b.identity()));
    let expired = Challenge::new(&Secrets::new(&[3; 32]), ACCOUNT, &a.identity(), of_a.id, 1);
    assert!(matches!(told(&expired.text()), OwnershipError::Expired { .. }));
    let of_past = Challenge::new(&Secrets::new(&[3; 32]), ACCOUNT, &a.identity(), 1, i64::MAX);
    assert!(matches!(told(&of_past.text()), OwnershipError::Wrong { .. }));
    let forged = Challenge::new(&Secrets::new(&[4; 32]), ACCOUNT, &a.identity(), of_a.id, i64::MAX);
    assert!(matches!(told(&forged.text()), OwnershipError::Wrong { .. }));
    let kept = ownerships.list(ACCOUNT).unwrap();
    assert_eq!(kept, [of_b, of_a]);
}

#[test]
fn adding_again_is_the_same_record_and_as_many_as_there_may_be_are_there() {
    let world = World::new();
    let ownerships = world.ownerships();
    let a = world.destination("a");
    let first = ownerships.add(ACCOUNT, &a, None).unwrap();
    let early = challenge(&world.path("a"), &first);
    fs::remove_file(world.path("a").join(first.filename())).unwrap();
    let again = ownerships.add(ACCOUNT, &a, None).unwrap();
    assert_eq!((again.id, again.submitted_us), (first.id, first.submitted_us));
    // The old one counts until it expires, for who has it may be about to send it.
    ownerships.validate(ACCOUNT, &a, &early).unwrap();
    fs::remove_file(world.path("a").join(first.filename())).unwrap();
    let proved = ownerships.add(ACCOUNT, &a, None).unwrap();
    assert_eq!(proved.status, Status::Success);
    assert!(!world.path("a").join(first.filename()).exists(), "what is proved is left alone");
    ownerships.add(ACCOUNT, &world.destination("b"), None).unwrap();
    let full = ownerships.add(ACCOUNT, &world.destination("c"), None);
    assert!(matches!(full, Err(OwnershipError::Full { limit: 2 })));
    assert!(ownerships.add(OTHER, &world.destination("c"), None).is_ok());
}

#[test]
fn what_could_not_be_written_is_failed_until_it_could_and_time_makes_it_so_too() {
    let world = World::new();
    let ownerships = world.ownerships();
    let a = world.destination("a");
    // A folder where the file has to be.
    let record = ownerships.find_or_insert(ACCOUNT, &a.identity()).unwrap();
    fs::create_dir_all(world.path("a").join(record.filename()).join("x")).unwrap();
    let error = ownerships.add(ACCOUNT, &a, None).unwrap_err();
    assert!(matches!(error, OwnershipError::Write { .. }), "{error}");
    assert_eq!(ownerships.list(ACCOUNT).unwrap()[0].result().status, Status::Failed);
    fs::remove_dir_all(world.path("a")).unwrap();
    let mended = ownerships.add(ACCOUNT, &a, None).unwrap();
    assert_eq!((mended.id, mended.result().status), (record.id, Status::Pending));
    let late = Record { expires_us: now_us() - 1, ..mended };
    assert_eq!(late.result().status, Status::Failed);
}

#[test]
fn keys_are_kept_only_when_they_have_worked_and_nobody_reads_them_in_the_database() {
    let world = World::new();
    let ownerships = world.ownerships();
    let account = "0123456789abcdef0123456789abcdef";
    let uri = format!("r2://bucket/dir?account-id={account}");
    let with_keys = format!("{uri}&access-key-id=hidden-id&secret-access-key=hidden-key");
    let (destination, keys) = world.destinations.parse(&with_keys).unwrap();
    let none = ownerships.add(ACCOUNT, &destination, None).unwrap_err();
    assert!(matches!(none, OwnershipError::Destination(_)), "{none}");
    let unreachable = ownerships.add(ACCOUNT, &destination, keys.as_ref()).unwrap_err();
    assert!(unreachable.to_string().contains("cannot be reached"), "{unreachable}");
    assert!(!format!("{unreachable} {unreachable:?}").contains("hidden"));
    assert_eq!(world.store.keys(ACCOUNT, &destination.identity()).unwrap(), None);
    // As if it had worked.
    let text = serde_json::to_vec(&keys).unwrap();
    let identity = destination.identity();
    let sealed = ownerships.secrets.seal(&bound(ACCOUNT, &identity), &text);
    world.store.put_keys(ACCOUNT, &identity, &sealed).unwrap();
    assert_eq!(ownerships.keys(ACCOUNT, &destination).unwrap(), keys);
    assert_eq!(ownerships.keys(OTHER, &destination).unwrap(), None);
    let file = fs::read(world.folder.path().join("data/taplined.redb")).unwrap();
    assert!(!file.windows(7).any(|part| part == b"hidden-"));
    let record = ownerships.list(ACCOUNT).unwrap().remove(0);
    ownerships.remove(ACCOUNT, record.id).unwrap();
    assert_eq!(world.store.keys(ACCOUNT, &identity).unwrap(), None);
}
