//! `tapline interfaces`.

use std::io::{self, Write};

use serde::Serialize;
use thiserror::Error;

use crate::nic::{self, Interface, LinkType, NicError};

/// List the interfaces and how each can be captured from.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
XDP     where the driver can run a program; `?` where this kernel (before 6.3) cannot say
MAX MTU the largest with which it can in native mode
SUITS   tap: any live interface, the host keeps every packet
        exclusive: mirror, SPAN and TAP ports, the host does not get the packets that match")]
pub struct InterfacesArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The interfaces could not be listed.
#[derive(Debug, Error)]
pub enum InterfacesError {
    /// The kernel did not tell.
    #[error(transparent)]
    Nic(#[from] NicError),
    /// The list could not be printed.
    #[error("printing the interfaces")]
    Output(#[from] io::Error),
}

/// Lists the interfaces of this network namespace.
pub fn run(args: &InterfacesArgs, out: &mut impl Write) -> Result<(), InterfacesError> {
    let interfaces = nic::list()?;
    if args.json {
        let entries: Vec<_> = interfaces.iter().map(Entry::new).collect();
        serde_json::to_writer_pretty(&mut *out, &entries).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        out.write_all(table(&interfaces).as_bytes())?;
    }
    out.flush()?;
    Ok(())
}

/// How an interface is best captured from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Suits {
    /// It looks like a mirror port.
    Exclusive,
    /// It never is one: it has no Ethernet packets, or is the loopback interface.
    Tap,
    /// It is in use; `exclusive` would take it away and so wants to be told that it may.
    TapOrMirrorPort,
}

impl Suits {
    fn of(interface: &Interface) -> Self {
        if interface.link_type != LinkType::Ethernet {
            Self::Tap
        } else if interface.exclusive_would_cut().is_some() {
            Self::TapOrMirrorPort
        } else {
            Self::Exclusive
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Exclusive => "exclusive",
            Self::Tap => "tap",
            Self::TapOrMirrorPort => "tap; exclusive needs --mirror-port",
        }
    }
}

/// An interface in JSON.
#[derive(Debug, Serialize)]
struct Entry<'a> {
    #[serde(flatten)]
    interface: &'a Interface,
    single_buffer_mtu: Option<u32>,
    suits: Suits,
    exclusive_would_cut: Option<String>,
}

impl<'a> Entry<'a> {
    fn new(interface: &'a Interface) -> Self {
        Self {
            interface,
            single_buffer_mtu: interface.single_buffer_mtu(),
            suits: Suits::of(interface),
            exclusive_would_cut: interface.exclusive_would_cut(),
        }
    }
}

const HEADINGS: [&str; 11] = [
    "INTERFACE",
    "DRIVER",
    "LINK",
    "QUEUES",
    "MTU",
    "XDP",
    "ZERO-COPY",
    "MULTI-BUFFER",
    "MAX MTU",
    "XDP PROGRAM",
    "SUITS",
];

fn row(interface: &Interface) -> [String; HEADINGS.len()] {
    let features = interface.features;
    let native = features.map(|features| features.basic);
    let multi_buffer = features.map(|features| features.rx_sg);
    let max_mtu = match (native, multi_buffer) {
        (Some(false), _) => "-".into(),
        (_, Some(true)) => "any".into(),
        _ => interface.single_buffer_mtu().map_or("?".into(), |mtu| mtu.to_string()),
    };
    let xdp = match native {
        Some(true) => "native, generic",
        Some(false) => "generic",
        None => "native?, generic",
    };
    [
        interface.name.clone(),
        interface.driver.clone().unwrap_or_else(|| "-".into()),
        link(interface),
        interface.rx_queues.to_string(),
        interface.mtu.to_string(),
        xdp.into(),
        yes_no(features.map(|features| features.zero_copy)),
        yes_no(multi_buffer),
        max_mtu,
        interface.xdp.as_ref().map_or("-".into(), ToString::to_string),
        Suits::of(interface).text().into(),
    ]
}

