//! The programs that copy into rings on single frames: the same verdicts as those of `exclusive`, and what
//! they copy.

use std::{collections::BTreeSet, env, time::Duration};

use capture_ebpf::{
    CAPTURE,
    abi::{Counters, Header, MAX_JOBS, Outcome},
    classify::classify,
    parse::{Buffer, Fields, Scratch, ethernet},
};
use capture_user::{
    filter::{Direction, Filter, HostPorts, Rule, Rules, tables},
    program::Program,
    ring::Rings,
    source::Source as _,
};
use fastrand::Rng;
use tapline_tests::{
    frames::{Frame, OLD_QINQ, QINQ, VLAN},
    kernel::{Action, Kernel, SHORTEST, Tap, pass, repeat, rings, run},
    privileged,
};

use crate::{
    property::{Made, filter, hex, made, pick},
    verdict::{Case, cases, filters, outcome, program},
};

/// A program with a ring for each CPU.
struct Tapped {
    program: Program,
    rings: Vec<Rings>,
}

/// A packet as a ring has it.
type Copied = (Header, Vec<u8>);

impl Tapped {
    fn new(mut program: Program) -> Self {
        let cpus = std::thread::available_parallelism().unwrap().get() as u32;
        let mut ring = |cpu| Rings::new(vec![program.ring(cpu).unwrap()]).unwrap();
        Self { rings: (0..cpus).map(&mut ring).collect(), program }
    }

    /// Runs a program on a frame that goes on unchanged, or is dropped; gives what was copied of it.
    fn run(&mut self, tap: Tap, frame: &[u8]) -> Option<Copied> {
        let goes_on = match tap {
            Tap::Ingress => pass(self.program.tap_ingress().unwrap(), frame),
            Tap::Egress => pass(self.program.tap_egress().unwrap(), frame),
            Tap::Xdp => pass(self.program.tap_xdp().unwrap(), frame),
            Tap::Exclusive => pass(self.program.exclusive_copy().unwrap(), frame),
        };
        let mut copied = self.copied();
        assert!(copied.len() <= 1, "one copy of a packet serves all jobs");
        assert_eq!(goes_on, tap != Tap::Exclusive || copied.is_empty(), "{tap:?}");
        copied.pop()
    }

    /// Empties the rings.
    fn copied(&mut self) -> Vec<Copied> {
        let mut copied = Vec::new();
        for (cpu, ring) in self.rings.iter_mut().enumerate() {
            while ring.backlog() > 0 {
                ring.receive(|packet| {
                    // The CPU, or `exclusive`'s receive queue.
                    let queue = usize::from(packet.header.queue);
                    assert!(queue == cpu || queue == 0, "{queue} in CPU {cpu}'s ring");
                    let mut data = packet.data.to_vec();
                    packet.rest.iter().for_each(|part| data.extend_from_slice(part));
                    copied.push((*packet.header, data));
                });
            }
        }
        copied
    }
}

#[test]
fn each_named_frame_is_the_same_hit_in_every_program() {
    privileged!();
    let filters = filters();
    let cases = cases();
    let mut tapped = Tapped::new(program(filters.iter().map(|(_, filter)| *filter)));
    let mut runs = 0;
    for Case { name, frame, expected } in &cases {
        let exclusive = run(tapped.program.exclusive().unwrap(), frame);
        for tap in Tap::ALL {
            if !tap.accepts(frame) {
                continue;
            }
            // Every frame is a hit of the job that takes any.
            let (header, data) = tapped.run(tap, frame).unwrap();
            let jobs = (0..filters.len()).filter(|slot| header.jobs >> slot & 1 != 0);
            let got: BTreeSet<_> = jobs.map(|slot| filters[slot].0).collect();
            assert_eq!(got, *expected, "{tap:?}: {name}");
            assert_eq!(header.jobs, exclusive.jobs(), "{tap:?}: {name}");
            assert!(data == *frame, "{tap:?}: {name}: the whole frame is copied");
            assert_eq!(header.original_len as usize, frame.len(), "{tap:?}: {name}");
            assert_eq!((header.direction, header.vlan), (tap.direction(), 0), "{tap:?}: {name}");
            let before = exclusive.header.unwrap().time_ns;
            let late = Duration::from_nanos(header.time_ns - before);
            assert!(late < Duration::from_secs(10), "{tap:?}: {name}: {late:?}");
            runs += 1;
        }
    }
    // All but the few that the kernel takes for no skb.
    println!("{runs} runs of {} frames in {} programs", cases.len(), Tap::ALL.len());
    assert!(runs + 30 > Tap::ALL.len() * cases.len(), "{runs} runs");
    let counters = tapped.program.counters().unwrap();
    assert_eq!(outcome(&counters, Outcome::Copied), runs as u64);
}

