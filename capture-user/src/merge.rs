//! Puts the packets of several workers that go into one file in the order of their time: those of several
//! queues or interfaces, or of more CPUs than one worker reads.
//!
//! Each worker's packets are in order. A packet may be written once every other worker has said that
//! nothing older is to come from it: its [`Frontier`]. A worker that sees traffic moves its frontier
//! with each buffer that it passes on. One that sees little is asked to, now and then, while others'
//! packets wait for it.
//!
//! Order is worth no packet: when a worker's buffers run low, what waits is written as it came.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    buffer::{Buffer, Pool},
    segment::{Run, pcapng::peek},
};

/// How often a worker is asked to pass on what it has, while others' packets wait for it.
const ASK: Duration = Duration::from_millis(5);

/// Up to when a worker's packets have been passed on, UTC nanoseconds. The worker moves it, the disk
/// thread reads it.
#[derive(Debug, Default)]
pub(crate) struct Frontier(AtomicU64);

impl Frontier {
    /// All packets up to this time have been passed on. Call it after they were.
    pub(crate) fn raise(&self, utc_ns: u64) {
        // The worker is the only one that writes.
        if utc_ns > self.0.load(Ordering::Relaxed) {
            self.0.store(utc_ns, Ordering::Release);
        }
    }

    /// No packet will come any more.
    pub(crate) fn end(&self) {
        self.raise(u64::MAX);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

/// One worker's packets on their way into the file.
pub(crate) struct Lane {
    /// Index of the worker's stream among the job's.
    pub(crate) stream: usize,
    /// Index of the interface in the file.
    pub(crate) interface: usize,
    pub(crate) frontier: Arc<Frontier>,
    /// Asks the worker to pass on what it has.
    pub(crate) ask: Box<dyn Fn() + Send>,
    /// Buffers that its worker has.
    pub(crate) buffers: usize,
    /// How many of them may wait here.
    pub(crate) patience: usize,
    held: VecDeque<Held>,
}

/// A buffer that waits, and how much of it has been taken.
struct Held {
    buffer: Buffer,
    at: usize,
}

impl Lane {
    pub(crate) fn new(
        stream: usize,
        interface: usize,
        frontier: Arc<Frontier>,
        buffers: usize,
        ask: Box<dyn Fn() + Send>,
    ) -> Self {
        Self {
            stream,
            interface,
            frontier,
            ask,
            buffers,
            patience: buffers / 2,
            held: VecDeque::new(),
        }
    }

    /// Time of the next packet.
    fn head(&self) -> Option<u64> {
        let held = self.held.front()?;
        Some(peek(&held.buffer.filled()[held.at..])?.timestamp_ns)
    }

    fn run(&self) -> Run {
        Run { stream: self.stream, interface: self.interface, ..Run::default() }
    }
}

/// What goes into one file, or one series of files.
pub(crate) struct Merge {
    lanes: Vec<Lane>,
    /// Which lane has which head, while packets are taken.
    heads: BinaryHeap<Reverse<(u64, usize)>>,
    /// Where packets of several lanes are put one after the other.
    mixed: Option<Buffer>,
    /// Where that comes from. A single lane needs none.
    pool: Option<Arc<Pool>>,
    runs: Vec<Run>,
    /// Bytes that `mixed` may hold.
    fill: usize,
    asked: Instant,
}

impl Merge {
    /// `pool` has buffers for the merge's own use, which are filled with up to `fill` bytes.
    pub(crate) fn new(lanes: Vec<Lane>, pool: Option<Arc<Pool>>, fill: usize) -> Self {
        let heads = BinaryHeap::with_capacity(lanes.len());
        Self { lanes, heads, mixed: None, pool, runs: Vec::new(), fill, asked: Instant::now() }
    }

    /// A worker has passed on a buffer.
    pub(crate) fn take(&mut self, lane: usize, buffer: Buffer) {
        if buffer.is_empty() {
            buffer.recycle();
        } else {
            self.lanes[lane].held.push_back(Held { buffer, at: 0 });
        }
    }

    /// Up to when every lane's packets are here, or on the queue to here. Read it first, then take
    /// what is on the queue, then [`emit`](Self::emit).
    pub(crate) fn frontier(&self) -> u64 {
        match self.lanes.as_slice() {
            [_] => u64::MAX,
            lanes => lanes.iter().map(|lane| lane.frontier.get()).min().unwrap_or(u64::MAX),
        }
    }

    /// Whether packets wait.
    pub(crate) fn holds(&self) -> bool {
        self.lanes.iter().any(|lane| !lane.held.is_empty())
    }

    /// How long the packets that wait may go on waiting before lanes are asked about.
    pub(crate) fn wait(&self) -> Option<Duration> {
        self.holds().then(|| self.ask_every().saturating_sub(self.asked.elapsed()))
    }

    /// Longer the more workers there are to wake.
    fn ask_every(&self) -> Duration {
        ASK.max(Duration::from_micros(250) * self.lanes.len() as u32)
    }

    /// Asks the workers that packets wait for.
    pub(crate) fn ask(&mut self) {
        if !self.holds() || self.asked.elapsed() < self.ask_every() {
            return;
        }
        self.asked = Instant::now();
        let newest = self
            .lanes
            .iter()
            .filter_map(|lane| Some(lane.held.back()?.buffer.last_ns))
            .max()
            .unwrap_or(0);
        for lane in self.lanes.iter().filter(|lane| lane.frontier.get() < newest) {
            (lane.ask)();
        }
    }

    /// Gives `out` all packets up to this time, and what may wait no longer, in order; `out` takes the
    /// runs away. False when it has to be called again once a buffer of the merge's pool is free.
    pub(crate) fn emit(&mut self, until: u64, mut out: impl FnMut(Buffer, &mut Vec<Run>)) -> bool {
        let impatient = self.lanes.iter().filter_map(|lane| {
            let last = lane.held.len().checked_sub(lane.patience + 1)?;
            Some(lane.held[last].buffer.last_ns)
        });
        let until = impatient.fold(until, u64::max);

        self.heads.clear();
        self.heads.extend(
            self.lanes
                .iter()
                .enumerate()
                .filter_map(|(at, lane)| Some(Reverse((lane.head()?, at)))),
        );
        while let Some(Reverse((head, at))) = self.heads.pop()
            && head <= until
        {
            // This lane's turn lasts until another's packet is older.
            let turn = self.heads.peek().map_or(until, |Reverse((next, _))| until.min(*next));
            if !self.turn(at, turn, &mut out) {
                return false;
            }
            if let Some(head) = self.lanes[at].head() {
                self.heads.push(Reverse((head, at)));
            }
        }
        self.flush(&mut out);
        true
    }

    /// Takes one lane's packets up to this time, at least one; false when there is no buffer for them.
    fn turn(&mut self, at: usize, until: u64, out: &mut impl FnMut(Buffer, &mut Vec<Run>)) -> bool {
        while let Some(held) = self.lanes[at].held.front() {
            let whole = held.at == 0 && held.buffer.last_ns <= until;
            let Some(pool) = self.pool.as_ref().filter(|_| !whole) else {
                // As it is, without a copy.
                self.flush(out);
                let lane = &mut self.lanes[at];
                let run = lane.run();
                let Some(Held { buffer, .. }) = lane.held.pop_front() else { return true };
                self.runs.push(Run {
                    bytes: buffer.len(),
                    packets: buffer.packets,
                    captured_bytes: buffer.captured_bytes,
                    ..run
                });
                out(buffer, &mut self.runs);
                continue;
            };
            if self.mixed.is_none() {
                self.mixed = pool.take();
            }
            if self.mixed.is_none() {
                return false;
            }
            if !self.copy(at, until, out) {
                return true;
            }
        }
        true
    }

    /// Copies packets up to this time out of a lane's first buffer; false when a later one came.
    fn copy(&mut self, at: usize, until: u64, out: &mut impl FnMut(Buffer, &mut Vec<Run>)) -> bool {
        let lane = &mut self.lanes[at];
        let mut run = lane.run();
        let Some(held) = lane.held.front_mut() else { return false };
        let Some(mixed) = &mut self.mixed else { return false };
        let start = held.at;
        let bytes = held.buffer.filled();
        let mut full = false;
        while let Some(packet) = peek(&bytes[held.at..]) {
            if packet.timestamp_ns > until {
                break;
            }
            let end = held.at + packet.block_len;
            full =
                mixed.len() + (end - start) > self.fill && !(mixed.is_empty() && run.packets == 0);
            if full {
                break;
            }
            mixed.note(packet.captured as usize, packet.timestamp_ns);
            run.packets += 1;
            run.captured_bytes += u64::from(packet.captured);
            held.at = end;
        }
        if run.packets > 0 {
            run.bytes = held.at - start;
            mixed.append(&bytes[start..held.at]);
            self.runs.push(run);
        }
        if held.at >= bytes.len() {
            if let Some(Held { buffer, .. }) = lane.held.pop_front() {
                buffer.recycle();
            }
            return true;
        }
        if full {
            self.flush(out);
        }
        full
    }

    fn flush(&mut self, out: &mut impl FnMut(Buffer, &mut Vec<Run>)) {
        if let Some(mixed) = self.mixed.take_if(|mixed| !mixed.is_empty()) {
            out(mixed, &mut self.runs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        buffer::Pool,
        segment::pcapng::{self, Packet},
    };

    /// A few numbers that look random.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.0 >> 33) % limit
        }
    }

    fn packet(buffer: &mut Buffer, lane: u32, timestamp_ns: u64, len: usize) {
        let data = vec![lane as u8; len];
        let one = Packet {
            interface: lane,
            timestamp_ns,
            original_len: len as u32,
            data: &data,
            ..Packet::default()
        };
        let length = pcapng::packet(buffer.free(), &one).unwrap();
        buffer.commit(length, len, timestamp_ns);
    }

    /// What came out: stream, time.
    #[derive(Default)]
    struct Out(Vec<(usize, u64)>);

    impl Out {
        fn take(&mut self, buffer: Buffer, runs: &mut Vec<Run>) {
            let mut rest = buffer.filled();
            for run in runs.drain(..) {
                let (mut blocks, after) = rest.split_at(run.bytes);
                let mut packets = 0;
                let mut captured = 0;
                while let Some(packet) = peek(blocks) {
                    assert_eq!(blocks[8], run.interface as u8);
                    self.0.push((run.stream, packet.timestamp_ns));
                    packets += 1;
                    captured += u64::from(packet.captured);
                    blocks = &blocks[packet.block_len..];
                }
                assert_eq!((packets, captured), (run.packets, run.captured_bytes));
                rest = after;
            }
            assert!(rest.is_empty());
            buffer.recycle();
        }
    }

    fn lanes(count: usize, buffers: usize) -> (Vec<Arc<Pool>>, Vec<Arc<Frontier>>, Merge) {
        let pools: Vec<_> = (0..count).map(|_| Pool::new(buffers, 1 << 16)).collect();
        let frontiers: Vec<Arc<Frontier>> = (0..count).map(|_| Arc::default()).collect();
        let lane =
            |at: usize| Lane::new(at, at, Arc::clone(&frontiers[at]), buffers, Box::new(|| {}));
        let pool = Pool::new(2, 1 << 16);
        let merge = Merge::new((0..count).map(lane).collect(), Some(pool), 1 << 14);
        (pools, frontiers, merge)
    }

    #[test]
    fn packets_of_several_workers_come_out_in_order_and_none_is_lost() {
        for seed in 0..200 {
            let mut numbers = Numbers(seed);
            let count = 2 + numbers.below(3) as usize;
            let (pools, frontiers, mut merge) = lanes(count, 64);
            let mut out = Out::default();
            let mut now = 1;
            let mut sent = 0;
            for _ in 0..30 {
                let lane = numbers.below(count as u64) as usize;
                let mut buffer = pools[lane].take().unwrap();
                // Times of several lanes interleave; those of one do not go back.
                now += numbers.below(3);
                let mut time = now;
                for _ in 0..numbers.below(100) {
                    time += numbers.below(5);
                    packet(&mut buffer, lane as u32, time, numbers.below(300) as usize);
                    sent += 1;
                }
                // No lane goes back behind what it has said.
                now = time;
                let promise = time.saturating_sub(numbers.below(200));
                merge.take(lane, buffer);
                for (at, frontier) in frontiers.iter().enumerate() {
                    frontier.raise(if at == lane { time } else { promise.min(time) });
                }
                let frontier = merge.frontier();
                assert!(merge.emit(frontier, |buffer, runs| out.take(buffer, runs)));
                assert!(out.0.iter().all(|(_, time)| *time <= frontier));
            }
            assert!(merge.emit(u64::MAX, |buffer, runs| out.take(buffer, runs)));
            assert_eq!(out.0.len(), sent, "seed {seed}");
            assert!(out.0.is_sorted_by_key(|(_, time)| *time), "seed {seed}");
            assert!(!merge.holds());
        }
    }

    #[test]
    fn a_packet_waits_for_a_worker_that_may_have_an_older_one() {
        let (pools, frontiers, mut merge) = lanes(2, 8);
        let mut out = Out::default();
        let mut buffer = pools[0].take().unwrap();
        for time in [10, 20, 30] {
            packet(&mut buffer, 0, time, 60);
        }
        merge.take(0, buffer);
        frontiers[0].raise(30);
        frontiers[1].raise(15);
        assert!(merge.emit(merge.frontier(), |buffer, runs| out.take(buffer, runs)));
        assert_eq!(out.0, [(0, 10)]);
        let mut buffer = pools[1].take().unwrap();
        packet(&mut buffer, 1, 25, 60);
        merge.take(1, buffer);
        frontiers[1].raise(25);
        assert!(merge.emit(merge.frontier(), |buffer, runs| out.take(buffer, runs)));
        assert_eq!(out.0, [(0, 10), (0, 20), (1, 25)]);
        assert!(merge.wait().is_some());
        frontiers[1].end();
        assert!(merge.emit(merge.frontier(), |buffer, runs| out.take(buffer, runs)));
        assert_eq!(out.0, [(0, 10), (0, 20), (1, 25), (0, 30)]);
        assert!(merge.wait().is_none());
    }

    #[test]
    fn packets_do_not_wait_when_their_worker_needs_the_buffers() {
        let (pools, _, mut merge) = lanes(2, 4);
        let mut out = Out::default();
        for time in 1..=4 {
            let mut buffer = pools[0].take().expect("no more than half of the buffers wait");
            packet(&mut buffer, 0, time, 60);
            merge.take(0, buffer);
            assert!(merge.emit(merge.frontier(), |buffer, runs| out.take(buffer, runs)));
        }
        assert_eq!(out.0, [(0, 1), (0, 2)]);
    }

    #[test]
    fn a_merge_without_a_buffer_goes_on_where_it_was() {
        let (pools, frontiers, mut merge) = lanes(2, 8);
        let own = Arc::clone(merge.pool.as_ref().unwrap());
        for lane in 0..2_u64 {
            let mut buffer = pools[lane as usize].take().unwrap();
            for time in 0..2_000 {
                packet(&mut buffer, lane as u32, 1 + 2 * time + lane, 10);
                if buffer.len() > 60_000 {
                    break;
                }
            }
            frontiers[lane as usize].end();
            merge.take(lane as usize, buffer);
        }
        let mut kept = Vec::new();
        let mut out = Out::default();
        let mut stalls = 0;
        while !merge.emit(u64::MAX, |buffer, runs| kept.push((buffer, std::mem::take(runs)))) {
            stalls += 1;
            for (buffer, mut runs) in kept.drain(..) {
                out.take(buffer, &mut runs);
            }
        }
        for (buffer, mut runs) in kept {
            out.take(buffer, &mut runs);
        }
        assert!(stalls > 1, "{stalls}");
        assert!(out.0.len() > 1_500 && out.0.is_sorted_by_key(|(_, time)| *time));
        assert!(!merge.holds() && own.take().is_some() && own.take().is_some());
    }
}
