//! Simple captures: packets that have passed, out of what the recorder has.

mod record;

pub use self::record::{PcapSimple, SimpleKind, SimpleRecord};
