//! The disk as a driver uses it, and as a hostile one tries to.

use std::{
    cell::Cell,
    fs::File,
    io::Write,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    sync::atomic::Ordering,
};

use imago::{FormatCreateBuilder, file::File as Storage, qcow2::Qcow2};
use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::{
    Block, Layer, open,
    request::{self, Limits, Operation, Request, SECTOR, Status},
    uring::{self, Uring},
};
use crate::{
    config::DiskFormat,
    virtio::{
        VirtioDevice,
        testing::{Buffer, Descriptor, Driver, NEXT, NO_EVENT_IDX, WRITE, hostile_table, load_hostile},
    },
};

const SIZE: u64 = 1 << 20;
const SERIAL: &str = "vol-0123456789abcdef-too-long";

fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    file
}

fn raw_layer(file: &NamedTempFile) -> Layer {
    Layer { file: OwnedFd::from(file.reopen().unwrap()), format: DiskFormat::Raw }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = header(0, 0);
    bytes[0..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..16].copy_from_slice(&flags.to_le_bytes());
    bytes
}

thread_local! {
    /// Whether the disks of this test leave reads and flushes to the kernel.
    static WITH_RING: Cell<bool> = const { Cell::new(false) };
}

/// A disk and its driver.
struct Bench {
    device: Block,
    driver: Driver,
}

impl Bench {
    fn new(disk: Layer, backing: Vec<Layer>, read_only: bool) -> Self {
        let mut device = Block::new("disk".into(), SERIAL, open(disk, backing, read_only).unwrap(), read_only).unwrap();
        device.set_uring(WITH_RING.get().then(|| Uring::new(uring::make().unwrap())));
        let driver = Driver::new(device.queue_sizes());
        device.activate(driver.activation(device.features() & NO_EVENT_IDX)).unwrap();
        Self { device, driver }
    }

    /// Sends one request: what came back before the status, and the status.
    fn ask(&mut self, out: &[&[u8]], room: usize) -> (Vec<u8>, u8) {
        let mut buffers: Vec<Buffer<'_>> = out.iter().map(|bytes| Buffer::Out(bytes)).collect();
        buffers.push(Buffer::In(room));
        buffers.push(Buffer::In(1));
        let made = self.driver.add(0, &buffers);
        assert_eq!(self.driver.used(0).0, made.head);
        let mut bytes = self.driver.written(&made);
        let status = bytes.pop().unwrap();
        (bytes, status)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.ask(&[&header(1, sector), data], 0).1
    }

    fn read(&mut self, sector: u64, length: usize) -> Vec<u8> {
        let (data, status) = self.ask(&[&header(0, sector)], length);
        assert_eq!(status, 0);
        data
    }
}

#[test]
fn what_is_written_is_read_flushed_and_counted() {
    let file = image();
    let mut bench = Bench::new(raw_layer(&file), Vec::new(), false);
    let data: Vec<u8> = (0..4096_u32).map(|byte| byte as u8).collect();
    assert_eq!(bench.write(5, &data), 0);
    assert_eq!(bench.ask(&[&header(4, 0)], 0).1, 0);
    assert_eq!(bench.read(5, 4096), data);
    assert_eq!(&std::fs::read(file.path()).unwrap()[5 * 512..][..4096], &data);
    let metrics = bench.device.counters().metrics("disk");
    assert_eq!((metrics.reads, metrics.writes, metrics.flushes, metrics.errors), (1, 1, 1, 0));
    assert_eq!((metrics.read_bytes, metrics.written_bytes), (4096, 4096));
    assert!(bench.driver.interrupts.queues[0].load(Ordering::SeqCst) >= 3);
}

#[test]
fn a_request_may_be_cut_anywhere() {
    let file = image();
    let mut bench = Bench::new(raw_layer(&file), Vec::new(), false);
    let head = header(1, 0);
    let (_, status) = bench.ask(&[&head[..7], &head[7..], &[1; 100], &[2; 412], &[3; 512]], 0);
    assert_eq!(status, 0);
    let made = bench.driver.add(0, &[Buffer::Out(&header(0, 0)), Buffer::In(1000), Buffer::In(25)]);
    assert_eq!(bench.driver.used(0), (made.head, 1025));
    let data = bench.driver.written(&made);
    assert_eq!((&data[..100], &data[512..1024], data[1024]), (&[1; 100][..], &[3; 512][..], 0));
}