#[test]
fn a_frame_that_no_job_asks_for_is_not_copied() {
    privileged!();
    let filters: Vec<_> = filters().into_iter().skip(1).collect();
    let mut tapped = Tapped::new(program(filters.iter().map(|(_, filter)| *filter)));
    let (mut missed, mut copied) = (0, 0);
    for Case { name, frame, expected } in cases() {
        for tap in Tap::ALL.into_iter().filter(|tap| tap.accepts(&frame)) {
            let hit = tapped.run(tap, &frame).is_some();
            assert_eq!(hit, expected.len() > 1, "{tap:?}: {name}");
            *(if hit { &mut copied } else { &mut missed }) += 1;
        }
    }
    let counters = tapped.program.counters().unwrap();
    assert_eq!(outcome(&counters, Outcome::NoMatch), missed);
    assert_eq!(outcome(&counters, Outcome::Copied), copied);
    assert!(missed > 60 && copied > 200, "{missed} missed, {copied} copied");
}

#[test]
fn host_and_tap_programs_agree_on_random_frames_and_filters() {
    const RULE_SETS: usize = 600;
    const FRAMES: usize = 20;
    privileged!();
    let seed =
        env::var("TAPLINE_SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("TAPLINE_SEED={seed} repeats this run");
    let rng = &mut Rng::with_seed(seed);
    let mut kernel = Kernel::load_with_tap();
    let (mut runs, mut pairs, mut matches) = (0, [0; Tap::ALL.len()], 0);
    for _ in 0..RULE_SETS {
        let mut rules: Rules = [None; MAX_JOBS];
        for _ in 0..pick(rng, &[1, 8, 64, 64]) {
            rules[rng.usize(..MAX_JOBS)] = Some(Rule::new(filter(rng)));
        }
        let active =
            (0..MAX_JOBS).filter(|slot| rules[*slot].is_some()).map(|slot| 1 << slot).sum();
        let (tables, ports) = (tables(&rules), HostPorts::new(&rules));
        kernel.set_rules(&rules);
        for _ in 0..FRAMES {
            let Made { bytes, .. } = made(rng);
            if bytes.len() < SHORTEST {
                continue;
            }
            let context = || format!("seed {seed}, {rules:?}, frame {}", hex(&bytes));
            let host = classify(&Fields::of_ethernet(bytes.as_slice()), &tables, &ports, active);
            let exclusive = run(kernel.program(), &bytes);
            assert_eq!((exclusive.jobs(), exclusive.action), (host, Action::Pass), "{}", context());
            runs += 1;
            for (at, tap) in Tap::ALL.into_iter().enumerate() {
                if !tap.accepts(&bytes) {
                    continue;
                }
                assert_eq!(kernel.tap(tap, &bytes), host, "{tap:?}: {}", context());
                runs += 1;
                pairs[at] += active.count_ones();
                matches += host.count_ones();
            }
        }
    }
    println!("pairs of frame and filter by program: {pairs:?}, {matches} matches");
    assert!(pairs.iter().all(|pairs| *pairs >= 100_000), "{pairs:?}");
    assert!(matches * 50 > pairs.iter().sum(), "matches are frequent enough");
    let counters = kernel.counters();
    assert_eq!(counters.iter().map(|cpu| cpu.packets).sum::<u64>(), runs);
}

/// A frame whose first VLAN tag has been taken aside, as the kernel takes it.
struct Untagged(Vec<u8>);

impl Buffer for Untagged {
    fn load<'a, const N: usize>(
        &'a self,
        offset: usize,
        scratch: &'a mut Scratch,
    ) -> Option<&'a [u8; N]> {
        self.0.as_slice().load(offset, scratch)
    }

    fn tag_aside(&self) -> bool {
        true
    }
}

#[test]
fn a_frame_whose_tag_is_kept_aside_is_read_as_if_it_stood_there() {
    let mut tagged = 0;
    for Case { name, frame, .. } in cases() {
        let tpid = frame.get(12..14).map(|two| u16::from_be_bytes([two[0], two[1]]));
        if frame.len() < 18 || !tpid.is_some_and(|tpid| [VLAN, QINQ, OLD_QINQ].contains(&tpid)) {
            continue;
        }
        let untagged = Untagged([&frame[..12], &frame[16..]].concat());
        assert_eq!(ethernet(&untagged), ethernet(frame.as_slice()), "{name}");
        tagged += 1;
    }
    assert!(tagged > 12, "{tagged} frames");
}

