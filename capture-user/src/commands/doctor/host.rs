//! The checks of the host: privileges, kernel, memory, processors.

use std::{collections::BTreeSet, fmt, fs, io};

use aya::{maps::MapType, programs::ProgramType, sys::BpfHelper};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use socket2::{Domain, Socket, Type};

use super::{Check, Status, Topic, cpus};
use crate::{
    capabilities::{Capabilities, SETCAP},
    error::with_causes,
    socket::HugePages,
};

/// The checks, in the order in which a capture would meet what they look at.
pub(super) fn checks() -> Vec<Check> {
    let kernel = read("/proc/sys/kernel/osrelease").as_deref().and_then(Version::parse);
    let capabilities = Capabilities::own();
    let symbols = Symbols::read();
    let features = Features { kernel, symbols: symbols.as_ref() };
    vec![
        privileges(capabilities, read("/proc/self/uid_map").as_deref(), kernel),
        locked_memory(capabilities, kernel, getrlimit(Resource::RLIMIT_MEMLOCK).ok().map(|l| l.0)),
        kernel_version(kernel),
        af_xdp(Socket::new(Domain::from(libc::AF_XDP), Type::from(libc::SOCK_RAW), None).map(drop)),
        features.xdp_links(),
        features.ring_buffer(),
        features.load_bytes(),
        features.multi_buffer(),
        features.tcx(),
        btf(symbols.is_some()),
        jit(read("/proc/sys/net/core/bpf_jit_enable").as_deref()),
        huge_pages(read("/proc/meminfo").as_deref()),
        governor(&governors()),
        processors(cpus()),
    ]
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// A kernel's version, as far as features go by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    major: u32,
    minor: u32,
}

impl Version {
    const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    fn parse(release: &str) -> Option<Self> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some(Self { major: numbers.next()?.ok()?, minor: numbers.next()?.ok()? })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

fn privileges(
    capabilities: Option<Capabilities>,
    uid_map: Option<&str>,
    kernel: Option<Version>,
) -> Check {
    let topic = Topic {
        name: "privileges",
        why: "programs are loaded with CAP_BPF (CAP_SYS_ADMIN before Linux 5.8) and CAP_PERFMON, \
              attached with CAP_NET_ADMIN, and AF_XDP sockets opened with CAP_NET_RAW",
    };
    let Some(capabilities) = capabilities else {
        return topic.unknown("/proc/self/status does not tell");
    };
    // CAP_SYS_ADMIN includes the two that were later split from it.
    let admin = capabilities.has(Capabilities::SYS_ADMIN);
    let split = kernel.is_none_or(|kernel| kernel >= Version::new(5, 8));
    let needed = if split {
        vec![
            ("CAP_BPF", admin || capabilities.has(Capabilities::BPF)),
            ("CAP_NET_ADMIN", capabilities.has(Capabilities::NET_ADMIN)),
            ("CAP_NET_RAW", capabilities.has(Capabilities::NET_RAW)),
            ("CAP_PERFMON", admin || capabilities.has(Capabilities::PERFMON)),
        ]
    } else {
        vec![
            ("CAP_NET_ADMIN", capabilities.has(Capabilities::NET_ADMIN)),
            ("CAP_NET_RAW", capabilities.has(Capabilities::NET_RAW)),
            ("CAP_SYS_ADMIN", admin),
        ]
    };
    let missing: Vec<_> = needed.iter().filter(|(_, held)| !held).map(|(name, _)| *name).collect();
    if !missing.is_empty() {
        return topic.fail(format!("without {}", missing.join(", ")), SETCAP);
    }
    // The whole range maps to itself only in the first user namespace, and the kernel asks for
    // CAP_BPF there.
    let mapped: Vec<_> = uid_map.unwrap_or_default().split_whitespace().collect();
    if !mapped.is_empty() && mapped != ["0", "0", "4294967295"] {
        return topic.fail(
            "held only in a user namespace (a rootless container), where they do not count",
            "run on the host itself, or in a container of the host's user namespace",
        );
    }
    topic.ok(needed.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", "))
}

