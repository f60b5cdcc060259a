//! What is compiled for the kernel only.

mod frame;
mod ring;
mod state;
mod tap;
mod xdp;

/// Loops, so that the verifier refuses a program in which a panic can be reached: it reports the
/// back-edge instead of running into it.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
