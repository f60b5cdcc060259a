//! The `exclusive` path.

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT},
    helpers::generated::{
        bpf_get_prandom_u32, bpf_ktime_get_ns, bpf_xdp_adjust_head, bpf_xdp_adjust_meta,
    },
    macros::xdp,
    programs::XdpContext,
};
use capture_ebpf::abi::{DIRECTION_IN, HEADER_LEN, HEADER_MAGIC, Header, Outcome};

use super::{
    frame::XdpFrame,
    ring::take,
    state::{Account, SOCKETS, hits},
};

/// Redirects hits into the `AF_XDP` socket of their queue and passes everything else.
#[xdp(frags)]
fn exclusive(context: XdpContext) -> u32 {
    let Some(account) = Account::open() else {
        return XDP_PASS;
    };
    // SAFETY: takes no argument and cannot fail.
    let draw = || unsafe { bpf_get_prandom_u32() };
    let frame = XdpFrame::new(context.ctx);
    let hit = match hits(&frame, DIRECTION_IN, draw) {
        Ok(hit) => hit,
        Err(outcome) => {
            account.close(outcome);
            return XDP_PASS;
        }
    };

    let length = frame.length();
    let queue = context.rx_queue_index();
    let header = Header {
        magic: HEADER_MAGIC,
        original_len: length,
        // SAFETY: takes no argument and cannot fail.
        time_ns: unsafe { bpf_ktime_get_ns() },
        jobs: hit.jobs,
        queue: queue as u16,
        direction: DIRECTION_IN,
        generation: hit.generation,
        vlan: 0,
    };
    let outcome = if prepend(&context, &header) {
        // The two low bits are the verdict for a queue without a socket.
        // https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/bpf.h#L2884-L2887
        match SOCKETS.redirect(queue, u64::from(XDP_PASS)) {
            Ok(XDP_REDIRECT) => Outcome::Redirected,
            _ => Outcome::NoSocket,
        }
    } else {
        Outcome::NoHeader
    };
    account.close_hit(outcome, &hit, u64::from(length));
    if outcome == Outcome::Redirected { XDP_REDIRECT } else { XDP_PASS }
}

/// Copies hits into this CPU's ring, where a socket would get a copy, too, and passes everything else.
#[xdp(frags)]
#[inline(always)]
fn exclusive_copy(context: XdpContext) -> u32 {
    let queue = || Some(context.rx_queue_index());
    if take(&XdpFrame::new(context.ctx), DIRECTION_IN, queue) { XDP_DROP } else { XDP_PASS }
}

/// Puts the header in front of the packet: as metadata, or, where the driver keeps none, as the first
/// bytes of the frame.
#[inline(always)]
fn prepend(context: &XdpContext, header: &Header) -> bool {
    // SAFETY: the context is the program's own; the helper checks the room in front of the packet.
    if unsafe { bpf_xdp_adjust_meta(context.ctx, -(HEADER_LEN as i32)) } == 0 {
        return write(context.metadata(), context.metadata_end(), header);
    }
    prepend_to_data(context, header)
}

#[cold]
#[inline(always)]
fn prepend_to_data(context: &XdpContext, header: &Header) -> bool {
    #[cfg(feature = "log")]
    aya_log_ebpf::debug!(context, "the driver keeps no metadata; the header goes into the frame");
    // Only for a queue that has a socket: without one the frame goes on to the stack, which must not
    // see the header.
    if SOCKETS.get(context.rx_queue_index()).is_none() {
        return false;
    }
    // SAFETY: as in `prepend`.
    if unsafe { bpf_xdp_adjust_head(context.ctx, -(HEADER_LEN as i32)) } != 0 {
        return false;
    }
    write(context.data(), context.data_end(), header)
}

#[inline(always)]
fn write(start: usize, end: usize, header: &Header) -> bool {
    if start + HEADER_LEN > end {
        return false;
    }
    // SAFETY: the comparison above proves to the verifier that the bytes are the packet's. Metadata
    // is aligned to four bytes only.
    unsafe { (start as *mut Header).write_unaligned(*header) };
    true
}
