//! Ownerships and keys. Both are by account and destination; the keys are encrypted before they come
//! here.

use redb::{ReadableDatabase as _, TableDefinition, WriteTransaction};

use super::{Store, StoreError};
use crate::ownership::Record;

type Place = (u128, &'static str);

const OWNERSHIPS: TableDefinition<'_, Place, &[u8]> = TableDefinition::new("ownerships");
const KEYS: TableDefinition<'_, Place, &[u8]> = TableDefinition::new("keys");

/// Makes the tables.
pub(super) fn create(write: &WriteTransaction) -> Result<(), StoreError> {
    write.open_table(OWNERSHIPS)?;
    write.open_table(KEYS)?;
    Ok(())
}

impl Store {
    /// Remembers an ownership as it is now.
    pub fn put_ownership(&self, record: &Record) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(record)?;
        let write = self.database.begin_write()?;
        let place = (record.account, record.destination.as_str());
        write.open_table(OWNERSHIPS)?.insert(place, bytes.as_slice())?;
        write.commit()?;
        Ok(())
    }

    /// Forgets an ownership.
    pub fn remove_ownership(&self, record: &Record) -> Result<(), StoreError> {
        let place = (record.account, record.destination.as_str());
        let write = self.database.begin_write()?;
        write.open_table(OWNERSHIPS)?.remove(place)?;
        write.commit()?;
        Ok(())
    }

    /// An ownership.
    pub fn ownership(
        &self,
        account: u128,
        destination: &str,
    ) -> Result<Option<Record>, StoreError> {
        let bytes = self.at(OWNERSHIPS, account, destination)?;
        Ok(bytes.map(|bytes| serde_json::from_slice(&bytes)).transpose()?)
    }

    /// An account's ownerships.
    pub fn ownerships(&self, account: u128) -> Result<Vec<Record>, StoreError> {
        let read = self.database.begin_read()?;
        let mut records = Vec::new();
        for entry in read.open_table(OWNERSHIPS)?.range((account, "")..)? {
            let (place, bytes) = entry?;
            if place.value().0 != account {
                break;
            }
            records.push(serde_json::from_slice(bytes.value())?);
        }
        Ok(records)
    }

    /// Remembers the keys of a destination.
    pub fn put_keys(
        &self,
        account: u128,
        destination: &str,
        sealed: &[u8],
    ) -> Result<(), StoreError> {
        let write = self.database.begin_write()?;
        write.open_table(KEYS)?.insert((account, destination), sealed)?;
        write.commit()?;
        Ok(())
    }

    /// Forgets the keys of a destination.
    pub fn remove_keys(&self, account: u128, destination: &str) -> Result<(), StoreError> {
        let write = self.database.begin_write()?;
        write.open_table(KEYS)?.remove((account, destination))?;
        write.commit()?;
        Ok(())
    }

    /// The keys of a destination.
    pub fn keys(&self, account: u128, destination: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.at(KEYS, account, destination)
    }

    fn at(
        &self,
        table: TableDefinition<'_, Place, &[u8]>,
        account: u128,
        destination: &str,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let read = self.database.begin_read()?;
        let found = read.open_table(table)?.get((account, destination))?;
        Ok(found.map(|bytes| bytes.value().to_vec()))
    }
}
