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
    PATH.get_or_init(|| env::var_os("TAPLINE_BIN").map_or_else(build_tapline, PathBuf::from))
}

/// `tapline` with these arguments.
pub fn tapline(args: &[&str]) -> Command {
    let mut command = Command::new(tapline_path());
    command.args(args);
    command
}

fn build_tapline() -> PathBuf {
    // TARGET/PROFILE/deps/main-HASH
    let test = env::current_exe().unwrap();
    let folder = test.parent().and_then(Path::parent).unwrap();
    let target = folder.parent().unwrap();
    let profile = match folder.file_name().and_then(|name| name.to_str()).unwrap() {
        "debug" => "dev",
        name => name,
    };
    let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--package", "capture-user", "--bin", "tapline", "--profile", profile])
        .arg("--target-dir")
        .arg(target);
    checked(&mut build);
    folder.join("tapline")
}