fn link(interface: &Interface) -> String {
    match (interface.up, interface.carrier, interface.speed) {
        (false, ..) => "down".into(),
        (true, false, _) => "no carrier".into(),
        (true, true, None) => "up".into(),
        (true, true, Some(speed)) if speed % 1000 == 0 => format!("up {}G", speed / 1000),
        (true, true, Some(speed)) => format!("up {speed}M"),
    }
}

fn yes_no(fact: Option<bool>) -> String {
    match fact {
        Some(true) => "yes",
        Some(false) => "no",
        None => "?",
    }
    .into()
}

fn table(interfaces: &[Interface]) -> String {
    let mut rows = vec![HEADINGS.map(String::from)];
    rows.extend(interfaces.iter().map(row));
    let mut widths = [0; HEADINGS.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut table = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        table.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        table.push('\n');
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nic::{XdpFeatures, XdpHolder, XdpHook};

    fn interface(name: &str) -> Interface {
        Interface {
            name: name.into(),
            index: 2,
            mtu: 1500,
            up: true,
            carrier: true,
            promiscuous: false,
            mac: None,
            link_type: LinkType::Ethernet,
            addresses: Vec::new(),
            default_route: false,
            master: None,
            uppers: Vec::new(),
            rx_queues: 4,
            driver: Some("ice".into()),
            bus: None,
            speed: Some(25_000),
            xdp: None,
            features: Some(XdpFeatures { basic: true, zero_copy: true, ..XdpFeatures::default() }),
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut eth0 = interface("eth0");
        eth0.default_route = true;
        eth0.xdp = Some(XdpHolder {
            mode: XdpHook::Native,
            program_id: 12,
            program_name: Some("filter".into()),
        });
        let mut old = interface("a");
        old.features = None;
        old.driver = Some("unheard-of".into());
        old.speed = None;
        old.carrier = false;
        let mut tunnel = interface("wg0");
        tunnel.link_type = LinkType::RawIp;
        tunnel.features = Some(XdpFeatures::default());
        tunnel.speed = Some(2500);
        assert_eq!(
            table(&[eth0, old, tunnel]),
            "\
INTERFACE  DRIVER      LINK        QUEUES  MTU   XDP               ZERO-COPY  MULTI-BUFFER  MAX MTU  XDP PROGRAM             SUITS
eth0       ice         up 25G      4       1500  native, generic   yes        no            3046     filter (id 12, native)  tap; exclusive needs --mirror-port
a          unheard-of  no carrier  4       1500  native?, generic  ?          ?             ?        -                       exclusive
wg0        ice         up 2500M    4       1500  generic           no         no            -        -                       tap
"
        );
    }

    #[test]
    fn a_driver_that_spans_buffers_has_no_largest_mtu() {
        let mut eth0 = interface("eth0");
        eth0.features = Some(XdpFeatures { basic: true, rx_sg: true, ..XdpFeatures::default() });
        assert_eq!(row(&eth0)[7..9], ["yes", "any"]);
    }

    #[test]
    fn json_says_why_exclusive_is_refused() {
        let mut eth0 = interface("eth0");
        let json = serde_json::to_value(Entry::new(&eth0)).unwrap();
        assert_eq!(json["name"], "eth0");
        assert_eq!(json["suits"], "exclusive");
        assert_eq!(json["single_buffer_mtu"], 3046);
        assert_eq!(json["exclusive_would_cut"], serde_json::Value::Null);
        eth0.default_route = true;
        let json = serde_json::to_value(Entry::new(&eth0)).unwrap();
        assert_eq!(json["suits"], "tap_or_mirror_port");
        let reason = json["exclusive_would_cut"].as_str().unwrap();
        assert!(reason.starts_with("eth0 carries the default route: "), "{reason}");
    }

    #[test]
    fn the_list_has_this_namespaces_interfaces() {
        let mut out = Vec::new();
        run(&InterfacesArgs { json: true }, &mut out).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert!(json.as_array().unwrap().iter().any(|entry| entry["name"] == "lo"));
    }
}
