//! What was measured, and what is made of it: medians with their spread.

use serde_json::{Value, json};

use crate::{
    run::{Load, Run, Size, as_f64},
    tool::Tool,
};

/// Median, least and most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, least, most })
    }

    pub(crate) fn json(self) -> Value {
        json!({ "median": self.median, "least": self.least, "most": self.most })
    }

    /// In units of `unit`, with this many decimals: the median, and behind it the spread.
    pub(crate) fn show(self, unit: f64, decimals: usize) -> String {
        let [median, least, most] = [self.median, self.least, self.most].map(|value| value / unit);
        format!("{median:.decimals$} ({least:.decimals$}–{most:.decimals$})")
    }
}

/// What a run was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// As fast as it takes it.
    Closed,
    /// All at the same rate, for CPU time and memory.
    Steady,
    /// At rising rates.
    Sweep,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Steady => "steady",
            Self::Sweep => "sweep",
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) part: Part,
    pub(crate) load: Load,
    pub(crate) run: Run,
}

impl Entry {
    /// The highest rate of a sweep up to which the part that is lost stays within `most`; that of the
    /// last step if none lost more.
    pub(crate) fn highest(&self, most: f64) -> f64 {
        let within = self.run.steps.iter().take_while(|step| step.loss() <= most);
        within.last().map_or(0.0, super::run::Step::offered)
    }

    fn json(&self) -> Value {
        let run = &self.run;
        json!({
            "part": self.part.name(),
            "tool": run.tool.name(),
            "size": self.load.size.to_string(),
            "one_percent": self.load.one_percent,
            "queues": self.load.queues,
            "steps": run.steps.iter().map(super::run::Step::json).collect::<Vec<_>>(),
            "law": {
                "hits": run.said.hits, "written": run.said.written, "drops": run.said.drops,
                "in_files": run.in_files, "delivered": run.delivered, "broken": run.broken_law(),
            },
            "machine_ns_per_packet": run.machine_ns(),
            "peak_kib": run.said.peak_kib,
            "bytes": run.bytes,
            "disk_bytes_per_second": run.disk_rate(),
            "latency": run.said.summary["latency"],
        })
    }
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub(crate) struct Results {
    pub(crate) entries: Vec<Entry>,
    /// Bytes a second of the plain writer, once a round.
    pub(crate) disk: Vec<f64>,
}

impl Results {
    fn of(&self, part: Part, load: Load, tool: Tool) -> impl Iterator<Item = &Entry> {
        self.entries
            .iter()
            .filter(move |entry| entry.part == part && entry.load == load && entry.run.tool == tool)
    }

    fn spread(
        &self,
        (part, load, tool): (Part, Load, Tool),
        value: impl Fn(&Entry) -> f64,
    ) -> Option<Spread> {
        Spread::of(self.of(part, load, tool).map(value))
    }

    /// Packets a second in a closed loop.
    pub(crate) fn closed(&self, load: Load, tool: Tool) -> Option<Spread> {
        self.spread((Part::Closed, load, tool), |entry| entry.run.steps[0].offered())
    }

    /// What was lost in closed loops, all rounds together.
    pub(crate) fn closed_lost(&self, load: Load, tool: Tool) -> u64 {
        self.of(Part::Closed, load, tool).map(|entry| entry.run.steps[0].lost()).sum()
    }

    /// Bytes a second that reached the disk in a closed loop.
    pub(crate) fn disk_rate(&self, load: Load, tool: Tool) -> Option<Spread> {
        self.spread((Part::Closed, load, tool), |entry| entry.run.disk_rate())
    }

    pub(crate) fn highest(&self, load: Load, tool: Tool, most: f64) -> Option<Spread> {
        self.spread((Part::Sweep, load, tool), |entry| entry.highest(most))
    }

    /// CPU time per packet of the whole machine, nanoseconds.
    pub(crate) fn machine_ns(&self, load: Load, tool: Tool) -> Option<Spread> {
        self.spread((Part::Steady, load, tool), |entry| entry.run.machine_ns())
    }

    /// The same, less what the generator and the pair take: what the same load costs when a program
    /// drops it.
    pub(crate) fn own_ns(&self, load: Load, tool: Tool) -> Option<Spread> {
        let floor = self.machine_ns(load, Tool::Drop)?.median;
        self.spread((Part::Steady, load, tool), |entry| entry.run.machine_ns() - floor)
    }

    pub(crate) fn peak_kib(&self, load: Load, tool: Tool) -> Option<u64> {
        let of = |entry: &&Entry| entry.load == load && entry.run.tool == tool;
        self.entries.iter().filter(of).map(|entry| entry.run.said.peak_kib).max()
    }

