//! ext4: recognise it, mount it, grow it to its device without external tools.
//!
//! Fields of the superblock: kernel documentation, `filesystems/ext4/super.rst`.

mod make;

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use rustix::mount::{MountFlags, mount};

use crate::{
    boot::devices::BlockDevice,
    error::{Context, Error},
    sys,
};
pub use make::{Identity, LEAST_BYTES, is_interrupted, make};

const SUPERBLOCK_OFFSET: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const MAGIC: u16 = 0xef53;
const INCOMPAT_64BIT: u32 = 0x80;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub block_bytes: u64,
    pub blocks: u64,
}

impl Superblock {
    /// Reads the fields we need; `None` when it is no ext4.
    pub fn parse(bytes: &[u8; SUPERBLOCK_BYTES]) -> Option<Self> {
        let u16_at = |at: usize| bytes.get(at..)?.first_chunk().map(|field| u16::from_le_bytes(*field));
        let u32_at = |at: usize| bytes.get(at..)?.first_chunk().map(|field| u32::from_le_bytes(*field));
        if u16_at(0x38)? != MAGIC {
            return None;
        }
        let shift = u32_at(0x18)?;
        if shift > 6 {
            return None;
        }
        let high = if u32_at(0x60)? & INCOMPAT_64BIT == 0 { 0 } else { u64::from(u32_at(0x150)?) };
        Some(Self { block_bytes: 1024 << shift, blocks: high << 32 | u64::from(u32_at(4)?) })
    }

    fn read(device: &File) -> io::Result<Option<Self>> {
        let mut bytes = [0; SUPERBLOCK_BYTES];
        match device.read_exact_at(&mut bytes, SUPERBLOCK_OFFSET) {
            Ok(()) => Ok(Self::parse(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How many blocks the file system could have on a device of this size, when these are more than it has.
    pub fn growth(&self, device_bytes: u64) -> Option<u64> {
        let blocks = device_bytes / self.block_bytes;
        (blocks > self.blocks).then_some(blocks)
    }
}

/// Whether an ext4 file system is on the device.
///
/// # Errors
/// When it cannot be read.
pub fn is_ext4(device: &File) -> io::Result<bool> {
    Ok(Superblock::read(device)?.is_some())
}

/// Mounts the file system of `device` on `target`, and with `grow` makes it as large as the device.
///
/// # Errors
/// When it is no ext4 or cannot be mounted. That it could not grow is given back beside: the file system works as it is.
pub fn mount_device(device: &BlockDevice, target: &Path, read_only: bool, grow: bool) -> Result<Option<Error>, Error> {
    let path = device.path();
    let superblock = File::open(&path)
        .and_then(|file| Superblock::read(&file))
        .at("read", &path)?
        .ok_or_else(|| Error::NotExt4 { device: path.display().to_string() })?;
    let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    mount(&path, target, "ext4", flags | MountFlags::RELATIME, None).doing(format!("mount {} on {}", path.display(), target.display()))?;
    Ok(if grow && !read_only { grow_from(device, &superblock, target).err() } else { None })
}

/// Makes the file system of `device`, which is mounted on `target` for writing, as large as the device.
///
/// # Errors
/// When it cannot grow; it works on as it is.
pub fn grow(device: &BlockDevice, target: &Path) -> Result<(), Error> {
    let path = device.path();
    // What is mounted is read through the same cache.
    match File::open(&path).and_then(|file| Superblock::read(&file)).at("read", &path)? {
        Some(superblock) => grow_from(device, &superblock, target),
        None => Err(Error::NotExt4 { device: path.display().to_string() }),
    }
}

fn grow_from(device: &BlockDevice, superblock: &Superblock, target: &Path) -> Result<(), Error> {
    let Some(blocks) = superblock.growth(device.size_bytes) else { return Ok(()) };
    File::open(target).and_then(|directory| Ok(sys::ext4_resize(&directory, blocks)?)).doing(format!(
        "grow the file system of {} from {} to {blocks} blocks",
        device.path().display(),
        superblock.blocks
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(high: u32, incompat: u32) -> [u8; SUPERBLOCK_BYTES] {
        let mut bytes = [0; SUPERBLOCK_BYTES];
        bytes[4..8].copy_from_slice(&1000_u32.to_le_bytes());
        bytes[0x18..0x1c].copy_from_slice(&2_u32.to_le_bytes());
        bytes[0x38..0x3a].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[0x60..0x64].copy_from_slice(&incompat.to_le_bytes());
        bytes[0x150..0x154].copy_from_slice(&high.to_le_bytes());
        bytes
    }

    #[test]
    fn superblocks() {
        assert_eq!(Superblock::parse(&sample(1, 0)), Some(Superblock { block_bytes: 4096, blocks: 1000 }));
        assert_eq!(Superblock::parse(&sample(1, INCOMPAT_64BIT)), Some(Superblock { block_bytes: 4096, blocks: (1 << 32) + 1000 }));
        assert_eq!(Superblock::parse(&[0; SUPERBLOCK_BYTES]), None);
        let mut odd = sample(0, 0);
        odd[0x18] = 60;
        assert_eq!(Superblock::parse(&odd), None);
    }

    #[test]
    fn growth_only_upwards() {
        let superblock = Superblock { block_bytes: 4096, blocks: 1000 };
        assert_eq!(superblock.growth(4096 * 1000 + 4095), None);
        assert_eq!(superblock.growth(4096 * 999), None);
        assert_eq!(superblock.growth(4096 * 5000), Some(5000));
    }
}
