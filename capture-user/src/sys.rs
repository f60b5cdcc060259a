//! The few system calls, and the one hint to the processor, that no safe crate offers. With [`crate::socket`] the only `unsafe` here.

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
};

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
