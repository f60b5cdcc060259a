//! The CPUs' rings, as the programs write them.
//!
//! A CPU has a ring of its own, which only the programs on it write: one that CPUs share collapses under its
//! lock. The rings lie in an array that userspace maps, for what the kernel's ring buffer has besides, a lock and
//! two calls for each record, takes a third of what a short packet costs. It only wakes the reader.

use core::{
    ffi::c_void,
    hint::black_box,
    intrinsics::{AtomicOrdering, atomic_xchg},
    ptr,
};

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_RB_FORCE_WAKEUP},
    btf_maps::{ArrayOfMaps, RingBuf},
    helpers::generated::{
        bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_ringbuf_discard,
        bpf_ringbuf_reserve, bpf_skb_load_bytes, bpf_xdp_load_bytes,
    },
    macros::{btf_map, map},
    maps::Array,
};
use capture_ebpf::{
    abi::{
        HEADER_MAGIC, Header, MAX_CPUS, MAX_SNAPLEN, Outcome, PIECE, Piece, Positions, RECORD_LEN,
        Record, position_after,
    },
    parse::Buffer,
};

use super::{
    frame::{Skb, XdpFrame},
    state::{Account, hits},
};

/// Userspace says how many pieces there are.
#[map]
static RINGS: Array<Piece> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// And for how many CPUs.
#[map]
static POSITIONS: Array<Positions> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[btf_map]
static BELLS: ArrayOfMaps<RingBuf<u64, 4096>, MAX_CPUS> = ArrayOfMaps::new();

/// Not 0 where the CPU lets others see its stores in their order. The verifier takes it for a constant, and leaves
/// out what is not run.
#[unsafe(no_mangle)]
static STORES_IN_ORDER: Global<u8> = Global::new(0);

/// The part of a ring at which its reader is woken from a sleep, which it sizes by how the ring fills up: for
/// a burst that begins in one.
const WAKE_PART: u64 = 4;

/// Length of a VLAN tag.
const VLAN_LEN: u32 = 4;

/// Where a packet's bytes are copied from.
pub(super) trait Packet: Buffer {
    /// Length of the bytes, which are in one piece or in several.
    fn length(&self) -> u32;

    /// The VLAN tag that the kernel keeps aside, as in a `Header`.
    fn vlan(&self) -> u32;

    /// Copies the first `length` bytes; false when that failed.
    fn copy(&self, to: *mut c_void, length: u32) -> bool;
}

impl Packet for Skb {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.length()
    }

    #[inline(always)]
    fn vlan(&self) -> u32 {
        self.vlan()
    }

    #[inline(always)]
    fn copy(&self, to: *mut c_void, length: u32) -> bool {
        let (data, end) = self.piece();
        // SAFETY: the caller's record has room for `length` bytes, which the verifier checks.
        let done = unsafe { copy_short(data, end, to, length) };
        // SAFETY: as above.
        done || (unsafe { bpf_skb_load_bytes(self.context.cast(), 0, to, length) }) == 0
    }
}

impl Packet for XdpFrame {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.length()
    }

    #[inline(always)]
    fn vlan(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn copy(&self, to: *mut c_void, length: u32) -> bool {
        let (data, end) = self.piece();
        // SAFETY: the caller's record has room for `length` bytes, which the verifier checks.
        let done = unsafe { copy_short(data, end, to, length) };
        // SAFETY: as above.
        done || (unsafe { bpf_xdp_load_bytes(self.context, 0, to, length) }) == 0
    }
}

/// Copies a short packet that is in one piece: a call of the kernel's copying takes longer than the bytes do.
///
/// # Safety
///
/// There is room for `length` bytes.
#[inline(always)]
unsafe fn copy_short(data: usize, end: usize, to: *mut c_void, length: u32) -> bool {
    let (to, length) = (to as usize, length as usize);
    match length {
        // SAFETY: as the caller says.
        32..=64 => unsafe { copy_ends::<4>(data, end, to, length) },
        // SAFETY: as above.
        65..=128 => unsafe { copy_ends::<8>(data, end, to, length) },
        _ => false,
    }
}

/// Copies the first `N` words, and the last `N` of `length` bytes: some of them twice.
///
/// # Safety
///
/// There is room for `length` bytes, and they are `N` words at least.
#[inline(always)]
unsafe fn copy_ends<const N: usize>(data: usize, end: usize, to: usize, length: usize) -> bool {
    let behind = length - 8 * N;
    // The compiler would compare where the packet ends instead, of which the verifier learns nothing.
    let last = black_box(data + behind);
    if data + 8 * N > end || last + 8 * N > end {
        return false;
    }
    for at in (0..8 * N).step_by(8) {
        // SAFETY: the comparisons above prove to the verifier that the words are inside the packet's first piece;
        // there is room for them, as the caller says.
        unsafe { copy_word(data + at, to + at) };
        // SAFETY: as above.
        unsafe { copy_word(last + at, to + behind + at) };
    }
    true
}

/// Copies 8 bytes from one address to another.
///
/// # Safety
///
/// They may be read there, and written here.
#[inline(always)]
unsafe fn copy_word(from: usize, to: usize) {
    // SAFETY: as the caller says.
    let word = unsafe { (from as *const u64).read_unaligned() };
    // SAFETY: as above.
    unsafe { (to as *mut u64).write_unaligned(word) };
}

