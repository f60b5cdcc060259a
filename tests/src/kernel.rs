//! The kernel program on single frames, through `BPF_PROG_TEST_RUN`.

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapData, PerCpuArray},
    programs::{SchedClassifier, TestRun, TestRunOptions, TestRunResult, Xdp},
};
use capture_ebpf::{
    abi::{
        Counters, DIRECTION_IN, DIRECTION_OUT, HEADER_LEN, HEADER_MAGIC, Header, MAX_JOBS, Switch,
        maps, programs,
    },
    classify::Tables,
};
use capture_user::{
    filter::{Rules, tables},
    program::RingSizes,
};

/// The kernel accepts no frame shorter than an Ethernet header for a test run.
/// `bpf_prog_test_run_xdp` in <https://github.com/torvalds/linux/blob/v6.6/net/bpf/test_run.c>
pub const SHORTEST: usize = 14;

/// What a program may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// `XDP_PASS`
    Pass,
    /// `XDP_REDIRECT`
    Redirect,
}

/// What the program did with a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Its answer.
    pub action: Action,
    /// What it put in front of a hit.
    pub header: Option<Header>,
    /// The frame behind that.
    pub frame: Vec<u8>,
}

impl Verdict {
    /// The jobs that the frame is a hit of.
    pub fn jobs(&self) -> u64 {
        self.header.map_or(0, |header| header.jobs)
    }
}

/// Runs the program on one frame.
pub fn run(program: &Xdp, frame: &[u8]) -> Verdict {
    let mut out = vec![0; frame.len() + HEADER_LEN];
    let options = TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut out),
        ..TestRunOptions::default()
    };
    let result = program.test_run(options).unwrap();
    let action = match result.return_value {
        2 => Action::Pass,
        4 => Action::Redirect,
        other => panic!("the program answers {other}"),
    };
    let length = result.data_size_out as usize;
    out.truncate(length);
    // What comes out begins with the metadata, if there is any.
    let header = match length - frame.len() {
        0 => None,
        HEADER_LEN => Some(read_header(&out)),
        other => panic!("{other} bytes of metadata"),
    };
    Verdict { action, header, frame: out.split_off(length - frame.len()) }
}

/// Rings for all CPUs, as small as can be.
pub fn rings() -> RingSizes {
    let cpus = std::thread::available_parallelism().unwrap().get() as u32;
    RingSizes { last_cpu: cpus - 1, bytes: 1 << 20 }
}

/// A program that copies into rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tap {
    /// At tc, for what is received.
    Ingress,
    /// At tc, for what is sent.
    Egress,
    /// At XDP, for what is received.
    Xdp,
    /// The same of the `exclusive` path, which drops what it copies.
    Exclusive,
}

impl Tap {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ingress, Self::Egress, Self::Xdp, Self::Exclusive];

    /// The longest frame that the kernel accepts for a test run: of an skb, what a page has left.
    /// `bpf_test_init` in <https://github.com/torvalds/linux/blob/v6.6/net/bpf/test_run.c>
    pub const fn longest(self) -> usize {
        match self {
            Self::Ingress | Self::Egress => 3500,
            Self::Xdp | Self::Exclusive => 60_000,
        }
    }

    /// Whether the kernel accepts a frame for a test run. Of an skb, newer ones want the whole IP
    /// header that the Ethertype promises.
    /// `bpf_prog_test_run_skb` in <https://github.com/torvalds/linux/blob/v6.18/net/bpf/test_run.c>
    pub fn accepts(self, frame: &[u8]) -> bool {
        let least = match (self, frame.get(12..14)) {
            (Self::Xdp | Self::Exclusive, _) => SHORTEST,
            (_, Some([0x08, 0x00])) => SHORTEST + 20,
            (_, Some([0x86, 0xdd])) => SHORTEST + 40,
            _ => SHORTEST,
        };
        (least..=self.longest()).contains(&frame.len())
    }

    /// What its packets' header says.
    pub const fn direction(self) -> u8 {
        match self {
            Self::Ingress | Self::Xdp | Self::Exclusive => DIRECTION_IN,
            Self::Egress => DIRECTION_OUT,
        }
    }
}

/// Runs a program that copies on one frame, which must come out as it went in; says whether it goes on.
pub fn pass<P>(program: &P, frame: &[u8]) -> bool
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut out = vec![0; frame.len()];
    let options = TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut out),
        ..TestRunOptions::default()
    };
    let result = program.test_run(options).unwrap();
    assert_eq!(result.data_size_out as usize, frame.len());
    assert!(out == frame, "the frame itself is left alone");
    match result.return_value {
        // `XDP_PASS`, `TCX_NEXT`
        2 | u32::MAX => true,
        // `XDP_DROP`
        1 => false,
        other => panic!("the program answers {other}"),
    }
}

/// Runs the program many times on one frame, which it must not change; gives the time of one run,
/// in whole nanoseconds.
pub fn repeat<P>(program: &P, frame: &[u8], times: u32) -> u64
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let options =
        TestRunOptions { data_in: Some(frame), repeat: times, ..TestRunOptions::default() };
    program.test_run(options).unwrap().duration.as_nanos() as u64
}

