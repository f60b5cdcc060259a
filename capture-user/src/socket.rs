//! One receive queue's `AF_XDP` socket, and all that touches its memory.
//!
//! Who owns a frame when:
//! - in the fill ring, the kernel;
//! - between `consume` and `produce` in [`receive`](Socket::receive), this module, which lends its
//!   bytes to a closure;
//! - `held`, the leading frames of a packet whose other frames were not on the ring yet.
//!
//! A frame never leaves this module, so none can be used twice or after it was given back. All frames
//! fit in the fill ring, so giving back cannot fail.

use std::{
    ffi::{CString, NulError},
    io,
    num::NonZeroU32,
    os::fd::{AsRawFd as _, BorrowedFd, RawFd},
    ptr,
    time::Duration,
};

use capture_ebpf::abi::{HEADER_LEN, HEADER_MAGIC, Header};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use thiserror::Error;
use xsk_rs::{
    CompQueue, FillQueue, FrameDesc, RxQueue, Socket as XskSocket, TxQueue, Umem,
    config::{
        BindFlags, FrameSize, Interface, LibxdpFlags, QueueSize, SocketConfig as XskConfig,
        UmemConfig,
    },
    socket::SocketCreateError,
    umem::UmemCreateError,
};

use crate::{
    source::{Received, Source, SourceCounters, Wake},
    sys,
};

/// Frames taken off the RX ring at once. Large enough to spread the cost of the ring's shared indices,
/// small enough that the frames stay in the first-level cache until they are encoded.
const BATCH: usize = 64;

/// How many frames ahead of the one that is encoded the memory is asked for.
const AHEAD: usize = 8;

/// Length of a cache line, bytes.
const LINE: usize = 64;

/// Room in front of the frames' own headroom, so that the kernel program's header begins a pair of cache
/// lines, and a short packet ends in the same pair: processors fetch both at once.
const HEADROOM: u32 = HEADER_LEN as u32;

/// Most frames of one packet: the kernel's `MAX_SKB_FRAGS` and the first.
/// <https://github.com/torvalds/linux/blob/v6.6/include/linux/skbuff.h#L356-L361>
const MAX_PARTS: usize = 18;

const _: () = assert!(BATCH > MAX_PARTS, "a batch holds at least one whole packet");

/// Whether the driver writes packets straight into UMEM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ZeroCopy {
    /// Where the driver can.
    #[default]
    Auto,
    /// Or fail.
    On,
    /// Never: the kernel copies each packet.
    Off,
}

/// Preferred busy polling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BusyPoll {
    /// Longest time that one system call polls, microseconds.
    pub micros: u32,
    /// Most packets per poll.
    pub budget: u32,
}

/// How a queue's socket is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SocketConfig {
    /// RX ring entries, a power of two. A longer ring rides out longer pauses of the worker and takes
    /// more cache.
    pub ring_size: u32,
    /// UMEM frame size, bytes: 2048 or 4096. The kernel keeps 256 of them for itself.
    pub frame_size: u32,
    /// UMEM frames. At least twice the ring, so that the ring is full before frames run out.
    pub frames: u32,
    /// Zero-copy.
    pub zero_copy: ZeroCopy,
    /// Let the kernel say when it wants to be woken instead of polling for frames itself.
    pub need_wakeup: bool,
    /// UMEM on huge pages, or not at all. Otherwise it lies on them where enough are free.
    pub huge_pages: bool,
    /// Preferred busy polling.
    pub busy_poll: Option<BusyPoll>,
}

impl Default for SocketConfig {
    fn default() -> Self {
        Self {
            ring_size: 4096,
            frame_size: 2048,
            frames: 4096,
            zero_copy: ZeroCopy::Auto,
            need_wakeup: true,
            huge_pages: false,
            busy_poll: None,
        }
    }
}

