//! Which buckets an account has proved to own.
//!
//! - A bucket is added: a challenge is written to it, and its record is `pending`. Whoever can read it
//!   there sends back what is in it: the record is `success`. Nothing is ever read back from a bucket,
//!   which this host may not be allowed to do.
//! - Account and destination have one record, however often it is added; each time it is not proved
//!   yet, a new challenge takes the old one's place, and the old one counts until it expires.
//! - A challenge that is wrong changes nothing. One that could not be written makes the record
//!   `failed`, and so does time; adding the bucket again mends both.
//! - The keys of a destination are apart from its record, and encrypted. They are kept when a request
//!   signed with them has succeeded.
//! - Deleting one ends no capture: those that there are, are delivered to their end, and none can be
//!   created or sent again. The keys go with the record, or with the last of these captures.

mod challenge;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use object_store::{ObjectStoreExt as _, PutPayload};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::runtime::Handle;
use utoipa::ToSchema;

use self::challenge::Challenge;
use crate::{
    config::Config,
    destination::{Bucket, Cause, Destination, DestinationError, Destinations, Keys},
    id,
    record::{now_us, time},
    secrets::Secrets,
    store::{Store, StoreError},
};

/// For a challenge to be written. The official clients give up after a minute, and try again.
const WRITE: Duration = Duration::from_secs(20);

/// Where the proof of an ownership stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = OwnershipStatus)]
pub enum Status {
    /// The challenge is in the bucket.
    Pending,
    /// What is in the challenge was sent back.
    Success,
    /// The challenge could not be written, or has expired.
    Failed,
}

/// An ownership, as the database has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: u128,
    /// Whose it is.
    pub account: u128,
    /// Of what: a destination's identity.
    pub destination: String,
    /// UTC microseconds.
    pub submitted_us: i64,
    /// Where the proof stands.
    pub status: Status,
    /// When it was proved, UTC microseconds.
    pub validated_us: Option<i64>,
    /// Until when the last challenge counts, UTC microseconds.
    pub expires_us: i64,
}

impl Record {
    /// The name of the challenge's file.
    pub fn filename(&self) -> String {
        format!("ownership-challenge-{}.txt", id::show(self.id))
    }

    /// As the API shows it.
    pub fn result(&self) -> Ownership {
        let expired = self.status == Status::Pending && self.expires_us <= now_us();
        Ownership {
            id: id::show(self.id),
            destination_conf: self.destination.clone(),
            filename: self.filename(),
            status: if expired { Status::Failed } else { self.status },
            submitted: time(self.submitted_us),
            validated: self.validated_us.map(time).unwrap_or_default(),
        }
    }
}

/// A bucket and whether it has been proved to be the account's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Ownership {
    /// The ownership's id.
    #[schema(min_length = 32, max_length = 32, example = "9883874ecac311ec8475433579a6bf5f")]
    pub id: String,
    /// The bucket, without credentials.
    pub destination_conf: String,
    /// The file in the bucket, at the destination's directory, with what has to be sent back.
    pub filename: String,
    /// Where the proof stands.
    pub status: Status,
    /// When it was first added.
    #[schema(format = DateTime)]
    pub submitted: String,
    /// When it was proved; empty before.
    pub validated: String,
}

/// An ownership could not be added, proved, found or removed.
#[derive(Debug, Error)]
pub enum OwnershipError {
    /// There is no way there.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// As many as there may be.
    #[error("the account has {limit} buckets, the most that this host allows: delete one")]
    Full {
        /// How many.
        limit: usize,
    },
    /// The bucket did not take the challenge.
    #[error("{filename} could not be written to {destination}: {cause}")]
    Write {
        /// The file.
        filename: String,
        /// Where to.
        destination: String,
        /// Why.
        cause: Cause,
    },
    /// Nobody has added it.
    #[error(
        "{destination} is not among the account's buckets: POST it to …/pcaps/ownership first, which \
         writes a challenge to it"
    )]
    NotAdded {
        /// What was asked for.
        destination: String,
    },
    /// Not proved.
    #[error(
        "the account has not proved that it owns {destination}: POST it to …/pcaps/ownership, read the \
         file that this writes to it, and POST what is in the file to …/pcaps/ownership/validate as \
         ownership_challenge"
    )]
    NotProved {
        /// What was asked for.
        destination: String,
    },
    /// The file's name instead of what is in it.
    #[error(
        "ownership_challenge is the name of the file: send what is in {filename}, which is in the bucket"
    )]
    Filename {
        /// The file.
        filename: String,
    },
    /// Not what is in the file.
    #[error("ownership_challenge is not what is in {filename}: send the whole line")]
    Wrong {
        /// The file.
        filename: String,
    },
    /// What is in another file.
    #[error("ownership_challenge is that of {other}: send what is in {filename}")]
    Other {
        /// Which it is of.
        other: String,
        /// The file.
        filename: String,
    },
    /// Too late.
    #[error(
        "the challenge expired at {at}: POST the destination to …/pcaps/ownership again, which writes a \
         new one to {filename}"
    )]
    Expired {
        /// When.
        at: String,
        /// The file.
        filename: String,
    },
    /// No such ownership, or another account's.
    #[error("no ownership has the id {}", id::show(*.0))]
    Unknown(u128),
    /// It was removed while it was worked on.
    #[error("{destination} was deleted meanwhile")]
    Removed {
        /// Which.
        destination: String,
    },
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// All ownerships.
#[derive(Debug)]
pub struct Ownerships {
    store: Arc<Store>,
    secrets: Secrets,
    destinations: Arc<Destinations>,
    /// Where requests to buckets run.
    runtime: Handle,
    valid_us: i64,
    limit: usize,
    /// Held from reading a record to writing it.
    change: Mutex<()>,
}

