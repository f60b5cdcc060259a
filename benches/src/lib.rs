//! The bench harness: the jobs and frames that the classifier is measured with.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use capture_user::filter::{Filter, Prefix, Protocol};

const SPORT: u16 = 1000;
const DPORT: u16 = 2000;

/// The addresses of network `n` on the source's or the destination's side.
fn address(family: IpAddr, side: u8, n: usize) -> IpAddr {
    match family {
        IpAddr::V4(_) => Ipv4Addr::new(10, side, n as u8, 1).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, side.into(), n as u16, 0, 0, 0, 1).into(),
    }
}

/// A job that asks for all five fields, and shares no address and no destination port with another.
pub fn job(family: IpAddr, n: usize) -> Filter {
    let length = if family.is_ipv4() { 24 } else { 64 };
    Filter {
        src: Prefix::new(address(family, 0, n), length),
        dst: Prefix::new(address(family, 1, n), length),
        sport: Some(SPORT),
        dport: Some(DPORT + n as u16),
        protocol: Some(Protocol(17)),
    }
}

/// A UDP frame that job `n` asks for, or all but its source address: the field that is looked at
/// last.
pub fn frame(family: IpAddr, n: usize, hit: bool) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    let src = address(family, if hit { 0 } else { 2 }, n);
    match (src, address(family, 1, n)) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            frame.extend([8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0]);
            frame.extend(src.octets());
            frame.extend(dst.octets());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 26, 17, 64]);
            frame.extend(src.octets());
            frame.extend(dst.octets());
        }
        _ => unreachable!("both are of one family"),
    }
    frame.extend(SPORT.to_be_bytes());
    frame.extend((DPORT + n as u16).to_be_bytes());
    frame.extend([0, 26, 0, 0]);
    frame.resize(frame.len() + 18, 0);
    frame
}
