//! Disks whose reads and flushes are left to the kernel. A pipe stands for storage that answers when the test says so.

use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::FileExt,
    },
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustix::fs::{Advice, fadvise};
use tempfile::NamedTempFile;

use super::*;
use crate::virtio::{
    VirtioDevice,
    block::{Block, DiskBackend, Payload, RawFile},
    testing::{Buffer, Driver, Made, NO_EVENT_IDX},
};

const SIZE: u64 = 4 << 20;
const IO_ERROR: u8 = 1;
/// What [`Odd`] answers itself.
const MARK: u8 = 0xA5;

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// Storage of which the kernel is given `file`, and which answers with [`MARK`] when it is asked itself.
struct Odd {
    file: File,
    asked: Arc<AtomicUsize>,
    fails: bool,
}

impl Odd {
    fn answer(&self) -> io::Result<()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.fails { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }
}

impl DiskBackend for Odd {
    fn size(&self) -> u64 {
        SIZE
    }
    fn grow(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn can_discard(&self) -> bool {
        false
    }
    fn file(&self) -> Option<RawFd> {
        Some(self.file.as_raw_fd())
    }
    fn read(&mut self, _: u64, into: &Payload<'_>) -> io::Result<()> {
        self.answer()?;
        into.copy_to_guest(0, &vec![MARK; into.len()])
    }
    fn write(&mut self, _: u64, _: &Payload<'_>) -> io::Result<()> {
        self.answer()
    }
    fn flush(&mut self) -> io::Result<()> {
        self.answer()
    }
    fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
        self.answer()
    }
    fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
        self.answer()
    }
}

/// Storage that has no file for the kernel.
struct Waiting;

