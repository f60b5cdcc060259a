//! One contestant under one load, from its start to what is in its file.
//!
//! ```text
//!   namespace              veth pair             namespace
//!  ┌────────────────┐                           ┌─────────────────┐
//!  │ generator      ├─ left end ──── right end ─┤ the contestant  ├─► file
//!  │ CPU 0          │                           │ CPU 1           │
//!  └────────────────┘                           └─────────────────┘
//! ```
//!
//! The pair hands a frame over on the CPU that sent it: what the kernel does with it, up to the ring
//! that the contestant reads, runs on the generator's CPU, whoever the contestant is. With two queues
//! there is a generator on each of the first two CPUs, and the contestant may use all.
//!
//! Every frame is numbered. What a contestant has written is counted in its file, not believed.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tapline_tests::{
    generator::{Generator, Template},
    netns::Namespace,
    process::wait_until,
    veth::{Options, Veth},
};

use crate::{
    floor,
    machine::{self, Busy},
    tool::{JOB_FLOWS, Running, Said, Tool, files},
};

/// Flows of a load of which one is asked for.
const FLOWS: u32 = 100;

/// The frames of a load. Sizes are of whole Ethernet frames; their checksum, 4 bytes, is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Fixed(usize),
    Imix,
}

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "imix" => Ok(Self::Imix),
            Ok(bytes @ 64..=1518) => Ok(Self::Fixed(bytes)),
            _ => Err("give a frame size from 64 to 1518, or imix".into()),
        }
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(bytes) => bytes.fmt(f),
            Self::Imix => f.write_str("imix"),
        }
    }
}

impl Size {
    /// Lengths in turn: of IMIX, 7 of 64 bytes, 4 of 594 and 1 of 1518, spread out.
    fn lengths(self) -> Vec<usize> {
        match self {
            Self::Fixed(bytes) => vec![bytes - 4],
            Self::Imix => {
                [64, 594, 64, 64, 594, 64, 1518, 64, 594, 64, 594, 64].map(|bytes| bytes - 4).into()
            }
        }
    }

    pub(crate) fn template(self, flows: u32) -> Template {
        let mut lengths = self.lengths();
        let length = lengths.iter().copied().max().unwrap();
        if lengths.len() == 1 {
            lengths.clear();
        }
        Template { length, lengths, flows, ..Template::default() }
    }

    /// What frames take in a contestant's file, bytes each on average.
    fn record_len(self, tool: Tool) -> f64 {
        let lengths = self.lengths();
        let all: usize = lengths.iter().map(|length| tool.record_len(*length)).sum();
        as_f64(all as u64) / as_f64(lengths.len() as u64)
    }
}

/// Counts as they are shown and divided: exact up to 2⁵³.
#[expect(clippy::cast_precision_loss, reason = "no count here comes near 2⁵³")]
pub(crate) fn as_f64(count: u64) -> f64 {
    count as f64
}

/// What is sent, apart from how fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) size: Size,
    /// Whether one flow in [`FLOWS`] is asked for, not all.
    pub(crate) one_percent: bool,
    pub(crate) queues: u32,
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.size {
            Size::Fixed(bytes) => write!(f, "{bytes} bytes")?,
            Size::Imix => f.write_str("IMIX")?,
        }
        f.write_str(if self.one_percent { ", 1 % matched" } else { ", everything matched" })?;
        write!(f, ", {} queue{}", self.queues, if self.queues == 1 { "" } else { "s" })
    }
}

/// How fast.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    /// Frames a second, over all queues.
    Rate(u64),
    /// As fast as the contestant takes it.
    Closed { window: u64 },
}

/// One stretch of load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    pub(crate) pace: Pace,
    pub(crate) elapsed: Duration,
    /// Frames that were sent.
    pub(crate) sent: u64,
    /// Of them, those that came out of the pair. Its own ring is short, and no contestant's fault.
    pub(crate) arrived: u64,
    /// Of them, those that the contestant was asked for.
    pub(crate) wanted: u64,
    /// Of them, those in its file; what it says it has taken, if it writes none.
    pub(crate) captured: u64,
}

