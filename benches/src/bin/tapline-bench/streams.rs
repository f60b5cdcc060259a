//! What a capture costs the traffic that it sees: a TCP stream (iperf3) between two namespaces, with
//! each watcher in turn, as a ratio to the same round without one.

use std::{fs, path::Path, time::Duration};

use serde_json::{Value, json};
use tapline_tests::{netns::Namespace, process::wait_until, veth::Veth};

use crate::{
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

/// Runs the rounds; gives a table and its values.
pub(crate) fn measure(folder: &Path, repeats: usize, duration: Duration) -> (String, Value) {
    let seconds = duration.as_secs().max(1).to_string();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    veth.left.add_address("10.0.0.1/24");
    veth.right.add_address("10.0.0.2/24");
    let mut server = right.spawn(&["iperf3", "--server"]);
    wait_until("iperf3", Duration::from_secs(10), || {
        !right.run(&["ss", "-Hltn", "sport = :5201"]).stdout.is_empty()
    });

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
            let client = ["iperf3", "--client", "10.0.0.2", "--json", "--time", &seconds];
            let report: Value = serde_json::from_slice(&left.run(&client).stdout).unwrap();
            parts[at].extend(written(&watcher.stop()));
            let _ = fs::remove_file(file);
            now[at] = report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e9;
        }
        for at in 0..WATCHERS.len() {
            rates[at].push(now[at]);
            ratios[at].push(now[at] / now[0]);
        }
    }
    server.kill().unwrap();
    server.wait().unwrap();

    let mut text = format!("\nTCP stream, {repeats} rounds of {seconds} s\n");
    text += &format!("{:<34} {:>20} {:>20} {:>20}\n", "", "Gbit/s", "ratio", "written");
    let mut values = Vec::new();
    for (at, (name, ..)) in WATCHERS.iter().enumerate() {
        let [rate, ratio] = [&rates, &ratios].map(|all| Spread::of(all[at].clone()).unwrap());
        let part = Spread::of(parts[at].clone());
        let shown = part.as_ref().map_or_else(|| "-".into(), |part| part.show(1.0, 3));
        let (shown_rate, shown_ratio) = (rate.show(1.0, 2), ratio.show(1.0, 3));
        text += &format!("{name:<34} {shown_rate:>20} {shown_ratio:>20} {shown:>20}\n");
        values.push(json!({
            "watcher": name, "gbit_s": rate.json(), "ratio": ratio.json(),
            "written": part.map(Spread::json),
        }));
    }
    (text, Value::Array(values))
}
