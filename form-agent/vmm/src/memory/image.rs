//! Guest RAM as a file: written sparse while the VM is paused, and mapped privately when it is restored, so that a page is read when
//! it is first touched and the file never changes.
//!
//! The file holds the ranges of RAM one behind the other, without the hole, then their checksums ([`super::sums`]), filled up to a page, and
//! then one page, the trailer: magic, the save that it belongs to (16 bytes), version, bytes of RAM (8), checksum of the checksums, checksum of
//! all this; numbers are little-endian and have 4 bytes else. Files of version 0 have no checksums, and zeros behind the save.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, FileOffset, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::changes::Pages;
use super::sums::{self, Sums, table_bytes};
use super::{MemoryError, patch};
use crate::memory::{GuestMemoryMmap, GuestRegionMmap};

const MAGIC: [u8; 8] = *b"FORMVMEM";
const VERSION: u32 = 1;
pub(super) const PAGE: usize = 4096;
/// Bytes of the trailer that are used.
pub(super) const TRAILER: usize = 48;
/// One write moves at most this much, so that a signal or a full disk is noticed early.
const RUN_MAX: usize = 4 << 20;

/// Names one save: memory and state belong together only when both carry the same.
pub type SaveId = [u8; 16];

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("cannot write the memory file")]
    Write(#[source] io::Error),
    #[error("cannot read the memory file")]
    Read(#[source] io::Error),
    #[error("the memory file has {found} bytes, the saved VM's has {expected}: it is torn, or another VM's")]
    Size { expected: u64, found: u64 },
    #[error("the memory file is not one of a saved VM, or it was never finished")]
    Foreign,
    #[error("the memory file belongs to another save than the state: pass the two that were written together")]
    OtherSave,
    #[error("the memory file has version {found}, this program reads {VERSION}: restore it with the release that saved it")]
    Version { found: u32 },
    #[error("the memory file is damaged: the checksum of what describes it is wrong")]
    Table,
    #[error("the memory file is damaged: the checksum of the MiB at {mebibyte} MiB is wrong")]
    Checksum { mebibyte: u64 },
    #[error("the memory file is of a release that kept no checksums, and cannot be compared with them")]
    NoChecksums,
}

/// What the last page of a file says.
pub(super) struct Trailer {
    pub id: SaveId,
    /// None of one without checksums.
    pub sums: Option<SumsTrailer>,
}

#[derive(Clone, Copy)]
pub(super) struct SumsTrailer {
    pub ram: u64,
    pub table: u32,
}

fn trailer(id: &SaveId, SumsTrailer { ram, table }: SumsTrailer) -> [u8; TRAILER] {
    let mut bytes = [0; TRAILER];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..24].copy_from_slice(id);
    bytes[24..28].copy_from_slice(&VERSION.to_le_bytes());
    bytes[28..36].copy_from_slice(&ram.to_le_bytes());
    bytes[36..40].copy_from_slice(&table.to_le_bytes());
    let own = crc32fast::hash(&bytes[..TRAILER - 8]);
    bytes[TRAILER - 8..TRAILER - 4].copy_from_slice(&own.to_le_bytes());
    bytes
}

impl Trailer {
    pub fn read(file: &File) -> Result<Self, ImageError> {
        let length = file.metadata().map_err(ImageError::Read)?.len();
        let at = length.checked_sub(PAGE as u64).ok_or(ImageError::Foreign)?;
        let mut bytes = [0; TRAILER];
        file.read_exact_at(&mut bytes, at).map_err(ImageError::Read)?;
        if bytes[..8] != MAGIC {
            return Err(ImageError::Foreign);
        }
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[8..24]);
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        match word(24) {
            0 if bytes[24..] == [0; TRAILER - 24] => return Ok(Self { id, sums: None }),
            VERSION => {}
            0 => return Err(ImageError::Table),
            found => return Err(ImageError::Version { found }),
        }
        if crc32fast::hash(&bytes[..TRAILER - 8]) != word(TRAILER - 8) {
            return Err(ImageError::Table);
        }
        let ram = u64::from(word(28)) | u64::from(word(32)) << 32;
        Ok(Self { id, sums: Some(SumsTrailer { ram, table: word(36) }) })
    }
}

