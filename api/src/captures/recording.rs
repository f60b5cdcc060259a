//! The recorder, as long as the daemon runs.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use capture_user::{
    engine::JobSpec,
    recorder::{Recorder, RecorderError, RecorderStats},
};

use super::engine::Engines;
use crate::config::{Config, RecorderSettings};

/// For others to let go of the recorder when the daemon stops.
const PATIENCE: Duration = Duration::from_secs(5);

/// The recorder, if it is on.
#[derive(Debug)]
pub struct Recording {
    folder: PathBuf,
    recorder: Mutex<Option<Arc<Recorder>>>,
}

impl Recording {
    /// Starts the recorder on all interfaces. Called before any capture starts, so that it has the first
    /// place among the jobs of the engine.
    pub(super) fn start(config: &Config, engines: &Arc<Engines>) -> Result<Self, RecorderError> {
        let folder = RecorderSettings::folder(&config.data_dir);
        let recorder = if let Some(settings) = config.recorder.recorder(&config.data_dir) {
            let engines = Arc::clone(engines);
            let start = move |spec: &dyn Fn() -> JobSpec| engines.start(spec).map_err(Into::into);
            let recorder = Recorder::start(settings, Box::new(start))?;
            tracing::info!(folder = %folder.display(), "recording");
            Some(Arc::new(recorder))
        } else {
            tracing::info!("not recording: `recorder.enabled` is false");
            None
        };
        Ok(Self { folder, recorder: Mutex::new(recorder) })
    }

    fn recorder(&self) -> MutexGuard<'_, Option<Arc<Recorder>>> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it records.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether there is one.
    pub fn is_on(&self) -> bool {
        self.recorder().is_some()
    }

    /// Waits until every packet that was recorded by now can be found.
    pub fn flush(&self) {
        let recorder = self.recorder().clone();
        if let Some(recorder) = recorder {
            recorder.flush();
        }
    }

    /// How it is doing.
    pub fn stats(&self) -> Option<RecorderStats> {
        let recorder = self.recorder().clone();
        recorder.map(|recorder| recorder.stats())
    }

    /// Seals what is open, and records no more.
    pub(super) fn end(&self) {
        let mut recorder = self.recorder().take();
        let start = Instant::now();
        // Whoever asks it something has it for a moment, and is not to be the one that seals: nobody waits
        // for that.
        while let Some(shared) = recorder.take() {
            match Arc::try_unwrap(shared) {
                Ok(own) => drop(own),
                Err(shared) if start.elapsed() < PATIENCE => {
                    thread::sleep(Duration::from_millis(1));
                    recorder = Some(shared);
                }
                Err(_shared) => tracing::error!("the recorder is still in use, and is not sealed"),
            }
        }
    }
}
