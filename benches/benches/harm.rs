//! What a capture costs the traffic that it sees, and how much it can see: `tapline` beside tcpdump,
//! dumpcap and netsniff-ng, taking turns in one run. Needs root, and an otherwise idle machine.
//!
//! 1. A TCP stream (iperf3) between two namespaces: throughput with each watcher, as a ratio to that
//!    of the same round without one.
//! 2. UDP frames of three sizes, all or one in a hundred of them matched, at rates that rise until a
//!    step loses one. The files are written to memory (`/dev/shm`), so that no disk is measured. Each
//!    frame is numbered, and what is lost is counted in the file, not believed.
//!
//! | variable | default | |
//! |---|---|---|
//! | `TAPLINE_BENCH_REPEATS` | 3 | rounds of the first part |
//! | `TAPLINE_BENCH_SECONDS` | 2 | length of one stream |
//! | `TAPLINE_BENCH_SWEEPS` | 1 | rounds of the second part |
//! | `TAPLINE_BENCH_STEP_MS` | 400 | length of a step at one rate |
#![expect(clippy::unwrap_used, reason = "a bench fails by panicking, with a line number")]
#![expect(clippy::print_stdout, reason = "the tables are what it is for")]
#![expect(clippy::cast_precision_loss, reason = "shown with a few digits")]

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid},
};
use tapline_tests::{
    capture::{Capture, command},
    generator::{Generator, Template},
    netns::Namespace,
    process::wait_until,
    tap::cpu_time,
    veth::{Options, Veth},
};

const SECOND: Duration = Duration::from_secs(1);

/// Rates of the sweep, frames a second: each about 1.6 times the one before.
const RATES: [u64; 8] = [50_000, 100_000, 200_000, 330_000, 520_000, 840_000, 1_300_000, 2_100_000];

const SIZES: [usize; 3] = [64, 512, 1500];

/// Longest that the generator takes to enter its namespace.
const SET_UP: Duration = Duration::from_millis(150);

/// One in this many flows is asked for, if not all are.
const FLOWS: u32 = 100;

fn setting(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// Who watches the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tool {
    Nobody,
    Tap,
    TapXdp,
    Exclusive,
    Tcpdump,
    Dumpcap,
    NetsniffNg,
}

impl Tool {
    const fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::Tap => "tapline tap",
            Self::TapXdp => "tapline tap, XDP",
            Self::Exclusive => "tapline exclusive",
            Self::Tcpdump => "tcpdump",
            Self::Dumpcap => "dumpcap",
            Self::NetsniffNg => "netsniff-ng",
        }
    }

    /// Its command line, with as much memory for each; the filter asks for one source port.
    fn line(self, interface: &str, file: &str, port: Option<u16>) -> Vec<String> {
        let filter = port.map(|port| format!("udp src port {port}"));
        let line = match self {
            Self::Nobody => String::new(),
            Self::Tap => format!("-i {interface} -w {file} --json"),
            Self::TapXdp => {
                format!("-i {interface} -w {file} --json --tap-hook xdp --direction in")
            }
            Self::Exclusive => format!("-i {interface} -w {file} --json --mode exclusive"),
            Self::Tcpdump => format!("tcpdump -n -i {interface} -B 65536 -w {file}"),
            Self::Dumpcap => format!("dumpcap -q -i {interface} -B 64 -w {file}"),
            Self::NetsniffNg => {
                format!("netsniff-ng --in {interface} --out {file} --silent --ring-size 64MiB")
            }
        };
        let mut line: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        match (self, port, filter) {
            (Self::Tap | Self::TapXdp | Self::Exclusive, Some(port), _) => {
                line.extend(["--sport".into(), port.to_string()]);
            }
            (Self::Tcpdump, _, Some(filter)) => line.push(filter),
            (Self::Dumpcap | Self::NetsniffNg, _, Some(filter)) => {
                line.extend(["-f".into(), filter]);
            }
            _ => {}
        }
        line
    }
}

/// A watcher at work.
enum Watcher {
    Nobody,
    Tapline(Box<Capture>),
    Other(Child),
}

