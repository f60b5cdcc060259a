//! How the parser reads a frame in the kernel.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    helpers::generated::{bpf_skb_load_bytes, bpf_xdp_get_buff_len, bpf_xdp_load_bytes},
};
use capture_ebpf::parse::{Buffer, Scratch};

/// No header lies deeper. The verifier wants a bound on every variable offset, and this one leaves
/// room for two VLAN tags and eight of the longest extension headers.
const MAX_OFFSET: usize = 0x7fff;

/// The `N` bytes at `offset`, in the packet if its first piece, from `data` to `end`, has them; otherwise in
/// `scratch`, as far as `copy` finds them in other pieces: headers may lie across them.
/// <https://github.com/torvalds/linux/blob/v6.6/net/core/filter.c#L3920-L3933>
#[inline(always)]
fn load<const N: usize>(
    data: usize,
    end: usize,
    offset: usize,
    scratch: &mut Scratch,
    copy: impl FnOnce(u32, *mut c_void, u32) -> i64,
) -> Option<&[u8; N]> {
    const { assert!(N <= size_of::<Scratch>()) };
    if offset > MAX_OFFSET {
        return None;
    }
    let at = data + offset;
    if at + N <= end {
        // SAFETY: the comparison above proves to the verifier that the bytes are inside the first piece. That
        // is the driver's or the skb's own memory while the program runs: what others may still write,
        // pages that a sender has lent, lies in other pieces, and a frame of UMEM was given away with the
        // fill ring.
        return Some(unsafe { &*(at as *const [u8; N]) });
    }
    let to = scratch.as_mut_ptr();
    if copy(offset as u32, to.cast(), N as u32) != 0 {
        return None;
    }
    // SAFETY: the assertion above sees to the room, and a helper that succeeds has written all `N` bytes.
    Some(unsafe { &*to.cast() })
}

/// A frame at the XDP hook.
pub(super) struct XdpFrame {
    pub(super) context: *mut xdp_md,
    data: usize,
    end: usize,
}

impl XdpFrame {
    #[inline(always)]
    pub(super) fn new(context: *mut xdp_md) -> Self {
        // SAFETY: the kernel hands the program a valid context.
        let data = unsafe { (*context).data } as usize;
        // SAFETY: as above.
        let end = unsafe { (*context).data_end } as usize;
        Self { context, data, end }
    }

    /// Where the first piece begins and ends.
    #[inline(always)]
    pub(super) fn piece(&self) -> (usize, usize) {
        (self.data, self.end)
    }

    /// Length of all pieces, bytes.
    #[inline(always)]
    pub(super) fn length(&self) -> u32 {
        // SAFETY: the context is the program's own.
        (unsafe { bpf_xdp_get_buff_len(self.context) }) as u32
    }
}

impl Buffer for XdpFrame {
    #[inline(always)]
    fn load<'a, const N: usize>(
        &'a self,
        offset: usize,
        scratch: &'a mut Scratch,
    ) -> Option<&'a [u8; N]> {
        load(self.data, self.end, offset, scratch, |offset, to, length| {
            // SAFETY: the context is the program's own, and `load` hands over room for `length` bytes.
            unsafe { bpf_xdp_load_bytes(self.context, offset, to, length) }
        })
    }
}

/// A packet at a tc hook.
pub(super) struct Skb {
    pub(super) context: *mut __sk_buff,
    data: usize,
    end: usize,
}

impl Skb {
    #[inline(always)]
    pub(super) fn new(context: *mut __sk_buff) -> Self {
        // SAFETY: the kernel hands the program a valid context.
        let data = unsafe { (*context).data } as usize;
        // SAFETY: as above.
        let end = unsafe { (*context).data_end } as usize;
        Self { context, data, end }
    }

    /// Where the first piece begins and ends.
    #[inline(always)]
    pub(super) fn piece(&self) -> (usize, usize) {
        (self.data, self.end)
    }

    /// Length of what is in the pieces, bytes.
    #[inline(always)]
    pub(super) fn length(&self) -> u32 {
        // SAFETY: the context is the program's own.
        unsafe { (*self.context).len }
    }

    /// The VLAN tag that the kernel keeps aside, as in a `Header`.
    #[inline(always)]
    pub(super) fn vlan(&self) -> u32 {
        if !self.tag_aside() {
            return 0;
        }
        // SAFETY: the context is the program's own. The protocol is in network order, the tag in the host's.
        let tpid = u16::from_be(unsafe { (*self.context).vlan_proto } as u16);
        // SAFETY: as above.
        u32::from(tpid) << 16 | unsafe { (*self.context).vlan_tci } & 0xffff
    }
}

impl Buffer for Skb {
    #[inline(always)]
    fn load<'a, const N: usize>(
        &'a self,
        offset: usize,
        scratch: &'a mut Scratch,
    ) -> Option<&'a [u8; N]> {
        load(self.data, self.end, offset, scratch, |offset, to, length| {
            // SAFETY: the context is the program's own, and `load` hands over room for `length` bytes.
            unsafe { bpf_skb_load_bytes(self.context.cast(), offset, to, length) }
        })
    }

    #[inline(always)]
    fn tag_aside(&self) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { (*self.context).vlan_present != 0 }
    }
}
