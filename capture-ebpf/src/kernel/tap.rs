//! The `tap` path: copies hits into this CPU's ring and lets every packet go on.

use core::{ffi::c_void, hint::black_box};

use aya_ebpf::{
    bindings::{
        BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, TC_ACT_UNSPEC,
        xdp_action::XDP_PASS,
    },
    btf_maps::{ArrayOfMaps, RingBuf},
    helpers::generated::{
        bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_ringbuf_discard,
        bpf_ringbuf_query, bpf_ringbuf_reserve, bpf_ringbuf_submit, bpf_skb_load_bytes,
        bpf_xdp_get_buff_len, bpf_xdp_load_bytes,
    },
    macros::{btf_map, classifier, xdp},
    programs::{TcContext, XdpContext},
};
use capture_ebpf::{
    abi::{
        DIRECTION_IN, DIRECTION_OUT, HEADER_MAGIC, Header, MAX_CPUS, Outcome, RECORD_LEN, Record,
    },
    parse::Buffer,
};

use super::{
    frame::{Skb, XdpFrame},
    state::{Account, hits},
};

/// Each CPU has a ring of its own: one that CPUs share collapses under its lock. Userspace makes the
/// rings and chooses their size; the size here only tells the verifier that they are rings.
#[btf_map]
static RINGS: ArrayOfMaps<RingBuf<Record, 4096>, MAX_CPUS> = ArrayOfMaps::new();

/// How often a ring is asked how full it is, until it is so full that its reader is woken.
const ASKS: u64 = 8;

/// Length of a VLAN tag.
const VLAN_LEN: u32 = 4;

/// Where a packet's bytes are copied from.
trait Packet: Buffer {
    /// Copies the first `length` bytes; false when that failed.
    fn copy(&self, to: *mut c_void, length: u32) -> bool;
}

impl Packet for Skb {
    #[inline(always)]
    fn copy(&self, to: *mut c_void, length: u32) -> bool {
        // SAFETY: the caller's record has room for `length` bytes, which the verifier checks.
        (unsafe { bpf_skb_load_bytes(self.context.cast(), 0, to, length) }) == 0
    }
}

impl Packet for XdpFrame {
    #[inline(always)]
    fn copy(&self, to: *mut c_void, length: u32) -> bool {
        // SAFETY: the caller's record has room for `length` bytes, which the verifier checks.
        (unsafe { bpf_xdp_load_bytes(self.context, 0, to, length) }) == 0
    }
}

// Each is one program, without a call of another function: a call is a part of what a packet costs.
#[classifier]
#[inline(always)]
fn tap_ingress(context: TcContext) -> i32 {
    tap_skb(&context, DIRECTION_IN)
}

#[classifier]
#[inline(always)]
fn tap_egress(context: TcContext) -> i32 {
    tap_skb(&context, DIRECTION_OUT)
}

#[inline(always)]
fn tap_skb(context: &TcContext, direction: u8) -> i32 {
    let skb = context.skb.skb;
    // SAFETY: the context is the program's own.
    let length = unsafe { (*skb).len };
    let packet = Skb::new(skb);
    tap(&packet, length, direction, packet.vlan);
    // The packet goes on to the next program, or the stack: with tcx this is `TCX_NEXT`.
    // https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/bpf.h#L6313-L6320
    TC_ACT_UNSPEC
}

/// What `tap_ingress` does, for frames as they are before GRO.
#[xdp(frags)]
#[inline(always)]
fn tap_xdp(context: XdpContext) -> u32 {
    // SAFETY: the context is the program's own.
    let length = unsafe { bpf_xdp_get_buff_len(context.ctx) } as u32;
    tap(&XdpFrame::new(context.ctx), length, DIRECTION_IN, 0);
    XDP_PASS
}

#[inline(always)]
fn tap<P: Packet>(packet: &P, length: u32, direction: u8, vlan: u32) {
    let Some(account) = Account::open() else { return };
    // SAFETY: takes no argument and cannot fail.
    let draw = || unsafe { bpf_get_prandom_u32() };
    let hit = match hits(packet, direction, draw) {
        Ok(hit) => hit,
        Err(outcome) => return account.close(outcome),
    };
    // What is kept aside was on the wire, too.
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
            queue: cpu as u16,
            direction,
            generation: hit.generation,
            vlan,
        },
        captured: length.min(hit.snaplen()),
        reserved: 0,
    };
    let copied = hand_over(packet, cpu, &record, hit.wake_at, &account);
    let outcome = if copied { Outcome::Copied } else { Outcome::RingFull };
    account.close_hit(outcome, hit.jobs, u64::from(original_len));
}

/// Reserves a record of the smallest size that fits: the verifier wants sizes that are constants.
#[inline(always)]
fn hand_over<P: Packet>(
    packet: &P,
    cpu: u32,
    record: &Record,
    wake_at: u64,
    account: &Account,
) -> bool {
    let Some(ring) = RINGS.get(cpu) else { return false };
    let ring = core::ptr::from_ref(ring).cast_mut().cast::<c_void>();
    macro_rules! sizes {
        ($($size:literal)+) => {
            $(if record.captured <= $size {
                return copy::<P, $size>(packet, ring, record, wake_at, account);
            })+
        };
    }
    sizes!(64 96 128 160 192 256 320 384 512 768 1024 1280 1536 2048 3072 4096 6144 9216 16384 32768
        65536 131_072 262_144);
    false
}

#[inline(always)]
fn copy<P: Packet, const SIZE: u32>(
    packet: &P,
    ring: *mut c_void,
    record: &Record,
    wake_at: u64,
    account: &Account,
) -> bool {
    let size = u64::from(SIZE) + RECORD_LEN as u64;
    // SAFETY: `ring` is a ring buffer: the map holds nothing else.
    let place = unsafe { bpf_ringbuf_reserve(ring, size, 0) };
    if place.is_null() {
        return false;
    }
    // SAFETY: the record has room for it, at 8-byte alignment.
    unsafe { place.cast::<Record>().write(*record) };
    // The compiler knows these bounds and would drop the comparison; the verifier does not, and needs
    // it.
    let length = black_box(record.captured);
    // SAFETY: the record is longer than its head.
    let data = unsafe { place.byte_add(RECORD_LEN) };
    let copied = length == 0 || length <= SIZE && packet.copy(data, length);
    if !copied {
        // SAFETY: reserved above, and not submitted.
        unsafe { bpf_ringbuf_discard(place, u64::from(BPF_RB_NO_WAKEUP)) };
        return false;
    }
    // Below, the reader comes by itself some milliseconds later: a wake-up for each packet would cost more
    // than the packet, and so would a question for each.
    // A record takes this much of the ring, with its own head.
    let taken = (size + 15) & !7;
    let wake = account.filled(taken, wake_at / ASKS).is_some_and(|filled| {
        // SAFETY: as for `bpf_ringbuf_reserve`.
        let waiting = unsafe { bpf_ringbuf_query(ring, u64::from(BPF_RB_AVAIL_DATA)) };
        waiting >= wake_at && waiting < wake_at + filled
    });
    let flags = if wake { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
    // SAFETY: reserved above, and submitted once.
    unsafe { bpf_ringbuf_submit(place, u64::from(flags)) };
    true
}