impl Watcher {
    fn start(tool: Tool, namespace: &Namespace, line: &[String]) -> Self {
        let args: Vec<&str> = line.iter().map(String::as_str).collect();
        match tool {
            Tool::Nobody => Self::Nobody,
            Tool::Tap | Tool::TapXdp | Tool::Exclusive => {
                Self::Tapline(Box::new(Capture::start(command(namespace, &args))))
            }
            _ => {
                let child = namespace
                    .command(args[0], &args[1..])
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                // None of them says when it is ready in a way that all share.
                thread::sleep(SECOND);
                Self::Other(child)
            }
        }
    }

    fn pid(&self) -> Option<Pid> {
        match self {
            Self::Nobody => None,
            Self::Tapline(capture) => Some(capture.pid()),
            Self::Other(child) => Some(Pid::from_raw(child.id().cast_signed())),
        }
    }

    fn cpu_time(&self) -> Duration {
        self.pid().map(cpu_time).unwrap_or_default()
    }

    /// Waits until what it has on the way is in its file. libpcap hands over a block that is not full
    /// after a second, and an interrupt loses what it has not.
    fn drain(&self, file: &Path) {
        let quiet = match self {
            Self::Nobody => return,
            Self::Tapline(_) => SECOND / 2,
            Self::Other(_) => SECOND * 3 / 2,
        };
        let size = || {
            let metadata = fs::metadata(file).or_else(|_| fs::metadata(hidden(file)));
            metadata.map_or(0, |metadata| metadata.len())
        };
        let (mut before, mut since) = (size(), Instant::now());
        while since.elapsed() < quiet {
            thread::sleep(SECOND / 20);
            if size() != before {
                (before, since) = (size(), Instant::now());
            }
        }
    }

    fn stop(self) {
        match self {
            Self::Nobody => {}
            // Checks that its own account adds up.
            Self::Tapline(capture) => drop(capture.stop().success()),
            Self::Other(mut child) => {
                kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
                child.wait().unwrap();
            }
        }
    }
}

/// Where `tapline` writes until the file is whole.
fn hidden(file: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(file.file_name().unwrap());
    name.push(".part");
    file.with_file_name(name)
}

/// Median, least and most.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    };
    (median, sorted[0], sorted[sorted.len() - 1])
}

fn streams(folder: &Path) {
    /// Watcher, and the port that it asks for.
    const WATCHERS: [(&str, Tool, Option<u16>); 4] = [
        ("off", Tool::Nobody, None),
        ("tapline tap, nothing matched", Tool::Tap, Some(9)),
        ("tapline tap, everything matched", Tool::Tap, None),
        ("tcpdump, everything matched", Tool::Tcpdump, None),
    ];
    let repeats = setting("TAPLINE_BENCH_REPEATS", 3);
    let seconds = setting("TAPLINE_BENCH_SECONDS", 2).to_string();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    veth.left.add_address("10.0.0.1/24");
    veth.right.add_address("10.0.0.2/24");
    let mut server = right.spawn(&["iperf3", "--server"]);
    wait_until("iperf3", SECOND * 10, || {
        !right.run(&["ss", "-Hltn", "sport = :5201"]).stdout.is_empty()
    });

    let mut rates = [const { Vec::new() }; WATCHERS.len()];
    let mut ratios = [const { Vec::new() }; WATCHERS.len()];
    for round in 0..repeats as usize {
        let mut now = [0.0; WATCHERS.len()];
        for turn in 0..WATCHERS.len() {
            // Another one begins each round.
            let at = (round + turn) % WATCHERS.len();
            let (_, tool, port) = WATCHERS[at];
            let file = folder.join("stream");
            let line = tool.line(&veth.right.name, file.to_str().unwrap(), port);
            let watcher = Watcher::start(tool, &right, &line);
            let client = ["iperf3", "--client", "10.0.0.2", "--json", "--time", &seconds];
            let report: serde_json::Value =
                serde_json::from_slice(&left.run(&client).stdout).unwrap();
            watcher.stop();
            let _ = fs::remove_file(file);
            now[at] = report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e9;
        }
        for at in 0..WATCHERS.len() {
            rates[at].push(now[at]);
            ratios[at].push(now[at] / now[0]);
        }
    }
    server.kill().unwrap();
    server.wait().unwrap();

    println!("\nTCP stream, {repeats} rounds of {seconds} s");
    println!("{:<34} {:>10} {:>8} {:>17}", "", "Gbit/s", "ratio", "least to most");
    for (at, (name, ..)) in WATCHERS.iter().enumerate() {
        let (rate, ..) = spread(&rates[at]);
        let (ratio, least, most) = spread(&ratios[at]);
        println!("{name:<34} {rate:>10.2} {ratio:>8.3} {least:>8.3} {most:>8.3}");
    }
}

