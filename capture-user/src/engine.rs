//! Puts the parts together: interfaces with their programs, sockets and workers, and the jobs that
//! run on all of them.
//!
//! # Threads
//!
//! | thread | one per | does |
//! |---|---|---|
//! | `tl-engine` | engine | starts and ends jobs; the only one that writes the programs' maps |
//! | `tl-IFACE-qN` | receive queue, or four CPUs | takes packets off the queue or the CPUs' rings, encodes them: [`crate::worker`] |
//! | `tl-disk-N` | job | writes segments: [`crate::disk`] |
//!
//! # How a job ends
//!
//! 1. The kernel stops matching it; when that returns, the count of its hits is final.
//! 2. Each worker drains its queue, passes on its last buffer and reports.
//! 3. The disk thread writes what is left, seals the segments and reports.
//! 4. The law is made up, and whoever waits for the job gets its [`Summary`].

mod control;
mod job;
mod port;
mod running;
mod synthetic;

use std::{
    io,
    thread::{self, JoinHandle},
};

use crossbeam::channel::{Sender, bounded, unbounded};
use serde::Serialize;
use thiserror::Error;

use self::{
    control::Control,
    port::{Place, Port},
};
pub use self::{
    job::{Ending, Job, JobId, JobSpec, MIN_BUFFER, Progress, QueueProgress, StartError, Stopper},
    port::Opened,
    running::{InterfaceSummary, QueueSummary, Summary},
    synthetic::run_synthetic,
};
use crate::{
    disk::DiskReport,
    filter::Direction,
    nic::{Interface, NicError},
    placement,
    program::{ProgramLoadError, TapHook, XdpMode},
    socket::{SocketConfig, SocketError},
    worker::Drained,
};

