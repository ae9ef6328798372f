//! Disks with limits, by a clock that the tests move.

use std::{
    num::NonZeroU64,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use proptest::prelude::*;
use tempfile::NamedTempFile;
use virtio_queue::QueueT;

use super::{
    super::{Block, Layer, open},
    BYTES_AT_ONCE, Limiter,
};
use crate::{
    config::{DiskFormat, DiskLimits},
    virtio::{
        VirtioDevice,
        limit::on_hand_moved_clock,
        testing::{Buffer, Driver, Made, NO_EVENT_IDX},
    },
};

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

fn limits(iops: u64, bytes_per_second: u64) -> DiskLimits {
    DiskLimits { iops: NonZeroU64::new(iops), bytes_per_second: NonZeroU64::new(bytes_per_second) }
}

struct Bench {
    device: Block,
    driver: Driver,
    limiter: Limiter,
    nanoseconds: Arc<AtomicU64>,
    _file: NamedTempFile,
}

impl Bench {
    fn new(limits: DiskLimits) -> Self {
        let (nanoseconds, buckets) = on_hand_moved_clock();
        Self::with(limits, Limiter(Arc::new(buckets)), nanoseconds)
    }

    fn with(limits: DiskLimits, limiter: Limiter, nanoseconds: Arc<AtomicU64>) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        let layer = Layer { file: OwnedFd::from(file.reopen().unwrap()), format: DiskFormat::Raw };
        let mut device = Block::new("disk".into(), "serial", open(layer, Vec::new(), false).unwrap(), false).unwrap();
        limiter.set(limits);
        device.set_limiter(limiter.clone());
        // Requests are answered in order.
        device.set_uring(None);
        let driver = Driver::new(device.queue_sizes());
        device.activate(driver.activation(device.features() & NO_EVENT_IDX)).unwrap();
        Self { device, driver, limiter, nanoseconds, _file: file }
    }

    /// A request for the first `bytes` of the disk.
    fn add(&mut self, kind: u32, bytes: usize) -> Made {
        let mut header = [0; 16];
        header[0..4].copy_from_slice(&kind.to_le_bytes());
        let mut range = [0; 16];
        range[8..12].copy_from_slice(&((bytes / 512) as u32).to_le_bytes());
        let data = vec![7; bytes];
        match kind {
            READ => self.driver.add(0, &[Buffer::Out(&header), Buffer::In(bytes), Buffer::In(1)]),
            WRITE => self.driver.add(0, &[Buffer::Out(&header), Buffer::Out(&data), Buffer::In(1)]),
            FLUSH => self.driver.add(0, &[Buffer::Out(&header), Buffer::In(1)]),
            _ => self.driver.add(0, &[Buffer::Out(&header), Buffer::Out(&range), Buffer::In(1)]),
        }
    }

    fn advance(&self, time: Duration) {
        self.nanoseconds.fetch_add(u64::try_from(time.as_nanos()).unwrap(), Ordering::SeqCst);
        self.limiter.0.wake();
    }

    /// The next request is served, and it is this one.
    fn assert_served(&mut self, made: &Made) {
        assert_eq!(self.driver.used(0).0, made.head);
        assert_eq!(self.driver.written(made).pop(), Some(0));
    }

    /// However often it is asked.
    fn assert_waits(&mut self) {
        for _ in 0..5 {
            self.driver.kick(0);
            self.limiter.0.wake();
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(self.driver.try_used(0), None);
        }
    }
}

#[test]
fn operations_of_every_kind_wait_for_their_turn_and_keep_their_order() {
    let mut bench = Bench::new(limits(10, 0));
    let made: Vec<Made> = [(WRITE, 512), (READ, 512), (FLUSH, 0), (DISCARD, 4096), (ZEROES, 4096), (READ, 512)]
        .into_iter()
        .map(|(kind, bytes)| bench.add(kind, bytes))
        .collect();
    for made in &made[..5] {
        bench.assert_served(made);
        bench.assert_waits();
        bench.advance(Duration::from_millis(99));
        bench.assert_waits();
        bench.advance(Duration::from_millis(1));
    }
    bench.assert_served(&made[5]);
}

#[test]
fn reads_writes_and_zeros_share_one_budget_of_bytes() {
    let burst = BYTES_AT_ONCE as usize;
    let mut bench = Bench::new(limits(0, 512));
    let made: Vec<Made> = [(WRITE, burst / 2), (DISCARD, 1 << 20), (READ, burst / 2), (FLUSH, 0), (ZEROES, 512), (READ, 512)]
        .into_iter()
        .map(|(kind, bytes)| bench.add(kind, bytes))
        .collect();
    // What moves no bytes does not wait for any.
    made[..4].iter().for_each(|made| bench.assert_served(made));
    bench.assert_waits();
    for made in &made[4..] {
        bench.advance(Duration::from_millis(999));
        bench.assert_waits();
        bench.advance(Duration::from_millis(1));
        bench.assert_served(made);
    }
}

