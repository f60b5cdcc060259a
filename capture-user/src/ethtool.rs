//! A driver's settings, as ethtool reads them. One of the few files with `unsafe` in it: the
//! ioctl, in [`call`].

use std::{
    io,
    os::{fd::AsRawFd as _, unix::net::UnixDatagram},
};

/// What the kernel calls a driver and the bus address of its device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Driver {
    pub(crate) name: String,
    /// A PCI address on most hardware; empty for a virtual interface.
    pub(crate) bus: String,
}

/// Receive queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Channels {
    /// In use.
    pub(crate) rx: u32,
    /// The most that the driver takes.
    pub(crate) rx_max: u32,
    /// Each receive queue comes with a send queue, and `ethtool -L` calls them `combined`.
    pub(crate) combined: bool,
}

/// Descriptors in each receive ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rings {
    pub(crate) rx: u32,
    pub(crate) rx_max: u32,
}

/// What the hardware or the stack does to packets, where it changes what a capture sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent settings, not one state")]
pub(crate) struct Offloads {
    /// The stack merges received packets of a flow.
    pub(crate) gro: bool,
    /// The driver does.
    pub(crate) lro: bool,
    /// The NIC takes VLAN tags out of received packets.
    pub(crate) rx_vlan: bool,
    /// The NIC fills in the checksums of sent packets.
    pub(crate) tx_checksum: bool,
}

// https://github.com/gregkh/linux/blob/v6.12.117/include/uapi/linux/ethtool.h#L1850-L1934
const GDRVINFO: u32 = 0x03;
const GRINGPARAM: u32 = 0x10;
const GTXCSUM: u32 = 0x16;
const GFLAGS: u32 = 0x25;
const GGRO: u32 = 0x2b;
const GRXFHINDIR: u32 = 0x38;
const GCHANNELS: u32 = 0x3c;
const GLINKSETTINGS: u32 = 0x4c;

// https://github.com/gregkh/linux/blob/v6.12.117/include/uapi/linux/ethtool.h#L1216-L1222
const FLAG_RX_VLAN: u32 = 1 << 8;
const FLAG_LRO: u32 = 1 << 15;

/// The 32-bit words of `struct ethtool_link_settings` before its bit maps, and where in them the
/// number of words of each map is.
const LINK_SETTINGS_WORDS: usize = 12;
const LINK_SETTINGS_MAP_WORDS: (usize, usize) = (3, 3);

/// The driver behind an interface.
pub(crate) fn driver(interface: &str) -> io::Result<Driver> {
    // Command, then five strings of 32 bytes of which the first is the name and the fourth the bus.
    let mut words = [0; 49];
    words[0] = GDRVINFO;
    call(interface, &mut words)?;
    Ok(Driver { name: string(&words[1..9]), bus: string(&words[25..33]) })
}

/// How many receive queues an interface has.
pub(crate) fn channels(interface: &str) -> io::Result<Channels> {
    let mut words = [0; 9];
    words[0] = GCHANNELS;
    call(interface, &mut words)?;
    let [_, rx_max, _, _, combined_max, rx, _, _, combined] = words;
    Ok(Channels {
        rx: rx.saturating_add(combined),
        rx_max: rx_max.saturating_add(combined_max),
        combined: combined_max > 0,
    })
}

/// How long the receive rings of an interface are.
pub(crate) fn rings(interface: &str) -> io::Result<Rings> {
    let mut words = [0; 9];
    words[0] = GRINGPARAM;
    call(interface, &mut words)?;
    let [_, rx_max, _, _, _, rx, ..] = words;
    Ok(Rings { rx, rx_max })
}

/// Which offloads are on.
pub(crate) fn offloads(interface: &str) -> io::Result<Offloads> {
    let value = |command| {
        let mut words = [command, 0];
        call(interface, &mut words)?;
        io::Result::Ok(words[1])
    };
    let flags = value(GFLAGS)?;
    Ok(Offloads {
        gro: value(GGRO)? != 0,
        lro: flags & FLAG_LRO != 0,
        rx_vlan: flags & FLAG_RX_VLAN != 0,
        tx_checksum: value(GTXCSUM)? != 0,
    })
}

/// The receive queue that each entry of the RSS indirection table points to.
pub(crate) fn indirection(interface: &str) -> io::Result<Vec<u32>> {
    // Asked with size 0 the kernel only says how large the table is.
    let mut size = [GRXFHINDIR, 0];
    call(interface, &mut size)?;
    let mut words = vec![0; 2 + size[1] as usize];
    words[..2].copy_from_slice(&size);
    call(interface, &mut words)?;
    Ok(words.split_off(2))
}

