//! Any bytes: the whole blocks at their front, and nothing else, are what `whole_prefix` keeps.

#![no_main]

use capture_user::segment::pcapng::{self, Prefix, SectionInfo, whole_prefix};
use libfuzzer_sys::fuzz_target;
use pcap_file::pcapng::PcapNgParser;

/// Types whose content `pcap-file` looks into, where `whole_prefix` does not.
const LOOKED_INTO: [u32; 2] = [0x0a0d_0d0a, 1];
const ENHANCED_PACKET: u32 = 6;

fuzz_target!(|bytes: &[u8]| {
    let prefix = whole_prefix(bytes);
    assert!(prefix.bytes <= bytes.len());
    assert!(prefix.bytes.is_multiple_of(4));
    let (kept, left) = bytes.split_at(prefix.bytes);

    // It stands by what it said, and has left nothing that it would have kept.
    assert_eq!(whole_prefix(kept), prefix);
    assert_eq!(whole_prefix(left), Prefix::default());

    // Cut anywhere, the front keeps no more, and the back adds exactly the rest.
    let cut = bytes.first().map_or(0, |byte| usize::from(*byte) * bytes.len() / 255);
    let front = whole_prefix(&bytes[..cut]);
    let back = whole_prefix(&bytes[front.bytes..]);
    assert_eq!(front.bytes + back.bytes, prefix.bytes);
    assert_eq!(front.packets + back.packets, prefix.packets);
    assert_eq!(front.captured_bytes + back.captured_bytes, prefix.captured_bytes);

    assert_eq!(walk(bytes), prefix);
});

/// The same, by `pcap-file`'s reader of blocks.
fn walk(bytes: &[u8]) -> Prefix {
    let mut section = Vec::with_capacity(64);
    pcapng::section_header(&mut section, &SectionInfo::default());
    let (_, mut parser) = PcapNgParser::new(&section).expect("a section header");

    let mut walked = Prefix::default();
    let mut rest = bytes;
    while let Some(kind) = rest.first_chunk().map(|kind| u32::from_le_bytes(*kind)) {
        let after = if LOOKED_INTO.contains(&kind) {
            let Some(after) = skip(rest) else { break };
            after
        } else {
            let Ok((after, block)) = parser.next_raw_block(rest) else { break };
            if kind == ENHANCED_PACKET {
                let Some(captured) = block.body.get(12..16) else { break };
                let captured = captured.iter().rfold(0, |sum, byte| sum << 8 | u64::from(*byte));
                if block.body.len() < 20 || captured > block.body.len() as u64 - 20 {
                    break;
                }
                walked.packets += 1;
                walked.captured_bytes += captured;
            }
            after
        };
        walked.bytes += rest.len() - after.len();
        rest = after;
    }
    walked
}

/// What follows the first block, by a parser that is told that it is of a type of nobody's.
fn skip(rest: &[u8]) -> Option<&[u8]> {
    let length = u32::from_le_bytes(*rest.get(4..)?.first_chunk()?) as usize;
    let body = length.checked_sub(12).filter(|_| length.is_multiple_of(4))?;
    let (trailer, after) = rest.get(8 + body..)?.split_first_chunk()?;
    (u32::from_le_bytes(*trailer) as usize == length).then_some(after)
}