/// A socket could not be opened.
#[derive(Debug, Error)]
pub enum SocketError {
    /// A setting is out of range.
    #[error("{name} is {value}, but must be {limit}")]
    Config {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: u32,
        /// What it must be.
        limit: &'static str,
    },
    /// UMEM could not be made.
    #[error(
        "no UMEM of {frames} frames of {frame_size} bytes for queue {queue} of {interface}{hint}"
    )]
    Umem {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
        /// Frames asked for.
        frames: u32,
        /// Their size, bytes.
        frame_size: u32,
        /// What may be the matter.
        hint: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The socket could not be bound.
    #[error("no AF_XDP socket on queue {queue} of {interface}{hint}")]
    Bind {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
        /// What may be the matter.
        hint: &'static str,
        /// What the kernel said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An option was refused.
    #[error("the kernel refused preferred busy polling on queue {queue} (added in Linux 5.11)")]
    BusyPoll {
        /// The queue.
        queue: u32,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl SocketConfig {
    /// Whether the settings fit together.
    pub fn check(&self) -> Result<(), SocketError> {
        let wrong = |name, value, limit| Err(SocketError::Config { name, value, limit });
        if !self.ring_size.is_power_of_two() || !(64..=65536).contains(&self.ring_size) {
            return wrong("ring size", self.ring_size, "a power of two from 64 to 65536");
        }
        if !matches!(self.frame_size, 2048 | 4096) {
            return wrong("UMEM frame size", self.frame_size, "2048 or 4096 bytes");
        }
        if !self.frames.is_power_of_two() || self.frames < self.ring_size || self.frames > 1 << 20 {
            return wrong(
                "number of UMEM frames",
                self.frames,
                "a power of two, at least the ring size and at most 1048576",
            );
        }
        Ok(())
    }
}

/// An `AF_XDP` socket with a UMEM of its own.
pub struct Socket {
    rx: RxQueue,
    fill: FillQueue,
    umem: Umem,
    batch: [FrameDesc; BATCH],
    held: usize,
    /// Kernel time of the newest packet so far.
    newest_ns: u64,
    zero_copy: bool,
    multi_buffer: bool,
    /// See [`Source::entries`]: what polls busily gets packets by asking only.
    entries: usize,
    // Never used, but the socket goes when its queues do.
    _tx: TxQueue,
    _completion: CompQueue,
}

impl Socket {
    /// Opens a socket on a receive queue and gives all its frames to the kernel.
    pub fn open(interface: &str, queue: u32, config: &SocketConfig) -> Result<Self, SocketError> {
        config.check()?;
        let mut common = BindFlags::empty();
        common.set(BindFlags::XDP_USE_NEED_WAKEUP, config.need_wakeup);
        match config.zero_copy {
            ZeroCopy::Auto => {}
            ZeroCopy::On => common |= BindFlags::XDP_ZEROCOPY,
            ZeroCopy::Off => common |= BindFlags::XDP_COPY,
        }

        let mut last = None;
        // Kernels before 6.6 do not know `XDP_USE_SG` and refuse the flag.
        for split in [BindFlags::XDP_USE_SG, BindFlags::empty()] {
            match Self::bind(interface, queue, config, common | split) {
                Err(error @ SocketError::Bind { .. }) => last = last.or(Some(error)),
                other => return other,
            }
        }
        Err(last.expect("at least one attempt was made"))
    }

    fn bind(
        interface: &str,
        queue: u32,
        config: &SocketConfig,
        flags: BindFlags,
    ) -> Result<Self, SocketError> {
        let no_umem = |hint, source| SocketError::Umem {
            interface: interface.into(),
            queue,
            frames: config.frames,
            frame_size: config.frame_size,
            hint,
            source,
        };
        let umem_error = |source: Box<dyn std::error::Error + Send + Sync>| no_umem("", source);
        let umem_config = UmemConfig::builder()
            .frame_size(FrameSize::new(config.frame_size).map_err(|e| umem_error(e.into()))?)
            .fill_queue_size(QueueSize::new(config.frames).map_err(|e| umem_error(e.into()))?)
            .frame_headroom(HEADROOM)
            .comp_queue_size(QueueSize::new(64).map_err(|e| umem_error(e.into()))?)
            .build()
            .map_err(|e| umem_error(e.into()))?;
        let frames = NonZeroU32::new(config.frames).expect("checked to be a power of two");
        let huge = (!config.huge_pages
            && are_free(u64::from(config.frames) * u64::from(config.frame_size)))
        .then(|| Umem::new(umem_config, frames, true).ok())
        .flatten();
        let (umem, descs) = match huge {
            Some(made) => made,
            None => Umem::new(umem_config, frames, config.huge_pages)
                .map_err(|e| no_umem(umem_hint(&e, config.huge_pages), chain(&e).into()))?,
        };

        let bind_error =
            |hint, source| SocketError::Bind { interface: interface.into(), queue, hint, source };
        let socket_config = XskConfig::builder()
            .rx_queue_size(QueueSize::new(config.ring_size).map_err(|e| umem_error(e.into()))?)
            .tx_queue_size(QueueSize::new(64).map_err(|e| umem_error(e.into()))?)
            // The XDP program is ours, not libxdp's.
            .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
            .bind_flags(flags)
            .build();
        let name = padded(interface).map_err(|e| bind_error("", e.into()))?;
        // SAFETY: the UMEM is new, so no other socket shares its rings.
        let opened = unsafe { XskSocket::new(socket_config, &umem, &Interface::new(name), queue) };
        let (tx, rx, rings) = opened.map_err(|e| bind_error(bind_hint(&e), chain(&e).into()))?;
        let (mut fill, completion) = rings.expect("the first socket of a UMEM gets its rings");

        // SAFETY: the frames are this UMEM's, and nobody else has them.
        let given = unsafe { fill.produce(&descs) };
        assert_eq!(given, descs.len(), "all frames fit in the fill ring");

        // SAFETY: the socket outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(rx.fd().as_raw_fd()) };
        if let Some(BusyPoll { micros, budget }) = config.busy_poll {
            sys::prefer_busy_poll(fd, micros, budget)
                .map_err(|source| SocketError::BusyPoll { queue, source })?;
        }
        let zero_copy = sys::is_zero_copy(fd).unwrap_or(false);
        Ok(Self {
            rx,
            fill,
            umem,
            batch: [FrameDesc::default(); BATCH],
            held: 0,
            newest_ns: 0,
            zero_copy,
            multi_buffer: flags.contains(BindFlags::XDP_USE_SG),
            entries: if config.busy_poll.is_some() { 0 } else { config.ring_size as usize },
            _tx: tx,
            _completion: completion,
        })
    }

    /// The descriptor that the kernel's socket map wants.
    pub fn as_raw_fd(&self) -> RawFd {
        self.rx.fd().as_raw_fd()
    }

    /// Whether the driver writes straight into UMEM.
    pub fn zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Whether packets longer than a frame arrive, in several.
    pub fn multi_buffer(&self) -> bool {
        self.multi_buffer
    }

    /// The bytes of a frame that this module owns.
    fn bytes(&self, frame: &FrameDesc) -> &[u8] {
        // SAFETY: the descriptor came from this UMEM's RX ring and has not been given back, so it
        // lies inside the UMEM and the kernel leaves it alone.
        let data = unsafe { self.umem.data(frame) };
        // The lifetime is the UMEM's; `Data` only borrows from it.
        let (start, len) = (data.contents().as_ptr(), data.contents().len());
        // SAFETY: the same bytes, for as long as `self` is borrowed: frames are given back through
        // `&mut self` only.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// Asks for the first bytes of a frame, and the header in front of them: another CPU has written them,
    /// and to fetch them takes as long as to encode some packets.
    #[inline]
    fn prefetch(&self, frame: &FrameDesc) {
        let start = self.bytes(frame).as_ptr();
        sys::prefetch(start.wrapping_sub(HEADER_LEN));
        sys::prefetch(start.wrapping_add(LINE - HEADER_LEN));
    }

    /// The kernel program's header in front of a packet, and the packet's bytes behind it. `newest_ns` is
    /// the time of the packet before.
    #[inline]
    fn split(data: &[u8], newest_ns: u64) -> (Header, &[u8]) {
        let at = data.as_ptr().expose_provenance() - HEADER_LEN;
        let metadata = ptr::with_exposed_provenance::<Header>(at);
        // SAFETY: `HEADER_LEN` bytes in front of a packet lie in the frame's headroom, which is 256
        // bytes and belongs to the frame. Any bytes are a valid `Header`.
        let header = unsafe { metadata.read_unaligned() };
        if header.magic == HEADER_MAGIC && header.time_ns > newest_ns {
            return (header, data);
        }
        Self::split_odd(header, data, newest_ns)
    }

    /// Without metadata, the header is in the frame itself, and what is in front of it is an earlier
    /// packet's, with an earlier time. It is not wiped out when it is read: the frame would have to come
    /// back to the kernel's CPU for each packet.
    #[cold]
    fn split_odd(metadata: Header, data: &[u8], newest_ns: u64) -> (Header, &[u8]) {
        if let Some((front, rest)) = data.split_first_chunk::<HEADER_LEN>() {
            // SAFETY: 32 readable bytes, any of which are a valid `Header`.
            let header = unsafe { front.as_ptr().cast::<Header>().read_unaligned() };
            if header.magic == HEADER_MAGIC && header.time_ns >= newest_ns {
                return (header, rest);
            }
        }
        // Clocks of two CPUs may be a little apart.
        let known = metadata.magic == HEADER_MAGIC;
        (if known { metadata } else { Header::default() }, data)
    }
}

impl Source for Socket {
    const WAKES: bool = true;

    fn entries(&self) -> usize {
        self.entries
    }

    #[inline]
    fn receive(&mut self, mut each: impl FnMut(&Received<'_>)) -> usize {
        let fresh = &mut self.batch[self.held..];
        // SAFETY: the socket and the UMEM are of one making.
        let taken = unsafe { self.rx.consume(fresh) };
        if taken == 0 {
            if self.fill.needs_wakeup() {
                self.kick();
            }
            return 0;
        }
        let have = self.held + taken;
        let mut done = 0;
        let mut newest_ns = self.newest_ns;
        for frame in &self.batch[self.held..have.min(self.held + AHEAD)] {
            self.prefetch(frame);
        }
        while done < have {
            let first = &self.batch[done];
            if done + AHEAD < have {
                self.prefetch(&self.batch[done + AHEAD]);
            }
            if !first.has_more_frames() {
                let (header, data) = Self::split(self.bytes(first), newest_ns);
                newest_ns = newest_ns.max(header.time_ns);
                each(&Received { header: &header, data, rest: &[] });
                done += 1;
                continue;
            }
            let Some(more) =
                self.batch[done..have].iter().position(|frame| !frame.has_more_frames())
            else {
                break;
            };
            let mut parts: [&[u8]; BATCH] = [&[]; BATCH];
            for (part, frame) in parts.iter_mut().zip(&self.batch[done + 1..=done + more]) {
                *part = self.bytes(frame);
            }
            let (header, data) = Self::split(self.bytes(first), newest_ns);
            newest_ns = newest_ns.max(header.time_ns);
            each(&Received { header: &header, data, rest: &parts[..more] });
            done += more + 1;
        }
        // SAFETY: these frames came from the RX ring of this UMEM, their bytes are lent to nobody any
        // more, and each is given back once.
        let given = unsafe { self.fill.produce(&self.batch[..done]) };
        debug_assert_eq!(given, done, "all frames fit in the fill ring");
        self.batch.copy_within(done..have, 0);
        self.held = have - done;
        self.newest_ns = newest_ns;
        if self.fill.needs_wakeup() {
            self.kick();
        }
        taken
    }

    fn backlog(&mut self) -> usize {
        self.rx.nb_avail_exact() as usize
    }

    fn wait(&mut self, other: BorrowedFd<'_>, timeout: Duration) -> io::Result<Wake> {
        // SAFETY: the socket outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(self.rx.fd().as_raw_fd()) };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN), PollFd::new(other, PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let failed = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        if fds[0].revents().is_some_and(|events| events.intersects(failed)) {
            // The kernel's word for an interface that was removed.
            // https://github.com/torvalds/linux/blob/v6.6/net/xdp/xsk.c#L1458-L1478
            return Ok(Wake::Gone);
        }
        if fds[1].any().unwrap_or(false) {
            return Ok(Wake::Called);
        }
        Ok(Wake::Look)
    }

    fn counters(&self) -> io::Result<SourceCounters> {
        let statistics = self.rx.fd().xdp_statistics()?;
        Ok(SourceCounters {
            ring_full: statistics.rx_ring_full(),
            dropped: statistics.rx_dropped(),
            fill_empty: statistics.rx_fill_ring_empty_descs(),
            invalid: statistics.rx_invalid_descs(),
        })
    }
}

impl Socket {
    /// Makes the kernel look at the fill ring.
    #[cold]
    fn kick(&mut self) {
        if let Err(error) = self.rx.poll(0) {
            log::debug!("waking the kernel: {error}");
        }
    }
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket")
            .field("zero_copy", &self.zero_copy)
            .field("multi_buffer", &self.multi_buffer)
            .finish_non_exhaustive()
    }
}

/// An interface's name of the length that libxdp copies, however short it is: what follows a colon, the
/// kernel takes for the label of an address and cuts off.
///
/// - `xsk_create_ctx` in <https://github.com/xdp-project/xdp-tools/blob/v1.6.0/lib/libxdp/xsk.c>
/// - `dev_ioctl` in <https://github.com/torvalds/linux/blob/v6.6/net/core/dev_ioctl.c>
fn padded(interface: &str) -> Result<CString, NulError> {
    const WIDTH: usize = libc::IFNAMSIZ - 1;
    CString::new(format!("{interface::<WIDTH$}"))
}

/// xsk-rs keeps the operating system's word in the source.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn errno(error: &dyn std::error::Error) -> Option<i32> {
    error.source()?.downcast_ref::<io::Error>()?.raw_os_error()
}

/// Why neither of the two can be had.
fn hint(code: i32) -> &'static str {
    match code {
        libc::EPERM => ": it needs CAP_NET_RAW (or root)",
        libc::EAFNOSUPPORT => ": this kernel is built without AF_XDP (CONFIG_XDP_SOCKETS)",
        _ => "",
    }
}

/// Whether so many bytes of reserved huge pages are free, which they fill up.
fn are_free(bytes: u64) -> bool {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    HugePages::read(&meminfo).is_some_and(|pages| {
        let size = pages.size_kib << 10;
        size > 0 && bytes.is_multiple_of(size) && pages.free * size >= bytes
    })
}

/// The reserved huge pages of the usual size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages {
    /// How many nobody has.
    pub free: u64,
    /// Size of one, KiB.
    pub size_kib: u64,
}

