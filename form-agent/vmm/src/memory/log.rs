//! What the host's kernel writes to guest memory in our place (vhost). It goes past KVM's dirty log and past the bitmaps of the regions, so
//! the kernel notes it here, and [`WriteLog::merge`] adds it to those bitmaps.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{GuestMemoryMmap, ours};

/// What one bit stands for (`VHOST_PAGE_SIZE`, linux/vhost.h), whatever the size of the host's pages is.
const PAGE: u64 = 4096;
const BITS: u64 = u64::BITS as u64;

/// A bit for each page from guest address 0 on, as `VHOST_SET_LOG_BASE` takes it.
pub struct WriteLog(Box<[AtomicU64]>);

impl WriteLog {
    /// Covers all of `memory`, whose end should not be far above its size: 32 KiB for each GiB of addresses.
    #[must_use]
    pub fn new(memory: &GuestMemoryMmap) -> Self {
        let pages = memory.last_addr().0 / PAGE + 1;
        Self((0..pages.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Where the kernel writes it, as long as this value lives.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Adds what was noted to what our devices wrote, and forgets it.
    pub fn merge(&self, memory: &GuestMemoryMmap) {
        for region in memory.iter() {
            let (first, last) = (region.start_addr().0 / PAGE, region.last_addr().0 / PAGE);
            for word in first / BITS..=last / BITS {
                let Some(noted) = usize::try_from(word).ok().and_then(|word| self.0.get(word)) else { break };
                // Two regions may share a word: each takes its own pages out of it.
                let of_region = (0..BITS).filter(|bit| (first..=last).contains(&(word * BITS + bit))).fold(0, |mask, bit| mask | 1 << bit);
                let mut bits = noted.load(Ordering::Acquire) & of_region;
                noted.fetch_and(!bits, Ordering::AcqRel);
                while bits != 0 {
                    let page = word * BITS + u64::from(bits.trailing_zeros());
                    ours(region).set_addr_range(((page - first) * PAGE) as usize, PAGE as usize);
                    bits &= bits - 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{HIGH, guest_memory};

    /// As the kernel does: bytes, lowest bit first.
    fn note(log: &WriteLog, address: u64) {
        let page = address / PAGE;
        log.0[(page / BITS) as usize].fetch_or(1 << (page % BITS), Ordering::SeqCst);
    }

    #[test]
    fn what_the_kernel_noted_is_among_what_devices_wrote_and_is_told_once() {
        let memory = guest_memory();
        let log = WriteLog::new(&memory);
        let pages = |memory: &GuestMemoryMmap| -> Vec<Vec<usize>> {
            let set = |words: Vec<u64>| (0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 == 1).collect();
            memory.iter().map(|region| set(ours(region).get_and_reset())).collect()
        };
        let last = memory.iter().next().unwrap().last_addr().0;
        for address in [0, 4095, 65 * PAGE + 7, last, HIGH + 2 * PAGE] {
            note(&log, address);
        }
        // In the hole: nobody's.
        note(&log, last + 1);
        log.merge(&memory);
        assert_eq!(pages(&memory), [vec![0, 65, (last / PAGE) as usize], vec![2]]);
        log.merge(&memory);
        assert_eq!(pages(&memory), [vec![], Vec::<usize>::new()]);
        note(&log, memory.last_addr().0);
        log.merge(&memory);
        assert_eq!(pages(&memory), [vec![], vec![255]]);
    }
}
