//! One packet into a pcapng block, beside `pcap-file`'s writer.
//!
//! All write the same bytes: an enhanced packet block with the options `epb_flags` and `epb_queue`,
//! into memory that is there already. An iteration fills a buffer that the second-level cache holds,
//! so that neither its start nor the memory behind it is what is measured.

use std::{borrow::Cow, hint::black_box, iter, time::Duration};

use capture_user::segment::pcapng::{self, Direction, Packet};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pcap_file::{
    DataLink, Endianness,
    pcapng::{
        Block, PcapNgParser, PcapNgWriter,
        blocks::{
            enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption},
            interface_description::InterfaceDescriptionBlock,
        },
    },
};

/// Half of a usual second-level cache, so that the packets' source fits as well.
const BUFFER: usize = 256 * 1024;

/// The smallest Ethernet frame, one that is no multiple of 4, and the largest.
const SIZES: [usize; 3] = [64, 590, 1500];

const START_NS: u64 = 1_700_000_000_000_000_000;

fn encoder(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("encoder");
    for size in SIZES {
        // A compiler that knows the size would make a copy for it alone.
        let size = black_box(size);
        let count = BUFFER / pcapng::packet_len(size);
        // One packet after the other from a ring of frames, as a worker sees them.
        let frames: Vec<u8> = (0..count * size).map(|byte| byte as u8).collect();
        let mut buffer = vec![0; BUFFER];
        let mut writer = pcap_file_writer();

        let used = tapline(&mut buffer, &frames, size);
        let expected = buffer[..used].to_vec();
        let options = pcap_file_options(&expected);
        for write in [pcap_file, pcap_file_reusing] {
            write(&mut writer, &frames, size, &options);
            assert!(*writer.get_ref() == expected, "all write the same bytes");
        }

        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::new("tapline", size), |bencher| {
            bencher.iter(|| tapline(black_box(&mut buffer), black_box(&frames), size));
        });
        group.bench_function(BenchmarkId::new("tapline in two parts", size), |bencher| {
            bencher.iter(|| tapline_parts(black_box(&mut buffer), black_box(&frames), size));
        });
        group.bench_function(BenchmarkId::new("the packet's bytes alone", size), |bencher| {
            bencher.iter(|| bytes_alone(black_box(&mut buffer), black_box(&frames), size));
        });
        group.bench_function(BenchmarkId::new("pcap-file", size), |bencher| {
            bencher.iter(|| pcap_file(black_box(&mut writer), black_box(&frames), size, &options));
        });
        group.bench_function(BenchmarkId::new("pcap-file, one block reused", size), |bencher| {
            bencher.iter(|| {
                pcap_file_reusing(black_box(&mut writer), black_box(&frames), size, &options);
            });
        });
    }
    group.finish();
}

/// Fills `buffer` and returns how much of it was used.
fn tapline(buffer: &mut [u8], frames: &[u8], size: usize) -> usize {
    fill(buffer, frames, size, pcapng::packet)
}

fn tapline_parts(buffer: &mut [u8], frames: &[u8], size: usize) -> usize {
    fill(buffer, frames, size, |out, packet| {
        let (first, second) = packet.data.split_at(size / 2);
        let packet = Packet { data: first, ..*packet };
        pcapng::packet_parts(out, &packet, usize::MAX, iter::once(second))
    })
}

fn fill(
    buffer: &mut [u8],
    frames: &[u8],
    size: usize,
    encode: impl Fn(&mut [u8], &Packet<'_>) -> Option<usize>,
) -> usize {
    let mut used = 0;
    for (timestamp_ns, data) in (START_NS..).zip(frames.chunks_exact(size)) {
        let packet = Packet {
            interface: 0,
            queue: 3,
            direction: Direction::Inbound,
            timestamp_ns,
            original_len: size as u32,
            data,
        };
        let Some(length) = encode(&mut buffer[used..], &packet) else { break };
        used += length;
    }
    used
}

/// The floor: what any encoder has to do.
fn bytes_alone(buffer: &mut [u8], frames: &[u8], size: usize) -> usize {
    fill(buffer, frames, size, |out, packet| {
        let out = out.get_mut(..pcapng::packet_len(packet.data.len()))?;
        out.get_mut(..packet.data.len())?.copy_from_slice(packet.data);
        Some(out.len())
    })
}

/// The usual way: a block of its own for each packet.
fn pcap_file(
    writer: &mut PcapNgWriter<Vec<u8>>,
    frames: &[u8],
    size: usize,
    options: &[EnhancedPacketOption<'_>],
) {
    writer.get_mut().clear();
    for (timestamp_ns, data) in (START_NS..).zip(frames.chunks_exact(size)) {
        let block = EnhancedPacketBlock {
            interface_id: 0,
            timestamp: Duration::from_nanos(timestamp_ns),
            original_len: size as u32,
            data: Cow::Borrowed(data),
            options: options.to_vec(),
        };
        writer.write_pcapng_block(block).expect("a Vec takes everything");
    }
}

/// The fastest way: one block, and so one `Vec` of options, for all packets.
fn pcap_file_reusing(
    writer: &mut PcapNgWriter<Vec<u8>>,
    frames: &[u8],
    size: usize,
    options: &[EnhancedPacketOption<'_>],
) {
    writer.get_mut().clear();
    let mut block = Block::EnhancedPacket(EnhancedPacketBlock {
        interface_id: 0,
        timestamp: Duration::ZERO,
        original_len: size as u32,
        data: Cow::Borrowed(&[]),
        options: options.to_vec(),
    });
    for (timestamp_ns, data) in (START_NS..).zip(frames.chunks_exact(size)) {
        if let Block::EnhancedPacket(packet) = &mut block {
            packet.timestamp = Duration::from_nanos(timestamp_ns);
            packet.data = Cow::Borrowed(data);
        }
        writer.write_block(&block).expect("a Vec takes everything");
    }
}

/// A writer that has seen the description of the one interface.
fn pcap_file_writer() -> PcapNgWriter<Vec<u8>> {
    let memory = Vec::with_capacity(BUFFER);
    let mut writer =
        PcapNgWriter::with_endianness(memory, Endianness::Little).expect("a Vec takes everything");
    let interface = InterfaceDescriptionBlock::new(DataLink::ETHERNET, 0);
    writer.write_pcapng_block(interface).expect("a Vec takes everything");
    writer
}

/// `pcap-file` cannot name `epb_queue`, but writes it as it read it: the options of a packet of ours.
fn pcap_file_options(packets: &[u8]) -> Vec<EnhancedPacketOption<'_>> {
    let mut section = Vec::new();
    pcapng::section_header(&mut section, &pcapng::SectionInfo::default());
    let (_, mut parser) = PcapNgParser::new(&section).expect("a section header");
    let (_, block) = parser.next_block(packets).expect("a packet");
    block.into_enhanced_packet().expect("a packet").options
}

criterion_group!(benches, encoder);
criterion_main!(benches);
