//! Workers and a kernel that are made up: what is kept of a load, by the packets' own times.

use super::*;

const SECOND: u64 = 1_000_000_000;

/// What is seen of a job: time and weight of each packet that was kept.
struct Kept(Vec<(u64, f64)>);

impl Kept {
    fn between(&self, from: u64, to: u64) -> impl Iterator<Item = f64> {
        self.0.iter().filter(move |(time, _)| (from..to).contains(time)).map(|(_, weight)| *weight)
    }

    fn packets(&self, from: u64, to: u64) -> f64 {
        self.between(from, to).map(|_| 1.0).sum()
    }

    fn estimate(&self, from: u64, to: u64) -> f64 {
        self.between(from, to).sum()
    }
}

/// How packets come.
#[derive(Clone, Copy, Debug)]
enum Arrival {
    Regular,
    /// As those of many independent senders.
    Random,
}

/// A job on some workers, to which packets come by turns, more to the first than to the others.
struct World {
    pacer: Arc<Pacer>,
    generations: Arc<Generations>,
    thinners: Vec<Thinner>,
    generation: u64,
    k: NonZeroU32,
    rng: fastrand::Rng,
    now_ns: u64,
    followed_ns: u64,
    kept: Kept,
    handed_over: f64,
}

impl World {
    fn new(budget: u32, workers: usize, seed: u64) -> Self {
        let pacer = Arc::new(Pacer::new(NonZeroU32::new(budget).unwrap(), workers));
        let generations = Arc::new(Generations::new(NonZeroU32::MIN));
        let thinners = (0..workers).map(|worker| {
            let mut thinner = Thinner::new(Arc::clone(&pacer), worker, Arc::clone(&generations));
            thinner.lots = fastrand::Rng::with_seed(seed + worker as u64);
            thinner
        });
        Self {
            thinners: thinners.collect(),
            pacer,
            generations,
            generation: 0,
            k: NonZeroU32::MIN,
            rng: fastrand::Rng::with_seed(!seed),
            now_ns: 1000 * SECOND,
            followed_ns: 1000 * SECOND,
            kept: Kept(Vec::new()),
            handed_over: 0.0,
        }
    }

    /// So many packets a second for so long; gives when it began and ended, and how many there were.
    fn load(&mut self, rate: u32, seconds: u32, arrival: Arrival) -> (u64, u64, f64) {
        let (from, to) = (self.now_ns, self.now_ns + u64::from(seconds) * SECOND);
        let mean = 1e9 / f64::from(rate);
        let (mut at, mut sent) = (0.0, 0.0);
        loop {
            at += match arrival {
                Arrival::Regular => mean,
                Arrival::Random => -mean * (1.0 - self.rng.f64()).ln(),
            };
            self.now_ns = from + Duration::from_secs_f64(at / 1e9).as_nanos() as u64;
            if self.now_ns >= to {
                self.now_ns = to;
                return (from, to, sent);
            }
            sent += 1.0;
            self.follow();
            self.packet();
        }
    }

    /// The kernel is told with the delay that it has.
    fn follow(&mut self) {
        if self.now_ns - self.followed_ns < FOLLOW.as_nanos() as u64 {
            return;
        }
        self.followed_ns = self.now_ns;
        let next = self.pacer.follow(self.k, self.now_ns);
        if next != self.k {
            self.k = next;
            self.generation += 1;
            self.generations.note(self.generation, next);
        }
    }

    fn packet(&mut self) {
        if self.rng.u32(..self.k.get()) != 0 {
            return;
        }
        self.handed_over += 1.0;
        let worker = self.rng.usize(..self.thinners.len() * 2).saturating_sub(self.thinners.len());
        let generation = self.generation as u8;
        let header = Header { time_ns: self.now_ns, generation, ..Header::default() };
        if let Some(weight) = self.thinners[worker].draw(&header) {
            self.kept.0.push((self.now_ns, weight.value()));
        }
    }
}

fn near(value: f64, want: f64, part: f64) -> bool {
    (value / want - 1.0).abs() <= part
}