/// What can go wrong between an interface's name and its first packet.
#[derive(Debug, Error)]
pub enum EngineError {
    /// No such interface.
    #[error(transparent)]
    Nic(#[from] NicError),
    /// It would take the host's own traffic.
    #[error(
        "{reason}; if this port only receives a copy of other hosts' traffic (mirror, SPAN, TAP), say \
         so with --mirror-port"
    )]
    WouldCut {
        /// What the interface carries and what would happen.
        reason: String,
    },
    /// The interface is not one that can be captured that way.
    #[error("{name} is not an Ethernet{or_ip} interface")]
    LinkType {
        /// The interface.
        name: String,
        /// Empty, or what else would do.
        or_ip: &'static str,
    },
    /// A worker could not be told to wait for its rings.
    #[error("waiting for rings")]
    Rings(#[source] io::Error),
    /// The ring size is out of range.
    #[error("ring size is {0} bytes, but must be a power of two from 1048576 to 1073741824")]
    RingSize(u32),
    /// The kernel program.
    #[error(transparent)]
    Program(#[from] ProgramLoadError),
    /// An `AF_XDP` socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A thread could not be started.
    #[error("no thread for {name}")]
    Thread {
        /// Its name.
        name: String,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The same interface twice.
    #[error("{0} is given twice")]
    Twice(String),
}

/// How an interface is captured.
#[derive(Clone, Debug)]
pub struct InterfaceConfig {
    /// Its name.
    pub name: String,
    /// How packets are taken.
    pub path: CapturePath,
    /// Also receive what is addressed to others.
    pub promiscuous: bool,
}

/// How packets are taken.
#[derive(Clone, Copy, Debug)]
pub enum CapturePath {
    /// Copied: the host's own stack sees every packet untouched.
    Tap {
        /// Where.
        hook: TapHook,
        /// Which way the packets go that jobs may ask for.
        direction: Direction,
        /// Where an XDP program runs, if there is one.
        xdp: XdpMode,
        /// Size of each CPU's ring, bytes: a power of two.
        ring_bytes: u32,
    },
    /// Taken away: the host's own stack does not see hits.
    Exclusive {
        /// Where the XDP program runs.
        xdp: XdpMode,
        /// Take packets although the interface carries an address or a default route.
        mirror_port: bool,
        /// By what they reach userspace.
        transport: Transport,
        /// The queues' sockets.
        socket: SocketConfig,
        /// Or each CPU's ring, bytes: a power of two.
        ring_bytes: u32,
    },
}

/// By what hits reach userspace on the `exclusive` path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// `AF_XDP` where the driver writes straight into UMEM, or the sockets' own options are used; otherwise
    /// BPF rings
    #[default]
    Auto,
    /// A socket per receive queue. Where the driver does not write into UMEM, the kernel copies each packet
    /// into a frame
    AfXdp,
    /// A ring per CPU, into which the kernel program copies one packet behind the other, up to snaplen
    BpfRing,
}

impl Transport {
    /// What is meant on this interface.
    pub(crate) fn on(self, interface: &Interface, socket: &SocketConfig) -> Self {
        let zero_copy = interface.features.is_none_or(|features| features.zero_copy);
        match self {
            Self::Auto if zero_copy || *socket != SocketConfig::default() => Self::AfXdp,
            Self::Auto => Self::BpfRing,
            transport => transport,
        }
    }
}

/// Size of a CPU's ring, bytes: a few milliseconds of a fast interface's traffic in small packets, and
/// room for many of the largest.
pub const RING_BYTES: u32 = 8 << 20;

/// The same on the `exclusive` path, whose interface may be as fast as it can.
pub const EXCLUSIVE_RING_BYTES: u32 = 16 << 20;

impl CapturePath {
    /// The `tap` path as it is without a word.
    pub const TAP: Self = Self::Tap {
        hook: TapHook::Auto,
        direction: Direction::Both,
        xdp: XdpMode::Auto,
        ring_bytes: RING_BYTES,
    };
}

/// What an engine is made of.
#[derive(Clone, Debug, Default)]
pub struct EngineConfig {
    /// The interfaces.
    pub interfaces: Vec<InterfaceConfig>,
    /// CPUs that workers run on, in this order; without any, as [`placement`] has it.
    pub cpus: Vec<usize>,
    /// CPUs that disk threads share; without any, as [`placement`] has it.
    pub disk_cpus: Vec<usize>,
    /// Whether workers go before all threads that have no real-time priority: for a host that captures
    /// only. A queue's ring lasts for a millisecond at line rate, and the kernel lets other threads have a
    /// CPU for longer at a time.
    pub realtime: bool,
    /// The kernel programs; by default the embedded ones.
    pub object: Option<Vec<u8>>,
}

/// What the engine's thread is told.
pub(crate) enum Event {
    Start { spec: Box<JobSpec>, answer: Sender<Result<Job, StartError>> },
    Stop { job: JobId },
    Progress { job: JobId, answer: Sender<Progress> },
    Flush { job: JobId, answer: Sender<()> },
    Flushed { job: JobId },
    Limit { job: JobId },
    Failed { job: JobId },
    Gone { port: usize },
    Drained { job: JobId, port: usize, worker: usize, drained: Drained },
    Sealed { job: JobId, report: Box<DiskReport> },
    Exit,
}

/// The capture engine.
#[derive(Debug)]
pub struct Engine {
    events: Sender<Event>,
    thread: Option<JoinHandle<()>>,
    opened: Vec<Opened>,
}

impl Engine {
    /// Loads and attaches the kernel programs, opens the sockets and starts the workers.
    pub fn open(config: &EngineConfig) -> Result<Self, EngineError> {
        let (events, inbox) = unbounded();
        let allowed = placement::allowed();
        let for_workers = match config.cpus.as_slice() {
            [] => placement::for_workers(&allowed),
            named => named.to_vec(),
        };
        let mut given = Vec::new();
        let mut cpus = for_workers.into_iter().cycle().inspect(|cpu| given.push(*cpu));
        let named = !config.cpus.is_empty();
        let mut place = Place { named, realtime: config.realtime, cpus: &mut cpus };
        let mut ports: Vec<Port> = Vec::new();
        for interface in &config.interfaces {
            if ports.iter().any(|port| port.opened.name == interface.name) {
                return Err(EngineError::Twice(interface.name.clone()));
            }
            let object = config.object.as_deref().unwrap_or(capture_ebpf::CAPTURE);
            ports.push(Port::open(ports.len(), interface, object, &mut place, &events)?);
        }
        let opened = ports.iter().map(|port| port.opened.clone()).collect();
        let disk_cpus = match config.disk_cpus.as_slice() {
            [] => placement::for_disk(&allowed, &given),
            named => named.to_vec(),
        };
        let control = Control::new(ports, disk_cpus, events.clone());
        let thread = thread::Builder::new()
            .name("tl-engine".into())
            .spawn(move || control.run(&inbox))
            .map_err(|source| EngineError::Thread { name: "tl-engine".into(), source })?;
        Ok(Self { events, thread: Some(thread), opened })
    }

    /// The interfaces.
    pub fn interfaces(&self) -> &[Opened] {
        &self.opened
    }

    /// Starts a job on all interfaces. When this returns, the next matching packet is a hit.
    pub fn start(&self, spec: JobSpec) -> Result<Job, StartError> {
        let (answer, reply) = bounded(1);
        let event = Event::Start { spec: Box::new(spec), answer };
        self.events.send(event).map_err(|_closed| StartError::Ended)?;
        reply.recv().map_err(|_closed| StartError::Ended)?
    }
}

impl Drop for Engine {
    /// Ends every job, then detaches.
    fn drop(&mut self) {
        drop(self.events.send(Event::Exit));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the engine's thread panicked");
        }
    }
}
