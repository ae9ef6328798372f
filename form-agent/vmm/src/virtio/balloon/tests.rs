//! The balloon as a driver uses it, and as a hostile one tries to.

use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::{
    Balloon,
    request::{self, PAGE, Range},
};
use crate::virtio::{
    VirtioDevice,
    testing::{Buffer, Descriptor, Driver, HIGH, NO_EVENT_IDX, WRITE, guest_memory, hostile_table, load_hostile},
};

const PAGES: u64 = 0x40_0000;

fn bench() -> (Balloon, Driver) {
    let mut device = Balloon::new("balloon".into());
    let driver = Driver::new(device.queue_sizes());
    device.activate(driver.activation(device.features() & NO_EVENT_IDX)).unwrap();
    (device, driver)
}

fn numbers(pages: &[u64]) -> Vec<u8> {
    pages.iter().flat_map(|address| ((address / PAGE) as u32).to_le_bytes()).collect()
}

#[test]
fn inflated_pages_are_given_back_and_read_as_zeros() {
    let (device, mut driver) = bench();
    for page in [PAGES, PAGES + PAGE, PAGES + 3 * PAGE, HIGH] {
        driver.write(page, &[7; PAGE as usize]);
    }
    // One of them lies nowhere, which only the driver minds.
    let made = driver.add(0, &[Buffer::Out(&numbers(&[PAGES + PAGE, PAGES, HIGH, 0xffff_ffff * PAGE]))]);
    assert_eq!(driver.used(0), (made.head, 0));
    for page in [PAGES, PAGES + PAGE, HIGH] {
        assert_eq!(driver.read(page, PAGE as usize), [0; PAGE as usize]);
    }
    assert_eq!(driver.read(PAGES + 3 * PAGE, 1), [7]);
    assert_eq!(device.handle().freed_bytes(), 3 * PAGE);

    let made = driver.add(1, &[Buffer::Out(&numbers(&[PAGES]))]);
    assert_eq!(driver.used(1), (made.head, 0));
    assert!(!driver.needs_reset.load(Ordering::SeqCst));
}

#[test]
fn reported_pages_are_given_back_whole() {
    let (device, mut driver) = bench();
    driver.write(PAGES, &[7; 4 * PAGE as usize]);
    let report = Descriptor { address: PAGES + 100, length: 3 * PAGE as u32, flags: WRITE, next: 0 };
    let head = driver.add_chain(2, &[report]);
    assert_eq!(driver.used(2), (head, 0));
    assert_eq!(driver.read(PAGES, PAGE as usize), [7; PAGE as usize]);
    assert_eq!(driver.read(PAGES + PAGE, 2 * PAGE as usize), [0; 2 * PAGE as usize]);
    assert_eq!(driver.read(PAGES + 3 * PAGE, 1), [7]);
    assert_eq!(device.handle().freed_bytes(), 2 * PAGE);
}

#[test]
fn the_target_is_told_and_the_driver_tells_what_it_gave() {
    let (mut device, driver) = bench();
    let handle = device.handle();
    handle.set_target_mib(64).unwrap();
    assert_eq!(driver.interrupts.config.load(Ordering::SeqCst), 1);
    let mut target = [0; 4];
    device.read_config(0, &mut target);
    assert_eq!(u32::from_le_bytes(target), 64 * 256);
    device.write_config(0, &[1; 4]);
    device.write_config(4, &(512_u32).to_le_bytes());
    device.write_config(4, &[1; 3]);
    device.write_config(u64::MAX, &[1; 4]);
    assert_eq!(handle.actual_mib(), 2);
    assert!(handle.set_target_mib(u64::MAX).is_err());

    let state = device.save();
    let mut other = Balloon::new("balloon".into());
    other.restore(&state).unwrap();
    assert_eq!(other.save(), state);
    assert!(other.restore(&serde_json::json!({"version": 9})).is_err());
}

#[test]
fn a_driver_without_reporting_has_two_queues() {
    let mut device = Balloon::new("balloon".into());
    let mut driver = Driver::new(&[128, 128]);
    device.activate(driver.activation(NO_EVENT_IDX & !(1 << 5))).unwrap();
    let made = driver.add(1, &[Buffer::Out(&numbers(&[PAGES]))]);
    assert_eq!(driver.used(1), (made.head, 0));
    assert_eq!(device.stop().len(), 2);
    assert!(device.activate(Driver::new(&[128]).activation(0)).is_err());
}

proptest! {
    #[test]
    fn ranges_cover_the_pages_named_and_nothing_else(table in hostile_table(), head in 0_u16..16, pages in prop::collection::vec(0_u32..12, 64)) {
        let content: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        let Some((memory, chain)) = load_hostile(&table, head, &content) else { return Ok(()) };
        let mut bytes = vec![0; chain.readable.len() / 4 * 4];
        chain.readable.read(&memory, 0, &mut bytes).unwrap();
        let mut named: Vec<u64> = bytes.chunks(4).map(|n| u64::from(u32::from_le_bytes([n[0], n[1], n[2], n[3]])) * PAGE).collect();
        let mut covered = Vec::new();
        request::inflated(&memory, &chain.readable, |range| {
            covered.extend((range.start..range.start + range.length).step_by(PAGE as usize));
        }).unwrap();
        // Hostile tables name a page more than once, in one batch or in several.
        named.sort_unstable();
        named.dedup();
        covered.sort_unstable();
        covered.dedup();
        prop_assert_eq!(named, covered);
    }

    #[test]
    fn any_range_can_be_released(start in prop_oneof![0_u64..0x90_0000, HIGH - 0x2000..HIGH + 0x12_0000, any::<u64>()], length in prop_oneof![0_u64..0x2_0000, any::<u64>()]) {
        let freed = request::release(&guest_memory(), Range { start, length }).unwrap();
        prop_assert!(freed <= 9 << 20);
    }
}
