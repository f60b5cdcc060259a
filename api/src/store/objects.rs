//! What a store has confirmed to have of a capture. A segment is removed from this host only when it is
//! in here.

use redb::{ReadableDatabase as _, TableDefinition, WriteTransaction};

use super::{Store, StoreError};
use crate::upload::Object;

/// By capture and segment.
const OBJECTS: TableDefinition<'_, (u128, &str), &[u8]> = TableDefinition::new("objects");

/// Makes the table.
pub(super) fn create(write: &WriteTransaction) -> Result<(), StoreError> {
    write.open_table(OBJECTS)?;
    Ok(())
}

impl Store {
    /// Remembers that a segment of a capture is where it belongs.
    pub fn put_object(&self, capture: u128, object: &Object) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(object)?;
        let write = self.database.begin_write()?;
        let place = (capture, object.segment.name.as_str());
        write.open_table(OBJECTS)?.insert(place, bytes.as_slice())?;
        write.commit()?;
        Ok(())
    }

    /// The segments of a capture that are where they belong, by name.
    pub fn objects(&self, capture: u128) -> Result<Vec<Object>, StoreError> {
        let read = self.database.begin_read()?;
        let mut objects = Vec::new();
        for entry in read.open_table(OBJECTS)?.range((capture, "")..)? {
            let (place, bytes) = entry?;
            if place.value().0 != capture {
                break;
            }
            objects.push(serde_json::from_slice(bytes.value())?);
        }
        Ok(objects)
    }
}
