//! The engine with one job or many, in a process of its own: `tapline` runs one.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::Duration,
};

use capture_user::{
    engine::{
        CapturePath, EXCLUSIVE_RING_BYTES, Engine, EngineConfig, InterfaceConfig, Job, JobSpec,
        Transport,
    },
    filter::{Filter, Protocol},
    program::XdpMode,
    segment::Target,
    socket::SocketConfig,
};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Map, Value, json};
use tapline_tests::generator::Template;

/// Captures until interrupted, into a folder. A single job asks for the packets' destination port, one
/// of several for a source port of its own: either way the kernel looks at two fields. Gives the sum
/// of their laws in the words of `tapline`.
pub(crate) fn run(count: usize, interface: &str, folder: &Path) -> Value {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().unwrap();
    let engine = Engine::open(&EngineConfig {
        interfaces: vec![InterfaceConfig {
            name: interface.to_owned(),
            path: CapturePath::Exclusive {
                xdp: XdpMode::Auto,
                mirror_port: false,
                transport: Transport::Auto,
                socket: SocketConfig::default(),
                ring_bytes: EXCLUSIVE_RING_BYTES,
            },
            promiscuous: true,
        }],
        ..EngineConfig::default()
    })
    .unwrap();
    fs::create_dir(folder).unwrap();
    let template = Template::default();
    let jobs: Vec<_> = (0..count)
        .map(|number| {
            let (sport, dport) = match count {
                1 => (None, Some(template.dport)),
                _ => (Some(template.sport + number as u16), None),
            };
            let filter = Filter { sport, dport, protocol: Some(Protocol(17)), ..Filter::default() };
            let target = Target::Directory { path: folder.into(), prefix: format!("job{number}") };
            engine.start(JobSpec { filter, ..JobSpec::new(target) }).unwrap()
        })
        .collect();
    eprintln!("capturing on {interface}: {count} jobs");
    // What is in their files lags behind by as many buffers as there are jobs: too far for a closed loop.
    let progress = folder.with_extension("progress");
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let file = File::create(&progress).unwrap();
            while !end.load(Relaxed) {
                let captured: u64 = jobs.iter().map(Job::packets_captured).sum();
                file.write_all_at(&captured.to_le_bytes(), 0).unwrap();
                thread::sleep(Duration::from_micros(200));
            }
        });
        signals.wait().unwrap();
        end.store(true, Relaxed);
    });
    fs::remove_file(progress).unwrap();

    for job in &jobs {
        job.stopper().stop();
    }
    let (mut hits, mut written, mut drops) = (0, 0, Map::new());
    for job in jobs {
        let law = job.wait().unwrap().law;
        hits += law.hits.packets;
        written += law.written.packets;
        for (cause, count, _) in law.drops.named() {
            let sum = drops.get(cause).and_then(Value::as_u64).unwrap_or(0) + count;
            drops.insert(cause.to_owned(), sum.into());
        }
    }
    json!({ "law": { "hits": { "packets": hits }, "written": { "packets": written }, "drops": drops } })
}
