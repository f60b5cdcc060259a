//! The daemon's own key, and what is done with it.
//!
//! - Its file has 64 hexadecimal digits and only its owner may read it; it is made if nobody said where
//!   it is.
//! - Two keys are made from it, for it is not used twice: one encrypts what the database must not
//!   show (AES-256-GCM), one signs what the daemon will see again (HMAC-SHA256).
//! - What is sealed or signed is bound to what it is for: neither can be put to another use.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf, hmac,
};
use thiserror::Error;

use crate::id;

/// The key cannot be had.
#[derive(Debug, Error)]
pub enum KeyError {
    /// Its file.
    #[error("{operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// What is in it.
    #[error("{} must have 64 hexadecimal digits and no more: openssl rand -hex 32", .0.display())]
    Digits(PathBuf),
}

/// What was sealed cannot be opened: the key is another one now, or the database was tampered with.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("it was encrypted with another key")]
pub struct OtherKey;

/// The keys.
pub struct Secrets {
    seals: LessSafeKey,
    signs: hmac::Key,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets")
    }
}

impl Secrets {
    /// Reads the key that is configured, or the one in the data folder, which is made if it is not
    /// there.
    pub fn open(configured: &Path, data_dir: &Path) -> Result<Self, KeyError> {
        let made = data_dir.join("secrets.key");
        let path = if configured.as_os_str().is_empty() { &made } else { configured };
        let failed = |operation| {
            let path = path.to_path_buf();
            move |source| KeyError::File { operation, path, source }
        };
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && path == made => {
                create(path).map_err(failed("creating"))?
            }
            text => text.map_err(failed("reading"))?,
        };
        let key = id::parse_digest(text.trim()).ok_or_else(|| KeyError::Digits(path.into()))?;
        Ok(Self::new(&key))
    }

    /// With this key.
    pub fn new(key: &[u8; 32]) -> Self {
        // The key is random already; what it is expanded with tells its uses apart.
        let master = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, key);
        // Neither asks for more than there can be.
        let seals = master.expand(&[b"tapline secrets"], &AES_256_GCM).map(UnboundKey::from);
        let signs = master.expand(&[b"tapline challenges"], hmac::HMAC_SHA256).map(hmac::Key::from);
        let (Ok(seals), Ok(signs)) = (seals, signs) else {
            unreachable!("HKDF gives up to 255 times as much")
        };
        Self { seals: LessSafeKey::new(seals), signs }
    }

    /// Encrypts; `bound` has to be the same when it is opened.
    pub fn seal(&self, bound: &[u8], text: &[u8]) -> Vec<u8> {
        // Random ones are fine for 2^32 messages, and this is done when a person adds a bucket.
        let nonce: [u8; NONCE_LEN] = id::random();
        let mut sealed = text.to_vec();
        let nonce_of = Nonce::assume_unique_for_key(nonce);
        let done = self.seals.seal_in_place_append_tag(nonce_of, Aad::from(bound), &mut sealed);
        assert!(done.is_ok(), "AES-GCM takes 64 GB");
        [&nonce, sealed.as_slice()].concat()
    }

    /// Decrypts.
    pub fn unseal(&self, bound: &[u8], sealed: &[u8]) -> Result<Vec<u8>, OtherKey> {
        let (nonce, text) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(OtherKey)?;
        let mut text = text.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let plain = self.seals.open_in_place(nonce, Aad::from(bound), &mut text);
        plain.map(|plain| plain.to_vec()).map_err(|_wrong| OtherKey)
    }

    /// Signs.
    pub fn sign(&self, text: &[u8]) -> [u8; 32] {
        let mut signature = [0; 32];
        signature.copy_from_slice(hmac::sign(&self.signs, text).as_ref());
        signature
    }

    /// Whether this was signed, in a time that does not tell how far it was right.
    pub fn is_signed(&self, text: &[u8], signature: &[u8; 32]) -> bool {
        hmac::verify(&self.signs, text, signature).is_ok()
    }
}

/// Makes a key's file, which is there as a whole or not at all.
fn create(path: &Path) -> io::Result<String> {
    let text = id::hex(&id::random::<32>());
    let part = path.with_extension("key.part");
    drop(fs::remove_file(&part));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&part, path)?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_is_sealed_opens_with_its_key_for_its_use_and_only_so() {
        let secrets = Secrets::new(&[7; 32]);
        let sealed = secrets.seal(b"bucket", b"hidden");
        assert_ne!(sealed, secrets.seal(b"bucket", b"hidden"));
        assert!(!sealed.windows(6).any(|part| part == b"hidden"));
        assert_eq!(secrets.unseal(b"bucket", &sealed).unwrap(), b"hidden");
        assert_eq!(secrets.unseal(b"other", &sealed), Err(OtherKey));
        assert_eq!(Secrets::new(&[8; 32]).unseal(b"bucket", &sealed), Err(OtherKey));
        for at in 0..sealed.len() {
            let mut broken = sealed.clone();
            broken[at] ^= 1;
            assert_eq!(secrets.unseal(b"bucket", &broken), Err(OtherKey), "{at}");
            assert_eq!(secrets.unseal(b"bucket", &sealed[..at]), Err(OtherKey), "{at}");
        }
    }

    #[test]
    fn a_signature_is_of_one_text_and_one_key() {
        let secrets = Secrets::new(&[7; 32]);
        let signature = secrets.sign(b"text");
        assert!(secrets.is_signed(b"text", &signature));
        assert!(!secrets.is_signed(b"texT", &signature));
        assert!(!Secrets::new(&[8; 32]).is_signed(b"text", &signature));
    }

    #[test]
    fn a_key_is_made_once_for_its_owner_only_and_one_that_is_configured_is_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let sealed = Secrets::open(Path::new(""), folder.path()).unwrap().seal(b"", b"x");
        let path = folder.path().join("secrets.key");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let again = Secrets::open(Path::new(""), folder.path()).unwrap();
        assert_eq!(again.unseal(b"", &sealed).unwrap(), b"x");

        let other = folder.path().join("other");
        let missing = Secrets::open(&other, folder.path()).unwrap_err();
        assert!(missing.to_string().contains("other"));
        fs::write(&other, format!("{}\n", "0a".repeat(32))).unwrap();
        let other_key = Secrets::open(&other, folder.path()).unwrap();
        assert_eq!(other_key.unseal(b"", &sealed), Err(OtherKey));
        fs::write(&other, "abc").unwrap();
        assert!(matches!(Secrets::open(&other, folder.path()), Err(KeyError::Digits(_))));
    }
}
