//! The contestants: how each is started, how it says that it is ready, and what it says in the end.
//!
//! Each is a process of its own on the tools' CPU, has the rings that suit it best, and
//! writes a file in the same folder. What it says goes to a file, because some only flush at their end.

use std::{
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use capture_user::segment::pcapng::packet_len;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tapline_tests::{
    process::{tapline_path, wait_until},
    veth::End,
};

use crate::{machine, run::as_f64};

/// Longer than any of them takes to start or to end.
const PATIENCE: Duration = Duration::from_mins(1);

/// Who receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Tool {
    /// Nobody: the interface alone
    Nobody,
    /// Floor: a tc program that lets every packet go on, and does nothing else
    LookOn,
    /// Floor: an XDP program that does the same
    Pass,
    /// Floor: an XDP program that drops
    Drop,
    /// Floor: a bare `AF_XDP` loop that gives frames back
    Receive,
    /// Floor: the same, and it reads every byte of each frame
    Read,
    /// `tapline capture --mode exclusive`
    Exclusive,
    /// The same without a disk: it encodes only
    ExclusiveNoWrite,
    /// `tapline capture`
    Tap,
    /// `tapline capture --tap-hook xdp`
    TapXdp,
    /// The engine, exclusive, with one job, in a process of this program
    Job1,
    /// The same with 64 jobs, which share the packets by their source ports
    Jobs64,
    /// tcpdump
    Tcpdump,
    /// dumpcap
    Dumpcap,
    /// netsniff-ng
    NetsniffNg,
}

/// The tools that people use today.
pub(crate) const PEERS: [Tool; 3] = [Tool::Tcpdump, Tool::Dumpcap, Tool::NetsniffNg];

/// Flows that the jobs of [`Tool::Jobs64`] share.
pub(crate) const JOB_FLOWS: u32 = 64;

/// Size of `tapline`'s buffers, bytes, and what each adds to a file: the last page is for padding.
const BUFFER: u64 = 256 << 10;
const FILL: u64 = BUFFER - 4096;

/// What a packet's record in a file consists of, besides the packet.
#[derive(Clone, Copy, Debug)]
enum Records {
    None,
    Tapline,
    Pcap,
    Pcapng,
}

