//! Makes an ext4 file system: one block group, which the kernel then grows to the size of the device.
//!
//! The programs that usually do this are in few images. What is written is what `mke2fs` writes for a file system of one group;
//! layout and checksums are those of the kernel's documentation, `filesystems/ext4`.

use std::{fs::File, io, os::unix::fs::FileExt};

/// The least a device must have.
pub const LEAST_BYTES: u64 = 16 << 20;

const BLOCK: u64 = 4096;
const BLOCK_BYTES: usize = BLOCK as usize;
const GROUP_BLOCKS: u64 = 32768;
const INODES: u64 = 8192;
const INODE_BYTES: u64 = 256;
const FIRST_FREE_INODE: u64 = 12;

const SUPERBLOCK_AT: u64 = 1024;
const DESCRIPTORS: u64 = 1;
/// Room for the descriptors of a file system of 2 TiB; beyond that the kernel keeps them elsewhere.
const RESERVED: u64 = 255;
const BLOCK_BITMAP: u64 = DESCRIPTORS + 1 + RESERVED;
const INODE_BITMAP: u64 = BLOCK_BITMAP + 1;
const INODE_TABLE: u64 = INODE_BITMAP + 1;
const INODE_TABLE_BLOCKS: u64 = INODES * INODE_BYTES / BLOCK;
const ROOT_DIRECTORY: u64 = INODE_TABLE + INODE_TABLE_BLOCKS;
const LOST_AND_FOUND: u64 = ROOT_DIRECTORY + 1;
const RESIZE_MAP: u64 = LOST_AND_FOUND + 1;
const JOURNAL: u64 = RESIZE_MAP + 1;

const ROOT_INODE: u32 = 2;
const RESIZE_INODE: u32 = 7;
const JOURNAL_INODE: u32 = 8;
const LOST_AND_FOUND_INODE: u32 = 11;

/// has_journal, ext_attr, resize_inode, dir_index.
const COMPATIBLE: u32 = 0x4 | 0x8 | 0x10 | 0x20;
/// filetype, extents, 64bit, flex_bg.
const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x80 | 0x200;
/// sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum.
const READ_ONLY_COMPATIBLE: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;

const USES_EXTENTS: u32 = 0x8_0000;

/// Where the mark of [`begin`] is: in the bytes before the superblock, which belong to nobody.
const MARK: &[u8; 48] = b"Formation makes a file system here 9c1f4e7ab3d20";

/// What makes one file system different from another.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    pub uuid: [u8; 16],
    /// For the order of names in directories.
    pub hash_seed: [u8; 16],
    /// Seconds since 1970.
    pub now: u32,
    /// Of the root directory.
    pub owner: u32,
    pub group: u32,
    /// Its permissions, without the kind of file.
    pub mode: u16,
}

/// Makes the file system on a device that reads as zeros, or on which an earlier try was interrupted. The superblock is written last:
/// until then the device bears a mark by which [`is_interrupted`] knows it.
///
/// # Errors
/// When the device is smaller than [`LEAST_BYTES`], or cannot be written.
pub fn make(device: &File, device_bytes: u64, identity: &Identity) -> io::Result<()> {
    if device_bytes < LEAST_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a file system needs {LEAST_BYTES} bytes, not {device_bytes}")));
    }
    let layout = Layout::new(device_bytes, *identity);
    device.write_all_at(MARK, 0)?;
    device.sync_data()?;
    let at = |block: u64| block * BLOCK;
    let (block_bitmap, inode_bitmap) = (layout.block_bitmap(), inode_bitmap());
    device.write_all_at(&layout.descriptors(&block_bitmap, &inode_bitmap), at(DESCRIPTORS))?;
    device.write_all_at(&block_bitmap, at(BLOCK_BITMAP))?;
    device.write_all_at(&inode_bitmap, at(INODE_BITMAP))?;
    for (number, inode) in layout.inodes() {
        device.write_all_at(&inode, at(INODE_TABLE) + (u64::from(number) - 1) * INODE_BYTES)?;
    }
    device.write_all_at(&layout.root_directory(), at(ROOT_DIRECTORY))?;
    device.write_all_at(&layout.lost_and_found(), at(LOST_AND_FOUND))?;
    device.write_all_at(&resize_map(), at(RESIZE_MAP))?;
    device.write_all_at(&layout.journal(), at(JOURNAL))?;
    device.sync_data()?;
    device.write_all_at(&layout.superblock(), SUPERBLOCK_AT)?;
    device.sync_data()?;
    device.write_all_at(&[0; MARK.len()], 0)?;
    device.sync_data()
}

