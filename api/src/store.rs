//! What is remembered: an embedded database in the data folder.
//!
//! - A change is on the disk when the call returns; a crash loses none that did.
//! - Each kind of capture has its records by id, and the ids of those that are not final, which are all
//!   that a restart has to look at. `BY_ACCOUNT` is the order of both kinds.
//! - What is remembered of buckets has tables of its own.

mod objects;
mod ownerships;

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicI64, Ordering},
};

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::{
    record::{Capture, Record, now_us},
    simple::SimpleRecord,
};

type Records = TableDefinition<'static, u128, &'static [u8]>;
type Ids = TableDefinition<'static, u128, ()>;

const BY_ACCOUNT: TableDefinition<'_, (u128, i64, u128), ()> = TableDefinition::new("by_account");

/// Where one kind of capture is.
#[derive(Clone, Copy)]
struct Tables {
    records: Records,
    open: Ids,
}

const FULL: Tables =
    Tables { records: TableDefinition::new("captures"), open: TableDefinition::new("open") };

const SIMPLE: Tables =
    Tables { records: TableDefinition::new("simple"), open: TableDefinition::new("open_simple") };

/// Something is not remembered.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The data folder.
    #[error("cannot make the data folder {}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The database cannot be opened: another `taplined` has it, or it is damaged.
    #[error("cannot open the database {}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// What the database said.
        #[source]
        source: Box<redb::DatabaseError>,
    },
    /// The database refused.
    #[error("the database")]
    Database(#[source] Box<redb::Error>),
    /// A record is not one.
    #[error("a record in the database")]
    Record(#[from] serde_json::Error),
}

macro_rules! from_database {
    ($($error:ident),+) => {
        $(impl From<redb::$error> for StoreError {
            fn from(error: redb::$error) -> Self {
                Self::Database(Box::new(error.into()))
            }
        })+
    };
}

from_database!(CommitError, StorageError, TableError, TransactionError);

/// The database.
#[derive(Debug)]
pub struct Store {
    database: Database,
    last_submitted_us: AtomicI64,
}

impl Store {
    /// Opens the database of a data folder; makes what is not there.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(data_dir)
            .map_err(|source| StoreError::Folder { path: data_dir.to_path_buf(), source })?;
        let path = data_dir.join("taplined.redb");
        let database = Database::create(&path)
            .map_err(|source| StoreError::Open { path, source: Box::new(source) })?;
        let write = database.begin_write()?;
        // A table is there from its first write on; later readers need not ask.
        write.open_table(BY_ACCOUNT)?;
        for tables in [FULL, SIMPLE] {
            write.open_table(tables.records)?;
            write.open_table(tables.open)?;
        }
        ownerships::create(&write)?;
        objects::create(&write)?;
        write.commit()?;
        Ok(Self { database, last_submitted_us: AtomicI64::new(0) })
    }

    /// A time that no other capture has: their order is the order of these.
    pub fn submitted_us(&self) -> i64 {
        let now = now_us();
        let later = |last: i64| Some(now.max(last + 1));
        self.last_submitted_us
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, later)
            .map_or(now, |last| now.max(last + 1))
    }

    /// Remembers a full capture as it is now.
    pub fn put(&self, record: &Record) -> Result<(), StoreError> {
        let place = (record.account, record.submitted_us, record.id);
        self.insert(FULL, place, &serde_json::to_vec(record)?, record.is_final())
    }

    /// Remembers a simple capture as it is now.
    pub fn put_simple(&self, record: &SimpleRecord) -> Result<(), StoreError> {
        let place = (record.account, record.submitted_us, record.id);
        self.insert(SIMPLE, place, &serde_json::to_vec(record)?, record.is_final())
    }

    fn insert(
        &self,
        tables: Tables,
        place: (u128, i64, u128),
        bytes: &[u8],
        is_final: bool,
    ) -> Result<(), StoreError> {
        let (_, _, id) = place;
        let write = self.database.begin_write()?;
        {
            write.open_table(tables.records)?.insert(id, bytes)?;
            write.open_table(BY_ACCOUNT)?.insert(place, ())?;
            let mut open = write.open_table(tables.open)?;
            if is_final {
                open.remove(id)?;
            } else {
                open.insert(id, ())?;
            }
        }
        write.commit()?;
        Ok(())
    }

    /// Forgets a full capture that never was.
    pub fn remove(&self, record: &Record) -> Result<(), StoreError> {
        let write = self.database.begin_write()?;
        {
            write.open_table(FULL.records)?.remove(record.id)?;
            let place = (record.account, record.submitted_us, record.id);
            write.open_table(BY_ACCOUNT)?.remove(place)?;
            write.open_table(FULL.open)?.remove(record.id)?;
        }
        write.commit()?;
        Ok(())
    }

    /// A full capture of an account.
    pub fn get(&self, account: u128, id: u128) -> Result<Option<Record>, StoreError> {
        Ok(self.find(FULL.records, id)?.filter(|record: &Record| record.account == account))
    }

    /// A full capture, whosesoever it is.
    pub fn find_full(&self, id: u128) -> Result<Option<Record>, StoreError> {
        self.find(FULL.records, id)
    }

    /// A capture of an account, of either kind.
    pub fn get_any(&self, account: u128, id: u128) -> Result<Option<Capture>, StoreError> {
        if let Some(record) = self.get(account, id)? {
            return Ok(Some(Capture::Full(record)));
        }
        let simple =
            self.find(SIMPLE.records, id)?.filter(|one: &SimpleRecord| one.account == account);
        Ok(simple.map(Capture::Simple))
    }

    fn find<T: DeserializeOwned>(
        &self,
        records: Records,
        id: u128,
    ) -> Result<Option<T>, StoreError> {
        let read = self.database.begin_read()?;
        let found = read.open_table(records)?.get(id)?;
        Ok(found.map(|bytes| serde_json::from_slice(bytes.value())).transpose()?)
    }

    /// The newest captures of an account, of both kinds.
    pub fn list(&self, account: u128, most: usize) -> Result<Vec<Capture>, StoreError> {
        let read = self.database.begin_read()?;
        let (full, simple) = (read.open_table(FULL.records)?, read.open_table(SIMPLE.records)?);
        let all = (account, i64::MIN, 0)..=(account, i64::MAX, u128::MAX);
        let mut captures = Vec::new();
        for entry in read.open_table(BY_ACCOUNT)?.range(all)?.rev().take(most) {
            let (_, _, id) = entry?.0.value();
            if let Some(bytes) = full.get(id)? {
                captures.push(Capture::Full(serde_json::from_slice(bytes.value())?));
            } else if let Some(bytes) = simple.get(id)? {
                captures.push(Capture::Simple(serde_json::from_slice(bytes.value())?));
            }
        }
        Ok(captures)
    }

    /// Every full capture that is not final.
    pub fn unfinished(&self) -> Result<Vec<Record>, StoreError> {
        self.open_ones(FULL)
    }

    /// Every simple capture that is not final, oldest first.
    pub fn unfinished_simple(&self) -> Result<Vec<SimpleRecord>, StoreError> {
        let mut records: Vec<SimpleRecord> = self.open_ones(SIMPLE)?;
        records.sort_by_key(|record| record.submitted_us);
        Ok(records)
    }

    fn open_ones<T: DeserializeOwned>(&self, tables: Tables) -> Result<Vec<T>, StoreError> {
        let read = self.database.begin_read()?;
        let mut records = Vec::new();
        for entry in read.open_table(tables.open)?.iter()? {
            records.extend(self.find(tables.records, entry?.0.value())?);
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        destination::Destination,
        record::Status,
        request::{FilterV1, FullRequest, SimpleRequest},
    };

    fn simple(account: u128, submitted_us: i64) -> SimpleRecord {
        let request = SimpleRequest {
            filter_v1: FilterV1::default(),
            offset_us: 5,
            time_limit: 1,
            packet_limit: 1,
        };
        SimpleRecord::new(account, &request, submitted_us)
    }

    fn record(account: u128, submitted_us: i64) -> Record {
        let request = FullRequest {
            filter_v1: FilterV1::default(),
            filter: capture_user::filter::Filter::default(),
            colo_name: "local01".into(),
            destination: Destination::in_folder("/x"),
            time_limit: 1,
            packet_limit: None,
            byte_limit: None,
        };
        Record::new(account, &request, submitted_us)
    }

    #[test]
    fn an_empty_database_has_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.list(1, 50).unwrap(), []);
        assert_eq!(store.unfinished().unwrap(), []);
        assert_eq!(store.get(1, 2).unwrap(), None);
    }

    #[test]
    fn captures_are_listed_newest_first_and_only_to_their_account() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        for at in 0..60 {
            store.put(&record(1, at)).unwrap();
        }
        let other = record(2, 5);
        store.put(&other).unwrap();
        let listed: Vec<i64> =
            store.list(1, 50).unwrap().iter().map(Capture::submitted_us).collect();
        assert_eq!(listed, (10..60).rev().collect::<Vec<_>>());
        assert_eq!(store.list(2, 50).unwrap(), [Capture::Full(other.clone())]);
        assert_eq!(store.get(1, other.id).unwrap(), None);
        assert_eq!(store.get(2, other.id).unwrap(), Some(other));
    }

    #[test]
    fn what_is_not_final_is_found_again_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let mut one = record(1, 1);
        let other = record(1, 2);
        {
            let store = Store::open(folder.path()).unwrap();
            store.put(&one).unwrap();
            store.put(&other).unwrap();
            one.status = Status::Success;
            store.put(&one).unwrap();
            assert!(Store::open(folder.path()).is_err(), "two daemons with one folder");
        }
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.unfinished().unwrap().as_slice(), std::slice::from_ref(&other));
        store.remove(&other).unwrap();
        assert_eq!(store.unfinished().unwrap(), []);
        assert_eq!(store.list(1, 50).unwrap(), [Capture::Full(one)]);
    }

    #[test]
    fn both_kinds_are_listed_together_and_found_again_apart() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let full = record(1, 2);
        let mut simple = [simple(1, 1), simple(1, 3)];
        store.put_simple(&simple[1]).unwrap();
        store.put(&full).unwrap();
        store.put_simple(&simple[0]).unwrap();
        let listed = store.list(1, 2).unwrap();
        assert_eq!(listed, [Capture::Simple(simple[1].clone()), Capture::Full(full.clone())]);
        assert_eq!(store.unfinished().unwrap(), [full]);
        assert_eq!(store.unfinished_simple().unwrap(), simple, "oldest first");
        simple[0].status = Status::Failed;
        store.put_simple(&simple[0]).unwrap();
        assert_eq!(store.unfinished_simple().unwrap(), simple[1..]);
        let found = store.get_any(1, simple[0].id).unwrap();
        assert_eq!(found, Some(Capture::Simple(simple[0].clone())));
        assert_eq!(store.get_any(2, simple[0].id).unwrap(), None);
        assert_eq!(store.get(1, simple[0].id).unwrap(), None, "it is no full one");
    }
}
