//! What requests are signed with: where it comes from, and that it is not shown.

use std::{env, fmt, fs, path::Path};

use serde::{Deserialize, Serialize};

use super::DestinationError;

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes a text.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text, for the one place that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// A pair of keys for a store that speaks S3.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    /// Its name.
    pub access_key_id: Secret,
    /// The key.
    pub secret_access_key: Secret,
    /// Goes with keys that are for a while.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_token: Option<Secret>,
}

impl Keys {
    /// Keys from a URI.
    pub(super) fn checked(id: String, secret: String) -> Result<Self, DestinationError> {
        let plain = |text: &str| {
            (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
        };
        for (key, text) in [("access-key-id", &id), ("secret-access-key", &secret)] {
            if !plain(text) {
                let limit = "1 to 128 visible ASCII characters".into();
                return Err(DestinationError::Value { key, value: "…".into(), limit });
            }
        }
        Ok(Self {
            access_key_id: Secret(id),
            secret_access_key: Secret(secret),
            session_token: None,
        })
    }

    /// Keys from the environment.
    pub(super) fn from_environment() -> Option<Self> {
        let read = |name| env::var(name).ok().filter(|value| !value.is_empty()).map(Secret);
        Some(Self {
            access_key_id: read("AWS_ACCESS_KEY_ID")?,
            secret_access_key: read("AWS_SECRET_ACCESS_KEY")?,
            session_token: read("AWS_SESSION_TOKEN"),
        })
    }

    /// Keys from a file as `aws configure` writes it: `[profile]` and `name = value` lines.
    pub(super) fn from_file(path: &Path, profile: &str) -> Result<Self, String> {
        let text = fs::read_to_string(path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let mut lines = text.lines().map(str::trim);
        let heading = format!("[{profile}]");
        let found = lines.by_ref().any(|line| line == heading);
        if !found {
            return Err(format!("{} has no profile [{profile}]", path.display()));
        }
        let pairs: Vec<_> = lines
            .take_while(|line| !line.starts_with('['))
            .filter_map(|line| line.split_once('='))
            .collect();
        let read = |name: &str| {
            let pair = pairs.iter().find(|(key, _)| key.trim() == name);
            pair.map(|(_, value)| Secret(value.trim().to_owned()))
        };
        let lacks = |name| format!("{} lacks {name} in [{profile}]", path.display());
        Ok(Self {
            access_key_id: read("aws_access_key_id").ok_or_else(|| lacks("aws_access_key_id"))?,
            secret_access_key: read("aws_secret_access_key")
                .ok_or_else(|| lacks("aws_secret_access_key"))?,
            session_token: read("aws_session_token"),
        })
    }
}
