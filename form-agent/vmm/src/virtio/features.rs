//! Feature bits that every device offers, and the configuration space as bytes.

/// `VIRTIO_F_INDIRECT_DESC`.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;

/// Reads `data.len()` bytes at `offset` of `config`; behind its end there are zeros.
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
    let count = data.len().min(config.len() - from);
    data[..count].copy_from_slice(&config[from..from + count]);
    data[count..].fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behind_the_end_of_the_configuration_are_zeros() {
        for (offset, expected) in [(0, [1, 2]), (2, [3, 0]), (3, [0, 0]), (u64::MAX, [0, 0])] {
            let mut data = [9; 2];
            read_config(&[1, 2, 3], offset, &mut data);
            assert_eq!(data, expected, "at {offset}");
        }
    }
}
