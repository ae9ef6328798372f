//! Signals, read one after another by a thread of ours instead of interrupting others.

use std::{io, mem::MaybeUninit};

/// The signals that PID 1 acts on.
const OURS: [i32; 4] = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGPWR];

/// The set of signals that [`block_signals`] keeps back.
pub struct Signals(libc::sigset_t);

/// Keeps our signals back in this thread and all that it starts later, so that only [`Signals::wait`] sees them. To be called before
/// any other thread exists. Processes that we start get an empty
/// mask again in [`super::prepare`].
///
/// # Errors
/// Those of `pthread_sigmask(3)`.
pub fn block_signals() -> io::Result<Signals> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` initialises the whole set, which is valid for writes.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init_mut()
    };
    for signal in OURS {
        // SAFETY: `set` is an initialised set and `signal` a valid number.
        unsafe { libc::sigaddset(set, signal) };
    }
    // SAFETY: `set` is initialised; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set, std::ptr::null_mut()) } {
        0 => Ok(Signals(*set)),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

impl Signals {
    /// The next signal.
    pub fn wait(&self) -> i32 {
        loop {
            // SAFETY: the set is initialised; no details of the signal are asked for.
            let signal = unsafe { libc::sigwaitinfo(&self.0, std::ptr::null_mut()) };
            if signal > 0 {
                return signal;
            }
        }
    }
}
