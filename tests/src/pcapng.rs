//! What a capture file holds, read with another's software.

use std::{fs::File, path::Path, time::Duration};

use pcap_file::pcapng::{
    Block, PcapNgReader,
    blocks::{
        enhanced_packet::EnhancedPacketOption, interface_description::InterfaceDescriptionOption,
        interface_statistics::InterfaceStatisticsOption, section_header::SectionHeaderOption,
    },
};

use crate::process::tool;

/// Option `epb_queue`, which pcap-file has no name for.
const EPB_QUEUE: u16 = 6;

/// A packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Index of its interface.
    pub interface: u32,
    /// Since 1970.
    pub time: Duration,
    /// Length on the wire, bytes.
    pub original_len: u32,
    /// What was kept of it.
    pub data: Vec<u8>,
    /// `epb_flags`
    pub flags: Option<u32>,
    /// `epb_queue`
    pub queue: Option<u32>,
}

impl Packet {
    /// The direction that `epb_flags` names: 1 is in, 2 is out.
    pub fn direction(&self) -> Option<u32> {
        self.flags.map(|flags| flags & 3)
    }
}

/// An interface, with the statistics at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// `if_name`
    pub name: Option<String>,
    /// `if_filter`
    pub filter: Option<String>,
    /// Longest packet that is kept whole, bytes; 0 is no limit.
    pub snaplen: u32,
    /// Its statistics blocks: one in a file of ours.
    pub statistics: Vec<Statistics>,
}

/// An interface statistics block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// `isb_ifrecv`
    pub received: Option<u64>,
    /// `isb_filteraccept`
    pub accepted: Option<u64>,
    /// `isb_ifdrop`
    pub interface_dropped: Option<u64>,
    /// `isb_osdrop`
    pub os_dropped: Option<u64>,
    /// `isb_usrdeliv`
    pub delivered: Option<u64>,
    /// Comments.
    pub comments: Vec<String>,
}

/// A capture file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// `shb_userappl`
    pub application: Option<String>,
    /// Interfaces, in order.
    pub interfaces: Vec<Interface>,
    /// Packets, in order.
    pub packets: Vec<Packet>,
}

impl Contents {
    /// The statistics of the only interface.
    pub fn statistics(&self) -> &Statistics {
        let [interface] = self.interfaces.as_slice() else { panic!("one interface: {self:?}") };
        let [statistics] = interface.statistics.as_slice() else {
            panic!("one statistics block: {interface:?}")
        };
        statistics
    }
}

/// Reads a whole file, which `capinfos` and `tshark` must read without a complaint and alike, and
/// whose packets must be in the order of their time.
pub fn accepted(path: &Path) -> Contents {
    let contents = read(path);
    let name = path.to_str().unwrap();
    assert!(contents.packets.is_sorted_by_key(|packet| packet.time), "{name}: not in order");
    assert_eq!(contents.packets.len() as u64, counted(path), "{name}: by capinfos");
    let fields = ["frame.len", "frame.cap_len", "frame.time_epoch"];
    let fields = fields.iter().flat_map(|field| ["-e", field]);
    let line: Vec<_> =
        ["tshark", "-n", "-r", name, "-T", "fields"].into_iter().chain(fields).collect();
    let read = tool(&line);
    let want = contents.packets.iter().map(|packet| {
        let (seconds, nanos) = (packet.time.as_secs(), packet.time.subsec_nanos());
        format!("{}\t{}\t{seconds}.{nanos:09}", packet.original_len, packet.data.len())
    });
    assert!(read.lines().eq(want), "{name}: tshark reads something else");
    contents
}

/// The number of packets in a file as `capinfos` has it.
pub fn counted(path: &Path) -> u64 {
    let infos = tool(&["capinfos", "-M", "-c", path.to_str().unwrap()]);
    let count = infos.lines().find_map(|line| line.strip_prefix("Number of packets:"));
    count.unwrap_or_else(|| panic!("{infos}")).trim().parse().unwrap()
}

/// Reads a whole file, every block of which must be in order.
pub fn read(path: &Path) -> Contents {
    let mut reader = PcapNgReader::new(File::open(path).unwrap()).unwrap();
    let mut contents = Contents::default();
    for option in &reader.section().options {
        if let SectionHeaderOption::UserApplication(application) = option {
            contents.application = Some(application.to_string());
        }
    }
    while let Some(block) = reader.next_block() {
        match block.unwrap_or_else(|error| panic!("{}: {error}", path.display())) {
            Block::InterfaceDescription(block) => {
                let mut interface = Interface { snaplen: block.snaplen, ..Interface::default() };
                let mut resolution = None;
                for option in block.options {
                    match option {
                        InterfaceDescriptionOption::IfName(name) => {
                            interface.name = Some(name.into_owned());
                        }
                        InterfaceDescriptionOption::IfFilter(filter) => {
                            // A zero byte first: the filter is text.
                            interface.filter =
                                Some(String::from_utf8(filter[1..].to_vec()).unwrap());
                        }
                        InterfaceDescriptionOption::IfTsResol(exponent) => {
                            resolution = Some(exponent);
                        }
                        _ => {}
                    }
                }
                // pcap-file takes every timestamp for nanoseconds.
                assert_eq!(resolution, Some(9), "{}: not in nanoseconds", path.display());
                contents.interfaces.push(interface);
            }
            Block::EnhancedPacket(block) => {
                let mut packet = Packet {
                    interface: block.interface_id,
                    time: block.timestamp,
                    original_len: block.original_len,
                    data: block.data.into_owned(),
                    flags: None,
                    queue: None,
                };
                for option in block.options {
                    match option {
                        EnhancedPacketOption::Flags(flags) => packet.flags = Some(flags),
                        EnhancedPacketOption::Unknown(option) if option.code == EPB_QUEUE => {
                            let value = option.value.as_ref().try_into().unwrap();
                            packet.queue = Some(u32::from_le_bytes(value));
                        }
                        _ => {}
                    }
                }
                contents.packets.push(packet);
            }
            Block::InterfaceStatistics(block) => {
                let mut statistics = Statistics::default();
                for option in block.options {
                    match option {
                        InterfaceStatisticsOption::IsbIfRecv(n) => statistics.received = Some(n),
                        InterfaceStatisticsOption::IsbFilterAccept(n) => {
                            statistics.accepted = Some(n);
                        }
                        InterfaceStatisticsOption::IsbIfDrop(n) => {
                            statistics.interface_dropped = Some(n);
                        }
                        InterfaceStatisticsOption::IsbOsDrop(n) => {
                            statistics.os_dropped = Some(n);
                        }
                        InterfaceStatisticsOption::IsbUsrDeliv(n) => {
                            statistics.delivered = Some(n);
                        }
                        InterfaceStatisticsOption::Comment(text) => {
                            statistics.comments.push(text.into_owned());
                        }
                        _ => {}
                    }
                }
                let interface = block.interface_id as usize;
                contents.interfaces[interface].statistics.push(statistics);
            }
            _ => {}
        }
    }
    contents
}
