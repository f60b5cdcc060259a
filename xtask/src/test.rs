//! `cargo xtask test`: builds everything once, runs it, and ends in one line of counts.
//!
//! Unit tests and doc tests run as the user. The end-to-end tests of package `tapline-tests` make
//! network namespaces, so they run as root; they load the whole machine, so they run one at a time.
//! A test that cannot run here says so with a line `SKIPPED <name>: <reason>` on standard error.

use std::{
    env,
    ffi::OsStr,
    fmt,
    io::{BufRead as _, BufReader, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::process::{
    Privilege, as_root, cargo, command, output, privilege, probe, show, target_dir,
};
use crate::setup;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only tests whose name contains this
    pub(crate) filter: Option<String>,
    /// Then run the tests of the packages with `unsafe` code again, under `AddressSanitizer`
    #[arg(long)]
    pub(crate) asan: bool,
    /// Count a skipped test as a failure; also with `TAPLINE_REQUIRE_ALL=1`
    #[arg(long)]
    pub(crate) require_all: bool,
}

/// Packages with `unsafe` code, and the one that exercises it end to end.
const UNSAFE_PACKAGES: &[&str] = &["capture-ebpf", "capture-user", "tapline-tests"];

/// The package whose tests need root.
const END_TO_END: &str = "tapline-tests";

/// The programs that the end-to-end tests start, and the variables that tell them where they are.
const PROGRAMS: &[(&str, &str)] = &[("tapline", "TAPLINE_BIN"), ("taplined", "TAPLINED_BIN")];

/// Set to 1, a skipped test is a failure: CI has all that the tests need.
const REQUIRE_ALL: &str = "TAPLINE_REQUIRE_ALL";

/// One way to build and run the tests.
struct Leg {
    /// Added to the name of what runs.
    suffix: &'static str,
    /// Arguments for the end-to-end tests.
    arguments: &'static [&'static str],
}

const RELEASE: Leg = Leg { suffix: "", arguments: &["--test-threads=1"] };

const ASAN: Leg = Leg {
    suffix: ", AddressSanitizer",
    // What runs is what reaches `unsafe` code: sockets, rings, the system calls around them. The daemon
    // has none and takes as long to compile as all the rest; the others time things, or say what they
    // say a hundred thousand times.
    arguments: &[
        "--test-threads=1",
        "--skip=api::",
        "--skip=cli::",
        "--skip=faults::",
        "--skip=harm::",
        "--skip=property::",
        "--skip=tap_verdict::",
        "--skip=an_idle_capture",
    ],
};

/// A test run that prints nothing for so long is stuck: it is killed, so that CI can say where.
const SILENCE: Duration = Duration::from_mins(10);

/// Tests failed, and the counts have said so.
#[derive(Debug)]
pub(crate) struct Failed;

impl fmt::Display for Failed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("tests failed")
    }
}

impl std::error::Error for Failed {}

pub(crate) fn run(args: &Args) -> Result<()> {
    tally(args)?.conclude()
}

/// Runs the tests. An error means that they could not be run at all.
pub(crate) fn tally(args: &Args) -> Result<Tally> {
    setup::ensure(&[setup::Use::Build, setup::Use::Demo, setup::Use::Test])?;
    let required = args.require_all || env::var_os(REQUIRE_ALL).is_some_and(|value| value == "1");
    let mut tally = Tally { all_required: required, ..Tally::default() };
    release_leg(args, &mut tally)?;
    if args.asan {
        asan_leg(args, &mut tally)?;
    }
    Ok(tally)
}

/// The build whose programs and tests are tried, and the demo in CI.
pub(crate) fn release_build() -> Command {
    let mut build = cargo();
    build.args(["build", "--release", "--workspace", "--lib", "--bins", "--tests"]);
    build
}

/// Everything, in the release profile: what is tested is what is shipped, and the dependencies are
/// compiled once.
fn release_leg(args: &Args, tally: &mut Tally) -> Result<()> {
    let built = Built::by(release_build())?;
    let server = match setup::s3_server() {
        Ok(path) => Some(path),
        // The tests that need it say so.
        Err(error) => {
            eprintln!("{error:#}; going on without it");
            None
        }
    };
    let server = server.as_ref().map(|path| ("S3S_FS_BIN", path.as_os_str()));
    built.run(&RELEASE, server.as_slice(), args, tally)?;

    let mut doc = cargo();
    doc.args(["test", "--release", "--workspace", "--doc"]);
    doc.args(args.filter.iter().flat_map(|filter| ["--", filter.as_str()]));
    tally.watch("doc tests", doc)
}

