//! Adaptive sampling: a job keeps a budget of packets a second, whatever the load is.
//!
//! # Two stages
//!
//! - The kernel program keeps 1 in K, a power of two that follows the load within a twentieth of a second, so
//!   that it hands over about twice the budget.
//! - The worker keeps 1 in N ∕ K of these, so that 1 in N is left of all. It decides anew at each packet, so
//!   that a burst is met by its first packets and not when K follows.
//!
//! # The N of a packet
//!
//! Each packet is written with its N, and the sum of these estimates without bias how many passed: N is
//! settled before the packet's lot is drawn, by what came before it.
//! - K is exact. The header in front of each packet says by which generation of the kernel's tables it was
//!   sampled, and [`Generations`] says the K of that one. A change is noted before the kernel can see it.
//! - N is the load divided by the budget, times a correction, and at least K.
//!   - The load is the larger of two averages, over a short time and over a longer one: it rises at once and
//!     falls smoothly. Each worker measures its own and publishes it to the others; a packet counts as K.
//!   - The correction pays back what was too much within a moment, and what was too little as far as the
//!     credit goes, which is little, so that after a pause a burst finds not more than that.
//!   - While more than half of the credit is left, N is K: of a load below the budget also a short burst is
//!     kept whole.
//! - When the load falls, K is too large for some tenths of a second, and less than the budget is kept.

use std::{
    fmt,
    io::Write as _,
    num::NonZeroU32,
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::Duration,
};

use capture_ebpf::abi::Header;
use crossbeam::utils::CachePadded;

use crate::segment::{pcapng, read::SAMPLED};

/// Budgets that can be held, packets a second.
pub const BUDGETS: RangeInclusive<u32> = 100..=1_000_000;

/// How often it is looked whether K still suits.
pub(crate) const FOLLOW: Duration = Duration::from_millis(50);

/// From this budget on, times are as they stand below; a smaller one needs longer to count as many packets.
const USUAL_BUDGET: f64 = 500.0;

/// Time of the average that rises, seconds.
const SHORT_S: f64 = 0.02;

/// Time of the average that falls, seconds.
const LONG_S: f64 = 0.06;

/// Time in which what was too much is paid back, seconds.
const PAYBACK_S: f64 = 0.25;

/// Most of the budget that is saved up, seconds of it.
const CREDIT_S: f64 = 0.1;

/// Most that is paid back, seconds of the budget.
const DEBT_S: f64 = 1.0;

/// How often a worker looks at the load of the others, nanoseconds.
const LOOK_NS: u64 = 1_000_000;

/// N ∕ K at which K is chosen, and between which it stays.
const CHOSEN: f64 = 1.6;
const STAYS: RangeInclusive<f64> = 1.1..=4.5;

/// The largest K.
const MOST: u32 = 1 << 20;

/// The K of the last 256 generations of an interface's tables, by the lowest bits of their number. A packet
/// is on its way for less long than so many generations take.
#[derive(Debug)]
pub(crate) struct Generations([AtomicU32; 256]);

impl Generations {
    pub(crate) fn new(k: NonZeroU32) -> Self {
        Self(std::array::from_fn(|_| AtomicU32::new(k.get())))
    }

    /// Notes the K of a generation that the kernel does not use yet.
    pub(crate) fn note(&self, generation: u64, k: NonZeroU32) {
        self.0[usize::from(generation as u8)].store(k.get(), Release);
    }

    fn of(&self, generation: u8) -> u32 {
        self.0[usize::from(generation)].load(Acquire)
    }
}

/// How many packets one stands for, in hundredths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Weight(u32);

impl Weight {
    #[expect(clippy::cast_sign_loss, reason = "at least 1, and a cast saturates")]
    fn at_least(n: f64) -> Self {
        Self((n.max(1.0) * 100.0).ceil() as u32)
    }

    fn value(self) -> f64 {
        f64::from(self.0) / 100.0
    }

