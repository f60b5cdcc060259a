//! Veth pairs.

use std::{collections::BTreeMap, fs, time::Duration};

use nix::net::if_::if_nametoindex;

use crate::{
    netns::{Namespace, unique_name},
    process::wait_until,
};

/// One end of a veth pair.
#[derive(Clone, Debug)]
pub struct End<'a> {
    /// Where it is.
    pub namespace: &'a Namespace,
    /// Interface name.
    pub name: String,
    /// Interface index.
    pub index: u32,
}

impl End<'_> {
    /// Gives the end an address, with its prefix length.
    pub fn add_address(&self, address: &str) {
        // Without `nodad` an IPv6 address would not work for the first second.
        let nodad: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
        let line = ["ip", "address", "add", address, "dev", &self.name];
        self.namespace.run(&[&line, nodad].concat());
    }

    /// The driver's own counters, as `ethtool -S` has them.
    pub fn statistics(&self) -> BTreeMap<String, u64> {
        let output = self.namespace.run(&["ethtool", "-S", &self.name]);
        let text = String::from_utf8(output.stdout).unwrap();
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        pairs
            .filter_map(|(name, value)| Some((name.trim().to_owned(), value.trim().parse().ok()?)))
            .collect()
    }

    /// One of the kernel's counters of an interface, such as `rx_dropped`.
    pub fn counter(&self, name: &str) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/{name}", self.name);
        let text = self.namespace.enter(|| fs::read_to_string(&path));
        text.unwrap_or_else(|error| panic!("{path}: {error}")).trim().parse().unwrap()
    }
}

/// How to make a [`Veth`].
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// MTU of both ends, bytes.
    pub mtu: u32,
    /// Receive and transmit queues of both ends. With more than one, a redirected frame arrives on
    /// the peer's queue of the CPU that sent it.
    pub queues: u32,
    /// Whether the ends gather segments. An end takes redirected frames only while it does or has
    /// an XDP program.
    pub gro: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { mtu: 1500, queues: 1, gro: true }
    }
}

/// A veth pair between two namespaces, both ends up and without addresses; gone when dropped.
#[derive(Debug)]
pub struct Veth<'a> {
    /// The end that the tests send from.
    pub left: End<'a>,
    /// The end that they capture at.
    pub right: End<'a>,
}

impl<'a> Veth<'a> {
    /// A pair with the default options.
    pub fn new(left: &'a Namespace, right: &'a Namespace) -> Self {
        Self::with(left, right, Options::default())
    }

    /// A pair with these options.
    pub fn with(left: &'a Namespace, right: &'a Namespace, options: Options) -> Self {
        let (left_name, right_name) = (unique_name("l"), unique_name("r"));
        let (mtu, queues) = (options.mtu.to_string(), options.queues.to_string());
        let end =
            |name| ["name", name, "mtu", &mtu, "numrxqueues", &queues, "numtxqueues", &queues];
        let add: &[&str] = &["ip", "link", "add"];
        let peer: &[&str] = &["type", "veth", "peer"];
        let to: &[&str] = &["netns", right.name()];
        left.run(&[add, &end(&left_name), peer, &end(&right_name), to].concat());
        let ends = [(left, left_name), (right, right_name)].map(|(namespace, name)| {
            namespace.run(&["ip", "link", "set", &name, "up"]);
            let index = namespace.enter(|| if_nametoindex(name.as_str()).unwrap());
            End { namespace, name, index }
        });
        if options.gro {
            // Only when both are up does one end's wish make the other a target for redirects.
            // `veth_set_features` in https://github.com/torvalds/linux/blob/v6.6/drivers/net/veth.c
            for end in &ends {
                end.namespace.run(&["ethtool", "-K", &end.name, "gro", "on"]);
            }
        }
        let [left, right] = ends;
        Self { left, right }
    }

    /// Waits until all that was ever sent out of the left end has been taken in at the right end;
    /// gives how much was. The pair's own ring is short, and what it has no room for is lost before
    /// any program sees it.
    pub fn settle(&self, sent: u64) -> u64 {
        let mut taken = 0;
        wait_until("frames at the other end", Duration::from_secs(10), || {
            taken = self.right.counter("rx_packets");
            taken + self.left.counter("tx_dropped") == sent
        });
        taken
    }
}

impl Drop for Veth<'_> {
    fn drop(&mut self) {
        // The other end goes with it; both may have gone with a test that deletes one.
        let mut delete = self.left.namespace.command("ip", ["link", "del", &self.left.name]);
        let _ = delete.output();
    }
}
