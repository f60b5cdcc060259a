//! What is remembered: an embedded database in the data folder.
//!
//! - A change is on the disk when the call returns; a crash loses none that did.
//! - `CAPTURES` has every capture's record by id, `BY_ACCOUNT` their order, `OPEN` those that are not
//!   final, which is all that a restart has to look at.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, TableError};
use thiserror::Error;

use crate::record::Record;

const CAPTURES: TableDefinition<'_, u128, &[u8]> = TableDefinition::new("captures");
const BY_ACCOUNT: TableDefinition<'_, (u128, i64, u128), ()> = TableDefinition::new("by_account");
const OPEN: TableDefinition<'_, u128, ()> = TableDefinition::new("open");

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
        Ok(Self { database })
    }

    /// Remembers a capture as it is now.
    pub fn put(&self, record: &Record) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(record)?;
        let write = self.database.begin_write()?;
        {
            write.open_table(CAPTURES)?.insert(record.id, bytes.as_slice())?;
            let place = (record.account, record.submitted_us, record.id);
            write.open_table(BY_ACCOUNT)?.insert(place, ())?;
            let mut open = write.open_table(OPEN)?;
            if record.is_final() {
                open.remove(record.id)?;
            } else {
                open.insert(record.id, ())?;
            }
        }
        write.commit()?;
        Ok(())
    }

    /// Forgets a capture that never was.
    pub fn remove(&self, record: &Record) -> Result<(), StoreError> {
        let write = self.database.begin_write()?;
        {
            write.open_table(CAPTURES)?.remove(record.id)?;
            let place = (record.account, record.submitted_us, record.id);
            write.open_table(BY_ACCOUNT)?.remove(place)?;
            write.open_table(OPEN)?.remove(record.id)?;
        }
        write.commit()?;
        Ok(())
    }

    /// A capture of an account.
    pub fn get(&self, account: u128, id: u128) -> Result<Option<Record>, StoreError> {
        Ok(self.find(id)?.filter(|record| record.account == account))
    }

    fn find(&self, id: u128) -> Result<Option<Record>, StoreError> {
        let read = self.database.begin_read()?;
        let captures = match read.open_table(CAPTURES) {
            Err(TableError::TableDoesNotExist(_)) => return Ok(None),
            table => table?,
        };
        let found = captures.get(id)?;
        Ok(found.map(|bytes| serde_json::from_slice(bytes.value())).transpose()?)
    }

    /// The newest captures of an account.
    pub fn list(&self, account: u128, most: usize) -> Result<Vec<Record>, StoreError> {
        let read = self.database.begin_read()?;
        let (captures, by_account) = match (read.open_table(CAPTURES), read.open_table(BY_ACCOUNT))
        {
            (Err(TableError::TableDoesNotExist(_)), _) => return Ok(Vec::new()),
            (captures, by_account) => (captures?, by_account?),
        };
        let mut records = Vec::new();
        let all = (account, i64::MIN, 0)..=(account, i64::MAX, u128::MAX);
        for entry in by_account.range(all)?.rev().take(most) {
            let (_, _, id) = entry?.0.value();
            if let Some(bytes) = captures.get(id)? {
                records.push(serde_json::from_slice(bytes.value())?);
            }
        }
        Ok(records)
    }

    /// Every capture that is not final.
    pub fn unfinished(&self) -> Result<Vec<Record>, StoreError> {
        let read = self.database.begin_read()?;
        let open = match read.open_table(OPEN) {
            Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            table => table?,
        };
        let mut records = Vec::new();
        for entry in open.iter()? {
            records.extend(self.find(entry?.0.value())?);
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
        request::{FilterV1, FullRequest},
    };

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
            store.list(1, 50).unwrap().iter().map(|record| record.submitted_us).collect();
        assert_eq!(listed, (10..60).rev().collect::<Vec<_>>());
        assert_eq!(store.list(2, 50).unwrap().as_slice(), std::slice::from_ref(&other));
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
        assert_eq!(store.list(1, 50).unwrap(), [one]);
    }
}
