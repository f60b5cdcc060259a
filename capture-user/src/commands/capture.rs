//! `tapline capture`.

mod args;
mod report;

use std::{
    fs,
    io::{self, IsTerminal as _, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
};

use nix::sys::signal::{SigSet, Signal};
use thiserror::Error;

pub use self::args::{CaptureArgs, Mode};
use self::report::{report, watch_job};
use crate::{
    engine::{
        CapturePath, EXCLUSIVE_RING_BYTES, Ending, Engine, EngineConfig, EngineError,
        InterfaceConfig, JobSpec, MIN_BUFFER, Opened, RING_BYTES, StartError, Transport,
        run_synthetic,
    },
    filter::{Direction, Filter},
    nic, placement,
    segment::{Rotation, Target},
    socket::{BusyPoll, SocketConfig, SocketError},
};

/// Why a capture could not be done.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// The flags contradict each other.
    #[error("{0}")]
    Usage(String),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The job.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A file that was named could not be read.
    #[error("reading {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The summary could not be printed.
    #[error("printing")]
    Print(#[source] io::Error),
    /// The engine ended without a word.
    #[error("the engine ended without a summary")]
    Ended,
    /// The capture ended early; what is whole was kept.
    #[error("the capture failed: {0}")]
    Failed(String),
}

impl CaptureError {
    /// Whether the command line is at fault.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Usage(_) | Self::Start(StartError::Config { .. } | StartError::Filter(_))
        )
    }
}

/// Runs a capture to its end.
pub fn run(args: &CaptureArgs) -> Result<(), CaptureError> {
    let filter = args.filter.filter().map_err(CaptureError::Usage)?;
    let config = engine_config(args)?;
    check_sizes(args)?;
    // A named pipe opens when its reader does; until then Ctrl-C ends the program.
    let target = match &args.write {
        Some(write) => target(write, args)?,
        None => Target::Nowhere,
    };
    // Before any thread starts, so that all of them leave these to the one that waits for them.
    let signals = block_signals();
    let spec = JobSpec {
        filter,
        sample: args.sample,
        direction: args.direction,
        snaplen: args.snaplen,
        packet_limit: args.packets,
        byte_limit: args.bytes,
        duration: args.duration,
        rotation: Rotation { bytes: args.rotate_bytes, every: args.rotate_every },
        buffers: args.buffers.into(),
        buffer_size: args.buffer_size as usize,
        ..JobSpec::new(target)
    };
    let summary = if args.no_capture {
        let stopped = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopped);
        on_signal(signals, move || stop.store(true, Relaxed));
        run_synthetic(spec, || stopped.load(Relaxed))?
    } else {
        let engine = Engine::open(&config)?;
        let job = engine.start(spec)?;
        for opened in engine.interfaces() {
            if nic::find(&opened.name).is_ok_and(|interface| !interface.up) {
                let name = &opened.name;
                log::warn!("{name} is down: packets come once it is up (`ip link set {name} up`)");
            }
        }
        if !args.quiet {
            announce(engine.interfaces(), &filter);
        }
        let stopper = job.stopper();
        on_signal(signals, move || stopper.stop());
        watch_job(job, args.quiet).ok_or(CaptureError::Ended)?
    };
    report(&summary, args).map_err(CaptureError::Print)?;
    match summary.ending {
        Ending::Failed(reason) => Err(CaptureError::Failed(reason)),
        _ => Ok(()),
    }
}

fn check_sizes(args: &CaptureArgs) -> Result<(), CaptureError> {
    if args.buffer_size < MIN_BUFFER as u64 || args.buffer_size > 1 << 30 {
        return Err(CaptureError::Usage(format!(
            "--buffer-size is {} bytes, but must be from {MIN_BUFFER} to {}",
            args.buffer_size,
            1 << 30
        )));
    }
    if let Some(bytes) = args.rotate_bytes
        && bytes < 2 * MIN_BUFFER as u64
    {
        return Err(CaptureError::Usage(format!(
            "--rotate-bytes is {bytes}, but must be at least {}",
            2 * MIN_BUFFER
        )));
    }
    Ok(())
}

/// Blocks the signals that end a capture, in this thread and those that it starts.
fn block_signals() -> SigSet {
    let mut signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    if !is_ignored(Signal::SIGHUP) {
        signals.add(Signal::SIGHUP);
    }
    if let Err(error) = signals.thread_block() {
        log::warn!("signals will not complete the file: {error}");
    }
    signals
}

/// Does something when the first of the signals comes.
fn on_signal(signals: SigSet, what: impl FnOnce() + Send + 'static) {
    let watch = move || {
        if signals.wait().is_ok() {
            what();
            // A second one means it.
            let _: nix::Result<()> = signals.thread_unblock();
            thread::park();
        }
    };
    if let Err(error) = thread::Builder::new().name("tl-signals".into()).spawn(watch) {
        log::warn!("signals will not complete the file: {error}");
    }
}

/// Whether whoever started this process has it ignore a signal, as nohup does with SIGHUP. One that is
/// blocked comes all the same.
fn is_ignored(signal: Signal) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|ignored| u64::from_str_radix(ignored.trim(), 16).ok());
    ignored.is_some_and(|ignored| ignored >> (signal as i32 - 1) & 1 != 0)
}