fn locked_memory(
    capabilities: Option<Capabilities>,
    kernel: Option<Version>,
    limit: Option<u64>,
) -> Check {
    // UMEM: https://github.com/gregkh/linux/blob/v6.12.117/net/xdp/xdp_umem.c#L128-L152
    let topic = Topic {
        name: "locked memory",
        why: "packet memory (16 MiB a queue by default) is locked, and before Linux 5.11 the \
              program's maps too; both count against the limit of a process without the capability",
    };
    let has = |capability| capabilities.is_some_and(|held| held.has(capability));
    let maps_are_free = kernel.is_none_or(|kernel| kernel >= Version::new(5, 11));
    match limit {
        _ if has(Capabilities::SYS_RESOURCE) => topic.ok("no limit that binds: CAP_SYS_RESOURCE"),
        _ if has(Capabilities::IPC_LOCK) && maps_are_free => {
            topic.ok("no limit that binds: CAP_IPC_LOCK")
        }
        Some(RLIM_INFINITY) => topic.ok("unlimited"),
        Some(limit) => topic.warn(
            format!("at most {} KiB", limit / 1024),
            "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity), or CAP_IPC_LOCK",
        ),
        None => topic.unknown("the limit could not be read"),
    }
}

fn kernel_version(kernel: Option<Version>) -> Check {
    let topic = Topic {
        name: "kernel",
        why: "5.18 is the first that has everything the capture program needs; 6.6 adds jumbo \
              frames in AF_XDP and tcx",
    };
    match kernel {
        None => topic.unknown("/proc/sys/kernel/osrelease does not tell"),
        Some(kernel) if kernel >= Version::new(6, 6) => topic.ok(kernel.to_string()),
        // A vendor's kernel may have what its number says it lacks: the next checks tell.
        Some(kernel) => topic.warn(kernel.to_string(), "boot Linux 6.6 or newer"),
    }
}

fn af_xdp(socket: io::Result<()>) -> Check {
    let topic = Topic {
        name: "AF_XDP",
        why: "the sockets that `exclusive` receives from; a kernel has them with \
              CONFIG_XDP_SOCKETS",
    };
    match socket {
        Ok(()) => topic.ok("a socket can be opened"),
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            topic.fail("this kernel has none", "boot a kernel built with CONFIG_XDP_SOCKETS=y")
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            topic.unknown("a socket may not be opened: see privileges")
        }
        Err(error) => topic.fail(
            format!("a socket cannot be opened: {error}"),
            "allow socket(AF_XDP) in the container's or service's seccomp filter",
        ),
    }
}

/// The names in the kernel's own type information. A feature leaves its name there also when a
/// vendor has brought it to an older kernel.
#[derive(Debug)]
struct Symbols(Vec<u8>);

impl Symbols {
    fn read() -> Option<Self> {
        fs::read("/sys/kernel/btf/vmlinux").ok().and_then(Self::parse)
    }

    /// Keeps the string section.
    ///
    /// <https://docs.kernel.org/bpf/btf.html#btf-type-and-string-encoding>
    fn parse(mut btf: Vec<u8>) -> Option<Self> {
        let field = |at| btf.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes);
        let (header, at, length): (u32, u32, u32) = (field(4)?, field(16)?, field(20)?);
        let start = header as usize + at as usize;
        btf.truncate(start + length as usize);
        (start < btf.len()).then(|| Self(btf.split_off(start)))
    }

    fn has(&self, name: &str) -> bool {
        self.0.split(|byte| *byte == 0).any(|symbol| symbol == name.as_bytes())
    }
}

/// What the kernel can do: asked where it can be asked, else by what is known of its version.
#[derive(Clone, Copy, Debug)]
struct Features<'a> {
    kernel: Option<Version>,
    symbols: Option<&'a Symbols>,
}

