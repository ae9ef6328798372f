//! The disk's thread.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::{
    Counters, DiskBackend, Limiter, Payload,
    request::{self, HEADER, Limits, Operation, Request, RequestError, SERIAL, Status},
    uring::{Asked, Uring},
};
use crate::memory::GuestMemoryMmap;
use crate::virtio::{
    GuestMemory,
    chain::Chain,
    ring::{Fault, Ring, Session},
    task::{Exit, Poller},
};

const EXIT: u64 = 0;
const KICK: u64 = 1;
const LIMITS: u64 = 2;
const DONE: u64 = 3;

/// Completions the driver may have to wait for while we go on with the next request.
const NOTIFY_EVERY: u32 = 8;

/// Everything the disk's thread holds; it gives all of it back when it stops.
pub struct Worker {
    pub session: Session,
    pub ring: Ring,
    pub backend: Box<dyn DiskBackend>,
    /// Without it one request is done after the other.
    pub uring: Option<Uring>,
    pub serial: [u8; SERIAL],
    pub limits: Limits,
    pub counters: Arc<Counters>,
    pub limiter: Limiter,
    pub write_through: bool,
    /// Completions that the driver was not told of.
    pub untold: u32,
}

/// Guest memory as it is now.
type Memory = <GuestMemory as GuestAddressSpace>::T;

impl Worker {
    pub fn run(mut self, exit: &Exit) -> Self {
        let served = self.serve(exit);
        // The queue, the memory and the files are others' from now on.
        let ended = self.end_all();
        if let Err(fault) = served.and(ended) {
            self.session.report(&fault);
        }
        // What is saved or copied while the device rests is complete.
        if !self.limits.read_only
            && let Err(error) = self.backend.flush()
        {
            eprintln!("{}: could not flush: {error}", self.session.id);
        }
        self
    }

    fn serve(&mut self, exit: &Exit) -> Result<(), Fault> {
        let host = |source| Fault::Host { context: "could not wait for the driver", source };
        let mut poller = Poller::new(4).map_err(host)?;
        poller.add(exit.as_raw_fd(), EXIT, EventSet::IN).map_err(host)?;
        poller.add(self.ring.kick_fd(), KICK, EventSet::IN).map_err(host)?;
        poller.add(self.limiter.0.as_raw_fd(), LIMITS, EventSet::IN).map_err(host)?;
        if let Some(uring) = &self.uring {
            poller.add(uring.as_raw_fd(), DONE, EventSet::IN).map_err(host)?;
        }
        let mut chain = Chain::default();
        // First without a kick: after a pause requests may be waiting.
        let mut limited = self.drain(exit, &mut chain)?;
        while !exit.requested() {
            let events = poller.wait(limited).map_err(host)?;
            let mut look = events.is_empty();
            for event in events {
                match event.data() {
                    KICK => self.ring.take_kick(),
                    LIMITS => self.limiter.0.take_event(),
                    DONE => {}
                    _ => continue,
                }
                look = true;
            }
            if look {
                limited = self.drain(exit, &mut chain)?;
            }
        }
        Ok(())
    }

    /// Answers what is done, and serves what the driver made available until there is no more, or the limits of the disk are reached: then it gives
    /// the time after which the next request, which stays in the ring, may be served. The driver is not asked to kick meanwhile.
    fn drain(&mut self, exit: &Exit, chain: &mut Chain) -> Result<Option<Duration>, Fault> {
        let mut memory = self.session.memory.memory();
        loop {
            self.ring.disarm(&memory)?;
            self.collect()?;
            let mut limited = None;
            let mut taken: u32 = 0;
            while !exit.requested() && self.has_room() && {
                memory = self.session.memory.memory();
                self.ring.pop(&memory, chain)?
            } {
                let request = self.parse(&memory, chain)?;
                if let Err(wait) = self.limiter.take(request.cost(chain)) {
                    self.ring.undo_pop(1);
                    limited = Some(wait);
                    break;
                }
                if let Some(written) = self.perform(&memory, chain, request)? {
                    self.complete(&memory, chain.head, written)?;
                }
                // A driver that never stops asking holds back nothing that waits for the kernel.
                taken += 1;
                if taken.is_multiple_of(NOTIFY_EVERY) {
                    self.tell()?;
                }
            }
            self.tell_or_wait()?;
            self.notify(&memory)?;
            if limited.is_some() {
                return Ok(limited);
            }
            // Without room what is done wakes us.
            if !self.ring.arm(&memory)? || exit.requested() || !self.has_room() {
                return Ok(None);
            }
        }
    }

