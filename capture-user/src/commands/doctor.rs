//! `tapline doctor`.

mod host;
mod interface;

use std::{
    fmt,
    io::{self, Write},
};

use serde::Serialize;
use thiserror::Error;

use crate::nic::{self, NicError};

/// Check what this host lacks for line-rate capture.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
ok    as it should be
warn  capture works, but slower, or not quite as on the wire
fail  capture does not work

Exit status: 0 no check failed, 1 at least one did.")]
pub struct DoctorArgs {
    /// Interface to check; repeat for several [default: those that are hardware]
    #[arg(short, long = "interface", value_name = "IFACE")]
    pub interfaces: Vec<String>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The checks could not be made.
#[derive(Debug, Error)]
pub enum DoctorError {
    /// The kernel did not tell of an interface.
    #[error(transparent)]
    Nic(#[from] NicError),
    /// The result could not be printed.
    #[error("printing the result")]
    Output(#[from] io::Error),
}

/// Checks the host and the interfaces, and says whether no check failed.
pub fn run(args: &DoctorArgs, out: &mut impl Write) -> Result<bool, DoctorError> {
    let interfaces = if args.interfaces.is_empty() {
        nic::list()?.into_iter().filter(|interface| interface.bus.is_some()).collect()
    } else {
        let found = args.interfaces.iter().map(|name| nic::find(name));
        found.collect::<Result<Vec<_>, _>>()?
    };
    let mut sections = vec![Section { subject: "host".into(), checks: host::checks() }];
    sections.extend(interfaces.iter().map(|interface| Section {
        subject: interface.name.clone(),
        checks: interface::checks(interface),
    }));
    let report =
        Report { fine: sections.iter().all(|section| section.count(Status::Fail) == 0), sections };
    if args.json {
        serde_json::to_writer_pretty(&mut *out, &report).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        write!(out, "{report}")?;
    }
    out.flush()?;
    Ok(report.fine)
}

/// What a check came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// Capture does not work.
    Fail,
    /// As it should be.
    Ok,
    /// It could not be found out.
    Unknown,
    /// Capture works, but slower, or not quite as on the wire.
    Warn,
}

impl Status {
    fn text(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::Ok => "ok",
            Self::Unknown => "unknown",
            Self::Warn => "warn",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    found: String,
    why: &'static str,
    /// The command that mends it.
    mend: Option<String>,
}

/// A check that is still to be made: its name, and why it matters.
#[derive(Clone, Copy, Debug)]
struct Topic {
    name: &'static str,
    why: &'static str,
}

impl Topic {
    fn check(self, status: Status, found: impl Into<String>, mend: Option<String>) -> Check {
        Check { name: self.name, status, found: found.into(), why: self.why, mend }
    }

    fn fail(self, found: impl Into<String>, mend: impl Into<String>) -> Check {
        self.check(Status::Fail, found, Some(mend.into()))
    }

    fn ok(self, found: impl Into<String>) -> Check {
        self.check(Status::Ok, found, None)
    }

    fn unknown(self, found: impl Into<String>) -> Check {
        self.check(Status::Unknown, found, None)
    }

    fn warn(self, found: impl Into<String>, mend: impl Into<String>) -> Check {
        self.check(Status::Warn, found, Some(mend.into()))
    }
}

/// The checks of the host, or of one interface.
#[derive(Debug, Serialize)]
struct Section {
    subject: String,
    checks: Vec<Check>,
}

impl Section {
    fn count(&self, status: Status) -> usize {
        self.checks.iter().filter(|check| check.status == status).count()
    }
}

#[derive(Debug, Serialize)]
struct Report {
    fine: bool,
    sections: Vec<Section>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.sections.iter().flat_map(|section| &section.checks);
        let width = names.map(|check| check.name.len()).max().unwrap_or(0);
        for Section { subject, checks } in &self.sections {
            writeln!(f, "{subject}")?;
            for check in checks {
                let Check { name, status, found, why, mend } = check;
                writeln!(f, "  {:7}  {name:width$}  {found}", status.text())?;
                if *status != Status::Ok {
                    writeln!(f, "{:13}why:  {why}", "")?;
                    if let Some(mend) = mend {
                        writeln!(f, "{:13}mend: {mend}", "")?;
                    }
                }
            }
            writeln!(f)?;
        }
        let count = |status| self.sections.iter().map(|section| section.count(status)).sum();
        let of = |status, one, many| {
            let count: usize = count(status);
            format!("{count} {}", if count == 1 { one } else { many })
        };
        writeln!(
            f,
            "{}, {}, {}, {}",
            of(Status::Ok, "ok", "ok"),
            of(Status::Warn, "warning", "warnings"),
            of(Status::Fail, "failure", "failures"),
            of(Status::Unknown, "unknown", "unknown"),
        )
    }
}

/// The processors that this process may run on.
fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOPIC: Topic = Topic { name: "topic", why: "it matters" };

    #[test]
    fn what_is_in_order_takes_one_line_and_what_is_not_says_why_and_how() {
        let report = Report {
            fine: false,
            sections: vec![
                Section { subject: "host".into(), checks: vec![TOPIC.ok("as it should be")] },
                Section {
                    subject: "eth0".into(),
                    checks: vec![
                        Topic { name: "long topic", ..TOPIC }.fail("broken", "mend it"),
                        TOPIC.unknown("not told"),
                    ],
                },
            ],
        };
        assert_eq!(
            report.to_string(),
            "\
host
  ok       topic       as it should be

eth0
  fail     long topic  broken
             why:  it matters
             mend: mend it
  unknown  topic       not told
             why:  it matters

1 ok, 0 warnings, 1 failure, 1 unknown
"
        );
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["fine"], false);
        assert_eq!(json["sections"][1]["subject"], "eth0");
        assert_eq!(json["sections"][1]["checks"][0]["status"], "fail");
        assert_eq!(json["sections"][1]["checks"][0]["mend"], "mend it");
    }

    #[test]
    fn an_unknown_interface_is_an_error() {
        let args = DoctorArgs { interfaces: vec!["no/such".into()], json: false };
        let error = run(&args, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, DoctorError::Nic(NicError::NoSuchInterface { .. })), "{error}");
    }

    #[test]
    fn the_report_is_made_whatever_the_privileges_are() {
        let args = DoctorArgs { interfaces: vec!["lo".into()], json: true };
        let mut out = Vec::new();
        let fine = run(&args, &mut out).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(json["fine"], fine);
        assert_eq!(json["sections"][0]["subject"], "host");
        assert_eq!(json["sections"][1]["subject"], "lo");
    }
}
