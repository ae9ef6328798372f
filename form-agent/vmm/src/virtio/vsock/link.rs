//! Streams with their host ends.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::mpsc::SyncSender,
    time::Instant,
};

use super::{
    connection::{Connection, Key},
    request::Header,
};

/// Names a link in the epoll set and in the queue of those with something to send; never used twice.
pub type LinkId = u64;

/// The first port of host ends; those below are left to services.
const FIRST_PORT: u32 = 1 << 30;

/// One stream and the device's end of its socket pair.
pub struct Link {
    pub connection: Connection,
    pub stream: OwnedFd,
    /// Who waits for the stream to open.
    pub answer: Option<SyncSender<()>>,
    /// When to give up waiting for the guest.
    pub deadline: Option<Instant>,
    /// A read may give something: forgotten only when one said otherwise.
    pub readable: bool,
    /// Both directions of the host's end are closed.
    pub hung_up: bool,
    /// It waits in the queue of those with something to send.
    queued: bool,
    /// The guest has forgotten the stream; what it sent before is still being delivered.
    pub draining: bool,
}

impl Link {
    /// Writes held bytes to the host's end until it takes no more. `false`: the host's end is gone.
    pub fn flush(&mut self) -> bool {
        while self.connection.holds() {
            let (front, _) = self.connection.held();
            // SAFETY: `front` is valid for reading `front.len()` bytes during the call.
            let result =
                unsafe { libc::send(self.stream.as_raw_fd(), front.as_ptr().cast(), front.len(), libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
            match usize::try_from(result) {
                Ok(count) => self.connection.released(count),
                Err(_) => match io::Error::last_os_error().kind() {
                    io::ErrorKind::WouldBlock => return true,
                    io::ErrorKind::Interrupted => {}
                    _ => return false,
                },
            }
        }
        true
    }

    /// Tells the host's end what the guest will no longer do, as soon as everything it sent was delivered.
    pub fn pass_on_shutdown(&self) {
        let how = match (self.connection.guest_sends() || self.connection.holds(), self.connection.guest_receives()) {
            (true, true) => return,
            (true, false) => libc::SHUT_RD,
            (false, true) => libc::SHUT_WR,
            (false, false) => libc::SHUT_RDWR,
        };
        // SAFETY: shutdown takes no pointers. It fails only when the other end is gone, and then there is nobody to tell.
        unsafe { libc::shutdown(self.stream.as_raw_fd(), how) };
    }
}

/// All streams of a guest.
#[derive(Default)]
pub struct Links {
    links: HashMap<LinkId, Link>,
    /// Those that the guest knows.
    by_key: HashMap<Key, LinkId>,
    next_id: LinkId,
    next_port: u32,
    /// Links that have something to send, in turn.
    queue: VecDeque<LinkId>,
    /// RSTs for packets that belong to no stream.
    pub resets: VecDeque<Header>,
}

impl Links {
    /// None yet; the first one gets this port, counted from the first port of host ends.
    pub fn from_port(next_port: u32) -> Self {
        Self { next_port: next_port % FIRST_PORT, ..Self::default() }
    }

    /// Which port the next stream gets, as for [`Links::from_port`].
    pub const fn next_port(&self) -> u32 {
        self.next_port
    }

    pub fn len(&self) -> usize {
        self.links.len()
    }

    pub fn ids(&self) -> Vec<LinkId> {
        self.links.keys().copied().collect()
    }

    /// Adds a stream to be opened to `guest_port`.
    pub fn open(&mut self, guest_port: u32, guest_cid: u64, stream: OwnedFd, answer: SyncSender<()>, deadline: Instant) -> LinkId {
        let key = loop {
            let key = Key { host_port: FIRST_PORT + self.next_port, guest_port };
            // There are far fewer streams than ports, so a free one is found.
            self.next_port = (self.next_port + 1) % FIRST_PORT;
            if !self.by_key.contains_key(&key) {
                break key;
            }
        };
        let id = self.next_id;
        self.next_id += 1;
        let link = Link {
            connection: Connection::request(key, guest_cid),
            stream,
            answer: Some(answer),
            deadline: Some(deadline),
            readable: false,
            hung_up: false,
            queued: false,
            draining: false,
        };
        self.links.insert(id, link);
        self.by_key.insert(key, id);
        id
    }

    pub fn find(&self, key: Key) -> Option<LinkId> {
        self.by_key.get(&key).copied()
    }

    pub fn get(&mut self, id: LinkId) -> Option<&mut Link> {
        self.links.get_mut(&id)
    }

    /// Puts a link into the queue of those with something to send.
    pub fn enqueue(&mut self, id: LinkId) {
        if let Some(link) = self.links.get_mut(&id)
            && !link.queued
            && !link.draining
        {
            link.queued = true;
            self.queue.push_back(id);
        }
    }

    /// The next link in turn that still exists.
    pub fn dequeue(&mut self) -> Option<LinkId> {
        while let Some(id) = self.queue.pop_front() {
            if let Some(link) = self.links.get_mut(&id) {
                link.queued = false;
                return Some(id);
            }
        }
        None
    }

    pub fn has_work(&self) -> bool {
        !self.resets.is_empty() || !self.queue.is_empty()
    }

    /// The guest no longer knows the stream: its ports may be used again. What is held is still delivered.
    pub fn forget(&mut self, id: LinkId) {
        if let Some(link) = self.links.get_mut(&id) {
            let key = link.connection.key();
            link.draining = true;
            link.deadline = None;
            if self.by_key.get(&key) == Some(&id) {
                self.by_key.remove(&key);
            }
        }
    }

    /// Drops a stream: its host end sees the end.
    pub fn remove(&mut self, id: LinkId) -> Option<Link> {
        self.forget(id);
        self.links.remove(&id)
    }

    pub fn next_deadline(&self) -> Option<Instant> {
        self.links.values().filter_map(|link| link.deadline).min()
    }

    pub fn overdue(&self, now: Instant) -> Vec<LinkId> {
        self.links.iter().filter(|(_, link)| link.deadline.is_some_and(|deadline| deadline <= now)).map(|(id, _)| *id).collect()
    }
}
