//! For tests/fuzz: the readers of bytes that somebody else made.

use std::{collections::BTreeMap, fs::File, path::Path};

use crate::{
    Cancel,
    diff::{Diff, Kind},
    ext4::read::{read_little, root_names},
    index::Index,
    kernel,
    oci::OciDigest,
    tarball::{self, Origin, Spool},
};

/// Reads a tarball, as a base (`root`) or as what a step left behind, with its contents below `directory`, and puts it into a
/// tree. What was read is written and read again; gives whether it could be read.
///
/// # Panics
/// When something of a base is not in the tree, or what was written cannot be read.
pub fn tar(bytes: &[u8], root: bool, directory: &Path) -> bool {
    let origin = if root { Origin::Root } else { Origin::Overlay };
    let Ok(spool) = Spool::create(directory.to_owned()) else { return false };
    let Ok(diff) = tarball::read(&mut { bytes }, origin, &spool) else { return false };
    grow(&diff, root);
    let mut written = Vec::new();
    if tarball::write(&diff, &spool, &mut written).is_ok() && root {
        let again = tarball::read(&mut written.as_slice(), origin, &spool);
        assert!(again.is_ok(), "what was written cannot be read: {:?}", again.err());
    }
    true
}

/// Reads the ext4 file system of `size` bytes at `begin` of `file`, with its contents below `directory`, at most `limit` bytes of them. Nothing in it may
/// hold a run of `outside`, which surrounds it. Gives how many entries were read, when they could be.
///
/// # Panics
/// When what was read is no tree, or more than it may be.
pub fn ext4(file: &File, (begin, size): (u64, u64), limit: u64, outside: &[u8], directory: &Path) -> Option<usize> {
    let part = || Some((file.try_clone().ok()?, begin, size));
    let spool = Spool::create(directory.to_owned()).ok()?;
    let diff = read_little(part()?, &spool, limit).ok()?;
    let kinds: BTreeMap<_, _> = diff.entries.iter().map(|entry| (&entry.path, &entry.kind)).collect();
    assert!(kinds.len() == diff.entries.len() && diff.removed.is_empty());
    let mut bytes = 0;
    for entry in &diff.entries {
        let path = entry.path.as_bytes();
        assert!(!path.is_empty() && path.split(|byte| *byte == b'/').all(|part| !matches!(part, b"" | b"." | b"..")), "{entry:?}");
        let above = entry.path.parent().filter(|above| !above.is_root());
        let is_directory = above.as_ref().is_none_or(|above| matches!(kinds.get(above), Some(Kind::Directory { .. })));
        assert!(is_directory, "{entry:?} lies in no directory");
        let held = match &entry.kind {
            Kind::Link { target } => {
                assert!(!matches!(kinds.get(target), None | Some(Kind::Directory { .. } | Kind::Link { .. })), "{entry:?} leads nowhere");
                continue;
            }
            Kind::File { size, digest } => {
                bytes += size;
                let held = spool.read(digest).unwrap_or_default();
                assert_eq!(held.len() as u64, *size, "{entry:?}");
                held
            }
            Kind::Symlink { target } => target.0.clone(),
            _ => path.to_vec(),
        };
        assert!(!held.windows(outside.len()).any(|piece| piece == outside), "{entry:?} holds what lies outside of its file system");
    }
    assert!(bytes <= limit, "{bytes} bytes of {limit}");
    let names = root_names(part()?, &Cancel::new());
    let in_root = |path: &[u8]| names.as_ref().is_ok_and(|names| names.iter().any(|name| name == path));
    assert!(diff.entries.iter().all(|entry| entry.path.as_bytes().contains(&b'/') || in_root(entry.path.as_bytes())));
    grow(&diff, true);
    Some(diff.entries.len())
}

/// How a blob of these bytes is named.
pub fn oci_digest(bytes: &[u8]) -> String {
    OciDigest::of(bytes).to_string()
}

/// Puts a layer into a tree without anything, and again where it is already.
fn grow(diff: &Diff, root: bool) {
    let mut index = Index::new();
    index.apply(diff);
    for entry in &diff.entries {
        let _ = index.resolve(&entry.path);
        if !root {
            continue;
        }
        let node = index.get(&entry.path).map(|node| &node.kind);
        let expected = if let Kind::Link { target } = &entry.kind { index.get(target).map(|node| &node.kind) } else { Some(&entry.kind) };
        assert!(node.is_some() && node == expected, "{entry:?} became {node:?}");
    }
    index.apply(diff);
}

/// Finds the kernel in a kernel image; gives whether there is one.
pub fn kernel_image(bytes: &[u8]) -> bool {
    kernel::extract_vmlinux(bytes).is_ok()
}

/// Unpacks a kernel module and reads what it needs.
pub fn kernel_module(bytes: &[u8]) -> usize {
    kernel::module(bytes).map_or(0, |needs| needs.len())
}
