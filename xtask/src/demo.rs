//! `cargo xtask demo`: a real capture file, replayed over a veth pair, captured by `taplined`.
//!
//! ```text
//!   network namespace tapline-demo-PID-a             tapline-demo-PID-b
//!   curl → taplined ← BPF rings ← tcx ← tap0 ═══ veth pair ═══ gen0 ← tcpreplay ← tests/data/web.pcap
//! ```
//!
//! The daemon runs with its defaults: a configuration file with a data folder and an interface is all
//! that it gets. Whatever ends the demo, Ctrl-C included, takes the namespaces down, and with them the
//! pair.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::process::{
    Privilege, cargo, command, exec, output, privilege, probe, root, show, target_dir,
};
use crate::setup;

/// A program to try in place of the one that is built.
const TAPLINED_BIN: &str = "TAPLINED_BIN";

/// Whose captures they are.
const ACCOUNT: &str = "023e105f4ecef8ad9ca31a8372d0c353";

/// The daemon's default address, and where the official clients look for an account's captures.
const URL: &str = "http://127.0.0.1:8700";

/// To start and to end; a fraction of a second is usual.
const PATIENCE: Duration = Duration::from_secs(20);

/// Packets per second of the replay: slow enough to watch, and done in a second or two.
const PACE: &str = "--pps=200";

/// Packets that are shown.
const SHOWN: &str = "10";

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

pub(crate) fn run() -> Result<()> {
    setup::ensure(&[setup::Use::Build, setup::Use::Demo])?;
    match env::var_os(TAPLINED_BIN) {
        Some(taplined) => run_with(Path::new(&taplined)),
        None => run_with(&build()?),
    }
}

/// The demo of a `taplined` that has been built.
pub(crate) fn run_with(taplined: &Path) -> Result<()> {
    let folder = target_dir().join("demo");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Before sudo, too: this process then waits for the other one's cleaning.
    ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed))
        .context("cannot handle Ctrl-C")?;
    if privilege() != Privilege::Root {
        return again_as_root(taplined);
    }
    show_off(taplined, &folder)
}

fn build() -> Result<PathBuf> {
    let selection = ["build", "--release", "--package", "api", "--bin", "taplined"];
    exec(cargo().args(selection))?;
    Ok(target_dir().join("release/taplined"))
}

/// The same once more under sudo, which may ask the person for a password.
fn again_as_root(taplined: &Path) -> Result<()> {
    println!("demo: network namespaces need root; going on with sudo");
    let pair = |name: &str, value: &OsStr| {
        let mut pair = OsString::from(name);
        pair.push("=");
        pair.push(value);
        pair
    };
    let xtask = env::current_exe().context("cannot tell where xtask is")?;
    let mut sudo = command("sudo");
    sudo.arg("env")
        .arg(pair(TAPLINED_BIN, taplined.as_os_str()))
        .arg(pair("CARGO_TARGET_DIR", target_dir().as_os_str()))
        .arg(xtask)
        .arg("demo");
    exec(&mut sudo)
}

fn show_off(taplined: &Path, folder: &Path) -> Result<()> {
    let id = std::process::id();
    let receiver = Namespace::new(format!("tapline-demo-{id}-a"))?;
    let sender = Namespace::new(format!("tapline-demo-{id}-b"))?;
    receiver.link(&[
        "add",
        "tap0",
        "type",
        "veth",
        "peer",
        "name",
        "gen0",
        "netns",
        &sender.name,
    ])?;
    for (namespace, interface) in [(&receiver, "lo"), (&receiver, "tap0"), (&sender, "gen0")] {
        namespace.link(&["set", interface, "up"])?;
    }

    let (mut daemon, api) = serve(taplined, folder, &receiver)?;
    let destination = format!("file://{}", folder.join("data/captures").display());
    let request = json!({
        "type": "full",
        "system": "magic-transit",
        "colo_name": "LOCAL",
        "destination_conf": destination,
        "time_limit": 60,
        "filter_v1": { "protocol": 6 },
    });
    println!("demo: POST /accounts/{ACCOUNT}/pcaps {request}");
    let capture = api.call("POST", "", Some(&request))?;
    println!("{capture:#}");
    let id = capture["id"].as_str().context("a capture without an id")?.to_owned();

    let pcap = root().join("tests/data/web.pcap");
    let mut replay = sender.command("tcpreplay");
    replay.args(["--quiet", PACE, "--intf1=gen0"]).arg(&pcap).stdout(Stdio::null());
    println!("demo: {}", show(&replay));
    let mut replay = Process::start("tcpreplay", &mut replay)?;
    let status = wait_until("the replay ends", || replay.status())?;
    ensure!(status.success(), "tcpreplay failed: {status}");

    println!("demo: PUT /accounts/{ACCOUNT}/pcaps/{id}/stop");
    api.call("PUT", &format!("/{id}/stop"), None)?;
    let capture = wait_until("the capture ends", || {
        let capture = api.call("GET", &format!("/{id}"), None)?;
        let ended = capture["status"] == "success" || capture["status"] == "failed";
        Ok(ended.then_some(capture))
    })?;
    println!("{capture:#}");
    let law = api.call("GET", &format!("/{id}/stats"), None)?["summary"]["law"].take();
    println!("demo: its law, hits = written + drops: {law}");
    daemon.signal(Signal::SIGTERM)?;
    let status = wait_until("taplined ends", || daemon.status())?;
    ensure!(status.success(), "taplined failed: {status}");

    let file = merge(&folder.join(format!("data/captures/pcap_{id}")), folder)?;
    println!("\ndemo: the first {SHOWN} packets as tshark prints them");
    let mut tshark = command("tshark");
    exec(tshark.arg("-r").arg(&file).args(["-c", SHOWN]).stderr(Stdio::null()))?;
    let (replayed, captured) = (packets(&pcap, "tcp")?, packets(&file, "")?);
    let told = capture["packets_captured"].as_u64();
    println!("\ndemo: {replayed} TCP packets replayed, {captured} captured in {}", file.display());
    ensure!(replayed == captured && told == Some(captured), "packets are missing");
    Ok(())
}