/// The packages with `unsafe` code, with `AddressSanitizer`, debug assertions and overflow checks.
fn asan_leg(args: &Args, tally: &mut Tally) -> Result<()> {
    let folder = target_dir().join("asan");
    // Nightly if it is there; otherwise the compiler at hand, told to act as one: both ship the
    // sanitizer's runtime.
    let mut build = if probe(command("rustup").args(["run", "nightly", "rustc", "-V"])).is_some() {
        let mut build = command("rustup");
        build.args(["run", "nightly", "cargo"]);
        // Where `cargo xtask` runs, this one names another toolchain.
        build.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO").env_remove("LD_LIBRARY_PATH");
        build
    } else {
        let mut build = cargo();
        build.env("RUSTC_BOOTSTRAP", "1");
        build
    };
    build
        .args(["build", "--lib", "--bins", "--tests"])
        // Some optimization, or the end-to-end tests take minutes.
        .args(["--config", "profile.dev.opt-level=1"])
        // With a target named, build scripts and macros are compiled without the sanitizer.
        .args(["--target", "x86_64-unknown-linux-gnu", "--target-dir"])
        .arg(&folder)
        .env("RUSTFLAGS", "-Zsanitizer=address")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    for package in UNSAFE_PACKAGES {
        build.args(["--package", package]);
    }
    // Everything is several times slower, and a test may have to know.
    let variables = [("TAPLINE_ASAN", OsStr::new("1"))];
    Built::by(build)?.run(&ASAN, &variables, args, tally)
}

/// What a build made.
#[derive(Default)]
struct Built {
    tests: Vec<TestBinary>,
    /// Variable, path.
    programs: Vec<(&'static str, PathBuf)>,
}

struct TestBinary {
    package: String,
    name: String,
    executable: PathBuf,
    /// Where cargo would run it.
    folder: PathBuf,
}

impl Built {
    /// Runs a cargo command that builds, and notes what it made.
    fn by(mut cargo: Command) -> Result<Self> {
        cargo.args(["--message-format", "json-render-diagnostics"]);
        let messages = output(&mut cargo)?;
        let mut built = Self::default();
        for line in messages.lines() {
            let message: Value = serde_json::from_str(line)
                .with_context(|| format!("cargo said what is not JSON: {line}"))?;
            built.note(&message);
        }
        // The end-to-end tests take longest; let what is quick fail first.
        built.tests.sort_by_key(|test| test.package == END_TO_END);
        Ok(built)
    }

    fn note(&mut self, message: &Value) {
        let Some(executable) = message["executable"].as_str().map(PathBuf::from) else {
            return;
        };
        let name = message["target"]["name"].as_str().unwrap_or_default();
        let folder = Path::new(message["manifest_path"].as_str().unwrap_or_default())
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default();
        if message["profile"]["test"] == true {
            // `path+file:///.../tests#tapline-tests@0.1.0`, or `...#0.1.0` where the folder has the
            // package's name.
            let id = message["package_id"].as_str().unwrap_or_default();
            let (place, version) = id.split_once('#').unwrap_or_default();
            let package = version.split_once('@').map_or_else(
                || place.rsplit('/').next().unwrap_or_default(),
                |(package, _)| package,
            );
            self.tests.push(TestBinary {
                package: package.to_owned(),
                name: name.to_owned(),
                executable,
                folder,
            });
        } else if let Some((_, variable)) = PROGRAMS.iter().find(|(program, _)| *program == name) {
            self.programs.push((variable, executable));
        }
    }

    fn run(
        &self,
        leg: &Leg,
        variables: &[(&str, &OsStr)],
        args: &Args,
        tally: &mut Tally,
    ) -> Result<()> {
        let privilege = privilege();
        let mut variables = variables.to_vec();
        variables.push(("RUST_BACKTRACE", OsStr::new("1")));
        variables.extend(self.programs.iter().map(|(name, path)| (*name, path.as_os_str())));
        if tally.all_required {
            variables.push((REQUIRE_ALL, OsStr::new("1")));
        }
        for test in &self.tests {
            let mut variables = variables.clone();
            variables.push(("CARGO_MANIFEST_DIR", test.folder.as_os_str()));
            let mut command = if test.package == END_TO_END {
                let mut command = as_root(privilege, &test.executable, &variables);
                command.args(leg.arguments);
                command
            } else {
                as_root(Privilege::None, &test.executable, &variables)
            };
            command.current_dir(&test.folder).args(&args.filter);
            tally.watch(&format!("{}: {}{}", test.package, test.name, leg.suffix), command)?;
        }
        Ok(())
    }
}

/// How the tests went.
#[derive(Default)]
pub(crate) struct Tally {
    passed: u64,
    failed: u64,
    /// What was skipped, and why.
    skipped: Vec<String>,
    /// Test binaries with a failure.
    failures: Vec<String>,
    /// A skip is a failure.
    all_required: bool,
}

impl Tally {
    /// Runs a command that runs tests, shows what it prints, and counts.
    fn watch(&mut self, name: &str, mut command: Command) -> Result<()> {
        println!("\n--- {name}");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", show(&command)))?;
        // Two pipes: in one, a line on standard error would land in the middle of libtest's.
        let (sender, lines) = mpsc::channel();
        forward(child.stdout.take(), sender.clone(), Line::Out);
        forward(child.stderr.take(), sender, Line::Err);

        let mut counts = Counts::default();
        let mut stuck = false;
        loop {
            match lines.recv_timeout(if stuck { Duration::from_secs(5) } else { SILENCE }) {
                Ok(Line::Out(line)) => {
                    println!("{line}");
                    counts.read(&line);
                }
                Ok(Line::Err(line)) => {
                    eprintln!("{line}");
                    counts.skipped.extend(line.strip_prefix("SKIPPED ").map(str::to_owned));
                }
                Err(RecvTimeoutError::Disconnected) => break,
                // What it started may hold the pipes, and their end never come.
                Err(RecvTimeoutError::Timeout) if stuck => break,
                Err(RecvTimeoutError::Timeout) => {
                    stuck = true;
                    child.kill().with_context(|| format!("cannot stop {}", show(&command)))?;
                }
            }
        }
        let status = child.wait().with_context(|| format!("lost {}", show(&command)))?;

        if !status.success() {
            // A crash reports no failed test, and is one.
            counts.failed = counts.failed.max(1);
            let why = if stuck { "stuck".to_owned() } else { status.to_string() };
            self.failures.push(format!("{name} ({why}) {}", counts.failures.join(", ")));
        }
        // To libtest a test that skips itself has passed.
        self.passed += counts.passed.saturating_sub(counts.skipped.len() as u64);
        self.failed += counts.failed;
        self.skipped.extend(counts.skipped);
        self.skipped.extend(counts.ignored);
        Ok(())
    }

