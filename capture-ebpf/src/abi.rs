//! The layouts and names that the kernel programs and userspace share.
//!
//! Every structure is `repr(C)` without padding and has its size asserted: what one side writes is
//! what the other reads. All integers are in the host's byte order.

/// Jobs that one interface can carry at once: one bit each in a `u64`.
pub const MAX_JOBS: usize = 64;

/// Receive queues per interface that the socket map has room for.
pub const MAX_QUEUES: u32 = 256;

/// CPUs that the array of rings has room for.
pub const MAX_CPUS: usize = 1024;

/// Program names, as in the object's symbol table.
pub mod programs {
    /// XDP: redirects hits into `AF_XDP` sockets, passes the rest.
    pub const EXCLUSIVE: &str = "exclusive";
    /// XDP: copies hits into this CPU's ring and drops them, passes the rest.
    pub const EXCLUSIVE_COPY: &str = "exclusive_copy";
    /// tcx or clsact ingress: copies hits into this CPU's ring, lets everything go on.
    pub const TAP_INGRESS: &str = "tap_ingress";
    /// tcx or clsact egress: the same.
    pub const TAP_EGRESS: &str = "tap_egress";
    /// XDP: the same for what is received, before the kernel makes an skb.
    pub const TAP_XDP: &str = "tap_xdp";
}

/// Map names.
pub mod maps {
    /// Array with one [`super::Switch`].
    pub const SWITCH: &str = "SWITCH";
    /// Two [`crate::classify::Tables`], of which one is in use.
    pub const TABLES: &str = "TABLES";
    /// Source port → set of the jobs that ask for it.
    pub const SPORTS: &str = "SPORTS";
    /// Destination port → set of the jobs that ask for it.
    pub const DPORTS: &str = "DPORTS";
    /// One [`super::Counters`] per CPU.
    pub const COUNTERS: &str = "COUNTERS";
    /// Receive queue → `AF_XDP` socket.
    pub const SOCKETS: &str = "SOCKETS";
    /// The CPUs' rings: for each one after the other its [`super::Piece`]s.
    pub const RINGS: &str = "RINGS";
    /// CPU → [`super::Positions`].
    pub const POSITIONS: &str = "POSITIONS";
    /// CPU → BPF ring buffer, by which the ring's reader is woken.
    pub const BELLS: &str = "BELLS";
}

/// Names of constants that userspace sets when it loads the programs.
pub mod globals {
    /// A byte: not 0 where the CPU lets others see its stores in their order.
    pub const STORES_IN_ORDER: &str = "STORES_IN_ORDER";
}

/// What the programs read first. In one place, as each lookup costs a packet some nanoseconds; what one write
/// changes is one word.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Switch {
    /// The set of active jobs. A job's bit is set last when it starts and cleared first when it ends, so
    /// the rest of its state is never read half-written.
    pub active: u64,
    /// The table generation; its lowest bit says which of the two `TABLES` is read.
    pub generation: u64,
    /// Size of each CPU's ring, bytes: some [`PIECE`]s, a power of two of them.
    pub ring_bytes: u64,
}

const _: () = assert!(size_of::<Switch>() == 3 * 8);

/// Marks a [`Header`]. What a frame holds of an earlier packet has it, too, and an earlier time, by which
/// userspace tells them apart.
pub const HEADER_MAGIC: u32 = 0x7470_6c31;

/// What travels in front of each packet that the kernel hands over.
///
/// On the `exclusive` path it is XDP metadata, or, where the driver has none, the first bytes of the
/// frame itself. 32 bytes is the most that every kernel accepts as metadata.
/// <https://github.com/torvalds/linux/blob/v6.1/include/net/xdp.h#L386-L389>
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// [`HEADER_MAGIC`].
    pub magic: u32,
    /// Length of the packet on the wire, bytes.
    pub original_len: u32,
    /// `CLOCK_MONOTONIC` when the program saw the packet, nanoseconds.
    pub time_ns: u64,
    /// The jobs that the packet is a hit of, one bit each.
    pub jobs: u64,
    /// Receive queue; on the `tap` path, the CPU.
    pub queue: u16,
    /// [`DIRECTION_IN`] or [`DIRECTION_OUT`].
    pub direction: u8,
    /// The lowest 8 bits of the generation of the tables that it was matched and sampled by.
    pub generation: u8,
    /// The VLAN tag that the kernel keeps beside an skb, as it stands in a frame: TPID in the upper 16
    /// bits, TCI in the lower; 0 is none.
    pub vlan: u32,
}

