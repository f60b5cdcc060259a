//! What this process may do.

use std::fs;

/// Gives the binary what it needs, once, so that it needs no root.
pub(crate) const SETCAP: &str = "sudo setcap cap_bpf,cap_ipc_lock,cap_net_admin,cap_net_raw,cap_perfmon+ep \
                          \"$(command -v tapline)\"";

/// A set of capabilities, as the kernel numbers them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capabilities(pub(crate) u64);

impl Capabilities {
    pub(crate) const NET_ADMIN: u32 = 12;
    pub(crate) const NET_RAW: u32 = 13;
    pub(crate) const IPC_LOCK: u32 = 14;
    pub(crate) const SYS_ADMIN: u32 = 21;
    pub(crate) const SYS_RESOURCE: u32 = 24;
    pub(crate) const PERFMON: u32 = 38;
    pub(crate) const BPF: u32 = 39;

    /// This process's; `None` when `/proc` does not tell.
    pub(crate) fn own() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/self/status").ok()?)
    }

    /// From `/proc/self/status`.
    pub(crate) fn parse(status: &str) -> Option<Self> {
        let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(set.trim(), 16).ok().map(Self)
    }

    pub(crate) fn has(self, capability: u32) -> bool {
        self.0 >> capability & 1 == 1
    }

    /// Whether they are enough to load and attach the programs.
    pub(crate) fn load_programs(self) -> bool {
        let split = self.has(Self::BPF) && self.has(Self::PERFMON);
        (split || self.has(Self::SYS_ADMIN)) && self.has(Self::NET_ADMIN)
    }
}
