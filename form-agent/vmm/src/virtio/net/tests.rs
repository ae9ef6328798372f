//! The interface as a driver uses it, on a real tap where one can be made, and as a hostile one tries to.

use std::{
    fs::File,
    io,
    net::UdpSocket,
    os::fd::{AsRawFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::{
    Net,
    request::{self, Buffers, PACKET_MAX, ReceiveMode},
    tap::HEADER,
};
use crate::memory::GuestRegionMmap;
use crate::virtio::{
    VirtioDevice,
    testing::{Buffer, Descriptor, Driver, NO_EVENT_IDX, WRITE, eventually, hostile_table, load_hostile},
};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const F_MRG_RXBUF: u64 = 1 << 15;
const F_GUEST_OFFLOADS: u64 = 1 << 1 | 1 << 7 | 1 << 8;

/// A tap of this test's own with an address of 198.18.N.0/30, gone with its descriptor. `None` without the privilege.
struct Tap {
    fd: Option<OwnedFd>,
    host: String,
    network: u8,
}

fn tap(flags: libc::c_int) -> Option<Tap> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = (std::process::id() * 8 + NEXT.fetch_add(1, Ordering::SeqCst)) % 200;
    let name = format!("fvt{}-{number}", std::process::id());
    let file = match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(file) => file,
        Err(error) => return skip(&error),
    };
    // SAFETY: all zeros is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
    if unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca_u64 as _, &raw mut request) } != 0 {
        return skip(&io::Error::last_os_error());
    }
    let host = format!("198.18.{number}.1");
    for arguments in [format!("addr add {host}/30 dev {name}"), format!("link set {name} up")] {
        let done = std::process::Command::new("ip").args(arguments.split(' ')).status();
        assert!(done.is_ok_and(|status| status.success()), "ip {arguments}");
    }
    Some(Tap { fd: Some(OwnedFd::from(file)), host, network: number as u8 })
}

fn skip(error: &io::Error) -> Option<Tap> {
    eprintln!("no tap can be made here ({error}): this part is tested in the nested host only");
    None
}

const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

