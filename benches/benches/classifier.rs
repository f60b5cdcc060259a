//! What parsing and classifying a packet costs on the host, for 0, 1, 8 and 64 jobs. The kernel runs
//! the same code; `kernel` measures it there.

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use capture_ebpf::{abi::MAX_JOBS, classify::classify, parse::Fields};
use capture_user::filter::{HostPorts, Rule, Rules, tables};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tapline_benches::{frame, job};

/// Frames in turn, hits and misses by turns: a predictor must not learn them by heart.
const FRAMES: usize = 1024;

fn classifier(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("classifier");
    group.throughput(Throughput::Elements(FRAMES as u64));
    let families =
        [("ipv4", IpAddr::V4(Ipv4Addr::LOCALHOST)), ("ipv6", IpAddr::V6(Ipv6Addr::LOCALHOST))];
    for (name, family) in families {
        for jobs in [0, 1, 8, 64] {
            let rules: Rules =
                std::array::from_fn(|slot| (slot < jobs).then(|| Rule::new(job(family, slot))));
            let (tables, ports) = (tables(&rules), HostPorts::new(&rules));
            let active = (0..jobs).map(|slot| 1 << slot).sum();
            let frames: Vec<_> = (0..FRAMES)
                .map(|at| {
                    // A step that has no common factor with the number of jobs.
                    let scattered = at * 37 + at * at * 11;
                    frame(family, scattered % jobs.max(1), (scattered / MAX_JOBS).is_multiple_of(2))
                })
                .collect();
            group.bench_function(BenchmarkId::new(name, jobs), |bencher| {
                bencher.iter(|| {
                    frames.iter().fold(0, |jobs, frame| {
                        let fields = Fields::of_ethernet(black_box(frame.as_slice()));
                        jobs ^ classify(&fields, &tables, &ports, black_box(active))
                    })
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, classifier);
criterion_main!(benches);
