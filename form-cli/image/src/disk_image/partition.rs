//! Where the file systems of a disk are: its partition table, GPT (UEFI specification 2.10, section 5.3) or MBR.
//!
//! The disk may be anybody's: what does not lie in it is refused, and nothing is followed that could go in circles.

use std::{fs::File, io, os::unix::fs::FileExt};

/// A part of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    /// As the system that it belongs to counts them, from 1; 0 for the whole of a disk without partitions.
    pub number: u32,
    pub begin: u64,
    pub size: u64,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TableError {
    #[error("it cannot be read: {0}")]
    Read(String),
    #[error("it has no partition table and no file system that is known here")]
    None,
    #[error("its partition table makes no sense: {0}")]
    Damaged(&'static str),
    #[error("it ends before its partition {number} does, after {size} bytes: it was cut short, so fetch or copy it again")]
    CutShort { number: u32, size: u64 },
}

impl From<io::Error> for TableError {
    fn from(error: io::Error) -> Self {
        Self::Read(error.to_string())
    }
}

/// The specification has 128; a table of more than these was made to keep its reader busy.
const MAX_ENTRIES: u32 = 1024;
/// Disks of blocks of 4 KiB have the header in the second of them.
const SECTORS: [u64; 2] = [512, 4096];

fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let part = bytes.get(at..at + N).unwrap_or_default();
    part.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

/// Reads what there is: the disk may end before.
fn read(disk: &File, at: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let mut have = 0;
    while have < length {
        match disk.read_at(&mut bytes[have..], at.saturating_add(have as u64))? {
            0 => break,
            count => have += count,
        }
    }
    Ok(bytes)
}

/// The partitions of a disk of `size` bytes, in the order of their numbers. A disk that is one file system is one partition.
///
/// # Errors
/// When there is no table, or it does not fit the disk.
pub(super) fn partitions(disk: &File, size: u64) -> Result<Vec<Partition>, TableError> {
    for sector in SECTORS {
        let header = read(disk, sector, 512)?;
        if header.starts_with(b"EFI PART") {
            return gpt(disk, size, sector, &header);
        }
    }
    if super::file_system::of(disk, 0)?.is_some() {
        return Ok(vec![Partition { number: 0, begin: 0, size }]);
    }
    let first = read(disk, 0, 512)?;
    if first.ends_with(&[0x55, 0xaa]) { mbr(&first, size) } else { Err(TableError::None) }
}

fn gpt(disk: &File, size: u64, sector: u64, header: &[u8]) -> Result<Vec<Partition>, TableError> {
    let (place, count, length) = (number::<8>(header, 72), number::<4>(header, 80), number::<4>(header, 84));
    if count > u64::from(MAX_ENTRIES) || !(128..=4096).contains(&length) {
        return Err(TableError::Damaged("it has too many entries, or too large ones"));
    }
    let place = place.checked_mul(sector).filter(|place| *place < size).ok_or(TableError::Damaged("its entries are not in the disk"))?;
    let table = read(disk, place, usize::try_from(count * length).unwrap_or(0))?;
    let mut found = Vec::new();
    for (number_, entry) in (1..).zip(table.chunks_exact(usize::try_from(length).unwrap_or(128))) {
        // A type of zeros is an entry that is not used.
        if entry[..16].iter().all(|byte| *byte == 0) {
            continue;
        }
        let (first, last) = (number::<8>(entry, 32), number::<8>(entry, 40));
        let blocks = last.checked_sub(first).and_then(|blocks| blocks.checked_add(1));
        let bytes = blocks.and_then(|blocks| Some((first.checked_mul(sector)?, blocks.checked_mul(sector)?)));
        let (begin, length) = bytes.ok_or(TableError::Damaged("a partition ends before it begins"))?;
        found.push(fitting(number_, begin, length, size)?);
    }
    Ok(found)
}

/// The four primary partitions; those inside of an extended one are no place where a system's own files are.
fn mbr(first: &[u8], size: u64) -> Result<Vec<Partition>, TableError> {
    let mut found = Vec::new();
    for (number_, entry) in (1..).zip(first[446..510].chunks_exact(16)) {
        let (kind, begin, sectors) = (entry[4], number::<4>(entry, 8), number::<4>(entry, 12));
        if !matches!(entry[0], 0 | 0x80) {
            return Err(TableError::None);
        }
        // The guard of a GPT.
        if kind == 0xee {
            return Err(TableError::Damaged("it has lost its GPT"));
        }
        // Unused, or extended.
        if matches!(kind, 0 | 5 | 0xf | 0x85) || sectors == 0 {
            continue;
        }
        found.push(fitting(number_, begin * 512, sectors * 512, size)?);
    }
    if found.is_empty() { Err(TableError::None) } else { Ok(found) }
}

fn fitting(number: u32, begin: u64, length: u64, size: u64) -> Result<Partition, TableError> {
    match begin.checked_add(length) {
        Some(end) if end <= size => Ok(Partition { number, begin, size: length }),
        _ => Err(TableError::CutShort { number, size }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn disk(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn with_gpt(sector: usize, parts: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = vec![0; 256 << 10];
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        bytes[446 + 4] = 0xee;
        let header = &mut bytes[sector..sector + 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[72..80].copy_from_slice(&2_u64.to_le_bytes());
        header[80..84].copy_from_slice(&16_u32.to_le_bytes());
        header[84..88].copy_from_slice(&128_u32.to_le_bytes());
        for (index, (first, last)) in parts.iter().enumerate() {
            let entry = &mut bytes[2 * sector + index * 128..][..128];
            if *last > 0 {
                entry[0] = 1;
            }
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
        }
        bytes
    }

    fn with_mbr(parts: &[(u8, u32, u32)]) -> Vec<u8> {
        let mut bytes = vec![0; 256 << 10];
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        for (index, (kind, first, count)) in parts.iter().enumerate() {
            let entry = &mut bytes[446 + index * 16..][..16];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&first.to_le_bytes());
            entry[12..16].copy_from_slice(&count.to_le_bytes());
        }
        bytes
    }

    fn of(bytes: &[u8]) -> Result<Vec<Partition>, TableError> {
        partitions(&disk(bytes), bytes.len() as u64)
    }

    #[test]
    fn both_kinds_of_tables_are_read() {
        let first = Partition { number: 1, begin: 64 << 10, size: 64 << 10 };
        let third = Partition { number: 3, begin: 128 << 10, size: 4096 };
        assert_eq!(of(&with_gpt(512, &[(128, 255), (0, 0), (256, 263)])).unwrap(), [first, third]);
        assert_eq!(of(&with_gpt(4096, &[(16, 31)])).unwrap(), [first]);
        assert_eq!(of(&with_mbr(&[(0x83, 128, 128), (5, 1, 1), (0x83, 256, 8)])).unwrap(), [first, third]);
    }

    #[test]
    fn what_does_not_fit_is_said() {
        let cut = with_gpt(512, &[(128, 255), (256, 511)]);
        assert_eq!(of(&cut[..200 << 10]), Err(TableError::CutShort { number: 2, size: 200 << 10 }));
        assert!(matches!(of(&with_mbr(&[(0x83, 128, u32::MAX)])), Err(TableError::CutShort { number: 1, .. })));
        assert!(matches!(of(&with_gpt(512, &[(255, 128)])), Err(TableError::Damaged(_))));
        assert!(matches!(of(&with_gpt(512, &[(0, u64::MAX)])), Err(TableError::Damaged(_))));
        let mut lost = with_gpt(512, &[(128, 255)]);
        lost[512] = 0;
        assert!(matches!(of(&lost), Err(TableError::Damaged(_))));
        for nothing in [vec![], vec![0; 5], vec![0; 1 << 16], vec![0xaa; 1 << 16], b"text".repeat(1000)] {
            assert_eq!(of(&nothing), Err(TableError::None));
        }
    }

    proptest! {
        /// Whatever the table says, a partition lies in the disk.
        #[test]
        fn partitions_lie_in_the_disk(seed in proptest::collection::vec((0usize..8192, any::<u8>()), 0..40), gpt in any::<bool>()) {
            let mut bytes = if gpt { with_gpt(512, &[(128, 255), (256, 263)]) } else { with_mbr(&[(0x83, 128, 128)]) };
            for (at, byte) in seed {
                bytes[at] = byte;
            }
            if let Ok(found) = of(&bytes) {
                prop_assert!(found.iter().all(|part| part.begin + part.size <= bytes.len() as u64));
            }
        }
    }
}
