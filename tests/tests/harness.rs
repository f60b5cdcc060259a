//! The harness itself: what the other tests rely on.

use std::{net::Ipv4Addr, panic, path::PathBuf, time::Duration};

use pcap::Capture;
use tapline_tests::{
    frames::Frame,
    generator::{Generator, Template},
    inject::Injector,
    netns::Namespace,
    privileged,
    process::wait_until,
    veth::{Options, Veth},
};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn namespaces_and_interfaces_go_away_when_a_test_panics() {
    privileged!();
    let mut paths: Vec<PathBuf> = Vec::new();
    let result = panic::catch_unwind(panic::AssertUnwindSafe(|| {
        let (left, right) = (Namespace::new(), Namespace::new());
        paths.extend([left.path(), right.path()]);
        let _veth = Veth::new(&left, &right);
        panic::resume_unwind(Box::new("as a failed assertion would"));
    }));
    assert!(result.is_err());
    assert_eq!(paths.len(), 2);
    assert!(!paths.iter().any(|path| path.exists()), "{paths:?}");
}

#[test]
fn the_generator_sends_exactly_what_it_is_asked_to() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options { queues: 2, ..Options::default() });
    let template = Template { flows: 4, ..Template::default() };
    let generator = Generator::new(&veth.left, template.clone());
    for (count, total) in [(1, 1), (63, 64), (1000, 1064)] {
        generator.send(count);
        assert_eq!(generator.sent(), total);
        wait_until("frames at the other end", SECOND, || veth.right.counter("rx_packets") == total);
    }
    assert_eq!(veth.right.counter("rx_bytes"), 1064 * template.length as u64);
    assert_eq!(generator.send_paced(10_000, SECOND / 10), 1000);
    assert!(generator.flood(SECOND / 10) > 0);
}

#[test]
fn the_generator_sends_from_the_cpu_it_is_pinned_to() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options { queues: 2, ..Options::default() });
    for cpu in 0..2_usize {
        let generator = Generator::new(&veth.left, Template::default()).pinned(cpu);
        generator.send(640);
        wait_until("frames at the other end", SECOND, || {
            veth.right.statistics()[&format!("rx_queue_{cpu}_xdp_packets")] == 640
        });
    }
}

#[test]
fn stamped_frames_arrive_as_expected() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let mut capture = right.enter(|| {
        let device = Capture::from_device(veth.right.name.as_str()).unwrap();
        device.immediate_mode(true).timeout(1000).open().unwrap()
    });
    let template = Template { length: 100, flows: 3, source: 700, ..Template::default() };
    Generator::new(&veth.left, template.clone()).pinned(1).send(10);
    for sequence in 0..10 {
        let packet = capture.next_packet().unwrap();
        let stamp = template.stamp(packet.data);
        assert_eq!((stamp.sequence, stamp.source), (sequence, 701));
        assert_eq!(u64::from(template.flow(packet.data)), 1000 + sequence % 3);
        assert_eq!(packet.data, template.expected(stamp));
    }
}

#[test]
fn jumbo_frames_arrive_whole() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::with(&left, &right, Options { mtu: 9000, ..Options::default() });
    let mut capture = right.enter(|| {
        let device = Capture::from_device(veth.right.name.as_str()).unwrap();
        device.immediate_mode(true).timeout(1000).open().unwrap()
    });
    let frame = Frame::new()
        .ipv4(Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2))
        .udp(1, 2)
        .fill(9014)
        .build();
    Injector::new(&veth.left).send(&frame);
    assert_eq!(capture.next_packet().unwrap().data, frame);
}
