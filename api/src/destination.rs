//! Where a capture's files may go, and the way there.
//!
//! ```text
//!  destination_conf ── Destinations::parse ──► Destination ── Destinations::open ──► Bucket
//!  text of a client    allow-lists only        no secrets     credentials, a client   object_store
//!                                │                            that reaches one host
//!                                └──► Keys: the secrets of an r2:// URI, and nothing else
//! ```
//!
//! | form | keys |
//! |---|---|
//! | `file:///PATH` | none; PATH lies in a folder of `roots` |
//! | `s3://BUCKET/DIRECTORY` | `region`; `endpoint`, which must be one of `destinations.endpoints` |
//! | `gs://BUCKET/DIRECTORY` | none |
//! | `r2://BUCKET/DIRECTORY` | `account-id`; `access-key-id` and `secret-access-key` |
//!
//! A [`Destination`] is what an account proves to own. It has no credentials, so two texts that differ
//! in nothing else are one destination; [`Destination::identity`] is its text, which is stored, matched
//! and shown. No client's text becomes the name of a host: what it can choose of one is a region or an
//! account id, and both are checked.

mod bucket;
mod cause;
mod client;
mod credentials;
mod roots;
mod uri;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use thiserror::Error;

pub use self::{
    bucket::Bucket,
    cause::Cause,
    credentials::{Keys, Secret},
    roots::Roots,
};
use self::{client::Origin, uri::Parts};
use crate::config::{Config, DestinationSettings};

/// Why a destination is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DestinationError {
    /// Not a URI that is known at all.
    #[error(
        "destination_conf must begin with s3://, gs:// or r2://, or be file:///PATH, where PATH lies \
         in {roots}"
    )]
    Scheme {
        /// The folders that there are.
        roots: String,
    },
    /// A name or a password before the bucket.
    #[error("destination_conf must not have a user or password (`…@`)")]
    UserInfo,
    /// The bucket's name cannot be.
    #[error("destination_conf has the bucket `{name}`, but its name must have {limit}")]
    BucketName {
        /// What was given.
        name: String,
        /// What it may be.
        limit: &'static str,
    },
    /// The directory behind the bucket cannot be.
    #[error("destination_conf has a directory that {problem}")]
    Directory {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The query cannot be read.
    #[error("destination_conf has a query that {problem}")]
    Query {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A key that this kind does not have.
    #[error("destination_conf has the key `{key}`, but {scheme}:// {known}")]
    Key {
        /// Which.
        key: String,
        /// The kind of destination.
        scheme: &'static str,
        /// What it has.
        known: &'static str,
    },
    /// A key that must be there.
    #[error("destination_conf lacks `{key}`: {example}")]
    Missing {
        /// Which.
        key: &'static str,
        /// What it looks like.
        example: &'static str,
    },
    /// A key's value cannot be.
    #[error("destination_conf has {key} = `{value}`, but it must be {limit}")]
    Value {
        /// Which key.
        key: &'static str,
        /// What was given; nothing of a secret.
        value: String,
        /// What it may be.
        limit: String,
    },
    /// Not a plain absolute path.
    #[error("destination_conf must be file:///PATH: {problem}")]
    Path {
        /// What it must not have.
        problem: &'static str,
    },
    /// Outside every root.
    #[error("destination_conf must lie in a folder that this host's operator allows: {roots}")]
    Outside {
        /// The folders that there are.
        roots: String,
    },
    /// There is nothing to sign requests with.
    #[error("there are no credentials for {place}: {remedy}")]
    Credentials {
        /// For what.
        place: String,
        /// Who can do what about it.
        remedy: &'static str,
    },
    /// The way there cannot be made ready.
    #[error("{place} cannot be opened: {cause}")]
    Open {
        /// What.
        place: String,
        /// Why.
        cause: String,
    },
}

/// A place for captures, without credentials.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    place: Place,
    /// Without slashes at its ends; empty for a folder.
    directory: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Place {
    Folder { path: PathBuf, trusted: bool },
    S3 { bucket: String, region: String, endpoint: Option<Origin> },
    Gs { bucket: String },
    R2 { bucket: String, account: String },
}

impl Destination {
    /// A folder that is trusted.
    #[cfg(test)]
    pub(crate) fn in_folder(path: impl Into<PathBuf>) -> Self {
        let place = Place::Folder { path: path.into(), trusted: true };
        Self { place, directory: String::new() }
    }

    /// Its text: two destinations are one if these are the same. It can be parsed again.
    pub fn identity(&self) -> String {
        self.to_string()
    }

    /// Whether an account must prove that it owns it before anything is written there.
    pub fn needs_proof(&self) -> bool {
        !matches!(self.place, Place::Folder { trusted: true, .. })
    }

    /// The folder, if it is one on this host.
    pub fn folder(&self) -> Option<&Path> {
        match &self.place {
            Place::Folder { path, .. } => Some(path),
            _ => None,
        }
    }

    /// The bucket, if it is one.
    pub fn bucket(&self) -> Option<&str> {
        match &self.place {
            Place::Folder { .. } => None,
            Place::S3 { bucket, .. } | Place::Gs { bucket } | Place::R2 { bucket, .. } => {
                Some(bucket)
            }
        }
    }

    /// What captures are put under, in the bucket or below the folder.
    pub fn directory(&self) -> &str {
        &self.directory
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let directory = |f: &mut fmt::Formatter<'_>| match self.directory.as_str() {
            "" => Ok(()),
            directory => write!(f, "/{directory}"),
        };
        match &self.place {
            Place::Folder { path, .. } => {
                write!(f, "file://{}", uri::encode(&path.to_string_lossy()))
            }
            Place::S3 { bucket, region, endpoint } => {
                write!(f, "s3://{bucket}")?;
                directory(f)?;
                write!(f, "?region={region}")?;
                match endpoint {
                    Some(endpoint) => write!(f, "&endpoint={endpoint}"),
                    None => Ok(()),
                }
            }
            Place::Gs { bucket } => {
                write!(f, "gs://{bucket}")?;
                directory(f)
            }
            Place::R2 { bucket, account } => {
                write!(f, "r2://{bucket}")?;
                directory(f)?;
                write!(f, "?account-id={account}")
            }
        }
    }
}