impl Tool {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::LookOn => "tcx, nothing (floor)",
            Self::Pass => "XDP, nothing (floor)",
            Self::Drop => "drop (floor)",
            Self::Receive => "receive (floor)",
            Self::Read => "receive, read (floor)",
            Self::Exclusive => "tapline exclusive",
            Self::ExclusiveNoWrite => "tapline excl. no-write",
            Self::Tap => "tapline tap",
            Self::TapXdp => "tapline tap, XDP",
            Self::Job1 => "engine, 1 job",
            Self::Jobs64 => "engine, 64 jobs",
            Self::Tcpdump => "tcpdump",
            Self::Dumpcap => "dumpcap",
            Self::NetsniffNg => "netsniff-ng",
        }
    }

    /// The program that has to be installed for it.
    pub(crate) fn needs(self) -> Option<&'static str> {
        PEERS.contains(&self).then(|| self.name())
    }

    /// Whether it leaves the packets to the host's own stack.
    pub(crate) fn passes(self) -> bool {
        matches!(self, Self::Tap | Self::TapXdp) || self.is_blind() || PEERS.contains(&self)
    }

    /// Whether it takes no packet: traffic without and with a hook.
    pub(crate) fn is_blind(self) -> bool {
        matches!(self, Self::Nobody | Self::LookOn | Self::Pass)
    }

    /// Whether it can be told to take one flow only.
    pub(crate) fn filters(self) -> bool {
        matches!(self, Self::Tap | Self::TapXdp | Self::Exclusive | Self::ExclusiveNoWrite)
            || PEERS.contains(&self)
    }

    fn records(self) -> Records {
        match self {
            Self::Nobody
            | Self::LookOn
            | Self::Pass
            | Self::Drop
            | Self::Receive
            | Self::Read
            | Self::ExclusiveNoWrite => Records::None,
            Self::Exclusive | Self::Tap | Self::TapXdp | Self::Job1 | Self::Jobs64 => {
                Records::Tapline
            }
            Self::Tcpdump | Self::NetsniffNg => Records::Pcap,
            Self::Dumpcap => Records::Pcapng,
        }
    }

    pub(crate) fn writes(self) -> bool {
        !matches!(self.records(), Records::None)
    }

    /// What a packet of this length takes in its file, bytes.
    pub(crate) fn record_len(self, packet: usize) -> usize {
        match self.records() {
            Records::None => 0,
            Records::Tapline => packet_len(packet),
            Records::Pcap => 16 + packet,
            Records::Pcapng => 32 + packet.next_multiple_of(4),
        }
    }

    /// How many packets it has written, if they take so many bytes on average. `tapline` writes whole
    /// buffers, each made longer to the next page: a packet more for every few of them would soon be a
    /// window's worth.
    #[expect(clippy::cast_sign_loss, reason = "a number of packets")]
    pub(crate) fn packets_in(self, bytes: u64, record: f64) -> u64 {
        match self.records() {
            Records::None => 0,
            Records::Tapline => bytes / FILL * (as_f64(FILL) / record) as u64,
            Records::Pcap | Records::Pcapng => (as_f64(bytes) / record) as u64,
        }
    }

    /// What it says once it captures.
    fn greeting(self) -> &'static str {
        match self {
            Self::Nobody => "",
            Self::Tcpdump => "listening on",
            // Said when the file is open; "Capturing on" comes before.
            Self::Dumpcap => "File: ",
            Self::NetsniffNg => "Running!",
            _ => "capturing on",
        }
    }

    /// Its command line. The filter asks for one source port.
    pub(crate) fn line(self, interface: &str, file: &Path, port: Option<u16>) -> Vec<OsString> {
        let file = file.to_str().unwrap();
        let filter = port.map(|port| format!("udp src port {port}"));
        // Each has 64 MiB for what comes while its disk is busy, rings included: more than a closed
        // loop's window and what the disk may be given at once.
        let capture = format!("capture -i {interface} --json --buffer-size {BUFFER} --buffers 192");
        let exclusive = format!("{capture} --mode exclusive");
        let (program, args): (PathBuf, String) = match self {
            Self::Nobody => return Vec::new(),
            Self::LookOn => (own(), format!("floor look-on {interface} {file}")),
            Self::Pass => (own(), format!("floor pass {interface} {file}")),
            Self::Drop => (own(), format!("floor drop {interface} {file}")),
            Self::Receive => (own(), format!("floor receive {interface} {file}")),
            Self::Read => (own(), format!("floor read {interface} {file}")),
            Self::Job1 => (own(), format!("jobs 1 {interface} {file}")),
            Self::Jobs64 => (own(), format!("jobs 64 {interface} {file}")),
            Self::Exclusive => (tapline_path().into(), exclusive + &format!(" -w {file}")),
            Self::ExclusiveNoWrite => (tapline_path().into(), exclusive + " --no-write"),
            Self::Tap => (tapline_path().into(), format!("{capture} -w {file}")),
            Self::TapXdp => {
                let args = format!("{capture} -w {file} --tap-hook xdp --direction in");
                (tapline_path().into(), args)
            }
            Self::Tcpdump => {
                let args = format!("-n -i {interface} -B 65536 -w {file}");
                ("tcpdump".into(), args)
            }
            Self::Dumpcap => ("dumpcap".into(), format!("-P -q -i {interface} -B 64 -w {file}")),
            Self::NetsniffNg => {
                let args = format!(
                    "--in {interface} --out {file} --silent --ring-size 64MiB --notouch-irq --no-sock-mem"
                );
                ("netsniff-ng".into(), args)
            }
        };
        let mut line = vec![program.into_os_string()];
        line.extend(args.split_whitespace().map(OsString::from));
        match (filter, port) {
            (Some(filter), _) if self == Self::Tcpdump => line.push(filter.into()),
            (Some(filter), _) if PEERS.contains(&self) => line.extend(["-f".into(), filter.into()]),
            (_, Some(port)) if !self.is_blind() => {
                line.extend(["--sport".into(), port.to_string().into()]);
            }
            _ => {}
        }
        line
    }
}

/// This program.
fn own() -> PathBuf {
    std::env::current_exe().unwrap()
}

/// A contestant at work; killed when dropped.
pub(crate) struct Running {
    tool: Tool,
    child: Option<Child>,
    /// Where it writes packets.
    pub(crate) file: PathBuf,
    said: PathBuf,
}

/// What a contestant says in the end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    /// Packets that its filter accepted.
    pub(crate) hits: Option<u64>,
    /// Those that it says it has written (or taken, if it writes none).
    pub(crate) written: Option<u64>,
    /// Those that it says it has not, by cause.
    pub(crate) drops: Vec<(String, u64)>,
    /// Its peak memory, KiB: with the rings and buffers that it has mapped.
    pub(crate) peak_kib: u64,
    /// The whole summary of one that gives it as JSON.
    pub(crate) summary: Value,
}

impl Said {
    pub(crate) fn dropped(&self) -> u64 {
        self.drops.iter().map(|(_, count)| count).sum()
    }
}

