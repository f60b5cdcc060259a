//! What the kernel program costs per packet, by `BPF_PROG_TEST_RUN`: for 0, 1, 8 and 64 jobs, hit
//! and miss, beside a program that only passes. Needs root.
//!
//! The kernel runs the program in a loop and gives the time of one run, rounded down to whole
//! nanoseconds; what the loop itself takes is in `pass`, and in every other figure. Each job asks for
//! all five fields. A miss differs from each of them in the field that is looked at last, so it is
//! the dearest there is. A hit finds no socket: what the kernel does with a redirected frame is not
//! in it, but `again` is, which see.
#![expect(clippy::unwrap_used, reason = "a bench fails by panicking, with a line number")]

use std::{
    error::Error,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{MapData, ProgramArray},
    programs::{TestRun as _, TestRunOptions, Xdp},
};
use capture_ebpf::{
    CAPTURE, GENERATOR,
    abi::{
        Outcome,
        generator::{AGAIN, MEASURED, PASS},
    },
};
use capture_user::{filter::Rule, program::Program};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use nix::unistd::Uid;
use tapline_benches::{frame, job};

/// Runs in one call: setting one up takes as long as many thousand, which the kernel leaves out of
/// its time but a person waits for.
const RUNS: u32 = 2_000_000;

/// The time of `iterations` runs.
fn time(program: &Xdp, frame: &[u8], iterations: u64) -> Duration {
    let options =
        TestRunOptions { data_in: Some(frame), repeat: RUNS, ..TestRunOptions::default() };
    let run = program.test_run(options).unwrap().duration;
    Duration::from_nanos(run.as_nanos() as u64 * iterations)
}

/// The programs of the bench itself.
struct Helpers {
    ebpf: Ebpf,
    measured: ProgramArray<MapData>,
}

impl Helpers {
    fn load() -> Result<Self, Box<dyn Error>> {
        let mut ebpf = EbpfLoader::new().load(GENERATOR)?;
        for name in [PASS, AGAIN] {
            let program: &mut Xdp = ebpf.program_mut(name).ok_or(name)?.try_into()?;
            program.load()?;
        }
        let measured = ebpf.take_map(MEASURED).ok_or(MEASURED)?.try_into()?;
        Ok(Self { ebpf, measured })
    }

    fn program(&self, name: &str) -> &Xdp {
        self.ebpf.program(name).unwrap().try_into().unwrap()
    }

    /// A program that runs this one as if on a fresh frame each time.
    fn again(&mut self, program: &Xdp) -> &Xdp {
        self.measured.set(0, program.fd().unwrap(), 0).unwrap();
        self.program(AGAIN)
    }
}

fn kernel(criterion: &mut Criterion) {
    if !Uid::effective().is_root() {
        eprintln!("SKIPPED kernel: needs root");
        return;
    }
    let mut helpers = Helpers::load().unwrap();
    let addresses =
        [("ipv4", IpAddr::V4(Ipv4Addr::LOCALHOST)), ("ipv6", IpAddr::V6(Ipv6Addr::LOCALHOST))];

    // What every figure contains.
    let mut group = criterion.benchmark_group("kernel");
    let any = frame(addresses[0].1, 0, false);
    let mut fixed = Program::load(CAPTURE, None).unwrap();
    group.bench_function("pass", |bencher| {
        bencher.iter_custom(|iterations| time(helpers.program(PASS), &any, iterations));
    });
    let pass = helpers.program(PASS).fd().unwrap().try_clone().unwrap();
    helpers.measured.set(0, &pass, 0).unwrap();
    group.bench_function("pass, again", |bencher| {
        bencher.iter_custom(|iterations| time(helpers.program(AGAIN), &any, iterations));
    });
    group.bench_function("0 jobs", |bencher| {
        let program = fixed.exclusive().unwrap();
        bencher.iter_custom(|iterations| time(program, &any, iterations));
    });

    for (family, address) in addresses {
        for jobs in [1, 8, 64] {
            let mut program = Program::load(CAPTURE, None).unwrap();
            for slot in 0..jobs {
                program.insert(slot, Rule::new(job(address, slot))).unwrap();
                program.activate(slot).unwrap();
            }
            let exclusive = program.exclusive().unwrap();
            let miss = frame(address, jobs / 2, false);
            group.bench_function(BenchmarkId::new(format!("{family}, miss"), jobs), |bencher| {
                bencher.iter_custom(|iterations| time(exclusive, &miss, iterations));
            });
            let hit = frame(address, jobs / 2, true);
            let again = helpers.again(exclusive);
            let id = BenchmarkId::new(format!("{family}, hit, again"), jobs);
            group.bench_function(id, |bencher| {
                bencher.iter_custom(|iterations| time(again, &hit, iterations));
            });
            let counters = program.counters().unwrap();
            let hits: u64 = counters.jobs.iter().map(|job| job.hits).sum();
            assert_eq!(counters.outcomes[Outcome::NoSocket as usize], hits, "each had room");
            assert_eq!(counters.jobs[jobs / 2].hits, hits, "of one job only");
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(10))
        // Counted in the time that the kernel tells, of which there is one run's for each iteration.
        .measurement_time(Duration::from_millis(10));
    targets = kernel
}
criterion_main!(benches);
