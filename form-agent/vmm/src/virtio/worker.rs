//! Threads that devices work on. Every device thread is started here, so that each gets a small stack and the seccomp filter
//! of its kind before it touches anything that the guest wrote.

use std::io;
use std::thread::{Builder, JoinHandle};

/// What a worker is allowed to do depends on the kind of its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WorkerKind {
    Block,
    Net,
    Vsock,
    Rng,
    Balloon,
    Mem,
}

/// Enough for the qcow2 driver's nested calls; a default stack of 2 MiB can cost a huge page each.
const STACK: usize = 256 * 1024;

/// Starts `work` on a thread of its own, named after the device, inside the jail of its kind.
///
/// # Errors
/// When the thread cannot be made.
pub fn spawn<F>(kind: WorkerKind, id: &str, work: F) -> io::Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
{
    Builder::new().name(id.to_owned()).stack_size(STACK).spawn(move || {
        crate::jail::enter_worker(kind);
        work();
    })
}
