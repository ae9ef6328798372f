//! Workers without threads, for fuzz targets: a worker runs inside [`Task::stop`], on the caller's thread, until nothing is left
//! to do. The same input then always does the same, and a fault is seen where it happens.

use std::{
    cell::RefCell,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use vmm_sys_util::{
    epoll::{Epoll, EpollEvent},
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
};

use super::Exit;
use crate::virtio::worker::WorkerKind;

type Idle = Box<dyn FnMut() -> bool>;
type Work<T> = Box<dyn FnOnce(&Exit) -> T + Send>;

thread_local! {
    static IDLE: RefCell<Option<Idle>> = const { RefCell::new(None) };
    /// What the running worker is told to stop by.
    static STOP: RefCell<Option<Arc<AtomicBool>>> = const { RefCell::new(None) };
}

/// Sets what is asked when a worker of this thread would wait: it may act as the guest does meanwhile. `true`: look again;
/// `false`: the worker shall end.
pub fn set_idle(idle: impl FnMut() -> bool + 'static) {
    IDLE.set(Some(Box::new(idle)));
}

/// Forgets what [`set_idle`] was given.
pub fn clear_idle() {
    IDLE.set(None);
}

/// A worker that has not run yet.
pub struct Task<T> {
    work: Option<Work<T>>,
    exit: Exit,
}

impl<T: Send + 'static> Task<T> {
    /// Keeps `work` until [`Task::stop`].
    ///
    /// # Errors
    /// When the eventfd cannot be made.
    pub fn start<F>(_kind: WorkerKind, _id: &str, work: F) -> io::Result<Self>
    where
        F: FnOnce(&Exit) -> T + Send + 'static,
    {
        let exit = Exit { stop: Arc::default(), wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? };
        Ok(Self { work: Some(Box::new(work)), exit })
    }

    /// Runs the worker until it has nothing to do; gives what it gives back.
    pub fn stop(mut self) -> Option<T> {
        self.run()
    }
}

impl<T> Task<T> {
    fn run(&mut self) -> Option<T> {
        let work = self.work.take()?;
        STOP.set(Some(Arc::clone(&self.exit.stop)));
        Some(work(&self.exit))
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        drop(self.run());
    }
}

/// A wait of `milliseconds` that never waits: when nothing has happened, it asks what [`set_idle`] set.
pub(super) fn wait(epoll: &Epoll, milliseconds: i32, events: &mut [EpollEvent]) -> io::Result<usize> {
    let count = epoll.wait(0, events)?;
    if count > 0 || milliseconds == 0 {
        return Ok(count);
    }
    if IDLE.with_borrow_mut(|idle| idle.as_mut().is_some_and(|idle| idle())) {
        return epoll.wait(0, events);
    }
    STOP.with_borrow(|stop| stop.iter().for_each(|stop| stop.store(true, Ordering::Release)));
    Ok(0)
}
