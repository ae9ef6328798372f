//! Starting processes and collecting those that end: PID 1 collects everyone's orphans too, and must not take the exit status of a
//! process that somebody here waits for.

use std::{
    collections::HashMap,
    io,
    process::{ChildStderr, ChildStdin, ChildStdout, Command},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use form_guest::protocol::ExitStatus;
use rustix::{
    fd::OwnedFd,
    io::Errno,
    process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, pidfd_open, wait},
};

/// Locks, also when another thread panicked while it held the lock: PID 1 goes on.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The processes that somebody waits for.
#[derive(Default)]
pub struct Children {
    // Held while a process is started and while ended ones are collected, so that no process can end before it is entered here.
    waited: Mutex<HashMap<i32, Arc<Ending>>>,
}

/// Where the exit status of one process arrives.
#[derive(Default)]
struct Ending {
    status: Mutex<Option<ExitStatus>>,
    known: Condvar,
}

/// A process that was started here. It is the leader of its own session and process group.
pub struct Child {
    pub pid: Pid,
    pub stdin: Option<ChildStdin>,
    pub stdout: Option<ChildStdout>,
    pub stderr: Option<ChildStderr>,
    /// Readable once the process has ended.
    pub ended: OwnedFd,
    ending: Arc<Ending>,
}

impl Children {
    /// Starts a process. `command` must have gone through [`crate::sys::prepare`].
    ///
    /// # Errors
    /// Those of fork and exec: `NotFound` and `PermissionDenied` tell a missing program from one that cannot be executed.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        crate::hold::wait_for_release();
        let mut waited = lock(&self.waited);
        let mut child = command.spawn()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
        let ending = Arc::new(Ending::default());
        waited.insert(pid.as_raw_nonzero().get(), Arc::clone(&ending));
        // Nothing is collected while the lock is held, so the number still means this process.
        let ended = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Child { pid, stdin: child.stdin.take(), stdout: child.stdout.take(), stderr: child.stderr.take(), ended, ending })
    }

    /// Collects every process that has ended. Gives whether any is left.
    pub fn collect(&self) -> bool {
        let mut waited = lock(&self.waited);
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(ending) = waited.remove(&pid.as_raw_nonzero().get()) {
                        *lock(&ending.status) = Some(exit_status(status));
                        ending.known.notify_all();
                    }
                }
                Ok(None) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitStatus::Code(code),
        (None, Some(signal)) => ExitStatus::Signal(signal),
        // `wait` reports neither stops nor continuations unless asked.
        (None, None) => ExitStatus::Code(0),
    }
}

impl Child {
    /// Waits for its end.
    pub fn wait(&self) -> ExitStatus {
        let mut status = lock(&self.ending.status);
        loop {
            if let Some(status) = *status {
                return status;
            }
            status = self.ending.known.wait(status).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for its end, at most `limit`.
    pub fn wait_for(&self, limit: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + limit;
        let mut status = lock(&self.ending.status);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if status.is_some() || left.is_zero() {
                return *status;
            }
            status = self.ending.known.wait_timeout(status, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Sends a signal to the process and everything it started that stayed in its group.
    pub fn signal_group(&self, signal: Signal) {
        // Also after its end: the group lives on with what it left behind, and no new process can get the number of a group in use.
        let _ = rustix::process::kill_process_group(self.pid, signal);
    }
}

/// The status a shell would give when a program cannot be started, and what to say.
pub fn start_failure(program: &str, workdir: &str, error: &io::Error) -> (ExitStatus, String) {
    if !std::path::Path::new(workdir).is_dir() {
        return (ExitStatus::NOT_EXECUTABLE, format!("cannot start {program}: there is no directory {workdir}; create it in the image"));
    }
    match error.kind() {
        io::ErrorKind::NotFound => (ExitStatus::NOT_FOUND, format!("cannot start {program}: there is no such program in the image")),
        _ => (ExitStatus::NOT_EXECUTABLE, format!("cannot start {program}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        process::Stdio,
        sync::atomic::{AtomicBool, Ordering},
    };

    use super::*;
    use crate::sys::{Launch, prepare};

    // One test: `collect` takes every child of the process it runs in.
    #[test]
    fn statuses_arrive_where_they_are_waited_for() {
        let children = Children::default();
        let stop = AtomicBool::new(false);
        let me =
            Launch { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw(), groups: vec![], terminal: false };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    children.collect();
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            let start = |script: &str| {
                let mut command = Command::new("/bin/sh");
                command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped());
                prepare(&mut command, &me);
                children.spawn(&mut command).expect("/bin/sh starts")
            };
            assert_eq!(start("exit 3").wait(), ExitStatus::Code(3));
            assert_eq!(start("kill -9 $$").wait(), ExitStatus::Signal(9));
            let sleeper = start("sleep 100 & wait");
            assert_eq!(sleeper.wait_for(Duration::from_millis(20)), None);
            sleeper.signal_group(Signal::TERM);
            assert_eq!(sleeper.wait(), ExitStatus::Signal(15));
            let mut missing = Command::new("/no/such/program");
            prepare(&mut missing, &me);
            assert_eq!(children.spawn(&mut missing).err().map(|error| error.kind()), Some(io::ErrorKind::NotFound));
            stop.store(true, Ordering::Relaxed);
        });
    }
}