    /// Prints the counts, as the last line; an error if any test failed, or none ran.
    pub(crate) fn conclude(&self) -> Result<()> {
        println!();
        for failure in &self.failures {
            println!("failed: {failure}");
        }
        for skip in &self.skipped {
            println!("skipped: {skip}");
        }
        let lacking = self.all_required && !self.skipped.is_empty();
        if lacking {
            println!("every test is required: a skipped one is a failure");
        }
        let none = self.passed + self.failed == 0 && self.skipped.is_empty();
        if none {
            println!("no test ran");
        }
        println!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped.len());
        if self.failed > 0 || lacking || none { Err(Failed.into()) } else { Ok(()) }
    }
}

enum Line {
    Out(String),
    Err(String),
}

/// Sends each line of a stream, from a thread of its own.
fn forward<R: Read + Send + 'static>(
    stream: Option<R>,
    to: mpsc::Sender<Line>,
    line: fn(String) -> Line,
) {
    thread::spawn(move || {
        // Bytes, not strings: what a test prints need not be UTF-8.
        for bytes in stream.map(BufReader::new).into_iter().flat_map(|stream| stream.split(b'\n')) {
            let Ok(bytes) = bytes else { return };
            if to.send(line(String::from_utf8_lossy(&bytes).into_owned())).is_err() {
                return;
            }
        }
    });
}

/// What one run of test binaries reports.
#[derive(Debug, Default, PartialEq)]
struct Counts {
    passed: u64,
    failed: u64,
    /// Names of failed tests.
    failures: Vec<String>,
    /// Names of `#[ignore]`d tests.
    ignored: Vec<String>,
    /// What skipped itself, and why.
    skipped: Vec<String>,
}

impl Counts {
    /// Reads a line of libtest's.
    fn read(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            let count = |what: &str| -> u64 {
                let words: Vec<_> =
                    result.split([' ', ';']).filter(|word| !word.is_empty()).collect();
                let at = words.iter().position(|word| *word == what);
                at.and_then(|at| words.get(at.checked_sub(1)?)?.parse().ok()).unwrap_or(0)
            };
            self.passed += count("passed");
            self.failed += count("failed");
        } else if let Some((name, outcome)) =
            line.strip_prefix("test ").and_then(|test| test.split_once(" ... "))
        {
            if let Some(reason) = outcome.strip_prefix("ignored") {
                self.ignored.push(format!("{name}: ignored{reason}"));
            } else if outcome == "FAILED" {
                self.failures.push(name.to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_over_result_lines() {
        let mut counts = Counts::default();
        for line in [
            "test ring::wraps ... ok",
            "test ring::drains ... FAILED",
            "test slow::soak ... ignored, takes an hour",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.01s",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 2.00s",
        ] {
            counts.read(line);
        }
        let expected = Counts {
            passed: 14,
            failed: 1,
            failures: vec!["ring::drains".to_owned()],
            ignored: vec!["slow::soak: ignored, takes an hour".to_owned()],
            skipped: Vec::new(),
        };
        assert_eq!(counts, expected);
    }

    #[test]
    fn a_skip_is_not_a_pass_and_a_crash_is_a_failure() {
        let mut tally = Tally::default();
        let mut skips = command("sh");
        skips.args([
            "-c",
            "echo 'SKIPPED a: no root' >&2; echo 'test result: ok. 2 passed; 0 failed'",
        ]);
        tally.watch("skips", skips).unwrap();
        let mut crashes = command("sh");
        crashes.args(["-c", "echo 'test b ... '; kill -9 $$"]);
        tally.watch("crashes", crashes).unwrap();
        assert_eq!((tally.passed, tally.failed), (1, 1));
        assert_eq!(tally.skipped, ["a: no root"]);
        assert!(tally.conclude().is_err());
    }

    #[test]
    fn a_run_without_tests_has_failed() {
        assert!(Tally::default().conclude().is_err());
    }
}
