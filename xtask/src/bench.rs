//! `cargo xtask bench`: the whole path beside other tools, measured by `tapline-bench` of package
//! `tapline-benches`, which runs as root. Installs nothing: what it lacks is said, by `tapline-bench` what
//! it can do without. The criterion benches are `cargo bench`'s.

use std::ffi::{OsStr, OsString};

use anyhow::{Result, bail};

use crate::process::{Privilege, as_root, cargo, exec, privilege, target_dir};
use crate::{setup, test};

#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// Passed on; `--help` says what there is
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let missing @ [_, ..] = setup::missing(&[setup::Use::Build, setup::Use::Bench]).as_slice() {
        bail!("missing: {}; `cargo xtask setup` installs it", missing.join(" "));
    }
    let mut build = cargo();
    build.args(["build", "--release", "--package", "tapline-benches", "--bin", "tapline-bench"]);
    build.args(["--package", "capture-user", "--bin", "tapline"]);
    exec(build.args(["--package", "api", "--bin", "taplined"]))?;
    start(&args.arguments)
}

/// Runs what has been built.
fn start(arguments: &[OsString]) -> Result<()> {
    let folder = target_dir().join("release");
    let privilege = privilege();
    let asks = arguments.iter().any(|argument| argument == "--help" || argument == "-h");
    if privilege == Privilege::None && !asks {
        bail!("network namespaces and XDP need root: run it as root, or with sudo");
    }
    let (tapline, taplined) = (folder.join("tapline"), folder.join("taplined"));
    let variables = [
        ("TAPLINE_BIN", tapline.as_os_str()),
        ("TAPLINED_BIN", taplined.as_os_str()),
        ("RUST_BACKTRACE", OsStr::new("1")),
    ];
    exec(as_root(privilege, folder.join("tapline-bench"), &variables).args(arguments))
}

/// A few seconds of everything, only to see that it adds up and leaves nothing behind. Runs what the tests
/// are run with: fewer packages at once would be other features of some, and a second build.
pub(crate) fn smoke() -> Result<()> {
    exec(&mut test::release_build())?;
    start(&["--smoke".into()])
}
