//! A save that builds upon an earlier one: its file begins as a copy of that one's, and only what has changed is written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crc32fast::Hasher;
use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::changes::Pages;
use super::image::{ImageError, PAGE, SaveId, SumsTrailer, TRAILER, Trailer, finish, is_zero, ram_bytes, write_run};
use super::sums::{CHUNK, Resum, read_table, table_bytes};
use super::{GuestMemoryMmap, GuestRegionMmap};

/// One bit a page: so many words for what has one checksum.
const WORDS: usize = CHUNK as usize / PAGE / 64;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// The save that `file` is a copy of, if it is whole, and of memory of this size.
pub fn base(memory: &GuestMemoryMmap, file: &File) -> Option<SaveId> {
    let ram = ram_bytes(memory);
    let length = file.metadata().ok()?.len();
    let Trailer { id, sums } = Trailer::read(file).ok()?;
    let SumsTrailer { ram: saved, table } = sums?;
    let fits = saved == ram && length == ram + table_bytes(ram) + PAGE as u64;
    // Whole checksums in each region.
    let fits = fits && memory.iter().all(|region| region.len().is_multiple_of(CHUNK));
    (fits && read_table(file, ram, table).is_ok()).then_some(id)
}

/// Writes the `pages` of `memory` to `file`, of which [`base`] says that it is a copy of the save since which these have changed. Pages of zeros
/// become holes. Gives the bytes written. The VM must be paused, or this a copy of its process: nothing is allocated.
///
/// # Errors
/// When the file cannot be written; it is no save then.
pub fn save_changes(memory: &GuestMemoryMmap, file: &File, id: &SaveId, pages: &[Vec<u64>]) -> Result<u64, ImageError> {
    let write = ImageError::Write;
    let ram = ram_bytes(memory);
    // From here on it is not the save that it was.
    file.write_all_at(&[0; TRAILER], ram + table_bytes(ram)).map_err(write)?;
    let mut sums = Resum::new(file, ram);
    let (mut offset, mut written) = (0, 0);
    for (region, pages) in memory.iter().zip(pages) {
        for (at, changed) in (0..region.size()).step_by(CHUNK as usize).zip(pages.chunks(WORDS)) {
            if changed.iter().all(|word| *word == 0) {
                sums.keep().map_err(write)?;
            } else {
                written += write_changed(region, at, changed, file, offset + at as u64).map_err(write)?;
                let sum = sum(region, at).map_err(write)?;
                sums.replace(|_| sum).map_err(write)?;
            }
        }
        offset += region.len();
    }
    finish(file, id, SumsTrailer { ram, table: sums.finish().map_err(write)? })?;
    Ok(written)
}

/// The MiB at `at` of `region`, which lies at `offset` of `file`, as far as it has `changed`.
fn write_changed(region: &GuestRegionMmap, at: usize, changed: &[u64], file: &File, offset: u64) -> io::Result<u64> {
    let mut written = 0;
    for run in runs(changed, |page| is_zero(region, at + page * PAGE)) {
        let (from, length) = (run.first * PAGE, run.count * PAGE);
        if run.is_zero {
            clear(file, offset + from as u64, length)?;
        } else {
            write_run(region, at + from, length, file, offset + from as u64)?;
            written += length as u64;
        }
    }
    Ok(written)
}

/// Neighbouring pages that have changed, which are all zero, or all not.
struct Run {
    first: usize,
    count: usize,
    is_zero: bool,
}

fn is_changed(changed: &[u64], page: usize) -> bool {
    changed.get(page / 64).is_some_and(|word| word >> (page % 64) & 1 == 1)
}

/// The runs among the pages of a MiB. Each page is looked at once.
fn runs(changed: &[u64], zero: impl Fn(usize) -> bool) -> impl Iterator<Item = Run> {
    let count = changed.len() * 64;
    let mut page = 0;
    // What the page after the last run is, if it has changed.
    let mut seen = None;
    std::iter::from_fn(move || {
        let first = (page..count).find(|page| is_changed(changed, *page))?;
        let is_zero = seen.take().unwrap_or_else(|| zero(first));
        page = first + 1;
        while is_changed(changed, page) {
            let next = zero(page);
            if next != is_zero {
                seen = Some(next);
                break;
            }
            page += 1;
        }
        Some(Run { first, count: page - first, is_zero })
    })
}

