//! The load generator: stamped frames into one end of a veth pair, made in the kernel.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr},
    thread,
    time::{Duration, Instant},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData, PerCpuArray},
    programs::{ProgramError, TestRun as _, TestRunAttrs, TestRunOptions, Xdp, XdpMode},
};
use capture_ebpf::abi::generator::{CONFIG, Config, MAX_SHAPES, PROGRAM, SENT, Shape, Stamp};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use crate::{
    frames::Frame,
    netns::{Namespace, unique_name},
    veth::End,
};

/// What the generator sends.
#[derive(Clone, Debug)]
pub struct Template {
    /// Frame length without checksum, bytes: 60 to [`LONGEST`].
    pub length: usize,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// UDP source port of the first flow; the others follow.
    pub sport: u16,
    /// UDP destination port.
    pub dport: u16,
    /// Number of flows, taken in turn.
    pub flows: u32,
    /// Added to the CPU number in each stamp, to tell generators apart.
    pub source: u32,
    /// Lengths of the frames in turn, none above `length`; empty if all have that. IPv4 only.
    pub lengths: Vec<usize>,
}

impl Default for Template {
    fn default() -> Self {
        Self {
            length: 60,
            src: Ipv4Addr::new(10, 0, 0, 1).into(),
            dst: Ipv4Addr::new(10, 0, 0, 2).into(),
            sport: 1000,
            dport: 2000,
            flows: 1,
            source: 0,
            lengths: Vec::new(),
        }
    }
}

/// The longest frame that the kernel can send this way: a page less headroom and tailroom.
pub const LONGEST: usize = 3300;

/// Where the IPv4 header is, in all frames.
const IP_OFFSET: usize = 14;

/// The most that is sent in one system call, so that a deadline is not missed by much.
const CHUNK: u32 = 16384;

/// The shortest time between two calls of a paced generator.
const TURN: Duration = Duration::from_micros(50);

/// Frames of a closed loop that come slowly: they find everybody asleep.
const FIRST: u64 = 1024;

/// Frames that the kernel makes before it hands them on.
const BATCH: u32 = 64;

impl Template {
    fn headers(&self) -> Frame {
        Frame::new().ip(self.src, self.dst).udp(self.sport, self.dport)
    }

    fn stamp_offset(&self) -> usize {
        self.headers().build().len()
    }

    /// The frame as it leaves, but for its stamp and flow.
    pub fn frame(&self) -> Vec<u8> {
        assert!(self.length <= LONGEST, "{} is longer than {LONGEST}", self.length);
        self.headers().payload(&[0; size_of::<Stamp>()]).fill(self.length).build()
    }

    /// Reads the stamp of a frame that was made from this.
    pub fn stamp(&self, frame: &[u8]) -> Stamp {
        let at = self.stamp_offset();
        let word = |at: usize| u64::from_le_bytes(*frame[at..].first_chunk().unwrap());
        Stamp { sequence: word(at), source: word(at + 8) }
    }

    /// The source port of a frame that was made from this.
    pub fn flow(&self, frame: &[u8]) -> u16 {
        u16::from_be_bytes(*frame[self.stamp_offset() - 8..].first_chunk().unwrap())
    }

    /// The length of the frame with this number.
    pub fn length_of(&self, sequence: u64) -> usize {
        match self.lengths.len() {
            0 => self.length,
            count => self.lengths[(sequence % count as u64) as usize],
        }
    }

    /// What to cut each frame to, and how many of these there are.
    fn shapes(&self) -> ([Shape; MAX_SHAPES], u32) {
        let mut shapes = [Shape::default(); MAX_SHAPES];
        assert!(self.lengths.len() <= MAX_SHAPES, "{:?}", self.lengths);
        for (shape, length) in shapes.iter_mut().zip(&self.lengths) {
            assert!(self.src.is_ipv4() && *length <= self.length, "{self:?}");
            let frame = Self { length: *length, lengths: Vec::new(), ..self.clone() }.frame();
            let field = |at: usize| *frame[IP_OFFSET + at..].first_chunk().unwrap();
            *shape = Shape {
                length: *length as u32,
                ip_length: field(2),
                ip_checksum: field(10),
                udp_length: field(24),
                reserved: [0; 2],
            };
        }
        (shapes, self.lengths.len() as u32)
    }

