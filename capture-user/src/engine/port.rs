//! One interface: its program, its queues or rings, its workers.

use std::os::fd::OwnedFd;

use capture_ebpf::abi::MAX_QUEUES;
use crossbeam::channel::Sender;
use serde::Serialize;

use super::{CapturePath, EngineError, Event, InterfaceConfig, Transport};
use crate::{
    filter::Direction,
    nic::{self, Interface, LinkType},
    placement,
    program::{Program, RingSizes, TapHook, XdpMode},
    ring::Rings,
    socket::{Socket, SocketConfig},
    source::Source,
    sys,
    worker::{Queues, WorkerConfig, WorkerLink, spawn},
};

/// An interface that an engine captures on, and how.
#[derive(Clone, Debug, Serialize)]
pub struct Opened {
    /// Its name.
    pub name: String,
    /// `tap` or `exclusive`.
    pub mode: &'static str,
    /// Where the `tap` programs are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hook: Option<TapHook>,
    /// By what hits reach userspace on the `exclusive` path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transport: Option<Transport>,
    /// Where the XDP program runs, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xdp: Option<XdpMode>,
    /// Whether the driver writes straight into UMEM.
    pub zero_copy: bool,
    /// Whether packets longer than a frame arrive whole.
    pub multi_buffer: bool,
    /// Its receive queues; on the `tap` path, the CPUs.
    pub queues: u32,
    /// Its driver.
    pub driver: String,
    /// Whether its packets begin with an IP header.
    pub raw_ip: bool,
}

/// "exclusive, native XDP, BPF rings, 2 queues".
impl std::fmt::Display for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.mode)?;
        match (self.hook, self.xdp) {
            (Some(hook), None) => write!(f, ", {hook}")?,
            (_, Some(xdp)) => write!(f, ", {xdp} XDP")?,
            (None, None) => {}
        }
        match self.transport {
            Some(Transport::BpfRing) => f.write_str(", BPF rings")?,
            Some(_) if self.zero_copy => f.write_str(", zero-copy")?,
            Some(_) => f.write_str(", copy")?,
            None => {}
        }
        let unit = if self.mode == "exclusive" { "queue" } else { "CPU" };
        let s = if self.queues == 1 { "" } else { "s" };
        write!(f, ", {} {unit}{s}", self.queues)
    }
}

/// CPUs whose rings one worker reads: as many as it takes to fill the worker's own when all of them do
/// little else than handle packets. With more of them, fewer packets have to be put in order afterwards.
const CPUS_PER_WORKER: usize = 4;

/// One interface.
pub(super) struct Port {
    pub(super) opened: Opened,
    pub(super) index: u32,
    // Before the workers: the program must let go of their sockets first.
    pub(super) program: Program,
    pub(super) workers: Vec<WorkerLink>,
    pub(super) gone: bool,
    /// Keeps the interface promiscuous.
    _promiscuous: Option<OwnedFd>,
}

/// Where and how workers run.
pub(super) struct Place<'a> {
    /// Whether they were named. Where the host does its own work, the scheduler knows better where a worker
    /// disturbs it least.
    pub(super) named: bool,
    pub(super) cpus: &'a mut dyn Iterator<Item = usize>,
    pub(super) realtime: bool,
}

/// What the parts of [`Port::open`] have in common.
struct Opening<'a, 'b> {
    port: usize,
    interface: Interface,
    program: Program,
    /// CPUs that run now. One that comes online later has no ring: its hits are counted as drops.
    cpus: Vec<usize>,
    place: &'a mut Place<'b>,
    events: &'a Sender<Event>,
}

