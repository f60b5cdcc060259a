//! Netlink requests, and the attributes of their answers.
//!
//! Answers are read attribute by attribute, and what is not needed is skipped. The typed messages
//! of netlink-packet-route are not used: they decode every attribute or none, so an interface with
//! something they do not know (a new kernel's, a rare driver's) could not be captured from.
//! <https://github.com/rust-netlink/netlink-packet-route/issues/151>

use std::io;

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr};

/// A dump that was interrupted by a change is not a picture of any one moment; it is made again,
/// this often at most, since a busy host may always be changing something.
const DUMPS: usize = 4;

/// A connection to one of the kernel's netlink protocols, in this thread's network namespace.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Lets a dump be narrowed by attributes. Kernels before 4.20 send everything, so every
        // caller checks what it gets.
        // https://github.com/gregkh/linux/blob/v6.12.117/net/ipv4/fib_frontend.c#L924-L999
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks for one object.
    pub(super) fn get(&mut self, kind: u16, body: &[u8]) -> io::Result<Vec<u8>> {
        self.send(kind, NLM_F_REQUEST, body)?;
        loop {
            if let Some(answer) = self.receive()?.answers.pop() {
                return Ok(answer);
            }
        }
    }

    /// Asks for all objects and keeps what `parse` makes of them.
    pub(super) fn dump<T>(
        &mut self,
        kind: u16,
        body: &[u8],
        parse: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let mut objects = Vec::new();
        for _ in 0..DUMPS {
            objects.clear();
            self.send(kind, NLM_F_REQUEST | NLM_F_DUMP, body)?;
            let mut interrupted = false;
            loop {
                let batch = self.receive()?;
                objects.extend(batch.answers.iter().filter_map(|answer| parse(answer)));
                interrupted |= batch.interrupted;
                if batch.done {
                    break;
                }
            }
            if !interrupted {
                break;
            }
        }
        Ok(objects)
    }

    fn send(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(Raw::new(kind, body)));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    fn receive(&mut self) -> io::Result<Batch> {
        let (datagram, _) = self.socket.recv_from_full()?;
        read(&datagram, self.sequence)
    }
}

/// What one datagram held.
#[derive(Debug, Default, PartialEq, Eq)]
struct Batch {
    answers: Vec<Vec<u8>>,
    done: bool,
    interrupted: bool,
}

/// Reads the messages of a datagram that answer request number `sequence`.
fn read(mut datagram: &[u8], sequence: u32) -> io::Result<Batch> {
    let mut batch = Batch::default();
    while !datagram.is_empty() {
        let length = NetlinkBuffer::new_checked(datagram).map_err(io::Error::other)?.length();
        let message = NetlinkMessage::<Raw>::deserialize(datagram).map_err(io::Error::other)?;
        let padded = (length as usize).next_multiple_of(4).min(datagram.len());
        datagram = &datagram[padded..];
        if message.header.sequence_number != sequence {
            continue;
        }
        batch.interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
        match message.payload {
            NetlinkPayload::InnerMessage(raw) => batch.answers.push(raw.body),
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
            NetlinkPayload::Done(_) => batch.done = true,
            _ => {}
        }
    }
    Ok(batch)
}

/// A message whose content is left to the caller.
#[derive(Clone, Debug)]
struct Raw {
    kind: u16,
    body: Vec<u8>,
}

impl Raw {
    fn new(kind: u16, body: &[u8]) -> Self {
        Self { kind, body: body.to_vec() }
    }
}

impl From<Raw> for NetlinkPayload<Raw> {
    fn from(raw: Raw) -> Self {
        Self::InnerMessage(raw)
    }
}

impl NetlinkSerializable for Raw {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.body);
    }
}

impl NetlinkDeserializable for Raw {
    type Error = std::convert::Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self::new(header.message_type, payload))
    }
}

/// The attributes in `bytes`, up to the first that is cut off.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(Result::ok).map(|attribute| {
        let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
        (kind, &attribute.into_inner()[4..length])
    })
}

/// Appends an attribute.
pub(super) fn push(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = 4 + value.len() as u16;
    body.extend(length.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The 32-bit number in an attribute or at the start of a body.
pub(super) fn u32_of(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// An attribute that is 64 bits wide, or 32 when it needs no more (the kernel's `uint`).
pub(super) fn uint_of(value: &[u8]) -> Option<u64> {
    match value.first_chunk() {
        Some(bytes) => Some(u64::from_ne_bytes(*bytes)),
        None => u32_of(value).map(u64::from),
    }
}

/// The text in an attribute, without its zero byte.
pub(super) fn text_of(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = (16 + body.len() as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_datagram_is_read_up_to_its_end() {
        let mut datagram = message(16, 2, 7, b"first");
        datagram.extend(message(16, 2 | NLM_F_DUMP_INTR, 7, b"second"));
        datagram.extend(message(16, 2, 6, b"of an older request"));
        datagram.extend(message(3, 2, 7, &0_i32.to_ne_bytes()));
        let batch = read(&datagram, 7).unwrap();
        assert_eq!(batch.answers, [&b"first"[..], b"second"]);
        assert!(batch.done && batch.interrupted);
    }

    #[test]
    fn an_error_message_is_an_error() {
        let mut body = (-libc::ENODEV).to_ne_bytes().to_vec();
        body.extend([0; 16]);
        let error = read(&message(2, 0, 7, &body), 7).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn a_cut_off_datagram_is_an_error() {
        let datagram = message(16, 2, 7, b"first");
        assert!(read(&datagram[..datagram.len() - 4], 7).is_err());
        assert!(read(&datagram[..8], 7).is_err());
    }

    #[test]
    fn attributes_come_back_as_they_were_pushed() {
        let mut body = Vec::new();
        push(&mut body, 3, b"eth0\0");
        push(&mut body, 4 | 0x8000, &1500_u32.to_ne_bytes());
        push(&mut body, 5, &[]);
        let read: Vec<_> = attributes(&body).collect();
        assert_eq!(read, [(3, &b"eth0\0"[..]), (4, &1500_u32.to_ne_bytes()), (5, &[])]);
        assert_eq!(text_of(read[0].1), "eth0");
        assert_eq!(u32_of(read[1].1), Some(1500));
        assert_eq!(attributes(&body[..body.len() - 6]).count(), 1);
    }

    #[test]
    fn numbers_have_the_width_they_came_with() {
        assert_eq!(uint_of(&7_u32.to_ne_bytes()), Some(7));
        assert_eq!(uint_of(&(7_u64 << 32).to_ne_bytes()), Some(7 << 32));
        assert_eq!(uint_of(&[1, 2]), None);
        assert_eq!(u32_of(&[1, 2]), None);
    }
}
