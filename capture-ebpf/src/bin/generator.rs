//! What tests and benches run in the kernel, all of it by `BPF_PROG_TEST_RUN`.
//!
//! `generate` makes load, with live frames: it stamps each frame, picks its flow, and redirects it to
//! a device, usually a veth end, whose peer then receives it at its own XDP hook.
//! <https://docs.kernel.org/bpf/bpf_prog_run.html#running-xdp-programs-in-live-frame-mode>
//!
//! `pass` is what the capture programs' cost is measured against; `again` lets one that hands packets
//! over be run many times on one frame.
//!
//! `drop`, `receive` and `look_on` are the least that can be done with a packet that arrives: floors for
//! the capture tools.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod kernel {
    use aya_ebpf::{
        bindings::{
            TC_ACT_UNSPEC,
            xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS},
        },
        helpers::generated::{
            bpf_get_smp_processor_id, bpf_redirect, bpf_xdp_adjust_meta, bpf_xdp_adjust_tail,
        },
        macros::{classifier, map, xdp},
        maps::{Array, PerCpuArray, ProgramArray, XskMap},
        programs::{TcContext, XdpContext},
    };
    use capture_ebpf::abi::generator::{Config, QUEUES, Stamp};

    #[map]
    static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

    #[map]
    static SENT: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

    /// Frames are one page at most, headers and stamp near the front.
    const MAX_OFFSET: usize = 0xfff;

    #[xdp]
    fn generate(context: XdpContext) -> u32 {
        let (Some(config), Some(sent)) = (CONFIG.get(0), SENT.get_ptr_mut(0)) else {
            return XDP_ABORTED;
        };
        // SAFETY: this CPU's value of a per-CPU map; the program does not nest.
        let sequence = unsafe { *sent };
        // SAFETY: as above.
        unsafe { *sent = sequence + 1 };

        if config.port_offset != 0 && config.flows != 0 {
            let port = (config.first_port + (sequence % u64::from(config.flows)) as u32) as u16;
            write(&context, config.port_offset, port.to_be_bytes());
        }
        if config.stamp_offset != 0 {
            // SAFETY: takes no argument and cannot fail.
            let cpu = unsafe { bpf_get_smp_processor_id() };
            let source = u64::from(cpu) + u64::from(config.source);
            write(&context, config.stamp_offset, Stamp { sequence, source });
        }
        if config.shape_count != 0 {
            shape(&context, config, sequence);
        }
        // SAFETY: takes plain numbers.
        (unsafe { bpf_redirect(config.ifindex, 0) }) as u32
    }

    /// Cuts the frame to the length whose turn it is.
    #[inline(always)]
    fn shape(context: &XdpContext, config: &Config, sequence: u64) {
        let turn = (sequence % u64::from(config.shape_count)) as usize;
        let Some(shape) = config.shapes.get(turn) else { return };
        write(context, config.ip_offset + 2, shape.ip_length);
        write(context, config.ip_offset + 10, shape.ip_checksum);
        write(context, config.ip_offset + 24, shape.udp_length);
        let longer = (context.data_end() - context.data()) as u32;
        let delta = shape.length.wrapping_sub(longer) as i32;
        // SAFETY: the context is the program's own; the helper checks the length.
        unsafe { bpf_xdp_adjust_tail(context.ctx, delta) };
    }

    #[inline(always)]
    fn write<T>(context: &XdpContext, offset: u32, value: T) {
        let at = context.data() + (offset as usize & MAX_OFFSET);
        if at + size_of::<T>() <= context.data_end() {
            // SAFETY: the comparison above proves to the verifier that the bytes are the packet's.
            unsafe { (at as *mut T).write_unaligned(value) };
        }
    }

    /// The least that an XDP program can do.
    #[xdp(frags)]
    fn pass(_: XdpContext) -> u32 {
        XDP_PASS
    }

    /// The least that can be done with a packet.
    #[xdp(frags)]
    fn drop(_: XdpContext) -> u32 {
        XDP_DROP
    }

    #[map]
    static SOCKETS: XskMap = XskMap::with_max_entries(QUEUES, 0);

    /// The least that brings a packet to user space.
    #[xdp(frags)]
    fn receive(context: XdpContext) -> u32 {
        SOCKETS.redirect(context.rx_queue_index(), XDP_DROP.into()).unwrap_or(XDP_DROP)
    }

    /// The least that a tc program can do that lets packets go on.
    #[classifier]
    fn look_on(_: TcContext) -> i32 {
        TC_ACT_UNSPEC
    }

    #[map]
    static MEASURED: ProgramArray = ProgramArray::with_max_entries(1, 0);

    /// Runs the program in `MEASURED`, after taking away the metadata that its last run has put in
    /// front of the frame: repeated runs share one frame, and soon there would be no room for more.
    #[xdp(frags)]
    fn again(context: XdpContext) -> u32 {
        let metadata = context.metadata_end() - context.metadata();
        // SAFETY: the context is the program's own; the helper checks the result.
        unsafe { bpf_xdp_adjust_meta(context.ctx, metadata as i32) };
        // SAFETY: a tail call does not return, or fails and has done nothing.
        unsafe { MEASURED.tail_call(&context, 0) };
        XDP_ABORTED
    }

    /// See the capture program's: the verifier refuses a program that can panic.
    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