fn bench(tap: &mut Tap, features: u64) -> (Net, Driver) {
    let mut device = Net::new("net".into(), tap.fd.take().unwrap(), MAC, 1500).unwrap();
    let driver = Driver::new(device.queue_sizes());
    device.activate(driver.activation(device.features() & NO_EVENT_IDX & features)).unwrap();
    (device, driver)
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// A broadcast UDP packet from the guest's address to port `port` of the host, with the header a driver puts before it.
fn udp_packet(network: u8, port: u16, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() + 8) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((length + 20).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 198, 18, network, 2, 198, 18, network, 1]);
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0; HEADER];
    packet.extend([0xff; 6]);
    packet.extend(MAC);
    packet.extend([8, 0]);
    packet.extend(ip);
    for number in [4000, port, length, 0] {
        packet.extend(number.to_be_bytes());
    }
    packet.extend(payload);
    packet
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn packets_reach_the_host_and_come_back() {
    let Some(mut tap) = tap(FLAGS) else { return };
    let socket = UdpSocket::bind((tap.host.as_str(), 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (mut device, mut driver) = bench(&mut tap, !(F_MRG_RXBUF | F_GUEST_OFFLOADS));

    let packet = udp_packet(tap.network, socket.local_addr().unwrap().port(), b"from the guest");
    let made = driver.add(1, &[Buffer::Out(&packet[..5]), Buffer::Out(&packet[5..])]);
    assert_eq!(driver.used(1), (made.head, 0));
    let mut bytes = [0; 64];
    let (length, from) = socket.recv_from(&mut bytes).unwrap();
    assert_eq!(&bytes[..length], b"from the guest");

    // The host does not know the guest's link address: its question is what comes first.
    let buffers: Vec<_> = (0..8).map(|_| driver.add(0, &[Buffer::In(12), Buffer::In(1600)])).collect();
    socket.send_to(b"to the guest", from).unwrap();
    let arp = eventually(|| {
        let (head, length) = driver.used(0);
        let made = buffers.iter().find(|made| made.head == head).unwrap();
        let packet = driver.written(made)[..length as usize].to_vec();
        (packet[24..26] == [8, 6]).then_some(packet)
    });
    assert_eq!(arp[10..12], [1, 0], "one buffer");
    assert!(contains(&arp, &[198, 18, tap.network, 2]));
    let metrics = device.counters().metrics("net");
    assert_eq!((metrics.sent_packets, metrics.sent_bytes, metrics.dropped), (1, packet.len() as u64 - 12, 0));
    assert!(metrics.received_packets >= 1);

    // Chains taken and not filled are the driver's again.
    let queues = device.stop();
    let next = virtio_queue::QueueT::next_avail(&queues[0].1);
    let filled = virtio_queue::QueueT::next_used(&queues[0].1);
    assert_eq!(next, filled);
}

#[test]
fn a_packet_may_span_mergeable_buffers() {
    let Some(mut tap) = tap(FLAGS) else { return };
    let (_device, mut driver) = bench(&mut tap, !F_GUEST_OFFLOADS);
    let host = UdpSocket::bind((tap.host.as_str(), 0)).unwrap();
    host.set_broadcast(true).unwrap();
    let buffers: Vec<_> = (0..32).map(|_| driver.add(0, &[Buffer::In(128)])).collect();
    host.send_to(&[0x5a; 700], (format!("198.18.{}.3", tap.network), 9)).unwrap();
    let (mut packet, mut left) = (Vec::new(), 0);
    loop {
        let (head, length) = driver.used(0);
        let made = buffers.iter().find(|made| made.head == head).unwrap();
        let bytes = driver.written(made)[..length as usize].to_vec();
        if left == 0 {
            packet.clear();
            left = u16::from_le_bytes([bytes[10], bytes[11]]);
        }
        packet.extend(bytes);
        left -= 1;
        if left == 0 && contains(&packet, &[0x5a; 700]) {
            break;
        }
    }
    assert_eq!(packet.len(), 12 + 14 + 20 + 8 + 700);
}

#[test]
fn what_is_no_packet_is_dropped_and_no_harm() {
    let Some(mut tap) = tap(FLAGS) else { return };
    let (device, mut driver) = bench(&mut tap, !0);
    let mut header = [0xff; HEADER].to_vec();
    header.extend([0; 60]);
    for bytes in [&[][..], &[0; 5], &[0; HEADER + 13], &[0; PACKET_MAX + 1], &header] {
        let made = driver.add(1, &[Buffer::Out(bytes), Buffer::In(1)]);
        assert_eq!(driver.used(1).0, made.head);
    }
    assert_eq!(device.counters().metrics("net").dropped, 5);
    assert!(!driver.needs_reset.load(Ordering::SeqCst));
    driver.add(0, &[Buffer::In(11)]);
    driver.await_needs_reset();
}

#[test]
fn what_is_no_tap_is_refused() {
    let file = tempfile::tempfile().unwrap();
    assert!(Net::new("net".into(), OwnedFd::from(file), MAC, 1500).is_err());
    let Some(mut tap) = tap(libc::IFF_TAP | libc::IFF_NO_PI) else { return };
    let error = Net::new("net".into(), tap.fd.take().unwrap(), MAC, 1500).err().unwrap();
    assert!(error.to_string().contains("IFF_VNET_HDR"), "{error}");
}

#[test]
fn the_configuration_names_address_link_and_mtu() {
    let Some(mut tap) = tap(FLAGS) else { return };
    let (mut device, _driver) = bench(&mut tap, !0);
    let mut config = [0; 12];
    device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 9, 1, 0, 1, 0, 0xdc, 5]);
    let state = device.save();
    device.restore(&state).unwrap();
    let mut other = state.clone();
    other["mtu"] = 9000.into();
    assert!(device.restore(&other).is_err());
    // A copy of the VM has another address, and shows it.
    let mut other = state;
    other["mac"] = serde_json::json!([2, 0, 0, 0, 0, 8]);
    device.restore(&other).unwrap();
    device.read_config(0, &mut config);
    assert_eq!(config[..6], [2, 0, 0, 0, 0, 9]);
}

proptest! {
    /// Receive buffers of any shape: what is handed to the tap is what is counted, and chains come back once each.
    #[test]
    fn receive_buffers_are_used_in_order(
        tables in prop::collection::vec((hostile_table(), 0_u16..16), 1..12),
        lengths in prop::collection::vec(HEADER..3000, 1..6),
        mergeable: bool,
    ) {
        let mode = ReceiveMode { mergeable, large: false, mtu: 1500 };
        let memory = crate::virtio::testing::guest_memory();
        let mut buffers = Buffers::default();
        let mut heads = Vec::new();
        for (number, (table, head)) in (0..).zip(&tables) {
            let Some((_, mut chain)) = load_hostile(table, *head, b"") else { continue };
            if chain.writable.len() < HEADER { continue }
            chain.head = number;
            heads.push(number);
            buffers.push(chain);
        }
        let mut seen = Vec::new();
        for length in lengths {
            let room: usize = buffers.front(mode).map(|segments| segments.len()).sum();
            if length > room { continue }
            let mut total = 0;
            buffers.take(&memory, length, |head, bytes| {
                seen.push(head);
                total += bytes;
            }).unwrap();
            prop_assert_eq!(total, length);
        }
        prop_assert_eq!(usize::from(buffers.clear()), heads.len() - seen.len());
        prop_assert_eq!(&heads[..seen.len()], &seen[..]);
    }

    #[test]
    fn only_packets_are_sent(table in hostile_table(), head in 0_u16..16) {
        let Some((memory, chain)) = load_hostile(&table, head, b"") else { return Ok(()) };
        if request::sendable(&chain.readable) {
            let length = chain.readable.len();
            prop_assert!(length <= PACKET_MAX);
            prop_assert_eq!(chain.readable.iovecs(&memory, 0..length).unwrap().len(), length);
        }
    }
}

