//! The allocator of a daemon that once in a while needs much memory for a moment: an upload, an import. What was needed then goes
//! back to the machine, which needs it for VMs.

/// Blocks from this size on are mappings of their own, which end with them. Fixed here, because the C library raises its
/// own bound to the largest block that was ever freed (mallopt(3)).
const MAPPED: libc::c_int = 128 << 10;

/// Heaps that threads share: each keeps what was once freed in it.
const HEAPS: libc::c_int = 2;

/// Call it first: heaps that exist stay.
pub fn keep_small() {
    // SAFETY: `mallopt` only sets parameters of the allocator, and may be called at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
    }
}

/// Gives free pages of all heaps back. Takes a moment for each heap; for the end of something large.
pub fn give_back() {
    // SAFETY: `malloc_trim` locks the heaps that it looks at, and touches nothing but free blocks.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Anonymous memory of this process, in kilobytes.
    fn anonymous() -> u64 {
        let text = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    #[test]
    fn what_was_freed_goes_back() {
        // Small blocks with one kept behind each group: the heap's end stays in use, so nothing goes back by itself.
        let blocks: Vec<Vec<u8>> = (0..32_768).map(|_| vec![1; 1024]).collect();
        let kept: Vec<Vec<u8>> = (0..8).map(|_| vec![1; 1024]).collect();
        let full = anonymous();
        drop(blocks);
        give_back();
        let after = anonymous();
        assert!(full - after > 16 << 10, "{full} kB, then {after} kB, {} kept", kept.len());
    }
}
