//! The harness of the end-to-end tests: what they set up, drive and read back.
//!
//! - [`privilege`]: a test that needs root is skipped aloud without it
//! - [`netns`], [`veth`]: guards for network namespaces and veth pairs of the test's own
//! - [`frames`]: frames, well-formed and not
//! - [`kernel`]: the kernel program on single frames, through `BPF_PROG_TEST_RUN`
//! - [`generator`], [`inject`]: frames into a veth pair, fast or one by one
//! - [`pcapng`]: what a capture file holds
//! - [`capture`]: `tapline capture` at work, and its summary
//! - [`daemon`]: `taplined` at work, and a plain HTTP client
//! - [`tap`]: the same on the `tap` path, and what is attached to an interface
//! - [`disk`]: a disk that is soon full
//! - [`fetch`]: software of others, from its registries
//! - [`store`], [`proxy`]: object stores of others, and what can go wrong on the way to them
//! - [`traffic`]: streams and requests of others' programs
//! - [`process`]: `tapline` and other programs; waiting
//!
//! Everything here panics instead of returning an error: a panic names the line.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test's harness fails by panicking, with a line number")]

pub mod capture;
pub mod daemon;
pub mod disk;
pub mod fetch;
pub mod frames;
pub mod generator;
pub mod inject;
pub mod kernel;
pub mod netns;
pub mod pcapng;
pub mod privilege;
pub mod process;
pub mod proxy;
pub mod store;
pub mod tap;
pub mod traffic;
pub mod veth;
