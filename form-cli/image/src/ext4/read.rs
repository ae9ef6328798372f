//! Reads what is in an ext4 file system, without privileges and without a mount (kernel documentation: `filesystems/ext4`).
//!
//! It reads what this builder writes, and what distributions make for their cloud images: extents, no inline data, no encryption. The file system may be anybody's: every number that leads
//! somewhere is looked at before it is followed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::Path,
};

use crate::{
    BuildError, Cancel,
    diff::{Diff, EPOCH, Entry, Kind, Meta, XattrValue},
    tarball::Spool,
    tree_path::TreePath,
};

/// Features that change how a file system is read: file types in directories, extents, 64-bit block numbers, flexible groups. The
/// seed of checksums (0x2000) changes only them.
const KNOWN: u32 = 0x2 | 0x40 | 0x80 | 0x200 | 0x2000;
/// What is in the journal is not in the file system yet.
const RECOVER: u32 = 0x4;
const ENCRYPT: u32 = 0x1_0000;
const ROOT: u32 = 2;
const EXTENTS: u32 = 0x8_0000;
const INLINE_DATA: u32 = 0x1000_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
const XATTR_MAGIC: u32 = 0xea02_0000;
/// An extent of more blocks than these is one that was never written, and has so many fewer.
const WRITTEN: u16 = 32_768;
const MAX_DEPTH: u16 = 5;
/// More pieces of one file than these are made to fill the memory.
const MAX_EXTENTS: usize = 1 << 20;
/// As for the images of registries.
const MAX_FILES: usize = 2_000_000;
const TOO_MANY: &str = "it has more than 2,000,000 files";
const MAX_DIRECTORY: u64 = 256 << 20;
/// A longer target is no path.
const MAX_TARGET: u64 = 4096;

/// What is in the file system in `path`, with its contents in `spool`. All files together have at most `limit_gib` GiB.
///
/// # Errors
/// When it is no file system of this builder, or damaged; those of the disk; when it is cancelled.
pub(crate) fn read(path: &Path, spool: &Spool, limit_gib: u64, cancel: &Cancel) -> Result<Diff, BuildError> {
    System::open(path).and_then(|system| system.read(spool, limit_gib << 30, cancel, &|_| true)).map_err(Fault::into_error)
}

/// What is in a file system that lies in `file` at `begin`, as [`read`] gives it. Of paths that are not `wanted` neither they nor what is below
/// them are read.
///
/// # Errors
/// As [`read`].
pub(crate) fn read_within(
    (file, begin, size): (File, u64, u64),
    spool: &Spool,
    limit_gib: u64,
    cancel: &Cancel,
    wanted: &dyn Fn(&TreePath) -> bool,
) -> Result<Diff, BuildError> {
    System::within(file, begin, size).and_then(|system| system.read(spool, limit_gib << 30, cancel, wanted)).map_err(Fault::into_error)
}

/// The names in the root of a file system that lies in `file` at `begin`.
///
/// # Errors
/// As [`read`].
pub(crate) fn root_names((file, begin, size): (File, u64, u64), cancel: &Cancel) -> Result<Vec<Vec<u8>>, BuildError> {
    let names = System::within(file, begin, size).and_then(|system| {
        let root = system.inode(ROOT)?;
        system.names_in(&root, cancel)
    });
    names.map(|names| names.into_iter().map(|(name, _)| name).collect()).map_err(Fault::into_error)
}

/// As [`read_within`], everything, and at most `limit` bytes.
///
/// # Errors
/// As [`read`].
#[cfg(feature = "fuzzing")]
pub(crate) fn read_little((file, begin, size): (File, u64, u64), spool: &Spool, limit: u64) -> Result<Diff, BuildError> {
    System::within(file, begin, size).and_then(|system| system.read(spool, limit, &Cancel::new(), &|_| true)).map_err(Fault::into_error)
}

fn read_all(system: &System, spool: &Spool, limit: u64, cancel: &Cancel, wanted: &dyn Fn(&TreePath) -> bool) -> Found<Diff> {
    let mut walk = Walk { system, spool, cancel, wanted, diff: Diff::default(), names: BTreeMap::new(), left: limit };
    let walked = walk.run();
    let mut diff = walk.diff;
    match walked {
        Ok(()) => {
            diff.normalise();
            Ok(diff)
        }
        // However it shows: a reader that was stopped looks like a damaged file.
        Err(_) if cancel.is_cancelled() => Err(Fault::Build(BuildError::Cancelled)),
        Err(fault) => Err(fault),
    }
}

