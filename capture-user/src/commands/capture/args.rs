//! The command line of `tapline capture`.

use std::{
    num::{NonZeroU16, NonZeroU32},
    path::PathBuf,
    time::Duration,
};

use capture_ebpf::abi::MAX_SNAPLEN;
use nix::sched::CpuSet;

use super::super::{
    filter::FilterArgs,
    parse::{bytes, duration, whole},
};
use crate::{
    engine::Transport,
    filter::Direction,
    program::{TapHook, XdpMode},
    socket::ZeroCopy,
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
    #[arg(
        short,
        long = "interface",
        value_name = "IFACE",
        required_unless_present = "no_capture",
        conflicts_with = "no_capture"
    )]
    pub interfaces: Vec<String>,

    /// File to write, folder for a series of files per queue (an existing one, or a name that ends
    /// in /), or - for standard output
    #[arg(
        short,
        long = "write",
        value_name = "FILE|DIR|-",
        required_unless_present = "no_write",
        conflicts_with = "no_write"
    )]
    pub write: Option<PathBuf>,

    /// Which packets
    #[command(flatten)]
    pub filter: FilterArgs,

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
    #[arg(
        long, value_name = "BYTES", value_parser = bytes, help_heading = "Files",
        conflicts_with = "no_write",
    )]
    pub rotate_bytes: Option<u64>,

    /// Begin a new file after this time: 60s, 5m, 1h
    #[arg(
        long, value_name = "TIME", value_parser = duration, help_heading = "Files",
        conflicts_with = "no_write",
    )]
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

    /// By what packets reach userspace with --mode exclusive
    #[arg(long, value_enum, default_value = "auto", help_heading = "Capture path")]
    pub transport: Transport,

    /// Whether the driver writes packets straight into UMEM
    #[arg(long, value_enum, default_value = "auto", help_heading = "Capture path")]
    pub zero_copy: ZeroCopy,

    /// Size of each CPU's BPF ring, a power of two from 1M to 1G [default: 8M, with --mode exclusive 16M]
    #[arg(
        long, value_name = "BYTES", value_parser = bytes, alias = "tap-ring-size",
        help_heading = "Tuning",
    )]
    pub bpf_ring_size: Option<u64>,

    /// RX ring entries of each AF_XDP socket, a power of two from 64 to 65536
    #[arg(
        long, value_name = "N", default_value = "4096", help_heading = "Tuning",
        value_parser = whole::<u32>(64, 65536),
    )]
    pub ring_size: u32,

    /// UMEM frames per queue, a power of two, at least the ring size [default: the ring size]
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

    /// Fail where UMEM cannot lie on reserved huge pages (vm.nr_hugepages) [default: use them if free]
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
        long, value_name = "N", default_value = "64", help_heading = "Tuning",
        value_parser = whole::<u16>(2, 4096),
    )]
    pub buffers: u16,

    /// Size of a segment buffer, 128K to 1G
    #[arg(long, value_name = "BYTES", default_value = "256K", value_parser = bytes, help_heading = "Tuning")]
    pub buffer_size: u64,

    /// CPUs to run workers on, in this order: 2,3,4 [default: all, from the highest down; any with tap]
    #[arg(
        long, value_name = "LIST", value_delimiter = ',', help_heading = "Tuning",
        value_parser = whole::<usize>(0, CpuSet::count() - 1),
    )]
    pub cpus: Vec<usize>,

    /// CPUs that disk threads share: 0,1 [default: those without a worker, if there are any]
    #[arg(
        long, value_name = "LIST", value_delimiter = ',', help_heading = "Tuning",
        value_parser = whole::<usize>(0, CpuSet::count() - 1),
    )]
    pub disk_cpus: Vec<usize>,

    /// Let workers go before all threads that have no real-time priority (SCHED_FIFO): for a host that
    /// captures only
    #[arg(long, help_heading = "Tuning")]
    pub realtime: bool,

    /// Capture and encode, and throw away what was to be written: how fast is all but the disk? What
    /// is thrown away counts as written
    #[arg(long, conflicts_with = "no_capture", help_heading = "Measuring")]
    pub no_write: bool,

    /// Write packets that are made up, of --snaplen bytes (without it, 64), as fast as the disk takes
    /// them: how fast is the disk alone? No interface is needed
    #[arg(
        long, help_heading = "Measuring",
        conflicts_with_all = ["src", "dst", "sport", "dport", "proto", "sample", "direction", "mode"],
    )]
    pub no_capture: bool,

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
