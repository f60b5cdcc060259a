//! Sampling in the kernel program: whether each packet has the same chance, whatever it is.

use std::{num::NonZeroU32, path::Path};

use capture_user::{
    engine::{CapturePath, Engine, EngineConfig, InterfaceConfig, JobSpec, MIN_BUFFER},
    segment::Target,
};
use pcap::Capture;
use tapline_tests::{
    generator::{Generator, Template},
    netns::Namespace,
    privileged,
    veth::Veth,
};
use tempfile::tempdir;

/// Packets that are sent at least.
const PACKETS: u64 = 10_000_000;

/// Packets that the pair may lose before any program sees them: too few to shift a sum by more than the
/// part of a percent.
const LOST: u64 = 1000;

/// Parts of the time.
const PARTS: u64 = 100;

const FLOWS: u32 = 64;

/// Lengths of frames, taken in turn: no divisor of the number of flows, so that each flow has all.
const LENGTHS: [usize; 7] = [60, 64, 128, 300, 594, 1000, 1514];

/// How many standard deviations a sum may be off: a fair program is blamed once in thirty million times.
const SIGMA: f64 = 5.4;

/// What a chi-square sum of so many squares lies between but for the chance of a normal deviate to exceed
/// [`SIGMA`], by the approximation of Wilson and Hilferty.
fn bounds(squares: f64) -> (f64, f64) {
    let part = 2.0 / (9.0 * squares);
    let at = |deviate: f64| squares * (1.0 - part + deviate * part.sqrt()).max(0.0).powi(3);
    (at(-SIGMA), at(SIGMA))
}

/// Packets that were sent and that were kept of each kind.
struct Kinds {
    sent: Vec<f64>,
    kept: Vec<f64>,
}

impl Kinds {
    fn new(packets: u64, kinds: usize, kind: impl Fn(u64) -> usize) -> Self {
        let mut sent = vec![0.0; kinds];
        for sequence in 0..packets {
            sent[kind(sequence)] += 1.0;
        }
        Self { sent, kept: vec![0.0; kinds] }
    }

    /// The chi-square sum when each packet is kept with this chance. All kinds are free, since how many are
    /// kept in all is chance, too.
    fn sum(&self, chance: f64) -> f64 {
        let square = |(sent, kept): (&f64, &f64)| {
            (kept - sent * chance).powi(2) / (sent * chance * (1.0 - chance))
        };
        self.sent.iter().zip(&self.kept).map(square).sum()
    }
}

/// Counts what libpcap reads in a file by kind, and checks that it is fair.
fn check(path: &Path, template: &Template, packets: u64, one_in: u32) {
    let (flows, lengths) = (FLOWS as usize, LENGTHS.len());
    let mut by_flow = Kinds::new(packets, flows, |sequence| sequence as usize % flows);
    let mut by_length = Kinds::new(packets, lengths, |sequence| sequence as usize % lengths);
    let mut by_both =
        Kinds::new(packets, flows * lengths, |sequence| sequence as usize % (flows * lengths));
    let part = |sequence: u64| (sequence * PARTS / packets) as usize;
    let mut by_time = Kinds::new(packets, PARTS as usize, part);
    let mut capture = Capture::from_file(path).unwrap();
    let mut before = None;
    while let Ok(packet) = capture.next_packet() {
        let sequence = template.stamp(packet.data).sequence;
        assert!(before < Some(sequence), "each at most once, in order");
        before = Some(sequence);
        let flow = usize::from(template.flow(packet.data) - template.sport);
        assert_eq!(flow, sequence as usize % flows);
        assert_eq!(packet.header.len as usize, template.length_of(sequence));
        by_flow.kept[flow] += 1.0;
        by_length.kept[sequence as usize % lengths] += 1.0;
        by_both.kept[sequence as usize % (flows * lengths)] += 1.0;
        by_time.kept[part(sequence)] += 1.0;
    }
    let chance = 1.0 / f64::from(one_in);
    for (what, kinds) in
        [("flow", by_flow), ("length", by_length), ("flow and length", by_both), ("time", by_time)]
    {
        let squares = f64::from(kinds.sent.len() as u32);
        let (sum, (least, most)) = (kinds.sum(chance), bounds(squares));
        assert!(sum < most, "1 in {one_in} is not fair by {what}: {sum} exceeds {most}");
        // Nor is it more even than chance would have it, as each Nth would be.
        assert!(sum > least, "1 in {one_in} is not random by {what}: {sum} is below {least}");
    }
}

#[test]
fn one_in_n_keeps_each_packet_with_the_same_chance_whatever_its_flow_and_size() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let folder = tempdir().unwrap();
    let interface = InterfaceConfig {
        name: veth.right.name.clone(),
        path: CapturePath::TAP,
        promiscuous: false,
    };
    let config = EngineConfig { interfaces: vec![interface], ..EngineConfig::default() };
    let engine = right.enter(|| Engine::open(&config).unwrap());
    let jobs = [10, 100, 1000].map(|one_in| {
        let path = folder.path().join(format!("{one_in}.pcapng"));
        let spec = JobSpec {
            sample: NonZeroU32::new(one_in).unwrap(),
            snaplen: 64,
            buffers: 128,
            buffer_size: MIN_BUFFER,
            ..JobSpec::new(Target::File(path.clone()))
        };
        (one_in, path, engine.start(spec).unwrap())
    });
    let template =
        Template { length: 1514, flows: FLOWS, lengths: LENGTHS.to_vec(), ..Template::default() };
    // From one CPU, so that the stamps number the packets.
    let generator = Generator::new(&veth.left, template.clone()).pinned(0);
    generator.flood_while(|| generator.sent() < PACKETS);
    let sent = generator.sent();
    let taken = veth.settle(sent);
    assert!(sent - taken <= LOST, "{} of {sent} are lost on the way", sent - taken);
    for (one_in, path, job) in jobs {
        job.stop();
        let summary = job.wait().unwrap();
        assert_eq!(summary.seen, taken);
        assert_eq!(summary.law.written.packets, summary.law.hits.packets, "{:?}", summary.law);
        check(&path, &template, sent, one_in);
    }
}
