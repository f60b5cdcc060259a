//! `tapline capture` on the `tap` path, and what is attached to an interface.

use std::{fs, path::Path, process::Command, time::Duration};

use aya::programs::{SchedClassifier, tc::TcAttachType};
use capture_user::nic;
use nix::unistd::Pid;
use serde_json::Value;

use crate::{capture::command, process::wait_until, veth::End};

/// `tapline capture --json` at an end of a veth pair, with no flag that says how packets are taken.
pub fn tap(end: &End<'_>, write: &Path, more: &[&str]) -> Command {
    let args = ["-i", &end.name, "-w", write.to_str().unwrap(), "--json"];
    command(end.namespace, &[&args, more].concat())
}

/// Every program that an interface runs, as hook and name: `tcx/ingress tap_ingress`.
pub fn attached(end: &End<'_>) -> Vec<String> {
    let mut all = end.namespace.enter(|| {
        let mut all = Vec::new();
        for (hook, kind) in
            [("tcx/ingress", TcAttachType::Ingress), ("tcx/egress", TcAttachType::Egress)]
        {
            let (_, programs) = SchedClassifier::query_tcx(&end.name, kind).unwrap();
            let name = |at: usize| programs[at].name_as_str().unwrap_or("?").to_owned();
            all.extend((0..programs.len()).map(|at| format!("{hook} {}", name(at))));
        }
        if let Some(holder) = nic::xdp_holder(end.index).unwrap() {
            all.push(format!("xdp {}", holder.program_name.unwrap_or_default()));
        }
        all
    });
    for hook in ["ingress", "egress"] {
        let output = end.namespace.run(&["tc", "filter", "show", "dev", &end.name, hook]);
        let text = String::from_utf8(output.stdout).unwrap();
        for line in
            text.lines().filter(|line| line.contains(" bpf ") && line.contains("direct-action"))
        {
            let name = line.split_whitespace().find(|word| word.starts_with("tap_"));
            all.push(format!("tc/{hook} {}", name.unwrap_or(line)));
        }
    }
    all
}

/// Waits until the stack behind an end without an address has refused this many frames in all: every
/// hook in front of it has seen them by then.
pub fn wait_until_refused(end: &End<'_>, count: u64) {
    wait_until("frames to reach the stack", Duration::from_secs(10), || {
        let output =
            end.namespace.run(&["ip", "-s", "-s", "-json", "link", "show", "dev", &end.name]);
        let links: Value = serde_json::from_slice(&output.stdout).unwrap();
        let received = &links[0]["stats64"]["rx"];
        // IP that is addressed to another host, and what no protocol asks for.
        let refused = ["otherhost", "dropped"].map(|name| received[name].as_u64().unwrap_or(0));
        refused.iter().sum::<u64>() >= count
    });
}

/// How many ask the interface to receive what is addressed to others.
pub fn promiscuity(end: &End<'_>) -> u64 {
    let output = end.namespace.run(&["ip", "-details", "-json", "link", "show", "dev", &end.name]);
    let links: Value = serde_json::from_slice(&output.stdout).unwrap();
    links[0]["promiscuity"].as_u64().unwrap()
}

/// CPU time that a process and all its threads that still run have had.
pub fn cpu_time(process: Pid) -> Duration {
    let mut total = 0;
    for thread in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        // Nanoseconds on a CPU, waiting for one, and time slices.
        let text = fs::read_to_string(thread.unwrap().path().join("schedstat")).unwrap();
        total += text.split(' ').next().unwrap().parse::<u64>().unwrap();
    }
    Duration::from_nanos(total)
}
