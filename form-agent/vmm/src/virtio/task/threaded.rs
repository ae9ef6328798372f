//! Workers on threads of their own.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Exit;
use crate::virtio::worker::{self, WorkerKind};

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

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use vmm_sys_util::epoll::EventSet;

    use super::*;
    use crate::virtio::task::Poller;

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
}
