//! What no tool can be faster than, each in a process of its own as the tools are: an XDP program that
//! drops, a bare `AF_XDP` loop that gives frames back, a tc program that lets packets go on, and a plain
//! `O_DIRECT` writer.

use std::{
    fs::{self, File, OpenOptions},
    hint::black_box,
    os::{
        fd::AsFd as _,
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::XskMap,
    programs::{SchedClassifier, TcAttachType, Xdp, XdpMode},
};
use capture_ebpf::{
    GENERATOR,
    abi::generator::{DROP, LOOK_ON, PASS, RECEIVE, SOCKETS},
};
use capture_user::{
    socket::{Socket, SocketConfig},
    source::Source as _,
    spin::{Next, Spin},
};
use nix::{
    fcntl::OFlag,
    sys::{
        eventfd::{EfdFlags, EventFd},
        signal::{SigSet, Signal},
    },
};
use serde_json::{Value, json};

/// Packets between two notes of how many there were: often enough for the shortest loop, and too seldom
/// for the system call to be seen.
const TOLD: u64 = 1024;

/// What is written at once to the disk. Larger ones are no faster on any disk that this was tried on.
const BLOCK: usize = 1 << 20;

/// What `O_DIRECT` asks of addresses, lengths and offsets.
const ALIGNMENT: usize = 4096;

/// Which floor.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Floor {
    Drop,
    Receive,
    /// Receives, and reads every byte.
    Read,
    /// Lets everything go on to the host's stack, at tcx.
    LookOn,
    /// The same at XDP.
    Pass,
}

/// Signals that end a floor; blocked in all its threads.
fn signals() -> SigSet {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().unwrap();
    signals
}

fn attach(ebpf: &mut Ebpf, program: &str, interface: &str) {
    let program: &mut Xdp = ebpf.program_mut(program).unwrap().try_into().unwrap();
    program.load().unwrap();
    program.attach(interface, XdpMode::default()).unwrap();
}