impl Ownerships {
    /// Those in this database.
    pub fn new(
        config: &Config,
        store: Arc<Store>,
        secrets: Secrets,
        destinations: Arc<Destinations>,
        runtime: Handle,
    ) -> Self {
        let hours = i64::from(config.destinations.challenge_hours);
        Self {
            store,
            secrets,
            destinations,
            runtime,
            valid_us: hours * 3_600_000_000,
            limit: config.destinations.per_account,
            change: Mutex::default(),
        }
    }

    /// Adds a destination, or a new challenge to one that is not proved yet. Blocks until the bucket
    /// has taken it.
    pub fn add(
        &self,
        account: u128,
        destination: &Destination,
        given: Option<&Keys>,
    ) -> Result<Record, OwnershipError> {
        let identity = destination.identity();
        let kept = self.keys(account, destination)?;
        let bucket = self.destinations.open(destination, given.or(kept.as_ref()))?;
        let record = self.find_or_insert(account, &identity)?;
        let is_new = given.is_some() && given != kept.as_ref();
        if record.status == Status::Success && !is_new {
            return Ok(record);
        }
        let expires_us = now_us() + self.valid_us;
        let challenge = Challenge::new(&self.secrets, account, &identity, record.id, expires_us);
        let written = self.write(&bucket, &record.filename(), challenge.text());
        let failed = written.is_err();
        let record = self.change(&record, |record| {
            if record.status != Status::Success {
                record.status = if failed { Status::Failed } else { Status::Pending };
            }
            if !failed {
                record.expires_us = expires_us;
            }
        })?;
        if let Err(cause) = written {
            let filename = record.filename();
            return Err(OwnershipError::Write { filename, destination: identity, cause });
        }
        if let Some(keys) = given.filter(|_| is_new) {
            let text = serde_json::to_vec(keys).map_err(StoreError::from)?;
            let sealed = self.secrets.seal(&bound(account, &identity), &text);
            self.store.put_keys(account, &identity, &sealed)?;
        }
        Ok(record)
    }

    fn write(&self, bucket: &Bucket, name: &str, text: String) -> Result<(), Cause> {
        let path = bucket.path(name);
        self.runtime.block_on(async {
            let put = bucket.store.put(&path, PutPayload::from(text));
            match tokio::time::timeout(WRITE, put).await {
                Ok(result) => result.map(drop).map_err(|error| Cause::of(&error)),
                Err(_elapsed) => Err(Cause::timeout(WRITE)),
            }
        })
    }

    fn find_or_insert(&self, account: u128, identity: &str) -> Result<Record, OwnershipError> {
        let _held = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.store.ownerships(account)?;
        if let Some(found) = all.iter().find(|record| record.destination == identity) {
            return Ok(found.clone());
        }
        if all.len() >= self.limit {
            return Err(OwnershipError::Full { limit: self.limit });
        }
        let record = Record {
            id: id::new(),
            account,
            destination: identity.to_owned(),
            submitted_us: now_us(),
            status: Status::Failed,
            validated_us: None,
            expires_us: 0,
        };
        self.store.put_ownership(&record)?;
        Ok(record)
    }

    /// Changes a record as it is now, which may not be as it was read.
    fn change(
        &self,
        record: &Record,
        enter: impl FnOnce(&mut Record),
    ) -> Result<Record, OwnershipError> {
        let _held = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.store.ownership(record.account, &record.destination)?;
        let mut now = now
            .filter(|now| now.id == record.id)
            .ok_or_else(|| OwnershipError::Removed { destination: record.destination.clone() })?;
        enter(&mut now);
        self.store.put_ownership(&now)?;
        Ok(now)
    }

