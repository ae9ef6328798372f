//! For tests/fuzz: the readers of bytes that somebody else made.

use std::path::Path;

use crate::{
    diff::{Diff, Kind},
    index::Index,
    kernel,
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
