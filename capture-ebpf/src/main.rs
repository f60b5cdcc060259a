//! The kernel programs: parse, classify, sample, hand over, count.
//!
//! `exclusive` is an XDP program: a hit goes to the `AF_XDP` socket of its receive queue, with a
//! [`Header`](capture_ebpf::abi::Header) in front; everything else is passed on untouched. `exclusive_copy` copies
//! hits into rings instead, and the `tap` programs do so and pass hits on, too.
//!
//! On the host this is an empty `main`, so that plain cargo commands work without an eBPF toolchain.
#![cfg_attr(
    target_arch = "bpf",
    no_std,
    no_main,
    feature(core_intrinsics),
    expect(internal_features, reason = "no stable function makes an exchange for this target")
)]

#[cfg(target_arch = "bpf")]
mod kernel;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