    /// What the packet's block says.
    pub(crate) fn comment(self) -> Comment {
        let mut comment = Comment { text: [0; 32], length: 0 };
        let mut rest = &mut comment.text[..];
        // There is room for the longest.
        let fits = write!(rest, "{self}").is_ok();
        debug_assert!(fits, "{self}");
        let left = rest.len();
        comment.length = comment.text.len() - left;
        comment
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, hundredths) = (self.0 / 100, self.0 % 100);
        write!(f, "{SAMPLED}{whole}")?;
        if hundredths == 0 { Ok(()) } else { write!(f, ".{hundredths:02}") }
    }
}

/// The text of a [`Weight`].
pub(crate) struct Comment {
    text: [u8; 32],
    length: usize,
}

impl Comment {
    pub(crate) fn text(&self) -> &[u8] {
        &self.text[..self.length]
    }

    /// What it adds to a packet's block, bytes.
    pub(crate) fn block_len(&self) -> usize {
        pcapng::option_len(self.length)
    }
}

/// Seconds from one kernel time to a later one; none if it is not later.
fn seconds(from_ns: u64, to_ns: u64) -> f64 {
    Duration::from_nanos(to_ns.saturating_sub(from_ns)).as_secs_f64()
}

/// An average that forgets exponentially.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    per_second: f64,
    at_ns: u64,
}

impl Rate {
    fn at(&self, now_ns: u64, time_s: f64) -> f64 {
        self.per_second * (-seconds(self.at_ns, now_ns) / time_s).exp()
    }

    fn add(&mut self, packets: f64, now_ns: u64, time_s: f64) {
        self.per_second = self.at(now_ns, time_s) + packets / time_s;
        self.at_ns = self.at_ns.max(now_ns);
    }
}

/// What a job's workers share to hold its budget together.
#[derive(Debug)]
pub(crate) struct Pacer {
    per_second: f64,
    /// What a packet costs, nanoseconds.
    cost_ns: u64,
    /// By how much longer all times are for a small budget.
    stretch: f64,
    /// The load that each worker has measured, and when.
    loads: Box<[CachePadded<AtomicU64>]>,
    /// Kernel time up to which the budget is spent.
    spent_ns: AtomicU64,
}

impl Pacer {
    pub(crate) fn new(per_second: NonZeroU32, workers: usize) -> Self {
        let stretch = (USUAL_BUDGET / f64::from(per_second.get())).max(1.0);
        Self {
            per_second: per_second.get().into(),
            cost_ns: 1_000_000_000 / u64::from(per_second.get()),
            stretch,
            loads: (0..workers).map(|_| CachePadded::default()).collect(),
            spent_ns: AtomicU64::new(0),
        }
    }

    /// The K to go on with after this one.
    pub(crate) fn follow(&self, k: NonZeroU32, now_ns: u64) -> NonZeroU32 {
        let wanted = self.wanted(self.load(None, now_ns), now_ns);
        let ratio = wanted / f64::from(k.get());
        if STAYS.contains(&ratio) || k == NonZeroU32::MIN && ratio < CHOSEN {
            return k;
        }
        let mut chosen = NonZeroU32::MIN;
        while f64::from(chosen.get()) * 2.0 <= wanted / CHOSEN && chosen.get() < MOST {
            chosen = chosen.saturating_mul(NonZeroU32::MIN.saturating_add(1));
        }
        chosen
    }

    /// What N should be at this load.
    fn wanted(&self, load: f64, now_ns: u64) -> f64 {
        let spent_ns = self.spent_ns.load(Relaxed);
        let credit = seconds(spent_ns, now_ns).min(CREDIT_S * self.stretch);
        let debt = seconds(now_ns, spent_ns);
        load / self.per_second * ((debt - credit) / (PAYBACK_S * self.stretch)).exp()
    }