/// A step of a sweep.
#[derive(Clone, Copy, Debug)]
struct Step {
    /// Frames a second that were sent.
    rate: u64,
    /// Numbers of its frames.
    first: u64,
    end: u64,
    /// Of them, those that came out of the pair.
    arrived: u64,
    /// CPU time of the watcher and of all CPUs together.
    own: Duration,
    machine: Duration,
}

/// What a sweep found.
#[derive(Clone, Copy, Debug, Default)]
struct Swept {
    /// The highest rate without a loss, frames a second.
    lossless: f64,
    /// That was not the watcher's limit but the generator's.
    at_least: bool,
    /// Over the steps up to there: of the watcher, microseconds per captured packet.
    own_us: f64,
    /// Of the whole machine, microseconds per packet that came by.
    machine_us: f64,
}

/// CPU time that was not idle, of all CPUs together.
fn busy() -> Duration {
    let text = fs::read_to_string("/proc/stat").unwrap();
    let fields = text.lines().next().unwrap().split_whitespace().skip(1);
    let ticks: Vec<u64> = fields.map(|field| field.parse().unwrap()).collect();
    // All but idle and waiting for a disk; guests are counted in user time.
    let busy: u64 = [0, 1, 2, 5, 6].iter().map(|at| ticks[*at]).sum();
    Duration::from_millis(busy * 10)
}

fn sweep(folder: &Path, tool: Tool, size: usize, port: Option<u16>) -> Swept {
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options::default());
    let flows = if port.is_some() { FLOWS } else { 1 };
    // A frame's checksum is not part of it.
    let template = Template { length: size - 4, flows, ..Template::default() };
    let generator = Generator::new(&veth.left, template.clone()).pinned(0);
    let file = folder.join("sweep");
    let line = tool.line(&veth.right.name, file.to_str().unwrap(), port);
    let watcher = Watcher::start(tool, &right, &line);

    let length = Duration::from_millis(setting("TAPLINE_BENCH_STEP_MS", 400));
    let mut steps: Vec<Step> = Vec::new();
    let mut arrived = 0;
    for rate in RATES {
        let (first, own, machine) = (generator.sent(), watcher.cpu_time(), busy());
        let start = Instant::now();
        let sent = generator.send_paced(rate, length);
        let elapsed = start.elapsed();
        let now = veth.settle(generator.sent());
        let step = Step {
            rate,
            first,
            end: first + sent,
            arrived: now - arrived,
            own: watcher.cpu_time().saturating_sub(own),
            machine: busy().saturating_sub(machine),
        };
        arrived = now;
        steps.push(step);
        // The generator or the pair can do no more.
        if elapsed > length + length / 10 + SET_UP || step.arrived < sent * 98 / 100 {
            break;
        }
    }
    watcher.drain(&file);
    watcher.stop();
    let swept = judge(tool, &file, &template, &steps);
    let _ = fs::remove_file(&file);
    swept
}

