//! The `tap` path: copies hits into this CPU's ring and lets every packet go on.

use aya_ebpf::{
    bindings::{TC_ACT_UNSPEC, xdp_action::XDP_PASS},
    macros::{classifier, xdp},
    programs::{TcContext, XdpContext},
};
use capture_ebpf::abi::{DIRECTION_IN, DIRECTION_OUT};

use super::{
    frame::{Skb, XdpFrame},
    ring::take,
};

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
    take(&Skb::new(context.skb.skb), direction, || None);
    // The packet goes on to the next program, or the stack: with tcx this is `TCX_NEXT`.
    // https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/bpf.h#L6313-L6320
    TC_ACT_UNSPEC
}

/// What `tap_ingress` does, for frames as they are before GRO.
#[xdp(frags)]
#[inline(always)]
fn tap_xdp(context: XdpContext) -> u32 {
    take(&XdpFrame::new(context.ctx), DIRECTION_IN, || None);
    XDP_PASS
}