impl Features<'_> {
    fn check(
        self,
        topic: Topic,
        since: Version,
        present: Option<bool>,
        when_missing: Status,
    ) -> Check {
        match present.or(self.kernel.map(|kernel| kernel >= since)) {
            Some(true) => topic.ok("there"),
            Some(false) => topic.check(
                when_missing,
                format!("missing; Linux has it since {since}"),
                Some(format!("boot Linux {since} or newer")),
            ),
            None => topic.unknown(format!("Linux has it since {since}")),
        }
    }

    fn symbol(self, name: &str) -> Option<bool> {
        self.symbols.map(|symbols| symbols.has(name))
    }

    fn xdp_links(self) -> Check {
        let topic = Topic {
            name: "XDP links",
            why: "without them a killed tapline would leave its program on the interface, so it \
                  refuses to attach",
        };
        self.check(topic, Version::new(5, 9), self.symbol("bpf_xdp_link"), Status::Fail)
    }

    fn ring_buffer(self) -> Check {
        let topic = Topic { name: "BPF ring buffer", why: "`tap` hands packets over through it" };
        let present = aya::sys::is_map_supported(MapType::RingBuf);
        self.check(topic, Version::new(5, 8), probed(present), Status::Fail)
    }

    fn load_bytes(self) -> Check {
        let topic = Topic {
            name: "XDP fragments",
            why: "the capture program reads frames that span buffers with bpf_xdp_load_bytes, and \
                  does not load without it",
        };
        let helper = BpfHelper::BPF_FUNC_xdp_load_bytes;
        let present = aya::sys::is_helper_supported(ProgramType::Xdp, helper);
        self.check(topic, Version::new(5, 18), probed(present), Status::Fail)
    }

    fn multi_buffer(self) -> Check {
        let topic = Topic {
            name: "AF_XDP multi-buffer",
            why: "without it `exclusive` loses frames longer than a UMEM frame holds (1792 bytes \
                  by default), counted as rx_dropped",
        };
        // The name of an attribute that came with it.
        let present = self.symbol("NETDEV_A_DEV_XDP_ZC_MAX_SEGS");
        self.check(topic, Version::new(6, 6), present, Status::Warn)
    }

    fn tcx(self) -> Check {
        let topic = Topic {
            name: "tcx",
            why: "without it `tap` attaches by classic clsact, which a killed tapline leaves behind",
        };
        self.check(topic, Version::new(6, 6), self.symbol("tcx_link"), Status::Warn)
    }
}

/// What a probe found; `None` when it could not be made.
fn probed<E: std::error::Error + 'static>(result: Result<bool, E>) -> Option<bool> {
    result.inspect_err(|error| log::debug!("probe: {}", with_causes(error))).ok()
}

fn btf(readable: bool) -> Check {
    let topic = Topic {
        name: "BTF",
        why: "with the kernel's type information a program can use its functions (hardware \
              timestamps); these checks read it too",
    };
    if readable {
        topic.ok("/sys/kernel/btf/vmlinux")
    } else {
        topic.warn(
            "/sys/kernel/btf/vmlinux cannot be read",
            "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y, or mount /sys",
        )
    }
}

fn jit(setting: Option<&str>) -> Check {
    let topic = Topic {
        name: "BPF JIT",
        why: "an interpreted program is several times slower for each packet",
    };
    let mend = "sudo sysctl -w net.core.bpf_jit_enable=1";
    match setting.map(str::trim) {
        Some("1") => topic.ok("on"),
        Some("0") => topic.check(Status::Fail, "off", Some(mend.into())),
        Some("2") => topic.warn("on, and dumps every program to the kernel's log", mend),
        _ => topic.unknown("net.core.bpf_jit_enable is shown only in the first network namespace"),
    }
}

