//! Where captures may go beside this host's own folders, and how.

use std::path::PathBuf;

use serde::Deserialize;

use super::{ConfigError, wrong};
use crate::destination::is_origin;

/// Buckets: which hosts there are, and how requests to them are signed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct DestinationSettings {
    pub endpoints: Vec<String>,
    pub s3_endpoint: String,
    pub gs_endpoint: String,
    pub r2_endpoint: String,
    pub s3_credentials: Vec<S3Credentials>,
    pub gs_credentials_file: PathBuf,
    pub instance_metadata: bool,
    pub challenge_hours: u32,
    pub per_account: usize,
    pub secrets_key_file: PathBuf,
}

impl Default for DestinationSettings {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            s3_endpoint: "https://s3.{region}.amazonaws.com".into(),
            gs_endpoint: "https://storage.googleapis.com".into(),
            r2_endpoint: "https://{account}.r2.cloudflarestorage.com".into(),
            s3_credentials: Vec::new(),
            gs_credentials_file: PathBuf::new(),
            instance_metadata: false,
            challenge_hours: 168,
            per_account: 100,
            secrets_key_file: PathBuf::new(),
        }
    }
}

impl DestinationSettings {
    /// What is not a number.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let must = "must be http://HOST[:PORT] or https://HOST[:PORT], and no more";
        for (at, endpoint) in self.endpoints.iter().enumerate() {
            if !is_origin(endpoint) {
                return Err(wrong(format!("destinations.endpoints[{at}]"), must));
            }
        }
        for (key, template, variable) in [
            ("s3_endpoint", &self.s3_endpoint, "{region}"),
            ("gs_endpoint", &self.gs_endpoint, "-"),
            ("r2_endpoint", &self.r2_endpoint, "{account}"),
        ] {
            if !is_origin(&template.replace(variable, "x")) {
                return Err(wrong(format!("destinations.{key}"), must));
            }
        }
        for (at, credentials) in self.s3_credentials.iter().enumerate() {
            let key = |name| format!("destinations.s3_credentials[{at}].{name}");
            if !credentials.endpoint.is_empty() && !self.endpoints.contains(&credentials.endpoint) {
                return Err(wrong(
                    key("endpoint"),
                    "must be one of `destinations.endpoints` as it is written there, or be left out",
                ));
            }
            if !credentials.file.is_absolute() {
                return Err(wrong(key("file"), "must begin with /"));
            }
        }
        for (key, path) in [
            ("gs_credentials_file", &self.gs_credentials_file),
            ("secrets_key_file", &self.secrets_key_file),
        ] {
            if !path.as_os_str().is_empty() && !path.is_absolute() {
                return Err(wrong(format!("destinations.{key}"), "must begin with /, or be empty"));
            }
        }
        Ok(())
    }
}

/// A file with keys for an S3 store.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct S3Credentials {
    #[serde(default)]
    pub endpoint: String,
    pub file: PathBuf,
    #[serde(default = "default_profile")]
    pub profile: String,
}

fn default_profile() -> String {
    "default".into()
}

/// Where captures for buckets wait.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct SpoolSettings {
    pub bytes: u64,
    pub capture_bytes: u64,
    pub retention_hours: u32,
}

impl Default for SpoolSettings {
    fn default() -> Self {
        Self { bytes: 16 << 30, capture_bytes: 4 << 30, retention_hours: 72 }
    }
}

/// How they are sent.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct UploadSettings {
    pub segment_seconds: u64,
    pub at_once: usize,
    pub per_store: usize,
    pub per_capture: usize,
    pub patience_seconds: u64,
    pub zstd: bool,
    pub zstd_level: i32,
    pub zstd_frame_bytes: usize,
}

impl Default for UploadSettings {
    fn default() -> Self {
        Self {
            segment_seconds: 60,
            at_once: 8,
            per_store: 4,
            per_capture: 2,
            patience_seconds: 3600,
            zstd: false,
            zstd_level: 3,
            zstd_frame_bytes: 1 << 20,
        }
    }
}
