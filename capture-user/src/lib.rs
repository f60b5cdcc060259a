//! The capture engine: from the wire to a pcapng file.
//!
//! ```text
//!        exclusive: redirected
//!  NIC ── XDP program ──── AF_XDP ring ─┬─ worker ── buffer ── disk thread ── segment
//!   │     program.rs       socket.rs    │  worker.rs buffer.rs disk.rs        segment.rs
//!   │     filter.rs                     │  source.rs                          segment/pcapng.rs
//!   └──── tcx programs ─── BPF ring ────┘
//!        tap: copied       ring.rs
//! ```
//!
//! | who has a packet | until |
//! |---|---|
//! | the kernel program | it finds no job that wants it and passes it on, or redirects or copies it |
//! | the ring of a queue or CPU | the worker takes a batch off it |
//! | [`socket`] or [`ring`], where the kernel put it | the batch has been encoded; the memory goes back to the kernel |
//! | a buffer of the job's | the disk thread has written it, in the order of time if a file has several workers' packets (`merge.rs`); the buffer goes back to the worker |
//! | a hidden segment | it is sealed, and its name becomes visible |
//! | a [`spool`] | whoever was told of the segment has taken it away |
//! | the [`recorder`]'s folder | it is too old, or there is no room for it any more |
//!
//! The threads are described in [`engine`], which puts the parts together; what is counted, and the law
//! that it adds up, in [`stats`].

pub mod buffer;
mod capabilities;
pub mod clock;
pub mod commands;
mod disk;
pub mod engine;
pub mod error;
mod ethtool;
pub mod filter;
pub mod latency;
pub mod limits;
mod merge;
pub mod nic;
pub mod pace;
pub mod placement;
pub mod program;
pub mod recorder;
pub mod ring;
pub mod segment;
pub mod socket;
pub mod source;
pub mod spin;
pub mod spool;
pub mod stats;
pub mod sys;
mod uring;
mod worker;