    /// The frame that was sent with this stamp.
    pub fn expected(&self, stamp: Stamp) -> Vec<u8> {
        let length = self.length_of(stamp.sequence);
        let mut frame = Self { length, lengths: Vec::new(), ..self.clone() }.frame();
        let at = self.stamp_offset();
        frame[at..at + 8].copy_from_slice(&stamp.sequence.to_le_bytes());
        frame[at + 8..at + 16].copy_from_slice(&stamp.source.to_le_bytes());
        let port = u64::from(self.sport) + stamp.sequence % u64::from(self.flows);
        frame[at - 8..at - 6].copy_from_slice(&(port as u16).to_be_bytes());
        frame
    }
}

/// A generator at one end of a veth pair; the frames come out of the other.
///
/// The other end must have an XDP program or gather segments (GRO), or the kernel drops them.
pub struct Generator<'a> {
    namespace: &'a Namespace,
    template: Template,
    ebpf: Ebpf,
    sent: PerCpuArray<MapData, u64>,
    cpu: Option<usize>,
}

impl<'a> Generator<'a> {
    /// A generator that sends out of `end`.
    pub fn new(end: &End<'a>, template: Template) -> Self {
        let mut ebpf = EbpfLoader::new().load(capture_ebpf::GENERATOR).unwrap();
        let program: &mut Xdp = ebpf.program_mut(PROGRAM).unwrap().try_into().unwrap();
        program.load().unwrap();
        let mut config: Array<_, Config> = ebpf.take_map(CONFIG).unwrap().try_into().unwrap();
        let stamp_offset = template.stamp_offset() as u32;
        let (shapes, shape_count) = template.shapes();
        let value = Config {
            ifindex: end.index,
            flows: template.flows,
            first_port: template.sport.into(),
            port_offset: stamp_offset - 8,
            stamp_offset,
            source: template.source,
            shape_count,
            ip_offset: IP_OFFSET as u32,
            shapes,
        };
        config.set(0, value, 0).unwrap();
        let sent = ebpf.take_map(SENT).unwrap().try_into().unwrap();
        let program: &mut Xdp = ebpf.program_mut(PROGRAM).unwrap().try_into().unwrap();
        stay_known(end.namespace, program);
        Self { namespace: end.namespace, template, ebpf, sent, cpu: None }
    }

    /// Sends from this CPU only.
    #[must_use]
    pub fn pinned(mut self, cpu: usize) -> Self {
        self.cpu = Some(cpu);
        self
    }

    /// What it sends.
    pub fn template(&self) -> &Template {
        &self.template
    }

