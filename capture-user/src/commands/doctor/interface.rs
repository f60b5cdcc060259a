//! The checks of one interface: driver, queues, rings, interrupts, offloads.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use super::{Check, Status, Topic, cpus};
use crate::{
    ethtool::{self, Channels, Offloads, Rings},
    nic::{self, Interface, Napi},
    socket::SocketConfig,
};

/// The receive ring that rides out the pauses of a busy CPU, descriptors. In a shorter one a burst
/// is lost before any program sees it; of a much longer one the packets have left the cache by the
/// time they are read.
const RING: u32 = 2048;

/// The checks, in the order in which a packet meets what they look at.
pub(super) fn checks(interface: &Interface) -> Vec<Check> {
    let name = &interface.name;
    let napis = nic::napis(interface.index);
    let mut checks = vec![
        link(interface),
        xdp_program(interface),
        native_xdp(interface),
        zero_copy(interface),
        mtu(interface),
    ];
    checks.extend(promiscuous(interface));
    let mut of_the_device = vec![queues(name, ethtool::channels(name).ok(), cpus())];
    if interface.rx_queues > 1 {
        let table = ethtool::indirection(name).ok();
        of_the_device.push(rss(name, table.as_deref(), interface.rx_queues));
    }
    of_the_device.push(ring(name, ethtool::rings(name).ok()));
    match &interface.bus {
        Some(bus) => of_the_device.push(affinity(&interrupts(bus, &napis), cpus())),
        // What a virtual interface does not tell, it does not have.
        None => of_the_device.retain(|check| check.status != Status::Unknown),
    }
    checks.append(&mut of_the_device);
    checks.extend(offloads(name, ethtool::offloads(name).ok()));
    checks.push(busy_poll(interface, deferral(interface, &napis)));
    checks
}

fn link(interface: &Interface) -> Check {
    let topic = Topic { name: "link", why: "no packet arrives without one" };
    let name = &interface.name;
    if !interface.is_ethernet() {
        let topic = Topic { why: "`exclusive` captures Ethernet frames", ..topic };
        return topic.check(Status::Warn, "not Ethernet", None);
    }
    match (interface.up, interface.carrier) {
        (false, _) => topic.warn("down", format!("sudo ip link set dev {name} up")),
        (true, false) => topic.check(Status::Warn, "no carrier", None),
        (true, true) => topic.ok("up"),
    }
}

fn xdp_program(interface: &Interface) -> Check {
    let topic = Topic {
        name: "XDP program",
        why: "an interface takes one, and Tapline never displaces another's: `exclusive` is \
              refused, `tap` works",
    };
    match &interface.xdp {
        None => topic.ok("none"),
        Some(holder) => topic.warn(
            holder.to_string(),
            format!(
                "end the program it belongs to, or: sudo ip link set dev {} xdp off",
                interface.name
            ),
        ),
    }
}

fn native_xdp(interface: &Interface) -> Check {
    let topic = Topic {
        name: "native XDP",
        why: "in generic mode the kernel builds an skb for every packet first, which costs most of \
              the speed",
    };
    match interface.features {
        None => topic.unknown("Linux tells since 6.3"),
        Some(features) if features.basic && features.redirect => topic.ok("yes, with redirect"),
        Some(features) if features.basic => {
            topic.check(Status::Warn, "yes, but without redirect, which `exclusive` needs", None)
        }
        Some(_) => topic.check(Status::Warn, "no: generic mode", None),
    }
}

fn zero_copy(interface: &Interface) -> Check {
    let topic = Topic {
        name: "zero-copy",
        why: "without it the kernel copies every packet that `exclusive` takes",
    };
    match interface.features {
        None => topic.unknown("Linux tells since 6.3"),
        Some(features) if features.zero_copy => topic.ok("yes"),
        Some(_) => topic.check(Status::Warn, "no", None),
    }
}

fn mtu(interface: &Interface) -> Check {
    /// What the kernel keeps of each UMEM frame, and Ethernet with two VLAN tags.
    const HEADROOM: u32 = 256 + 22;
    let topic = Topic {
        name: "MTU",
        why: "a frame that does not fit one buffer needs a driver and a kernel that can split it",
    };
    let Interface { name, mtu, .. } = interface;
    let frame = SocketConfig::default().frame_size - HEADROOM;
    let Some(features) = interface.features.filter(|features| features.basic) else {
        return topic.ok(mtu.to_string());
    };
    match interface.single_buffer_mtu() {
        Some(limit) if !features.rx_sg && *mtu > limit => topic.warn(
            format!("{mtu}; the driver runs XDP natively up to {limit}"),
            format!("sudo ip link set dev {name} mtu {limit}, or --xdp generic"),
        ),
        _ if features.zero_copy && features.zc_max_segs <= 1 && *mtu > frame => topic.warn(
            format!("{mtu}; a zero-copy UMEM frame holds {frame} and the driver does not split"),
            "--frame-size 4096 or --zero-copy off",
        ),
        _ => topic.ok(mtu.to_string()),
    }
}

