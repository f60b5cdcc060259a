//! The whole path, from the wire to the disk: `tapline` beside tcpdump, dumpcap and netsniff-ng, and
//! beside floors that nothing can be faster than. `cargo xtask bench` builds and runs it, as root.
//!
//! - Contestants take turns, another one begins each round, and what is told is the median of the rounds
//!   with its spread: a machine that others use disturbs all alike.
//! - What is sent is counted, what was captured is counted in the files, and for every run it must add
//!   up: offered = passed + written + each named drop. A run whose law is broken fails the bench.
//! - `closed loop`: the generator sends as fast as the contestant writes, and no packet may be lost.
//!   `sweep`: at rates that rise; `lossless` is the highest up to which nothing is lost. `steady`: all at
//!   the same rate, for CPU time and memory.
//! - CPU time is the whole machine's, kernel, interrupts and the writing back of files included, less
//!   what the same load takes when a program drops it; in parentheses, without that subtraction. Peak
//!   memory is `VmHWM`, which has the rings, UMEM and buffers in it.
//!
//! Nothing is installed. What is missing is said, and left out.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a bench fails by panicking, with a line number")]
#![expect(clippy::print_stdout, reason = "the tables are what it is for")]

mod floor;
mod jobs;
mod leaks;
mod long;
mod machine;
mod plot;
mod ratios;
mod recorder;
mod results;
mod run;
mod streams;
mod tool;
mod upload;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Parser, Subcommand, ValueEnum};
use nix::unistd::Uid;
use serde_json::{Map, Value, json};

use crate::{
    floor::Floor,
    leaks::Leftovers,
    results::{Entry, Part, Results},
    run::{Load, Pace, Size},
    tool::{PEERS, Tool},
};

/// Measure tapline beside other capture tools, and beside floors
#[derive(Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Args {
    #[command(subcommand)]
    inner: Option<Inner>,

    /// What to measure
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "closed,steady,sweep,one-percent,jobs,streams,recorder,upload"
    )]
    what: Vec<What>,

    /// Contestants
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "drop,receive,read,exclusive,tap,tcpdump,dumpcap,netsniff-ng"
    )]
    tools: Vec<Tool>,

    /// Frame sizes in bytes, 64 to 1518, or imix
    #[arg(long, value_delimiter = ',', default_value = "64,512,1500,imix")]
    sizes: Vec<Size>,

    /// Receive queues, each with a generator on a CPU of its own
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..=64))]
    queues: Vec<u32>,

    /// Rounds
    #[arg(long, default_value_t = 3)]
    repeats: usize,

    /// Length of a closed loop, of a steady stretch and of a stream, seconds
    #[arg(long, default_value = "2", value_parser = seconds)]
    seconds: Duration,

    /// Frames that may be on their way in a closed loop; of several, each contestant gets its best
    #[arg(long, value_delimiter = ',', default_value = "65536,32768,16384,8192,5120,4608,4032", value_parser = clap::value_parser!(u64).range(64..))]
    windows: Vec<u64>,

    /// Length of a step of a sweep, seconds
    #[arg(long, default_value = "0.3", value_parser = seconds)]
    step: Duration,

    /// First and last rate of a sweep, packets a second
    #[arg(long, num_args = 2, default_values_t = [100_000, 4_000_000])]
    rates: Vec<u64>,

    /// Steps of a sweep; each rate is the same factor above the one before
    #[arg(long, default_value_t = 24)]
    steps: u32,

    /// Rate of a steady stretch, packets a second
    #[arg(long, default_value_t = 200_000)]
    steady: u64,

    /// Instead of all else, run each of the contestants that are `tapline` for this long and watch its memory,
    /// seconds
    #[arg(long, value_parser = seconds)]
    long: Option<Duration>,

    /// Where the contestants write, and the report goes [default: bench in cargo's target folder]
    #[arg(long)]
    out: Option<PathBuf>,

    /// A few seconds of everything, only to see that all laws add up and nothing is left behind
    #[arg(long)]
    smoke: bool,
}

#[derive(Subcommand)]
#[command(hide = true)]
enum Inner {
    /// A floor, started by a bench
    Floor { floor: Floor, interface: String, progress: PathBuf },
    /// The engine with this many jobs, started by a bench
    Jobs { count: usize, interface: String, folder: PathBuf },
}

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    /// The rate in a closed loop
    Closed,
    /// CPU time and memory, all at the same rate
    Steady,
    /// Loss against offered load
    Sweep,
    /// What traffic suffers, 1 % of it captured
    OnePercent,
    /// 64 jobs instead of one
    Jobs,
    /// What a TCP stream (iperf3) and requests to a web server (nginx, wrk) suffer
    Streams,
    /// What the recorder costs, and how long a question to it takes
    Recorder,
    /// Whether what is captured leaves this host as fast as it comes
    Upload,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.filter(|time| !time.is_zero()).ok_or_else(|| "give a time in seconds".into())
}

