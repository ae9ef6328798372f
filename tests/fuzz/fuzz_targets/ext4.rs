//! Ext4 file systems that somebody else made, as images of disks and imported images hold them.
//!
//! The sound one, `src/format/ext4.gz`, has 120 blocks of 1 KiB: directories, one of them of some blocks, files, one with more extents than fit into its
//! inode, hard and symbolic links short and long, devices, attributes in an inode and outside of one. `mke2fs -d` made it, without a journal and with
//! inodes of 256 bytes. The reader looks at no checksums of it, so a change needs none.

#![no_main]

use std::{fs::File, io::Read, os::unix::fs::FileExt, path::PathBuf, sync::LazyLock};

use arbitrary::Arbitrary;
use flate2::read::GzDecoder;
use form_image::fuzzing::ext4;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

const BLOCK: usize = 1024;
/// Before and behind the file system.
const AROUND: usize = 4096;
const OUTSIDE: u8 = 0xc7;
/// Of all files together, in bytes.
const LIMIT: u64 = 1 << 18;
const MAX_CHANGES: usize = 24;
/// Where the inodes are.
const INODES: usize = 35 * BLOCK;
const INODE: usize = 256;

#[derive(Arbitrary, Debug)]
enum Place {
    Superblock(u16),
    Descriptor(u8),
    /// A field of an inode: one of the first, which are in use.
    Inode(u8, u8),
    /// Of a block that is not all zeros.
    Used(u8, u16),
    /// Of any block.
    Any(u8, u16),
}

#[derive(Arbitrary, Debug)]
enum Change<'a> {
    Byte(Place, u8),
    Flip(Place, u8),
    Half(Place, u16),
    Word(Place, u32),
    Bytes(Place, &'a [u8]),
    /// A block over another.
    Block {
        from: u8,
        to: u8,
    },
    /// An inode over another.
    CopyInode {
        from: u8,
        to: u8,
    },
    /// What an inode holds lies elsewhere.
    Elsewhere {
        inode: u8,
        to: u8,
        blocks: u8,
    },
    /// A tree of extents in place of what the inode or block has: depth, and for each entry its first block, its length and where it leads.
    Extents {
        inode: Option<u8>,
        block: u8,
        depth: u8,
        entries: Vec<(u8, u16, u8)>,
    },
}

static SOUND: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut disk = Vec::new();
    GzDecoder::new(&include_bytes!("../src/format/ext4.gz")[..]).read_to_end(&mut disk).expect("a sound file");
    disk
});

static USED: LazyLock<Vec<usize>> = LazyLock::new(|| {
    let blocks = SOUND.chunks(BLOCK).enumerate();
    blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0)).map(|(index, _)| index * BLOCK).collect()
});

impl Place {
    fn at(&self) -> usize {
        match self {
            Self::Superblock(at) => BLOCK + usize::from(at % 1024),
            Self::Descriptor(at) => 2 * BLOCK + usize::from(at % 64),
            Self::Inode(number, at) => inode(*number) + usize::from(*at),
            Self::Used(block, at) => USED[usize::from(*block) % USED.len()] + usize::from(at % 1024),
            Self::Any(block, at) => block_at(*block) + usize::from(at % 1024),
        }
    }
}

fn inode(number: u8) -> usize {
    INODES + usize::from(number % 64) * INODE
}

fn block_at(number: u8) -> usize {
    usize::from(number) % (SOUND.len() / BLOCK) * BLOCK
}

fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
    let end = (at + bytes.len()).min(disk.len());
    disk[at..end].copy_from_slice(&bytes[..end - at]);
}

/// Kernel documentation: `filesystems/ext4/ifork`.
fn extents(depth: u8, entries: &[(u8, u16, u8)], most: usize) -> Vec<u8> {
    // Mostly of one depth: the files of the sound one have no more.
    let depth = if depth < 128 { 0 } else { depth % 6 };
    let count = entries.len().min(most) as u16;
    let mut node = [0xf30a, count, count, depth.into(), 0, 0].map(u16::to_le_bytes).concat();
    for (first, length, to) in entries.iter().take(most) {
        node.extend(u32::from(first % 16).to_le_bytes());
        // Many at the end of the file system, or behind it.
        let last = (SOUND.len() / BLOCK - 1) as u32;
        let place = if *to < 64 { last + u32::from(to % 4) } else { u32::from(*to) % last }.to_le_bytes();
        let rest = if depth == 0 { [&length.to_le_bytes()[..], &[0; 2], &place] } else { [&place[..], &[0; 2], &[0; 2]] };
        node.extend(rest.concat());
    }
    node
}

impl Change<'_> {
    fn make(&self, disk: &mut [u8]) {
        match self {
            Self::Byte(place, value) => disk[place.at()] = *value,
            Self::Flip(place, bit) => disk[place.at()] ^= 1 << (bit % 8),
            Self::Half(place, value) => put(disk, place.at(), &value.to_le_bytes()),
            Self::Word(place, value) => put(disk, place.at(), &value.to_le_bytes()),
            Self::Bytes(place, bytes) => put(disk, place.at(), bytes),
            Self::Block { from, to } => disk.copy_within(block_at(*from)..block_at(*from) + BLOCK, block_at(*to)),
            Self::CopyInode { from, to } => disk.copy_within(inode(*from)..inode(*from) + INODE, inode(*to)),
            Self::Elsewhere { inode: number, to, blocks } => {
                put(disk, inode(*number) + 0x28, &extents(0, &[(0, u16::from(*blocks), *to)], 1));
            }
            Self::Extents { inode: Some(number), depth, entries, .. } => put(disk, inode(*number) + 0x28, &extents(*depth, entries, 4)),
            Self::Extents { block, depth, entries, .. } => put(disk, block_at(*block), &extents(*depth, entries, 84)),
        }
    }
}

static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| PathBuf::from(format!("/dev/shm/form-fuzz-ext4-{}", std::process::id())));

fuzz_target!(|input: (Vec<Change>, Option<u8>)| {
    let (changes, lost) = input;
    let mut disk = SOUND.clone();
    changes.iter().take(MAX_CHANGES).for_each(|change| change.make(&mut disk));
    // What lies around it is nowhere in it.
    disk.iter_mut().filter(|byte| **byte == OUTSIDE).for_each(|byte| *byte = 0);
    // As a partition may be shorter than what is in it.
    let size = disk.len() - usize::from(lost.unwrap_or(0)) * 256;
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file in memory"));
    let around = [OUTSIDE; AROUND];
    file.write_all_at(&[&around[..], &disk[..size], &around].concat(), 0).expect("it can be written");
    let read = ext4(&file, (AROUND as u64, size as u64), LIMIT, &[OUTSIDE; 64], &DIRECTORY);
    assert!(!changes.is_empty() || size < disk.len() || read == Some(53), "the sound one cannot be read: {read:?}");
    let _ = std::fs::remove_dir_all(&*DIRECTORY);
});