    /// Takes what is said to be in the challenge's file.
    pub fn validate(
        &self,
        account: u128,
        destination: &Destination,
        text: &str,
    ) -> Result<Record, OwnershipError> {
        let identity = destination.identity();
        let Some(record) = self.store.ownership(account, &identity)? else {
            return Err(OwnershipError::NotAdded { destination: identity });
        };
        let filename = record.filename();
        let Some(challenge) = Challenge::read(text) else {
            return Err(if text.contains("ownership-challenge-") {
                OwnershipError::Filename { filename }
            } else {
                OwnershipError::Wrong { filename }
            });
        };
        if challenge.id != record.id || !challenge.is_of(&self.secrets, account, &identity) {
            let all = self.store.ownerships(account)?;
            let other = all.into_iter().find(|other| {
                other.id == challenge.id
                    && other.id != record.id
                    && challenge.is_of(&self.secrets, account, &other.destination)
            });
            return Err(match other {
                Some(other) => OwnershipError::Other { other: other.destination, filename },
                None => OwnershipError::Wrong { filename },
            });
        }
        let now = now_us();
        if challenge.expires_us <= now {
            return Err(OwnershipError::Expired { at: time(challenge.expires_us), filename });
        }
        self.change(&record, |record| {
            record.status = Status::Success;
            record.validated_us.get_or_insert(now);
        })
    }

    /// An account's ownerships, newest first.
    pub fn list(&self, account: u128) -> Result<Vec<Record>, OwnershipError> {
        let mut all = self.store.ownerships(account)?;
        all.sort_by_key(|record| std::cmp::Reverse((record.submitted_us, record.id)));
        Ok(all)
    }

    /// Forgets one, and the keys that it had when no capture needs them any more.
    pub fn remove(&self, account: u128, id: u128) -> Result<(), OwnershipError> {
        let _held = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.store.ownerships(account)?;
        let record = all.iter().find(|record| record.id == id);
        let record = record.ok_or(OwnershipError::Unknown(id))?;
        self.store.remove_ownership(record)?;
        Ok(self.remove_unused_keys(account, &record.destination)?)
    }

    /// A capture to a destination has come to its end.
    pub fn tidy(&self, account: u128, destination: &str) {
        let _held = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let tidied = match self.store.ownership(account, destination) {
            Ok(None) => self.remove_unused_keys(account, destination),
            other => other.map(drop),
        };
        if let Err(error) = tidied {
            tracing::error!(%error, "keys that nobody needs are still there");
        }
    }

    fn remove_unused_keys(&self, account: u128, destination: &str) -> Result<(), StoreError> {
        if self.store.keys(account, destination)?.is_none() {
            return Ok(());
        }
        let unfinished = self.store.unfinished()?;
        let needs = |one: &crate::record::Record| {
            one.account == account && one.destination_conf == destination
        };
        if unfinished.iter().any(needs) {
            return Ok(());
        }
        self.store.remove_keys(account, destination)
    }

    /// The way to a destination that the account may have captures written to; none is needed to a folder.
    pub fn open(
        &self,
        account: u128,
        destination: &Destination,
    ) -> Result<Option<Bucket>, OwnershipError> {
        let identity = destination.identity();
        let proved = |record: &Record| record.status == Status::Success;
        if destination.needs_proof()
            && !self.store.ownership(account, &identity)?.as_ref().is_some_and(proved)
        {
            return Err(OwnershipError::NotProved { destination: identity });
        }
        match destination.folder() {
            Some(_) => Ok(None),
            None => self.way(account, destination).map(Some),
        }
    }

    /// The way to a destination, proved or not.
    pub fn way(&self, account: u128, destination: &Destination) -> Result<Bucket, OwnershipError> {
        let keys = self.keys(account, destination)?;
        Ok(self.destinations.open(destination, keys.as_ref())?)
    }

    /// The keys of a destination, if it has some of its own.
    fn keys(
        &self,
        account: u128,
        destination: &Destination,
    ) -> Result<Option<Keys>, OwnershipError> {
        let identity = destination.identity();
        let Some(sealed) = self.store.keys(account, &identity)? else { return Ok(None) };
        let text = self.secrets.unseal(&bound(account, &identity), &sealed);
        let keys = text.ok().and_then(|text| serde_json::from_slice(&text).ok());
        if keys.is_none() {
            // As if there were none: whoever adds it again brings them.
            tracing::error!(destination = identity, "its keys were encrypted with another key");
        }
        Ok(keys)
    }
}

/// What a destination's keys are bound to.
fn bound(account: u128, identity: &str) -> Vec<u8> {
    [&account.to_be_bytes(), identity.as_bytes()].concat()
}

#[cfg(test)]
mod tests;