fn main() -> ExitCode {
    let mut args = Args::parse();
    match &args.inner {
        Some(Inner::Floor { floor, interface, progress }) => {
            println!("{}", floor::run(*floor, interface, progress));
        }
        Some(Inner::Jobs { count, interface, folder }) => {
            println!("{}", jobs::run(*count, interface, folder));
        }
        None => {
            if !Uid::effective().is_root() {
                eprintln!("error: network namespaces and XDP need root");
                return ExitCode::FAILURE;
            }
            if args.smoke {
                args.shrink();
            }
            return bench(&args);
        }
    }
    ExitCode::SUCCESS
}

impl Args {
    /// To a run of a few seconds.
    fn shrink(&mut self) {
        self.sizes = vec![Size::Fixed(64), Size::Imix];
        self.queues = vec![1, 2];
        self.repeats = 1;
        self.windows = vec![8192];
        self.seconds = Duration::from_millis(200);
        self.step = Duration::from_millis(50);
        self.steps = 3;
        self.rates = vec![50_000, 200_000];
        self.steady = 100_000;
        self.what = vec![What::Closed, What::Steady, What::Sweep, What::OnePercent, What::Jobs];
        self.tools =
            vec![Tool::Drop, Tool::Receive, Tool::Read, Tool::Exclusive, Tool::Tap, Tool::TapXdp];
    }

    fn ladder(&self) -> Vec<Pace> {
        let (first, last) = (run::as_f64(self.rates[0]), run::as_f64(self.rates[1]));
        let steps = self.steps.max(2);
        #[expect(clippy::cast_sign_loss, reason = "a rate")]
        (0..steps)
            .map(|step| f64::from(step) / f64::from(steps - 1))
            .map(|part| Pace::Rate((first * (last / first).powf(part)) as u64))
            .collect()
    }
}

/// The contestants that are there; says which are not.
fn present(tools: &[Tool]) -> Vec<Tool> {
    let (there, missing): (Vec<Tool>, Vec<Tool>) =
        tools.iter().partition(|tool| tool.needs().is_none_or(machine::has));
    for tool in missing {
        println!("{} is not installed, and is left out", tool.name());
    }
    there
}

