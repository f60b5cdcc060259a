//! The kernel program of one interface: loaded, told about jobs, attached, counted.
//!
//! A job's bit in the switch is set last when it starts and cleared first when it ends. Everything
//! else of it is written while its bit is clear, so a packet never meets a half-written job, and
//! writing one job never disturbs another:
//! - the port maps hold one bit per job and are written in place;
//! - the other tables exist twice, and the one that is not read is rewritten, then switched to;
//! - before one is written again, its last readers are waited for.

use std::{
    io,
    num::NonZeroU32,
    os::fd::RawFd,
    sync::{Arc, Once},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, ArrayOfMaps, Map, MapData, MapError, PerCpuArray, RingBuf, XskMap},
    programs::{
        LinkOrder, Program as AyaProgram, ProgramError, SchedClassifier, TcAttachType, Xdp,
        XdpMode as AyaXdpMode,
        links::FdLink,
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError},
    },
};
use capture_ebpf::{
    abi::{Counters, MAX_CPUS, MAX_JOBS, PIECE, Switch, globals, maps, programs},
    classify::Tables,
};
use serde::Serialize;
use thiserror::Error;

use crate::{
    capabilities::{Capabilities, SETCAP},
    filter::{Direction, Rule, Rules, tables},
    nic::{self, Interface},
    pace::Generations,
    ring::Ring,
};

/// A kernel program could not be loaded, attached or told about a job.
#[derive(Debug, Error)]
pub enum ProgramLoadError {
    /// Not allowed.
    #[error(
        "loading the capture program needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (or root): run it \
         with sudo, or once `{SETCAP}`"
    )]
    Privileges(#[source] io::Error),
    /// The object, a map or a program of it was refused.
    #[error("the kernel refused the capture program; `tapline doctor` says what this kernel lacks")]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The object lacks a part: it is of another version.
    #[error("the eBPF object has no {kind} `{name}`: it is not of this version")]
    Missing {
        /// `map` or `program`.
        kind: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// Another program has the hook.
    #[error(
        "{interface} already runs the XDP program `{holder}` (id {id}, {mode} mode), and only one can \
         be attached; Tapline never displaces another's: detach it first \
         (`ip link set dev {interface} xdp off`), or use `--mode tap`, which needs no XDP hook"
    )]
    Taken {
        /// The interface.
        interface: String,
        /// The program's name.
        holder: String,
        /// Its id.
        id: u32,
        /// Where it is attached.
        mode: String,
    },
    /// The driver refused the program in the mode that was asked for.
    #[error(
        "{interface} does not take an XDP program in {mode} mode ({driver} driver, MTU {mtu}); \
         `--xdp generic` works with every driver"
    )]
    Mode {
        /// The interface.
        interface: String,
        /// The mode asked for.
        mode: XdpMode,
        /// Its driver.
        driver: String,
        /// Its MTU, bytes.
        mtu: u32,
        /// What the kernel said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The kernel has no fd-owned XDP links.
    #[error(
        "this kernel has no XDP links (added in Linux 5.9), so a program could be left behind if \
         Tapline were killed: refusing to attach to {interface}"
    )]
    NoLinks {
        /// The interface.
        interface: String,
    },
    /// Neither tcx nor clsact.
    #[error("{interface} does not take a tc program ({hook}, {direction})")]
    Tap {
        /// The interface.
        interface: String,
        /// `tcx` or `tc`.
        hook: TapHook,
        /// `ingress` or `egress`.
        direction: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// More CPUs than the array of rings has room for.
    #[error("CPU {0} is beyond the {WAIT} that the capture program has rings for")]
    TooManyCpus(u32),
    /// A ring could not be mapped.
    #[error("mapping a ring of {bytes} bytes for CPU {cpu}")]
    Ring {
        /// The CPU.
        cpu: u32,
        /// Its size.
        bytes: u32,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// A map could not be read or written.
    #[error("map {map}")]
    Map {
        /// Its name.
        map: &'static str,
        /// What the kernel said.
        #[source]
        source: MapError,
    },
}

/// Where in the receive path an XDP program runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    /// Native where the driver can, else generic.
    #[default]
    Auto,
    /// In the driver, before the kernel makes an skb.
    Native,
    /// In the stack, after it: slower, and with every driver.
    Generic,
}

