//! The configuration file: what can be set, its defaults, and what cannot be.

mod buckets;
mod recorder;

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr as _,
};

use capture_user::{engine::MIN_BUFFER, recorder::LEAST_BYTES};
use serde::Deserialize;
use thiserror::Error;
use tracing_subscriber::filter::Targets;

pub use self::{
    buckets::{DestinationSettings, S3Credentials, SpoolSettings, UploadSettings},
    recorder::{RecorderSettings, SimpleSettings},
};
use crate::{auth::Permission, id};

/// The sample file: every key with its default, unit and meaning.
pub const SAMPLE: &str = include_str!("../sample.toml");

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// It is not TOML, or has a key that is not known, or a value of another type.
    #[error("{}: {message}", path.display())]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Where and what.
        message: String,
    },
    /// A value cannot be.
    #[error("`{key}` {problem}")]
    Value {
        /// Which.
        key: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

fn wrong(key: impl Into<String>, problem: impl Into<String>) -> ConfigError {
    ConfigError::Value { key: key.into(), problem: problem.into() }
}

/// The configuration. What each key means stands in [`SAMPLE`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct Config {
    pub listen: SocketAddr,
    pub plaintext: bool,
    pub data_dir: PathBuf,
    pub colo: String,
    pub region: String,
    pub host: String,
    pub max_jobs: usize,
    pub realtime: bool,
    pub log: String,
    pub open: Vec<String>,
    pub interfaces: Vec<Interface>,
    pub roots: Vec<Root>,
    pub keys: Vec<Key>,
    pub tls: Option<Tls>,
    pub limits: Limits,
    pub buffers: Buffers,
    pub destinations: DestinationSettings,
    pub spool: SpoolSettings,
    pub upload: UploadSettings,
    pub recorder: RecorderSettings,
    pub simple: SimpleSettings,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8700)),
            plaintext: false,
            data_dir: "/var/lib/tapline".into(),
            colo: "local01".into(),
            region: String::new(),
            host: String::new(),
            max_jobs: 63,
            realtime: false,
            log: "info".into(),
            open: vec!["/healthz".into(), "/readyz".into()],
            interfaces: Vec::new(),
            roots: Vec::new(),
            keys: Vec::new(),
            tls: None,
            limits: Limits::default(),
            buffers: Buffers::default(),
            destinations: DestinationSettings::default(),
            spool: SpoolSettings::default(),
            upload: UploadSettings::default(),
            recorder: RecorderSettings::default(),
            simple: SimpleSettings::default(),
        }
    }
}

/// An interface to capture on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct Interface {
    pub name: String,
    #[serde(default)]
    pub mode: Mode,
    #[serde(default)]
    pub mirror_port: bool,
    #[serde(default)]
    pub transport: Transport,
    #[serde(default = "yes")]
    pub promiscuous: bool,
}

const fn yes() -> bool {
    true
}

/// How packets are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Copied.
    #[default]
    Tap,
    /// Redirected.
    Exclusive,
}

/// By what packets reach the daemon where `mode` is `exclusive`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// What suits the driver.
    #[default]
    Auto,
    /// A socket per receive queue.
    AfXdp,
    /// A ring per CPU.
    BpfRing,
}

/// A folder that captures may be written to.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct Root {
    pub path: PathBuf,
    #[serde(default)]
    pub trusted: bool,
}

/// A key for `X-Auth-Key`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
#[expect(clippy::struct_field_names, reason = "the file says which digest it is")]
pub struct Key {
    pub email: String,
    pub key_sha256: String,
    pub accounts: Vec<String>,
    pub permission: Permission,
}

/// Where the certificate is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct Tls {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// What a client may ask for at most.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct Limits {
    pub body_bytes: usize,
    pub headers: usize,
    pub head_bytes: usize,
    pub header_seconds: u64,
    pub request_seconds: u64,
    pub connections: usize,
    pub event_streams: usize,
    pub downloads: usize,
    pub auth_failures_per_minute: u32,
    pub shutdown_seconds: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 65536,
            headers: 64,
            head_bytes: 16384,
            header_seconds: 10,
            request_seconds: 30,
            connections: 1024,
            event_streams: 256,
            downloads: 64,
            auth_failures_per_minute: 20,
            shutdown_seconds: 10,
        }
    }
}