/// Of use only to a port that looks like a mirror port.
fn promiscuous(interface: &Interface) -> Option<Check> {
    let topic = Topic {
        name: "promiscuous mode",
        why: "a NIC drops frames that are addressed to others, as all are on a mirror port",
    };
    if !interface.up || !interface.is_ethernet() || interface.exclusive_would_cut().is_some() {
        return None;
    }
    let mend = format!("sudo ip link set dev {} promisc on", interface.name);
    Some(if interface.promiscuous { topic.ok("on") } else { topic.warn("off", mend) })
}

fn queues(name: &str, channels: Option<Channels>, cpus: usize) -> Check {
    let topic = Topic {
        name: "queues",
        why: "each receive queue is one CPU's work: fewer leave CPUs idle, more share one",
    };
    let Some(Channels { rx, rx_max, combined }) = channels else {
        return topic.unknown("the driver does not tell");
    };
    let best = rx_max.min(cpus as u32);
    let found = format!("{rx} of at most {rx_max}, {cpus} CPUs");
    if rx == best || rx_max == 0 {
        return topic.ok(found);
    }
    let kind = if combined { "combined" } else { "rx" };
    topic.warn(found, format!("sudo ethtool -L {name} {kind} {best}"))
}

fn rss(name: &str, indirection: Option<&[u32]>, queues: u32) -> Check {
    let topic = Topic {
        name: "RSS",
        why: "a queue that the NIC's hash never chooses gets no packets, and the others get more",
    };
    let Some(table) = indirection else {
        return topic.unknown("the driver has no indirection table");
    };
    let used = table.iter().collect::<BTreeSet<_>>().len();
    let found = format!("packets go to {used} of {queues} queues");
    if used == queues as usize {
        topic.ok(found)
    } else {
        topic.warn(found, format!("sudo ethtool -X {name} equal {queues}"))
    }
}

fn ring(name: &str, rings: Option<Rings>) -> Check {
    let topic = Topic {
        name: "receive ring",
        why: "a burst that finds it full is lost in the NIC, before any program sees it",
    };
    let Some(Rings { rx, rx_max }) = rings else {
        return topic.unknown("the driver does not tell");
    };
    let found = format!("{rx} of at most {rx_max}");
    let best = rx_max.min(RING);
    if rx >= best {
        topic.ok(found)
    } else {
        topic.warn(found, format!("sudo ethtool -G {name} rx {best}"))
    }
}

/// The receive interrupts of a device and the CPUs that each may go to.
fn interrupts(bus: &str, napis: &[Napi]) -> BTreeMap<u32, String> {
    let mut irqs: BTreeSet<u32> = napis.iter().filter_map(|napi| napi.irq).collect();
    if irqs.is_empty() {
        let device = Path::new("/sys/bus/pci/devices").join(bus).join("msi_irqs");
        let entries = fs::read_dir(device).into_iter().flatten().flatten();
        irqs = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        let names = fs::read_to_string("/proc/interrupts").unwrap_or_default();
        let receiving = receive_interrupts(&names);
        irqs.retain(|irq| receiving.contains(irq));
    }
    let cpus = |irq: u32| {
        let file = |name| fs::read_to_string(format!("/proc/irq/{irq}/{name}")).ok();
        let list = file("effective_affinity_list").filter(|list| !list.trim().is_empty());
        list.or_else(|| file("smp_affinity_list")).map(|list| (irq, list.trim().to_owned()))
    };
    irqs.into_iter().filter_map(cpus).collect()
}

/// The interrupts in `/proc/interrupts` that by their names are of receive queues.
fn receive_interrupts(table: &str) -> BTreeSet<u32> {
    let irq = |line: &str| {
        let (number, rest) = line.split_once(':')?;
        let action = rest.split_whitespace().last()?.to_ascii_lowercase();
        // `eth0-TxRx-0`, `virtio2-input.0`, `mlx5_comp0@pci:0000:03:00.0`
        let receives = ["rx", "input", "comp"].iter().any(|part| action.contains(part));
        receives.then(|| number.trim().parse().ok())?
    };
    table.lines().filter_map(irq).collect()
}