impl std::fmt::Display for XdpMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// Where the `tap` path takes its copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum TapHook {
    /// tcx, or clsact on kernels without it
    #[default]
    Auto,
    /// Linux 6.6: beside any other program, and gone with the process
    Tcx,
    /// The classic clsact queueing discipline. Its programs are not owned by the process: SIGKILL
    /// leaves them behind, idle
    Tc,
    /// What is received is copied by an XDP program, before GRO; what is sent, by tcx or clsact
    Xdp,
}

impl std::fmt::Display for TapHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Tcx => "tcx",
            Self::Tc => "tc",
            Self::Xdp => "xdp",
        })
    }
}

/// What keeps a program attached; it is detached when this is dropped.
enum Attached {
    Xdp { _link: FdLink },
    Tc { _link: SchedClassifierLink },
}

/// An entry of `BELLS` that is no CPU's; writing it makes the kernel wait.
const WAIT: u32 = MAX_CPUS as u32 - 1;

/// Size of a bell: the smallest ring on machines with pages of up to 64 KiB, bytes.
const BELL: u32 = 64 << 10;

/// The CPUs' rings.
#[derive(Clone, Copy, Debug)]
pub struct RingSizes {
    /// The highest CPU that has one.
    pub last_cpu: u32,
    /// Size of each, bytes: a power of two, at least [`PIECE`].
    pub bytes: u32,
}

/// The loaded program of one interface.
pub struct Program {
    ebpf: Ebpf,
    switch: Array<MapData, Switch>,
    tables: Array<MapData, Tables>,
    sports: Array<MapData, u64>,
    dports: Array<MapData, u64>,
    counters: PerCpuArray<MapData, Counters>,
    sockets: XskMap<MapData>,
    rings: MapData,
    positions: MapData,
    bells: ArrayOfMaps<MapData, MapData>,
    /// What is written to [`WAIT`].
    spare: MapData,
    raw_ip: bool,
    rules: Rules,
    /// What is in `switch`.
    state: Switch,
    /// Of the jobs whose sampling changes while they run, by slot.
    histories: [Option<Arc<Generations>>; MAX_JOBS],
    /// Whether a packet may still be looked up in the tables of the generation before.
    unsettled: bool,
    links: Vec<Attached>,
}

fn missing(kind: &'static str, name: &'static str) -> ProgramLoadError {
    ProgramLoadError::Missing { kind, name }
}

fn map_error(map: &'static str) -> impl FnOnce(MapError) -> ProgramLoadError {
    move |source| ProgramLoadError::Map { map, source }
}

