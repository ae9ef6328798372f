//! Streams between connectors and a driver that plays the guest's kernel, and a hostile one.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    os::unix::net::UnixStream,
    sync::atomic::Ordering,
    thread::JoinHandle,
    time::Duration,
};

use proptest::prelude::*;

use super::{
    CONNECTIONS_MAX, Vsock,
    connection::BUFFER,
    request::{self, HEADER, HOST_CID, Header, Operation, Packet, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM},
};
use crate::virtio::{
    VirtioDevice,
    testing::{Buffer, Driver, Made, NO_EVENT_IDX, eventually, hostile_table, load_hostile},
};

const CID: u64 = 42;
const PORT: u32 = 1024;
const SOON: Duration = Duration::from_secs(60);

struct Guest {
    device: Vsock,
    driver: Driver,
    offered: Vec<Made>,
    features: u64,
}

/// Where a stream's packets go, as the guest sees it.
#[derive(Clone, Copy)]
struct Stream {
    host_port: u32,
    guest_port: u32,
}

impl Guest {
    fn new(buffers: usize) -> Self {
        let mut device = Vsock::new(CID).unwrap();
        let driver = Driver::new(device.queue_sizes());
        let features = device.features() & NO_EVENT_IDX;
        device.activate(driver.activation(features)).unwrap();
        let mut guest = Self { device, driver, offered: Vec::new(), features };
        for _ in 0..buffers {
            guest.offer();
        }
        guest
    }

    fn offer(&mut self) {
        let made = self.driver.add(0, &[Buffer::In(HEADER), Buffer::In(4096)]);
        self.offered.push(made);
    }

    /// The next packet for the guest, whose buffer goes back at once.
    fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, length) = self.driver.try_used(0)?;
        let at = self.offered.iter().position(|made| made.head == head).unwrap();
        let made = self.offered.remove(at);
        let bytes = self.driver.written(&made)[..length as usize].to_vec();
        let header = Header::decode(bytes[..HEADER].try_into().unwrap());
        assert_eq!((header.source_cid, header.destination_cid, header.kind), (HOST_CID, CID, TYPE_STREAM));
        assert_eq!(header.length as usize, bytes.len() - HEADER);
        // The same memory again, lest the test runs out of it.
        let descriptors: Vec<_> = made.descriptors();
        let head = self.driver.add_chain(0, &descriptors);
        self.offered.push(made.with_head(head));
        Some((header, bytes[HEADER..].to_vec()))
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        eventually(|| self.try_receive())
    }

    fn expect(&mut self, operation: Operation) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.operation, operation);
        header
    }

    fn send_header(&mut self, header: Header, payload: &[u8]) {
        let made = self.driver.add(1, &[Buffer::Out(&header.encode()), Buffer::Out(payload)]);
        assert_eq!(self.driver.used(1), (made.head, 0));
    }

    fn send(&mut self, stream: Stream, operation: Operation, payload: &[u8], flags: u32, buffer: u32, forwarded: u32) {
        let header = Header {
            source_cid: CID,
            destination_cid: HOST_CID,
            source_port: stream.guest_port,
            destination_port: stream.host_port,
            length: payload.len() as u32,
            kind: TYPE_STREAM,
            operation,
            flags,
            buffer,
            forwarded,
        };
        self.send_header(header, payload);
    }

    /// Takes a connection as a listener on `PORT` with a receive buffer of `buffer` bytes does.
    fn accept(&mut self, buffer: u32) -> (Stream, UnixStream) {
        let waiting = self.connect(SOON);
        let request = self.expect(Operation::Request);
        assert_eq!(request.destination_port, PORT);
        let stream = Stream { host_port: request.source_port, guest_port: PORT };
        self.send(stream, Operation::Response, b"", 0, buffer, 0);
        (stream, UnixStream::from(waiting.join().unwrap().unwrap()))
    }

    fn connect(&self, timeout: Duration) -> JoinHandle<io::Result<OwnedFd>> {
        let connector = self.device.connector();
        std::thread::spawn(move || connector.connect(PORT, timeout))
    }
}

