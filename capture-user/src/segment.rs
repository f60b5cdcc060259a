//! Segments: pcapng files that are hidden until they are whole.
//!
//! - A segment is written as `.NAME.part` beside its place. When it is complete it gets its statistics
//!   blocks, is synced, and is renamed to `NAME`; then its folder is synced. A visible name is always a
//!   whole file, also after a crash.
//! - A write that fails is cut back to the last whole block. What is whole is kept and made visible;
//!   what was lost is counted.
//! - Large buffers go to the disk past the page cache, small ones through it: `segment/file.rs`.
//! - A stream (standard output, a FIFO) has no name to hide: it gets the same blocks as they come.

mod blocks;
pub mod export;
mod file;
pub(crate) mod hidden;
mod io;
mod once;
pub mod pcapng;
pub mod read;
mod recover;
mod writer;

pub use blocks::{InterfaceLabel, StreamTotals};
pub use io::DiskUse;
pub(crate) use io::Io;
pub use once::Once;
pub use recover::{recover, recover_folder, survey};
pub use writer::{Rotation, SegmentError, SegmentInfo, Target};
pub(crate) use writer::{Run, Writer};
