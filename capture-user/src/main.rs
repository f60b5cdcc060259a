//! `tapline`: line-rate packet capture from a shell.

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use capture_user::{
    commands::{capture, doctor, interfaces, query},
    error::with_causes,
};
use clap::{CommandFactory as _, Parser, Subcommand};

/// Line-rate packet capture: filters and samples in the kernel, writes pcapng, counts every drop.
#[derive(Parser)]
#[command(name = "tapline", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Capture(Box<capture::CaptureArgs>),
    Query(query::QueryArgs),
    Interfaces(interfaces::InterfacesArgs),
    Doctor(doctor::DoctorArgs),
    /// Print a shell's completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, of `tapline` or of one of its commands
    Man {
        /// The command; without one, `tapline` itself
        command: Option<String>,
    },
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_target(false)
        .init();
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        Err(Failure { message, usage }) => {
            eprintln!("tapline: {message}");
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

/// What is said, and whether the command line is at fault.
struct Failure {
    message: String,
    usage: bool,
}

impl Failure {
    fn new(error: &dyn std::error::Error, usage: bool) -> Self {
        Self { message: with_causes(error), usage }
    }
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    let mut page = Vec::new();
    let mut code = ExitCode::SUCCESS;
    match command {
        Command::Capture(args) => {
            capture::run(&args).map_err(|error| Failure::new(&error, error.is_usage()))?;
        }
        Command::Query(args) => {
            query::run(&args).map_err(|error| Failure::new(&error, error.is_usage()))?;
        }
        Command::Interfaces(args) => {
            interfaces::run(&args, &mut page).map_err(|error| Failure::new(&error, false))?;
        }
        Command::Doctor(args) => {
            let fine =
                doctor::run(&args, &mut page).map_err(|error| Failure::new(&error, false))?;
            if !fine {
                code = ExitCode::FAILURE;
            }
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "tapline", &mut page);
        }
        Command::Man { command } => page = man(command.as_deref())?,
    }
    match io::stdout().write_all(&page) {
        // Whoever reads has read enough: `tapline doctor | head`.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(&error, false)),
        _ => Ok(code),
    }
}

fn man(name: Option<&str>) -> Result<Vec<u8>, Failure> {
    let mut top = Cli::command();
    top.build();
    let command = match name {
        None => top,
        Some(name) => {
            let known: Vec<_> = top.get_subcommands().map(clap::Command::get_name).collect();
            let unknown = Failure {
                message: format!("no command `{name}`; there are {}", known.join(", ")),
                usage: true,
            };
            top.find_subcommand(name).ok_or(unknown)?.clone()
        }
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(command)
        .render(&mut page)
        .map_err(|error| Failure::new(&error, false))?;
    Ok(page)
}
