//! `tapline query`.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
};

use jiff::{SignedDuration, Timestamp, civil::DateTime, tz::TimeZone};
use thiserror::Error;

use super::{
    filter::FilterArgs,
    parse::{duration, whole},
};
use crate::{
    recorder::{Answer, FOLDER, Query, QueryError, Store},
    segment::SegmentError,
};

/// Write packets of the past into a pcapng file, as far as the recorder has kept them.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Times are RFC 3339 (2024-05-01T12:00:00Z, 2024-05-01T14:00:00+02:00; without a zone they are UTC), how \
long ago (-5m, -90s, -2h), or now. Both ends are included.

Filters are ANDed. Without any, every packet of the window is written. Neither the daemon nor any \
privilege but that of reading the folder is needed; what was recorded a moment ago may take half a \
second to be found.

Exit status: 0 done, also when nothing was found, 1 failed, 2 usage.")]
pub struct QueryArgs {
    /// Data folder of the daemon, or a recorder's own
    #[arg(long, value_name = "DIR", default_value = "/var/lib/tapline")]
    pub data: PathBuf,

    /// Begin of the window
    #[arg(
        long, value_name = "TIME", default_value = "-24h", allow_hyphen_values = true,
        value_parser = time,
    )]
    pub from: Time,

    /// End of the window
    #[arg(
        long, value_name = "TIME", default_value = "now", allow_hyphen_values = true,
        value_parser = time,
    )]
    pub to: Time,

    /// File to write, or - for standard output
    #[arg(short, long = "write", value_name = "FILE|-", required = true)]
    pub write: PathBuf,

    /// Which packets
    #[command(flatten)]
    pub filter: FilterArgs,

    /// Only this many of them, the newest
    #[arg(short = 'c', long, value_name = "N", value_parser = whole::<u64>(1, u64::MAX))]
    pub packets: Option<u64>,

    /// Print what was found as JSON, to standard output (to standard error with -w -)
    #[arg(long)]
    pub json: bool,

    /// Say nothing but errors and warnings
    #[arg(short, long)]
    pub quiet: bool,
}

/// A time as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Time {
    /// A point in time.
    At(Timestamp),
    /// So long before now.
    Ago(SignedDuration),
}

impl Time {
    fn resolve(self, now: Timestamp) -> Timestamp {
        match self {
            Self::At(time) => time,
            Self::Ago(ago) => now.checked_sub(ago).unwrap_or(Timestamp::UNIX_EPOCH),
        }
    }
}

/// Reads a time: RFC 3339, `-5m` or `now`.
fn time(text: &str) -> Result<Time, String> {
    let limit = "give a time like 2024-05-01T12:00:00Z (without a zone: UTC), how long ago like -5m, or \
                 now";
    if text == "now" {
        return Ok(Time::Ago(SignedDuration::ZERO));
    }
    if let Some(ago) = text.strip_prefix('-') {
        let ago = duration(ago).map_err(|_limit| limit)?;
        return SignedDuration::try_from(ago).map(Time::Ago).map_err(|_error| limit.into());
    }
    let time = text.parse::<Timestamp>().or_else(|_| {
        text.parse::<DateTime>()
            .and_then(|time| time.to_zoned(TimeZone::UTC))
            .map(|time| time.timestamp())
    });
    let time = time.map_err(|_error| limit)?;
    if time < Timestamp::UNIX_EPOCH {
        return Err("must not be before 1970".into());
    }
    Ok(Time::At(time))
}

