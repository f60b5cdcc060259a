//! What a developer runs, as `cargo xtask VERB`. Needs stable Rust and no system library; what the
//! rest of the workspace needs, `setup` installs.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a developer's tool talks to its terminal")]

mod bench;
mod ci;
mod demo;
mod ebpf;
mod object;
mod process;
mod setup;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Build, test and try Tapline
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Find out what this machine lacks, and install it with apt
    Setup(setup::Args),
    /// Build the kernel programs and put them where they are embedded from
    Ebpf(ebpf::Args),
    /// Replay a real capture file through two network namespaces while `taplined` captures
    Demo,
    /// Run every test, the privileged ones as root, and count them
    Test(test::Args),
    /// Run the benchmarks
    Bench(bench::Args),
    /// Run every check that a change has to pass
    Ci,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().verb {
        Verb::Setup(args) => setup::run(&args),
        Verb::Ebpf(args) => ebpf::run(&args),
        Verb::Demo => demo::run(),
        Verb::Test(args) => test::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Ci => ci::run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // A run of tests ends in its counts, so it has said already what failed.
            if !error.is::<test::Failed>() {
                eprintln!("error: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}
