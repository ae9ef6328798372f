//! Starting a VM process: the listening socket is made here and inherited by it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

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

/// A command that starts `program` (the `form-vmm` binary) as a VM process that serves `listener`, which becomes its standard input. It
/// gets no environment, `/` as its directory and a process group of its own, for signals of the caller's terminal are not for it; the
/// caller adds what else it wants.
#[must_use]
pub fn command(program: &Path, listener: OwnedFd) -> Command {
    let mut command = Command::new(program);
    command.args(["--control-fd", "0"]).env_clear().current_dir("/").stdin(Stdio::from(listener)).process_group(0);
    command
}
