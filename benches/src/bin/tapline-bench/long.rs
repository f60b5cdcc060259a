//! A long run at a moderate rate, to see that memory stays flat.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tapline_tests::{
    generator::Generator,
    netns::Namespace,
    veth::{Options, Veth},
};

use crate::{
    machine,
    run::{Size, as_f64},
    tool::{Running, Tool},
};

/// Samples that are taken, at even distances.
const SAMPLES: u32 = 30;

/// What memory may grow by from the first third of the samples to the last, KiB: an allocator's whim.
const FLAT_KIB: u64 = 1024;

/// Runs one contestant for so long; prints and returns its resident memory over time.
pub(crate) fn measure(tool: Tool, folder: &Path, rate: u64, length: Duration) -> (String, Value) {
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options::default());
    let template = Size::Fixed(64).template(64);
    let generator = Generator::new(&veth.left, template).pinned(0);
    let running = Running::start(tool, &veth.right, folder, None, None);
    let pid = running.pid().unwrap();
    let mut samples = Vec::new();
    thread::scope(|scope| {
        let sending = scope.spawn(|| generator.send_paced(rate, length));
        let start = Instant::now();
        for sample in 1..=SAMPLES {
            thread::sleep((length * sample / SAMPLES).saturating_sub(start.elapsed()));
            samples.push(machine::memory(pid, "VmRSS"));
        }
        sending.join().unwrap();
    });
    let arrived = veth.settle(generator.sent());
    running.drain();
    let file = running.file.clone();
    let said = running.stop();
    fs::remove_file(file).unwrap();

    let third = samples.len() / 3;
    let most = |samples: &[u64]| samples.iter().copied().max().unwrap_or(0);
    let (early, late) = (most(&samples[..third]), most(&samples[samples.len() - third..]));
    let flat = late <= early + FLAT_KIB;
    let mib = |kib: u64| as_f64(kib) / 1024.0;
    let text = format!(
        "\n{} for {:.0} s at {rate} packets/s: {arrived} arrived, {} written, {} dropped\n\
         resident memory {:.1} MiB at most in the first third, {:.1} MiB in the last: {}\n",
        tool.name(),
        length.as_secs_f64(),
        said.written.unwrap_or(0),
        said.dropped(),
        mib(early),
        mib(late),
        if flat { "flat" } else { "GROWS" }
    );
    let value = json!({
        "tool": tool.name(), "seconds": length.as_secs_f64(), "arrived": arrived,
        "written": said.written, "drops": said.drops, "rss_kib": samples, "flat": flat,
    });
    (text, value)
}