#[test]
fn the_budget_is_held_within_a_tenth_while_the_load_swings_by_a_hundred_times() {
    for (budget, workers) in [(1000, 1), (1000, 4), (100, 2), (5000, 8)] {
        for arrival in [Arrival::Regular, Arrival::Random] {
            for seed in 0..3 {
                let mut world = World::new(budget, workers, seed);
                let what =
                    format!("{budget} a second, {workers} workers, {arrival:?}, seed {seed}");
                // Five times as long, as all times are then.
                let length = if budget < 500 { 30 } else { 6 };
                for load in [3, 300, 3, 30, 300, 20, 2] {
                    let (from, to, sent) = world.load(budget * load, length, arrival);
                    let want = f64::from(budget * length);
                    let kept = world.kept.packets(from, to);
                    assert!(near(kept, want, 0.1), "{what}: {kept} for {want} at {load} times");
                    // What is estimated has only the error of the draw.
                    let estimate = world.kept.estimate(from, to);
                    assert!(near(estimate, sent, 0.2), "{what}: {estimate} for {sent} at {load}");
                }
                let most = world.handed_over / world.kept.packets(0, u64::MAX);
                assert!(most < 8.0, "{what}: the kernel hands over {most} times what is kept");
            }
        }
    }
}

#[test]
fn no_second_has_much_more_than_the_budget_when_a_burst_comes() {
    for seed in 0..8 {
        let mut world = World::new(1000, 2, seed);
        let (begin, ..) = world.load(10, 3, Arrival::Random);
        for load in [100_000, 900, 100_000, 200, 300_000] {
            world.load(load, 3, Arrival::Random);
        }
        let mut from = begin;
        while from + SECOND < world.now_ns {
            let kept = world.kept.packets(from, from + SECOND);
            assert!(kept < 1250.0, "seed {seed}: {kept} in a second");
            from += SECOND / 20;
        }
    }
}

#[test]
fn of_a_load_below_the_budget_every_packet_is_kept_and_stands_for_itself() {
    let mut world = World::new(1000, 2, 7);
    world.load(100_000, 3, Arrival::Random);
    assert!(world.k.get() > 16, "{}", world.k);
    // The first moments still have the sampling of the load before.
    world.load(500, 1, Arrival::Regular);
    assert_eq!(world.k, NonZeroU32::MIN);
    let (from, to, sent) = world.load(500, 4, Arrival::Regular);
    assert_eq!((world.kept.packets(from, to), world.kept.estimate(from, to)), (sent, sent));
    // Also when nothing at all came for long.
    world.load(1_000_000, 1, Arrival::Regular);
    for _ in 0..30 {
        world.now_ns += FOLLOW.as_nanos() as u64;
        world.follow();
    }
    assert_eq!(world.k, NonZeroU32::MIN);
    let (from, to, sent) = world.load(2, 5, Arrival::Regular);
    assert!(near(world.kept.packets(from, to), sent, 0.0));
}

#[test]
fn a_packet_counts_as_what_its_own_generation_sampled_it_by() {
    let one_in = |k: u32| NonZeroU32::new(k).unwrap();
    let generations = Arc::new(Generations::new(one_in(4)));
    let pacer = Arc::new(Pacer::new(one_in(1_000_000), 1));
    let mut thinner = Thinner::new(pacer, 0, Arc::clone(&generations));
    for (generation, k) in [(1, 8), (2, 2), (255, 16), (256, 32)] {
        generations.note(generation, one_in(k));
    }
    for (generation, k) in [(7, 4.0), (2, 2.0), (1, 8.0), (255, 16.0), (0, 32.0)] {
        let header = Header { time_ns: SECOND, generation, ..Header::default() };
        assert_eq!(thinner.draw(&header).map(Weight::value), Some(k));
    }
}

#[test]
fn a_weight_reads_as_the_sentence_that_readers_know() {
    for (n, want) in [
        (0.2, "sampled 1 in 1"),
        (1.0, "sampled 1 in 1"),
        (1.499, "sampled 1 in 1.50"),
        (12.04, "sampled 1 in 12.04"),
        (1e12, "sampled 1 in 42949672.95"),
    ] {
        let weight = Weight::at_least(n);
        assert!(weight.value() >= n || n > 1e7);
        assert_eq!(weight.comment().text(), want.as_bytes());
    }
}

#[test]
fn a_short_burst_in_a_load_below_the_budget_is_kept_whole() {
    let mut world = World::new(1000, 2, 3);
    world.load(100, 1, Arrival::Regular);
    for _ in 0..20 {
        // Nearly half of what may be saved up, at once.
        for _ in 0..40 {
            world.now_ns += 1000;
            world.packet();
        }
        world.load(100, 1, Arrival::Regular);
    }
    assert!(near(world.kept.packets(0, u64::MAX), 21.0 * 100.0 + 20.0 * 40.0, 0.02));
}
