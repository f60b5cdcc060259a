//! Any frame: what is read of it stays true when it is cut, tagged or taken out of its Ethernet
//! header, and is what `etherparse` reads wherever that reads as far.

#![no_main]

use capture_ebpf::parse::{
    Buffer, Headers, Ipv6, MAX_EXTENSIONS, Network, Scratch, ethernet, raw_ip,
};
use etherparse::{
    IpNumber, Ipv6ExtensionSlice, LaxIpv4Slice, LaxIpv6Slice, LaxLinkExtSlice, LaxNetSlice,
    LaxSlicedPacket, LinkSlice, TransportSlice, ether_type, ip_number,
};
use libfuzzer_sys::fuzz_target;

const UNKNOWN: Headers = Headers { network: Network::Unknown, protocol: None, ports: None };

/// Both addresses, which no header that is read goes without.
const MACS: usize = 12;
const TPIDS: [[u8; 2]; 3] = [[0x81, 0], [0x88, 0xa8], [0x91, 0]];

fuzz_target!(|frame: &[u8]| {
    let headers = ethernet(frame);

    // Of a front of it nothing else is known, at most less.
    for cut in 0..frame.len() {
        assert_less(&ethernet(&frame[..cut]), &headers);
    }

    let raw = raw_ip(frame);
    for cut in 0..frame.len() {
        assert_less(&raw_ip(&frame[..cut]), &raw);
    }

    if let Some(ethertype) = frame.get(MACS..MACS + 2) {
        let tagged = TPIDS.iter().any(|tpid| tpid == ethertype);
        if tagged && frame.len() >= MACS + 4 {
            let untagged = Untagged([&frame[..MACS], &frame[MACS + 4..]].concat());
            assert_eq!(ethernet(&untagged), headers, "a tag that is kept aside");
        } else if !tagged {
            for tpid in TPIDS {
                let tag = [tpid[0], tpid[1], 0x20, 7];
                let once = [&frame[..MACS], &tag, &frame[MACS..]].concat();
                assert_eq!(ethernet(once.as_slice()), headers, "one tag");
                let twice = [&frame[..MACS], &tag, &once[MACS..]].concat();
                assert_eq!(ethernet(twice.as_slice()), headers, "two tags");
                let thrice = [&frame[..MACS], &tag, &twice[MACS..]].concat();
                assert_eq!(ethernet(thrice.as_slice()), UNKNOWN, "three tags");
            }
            let packet = &frame[MACS + 2..];
            match (ethertype, packet.first().map(|first| first >> 4)) {
                ([0x08, 0x00], Some(4)) | ([0x86, 0xdd], Some(6)) => {
                    assert_eq!(raw_ip(packet), headers, "without its Ethernet header");
                }
                _ => assert_eq!(headers, UNKNOWN),
            }
        }
    }

    if let Ok(theirs) = LaxSlicedPacket::from_ethernet(frame) {
        compare(&headers, &theirs);
    }
});

/// Whatever is known of the one is so in the other.
fn assert_less(less: &Headers, more: &Headers) {
    assert!(less.network == Network::Unknown || less.network == more.network);
    assert!(less.protocol.is_none() || less.protocol == more.protocol);
    assert!(less.ports.is_none() || less.ports == more.ports);
}

/// A frame whose first tag has been taken aside, as the kernel takes it.
struct Untagged(Vec<u8>);

impl Buffer for Untagged {
    fn load<'a, const N: usize>(
        &'a self,
        offset: usize,
        scratch: &'a mut Scratch,
    ) -> Option<&'a [u8; N]> {
        self.0.as_slice().load(offset, scratch)
    }

    fn tag_aside(&self) -> bool {
        true
    }
}

fn compare(ours: &Headers, theirs: &LaxSlicedPacket<'_>) {
    let Some(LinkSlice::Ethernet2(link)) = &theirs.link else { panic!("no Ethernet") };
    let mut ethertype = link.ether_type();
    for tag in &theirs.link_exts {
        // It knows more kinds of tags than we do.
        let LaxLinkExtSlice::Vlan(tag) = tag else { return assert_eq!(*ours, UNKNOWN) };
        ethertype = tag.ether_type();
    }
    if theirs.link_exts.len() > 2 {
        return assert_eq!(*ours, UNKNOWN);
    }
    match &theirs.net {
        // It goes by the version alone, where the Ethertype has a say, too.
        Some(LaxNetSlice::Ipv4(packet)) if ethertype == ether_type::IPV4 => {
            compare_v4(ours, packet, theirs.transport.as_ref());
        }
        Some(LaxNetSlice::Ipv6(packet)) if ethertype == ether_type::IPV6 => {
            compare_v6(ours, packet, theirs);
        }
        Some(_) => assert_eq!(*ours, UNKNOWN),
        // It reads nothing of a header whose options are cut off.
        None => assert!(!matches!(ours.network, Network::V6 { .. }) && ours.ports.is_none()),
    }
}

fn compare_v4(ours: &Headers, packet: &LaxIpv4Slice<'_>, transport: Option<&TransportSlice<'_>>) {
    let header = packet.header();
    let [src, dst] = [header.source(), header.destination()].map(u32::from_be_bytes);
    assert_eq!(ours.network, Network::V4 { src, dst });
    assert_eq!(ours.protocol, Some(header.protocol().0));
    if header.fragments_offset().value() != 0 {
        assert_eq!(ours.ports, None);
    }
    // The authentication header is a protocol to us, and no step towards one.
    if packet.extensions().is_empty() {
        compare_ports(ours, transport);
    }
}

fn compare_v6(ours: &Headers, packet: &LaxIpv6Slice<'_>, theirs: &LaxSlicedPacket<'_>) {
    let header = packet.header();
    let [src, dst] = [header.source(), header.destination()].map(Ipv6::from_octets);
    assert_eq!(ours.network, Network::V6 { src, dst });
    if theirs.stop_err.is_some() {
        // Behind a header that is cut off its list of extensions must not be walked: etherparse
        // 0.21 reads past the end.
        return;
    }
    let (mut count, mut later) = (0, false);
    for extension in packet.extensions().clone() {
        count += 1;
        if let Ipv6ExtensionSlice::Fragment(fragment) = extension {
            later |= fragment.fragment_offset().value() != 0;
        }
    }
    let number = packet.payload().ip_number;
    if count > MAX_EXTENSIONS {
        assert_eq!((ours.protocol, ours.ports), (None, None));
    } else if !is_unread_extension(number) {
        // A chain that goes on behind a later fragment's header is not followed.
        assert!(ours.protocol == Some(number.0) || later && ours.protocol.is_none());
        if later {
            assert_eq!(ours.ports, None);
        } else {
            compare_ports(ours, theirs.transport.as_ref());
        }
    }
}

/// Extension headers at which it ends.
fn is_unread_extension(number: IpNumber) -> bool {
    [ip_number::MOBILITY_HEADER, ip_number::HIP, ip_number::SHIM6].contains(&number)
}

fn compare_ports(ours: &Headers, transport: Option<&TransportSlice<'_>>) {
    let ports = match transport {
        Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
        Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
        _ => return,
    };
    assert_eq!(ours.ports, Some(ports));
}
