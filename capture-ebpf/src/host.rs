//! What only the host needs: the built kernel programs, and leave to copy the shared layouts.
//!
//! The objects are embedded, so that a user needs no eBPF toolchain. `cargo xtask ebpf` rebuilds
//! them; `cargo xtask ebpf --check` compares them byte by byte.

use crate::{
    abi::{Counters, Switch, generator},
    classify::Tables,
};

/// ELF headers are read in place, so the bytes must be as aligned as the widest field in them.
#[repr(C, align(32))]
struct Aligned<T: ?Sized>(T);

static CAPTURE_OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!("../bpf/capture.bpfel.o"));
static GENERATOR_OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!("../bpf/generator.bpfel.o"));

/// The capture programs (`src/main.rs`).
pub static CAPTURE: &[u8] = &CAPTURE_OBJECT.0;

/// The load generator of the tests and benches (`src/bin/generator.rs`).
pub static GENERATOR: &[u8] = &GENERATOR_OBJECT.0;

// SAFETY: `repr(C)`, made of integers only, and without padding (the size asserts beside each type).
unsafe impl aya::Pod for Counters {}
// SAFETY: as above.
unsafe impl aya::Pod for Switch {}
// SAFETY: as above.
unsafe impl aya::Pod for Tables {}
// SAFETY: as above.
unsafe impl aya::Pod for generator::Config {}
