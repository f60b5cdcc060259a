//! `taplined`: the PCAPs API over the capture engine.
//!
//! ```text
//!  client ── server.rs ── http.rs ── routes.rs ── routes/* ── captures.rs ── capture_user::engine
//!            TLS, limits  id, log,   the whole    decode,      │
//!            shutdown     time       surface      call,        ├─ store.rs: what is remembered
//!                                                 encode       └─ destination: files
//! ```
//!
//! | a request for a capture | is in |
//! |---|---|
//! | is let in | [`auth`] |
//! | is read, with everything that is wrong with it | [`request`], [`destination`], [`colo`] |
//! | may be written where it wants to | [`ownership`], with [`secrets`] |
//! | becomes a job of the engine, and a record | [`captures`], [`store`] |
//! | is answered out of what was recorded | [`simple`] |
//! | is delivered, or downloaded | [`upload`], [`download`] |
//! | is answered | [`record`], [`envelope`] |
//! | is refused | [`error`], the one place where errors become HTTP |
//!
//! A walk through `POST …/pcaps`: the connection's task reads the request within its limits; `caller`
//! finds out whose it is; the handler reads the body and goes on on a thread that may block. There the
//! record is written, the engine starts the job, and the answer is sent: from then on every matching
//! packet is captured. A thread of the capture's own waits for its end and writes the record again.
#![forbid(unsafe_code)]

pub mod auth;
pub mod captures;
pub mod colo;
pub mod config;
pub mod destination;
pub mod download;
pub mod envelope;
pub mod error;
pub mod http;
pub mod id;
pub mod metrics;
pub mod openapi;
pub mod ownership;
pub mod record;
pub mod request;
pub mod routes;
pub mod secrets;
pub mod server;
pub mod simple;
pub mod store;
pub mod upload;