impl Step {
    /// Frames a second that were offered.
    pub(crate) fn offered(&self) -> f64 {
        as_f64(self.arrived) / self.elapsed.as_secs_f64()
    }

    pub(crate) fn lost(&self) -> u64 {
        self.wanted.saturating_sub(self.captured)
    }

    /// The part that was lost, 0 to 1.
    pub(crate) fn loss(&self) -> f64 {
        if self.wanted == 0 { 0.0 } else { as_f64(self.lost()) / as_f64(self.wanted) }
    }

    pub(crate) fn json(&self) -> Value {
        let pace = match self.pace {
            Pace::Rate(rate) => json!(rate),
            Pace::Closed { window } => json!({ "window": window }),
        };
        json!({
            "pace": pace, "seconds": self.elapsed.as_secs_f64(), "sent": self.sent,
            "arrived": self.arrived, "wanted": self.wanted, "captured": self.captured,
            "lost": self.lost(), "offered_pps": self.offered(),
        })
    }
}

/// A run of one contestant.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) tool: Tool,
    pub(crate) steps: Vec<Step>,
    pub(crate) said: Said,
    /// CPU time of the whole machine from the first frame until the file was on the disk.
    pub(crate) busy: Duration,
    /// Bytes in its files.
    pub(crate) bytes: u64,
    /// How long it took from its interruption until they were on the disk.
    pub(crate) ending: Duration,
    /// Packets in its files, whatever they are.
    pub(crate) in_files: u64,
    /// Frames that the host's own stack got.
    pub(crate) delivered: u64,
}

impl Run {
    pub(crate) fn total(&self, of: fn(&Step) -> u64) -> u64 {
        self.steps.iter().map(of).sum()
    }

    /// CPU time of the whole machine per packet that came by, nanoseconds; the generator's included.
    pub(crate) fn machine_ns(&self) -> f64 {
        as_f64(self.busy.as_nanos() as u64) / as_f64(self.total(|step| step.arrived).max(1))
    }

    /// Bytes a second that reached the disk.
    pub(crate) fn disk_rate(&self) -> f64 {
        let sending: Duration = self.steps.iter().map(|step| step.elapsed).sum();
        as_f64(self.bytes) / (sending + self.ending).as_secs_f64()
    }

    /// Why the counts do not add up, if they do not: offered = passed + written + each named drop.
    pub(crate) fn broken_law(&self) -> Option<String> {
        let said = &self.said;
        let arrived = self.total(|step| step.arrived);
        if self.tool.passes() && self.delivered != arrived {
            return Some(format!("{arrived} arrived, {} went on to the stack", self.delivered));
        }
        let (Some(hits), Some(written)) = (said.hits, said.written) else { return None };
        // The peers count what they drop among what they receive, or do not, by version.
        let all = written + said.dropped();
        if hits != all && hits != written {
            return Some(format!(
                "{hits} hits, but {written} written + {} dropped",
                said.dropped()
            ));
        }
        if self.tool.writes() && written != self.in_files {
            return Some(format!("{written} written, but {} in the file", self.in_files));
        }
        let wanted = self.total(|step| step.wanted);
        // Other traffic there is none; but what was lost in the pair may have been asked for.
        let wire = self.total(|step| step.sent) - arrived;
        (all > wanted || all + wire < wanted).then(|| {
            format!("{wanted} were to be captured; {written} + {} is not that", said.dropped())
        })
    }
}

/// The namespaces, the pair and its generators.
struct Bed<'a> {
    veth: Veth<'a>,
    generators: Vec<Generator<'a>>,
    template: Template,
}

impl<'a> Bed<'a> {
    fn new(left: &'a Namespace, right: &'a Namespace, load: Load, flows: u32) -> Self {
        let options = Options { queues: load.queues, ..Options::default() };
        let veth = Veth::with(left, right, options);
        let template = load.size.template(flows);
        let generators = (0..load.queues as usize)
            .map(|cpu| Generator::new(&veth.left, template.clone()).pinned(cpu))
            .collect();
        Self { veth, generators, template }
    }