fn huge_pages(meminfo: Option<&str>) -> Check {
    let topic = Topic {
        name: "huge pages",
        why: "UMEM on them takes fewer TLB misses; a queue's 8 MiB are 4 pages",
    };
    match meminfo.and_then(HugePages::read) {
        Some(HugePages { free: 0, .. }) => {
            topic.warn("none free", format!("sudo sysctl -w vm.nr_hugepages={}", 4 * cpus().max(2)))
        }
        Some(pages) => topic.ok(format!("{} free of {} MiB", pages.free, pages.size_kib / 1024)),
        None => topic.unknown("/proc/meminfo does not tell"),
    }
}

/// The frequency governors in use.
fn governors() -> BTreeSet<String> {
    let cpus = fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten();
    cpus.filter_map(|cpu| fs::read_to_string(cpu.path().join("cpufreq/scaling_governor")).ok())
        .map(|governor| governor.trim().to_owned())
        .collect()
}

fn governor(governors: &BTreeSet<String>) -> Check {
    let topic = Topic {
        name: "CPU governor",
        why: "a CPU that was slowed down between bursts loses the start of the next",
    };
    let found = governors.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    match found.as_str() {
        "" => topic.ok("none: the frequency is not the kernel's to set"),
        "performance" => topic.ok(found),
        _ => topic.warn(found, "sudo cpupower frequency-set -g performance"),
    }
}