fn engine_config(args: &CaptureArgs) -> Result<EngineConfig, CaptureError> {
    let usage = |message: String| Err(CaptureError::Usage(message));
    if args.interfaces.len() > 16 {
        return usage(format!(
            "-i is given {} times, but at most 16 may be",
            args.interfaces.len()
        ));
    }
    for (at, name) in args.interfaces.iter().enumerate() {
        if args.interfaces[..at].contains(name) {
            return usage(format!("-i {name} is given twice"));
        }
    }
    let socket = SocketConfig {
        ring_size: args.ring_size,
        frame_size: args.frame_size,
        frames: args.umem_frames.unwrap_or(args.ring_size),
        zero_copy: args.zero_copy,
        need_wakeup: !args.no_need_wakeup,
        huge_pages: args.huge_pages,
        busy_poll: args.busy_poll.map(|micros| BusyPoll {
            micros: u32::from(micros.get()),
            budget: u32::from(args.busy_poll_budget.get()),
        }),
    };
    if let Err(SocketError::Config { name, value, limit }) = socket.check() {
        let flag = match name {
            "ring size" => "--ring-size",
            "UMEM frame size" => "--frame-size",
            _ => "--umem-frames",
        };
        return usage(format!("{flag} is {value}, but must be {limit}"));
    }
    let allowed = placement::allowed();
    for (flag, cpus) in [("--cpus", &args.cpus), ("--disk-cpus", &args.disk_cpus)] {
        if let Some(cpu) = cpus.iter().find(|cpu| !allowed.contains(cpu)) {
            let usable: Vec<_> = allowed.iter().map(usize::to_string).collect();
            return usage(format!(
                "{flag} has {cpu}, but the CPUs that this process may use are {}",
                usable.join(",")
            ));
        }
    }
    let object = match &args.ebpf_object {
        None => None,
        Some(path) => Some(
            fs::read(path).map_err(|source| CaptureError::Read { path: path.clone(), source })?,
        ),
    };
    let ring_bytes = match (args.bpf_ring_size, args.mode) {
        (None, Mode::Tap) => RING_BYTES,
        (None, Mode::Exclusive) => EXCLUSIVE_RING_BYTES,
        (Some(size), _) => match u32::try_from(size) {
            Ok(bytes @ 0x10_0000..=0x4000_0000) if bytes.is_power_of_two() => bytes,
            _ => {
                return usage(format!(
                    "--bpf-ring-size is {size} bytes, but must be a power of two from {} to {}",
                    1 << 20,
                    1 << 30
                ));
            }
        },
    };
    let path = match args.mode {
        Mode::Tap => CapturePath::Tap {
            hook: args.tap_hook,
            direction: args.direction,
            xdp: args.xdp,
            ring_bytes,
        },
        Mode::Exclusive if args.direction == Direction::Out => {
            return usage(
                "--direction out: --mode exclusive takes only what is received; use --mode tap"
                    .into(),
            );
        }
        Mode::Exclusive => {
            if args.transport == Transport::BpfRing && socket != SocketConfig::default() {
                return usage(
                    "--transport is bpf-ring, but --ring-size, --umem-frames, --frame-size, --zero-copy, \
                     --huge-pages, --busy-poll and --no-need-wakeup are of af-xdp"
                        .into(),
                );
            }
            CapturePath::Exclusive {
                xdp: args.xdp,
                mirror_port: args.mirror_port,
                transport: args.transport,
                socket,
                ring_bytes,
            }
        }
    };
    let interfaces = args
        .interfaces
        .iter()
        .map(|name| InterfaceConfig {
            name: name.clone(),
            path,
            promiscuous: !args.no_promiscuous_mode,
        })
        .collect();
    let (cpus, disk_cpus) = (args.cpus.clone(), args.disk_cpus.clone());
    Ok(EngineConfig { interfaces, cpus, disk_cpus, realtime: args.realtime, object })
}

/// What `-w` means: a pipe, a folder or a file.
fn target(write: &Path, args: &CaptureArgs) -> Result<Target, CaptureError> {
    use std::os::unix::{ffi::OsStrExt as _, fs::FileTypeExt as _};
    let rotates = args.rotate_bytes.is_some() || args.rotate_every.is_some();
    let stream = |stream: Box<dyn Write + Send>| {
        if rotates {
            return Err(CaptureError::Usage(
                "--rotate-bytes and --rotate-every need files, but -w is a stream".into(),
            ));
        }
        Ok(Target::Stream(stream))
    };
    if write == Path::new("-") {
        if io::stdout().is_terminal() {
            return Err(CaptureError::Usage(
                "-w - would write pcapng to the terminal; pipe it into another program, for example \
                 `| wireshark -k -i -`"
                    .into(),
            ));
        }
        return stream(Box::new(io::stdout()));
    }
    if write.as_os_str().is_empty() {
        return Err(CaptureError::Usage("-w is empty: give a file, a folder or -".into()));
    }
    let kind = fs::metadata(write).ok().map(|metadata| metadata.file_type());
    if write.as_os_str().as_bytes().ends_with(b"/") || kind.is_some_and(|kind| kind.is_dir()) {
        let prefix = format!("tapline_{}", jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ"));
        return Ok(Target::Directory { path: write.to_path_buf(), prefix });
    }
    if kind.is_some_and(|kind| kind.is_fifo() || kind.is_char_device() || kind.is_socket()) {
        let file = fs::OpenOptions::new()
            .write(true)
            .open(write)
            .map_err(|source| CaptureError::Read { path: write.to_path_buf(), source })?;
        return stream(Box::new(file));
    }
    Ok(Target::File(write.to_path_buf()))
}

fn announce(interfaces: &[Opened], filter: &Filter) {
    for opened in interfaces {
        eprint!("capturing on {}: {opened}", opened.name);
        match filter.to_string() {
            empty if empty.is_empty() => eprintln!(),
            filter => eprintln!(", filter: {filter}"),
        }
    }
}
