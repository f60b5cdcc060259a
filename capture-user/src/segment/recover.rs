//! What a crash left: hidden segments become visible as far as they are whole.
//!
//! - A torn segment is cut behind its last whole block, synced and renamed, as if it had been sealed
//!   there. It has no statistics block, which readers do not miss.
//! - One without a single packet is removed.
//! - Files are walked piece by piece: memory does not grow with them.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use super::{SegmentError, SegmentInfo, pcapng::whole_prefix};

/// Read at a time, bytes: more than the longest block that is ever written.
const PIECE: usize = 4 << 20;

/// An enhanced packet block. <https://www.ietf.org/archive/id/draft-ietf-opsawg-pcapng-03.html>
const ENHANCED_PACKET: u32 = 6;

/// A section header block.
const SECTION_HEADER: u32 = 0x0a0d_0d0a;

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SegmentError {
    move |source| SegmentError { operation, path: path.to_path_buf(), source }
}

/// Reads what is whole in a segment of ours; `size` of the result is how far that reaches.
pub fn survey(path: &Path) -> Result<SegmentInfo, SegmentError> {
    let mut file = File::open(path).map_err(failed("opening", path))?;
    let mut info = SegmentInfo {
        path: path.to_path_buf(),
        size: 0,
        packets: 0,
        captured_bytes: 0,
        first_ns: 0,
        last_ns: 0,
        sha256: None,
    };
    let mut piece = Vec::with_capacity(PIECE);
    loop {
        let room = (PIECE - piece.len()) as u64;
        let more =
            (&mut file).take(room).read_to_end(&mut piece).map_err(failed("reading", path))?;
        let whole = whole_prefix(&piece);
        if info.size == 0 && word(&piece, 0) != Some(SECTION_HEADER) {
            return Ok(info);
        }
        times(&piece[..whole.bytes], &mut info);
        info.size += whole.bytes as u64;
        info.packets += whole.packets;
        info.captured_bytes += whole.captured_bytes;
        piece.drain(..whole.bytes);
        // The rest is torn, or a block that is too long to be ours.
        if more == 0 || piece.len() == PIECE {
            return Ok(info);
        }
    }
}

/// Makes a hidden segment (`.NAME.part`) visible as far as it is whole, or removes it when there is
/// no packet in it. Other files are left alone.
pub fn recover(hidden: &Path) -> Result<Option<SegmentInfo>, SegmentError> {
    let Some(visible) = visible_name(hidden) else { return Ok(None) };
    let mut info = survey(hidden)?;
    if info.packets == 0 {
        fs::remove_file(hidden).map_err(failed("removing", hidden))?;
        return Ok(None);
    }
    let file = OpenOptions::new().write(true).open(hidden).map_err(failed("opening", hidden))?;
    file.set_len(info.size).map_err(failed("cutting", hidden))?;
    file.sync_all().map_err(failed("syncing", hidden))?;
    fs::rename(hidden, &visible).map_err(failed("renaming", hidden))?;
    if let Some(folder) = visible.parent() {
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(failed("syncing the folder", folder))?;
    }
    info.path = visible;
    Ok(Some(info))
}