#[test]
fn what_is_larger_than_the_burst_goes_too_and_is_paid_for_later() {
    let mut bench = Bench::new(limits(0, 1024));
    let large = 4 * BYTES_AT_ONCE as usize;
    let (first, second) = (bench.add(WRITE, large), bench.add(READ, 512));
    bench.assert_served(&first);
    let debt = (large as u64 - BYTES_AT_ONCE + 512) * 1000 / 1024;
    bench.advance(Duration::from_millis(debt - 1));
    bench.assert_waits();
    bench.advance(Duration::from_millis(1));
    bench.assert_served(&second);
}

#[test]
fn other_limits_hold_at_once() {
    let mut bench = Bench::new(limits(1, 0));
    let made: Vec<Made> = (0..3).map(|_| bench.add(WRITE, 512)).collect();
    bench.assert_served(&made[0]);
    bench.assert_waits();
    // A new bucket is full, whatever the old one was.
    bench.limiter.set(limits(2, 0));
    bench.assert_served(&made[1]);
    bench.assert_waits();
    bench.limiter.set(DiskLimits::default());
    bench.assert_served(&made[2]);
}

#[test]
fn a_pause_or_reset_neither_waits_for_the_limit_nor_gets_round_it() {
    let mut bench = Bench::new(limits(1, 0));
    let made: Vec<Made> = (0..2).map(|_| bench.add(WRITE, 512)).collect();
    bench.assert_served(&made[0]);
    bench.assert_waits();
    let before = Instant::now();
    let queues = bench.device.stop();
    // The limit's clock stands still: it would never come.
    assert!(before.elapsed() < Duration::from_secs(60), "{:?}", before.elapsed());
    // The request that waits is the driver's still: a saved queue has it.
    assert_eq!((queues[0].1.next_avail(), queues[0].1.next_used()), (1, 1));
    let state = bench.device.save();
    assert!(!state.to_string().contains("iops"), "{state}");
    bench.device.restore(&state).unwrap();
    let features = bench.device.features() & NO_EVENT_IDX;
    bench.device.activate(bench.driver.activation_of(queues, features)).unwrap();
    bench.assert_waits();
    bench.advance(Duration::from_secs(1));
    bench.assert_served(&made[1]);
}

#[test]
fn who_waits_is_woken_by_time_alone() {
    let mut bench = Bench::with(limits(40, 0), Limiter::new().unwrap(), Arc::default());
    let before = Instant::now();
    let made: Vec<Made> = (0..9).map(|_| bench.add(READ, 512)).collect();
    made.iter().for_each(|made| bench.assert_served(made));
    // Four at once, and five more at forty a second.
    assert!(before.elapsed() >= Duration::from_millis(125), "{:?}", before.elapsed());
}

#[derive(Clone, Copy, Debug)]
struct Step {
    kind: u32,
    sectors: usize,
    /// Before it is made.
    pause_ms: u64,
}

fn step() -> impl Strategy<Value = Step> {
    let kind = prop::sample::select(vec![READ, WRITE, FLUSH, ZEROES]);
    let pause = prop_oneof![3 => Just(0_u64), 1 => 0_u64..300];
    (kind, 1_usize..200, pause).prop_map(|(kind, sectors, pause_ms)| Step { kind, sectors, pause_ms })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is asked and whenever: at no time more was served than rate × time + burst, and all is served in the end, in its order.
    #[test]
    fn a_guest_gets_its_share_and_all_of_it(
        steps in prop::collection::vec(step(), 1..40),
        iops in 5_u64..200,
        bytes_per_second in 20_000_u64..2_000_000,
    ) {
        let mut bench = Bench::new(limits(iops, bytes_per_second));
        let mut waiting = std::collections::VecDeque::new();
        let (mut operations, mut bytes) = (0, 0);
        let mut steps = steps.into_iter();
        let bursts = ((iops / 10).max(1), (bytes_per_second / 10).max(BYTES_AT_ONCE));
        loop {
            let next = steps.next();
            if let Some(Step { kind, sectors, pause_ms }) = next {
                bench.advance(Duration::from_millis(pause_ms));
                let cost = if kind == FLUSH { 0 } else { sectors as u64 * 512 };
                waiting.push_back((bench.add(kind, sectors * 512), cost));
            } else {
                bench.advance(Duration::from_millis(50));
            }
            std::thread::sleep(Duration::from_micros(300));
            while let Some((head, _)) = bench.driver.try_used(0) {
                let (made, cost): (Made, u64) = waiting.pop_front().unwrap();
                prop_assert_eq!(head, made.head);
                operations += 1;
                bytes += cost;
            }
            let nanoseconds = u128::from(bench.nanoseconds.load(Ordering::SeqCst));
            let allowed = |rate: u64, burst: u64| u128::from(rate) * nanoseconds / 1_000_000_000 + u128::from(burst);
            prop_assert!(operations <= allowed(iops, bursts.0), "{} operations after {} ns", operations, nanoseconds);
            prop_assert!(u128::from(bytes) <= allowed(bytes_per_second, bursts.1), "{} bytes after {} ns", bytes, nanoseconds);
            if next.is_none() && waiting.is_empty() {
                break;
            }
            prop_assert!(nanoseconds < 1_000_000_000_000, "{} requests are lost", waiting.len());
        }
    }
}
