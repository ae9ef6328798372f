//! Interfaces with limits, by a clock that the tests move, over a socket in the place of a tap.

use std::{
    num::NonZeroU64,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use virtio_queue::QueueT;

use super::{super::Net, BYTES_AT_ONCE, HEADER, LONGEST, Limiter};
use crate::virtio::{
    VirtioDevice,
    limit::on_hand_moved_clock,
    testing::{Buffer, Driver, Made, NO_EVENT_IDX, eventually},
};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Of each packet.
const BYTES: usize = 20_000;
const RATE: u64 = 1000;

struct Bench {
    device: Net,
    driver: Driver,
    wire: OwnedFd,
    nanoseconds: Arc<AtomicU64>,
}

impl Bench {
    fn new() -> Self {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (wire, tap) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None).unwrap();
        let mut device = Net::over_socket("net".into(), tap, [2, 0, 0, 0, 0, 9], 1500).unwrap();
        let (nanoseconds, buckets) = on_hand_moved_clock();
        device.set_limiter(Limiter(Arc::new(buckets)));
        device.limiter().set(NonZeroU64::new(RATE));
        let driver = Driver::new(device.queue_sizes());
        device.activate(driver.activation(device.features() & NO_EVENT_IDX)).unwrap();
        Self { device, driver, wire, nanoseconds }
    }

    fn advance(&self, time: Duration) {
        self.nanoseconds.fetch_add(u64::try_from(time.as_nanos()).unwrap(), Ordering::SeqCst);
        self.device.limiter().0.wake();
    }

    fn transmit(&mut self, fill: u8) -> Made {
        self.driver.add(TRANSMIT, &[Buffer::Out(&[0; HEADER]), Buffer::Out(&[fill; BYTES])])
    }

    /// A packet of the wire for the guest.
    fn offer(&self, fill: u8) {
        let packet = [vec![0; HEADER], vec![fill; BYTES]].concat();
        assert_eq!(send(&self.wire, &packet, SendFlags::empty()), Ok(packet.len()));
    }

    /// The next packet on the wire is this one.
    fn assert_sent(&mut self, made: &Made, fill: u8) {
        assert_eq!(self.driver.used(TRANSMIT).0, made.head);
        let mut packet = vec![0; HEADER + BYTES + 1];
        let (length, _) = recv(&self.wire, &mut packet, RecvFlags::empty()).unwrap();
        assert_eq!((length, packet[HEADER], packet[length - 1]), (HEADER + BYTES, fill, fill));
    }

    /// The guest has received this packet.
    fn assert_received(&mut self, made: &Made, fill: u8) {
        assert_eq!(self.driver.used(RECEIVE), (made.head, (HEADER + BYTES) as u32));
        assert_eq!(self.driver.written(made)[HEADER], fill);
    }

    fn assert_waits(&mut self, queue: usize) {
        for _ in 0..5 {
            self.driver.kick(queue);
            self.device.limiter().0.wake();
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(self.driver.try_used(queue), None);
        }
    }
}

/// How long the packet after `packets` of them has to wait, when `needed` bytes must be there before it may go.
fn wait_after(packets: u64, needed: u64) -> Duration {
    Duration::from_millis((packets * BYTES as u64 + needed - BYTES_AT_ONCE) * 1000 / RATE)
}

#[test]
fn what_a_guest_sends_waits_for_its_turn_and_is_not_lost() {
    let mut bench = Bench::new();
    let at_once = BYTES_AT_ONCE / BYTES as u64;
    let made: Vec<Made> = (0..at_once as u8 + 2).map(|fill| bench.transmit(fill)).collect();
    for fill in 0..at_once as u8 {
        bench.assert_sent(&made[usize::from(fill)], fill);
    }
    bench.assert_waits(TRANSMIT);
    let wait = wait_after(at_once, BYTES as u64);
    bench.advance(wait - Duration::from_millis(1));
    bench.assert_waits(TRANSMIT);
    bench.advance(Duration::from_millis(1));
    bench.assert_sent(&made[at_once as usize], at_once as u8);
    bench.assert_waits(TRANSMIT);
    bench.device.limiter().set(None);
    bench.assert_sent(&made[at_once as usize + 1], at_once as u8 + 1);
    assert_eq!(bench.device.counters().metrics("net").dropped, 0);
}

#[test]
fn what_a_guest_receives_waits_too_and_the_other_way_goes_on() {
    let mut bench = Bench::new();
    // As many as leave room for one of the longest kind, whose length is not known before.
    let at_once = (BYTES_AT_ONCE - LONGEST) / BYTES as u64 + 1;
    let buffers: Vec<Made> = (0..at_once + 1).map(|_| bench.driver.add(RECEIVE, &[Buffer::In(HEADER + LONGEST as usize)])).collect();
    for fill in 0..at_once as u8 {
        bench.offer(fill);
        bench.assert_received(&buffers[usize::from(fill)], fill);
    }
    bench.offer(99);
    bench.assert_waits(RECEIVE);
    let made = bench.transmit(1);
    bench.assert_sent(&made, 1);

    let wait = wait_after(at_once, LONGEST);
    bench.advance(wait - Duration::from_millis(1));
    bench.assert_waits(RECEIVE);
    bench.advance(Duration::from_millis(1));
    bench.assert_received(&buffers[at_once as usize], 99);
}

#[test]
fn a_pause_does_not_wait_for_the_limit_and_gives_everything_back() {
    let mut bench = Bench::new();
    let at_once = (BYTES_AT_ONCE / BYTES as u64) as u16;
    let made: Vec<Made> = (0..=at_once as u8).map(|fill| bench.transmit(fill)).collect();
    eventually(|| (bench.device.counters().metrics("net").sent_packets == u64::from(at_once)).then_some(()));
    let before = Instant::now();
    let queues = bench.device.stop();
    // The limit's clock stands still: it would never come.
    assert!(before.elapsed() < Duration::from_secs(60), "{:?}", before.elapsed());
    assert_eq!((queues[TRANSMIT].1.next_avail(), queues[TRANSMIT].1.next_used()), (at_once, at_once));
    let features = bench.device.features() & NO_EVENT_IDX;
    bench.device.activate(bench.driver.activation_of(queues, features)).unwrap();
    for fill in 0..at_once as u8 {
        bench.assert_sent(&made[usize::from(fill)], fill);
    }
    bench.assert_waits(TRANSMIT);
    bench.advance(Duration::from_secs(3600));
    bench.assert_sent(&made[usize::from(at_once)], at_once as u8);
}