    fn has_room(&self) -> bool {
        self.uring.as_ref().is_none_or(Uring::has_room)
    }

    fn complete(&mut self, memory: &GuestMemoryMmap, head: u16, written: usize) -> Result<(), Fault> {
        self.ring.complete(memory, head, written)?;
        self.untold += 1;
        if self.untold == NOTIFY_EVERY { self.notify(memory) } else { Ok(()) }
    }

    fn notify(&mut self, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        if std::mem::take(&mut self.untold) > 0 { self.ring.notify(memory) } else { Ok(()) }
    }

    fn parse(&self, memory: &GuestMemoryMmap, chain: &Chain) -> Result<Request, Fault> {
        request::parse(memory, chain, self.limits).map_err(|error| match error {
            RequestError::TooShort { .. } => Fault::Request("a block request without room for header and status"),
            RequestError::Chain(source) => Fault::Chain { index: 0, source },
        })
    }

    /// Does what the chain asks for and writes the status; gives the number of bytes written to guest memory. `None` when the kernel works on it,
    /// which has the chain then.
    fn perform(&mut self, memory: &Memory, chain: &mut Chain, request: Request) -> Result<Option<usize>, Fault> {
        let result = match request {
            Request::Refuse(status) => Err(status),
            Request::Perform(operation) => {
                let Some(done) = self.begin(memory, chain, &operation)? else { return Ok(None) };
                self.execute(memory, chain, &operation, done).map_err(|error| self.failed(&operation, &error))
            }
        };
        self.answer(memory, chain, result).map(Some)
    }

    /// Reads what is there without waiting, and leaves the rest to the kernel, and every flush: then `None`. Otherwise the number of bytes that
    /// were read. Writes are copies to the host's cache, which wait for nothing as a rule: the kernel would give each to a thread of its own where
    /// the file system cannot say that beforehand (ext4).
    fn begin(&mut self, memory: &Memory, chain: &mut Chain, operation: &Operation) -> Result<Option<usize>, Fault> {
        let (Some(uring), Some(file)) = (&mut self.uring, self.backend.file()) else { return Ok(Some(0)) };
        let (done, vectors) = match operation {
            Operation::Read { offset } => {
                let all = 0..chain.writable.len() - 1;
                let mut vectors = chain.writable.iovecs(memory, all).map_err(|source| Fault::Chain { index: 0, source })?;
                // What is wrong here shows when the rest is read.
                let done = vectors.read_now_at(file, *offset).unwrap_or(0);
                if vectors.is_empty() {
                    return Ok(Some(done));
                }
                (done, vectors.into_list())
            }
            Operation::Flush => (0, Vec::new()),
            _ => return Ok(Some(0)),
        };
        let asked = uring.ask(|| Asked {
            chain: std::mem::take(chain),
            operation: operation.clone(),
            done,
            memory: memory.clone().into_inner(),
            vectors,
        });
        Ok(if asked { None } else { Some(done) })
    }

    /// As [`Worker::tell`], but a read that is alone is waited for here: that takes fewer turns.
    fn tell_or_wait(&mut self) -> Result<(), Fault> {
        match self.uring.as_mut().and_then(Uring::take_back_lone_read) {
            Some(asked) => self.finish(asked, 0),
            None => self.tell(),
        }
    }

    /// Tells the kernel what was left to it, and answers what is done.
    fn tell(&mut self) -> Result<(), Fault> {
        if let (Some(uring), Some(file)) = (&mut self.uring, self.backend.file()) {
            uring.submit(file).map_err(|source| Fault::Host { context: "could not leave requests to the kernel", source })?;
        }
        self.collect()
    }

    /// Answers what the kernel is done with.
    fn collect(&mut self) -> Result<(), Fault> {
        while let Some((asked, result)) = self.uring.as_mut().and_then(Uring::next_done) {
            self.finish(asked, result)?;
        }
        Ok(())
    }

    /// Waits for everything that the kernel works on, and answers it.
    fn end_all(&mut self) -> Result<(), Fault> {
        let mut ended = Ok(());
        while let Some(uring) = &mut self.uring
            && !uring.is_idle()
        {
            if let Some((asked, result)) = uring.next_done() {
                ended = ended.and(self.finish(asked, result));
                continue;
            }
            let told = self.backend.file().map_or(Ok(()), |file| uring.submit(file));
            if let Err(source) = told.and_then(|()| uring.wait()) {
                // What is under way keeps its memory, and the ring is used no more.
                self.uring = None;
                return Err(Fault::Host { context: "could not wait for the kernel", source });
            }
        }
        let memory = self.session.memory.memory();
        ended.and(self.notify(&memory))
    }