/// The speed of the link, Mb/s; `None` when the driver does not know it.
pub(crate) fn speed(interface: &str) -> io::Result<Option<u32>> {
    let mut words = vec![0; LINK_SETTINGS_WORDS];
    words[0] = GLINKSETTINGS;
    // The first answer is how long the bit maps are, as a negative number.
    call(interface, &mut words)?;
    let (word, byte) = LINK_SETTINGS_MAP_WORDS;
    let mut settings = words[word].to_ne_bytes();
    let length = settings[byte].cast_signed().unsigned_abs();
    settings[byte] = length;
    words = vec![0; LINK_SETTINGS_WORDS + 3 * usize::from(length)];
    words[0] = GLINKSETTINGS;
    words[word] = u32::from_ne_bytes(settings);
    call(interface, &mut words)?;
    Ok(match words[1] {
        // SPEED_UNKNOWN is -1.
        0 | u32::MAX => None,
        speed => Some(speed),
    })
}

/// The words that the kernel may write for this request.
fn reply_words(request: &[u32]) -> Option<usize> {
    Some(match *request.first()? {
        GDRVINFO => 49,
        GCHANNELS | GRINGPARAM => 9,
        GFLAGS | GGRO | GTXCSUM => 2,
        // It refuses a table that is larger than the size given.
        GRXFHINDIR => (*request.get(1)? as usize).saturating_add(2),
        // It writes the maps only when the length given is the right one.
        GLINKSETTINGS => {
            let (word, byte) = LINK_SETTINGS_MAP_WORDS;
            let length = request.get(word)?.to_ne_bytes()[byte].cast_signed();
            LINK_SETTINGS_WORDS + 3 * usize::try_from(length).unwrap_or(0)
        }
        _ => return None,
    })
}

/// Makes an ethtool request of the current network namespace. `words` is one of ethtool's
/// structures, the command first; the kernel answers in place.
fn call(interface: &str, words: &mut [u32]) -> io::Result<()> {
    let name = interface.as_bytes();
    let fits = reply_words(words).is_some_and(|needed| words.len() >= needed);
    if !fits || name.len() >= libc::IFNAMSIZ || name.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: words.as_mut_ptr().cast() },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    // Any socket will do, and this one needs neither IPv4 nor a privilege.
    let socket = UnixDatagram::unbound()?;
    // SAFETY: `request` is a valid `ifreq` with a name that ends in a zero byte. Its data pointer
    // is to `words`, exclusively borrowed for the call, and `reply_words` has just checked that
    // they are at least as many as this command reads and writes.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The C string in these words.
fn string(words: &[u32]) -> String {
    let bytes: Vec<u8> =
        words.iter().flat_map(|word| word.to_ne_bytes()).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_with_too_little_room_for_the_answer_is_not_made() {
        for words in [
            &mut [GDRVINFO; 48][..],
            &mut [GCHANNELS; 8],
            &mut [GGRO],
            &mut [GRXFHINDIR, 2, 0],
            &mut [GRXFHINDIR, u32::MAX, 0],
            &mut [0xffff; 64],
            &mut [],
        ] {
            let error = call("lo", words).expect_err("refused");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn link_settings_need_room_for_three_maps() {
        let mut words = vec![0; LINK_SETTINGS_WORDS + 8];
        words[0] = GLINKSETTINGS;
        assert_eq!(reply_words(&words), Some(LINK_SETTINGS_WORDS));
        words[3] = u32::from_ne_bytes([0, 0, 0, 3]);
        assert_eq!(reply_words(&words), Some(LINK_SETTINGS_WORDS + 9));
        words[3] = u32::from_ne_bytes([0, 0, 0, 0xfd]);
        assert_eq!(reply_words(&words), Some(LINK_SETTINGS_WORDS));
    }

    #[test]
    fn a_name_that_cannot_be_is_not_asked_for() {
        for name in ["a-name-of-16-byte", "zero\0byte"] {
            let error = driver(name).expect_err("refused");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn the_loopback_interface_answers() {
        offloads("lo").unwrap();
        let error = rings("lo").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
        let error = driver("no/such").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn a_string_ends_at_its_zero_byte() {
        let words = [u32::from_ne_bytes(*b"veth"), 0, u32::MAX];
        assert_eq!(string(&words), "veth");
        assert_eq!(string(&[]), "");
    }
}
