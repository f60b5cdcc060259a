//! The engine on the configured interfaces, opened again when one of them went away and came back.

use std::sync::{Arc, Mutex, PoisonError};

use capture_user::{
    engine::{
        CapturePath, EXCLUSIVE_RING_BYTES, Engine, EngineConfig, EngineError, InterfaceConfig, Job,
        JobSpec, RING_BYTES, StartError, Transport,
    },
    filter::Direction,
    nic,
    program::{TapHook, XdpMode},
    socket::SocketConfig,
};

use nix::net::if_::if_nametoindex;

use super::CaptureError;
use crate::config::{self, Config, Mode};

pub(super) struct Engines {
    config: EngineConfig,
    current: Mutex<Option<Arc<Engine>>>,
}

impl std::fmt::Debug for Engines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engines").field("config", &self.config.interfaces).finish_non_exhaustive()
    }
}

impl Engines {
    pub(super) fn open(config: &Config) -> Result<Self, EngineError> {
        let interface = |interface: &config::Interface| InterfaceConfig {
            name: interface.name.clone(),
            path: match interface.mode {
                Mode::Tap => CapturePath::Tap {
                    hook: TapHook::Auto,
                    direction: Direction::Both,
                    xdp: XdpMode::Auto,
                    ring_bytes: config.buffers.bpf_ring_bytes.unwrap_or(RING_BYTES),
                },
                Mode::Exclusive => CapturePath::Exclusive {
                    xdp: XdpMode::Auto,
                    mirror_port: interface.mirror_port,
                    transport: match interface.transport {
                        config::Transport::Auto => Transport::Auto,
                        config::Transport::AfXdp => Transport::AfXdp,
                        config::Transport::BpfRing => Transport::BpfRing,
                    },
                    socket: SocketConfig::default(),
                    ring_bytes: config.buffers.bpf_ring_bytes.unwrap_or(EXCLUSIVE_RING_BYTES),
                },
            },
            promiscuous: interface.promiscuous,
        };
        let interfaces = config.interfaces.iter().map(interface).collect();
        let config =
            EngineConfig { interfaces, realtime: config.realtime, ..EngineConfig::default() };
        let engine = Engine::open(&config)?;
        for opened in engine.interfaces() {
            tracing::info!(interface = opened.name, "capturing: {opened}");
        }
        Ok(Self { config, current: Mutex::new(Some(Arc::new(engine))) })
    }

    /// Starts a job. When an interface is gone, or another has its name now, all are opened again:
    /// every job ended when that happened.
    pub(super) fn start(&self, spec: impl Fn() -> JobSpec) -> Result<Job, CaptureError> {
        // The engine looks twice a second; a job that it starts meanwhile would see no packet.
        for interface in &self.config.interfaces {
            if if_nametoindex(interface.name.as_str()).is_err() {
                let interface = interface.name.clone();
                return Err(CaptureError::Start(StartError::Gone { interface }));
            }
        }
        let engine = self.current(None)?;
        match engine.start(spec()) {
            Err(StartError::Gone { interface }) => {
                tracing::warn!(interface, "the interface is gone: opening all again");
            }
            Err(StartError::Ended) => tracing::warn!("the engine has ended: opening it again"),
            result => return result.map_err(CaptureError::Start),
        }
        let engine = self.current(Some(engine))?;
        engine.start(spec()).map_err(CaptureError::Start)
    }

    /// The engine, or a new one if there is none but `broken`.
    fn current(&self, broken: Option<Arc<Engine>>) -> Result<Arc<Engine>, EngineError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(engine), Some(broken)) = (&*current, &broken)
            && Arc::ptr_eq(engine, broken)
        {
            *current = None;
        }
        // Its programs must be gone before the new ones come.
        drop(broken);
        if let Some(engine) = &*current {
            return Ok(Arc::clone(engine));
        }
        let engine = Arc::new(Engine::open(&self.config)?);
        *current = Some(Arc::clone(&engine));
        Ok(engine)
    }

    /// Whether every interface is there.
    pub(super) fn ready(&self) -> Result<(), String> {
        for interface in &self.config.interfaces {
            nic::find(&interface.name).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}
