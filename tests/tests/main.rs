//! Every end-to-end test, in one binary: a module for each subject.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, with a line number")]

mod api;
mod capture;
mod cli;
mod faults;
mod harm;
mod harness;
mod limits;
mod property;
mod recorder;
mod sampling;
mod stages;
mod tap;
mod tap_verdict;
mod verdict;