enum Fault {
    Damaged(String),
    Build(BuildError),
}

impl Fault {
    fn into_error(self) -> BuildError {
        match self {
            Self::Damaged(reason) => BuildError::FileSystem { reason: format!("the image's file system cannot be read: {reason}") },
            Self::Build(error) => error,
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Damaged(error.to_string())
    }
}

type Found<T> = Result<T, Fault>;

fn damaged<T>(reason: impl Into<String>) -> Found<T> {
    Err(Fault::Damaged(reason.into()))
}

fn word(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |two| u16::from_le_bytes([two[0], two[1]]))
}

fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | (u32::from(word(bytes, at + 2)) << 16)
}

/// A number whose halves lie apart.
fn split(low: u32, high: u32) -> u64 {
    u64::from(low) | (u64::from(high) << 32)
}

struct System {
    file: File,
    /// Where in the file it begins.
    begin: u64,
    /// Bytes.
    size: u64,
    block: u64,
    inodes: u32,
    inodes_per_group: u32,
    inode_size: u64,
    descriptor_size: u64,
    first_data_block: u64,
}

struct Inode {
    number: u32,
    mode: u16,
    uid: u32,
    gid: u32,
    size: u64,
    mtime: u32,
    links: u16,
    flags: u32,
    blocks: [u8; 60],
    xattrs: BTreeMap<String, XattrValue>,
}

/// What was found of a file's tree of extents.
#[derive(Default)]
struct Tree {
    extents: Vec<Extent>,
    /// At each depth, the first block of the file that the next entry may be for.
    next: [u64; MAX_DEPTH as usize + 1],
}

/// Blocks of a file that lie together.
#[derive(Clone, Copy)]
struct Extent {
    first: u64,
    length: u64,
    /// `None` for zeros.
    place: Option<u64>,
}

