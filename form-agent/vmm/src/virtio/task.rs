//! A device's worker as its device sees it: started, told to stop, and giving back what it was given.

#[cfg(feature = "fuzzing")]
pub mod inline;
#[cfg(not(feature = "fuzzing"))]
mod threaded;

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

#[cfg(feature = "fuzzing")]
pub use inline::Task;
#[cfg(not(feature = "fuzzing"))]
pub use threaded::Task;

/// The worker's side of [`Task::stop`].
pub struct Exit {
    stop: Arc<AtomicBool>,
    wake: EventFd,
}

impl Exit {
    /// Whether the worker shall give back what it holds. Asked between two requests, so that a guest which never stops
    /// sending cannot keep the thread.
    pub fn requested(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

impl AsRawFd for Exit {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// An epoll set with numbered sources.
pub struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poller {
    /// `capacity` is the number of events one [`Poller::wait`] gives at most.
    ///
    /// # Errors
    /// Those of `epoll_create1`.
    pub fn new(capacity: usize) -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, events: vec![EpollEvent::default(); capacity.max(1)] })
    }

    /// # Errors
    /// Those of `epoll_ctl`.
    pub fn add(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// # Errors
    /// Those of `epoll_ctl`.
    pub fn modify(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(events, token))
    }

    /// # Errors
    /// Those of `epoll_ctl`.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }

    /// Waits for the first event, at most `timeout` (`None`: for ever). Empty after the time is over and after a signal.
    ///
    /// # Errors
    /// Those of `epoll_wait`, never `EINTR`.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<&[EpollEvent]> {
        let milliseconds = match timeout {
            None => -1,
            // Rounded up: a timer that fires early would only spin.
            Some(time) => i32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX),
        };
        #[cfg(feature = "fuzzing")]
        let result = inline::wait(&self.epoll, milliseconds, &mut self.events);
        #[cfg(not(feature = "fuzzing"))]
        let result = self.epoll.wait(milliseconds, &mut self.events);
        match result {
            Ok(count) => Ok(&self.events[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(&[]),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_its_time() {
        let mut poller = Poller::new(4).unwrap();
        assert!(poller.wait(Some(Duration::from_micros(1))).unwrap().is_empty());
    }
}
