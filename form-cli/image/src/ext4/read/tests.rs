use std::fs::OpenOptions;

use super::*;
use crate::{
    ext4::{BASE_SIZE, Ext4},
    index::Index,
};

fn path(text: &str) -> TreePath {
    TreePath::parse(text.as_bytes()).unwrap()
}

/// Some of every kind; with `much` also what takes its time to read.
fn everything(spool: &Spool, much: bool) -> Diff {
    let mut diff = Diff::default();
    let mut add = |text: &str, mode: u32, kind: Kind| {
        diff.entries.push(Entry { path: path(text), meta: Meta::new(mode, 7, 100_008), kind });
    };
    let file = |bytes: &[u8]| {
        let (size, digest) = spool.add(&mut { bytes }).unwrap();
        Kind::File { size, digest }
    };
    for directory in ["dev", "etc", "etc/many", "usr"] {
        add(directory, 0o755, Kind::Directory { opaque: false });
    }
    add("etc/empty", 0o4755, file(b""));
    add("etc/short", 0o4755, file(b"short\n"));
    if much {
        let noise: Vec<u8> = (0..300_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        add("etc/large", 0o644, file(&noise));
        let mut sparse = vec![0; 3 << 20];
        sparse[2 << 20] = 1;
        add("etc/sparse", 0o644, file(&sparse));
    }
    add("etc/zz-link", 0o4755, Kind::Link { target: path("etc/empty") });
    add("usr/near", 0o777, Kind::Symlink { target: XattrValue(b"../etc/short".to_vec()) });
    add("usr/far", 0o777, Kind::Symlink { target: XattrValue([b"/".as_slice(), "x/".repeat(200).as_bytes()].concat()) });
    add("dev/null", 0o666, Kind::Char { major: 1, minor: 3 });
    add("dev/disk", 0o660, Kind::Block { major: 259, minor: 300 });
    add("dev/pipe", 0o644, Kind::Fifo);
    // So many that the directory gets an index.
    for number in 0..if much { 1200 } else { 3 } {
        add(&format!("etc/many/a file with a name that is not short {number:05}"), 0o644, file(number.to_string().as_bytes()));
    }
    for entry in &mut diff.entries {
        if entry.path == path("etc/short") {
            entry.meta.mtime = 1_000_000_000;
            entry
                .meta
                .xattrs
                .insert("security.capability".to_owned(), XattrValue(vec![1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
            entry.meta.xattrs.insert("user.note".to_owned(), XattrValue(b"kept".to_vec()));
        }
    }
    diff.normalise();
    // A link has the attributes of its file.
    diff
}

fn written(directory: &Path, much: bool) -> (Ext4, Diff, Spool) {
    let spool = Spool::create(directory.join("spool")).unwrap();
    let diff = everything(&spool, much);
    let ext4 = Ext4::create(directory.join("disk"), BASE_SIZE).unwrap();
    let changes = Index::new().apply(&diff);
    ext4.apply(&changes, &spool, &Cancel::new()).unwrap();
    (ext4, diff, spool)
}

#[test]
fn what_was_written_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let (ext4, diff, spool) = written(directory.path(), true);
    let again = Spool::create(directory.path().join("again")).unwrap();
    let found = read(ext4.path(), &again, 1, &Cancel::new()).unwrap();
    assert_eq!(found.entries.len(), diff.entries.len());
    for (expected, found) in diff.entries.iter().zip(&found.entries) {
        assert_eq!(expected, found);
        if let Kind::File { digest, .. } = &found.kind {
            assert!(again.read(digest).unwrap() == spool.read(digest).unwrap());
        }
    }
    // More than there may be.
    assert!(matches!(read(ext4.path(), &again, 0, &Cancel::new()), Err(BuildError::FileSystem { .. })));
    let cancel = Cancel::new();
    cancel.cancel();
    assert!(matches!(read(ext4.path(), &again, 1, &cancel), Err(BuildError::Cancelled)));
}

/// Nothing that is found in it makes the reader panic or go on for ever.
#[test]
fn a_damaged_file_system_is_refused_or_read() {
    let directory = tempfile::tempdir().unwrap();
    let (ext4, ..) = written(directory.path(), false);
    let again = Spool::create(directory.path().join("again")).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(ext4.path()).unwrap();
    let system = System::open(ext4.path()).ok().unwrap();
    // The superblock, the first descriptor, the first inodes and the root directory, whose every part leads somewhere.
    let descriptor = system.block;
    let mut table = [0; 4];
    file.read_exact_at(&mut table, descriptor + 8).unwrap();
    let inodes = u64::from(u32::from_le_bytes(table)) * system.block;
    let root = system.inode(ROOT).ok().unwrap();
    let names = system.extents(&root).ok().unwrap()[0].place.unwrap() * system.block;
    let places = [(1024, 0x120), (descriptor, 64), (inodes + 256, 160), (inodes + 11 * 256, 256), (names, 96)];
    for (begin, length) in places {
        for at in (begin..begin + length).step_by(2) {
            let mut old = [0; 2];
            file.read_exact_at(&mut old, at).unwrap();
            for new in [[0xff, 0xff], [0, 0], [old[0] ^ 1, old[1]], [old[0], old[1] ^ 0x80]] {
                file.write_all_at(&new, at).unwrap();
                let _ = read(ext4.path(), &again, 1, &Cancel::new());
            }
            file.write_all_at(&old, at).unwrap();
        }
    }
    assert!(read(ext4.path(), &again, 1, &Cancel::new()).is_ok());
    file.set_len(1 << 20).unwrap();
    assert!(read(ext4.path(), &again, 1, &Cancel::new()).is_err());
    std::fs::write(directory.path().join("text"), "no file system").unwrap();
    assert!(read(&directory.path().join("text"), &again, 1, &Cancel::new()).is_err());
}

fn file_of(ext4: &Ext4) -> File {
    OpenOptions::new().read(true).write(true).open(ext4.path()).unwrap()
}

/// Where an inode is, in bytes.
fn place_of(system: &System, inode: u64) -> u64 {
    let table = system.read_at((system.first_data_block + 1) * system.block + 8, 4).ok().unwrap();
    u64::from(long(&table, 0)) * system.block + (inode - 1) * system.inode_size
}

/// The head of a node and its entries, which are bytes already.
fn node(depth: u16, entries: &[[u8; 12]]) -> Vec<u8> {
    let count = entries.len() as u16;
    [&[EXTENT_MAGIC, count, count, depth, 0, 0].map(u16::to_le_bytes).concat(), &entries.concat()[..]].concat()
}

fn leads_to(first: u32, block: u32) -> [u8; 12] {
    [first.to_le_bytes(), block.to_le_bytes(), [0; 4]].concat().try_into().unwrap()
}

fn reason(error: BuildError) -> String {
    match error {
        BuildError::FileSystem { reason } => reason,
        other => panic!("{other}"),
    }
}

/// Some entries of some nodes that lead to the same one would be read for days.
#[test]
fn a_tree_that_leads_to_a_node_again_and_again_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (ext4, ..) = written(directory.path(), false);
    let (file, system) = (file_of(&ext4), System::open(ext4.path()).ok().unwrap());
    let free = (BASE_SIZE / system.block) as u32 - 8;
    for first in [0, 1] {
        // Two nodes of 340 entries each, and one without.
        for depth in 0..3 {
            let entries: Vec<[u8; 12]> = (0..if depth == 0 { 0 } else { 340 }).map(|at| leads_to(at * first, free + depth - 1)).collect();
            file.write_all_at(&node(depth as u16, &entries), u64::from(free + depth) * system.block).unwrap();
        }
        let root = [0, 1, 2, 3].map(|at| leads_to(at * 1000 * first, free + 2));
        file.write_all_at(&node(3, &root), place_of(&system, 2) + 0x28).unwrap();
        let again = Spool::create(directory.path().join("again")).unwrap();
        let said = reason(read(ext4.path(), &again, 1, &Cancel::new()).unwrap_err());
        assert!(said.contains("out of order"), "{said}");
    }
}

#[test]
fn a_directory_is_no_longer_than_its_blocks_and_has_each_name_once() {
    let directory = tempfile::tempdir().unwrap();
    let (ext4, ..) = written(directory.path(), false);
    let (file, system) = (file_of(&ext4), System::open(ext4.path()).ok().unwrap());
    let again = Spool::create(directory.path().join("again")).unwrap();
    let said = || reason(read(ext4.path(), &again, 1, &Cancel::new()).unwrap_err());
    let size = place_of(&system, 2) + 4;
    file.write_all_at(&(200_u32 << 20).to_le_bytes(), size).unwrap();
    assert!(said().contains("longer than its blocks"), "{}", said());
    file.write_all_at(&4096_u32.to_le_bytes(), size).unwrap();
    // `etc` becomes `usr`, which there is already.
    let names = system.extents(&system.inode(ROOT).ok().unwrap()).ok().unwrap()[0].place.unwrap() * system.block;
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, names).unwrap();
    let at = block.windows(3).position(|name| name == b"etc").unwrap() as u64;
    file.write_all_at(b"usr", names + at).unwrap();
    assert!(said().contains("twice"), "{}", said());
}