/// The operating system's word at the root of this error, if it is that this process is not allowed
/// to. The verifier uses the same word, with a page of reasons, for a program that it does not trust:
/// a process without `CAP_PERFMON` hears it for one that is in order.
fn permission(error: &(dyn std::error::Error + 'static)) -> Option<io::Error> {
    if Capabilities::own().is_some_and(Capabilities::load_programs) {
        return None;
    }
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::PermissionDenied
        {
            return Some(io.raw_os_error().map_or(io.kind().into(), io::Error::from_raw_os_error));
        }
        cause = error.source();
    }
    None
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> ProgramLoadError {
    match permission(&error) {
        Some(error) => ProgramLoadError::Privileges(error),
        None => ProgramLoadError::Refused(Box::new(error)),
    }
}

fn bell() -> Result<MapData, ProgramLoadError> {
    const RINGBUF: u32 = aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_RINGBUF as u32;
    let ring = aya_obj::Map::new_from_params(RINGBUF, 0, 0, BELL, 0);
    MapData::create(ring, "BELL", None).map_err(map_error(maps::BELLS))
}

impl Program {
    /// Loads the object's maps, with rings if any are wanted. A program is loaded when it is first asked for.
    pub fn load(object: &[u8], rings: Option<RingSizes>) -> Result<Self, ProgramLoadError> {
        allow_locked_memory();
        let mut loader = EbpfLoader::new();
        // The memory model of Intel and AMD, and the kernel's string copies, too, come before a store that
        // follows ("Fast-String Operation and Out-of-Order Stores" in Intel's manual, volume 3A); not so on ARM,
        // POWER or RISC-V.
        let stores_in_order = u8::from(cfg!(target_arch = "x86_64"));
        loader.override_global(globals::STORES_IN_ORDER, &stores_in_order, true);
        let mut state = Switch::default();
        if let Some(RingSizes { last_cpu, bytes }) = rings {
            if last_cpu >= WAIT {
                return Err(ProgramLoadError::TooManyCpus(last_cpu));
            }
            let pieces = bytes / PIECE as u32;
            debug_assert!(pieces.is_power_of_two(), "a ring of {bytes} bytes");
            loader.map_max_entries(maps::RINGS, (last_cpu + 1) * pieces);
            loader.map_max_entries(maps::POSITIONS, last_cpu + 1);
            state.ring_bytes = bytes.into();
        }
        let mut ebpf = loader.load(object).map_err(|error: EbpfError| refused(error))?;
        // Only a diagnostic build of the object has the map that logs go through.
        if let Err(error) = aya_log::EbpfLogger::init(&mut ebpf) {
            log::trace!("no log of the kernel program: {error}");
        }
        let mut take = |name| ebpf.take_map(name).ok_or_else(|| missing("map", name));
        let switch = Array::try_from(take(maps::SWITCH)?).map_err(map_error(maps::SWITCH))?;
        let tables = Array::try_from(take(maps::TABLES)?).map_err(map_error(maps::TABLES))?;
        let sports = Array::try_from(take(maps::SPORTS)?).map_err(map_error(maps::SPORTS))?;
        let dports = Array::try_from(take(maps::DPORTS)?).map_err(map_error(maps::DPORTS))?;
        let counters =
            PerCpuArray::try_from(take(maps::COUNTERS)?).map_err(map_error(maps::COUNTERS))?;
        let sockets = XskMap::try_from(take(maps::SOCKETS)?).map_err(map_error(maps::SOCKETS))?;
        let mut array = |name| match take(name)? {
            Map::Array(map) => Ok(map),
            _ => Err(missing("array", name)),
        };
        let rings = array(maps::RINGS)?;
        let positions = array(maps::POSITIONS)?;
        let bells = ArrayOfMaps::try_from(take(maps::BELLS)?).map_err(map_error(maps::BELLS))?;
        Ok(Self {
            ebpf,
            switch,
            tables,
            sports,
            dports,
            counters,
            sockets,
            rings,
            positions,
            bells,
            spare: bell()?,
            raw_ip: false,
            rules: [None; MAX_JOBS],
            state,
            histories: [const { None }; MAX_JOBS],
            unsettled: false,
            links: Vec::new(),
        })
    }

    /// The `exclusive` program.
    pub fn exclusive(&mut self) -> Result<&mut Xdp, ProgramLoadError> {
        self.xdp(programs::EXCLUSIVE)
    }

    /// The program that copies what `exclusive` redirects.
    pub fn exclusive_copy(&mut self) -> Result<&mut Xdp, ProgramLoadError> {
        self.xdp(programs::EXCLUSIVE_COPY)
    }

    /// The XDP program of the `tap` path.
    pub fn tap_xdp(&mut self) -> Result<&mut Xdp, ProgramLoadError> {
        self.xdp(programs::TAP_XDP)
    }

    /// The tc program of the `tap` path for packets that are received.
    pub fn tap_ingress(&mut self) -> Result<&mut SchedClassifier, ProgramLoadError> {
        self.classifier(programs::TAP_INGRESS)
    }

    /// The tc program of the `tap` path for packets that are sent.
    pub fn tap_egress(&mut self) -> Result<&mut SchedClassifier, ProgramLoadError> {
        self.classifier(programs::TAP_EGRESS)
    }

    fn xdp(&mut self, name: &'static str) -> Result<&mut Xdp, ProgramLoadError> {
        let Some(AyaProgram::Xdp(program)) = self.ebpf.program_mut(name) else {
            return Err(missing("program", name));
        };
        if program.fd().is_err() {
            program.load().map_err(refused)?;
        }
        Ok(program)
    }

    fn classifier(&mut self, name: &'static str) -> Result<&mut SchedClassifier, ProgramLoadError> {
        let Some(AyaProgram::SchedClassifier(program)) = self.ebpf.program_mut(name) else {
            return Err(missing("program", name));
        };
        if program.fd().is_err() {
            program.load().map_err(refused)?;
        }
        Ok(program)
    }

    /// Attaches `exclusive`, or what copies into rings instead, and says in which mode. The programs go away
    /// with this value, or with the process, however that ends.
    pub fn attach_exclusive(
        &mut self,
        interface: &Interface,
        mode: XdpMode,
        copy: bool,
    ) -> Result<XdpMode, ProgramLoadError> {
        let name = if copy { programs::EXCLUSIVE_COPY } else { programs::EXCLUSIVE };
        self.attach_xdp(name, interface, mode)
    }

    /// Attaches the `tap` programs for these directions and says at which hook, and, if that is XDP,
    /// in which mode.
    pub fn attach_tap(
        &mut self,
        interface: &Interface,
        hook: TapHook,
        direction: Direction,
        mode: XdpMode,
    ) -> Result<(TapHook, Option<XdpMode>), ProgramLoadError> {
        self.raw_ip = !interface.is_ethernet();
        let mut used = (hook, None);
        if direction.inbound() {
            used = if hook == TapHook::Xdp {
                (hook, Some(self.attach_xdp(programs::TAP_XDP, interface, mode)?))
            } else {
                (self.attach_tc(programs::TAP_INGRESS, interface, hook)?, None)
            };
        }
        if direction.outbound() {
            let egress = if hook == TapHook::Xdp { TapHook::Auto } else { hook };
            let egress = self.attach_tc(programs::TAP_EGRESS, interface, egress)?;
            if !direction.inbound() || hook != TapHook::Xdp {
                used.0 = egress;
            }
        }
        Ok(used)
    }

    fn attach_tc(
        &mut self,
        name: &'static str,
        interface: &Interface,
        hook: TapHook,
    ) -> Result<TapHook, ProgramLoadError> {
        match hook {
            TapHook::Tcx | TapHook::Xdp => self.attach_tc_by(name, interface, TapHook::Tcx),
            TapHook::Tc => self.attach_tc_by(name, interface, TapHook::Tc),
            TapHook::Auto => match self.attach_tc_by(name, interface, TapHook::Tcx) {
                Err(ProgramLoadError::Tap { source, .. }) => {
                    log::info!("{}: no tcx ({source}); using clsact", interface.name);
                    self.attach_tc_by(name, interface, TapHook::Tc)
                }
                result => result,
            },
        }
    }

    fn attach_tc_by(
        &mut self,
        name: &'static str,
        interface: &Interface,
        hook: TapHook,
    ) -> Result<TapHook, ProgramLoadError> {
        let (kind, direction) = if name == programs::TAP_INGRESS {
            (TcAttachType::Ingress, "ingress")
        } else {
            (TcAttachType::Egress, "egress")
        };
        let failed = |error: ProgramError| {
            if let Some(error) = permission(&error) {
                return ProgramLoadError::Privileges(error);
            }
            let source = Box::new(error);
            ProgramLoadError::Tap { interface: interface.name.clone(), hook, direction, source }
        };
        let options = if hook == TapHook::Tc {
            match tc::qdisc_add_clsact(&interface.name) {
                // Another's, or ours of an earlier run: it serves.
                Ok(()) => {}
                Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {
                }
                Err(error) => return Err(failed(error.into())),
            }
            TcAttachOptions::Netlink(NlOptions::default())
        } else {
            // As a packet socket sees them: what is received before any other program, what is sent
            // after all.
            TcAttachOptions::TcxOrder(match kind {
                TcAttachType::Ingress => LinkOrder::first(),
                _ => LinkOrder::last(),
            })
        };
        let program = self.classifier(name)?;
        let id = program.attach_with_options(&interface.name, kind, options).map_err(failed)?;
        let link = program.take_link(id).map_err(refused)?;
        self.links.push(Attached::Tc { _link: link });
        Ok(hook)
    }

    fn attach_xdp(
        &mut self,
        name: &'static str,
        interface: &Interface,
        mode: XdpMode,
    ) -> Result<XdpMode, ProgramLoadError> {
        let attempts: &[(XdpMode, AyaXdpMode)] = match mode {
            XdpMode::Native => &[(XdpMode::Native, AyaXdpMode::Driver)],
            XdpMode::Generic => &[(XdpMode::Generic, AyaXdpMode::Skb)],
            XdpMode::Auto => {
                &[(XdpMode::Native, AyaXdpMode::Driver), (XdpMode::Generic, AyaXdpMode::Skb)]
            }
        };
        let mut result = Ok(mode);
        for (mode, flags) in attempts {
            result = self.attach_xdp_in(name, interface, *mode, *flags);
            match &result {
                Err(ProgramLoadError::Mode { source, .. }) if attempts.len() > 1 => {
                    log::info!("{}: no native XDP ({source}); using generic", interface.name);
                }
                _ => break,
            }
        }
        result
    }

    fn attach_xdp_in(
        &mut self,
        name: &'static str,
        interface: &Interface,
        mode: XdpMode,
        flags: AyaXdpMode,
    ) -> Result<XdpMode, ProgramLoadError> {
        // Asked before as well as after: attaching by link never displaces, but the kernel's word
        // for it is only "busy".
        check_free(interface)?;
        let program = self.xdp(name)?;
        let id = match program.attach_to_if_index(interface.index, flags) {
            Ok(id) => id,
            Err(error) => {
                check_free(interface)?;
                if let Some(error) = permission(&error) {
                    return Err(ProgramLoadError::Privileges(error));
                }
                return Err(ProgramLoadError::Mode {
                    interface: interface.name.clone(),
                    mode,
                    driver: interface.driver.clone().unwrap_or_else(|| "unknown".into()),
                    mtu: interface.mtu,
                    source: Box::new(error),
                });
            }
        };
        let link = program.take_link(id).map_err(refused)?;
        // aya falls back to netlink where the kernel has no links; such a program would outlive us.
        let link = FdLink::try_from(link)
            .map_err(|_not_fd| ProgramLoadError::NoLinks { interface: interface.name.clone() })?;
        self.links.push(Attached::Xdp { _link: link });
        Ok(mode)
    }

    /// Detaches; what is on its way through the programs still arrives.
    pub fn detach(&mut self) {
        self.links.clear();
    }

    /// The reader of a CPU's ring.
    pub fn ring(&mut self, cpu: u32) -> Result<Ring, ProgramLoadError> {
        let bell = bell()?;
        self.bells.set(cpu, &bell, 0).map_err(map_error(maps::BELLS))?;
        let bell = RingBuf::try_from(Map::RingBuf(bell)).map_err(map_error(maps::BELLS))?;
        let bytes = self.state.ring_bytes as u32;
        Ring::map(&self.rings, &self.positions, bell, cpu, bytes)
            .map_err(|source| ProgramLoadError::Ring { cpu, bytes, source })
    }

    /// Gives the packets of a receive queue to an `AF_XDP` socket.
    pub fn set_socket(&mut self, queue: u32, socket: RawFd) -> Result<(), ProgramLoadError> {
        self.sockets.set(queue, socket, 0).map_err(map_error(maps::SOCKETS))
    }

    /// A slot without a job.
    pub fn free_slot(&self) -> Option<usize> {
        self.rules.iter().position(Option::is_none)
    }

    /// Writes a job's rule, without activating it.
    pub fn insert(&mut self, slot: usize, rule: Rule) -> Result<(), ProgramLoadError> {
        debug_assert!(self.rules[slot].is_none(), "slot {slot} is taken");
        self.rules[slot] = Some(rule);
        self.write_ports(slot, &rule, true)?;
        self.write_tables()
    }

    /// Keeps book of how the job is sampled, from now on.
    pub(crate) fn follow(&mut self, slot: usize) -> Option<Arc<Generations>> {
        let rule = self.rules[slot].as_ref()?;
        let history = Arc::new(Generations::new(rule.sample));
        self.histories[slot] = Some(Arc::clone(&history));
        Some(history)
    }

    /// Samples a job otherwise, while it runs.
    pub(crate) fn resample(
        &mut self,
        slot: usize,
        sample: NonZeroU32,
    ) -> Result<(), ProgramLoadError> {
        if let Some(rule) = &mut self.rules[slot] {
            rule.sample = sample;
            self.write_tables()?;
        }
        Ok(())
    }

    /// Lets the kernel match the job.
    pub fn activate(&mut self, slot: usize) -> Result<(), ProgramLoadError> {
        self.switch_to(Switch { active: self.state.active | 1 << slot, ..self.state })
    }

    /// Stops the kernel matching the job; when this returns, its counters are final.
    pub fn deactivate(&mut self, slot: usize) -> Result<(), ProgramLoadError> {
        self.switch_to(Switch { active: self.state.active & !(1 << slot), ..self.state })?;
        self.settle()
    }

    /// Lets every run of the program that began before end: when an array of maps is written, the
    /// kernel waits for all that may still see the old entry. (`membarrier()` would do the same, but
    /// kernels that run with `nohz_full` CPUs refuse it.)
    /// <https://github.com/torvalds/linux/commit/1ae80cf31938c8f77c37a29bbe29e7f1cd492be8>
    fn settle(&mut self) -> Result<(), ProgramLoadError> {
        self.bells.set(WAIT, &self.spare, 0).map_err(map_error(maps::BELLS))?;
        self.unsettled = false;
        Ok(())
    }

    /// Takes back the rule of a job that is not active, and frees its slot.
    pub fn remove(&mut self, slot: usize) -> Result<(), ProgramLoadError> {
        debug_assert!(self.state.active >> slot & 1 == 0, "slot {slot} is active");
        self.histories[slot] = None;
        if let Some(rule) = self.rules[slot].take() {
            self.write_ports(slot, &rule, false)?;
            self.write_tables()?;
        }
        Ok(())
    }

    fn switch_to(&mut self, state: Switch) -> Result<(), ProgramLoadError> {
        self.switch.set(0, state, 0).map_err(map_error(maps::SWITCH))?;
        self.state = state;
        Ok(())
    }

    fn write_ports(
        &mut self,
        slot: usize,
        rule: &Rule,
        present: bool,
    ) -> Result<(), ProgramLoadError> {
        let sides = [
            (maps::SPORTS, &mut self.sports, rule.filter.sport),
            (maps::DPORTS, &mut self.dports, rule.filter.dport),
        ];
        for (name, map, port) in sides {
            let Some(port) = port else { continue };
            let port = u32::from(port);
            let jobs = map.get(&port, 0).map_err(map_error(name))?;
            let jobs = if present { jobs | 1 << slot } else { jobs & !(1 << slot) };
            map.set(port, jobs, 0).map_err(map_error(name))?;
        }
        Ok(())
    }

    fn write_tables(&mut self) -> Result<(), ProgramLoadError> {
        if self.unsettled {
            self.settle()?;
        }
        let next = self.state.generation + 1;
        let mut tables = tables(&self.rules);
        tables.raw_ip = self.raw_ip.into();
        self.tables.set((next & 1) as u32, *tables, 0).map_err(map_error(maps::TABLES))?;
        for (history, rule) in self.histories.iter().zip(&self.rules) {
            if let (Some(history), Some(rule)) = (history, rule) {
                history.note(next, rule.sample);
            }
        }
        self.switch_to(Switch { generation: next, ..self.state })?;
        self.unsettled = true;
        Ok(())
    }

    /// What the program has counted, over all CPUs.
    pub fn counters(&self) -> Result<Box<Counters>, ProgramLoadError> {
        let mut total = Box::new(Counters::ZERO);
        let per_cpu = self.counters.get(&0, 0).map_err(map_error(maps::COUNTERS))?;
        for cpu in per_cpu.iter() {
            total.packets += cpu.packets;
            for (total, count) in total.outcomes.iter_mut().zip(cpu.outcomes) {
                *total += count;
            }
            for (total, job) in total.jobs.iter_mut().zip(&cpu.jobs) {
                total.hits += job.hits;
                total.bytes += job.bytes;
                total.no_socket += job.no_socket;
                total.no_header += job.no_header;
                total.ring_full += job.ring_full;
            }
        }
        Ok(total)
    }
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Program")
            .field("switch", &self.state)
            .field("attached", &self.links.len())
            .finish_non_exhaustive()
    }
}

fn check_free(interface: &Interface) -> Result<(), ProgramLoadError> {
    match nic::xdp_holder(interface.index) {
        Ok(Some(holder)) => Err(ProgramLoadError::Taken {
            interface: interface.name.clone(),
            holder: holder.program_name.unwrap_or_else(|| "unnamed".into()),
            id: holder.program_id,
            mode: holder.mode.to_string(),
        }),
        _ => Ok(()),
    }
}

/// Kernels before 5.11 charge maps and UMEM against `RLIMIT_MEMLOCK`, whose default is too small.
fn allow_locked_memory() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
        if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
            log::debug!("RLIMIT_MEMLOCK stays as it is: {error}");
        }
    });
}

const _: () = assert!(MAX_JOBS == 64, "a set of jobs is a u64");
