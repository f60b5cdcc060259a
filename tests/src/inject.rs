//! Frames of any kind and length into an end of a veth pair, one by one through a packet socket.

use pcap::{Active, Capture};

use crate::veth::End;

/// Sends what it is given, as it is.
pub struct Injector {
    handle: Capture<Active>,
}

impl Injector {
    /// An injector that sends out of `end`.
    pub fn new(end: &End<'_>) -> Self {
        let handle = end.namespace.enter(|| {
            let device = Capture::from_device(end.name.as_str()).unwrap();
            device.snaplen(1).immediate_mode(true).open().unwrap()
        });
        Self { handle }
    }

    /// Sends one frame.
    pub fn send(&mut self, frame: &[u8]) {
        self.handle.sendpacket(frame).unwrap();
    }
}

impl std::fmt::Debug for Injector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Injector").finish_non_exhaustive()
    }
}