impl Port {
    pub(super) fn open(
        port: usize,
        config: &InterfaceConfig,
        object: &[u8],
        place: &mut Place<'_>,
        events: &Sender<Event>,
    ) -> Result<Self, EngineError> {
        let interface = nic::find(&config.name)?;
        let cpus = online_cpus();
        let last_cpu = cpus.last().map_or(0, |cpu| *cpu as u32);
        let rings = |bytes: u32| {
            if !bytes.is_power_of_two() || !(1 << 20..=1 << 30).contains(&bytes) {
                return Err(EngineError::RingSize(bytes));
            }
            Ok(RingSizes { last_cpu, bytes })
        };
        let rings = match config.path {
            CapturePath::Tap { ring_bytes, .. } => Some(rings(ring_bytes)?),
            CapturePath::Exclusive { transport, socket, ring_bytes, .. }
                if transport.on(&interface, &socket) == Transport::BpfRing =>
            {
                Some(rings(ring_bytes)?)
            }
            CapturePath::Exclusive { .. } => None,
        };
        let program = Program::load(object, rings)?;
        let promiscuous = config.promiscuous.then(|| sys::promiscuous(interface.index));
        let promiscuous = promiscuous.and_then(|result| match result {
            Ok(socket) => Some(socket),
            Err(error) => {
                log::warn!("{} is not promiscuous: {error}", interface.name);
                None
            }
        });
        let index = interface.index;
        let opening = Opening { port, interface, program, cpus, place, events };
        let (opened, program, workers) = match config.path {
            CapturePath::Tap { hook, direction, xdp, .. } => opening.tap(hook, direction, xdp)?,
            CapturePath::Exclusive { xdp, mirror_port, socket, .. } => {
                opening.may_be_exclusive(mirror_port)?;
                match rings {
                    None => opening.exclusive(xdp, &socket)?,
                    Some(_) => opening.exclusive_copy(xdp)?,
                }
            }
        };
        Ok(Self { opened, index, program, workers, gone: false, _promiscuous: promiscuous })
    }
}

impl Opening<'_, '_> {
    fn opened(&self, mode: &'static str) -> Opened {
        Opened {
            name: self.interface.name.clone(),
            mode,
            hook: None,
            transport: None,
            xdp: None,
            zero_copy: false,
            multi_buffer: true,
            queues: 0,
            driver: self.interface.driver.clone().unwrap_or_default(),
            raw_ip: !self.interface.is_ethernet(),
        }
    }

