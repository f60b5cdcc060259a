//! Tokens, as files of their own: `taplined token new` works while the daemon runs, and a token is
//! taken back by removing its file.
//!
//! - A token is `tapline_ID_SECRET`, 16 and 64 hexadecimal digits: 256 random bits.
//! - Its file is `DATA/tokens/ID.json` and has the digest of the secret, never the secret. A plain
//!   digest will do: there is nothing to guess in 256 random bits.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;
use thiserror::Error;

use super::{Identity, Permission};
use crate::id;

/// A token could not be made.
#[derive(Debug, Error)]
#[error("{operation} {}", path.display())]
pub struct TokenError {
    operation: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What a token is to be for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewToken {
    /// Accounts that it is for.
    pub accounts: Vec<u128>,
    /// What it may do to them.
    pub permission: Permission,
}

/// A token's file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    secret_sha256: String,
    accounts: Vec<String>,
    permission: Permission,
}

/// The tokens in a data folder.
#[derive(Debug)]
pub struct Tokens {
    folder: PathBuf,
}

impl Tokens {
    /// Those of this data folder.
    pub fn new(data_dir: &Path) -> Self {
        Self { folder: data_dir.join("tokens") }
    }

    /// Whose token that is.
    pub fn find(&self, token: &str) -> Option<Identity> {
        let (name, secret) = token.strip_prefix("tapline_")?.split_once('_')?;
        // Checked before it becomes part of a path.
        if name.len() != 16 || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let stored = fs::read(self.folder.join(format!("{name}.json"))).ok()?;
        let stored: Stored = serde_json::from_slice(&stored).ok()?;
        let digest = id::parse_digest(&stored.secret_sha256)?;
        if !bool::from(digest.ct_eq(&id::sha256(secret.as_bytes()))) {
            return None;
        }
        let accounts = stored.accounts.iter().filter_map(|account| id::parse(account)).collect();
        Some(Identity { accounts, permission: stored.permission })
    }

    /// Makes a token and returns it: it is not to be had again.
    pub fn create(&self, new: &NewToken) -> Result<String, TokenError> {
        let failed = |operation, path: &Path| {
            let path = path.to_path_buf();
            move |source| TokenError { operation, path, source }
        };
        let name = id::hex(&id::random::<8>());
        let secret = id::hex(&id::random::<32>());
        let stored = Stored {
            secret_sha256: id::hex(&id::sha256(secret.as_bytes())),
            accounts: new.accounts.iter().map(|account| id::show(*account)).collect(),
            permission: new.permission,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(failed("creating", &self.folder))?;
        let path = self.folder.join(format!("{name}.json"));
        let part = self.folder.join(format!(".{name}.part"));
        let text = serde_json::to_vec(&stored)
            .map_err(|error| failed("writing", &part)(io::Error::other(error)))?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)
            .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
            .map_err(failed("writing", &part))?;
        fs::rename(&part, &path)
            .and_then(|()| File::open(&self.folder)?.sync_all())
            .map_err(failed("writing", &path))?;
        Ok(format!("tapline_{name}_{secret}"))
    }
}

#[cfg(test)]
pub(super) fn create(data_dir: &Path, new: &NewToken) -> Result<String, TokenError> {
    Tokens::new(data_dir).create(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secret_is_nowhere_in_the_data_folder_and_a_removed_file_is_a_removed_token() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens::new(folder.path());
        let new = NewToken { accounts: vec![7], permission: Permission::Write };
        let token = tokens.create(&new).unwrap();
        assert_eq!(tokens.find(&token).unwrap().accounts, [7]);
        let (_, secret) = token.rsplit_once('_').unwrap();
        let files: Vec<_> = fs::read_dir(folder.path().join("tokens")).unwrap().flatten().collect();
        assert_eq!(files.len(), 1);
        let path = files[0].path();
        assert!(!fs::read_to_string(&path).unwrap().contains(secret));
        fs::remove_file(path).unwrap();
        assert_eq!(tokens.find(&token), None);
    }

    #[test]
    fn a_token_that_is_a_path_leads_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = Tokens::new(folder.path());
        for token in
            ["tapline_../../etc/passwd_x", "tapline__", "tapline_", "", "tapline_0123456789abcdef_"]
        {
            assert_eq!(tokens.find(token), None, "{token}");
        }
    }
}
