//! Limits of how much a device does in a second, as token buckets.
//!
//! A bucket fills at its rate up to its burst. What is let through takes its cost from it; what costs more than there is waits. A cost
//! above the burst waits for a full bucket and leaves it in debt, which later requests wait for: so over any time the sum of the costs is
//! at most rate × time + burst (or the largest cost, if that is more), and nothing waits for ever.

use std::{
    io,
    num::NonZeroU64,
    os::fd::{AsRawFd, RawFd},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const NANOSECONDS: i128 = 1_000_000_000;

/// A tenth of a second's worth may come at once: long enough not to wake for each request, short enough not to be noticed.
const BURSTS_A_SECOND: u64 = 10;

/// How fast a bucket fills, and how much it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    per_second: NonZeroU64,
    burst: u64,
}

impl Rate {
    /// A bucket of a tenth of a second, but one that holds at least `least`.
    pub fn new(per_second: NonZeroU64, least: u64) -> Self {
        Self { per_second, burst: (per_second.get() / BURSTS_A_SECOND).max(least).max(1) }
    }

    #[cfg(test)]
    pub fn burst(&self) -> u64 {
        self.burst
    }
}

/// One bucket. Full at first.
#[derive(Clone, Debug)]
struct Bucket {
    rate: Rate,
    /// In billionths of a token, so that nothing is lost to rounding; below zero: debt.
    level: i128,
    /// When `level` was right.
    at: Duration,
}

impl Bucket {
    fn new(rate: Rate, now: Duration) -> Self {
        Self { rate, level: i128::from(rate.burst) * NANOSECONDS, at: now }
    }

    fn fill(&mut self, now: Duration) {
        // A clock that went back fills nothing.
        let elapsed = i128::try_from(now.saturating_sub(self.at).as_nanos()).unwrap_or(i128::MAX);
        let more = elapsed.saturating_mul(i128::from(self.rate.per_second.get()));
        self.level = self.level.saturating_add(more).min(i128::from(self.rate.burst) * NANOSECONDS);
        self.at = self.at.max(now);
    }

    /// How long `cost` has to wait; zero when it need not.
    fn wait(&self, cost: u64) -> Duration {
        let needed = i128::from(cost.min(self.rate.burst)) * NANOSECONDS;
        let missing = needed.saturating_sub(self.level);
        if cost == 0 || missing <= 0 {
            return Duration::ZERO;
        }
        let rate = i128::from(self.rate.per_second.get());
        // Rounded up: after it there is enough.
        Duration::from_nanos(u64::try_from((missing + rate - 1) / rate).unwrap_or(u64::MAX))
    }

    fn spend(&mut self, cost: u64) {
        self.level = self.level.saturating_sub(i128::from(cost) * NANOSECONDS);
    }
}

/// A clock that never goes back: the time since some moment.
type Clock = Box<dyn Fn() -> Duration + Send + Sync>;

/// The two buckets of a device, which its worker takes from and the main thread may replace. They stay when the worker stops, so that a
/// guest gains nothing by resetting the device.
pub struct Buckets {
    clock: Clock,
    buckets: Mutex<[Option<Bucket>; 2]>,
    /// Readable when the buckets were replaced: who waits then looks again.
    changed: EventFd,
}

impl Buckets {
    /// Without limits.
    ///
    /// # Errors
    /// When the eventfd cannot be made.
    pub fn new() -> io::Result<Self> {
        let start = Instant::now();
        Self::with_clock(Box::new(move || start.elapsed()))
    }

