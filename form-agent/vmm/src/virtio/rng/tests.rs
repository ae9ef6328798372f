//! The entropy device as a driver uses it.

use proptest::prelude::*;

use super::{Rng, request::REQUEST_MAX};
use crate::virtio::{
    VirtioDevice,
    testing::{Buffer, Driver, NO_EVENT_IDX, hostile_table, load_hostile},
};

fn bench() -> (Rng, Driver) {
    let mut device = Rng::new("rng".into());
    let driver = Driver::new(device.queue_sizes());
    device.activate(driver.activation(device.features() & NO_EVENT_IDX)).unwrap();
    (device, driver)
}

#[test]
fn buffers_are_filled_with_entropy() {
    let (mut device, mut driver) = bench();
    let made = driver.add(0, &[Buffer::In(100), Buffer::In(28)]);
    assert_eq!(driver.used(0), (made.head, 128));
    let bytes = driver.written(&made);
    assert!(bytes.iter().any(|byte| *byte != bytes[0]));
    assert_eq!(device.stop().len(), 1);
}

#[test]
fn a_large_request_gets_a_part_and_an_empty_one_nothing() {
    let (_device, mut driver) = bench();
    let made = driver.add(0, &[Buffer::In(REQUEST_MAX + 100)]);
    assert_eq!(driver.used(0), (made.head, REQUEST_MAX as u32));
    let made = driver.add(0, &[Buffer::Out(b"why not")]);
    assert_eq!(driver.used(0), (made.head, 0));
}

#[test]
fn a_greedy_driver_is_served_later_not_never() {
    let (_device, mut driver) = bench();
    let address = driver.allocate(REQUEST_MAX);
    let buffer = crate::virtio::testing::Descriptor { address, length: REQUEST_MAX as u32, flags: crate::virtio::testing::WRITE, next: 0 };
    for _ in 0..40 {
        let head = driver.add_chain(0, &[buffer]);
        assert_eq!(driver.used(0), (head, REQUEST_MAX as u32));
    }
}

proptest! {
    #[test]
    fn no_chain_gets_more_than_it_has_room_for(table in hostile_table(), head in 0_u16..16) {
        let Some((memory, chain)) = load_hostile(&table, head, b"") else { return Ok(()) };
        let length = chain.writable.len().min(REQUEST_MAX);
        let written = chain.writable.iovecs(&memory, 0..length).unwrap().fill_random().unwrap();
        prop_assert_eq!(written, length);
    }
}