pub(super) fn ram_bytes(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Writes all of `memory` to `file`, whose former content is dropped; pages of zeros become holes. The VM must be paused. When it
/// returns the file is on stable storage. Gives the bytes of pages written.
///
/// # Errors
/// When the file cannot be written, for example because the disk is full.
pub fn save(memory: &GuestMemoryMmap, file: &File, id: &SaveId) -> Result<u64, ImageError> {
    let write = ImageError::Write;
    let ram = ram_bytes(memory);
    file.set_len(0).map_err(write)?;
    file.set_len(ram + table_bytes(ram) + PAGE as u64).map_err(write)?;
    let mut sums = Sums::new(file, ram);
    let (mut offset, mut written) = (0, 0);
    for region in memory.iter() {
        let length = usize::try_from(region.len()).map_err(|_| write(io::ErrorKind::InvalidInput.into()))?;
        let mut at = 0;
        while at < length {
            let run = run(region, at, length);
            if run.zero {
                sums.zeros(run.length).map_err(write)?;
            } else {
                write_run(region, at, run.length, file, offset + at as u64).map_err(write)?;
                sum_run(region, at, run.length, &mut sums).map_err(write)?;
                written += run.length as u64;
            }
            at += run.length;
        }
        offset += region.len();
    }
    finish(file, id, SumsTrailer { ram, table: sums.finish().map_err(write)? })?;
    Ok(written)
}

/// The mark comes last: a file without it was never finished.
pub(super) fn finish(file: &File, id: &SaveId, sums: SumsTrailer) -> Result<(), ImageError> {
    let write = ImageError::Write;
    file.sync_data().map_err(write)?;
    file.write_all_at(&trailer(id, sums), sums.ram + table_bytes(sums.ram)).map_err(write)?;
    file.sync_data().map_err(write)
}

/// The save that the finished `file` belongs to.
///
/// # Errors
/// When it was never finished, or is of another version.
pub fn save_of(file: &File) -> Result<SaveId, ImageError> {
    Trailer::read(file).map(|trailer| trailer.id)
}

/// Into which file a save goes.
#[derive(Clone, Copy)]
pub enum Onto<'a> {
    /// One whose content does not matter.
    New,
    /// A copy of an earlier save's, since which these pages have changed: [`patch::base`].
    Earlier(&'a Pages),
}

impl Onto<'_> {
    /// Saves; gives the bytes of pages written.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(self, memory: &GuestMemoryMmap, file: &File, id: &SaveId) -> Result<u64, ImageError> {
        match self {
            Self::New => save(memory, file, id),
            Self::Earlier(pages) => patch::save_changes(memory, file, id, pages),
        }
    }
}

/// What was written is read once more: nobody changes it meanwhile.
fn sum_run(region: &GuestRegionMmap, at: usize, length: usize, sums: &mut Sums<'_>) -> io::Result<()> {
    let mut page = [0; PAGE];
    (at..at + length).step_by(PAGE).try_for_each(|at| {
        region.read_slice(&mut page, MemoryRegionAddress(at as u64)).map_err(|_| io::ErrorKind::InvalidInput)?;
        sums.page(&page)
    })
}

/// Neighbouring pages that are all zero, or all not.
struct Run {
    zero: bool,
    length: usize,
}

fn run(region: &GuestRegionMmap, start: usize, end: usize) -> Run {
    let zero = is_zero(region, start);
    let mut at = start + PAGE;
    while at < end && (zero || at - start < RUN_MAX) && is_zero(region, at) == zero {
        at += PAGE;
    }
    Run { zero, length: at - start }
}

/// Whether the page at offset `at` of `region` holds only zeros.
pub(super) fn is_zero(region: &GuestRegionMmap, at: usize) -> bool {
    debug_assert!(at + PAGE <= region.size() && at.is_multiple_of(PAGE));
    let words = region.as_ptr().wrapping_add(at).cast::<u64>();
    // Eight words at a time: the loop is what a save mostly consists of.
    (0..PAGE / 64).all(|line| {
        let word = |index: usize| {
            // SAFETY: the page lies inside the region's mapping, which is readable, lives as long as `region`, and begins at a page, so
            // the pointer is aligned. Volatile, since others may map the same memory.
            unsafe { words.add(line * 8 + index).read_volatile() }
        };
        (word(0) | word(1) | word(2) | word(3) | word(4) | word(5) | word(6) | word(7)) == 0
    })
}

