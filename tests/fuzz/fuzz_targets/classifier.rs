//! Any jobs and packets: the tables give each packet to just those jobs whose filters, asked one by
//! one, accept it, and that keep its draw.

#![no_main]

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
};

use arbitrary::Arbitrary;
use capture_ebpf::{
    abi::MAX_JOBS,
    classify::{Ports, classify, sample},
    parse::{Headers, Ipv6, Network},
};
use capture_user::filter::{Filter, Prefix, Protocol, Rule, Rules, tables};
use ipnet::IpNet;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Case {
    jobs: Vec<Job>,
    active: u64,
    packets: Vec<Packet>,
}

#[derive(Arbitrary, Debug)]
struct Job {
    slot: u8,
    src: Option<Net>,
    dst: Option<Net>,
    sport: Option<u16>,
    dport: Option<u16>,
    protocol: Option<u8>,
    sample: u32,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Net {
    V4(u32, u8),
    V6(u128, u8),
}

#[derive(Arbitrary, Debug)]
struct Packet {
    src: Option<Address>,
    dst: Option<Address>,
    protocol: Option<u8>,
    ports: Option<(u16, u16)>,
    draw: u32,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    V4(u32),
    V6(u128),
    /// Next to an end of what a job asks for: where one range gives way to another.
    Edge {
        job: u8,
        of_dst: bool,
        last: bool,
        by: i8,
    },
}

fuzz_target!(|case: Case| {
    let mut rules: Rules = [None; MAX_JOBS];
    for job in &case.jobs {
        rules[usize::from(job.slot) % MAX_JOBS] = Some(job.rule());
    }
    let ports = SparsePorts::new(&rules);
    let tables = tables(&rules);
    for packet in &case.packets {
        let (src, dst) = (case.address(packet.src), case.address(packet.dst));
        let network = network(src, dst);
        let headers = Headers { network, protocol: packet.protocol, ports: packet.ports };
        let known = network != Network::Unknown;
        let accepts = |rule: &Rule| {
            let Rule { filter, .. } = rule;
            accepts(filter.src, src.filter(|_| known))
                && accepts(filter.dst, dst.filter(|_| known))
                && filter.sport.is_none_or(|want| packet.ports.is_some_and(|(is, _)| is == want))
                && filter.dport.is_none_or(|want| packet.ports.is_some_and(|(_, is)| is == want))
                && filter.protocol.is_none_or(|Protocol(want)| packet.protocol == Some(want))
        };
        let active = (0..MAX_JOBS).filter(|slot| case.active >> slot & 1 != 0);
        let active = active.filter(|slot| rules[*slot].is_some());
        let active: u64 = active.map(|slot| 1 << slot).sum();
        let set = |wants: &dyn Fn(&Rule) -> bool| -> u64 {
            let slots = (0..MAX_JOBS).filter(|slot| active >> slot & 1 != 0);
            slots.filter(|slot| rules[*slot].as_ref().is_some_and(wants)).map(|at| 1 << at).sum()
        };

        let jobs = classify(&headers.into(), &tables, &ports, active);
        assert_eq!(jobs, set(&accepts), "{headers:?}");
        let kept = sample(&tables, jobs, || packet.draw);
        assert_eq!(kept, set(&|rule| accepts(rule) && keeps(rule, packet.draw)));
    }
});

/// Whether a draw is among the lowest 1 in N.
fn keeps(rule: &Rule, draw: u32) -> bool {
    f64::from(draw) < (2_f64.powi(32) / f64::from(rule.sample.get())).round()
}

fn accepts(prefix: Option<Prefix>, address: Option<IpAddr>) -> bool {
    let Some(prefix) = prefix else { return true };
    let net = IpNet::new(prefix.address(), prefix.length()).expect("a length of its family");
    address.is_some_and(|address| net.contains(&address))
}

fn network(src: Option<IpAddr>, dst: Option<IpAddr>) -> Network {
    let octets = |address: Ipv6Addr| Ipv6::from_octets(address.octets());
    match (src, dst) {
        (Some(IpAddr::V4(src)), Some(IpAddr::V4(dst))) => {
            Network::V4 { src: src.to_bits(), dst: dst.to_bits() }
        }
        (Some(IpAddr::V6(src)), Some(IpAddr::V6(dst))) => {
            Network::V6 { src: octets(src), dst: octets(dst) }
        }
        _ => Network::Unknown,
    }
}

impl Case {
    fn address(&self, address: Option<Address>) -> Option<IpAddr> {
        match address? {
            Address::V4(bits) => Some(Ipv4Addr::from_bits(bits).into()),
            Address::V6(bits) => Some(Ipv6Addr::from_bits(bits).into()),
            Address::Edge { job, of_dst, last, by } => {
                let job = &self.jobs[usize::from(job).checked_rem(self.jobs.len())?];
                let prefix = (if of_dst { job.dst } else { job.src })?.prefix();
                let net = IpNet::new(prefix.address(), prefix.length()).expect("a net");
                Some(match if last { net.broadcast() } else { net.network() } {
                    IpAddr::V4(end) => {
                        Ipv4Addr::from_bits(end.to_bits().wrapping_add_signed(by.into())).into()
                    }
                    IpAddr::V6(end) => {
                        Ipv6Addr::from_bits(end.to_bits().wrapping_add_signed(by.into())).into()
                    }
                })
            }
        }
    }
}

impl Net {
    fn prefix(self) -> Prefix {
        let (address, length) = match self {
            Self::V4(bits, length) => (Ipv4Addr::from_bits(bits).into(), length % 33),
            Self::V6(bits, length) => (Ipv6Addr::from_bits(bits).into(), length % 129),
        };
        Prefix::new(address, length).expect("a length of its family")
    }
}

impl Job {
    fn rule(&self) -> Rule {
        let filter = Filter {
            src: self.src.map(Net::prefix),
            dst: self.dst.map(Net::prefix),
            sport: self.sport,
            dport: self.dport,
            protocol: self.protocol.map(Protocol),
        };
        Rule {
            sample: NonZeroU32::new(self.sample).unwrap_or(NonZeroU32::MIN),
            ..Rule::new(filter)
        }
    }
}

/// The port tables, without the half megabyte each that nobody asks for.
struct SparsePorts {
    sports: HashMap<u16, u64>,
    dports: HashMap<u16, u64>,
}

impl SparsePorts {
    fn new(rules: &Rules) -> Self {
        let mut ports = Self { sports: HashMap::new(), dports: HashMap::new() };
        for (slot, rule) in rules.iter().enumerate() {
            let Some(Rule { filter, .. }) = rule else { continue };
            if let Some(port) = filter.sport {
                *ports.sports.entry(port).or_default() |= 1 << slot;
            }
            if let Some(port) = filter.dport {
                *ports.dports.entry(port).or_default() |= 1 << slot;
            }
        }
        ports
    }
}

impl Ports for SparsePorts {
    fn sport(&self, port: u16) -> u64 {
        self.sports.get(&port).copied().unwrap_or(0)
    }

    fn dport(&self, port: u16) -> u64 {
        self.dports.get(&port).copied().unwrap_or(0)
    }
}
