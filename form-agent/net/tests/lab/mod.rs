//! Network namespaces for tests. Each lives as long as a descriptor or thread of it does: nothing is left behind, however the
//! test ends.

use std::{
    fs::File,
    future::Future,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use form_net::Attachment;
use hickory_server::proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::Name,
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

/// For what has to come.
const PATIENCE: Duration = Duration::from_secs(30);

/// For what must not come: a machine that is busier lets it pass, and fails no test.
const GLANCE: Duration = Duration::from_millis(1500);

/// A datagram, or the answer to it, may be lost: then it is sent again.
const AGAIN: Duration = Duration::from_secs(1);

pub type Answer = Result<String, String>;

#[derive(Clone)]
pub struct Namespace(Arc<OwnedFd>);

impl Namespace {
    /// A new one, with its loopback interface up.
    fn new() -> Self {
        let make = || {
            // SAFETY: only the network namespace of this short-lived thread changes; no file descriptor table, memory or
            // user id is unshared, so nothing that another thread relies on is touched.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("these tests need root: a network namespace cannot be made");
            sh("ip link set lo up").unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        Self(Arc::new(thread::spawn(make).join().unwrap().into()))
    }

    fn join(&self) {
        move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }

    /// Runs something in the namespace, on a thread of its own.
    pub fn enter<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        self.spawn(work).join().expect("the work in a namespace failed")
    }

    fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let namespace = self.clone();
        thread::spawn(move || {
            namespace.join();
            work()
        })
    }

    fn sh(&self, script: &str) -> String {
        let script = script.to_owned();
        self.enter(move || sh(&script)).unwrap()
    }

    fn get(&self, address: &str, patience: Duration) -> Answer {
        let address: SocketAddr = address.parse().unwrap();
        self.enter(move || get(address, patience))
    }

    /// Greets whoever connects: with the text, or with the address it sees.
    fn serve(&self, port: u16, text: Option<String>) {
        let listener = self.enter(move || TcpListener::bind(("::", port)).unwrap());
        self.spawn(move || {
            for stream in listener.incoming().flatten() {
                let seen = stream.peer_addr().map_or_else(|error| error.to_string(), |peer| peer.ip().to_canonical().to_string());
                let text = text.clone().unwrap_or_else(|| format!("hello to {seen}\n"));
                let _ = { stream }.write_all(text.as_bytes());
            }
        });
    }
}

fn sh(script: &str) -> Answer {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout).unwrap());
    }
    Err(format!("{script}: {}", String::from_utf8_lossy(&output.stderr)))
}

fn get(address: SocketAddr, patience: Duration) -> Answer {
    let talk = || {
        let mut stream = TcpStream::connect_timeout(&address, patience)?;
        stream.set_read_timeout(Some(patience))?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    };
    talk().map_err(|error: std::io::Error| error.to_string())
}

/// One datagram there and one back. Gives the length of that.
fn ask(server: impl std::net::ToSocketAddrs, question: &[u8], answer: &mut [u8]) -> std::io::Result<usize> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(AGAIN))?;
    socket.connect(server)?;
    let begun = Instant::now();
    loop {
        socket.send(question)?;
        match socket.recv(answer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && begun.elapsed() < PATIENCE => {}
            received => return received,
        }
    }
}

/// A host with an outside world behind `up0`: 192.0.2.1 and 2001:db8::1, the world being `.2` and `::2`.
pub struct Lab {
    outside: Namespace,
    root: tempfile::TempDir,
}

impl Lab {
    /// Runs a test on the host, in a runtime of one thread.
    pub fn run<F: Future<Output = ()>>(test: impl FnOnce(Arc<Lab>) -> F + Send + 'static) {
        let (host, outside) = (Namespace::new(), Namespace::new());
        let lab = Arc::new(Lab { outside: outside.clone(), root: tempfile::tempdir().unwrap() });
        let result = host
            .spawn(move || {
                lab.connect();
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(test(lab));
            })
            .join();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    }

    fn connect(&self) {
        let name = format!("/proc/{}/fd/{}", std::process::id(), self.outside.0.as_raw_fd());
        // An address that is still being checked for duplicates cannot be used, and nobody here has it.
        self.host_sh(&format!(
            "ip link add up0 type veth peer name eth0; ip link set eth0 netns {name};
             echo 0 > /proc/sys/net/ipv6/conf/up0/accept_dad; ip link set up0 up;
             ip addr add 192.0.2.1/24 dev up0; ip addr add 2001:db8::1/64 dev up0 nodad"
        ));
        self.outside.sh("ip link set eth0 up; ip addr add 192.0.2.2/24 dev eth0; ip addr add 2001:db8::2/64 dev eth0 nodad");
    }

    pub fn root(&self) -> &Path {
        self.root.path()
    }

    pub fn host_sh(&self, script: &str) -> String {
        sh(script).unwrap()
    }

    pub fn host_get(&self, address: &str) -> Answer {
        get(address.parse().unwrap(), PATIENCE)
    }

    /// As [`Lab::host_get`], where nothing is to be had.
    pub fn host_cannot_get(&self, address: &str) -> bool {
        get(address.parse().unwrap(), GLANCE).is_err()
    }

    pub fn host_udp(&self, address: &str, port: u16) -> Answer {
        let talk = || {
            let mut buffer = [0; 64];
            let length = ask((address, port), b"echo", &mut buffer)?;
            Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
        };
        talk().map_err(|error: std::io::Error| error.to_string())
    }

    /// A service of the host itself.
    pub fn host_serve(&self, port: u16) -> TcpListener {
        TcpListener::bind(("::", port)).unwrap()
    }

    pub fn outside_get(&self, address: &str) -> Answer {
        self.outside.get(address, PATIENCE)
    }