    /// Whether enough is saved up for a burst, which is not thinned as long.
    fn has_saved(&self, now_ns: u64) -> bool {
        let spent_ns = self.spent_ns.load(Relaxed);
        seconds(spent_ns, now_ns) > CREDIT_S / 2.0 * self.stretch
    }

    /// Takes one packet from the budget.
    fn pay(&self, now_ns: u64) {
        let nanoseconds = |seconds: f64| Duration::from_secs_f64(seconds).as_nanos() as u64;
        let most_saved = now_ns.saturating_sub(nanoseconds(CREDIT_S * self.stretch));
        let most_owed = now_ns + nanoseconds(DEBT_S * self.stretch);
        let spend =
            |spent: u64| Some((spent.max(most_saved) + self.cost_ns).min(most_owed.max(spent)));
        let _: Result<_, _> = self.spent_ns.fetch_update(Relaxed, Relaxed, spend);
    }

    /// Says the load of a worker, packets a second.
    #[expect(clippy::cast_possible_truncation, reason = "a few digits are enough")]
    fn publish(&self, worker: usize, load: f64, now_ns: u64) {
        let load = u64::from((load as f32).to_bits());
        let milliseconds = u64::from((now_ns / 1_000_000) as u32);
        self.loads[worker].store(load << 32 | milliseconds, Relaxed);
    }

    /// The load of all workers but one.
    fn load(&self, but: Option<usize>, now_ns: u64) -> f64 {
        let now = (now_ns / 1_000_000) as u32;
        let all = self.loads.iter().enumerate().filter(|(worker, _)| Some(*worker) != but);
        all.map(|(_, load)| {
            let load = load.load(Relaxed);
            // The other clock may be ahead a little; all of them come round after weeks.
            let age = now.wrapping_sub(load as u32);
            let age = if age > u32::MAX / 2 { 0.0 } else { f64::from(age) / 1000.0 };
            f64::from(f32::from_bits((load >> 32) as u32)) * (-age / (LONG_S * self.stretch)).exp()
        })
        .sum()
    }
}

/// One worker's part.
#[derive(Debug)]
pub(crate) struct Thinner {
    pacer: Arc<Pacer>,
    /// Which of the job's workers it is.
    worker: usize,
    generations: Arc<Generations>,
    short: Rate,
    long: Rate,
    others: f64,
    looked_ns: u64,
    lots: fastrand::Rng,
}

impl Thinner {
    pub(crate) fn new(pacer: Arc<Pacer>, worker: usize, generations: Arc<Generations>) -> Self {
        Self {
            pacer,
            worker,
            generations,
            short: Rate::default(),
            long: Rate::default(),
            others: 0.0,
            looked_ns: 0,
            lots: fastrand::Rng::new(),
        }
    }

    /// Whether a packet is kept, and how many it stands for then.
    pub(crate) fn draw(&mut self, header: &Header) -> Option<Weight> {
        let (now_ns, k) = (header.time_ns, f64::from(self.generations.of(header.generation)));
        if now_ns.saturating_sub(self.looked_ns) > LOOK_NS {
            self.looked_ns = now_ns;
            self.others = self.pacer.load(Some(self.worker), now_ns);
        }
        let (short_s, long_s) = (SHORT_S * self.pacer.stretch, LONG_S * self.pacer.stretch);
        let own = self.short.at(now_ns, short_s).max(self.long.at(now_ns, long_s));
        let wanted = if self.pacer.has_saved(now_ns) {
            k
        } else {
            self.pacer.wanted(own + self.others, now_ns)
        };
        self.short.add(k, now_ns, short_s);
        self.long.add(k, now_ns, long_s);
        let own = self.short.per_second.max(self.long.per_second);
        self.pacer.publish(self.worker, own, now_ns);

        let weight = Weight::at_least(wanted.max(k));
        // 1 in N of all is N ∕ K of these.
        let kept = self.lots.f64() * weight.value() < k;
        kept.then(|| {
            self.pacer.pay(now_ns);
            weight
        })
    }
}

#[cfg(test)]
mod tests;