fn bench(args: &Args) -> ExitCode {
    let start = Instant::now();
    let out = args.out.clone().unwrap_or_else(default_out);
    fs::create_dir_all(&out).unwrap();
    let before = Leftovers::now(&out);
    let machine = machine::describe();
    println!("{machine}");
    let mut report = Map::new();
    report.insert("machine".into(), machine);

    let folder = tempfile::tempdir_in(&out).unwrap();
    let mut results = Results::default();
    if let Some(length) = args.long {
        let of = |tool| long::measure(tool, folder.path(), args.steady, length);
        let ours = |tool: &Tool| tool.writes() && !PEERS.contains(tool);
        let runs = args.tools.iter().copied().filter(ours).map(of);
        let values = runs.map(|(text, value)| {
            println!("{text}");
            value
        });
        report.insert("long".into(), values.collect());
    } else {
        measure(args, folder.path(), &mut results);
        tell(args, folder.path(), &out, &results, &mut report);
    }
    drop(folder);

    if args.smoke {
        before.wait_until_gone(&out);
    }
    fs::write(out.join("report.json"), format!("{:#}\n", Value::Object(report))).unwrap();
    println!("\n{:.0} s; {}", start.elapsed().as_secs_f64(), out.join("report.json").display());
    let broken = results.broken();
    for law in &broken {
        println!("the law is broken: {law}");
    }
    if broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// TARGET/bench, from TARGET/PROFILE/tapline-bench.
fn default_out() -> PathBuf {
    let own = env::current_exe().unwrap();
    own.parent().and_then(Path::parent).unwrap().join("bench")
}

/// The rounds.
fn measure(args: &Args, folder: &Path, results: &mut Results) {
    let tools = present(&args.tools);
    let mut windows = run::Windows::new(args.windows.clone());
    let wants = |what| args.what.contains(&what);
    let mut push = |part, load, run: run::Run| {
        eprintln!(
            "{load}: {}: {}",
            run.tool.name(),
            run.steps.last().map_or_else(String::new, |step| step.json().to_string())
        );
        results.entries.push(Entry { part, load, run });
    };
    for round in 0..args.repeats {
        for &queues in &args.queues {
            for &size in &args.sizes {
                let load = Load { size, one_percent: false, queues };
                for tool in rotated(&tools, round) {
                    if wants(What::Closed) {
                        push(Part::Closed, load, windows.closed(tool, load, folder, args.seconds));
                    }
                    if wants(What::Steady) {
                        let paces = [Pace::Rate(args.steady)];
                        let run = run::run(tool, load, folder, &paces, args.seconds, |_| true);
                        push(Part::Steady, load, run);
                    }
                    if wants(What::Sweep) {
                        // Not on once the generator or the pair can do no more.
                        let go_on = |step: &run::Step| {
                            let Pace::Rate(rate) = step.pace else { return false };
                            step.offered() > 0.9 * run::as_f64(rate)
                        };
                        let run = run::run(tool, load, folder, &args.ladder(), args.step, go_on);
                        push(Part::Sweep, load, run);
                    }
                }
                let load = Load { one_percent: true, ..load };
                let filtering = tools.iter().copied().filter(|tool| tool.filters());
                let watchers: Vec<_> =
                    [Tool::Nobody, Tool::LookOn, Tool::Pass].into_iter().chain(filtering).collect();
                for tool in rotated(&watchers, round) {
                    if wants(What::OnePercent) && size != Size::Imix && queues == 1 {
                        push(Part::Closed, load, windows.closed(tool, load, folder, args.seconds));
                    }
                }
            }
        }
        let load = results::plain(Size::Fixed(64));
        for tool in rotated(&[Tool::Job1, Tool::Jobs64], round) {
            if wants(What::Jobs) {
                push(Part::Closed, load, windows.closed(tool, load, folder, args.seconds));
            }
        }
        results.disk.extend(floor::disk(folder, args.seconds));
    }
}

/// Another one begins each round.
fn rotated(tools: &[Tool], round: usize) -> impl Iterator<Item = Tool> {
    let first = if tools.is_empty() { 0 } else { round % tools.len() };
    let (late, early) = tools.split_at(first);
    [early, late].concat().into_iter()
}

/// Prints tables, draws plots, and fills the report.
fn tell(
    args: &Args,
    folder: &Path,
    out: &Path,
    results: &Results,
    report: &mut Map<String, Value>,
) {
    for load in results.loads() {
        println!("{}", results.table(load));
        if args.what.contains(&What::Sweep) && !load.one_percent {
            let tools = results.tools(load);
            let curves: Vec<_> = tools
                .iter()
                .map(|tool| (tool.name(), results.curve(load, *tool)))
                .filter(|(_, points)| !points.is_empty())
                .collect();
            let name = format!("loss-{}-{}q.svg", load.size, load.queues);
            let svg = plot::draw(&format!("Loss against offered load: {load}"), &curves);
            fs::write(out.join(name), svg).unwrap();
        }
    }
    if args.what.contains(&What::Streams) && !args.smoke {
        let (text, values) = streams::measure(folder, args.repeats, args.seconds);
        println!("{text}");
        report.insert("streams".into(), values);
    }
    if args.what.contains(&What::Recorder) && !args.smoke {
        let (text, values) = recorder::cost(folder, args.repeats, args.steady, args.seconds);
        println!("{text}");
        report.insert("recorder_cost".into(), values);
        if present(&[Tool::Tcpdump]).is_empty() {
            println!("questions to the recorder are not measured without tcpdump");
        } else {
            let (text, values) = recorder::questions(folder, args.repeats);
            println!("{text}");
            report.insert("recorder_questions".into(), values);
        }
    }
    if args.what.contains(&What::Upload) && !args.smoke {
        let (text, values) = upload::measure(args.repeats, args.seconds);
        println!("{text}");
        report.insert("upload".into(), values);
    }
    let ratios = ratios::of(results);
    println!("{}", ratios::show(&ratios));
    let lines = args.tools.iter().map(|tool| {
        let line = tool.line("IFACE", Path::new("FILE"), None);
        let words: Vec<_> = line.iter().map(|word| word.to_string_lossy()).collect();
        json!({ "tool": tool.name(), "line": words.join(" ") })
    });
    report.insert("commands".into(), lines.collect());
    report.insert("peers".into(), PEERS.map(tool::version).into_iter().flatten().collect());
    report.insert("ratios".into(), ratios.iter().map(ratios::Ratio::json).collect());
    if let Value::Object(values) = results.json() {
        report.extend(values);
    }
}
