//! How the parser reads a frame in the kernel.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{__sk_buff, xdp_md},
    helpers::generated::{bpf_skb_load_bytes, bpf_xdp_load_bytes},
};
use capture_ebpf::parse::Buffer;

/// No header lies deeper. The verifier wants a bound on every variable offset, and this one leaves
/// room for two VLAN tags and eight of the longest extension headers.
const MAX_OFFSET: usize = 0x7fff;

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
}

impl Buffer for XdpFrame {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset > MAX_OFFSET {
            return None;
        }
        let at = self.data + offset;
        if at + N <= self.end {
            // SAFETY: the comparison above proves to the verifier that the bytes are inside the
            // packet.
            return Some(unsafe { *(at as *const [u8; N]) });
        }
        // The first buffer of a multi-buffer frame may end inside the headers.
        // https://github.com/torvalds/linux/blob/v6.6/net/core/filter.c#L3920-L3933
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the destination is a local array of `N` bytes; the helper checks the frame's end.
        let failed = unsafe {
            bpf_xdp_load_bytes(self.context, offset as u32, bytes.as_mut_ptr().cast(), N as u32)
        };
        // SAFETY: a helper that succeeds has written all of it.
        if failed == 0 { Some(unsafe { bytes.assume_init() }) } else { None }
    }
}

/// A packet at a tc hook.
pub(super) struct Skb {
    pub(super) context: *mut __sk_buff,
    data: usize,
    end: usize,
    /// The VLAN tag that the kernel keeps aside, as in a `Header`.
    pub(super) vlan: u32,
}

impl Skb {
    #[inline(always)]
    pub(super) fn new(context: *mut __sk_buff) -> Self {
        // SAFETY: the kernel hands the program a valid context.
        let data = unsafe { (*context).data } as usize;
        // SAFETY: as above.
        let end = unsafe { (*context).data_end } as usize;
        // SAFETY: as above.
        let vlan = if unsafe { (*context).vlan_present } == 0 {
            0
        } else {
            // SAFETY: as above. The protocol is in network order, the tag in the host's.
            let tpid = u16::from_be(unsafe { (*context).vlan_proto } as u16);
            // SAFETY: as above.
            u32::from(tpid) << 16 | unsafe { (*context).vlan_tci } & 0xffff
        };
        Self { context, data, end, vlan }
    }
}

impl Buffer for Skb {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset > MAX_OFFSET {
            return None;
        }
        let at = self.data + offset;
        if at + N <= self.end {
            // SAFETY: the comparison above proves to the verifier that the bytes are inside the
            // linear part.
            return Some(unsafe { *(at as *const [u8; N]) });
        }
        // Headers may lie outside the linear part.
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the destination is a local array of `N` bytes; the helper checks the packet's end.
        let failed = unsafe {
            bpf_skb_load_bytes(
                self.context.cast(),
                offset as u32,
                bytes.as_mut_ptr().cast(),
                N as u32,
            )
        };
        // SAFETY: a helper that succeeds has written all of it.
        if failed == 0 { Some(unsafe { bytes.assume_init() }) } else { None }
    }

    #[inline(always)]
    fn tag_aside(&self) -> bool {
        self.vlan != 0
    }
}
