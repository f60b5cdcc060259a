//! What is read of the machine: CPU time, memory, and what it is and has.
//!
//! CPU time is that of all CPUs together, user, kernel and interrupts, as the time that they were
//! neither idle, nor waiting for a disk, nor taken by the hypervisor. The kernel measures idle time; it
//! only samples what else a CPU does, which would miss half of what runs in interrupts.

use std::{
    env, fs, thread,
    time::{Duration, Instant},
};

use nix::{sys::utsname::uname, unistd::Pid};
use serde_json::{Value, json};

/// A tick of `/proc/stat`, milliseconds: `USER_HZ` is 100 wherever Linux runs.
const TICK_MS: u64 = 10;

/// Whether a program is installed.
pub(crate) fn has(program: &str) -> bool {
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .any(|folder| folder.join(program).is_file())
}

/// A reading of what all CPUs have done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Busy {
    at: Instant,
    /// Not available to programs, or not used by any.
    idle: Duration,
}

impl Busy {
    pub(crate) fn now() -> Self {
        let text = fs::read_to_string("/proc/stat").unwrap();
        let fields = text.lines().next().unwrap().split_whitespace().skip(1);
        let ticks: Vec<u64> = fields.map(|field| field.parse().unwrap()).collect();
        // Idle, waiting for a disk, stolen.
        let idle: u64 = [3, 4, 7].iter().map(|at| ticks[*at]).sum();
        Self { at: Instant::now(), idle: Duration::from_millis(idle * TICK_MS) }
    }

    /// CPU time since then.
    pub(crate) fn since(self) -> Duration {
        let now = Self::now();
        let all = (now.at - self.at) * cpus() as u32;
        all.saturating_sub(now.idle.saturating_sub(self.idle))
    }
}

pub(crate) fn cpus() -> usize {
    thread::available_parallelism().unwrap().get()
}

/// A field of `/proc/PID/status` in KiB, such as `VmHWM`; 0 if the process is gone.
pub(crate) fn memory(process: Pid, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.trim_start_matches(':').split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// Bytes that a process has written so far: by system calls, or, where it writes past them (direct
/// or mapped), to a disk.
pub(crate) fn written(process: Pid) -> u64 {
    let io = fs::read_to_string(format!("/proc/{process}/io")).unwrap_or_default();
    let field = |name: &str| {
        let line = io.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    field("wchar:").max(field("write_bytes:"))
}

/// What it is, for whoever reads the figures.
pub(crate) fn describe() -> Value {
    let first = |path: &str, key: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        line.split_once(':').map_or("", |(_, value)| value.trim()).to_owned()
    };
    let name = uname().unwrap();
    json!({
        "cpus": cpus(),
        "model": first("/proc/cpuinfo", "model name"),
        "memory": first("/proc/meminfo", "MemTotal"),
        "kernel": name.release().to_string_lossy(),
    })
}
