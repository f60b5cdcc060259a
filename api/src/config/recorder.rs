//! What is recorded all the time, and what is answered out of it.

use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use capture_user::{
    pace::BUDGETS,
    recorder::{FOLDER, RecorderConfig, Sampling},
};
use serde::Deserialize;

use super::{ConfigError, wrong};

/// The recorder.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct RecorderSettings {
    pub enabled: bool,
    pub bytes: u64,
    pub reserve_bytes: u64,
    pub keep_hours: u32,
    pub sample: u32,
    pub packets_per_second: u32,
    pub snaplen: u32,
}

impl Default for RecorderSettings {
    fn default() -> Self {
        Self {
            enabled: true,
            bytes: 1 << 30,
            reserve_bytes: 1 << 30,
            keep_hours: 24,
            sample: 100,
            packets_per_second: 0,
            snaplen: 160,
        }
    }
}

impl RecorderSettings {
    /// Where a data folder has it.
    pub(crate) fn folder(data_dir: &Path) -> PathBuf {
        data_dir.join(FOLDER)
    }

    /// What the engine's side of it is told; `None` when it is off.
    pub(crate) fn recorder(&self, data_dir: &Path) -> Option<RecorderConfig> {
        self.enabled.then(|| RecorderConfig {
            bytes: self.bytes,
            reserve: self.reserve_bytes,
            keep: Duration::from_hours(self.keep_hours.into()),
            sampling: self.sampling(),
            snaplen: self.snaplen,
            ..RecorderConfig::new(Self::folder(data_dir))
        })
    }

    fn sampling(&self) -> Sampling {
        match self.packets_per_second {
            0 => Sampling::Fixed(NonZeroU32::new(self.sample).unwrap_or(NonZeroU32::MIN)),
            packets_per_second => Sampling::Adaptive { packets_per_second },
        }
    }

    /// What is more than a range of one number.
    pub(super) fn check(&self, data_dir: &Path, max_jobs: usize) -> Result<(), ConfigError> {
        let Some(config) = self.recorder(data_dir) else { return Ok(()) };
        if max_jobs > MOST_JOBS {
            return Err(wrong(
                "max_jobs",
                format!(
                    "is {max_jobs}, but must be at most {MOST_JOBS} while `recorder.enabled` is true: the \
                     recorder takes one of the 64 places that an interface has"
                ),
            ));
        }
        let packets = self.packets_per_second;
        if packets != 0 && !BUDGETS.contains(&packets) {
            let (least, most) = BUDGETS.into_inner();
            return Err(wrong(
                "recorder.packets_per_second",
                format!("is {packets}, but must be 0, or from {least} to {most}"),
            ));
        }
        config.check().map_err(|error| wrong("recorder", format!("cannot be: {error}")))
    }
}

/// Most captures at once beside the recorder.
const MOST_JOBS: usize = 63;

/// Simple captures.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the sample file has it, for those who need it")]
pub struct SimpleSettings {
    pub keep_hours: u32,
    pub files: usize,
    pub bytes: u64,
    pub at_once: usize,
    pub waiting: usize,
    pub one_per_minute: bool,
}

impl Default for SimpleSettings {
    fn default() -> Self {
        Self {
            keep_hours: 24,
            files: 1000,
            bytes: 1 << 30,
            at_once: 2,
            waiting: 256,
            one_per_minute: false,
        }
    }
}
