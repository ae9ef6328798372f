//! Volumes: disks with a life of their own.

use serde::{Deserialize, Serialize};

use crate::VolumeId;

/// How a volume's bytes are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum VolumeFormat {
    /// A sparse file whose bytes are the disk's.
    #[default]
    Raw,
    Qcow2,
}

impl VolumeFormat {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// The smallest volume, in bytes: less holds no file system worth its name.
pub const LEAST_BYTES: u64 = 16 << 20;

/// The largest volume, in bytes.
pub const MOST_BYTES: u64 = 64 << 40;

/// Made without a size.
pub const DEFAULT_BYTES: u64 = 10 << 30;

/// A disk is made of sectors: a guest sees no part of one.
pub const SECTOR_BYTES: u64 = 512;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeSizeError {
    #[error("a volume has {LEAST_BYTES} (16M) to {MOST_BYTES} (64T) bytes, not {0}")]
    Range(u64),
    #[error("a volume is made of sectors of {SECTOR_BYTES} bytes, and {0} bytes are no whole number of them")]
    Sectors(u64),
}

/// # Errors
/// When a volume cannot have this size.
pub const fn check_size(bytes: u64) -> Result<(), VolumeSizeError> {
    if bytes < LEAST_BYTES || bytes > MOST_BYTES {
        Err(VolumeSizeError::Range(bytes))
    } else if !bytes.is_multiple_of(SECTOR_BYTES) {
        Err(VolumeSizeError::Sectors(bytes))
    } else {
        Ok(())
    }
}

impl VolumeId {
    /// What the guest finds its device by: 20 bytes, all that virtio-blk has room for (virtio 1.2, section 5.2.6).
    pub fn serial(&self) -> String {
        format!("vol-{}", &self.to_string()[..16])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(check_size(LEAST_BYTES), Ok(()));
        assert_eq!(check_size(LEAST_BYTES + 512), Ok(()));
        assert_eq!(check_size(LEAST_BYTES + 1), Err(VolumeSizeError::Sectors(LEAST_BYTES + 1)));
        assert_eq!(check_size(LEAST_BYTES - 512), Err(VolumeSizeError::Range(LEAST_BYTES - 512)));
        assert_eq!(check_size(u64::MAX), Err(VolumeSizeError::Range(u64::MAX)));
    }

    #[test]
    fn a_serial_fits_and_tells_volumes_apart() {
        let serial = VolumeId::from_bytes([0xab; 16]).serial();
        assert_eq!((serial.as_str(), serial.len()), ("vol-abababababababab", 20));
    }
}