/// Completes or removes every hidden segment in a folder and lists what is visible then, by name.
pub fn recover_folder(folder: &Path) -> Result<Vec<SegmentInfo>, SegmentError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed("listing", folder))? {
        paths.push(entry.map_err(failed("listing", folder))?.path());
    }
    paths.sort();
    let mut segments = Vec::new();
    for path in paths {
        if visible_name(&path).is_some() {
            segments.extend(recover(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "pcapng") {
            segments.push(survey(&path)?);
        }
    }
    segments.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(segments)
}

/// The name that a hidden segment will have.
fn visible_name(hidden: &Path) -> Option<PathBuf> {
    let name = hidden.file_name()?.to_str()?.strip_prefix('.')?.strip_suffix(".part")?;
    (!name.is_empty()).then(|| hidden.with_file_name(name))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// First and last packet time of a run of whole blocks.
fn times(mut blocks: &[u8], info: &mut SegmentInfo) {
    while let (Some(kind), Some(length)) = (word(blocks, 0), word(blocks, 4)) {
        if kind == ENHANCED_PACKET
            && let (Some(high), Some(low)) = (word(blocks, 12), word(blocks, 16))
        {
            let time = u64::from(high) << 32 | u64::from(low);
            if info.last_ns == 0 {
                info.first_ns = time;
            }
            info.first_ns = info.first_ns.min(time);
            info.last_ns = info.last_ns.max(time);
        }
        blocks = blocks.get(length as usize..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        buffer::Pool,
        segment::{
            InterfaceLabel, Io, Rotation, Run, Target, Writer,
            pcapng::{Packet, packet},
        },
    };

    /// A segment of 100 packets of 60 bytes, sealed, with its bytes.
    fn segment(folder: &Path) -> (PathBuf, Vec<u8>) {
        let path = folder.join("x.pcapng");
        let label = InterfaceLabel { name: "eth0".into(), ..InterfaceLabel::default() };
        let mut writer = Writer::create(
            Target::File(path.clone()),
            "",
            Rotation::default(),
            false,
            "",
            vec![label],
        )
        .unwrap();
        let pool = Pool::new(2, 1 << 17);
        let mut buffer = pool.take().unwrap();
        for number in 0..100_u64 {
            let one = Packet {
                timestamp_ns: 1_000 + number,
                original_len: 60,
                data: &[7; 60],
                ..Packet::default()
            };
            let length = packet(buffer.free(), &one).unwrap();
            buffer.commit(length, 60, one.timestamp_ns);
        }
        let run = Run {
            bytes: buffer.len(),
            packets: buffer.packets,
            captured_bytes: buffer.captured_bytes,
            ..Run::default()
        };
        let mut io = Io::default();
        writer.write(&mut io, buffer, &mut vec![run]).unwrap();
        assert_eq!(writer.outcomes().map(|outcome| outcome.packets).sum::<u64>(), 100);
        writer.finish(&mut io, &[]).1.unwrap();
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    }

    #[test]
    fn a_segment_torn_at_any_byte_keeps_its_whole_packets() {
        let folder = tempfile::tempdir().unwrap();
        let (path, bytes) = segment(folder.path());
        assert_eq!(survey(&path).unwrap().packets, 100);
        let hidden = folder.path().join(".torn.pcapng.part");
        let visible = folder.path().join("torn.pcapng");
        let mut before = 0;
        for length in (0..bytes.len()).step_by(97).chain([bytes.len()]) {
            fs::write(&hidden, &bytes[..length]).unwrap();
            let recovered = recover(&hidden).unwrap();
            assert!(!hidden.exists());
            let Some(info) = recovered else {
                assert_eq!(before, 0, "{length}");
                assert!(!visible.exists());
                continue;
            };
            assert!(info.packets >= before && info.size <= length as u64);
            assert_eq!(fs::metadata(&visible).unwrap().len(), info.size);
            assert_eq!((info.first_ns, info.last_ns), (1_000, 999 + info.packets));
            assert_eq!(info.captured_bytes, 60 * info.packets);
            before = info.packets;
            fs::remove_file(&visible).unwrap();
        }
        assert_eq!(before, 100);
    }

    #[test]
    fn a_folder_is_put_in_order_and_other_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (_, bytes) = segment(folder.path());
        fs::write(folder.path().join(".b.pcapng.part"), &bytes[..bytes.len() - 3]).unwrap();
        fs::write(folder.path().join(".empty.pcapng.part"), &bytes[..40]).unwrap();
        fs::write(folder.path().join(".zero.pcapng.part"), [0; 4096]).unwrap();
        fs::write(folder.path().join("notes.txt"), "hello").unwrap();
        let found = recover_folder(folder.path()).unwrap();
        let names: Vec<_> = found.iter().map(|info| info.path.file_name().unwrap()).collect();
        assert_eq!(names, ["b.pcapng", "x.pcapng"]);
        assert!(found.iter().all(|info| info.packets == 100));
        let mut left: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["b.pcapng", "notes.txt", "x.pcapng"]);
    }
}
