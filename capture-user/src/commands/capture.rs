//! `tapline capture`.

use std::{
    fmt::Display,
    fs,
    io::{self, IsTerminal as _, Write},
    num::{NonZeroU16, NonZeroU32},
    path::{Path, PathBuf},
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use capture_ebpf::abi::MAX_SNAPLEN;
use nix::{
    sched::{CpuSet, sched_getaffinity},
    sys::signal::{SigSet, Signal},
    unistd::Pid,
};
use thiserror::Error;

use crate::{
    engine::{
        CapturePath, Ending, Engine, EngineConfig, EngineError, InterfaceConfig, Job, JobSpec,
        MIN_BUFFER, Opened, Progress, StartError, Summary,
    },
    filter::{Direction, Filter, FilterError, Prefix, Protocol},
    nic,
    program::{TapHook, XdpMode},
    segment::{Rotation, Target},
    socket::{BusyPoll, SocketConfig, SocketError, ZeroCopy},
};

/// Capture packets into pcapng files.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Filters are ANDed. Without any, every packet is captured. \
Without a limit, the capture runs until Ctrl-C or SIGTERM; then the rings are drained, the file is \
completed and the summary printed.

Exit status: 0 done, 1 failed, 2 usage.")]
#[expect(clippy::struct_excessive_bools, reason = "flags are bools")]
#[expect(clippy::doc_markdown, reason = "it is the help text, not Markdown")]
pub struct CaptureArgs {
    /// Interface to capture on; repeat for several, up to 16
    #[arg(short, long = "interface", value_name = "IFACE", required = true)]
    pub interfaces: Vec<String>,

    /// File to write, folder for a series of files per queue (an existing one, or a name that ends
    /// in /), or - for standard output
    #[arg(short, long = "write", value_name = "FILE|DIR|-", required = true)]
    pub write: PathBuf,

    /// Source address or network: 192.0.2.1, 10.0.0.0/8, 2001:db8::/32
    #[arg(long, value_name = "ADDR[/LEN]", help_heading = "Filter")]
    pub src: Option<Prefix>,

    /// Destination address or network
    #[arg(long, value_name = "ADDR[/LEN]", help_heading = "Filter")]
    pub dst: Option<Prefix>,

    /// Source port, 0 to 65535
    #[arg(
        long, value_name = "PORT", value_parser = whole::<u16>(0, u16::MAX),
        help_heading = "Filter",
    )]
    pub sport: Option<u16>,

    /// Destination port, 0 to 65535
    #[arg(
        long, value_name = "PORT", value_parser = whole::<u16>(0, u16::MAX),
        help_heading = "Filter",
    )]
    pub dport: Option<u16>,

    /// Upper-layer protocol: tcp, udp, sctp, icmp, icmp6 and others, or a number from 0 to 255
    #[arg(long, value_name = "NAME|N", help_heading = "Filter")]
    pub proto: Option<Protocol>,

    /// Keep one in N of the packets that match, at random, 1 to 4294967295
    #[arg(
        long, value_name = "N", default_value = "1", help_heading = "Filter",
        value_parser = whole::<NonZeroU32>(NonZeroU32::MIN, NonZeroU32::MAX),
    )]
    pub sample: NonZeroU32,

    /// Keep at most this many bytes of each packet; 0 keeps all
    #[arg(
        short, long, value_name = "BYTES", default_value = "0", help_heading = "Filter",
        value_parser = whole::<u32>(0, MAX_SNAPLEN),
    )]
    pub snaplen: u32,

    /// Stop after exactly this many packets
    #[arg(
        short = 'c', long, value_name = "N", help_heading = "Limits",
        value_parser = whole::<u64>(1, u64::MAX),
    )]
    pub packets: Option<u64>,

    /// Stop before the captured bytes of packets exceed this: 500000, 64K, 10M, 2G (powers of 1024)
    #[arg(long, value_name = "BYTES", value_parser = bytes, help_heading = "Limits")]
    pub bytes: Option<u64>,

    /// Stop after this time: 500ms, 30s, 5m, 2h
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Limits")]
    pub duration: Option<Duration>,

    /// Begin a new file before one would exceed this many bytes (at least 256K)
    #[arg(long, value_name = "BYTES", value_parser = bytes, help_heading = "Files")]
    pub rotate_bytes: Option<u64>,

    /// Begin a new file after this time: 60s, 5m, 1h
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Files")]
    pub rotate_every: Option<Duration>,

    /// How packets are taken
    #[arg(long, value_enum, default_value = "tap", help_heading = "Capture path")]
    pub mode: Mode,

    /// Which way packets go
    #[arg(long, value_enum, default_value = "both", help_heading = "Filter")]
    pub direction: Direction,

    /// Where `tap` takes its copies
    #[arg(long, value_enum, default_value = "auto", help_heading = "Capture path")]
    pub tap_hook: TapHook,

    /// Do not put the interface into promiscuous mode
    #[arg(short = 'p', long, help_heading = "Capture path")]
    pub no_promiscuous_mode: bool,

    /// The interface only receives a copy of other hosts' traffic (mirror, SPAN or TAP port): take
    /// packets although it carries an address or a default route
    #[arg(long, help_heading = "Capture path")]
    pub mirror_port: bool,

    /// Where the XDP program runs, with --mode exclusive and --tap-hook xdp
    #[arg(long, value_enum, default_value = "auto", help_heading = "Capture path")]
    pub xdp: XdpMode,

    /// Whether the driver writes packets straight into UMEM
    #[arg(long, value_enum, default_value = "auto", help_heading = "Capture path")]
    pub zero_copy: ZeroCopy,

    /// Size of each CPU's ring with --mode tap, a power of two from 1M to 1G
    #[arg(long, value_name = "BYTES", default_value = "8M", value_parser = bytes, help_heading = "Tuning")]
    pub tap_ring_size: u64,

    /// RX ring entries per queue with --mode exclusive, a power of two from 64 to 65536
    #[arg(
        long, value_name = "N", default_value = "4096", help_heading = "Tuning",
        value_parser = whole::<u32>(64, 65536),
    )]
    pub ring_size: u32,

    /// UMEM frames per queue, a power of two, at least twice the ring size [default: twice the ring
    /// size]
    #[arg(
        long, value_name = "N", value_parser = whole::<u32>(128, 1 << 20),
        help_heading = "Tuning",
    )]
    pub umem_frames: Option<u32>,

    /// UMEM frame size, bytes: 2048 or 4096
    #[arg(
        long, value_name = "BYTES", default_value = "2048", help_heading = "Tuning",
        value_parser = whole::<u32>(2048, 4096),
    )]
    pub frame_size: u32,

    /// Put UMEM on huge pages (they must have been reserved: vm.nr_hugepages)
    #[arg(long, help_heading = "Tuning")]
    pub huge_pages: bool,

    /// Do not use the need-wakeup flag of the rings
    #[arg(long, help_heading = "Tuning")]
    pub no_need_wakeup: bool,

    /// Preferred busy polling, microseconds per system call; also set the interface's
    /// napi_defer_hard_irqs and gro_flush_timeout
    #[arg(
        long, value_name = "MICROS", help_heading = "Tuning",
        value_parser = whole::<NonZeroU16>(NonZeroU16::MIN, NonZeroU16::MAX),
    )]
    pub busy_poll: Option<NonZeroU16>,

    /// Most packets per busy poll
    #[arg(
        long, value_name = "N", default_value = "64", help_heading = "Tuning",
        value_parser = whole::<NonZeroU16>(NonZeroU16::MIN, NonZeroU16::MAX),
    )]
    pub busy_poll_budget: NonZeroU16,

    /// Segment buffers per queue, 2 to 4096: they bridge the time that the disk takes
    #[arg(
        long, value_name = "N", default_value = "16", help_heading = "Tuning",
        value_parser = whole::<u16>(2, 4096),
    )]
    pub buffers: u16,

    /// Size of a segment buffer, 128K to 1G
    #[arg(long, value_name = "BYTES", default_value = "1M", value_parser = bytes, help_heading = "Tuning")]
    pub buffer_size: u64,

    /// CPUs to run workers on, in this order: 2,3,4 [default: all, from the highest down]
    #[arg(
        long, value_name = "LIST", value_delimiter = ',', help_heading = "Tuning",
        value_parser = whole::<usize>(0, CpuSet::count() - 1),
    )]
    pub cpus: Vec<usize>,

    /// Use this eBPF object in place of the embedded one
    #[arg(long, value_name = "FILE", help_heading = "Tuning")]
    pub ebpf_object: Option<PathBuf>,

    /// Print the summary as JSON, to standard output (to standard error with -w -)
    #[arg(long)]
    pub json: bool,

    /// Say nothing but errors and warnings: no live line, no summary
    #[arg(short, long)]
    pub quiet: bool,
}