fn packets(interface: &str) -> u64 {
    let path = format!("/sys/class/net/{interface}/statistics/rx_packets");
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

/// A floor at work until it is interrupted; gives its law in the words of `tapline`.
pub(crate) fn run(floor: Floor, interface: &str, progress: &Path) -> Value {
    let signals = signals();
    let mut ebpf = EbpfLoader::new().load(GENERATOR).unwrap();
    match floor {
        Floor::Drop => {
            attach(&mut ebpf, DROP, interface);
            let before = packets(interface);
            eprintln!("capturing on {interface}: dropping");
            signals.wait().unwrap();
            let seen = packets(interface) - before;
            law(seen, seen, &json!({}))
        }
        Floor::LookOn => {
            let program: &mut SchedClassifier =
                ebpf.program_mut(LOOK_ON).unwrap().try_into().unwrap();
            program.load().unwrap();
            program.attach(interface, TcAttachType::Ingress).unwrap();
            look_on(interface, signals)
        }
        Floor::Pass => {
            attach(&mut ebpf, PASS, interface);
            look_on(interface, signals)
        }
        Floor::Receive => receive(&mut ebpf, interface, signals, progress, false),
        Floor::Read => receive(&mut ebpf, interface, signals, progress, true),
    }
}

fn look_on(interface: &str, signals: SigSet) -> Value {
    eprintln!("capturing on {interface}: looking on");
    signals.wait().unwrap();
    law(0, 0, &json!({}))
}

fn law(hits: u64, written: u64, drops: &Value) -> Value {
    json!({ "law": { "hits": { "packets": hits }, "written": { "packets": written }, "drops": drops } })
}

fn receive(
    ebpf: &mut Ebpf,
    interface: &str,
    signals: SigSet,
    progress: &Path,
    read: bool,
) -> Value {
    let queues = fs::read_dir(format!("/sys/class/net/{interface}/queues")).unwrap();
    let queues = queues
        .filter(|queue| queue.as_ref().unwrap().file_name().to_string_lossy().starts_with("rx-"))
        .count();
    let mut map: XskMap<_> = ebpf.take_map(SOCKETS).unwrap().try_into().unwrap();
    let mut sockets = Vec::new();
    for queue in 0..queues as u32 {
        let socket = Socket::open(interface, queue, &SocketConfig::default()).unwrap();
        map.set(queue, socket.as_raw_fd(), 0).unwrap();
        sockets.push(socket);
    }
    attach(ebpf, RECEIVE, interface);
    let before = packets(interface);
    eprintln!("capturing on {interface}: receiving");
    let end = AtomicBool::new(false);
    let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let progress = Progress { file: File::create(progress).unwrap(), received: AtomicU64::new(0) };
    let (mut received, mut ring_full, mut dropped) = (0, 0, 0);
    thread::scope(|scope| {
        let threads: Vec<_> = sockets
            .iter_mut()
            .map(|socket| scope.spawn(|| receive_all(socket, &end, &wake, &progress, read)))
            .collect();
        signals.wait().unwrap();
        end.store(true, Relaxed);
        wake.write(1).unwrap();
        received = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    });
    for socket in &sockets {
        let counters = socket.counters().unwrap();
        ring_full += counters.ring_full;
        dropped += counters.dropped;
    }
    let drops = json!({ "rx_ring_full": ring_full, "rx_dropped": dropped });
    law(packets(interface) - before, received, &drops)
}

/// What all queues have received, as a closed loop reads it.
struct Progress {
    file: File,
    received: AtomicU64,
}

impl Progress {
    fn add(&self, packets: u64) {
        let all = self.received.fetch_add(packets, Relaxed) + packets;
        self.file.write_all_at(&all.to_le_bytes(), 0).unwrap();
    }
}

/// What the bare loop has received so far.
pub(crate) fn received(progress: &Path) -> u64 {
    let bytes = fs::read(progress).unwrap_or_default();
    bytes.first_chunk().copied().map_or(0, u64::from_le_bytes)
}

fn receive_all(
    socket: &mut Socket,
    end: &AtomicBool,
    wake: &EventFd,
    progress: &Progress,
    read: bool,
) -> u64 {
    let (mut received, mut told) = (0, 0);
    // It waits as the engine's worker does.
    let mut spin = Spin::new(socket.entries());
    loop {
        let taken = socket.receive(|packet| {
            black_box(packet.data);
            if read {
                black_box(packet.data.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)));
            }
            received += 1;
        });
        if taken > 0 {
            spin.found(taken);
            if received - told >= TOLD {
                progress.add(received - std::mem::replace(&mut told, received));
            }
            continue;
        }
        if told < received {
            progress.add(received - std::mem::replace(&mut told, received));
        }
        match spin.empty() {
            Next::First(_) | Next::Look => continue,
            Next::Nap(nap) => {
                thread::sleep(nap);
                continue;
            }
            Next::Sleep if end.load(Relaxed) => return received,
            Next::Sleep => {}
        }
        socket.wait(wake.as_fd(), Duration::from_millis(100)).unwrap();
    }
}

/// Writes to a new file for so long, one block after the other past the page cache; gives bytes per
/// second, with the time that it takes to reach the disk. `None` where a file system refuses.
pub(crate) fn disk(folder: &Path, duration: Duration) -> Option<f64> {
    let path = folder.join("floor");
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(OFlag::O_DIRECT.bits())
        .open(&path)
        .ok()?;
    let mut memory = vec![0_u8; BLOCK + ALIGNMENT];
    let skip = memory.as_ptr().align_offset(ALIGNMENT);
    let block = &mut memory[skip..skip + BLOCK];
    // Not what a disk could leave out.
    let mut state = 1_u32;
    for byte in block.iter_mut() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    let rate = stream(&file, block, duration);
    fs::remove_file(path).unwrap();
    rate
}

#[expect(clippy::cast_precision_loss, reason = "a rate, shown with a few digits")]
fn stream(file: &File, block: &[u8], duration: Duration) -> Option<f64> {
    let start = Instant::now();
    let mut written = 0_u64;
    while start.elapsed() < duration {
        file.write_all_at(block, written).ok()?;
        written += block.len() as u64;
    }
    file.sync_all().unwrap();
    Some(written as f64 / start.elapsed().as_secs_f64())
}
