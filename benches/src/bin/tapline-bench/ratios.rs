//! The ratios that a release is held to, as far as a run has what they are made of.

use serde_json::{Value, json};

use crate::{
    results::{Results, Spread, plain},
    run::{Load, Size},
    tool::{PEERS, Tool},
};

/// A ratio, and what it is to be.
#[derive(Clone, Debug)]
pub(crate) struct Ratio {
    what: String,
    value: f64,
    /// At least this, or at most.
    least: bool,
    bound: f64,
}

impl Ratio {
    fn met(&self) -> bool {
        if self.least { self.value >= self.bound } else { self.value <= self.bound }
    }

    pub(crate) fn json(&self) -> Value {
        let bound = if self.least { "at_least" } else { "at_most" };
        json!({ "what": self.what, "value": self.value, bound: self.bound, "met": self.met() })
    }
}

pub(crate) fn show(ratios: &[Ratio]) -> String {
    let mut text = String::from("\nratios\n");
    for ratio in ratios {
        let bound = if ratio.least { "at least" } else { "at most" };
        let met = if ratio.met() { "met" } else { "MISSED" };
        text += &format!(
            "{:<82} {:>6.3}  {bound:>8} {:<5} {met}\n",
            ratio.what, ratio.value, ratio.bound
        );
    }
    text
}

/// The best peer at something.
fn best(of: impl Fn(Tool) -> Option<Spread>) -> Option<(Tool, f64)> {
    let all = PEERS.into_iter().filter_map(|tool| Some((tool, of(tool)?.median)));
    all.max_by(|a, b| a.1.total_cmp(&b.1))
}

/// All ratios that these results have the parts of.
pub(crate) fn of(results: &Results) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    let mut push = |what: String, value: Option<f64>, least: bool, bound: f64| {
        ratios.extend(value.map(|value| Ratio { what, value, least, bound }));
    };
    let median = |spread: Option<Spread>| spread.map(|spread| spread.median);
    let small = plain(Size::Fixed(64));
    let closed = |tool| results.closed(small, tool);

    for (tool, bound) in [(Tool::Exclusive, 2.5), (Tool::Tap, 1.3)] {
        if let Some((peer, rate)) = best(closed) {
            let what = format!("64 bytes, closed loop: {} / {}", tool.name(), peer.name());
            push(what, median(closed(tool)).map(|own| own / rate), true, bound);
        }
    }
    let over = |tool, floor| Some(median(closed(tool))? / median(closed(floor))?);
    let what = "64 bytes, closed loop: tapline exclusive / bare AF_XDP loop".to_owned();
    push(what, over(Tool::Exclusive, Tool::Receive), true, 0.85);
    let what = "64 bytes, closed loop: 64 jobs / 1 job".to_owned();
    push(what, over(Tool::Jobs64, Tool::Job1), true, 0.9);

    for (tool, bound) in [(Tool::Exclusive, 0.4), (Tool::Tap, 0.8)] {
        for (how, of) in [
            ("", Results::own_ns as fn(&Results, Load, Tool) -> Option<Spread>),
            (", generator included", Results::machine_ns),
        ] {
            let cost = |tool| median(of(results, small, tool));
            let what = format!("64 bytes, CPU per packet{how}: {} / tcpdump", tool.name());
            let value = cost(tool).zip(cost(Tool::Tcpdump)).map(|(own, peer)| own / peer);
            push(what, value, false, bound);
        }
    }

    let large = plain(Size::Fixed(1500));
    let disk = Spread::of(results.disk.iter().copied());
    if let (Some(own), Some(disk)) = (results.disk_rate(large, Tool::Exclusive), disk) {
        let record = f64::from(u32::try_from(Tool::Exclusive.record_len(1496)).unwrap_or(0));
        let loop_rate = median(results.closed(large, Tool::Receive)).map(|rate| rate * record);
        let floor = loop_rate.map_or(disk.median, |rate| rate.min(disk.median));
        let name = if floor < disk.median { "bare AF_XDP loop" } else { "O_DIRECT writer" };
        let what = format!("1500 bytes, closed loop: bytes on disk, tapline exclusive / {name}");
        push(what, Some(own.median / floor), true, 0.9);
    }

    for size in [64, 512, 1500] {
        let load = Load { one_percent: true, ..plain(Size::Fixed(size)) };
        let rate = |tool| median(results.closed(load, tool));
        let what = format!("{size} bytes, 1 % matched: traffic with tapline tap / without capture");
        let value = rate(Tool::Tap).zip(rate(Tool::Nobody)).map(|(own, none)| own / none);
        push(what, value, true, 0.95);
    }
    ratios
}