impl Running {
    /// Starts a contestant at an end of a veth pair, and waits until it captures.
    pub(crate) fn start(
        tool: Tool,
        end: &End<'_>,
        folder: &Path,
        cpu: Option<usize>,
        port: Option<u16>,
    ) -> Self {
        let (file, said) = (folder.join("packets"), folder.join("said"));
        let mut running = Self { tool, child: None, file, said };
        if tool == Tool::Nobody {
            return running;
        }
        let mut line = tool.line(&end.name, &running.file, port);
        if let Some(cpu) = cpu {
            let on = ["taskset".into(), "-c".into(), cpu.to_string().into()];
            line.splice(0..0, on);
        }
        let said = File::create(&running.said).unwrap();
        let mut command: Command = end.namespace.command(&line[0], &line[1..]);
        command.stdin(Stdio::null()).stdout(said.try_clone().unwrap()).stderr(said);
        running.child = Some(command.spawn().unwrap());
        wait_until("a contestant to capture", PATIENCE, || {
            let ended = running.child.as_mut().unwrap().try_wait().unwrap();
            let ready = running.text().contains(tool.greeting());
            assert!(ready || ended.is_none(), "{line:?} has ended: {}", running.text());
            ready
        });
        running
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.said).unwrap_or_default()).into_owned()
    }

    pub(crate) fn pid(&self) -> Option<Pid> {
        self.child.as_ref().map(|child| Pid::from_raw(child.id().cast_signed()))
    }

    /// Waits until it has written all that it has taken, as far as that can be seen. libpcap hands over
    /// a block that is not full after a second, and an interrupt loses what it has not.
    pub(crate) fn drain(&self) {
        let Some(pid) = self.pid() else { return };
        if !self.tool.writes() {
            return;
        }
        let quiet = Duration::from_millis(if PEERS.contains(&self.tool) { 1500 } else { 500 });
        let (mut before, mut since) = (machine::written(pid), Instant::now());
        while since.elapsed() < quiet {
            std::thread::sleep(Duration::from_millis(50));
            let now = machine::written(pid);
            if now != before {
                (before, since) = (now, Instant::now());
            }
        }
    }

    /// Interrupts it, and hears what it has to say. Its file is on the disk then.
    pub(crate) fn stop(mut self) -> Said {
        let (Some(pid), Some(mut child)) = (self.pid(), self.child.take()) else {
            return Said::default();
        };
        let peak_kib = machine::memory(pid, "VmHWM");
        kill(pid, Signal::SIGINT).unwrap();
        let mut status = None;
        wait_until("a contestant to end", PATIENCE, || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        let text = self.text();
        assert!(status.is_some_and(|status| status.success()), "{:?}: {text}", self.tool);
        for file in files(&self.file) {
            File::open(file).unwrap().sync_all().unwrap();
        }
        Said { peak_kib, ..self.tool.understand(&text) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The files that a contestant has written: one, or a folder of them.
pub(crate) fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_dir() {
        let entries = fs::read_dir(path).unwrap();
        return entries.map(|entry| entry.unwrap().path()).collect();
    }
    Vec::from_iter(path.exists().then(|| path.to_path_buf()))
}

/// The number in front of a phrase, or behind one that ends in a colon.
fn number(text: &str, phrase: &str) -> Option<u64> {
    let at = text.find(phrase)?;
    let word = if phrase.ends_with(':') {
        text[at + phrase.len()..].split_whitespace().next()?
    } else {
        text[..at].split_whitespace().next_back()?
    };
    word.parse().ok()
}

impl Tool {
    /// Reads what a contestant says in the end.
    fn understand(self, text: &str) -> Said {
        let dropped = |count: Option<u64>| {
            count.map(|count| ("kernel".to_owned(), count)).into_iter().collect()
        };
        match self {
            Self::Tcpdump => Said {
                hits: number(text, "packets received by filter"),
                written: number(text, "packets captured"),
                drops: dropped(number(text, "packets dropped by kernel")),
                ..Said::default()
            },
            // "Packets received/dropped on interface 'x': 10/0 (pcap:0/dumpcap:0/flushed:0/ps_ifdrop:0)"
            Self::Dumpcap => {
                let both = text.lines().find(|line| line.contains("received/dropped"));
                let both = both.and_then(|line| {
                    let (_, numbers) = line.rsplit_once("': ")?;
                    let (received, dropped) = numbers.split(' ').next()?.split_once('/')?;
                    Some((received.parse::<u64>().ok()?, dropped.parse::<u64>().ok()?))
                });
                Said {
                    hits: both.map(|(received, dropped)| received + dropped),
                    written: number(text, "Packets captured:"),
                    drops: dropped(both.map(|(_, dropped)| dropped)),
                    ..Said::default()
                }
            }
            Self::NetsniffNg => {
                let (incoming, failed) =
                    (number(text, "packets incoming"), number(text, "packets failed"));
                Said {
                    hits: incoming,
                    written: number(text, "packets passed"),
                    drops: dropped(failed),
                    ..Said::default()
                }
            }
            _ => {
                let line = text.lines().find(|line| line.starts_with('{'));
                let line = line.unwrap_or_else(|| panic!("{self:?}: no summary: {text}"));
                let summary: Value = serde_json::from_str(line).unwrap();
                let law = &summary["law"];
                let drops = law["drops"].as_object().unwrap().iter();
                Said {
                    hits: law["hits"]["packets"].as_u64(),
                    written: law["written"]["packets"].as_u64(),
                    drops: drops
                        .map(|(cause, count)| (cause.clone(), count.as_u64().unwrap()))
                        .filter(|(_, count)| *count > 0)
                        .collect(),
                    summary,
                    ..Said::default()
                }
            }
        }
    }
}

/// What a peer calls itself.
pub(crate) fn version(peer: Tool) -> Option<Value> {
    let output = Command::new(peer.needs()?).arg("--version").output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    Some(String::from_utf8_lossy(&text).lines().next()?.into())
}
