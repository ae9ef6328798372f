//! What a partition holds, by the marks that each kind has at its place.

use std::{fs::File, io, os::unix::fs::FileExt};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Ext4,
    /// Something that is known and not read here.
    Other(&'static str),
}

/// Mark, place, kind. libblkid knows them too.
const MARKS: &[(&[u8], u64, Kind)] = &[
    (b"\x53\xef", 1024 + 0x38, Kind::Ext4),
    (b"XFSB", 0, Kind::Other("XFS")),
    (b"_BHRfS_M", 0x1_0040, Kind::Other("Btrfs")),
    (b"LUKS\xba\xbe", 0, Kind::Other("encrypted (LUKS)")),
    (b"LABELONE", 512, Kind::Other("LVM")),
    (b"hsqs", 0, Kind::Other("squashfs")),
    (b"\xe2\xe1\xf5\xe0", 1024, Kind::Other("EROFS")),
    (b"-FVE-FS-", 3, Kind::Other("encrypted (BitLocker)")),
    (b"NTFS    ", 3, Kind::Other("NTFS")),
];

/// What begins at `at` of the disk.
///
/// # Errors
/// When the disk cannot be read.
pub(super) fn of(disk: &File, at: u64) -> io::Result<Option<Kind>> {
    for (mark, place, kind) in MARKS {
        let mut found = [0; 8];
        let found = &mut found[..mark.len()];
        match disk.read_exact_at(found, at.saturating_add(*place)) {
            Ok(()) if found == *mark => return Ok(Some(*kind)),
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error),
            _ => {}
        }
    }
    Ok(None)
}
