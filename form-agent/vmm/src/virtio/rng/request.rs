//! How much entropy a guest gets, and when.

use std::time::{Duration, Instant};

/// What one request gets at most; the driver asks again for the rest.
pub const REQUEST_MAX: usize = 64 * 1024;

/// What may be taken at once after a quiet time.
const BURST: u64 = 1024 * 1024;
/// What comes back in a second. Far more than a guest needs, and far less than what would keep a core busy.
const REFILL_PER_SECOND: u64 = 4 * 1024 * 1024;

/// A token bucket, in bytes.
#[derive(Debug)]
pub struct Budget {
    left: u64,
    filled: Instant,
}

impl Budget {
    pub fn new(now: Instant) -> Self {
        Self { left: BURST, filled: now }
    }

    /// Takes the length of a request that asks for `wanted` bytes.
    ///
    /// # Errors
    /// The time to wait until there is enough for it.
    pub fn take(&mut self, wanted: usize, now: Instant) -> Result<usize, Duration> {
        let wanted = wanted.min(REQUEST_MAX);
        let passed = now.saturating_duration_since(self.filled);
        let more = (passed.as_micros() * u128::from(REFILL_PER_SECOND) / 1_000_000).min(u128::from(BURST)) as u64;
        if more > 0 {
            self.left = (self.left + more).min(BURST);
            self.filled = now;
        }
        match self.left.checked_sub(wanted as u64) {
            Some(left) => {
                self.left = left;
                Ok(wanted)
            }
            None => Err(Duration::from_micros((wanted as u64 - self.left) * 1_000_000 / REFILL_PER_SECOND + 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greedy_guest_waits_and_then_gets_its_bytes() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let mut taken = 0;
        let wait = loop {
            match budget.take(usize::MAX, start) {
                Ok(count) => taken += count as u64,
                Err(wait) => break wait,
            }
        };
        assert_eq!(taken, BURST);
        assert!(wait <= Duration::from_millis(20), "{wait:?}");
        assert_eq!(budget.take(usize::MAX, start + wait), Ok(REQUEST_MAX));
    }

    #[test]
    fn a_long_quiet_time_fills_the_bucket_once() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let later = start + Duration::from_secs(1_000_000);
        let taken = std::iter::from_fn(|| budget.take(REQUEST_MAX, later).ok()).sum::<usize>();
        assert_eq!(taken as u64, BURST);
    }
}
