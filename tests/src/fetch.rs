//! Software of others, at the versions that the tests were written for: fetched once, and kept beside
//! what cargo builds.

use std::{
    env, fs,
    path::PathBuf,
    process::Command,
    sync::{Mutex, PoisonError},
};

use crate::daemon::cache;

/// One at a time: tests that need the same may run at once.
static FETCH: Mutex<()> = Mutex::new(());

/// An S3 server over a folder.
const S3S_FS: &str = "s3s-fs@0.14.1";

/// The mark of a folder in which all has been installed.
const COMPLETE: &str = "complete";

/// A Python that has these packages.
pub fn python(name: &str, packages: &[&str]) -> Result<PathBuf, String> {
    let _one_at_a_time = FETCH.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = cache(name);
    let (python, mark) = (folder.join("bin/python"), folder.join(COMPLETE));
    if mark.exists() {
        return Ok(python);
    }
    attempt(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    let mut install = Command::new(&python);
    attempt(install.args(["-m", "pip", "install", "--quiet"]).args(packages))?;
    fs::write(mark, "").unwrap();
    Ok(python)
}

/// A folder in which Node finds these packages.
pub fn node(name: &str, packages: &[&str]) -> Result<PathBuf, String> {
    let _one_at_a_time = FETCH.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = cache(name);
    let mark = folder.join(COMPLETE);
    if !mark.exists() {
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("package.json"), "{\"private\": true}").unwrap();
        attempt(
            Command::new("npm").args(["install", "--silent"]).args(packages).current_dir(&folder),
        )?;
        fs::write(mark, "").unwrap();
    }
    Ok(folder)
}

/// The path of `s3s-fs`: what `S3S_FS_BIN` names, or built now. `cargo xtask test` names one, built as
/// the user who owns cargo's folders.
pub fn s3s_fs() -> Result<PathBuf, String> {
    if let Some(named) = env::var_os("S3S_FS_BIN") {
        return Ok(named.into());
    }
    let _one_at_a_time = FETCH.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = cache("s3s-fs");
    let program = folder.join("bin/s3s-fs");
    if program.exists() {
        return Ok(program);
    }
    let mut install = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    install
        .args(["install", "--quiet", "--locked", "--features", "binary", S3S_FS])
        // Quick to build, but not so slow that hashing decides how long a test takes.
        .args(["--debug", "--config", "profile.dev.opt-level=1"])
        .args(["--config", "profile.dev.debug=false"])
        .arg("--root")
        .arg(&folder);
    attempt(&mut install)?;
    Ok(program)
}

fn attempt(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let said = || String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {}", said())) }
}