impl DiskBackend for Waiting {
    fn size(&self) -> u64 {
        SIZE
    }
    fn grow(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn can_discard(&self) -> bool {
        false
    }
    fn read(&mut self, _: u64, into: &Payload<'_>) -> io::Result<()> {
        into.copy_to_guest(0, &vec![MARK; into.len()])
    }
    fn write(&mut self, _: u64, _: &Payload<'_>) -> io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

struct Bench {
    device: Block,
    driver: Driver,
    asked: Arc<AtomicUsize>,
}

impl Bench {
    /// Not working yet: what is asked for before `start` comes at once.
    fn new(backend: Box<dyn DiskBackend>, asked: Arc<AtomicUsize>) -> Self {
        let mut device = Block::new("disk".into(), "serial", backend, false).unwrap();
        device.set_uring(Some(Uring::new(make().unwrap())));
        let driver = Driver::new(device.queue_sizes());
        Self { device, driver, asked }
    }

    fn odd(file: impl Into<OwnedFd>, fails: bool) -> Self {
        let asked = Arc::default();
        Self::new(Box::new(Odd { file: File::from(file.into()), asked: Arc::clone(&asked), fails }), asked)
    }

    /// A pipe is what the kernel reads; what is written to the other end comes from the disk.
    fn pipe() -> (Self, io::PipeWriter) {
        let (reader, writer) = io::pipe().unwrap();
        (Self::odd(reader, false), writer)
    }

    fn start(&mut self) {
        let features = self.device.features() & NO_EVENT_IDX;
        self.device.activate(self.driver.activation(features)).unwrap();
    }

    fn read(&mut self, sector: u64, length: usize) -> Made {
        self.driver.add(0, &[Buffer::Out(&header(0, sector)), Buffer::In(length), Buffer::In(1)])
    }

    fn flush(&mut self) -> Made {
        self.driver.add(0, &[Buffer::Out(&header(4, 0)), Buffer::In(1)])
    }

    fn identify(&mut self) -> Made {
        self.driver.add(0, &[Buffer::Out(&header(8, 0)), Buffer::In(20), Buffer::In(1)])
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn errors(&self) -> u64 {
        self.device.counters().metrics("disk").errors
    }
}

#[test]
fn later_requests_overtake_reads_that_wait() {
    let (mut bench, mut disk) = Bench::pipe();
    let reads = [bench.read(0, 512), bench.read(1, 512)];
    bench.start();
    assert!(bench.device.counters().metrics("disk").io_uring);
    // The queue is looked at again and again meanwhile.
    for _ in 0..20 {
        let other = bench.identify();
        assert_eq!(bench.driver.used(0), (other.head, 21));
    }
    assert!(bench.driver.try_used(0).is_none());
    disk.write_all(&[7; 512]).unwrap();
    let (first, length) = bench.driver.used(0);
    assert_eq!(length, 513);
    disk.write_all(&[8; 512]).unwrap();
    let (second, _) = bench.driver.used(0);
    let content = |head| bench.driver.written(reads.iter().find(|read| read.head == head).unwrap());
    assert_eq!((content(first)[..512].to_vec(), content(first)[512]), (vec![7; 512], 0));
    assert_eq!((content(second)[..512].to_vec(), content(second)[512]), (vec![8; 512], 0));
    assert_eq!(bench.asked(), 0);
    let metrics = bench.device.counters().metrics("disk");
    assert_eq!((metrics.reads, metrics.read_bytes, metrics.errors), (2, 1024, 0));
}

#[test]
fn a_read_that_is_alone_is_done_at_once() {
    let (mut bench, _disk) = Bench::pipe();
    bench.start();
    let read = bench.read(0, 512);
    assert_eq!(bench.driver.used(0), (read.head, 513));
    assert_eq!((bench.asked(), bench.driver.written(&read)[511]), (1, MARK));
}

#[test]
fn a_device_stops_when_nothing_is_under_way_any_more_and_answers_it_all() {
    let (mut bench, mut disk) = Bench::pipe();
    let reads: Vec<_> = (0..64).map(|sector| bench.read(sector, 512)).collect();
    bench.start();
    // The kernel has them all.
    let other = bench.identify();
    assert_eq!(bench.driver.used(0).0, other.head);
    let answers = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        disk.write_all(&[9; 64 * 512]).unwrap();
        disk
    });
    let queues = bench.device.stop();
    let mut heads: Vec<u16> =
        std::iter::from_fn(|| bench.driver.try_used(0)).map(|(head, length)| (head, assert_eq!(length, 513)).0).collect();
    let mut expected: Vec<u16> = reads.iter().map(|read| read.head).collect();
    heads.sort_unstable();
    expected.sort_unstable();
    assert_eq!(heads, expected);
    assert!(reads.iter().all(|read| bench.driver.written(read)[..512] == [9; 512]));
    let _disk = answers.join().unwrap();
    // It goes on with the same ring; only the worker's last flush asked the storage.
    assert_eq!(bench.asked(), 1);
    let features = bench.device.features() & NO_EVENT_IDX;
    bench.device.activate(bench.driver.activation_of(queues, features)).unwrap();
    assert!(bench.device.counters().metrics("disk").io_uring);
    let other = bench.identify();
    assert_eq!(bench.driver.used(0).0, other.head);
}

#[test]
fn a_driver_that_breaks_the_ring_leaves_nothing_under_way() {
    let (mut bench, mut disk) = Bench::pipe();
    bench.read(0, 512);
    bench.read(1, 512);
    bench.start();
    // The kernel has both.
    let other = bench.identify();
    assert_eq!(bench.driver.used(0).0, other.head);
    bench.driver.set_available(0, 1000);
    std::thread::sleep(Duration::from_millis(20));
    // The worker waits for the two before it says so.
    assert!(!bench.driver.needs_reset.load(Ordering::SeqCst));
    disk.write_all(&[7; 1024]).unwrap();
    bench.driver.await_needs_reset();
    assert_eq!(bench.device.stop().len(), 1);
}

#[test]
fn a_long_queue_holds_back_no_read_that_waits() {
    let (mut bench, mut disk) = Bench::pipe();
    disk.write_all(&[7; 1024]).unwrap();
    let reads = [bench.read(0, 512).head, bench.read(1, 512).head];
    let others: Vec<u16> = (0..60).map(|_| bench.identify().head).collect();
    bench.start();
    let order: Vec<u16> = (0..62).map(|_| bench.driver.used(0).0).collect();
    let last = |heads: &[u16]| order.iter().rposition(|head| heads.contains(head)).unwrap();
    assert!(last(&reads) < 10 && last(&others) == 61, "{order:?}, the reads are {reads:?}");
}

#[test]
fn what_the_kernel_did_not_read_is_read() {
    let (mut bench, mut disk) = Bench::pipe();
    let reads = [bench.read(0, 512), bench.read(1, 512)];
    bench.start();
    disk.write_all(&[7; 100]).unwrap();
    let (first, length) = bench.driver.used(0);
    assert_eq!(length, 513);
    // The end of the file.
    drop(disk);
    let (second, _) = bench.driver.used(0);
    let content = |head| bench.driver.written(reads.iter().find(|read| read.head == head).unwrap());
    assert_eq!((content(first)[..100].to_vec(), content(first)[100..512].to_vec()), (vec![7; 100], vec![MARK; 412]));
    assert_eq!(content(second)[..512], [MARK; 512]);
    assert_eq!(bench.errors(), 0);
}

#[test]
fn an_error_of_the_kernel_is_told_when_the_storage_confirms_it() {
    let (_reader, writer) = io::pipe().unwrap();
    // Not open for reading.
    let mut bench = Bench::odd(writer, true);
    let reads = [bench.read(0, 512), bench.read(1, 512)];
    bench.start();
    for _ in &reads {
        assert_eq!(bench.driver.used(0).1, 0);
    }
    assert!(reads.iter().all(|read| bench.driver.written(read)[512] == IO_ERROR));
    assert_eq!((bench.asked(), bench.errors()), (2, 2));
}

#[test]
fn a_flush_that_failed_is_not_tried_again() {
    let (mut bench, _disk) = Bench::pipe();
    bench.start();
    let flush = bench.flush();
    assert_eq!(bench.driver.used(0).0, flush.head);
    assert_eq!((bench.driver.written(&flush), bench.asked(), bench.errors()), (vec![IO_ERROR], 0, 1));
}

#[test]
fn more_than_fits_waits_in_the_queue() {
    let (mut bench, mut disk) = Bench::pipe();
    let first = bench.read(0, 512);
    bench.start();
    assert_eq!(bench.driver.used(0).0, first.head);
    let queues = bench.device.stop();
    // The driver offers one request again and again: it may, only it will not know which one is done.
    let read = bench.read(0, 512);
    for _ in 0..u32::from(ENTRIES) + 99 {
        bench.driver.offer(0, read.head);
    }
    let features = bench.device.features() & NO_EVENT_IDX;
    bench.device.activate(bench.driver.activation_of(queues, features)).unwrap();
    for _ in 0..u32::from(ENTRIES) + 100 {
        disk.write_all(&[7; 512]).unwrap();
        assert_eq!(bench.driver.used(0), (read.head, 513));
    }
    assert!(bench.driver.try_used(0).is_none());
}

#[test]
fn what_is_read_in_any_order_is_what_lies_there() {
    let file = NamedTempFile::new().unwrap();
    for sector in 0..SIZE / 512 {
        file.as_file().write_all_at(&sector.to_le_bytes().repeat(64), sector * 512).unwrap();
    }
    let raw = || RawFile::new(OwnedFd::from(file.reopen().unwrap()), true).unwrap();
    for round in 0..4_u64 {
        file.as_file().sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let mut bench = Bench::new(Box::new(raw()), Arc::default());
        let places = |number: u64| (number * 1021 + round * 77) % (SIZE / 512 - 8);
        let reads: Vec<_> = (0..64).map(|number| bench.read(places(number), 4096)).collect();
        bench.start();
        if round % 2 == 1 {
            bench.device.stop();
        }
        let mut left = if round % 2 == 0 { 64 } else { 0 };
        while left > 0 {
            assert_eq!(bench.driver.used(0).1, 4097);
            left -= 1;
        }
        if round % 2 == 0 {
            for (number, read) in (0..).zip(&reads) {
                let content = bench.driver.written(read);
                for (sector, bytes) in (places(number)..).zip(content[..4096].chunks(512)) {
                    assert_eq!(bytes, sector.to_le_bytes().repeat(64), "round {round}, request {number}");
                }
            }
        } else {
            // What was taken from the queue was answered, and rightly.
            while let Some((head, length)) = bench.driver.try_used(0) {
                assert_eq!(length, 4097);
                let (number, read) = (0..).zip(&reads).find(|(_, read)| read.head == head).unwrap();
                assert_eq!(bench.driver.written(read)[..8], places(number).to_le_bytes());
            }
        }
    }
}

#[test]
fn storage_that_the_kernel_has_to_wait_for_is_asked_one_request_after_the_other() {
    let mut device = Block::new("disk".into(), "serial", Box::new(Waiting), false).unwrap();
    device.set_uring(Some(Uring::new(make().unwrap())));
    let mut driver = Driver::new(device.queue_sizes());
    device.activate(driver.activation(device.features() & NO_EVENT_IDX)).unwrap();
    let read = driver.add(0, &[Buffer::Out(&header(0, 0)), Buffer::In(512), Buffer::In(1)]);
    assert_eq!(driver.used(0), (read.head, 513));
    assert!(!device.counters().metrics("disk").io_uring);
}

/// What the kernel says of one request, with a ring as a disk has it.
fn result_of(entry: io_uring::squeue::Entry) -> i32 {
    let mut ring = make().unwrap();
    // SAFETY: the entries of the test below lead to memory that is always there.
    unsafe { ring.submission().push(&entry) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().unwrap().result()
}

#[test]
fn a_ring_takes_reads_and_flushes_and_nothing_else() {
    let file = NamedTempFile::new().unwrap();
    let fd = Fd(file.as_raw_fd());
    let path = c"/etc/hostname";
    assert_eq!(result_of(opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build()), -libc::EACCES);
    assert_eq!(result_of(opcode::Nop::new().build()), -libc::EACCES);
    assert_eq!(result_of(opcode::Write::new(fd, path.as_ptr().cast(), 4).build()), -libc::EACCES);
    assert_eq!(result_of(opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build()), -libc::EACCES);
    assert_eq!(result_of(opcode::Fsync::new(fd).build().flags(io_uring::squeue::Flags::ASYNC)), -libc::EACCES);
    assert_eq!(result_of(opcode::Fsync::new(fd).build()), 0);
    let ring = make().unwrap();
    assert_eq!(ring.submitter().register_files(&[0]).unwrap_err().raw_os_error(), Some(libc::EACCES));
    assert!(ring.submitter().register_enable_rings().is_err());
}

#[test]
fn rings_are_made_for_disks_and_a_few_more_and_used_again() {
    provide(1);
    let made = || RINGS.lock().unwrap().len();
    let first = made();
    assert!(first > SPARE);
    let one = Uring::take().unwrap();
    assert_eq!(made(), first - 1);
    drop(one);
    assert_eq!(made(), first);
    let all: Vec<_> = std::iter::from_fn(Uring::take).collect();
    assert!(Uring::take().is_none());
    drop(all);
}