fn read_header(bytes: &[u8]) -> Header {
    let u16_at = |at| u16::from_ne_bytes(*bytes[at..].first_chunk().unwrap());
    let u32_at = |at| u32::from_ne_bytes(*bytes[at..].first_chunk().unwrap());
    let u64_at = |at| u64::from_ne_bytes(*bytes[at..].first_chunk().unwrap());
    let header = Header {
        magic: u32_at(0),
        original_len: u32_at(4),
        time_ns: u64_at(8),
        jobs: u64_at(16),
        queue: u16_at(24),
        direction: bytes[26],
        generation: bytes[27],
        ..Header::default()
    };
    assert_eq!(bytes[28..HEADER_LEN], [0; 4], "the rest of the header is zero");
    assert_eq!(header.magic, HEADER_MAGIC);
    assert_eq!(header.direction, DIRECTION_IN);
    header
}

/// The program with its maps, for rules that change by the thousand: they are written at once and
/// without waiting for readers, since nothing runs meanwhile.
pub struct Kernel {
    ebpf: Ebpf,
    switch: Array<MapData, Switch>,
    tables: Array<MapData, Tables>,
    sports: Array<MapData, u64>,
    dports: Array<MapData, u64>,
    counters: PerCpuArray<MapData, Counters>,
    rules: Rules,
    generation: u64,
}

impl Kernel {
    /// Loads the committed object.
    pub fn load() -> Self {
        let mut ebpf = EbpfLoader::new().load(capture_ebpf::CAPTURE).unwrap();
        let program: &mut Xdp = ebpf.program_mut(programs::EXCLUSIVE).unwrap().try_into().unwrap();
        program.load().unwrap();
        let mut take = |name| ebpf.take_map(name).unwrap();
        Self {
            switch: take(maps::SWITCH).try_into().unwrap(),
            tables: take(maps::TABLES).try_into().unwrap(),
            sports: take(maps::SPORTS).try_into().unwrap(),
            dports: take(maps::DPORTS).try_into().unwrap(),
            counters: take(maps::COUNTERS).try_into().unwrap(),
            ebpf,
            rules: [None; 64],
            generation: 0,
        }
    }

    /// Loads the programs that copy, too. They have no rings: every hit is one that finds its
    /// ring full, which changes nothing of the verdict.
    pub fn load_with_tap() -> Self {
        let mut kernel = Self::load();
        for name in [programs::TAP_INGRESS, programs::TAP_EGRESS] {
            let program: &mut SchedClassifier =
                kernel.ebpf.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap();
        }
        for name in [programs::TAP_XDP, programs::EXCLUSIVE_COPY] {
            let program: &mut Xdp = kernel.ebpf.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap();
        }
        kernel
    }

    /// The jobs that a program that copies takes a frame for a hit of: those whose count of
    /// hits grows.
    pub fn tap(&self, tap: Tap, frame: &[u8]) -> u64 {
        let program = |name| self.ebpf.program(name).unwrap();
        let before = self.hits();
        let goes_on = match tap {
            Tap::Ingress => {
                let program = program(programs::TAP_INGRESS);
                pass::<SchedClassifier>(program.try_into().unwrap(), frame)
            }
            Tap::Egress => {
                let program = program(programs::TAP_EGRESS);
                pass::<SchedClassifier>(program.try_into().unwrap(), frame)
            }
            Tap::Xdp => pass::<Xdp>(program(programs::TAP_XDP).try_into().unwrap(), frame),
            Tap::Exclusive => {
                pass::<Xdp>(program(programs::EXCLUSIVE_COPY).try_into().unwrap(), frame)
            }
        };
        let mut jobs = 0;
        for (slot, (before, after)) in before.into_iter().zip(self.hits()).enumerate() {
            assert!(after == before || after == before + 1, "{before} hits, then {after}");
            jobs |= (after - before) << slot;
        }
        assert_eq!(goes_on, tap != Tap::Exclusive || jobs == 0, "{tap:?}");
        jobs
    }

    fn hits(&self) -> [u64; MAX_JOBS] {
        let cpus = self.counters();
        std::array::from_fn(|slot| cpus.iter().map(|cpu| cpu.jobs[slot].hits).sum())
    }

    /// The `exclusive` program.
    pub fn program(&self) -> &Xdp {
        self.ebpf.program(programs::EXCLUSIVE).unwrap().try_into().unwrap()
    }

    /// Replaces all rules, and makes those active that there are.
    pub fn set_rules(&mut self, rules: &Rules) {
        for rule in self.rules.iter().flatten() {
            let sides =
                [(&mut self.sports, rule.filter.sport), (&mut self.dports, rule.filter.dport)];
            for (map, port) in sides {
                let Some(port) = port else { continue };
                map.set(port.into(), 0, 0).unwrap();
            }
        }
        for (slot, rule) in rules.iter().enumerate() {
            let Some(rule) = rule else { continue };
            let sides =
                [(&mut self.sports, rule.filter.sport), (&mut self.dports, rule.filter.dport)];
            for (map, port) in sides {
                let Some(port) = port else { continue };
                let jobs = map.get(&port.into(), 0).unwrap();
                map.set(port.into(), jobs | 1 << slot, 0).unwrap();
            }
        }
        self.rules = *rules;
        self.generation += 1;
        self.tables.set((self.generation & 1) as u32, *tables(rules), 0).unwrap();
        let active = (0..64).filter(|slot| rules[*slot].is_some()).map(|slot| 1 << slot).sum();
        let switch = Switch { active, generation: self.generation, ring_bytes: 0 };
        self.switch.set(0, switch, 0).unwrap();
    }

    /// What the program has counted, by CPU.
    pub fn counters(&self) -> Vec<Counters> {
        self.counters.get(&0, 0).unwrap().to_vec()
    }
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel").field("generation", &self.generation).finish_non_exhaustive()
    }
}