    /// Answers a request of which the kernel says `result`: the number of bytes, or an error as a negative number.
    fn finish(&mut self, asked: Asked, result: i32) -> Result<(), Fault> {
        let Asked { chain, operation, done, memory, .. } = asked;
        let result = match (&operation, result) {
            // Asked a second time the file says that all is well, which it is not: the error is told once.
            (Operation::Flush, ..0) if !is_passing(-result) => Err(io::Error::from_raw_os_error(-result)),
            (Operation::Flush, 0) => {
                self.counters.flushes.fetch_add(1, Relaxed);
                Ok(0)
            }
            // What the kernel did not do is done here: the end of the file, an error to be told, no thread to be had for it.
            _ => self.execute(&memory, &chain, &operation, done + usize::try_from(result).unwrap_or(0)),
        };
        let result = result.map_err(|error| self.failed(&operation, &error));
        let written = self.answer(&memory, &chain, result)?;
        self.complete(&memory, chain.head, written)
    }

    fn failed(&self, operation: &Operation, error: &io::Error) -> Status {
        // A full disk fails every write: the first is told, and then ever fewer.
        if (self.counters.errors.load(Relaxed) + 1).is_power_of_two() {
            eprintln!("{}: {operation:?} failed: {error}", self.session.id);
        }
        Status::IoError
    }

    /// Writes the status of a request, of which `result` says how much data was written to guest memory; gives what goes into the used ring.
    fn answer(&self, memory: &GuestMemoryMmap, chain: &Chain, result: Result<usize, Status>) -> Result<usize, Fault> {
        let status_at = chain.writable.len() - 1;
        let (status, data) = result.map_or_else(|status| (status, 0), |data| (Status::Ok, data));
        if status != Status::Ok {
            self.counters.errors.fetch_add(1, Relaxed);
        }
        // A read that failed may have written any part of it.
        let changed = if status == Status::Ok { data } else { status_at };
        chain
            .writable
            .mark_written(memory, changed)
            .and_then(|()| chain.writable.write(memory, status_at, &[status as u8]))
            .map_err(|source| Fault::Chain { index: 0, source })?;
        // The length counts bytes written from the start on; the status is the very last one.
        Ok(if data == status_at { data + 1 } else { data })
    }

    /// Gives the number of bytes of data written to guest memory. Of a read, the first `done` bytes are there already.
    fn execute(&mut self, memory: &GuestMemoryMmap, chain: &Chain, operation: &Operation, done: usize) -> io::Result<usize> {
        let counters = &self.counters;
        match operation {
            Operation::Read { offset } => {
                let length = chain.writable.len() - 1;
                if done < length {
                    let payload = Payload::new(memory, &chain.writable, done..length).map_err(io::Error::other)?;
                    self.backend.read(*offset + done as u64, &payload)?;
                }
                counters.reads.fetch_add(1, Relaxed);
                counters.read_bytes.fetch_add(length as u64, Relaxed);
                return Ok(length);
            }
            Operation::Write { offset } => {
                let payload = Payload::new(memory, &chain.readable, HEADER..chain.readable.len()).map_err(io::Error::other)?;
                self.backend.write(*offset, &payload)?;
                counters.writes.fetch_add(1, Relaxed);
                counters.written_bytes.fetch_add(payload.len() as u64, Relaxed);
                self.settle()?;
            }
            Operation::Flush => {
                self.backend.flush()?;
                counters.flushes.fetch_add(1, Relaxed);
            }
            Operation::GetId => {
                let length = SERIAL.min(chain.writable.len() - 1);
                chain.writable.write(memory, 0, &self.serial[..length]).map_err(io::Error::other)?;
                return Ok(length);
            }
            Operation::Discard(extents) => {
                for extent in extents {
                    self.backend.discard(extent.offset, extent.length)?;
                }
                self.settle()?;
            }
            Operation::WriteZeroes { extents, unmap } => {
                for extent in extents {
                    self.backend.write_zeroes(extent.offset, extent.length, *unmap)?;
                }
                self.settle()?;
            }
        }
        Ok(0)
    }

    fn settle(&mut self) -> io::Result<()> {
        if self.write_through { self.backend.flush() } else { Ok(()) }
    }
}

/// The kernel did not begin: no memory, no thread, or something came in between.
fn is_passing(errno: i32) -> bool {
    matches!(errno, libc::EAGAIN | libc::EINTR | libc::ECANCELED)
}