    fn sent(&self) -> Vec<u64> {
        self.generators.iter().map(Generator::sent).collect()
    }

    /// Sends from each generator.
    fn send(&self, pace: Pace, duration: Duration, taken: &(dyn Fn() -> Option<u64> + Sync)) {
        let share = self.generators.len() as u64;
        thread::scope(|scope| {
            for generator in &self.generators {
                scope.spawn(move || match pace {
                    Pace::Rate(rate) => generator.send_paced(rate / share, duration),
                    Pace::Closed { window } => {
                        // What one cannot look into gets all there is.
                        let Some(before) = taken() else { return generator.flood(duration) };
                        generator.send_closed(window / share, duration, || {
                            (taken().unwrap_or(before) - before) / share
                        })
                    }
                });
            }
        });
    }

    /// Frames that the host's own stack has got: for another's address, or of no protocol.
    fn delivered(&self) -> u64 {
        let name = &self.veth.right.name;
        let line = ["ip", "-s", "-s", "-json", "link", "show", "dev", name];
        let output = self.veth.right.namespace.run(&line);
        let links: Value = serde_json::from_slice(&output.stdout).unwrap();
        let received = &links[0]["stats64"]["rx"];
        ["otherhost", "dropped"].iter().filter_map(|name| received[name].as_u64()).sum()
    }
}

/// The CPU that the contestant runs on.
fn cpu(load: Load) -> Option<usize> {
    (load.queues == 1 && machine::cpus() > 1).then_some(1)
}

/// Runs a contestant through steps, each of this length. `go_on` says after each whether another one
/// is worth it.
pub(crate) fn run(
    tool: Tool,
    load: Load,
    folder: &Path,
    paces: &[Pace],
    duration: Duration,
    go_on: impl Fn(&Step) -> bool,
) -> Run {
    let (left, right) = (Namespace::new(), Namespace::new());
    let flows = if load.one_percent { FLOWS } else { JOB_FLOWS };
    let bed = Bed::new(&left, &right, load, flows);
    let end = &bed.veth.right;
    let port = load.one_percent.then_some(bed.template.sport);
    let running = Running::start(tool, end, folder, cpu(load), port);
    let record = load.size.record_len(tool);
    let taken = || {
        match tool {
            Tool::Receive | Tool::Read => return Some(floor::received(&running.file)),
            Tool::Job1 | Tool::Jobs64 => {
                return Some(floor::received(&running.file.with_extension("progress")));
            }
            _ => {}
        }
        let pid = running.pid().filter(|_| is_looped(tool, load))?;
        Some(tool.packets_in(machine::written(pid), record))
    };

    let (mut steps, mut marks) = (Vec::new(), vec![bed.sent()]);
    let mut arrived = 0;
    let busy = Busy::now();
    for pace in paces {
        let start = Instant::now();
        bed.send(*pace, duration, &taken);
        let elapsed = start.elapsed();
        let now = bed.veth.settle(bed.sent().iter().sum());
        marks.push(bed.sent());
        let of = |mark: &[u64]| mark.iter().sum::<u64>();
        let sent = of(&marks[marks.len() - 1]) - of(&marks[marks.len() - 2]);
        let step =
            Step { pace: *pace, elapsed, sent, arrived: now - arrived, wanted: 0, captured: 0 };
        arrived = now;
        steps.push(step);
        if !go_on(&step) {
            break;
        }
    }
    if tool.passes() {
        wait_until("frames to reach the stack", Duration::from_secs(10), || {
            bed.delivered() >= arrived
        });
    }
    let delivered = bed.delivered();
    running.drain();
    let file = running.file.clone();
    let stopping = Instant::now();
    let said = running.stop();
    let ending = stopping.elapsed();
    let busy = busy.since();

    let bytes = files(&file).iter().map(|file| fs::metadata(file).unwrap().len()).sum();
    let mut run = Run { tool, steps, said, busy, bytes, ending, in_files: 0, delivered };
    judge(&mut run, &file, &bed.template, load, &marks);
    for file in files(&file) {
        fs::remove_file(file).unwrap();
    }
    if file.is_dir() {
        fs::remove_dir(&file).unwrap();
    }
    run
}