impl System {
    fn open(path: &Path) -> Found<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        Self::within(file, 0, size)
    }

    fn within(file: File, begin: u64, size: u64) -> Found<Self> {
        if size < 2048 {
            return damaged("it is no ext4");
        }
        let mut bytes = [0; 1024];
        file.read_exact_at(&mut bytes, begin.saturating_add(1024))?;
        let features = long(&bytes, 0x60);
        if word(&bytes, 0x38) != 0xef53 {
            return damaged("it is no ext4");
        }
        if features & RECOVER != 0 {
            return damaged("it was not unmounted cleanly: mount and unmount it once, or shut its machine down");
        }
        if features & ENCRYPT != 0 {
            return damaged("it has encrypted files");
        }
        if features & !KNOWN != 0 {
            return damaged(format!("it uses features that this version does not know ({:#x})", features & !KNOWN));
        }
        let log = long(&bytes, 0x18);
        let system = Self {
            file,
            begin,
            size,
            block: if log <= 6 { 1024 << log } else { 0 },
            inodes: long(&bytes, 0),
            inodes_per_group: long(&bytes, 0x28),
            inode_size: u64::from(word(&bytes, 0x58)),
            descriptor_size: if features & 0x80 == 0 { 32 } else { u64::from(word(&bytes, 0xfe)) },
            first_data_block: u64::from(long(&bytes, 0x14)),
        };
        let fits = system.block >= 1024 && system.inodes_per_group > 0 && (128..=system.block).contains(&system.inode_size);
        if fits && (32..=1024).contains(&system.descriptor_size) { Ok(system) } else { damaged("its superblock makes no sense") }
    }

    fn read_at(&self, at: u64, length: u64) -> Found<Vec<u8>> {
        if at.checked_add(length).is_none_or(|end| end > self.size) {
            return damaged("something in it lies behind its end");
        }
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| Fault::Damaged("something in it is too large".to_owned()))?];
        self.read_exact_at(&mut bytes, at)?;
        Ok(bytes)
    }

    /// Nothing behind its end is read: there may be another file system.
    fn read_exact_at(&self, piece: &mut [u8], at: u64) -> io::Result<()> {
        match at.checked_add(piece.len() as u64).filter(|end| *end <= self.size).and_then(|_| at.checked_add(self.begin)) {
            Some(at) => self.file.read_exact_at(piece, at),
            None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "something in it lies behind its end")),
        }
    }

    /// All files together have at most `limit` bytes.
    fn read(&self, spool: &Spool, limit: u64, cancel: &Cancel, wanted: &dyn Fn(&TreePath) -> bool) -> Found<Diff> {
        read_all(self, spool, limit, cancel, wanted)
    }

    fn block(&self, number: u64) -> Found<Vec<u8>> {
        match number.checked_mul(self.block) {
            Some(at) => self.read_at(at, self.block),
            None => damaged("something in it lies behind its end"),
        }
    }

    fn inode(&self, number: u32) -> Found<Inode> {
        if number == 0 || number > self.inodes {
            return damaged(format!("there is no inode {number}"));
        }
        let (group, index) = ((number - 1) / self.inodes_per_group, (number - 1) % self.inodes_per_group);
        let descriptor = (self.first_data_block + 1) * self.block + u64::from(group) * self.descriptor_size;
        let descriptor = self.read_at(descriptor, self.descriptor_size)?;
        let high = if self.descriptor_size >= 64 { long(&descriptor, 0x28) } else { 0 };
        let table = split(long(&descriptor, 8), high).checked_mul(self.block);
        let at = table.and_then(|table| table.checked_add(u64::from(index) * self.inode_size));
        let Some(at) = at else { return damaged("something in it lies behind its end") };
        let bytes = self.read_at(at, self.inode_size)?;
        let flags = long(&bytes, 0x20);
        if flags & INLINE_DATA != 0 {
            return damaged("it has files inside of inodes, which this version does not know");
        }
        let mut blocks = [0; 60];
        blocks.copy_from_slice(&bytes[0x28..0x28 + 60]);
        let mut inode = Inode {
            number,
            mode: word(&bytes, 0),
            uid: u32::from(word(&bytes, 2)) | (u32::from(word(&bytes, 0x78)) << 16),
            gid: u32::from(word(&bytes, 0x18)) | (u32::from(word(&bytes, 0x7a)) << 16),
            size: split(long(&bytes, 4), long(&bytes, 0x6c)),
            mtime: long(&bytes, 0x10),
            links: word(&bytes, 0x1a),
            flags,
            blocks,
            xattrs: BTreeMap::new(),
        };
        let within = 128 + usize::from(word(&bytes, 0x80));
        if bytes.len() > 132 && long(&bytes, within) == XATTR_MAGIC {
            attributes(&bytes, within + 4, within + 4, &mut inode.xattrs)?;
        }
        let outside = split(long(&bytes, 0x68), u32::from(word(&bytes, 0x76)));
        if outside != 0 {
            let block = self.block(outside)?;
            if long(&block, 0) == XATTR_MAGIC {
                attributes(&block, 32, 0, &mut inode.xattrs)?;
            }
        }
        Ok(inode)
    }

    /// The places of a file's blocks, in order.
    fn extents(&self, inode: &Inode) -> Found<Vec<Extent>> {
        if inode.flags & EXTENTS == 0 {
            // An empty file has no blocks to describe.
            return if inode.size == 0 { Ok(Vec::new()) } else { damaged(format!("the file of inode {} has no extents", inode.number)) };
        }
        let mut tree = Tree::default();
        self.extents_of(&inode.blocks, MAX_DEPTH, &mut tree).map_err(|fault| match fault {
            Fault::Damaged(reason) => Fault::Damaged(format!("the extents of inode {}: {reason}", inode.number)),
            fault @ Fault::Build(_) => fault,
        })?;
        Ok(tree.extents)
    }

    fn extents_of(&self, node: &[u8], deepest: u16, tree: &mut Tree) -> Found<()> {
        let (entries, depth) = (usize::from(word(node, 2)), word(node, 6));
        if word(node, 0) != EXTENT_MAGIC || depth > deepest || 12 + entries * 12 > node.len() {
            return damaged("the tree is damaged");
        }
        for entry in node[12..12 + entries * 12].chunks_exact(12) {
            // At each depth they go on: no node comes twice, and the work ends with the blocks that there are.
            let (first, next) = (u64::from(long(entry, 0)), &mut tree.next[usize::from(depth)]);
            if first < *next {
                return damaged("they are out of order");
            }
            *next = first + 1;
            if depth > 0 {
                let child = self.block(split(long(entry, 4), u32::from(word(entry, 8))))?;
                self.extents_of(&child, depth - 1, tree)?;
                continue;
            }
            let length = word(entry, 4);
            let place = split(long(entry, 8), u32::from(word(entry, 6)));
            let (length, place) = if length > WRITTEN { (length - WRITTEN, None) } else { (length, Some(place)) };
            tree.next[0] = first + u64::from(length);
            tree.extents.push(Extent { first, length: u64::from(length), place });
            if length == 0 || tree.extents.len() > MAX_EXTENTS {
                return damaged("one is empty, or there are too many");
            }
        }
        Ok(())
    }

    fn contents<'s>(&'s self, inode: &Inode, cancel: &'s Cancel) -> Found<Contents<'s>> {
        Ok(Contents { system: self, extents: self.extents(inode)?, next: 0, at: 0, size: inode.size, cancel })
    }

    fn whole(&self, inode: &Inode, limit: u64, cancel: &Cancel) -> Found<Vec<u8>> {
        if inode.size > limit {
            return damaged(format!("inode {} is too large", inode.number));
        }
        let mut bytes = Vec::new();
        self.contents(inode, cancel)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn names_in(&self, directory: &Inode, cancel: &Cancel) -> Found<Vec<(Vec<u8>, u32)>> {
        // A directory has no holes: what its inode says alone is nothing to make room for.
        let written: u64 = self.extents(directory)?.iter().filter(|extent| extent.place.is_some()).map(|extent| extent.length).sum();
        if directory.size > written * self.block {
            return damaged(format!("the directory of inode {} is longer than its blocks", directory.number));
        }
        let bytes = self.whole(directory, MAX_DIRECTORY, cancel)?;
        let mut found = Vec::new();
        // Entries do not go from block to block; inner blocks of an index look like empty ones.
        for block in bytes.chunks(usize::try_from(self.block).unwrap_or(4096)) {
            let mut at = 0;
            while at + 8 <= block.len() {
                let (inode, length, name) = (long(block, at), usize::from(word(block, at + 4)), usize::from(block[at + 6]));
                // The largest length, of blocks of 64 KiB, is written as this.
                let length = if length == 0xffff || (length == 0 && block.len() > 0xffff) { block.len() } else { length };
                if length < 8 || at + length > block.len() || 8 + name > length {
                    return damaged("a directory is damaged");
                }
                let name = &block[at + 8..at + 8 + name];
                if inode != 0 && name != b"." && name != b".." {
                    if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
                        return damaged("a directory has a name that is none");
                    }
                    found.push((name.to_vec(), inode));
                    if found.len() > MAX_FILES {
                        return damaged(TOO_MANY);
                    }
                }
                at += length;
            }
        }
        found.sort();
        match found.windows(2).find(|two| two[0].0 == two[1].0) {
            Some(two) => damaged(format!("a directory has the name {} twice", String::from_utf8_lossy(&two[0].0).escape_debug())),
            None => Ok(found),
        }
    }
}