const _: () = assert!(size_of::<Header>() == 32);

/// Length of [`Header`].
pub const HEADER_LEN: usize = size_of::<Header>();

/// What precedes each packet's bytes in a ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// As in front of a frame.
    pub header: Header,
    /// Bytes of the packet that follow.
    pub captured: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<Record>() == 40);

/// Length of [`Record`].
pub const RECORD_LEN: usize = size_of::<Record>();

/// Most bytes that are kept of a packet: what libpcap calls `MAXIMUM_SNAPLEN`.
pub const MAX_SNAPLEN: u32 = 262_144;

/// The part of a ring, in bytes, that the verifier sees as one array: a power of two.
pub const PIECE: usize = 1 << 20;

/// A part of a ring. A record begins in the first [`PIECE`] bytes and may end in the rest, so that it is never
/// split; the next one then begins in the next piece. Whole pages, of up to 64 KiB.
pub type Piece = [u8; PIECE + (5 << 16)];

const _: () = assert!(size_of::<Piece>() - PIECE >= RECORD_LEN + MAX_SNAPLEN as usize);

/// How far a ring has been written and read, in bytes since it was made; each on cache lines of its own, as
/// CPUs fetch two at once.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Positions {
    /// Written by the kernel program, when a record is complete.
    pub produced: u64,
    reserved: [u64; 15],
    /// Written by the reader, when it no longer needs what is before.
    pub consumed: u64,
    reserved_too: [u64; 15],
}

const _: () = assert!(size_of::<Positions>() == 256);

/// The position behind a record at this one.
#[inline(always)]
pub const fn position_after(position: u64, captured: u32) -> u64 {
    const PIECE: u64 = self::PIECE as u64;
    let end = position + (RECORD_LEN as u64 + captured as u64).next_multiple_of(8);
    let next_piece = (position & !(PIECE - 1)) + PIECE;
    if end < next_piece { end } else { next_piece }
}

/// The packet was received, as `epb_flags` counts directions.
pub const DIRECTION_IN: u8 = 1;

/// The packet was sent, as `epb_flags` counts directions.
pub const DIRECTION_OUT: u8 = 2;

/// What became of a packet in the kernel program. Each packet has exactly one outcome, so their sum
/// is [`Counters::packets`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No job was active; passed on.
    Idle = 0,
    /// No active job's filter accepts it; passed on.
    NoMatch = 1,
    /// Some filter accepts it, but the random draw left it out for each such job; passed on.
    SampledOut = 2,
    /// Handed over to the queue's `AF_XDP` socket.
    Redirected = 3,
    /// A hit, but its queue has no socket; passed on, not captured.
    NoSocket = 4,
    /// A hit, but the driver left no room for the header; passed on, not captured.
    NoHeader = 5,
    /// Copied into this CPU's ring; passed on, or, on the `exclusive` path, dropped.
    Copied = 6,
    /// A hit, but this CPU's ring was full; not captured, otherwise the same.
    RingFull = 7,
}

/// Number of [`Outcome`]s.
pub const OUTCOMES: usize = 8;

/// Every [`Outcome`] with its name in statistics.
pub const OUTCOME_NAMES: [(Outcome, &str); OUTCOMES] = [
    (Outcome::Idle, "idle"),
    (Outcome::NoMatch, "no_match"),
    (Outcome::SampledOut, "sampled_out"),
    (Outcome::Redirected, "redirected"),
    (Outcome::NoSocket, "no_socket"),
    (Outcome::NoHeader, "no_header"),
    (Outcome::Copied, "copied"),
    (Outcome::RingFull, "ring_full"),
];

/// What the kernel counts for one job on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobCounters {
    /// Packets that the filter and the sampling accept.
    pub hits: u64,
    /// Their lengths on the wire, bytes.
    pub bytes: u64,
    /// Hits that found no socket on their queue.
    pub no_socket: u64,
    /// Hits that the driver left no room to hand over.
    pub no_header: u64,
    /// Hits that found this CPU's ring full.
    pub ring_full: u64,
}