fn affinity(interrupts: &BTreeMap<u32, String>, cpus: usize) -> Check {
    let topic = Topic {
        name: "IRQ affinity",
        why: "queues whose interrupts go to one CPU share it; irqbalance may also move them during \
              a capture",
    };
    if interrupts.is_empty() {
        return topic.unknown("no interrupts of its queues found");
    }
    let used = interrupts.values().collect::<BTreeSet<_>>().len();
    let list: Vec<_> =
        interrupts.iter().map(|(irq, cpus)| format!("{irq} on CPU {cpus}")).collect();
    if used >= interrupts.len().min(cpus) {
        return topic.ok(list.join(", "));
    }
    let spread = interrupts.keys().enumerate().map(|(at, irq)| {
        format!("echo {} | sudo tee /proc/irq/{irq}/smp_affinity_list", at % cpus)
    });
    let stop = "sudo systemctl stop irqbalance".to_owned();
    let mend = std::iter::once(stop).chain(spread).collect::<Vec<_>>().join("; ");
    topic.warn(list.join(", "), mend)
}

fn offloads(name: &str, offloads: Option<Offloads>) -> Vec<Check> {
    let gro = Topic {
        name: "GRO",
        why: "`tap` runs after the stack has merged the packets of a flow, so a file has fewer and \
              longer ones than the wire; turning it off costs the host throughput",
    };
    let lro = Topic {
        name: "LRO",
        why: "the NIC merges packets, so a file has others than the wire; many drivers refuse \
              native XDP with it",
    };
    let vlan = Topic {
        name: "VLAN offload",
        why: "the NIC takes VLAN tags out before XDP runs, so that a file lacks them",
    };
    let checksum = Topic {
        name: "checksum offload",
        why: "`tap` sees packets of this host before the NIC has filled in their checksums; readers \
              call those wrong",
    };
    let Some(offloads) = offloads else {
        return [gro, lro, vlan].map(|topic| topic.unknown("the driver does not tell")).into();
    };
    let off = |topic: Topic, on: bool, feature: &str| {
        if on {
            topic.warn("on", format!("sudo ethtool -K {name} {feature} off"))
        } else {
            topic.ok("off")
        }
    };
    vec![
        off(gro, offloads.gro, "gro"),
        off(lro, offloads.lro, "lro"),
        off(vlan, offloads.rx_vlan, "rxvlan"),
        // Worth what it costs a reader, so no reason to turn it off.
        checksum.ok(if offloads.tx_checksum {
            "on: captured packets that this host sends have unfinished checksums"
        } else {
            "off"
        }),
    ]
}

/// `napi_defer_hard_irqs` and `gro_flush_timeout` (ns) of an interface.
fn deferral(interface: &Interface, napis: &[Napi]) -> Option<(u64, u64)> {
    let told = napis.iter().find_map(|napi| napi.defer_hard_irqs.zip(napi.gro_flush_timeout));
    told.or_else(|| {
        let directory = sysfs(interface)?;
        let value = |name| fs::read_to_string(directory.join(name)).ok()?.trim().parse().ok();
        value("napi_defer_hard_irqs").zip(value("gro_flush_timeout"))
    })
}

/// The directory of this interface in `/sys`, unless that shows another network namespace, where
/// the name is another interface's.
fn sysfs(interface: &Interface) -> Option<PathBuf> {
    let directory = Path::new("/sys/class/net").join(&interface.name);
    let value = |name| fs::read_to_string(directory.join(name)).ok();
    let index = value("ifindex")?.trim().parse() == Ok(interface.index);
    let mac = value("address")?.trim().to_owned();
    let same = interface.mac.is_none_or(|ours| nic::mac_text(ours) == mac);
    (index && same).then_some(directory)
}