/// The pages that are noted as written, and forgets them.
fn noted(driver: &Driver) -> Vec<u64> {
    let words = |region: &GuestRegionMmap| vm_memory::mmap::MmapRegion::bitmap(region).get_and_reset();
    let low = driver.memory.memory().iter().next().map(words).unwrap();
    (0..low.len() as u64 * 64).filter(|page| low[*page as usize / 64] >> (page % 64) & 1 == 1).collect()
}

#[test]
#[ignore = "needs vhost-net and root: tests/kvm-host"]
fn kvm_what_the_hosts_kernel_writes_is_noted_and_the_rings_go_on_with_us() {
    let vhost = File::options().read(true).write(true).open("/dev/vhost-net").unwrap();
    let mut tap = tap(FLAGS).unwrap();
    let mut device = Net::new("net".into(), tap.fd.take().unwrap(), MAC, 1500).unwrap().with_vhost(Some(vhost.into()));
    let mut driver = Driver::new(device.queue_sizes());
    let features = device.features() & NO_EVENT_IDX;
    let activation = driver.activation(features);
    let (receive, transmit) = (activation.queues[0].1.used_ring(), activation.queues[1].1.used_ring());
    activation.kernel.must_note();
    device.activate(activation).unwrap();
    assert!(device.counters().is_vhost());

    let socket = UdpSocket::bind((tap.host.as_str(), 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let port = socket.local_addr().unwrap().port();
    let send = |driver: &mut Driver, text: &[u8]| {
        let made = driver.add(1, &[Buffer::Out(&udp_packet(tap.network, port, text))]);
        assert_eq!(driver.used(1).0, made.head);
        let mut bytes = [0; 64];
        let (length, _) = socket.recv_from(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], text);
    };
    send(&mut driver, b"by the kernel");
    // The host's own packets, of an address that it looks for.
    let place = driver.allocate(8 << 12).next_multiple_of(4096);
    let buffers = [0, 1, 2, 3].map(|number| Descriptor { address: place + number * 4096, length: 2048, flags: WRITE, next: 0 });
    let first = driver.add_chain(0, &buffers[..1]);
    for buffer in &buffers[1..] {
        driver.add_chain(0, std::slice::from_ref(buffer));
    }
    let _ = socket.send_to(b"who is it", format!("198.18.{}.2:9", tap.network));
    assert_eq!(driver.used(0).0, first);
    // The test's own writes are not the kernel's.
    noted(&driver);
    let queues = device.stop();
    let pages = noted(&driver);
    for written in [place, receive, transmit] {
        assert!(pages.contains(&(written >> 12)), "{:#x} of {pages:x?}", written >> 12);
    }
    let unused = place + 5 * 4096;
    assert!(!pages.contains(&(unused >> 12)), "{pages:x?}");

    // From here on by us.
    assert_eq!((queues[1].1.next_avail(), queues[1].1.next_used()), (1, 1));
    let activation = driver.activation_of(queues, features);
    activation.kernel.forbid();
    device.activate(activation).unwrap();
    assert!(!device.counters().is_vhost());
    send(&mut driver, b"by us");
    // And back.
    let queues = device.stop();
    device.activate(driver.activation_of(queues, features)).unwrap();
    assert!(device.counters().is_vhost());
    send(&mut driver, b"by the kernel again");
    let queues = device.stop();
    assert_eq!((queues[1].1.next_avail(), queues[1].1.next_used()), (3, 3));
}

#[test]
fn an_interface_whose_vhost_does_not_work_moves_its_packets_itself() {
    use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};
    for may in [true, false] {
        let (wire, tap) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None).unwrap();
        let no_vhost = File::open("/dev/null").unwrap().into();
        let mut device = Net::over_socket("net".into(), tap, MAC, 1500).unwrap().with_vhost(Some(no_vhost));
        let mut driver = Driver::new(device.queue_sizes());
        assert_eq!(device.counters().metrics("net").vhost_net, Some(false), "it is not known yet");
        let activation = driver.activation(device.features() & NO_EVENT_IDX);
        if !may {
            activation.kernel.forbid();
        }
        device.activate(activation).unwrap();
        // Whoever asks goes on counting where he counted: the tap knows all packets, and the VM process its own since the error.
        assert_eq!(device.counters().metrics("net").vhost_net, Some(false));
        // Nothing is to be had from a start without a limit any more.
        assert_eq!(device.counters().changes_carrier(false), !may);
        let made = driver.add(1, &[Buffer::Out(&[0; HEADER]), Buffer::Out(&[7; 60])]);
        assert_eq!(driver.used(1), (made.head, 0));
        let mut bytes = [0; 128];
        assert_eq!(recv(&wire, &mut bytes, RecvFlags::empty()).unwrap().0, HEADER + 60);
        assert_eq!(device.stop().len(), 2);
    }
}