/// Counts the frames of each step in the file.
fn judge(tool: Tool, file: &Path, template: &Template, steps: &[Step]) -> Swept {
    let mut captured = vec![0_u64; steps.len()];
    if tool == Tool::Nobody {
        captured = steps.iter().map(|step| step.arrived).collect();
    } else {
        let mut packets = pcap::Capture::from_file(file).unwrap();
        while let Ok(packet) = packets.next_packet() {
            if packet.data.len() == template.length {
                let number = template.stamp(packet.data).sequence;
                if let Some(at) = steps.iter().position(|step| number < step.end) {
                    captured[at] += 1;
                }
            }
        }
    }
    let flows = u64::from(template.flows);
    let mut swept = Swept { at_least: true, ..Swept::default() };
    let (mut own, mut machine, mut packets, mut seen) = (Duration::ZERO, Duration::ZERO, 0, 0);
    for (step, captured) in steps.iter().zip(&captured) {
        let asked_for = step.end.div_ceil(flows) - step.first.div_ceil(flows);
        let asked_for = if tool == Tool::Nobody { step.arrived } else { asked_for };
        let lost_before = step.end - step.first - step.arrived;
        if captured + lost_before < asked_for {
            swept.at_least = false;
            break;
        }
        swept.lossless = step.rate as f64;
        own += step.own;
        machine += step.machine;
        packets += captured;
        seen += step.arrived;
    }
    if packets > 0 {
        swept.own_us = own.as_secs_f64() * 1e6 / packets as f64;
        swept.machine_us = machine.as_secs_f64() * 1e6 / seen as f64;
    }
    swept
}

fn sweeps(folder: &Path) {
    const TOOLS: [Tool; 7] = [
        Tool::Nobody,
        Tool::Tap,
        Tool::TapXdp,
        Tool::Exclusive,
        Tool::Tcpdump,
        Tool::Dumpcap,
        Tool::NetsniffNg,
    ];
    let repeats = setting("TAPLINE_BENCH_SWEEPS", 1) as usize;
    for port in [None, Some(Template::default().sport)] {
        let what = if port.is_some() { "1 % matched" } else { "everything matched" };
        for size in SIZES {
            let mut results = [const { Vec::new() }; TOOLS.len()];
            for round in 0..repeats {
                for turn in 0..TOOLS.len() {
                    let at = (round + turn) % TOOLS.len();
                    results[at].push(sweep(folder, TOOLS[at], size, port));
                }
            }
            println!("\nUDP frames of {size} bytes, {what}; rates in frames a second");
            println!(
                "{:<20} {:>12} {:>21} {:>16} {:>16}",
                "", "lossless", "least to most", "own µs/captured", "machine µs/seen"
            );
            for (tool, results) in TOOLS.iter().zip(&results) {
                let each = |what: fn(&Swept) -> f64| results.iter().map(what).collect::<Vec<_>>();
                let (rate, least, most) = spread(&each(|swept| swept.lossless));
                let (own, ..) = spread(&each(|swept| swept.own_us));
                let (machine, ..) = spread(&each(|swept| swept.machine_us));
                let sign = if results.iter().all(|swept| swept.at_least) { "≥" } else { "" };
                let rate = format!("{sign}{rate:.0}");
                println!(
                    "{:<20} {rate:>12} {least:>10.0} {most:>10.0} {own:>16.3} {machine:>16.3}",
                    tool.name()
                );
            }
        }
    }
}

fn main() {
    // Cargo says `--bench` for `cargo bench` alone; criterion's filters are for all benches.
    let args: Vec<String> = env::args().skip(1).collect();
    let flag = |name: &str| args.iter().any(|arg| arg == name);
    let mut filters = args.iter().filter(|arg| !arg.starts_with('-')).peekable();
    let wanted = filters.peek().is_none() || filters.any(|filter| "harm".contains(filter.as_str()));
    if !flag("--bench") || flag("--test") || !wanted {
        return;
    }
    if !Uid::effective().is_root() {
        println!("harm: skipped: needs root");
        return;
    }
    let start = Instant::now();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let kernel = Command::new("uname").arg("-r").output().unwrap();
    println!(
        "{} CPUs, Linux {}",
        thread::available_parallelism().unwrap(),
        String::from_utf8_lossy(&kernel.stdout).trim()
    );
    streams(folder.path());
    sweeps(folder.path());
    println!("\n{:.0} s", start.elapsed().as_secs_f64());
}
