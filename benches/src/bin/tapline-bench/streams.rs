//! What a capture costs the traffic that it sees: a TCP stream (iperf3) and requests to a web server (nginx)
//! between two namespaces, with each watcher in turn, as a ratio to the same round without one.

use std::{fs, path::Path, time::Duration};

use serde_json::{Value, json};
use tapline_tests::{
    netns::Namespace,
    traffic::{SERVER, addresses, iperf3, nginx, requests},
    veth::Veth,
};

use crate::{
    machine,
    results::Spread,
    run::as_f64,
    tool::{Running, Said, Tool},
};

/// Name, watcher, and the port that it asks for: nothing uses the discard port.
const WATCHERS: [(&str, Tool, Option<u16>); 4] = [
    ("off", Tool::Nobody, None),
    ("tapline tap, nothing matched", Tool::Tap, Some(9)),
    ("tapline tap, everything matched", Tool::Tap, None),
    ("tcpdump, everything matched", Tool::Tcpdump, None),
];

/// The part of the packets that a watcher has written.
fn written(said: &Said) -> Option<f64> {
    let (hits, written) = (said.hits.filter(|hits| *hits > 0)?, said.written?);
    // Not all tools count what they lose among what they receive.
    Some(as_f64(written) / as_f64(hits.max(written + said.dropped())))
}

/// What is watched.
#[derive(Clone, Copy)]
enum Traffic {
    /// One TCP connection, as fast as it gets; Gbit/s.
    Stream,
    /// Requests on connections that stay; thousands a second.
    Requests,
    /// Requests, each on a connection of its own; thousands a second.
    Connections,
}

impl Traffic {
    const fn name(self) -> &'static str {
        match self {
            Self::Stream => "TCP stream (iperf3), Gbit/s",
            Self::Requests => "requests (nginx, wrk), thousands a second",
            Self::Connections => "requests, each with its connection, thousands a second",
        }
    }

    /// Programs that have to be installed for it.
    const fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Stream => &["iperf3"],
            Self::Requests | Self::Connections => &["nginx", "wrk"],
        }
    }

    fn rate(self, client: &Namespace, seconds: u64) -> f64 {
        match self {
            Self::Stream => {
                let line = ["iperf3", "--client", SERVER, "--json", "--time", &seconds.to_string()];
                let report: Value = serde_json::from_slice(&client.run(&line).stdout).unwrap();
                report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e9
            }
            Self::Requests => requests(client, "page", seconds, true).rate / 1e3,
            Self::Connections => requests(client, "page", seconds, false).rate / 1e3,
        }
    }
}

/// Runs the rounds of a kind of traffic; gives a table and its values.
fn rounds(
    traffic: Traffic,
    (client, veth): (&Namespace, &Veth<'_>),
    folder: &Path,
    repeats: usize,
    seconds: u64,
) -> (String, Vec<Value>) {
    let mut rates = [const { Vec::new() }; WATCHERS.len()];
    let mut ratios = [const { Vec::new() }; WATCHERS.len()];
    let mut parts = [const { Vec::new() }; WATCHERS.len()];
    for round in 0..repeats {
        let mut now = [0.0; WATCHERS.len()];
        for turn in 0..WATCHERS.len() {
            // Another one begins each round.
            let at = (round + turn) % WATCHERS.len();
            let (_, tool, port) = WATCHERS[at];
            let watcher = Running::start(tool, &veth.right, folder, None, port);
            let file = watcher.file.clone();
            now[at] = traffic.rate(client, seconds);
            parts[at].extend(written(&watcher.stop()));
            let _ = fs::remove_file(file);
        }
        for at in 0..WATCHERS.len() {
            rates[at].push(now[at]);
            ratios[at].push(now[at] / now[0]);
        }
    }

    let mut text = format!("\n{}: {repeats} rounds of {seconds} s\n", traffic.name());
    text += &format!("{:<34} {:>20} {:>20} {:>20}\n", "", "rate", "ratio", "written");
    let mut values = Vec::new();
    for (at, (name, ..)) in WATCHERS.iter().enumerate() {
        let [rate, ratio] = [&rates, &ratios].map(|all| Spread::of(all[at].clone()).unwrap());
        let part = Spread::of(parts[at].clone());
        let shown = part.as_ref().map_or_else(|| "-".into(), |part| part.show(1.0, 3));
        let (shown_rate, shown_ratio) = (rate.show(1.0, 2), ratio.show(1.0, 3));
        text += &format!("{name:<34} {shown_rate:>20} {shown_ratio:>20} {shown:>20}\n");
        values.push(json!({
            "traffic": traffic.name(), "watcher": name, "rate": rate.json(), "ratio": ratio.json(),
            "written": part.map(Spread::json),
        }));
    }
    (text, values)
}

/// Watches each kind of traffic; gives tables and their values.
pub(crate) fn measure(folder: &Path, repeats: usize, duration: Duration) -> (String, Value) {
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    addresses(&veth);
    let pages = tempfile::tempdir().unwrap();
    fs::write(pages.path().join("page"), vec![b'x'; 4000]).unwrap();
    let (mut text, mut values) = (String::new(), Vec::new());
    let mut servers = Vec::new();
    for traffic in [Traffic::Stream, Traffic::Requests, Traffic::Connections] {
        if let Some(missing) = traffic.needs().iter().find(|program| !machine::has(program)) {
            println!("{} without {missing}: left out", traffic.name());
            continue;
        }
        match traffic {
            Traffic::Stream => servers.push(iperf3(&right)),
            Traffic::Requests => servers.push(nginx(&right, pages.path())),
            Traffic::Connections => {}
        }
        let seconds = duration.as_secs().max(1);
        let (table, more) = rounds(traffic, (&left, &veth), folder, repeats, seconds);
        text += &table;
        values.extend(more);
    }
    (text, Value::Array(values))
}