pub(super) fn write_run(region: &GuestRegionMmap, at: usize, length: usize, file: &File, offset: u64) -> io::Result<()> {
    debug_assert!(at + length <= region.size());
    let mut done = 0;
    while done < length {
        let position = libc::off_t::try_from(offset + done as u64).map_err(|_| io::ErrorKind::InvalidInput)?;
        let from = region.as_ptr().wrapping_add(at + done);
        // SAFETY: the range lies inside the region's mapping, which is readable and lives as long as `region`.
        let result = unsafe { libc::pwrite(file.as_raw_fd(), from.cast(), length - done, position) };
        match usize::try_from(result) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Maps `file`, as [`save`] wrote it, as the RAM that lies at `ranges` (start and length, ascending).
///
/// # Errors
/// When the file was never finished, was cut, or belongs to another save than `id`.
pub fn map(ranges: &[(u64, u64)], file: File, id: &SaveId) -> Result<GuestMemoryMmap, MemoryError> {
    check(ranges, &file, id)?;
    let file = std::sync::Arc::new(file);
    let mut offset = 0;
    super::map_ranges(ranges, libc::MAP_PRIVATE | libc::MAP_NORESERVE, |bytes| {
        let from = FileOffset::from_arc(std::sync::Arc::clone(&file), offset);
        offset += bytes;
        Some(from)
    })
}

/// Whether `file` is the finished RAM at `ranges` from the save `id`.
///
/// # Errors
/// As [`map`].
pub fn check(ranges: &[(u64, u64)], file: &File, id: &SaveId) -> Result<(), ImageError> {
    let ram: u64 = ranges.iter().map(|(_, bytes)| bytes).sum();
    let found = file.metadata().map_err(ImageError::Read)?.len();
    let (bare, expected) = (ram + PAGE as u64, ram + table_bytes(ram) + PAGE as u64);
    if found != bare && found != expected {
        return Err(ImageError::Size { expected, found });
    }
    let trailer = Trailer::read(file)?;
    if trailer.id != *id {
        return Err(ImageError::OtherSave);
    }
    match trailer.sums {
        None if found == bare => Ok(()),
        Some(sums) if found == expected && sums.ram == ram => Ok(()),
        _ => Err(ImageError::Size { expected, found }),
    }
}

/// Reads all of `file`, but for its holes, and compares it with its checksums. It belongs to a save of its own, whichever that is.
///
/// # Errors
/// [`ImageError::Checksum`] with the first place that is damaged, [`ImageError::NoChecksums`], and what [`check`] finds.
pub fn verify(file: &File) -> Result<(), ImageError> {
    let found = file.metadata().map_err(ImageError::Read)?.len();
    let SumsTrailer { ram, table } = Trailer::read(file)?.sums.ok_or(ImageError::NoChecksums)?;
    let expected = ram.saturating_add(PAGE as u64);
    // Whatever it says, no more than there is.
    if ram >= found || ram + table_bytes(ram) + PAGE as u64 != found {
        return Err(ImageError::Size { expected, found });
    }
    sums::verify(file, ram, table)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use rustix::fs::FallocateFlags;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::layout::{HOLE_END, Layout, MIB};

    const ID: SaveId = [7; 16];

    /// RAM on both sides of a hole, small enough to scan in a test.
    fn layout() -> Layout {
        Layout { low_ram: 16 * MIB, high_ram: MIB, mmio64_start: 8 << 30, mmio64_end: 16 << 30 }
    }

    fn saved() -> (tempfile::NamedTempFile, GuestMemoryMmap) {
        let memory = super::super::map(&layout()).unwrap();
        memory.write_obj(0x1122_3344_u32, GuestAddress(3 * MIB + 5)).unwrap();
        memory.write_slice(&[9; 3 * PAGE], GuestAddress(16 * MIB - 3 * PAGE as u64)).unwrap();
        memory.write_obj(1_u8, GuestAddress(HOLE_END + MIB - 1)).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        save(&memory, file.as_file(), &ID).unwrap();
        (file, memory)
    }

    fn restored(file: &tempfile::NamedTempFile) -> Result<GuestMemoryMmap, MemoryError> {
        map(&layout().ram(), File::open(file.path()).unwrap(), &ID)
    }

    #[test]
    fn memory_comes_back_from_a_sparse_file_that_then_stays_as_it_is() {
        let (file, memory) = saved();
        assert!(file.as_file().metadata().unwrap().blocks() * 512 < 64 * 1024, "zeros take space");
        let before = std::fs::read(file.path()).unwrap();
        let again = restored(&file).unwrap();
        for address in [0, 3 * MIB, 16 * MIB - 4 * PAGE as u64, HOLE_END + MIB - PAGE as u64] {
            let (mut one, mut other) = ([0; PAGE], [1; PAGE]);
            memory.read_slice(&mut one, GuestAddress(address)).unwrap();
            again.read_slice(&mut other, GuestAddress(address)).unwrap();
            assert_eq!(one, other, "at {address:#x}");
        }
        again.write_obj(u64::MAX, GuestAddress(3 * MIB)).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), before);
    }

    #[test]
    fn what_was_in_the_file_before_is_gone() {
        let (file, _) = saved();
        let empty = super::super::map(&layout()).unwrap();
        save(&empty, file.as_file(), &ID).unwrap();
        assert_eq!(restored(&file).unwrap().read_obj::<u32>(GuestAddress(3 * MIB + 5)).unwrap(), 0);
    }

    #[test]
    fn a_torn_a_foreign_and_anothers_file_are_refused() {
        let (file, _) = saved();
        let refused = |file: &tempfile::NamedTempFile| match restored(file) {
            Err(MemoryError::Image(error)) => error,
            other => panic!("{:?}", other.map(|_| ())),
        };
        let length = file.as_file().metadata().unwrap().len();
        file.as_file().set_len(length - 1).unwrap();
        assert!(matches!(refused(&file), ImageError::Size { .. }));
        file.as_file().set_len(length).unwrap();
        let mark = length - PAGE as u64;
        let sums = Trailer::read(file.as_file()).unwrap().sums.unwrap();
        file.as_file().write_all_at(&[0; TRAILER], mark).unwrap();
        assert!(matches!(refused(&file), ImageError::Foreign));
        file.as_file().write_all_at(&trailer(&[8; 16], sums), mark).unwrap();
        assert!(matches!(refused(&file), ImageError::OtherSave));
        file.as_file().write_all_at(&trailer(&ID, SumsTrailer { ram: sums.ram - 1, ..sums }), mark).unwrap();
        assert!(matches!(refused(&file), ImageError::Size { .. }));
        file.as_file().write_all_at(&trailer(&ID, sums), mark).unwrap();
        file.as_file().write_all_at(&2_u32.to_le_bytes(), mark + 24).unwrap();
        assert!(matches!(refused(&file), ImageError::Version { found: 2 }));
        file.as_file().write_all_at(&trailer(&ID, sums), mark).unwrap();
        assert!(restored(&file).is_ok());
    }

    #[test]
    fn damage_anywhere_is_found_and_its_place_is_told() {
        let (file, _) = saved();
        let length = file.as_file().metadata().unwrap().len();
        verify(file.as_file()).unwrap();
        let damaged = |at: u64, bytes: &[u8]| {
            let mut before = vec![0; bytes.len()];
            file.as_file().read_exact_at(&mut before, at).unwrap();
            file.as_file().write_all_at(bytes, at).unwrap();
            let said = verify(file.as_file()).unwrap_err();
            file.as_file().write_all_at(&before, at).unwrap();
            verify(file.as_file()).unwrap();
            said
        };
        let place = |error: ImageError| match error {
            ImageError::Checksum { mebibyte } => mebibyte,
            other => panic!("{other}"),
        };
        // One bit of a page, a page that is lost, something where a hole was, the last byte.
        assert_eq!(place(damaged(3 * MIB + 5, &[0x45])), 3);
        assert_eq!(place(damaged(16 * MIB - 3 * PAGE as u64, &[0; PAGE])), 15);
        assert_eq!(place(damaged(9 * MIB, &[1])), 9);
        assert_eq!(place(damaged(17 * MIB - 1, &[2])), 16);
        let lost = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert!(matches!(damaged(17 * MIB + 4, &[1]), ImageError::Table));
        assert!(matches!(damaged(length - PAGE as u64 + 30, &[1]), ImageError::Table));
        rustix::fs::fallocate(file.as_file(), lost, 3 * MIB, PAGE as u64).unwrap();
        assert_eq!(place(verify(file.as_file()).unwrap_err()), 3);
    }

    #[test]
    fn a_file_of_an_earlier_release_is_taken_and_cannot_be_verified() {
        let (file, memory) = saved();
        let ram = 17 * MIB;
        file.as_file().set_len(ram).unwrap();
        file.as_file().set_len(ram + PAGE as u64).unwrap();
        let mut old = [0; 24];
        old[..8].copy_from_slice(&MAGIC);
        old[8..].copy_from_slice(&ID);
        file.as_file().write_all_at(&old, ram).unwrap();
        let value: u32 = restored(&file).unwrap().read_obj(GuestAddress(3 * MIB + 5)).unwrap();
        assert_eq!(value, memory.read_obj::<u32>(GuestAddress(3 * MIB + 5)).unwrap());
        assert!(matches!(verify(file.as_file()), Err(ImageError::NoChecksums)));
    }

    #[test]
    fn a_file_that_cannot_be_written_is_an_error() {
        let memory = super::super::map(&layout()).unwrap();
        memory.write_obj(1_u8, GuestAddress(0)).unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert!(matches!(save(&memory, &full, &ID), Err(ImageError::Write(_))));
    }
}