    /// # Errors
    /// When the eventfd cannot be made.
    pub fn with_clock(clock: Clock) -> io::Result<Self> {
        Ok(Self { clock, buckets: Mutex::new([None, None]), changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    /// Changes the limits from now on. A bucket whose rate stays is kept as it is; a new one is full.
    pub fn set(&self, rates: [Option<Rate>; 2]) {
        let now = (self.clock)();
        let mut buckets = self.lock();
        for (bucket, rate) in buckets.iter_mut().zip(rates) {
            if bucket.as_ref().map(|bucket| bucket.rate) != rate {
                *bucket = rate.map(|rate| Bucket::new(rate, now));
            }
        }
        drop(buckets);
        self.wake();
    }

    /// Whether there is any limit.
    pub fn is_any(&self) -> bool {
        self.lock().iter().any(Option::is_some)
    }

    /// How long what costs this much of each bucket has to wait; `None` when it need not. Nothing is taken.
    pub fn wait(&self, costs: [u64; 2]) -> Option<Duration> {
        self.look(costs, false)
    }

    /// Takes the costs from the buckets if they need not wait; otherwise says how long they have to.
    ///
    /// # Errors
    /// The time after which they need not wait any more, unless something else takes from the buckets.
    pub fn take(&self, costs: [u64; 2]) -> Result<(), Duration> {
        self.look(costs, true).map_or(Ok(()), Err)
    }

    /// Takes the costs of what could not wait.
    pub fn spend(&self, costs: [u64; 2]) {
        let mut buckets = self.lock();
        if buckets.iter().any(Option::is_some) {
            let now = (self.clock)();
            for (bucket, cost) in buckets.iter_mut().zip(costs) {
                if let Some(bucket) = bucket {
                    bucket.fill(now);
                    bucket.spend(cost);
                }
            }
        }
    }

    fn look(&self, costs: [u64; 2], take: bool) -> Option<Duration> {
        let mut buckets = self.lock();
        if buckets.iter().all(Option::is_none) {
            return None;
        }
        let now = (self.clock)();
        let mut longest = Duration::ZERO;
        for (bucket, cost) in buckets.iter_mut().zip(costs) {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                longest = longest.max(bucket.wait(cost));
            }
        }
        if !longest.is_zero() {
            return Some(longest);
        }
        if take {
            buckets.iter_mut().zip(costs).for_each(|(bucket, cost)| bucket.iter_mut().for_each(|bucket| bucket.spend(cost)));
        }
        None
    }

    /// Makes who waits look again.
    pub fn wake(&self) {
        // The counter of an eventfd is full after 2^64 - 2 writes only, and then it is readable anyway.
        let _ = self.changed.write(1);
    }

    /// Takes the event that epoll announced.
    pub fn take_event(&self) {
        // A failure means that there was nothing to take.
        let _ = self.changed.read();
    }

    fn lock(&self) -> MutexGuard<'_, [Option<Bucket>; 2]> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Buckets {
    fn as_raw_fd(&self) -> RawFd {
        self.changed.as_raw_fd()
    }
}

/// A clock that stands still until a test moves it, and the buckets that go by it.
#[cfg(test)]
pub fn on_hand_moved_clock() -> (std::sync::Arc<std::sync::atomic::AtomicU64>, Buckets) {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };
    let nanoseconds = Arc::new(AtomicU64::new(0));
    let hand = Arc::clone(&nanoseconds);
    let buckets = Buckets::with_clock(Box::new(move || Duration::from_nanos(hand.load(Ordering::SeqCst)))).unwrap();
    (nanoseconds, buckets)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use proptest::prelude::*;

    use super::*;

    fn rate(per_second: u64, burst: u64) -> Rate {
        Rate { per_second: NonZeroU64::new(per_second).unwrap(), burst }
    }

    #[test]
    fn a_tenth_of_a_second_comes_at_once_and_never_less_than_asked() {
        let rate = |per_second, least| Rate::new(NonZeroU64::new(per_second).unwrap(), least).burst();
        assert_eq!((rate(1000, 1), rate(1000, 500), rate(1, 0), rate(u64::MAX, 1)), (100, 500, 1, u64::MAX / 10));
    }

    #[test]
    fn without_limits_nothing_waits() {
        let buckets = Buckets::new().unwrap();
        assert_eq!(buckets.take([u64::MAX; 2]), Ok(()));
        assert_eq!(buckets.wait([u64::MAX; 2]), None);
    }

    #[test]
    fn both_buckets_must_have_enough_and_none_is_taken_from_in_vain() {
        let (_, buckets) = on_hand_moved_clock();
        buckets.set([Some(rate(10, 2)), Some(rate(1000, 100))]);
        assert_eq!(buckets.take([1, 100]), Ok(()));
        // The second is empty: the first keeps what it has.
        assert_eq!(buckets.take([1, 50]), Err(Duration::from_millis(50)));
        assert_eq!(buckets.take([1, 0]), Ok(()));
        assert_eq!(buckets.take([1, 0]), Err(Duration::from_millis(100)));
    }

    #[test]
    fn new_limits_hold_at_once_and_kept_ones_keep_their_level() {
        let (_, buckets) = on_hand_moved_clock();
        buckets.set([Some(rate(1, 1)), None]);
        assert_eq!(buckets.take([1, 1]), Ok(()));
        buckets.set([Some(rate(1, 1)), Some(rate(1, 1))]);
        assert!(buckets.take([1, 0]).is_err());
        buckets.set([Some(rate(2, 1)), None]);
        assert_eq!(buckets.take([1, 9]), Ok(()));
        buckets.set([None, None]);
        assert_eq!(buckets.take([9, 9]), Ok(()));
    }

    #[test]
    fn figures_of_any_size_do_no_harm() {
        let (hand, buckets) = on_hand_moved_clock();
        buckets.set([Some(rate(1, 1)), Some(rate(u64::MAX, u64::MAX))]);
        for _ in 0..3 {
            buckets.spend([u64::MAX, u64::MAX]);
            hand.fetch_add(u64::MAX / 4, Ordering::SeqCst);
            assert!(buckets.wait([1, u64::MAX]).is_some_and(|wait| wait > Duration::from_secs(1)));
        }
        hand.store(0, Ordering::SeqCst);
        assert!(buckets.wait([1, 1]).is_some());
    }

    proptest! {
        /// Requests that wait exactly as long as they are told: in no window more than rate × window + burst (or the largest), and all go.
        #[test]
        fn no_window_has_more_than_its_share(
            per_second in 1_u64..5000,
            burst in 1_u64..500,
            requests in prop::collection::vec((0_u64..1500, prop_oneof![3 => Just(0), 1 => 0_u64..2_000_000_000]), 1..60),
        ) {
            let (hand, buckets) = on_hand_moved_clock();
            buckets.set([None, Some(rate(per_second, burst))]);
            let mut passed: Vec<(u64, u64)> = Vec::new();
            for (cost, pause) in requests {
                hand.fetch_add(pause, Ordering::SeqCst);
                let mut waits = 0;
                while let Err(wait) = buckets.take([1, cost]) {
                    hand.fetch_add(u64::try_from(wait.as_nanos()).unwrap(), Ordering::SeqCst);
                    waits += 1;
                    prop_assert!(waits <= 1, "after the wait there must be enough");
                }
                passed.push((hand.load(Ordering::SeqCst), cost));
            }
            for first in 0..passed.len() {
                let (mut sum, mut largest) = (0_u128, 0);
                for (at, cost) in &passed[first..] {
                    sum += u128::from(*cost);
                    largest = largest.max(*cost);
                    let window = u128::from(at - passed[first].0);
                    let allowed = u128::from(per_second) * window + u128::from(burst.max(largest)) * 1_000_000_000;
                    prop_assert!(sum * 1_000_000_000 <= allowed, "{sum} in {window} ns");
                }
            }
        }
    }
}