/// Whether a text is `http://HOST[:PORT]` or `https://HOST[:PORT]`.
pub(crate) fn is_origin(text: &str) -> bool {
    Origin::parse(text).is_some()
}

/// What destinations there can be on this host, and how they are reached.
#[derive(Clone, Debug)]
pub struct Destinations {
    roots: Roots,
    settings: DestinationSettings,
    /// What `endpoint` may be.
    endpoints: Vec<Origin>,
}

impl Destinations {
    /// As configured.
    pub fn new(config: &Config) -> Self {
        // What is configured has been checked.
        let endpoints = config.destinations.endpoints.iter();
        Self {
            roots: Roots::new(&config.roots),
            settings: config.destinations.clone(),
            endpoints: endpoints.filter_map(|text| Origin::parse(text)).collect(),
        }
    }

    /// Makes the folders that are not there.
    pub fn create_roots(&self) -> std::io::Result<()> {
        self.roots.create()
    }

    /// Reads a `destination_conf`.
    pub fn parse(&self, text: &str) -> Result<(Destination, Option<Keys>), DestinationError> {
        let roots = || self.roots.names();
        let (scheme, rest) =
            text.split_once("://").ok_or_else(|| DestinationError::Scheme { roots: roots() })?;
        let (destination, keys) = match scheme.to_ascii_lowercase().as_str() {
            "file" => {
                let (path, trusted) = self.roots.resolve(rest)?;
                let place = Place::Folder { path, trusted };
                (Destination { place, directory: String::new() }, None)
            }
            "s3" => (self.s3(rest)?, None),
            "gs" => (gs(rest)?, None),
            "r2" => r2(rest)?,
            _ => return Err(DestinationError::Scheme { roots: roots() }),
        };
        Ok((destination, keys))
    }

    /// What stands for the store of a destination: who waits for one waits for all of its directories.
    pub fn store_of(&self, identity: &str) -> String {
        match self.parse(identity).map(|(destination, _keys)| destination.place) {
            Ok(Place::S3 { endpoint: Some(endpoint), .. }) => endpoint.to_string(),
            Ok(place) => Destination { place, directory: String::new() }.identity(),
            Err(_) => identity.to_owned(),
        }
    }