    /// How many it has sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.get(&0, 0).unwrap().iter().sum()
    }

    /// Sends exactly `count` frames, in bursts that a veth queue has room for.
    pub fn send(&self, count: u64) {
        self.inside(|program, frame| {
            let mut rest = count;
            while rest > 0 {
                let now = rest.min(BATCH.into()) as u32;
                self.burst(program, frame, now);
                rest -= u64::from(now);
                // Time to take them, also for a receiver that lives on this very CPU.
                thread::sleep(Duration::from_millis(1));
            }
        });
    }

    /// Sends `rate` frames a second for as long as `duration`; gives how many.
    pub fn send_paced(&self, rate: u64, duration: Duration) -> u64 {
        let before = self.sent();
        self.inside(|program, frame| {
            let start = Instant::now();
            let frames =
                |elapsed: Duration| (u128::from(rate) * elapsed.as_nanos() / 1_000_000_000) as u64;
            let total = frames(duration);
            // A call has a price of its own, and so all pay it equally often, whatever else the CPU does.
            let turn =
                Duration::from_nanos(u64::from(BATCH) * 1_000_000_000 / rate.max(1)).max(TURN);
            let (mut done, mut next) = (0, turn);
            while done < total {
                if let Some(early) = next.checked_sub(start.elapsed()) {
                    thread::sleep(early);
                }
                let due = frames(start.elapsed().max(next).min(duration)) - done;
                next += turn;
                let now = due.min(CHUNK.into()) as u32;
                if now > 0 {
                    self.burst(program, frame, now);
                    done += u64::from(now);
                }
            }
        });
        self.sent() - before
    }

    /// Sends as fast as what was sent is taken at the other end, for as long as `duration`, so that no
    /// more than `window` frames are on their way; gives how many. `taken` counts from now on.
    pub fn send_closed(
        &self,
        window: u64,
        duration: Duration,
        mut taken: impl FnMut() -> u64 + Send,
    ) -> u64 {
        let before = self.sent();
        self.inside(|program, frame| {
            let mut done = 0;
            while done < window.min(FIRST) {
                let now = (window - done).min(BATCH.into()) as u32;
                self.burst(program, frame, now);
                done += u64::from(now);
                thread::sleep(TURN);
            }
            let start = Instant::now();
            while start.elapsed() < duration {
                let room = (taken() + window).saturating_sub(done);
                // A call has a price of its own: not for a few frames.
                if room < window / 4 {
                    thread::sleep(Duration::from_micros(20));
                    continue;
                }
                let now = room.min(CHUNK.into()) as u32;
                self.burst(program, frame, now);
                done += u64::from(now);
            }
        });
        self.sent() - before
    }

    /// Sends as fast as it can for as long as `duration`; gives how many.
    pub fn flood(&self, duration: Duration) -> u64 {
        let start = Instant::now();
        self.flood_while(|| start.elapsed() < duration)
    }

    /// Sends as fast as it can while something holds; gives how many.
    pub fn flood_while(&self, mut holds: impl FnMut() -> bool + Send) -> u64 {
        let before = self.sent();
        self.inside(|program, frame| {
            while holds() {
                self.burst(program, frame, CHUNK);
            }
        });
        self.sent() - before
    }

    /// Sends some frames, in one go or in as many as it takes.
    fn burst(&self, program: &Xdp, frame: &[u8], count: u32) {
        let until = self.sent() + u64::from(count);
        let mut rest = count;
        while !run(program, frame, rest) {
            rest = until.saturating_sub(self.sent()) as u32;
            if rest == 0 {
                break;
            }
        }
    }

    fn inside(&self, body: impl FnOnce(&Xdp, &[u8]) + Send) {
        let program: &Xdp = self.ebpf.program(PROGRAM).unwrap().try_into().unwrap();
        let frame = self.template.frame();
        // The kernel looks the device up in the namespace of whoever starts the run.
        self.namespace.enter(|| {
            if let Some(cpu) = self.cpu {
                let mut cpus = CpuSet::new();
                cpus.set(cpu).unwrap();
                sched_setaffinity(Pid::from_raw(0), &cpus).unwrap();
            }
            body(program, &frame);
        });
    }
}

impl std::fmt::Debug for Generator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator").field("template", &self.template).finish_non_exhaustive()
    }
}

/// Attaches the program where no packet comes. The kernel makes every program that is run repeatedly known
/// to its XDP dispatcher and forgets it afterwards, and waits for all CPUs each time; one that is attached
/// somewhere stays known, and a run takes microseconds instead of tens of milliseconds.
/// <https://github.com/torvalds/linux/blob/v6.18/kernel/bpf/dispatcher.c>
fn stay_known(namespace: &Namespace, program: &mut Xdp) {
    let name = unique_name("k");
    namespace.run(&["ip", "link", "add", &name, "type", "veth"]);
    namespace.enter(|| program.attach(&name, XdpMode::Skb).unwrap());
}

/// Sends some frames; false when the kernel broke off, as it does when it has something else to say to the
/// thread.
fn run(program: &Xdp, frame: &[u8], count: u32) -> bool {
    let options = TestRunOptions {
        data_in: Some(frame),
        repeat: count,
        attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
        ..TestRunOptions::default()
    };
    match program.test_run(options) {
        Ok(_) => true,
        Err(ProgramError::SyscallError(error))
            if error.io_error.kind() == ErrorKind::Interrupted =>
        {
            false
        }
        Err(error) => panic!("{error}"),
    }
}
