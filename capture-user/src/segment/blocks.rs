//! The blocks at both ends of a segment, in a job's terms.

use super::pcapng::{
    self, InterfaceInfo, InterfaceStatistics, LINKTYPE_ETHERNET, LINKTYPE_RAW, SectionInfo,
};
use crate::{clock::utc_ns, stats::Law};

/// Room kept for the statistics blocks when a segment is limited in size, bytes per interface.
pub(super) const STATISTICS_ROOM: u64 = 1024;

/// What a file says of an interface.
#[derive(Clone, Debug, Default)]
pub struct InterfaceLabel {
    /// Its name.
    pub name: String,
    /// Driver and the like.
    pub hardware: String,
    /// The job's filter.
    pub filter: String,
    /// Most bytes kept of a packet; 0 is all.
    pub snaplen: u32,
    /// How it is captured.
    pub comment: String,
    /// Whether packets begin with an IP header and not with an Ethernet header.
    pub raw_ip: bool,
}

/// What is known of one interface, or one queue of it, when the job is over.
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamTotals {
    /// Packets that reached the kernel program.
    pub seen: u64,
    /// What became of the hits.
    pub law: Law,
}

/// The first blocks of every segment.
pub(super) fn head(comment: &str, interfaces: &[InterfaceLabel]) -> Vec<u8> {
    let name = nix::sys::utsname::uname().ok();
    let field = |value: Option<&std::ffi::OsStr>| {
        value.map(|value| value.to_string_lossy().into_owned()).unwrap_or_default()
    };
    let os = format!(
        "{} {}",
        field(name.as_ref().map(nix::sys::utsname::UtsName::sysname)),
        field(name.as_ref().map(nix::sys::utsname::UtsName::release))
    );
    let mut out = Vec::new();
    pcapng::section_header(
        &mut out,
        &SectionInfo {
            hardware: &field(name.as_ref().map(nix::sys::utsname::UtsName::machine)),
            os: &os,
            application: concat!("Tapline ", env!("CARGO_PKG_VERSION")),
            comment,
        },
    );
    for interface in interfaces {
        pcapng::interface_description(
            &mut out,
            &InterfaceInfo {
                name: &interface.name,
                description: "",
                filter: &interface.filter,
                os: &os,
                hardware: &interface.hardware,
                comment: &interface.comment,
                snaplen: interface.snaplen,
                linktype: if interface.raw_ip { LINKTYPE_RAW } else { LINKTYPE_ETHERNET },
            },
        );
    }
    out
}

/// The statistics blocks of a segment, one per interface, which had this many packets. `totals` are the
/// whole job's.
pub(super) fn statistics(
    packets: &[u64],
    start_ns: u64,
    totals: Option<&[StreamTotals]>,
) -> Vec<u8> {
    let mut out = Vec::new();
    let now = utc_ns();
    for (at, packets) in packets.iter().enumerate() {
        let mut statistics = InterfaceStatistics {
            interface: at as u32,
            timestamp_ns: now,
            start_ns,
            end_ns: now,
            received: None,
            dropped_by_interface: None,
            filter_accepted: None,
            dropped_by_os: None,
            delivered: Some(*packets),
            comment: "",
        };
        let comment;
        if let Some(totals) = totals.and_then(|totals| totals.get(at)) {
            let law = &totals.law;
            statistics.received = Some(totals.seen);
            statistics.filter_accepted = Some(law.hits.packets);
            statistics.dropped_by_interface = Some(0);
            statistics.dropped_by_os = Some(law.drops.total());
            statistics.delivered = Some(law.written.packets);
            comment = law_in_words(law);
            statistics.comment = &comment;
        }
        pcapng::interface_statistics(&mut out, &statistics);
    }
    out
}

/// `hits 10 = written 8 + rx_ring_full 2`.
fn law_in_words(law: &Law) -> String {
    let mut words = format!("hits {} = written {}", law.hits.packets, law.written.packets);
    for (name, count, _) in law.drops.named() {
        if count > 0 {
            words += &format!(" + {name} {count}");
        }
    }
    words
}