    fn s3(&self, rest: &str) -> Result<Destination, DestinationError> {
        let known = "has the keys region and endpoint only; its credentials are the operator's";
        let mut parts = Parts::new(rest, "s3", known, &["region", "endpoint"])?;
        let bucket = parts.bucket(|c| matches!(c, 'a'..='z' | '0'..='9' | '-' | '.'))?;
        let endpoint = parts.take("endpoint");
        let endpoint = endpoint.map(|value| self.endpoint(&value)).transpose()?;
        let region = match parts.take("region") {
            Some(region) => region,
            // Stores that are not Amazon's have one region, which is called that.
            None if endpoint.is_some() => "us-east-1".to_owned(),
            None => {
                let example = "s3://BUCKET/DIRECTORY?region=us-east-1";
                return Err(DestinationError::Missing { key: "region", example });
            }
        };
        let plain = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-');
        if region.is_empty() || region.len() > 32 || !region.chars().all(plain) {
            let limit = "1 to 32 small letters, digits and hyphens, such as us-east-1".into();
            let value = uri::cut(&region);
            return Err(DestinationError::Value { key: "region", value, limit });
        }
        let directory = parts.directory()?;
        Ok(Destination { place: Place::S3 { bucket, region, endpoint }, directory })
    }

    /// One of those that the operator allows: as it is written there, or without its scheme.
    fn endpoint(&self, value: &str) -> Result<Origin, DestinationError> {
        let given = Origin::parse(value);
        let found = self.endpoints.iter().find(|origin| match &given {
            Some(given) => *origin == given,
            None => origin.authority().eq_ignore_ascii_case(value),
        });
        found.cloned().ok_or_else(|| {
            let names: Vec<_> = self.endpoints.iter().map(Origin::to_string).collect();
            let limit = if names.is_empty() {
                "one that this host's operator allows, and there is none: see \
                 `destinations.endpoints` in its configuration"
                    .into()
            } else {
                format!("one that this host's operator allows: {}", names.join(", "))
            };
            // It may be anything, a password included.
            let value = uri::without_secrets(value);
            DestinationError::Value { key: "endpoint", value, limit }
        })
    }
}

fn gs(rest: &str) -> Result<Destination, DestinationError> {
    let parts = Parts::new(rest, "gs", "has no keys; its credentials are the operator's", &[])?;
    let bucket = parts.bucket(|c| matches!(c, 'a'..='z' | '0'..='9' | '-' | '.' | '_'))?;
    let directory = parts.directory()?;
    Ok(Destination { place: Place::Gs { bucket }, directory })
}

fn r2(rest: &str) -> Result<(Destination, Option<Keys>), DestinationError> {
    let known = "has the keys account-id, access-key-id and secret-access-key only";
    let all = &["account-id", "access-key-id", "secret-access-key"];
    let mut parts = Parts::new(rest, "r2", known, all)?;
    let bucket = parts.bucket(|c| matches!(c, 'a'..='z' | '0'..='9' | '-'))?;
    let example = "r2://BUCKET/DIRECTORY?account-id=ID&access-key-id=ID&secret-access-key=KEY";
    let missing = |key| DestinationError::Missing { key, example };
    let account = parts.take("account-id").ok_or_else(|| missing("account-id"))?;
    if account.len() != 32 || !account.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let (value, limit) = (uri::cut(&account), "32 hexadecimal digits".into());
        return Err(DestinationError::Value { key: "account-id", value, limit });
    }
    let keys = match (parts.take("access-key-id"), parts.take("secret-access-key")) {
        (None, None) => None,
        (Some(id), Some(secret)) => Some(Keys::checked(id, secret)?),
        (None, Some(_)) => return Err(missing("access-key-id")),
        (Some(_), None) => return Err(missing("secret-access-key")),
    };
    let directory = parts.directory()?;
    let place = Place::R2 { bucket, account: account.to_ascii_lowercase() };
    Ok((Destination { place, directory }, keys))
}

#[cfg(test)]
mod tests;