/// Counts the frames of each step in the files.
fn judge(run: &mut Run, file: &Path, template: &Template, load: Load, marks: &[Vec<u64>]) {
    let flows = u64::from(template.flows);
    for (step, pair) in run.steps.iter_mut().zip(marks.windows(2)) {
        let wanted = if load.one_percent {
            let first_flow =
                |mark: &Vec<u64>| mark.iter().map(|at| at.div_ceil(flows)).sum::<u64>();
            first_flow(&pair[1]) - first_flow(&pair[0])
        } else {
            step.arrived
        };
        step.wanted = if run.tool.is_blind() { 0 } else { wanted };
    }
    if !run.tool.writes() {
        // All steps together.
        let mut taken = run.said.written.unwrap_or(0);
        for step in &mut run.steps {
            step.captured = taken.min(step.wanted);
            taken -= step.captured;
        }
        return;
    }
    for file in files(file) {
        let mut packets = pcap::Capture::from_file(file).unwrap();
        while let Ok(packet) = packets.next_packet() {
            run.in_files += 1;
            let stamp = template.stamp(packet.data);
            let (number, source) = (stamp.sequence, stamp.source as usize);
            if packet.data.len() == template.length_of(number)
                && let Some(at) = marks[1..].iter().position(|mark| number < mark[source])
            {
                run.steps[at].captured += 1;
            }
        }
    }
    if load.one_percent {
        // What was lost in the pair was wanted only if it did not arrive.
        for step in &mut run.steps {
            let wire = step.sent - step.arrived;
            step.wanted -= wire.min(step.lost());
        }
    }
}

/// How many frames may be on their way in a closed loop. Few, and a contestant that works in large batches
/// waits for frames; many, and its ring overflows, or its memory outgrows the caches. So each one has, in
/// the first round, the choice.
#[derive(Debug)]
pub(crate) struct Windows {
    choice: Vec<u64>,
    chosen: Vec<(Tool, Load, u64)>,
}

impl Windows {
    pub(crate) fn new(choice: Vec<u64>) -> Self {
        Self { choice, chosen: Vec::new() }
    }

    /// The highest rate that a contestant takes without a loss, in a closed loop.
    pub(crate) fn closed(
        &mut self,
        tool: Tool,
        load: Load,
        folder: &Path,
        duration: Duration,
    ) -> Run {
        let is_known = |chosen: &&(Tool, Load, u64)| chosen.0 == tool && chosen.1 == load;
        let known = self.chosen.iter().find(is_known).map(|chosen| [chosen.2]);
        let choice = known.as_ref().map_or(self.choice.as_slice(), <[u64; 1]>::as_slice);
        let mut best: Option<(Run, u64)> = None;
        for &window in choice {
            let run = run(tool, load, folder, &[Pace::Closed { window }], duration, |_| true);
            let rank = |run: &Run| {
                let step = &run.steps[0];
                (step.lost() == 0, step.offered())
            };
            if best.as_ref().is_none_or(|(best, _)| rank(&run) > rank(best)) {
                best = Some((run, window));
            }
            if !is_looped(tool, load) {
                break;
            }
        }
        let (run, window) = best.expect("there is a choice");
        if known.is_none() {
            self.chosen.push((tool, load, window));
        }
        run
    }
}

/// Whether it can be seen how far a contestant is. Others get all that the generator can send.
fn is_looped(tool: Tool, load: Load) -> bool {
    matches!(tool, Tool::Receive | Tool::Read | Tool::Job1 | Tool::Jobs64)
        || (tool.writes() && !load.one_percent)
}
