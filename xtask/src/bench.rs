//! `cargo xtask bench`: the criterion benches of package `tapline-benches`.

use anyhow::Result;

use crate::process::{cargo, exec};
use crate::setup;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Passed on to criterion: a filter, `--save-baseline NAME`, ...
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    criterion: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    setup::ensure(&[setup::Use::Build, setup::Use::Test])?;
    exec(cargo().args(["bench", "--package", "tapline-benches", "--"]).args(&args.criterion))
}
