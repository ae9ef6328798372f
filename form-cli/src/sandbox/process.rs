//! The QEMU process of a sandbox: found by what it is, not by a number that another process may have by now.

use std::{
    fs, io,
    os::unix::ffi::OsStrExt,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::qmp::Qmp;
use crate::failure::Failure;

/// Written by QEMU at its start and removed at its orderly end.
pub const PID_FILE: &str = "qemu.pid";

/// How long QEMU may take to end when it is asked to.
const PATIENCE: Duration = Duration::from_secs(5);

/// A QEMU that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: Pid,
    pub since: Option<SystemTime>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Running(Process),
    /// It ended by itself: the host was powered off, or its kernel gave up.
    Stopped,
    /// It was killed, or the machine went down under it.
    Crashed,
}

impl State {
    /// How the sandbox in `directory` is now.
    pub fn of(directory: &Path) -> Self {
        let file = directory.join(PID_FILE);
        let recorded = fs::read_to_string(&file).ok().and_then(|text| Pid::from_raw(text.trim().parse().ok()?));
        let since = fs::metadata(&file).and_then(|metadata| metadata.modified()).ok();
        let pid = recorded.filter(|pid| is_ours(*pid, &file)).or_else(|| search(&file));
        match (pid, since) {
            (Some(pid), since) => Self::Running(Process { pid, since }),
            (None, Some(_)) => Self::Crashed,
            (None, None) => Self::Stopped,
        }
    }

    pub const fn process(&self) -> Option<Process> {
        match self {
            Self::Running(process) => Some(*process),
            Self::Stopped | Self::Crashed => None,
        }
    }

    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Running(_) => "running",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
        }
    }
}

impl Process {
    /// Memory of this machine that it holds, in bytes.
    pub fn resident_bytes(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid.as_raw_nonzero())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
    }
}

/// Whether a process is a QEMU that was started with this pid file. One that has ended and waits for its parent has no command line.
fn is_ours(pid: Pid, pid_file: &Path) -> bool {
    fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).is_ok_and(|line| names(&line, pid_file))
}

fn names(command_line: &[u8], pid_file: &Path) -> bool {
    let words: Vec<&[u8]> = command_line.split(|byte| *byte == 0).collect();
    words.windows(2).any(|pair| pair[0] == b"-pidfile" && pair[1] == pid_file.as_os_str().as_bytes())
}

/// Looks through all processes: the pid file may be gone, or never have been written.
fn search(pid_file: &Path) -> Option<Pid> {
    let numbers = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter_map(Pid::from_raw).find(|pid| is_ours(*pid, pid_file))
}

/// Ends the QEMU of the sandbox in `directory`, if there is one, and waits until it is gone.
///
/// # Errors
/// When it cannot be ended: it belongs to somebody else.
pub fn stop(directory: &Path) -> Result<(), Failure> {
    let Some(process) = State::of(directory).process() else { return Ok(()) };
    // The disk is complete even when QEMU is killed; this only is the polite way.
    if Qmp::connect(directory).and_then(Qmp::quit).is_ok() && ends(directory, PATIENCE) {
        return Ok(());
    }
    kill(process.pid, &directory.join(PID_FILE))
        .map_err(|error| Failure::failed(format!("QEMU (process {}) cannot be ended: {error}", process.pid.as_raw_nonzero())))?;
    if ends(directory, PATIENCE) {
        return Ok(());
    }
    Err(Failure::failed(format!("QEMU (process {}) was killed and is still there", process.pid.as_raw_nonzero()))
        .hint("its disk may hang; try again when it answers"))
}

fn ends(directory: &Path, patience: Duration) -> bool {
    let begun = Instant::now();
    while State::of(directory).process().is_some() {
        if begun.elapsed() > patience {
            return false;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    true
}

fn kill(pid: Pid, pid_file: &Path) -> io::Result<()> {
    let handle = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(handle) => handle,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    // Looked at again: from here on the handle means this process and no other.
    if !is_ours(pid, pid_file) {
        return Ok(());
    }
    match pidfd_send_signal(&handle, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process with the command line of a QEMU of this directory.
    fn pretend(directory: &Path) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", "read forever", "qemu", "-pidfile"]).arg(directory.join(PID_FILE)).stdin(Stdio::piped());
        let child = command.spawn().unwrap();
        // Until it is the program, its command line is ours.
        while !is_ours(Pid::from_child(&child), &directory.join(PID_FILE)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    }

    #[test]
    fn a_number_alone_is_no_process() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(State::of(directory.path()), State::Stopped);
        // This test's own process lives, and is no QEMU.
        fs::write(directory.path().join(PID_FILE), format!("{}\n", std::process::id())).unwrap();
        assert_eq!(State::of(directory.path()), State::Crashed);
        fs::write(directory.path().join(PID_FILE), "").unwrap();
        assert_eq!(State::of(directory.path()), State::Crashed);
    }

    #[test]
    fn what_runs_is_found_with_or_without_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = pretend(directory.path());
        let pid = Pid::from_child(&child);
        assert_eq!(State::of(directory.path()).process().map(|process| process.pid), Some(pid));
        fs::write(directory.path().join(PID_FILE), format!("{}\n", pid.as_raw_nonzero())).unwrap();
        let process = State::of(directory.path()).process().unwrap();
        assert!(process.since.is_some() && process.resident_bytes().is_some_and(|bytes| bytes > 0));
        stop(directory.path()).unwrap();
        child.wait().unwrap();
        assert_eq!(State::of(directory.path()), State::Crashed);
        stop(directory.path()).unwrap();
    }

    #[test]
    fn another_sandbox_is_not_this_one() {
        let line = b"qemu-system-x86_64\0-pidfile\0/a/b/qemu.pid\0-m\x002048M\0";
        assert!(names(line, Path::new("/a/b/qemu.pid")));
        assert!(!names(line, Path::new("/a/b/c/qemu.pid")));
        assert!(!names(b"", Path::new("/a/b/qemu.pid")));
    }
}