#[test]
fn requests_beyond_the_end_or_not_in_sectors_fail() {
    let file = image();
    let mut bench = Bench::new(raw_layer(&file), Vec::new(), false);
    let last = SIZE / SECTOR;
    assert_eq!(bench.write(last, &[0; 512]), 1);
    assert_eq!(bench.write(last - 1, &[0; 1024]), 1);
    assert_eq!(bench.write(u64::MAX, &[0; 512]), 1);
    // Sectors whose offset in bytes is beyond what a number holds.
    assert_eq!(bench.write(1 << 60, &[0; 512]), 1);
    assert_eq!(bench.ask(&[&header(11, 0), &range(u64::MAX, 0, 0)], 0).1, 1);
    assert_eq!(bench.write(0, &[0; 100]), 1);
    assert_eq!(bench.ask(&[&header(0, last)], 512).1, 1);
    assert_eq!(bench.ask(&[&header(99, 0)], 0).1, 2);
    assert_eq!(file.as_file().metadata().unwrap().len(), SIZE);
    assert_eq!(bench.device.counters().metrics("disk").errors, 8);
}

#[test]
fn the_serial_is_told() {
    let file = image();
    let mut bench = Bench::new(raw_layer(&file), Vec::new(), false);
    assert_eq!(bench.ask(&[&header(8, 0)], 20), (SERIAL.as_bytes()[..20].to_vec(), 0));
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_free_the_host() {
    let file = image();
    let mut bench = Bench::new(raw_layer(&file), Vec::new(), false);
    for kind in [11, 13] {
        assert_eq!(bench.write(0, &[7; 65536]), 0);
        assert_eq!(bench.ask(&[&header(4, 0)], 0).1, 0);
        let before = file.as_file().metadata().unwrap().blocks();
        let unmap = u32::from(kind == 13);
        assert_eq!(bench.ask(&[&header(kind, 0), &range(0, 64, unmap), &range(64, 64, unmap)], 0).1, 0);
        assert!(bench.read(0, 65536).iter().all(|byte| *byte == 0));
        assert!(file.as_file().metadata().unwrap().blocks() < before, "kind {kind} freed nothing");
    }
    assert_eq!(bench.write(0, &[7; 4096]), 0);
    assert_eq!(bench.ask(&[&header(13, 0), &range(1, 2, 0)], 0).1, 0);
    let data = bench.read(0, 4096);
    assert_eq!((data[511], data[512], data[1535], data[1536]), (7, 0, 0, 7));
    // Wrong flags, no range, half a range, too many sectors, beyond the end.
    assert_eq!(bench.ask(&[&header(11, 0), &range(0, 8, 1)], 0).1, 2);
    assert_eq!(bench.ask(&[&header(13, 0), &range(0, 8, 2)], 0).1, 2);
    assert_eq!(bench.ask(&[&header(11, 0)], 0).1, 1);
    assert_eq!(bench.ask(&[&header(11, 0), &[0; 24]], 0).1, 1);
    assert_eq!(bench.ask(&[&header(11, 0), &range(0, u32::MAX, 0)], 0).1, 1);
    assert_eq!(bench.ask(&[&header(11, 0), &range(SIZE / SECTOR, 1, 0)], 0).1, 1);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let file = image();
    let mut bench = Bench::new(raw_layer(&file), Vec::new(), true);
    assert_eq!(bench.device.features() & (1 << 5), 1 << 5);
    assert_eq!(bench.write(0, &[1; 512]), 1);
    for kind in [11, 13] {
        assert_eq!(bench.ask(&[&header(kind, 0), &range(0, 8, 0)], 0).1, 1);
    }
    assert_eq!(bench.read(0, 512), [0; 512]);
}

#[test]
fn a_pause_gives_the_queue_back_and_goes_on_where_it_stood() {
    let file = image();
    let mut bench = Bench::new(raw_layer(&file), Vec::new(), false);
    assert_eq!(bench.write(0, &[9; 512]), 0);
    let queues = bench.device.stop();
    assert_eq!(queues.len(), 1);
    assert!(bench.device.stop().is_empty());
    let state = bench.device.save();
    let waiting = bench.driver.add(0, &[Buffer::Out(&header(0, 0)), Buffer::In(512), Buffer::In(1)]);
    assert!(bench.driver.try_used(0).is_none());

    bench.device.restore(&state).unwrap();
    let features = bench.device.features() & NO_EVENT_IDX;
    bench.device.activate(bench.driver.activation_of(queues, features)).unwrap();
    assert_eq!(bench.driver.used(0), (waiting.head, 513));
    assert_eq!(bench.driver.written(&waiting)[..512], [9; 512]);
}

#[test]
fn a_state_of_another_disk_or_version_is_refused() {
    let file = image();
    let mut device = Block::new("disk".into(), "a", open(raw_layer(&file), Vec::new(), false).unwrap(), false).unwrap();
    let mut state = device.save();
    state["sectors"] = 1.into();
    assert!(device.restore(&state).is_err());
    // A copy of the VM has a disk with another serial.
    let mut state = device.save();
    state["serial"] = "b".into();
    device.restore(&state).unwrap();
    let mut state = device.save();
    state["version"] = 2.into();
    assert!(device.restore(&state).unwrap_err().to_string().contains("version 2"));
    assert!(device.restore(&serde_json::json!(null)).is_err());
}

#[test]
fn the_backend_is_replaced_only_while_paused() {
    let (first, second, small) = (image(), image(), image());
    small.as_file().set_len(512).unwrap();
    let mut bench = Bench::new(raw_layer(&first), Vec::new(), false);
    let backend = |file: &NamedTempFile| open(raw_layer(file), Vec::new(), false).unwrap();
    assert!(bench.device.replace_backend(backend(&second)).is_err());
    assert_eq!(bench.write(0, &[1; 512]), 0);
    let queues = bench.device.stop();
    assert!(bench.device.replace_backend(backend(&small)).is_err());
    bench.device.replace_backend(backend(&second)).unwrap();
    let features = bench.device.features() & NO_EVENT_IDX;
    bench.device.activate(bench.driver.activation_of(queues, features)).unwrap();
    assert_eq!(bench.read(0, 512), [0; 512]);
}

#[test]
fn broken_chains_need_a_reset_and_stop_nothing_else() {
    let here = 0x20_0000;
    let good = Descriptor { address: here, length: 16, flags: 0, next: 0 };
    let broken: [&[Descriptor]; 5] = [
        &[Descriptor { address: u64::MAX - 4, ..good }],
        &[Descriptor { flags: NEXT, next: 999, ..good }],
        &[Descriptor { flags: NEXT, next: 0, ..good }],
        &[Descriptor { length: 15, flags: NEXT, next: 1, ..good }, Descriptor { flags: WRITE, length: 1, ..good }],
        &[good],
    ];
    for table in broken {
        let file = image();
        let mut bench = Bench::new(raw_layer(&file), Vec::new(), false);
        for (index, descriptor) in (0..).zip(table) {
            bench.driver.set_descriptor(0, index, *descriptor);
        }
        bench.driver.offer(0, 0);
        bench.driver.await_needs_reset();
        // The driver resets and starts anew.
        assert_eq!(bench.device.stop().len(), 1);
        assert_eq!(bench.driver.interrupts.config.load(Ordering::SeqCst), 1);
        bench.driver = Driver::new(bench.device.queue_sizes());
        bench.device.activate(bench.driver.activation(bench.device.features() & NO_EVENT_IDX)).unwrap();
        assert_eq!(bench.write(0, &[1; 512]), 0);
    }
}

#[test]
fn a_ring_that_claims_too_much_needs_a_reset() {
    let file = image();
    let bench = Bench::new(raw_layer(&file), Vec::new(), false);
    bench.driver.set_available(0, 1000);
    bench.driver.await_needs_reset();
}

fn overlay(backing: Option<&str>) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let storage = Storage::try_from(file.reopen().unwrap()).unwrap();
    let mut builder = Qcow2::<Storage>::create_builder(storage).size(SIZE);
    if let Some(path) = backing {
        builder = builder.backing(path.into(), "raw".into());
    }
    builder.create().unwrap();
    file
}