/// What the kernel counts on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Packets that reached the program.
    pub packets: u64,
    /// Packets by [`Outcome`].
    pub outcomes: [u64; OUTCOMES],
    /// Per job, by slot.
    pub jobs: [JobCounters; MAX_JOBS],
}

impl Counters {
    /// Nothing counted.
    pub const ZERO: Self = Self {
        packets: 0,
        outcomes: [0; OUTCOMES],
        jobs: [JobCounters { hits: 0, bytes: 0, no_socket: 0, no_header: 0, ring_full: 0 };
            MAX_JOBS],
    };
}

const _: () = assert!(size_of::<JobCounters>() == 40);
const _: () = assert!(size_of::<Counters>() == 8 + 8 * OUTCOMES + 40 * MAX_JOBS);

/// Names and layouts of what tests and benches run.
pub mod generator {
    /// XDP program for `BPF_PROG_TEST_RUN` with live frames: stamps its frame and redirects it.
    pub const PROGRAM: &str = "generate";
    /// XDP program that only passes.
    pub const PASS: &str = "pass";
    /// XDP program that only drops.
    pub const DROP: &str = "drop";
    /// XDP program that redirects everything into the sockets in [`SOCKETS`], and drops the rest.
    pub const RECEIVE: &str = "receive";
    /// tc program that lets every packet go on.
    pub const LOOK_ON: &str = "look_on";
    /// XDP program that makes room for metadata again and then runs the one in [`MEASURED`].
    pub const AGAIN: &str = "again";
    /// Program array with one entry.
    pub const MEASURED: &str = "MEASURED";
    /// Receive queue → `AF_XDP` socket.
    pub const SOCKETS: &str = "SOCKETS";
    /// Receive queues that it has room for.
    pub const QUEUES: u32 = 64;
    /// Array with one [`Config`].
    pub const CONFIG: &str = "CONFIG";
    /// Per-CPU array with one `u64`: frames generated.
    pub const SENT: &str = "SENT";

    /// What to do to each frame.
    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Config {
        /// Device whose peer gets the frames.
        pub ifindex: u32,
        /// Number of flows; flow `n % flows` gets UDP source port `first_port + n % flows`.
        pub flows: u32,
        /// Lowest source port.
        pub first_port: u32,
        /// Offset of the source port in the frame; 0 leaves it alone.
        pub port_offset: u32,
        /// Offset of a [`Stamp`]; 0 leaves the payload alone.
        pub stamp_offset: u32,
        /// Added to the CPU number in the stamp, to tell generators apart.
        pub source: u32,
        /// How many of `shapes` are taken in turn; 0 leaves every frame as it is.
        pub shape_count: u32,
        /// Where the IPv4 header is, if there are shapes.
        pub ip_offset: u32,
        /// Lengths that frames are cut to.
        pub shapes: [Shape; MAX_SHAPES],
    }

    /// Most [`Shape`]s: enough for the 7, 4 and 1 of the usual mix of sizes (IMIX).
    pub const MAX_SHAPES: usize = 12;

    /// A length, and what the headers of an IPv4/UDP frame of that length have to say. Integers of the
    /// headers are in network order.
    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Shape {
        /// Frame length, bytes: at most that of the template.
        pub length: u32,
        /// IPv4's total length.
        pub ip_length: [u8; 2],
        /// IPv4's header checksum.
        pub ip_checksum: [u8; 2],
        /// UDP's length.
        pub udp_length: [u8; 2],
        /// Zero.
        pub reserved: [u8; 2],
    }

    /// What a stamped frame carries, little-endian and unaligned.
    #[repr(C)]
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Stamp {
        /// Count of frames from this source before this one.
        pub sequence: u64,
        /// [`Config::source`] plus the CPU number.
        pub source: u64,
    }

    const _: () = assert!(size_of::<Shape>() == 12);
    const _: () = assert!(size_of::<Config>() == 32 + 12 * MAX_SHAPES);
    const _: () = assert!(size_of::<Stamp>() == 16);
}