/// Whether [`make`] began here and did not come to its end.
///
/// # Errors
/// When the device cannot be read.
pub fn is_interrupted(device: &File) -> io::Result<bool> {
    let mut bytes = [0; MARK.len()];
    device.read_exact_at(&mut bytes, 0)?;
    Ok(bytes == *MARK)
}

struct Layout {
    blocks: u64,
    journal_blocks: u64,
    identity: Identity,
    /// What every checksum begins with.
    seed: u32,
}

impl Layout {
    fn new(device_bytes: u64, identity: Identity) -> Self {
        let blocks = (device_bytes / BLOCK).min(GROUP_BLOCKS);
        // As large as `mke2fs` makes it for a disk of this size, as far as there is room for it in one group.
        let journal_blocks = match device_bytes >> 20 {
            ..128 => 1024,
            128..1024 => 4096,
            1024..2048 => 8192,
            _ => 16384,
        };
        Self { blocks, journal_blocks, seed: crc32c(!0, &identity.uuid), identity }
    }

    const fn used_blocks(&self) -> u64 {
        JOURNAL + self.journal_blocks
    }

    fn superblock(&self) -> [u8; 1024] {
        let mut block = Fields([0; 1024]);
        let now = self.identity.now;
        block.u32(0x00, INODES as u32);
        block.u32(0x04, self.blocks as u32);
        block.u32(0x0c, (self.blocks - self.used_blocks()) as u32);
        block.u32(0x10, (INODES - FIRST_FREE_INODE + 1) as u32);
        block.u32(0x18, 2); // blocks of 1024 << 2
        block.u32(0x1c, 2);
        block.u32(0x20, GROUP_BLOCKS as u32);
        block.u32(0x24, GROUP_BLOCKS as u32);
        block.u32(0x28, INODES as u32);
        block.u32(0x30, now);
        block.u16(0x36, u16::MAX); // mounts before a check: any number
        block.u16(0x38, super::MAGIC);
        block.u16(0x3a, 1); // clean
        block.u16(0x3c, 1); // go on after errors
        block.u32(0x40, now);
        block.u32(0x4c, 1); // dynamic inode sizes
        block.u32(0x54, LOST_AND_FOUND_INODE);
        block.u16(0x58, INODE_BYTES as u16);
        block.u32(0x5c, COMPATIBLE);
        block.u32(0x60, INCOMPATIBLE);
        block.u32(0x64, READ_ONLY_COMPATIBLE);
        block.bytes(0x68, &self.identity.uuid);
        block.u16(0xce, RESERVED as u16);
        block.u32(0xe0, JOURNAL_INODE);
        block.bytes(0xec, &self.identity.hash_seed);
        block.u8(0xfc, 1); // half MD4
        block.u8(0xfd, 1); // a copy of the journal's inode follows at 0x10c
        block.u16(0xfe, 64); // bytes of a group descriptor
        block.u32(0x100, 0xc); // user_xattr, acl
        block.u32(0x108, now);
        let journal = extent(JOURNAL, self.journal_blocks);
        block.bytes(0x10c, &journal);
        block.u32(0x10c + 16 * 4, (self.journal_blocks * BLOCK) as u32);
        block.u16(0x15c, 32);
        block.u16(0x15e, 32);
        block.u32(0x160, 1); // names are hashed as signed characters
        block.u8(0x174, 4); // 16 groups keep their tables together
        block.u8(0x175, 1); // CRC-32C
        let checksum = crc32c(!0, &block.0[..0x3fc]);
        block.u32(0x3fc, checksum);
        block.0
    }

