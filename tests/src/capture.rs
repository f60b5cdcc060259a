//! `tapline capture` at work, and what it says in the end.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    netns::Namespace,
    process::{tapline_path, wait_until},
    veth::End,
};

/// Longer than any step of a capture takes, on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running `tapline capture`; killed when dropped.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Arc<Mutex<String>>,
    stderr_reader: Option<JoinHandle<()>>,
}

/// `tapline capture` in a namespace, with these arguments.
pub fn command(namespace: &Namespace, args: &[&str]) -> Command {
    let mut command = namespace.command(tapline_path(), ["capture"]);
    command.args(args);
    command
}

/// `tapline capture --mode exclusive --json` at an end of a veth pair.
pub fn exclusive(end: &End<'_>, write: &Path, more: &[&str]) -> Command {
    let write = write.to_str().unwrap();
    let args = ["-i", &end.name, "-w", write, "--mode", "exclusive", "--json"];
    command(end.namespace, &[&args, more].concat())
}

impl Capture {
    /// Starts a capture, and waits until it says that it captures.
    pub fn start(command: Command) -> Self {
        let mut capture = Self::spawn(command);
        capture.wait_until_ready();
        capture
    }

    /// Starts a command that need not come to capture.
    pub fn spawn(command: Command) -> Self {
        let (mut capture, mut stdout) = Self::streaming(command);
        capture.stdout = Some(thread::spawn(move || {
            let mut bytes = Vec::new();
            stdout.read_to_end(&mut bytes).unwrap();
            bytes
        }));
        capture
    }

    /// Starts a command whose standard output the test reads.
    pub fn streaming(mut command: Command) -> (Self, ChildStdout) {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdout = child.stdout.take().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let stderr = Arc::clone(&said);
        let reader = thread::spawn(move || {
            loop {
                let mut line = Vec::new();
                if lines.read_until(b'\n', &mut line).unwrap() == 0 {
                    return;
                }
                said.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
            }
        });
        (Self { child, stdout: None, stderr, stderr_reader: Some(reader) }, stdout)
    }

    /// Waits until it says that it captures: what is sent from now on is a hit.
    pub fn wait_until_ready(&mut self) {
        wait_until("tapline to capture", PATIENCE, || {
            // First the status, so that what was said before it ended is not missed.
            let ended = self.has_ended();
            let ready = self.said().contains("capturing on");
            assert!(ready || !ended, "it has ended: {}", self.said());
            ready
        });
    }

    /// What it has said on standard error so far.
    pub fn said(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    /// Its process.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Interrupts it, as Ctrl-C does, and waits for its end.
    pub fn stop(self) -> Ended {
        self.signal(Signal::SIGINT);
        self.wait()
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ended {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < PATIENCE, "tapline does not end: {}", self.said());
            thread::sleep(Duration::from_millis(5));
        };
        let stdout = self.stdout.take().map(|reader| reader.join().unwrap()).unwrap_or_default();
        self.stderr_reader.take().unwrap().join().unwrap();
        Ended { status, stdout, stderr: self.said() }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Without effect on one that has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A command that has ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Ended {
    /// Its exit status, and that it was not killed.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("{}: {}", self.status, self.stderr))
    }

    /// The summary of a capture that was asked for JSON, whose counts add up.
    pub fn summary(&self) -> Summary {
        let stdout = String::from_utf8_lossy(&self.stdout);
        let lines = || stdout.lines().chain(self.stderr.lines());
        let line = lines().find(|line| line.starts_with('{'));
        let line = line.unwrap_or_else(|| panic!("no summary: {stdout}{}", self.stderr));
        let summary = Summary(serde_json::from_str(line).unwrap());
        summary.check();
        summary
    }

    /// The summary of a capture that ended well.
    pub fn success(&self) -> Summary {
        assert_eq!(self.code(), 0, "{}", self.stderr);
        self.summary()
    }

    /// What a capture that failed says on its last line.
    pub fn failure(&self) -> &str {
        assert_eq!(self.code(), 1, "{}", self.stderr);
        let line = self.stderr.lines().last().unwrap_or_default();
        line.strip_prefix("tapline: ").unwrap_or_else(|| panic!("{}", self.stderr))
    }
}

/// The summary of a capture.
#[derive(Clone, Debug)]
pub struct Summary(pub Value);

/// A number in JSON.
pub fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a count"))
}

fn total(drops: &Value) -> u64 {
    drops.as_object().unwrap().values().map(number).sum()
}

impl Summary {
    /// The law: every hit was written, or has exactly one reason why not.
    fn check(&self) {
        let mut hits = 0;
        for law in self.interfaces().iter().map(|interface| &interface["law"]).chain([self.law()]) {
            let sum = number(&law["written"]["packets"]) + total(&law["drops"]);
            assert_eq!(number(&law["hits"]["packets"]), sum, "{law}");
        }
        for interface in self.interfaces() {
            hits += number(&interface["law"]["hits"]["packets"]);
            assert!(number(&interface["seen"]) >= number(&interface["law"]["hits"]["packets"]));
        }
        assert_eq!(self.hits(), hits);
        let in_segments: u64 =
            self.segments().iter().map(|segment| number(&segment["packets"])).sum();
        if number(&self.0["disk"]["discarded_bytes"]) == 0 {
            assert_eq!(self.written(), in_segments, "what is written is in the segments");
        } else {
            assert!(self.segments().is_empty(), "nothing was to be written");
        }
    }

    fn law(&self) -> &Value {
        &self.0["law"]
    }

    /// Why it ended.
    pub fn ending(&self) -> &Value {
        &self.0["ending"]
    }

    /// Packets that reached the kernel program.
    pub fn seen(&self) -> u64 {
        number(&self.0["seen"])
    }

    /// Packets that the filter and the sampling accepted.
    pub fn hits(&self) -> u64 {
        number(&self.law()["hits"]["packets"])
    }

    /// Packets in files.
    pub fn written(&self) -> u64 {
        number(&self.law()["written"]["packets"])
    }

    /// Their captured lengths, bytes.
    pub fn written_bytes(&self) -> u64 {
        number(&self.law()["written"]["bytes"])
    }

    /// Hits in no file.
    pub fn dropped(&self) -> u64 {
        total(&self.law()["drops"])
    }

    /// Hits in no file, for one reason.
    pub fn dropped_by(&self, cause: &str) -> u64 {
        number(&self.law()["drops"][cause])
    }

    /// Per interface.
    pub fn interfaces(&self) -> &[Value] {
        self.0["interfaces"].as_array().unwrap()
    }

    /// The files.
    pub fn segments(&self) -> &[Value] {
        self.0["segments"].as_array().unwrap()
    }
}