/// Copies a hit into this CPU's ring, if there is room; says whether the packet is a hit. What is only asked of a
/// hit is only found out for one. Without a receive queue, the CPU is said.
#[inline(always)]
pub(super) fn take<P: Packet>(
    packet: &P,
    direction: u8,
    queue: impl FnOnce() -> Option<u32>,
) -> bool {
    let Some(account) = Account::open() else { return false };
    // SAFETY: takes no argument and cannot fail.
    let draw = || unsafe { bpf_get_prandom_u32() };
    let hit = match hits(packet, direction, draw) {
        Ok(hit) => hit,
        Err(outcome) => {
            account.close(outcome);
            return false;
        }
    };
    // What is kept aside was on the wire, too.
    let (length, vlan) = (packet.length(), packet.vlan());
    let original_len = if vlan == 0 { length } else { length + VLAN_LEN };
    // SAFETY: takes no argument and cannot fail.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let record = Record {
        header: Header {
            magic: HEADER_MAGIC,
            original_len,
            // SAFETY: takes no argument and cannot fail.
            time_ns: unsafe { bpf_ktime_get_ns() },
            jobs: hit.jobs,
            queue: queue().unwrap_or(cpu) as u16,
            direction,
            generation: hit.generation,
            vlan,
        },
        captured: length.min(hit.snaplen()),
        reserved: 0,
    };
    let outcome = if append(packet, cpu, &record, hit.ring_bytes).is_some() {
        Outcome::Copied
    } else {
        Outcome::RingFull
    };
    account.close_hit(outcome, &hit, u64::from(original_len));
    true
}

/// Writes a record, if there is room for it.
#[inline(always)]
fn append<P: Packet>(packet: &P, cpu: u32, record: &Record, ring_bytes: u64) -> Option<()> {
    let positions = POSITIONS.get_ptr_mut(cpu)?;
    // SAFETY: a map value, alive as long as the program runs.
    let produced_at = unsafe { &raw mut (*positions).produced };
    // SAFETY: as above.
    let consumed_at = unsafe { &raw const (*positions).consumed };
    // SAFETY: as above. Only this CPU's programs write it, and they do not nest: XDP and tcx run with bottom halves
    // disabled, on egress too, in `__dev_queue_xmit` of
    // <https://github.com/torvalds/linux/blob/v6.6/net/core/dev.c>.
    let produced = unsafe { *produced_at };
    // SAFETY: as above; one aligned word, which the reader may write meanwhile.
    let consumed = unsafe { ptr::read_volatile(consumed_at) };
    let next = position_after(produced, record.captured);
    if next - consumed > ring_bytes {
        return None;
    }
    let pieces = ring_bytes / PIECE as u64;
    let piece = u64::from(cpu) * pieces + ((produced / PIECE as u64) & (pieces - 1));
    let piece = RINGS.get_ptr_mut(piece as u32)?.cast::<u8>();
    // The verifier has to see that the record begins inside the piece. What follows that is then inside, too,
    // as long as it is no longer than `MAX_SNAPLEN`.
    let offset = black_box(produced) as usize & (PIECE - 8);
    // SAFETY: the offset is below the piece's length.
    let place = unsafe { piece.add(offset) };
    // SAFETY: there is room for a record behind each offset, which is a multiple of 8, and the reader has done
    // with what was there: see the comparison above.
    unsafe { place.cast::<Record>().write_unaligned(*record) };
    // The compiler knows the bound and would drop the comparison; the verifier does not, and needs it.
    let length = black_box(record.captured);
    // SAFETY: as above.
    let data = unsafe { place.add(RECORD_LEN) };
    if length != 0 && (length > MAX_SNAPLEN || !packet.copy(data.cast(), length)) {
        return None;
    }
    // SAFETY: a map value, as above.
    unsafe { publish(produced_at, next) };
    let wake_at = consumed + ring_bytes / WAKE_PART;
    if produced < wake_at && next >= wake_at {
        ring_bell(cpu);
    }
    Some(())
}

/// Stores a position, after all that was stored before.
///
/// # Safety
///
/// The place is a map value, aligned to 8 bytes.
#[inline(always)]
unsafe fn publish(place: *mut u64, position: u64) {
    if STORES_IN_ORDER.load() == 0 {
        // SAFETY: as the caller says. An exchange, for BPF has no store that orders those before it on every
        // architecture; it waits until they are in the cache, which costs a packet 13 ns.
        unsafe { atomic_xchg::<u64, { AtomicOrdering::Release }>(place, position) };
    } else {
        // SAFETY: as the caller says. The compiler keeps it behind what `black_box` might have read.
        unsafe { black_box(place).write_volatile(position) };
    }
}

/// Wakes the ring's reader. Otherwise it comes by itself some milliseconds later: a wake-up for each packet would
/// cost more than the packet.
#[cold]
#[inline(always)]
fn ring_bell(cpu: u32) {
    let Some(bell) = BELLS.get(cpu) else { return };
    let bell = ptr::from_ref(bell).cast_mut().cast::<c_void>();
    // SAFETY: `bell` is a ring buffer: the map holds nothing else.
    let place = unsafe { bpf_ringbuf_reserve(bell, 8, 0) };
    // A full one has been rung, and not been heard yet.
    if !place.is_null() {
        // SAFETY: reserved above, and discarded once.
        unsafe { bpf_ringbuf_discard(place, u64::from(BPF_RB_FORCE_WAKEUP)) };
    }
}