/// Pages that were copied out of guest memory, so that nothing else of it is needed for them to be written.
pub struct Carried {
    /// Of each region.
    sizes: Vec<usize>,
    /// Those of the sets of pages that are not empty: region, place, 64 pages.
    words: Vec<(usize, usize, u64)>,
    /// The pages one behind the other, in the order of guest addresses.
    bytes: Vec<u8>,
}

impl Carried {
    /// Copies at most `most` bytes; `None` when there are more, or there is no memory for them. The VM stands for this: of memory that has not
    /// changed each 64 pages are looked at once.
    pub fn copy(memory: &GuestMemoryMmap, pages: &Pages, most: usize) -> Option<Self> {
        let mut words = Vec::new();
        let mut count = 0;
        for (region, pages) in pages.iter().enumerate() {
            for (at, word) in pages.iter().enumerate().filter(|(_, word)| **word != 0) {
                words.push((region, at, *word));
                count += word.count_ones() as usize;
            }
        }
        let mut bytes = Vec::new();
        if count * PAGE > most {
            return None;
        }
        bytes.try_reserve_exact(count * PAGE).ok()?;
        let regions: Vec<_> = memory.iter().collect();
        let mut page = [0; PAGE];
        for (region, at, word) in &words {
            for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
                regions.get(*region)?.read_slice(&mut page, MemoryRegionAddress(((at * 64 + bit) * PAGE) as u64)).ok()?;
                bytes.extend_from_slice(&page);
            }
        }
        Some(Self { sizes: sizes(memory), words, bytes })
    }

    /// As [`save_changes`], of the pages that were copied. The file is read, too.
    ///
    /// # Errors
    /// As [`save_changes`].
    pub fn save(&self, file: &File, id: &SaveId) -> Result<u64, ImageError> {
        let mut pages: Pages = self.sizes.iter().map(|size| vec![0; size.div_ceil(PAGE * 64)]).collect();
        for (region, at, word) in &self.words {
            pages[*region][*at] = *word;
        }
        let mut left = self.bytes.chunks_exact(PAGE);
        save_chunks(file, id, &self.sizes, (&pages, false), |_, _, to| {
            to.copy_from_slice(left.next().ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }
}

fn sizes(memory: &GuestMemoryMmap) -> Vec<usize> {
    memory.iter().map(|region| region.size()).collect()
}

/// As [`save_changes`], of a VM that may run: each page is written as it is found, and what describes the file is true of it. The file is read, too.
/// With `is_all` nothing was in the file, and the other pages are zeros.
///
/// # Errors
/// As [`save_changes`].
pub fn save_running(memory: &GuestMemoryMmap, file: &File, id: &SaveId, pages: &Pages, is_all: bool) -> Result<u64, ImageError> {
    let regions: Vec<_> = memory.iter().collect();
    save_chunks(file, id, &sizes(memory), (pages, is_all), |region, page, to| {
        let found = regions.get(region).map(|region| region.read_slice(to, MemoryRegionAddress((page * PAGE) as u64)));
        if matches!(found, Some(Ok(()))) { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    })
}

/// MiB by MiB, as the file comes to hold them: the memory may be another already. `page` gives the pages of each region, in ascending order.
fn save_chunks(
    file: &File,
    id: &SaveId,
    sizes: &[usize],
    (pages, is_all): (&Pages, bool),
    mut page: impl FnMut(usize, usize, &mut [u8]) -> io::Result<()>,
) -> Result<u64, ImageError> {
    let write = ImageError::Write;
    let ram: u64 = sizes.iter().map(|size| *size as u64).sum();
    if is_all {
        file.set_len(0).map_err(write)?;
        file.set_len(ram + table_bytes(ram) + PAGE as u64).map_err(write)?;
    } else {
        // From here on it is not the save that it was.
        file.write_all_at(&[0; TRAILER], ram + table_bytes(ram)).map_err(write)?;
    }
    let mut sums = Resum::new(file, ram);
    let mut chunk = vec![0; CHUNK as usize];
    let zeros = crc32fast::hash(&chunk);
    let (mut offset, mut written) = (0, 0);
    for (region, (size, pages)) in sizes.iter().zip(pages).enumerate() {
        for (at, changed) in (0..size / PAGE).step_by(CHUNK as usize / PAGE).zip(pages.chunks(WORDS)) {
            if changed.iter().all(|word| *word == 0) {
                if is_all { sums.replace(|_| zeros) } else { sums.keep() }.map_err(write)?;
            } else {
                let before = if is_all {
                    chunk.fill(0);
                    None
                } else {
                    file.read_exact_at(&mut chunk, offset).map_err(write)?;
                    Some(crc32fast::hash(&chunk))
                };
                let mut places = chunk.chunks_exact_mut(PAGE).enumerate().filter(|(of_chunk, _)| is_changed(changed, *of_chunk));
                places.try_for_each(|(of_chunk, place)| page(region, at + of_chunk, place)).map_err(write)?;
                written += write_chunk(&chunk, changed, file, offset, is_all).map_err(write)?;
                let after = crc32fast::hash(&chunk);
                // What was damaged before stays so for whoever compares.
                sums.replace(|was| if before.is_none_or(|before| before == was) { after } else { !after }).map_err(write)?;
            }
            offset += CHUNK;
        }
    }
    finish(file, id, SumsTrailer { ram, table: sums.finish().map_err(write)? })?;
    Ok(written)
}

/// Writes the pages of a MiB that have `changed` to `file`, where that MiB lies at `offset`.
fn write_chunk(chunk: &[u8], changed: &[u64], file: &File, offset: u64, is_all: bool) -> io::Result<u64> {
    let mut written = 0;
    for run in runs(changed, |page| chunk[page * PAGE..][..PAGE] == ZEROS) {
        let (from, length) = (run.first * PAGE, run.count * PAGE);
        if !run.is_zero {
            file.write_all_at(&chunk[from..from + length], offset + from as u64)?;
            written += length as u64;
        } else if !is_all {
            clear(file, offset + from as u64, length)?;
        }
    }
    Ok(written)
}

fn clear(file: &File, offset: u64, length: usize) -> io::Result<()> {
    if fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length as u64).is_ok() {
        return Ok(());
    }
    (0..length as u64).step_by(PAGE).try_for_each(|at| file.write_all_at(&ZEROS, offset + at))
}

/// The checksum of the MiB at `at` of `region`.
fn sum(region: &GuestRegionMmap, at: usize) -> io::Result<u32> {
    let mut hasher = Hasher::new();
    let mut page = [0; PAGE];
    for at in (at..at + CHUNK as usize).step_by(PAGE) {
        region.read_slice(&mut page, MemoryRegionAddress(at as u64)).map_err(|_| io::ErrorKind::InvalidInput)?;
        hasher.update(&page);
    }
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::super::image::{check, map, save, verify};
    use super::super::ours;
    use super::*;
    use crate::layout::{HOLE_END, Layout, MIB};

    const FIRST: SaveId = [7; 16];
    const SECOND: SaveId = [8; 16];

    fn layout() -> Layout {
        Layout { low_ram: 4 * MIB, high_ram: 2 * MIB, mmio64_start: 8 << 30, mmio64_end: 16 << 30 }
    }

    fn memory() -> GuestMemoryMmap {
        let memory = super::super::map(&layout()).unwrap();
        memory.write_slice(&[3; 5 * PAGE], GuestAddress(MIB - PAGE as u64)).unwrap();
        memory.write_slice(&[4; PAGE], GuestAddress(HOLE_END)).unwrap();
        memory.iter().for_each(|region| ours(region).reset());
        memory
    }

    fn saved(memory: &GuestMemoryMmap) -> File {
        let file = tempfile::tempfile().unwrap();
        save(memory, &file, &FIRST).unwrap();
        file
    }

    fn changed(memory: &GuestMemoryMmap) -> Vec<Vec<u64>> {
        memory.iter().map(|region| ours(region).get_and_reset()).collect()
    }

    fn bytes(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn pages_that_have_changed_are_written_and_those_of_zeros_become_holes() {
        let memory = memory();
        let file = saved(&memory);
        let before = file.metadata().unwrap().blocks();
        memory.write_slice(&[0; 4 * PAGE], GuestAddress(MIB)).unwrap();
        memory.write_obj(5_u8, GuestAddress(HOLE_END + 2 * MIB - 1)).unwrap();
        assert_eq!(base(&memory, &file), Some(FIRST));
        assert_eq!(save_changes(&memory, &file, &SECOND, &changed(&memory)).unwrap(), PAGE as u64);
        assert_eq!(before - file.metadata().unwrap().blocks(), 3 * (PAGE as u64 / 512));
        verify(&file).unwrap();
        check(&layout().ram(), &file, &SECOND).unwrap();
        assert!(matches!(check(&layout().ram(), &file, &FIRST), Err(ImageError::OtherSave)));
        let again = map(&layout().ram(), file, &SECOND).unwrap();
        assert_eq!(again.read_obj::<u8>(GuestAddress(MIB)).unwrap(), 0);
        assert_eq!(again.read_obj::<u8>(GuestAddress(MIB - 1)).unwrap(), 3);
        assert_eq!(again.read_obj::<u8>(GuestAddress(HOLE_END + 2 * MIB - 1)).unwrap(), 5);
    }

    #[test]
    fn only_a_whole_save_of_as_much_memory_is_built_upon() {
        let memory = memory();
        assert_eq!(base(&memory, &tempfile::tempfile().unwrap()), None);
        let ram = 6 * MIB;
        for (at, damage) in [(ram + 2, b"damaged"), (ram + 4096 + 26, b"damaged")] {
            let file = saved(&memory);
            file.write_all_at(damage, at).unwrap();
            assert_eq!(base(&memory, &file), None, "{at}");
        }
        let file = saved(&memory);
        file.set_len(ram).unwrap();
        assert_eq!(base(&memory, &file), None);
        let more = super::super::map(&Layout { low_ram: 5 * MIB, ..layout() }).unwrap();
        assert_eq!(base(&more, &saved(&memory)), None);
    }

    #[test]
    fn one_that_was_not_finished_is_no_save() {
        let memory = memory();
        let file = saved(&memory);
        let pages = changed(&memory);
        memory.write_obj(1_u8, GuestAddress(0)).unwrap();
        // Nothing can be written behind this.
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        assert!(matches!(save_changes(&memory, &full, &SECOND, &pages), Err(ImageError::Write(_))));
        // What it begins with.
        file.write_all_at(&[0; TRAILER], 6 * MIB + table_bytes(6 * MIB)).unwrap();
        assert!(matches!(check(&layout().ram(), &file, &FIRST), Err(ImageError::Foreign)));
    }

    #[test]
    fn what_the_file_had_lost_already_is_still_found() {
        let memory = memory();
        let file = saved(&memory);
        // Beside what changes, in the same MiB.
        file.write_all_at(b"x", MIB + 10).unwrap();
        memory.write_obj(1_u8, GuestAddress(2 * MIB - 1)).unwrap();
        let pages = changed(&memory);
        for carried in [false, true] {
            if carried {
                Carried::copy(&memory, &pages, usize::MAX).unwrap().save(&file, &SECOND).unwrap();
            } else {
                save_changes(&memory, &file, &SECOND, &pages).unwrap();
            }
            assert!(matches!(verify(&file), Err(ImageError::Checksum { mebibyte: 1 })), "{carried}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn it_holds_what_a_full_one_holds(writes in prop::collection::vec((0_u64..1536, 0_u8..3, 1_usize..9000), 0..40), twice in 0_usize..40, carried in any::<bool>()) {
            let memory = memory();
            let file = saved(&memory);
            let mut id = FIRST;
            let mut save_now = |memory: &GuestMemoryMmap| {
                prop_assert_eq!(base(memory, &file), Some(id));
                id = [id[0] + 1; 16];
                let pages = changed(memory);
                if carried {
                    Carried::copy(memory, &pages, usize::MAX).unwrap().save(&file, &id).unwrap();
                } else {
                    save_changes(memory, &file, &id, &pages).unwrap();
                }
                let full = tempfile::tempfile().unwrap();
                save(memory, &full, &id).unwrap();
                prop_assert!(bytes(&file) == bytes(&full));
                prop_assert_eq!(file.metadata().unwrap().len(), full.metadata().unwrap().len());
                Ok(())
            };
            for (index, (page, byte, length)) in writes.into_iter().enumerate() {
                if index == twice {
                    save_now(&memory)?;
                }
                let at = if page < 1024 { page * PAGE as u64 } else { HOLE_END + (page - 1024) * PAGE as u64 };
                // Behind its end there is nothing.
                let _ = memory.write_slice(&vec![byte; length], GuestAddress(at + page % 7));
            }
            save_now(&memory)?;
        }
    }
}
