//! Takes out of a system's files what ties them to the disk and the cloud that they were made for.

use crate::{
    BuildError,
    diff::{Diff, Entry, Kind, Meta},
    tarball::Spool,
    tree_path::TreePath,
};

/// A longer table is none.
const MAX_FSTAB: u64 = 1 << 20;

/// The disk's other partitions are not there: waiting for them would end a start in the emergency shell. And what `cloud-init` would ask a cloud
/// for, a guest of ours is told before its init runs.
///
/// # Errors
/// Those of the spool.
pub(super) fn settle(diff: &mut Diff, spool: &Spool) -> Result<(), BuildError> {
    let file = |text: &[u8]| spool.add(&mut { text }).map(|(size, digest)| Kind::File { size, digest });
    if let Some(entry) = diff.entries.iter_mut().find(|entry| entry.path.as_bytes() == b"etc/fstab")
        && let Kind::File { size, digest } = &entry.kind
        && *size <= MAX_FSTAB
    {
        entry.kind = file(without_disks(&String::from_utf8_lossy(&spool.read(digest)?)).as_bytes())?;
    }
    if diff.entries.iter().any(|entry| entry.path.as_bytes() == b"etc/cloud") {
        let path =
            TreePath::parse(b"etc/cloud/cloud-init.disabled").map_err(|error| BuildError::FileSystem { reason: error.to_string() })?;
        diff.entries.push(Entry { path, meta: Meta::new(0o644, 0, 0), kind: file(b"")? });
    }
    diff.normalise();
    Ok(())
}

/// fstab(5) with the lines that name a device made comments.
fn without_disks(text: &str) -> String {
    const DEVICES: [&str; 6] = ["UUID=", "PARTUUID=", "LABEL=", "PARTLABEL=", "ID=", "/dev/"];
    let mut settled = String::new();
    for line in text.lines() {
        if DEVICES.iter().any(|device| line.trim_start().trim_start_matches('"').starts_with(device)) {
            settled.push_str("# not here: ");
        }
        settled.push_str(line);
        settled.push('\n');
    }
    settled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_taken_out_of_the_table() {
        let text = "# a comment\nPARTUUID=1-2 / ext4 rw 0 1\n  LABEL=UEFI /boot/efi vfat defaults 0 0\ntmpfs /tmp tmpfs size=1G 0 0\n/dev/sda2 none swap sw 0 0";
        let expected = "# a comment\n# not here: PARTUUID=1-2 / ext4 rw 0 1\n# not here:   LABEL=UEFI /boot/efi vfat defaults 0 0\ntmpfs /tmp tmpfs size=1G 0 0\n# not here: /dev/sda2 none swap sw 0 0\n";
        assert_eq!(without_disks(text), expected);
    }
}
