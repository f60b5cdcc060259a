//! What the kernel does with each packet, and what both sides of the kernel boundary must agree on.
//!
//! - [`abi`]: map names, and the layouts that cross the boundary
//! - [`parse`]: from a frame to the fields that a filter can ask for
//! - [`classify`]: from those fields to the set of jobs that want the packet
//!
//! The library is `no_std` and generic over where the bytes lie: the eBPF programs in `main.rs` and
//! the tests, fuzz targets and benches on the host run the same parser and the same classifier.
#![no_std]

pub mod abi;
pub mod classify;
pub mod parse;

#[cfg(not(target_arch = "bpf"))]
mod host;
#[cfg(not(target_arch = "bpf"))]
pub use host::{CAPTURE, GENERATOR};