/// Memory and files of a capture.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct Buffers {
    pub per_queue: usize,
    pub bytes: usize,
    #[serde(alias = "tap_ring_bytes")]
    pub bpf_ring_bytes: Option<u32>,
    pub segment_bytes: u64,
}

impl Default for Buffers {
    fn default() -> Self {
        Self { per_queue: 8, bytes: 262_144, bpf_ring_bytes: None, segment_bytes: 256 << 20 }
    }
}

impl Config {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
        let mut config = Self::parse(&text, path)?;
        if config.roots.is_empty() {
            config.roots.push(Root { path: config.data_dir.join("captures"), trusted: true });
        }
        config.check()?;
        Ok(config)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| ConfigError::Syntax {
            path: path.to_path_buf(),
            message: error.to_string().trim_end().to_owned(),
        })
    }

    fn check(&self) -> Result<(), ConfigError> {
        if self.interfaces.is_empty() {
            return Err(wrong("interfaces", "is empty: name at least one, see --print-config"));
        }
        if !self.listen.ip().is_loopback() && self.tls.is_none() && !self.plaintext {
            return Err(wrong(
                "listen",
                format!(
                    "is {}, which others can reach: configure [tls], or say `plaintext = true`",
                    self.listen
                ),
            ));
        }
        self.check_names()?;
        self.check_numbers()?;
        self.destinations.check()?;
        self.recorder.check(&self.data_dir, self.max_jobs)?;
        for (at, root) in self.roots.iter().enumerate() {
            if !root.path.is_absolute() {
                return Err(wrong(format!("roots[{at}].path"), "must begin with /"));
            }
        }
        for (at, key) in self.keys.iter().enumerate() {
            if id::parse_digest(&key.key_sha256).is_none() {
                return Err(wrong(
                    format!("keys[{at}].key_sha256"),
                    "must be 64 hexadecimal digits: `printf %s KEY | sha256sum`",
                ));
            }
            if let Some(account) = key.accounts.iter().find(|account| id::parse(account).is_none())
            {
                return Err(wrong(
                    format!("keys[{at}].accounts"),
                    format!("has `{account}`, but an account id is 32 hexadecimal digits"),
                ));
            }
        }
        Ok(())
    }

    fn check_names(&self) -> Result<(), ConfigError> {
        for (key, value, may_be_empty) in [
            ("colo", &self.colo, false),
            ("region", &self.region, true),
            ("host", &self.host, true),
        ] {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
            if !value.chars().all(plain)
                || value.len() > 63
                || value.starts_with('.')
                || (value.is_empty() && !may_be_empty)
            {
                return Err(wrong(
                    key,
                    "must be at most 63 letters, digits, dots and hyphens, and not begin with a dot",
                ));
            }
        }
        if !self.data_dir.is_absolute() {
            return Err(wrong("data_dir", "must begin with /"));
        }
        if Targets::from_str(&self.log).is_err() {
            return Err(wrong(
                "log",
                "must be error, warn, info, debug or trace, or MODULE=LEVEL, with commas",
            ));
        }
        let openable = ["/healthz", "/readyz", "/metrics", "/openapi.json"];
        if let Some(path) = self.open.iter().find(|path| !openable.contains(&path.as_str())) {
            return Err(wrong(
                "open",
                format!("has `{path}`, but can only have {}", openable.join(", ")),
            ));
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<(), ConfigError> {
        let (limits, buffers) = (&self.limits, &self.buffers);
        let (spool, upload) = (&self.spool, &self.upload);
        let level = u64::try_from(upload.zstd_level).unwrap_or_default();
        let (recorder, simple) = (&self.recorder, &self.simple);
        let ranges: [(&str, u64, u64, u64); 36] = [
            ("max_jobs", self.max_jobs as u64, 1, 64),
            ("limits.body_bytes", limits.body_bytes as u64, 1024, 16 << 20),
            ("limits.headers", limits.headers as u64, 16, 1024),
            ("limits.head_bytes", limits.head_bytes as u64, 8192, 1 << 20),
            ("limits.header_seconds", limits.header_seconds, 1, 3600),
            ("limits.request_seconds", limits.request_seconds, 1, 3600),
            ("limits.connections", limits.connections as u64, 1, 65536),
            ("limits.event_streams", limits.event_streams as u64, 0, 65536),
            (
                "limits.auth_failures_per_minute",
                limits.auth_failures_per_minute.into(),
                1,
                1_000_000,
            ),
            ("limits.shutdown_seconds", limits.shutdown_seconds, 0, 3600),
            ("buffers.per_queue", buffers.per_queue as u64, 2, 4096),
            ("buffers.bytes", buffers.bytes as u64, MIN_BUFFER as u64, 1 << 30),
            ("buffers.segment_bytes", buffers.segment_bytes, 2 * MIN_BUFFER as u64, 1 << 50),
            ("destinations.challenge_hours", self.destinations.challenge_hours.into(), 1, 24 * 365),
            ("destinations.per_account", self.destinations.per_account as u64, 1, 100_000),
            ("spool.bytes", spool.bytes, 1 << 20, 1 << 50),
            ("spool.capture_bytes", spool.capture_bytes, 1 << 20, 1 << 50),
            ("spool.retention_hours", spool.retention_hours.into(), 0, 24 * 365),
            ("upload.segment_seconds", upload.segment_seconds, 1, 86400),
            ("upload.at_once", upload.at_once as u64, 1, 256),
            ("upload.per_store", upload.per_store as u64, 1, 256),
            ("upload.per_capture", upload.per_capture as u64, 1, 64),
            ("upload.patience_seconds", upload.patience_seconds, 0, 30 * 86400),
            ("upload.zstd_level", level, 1, 19),
            ("upload.zstd_frame_bytes", upload.zstd_frame_bytes as u64, 65536, 64 << 20),
            ("recorder.bytes", recorder.bytes, LEAST_BYTES, 1 << 50),
            ("recorder.reserve_bytes", recorder.reserve_bytes, 0, 1 << 50),
            ("recorder.keep_hours", recorder.keep_hours.into(), 1, 24 * 365),
            ("recorder.sample", recorder.sample.into(), 1, u32::MAX.into()),
            ("recorder.snaplen", recorder.snaplen.into(), 64, 65535),
            ("simple.keep_hours", simple.keep_hours.into(), 1, 24 * 365),
            ("simple.files", simple.files as u64, 1, 1_000_000),
            ("simple.bytes", simple.bytes, 1 << 20, 1 << 50),
            ("simple.at_once", simple.at_once as u64, 1, 64),
            ("simple.waiting", simple.waiting as u64, 1, 100_000),
            ("limits.downloads", limits.downloads as u64, 1, 65536),
        ];
        for (key, value, least, most) in ranges {
            if !(least..=most).contains(&value) {
                return Err(wrong(key, format!("is {value}, but must be from {least} to {most}")));
            }
        }
        if let Some(ring) = buffers.bpf_ring_bytes
            && !(ring.is_power_of_two() && (1 << 20..=1 << 30).contains(&ring))
        {
            return Err(wrong(
                "buffers.bpf_ring_bytes",
                format!("is {ring}, but must be a power of two from 1048576 to 1073741824"),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("test.toml"))
    }

    fn with_interface(text: &str) -> Result<(), ConfigError> {
        parse(&format!("{text}\n[[interfaces]]\nname = \"eth0\"\n")).unwrap().check()
    }

    #[test]
    fn the_sample_has_the_defaults() {
        assert_eq!(parse(SAMPLE).unwrap(), Config::default());
    }

    #[test]
    fn what_the_sample_shows_commented_out_can_be_used() {
        let shown: Vec<&str> = SAMPLE
            .lines()
            .map(|line| line.strip_prefix("# ").unwrap_or(line))
            .filter(|line| {
                line.starts_with("[[")
                    || line.starts_with("[tls")
                    || line.split_once(" = ").is_some_and(|(key, _)| !key.contains([' ', '`']))
                    || line.starts_with('[')
            })
            .collect();
        let config = parse(&shown.join("\n")).unwrap();
        assert_eq!(config.interfaces.len(), 1);
        assert_eq!(config.roots.len(), 1);
        assert_eq!(config.keys.len(), 1);
        assert_eq!(config.destinations.s3_credentials.len(), 1);
        assert!(config.tls.is_some());
    }

    #[test]
    fn a_word_that_is_no_transport_is_named_with_those_that_are() {
        let of = |transport| {
            let text = format!("[[interfaces]]\nname = \"eth0\"\ntransport = \"{transport}\"");
            parse(&text).map(|config| config.interfaces[0].transport)
        };
        assert_eq!(of("af-xdp").unwrap(), Transport::AfXdp);
        assert_eq!(of("bpf-ring").unwrap(), Transport::BpfRing);
        let error = of("dpdk").unwrap_err().to_string();
        for part in ["transport", "dpdk", "auto", "af-xdp", "bpf-ring"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn an_unknown_key_is_named() {
        let error = parse("lissen = 1").unwrap_err().to_string();
        assert!(error.contains("lissen"), "{error}");
    }

    #[test]
    fn an_address_that_others_reach_needs_tls_or_a_word() {
        assert!(with_interface("").is_ok());
        let error = with_interface("listen = \"0.0.0.0:8700\"").unwrap_err().to_string();
        assert!(error.contains("plaintext = true"), "{error}");
        assert!(with_interface("listen = \"0.0.0.0:8700\"\nplaintext = true").is_ok());
        assert!(with_interface("listen = \"[::1]:8700\"").is_ok());
    }

    #[test]
    fn values_out_of_range_are_named_with_their_range() {
        for (text, key) in [
            ("max_jobs = 65", "max_jobs"),
            ("max_jobs = 64", "max_jobs"),
            ("[recorder]\nbytes = 1000", "recorder.bytes"),
            ("[recorder]\nsample = 0", "recorder.sample"),
            ("[recorder]\nkeep_hours = 0", "recorder.keep_hours"),
            ("[recorder]\npackets_per_second = 99", "recorder.packets_per_second"),
            ("[recorder]\nsnaplen = 1", "recorder.snaplen"),
            ("[simple]\nfiles = 0", "simple.files"),
            ("colo = \"../x\"", "colo"),
            ("log = \"chatty=maybe\"", "log"),
            ("open = [\"/x\"]", "open"),
            ("data_dir = \"here\"", "data_dir"),
            ("[buffers]\nbpf_ring_bytes = 3", "buffers.bpf_ring_bytes"),
            ("[limits]\nheaders = 1", "limits.headers"),
            ("[destinations]\nendpoints = [\"store:9000\"]", "destinations.endpoints[0]"),
            ("[destinations]\nr2_endpoint = \"https://u@{account}\"", "destinations.r2_endpoint"),
            ("[destinations]\nsecrets_key_file = \"key\"", "destinations.secrets_key_file"),
            ("[destinations]\nchallenge_hours = 0", "destinations.challenge_hours"),
            ("[spool]\nbytes = 1", "spool.bytes"),
            ("[upload]\nzstd_level = -1", "upload.zstd_level"),
            ("[upload]\nper_capture = 0", "upload.per_capture"),
            (
                "[[destinations.s3_credentials]]\nendpoint = \"https://x\"\nfile = \"/f\"",
                "destinations.s3_credentials[0].endpoint",
            ),
            (
                "[[keys]]\nemail = \"a\"\nkey_sha256 = \"1\"\naccounts = []\npermission = \"read\"",
                "keys[0]",
            ),
        ] {
            let error = with_interface(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text}: {error}");
        }
    }
}