/// How packets are taken.
#[expect(clippy::doc_markdown, reason = "it is the help text, not Markdown")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Copies: the host's own stack sees every packet untouched, and both directions are captured
    Tap,
    /// Redirects what is received into AF_XDP sockets, the fastest there is: the host's own stack does not see captured packets. For mirror, SPAN and TAP ports
    Exclusive,
}

/// Reads a whole number; when it is none, or not in range, the error says what would be.
fn whole<T>(least: T, most: T) -> impl Fn(&str) -> Result<T, String> + Clone
where
    T: FromStr + PartialOrd + Display + Copy,
{
    move |text| match text.parse() {
        Ok(number) if least <= number && number <= most => Ok(number),
        _ => Err(format!("give a whole number from {least} to {most}")),
    }
}

/// Bytes with an optional unit of powers of 1024.
fn bytes(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor: u64 = match &lower[digits.len()..] {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return Err("give a whole number of bytes, or one with K, M, G or T".into()),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_error| "give a whole number of bytes, or one with K, M, G or T")?;
    match number.checked_mul(factor) {
        Some(0) => Err("must be at least 1 byte".into()),
        Some(bytes) => Ok(bytes),
        None => Err(format!("must be at most {} bytes", u64::MAX)),
    }
}

/// A duration of at least a millisecond and at most a year.
fn duration(text: &str) -> Result<Duration, String> {
    const YEAR: Duration = Duration::from_hours(365 * 24);
    let limit = "give a time with a unit, from 1ms to 365days: 500ms, 30s, 5m, 2h";
    let duration = text
        .parse::<u64>()
        .map(Duration::from_secs)
        .or_else(|_| humantime::parse_duration(text))
        .map_err(|_error| limit)?;
    if duration < Duration::from_millis(1) || duration > YEAR {
        return Err(limit.into());
    }
    Ok(duration)
}

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