fn busy_poll(interface: &Interface, deferral: Option<(u64, u64)>) -> Check {
    let topic = Topic {
        name: "busy polling",
        why: "--busy-poll has the worker drive the NIC, for which interrupts must wait: without \
              that, one CPU that does both can spend itself on interrupts",
    };
    let Some((defer, timeout)) = deferral else {
        return topic.unknown("napi_defer_hard_irqs and gro_flush_timeout cannot be read");
    };
    let found = format!("napi_defer_hard_irqs {defer}, gro_flush_timeout {timeout} ns");
    let pays = interface.features.is_some_and(|features| features.zero_copy);
    if (defer > 0 && timeout > 0) || !pays {
        return topic.ok(found);
    }
    let name = &interface.name;
    topic.warn(
        found,
        format!(
            "echo 2 | sudo tee /sys/class/net/{name}/napi_defer_hard_irqs; \
             echo 200000 | sudo tee /sys/class/net/{name}/gro_flush_timeout"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nic::{LinkType, XdpFeatures, XdpHolder, XdpHook};

    fn interface() -> Interface {
        Interface {
            name: "eth0".into(),
            index: 2,
            mtu: 1500,
            up: true,
            carrier: true,
            promiscuous: false,
            mac: Some([2, 0, 0, 0, 0, 1]),
            link_type: LinkType::Ethernet,
            addresses: Vec::new(),
            default_route: false,
            master: None,
            uppers: Vec::new(),
            rx_queues: 4,
            driver: Some("ixgbe".into()),
            bus: Some("0000:03:00.0".into()),
            speed: None,
            xdp: None,
            features: Some(XdpFeatures { basic: true, redirect: true, ..XdpFeatures::default() }),
        }
    }

    fn mend(check: &Check) -> &str {
        check.mend.as_deref().unwrap_or_default()
    }

    #[test]
    fn a_link_must_be_up_and_ethernet() {
        assert_eq!(link(&interface()).status, Status::Ok);
        let down = Interface { up: false, carrier: false, ..interface() };
        assert_eq!(mend(&link(&down)), "sudo ip link set dev eth0 up");
        let unplugged = Interface { carrier: false, ..interface() };
        assert_eq!(link(&unplugged).found, "no carrier");
        let tunnel = Interface { link_type: LinkType::RawIp, ..interface() };
        assert_eq!(link(&tunnel).found, "not Ethernet");
    }

    #[test]
    fn another_program_is_named() {
        let program_name = Some("filter".into());
        let holder = XdpHolder { mode: XdpHook::Native, program_id: 12, program_name };
        let check = xdp_program(&Interface { xdp: Some(holder), ..interface() });
        assert_eq!((check.status, check.found.as_str()), (Status::Warn, "filter (id 12, native)"));
    }

    #[test]
    fn what_an_old_kernel_cannot_say_is_unknown() {
        let old = Interface { features: None, ..interface() };
        assert_eq!(native_xdp(&old).status, Status::Unknown);
        assert_eq!(zero_copy(&old).status, Status::Unknown);
        assert_eq!(mtu(&old).status, Status::Ok);
        assert_eq!(native_xdp(&interface()).status, Status::Ok);
        assert_eq!(zero_copy(&interface()).status, Status::Warn);
    }

    #[test]
    fn an_mtu_that_takes_more_than_a_buffer_needs_a_driver_that_splits() {
        let jumbo = Interface { mtu: 9000, ..interface() };
        let check = mtu(&jumbo);
        assert_eq!(check.found, "9000; the driver runs XDP natively up to 3050");
        assert_eq!(mend(&check), "sudo ip link set dev eth0 mtu 3050, or --xdp generic");

        let features = XdpFeatures { basic: true, rx_sg: true, ..XdpFeatures::default() };
        let splits = Interface { features: Some(features), ..jumbo };
        assert_eq!(mtu(&splits).status, Status::Ok);
        let features = XdpFeatures { zero_copy: true, zc_max_segs: 1, ..features };
        let but_not_in_zero_copy = Interface { features: Some(features), ..splits };
        assert_eq!(mend(&mtu(&but_not_in_zero_copy)), "--frame-size 4096 or --zero-copy off");
        let small = Interface { mtu: 1770, ..but_not_in_zero_copy };
        assert_eq!(mtu(&small).status, Status::Ok);
    }

    #[test]
    fn only_what_looks_like_a_mirror_port_need_be_promiscuous() {
        assert_eq!(promiscuous(&interface()).unwrap().status, Status::Warn);
        let on = Interface { promiscuous: true, ..interface() };
        assert_eq!(promiscuous(&on).unwrap().status, Status::Ok);
        assert_eq!(promiscuous(&Interface { default_route: true, ..interface() }), None);
    }

    #[test]
    fn there_are_as_many_queues_as_cpus_or_as_the_driver_has() {
        let channels = |rx, rx_max, combined| Some(Channels { rx, rx_max, combined });
        let check = |channels, cpus| queues("eth0", channels, cpus);
        assert_eq!(check(channels(8, 64, true), 8).status, Status::Ok);
        assert_eq!(check(channels(4, 4, true), 8).status, Status::Ok);
        let few = check(channels(1, 64, true), 8);
        assert_eq!(few.found, "1 of at most 64, 8 CPUs");
        assert_eq!(mend(&few), "sudo ethtool -L eth0 combined 8");
        assert_eq!(mend(&check(channels(16, 16, false), 8)), "sudo ethtool -L eth0 rx 8");
        assert_eq!(check(None, 8).status, Status::Unknown);
    }

    #[test]
    fn rss_must_choose_every_queue() {
        assert_eq!(rss("eth0", Some(&[0, 1, 0, 1]), 2).status, Status::Ok);
        let check = rss("eth0", Some(&[0, 1, 0, 1]), 4);
        assert_eq!(check.found, "packets go to 2 of 4 queues");
        assert_eq!(mend(&check), "sudo ethtool -X eth0 equal 4");
        assert_eq!(rss("eth0", None, 4).status, Status::Unknown);
    }

    #[test]
    fn a_ring_is_long_enough_or_as_long_as_it_can_be() {
        let check = |rx, rx_max| ring("eth0", Some(Rings { rx, rx_max }));
        assert_eq!(check(256, 256).status, Status::Ok);
        assert_eq!(check(2048, 8192).status, Status::Ok);
        assert_eq!(mend(&check(512, 8192)), "sudo ethtool -G eth0 rx 2048");
        assert_eq!(mend(&check(512, 1024)), "sudo ethtool -G eth0 rx 1024");
    }

    #[test]
    fn receive_interrupts_are_told_by_their_names() {
        let table = "           CPU0       CPU1
  24:       1          0  IO-APIC   5-edge      ACPI:Ged
  37:       0          0  PCI-MSIX-0000:00:03.0   0-edge      virtio2-config
  38:       0       7652  PCI-MSIX-0000:00:03.0   1-edge      virtio2-input.0
  39:    6993          0  PCI-MSIX-0000:00:03.0   2-edge      virtio2-output.0
  51:       0          0  PCI-MSIX-0000:03:00.0   0-edge      eth1-TxRx-0
  52:       0          0  PCI-MSIX-0000:04:00.0   1-edge      mlx5_comp0@pci:0000:04:00.0
 NMI:       0          0  Non-maskable interrupts
";
        assert_eq!(receive_interrupts(table), BTreeSet::from([38, 51, 52]));
    }

    #[test]
    fn interrupts_are_spread_over_the_cpus() {
        let on = |list: &[(u32, &str)]| {
            list.iter().map(|(irq, cpus)| (*irq, (*cpus).to_owned())).collect::<BTreeMap<_, _>>()
        };
        assert_eq!(affinity(&on(&[(40, "0"), (41, "1"), (42, "0")]), 2).status, Status::Ok);
        assert_eq!(affinity(&on(&[]), 2).status, Status::Unknown);
        let check = affinity(&on(&[(40, "0"), (41, "0")]), 2);
        assert_eq!(check.found, "40 on CPU 0, 41 on CPU 0");
        assert_eq!(
            mend(&check),
            "sudo systemctl stop irqbalance; echo 0 | sudo tee /proc/irq/40/smp_affinity_list; \
             echo 1 | sudo tee /proc/irq/41/smp_affinity_list"
        );
    }

    #[test]
    fn offloads_that_change_what_a_capture_sees_are_named() {
        let all = Offloads { gro: true, lro: true, rx_vlan: true, tx_checksum: true };
        let checks = offloads("eth0", Some(all));
        let mends: Vec<_> = checks.iter().map(mend).collect();
        assert_eq!(
            mends,
            [
                "sudo ethtool -K eth0 gro off",
                "sudo ethtool -K eth0 lro off",
                "sudo ethtool -K eth0 rxvlan off",
                ""
            ]
        );
        assert_eq!(checks[3].status, Status::Ok);
        let none = Offloads { gro: false, lro: false, rx_vlan: false, tx_checksum: false };
        assert!(offloads("eth0", Some(none)).iter().all(|check| check.status == Status::Ok));
    }

    #[test]
    fn busy_polling_wants_interrupts_deferred_where_it_pays() {
        let mut eth0 = interface();
        assert_eq!(busy_poll(&eth0, Some((0, 0))).status, Status::Ok);
        assert_eq!(busy_poll(&eth0, None).status, Status::Unknown);
        eth0.features = Some(XdpFeatures { zero_copy: true, ..XdpFeatures::default() });
        assert_eq!(busy_poll(&eth0, Some((0, 0))).status, Status::Warn);
        assert_eq!(busy_poll(&eth0, Some((2, 200_000))).status, Status::Ok);
    }

    #[test]
    fn sysfs_of_another_namespace_is_not_read() {
        let lo = nic::find("lo").unwrap();
        assert_eq!(sysfs(&Interface { index: lo.index + 1, ..lo.clone() }), None);
        assert_eq!(sysfs(&Interface { mac: Some([2, 0, 0, 0, 0, 9]), ..lo }), None);
    }
}