/// The attributes that are part of an image, of a list that begins at `at`. Values lie behind `base`.
fn attributes(bytes: &[u8], mut at: usize, base: usize, found: &mut BTreeMap<String, XattrValue>) -> Found<()> {
    while at + 4 <= bytes.len() && long(bytes, at) != 0 {
        let (length, index) = (usize::from(bytes[at]), *bytes.get(at + 1).unwrap_or(&0));
        let begin = base + usize::from(word(bytes, at + 2));
        let end = begin.saturating_add(long(bytes, at + 8) as usize);
        let name = bytes.get(at + 16..at + 16 + length).map(String::from_utf8_lossy);
        let (Some(name), Some(value)) = (name, bytes.get(begin..end)) else { return damaged("an attribute is damaged") };
        let name = match index {
            1 => format!("user.{name}"),
            6 => format!("security.{name}"),
            _ => String::new(),
        };
        // As of every base: what else there is belongs to the machine that it was on.
        if name.starts_with("user.") || name == "security.capability" {
            found.insert(name, XattrValue(value.to_vec()));
        }
        at += 16 + length.next_multiple_of(4);
    }
    Ok(())
}

/// The bytes of a file. What no extent covers are zeros.
struct Contents<'s> {
    system: &'s System,
    extents: Vec<Extent>,
    /// The extent that was read last, or the one after it.
    next: usize,
    at: u64,
    size: u64,
    cancel: &'s Cancel,
}

