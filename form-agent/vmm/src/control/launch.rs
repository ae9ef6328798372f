//! Starting a VM process: the listening socket is made here and inherited by it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// Makes the control socket at `path`, which must not exist. Its permissions follow the umask.
///
/// # Errors
/// When the path is taken or too long (107 bytes).
pub fn listen(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A command that starts `program` (the `form-vmm` binary) as a VM process that serves `listener`. It gets no standard input, no
/// environment, and `/` as its directory; the caller adds what else it wants. `listener` must stay open until the command is spawned
/// and can be closed then.
#[must_use]
pub fn command(program: &Path, listener: &OwnedFd) -> Command {
    let mut command = Command::new(program);
    let fd = listener.as_raw_fd();
    command.arg("--control-fd").arg(fd.to_string()).env_clear().current_dir("/").stdin(Stdio::null());
    // SAFETY: between fork and exec only `fcntl` is called, which is async-signal-safe; the descriptor is open there because the
    // child has a copy of it.
    unsafe {
        command.pre_exec(move || {
            let listener = std::os::fd::BorrowedFd::borrow_raw(fd);
            rustix::io::fcntl_setfd(listener.as_fd(), FdFlags::empty())?;
            Ok(())
        });
    }
    command
}
