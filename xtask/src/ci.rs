//! `cargo xtask ci`: every check that a change has to pass, in the order of how soon each fails.

use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::process::{cargo, command, exec, probe, target_dir};
use crate::{bench, demo, ebpf, setup, test};

/// Pinned, so that a new release's opinion is a commit here and not a surprise.
const CARGO_DENY: &str = "0.20.2";

type Step = (&'static str, fn() -> Result<()>);

/// The test run follows these: its counts are the last line.
const STEPS: &[Step] = &[
    ("setup", || setup::ensure(setup::EVERYTHING)),
    ("fmt", || exec(cargo().args(["fmt", "--all", "--check"]))),
    ("licenses, bans, sources", deny),
    // In the release profile as the tests are, so that the C libraries are built once.
    ("clippy", || {
        let mut clippy = cargo();
        clippy.args(["clippy", "--release", "--workspace", "--all-targets"]);
        exec(clippy.args(["--", "--deny", "warnings"]))
    }),
    ("clippy of the kernel programs", || {
        ebpf::run(&ebpf::Args { lint: true, ..Default::default() })
    }),
    ("doc", || {
        // For those who work on it, private parts included; so links to them are no mistake.
        let mut doc = cargo();
        doc.args(["doc", "--release", "--workspace", "--no-deps", "--document-private-items"]);
        doc.env("RUSTDOCFLAGS", "--deny warnings --allow rustdoc::private_intra_doc_links");
        exec(&mut doc)
    }),
    ("kernel objects", || ebpf::run(&ebpf::Args { check: true, ..Default::default() })),
    ("build", || exec(&mut test::release_build())),
    ("demo", || demo::run_with(&target_dir().join("release/taplined"))),
    // No threshold on time: that all laws add up, and nothing is left behind.
    ("bench", bench::smoke),
];

pub(crate) fn run() -> Result<()> {
    let mut times = Vec::new();
    for (name, step) in STEPS {
        timed(name, &mut times, step)?;
    }
    let args = test::Args { filter: None, asan: true, require_all: true };
    let tally = timed("test", &mut times, || test::tally(&args))?;
    println!();
    for (name, seconds) in times {
        println!("{seconds:>6} s  {name}");
    }
    tally.conclude()
}

/// Announces a step, runs it, and notes how long it took.
fn timed<T>(
    name: &'static str,
    times: &mut Vec<(&'static str, u64)>,
    step: impl FnOnce() -> Result<T>,
) -> Result<T> {
    println!("\n=== {name}");
    let start = Instant::now();
    let value = step().with_context(|| format!("step \"{name}\" failed"))?;
    let seconds = start.elapsed().as_secs();
    println!("=== {name}: {seconds} s");
    times.push((name, seconds));
    Ok(value)
}

fn deny() -> Result<()> {
    let version = probe(command("cargo-deny").arg("--version"));
    if version.is_none_or(|version| version.trim_end() != format!("cargo-deny {CARGO_DENY}")) {
        let package = format!("cargo-deny@{CARGO_DENY}");
        exec(cargo().args(["install", "--locked", "--force", &package]))?;
    }
    exec(command("cargo-deny").args(["--workspace", "check", "bans", "licenses", "sources"]))
}
