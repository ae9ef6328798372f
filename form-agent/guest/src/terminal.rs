//! Terminals for commands that are started from outside.

use std::{io, os::unix::fs::fchown};

use rustix::{
    fd::OwnedFd,
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

/// The group id that Unix systems give to terminals (Debian's base-passwd; devpts is mounted with it).
const TTY_GROUP: u32 = 5;

/// Both ends of a new terminal.
pub struct Terminal {
    pub ours: OwnedFd,
    /// Standard input, output and error of the command.
    pub theirs: OwnedFd,
}

/// A terminal for the user with this number.
///
/// # Errors
/// When the machine has none to give.
pub fn open(uid: u32, size: Winsize) -> io::Result<Terminal> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    unlockpt(&ours)?;
    let theirs = ioctl_tiocgptpeer(&ours, flags)?;
    // As login does, so that programs which open the terminal again by its name may. Without root it is ours and stays so.
    let _ = fchown(&theirs, Some(uid), Some(TTY_GROUP));
    tcsetwinsize(&ours, size)?;
    Ok(Terminal { ours, theirs })
}
