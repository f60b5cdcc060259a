//! Counters, and `/metrics` in the text format of Prometheus.
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use capture_user::{
    engine::Summary,
    recorder::RecorderStats,
    stats::{Amount, Drops},
};

use crate::{captures::Captures, record::Status, upload::Uploads};

/// Upper bounds of the request duration histogram, seconds.
const BOUNDS: [f64; 10] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 10.0];

/// What is counted since the daemon started.
#[derive(Debug)]
pub struct Counters {
    started: SystemTime,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// By method and status. Both come from short lists.
    requests: BTreeMap<(&'static str, u16), u64>,
    durations: [u64; BOUNDS.len() + 1],
    seconds: f64,
    captures_started: u64,
    captures_succeeded: u64,
    captures_failed: u64,
    uploaded_objects: u64,
    uploaded_bytes: u64,
    upload_retries: u64,
    upload_failures: u64,
    hits: Amount,
    written: Amount,
    drops: Drops,
}

impl Default for Counters {
    fn default() -> Self {
        Self { started: SystemTime::now(), inner: Mutex::default() }
    }
}

impl Counters {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn request(&self, method: &'static str, status: u16, took: Duration) {
        let mut inner = self.inner();
        *inner.requests.entry((method, status)).or_default() += 1;
        let seconds = took.as_secs_f64();
        let at = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        inner.durations[at] += 1;
        inner.seconds += seconds;
    }

    pub(crate) fn captures_started(&self) {
        self.inner().captures_started += 1;
    }

    /// A capture's job has ended.
    pub(crate) fn capture_ended(&self, summary: Option<&Summary>) {
        if let Some(summary) = summary {
            let mut inner = self.inner();
            inner.hits += summary.law.hits;
            inner.written += summary.law.written;
            inner.drops += summary.law.drops;
        }
    }
}

impl Counters {
    /// A capture is final.
    pub(crate) fn capture_delivered(&self, status: Status) {
        let mut inner = self.inner();
        if status == Status::Success {
            inner.captures_succeeded += 1;
        } else {
            inner.captures_failed += 1;
        }
    }

    /// A store has confirmed a segment.
    pub(crate) fn uploaded(&self, bytes: u64) {
        let mut inner = self.inner();
        inner.uploaded_objects += 1;
        inner.uploaded_bytes += bytes;
    }

    /// An attempt to send something has failed.
    pub(crate) fn upload_retried(&self) {
        self.inner().upload_retries += 1;
    }

    /// A capture's files are not all where they belong.
    pub(crate) fn upload_failed(&self) {
        self.inner().upload_failures += 1;
    }
}

/// One metric: its lines under its help and type.
struct Page(String);

impl Page {
    fn metric(&mut self, name: &str, kind: &str, help: &str, lines: &[(String, f64)]) {
        // Writing to a string does not fail.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (suffix, value) in lines {
            let _ = writeln!(self.0, "{name}{suffix} {value}");
        }
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.metric(name, kind, help, &[(String::new(), value)]);
    }
}