    fn descriptors(&self, block_bitmap: &[u8], inode_bitmap: &[u8]) -> [u8; BLOCK_BYTES] {
        let mut group = Fields([0; 64]);
        group.u32(0x00, BLOCK_BITMAP as u32);
        group.u32(0x04, INODE_BITMAP as u32);
        group.u32(0x08, INODE_TABLE as u32);
        group.u16(0x0c, (self.blocks - self.used_blocks()) as u16);
        group.u16(0x0e, (INODES - FIRST_FREE_INODE + 1) as u16);
        group.u16(0x10, 2); // directories
        group.u16(0x12, 0x4); // the inode table is zeroed
        group.u16(0x1c, (INODES - FIRST_FREE_INODE + 1) as u16);
        let halves = |checksum: u32| (checksum as u16, (checksum >> 16) as u16);
        let (low, high) = halves(crc32c(self.seed, block_bitmap));
        group.u16(0x18, low);
        group.u16(0x38, high);
        let (low, high) = halves(crc32c(self.seed, &inode_bitmap[..INODES as usize / 8]));
        group.u16(0x1a, low);
        group.u16(0x3a, high);
        let checksum = crc32c(crc32c(self.seed, &0_u32.to_le_bytes()), &group.0);
        group.u16(0x1e, checksum as u16);
        let mut block = [0; BLOCK_BYTES];
        block[..64].copy_from_slice(&group.0);
        block
    }

    fn block_bitmap(&self) -> [u8; BLOCK_BYTES] {
        // What lies behind the end counts as used.
        bitmap(|block| block < self.used_blocks() || block >= self.blocks)
    }

    fn inodes(&self) -> Vec<(u32, [u8; 256])> {
        let sectors = |blocks: u64| (blocks * BLOCK / 512) as u32;
        let directory = |mode, links, block| Inode { mode, links, bytes: BLOCK, sectors: sectors(1), map: Map::Extent(block, 1) };
        let all = [
            (ROOT_INODE, directory(0o40000 | self.identity.mode & 0o7777, 3, ROOT_DIRECTORY)),
            (
                RESIZE_INODE,
                Inode {
                    mode: 0o100_600,
                    links: 1,
                    // As far as two levels of maps reach.
                    bytes: (1024 * 1024 + 1024 + 12) * BLOCK,
                    sectors: sectors(1 + RESERVED),
                    map: Map::DoubleIndirect(RESIZE_MAP),
                },
            ),
            (
                JOURNAL_INODE,
                Inode {
                    mode: 0o100_600,
                    links: 1,
                    bytes: self.journal_blocks * BLOCK,
                    sectors: sectors(self.journal_blocks),
                    map: Map::Extent(JOURNAL, self.journal_blocks),
                },
            ),
            (LOST_AND_FOUND_INODE, directory(0o40700, 2, LOST_AND_FOUND)),
        ];
        all.into_iter().map(|(number, inode)| (number, self.inode(number, &inode))).collect()
    }

    fn inode(&self, number: u32, inode: &Inode) -> [u8; 256] {
        let mut bytes = Fields([0; 256]);
        let now = self.identity.now;
        bytes.u16(0x00, inode.mode);
        bytes.u32(0x04, inode.bytes as u32);
        for time in [0x08, 0x0c, 0x10, 0x90] {
            bytes.u32(time, now);
        }
        if number == ROOT_INODE {
            let Identity { owner, group, .. } = self.identity;
            bytes.u16(0x02, owner as u16);
            bytes.u16(0x78, (owner >> 16) as u16);
            bytes.u16(0x18, group as u16);
            bytes.u16(0x7a, (group >> 16) as u16);
        }
        bytes.u16(0x1a, inode.links);
        bytes.u32(0x1c, inode.sectors);
        match inode.map {
            Map::Extent(block, count) => {
                bytes.u32(0x20, USES_EXTENTS);
                bytes.bytes(0x28, &extent(block, count));
            }
            Map::DoubleIndirect(block) => bytes.u32(0x28 + 13 * 4, block as u32),
        }
        bytes.u32(0x6c, (inode.bytes >> 32) as u32);
        bytes.u16(0x80, 32);
        let checksum = crc32c(self.inode_seed(number), &bytes.0);
        bytes.u16(0x7c, checksum as u16);
        bytes.u16(0x82, (checksum >> 16) as u16);
        bytes.0
    }