/// Why a query could not be answered.
#[derive(Debug, Error)]
pub enum QueryCommandError {
    /// The flags contradict each other.
    #[error("{0}")]
    Usage(String),
    /// The folder.
    #[error(transparent)]
    Folder(#[from] SegmentError),
    /// The query.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// What was found could not be printed.
    #[error("printing")]
    Print(#[source] io::Error),
}

impl QueryCommandError {
    /// Whether the command line is at fault.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Usage(_))
    }
}

/// Answers a query.
pub fn run(args: &QueryArgs) -> Result<(), QueryCommandError> {
    let usage = |message: String| Err(QueryCommandError::Usage(message));
    let now = Timestamp::now();
    let (from, to) = (args.from.resolve(now), args.to.resolve(now));
    if from > to {
        return usage(format!("--from is {from}, but must not be later than --to, {to}"));
    }
    let filter = args.filter.filter().map_err(QueryCommandError::Usage)?;
    let to_stream = args.write == Path::new("-");
    if to_stream && io::stdout().is_terminal() {
        return usage(
            "-w - would write pcapng to the terminal; pipe it into another program, for example \
             `| wireshark -k -i -`"
                .into(),
        );
    }
    if !to_stream && (args.write.file_name().is_none() || args.write.is_dir()) {
        return usage(format!("-w is {}, but must be a file or -", args.write.display()));
    }
    let nanoseconds = |time: Timestamp| u64::try_from(time.as_nanosecond()).unwrap_or(u64::MAX);
    let query =
        Query { from_ns: nanoseconds(from), to_ns: nanoseconds(to), filter, limit: args.packets };
    let store = Store::open(&folder(&args.data)?)?;
    let answer = if to_stream {
        store.query_into(&query, &mut io::stdout().lock())
    } else {
        store.query(&query, &args.write)
    }?;
    report(&answer, args, to_stream).map_err(QueryCommandError::Print)
}

/// The recorder's folder in a data folder, or the folder itself if that is one.
fn folder(data: &Path) -> Result<PathBuf, QueryCommandError> {
    let within = data.join(FOLDER);
    if within.is_dir() {
        return Ok(within);
    }
    // What cannot be read is said as it is.
    Store::open(data)?;
    if Store::is_one(data) {
        return Ok(data.to_path_buf());
    }
    Err(QueryCommandError::Usage(format!(
        "--data is {}, but there is no recorder in it: it is where the `recorder` of the daemon's \
         `data_dir` is",
        data.display()
    )))
}

fn report(answer: &Answer, args: &QueryArgs, to_stream: bool) -> io::Result<()> {
    if args.json {
        let line = serde_json::to_string(answer).map_err(io::Error::other)?;
        return if to_stream {
            writeln!(io::stderr(), "{line}")
        } else {
            writeln!(io::stdout(), "{line}")
        };
    }
    if args.quiet {
        return Ok(());
    }
    io::stderr().write_all(in_words(answer).as_bytes())
}

fn in_words(answer: &Answer) -> String {
    let mut text = format!("{} packets found", answer.packets);
    if answer.packets > 0 {
        let time = |ns: u64| Timestamp::from_nanosecond(ns.into()).unwrap_or_default();
        let (first, last) = (time(answer.first_ns), time(answer.last_ns));
        text += &format!(", from {first} to {last}");
        text += &format!("\nabout {:.0} passed, by how they were sampled", answer.estimated);
    }
    let blocks = &answer.blocks;
    text += &format!("\n{} blocks read, {} passed over\n", blocks.read, blocks.skipped);
    if blocks.corrupt > 0 {
        text += &format!("{} blocks are damaged and were skipped\n", blocks.corrupt);
    }
    if blocks.expired > 0 {
        text += &format!("{} blocks expired meanwhile\n", blocks.expired);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_and_without_a_zone_and_by_how_long_ago() {
        let noon = Time::At("2024-05-01T12:00:00Z".parse().unwrap());
        for text in [
            "2024-05-01T12:00:00Z",
            "2024-05-01T14:00:00+02:00",
            "2024-05-01T12:00:00",
            "2024-05-01 12:00:00.000",
        ] {
            assert_eq!(time(text), Ok(noon), "{text}");
        }
        assert_eq!(time("2024-05-01"), Ok(Time::At("2024-05-01T00:00:00Z".parse().unwrap())));
        let now = "2024-05-01T12:05:00Z".parse().unwrap();
        assert_eq!(time("-5m").unwrap().resolve(now), noon.resolve(now));
        assert_eq!(time("-1h 30s").unwrap().resolve(now).to_string(), "2024-05-01T11:04:30Z");
        assert_eq!(time("now").unwrap().resolve(now), now);
        for text in ["", "yesterday", "5m", "-", "-5", "--5m", "2024-13-01", "1969-01-01", "now+1h"]
        {
            assert!(time(text).is_err() || text == "-5", "{text}");
        }
    }

    #[test]
    fn what_was_found_is_said_with_what_was_not_read() {
        let answer = Answer { packets: 2, estimated: 200.0, ..Answer::default() };
        let text = in_words(&answer);
        assert!(text.contains("2 packets found") && text.contains("about 200 passed"), "{text}");
        assert!(!text.contains("damaged") && !text.contains("expired"), "{text}");
        let mut answer = Answer::default();
        (answer.blocks.corrupt, answer.blocks.expired) = (3, 4);
        let text = in_words(&answer);
        assert!(text.starts_with("0 packets found\n"), "{text}");
        assert!(
            text.contains("3 blocks are damaged") && text.contains("4 blocks expired"),
            "{text}"
        );
    }
}