fn qcow2_layer(file: &NamedTempFile) -> Layer {
    Layer { file: OwnedFd::from(File::options().read(true).write(true).open(file.path()).unwrap()), format: DiskFormat::Qcow2 }
}

#[test]
fn an_overlay_reads_what_lies_behind_and_keeps_it_unchanged() {
    let mut base = image();
    base.write_all(&[5; 128 * 1024]).unwrap();
    let before = std::fs::read(base.path()).unwrap();
    let top = overlay(Some("/nonexistent/never followed"));
    {
        let mut bench = Bench::new(qcow2_layer(&top), vec![raw_layer(&base)], false);
        assert_eq!(bench.read(0, 1024), [5; 1024]);
        assert_eq!(bench.write(1, &[6; 512]), 0);
        let data = bench.read(0, 1536);
        assert_eq!((data[511], data[512], data[1024]), (5, 6, 5));
        // A discard hides what lies behind.
        assert_eq!(bench.ask(&[&header(11, 0), &range(0, 256, 0)], 0).1, 0);
        assert!(bench.read(0, 128 * 1024).iter().all(|byte| *byte == 0));
        assert_eq!(bench.ask(&[&header(4, 0)], 0).1, 0);
        bench.device.stop();
    }
    assert_eq!(std::fs::read(base.path()).unwrap(), before);
    // Nothing was left in caches.
    let mut bench = Bench::new(qcow2_layer(&top), vec![raw_layer(&base)], false);
    assert_eq!(bench.read(1, 512), [0; 512]);
}

