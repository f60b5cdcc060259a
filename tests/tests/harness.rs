//! The harness itself: what the other tests rely on.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::Ipv4Addr,
    panic,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use pcap::Capture;
use tapline_tests::{
    frames::Frame,
    generator::{Generator, Template},
    inject::Injector,
    needs,
    netns::Namespace,
    privileged,
    process::wait_until,
    proxy::{Act, Proxy},
    store::{ACCESS_KEY, Moto, S3Fs, SECRET_KEY},
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
fn frames_of_a_mix_of_lengths_arrive_as_expected() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let mut capture = right.enter(|| {
        let device = Capture::from_device(veth.right.name.as_str()).unwrap();
        // The buffer has room for as many packets as this goes into it.
        device.immediate_mode(true).snaplen(2048).timeout(1000).open().unwrap()
    });
    let lengths = vec![60, 1514, 590, 60];
    let template = Template { length: 1514, lengths: lengths.clone(), ..Template::default() };
    // More than there are pages in a batch, so that each page has had other lengths.
    Generator::new(&veth.left, template.clone()).pinned(0).send(200);
    for sequence in 0..200 {
        let packet = capture.next_packet().unwrap();
        let stamp = template.stamp(packet.data);
        assert_eq!(stamp.sequence, sequence);
        assert_eq!(packet.data.len(), lengths[sequence as usize % lengths.len()]);
        assert_eq!(packet.data, template.expected(stamp));
    }
}

#[test]
fn a_closed_loop_sends_no_more_than_its_window_ahead() {
    privileged!();
    let (left, right) = (Namespace::new(), Namespace::new());
    let veth = Veth::new(&left, &right);
    let generator = Generator::new(&veth.left, Template::default());
    assert_eq!(generator.send_closed(300, SECOND / 10, || 0), 300);
    let mut taken = 0;
    let sent = generator.send_closed(100, SECOND, || {
        taken = 1000.min(taken + 7);
        taken
    });
    // Less than a quarter of a window is not worth a call.
    assert!((1100 - 24..=1100).contains(&sent), "{sent}");
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

/// Puts 300,000 bytes where each line says, and says the status, or 0 if there was no answer.
const PUT: &str = r#"
import sys, boto3
from botocore.config import Config
from botocore.exceptions import ClientError
for line in sys.stdin:
    port, bucket, name, key, secret = line.split()
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
        aws_access_key_id=key, aws_secret_access_key=secret,
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}))
    try:
        answer = client.put_object(Bucket=bucket, Key=name, Body=b"7" * 300_000)
        print(answer["ResponseMetadata"]["HTTPStatusCode"], flush=True)
    except ClientError as error:
        print(error.response["ResponseMetadata"]["HTTPStatusCode"], flush=True)
    except Exception:
        print(0, flush=True)
"#;

#[test]
fn stores_keep_what_arrives_and_the_proxy_decides_what_does() {
    needs!(|| S3Fs::available().and_then(|()| Moto::available()));
    let namespace = Namespace::new();
    let mut store = S3Fs::start(&namespace, 9000, &["bucket"]);
    let proxy = Proxy::start(&namespace, 9001, 9000);
    let moto = Moto::start(&namespace, 9002, &["one"]);
    let mut client = namespace.command(Moto::python().unwrap(), ["-c", PUT]);
    let mut client = client.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = client.stdin.take().unwrap();
    let mut answers = BufReader::new(client.stdout.take().unwrap()).lines();
    let mut put_at = |place: &str, secret: &str| -> u16 {
        writeln!(lines, "{place} {ACCESS_KEY} {secret}").unwrap();
        answers.next().unwrap().unwrap().parse().unwrap()
    };
    let mut put = |name: &str| put_at(&format!("9001 bucket {name}"), SECRET_KEY);

    assert_eq!(put("a/passed"), 200);
    proxy.rule(|_| Act::Slow(1_000_000));
    let start = Instant::now();
    assert_eq!(put("slow"), 200);
    assert!(start.elapsed() > Duration::from_millis(200), "300 kB at 1 MB/s");
    proxy.rule(|_| Act::Reset(100_000));
    assert_eq!(put("reset"), 0);
    proxy.rule(|_| Act::refuse(503));
    assert_eq!(put("refused"), 503);
    proxy.rule(|_| Act::Lose);
    assert_eq!(put("lost"), 0);
    proxy.rule(|_| Act::Pass);
    store.restart_ahead("+1h");
    assert_eq!(put("skewed"), 403);
    store.kill();
    assert_eq!(put("down"), 0);
    store.restart();
    assert_eq!(put("up"), 200);
    assert_eq!(put_at("9001 bucket wrong", "another"), 403);
    assert_eq!(put_at("9002 one b/c", "any"), 200);
    assert_eq!(put_at("9002 none b/c", "any"), 404);
    drop(lines);
    assert!(client.wait().unwrap().success());

    let body = vec![b'7'; 300_000];
    let objects = store.objects("bucket");
    assert_eq!(objects.keys().collect::<Vec<_>>(), ["a/passed", "lost", "slow", "up"]);
    assert!(objects.values().all(|stored| *stored == body));
    assert_eq!(moto.objects("one"), [("b/c".to_owned(), body)].into());
    let seen = proxy.seen();
    let statuses: Vec<_> = seen.iter().map(|seen| seen.status).collect();
    let (fine, gone) = (Some(200), None);
    let expected = [fine, fine, gone, Some(503), gone, Some(403), gone, fine, Some(403)];
    assert_eq!(statuses, expected);
    assert!(seen.iter().all(|seen| seen.request.is_upload() && !seen.request.is_part()));
    assert_eq!(seen[2].passed, 100_000);
}
