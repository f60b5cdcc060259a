//! The few system calls, and the one hint to the processor, that no safe crate offers. With [`crate::socket`] the only `unsafe` here.

use std::{
    io,
    mem::size_of,
    num::NonZeroUsize,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::Arc,
};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

/// Size of a huge page where it is not another, bytes: on x86-64, and on arm64 with 4 KiB pages.
const HUGE: usize = 2 << 20;

/// A mapping of zeros, of which [`Part`]s are.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length; the memory itself is reached through parts only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `parts` with this length; each part holds the mapping, so there is none left.
        let _: nix::Result<()> = unsafe { munmap(self.start.cast(), self.len) };
    }
}

/// A part of a mapping, which nobody else has.
pub(crate) struct Part {
    start: NonNull<u8>,
    len: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: the memory is this value's alone, and any thread may use it.
unsafe impl Send for Part {}
// SAFETY: a shared reference only reads.
unsafe impl Sync for Part {}

impl Part {
    #[inline]
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `parts` cut this range for this value alone; the mapping outlives it, and was zeroed.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    #[inline]
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`; who has `self` for writing has the range.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Part").field("len", &self.len).finish_non_exhaustive()
    }
}

/// `count` parts of `size` bytes, a multiple of the page size, one after the other: in huge pages, if the
/// kernel has them, as each is a single entry of the TLB, and a single piece for the disk.
///
/// <https://docs.kernel.org/admin-guide/mm/transhuge.html>
pub(crate) fn parts(count: usize, size: usize) -> io::Result<Vec<Part>> {
    let bytes = count * size;
    // Room to begin where a huge page does; what is never touched takes no memory.
    let len = NonZeroUsize::new(bytes + HUGE).ok_or(io::ErrorKind::InvalidInput)?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice replaces none.
    let start =
        unsafe { mmap_anonymous(None, len, protection, MapFlags::MAP_PRIVATE) }?.cast::<u8>();
    let mapping = Arc::new(Mapping { start, len: len.get() });
    let skip = start.as_ptr().align_offset(HUGE).min(HUGE);
    // SAFETY: `skip` is at most what was mapped beyond `bytes`.
    let first = unsafe { start.add(skip) };
    if bytes >= HUGE {
        // SAFETY: in the mapping, which nobody uses yet; advice changes no content.
        if let Err(error) = unsafe { madvise(first.cast(), bytes, MmapAdvise::MADV_HUGEPAGE) } {
            log::debug!("no huge pages: {error}");
        }
    }
    let part = |at| Part {
        // SAFETY: `count * size` bytes lie behind `first`.
        start: unsafe { first.add(at * size) },
        len: size,
        _mapping: Arc::clone(&mapping),
    };
    Ok((0..count).map(part).collect())
}

/// Makes this socket's reader drive the driver's NAPI context itself instead of waiting for
/// interrupts, `budget` packets at a time and for up to `micros`.
///
/// <https://docs.kernel.org/networking/napi.html#busy-polling>
///
/// # Minimum kernel version
///
/// 5.11
pub fn prefer_busy_poll(socket: BorrowedFd<'_>, micros: u32, budget: u32) -> io::Result<()> {
    set_option(socket, libc::SO_PREFER_BUSY_POLL, 1)?;
    set_option(socket, libc::SO_BUSY_POLL, micros)?;
    set_option(socket, libc::SO_BUSY_POLL_BUDGET, budget)
}

fn set_option(socket: BorrowedFd<'_>, option: libc::c_int, value: u32) -> io::Result<()> {
    // SAFETY: the value outlives the call, and the length given is its own.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether an `AF_XDP` socket was bound with zero-copy.
///
/// # Minimum kernel version
///
/// 5.3
pub fn is_zero_copy(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut options: u32 = 0;
    let mut length = size_of::<u32>() as libc::socklen_t;
    // SAFETY: `options` and `length` are ours, outlive the call, and agree on the size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            libc::XDP_OPTIONS,
            (&raw mut options).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(options & libc::XDP_OPTIONS_ZEROCOPY != 0)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Lets the calling thread go before others: its nice value, of which Linux has one per thread.
///
/// <https://man7.org/linux/man-pages/man2/setpriority.2.html>
pub(crate) fn set_nice(nice: i32) -> io::Result<()> {
    // SAFETY: takes plain numbers only; 0 is the calling thread.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives the calling thread the lowest real-time priority: it goes before all threads that have none, and
/// at once, also where one of them is in the kernel.
///
/// <https://man7.org/linux/man-pages/man7/sched.7.html> (`SCHED_FIFO`)
pub(crate) fn be_realtime() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters outlive the call; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks for the cache line at this address, which may be any: nothing is read.
#[inline]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint, and faults on no address. The instruction is part of the base set.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// Makes an interface receive what is addressed to others, for as long as the returned socket is open.
/// The kernel counts such requests, so nobody else's is undone.
///
/// <https://man7.org/linux/man-pages/man7/packet.7.html> (`PACKET_ADD_MEMBERSHIP`)
pub fn promiscuous(index: u32) -> io::Result<OwnedFd> {
    // Protocol 0: the socket itself receives nothing.
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Packet,
        nix::sys::socket::SockType::Raw,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let request = libc::packet_mreq {
        mr_ifindex: index.cast_signed(),
        mr_type: libc::PACKET_MR_PROMISC as libc::c_ushort,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    // SAFETY: the request outlives the call, and the length given is its own.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            (&raw const request).cast(),
            size_of::<libc::packet_mreq>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}