#[test]
fn a_backing_file_that_was_not_passed_is_refused() {
    let base = image();
    let top = overlay(Some(base.path().to_str().unwrap()));
    let error = open(qcow2_layer(&top), Vec::new(), false).err().unwrap();
    assert!(!error.to_string().is_empty());
}

#[test]
fn discarding_in_an_overlay_frees_the_host() {
    let top = overlay(None);
    let mut bench = Bench::new(qcow2_layer(&top), Vec::new(), false);
    assert_eq!(bench.write(0, &[7; 512 * 1024]), 0);
    assert_eq!(bench.ask(&[&header(4, 0)], 0).1, 0);
    let full = top.as_file().metadata().unwrap().blocks();
    assert_eq!(bench.ask(&[&header(11, 0), &range(0, 1024, 0)], 0).1, 0);
    assert_eq!(bench.ask(&[&header(4, 0)], 0).1, 0);
    let empty = top.as_file().metadata().unwrap().blocks();
    assert!(empty + 900 < full, "{full} blocks before, {empty} after");
    assert!(bench.read(0, 512 * 1024).iter().all(|byte| *byte == 0));
    assert_eq!(bench.write(0, &[8; 512]), 0);
    assert_eq!(bench.read(0, 512), [8; 512]);
}

/// The tests above are of disks that do one request after the other.
#[test]
fn all_of_it_holds_with_io_uring() {
    WITH_RING.set(true);
    for case in [
        what_is_written_is_read_flushed_and_counted,
        a_request_may_be_cut_anywhere,
        requests_beyond_the_end_or_not_in_sectors_fail,
        the_serial_is_told,
        discarded_and_zeroed_ranges_read_as_zeros_and_free_the_host,
        a_read_only_disk_refuses_every_change,
        a_pause_gives_the_queue_back_and_goes_on_where_it_stood,
        the_backend_is_replaced_only_while_paused,
        broken_chains_need_a_reset_and_stop_nothing_else,
        a_ring_that_claims_too_much_needs_a_reset,
        an_overlay_reads_what_lies_behind_and_keeps_it_unchanged,
    ] {
        case();
    }
}

proptest! {
    /// Whatever a driver writes, a request that is to be performed stays inside disk and buffers.
    #[test]
    fn no_request_leaves_the_disk(table in hostile_table(), head in 0_u16..16, kind in 0_u32..15, sector in any::<u64>(), read_only: bool) {
        let limits = Limits { sectors: 64, read_only, discard: true };
        let mut content = header(kind, if kind % 2 == 0 { sector } else { sector % 70 }).to_vec();
        content.extend(range(sector % 70, (sector >> 32) as u32 % 70, (sector >> 60) as u32));
        let Some((memory, chain)) = load_hostile(&table, head, &content) else { return Ok(()) };
        let Ok(request) = request::parse(&memory, &chain, limits) else { return Ok(()) };
        let inside = |offset: u64, length: u64| offset.checked_add(length).is_some_and(|end| end <= 64 * SECTOR);
        match request {
            Request::Perform(Operation::Read { offset }) => prop_assert!(inside(offset, chain.writable.len() as u64 - 1)),
            Request::Perform(Operation::Write { offset }) => {
                prop_assert!(!read_only);
                prop_assert!(inside(offset, chain.readable.len() as u64 - 16));
            }
            Request::Perform(Operation::Discard(extents) | Operation::WriteZeroes { extents, .. }) => {
                prop_assert!(!read_only);
                for extent in extents {
                    prop_assert!(inside(extent.offset, extent.length));
                }
            }
            Request::Perform(Operation::Flush | Operation::GetId) => {}
            Request::Refuse(status) => prop_assert_ne!(status, Status::Ok),
        }
    }
}