impl Read for Contents<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        let block = self.system.block;
        while self.extents.get(self.next).is_some_and(|extent| (extent.first + extent.length) * block <= self.at) {
            self.next += 1;
        }
        let (place, end) = match self.extents.get(self.next) {
            Some(extent) if extent.first * block <= self.at => {
                let place = extent.place.map(|place| place.saturating_mul(block).saturating_add(self.at - extent.first * block));
                (place, (extent.first + extent.length) * block)
            }
            Some(extent) => (None, extent.first * block),
            None => (None, self.size),
        };
        let most = usize::try_from(end.min(self.size).saturating_sub(self.at)).unwrap_or(usize::MAX).min(buffer.len());
        let piece = &mut buffer[..most];
        match place {
            Some(place) => self.system.read_exact_at(piece, place)?,
            None => piece.fill(0),
        }
        self.at += most as u64;
        Ok(most)
    }
}

struct Walk<'a> {
    system: &'a System,
    spool: &'a Spool,
    cancel: &'a Cancel,
    wanted: &'a dyn Fn(&TreePath) -> bool,
    diff: Diff,
    /// The first name of each file that has several.
    names: BTreeMap<u32, TreePath>,
    /// Bytes that may still come.
    left: u64,
}

impl Walk<'_> {
    fn run(&mut self) -> Found<()> {
        let mut seen = BTreeSet::from([ROOT]);
        let mut waiting = vec![(TreePath::root(), self.system.inode(ROOT)?)];
        while let Some((directory, inode)) = waiting.pop() {
            if inode.mode & 0xf000 != 0x4000 {
                return damaged("a directory is none");
            }
            for (name, number) in self.system.names_in(&inode, self.cancel)? {
                if self.cancel.is_cancelled() {
                    return Err(Fault::Build(BuildError::Cancelled));
                }
                if directory.is_root() && name == b"lost+found" {
                    continue;
                }
                let path = TreePath::parse(directory.join(&name).as_bytes()).map_err(|error| Fault::Damaged(error.to_string()))?;
                if !(self.wanted)(&path) {
                    continue;
                }
                let inode = self.system.inode(number)?;
                self.entry(&path, &inode)?;
                if inode.mode & 0xf000 == 0x4000 {
                    if !seen.insert(number) {
                        return damaged("a directory is in two places");
                    }
                    waiting.push((path, inode));
                }
                if self.diff.entries.len() > MAX_FILES {
                    return damaged(TOO_MANY);
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &TreePath, inode: &Inode) -> Found<()> {
        let device = || {
            let (old, new) = (long(&inode.blocks, 0), long(&inode.blocks, 4));
            if old == 0 { ((new >> 8) & 0xfff, (new & 0xff) | ((new >> 12) & 0xf_ff00)) } else { ((old >> 8) & 0xff, old & 0xff) }
        };
        let kind = match inode.mode & 0xf000 {
            0x4000 => Kind::Directory { opaque: false },
            _ if self.names.contains_key(&inode.number) => Kind::Link { target: self.names[&inode.number].clone() },
            0x8000 => {
                let Some(left) = self.left.checked_sub(inode.size) else { return damaged("its files are larger than its disk") };
                self.left = left;
                let mut contents = self.system.contents(inode, self.cancel)?;
                let (size, digest) = self.spool.add(&mut contents).map_err(Fault::Build)?;
                Kind::File { size, digest }
            }
            0xa000 => {
                let target = match usize::try_from(inode.size) {
                    Ok(length) if length < inode.blocks.len() && inode.flags & EXTENTS == 0 => inode.blocks[..length].to_vec(),
                    _ => self.system.whole(inode, MAX_TARGET, self.cancel)?,
                };
                Kind::Symlink { target: XattrValue(target) }
            }
            0x2000 => {
                let (major, minor) = device();
                Kind::Char { major, minor }
            }
            0x6000 => {
                let (major, minor) = device();
                Kind::Block { major, minor }
            }
            0x1000 => Kind::Fifo,
            // A socket is nothing without the program that made it.
            0xc000 => return Ok(()),
            other => return damaged(format!("{path} is of a kind that there is not ({other:#x})")),
        };
        if inode.links > 1 && !matches!(kind, Kind::Directory { .. } | Kind::Link { .. }) {
            self.names.insert(inode.number, path.clone());
        }
        let meta = Meta {
            mode: u32::from(inode.mode & 0o7777),
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime.min(EPOCH),
            xattrs: inode.xattrs.clone(),
        };
        self.diff.entries.push(Entry { path: path.clone(), meta, kind });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
