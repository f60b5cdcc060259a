//! Running other programs, as whom, and where.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// The workspace's root folder.
pub(crate) fn root() -> PathBuf {
    // Cargo says at run time where the package lies now; the compiled-in path is for a binary that
    // is started by hand, or by sudo.
    let package = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.parent().map(Path::to_owned).unwrap_or_default()
}

/// Cargo's target folder.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// `PATH` with the folders of system tools, which an ordinary user's `PATH` leaves out on Debian.
pub(crate) fn path() -> OsString {
    let mut dirs: Vec<PathBuf> =
        env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    for dir in ["/usr/local/sbin", "/usr/sbin", "/sbin"] {
        if !dirs.iter().any(|known| known == Path::new(dir)) {
            dirs.push(dir.into());
        }
    }
    env::join_paths(dirs).unwrap_or_default()
}

/// Where a program is found, if it is.
pub(crate) fn which(program: &str) -> Option<PathBuf> {
    env::split_paths(&path()).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// A command that runs in the workspace's root and finds system tools.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root()).env("PATH", path());
    command
}

/// The cargo that runs xtask.
pub(crate) fn cargo() -> Command {
    command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs a command to its end; any exit status but 0 is an error.
pub(crate) fn exec(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", show(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", show(command));
    }
    Ok(())
}

/// What a command prints; its error output is let through.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", show(command)))?;
    if !output.status.success() {
        bail!("{} failed: {}", show(command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What a command prints, or `None` if it cannot be run or fails. For asking, not for doing.
pub(crate) fn probe(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A command as a person would type it.
pub(crate) fn show(command: &Command) -> String {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// How this process can act as root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// It is root.
    Root,
    /// `sudo` asks for no password.
    Sudo,
    /// Not without a person.
    None,
}

pub(crate) fn privilege() -> Privilege {
    if nix::unistd::geteuid().is_root() {
        Privilege::Root
    } else if probe(command("sudo").args(["-n", "true"])).is_some() {
        Privilege::Sudo
    } else {
        Privilege::None
    }
}

/// A command that runs as root, with these variables. Sudo drops the environment, so they are
/// spelled out on its command line.
pub(crate) fn as_root(
    privilege: Privilege,
    program: impl AsRef<OsStr>,
    variables: &[(&str, &OsStr)],
) -> Command {
    if privilege == Privilege::Sudo {
        let mut sudo = command("sudo");
        sudo.args(["-n", "env"]);
        let path = path();
        for (name, value) in variables.iter().copied().chain([("PATH", path.as_os_str())]) {
            let mut pair = OsString::from(name);
            pair.push("=");
            pair.push(value);
            sudo.arg(pair);
        }
        sudo.arg(program);
        sudo
    } else {
        let mut command = command(program);
        command.envs(variables.iter().copied());
        command
    }
}