fn refused(result: io::Result<OwnedFd>) -> bool {
    result.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[test]
fn bytes_pass_both_ways() {
    let mut guest = Guest::new(8);
    let (stream, mut host) = guest.accept(65536);
    host.write_all(b"hello guest").unwrap();
    let (header, bytes) = guest.receive();
    assert_eq!((header.operation, &bytes[..]), (Operation::Data, &b"hello guest"[..]));
    guest.send(stream, Operation::Data, b"hello host", 0, 65536, 11);
    let mut bytes = [0; 10];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello host");
}

#[test]
fn nobody_listening_and_no_driver_are_refusals() {
    let mut guest = Guest::new(8);
    let waiting = guest.connect(SOON);
    let request = guest.expect(Operation::Request);
    guest.send_header(request.reset_for(), b"");
    assert!(refused(waiting.join().unwrap()));

    let waiting = guest.connect(SOON);
    guest.expect(Operation::Request);
    guest.device.stop();
    let fresh = guest.driver.activation(guest.features);
    guest.device.activate(fresh).unwrap();
    assert!(refused(waiting.join().unwrap()), "the driver that was asked is gone");

    guest.device.stop();
    assert!(refused(guest.device.connector().connect(PORT, SOON)));
}

#[test]
fn a_silent_guest_times_out_and_is_told() {
    let mut guest = Guest::new(8);
    let waiting = guest.connect(Duration::from_millis(30));
    let request = guest.expect(Operation::Request);
    assert_eq!(waiting.join().unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
    let reset = guest.expect(Operation::Reset);
    assert_eq!(reset.source_port, request.source_port);
    let stream = Stream { host_port: request.source_port, guest_port: PORT };
    guest.send(stream, Operation::Response, b"", 0, 100, 0);
    guest.expect(Operation::Reset);
}

#[test]
fn a_guest_that_gives_no_buffers_holds_up_nobody_else() {
    let guest = Guest::new(0);
    let waiting: Vec<_> = (0..3).map(|_| guest.connect(Duration::from_millis(50))).collect();
    for waiting in waiting {
        assert_eq!(waiting.join().unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}

#[test]
fn the_guests_credit_bounds_what_it_is_sent() {
    let mut guest = Guest::new(32);
    let (stream, mut host) = guest.accept(1000);
    let data: Vec<u8> = (0..5000_u32).map(|byte| byte as u8).collect();
    host.write_all(&data).unwrap();
    let (mut received, mut told) = (Vec::new(), 0);
    while received.len() < data.len() {
        let (header, bytes) = guest.receive();
        received.extend(bytes);
        assert!(received.len() <= told + 1000, "{} bytes with credit for {}", received.len(), told + 1000);
        if header.operation == Operation::CreditRequest {
            told = received.len();
            guest.send(stream, Operation::CreditUpdate, b"", 0, 1000, told as u32);
        }
    }
    assert_eq!(received, data);
}

#[test]
fn a_host_that_does_not_read_stops_only_its_own_stream() {
    let mut guest = Guest::new(32);
    let (slow, mut slow_host) = guest.accept(65536);
    let (quick, mut quick_host) = guest.accept(65536);
    // The socket takes some, our buffer the rest: credit comes back only for what the socket took.
    let piece = vec![1; 4096];
    let (mut sent, mut forwarded) = (0_u32, 0_u32);
    loop {
        while let Some((header, _)) = guest.try_receive() {
            forwarded = header.forwarded;
        }
        if sent - forwarded + 4096 > BUFFER {
            std::thread::sleep(Duration::from_millis(20));
            match guest.try_receive() {
                Some((header, _)) => forwarded = header.forwarded,
                // Before that the device has yet to come to it.
                None if sent > BUFFER => break,
                None => {}
            }
            continue;
        }
        guest.send(slow, Operation::Data, &piece, 0, 65536, 0);
        sent += 4096;
    }
    assert!(sent > BUFFER, "{sent}");
    guest.send(quick, Operation::Data, b"still here", 0, 65536, 0);
    let mut bytes = [0; 10];
    quick_host.read_exact(&mut bytes).unwrap();

    // What the guest sent and closed upon is delivered all the same, in order, and then ends.
    guest.send(slow, Operation::Shutdown, b"", SHUTDOWN_RECEIVE | SHUTDOWN_SEND, 65536, 0);
    let mut all = Vec::new();
    slow_host.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), sent as usize);
    loop {
        let (header, _) = guest.receive();
        if header.operation == Operation::Reset {
            assert_eq!(header.source_port, slow.host_port);
            break;
        }
    }
}

#[test]
fn more_than_the_credit_is_answered_with_a_reset() {
    let mut guest = Guest::new(32);
    let (stream, mut host) = guest.accept(65536);
    let (slow, _slow_host) = guest.accept(65536);
    let piece = vec![1; 65536];
    let reset = loop {
        guest.send(slow, Operation::Data, &piece, 0, 65536, 0);
        if let Some((header, _)) = guest.try_receive()
            && header.operation == Operation::Reset
        {
            break header;
        }
    };
    assert_eq!(reset.source_port, slow.host_port);
    guest.send(stream, Operation::Data, b"x", 0, 65536, 0);
    host.read_exact(&mut [0]).unwrap();
}

#[test]
fn closing_on_the_host_closes_in_the_guest() {
    let mut guest = Guest::new(8);
    let (stream, mut host) = guest.accept(65536);
    // Half: the answer still comes.
    host.write_all(b"question").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    guest.expect(Operation::Data);
    assert_eq!(guest.expect(Operation::Shutdown).flags, SHUTDOWN_SEND);
    guest.send(stream, Operation::Data, b"answer", 0, 65536, 8);
    let mut bytes = [0; 6];
    host.read_exact(&mut bytes).unwrap();
    drop(host);
    assert_eq!(guest.expect(Operation::Shutdown).flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    guest.send(stream, Operation::Reset, b"", 0, 0, 0);
    // The stream is gone: its ports are free, and packets to it are refused.
    guest.send(stream, Operation::Data, b"late", 0, 0, 0);
    guest.expect(Operation::Reset);

    // Whole, at once.
    let (stream, host) = guest.accept(65536);
    drop(host);
    assert_eq!(guest.expect(Operation::Shutdown).flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    guest.send(stream, Operation::Data, b"to nobody", 0, 65536, 0);
    guest.expect(Operation::Reset);
}

#[test]
fn closing_in_the_guest_closes_on_the_host() {
    let mut guest = Guest::new(8);
    let (stream, mut host) = guest.accept(65536);
    guest.send(stream, Operation::Data, b"last words", 0, 65536, 0);
    guest.send(stream, Operation::Shutdown, b"", SHUTDOWN_SEND, 65536, 0);
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"last words");
    host.write_all(b"heard").unwrap();
    guest.expect(Operation::Data);
    guest.send(stream, Operation::Shutdown, b"", SHUTDOWN_RECEIVE | SHUTDOWN_SEND, 65536, 5);
    guest.expect(Operation::Reset);
    assert!(host.write_all(b"gone").is_err());

    // A reset is an end as well.
    let (stream, mut host) = guest.accept(65536);
    guest.send(stream, Operation::Data, b"bye", 0, 65536, 0);
    guest.send(stream, Operation::Reset, b"", 0, 0, 0);
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"bye");
}

#[test]
fn there_are_only_so_many_streams() {
    let guest = Guest::new(0);
    let connector = guest.device.connector();
    let waiting: Vec<_> = (0..8)
        .map(|_| {
            let connector = connector.clone();
            std::thread::spawn(move || (0..CONNECTIONS_MAX / 8 + 1).filter(|_| refused(connector.connect(PORT, Duration::ZERO))).count())
        })
        .collect();
    // All of them time out at once, so none is held for ever.
    for waiting in waiting {
        waiting.join().unwrap();
    }
    eventually(|| guest.device.connector().connect(PORT, Duration::from_millis(1)).err().filter(|e| e.kind() == io::ErrorKind::TimedOut));
}

#[test]
fn streams_outlive_a_pause_and_end_with_the_driver() {
    let mut guest = Guest::new(8);
    let (stream, mut host) = guest.accept(65536);
    let queues = guest.device.stop();
    assert_eq!(queues.len(), 3);
    host.write_all(b"written while paused").unwrap();
    assert!(guest.try_receive().is_none());
    let again = guest.driver.activation_of(queues, guest.features);
    guest.device.activate(again).unwrap();
    assert_eq!(guest.receive().1, b"written while paused");
    guest.send(stream, Operation::Data, b"x", 0, 65536, 0);
    host.read_exact(&mut [0]).unwrap();

    guest.device.stop();
    let fresh = Driver::new(guest.device.queue_sizes());
    guest.device.activate(fresh.activation(guest.features)).unwrap();
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_restored_guest_is_told_that_its_streams_are_gone() {
    let mut guest = Guest::new(8);
    let (_, mut host) = guest.accept(65536);
    let event = guest.driver.add(2, &[Buffer::In(4)]);
    let queues = guest.device.stop();
    let state = guest.device.save();

    let mut device = Vsock::new(CID + 1).unwrap();
    device.restore(&state).unwrap();
    device.activate(guest.driver.activation_of(queues, guest.features)).unwrap();
    assert_eq!(guest.driver.used(2), (event.head, 4));
    assert_eq!(guest.driver.written(&event), [0; 4]);
    let mut cid = [0; 8];
    device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), CID + 1);
    drop(guest.device);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    assert!(device.restore(&serde_json::json!({"version": 0, "cid": 3})).is_err());
    assert!(Vsock::new(2).is_err());
}

/// It closes those in its own time, and would take a new one with the same ports for one of them.
#[test]
fn a_restored_guest_gets_streams_on_ports_that_were_not_used_before() {
    let mut guest = Guest::new(8);
    let old = [guest.accept(65536), guest.accept(65536)].map(|(stream, _)| stream.host_port);
    let queues = guest.device.stop();
    let state = guest.device.save();
    let mut device = Vsock::new(CID).unwrap();
    device.restore(&state).unwrap();
    device.activate(guest.driver.activation_of(queues, guest.features)).unwrap();
    guest.device = device;
    // What was on its way may still come before it.
    let waiting = guest.connect(SOON);
    let request = loop {
        let (header, _) = guest.receive();
        if header.operation == Operation::Request {
            break header;
        }
    };
    assert!(!old.contains(&request.source_port), "{old:?} {}", request.source_port);
    guest.send(Stream { host_port: request.source_port, guest_port: PORT }, Operation::Response, b"", 0, 65536, 0);
    waiting.join().unwrap().unwrap();
    // A state of before says nothing of ports.
    let mut older = guest.device.save();
    older.as_object_mut().unwrap().remove("next_port");
    Vsock::new(CID).unwrap().restore(&older).unwrap();
}

#[test]
fn packets_of_no_stream_are_reset_and_a_deaf_guest_is_not_listened_to() {
    let mut guest = Guest::new(0);
    let stranger = Stream { host_port: 5, guest_port: 6 };
    let mut header = [0; HEADER];
    header.copy_from_slice(
        &Header {
            source_cid: CID,
            destination_cid: HOST_CID,
            source_port: 6,
            destination_port: 5,
            length: 0,
            kind: TYPE_STREAM,
            operation: Operation::Request,
            flags: 0,
            buffer: 0,
            forwarded: 0,
        }
        .encode(),
    );
    // More than the device owes before it stops listening; the ring holds 256, so in two parts.
    let mut taken = 0;
    for expected in [200, 256] {
        for _ in 0..200 {
            guest.driver.add(1, &[Buffer::Out(&header)]);
        }
        while taken < expected {
            guest.driver.used(1);
            taken += 1;
        }
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.driver.try_used(1), None, "more than {taken} were taken");
    for _ in 0..8 {
        guest.offer();
    }
    for _ in 0..400 {
        let reset = guest.expect(Operation::Reset);
        assert_eq!((reset.source_port, reset.destination_port), (stranger.host_port, stranger.guest_port));
    }
    while taken < 400 {
        guest.driver.used(1);
        taken += 1;
    }
    assert!(!guest.driver.needs_reset.load(Ordering::SeqCst));
}

#[test]
fn strange_packets_are_passed_over_or_refused_in_kind() {
    let mut guest = Guest::new(4);
    let plain = Header {
        source_cid: CID,
        destination_cid: HOST_CID,
        source_port: 6,
        destination_port: 5,
        length: 0,
        kind: TYPE_STREAM,
        operation: Operation::Data,
        flags: 0,
        buffer: 0,
        forwarded: 0,
    };
    // From or to somebody else, longer than its chain, an answer to nothing: nobody is told.
    for header in [
        Header { source_cid: CID + 1, ..plain },
        Header { destination_cid: 1, ..plain },
        Header { length: 1, ..plain },
        Header { length: u32::MAX, ..plain },
        Header { operation: Operation::Reset, ..plain },
    ] {
        guest.send_header(header, b"");
    }
    let made = guest.driver.add(1, &[Buffer::Out(&[0; HEADER - 1])]);
    assert_eq!(guest.driver.used(1), (made.head, 0));
    // Another kind of socket hears so in its own kind.
    let seqpacket = guest.driver.add(1, &[Buffer::Out(&Header { kind: 2, ..plain }.encode())]);
    assert_eq!(guest.driver.used(1), (seqpacket.head, 0));
    let (head, length) = guest.driver.used(0);
    let made = guest.offered.iter().find(|made| made.head == head).unwrap();
    let reset = Header::decode(guest.driver.written(made)[..length as usize].try_into().unwrap());
    assert_eq!((reset.operation, reset.kind, reset.destination_port), (Operation::Reset, 2, 6));
}

#[test]
fn descriptors_do_not_leak() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut guest = Guest::new(8);
    let (stream, host) = guest.accept(65536);
    assert!(File::from(OwnedFd::from(host.try_clone().unwrap())).as_raw_fd() > 0);
    let before = count();
    for _ in 0..20 {
        let (stream, host) = guest.accept(65536);
        guest.send(stream, Operation::Reset, b"", 0, 0, 0);
        drop(host);
    }
    eventually(|| (count() == before).then_some(()));
    let _ = stream;
}

proptest! {
    #[test]
    fn packets_lie_inside_their_chain(table in hostile_table(), head in 0_u16..16, operation in 0_u16..9, length in 0_u32..300, kind in 0_u16..3) {
        let header = Header {
            source_cid: CID, destination_cid: HOST_CID, source_port: 1, destination_port: 2, length, kind,
            operation: Operation::Unknown(operation), flags: length, buffer: 0, forwarded: 0,
        };
        let Some((memory, chain)) = load_hostile(&table, head, &header.encode()) else { return Ok(()) };
        if let Packet::Stream(header) = request::parse(&memory, &chain.readable, CID).unwrap() {
            prop_assert!(HEADER + header.length as usize <= chain.readable.len());
            prop_assert_eq!(header.source_cid, CID);
        }
    }

    #[test]
    fn headers_are_what_they_were(bytes in prop::collection::vec(any::<u8>(), HEADER)) {
        let bytes: [u8; HEADER] = bytes.try_into().unwrap();
        prop_assert_eq!(Header::decode(&bytes).encode(), bytes);
    }
}