    /// What belongs to an inode begins with its number and its generation, which is zero.
    fn inode_seed(&self, number: u32) -> u32 {
        crc32c(crc32c(self.seed, &number.to_le_bytes()), &[0; 4])
    }

    fn root_directory(&self) -> [u8; BLOCK_BYTES] {
        self.directory(ROOT_INODE, &[(ROOT_INODE, "."), (ROOT_INODE, ".."), (LOST_AND_FOUND_INODE, "lost+found")])
    }

    fn lost_and_found(&self) -> [u8; BLOCK_BYTES] {
        self.directory(LOST_AND_FOUND_INODE, &[(LOST_AND_FOUND_INODE, "."), (ROOT_INODE, "..")])
    }

    fn directory(&self, inode: u32, entries: &[(u32, &str)]) -> [u8; BLOCK_BYTES] {
        const TAIL: usize = 12;
        let mut block = Fields([0; BLOCK_BYTES]);
        let mut at = 0;
        for (index, (number, name)) in entries.iter().enumerate() {
            let length = if index + 1 == entries.len() { BLOCK_BYTES - TAIL - at } else { (8 + name.len()).next_multiple_of(4) };
            block.u32(at, *number);
            block.u16(at + 4, length as u16);
            block.u8(at + 6, name.len() as u8);
            block.u8(at + 7, 2); // a directory
            block.bytes(at + 8, name.as_bytes());
            at += length;
        }
        block.u16(at + 4, TAIL as u16);
        block.u8(at + 7, 0xde);
        let checksum = crc32c(self.inode_seed(inode), &block.0[..at]);
        block.u32(at + 8, checksum);
        block.0
    }

    /// The journal's own superblock, which is big-endian. The rest of the journal is zeros.
    fn journal(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        let mut put = |at: usize, value: u32| block[at..at + 4].copy_from_slice(&value.to_be_bytes());
        put(0x00, 0xc03b_3998);
        put(0x04, 4); // superblock, version 2
        put(0x0c, BLOCK as u32);
        put(0x10, self.journal_blocks as u32);
        put(0x14, 1);
        put(0x18, 1);
        put(0x40, 1);
        block[0x30..0x40].copy_from_slice(&self.identity.uuid);
        block
    }
}

struct Inode {
    mode: u16,
    links: u16,
    bytes: u64,
    sectors: u32,
    map: Map,
}

enum Map {
    /// First block and count.
    Extent(u64, u64),
    DoubleIndirect(u64),
}

/// The blocks that the kernel may take for descriptors as the file system grows, as the inode kept for this names them.
fn resize_map() -> [u8; BLOCK_BYTES] {
    let mut block = Fields([0; BLOCK_BYTES]);
    for index in 0..RESERVED {
        let entry = (DESCRIPTORS + index) as usize;
        block.u32(entry * 4, (DESCRIPTORS + 1 + index) as u32);
    }
    block.0
}

fn inode_bitmap() -> [u8; BLOCK_BYTES] {
    bitmap(|inode| inode + 1 < FIRST_FREE_INODE || inode >= INODES)
}

fn bitmap(is_used: impl Fn(u64) -> bool) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    for (at, byte) in block.iter_mut().enumerate() {
        *byte = (0..8).filter(|bit| is_used(at as u64 * 8 + bit)).fold(0, |byte, bit| byte | 1 << bit);
    }
    block
}

/// The root of an extent tree that is one extent.
fn extent(block: u64, count: u64) -> [u8; 60] {
    let mut tree = Fields([0; 60]);
    tree.u16(0, 0xf30a);
    tree.u16(2, 1);
    tree.u16(4, 4);
    tree.u16(16, count as u16);
    tree.u32(20, block as u32);
    tree.0
}