    fn worker<S: Source + 'static>(
        &self,
        index: usize,
        cpu: Option<usize>,
        queues: Queues,
        source: S,
    ) -> Result<WorkerLink, EngineError> {
        let name = format!("tl-{}-q{}", self.interface.name, queues.first);
        let (port, realtime) = (self.port, self.place.realtime);
        let config = WorkerConfig { name: name.clone(), cpu, port, index, queues, realtime };
        spawn(config, source, self.events.clone())
            .map_err(|source| EngineError::Thread { name, source })
    }

    /// What reads these CPUs' rings.
    fn rings(&mut self, cpus: &[usize]) -> Result<Rings, EngineError> {
        let rings: Result<_, _> = cpus.iter().map(|cpu| self.program.ring(*cpu as u32)).collect();
        Rings::new(rings?).map_err(EngineError::Rings)
    }

    fn tap(
        mut self,
        hook: TapHook,
        direction: Direction,
        xdp: XdpMode,
    ) -> Result<(Opened, Program, Vec<WorkerLink>), EngineError> {
        if matches!(self.interface.link_type, LinkType::Other(_)) {
            let name = self.interface.name;
            return Err(EngineError::LinkType { name, or_ip: " or IP" });
        }
        let mut opened = self.opened("tap");
        let mut workers = Vec::new();
        // Rings first, then the programs that fill them.
        let cpus = std::mem::take(&mut self.cpus);
        for group in cpus.chunks(CPUS_PER_WORKER) {
            let rings = self.rings(group)?;
            let queues = Queues { first: group[0] as u32, count: group.len() };
            let on = self.place.named.then(|| self.place.cpus.next()).flatten();
            workers.push(self.worker(workers.len(), on, queues, rings)?);
        }
        opened.queues = cpus.len() as u32;
        let (hook, xdp) = self.program.attach_tap(&self.interface, hook, direction, xdp)?;
        (opened.hook, opened.xdp) = (Some(hook), xdp);
        Ok((opened, self.program, workers))
    }

    fn may_be_exclusive(&self, mirror_port: bool) -> Result<(), EngineError> {
        if !self.interface.is_ethernet() {
            let name = self.interface.name.clone();
            return Err(EngineError::LinkType { name, or_ip: "" });
        }
        match self.interface.exclusive_would_cut() {
            Some(reason) if !mirror_port => Err(EngineError::WouldCut { reason }),
            _ => Ok(()),
        }
    }

    fn exclusive_copy(
        mut self,
        xdp: XdpMode,
    ) -> Result<(Opened, Program, Vec<WorkerLink>), EngineError> {
        let mut opened = self.opened("exclusive");
        opened.transport = Some(Transport::BpfRing);
        opened.queues = self.interface.rx_queues.max(1);
        let cpus = std::mem::take(&mut self.cpus);
        // A worker per queue, as far as there are CPUs that queues can be served from. Those are most often
        // neighbours, so that each is another worker's.
        let count = cpus.len().min(opened.queues as usize);
        let mut workers = Vec::new();
        for first in 0..count {
            let group: Vec<usize> = cpus.iter().copied().skip(first).step_by(count).collect();
            let rings = self.rings(&group)?;
            let on = self.place.cpus.next();
            let queues = Queues { first: first as u32, count: 1 };
            workers.push(self.worker(first, on, queues, rings)?);
        }
        opened.xdp = Some(self.program.attach_exclusive(&self.interface, xdp, true)?);
        Ok((opened, self.program, workers))
    }

    fn exclusive(
        mut self,
        xdp: XdpMode,
        config: &SocketConfig,
    ) -> Result<(Opened, Program, Vec<WorkerLink>), EngineError> {
        let mut opened = self.opened("exclusive");
        opened.transport = Some(Transport::AfXdp);
        opened.zero_copy = true;
        opened.queues = self.interface.rx_queues.clamp(1, MAX_QUEUES);
        // First the program, which so far passes everything, then the sockets: some drivers reset
        // their queues when a program is attached.
        opened.xdp = Some(self.program.attach_exclusive(&self.interface, xdp, false)?);
        let mut workers = Vec::new();
        for queue in 0..opened.queues {
            let socket = Socket::open(&self.interface.name, queue, config)?;
            opened.zero_copy &= socket.zero_copy();
            opened.multi_buffer &= socket.multi_buffer();
            self.program.set_socket(queue, socket.as_raw_fd())?;
            let on = self.place.cpus.next();
            let queues = Queues { first: queue, count: 1 };
            workers.push(self.worker(workers.len(), on, queues, socket)?);
        }
        warn_of_single_buffers(&self.interface, &opened, config);
        Ok((opened, self.program, workers))
    }
}

/// CPUs that run now.
fn online_cpus() -> Vec<usize> {
    let listed = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let mut cpus = Vec::new();
    for range in listed.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        if let (Ok(first), Ok(last)) = (first.parse(), last.parse::<usize>()) {
            cpus.extend(first..=last);
        }
    }
    if cpus.is_empty() { placement::allowed() } else { cpus }
}

fn warn_of_single_buffers(interface: &Interface, opened: &Opened, config: &SocketConfig) {
    // The kernel keeps 256 bytes of each frame; Ethernet and two VLAN tags take 22.
    let room = config.frame_size - 256;
    if !opened.multi_buffer && interface.mtu + 22 > room {
        log::warn!(
            "{}: MTU {} is more than a UMEM frame holds ({room} bytes), and this kernel does not \
             split packets (Linux 6.6 does): longer ones will be counted as rx_dropped",
            interface.name,
            interface.mtu,
        );
    }
}
