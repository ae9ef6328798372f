//! A device's worker thread as its device sees it: started, told to stop, and giving back what it was given.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

use super::worker::{self, WorkerKind};

/// The kernel cuts names of threads to this many bytes.
const NAME_MAX: usize = 15;

/// A running worker that answers with a `T` when it is told to stop.
pub struct Task<T> {
    stop: Arc<AtomicBool>,
    wake: EventFd,
    answer: mpsc::Receiver<T>,
    /// `None` once it was joined.
    thread: Option<JoinHandle<()>>,
}

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

impl<T: Send + 'static> Task<T> {
    /// Starts `work` on a thread named after the device.
    ///
    /// # Errors
    /// When the eventfd or the thread cannot be made.
    pub fn start<F>(kind: WorkerKind, id: &str, work: F) -> io::Result<Self>
    where
        F: FnOnce(&Exit) -> T + Send + 'static,
    {
        let stop = Arc::new(AtomicBool::new(false));
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let exit = Exit { stop: Arc::clone(&stop), wake: wake.try_clone()? };
        let (answers, answer) = mpsc::channel();
        let thread = worker::spawn(kind, thread_name(id), move || {
            // The receiver is gone only when the device was dropped without being stopped: then nobody wants the answer.
            let _ = answers.send(work(&exit));
        })?;
        Ok(Self { stop, wake, answer, thread: Some(thread) })
    }

    /// Tells the worker to stop and waits for what it gives back. `None` when it panicked.
    pub fn stop(mut self) -> Option<T> {
        self.finish();
        self.answer.try_recv().ok()
    }
}

impl<T> Task<T> {
    fn finish(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stop.store(true, Ordering::Release);
            // The counter of an eventfd is full after 2^64 - 2 writes only.
            let _ = self.wake.write(1);
            // A panic shows in the missing answer.
            let _ = thread.join();
        }
    }
}

/// A device that is dropped while it runs leaves no thread behind, and nothing unflushed.
impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.finish();
    }
}

fn thread_name(id: &str) -> &str {
    let mut end = id.len().min(NAME_MAX);
    while !id.is_char_boundary(end) {
        end -= 1;
    }
    // A name with a zero byte cannot be given to a thread.
    id[..end].split('\0').next().unwrap_or_default()
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
        match self.epoll.wait(milliseconds, &mut self.events) {
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
    fn a_worker_gives_back_what_it_was_given() {
        let task = Task::start(WorkerKind::Rng, "a name that is far too long for the kernel", |exit| {
            let mut poller = Poller::new(1).unwrap();
            poller.add(exit.as_raw_fd(), 0, EventSet::IN).unwrap();
            while !exit.requested() {
                poller.wait(None).unwrap();
            }
            42
        })
        .unwrap();
        assert_eq!(task.stop(), Some(42));
    }

    #[test]
    fn a_dropped_task_has_ended() {
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ended);
        let task = Task::start(WorkerKind::Rng, "rng", move |exit| {
            while !exit.requested() {
                std::thread::yield_now();
            }
            seen.store(true, Ordering::SeqCst);
        })
        .unwrap();
        drop(task);
        assert!(ended.load(Ordering::SeqCst));
    }

    #[test]
    fn names_of_threads_are_cut_at_a_character() {
        assert_eq!(thread_name("blk-äääääääää"), "blk-äääää");
        assert_eq!(thread_name("a\0b"), "a");
    }

    #[test]
    fn a_wait_ends_with_its_time() {
        let mut poller = Poller::new(4).unwrap();
        assert!(poller.wait(Some(Duration::from_micros(1))).unwrap().is_empty());
    }
}