/// Bytes with little-endian numbers in them.
struct Fields<const N: usize>([u8; N]);

impl<const N: usize> Fields<N> {
    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn u8(&mut self, at: usize, value: u8) {
        self.0[at] = value;
    }

    fn u16(&mut self, at: usize, value: u16) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_le_bytes());
    }
}

/// CRC-32C (RFC 3720, appendix B.4) as ext4 uses it: it goes on from `seed`, and nothing is inverted at the end.
fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes
        .iter()
        .fold(seed, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ POLYNOMIAL }))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::MetadataExt, process::Command};

    use super::*;

    const IDENTITY: Identity =
        Identity { uuid: [7; 16], hash_seed: [9; 16], now: 1_700_000_000, owner: 70_001, group: 70_002, mode: 0o1770 };

    fn blank(bytes: u64) -> (std::path::PathBuf, File) {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("form-guest-ext4-{}-{number}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).expect("temporary file");
        file.set_len(bytes).expect("temporary file");
        (path, file)
    }

    fn run(program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{program} {arguments:?}: {text}");
        text
    }

    #[test]
    fn the_checksum_is_the_known_one() {
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
    }

    #[test]
    fn e2fsck_finds_nothing_to_mend_whatever_the_size() {
        for bytes in [LEAST_BYTES, LEAST_BYTES + 5000, 100 << 20, 128 << 20, 1 << 30, 5 << 30] {
            let (path, file) = blank(bytes);
            make(&file, bytes, &IDENTITY).expect("made");
            let said = run("e2fsck", &["-fn", path.to_str().expect("UTF-8")]);
            assert!(!is_interrupted(&file).expect("readable"));
            std::fs::remove_file(&path).expect("there");
            assert!(!said.contains("Fix") && said.contains("lost+found") | said.contains("11/8192"), "{bytes}: {said}");
        }
        let (path, file) = blank(1 << 20);
        assert!(make(&file, 1 << 20, &IDENTITY).is_err());
        std::fs::remove_file(&path).expect("there");
    }

    /// Needs root for the mount. That it also grows is tested with a real guest: this needs a capability that containers lack.
    #[test]
    fn the_kernel_mounts_it_and_writes_to_it() {
        let bytes = 1 << 30;
        let (path, file) = blank(bytes);
        make(&file, bytes, &IDENTITY).expect("made");
        let text = path.to_str().expect("UTF-8").to_owned();
        let target = format!("{text}.mount");
        std::fs::create_dir(&target).expect("temporary directory");
        run("mount", &["-o", "loop", &text, &target]);
        let root = std::fs::metadata(&target).map(|meta| (meta.uid(), meta.gid(), meta.mode()));
        let written = std::fs::write(format!("{target}/file"), vec![7; 20 << 20]);
        run("umount", &[&target]);
        std::fs::remove_dir(&target).expect("empty");
        written.expect("writable");
        assert_eq!(root.expect("mounted"), (70_001, 70_002, 0o41_770));
        run("e2fsck", &["-fn", &text]);
        let said = run("debugfs", &["-R", "stat file", &text]);
        std::fs::remove_file(&path).expect("there");
        assert!(said.contains("Size: 20971520"), "{said}");
    }

    #[test]
    fn an_interrupted_try_is_known_and_made_again() {
        let (path, file) = blank(LEAST_BYTES);
        assert!(!is_interrupted(&file).expect("readable"));
        file.write_all_at(MARK, 0).expect("writable");
        file.write_all_at(&[0x55; BLOCK_BYTES], BLOCK_BITMAP * BLOCK).expect("writable");
        assert!(is_interrupted(&file).expect("readable"));
        make(&file, LEAST_BYTES, &IDENTITY).expect("made");
        assert!(!is_interrupted(&file).expect("readable"));
        run("e2fsck", &["-fn", path.to_str().expect("UTF-8")]);
        std::fs::remove_file(&path).expect("there");
    }
}