/// Starts the daemon with a fresh data folder and makes a token.
fn serve<'a>(
    taplined: &Path,
    folder: &Path,
    namespace: &'a Namespace,
) -> Result<(Process, Api<'a>)> {
    let data = folder.join("data");
    match fs::remove_dir_all(&data) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", data.display()));
        }
        _ => {}
    }
    let file = folder.join("taplined.toml");
    let config = format!(
        "data_dir = \"{}\"\nlog = \"warn\"\n\n[[interfaces]]\nname = \"tap0\"\n",
        data.display()
    );
    println!("demo: taplined.toml\n\n{config}");
    fs::write(&file, config).with_context(|| format!("cannot write {}", file.display()))?;
    let mut token = command(taplined);
    token.args(["token", "new", "--account", ACCOUNT, "--permission", "write", "--config"]);
    let token = output(token.arg(&file))?.trim().to_owned();
    let mut daemon = namespace.command(taplined);
    let mut daemon = Process::start("taplined", daemon.arg("--config").arg(&file))?;
    let api = Api { namespace, token };
    let up = wait_until("taplined answers", || {
        let ready = api.curl(&["--fail", &format!("{URL}/readyz")]);
        if ready.is_some() { Ok(Some(None)) } else { Ok(daemon.status()?.map(Some)) }
    })?;
    if let Some(status) = up {
        bail!("taplined ended before it answered: {status}");
    }
    Ok((daemon, api))
}

/// The API, by curl.
struct Api<'a> {
    namespace: &'a Namespace,
    token: String,
}

impl Api<'_> {
    fn curl(&self, args: &[&str]) -> Option<String> {
        probe(self.namespace.command("curl").args(["--silent", "--max-time", "10"]).args(args))
    }

    /// The result of a request about an account's captures.
    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let url = format!("{URL}/client/v4/accounts/{ACCOUNT}/pcaps{path}");
        let header = format!("Authorization: Bearer {}", self.token);
        let body = body.map(Value::to_string);
        let mut args = vec!["--request", method, "--header", &header, &url];
        if let Some(body) = &body {
            args.extend(["--data", body]);
        }
        let answer = self.curl(&args).with_context(|| format!("{method} {url} failed"))?;
        if answer.is_empty() {
            return Ok(Value::Null);
        }
        let mut answer: Value = serde_json::from_str(&answer)?;
        ensure!(answer["success"] == true, "{method} {url}: {}", answer["errors"]);
        Ok(answer["result"].take())
    }
}

/// One file of a capture's, which has one per queue that saw packets.
fn merge(from: &Path, folder: &Path) -> Result<PathBuf> {
    let merged = folder.join("demo.pcapng");
    let mut mergecap = command("mergecap");
    mergecap.arg("-w").arg(&merged);
    let files = fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))?;
    for file in files {
        let file = file?.path();
        // The manifest is beside them.
        if file.extension().is_some_and(|extension| extension == "pcapng") {
            mergecap.arg(file);
        }
    }
    exec(&mut mergecap)?;
    Ok(merged)
}

/// How many packets of a kind tshark finds in a file.
fn packets(file: &Path, filter: &str) -> Result<u64> {
    let mut tshark = command("tshark");
    tshark.arg("-r").arg(file).args(["-Y", filter, "-T", "fields", "-e", "frame.number"]);
    // It grumbles about root on standard error, which is let go.
    let numbers = probe(&mut tshark).with_context(|| format!("{} failed", show(&tshark)))?;
    Ok(numbers.lines().count() as u64)
}

/// Asks again and again until there is an answer, [`PATIENCE`] is over or a person interrupts.
fn wait_until<T>(what: &str, mut answer: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = answer()? {
            return Ok(answer);
        }
        ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
        ensure!(start.elapsed() < PATIENCE, "waited {} s until {what}", PATIENCE.as_secs());
        thread::sleep(Duration::from_millis(20));
    }
}

/// A network namespace; gone when dropped, with every interface in it.
struct Namespace {
    name: String,
}

impl Namespace {
    fn new(name: String) -> Result<Self> {
        ip(&["netns", "add", &name])?;
        let namespace = Self { name };
        // IPv6 announces itself on every new interface; the replayed packets are to be the only
        // ones. Without IPv6 in the kernel there is no such file, and no need.
        let quiet = "f=/proc/sys/net/ipv6/conf/default/disable_ipv6; [ ! -e $f ] || echo 1 > $f";
        exec(namespace.command("sh").args(["-c", quiet]))?;
        Ok(namespace)
    }

    fn link(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-netns", &self.name, "link"], arguments].concat())
    }

    /// A command that runs inside.
    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut inside = command("ip");
        inside.args(["netns", "exec", &self.name]).arg(program);
        inside
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "delete", &self.name]) {
            eprintln!("demo: {error:#}");
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    // In a process group of its own, so that an impatient second Ctrl-C does not stop the cleaning.
    exec(command("ip").args(arguments).process_group(0))
}

/// A process that does not outlive its owner.
struct Process {
    name: &'static str,
    child: Child,
}

impl Process {
    fn start(name: &'static str, command: &mut Command) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot run {}", show(command)))?;
        Ok(Self { name, child })
    }

    /// How it ended, if it has.
    fn status(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("lost {}", self.name))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        // `ip netns exec` becomes the program, so the process is the program's own.
        let pid = i32::try_from(self.child.id()).context("no process id")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("cannot stop {}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