fn processors(cpus: usize) -> Check {
    let topic = Topic {
        name: "CPUs",
        why: "on one CPU the worker, the disk thread and the interrupts of the NIC take turns",
    };
    match cpus {
        1 => topic.check(Status::Warn, "1", None),
        cpus => topic.ok(cpus.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODERN: Option<Version> = Some(Version::new(6, 6));
    const ROOT_MAP: Option<&str> = Some("         0          0 4294967295\n");

    fn capabilities(held: &[u32]) -> Capabilities {
        Capabilities(held.iter().map(|capability| 1 << capability).sum())
    }

    #[test]
    fn versions_are_read_from_releases_of_all_kinds() {
        for (release, version) in [
            ("6.6.0\n", Some(Version::new(6, 6))),
            ("5.14.0-427.el9.x86_64", Some(Version::new(5, 14))),
            ("6.12-rc3", Some(Version::new(6, 12))),
            ("linux", None),
            ("6", None),
        ] {
            assert_eq!(Version::parse(release), version, "{release}");
        }
        assert!(Version::new(5, 18) < Version::new(6, 6));
    }

    #[test]
    fn missing_capabilities_are_named() {
        let held = Capabilities::parse("Name:\ttapline\nCapEff:\t000001fffeffffff\n");
        assert_eq!(privileges(held, ROOT_MAP, MODERN).status, Status::Ok);

        let held = Some(capabilities(&[Capabilities::NET_RAW, Capabilities::BPF]));
        let check = privileges(held, ROOT_MAP, MODERN);
        assert_eq!(check.status, Status::Fail);
        assert_eq!(check.found, "without CAP_NET_ADMIN, CAP_PERFMON");
        assert_eq!(check.mend.as_deref(), Some(SETCAP));

        let old = Some(Version::new(5, 4));
        assert_eq!(privileges(held, None, old).found, "without CAP_NET_ADMIN, CAP_SYS_ADMIN");
        assert_eq!(privileges(None, None, MODERN).status, Status::Unknown);
    }

    #[test]
    fn capabilities_of_a_user_namespace_do_not_count() {
        let all = Some(Capabilities(u64::MAX));
        let check = privileges(all, Some("0 100000 65536"), MODERN);
        assert_eq!(check.status, Status::Fail);
        assert!(check.found.contains("user namespace"), "{}", check.found);
    }

    #[test]
    fn locked_memory_binds_only_without_the_capability() {
        let none = Some(capabilities(&[]));
        let lock = Some(capabilities(&[Capabilities::IPC_LOCK]));
        let limit = Some(8 << 20);
        assert_eq!(locked_memory(lock, MODERN, limit).status, Status::Ok);
        assert_eq!(locked_memory(lock, Some(Version::new(5, 10)), limit).status, Status::Warn);
        assert_eq!(locked_memory(none, MODERN, limit).found, "at most 8192 KiB");
        assert_eq!(locked_memory(none, MODERN, Some(RLIM_INFINITY)).status, Status::Ok);
        assert_eq!(locked_memory(none, MODERN, None).status, Status::Unknown);
    }

    #[test]
    fn a_kernel_without_af_xdp_is_told_from_one_that_forbids_it() {
        let errno = |errno| Err(io::Error::from_raw_os_error(errno));
        assert_eq!(af_xdp(Ok(())).status, Status::Ok);
        assert_eq!(af_xdp(errno(libc::EPERM)).status, Status::Unknown);
        assert_eq!(af_xdp(errno(libc::EAFNOSUPPORT)).found, "this kernel has none");
        assert_eq!(af_xdp(errno(libc::ENOSYS)).status, Status::Fail);
    }

    #[test]
    fn a_feature_is_judged_by_the_kernels_own_names_before_its_version() {
        let mut btf = vec![0; 24];
        btf[4] = 24;
        btf[16] = 8;
        btf.extend([0xff; 8]);
        let names = b"\0tcx_link\0sk_buff\0";
        btf[20] = names.len() as u8;
        btf.extend(names);
        btf.extend(b"tcx_linkage\0");
        let symbols = Symbols::parse(btf).unwrap();
        assert!(symbols.has("tcx_link") && !symbols.has("tcx_linkage") && !symbols.has("tcx"));

        let old = Some(Version::new(5, 14));
        let vendor = Features { kernel: old, symbols: Some(&symbols) };
        assert_eq!(vendor.tcx().status, Status::Ok);
        assert_eq!(vendor.multi_buffer().status, Status::Warn);
        let plain = Features { kernel: old, symbols: None };
        let check = plain.tcx();
        assert_eq!(check.status, Status::Warn);
        assert_eq!(check.found, "missing; Linux has it since 6.6");
        assert_eq!(check.mend.as_deref(), Some("boot Linux 6.6 or newer"));
        assert_eq!(plain.xdp_links().status, Status::Ok);
        let unheard_of = Features { kernel: None, symbols: None };
        assert_eq!(unheard_of.tcx().status, Status::Unknown);
    }

    #[test]
    fn type_information_that_is_cut_off_is_none() {
        assert!(Symbols::parse(Vec::new()).is_none());
        assert!(Symbols::parse(vec![0; 23]).is_none());
        assert!(Symbols::parse(vec![0xff; 40]).is_none());
    }

    #[test]
    fn an_interpreter_is_a_failure() {
        assert_eq!(jit(Some("1\n")).status, Status::Ok);
        assert_eq!(jit(Some("0\n")).status, Status::Fail);
        assert_eq!(jit(Some("2\n")).status, Status::Warn);
        assert_eq!(jit(None).status, Status::Unknown);
    }

    #[test]
    fn huge_pages_are_counted_free() {
        let meminfo =
            "MemTotal: 8 kB\nHugePages_Total:  64\nHugePages_Free:  32\nHugepagesize:  2048 kB\n";
        assert_eq!(huge_pages(Some(meminfo)).found, "32 free of 2 MiB");
        assert_eq!(
            huge_pages(Some("HugePages_Free: 0\nHugepagesize: 2048 kB\n")).status,
            Status::Warn
        );
        assert_eq!(huge_pages(Some("")).status, Status::Unknown);
    }

    #[test]
    fn one_slow_cpu_is_enough_to_warn() {
        let set = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        assert_eq!(governor(&set(&[])).status, Status::Ok);
        assert_eq!(governor(&set(&["performance"])).status, Status::Ok);
        assert_eq!(governor(&set(&["performance", "powersave"])).status, Status::Warn);
    }
}
