//! Sends again what of a capture could not be delivered.

use std::sync::{PoisonError, atomic::Ordering};

use super::{CaptureError, Captures};
use crate::record::{Capture, Record, Status};

impl Captures {
    /// Sends what of a full capture is still on this host. Its account has to own the destination, as if
    /// it were a new one.
    pub fn retry(&self, account: u128, id: u128) -> Result<Record, CaptureError> {
        if self.closing.load(Ordering::Acquire) {
            return Err(CaptureError::ShuttingDown);
        }
        let refuse = |reason| CaptureError::Retry { id, reason };
        // Not while another one reads the record.
        let _held = self.retrying.lock().unwrap_or_else(PoisonError::into_inner);
        let Capture::Full(mut record) = self.get(account, id)? else {
            return Err(refuse("it is a simple one, which is downloaded".into()));
        };
        if let Some(reason) = self.uploads.cannot_retry(&record) {
            return Err(refuse(reason));
        }
        self.uploads.may_send(&record)?;
        record.status = Status::ConversionPending;
        record.upload_error = None;
        record.final_us = None;
        self.store.put(&record)?;
        self.uploads.resume(record.clone());
        Ok(record)
    }
}
