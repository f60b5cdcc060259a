//! What must not be left behind: namespaces, kernel programs and maps, files.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use aya::{maps::loaded_maps, programs::loaded_programs};
use tapline_tests::process::wait_until;

/// The names of our programs and maps, as far as the kernel keeps them (15 bytes).
const OURS: [&str; 21] = [
    "exclusive",
    "exclusive_copy",
    "tap_ingress",
    "tap_egress",
    "tap_xdp",
    "generate",
    "drop",
    "receive",
    "look_on",
    "pass",
    "SWITCH",
    "TABLES",
    "SPORTS",
    "DPORTS",
    "COUNTERS",
    "SOCKETS",
    "RINGS",
    "POSITIONS",
    "BELLS",
    "CONFIG",
    "SENT",
];

/// What there is of them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Leftovers(BTreeSet<String>);

impl Leftovers {
    pub(crate) fn now(folder: &Path) -> Self {
        let mut found = BTreeSet::new();
        // Ours are named by the process that makes them.
        let own = format!("tln{}-", std::process::id());
        for (kind, folder) in [("namespace", Path::new("/run/netns")), ("file", folder)] {
            let Ok(entries) = fs::read_dir(folder) else { continue };
            let names =
                entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
            // Plots and the report are to stay; what contestants write is in a hidden folder.
            let temporary = |name: &str| kind == "file" && name.starts_with('.');
            let ours = names.filter(|name| temporary(name) || name.starts_with(&own));
            found.extend(ours.map(|name| format!("{kind} {name}")));
        }
        let ours = |name: Option<&str>| name.filter(|name| OURS.contains(name)).map(str::to_owned);
        for program in loaded_programs().flatten() {
            found.extend(
                ours(program.name_as_str()).map(|name| format!("program {name} {}", program.id())),
            );
        }
        for map in loaded_maps().flatten() {
            found.extend(ours(map.name_as_str()).map(|name| format!("map {name} {}", map.id())));
        }
        Self(found)
    }

    /// Waits until nothing is there that was not there before: the kernel frees maps and programs a
    /// moment after their last use. Panics with what stays.
    pub(crate) fn wait_until_gone(&self, folder: &Path) {
        let mut left = Vec::new();
        let gone = || {
            left = Self::now(folder).0.difference(&self.0).cloned().collect();
            left.is_empty()
        };
        wait_until("everything to be gone", Duration::from_secs(30), gone);
    }
}
