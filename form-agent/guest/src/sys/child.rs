//! What a new process does to itself between fork and exec.

use std::{io, mem::MaybeUninit, os::unix::process::CommandExt, process::Command};

use rustix::{
    fd::BorrowedFd,
    process::{Gid, Uid},
};

/// How a process is started besides its command, environment, directory and streams.
#[derive(Clone, Debug)]
pub struct Launch {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    /// Standard input is a terminal that becomes the controlling one.
    pub terminal: bool,
}

/// Makes the process a session leader with the given user and groups, and gives it its terminal.
pub fn prepare(command: &mut Command, launch: &Launch) {
    let uid = Uid::from_raw(launch.uid);
    let gid = Gid::from_raw(launch.gid);
    let groups: Vec<Gid> = launch.groups.iter().map(|group| Gid::from_raw(*group)).collect();
    let terminal = launch.terminal;
    // Without the privilege to change it (tests, an agent for one user) only the current user can be asked for.
    let change_user = rustix::process::geteuid().is_root() || uid != rustix::process::geteuid();
    let child_setup = move || {
        default_signals();
        unblock_signals()?;
        rustix::process::setsid()?;
        if terminal {
            // SAFETY: standard input is open: the parent has just made it the terminal.
            rustix::process::ioctl_tiocsctty(unsafe { BorrowedFd::borrow_raw(0) })?;
        }
        if change_user {
            // These change one thread, which after a fork is the whole process.
            rustix::thread::set_thread_groups(&groups)?;
            rustix::thread::set_thread_gid(gid)?;
            rustix::thread::set_thread_uid(uid)?;
        }
        Ok(())
    };
    // SAFETY: the closure runs in the forked child and makes system calls only; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(child_setup) };
}

/// What whoever started this program has it ignore would be ignored by every program from here on (signal(7)): a Ctrl-C would end nothing.
fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: no handler is installed, and the function is async-signal-safe. Those that cannot be changed are the kernel's and the C
        // library's own, which nobody ignores.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// PID 1 keeps signals back for a thread of its own; a program expects to get them.
fn unblock_signals() -> io::Result<()> {
    let mut none = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` initialises the set before it is read, and both functions are async-signal-safe.
    let result = unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Launch {
    pub const fn root() -> Self {
        Self { uid: 0, gid: 0, groups: Vec::new(), terminal: false }
    }
}
