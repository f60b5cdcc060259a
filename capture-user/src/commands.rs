//! The commands of `tapline`: of each, what was typed and what is done about it.

pub mod capture;
pub mod doctor;
pub mod filter;
pub mod interfaces;
mod parse;
pub mod query;
