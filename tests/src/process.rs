//! Other programs, and waiting.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

/// Runs a command that must succeed.
pub fn checked(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs a tool such as `capinfos` or `tshark` that must succeed without a complaint, and gives what
/// it prints.
pub fn tool(line: &[&str]) -> String {
    let mut command = Command::new(line[0]);
    let output = checked(command.args(&line[1..]));
    let stderr = String::from_utf8(output.stderr).unwrap();
    let complaints: Vec<_> =
        stderr.lines().filter(|line| !line.is_empty() && !is_greeting(line)).collect();
    assert!(complaints.is_empty(), "{line:?} complains: {complaints:#?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What tshark says about the user, not about the file.
fn is_greeting(line: &str) -> bool {
    line.starts_with("Running as user \"root\" and group \"root\"")
}

/// Polls until `done`; panics after `timeout`.
pub fn wait_until(what: &str, timeout: Duration, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < timeout, "waited {timeout:?} for: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The path of `tapline`: what `TAPLINE_BIN` names, or built now, as the tests were.
pub fn tapline_path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| built("TAPLINE_BIN", "capture-user", "tapline"))
}

/// `tapline` with these arguments.
pub fn tapline(args: &[&str]) -> Command {
    let mut command = Command::new(tapline_path());
    command.args(args);
    command
}

/// Cargo's target folder, and the profile's folder in it.
pub(crate) fn folders() -> (PathBuf, PathBuf) {
    // TARGET/PROFILE/deps/main-HASH of a test, TARGET/PROFILE/NAME of a program
    let this = env::current_exe().unwrap();
    let folder = this.parent().unwrap();
    let profile = if folder.ends_with("deps") { folder.parent().unwrap() } else { folder };
    (profile.parent().unwrap().to_path_buf(), profile.to_path_buf())
}

/// The path of a program: what the variable names, or built now, as the tests were.
pub(crate) fn built(variable: &str, package: &str, program: &str) -> PathBuf {
    if let Some(path) = env::var_os(variable) {
        return path.into();
    }
    let (target, folder) = folders();
    let profile = match folder.file_name().and_then(|name| name.to_str()).unwrap() {
        "debug" => "dev",
        name => name,
    };
    let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--package", package, "--bin", program, "--profile", profile])
        .arg("--target-dir")
        .arg(target);
    checked(&mut build);
    folder.join(program)
}