impl HugePages {
    /// Reads `/proc/meminfo`.
    pub fn read(meminfo: &str) -> Option<Self> {
        let number = |key| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()?.parse().ok()
        };
        Some(Self { free: number("HugePages_Free:")?, size_kib: number("Hugepagesize:")? })
    }
}

fn umem_hint(error: &UmemCreateError, huge_pages: bool) -> &'static str {
    match errno(error) {
        Some(libc::ENOBUFS) => {
            ": it is more than this user may lock in memory; give CAP_IPC_LOCK, or raise the limit \
             (`ulimit -l unlimited`)"
        }
        Some(libc::ENOMEM) if huge_pages => {
            ": too few huge pages are free; reserve them (`sudo sysctl vm.nr_hugepages=N`)"
        }
        code => code.map_or("", hint),
    }
}

fn bind_hint(error: &SocketCreateError) -> &'static str {
    match errno(error) {
        Some(libc::EBUSY) => ": another AF_XDP socket has the queue",
        Some(libc::EOPNOTSUPP) => ": the driver has no zero-copy; use `--zero-copy auto`",
        code => code.map_or("", hint),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_as_long_as_what_libxdp_copies() {
        for (name, want) in [("lo", "lo:::::::::::::"), ("a-name-of-15-by", "a-name-of-15-by")] {
            assert_eq!(padded(name).unwrap().to_str(), Ok(want));
        }
        assert!(padded("eth\0").is_err());
    }
}