#[test]
fn a_job_that_wants_one_direction_gets_no_other() {
    privileged!();
    let frame = Frame::new().fill(100).build();
    let mut program = Program::load(CAPTURE, Some(rings())).unwrap();
    let directions = [Direction::In, Direction::Out, Direction::Both];
    for (slot, direction) in directions.into_iter().enumerate() {
        program.insert(slot, Rule { direction, ..Rule::new(Filter::default()) }).unwrap();
        program.activate(slot).unwrap();
    }
    let mut tapped = Tapped::new(program);
    let jobs = Tap::ALL.map(|tap| tapped.run(tap, &frame).unwrap().0.jobs);
    assert_eq!(jobs, [0b101, 0b110, 0b101, 0b101]);
}

#[test]
fn as_much_is_copied_as_the_most_generous_job_keeps() {
    privileged!();
    let (any, udp) = (Filter::default(), Filter { dport: Some(53), ..Filter::default() });
    for least in [1, 40, 100] {
        let mut program = Program::load(CAPTURE, Some(rings())).unwrap();
        for (slot, (filter, snaplen)) in [(any, least), (udp, 700)].into_iter().enumerate() {
            program.insert(slot, Rule { snaplen, ..Rule::new(filter) }).unwrap();
            program.activate(slot).unwrap();
        }
        let mut tapped = Tapped::new(program);
        for tap in Tap::ALL {
            for length in (42..1500).step_by(13) {
                for (port, snaplen) in [(53, 700), (54, least as usize)] {
                    let addresses = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().unwrap());
                    let [src, dst] = addresses;
                    let frame = Frame::new().ipv4(src, dst).udp(1, port).fill(length).build();
                    let (header, data) = tapped.run(tap, &frame).unwrap();
                    assert_eq!(header.original_len as usize, length);
                    assert!(data == frame[..length.min(snaplen)], "{tap:?}: {length} {least}");
                }
            }
        }
    }
}

#[test]
fn frames_of_every_length_are_copied_whole() {
    privileged!();
    let mut tapped = Tapped::new(program([Filter::default()]));
    for tap in Tap::ALL {
        // Short ones are copied by words, others by the kernel.
        for length in (SHORTEST..1600).chain((1600..tap.longest()).step_by(509)) {
            let frame = Frame::new().fill(length).build();
            let (header, data) = tapped.run(tap, &frame).unwrap();
            assert_eq!(header.original_len as usize, length, "{tap:?}");
            assert!(data == frame, "{tap:?}: {length} bytes");
        }
    }
}

#[test]
fn a_hit_that_finds_its_ring_full_goes_on_and_is_counted() {
    const TIMES: u32 = 10_000;
    privileged!();
    let mut tapped = Tapped::new(program([Filter::default()]));
    let frame = Frame::new().fill(1000).build();
    for tap in Tap::ALL {
        let before = tapped.program.counters().unwrap();
        match tap {
            Tap::Ingress => repeat(tapped.program.tap_ingress().unwrap(), &frame, TIMES),
            Tap::Egress => repeat(tapped.program.tap_egress().unwrap(), &frame, TIMES),
            Tap::Xdp => repeat(tapped.program.tap_xdp().unwrap(), &frame, TIMES),
            Tap::Exclusive => repeat(tapped.program.exclusive_copy().unwrap(), &frame, TIMES),
        };
        let after = tapped.program.counters().unwrap();
        let grown = |what| outcome(&after, what) - outcome(&before, what);
        let (copied, full) = (grown(Outcome::Copied), grown(Outcome::RingFull));
        assert_eq!(copied + full, u64::from(TIMES), "{tap:?}");
        assert!(copied > 500 && full > 500, "{tap:?}: {copied} copied, {full} not");
        let job = |counters: &Counters| (counters.jobs[0].hits, counters.jobs[0].ring_full);
        let (before, after) = (job(&before), job(&after));
        assert_eq!((after.0 - before.0, after.1 - before.1), (u64::from(TIMES), full), "{tap:?}");
        assert_eq!(tapped.copied().len() as u64, copied, "{tap:?}: what was copied is there");
    }
}