impl From<FilterError> for CaptureError {
    fn from(error: FilterError) -> Self {
        Self::Usage(match &error {
            FilterError::Families { .. } => format!("--src and --dst: {error}"),
            FilterError::NoPorts(_) => format!("--sport, --dport and --proto: {error}"),
            _ => error.to_string(),
        })
    }
}

/// Runs a capture to its end.
pub fn run(args: &CaptureArgs) -> Result<(), CaptureError> {
    let filter = filter(args)?;
    let config = engine_config(args)?;
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
    // A named pipe opens when its reader does; until then Ctrl-C ends the program.
    let target = target(&args.write, args)?;
    // Before any thread starts, so that all of them leave these to the one that waits for them.
    let mut signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    if !is_ignored(Signal::SIGHUP) {
        signals.add(Signal::SIGHUP);
    }
    if let Err(error) = signals.thread_block() {
        log::warn!("signals will not complete the file: {error}");
    }
    let engine = Engine::open(&config)?;
    let job = engine.start(JobSpec {
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
    })?;
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
    let watch = move || {
        if signals.wait().is_ok() {
            stopper.stop();
            // A second one means it.
            let _: nix::Result<()> = signals.thread_unblock();
            thread::park();
        }
    };
    if let Err(error) = thread::Builder::new().name("tl-signals".into()).spawn(watch) {
        log::warn!("signals will not complete the file: {error}");
    }
    let summary = watch_job(job, args.quiet).ok_or(CaptureError::Ended)?;
    drop(engine);
    report(&summary, args).map_err(CaptureError::Print)?;
    match summary.ending {
        Ending::Failed(reason) => Err(CaptureError::Failed(reason)),
        _ => Ok(()),
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

fn filter(args: &CaptureArgs) -> Result<Filter, CaptureError> {
    let filter = Filter {
        src: args.src,
        dst: args.dst,
        sport: args.sport,
        dport: args.dport,
        protocol: args.proto,
    };
    filter.check()?;
    Ok(filter)
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
        frames: args.umem_frames.unwrap_or(args.ring_size.saturating_mul(2)),
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
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    let allowed = |cpu: &usize| allowed.is_set(*cpu).unwrap_or(false);
    if let Some(cpu) = args.cpus.iter().find(|cpu| !allowed(cpu)) {
        let usable: Vec<_> =
            (0..CpuSet::count()).filter(allowed).map(|cpu| cpu.to_string()).collect();
        return usage(format!(
            "--cpus has {cpu}, but the CPUs that this process may use are {}",
            usable.join(",")
        ));
    }
    let object = match &args.ebpf_object {
        None => None,
        Some(path) => Some(
            fs::read(path).map_err(|source| CaptureError::Read { path: path.clone(), source })?,
        ),
    };
    let ring_bytes = u32::try_from(args.tap_ring_size).unwrap_or(0);
    if !ring_bytes.is_power_of_two() || !(1 << 20..=1 << 30).contains(&ring_bytes) {
        return usage(format!(
            "--tap-ring-size is {} bytes, but must be a power of two from {} to {}",
            args.tap_ring_size,
            1 << 20,
            1 << 30
        ));
    }
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
            CapturePath::Exclusive { xdp: args.xdp, mirror_port: args.mirror_port, socket }
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
    Ok(EngineConfig { interfaces, cpus: args.cpus.clone(), object })
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

/// Waits for the end, with a live line if a person is watching.
fn watch_job(job: Job, quiet: bool) -> Option<Summary> {
    const EVERY: Duration = Duration::from_secs(1);
    if quiet || !io::stderr().is_terminal() {
        return job.wait();
    }
    let mut before = (Instant::now(), Progress::default());
    loop {
        if let Some(summary) = job.wait_for(EVERY) {
            eprint!("\r\x1b[K");
            return Some(summary);
        }
        if let Some(progress) = job.progress() {
            let now = Instant::now();
            let seconds = (now - before.0).as_secs_f64();
            eprint!("\r\x1b[K{}", live_line(&progress, &before.1, seconds));
            before = (now, progress);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
fn live_line(now: &Progress, before: &Progress, seconds: f64) -> String {
    let rate = (now.captured.packets - before.captured.packets) as f64 / seconds;
    let mut line = format!(
        "{} packets, {}, {} packets/s",
        now.captured.packets,
        scaled(now.captured.bytes as f64, "B"),
        scaled(rate, ""),
    );
    match now.drops.total() {
        0 => line += ", none dropped",
        total => {
            line += &format!(", {total} dropped:");
            for (name, count, _) in now.drops.named() {
                if count > 0 {
                    line += &format!(" {name} {count}");
                }
            }
        }
    }
    line
}

fn scaled(value: f64, unit: &str) -> String {
    let scales = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match scales.iter().find(|(scale, _)| value >= *scale) {
        Some((scale, prefix)) => format!("{:.2} {prefix}{unit}", value / scale),
        None => format!("{value:.0} {unit}").trim_end().to_owned(),
    }
}

/// The end of a capture: for scripts or for people.
fn report(summary: &Summary, args: &CaptureArgs) -> io::Result<()> {
    if args.json {
        let line = serde_json::to_string(summary).map_err(io::Error::other)?;
        return if args.write == Path::new("-") {
            writeln!(io::stderr(), "{line}")
        } else {
            writeln!(io::stdout(), "{line}")
        };
    }
    if args.quiet {
        return Ok(());
    }
    io::stderr().write_all(in_words(summary).as_bytes())
}

fn in_words(summary: &Summary) -> String {
    let law = &summary.law;
    let mut text = format!(
        "{} packets seen in {:.3} s\n{} hits, {} bytes\n= {} written, {} bytes\n",
        summary.seen,
        summary.seconds,
        law.hits.packets,
        law.hits.bytes,
        law.written.packets,
        law.written.bytes,
    );
    text += &format!("+ {} dropped\n", law.drops.total());
    for (name, count, meaning) in law.drops.named() {
        if count > 0 {
            text += &format!("    {name} {count}: {meaning}\n");
        }
    }
    for segment in &summary.segments {
        text += &format!(
            "{}: {} packets, {} bytes\n",
            segment.path.display(),
            segment.packets,
            segment.size
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_units_and_refused_with_the_limit() {
        assert_eq!(bytes("500000"), Ok(500_000));
        assert_eq!(bytes("64K"), Ok(65_536));
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes("0"), Err("must be at least 1 byte".into()));
        assert!(bytes("1.5M").is_err() && bytes("").is_err() && bytes("M").is_err());
        assert!(bytes("99999999999999999999").is_err() && bytes("99999999T").is_err());
    }

    #[test]
    fn durations_are_read_with_units_and_refused_with_the_limit() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("1h 30m"), Ok(Duration::from_mins(90)));
        assert!(duration("0s").is_err() && duration("400days").is_err() && duration("x").is_err());
    }

    #[test]
    fn the_live_line_shows_rate_and_drops_by_cause() {
        let mut now = Progress::default();
        now.captured.packets = 3_000_000;
        now.captured.bytes = 192_000_000;
        let line = live_line(&now, &Progress::default(), 1.0);
        assert_eq!(line, "3000000 packets, 192.00 MB, 3.00 M packets/s, none dropped");
        now.drops.rx_ring_full = 7;
        assert!(live_line(&now, &now, 1.0).ends_with("7 dropped: rx_ring_full 7"));
    }
}