/// The page.
#[expect(clippy::cast_precision_loss, reason = "Prometheus has floats only")]
pub fn page(counters: &Counters, captures: &Captures) -> String {
    let inner = counters.inner();
    let mut page = Page(String::new());
    let version = format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    page.metric("tapline_build_info", "gauge", "The version that runs.", &[(version, 1.0)]);
    let running = captures.running() as f64;
    page.one("tapline_captures_running", "gauge", "Captures that run now.", running);
    page.one(
        "tapline_captures_started_total",
        "counter",
        "Captures started.",
        inner.captures_started as f64,
    );
    page.metric(
        "tapline_captures_ended_total",
        "counter",
        "Captures ended, by status.",
        &[
            ("{status=\"success\"}".into(), inner.captures_succeeded as f64),
            ("{status=\"failed\"}".into(), inner.captures_failed as f64),
        ],
    );
    for (name, what, amount) in
        [("hits", "accepted by the filters", inner.hits), ("written", "in files", inner.written)]
    {
        let help = |unit: &str| format!("{unit} {what}, of captures that have ended.");
        page.one(
            &format!("tapline_{name}_packets_total"),
            "counter",
            &help("Packets"),
            amount.packets as f64,
        );
        page.one(
            &format!("tapline_{name}_bytes_total"),
            "counter",
            &help("Bytes"),
            amount.bytes as f64,
        );
    }
    page.metric(
        "tapline_dropped_packets_total",
        "counter",
        "Packets accepted and not written, by cause, of captures that have ended.",
        &by_cause(&inner.drops),
    );
    uploads(&inner, captures.uploads(), &mut page);
    if let Some(stats) = captures.recording().stats() {
        recorder(&stats, &mut page);
    }
    let requests: Vec<_> = inner
        .requests
        .iter()
        .map(|((method, code), count)| {
            (format!("{{method=\"{method}\",code=\"{code}\"}}"), *count as f64)
        })
        .collect();
    page.metric("http_requests_total", "counter", "Requests answered.", &requests);
    durations(&inner, &mut page);
    drop(inner);
    process(counters, &mut page);
    page.0
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus has floats only")]
fn uploads(inner: &Inner, uploads: &Uploads, page: &mut Page) {
    let (used, limit) = uploads.spool_bytes();
    for (name, kind, help, value) in [
        ("spool_bytes", "gauge", "Bytes in the spool.", used),
        ("spool_limit_bytes", "gauge", "Bytes that there may be in the spool.", limit),
        (
            "uploads_in_flight",
            "gauge",
            "Files on their way to a bucket.",
            uploads.in_flight() as u64,
        ),
        (
            "uploaded_objects_total",
            "counter",
            "Files that a bucket has confirmed.",
            inner.uploaded_objects,
        ),
        ("uploaded_bytes_total", "counter", "Their bytes.", inner.uploaded_bytes),
        (
            "upload_retries_total",
            "counter",
            "Attempts to deliver a file that have failed.",
            inner.upload_retries,
        ),
        (
            "upload_failures_total",
            "counter",
            "Captures whose files could not all be delivered.",
            inner.upload_failures,
        ),
    ] {
        page.one(&format!("tapline_{name}"), kind, help, value as f64);
    }
}

/// Counters of packets begin anew when its job does, as after an interface was gone.
#[expect(clippy::cast_precision_loss, reason = "Prometheus has floats only")]
fn recorder(stats: &RecorderStats, page: &mut Page) {
    let (progress, seconds) =
        (&stats.progress, |ns: Option<u64>| ns.unwrap_or_default() as f64 / 1e9);
    for (name, kind, help, value) in [
        (
            "recording",
            "gauge",
            "Whether the recorder records.",
            f64::from(u8::from(stats.recording)),
        ),
        ("seen_packets_total", "counter", "Packets that passed it.", progress.seen as f64),
        ("hits_packets_total", "counter", "Packets in its sample.", progress.hits.packets as f64),
        (
            "packets_total",
            "counter",
            "Of these, packets recorded.",
            progress.captured.packets as f64,
        ),
        ("bytes_total", "counter", "Bytes of packets recorded.", progress.captured.bytes as f64),
        ("segments", "gauge", "Sealed files.", stats.segments as f64),
        ("disk_bytes", "gauge", "Bytes on the disk.", stats.bytes as f64),
        ("disk_limit_bytes", "gauge", "Bytes that there may be.", stats.limit as f64),
        ("damaged_total", "counter", "Damaged places found in files.", stats.damaged as f64),
        (
            "oldest_timestamp_seconds",
            "gauge",
            "Time of the oldest sealed packet.",
            seconds(stats.oldest_ns),
        ),
        (
            "newest_timestamp_seconds",
            "gauge",
            "Time of the newest sealed packet.",
            seconds(stats.newest_ns),
        ),
    ] {
        page.one(&format!("tapline_recorder_{name}"), kind, help, value);
    }
    page.metric(
        "tapline_recorder_dropped_packets_total",
        "counter",
        "Packets in its sample and not recorded, by cause.",
        &by_cause(&progress.drops),
    );
    let removed = &stats.removed;
    let removed = [("age", removed.age), ("budget", removed.budget), ("reserve", removed.reserve)]
        .map(|(cause, count)| (format!("{{cause=\"{cause}\"}}"), count as f64));
    page.metric(
        "tapline_recorder_removed_segments_total",
        "counter",
        "Files removed: too old, to stay within the budget, to leave the reserve of the disk free.",
        &removed,
    );
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus has floats only")]
fn by_cause(drops: &Drops) -> Vec<(String, f64)> {
    let line = |(cause, count, _)| (format!("{{cause=\"{cause}\"}}"), count as f64);
    drops.named().into_iter().map(line).collect()
}

#[expect(clippy::cast_precision_loss, reason = "Prometheus has floats only")]
fn durations(inner: &Inner, page: &mut Page) {
    let mut sum = 0;
    let mut lines = Vec::new();
    for (at, count) in inner.durations.iter().enumerate() {
        sum += count;
        let bound = BOUNDS.get(at).map_or_else(|| "+Inf".to_owned(), ToString::to_string);
        lines.push((format!("_bucket{{le=\"{bound}\"}}"), sum as f64));
    }
    lines.push(("_sum".into(), inner.seconds));
    lines.push(("_count".into(), sum as f64));
    page.metric(
        "http_request_duration_seconds",
        "histogram",
        "From the request's headers to the answer's.",
        &lines,
    );
}

/// What Prometheus' own clients say of a process. On a kernel without `/proc` it is left out.
#[expect(clippy::cast_precision_loss, reason = "Prometheus has floats only")]
fn process(counters: &Counters, page: &mut Page) {
    let started = counters.started.duration_since(UNIX_EPOCH).unwrap_or_default();
    page.one(
        "process_start_time_seconds",
        "gauge",
        "When the process started, since 1970.",
        started.as_secs_f64(),
    );
    if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
        let help = "File descriptors in use.";
        page.one("process_open_fds", "gauge", help, descriptors.count() as f64);
    }
    if let Ok(usage) = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF) {
        let seconds =
            |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        page.one(
            "process_cpu_seconds_total",
            "counter",
            "CPU time used, user and system.",
            seconds(usage.user_time()) + seconds(usage.system_time()),
        );
    }
    let memory = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    if let Some(pages) = memory.split(' ').nth(1).and_then(|pages| pages.parse::<f64>().ok()) {
        let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
        page.one(
            "process_resident_memory_bytes",
            "gauge",
            "Memory in use.",
            pages * size.unwrap_or(4096) as f64,
        );
    }
}
