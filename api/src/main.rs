//! `taplined`: the PCAPs API on this host.
#![forbid(unsafe_code)]

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
    str::FromStr as _,
};

use api::{
    auth::{NewToken, Permission, Tokens},
    config::{Config, SAMPLE},
    id, server,
};
use capture_user::error::with_causes;
use clap::{Args, Parser, Subcommand};
use tracing_subscriber::{
    filter::Targets, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

/// Serve the PCAPs API on this host's interfaces.
#[derive(Parser)]
#[command(name = "taplined", version, max_term_width = 100, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    file: ConfigFile,

    /// Only say whether the configuration can be used
    #[arg(long)]
    check: bool,

    /// Print a configuration with every key, its default and its meaning
    #[arg(long, conflicts_with_all = ["check", "config"])]
    print_config: bool,

    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Args)]
struct ConfigFile {
    /// Configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/tapline/taplined.toml")]
    config: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Make tokens, while the daemon runs or not
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
}

#[derive(Subcommand)]
enum TokenCommand {
    /// Make a token and print it: only its digest is kept
    New {
        #[command(flatten)]
        file: ConfigFile,

        /// Account id, 32 hexadecimal digits; repeat for several
        #[arg(long = "account", value_name = "ID", required = true, value_parser = account)]
        accounts: Vec<u128>,

        /// What the token may do
        #[arg(long)]
        permission: Permission,
    },
}

fn account(text: &str) -> Result<u128, String> {
    id::parse(text).ok_or_else(|| "an account id is 32 hexadecimal digits".into())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "taplined: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<(), Box<dyn std::error::Error>> {
    let mut out = io::stdout();
    if cli.print_config {
        out.write_all(SAMPLE.as_bytes())?;
        return Ok(());
    }
    match cli.command {
        Some(Command::Token { command: TokenCommand::New { file, accounts, permission } }) => {
            let config = Config::read(&file.config)?;
            let token = Tokens::new(&config.data_dir).create(&NewToken { accounts, permission })?;
            writeln!(out, "{token}")?;
        }
        None => {
            let config = Config::read(&cli.file.config)?;
            if cli.check {
                writeln!(out, "{}: can be used", cli.file.config.display())?;
                return Ok(());
            }
            log_to_stderr(&config.log)?;
            server::run(&config)?;
        }
    }
    Ok(())
}

/// JSON lines, with what the engine logs.
fn log_to_stderr(filter: &str) -> Result<(), Box<dyn std::error::Error>> {
    let lines = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_writer(io::stderr);
    tracing_subscriber::registry().with(Targets::from_str(filter)?).with(lines).try_init()?;
    Ok(())
}
