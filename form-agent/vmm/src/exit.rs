//! How a VM process ends: who says so first, what is left behind for the daemon, and panics.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use vmm_sys_util::eventfd::EventFd;

use crate::control::{ExitReason, ExitRecord};

/// The first reason to end, from whichever thread.
pub struct ExitSlot {
    reason: Mutex<Option<(ExitReason, Option<String>)>>,
    pub event: EventFd,
}

impl ExitSlot {
    /// # Errors
    /// When the operating system has no eventfd left.
    pub fn new() -> io::Result<Self> {
        Ok(ExitSlot { reason: Mutex::new(None), event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)? })
    }

    /// Later reports are consequences of the first and are dropped.
    pub fn report(&self, reason: ExitReason, message: Option<String>) {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((reason, message));
        let _ = self.event.write(1);
    }

    #[must_use]
    pub fn get(&self) -> Option<(ExitReason, Option<String>)> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The status that the process ends with.
#[must_use]
pub fn status(reason: ExitReason) -> ExitCode {
    ExitCode::from(match reason {
        ExitReason::PowerOff | ExitReason::Stopped => 0,
        ExitReason::Failed | ExitReason::Panicked => 1,
        ExitReason::Reset => 3,
    })
}

static RECORD: OnceLock<File> = OnceLock::new();

/// From now on the exit record goes to `file`. Only the first call counts.
pub fn record_to(file: File) {
    let _ = RECORD.set(file);
}

/// Writes the exit record, if one was asked for.
///
/// # Errors
/// When it cannot be written.
pub fn record(reason: ExitReason, message: Option<String>) -> io::Result<()> {
    let Some(file) = RECORD.get() else { return Ok(()) };
    let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let json = serde_json::to_vec(&ExitRecord { reason, message, at })?;
    file.set_len(0)?;
    file.write_all_at(&json, 0)?;
    file.sync_data()
}

/// A panic in any thread is recorded and ends the process: a VM that lost a thread must not go on.
pub fn catch_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let message = format!("{panic}");
        eprintln!("form-vmm: {message}");
        let _ = record(ExitReason::Panicked, Some(message));
        std::process::abort();
    }));
}
