//! The memory device as a driver uses it, and as a hostile one tries to.

use std::{
    collections::BTreeSet,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use proptest::prelude::*;

use super::{
    BLOCK, Backing, Mem, MemState, Region,
    blocks::Blocks,
    request::{Answer, PlugState, Request},
};
use crate::virtio::{
    VirtioDevice,
    testing::{Buffer, Driver, NO_EVENT_IDX, eventually},
};

const START: u64 = 68 << 30;
const COUNT: u32 = 8;
const REGION: Region = Region { start: START, blocks: COUNT };

/// Which blocks the host has given; it fails at the block `fails`.
struct Host {
    given: Mutex<BTreeSet<u32>>,
    fails: AtomicU32,
}

impl Default for Host {
    fn default() -> Self {
        Self { given: Mutex::default(), fails: AtomicU32::new(u32::MAX) }
    }
}

impl Host {
    fn given(&self) -> Vec<u32> {
        self.given.lock().unwrap().iter().copied().collect()
    }

    fn fails(&self, index: u32) -> io::Result<()> {
        if self.fails.load(Ordering::SeqCst) == index { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }
}

impl Backing for Arc<Host> {
    fn plug(&self, index: u32) -> io::Result<()> {
        self.fails(index)?;
        assert!(self.given.lock().unwrap().insert(index), "block {index} was given twice");
        Ok(())
    }

    fn unplug(&self, index: u32) -> io::Result<()> {
        self.fails(index)?;
        assert!(self.given.lock().unwrap().remove(&index), "block {index} was not the guest's");
        Ok(())
    }
}

fn at(index: u64) -> u64 {
    START + index * BLOCK
}

fn plug(index: u64, count: u16) -> Request {
    Request::Plug { address: at(index), count }
}

fn unplug(index: u64, count: u16) -> Request {
    Request::Unplug { address: at(index), count }
}

fn state(index: u64, count: u16) -> Request {
    Request::State { address: at(index), count }
}

#[test]
fn every_request_in_every_state() {
    let host = Arc::<Host>::default();
    let mut blocks = Blocks::new(REGION);
    assert!(blocks.want(5) && !blocks.want(COUNT + 1));
    assert_eq!(blocks.wanted(), 5);
    // Blocks 1 and 2 are there.
    let steps = [
        (plug(1, 2), Answer::Done),
        (state(0, 1), Answer::State(PlugState::Unplugged)),
        (state(1, 2), Answer::State(PlugState::Plugged)),
        (state(0, 3), Answer::State(PlugState::Mixed)),
        // What is there cannot come again, not even a part of it; what is not cannot go.
        (plug(1, 1), Answer::Error),
        (plug(0, 2), Answer::Error),
        (plug(2, 2), Answer::Error),
        (unplug(0, 1), Answer::Error),
        (unplug(0, 2), Answer::Error),
        (unplug(2, 2), Answer::Error),
        // More than it should have.
        (plug(3, 4), Answer::Refused),
        (plug(3, 3), Answer::Done),
        (plug(7, 1), Answer::Refused),
        (unplug(3, 1), Answer::Done),
        (plug(0, 1), Answer::Done),
        // Beside the region, and nothing at all.
        (plug(COUNT.into(), 1), Answer::Error),
        (state(7, 2), Answer::Error),
        (state(0, u16::MAX), Answer::Error),
        (state(0, 0), Answer::Error),
        (plug(7, 0), Answer::Error),
        (unplug(0, 0), Answer::Error),
        (Request::State { address: START + 1, count: 1 }, Answer::Error),
        (Request::State { address: START - BLOCK, count: 1 }, Answer::Error),
        (Request::State { address: u64::MAX, count: 1 }, Answer::Error),
        (Request::State { address: 0, count: 1 }, Answer::Error),
        (Request::Unknown, Answer::Error),
    ];
    for (request, answer) in steps {
        assert_eq!(blocks.perform(request, &host), answer, "{request:?}");
    }
    assert_eq!(host.given(), [0, 1, 2, 4, 5]);
    // Less is wanted: what is there stays until the driver gives it.
    blocks.want(0);
    assert_eq!(blocks.plugged_count(), 5);
    assert_eq!(blocks.perform(plug(3, 1), &host), Answer::Refused);
    assert_eq!(blocks.perform(Request::UnplugAll, &host), Answer::Done);
    assert_eq!(blocks.perform(Request::UnplugAll, &host), Answer::Done);
    assert!(host.given().is_empty() && blocks.plugged_count() == 0);
}

#[test]
fn a_host_without_memory_gives_all_or_nothing_and_is_asked_again() {
    let host = Arc::<Host>::default();
    let mut blocks = Blocks::new(REGION);
    blocks.want(COUNT);
    host.fails.store(3, Ordering::SeqCst);
    assert_eq!(blocks.perform(plug(1, 4), &host), Answer::Busy);
    assert!(host.given().is_empty() && blocks.plugged_count() == 0);
    host.fails.store(u32::MAX, Ordering::SeqCst);
    assert_eq!(blocks.perform(plug(1, 4), &host), Answer::Done);
    host.fails.store(2, Ordering::SeqCst);
    assert_eq!(blocks.perform(unplug(1, 4), &host), Answer::Busy);
    assert_eq!((host.given(), blocks.plugged().collect::<Vec<_>>()), (vec![2], vec![2]));
}

fn request_bytes(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

fn field(device: &Mem, index: u64) -> u64 {
    let mut bytes = [0; 8];
    device.read_config(index * 8, &mut bytes);
    u64::from_le_bytes(bytes)
}

fn bench(device: &mut Mem) -> Driver {
    let driver = Driver::new(device.queue_sizes());
    device.activate(driver.activation(device.features() & NO_EVENT_IDX)).unwrap();
    driver
}

fn ask(driver: &mut Driver, kind: u16, address: u64, count: u16) -> Vec<u8> {
    let made = driver.add(0, &[Buffer::Out(&request_bytes(kind, address, count)), Buffer::In(10)]);
    assert_eq!(driver.used(0), (made.head, 10));
    driver.written(&made)
}

#[test]
fn a_driver_is_told_takes_gives_and_reads_what_it_has() {
    let host = Arc::<Host>::default();
    let mut device = Mem::new("memory".into(), REGION, Box::new(Arc::clone(&host)));
    let handle = device.handle();
    // Without a driver nobody is told.
    handle.want(1).unwrap();
    assert!(!handle.has_driver());
    let mut driver = bench(&mut device);
    assert!(handle.has_driver() && handle.want(COUNT + 1).is_err());
    handle.want(2).unwrap();
    assert_eq!(driver.interrupts.config.load(Ordering::SeqCst), 1);
    let config: Vec<u64> = (0..8).map(|index| field(&device, index)).collect();
    assert_eq!(config, [BLOCK, 0, START, 8 * BLOCK, 8 * BLOCK, 0, 2 * BLOCK, 0]);
    assert_eq!(ask(&mut driver, 0, at(0), 2), [0; 10]);
    assert_eq!((handle.plugged(), field(&device, 5)), (2, 2 * BLOCK));
    assert_eq!(ask(&mut driver, 0, at(2), 1)[0], 1);
    assert_eq!(ask(&mut driver, 3, at(1), 2)[8], 2);
    assert_eq!(ask(&mut driver, 1, at(1), 2)[0], 3);
    assert_eq!(ask(&mut driver, 1, at(1), 1)[0], 0);
    assert_eq!(ask(&mut driver, 9, 0, 0)[0], 3);
    host.fails.store(1, Ordering::SeqCst);
    assert_eq!(ask(&mut driver, 0, at(1), 1)[0], 2);
    // A reset of the device takes nothing from the guest (section 5.15.6.1); a driver that begins anew gives all of it.
    assert_eq!(device.stop().len(), 1);
    assert!(!handle.has_driver() && device.stop().is_empty());
    assert_eq!(handle.plugged(), 1);
    let mut driver = bench(&mut device);
    assert_eq!(ask(&mut driver, 2, 0, 0)[0], 0);
    assert_eq!((handle.plugged(), host.given().len()), (0, 0));
}

#[test]
fn a_request_without_room_for_itself_or_its_answer_stops_the_device() {
    let whole = request_bytes(0, at(0), 1);
    for (request, room) in [(&whole[..23], 10), (&whole[..], 9), (&[][..], 0)] {
        let host = Arc::<Host>::default();
        let mut device = Mem::new("memory".into(), REGION, Box::new(Arc::clone(&host)));
        device.handle().want(COUNT).unwrap();
        let mut driver = bench(&mut device);
        driver.add(0, &[Buffer::Out(request), Buffer::In(room)]);
        driver.await_needs_reset();
        assert!(host.given().is_empty());
    }
}

#[test]
fn a_saved_device_has_what_it_had_and_others_are_refused() {
    let host = Arc::<Host>::default();
    let mut device = Mem::new("memory".into(), REGION, Box::new(Arc::clone(&host)));
    device.handle().want(3).unwrap();
    let mut driver = bench(&mut device);
    ask(&mut driver, 0, at(1), 1);
    ask(&mut driver, 0, at(4), 2);
    device.stop();
    let saved = device.save();
    let state = MemState::read(&saved).unwrap();
    assert_eq!((state.wanted, state.plugged.as_slice()), (3, [1, 4, 5].as_slice()));
    assert_eq!(state.ranges().collect::<Vec<_>>(), [(at(1), BLOCK), (at(4), BLOCK), (at(5), BLOCK)]);
    let mut again = Mem::saved("memory".into(), &state, Box::new(Arc::clone(&host)));
    again.restore(&saved).unwrap();
    assert_eq!(again.save(), saved);
    // It goes on where it was.
    again.handle().want(2).unwrap();
    let mut driver = bench(&mut again);
    assert_eq!(ask(&mut driver, 1, at(4), 1)[0], 0);
    eventually(|| (again.handle().plugged() == 2).then_some(()));
    again.stop();
    assert!(again.restore(&saved).is_err(), "it has other blocks by now");

    let altered = |change: fn(&mut MemState)| {
        let mut state = state.clone();
        change(&mut state);
        MemState::read(&serde_json::to_value(state).unwrap())
    };
    assert!(altered(|_| {}).is_ok());
    assert!(altered(|state| state.version = 2).is_err());
    assert!(altered(|state| state.wanted = COUNT + 1).is_err());
    assert!(altered(|state| state.plugged.push(COUNT)).is_err());
    assert!(altered(|state| state.plugged.push(5)).is_err());
    assert!(altered(|state| state.plugged.insert(0, 2)).is_err());
    assert!(altered(|state| state.start += 4096).is_err());
    assert!(altered(|state| state.start = u64::MAX / BLOCK * BLOCK).is_err());
    assert!(altered(|state| state.blocks = u32::MAX).is_err());
    assert!(MemState::read(&serde_json::Value::Null).is_err());
}

fn any_request() -> impl Strategy<Value = Request> {
    let address = prop_oneof![
        8 => (0..u64::from(COUNT) + 2).prop_map(at),
        1 => any::<u64>(),
        1 => (0..u64::from(COUNT)).prop_map(|index| at(index) + 4096),
    ];
    let count = prop_oneof![8 => 0_u16..5, 1 => any::<u16>()];
    (0_u16..6, address, count).prop_map(|(kind, address, count)| {
        let bytes: [u8; 24] = request_bytes(kind, address, count).try_into().unwrap();
        Request::parse(&bytes)
    })
}

proptest! {
    /// What the device says that the guest has is what the host gave, never more than it should have got, and survives being saved.
    #[test]
    fn blocks_and_the_host_always_agree(steps in prop::collection::vec((any_request(), 0..COUNT + 2, prop::option::of(0..COUNT)), 0..60)) {
        let host = Arc::<Host>::default();
        let mut blocks = Blocks::new(REGION);
        for (request, wanted, fails) in steps {
            let before = blocks.plugged_count();
            prop_assert_eq!(blocks.want(wanted), wanted <= COUNT);
            host.fails.store(fails.unwrap_or(u32::MAX), Ordering::SeqCst);
            let answer = blocks.perform(request, &host);
            prop_assert_eq!(blocks.plugged().collect::<Vec<_>>(), host.given());
            prop_assert!(blocks.plugged_count() <= before.max(blocks.wanted()));
            if matches!(answer, Answer::Error | Answer::Refused | Answer::State(_)) {
                prop_assert_eq!(blocks.plugged_count(), before);
            }
            let state = MemState::read(&serde_json::to_value(MemState::new(&blocks)).unwrap()).unwrap();
            prop_assert_eq!(state.blocks(), blocks.clone());
        }
    }
}
