//! What a capture says: a live line while it runs, the law in the end.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    time::{Duration, Instant},
};

use super::CaptureArgs;
use crate::engine::{Job, Progress, Summary};

/// Waits for the end, with a live line if a person is watching.
pub(super) fn watch_job(job: Job, quiet: bool) -> Option<Summary> {
    const EVERY: Duration = Duration::from_secs(1);
    if quiet || !io::stderr().is_terminal() {
        return job.wait();
    }
    let mut before = (Instant::now(), Progress::default());
    loop {
        if let Some(summary) = job.wait_for(EVERY) {
            eprint!("\r\x1b[K");
            return Some(summary);
        }
        if let Some(progress) = job.progress() {
            let now = Instant::now();
            let seconds = (now - before.0).as_secs_f64();
            eprint!("\r\x1b[K{}", live_line(&progress, &before.1, seconds));
            before = (now, progress);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
fn live_line(now: &Progress, before: &Progress, seconds: f64) -> String {
    let rate = (now.captured.packets - before.captured.packets) as f64 / seconds;
    let mut line = format!(
        "{} packets, {}, {} packets/s",
        now.captured.packets,
        scaled(now.captured.bytes as f64, "B"),
        scaled(rate, ""),
    );
    match now.drops.total() {
        0 => line += ", none dropped",
        total => {
            line += &format!(", {total} dropped:");
            for (name, count, _) in now.drops.named() {
                if count > 0 {
                    line += &format!(" {name} {count}");
                }
            }
        }
    }
    line
}

fn scaled(value: f64, unit: &str) -> String {
    let scales = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match scales.iter().find(|(scale, _)| value >= *scale) {
        Some((scale, prefix)) => format!("{:.2} {prefix}{unit}", value / scale),
        None => format!("{value:.0} {unit}").trim_end().to_owned(),
    }
}

/// The end of a capture: for scripts or for people.
pub(super) fn report(summary: &Summary, args: &CaptureArgs) -> io::Result<()> {
    if args.json {
        let line = serde_json::to_string(summary).map_err(io::Error::other)?;
        return if args.write.as_deref() == Some(Path::new("-")) {
            writeln!(io::stderr(), "{line}")
        } else {
            writeln!(io::stdout(), "{line}")
        };
    }
    if args.quiet {
        return Ok(());
    }
    io::stderr().write_all(in_words(summary, args).as_bytes())
}

fn in_words(summary: &Summary, args: &CaptureArgs) -> String {
    let law = &summary.law;
    let mut text = format!(
        "{} packets {} in {:.3} s\n{} hits, {} bytes\n= {} {}, {} bytes\n",
        summary.seen,
        if args.no_capture { "made up" } else { "seen" },
        summary.seconds,
        law.hits.packets,
        law.hits.bytes,
        law.written.packets,
        if args.no_write { "encoded and thrown away" } else { "written" },
        law.written.bytes,
    );
    text += &format!("+ {} dropped\n", law.drops.total());
    for (name, count, meaning) in law.drops.named() {
        if count > 0 {
            text += &format!("    {name} {count}: {meaning}\n");
        }
    }
    if args.no_capture {
        text += &disk_line(summary);
    }
    for segment in &summary.segments {
        text += &format!(
            "{}: {} packets, {} bytes\n",
            segment.path.display(),
            segment.packets,
            segment.size
        );
    }
    text
}

/// How fast the disk was.
#[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
fn disk_line(summary: &Summary) -> String {
    let disk = &summary.disk;
    let bytes = (disk.direct_bytes + disk.cached_bytes) as f64;
    let how = if disk.direct_bytes > disk.cached_bytes { "past" } else { "through" };
    format!("{}/s, {how} the page cache\n", scaled(bytes / summary.seconds, "B"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_live_line_shows_rate_and_drops_by_cause() {
        let mut now = Progress::default();
        now.captured.packets = 3_000_000;
        now.captured.bytes = 192_000_000;
        let line = live_line(&now, &Progress::default(), 1.0);
        assert_eq!(line, "3000000 packets, 192.00 MB, 3.00 M packets/s, none dropped");
        now.drops.rx_ring_full = 7;
        assert!(live_line(&now, &now, 1.0).ends_with("7 dropped: rx_ring_full 7"));
    }
}