    /// The laws that do not add up.
    pub(crate) fn broken(&self) -> Vec<String> {
        let of = |entry: &Entry| {
            let broken = entry.run.broken_law()?;
            let (tool, part) = (entry.run.tool.name(), entry.part.name());
            Some(format!("{tool}, {}, {part}: {broken}", entry.load))
        };
        self.entries.iter().filter_map(of).collect()
    }

    /// The loads, in the order of their first run.
    pub(crate) fn loads(&self) -> Vec<Load> {
        let mut loads: Vec<Load> = Vec::new();
        for entry in &self.entries {
            if !loads.contains(&entry.load) {
                loads.push(entry.load);
            }
        }
        loads
    }

    pub(crate) fn tools(&self, load: Load) -> Vec<Tool> {
        let of = |entry: &&Entry| entry.load == load;
        let mut tools: Vec<_> =
            self.entries.iter().filter(of).map(|entry| entry.run.tool).collect();
        tools.sort_unstable();
        tools.dedup();
        tools
    }

    /// Points of a loss curve: offered rate, part lost; medians over the rounds.
    pub(crate) fn curve(&self, load: Load, tool: Tool) -> Vec<(f64, f64)> {
        let runs: Vec<_> = self.of(Part::Sweep, load, tool).map(|entry| &entry.run.steps).collect();
        let longest = runs.iter().map(|steps| steps.len()).max().unwrap_or(0);
        let at = |step: usize, value: fn(&super::run::Step) -> f64| {
            Spread::of(runs.iter().filter_map(|steps| steps.get(step)).map(value)).unwrap().median
        };
        (0..longest)
            .map(|step| (at(step, super::run::Step::offered), at(step, super::run::Step::loss)))
            .collect()
    }

    pub(crate) fn json(&self) -> Value {
        let summary = |load: Load, tool: Tool| {
            let spread = |spread: Option<Spread>| spread.map(Spread::json);
            json!({
                "tool": tool.name(),
                "size": load.size.to_string(),
                "one_percent": load.one_percent,
                "queues": load.queues,
                "closed_pps": spread(self.closed(load, tool)),
                "closed_lost": self.closed_lost(load, tool),
                "lossless_pps": spread(self.highest(load, tool, 0.0)),
                "loss_0.1_percent_pps": spread(self.highest(load, tool, 0.001)),
                "cpu_ns_per_packet": spread(self.own_ns(load, tool)),
                "machine_ns_per_packet": spread(self.machine_ns(load, tool)),
                "disk_bytes_per_second": spread(self.disk_rate(load, tool)),
                "peak_kib": self.peak_kib(load, tool),
            })
        };
        let loads = self.loads();
        let all = loads.iter().flat_map(|load| {
            self.tools(*load).into_iter().map(|tool| summary(*load, tool)).collect::<Vec<_>>()
        });
        json!({
            "summary": all.collect::<Vec<_>>(),
            "disk_floor_bytes_per_second": self.disk,
            "runs": self.entries.iter().map(Entry::json).collect::<Vec<_>>(),
        })
    }

    /// The table of one load.
    pub(crate) fn table(&self, load: Load) -> String {
        let mut text = format!(
            "\n{load}\n{:<22} {:>20} {:>20} {:>20} {:>22} {:>9} {:>9}\n",
            "",
            "closed loop, kpps",
            "lossless, kpps",
            "0.1 % lost, kpps",
            "CPU ns/packet (all)",
            "peak MiB",
            "MB/s"
        );
        let show = |spread: Option<Spread>, unit, decimals| {
            spread.map_or_else(|| "-".to_owned(), |spread| spread.show(unit, decimals))
        };
        for tool in self.tools(load) {
            let lost = self.closed_lost(load, tool);
            let mut closed = show(self.closed(load, tool), 1e3, 0);
            if lost > 0 {
                closed += &format!(" !{lost}");
            }
            let own = self.own_ns(load, tool).map_or_else(
                || show(self.machine_ns(load, tool), 1.0, 0),
                |own| {
                    let all = self.machine_ns(load, tool).map_or(0.0, |all| all.median);
                    format!("{:.0} ({all:.0})", own.median)
                },
            );
            let peak = self.peak_kib(load, tool).map_or(0.0, |kib| as_f64(kib) / 1024.0);
            let rate = self.disk_rate(load, tool).filter(|_| tool.writes());
            text += &format!(
                "{:<22} {closed:>20} {:>20} {:>20} {own:>22} {peak:>9.1} {:>9}\n",
                tool.name(),
                show(self.highest(load, tool, 0.0), 1e3, 0),
                show(self.highest(load, tool, 0.001), 1e3, 0),
                rate.map_or_else(|| "-".to_owned(), |rate| format!("{:.0}", rate.median / 1e6)),
            );
        }
        text
    }
}

/// Everything matched, one queue.
pub(crate) fn plain(size: Size) -> Load {
    Load { size, one_percent: false, queues: 1 }
}