    /// As [`Lab::outside_get`], where nothing is to be had.
    pub fn outside_cannot_get(&self, address: &str) -> bool {
        self.outside.get(address, GLANCE).is_err()
    }

    pub fn outside_serve(&self, port: u16) {
        self.outside.serve(port, None);
    }

    pub fn outside_sh(&self, script: &str) {
        self.outside.sh(script);
    }

    /// What reaches UDP port 9 of the outside: text and sender, of so many that have to come and of all that come in a while after them.
    pub fn outside_hears(&self) -> impl FnOnce(usize) -> Vec<(String, IpAddr)> {
        let socket = self.outside.enter(|| UdpSocket::bind(("::", 9)).unwrap());
        move |expected| {
            let mut heard = Vec::new();
            let mut buffer = [0; 64];
            loop {
                let patience = if heard.len() < expected { PATIENCE } else { Duration::from_millis(500) };
                socket.set_read_timeout(Some(patience)).unwrap();
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { return heard };
                heard.push((String::from_utf8_lossy(&buffer[..length]).into_owned(), from.ip().to_canonical()));
            }
        }
    }
}

/// A VM without the VM: a namespace whose `eth0` is another tap, with frames carried between the two.
pub struct Guest {
    namespace: Namespace,
}

impl Guest {
    pub fn start(tap: OwnedFd, attachment: &Attachment) -> Self {
        let namespace = Namespace::new();
        let inner = namespace.enter(|| form_net::tap::open("eth0").unwrap());
        thread::spawn(move || carry(&tap, &inner));
        let guest = Self { namespace };
        guest.sh(&format!(
            "echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad;
             ip link set eth0 address {} up; ip addr add {}/32 dev eth0; ip addr add {}/128 dev eth0 nodad",
            attachment.mac, attachment.ipv4, attachment.ipv6
        ));
        guest.route_to_gateway();
        guest
    }

    pub fn route_to_gateway(&self) {
        self.sh("ip route replace 169.254.77.1 dev eth0; ip route replace default via 169.254.77.1 dev eth0;
                 ip -6 route replace default via fe80::1 dev eth0");
    }

    /// Makes the guest send packets for 127.0.0.1 out of its interface.
    pub fn route_loopback_to_gateway(&self) {
        self.sh("echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet; ip addr del 127.0.0.1/8 dev lo;
                 ip route add 127.0.0.1 via 169.254.77.1 dev eth0");
    }

    pub fn sh(&self, script: &str) -> String {
        self.namespace.sh(script)
    }

    pub fn get(&self, address: &str) -> Answer {
        self.namespace.get(address, PATIENCE)
    }

    /// As [`Guest::get`], where nothing is to be had.
    pub fn cannot_get(&self, address: &str) -> bool {
        self.namespace.get(address, GLANCE).is_err()
    }

    pub fn serve(&self, port: u16, text: &str) {
        self.namespace.serve(port, Some(text.to_owned()));
    }

    pub fn serve_udp_echo(&self, port: u16) {
        let socket = self.namespace.enter(move || UdpSocket::bind(("0.0.0.0", port)).unwrap());
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        });
    }

    /// Sends a datagram from an address of the guest.
    pub fn say(&self, text: &str, from: IpAddr, to: &str) {
        let (text, to) = (text.to_owned(), to.parse::<SocketAddr>().unwrap());
        self.namespace.enter(move || UdpSocket::bind((from, 0)).unwrap().send_to(text.as_bytes(), to).map(drop).unwrap());
    }

    /// Asks a name server, over UDP or TCP: the first answer, or the error code. Needs the host's runtime meanwhile.
    pub async fn resolve(&self, server: IpAddr, name: &str, kind: &str, tcp: bool) -> Answer {
        let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(format!("{name}.")).unwrap(), kind.parse().unwrap()));
        let query = message.to_vec().unwrap();
        let namespace = self.namespace.clone();
        let exchange = move || -> std::io::Result<Vec<u8>> {
            let mut reply = vec![0; 4096];
            if tcp {
                let mut stream = TcpStream::connect_timeout(&(server, 53).into(), PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                let length = u16::try_from(query.len()).unwrap().to_be_bytes();
                stream.write_all(&[&length, query.as_slice()].concat())?;
                let mut length = [0; 2];
                stream.read_exact(&mut length)?;
                reply.truncate(u16::from_be_bytes(length).into());
                stream.read_exact(&mut reply)?;
            } else {
                let length = ask((server, 53), &query, &mut reply)?;
                reply.truncate(length);
            }
            Ok(reply)
        };
        let reply = tokio::task::spawn_blocking(move || namespace.enter(exchange)).await.unwrap().map_err(|error| error.to_string())?;
        let reply = Message::from_vec(&reply).unwrap();
        match (reply.metadata.response_code, reply.answers.first()) {
            (ResponseCode::NoError, Some(answer)) => Ok(answer.data.to_string()),
            (code, _) => Err(code.to_string()),
        }
    }
}

/// Carries frames between two taps until one is gone.
fn carry(one: &OwnedFd, other: &OwnedFd) {
    let mut frame = vec![0; 70_000];
    loop {
        let mut waiting = [PollFd::new(one, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
        if poll(&mut waiting, None).is_err() || waiting.iter().any(|fd| fd.revents().intersects(PollFlags::ERR | PollFlags::NVAL)) {
            return;
        }
        for (from, to) in [(one, other), (other, one)] {
            while let Ok(length) = rustix::io::read(from, &mut frame) {
                // A frame that the other side will not take is lost, as on a wire.
                let _ = rustix::io::write(to, &frame[..length]);
            }
        }
    }
}
