//! The one ioctl that makes a tap.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsRawFd, OwnedFd},
    os::unix::fs::OpenOptionsExt,
};

use crate::{
    error::{NetError, Result},
    link,
};

/// A name and flags, as the tun driver reads them (`struct ifreq`, linux/if.h).
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    padding: [u8; 22],
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

/// A new tap: Ethernet frames, each behind a virtio-net header. It is not persistent: it goes with the last copy of its
/// descriptor, so a VM process that dies leaves none behind.
///
/// # Errors
/// [`NetError::Tun`] without the driver or the right to use it, [`NetError::TapTaken`] when somebody holds one of that name.
pub fn open(name: &str) -> Result<OwnedFd> {
    open_with(name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL)
}

/// Switches the interface `name` on, without addresses of ours. Gives its index.
///
/// # Errors
/// When there is none, or the kernel refuses.
pub async fn up(name: &str) -> Result<u32> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetError::Socket)?;
    let connection = tokio::spawn(connection);
    let done = link::up(&handle, name).await;
    connection.abort();
    done
}

fn open_with(name: &str, flags: libc::c_int) -> Result<OwnedFd> {
    let fault = |source| NetError::Tap { name: name.to_owned(), source };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(fault(io::ErrorKind::InvalidInput.into()));
    }
    let flags = libc::c_short::from_ne_bytes([flags.to_ne_bytes()[0], flags.to_ne_bytes()[1]]);
    let mut request = Request { name: [0; libc::IFNAMSIZ], flags, padding: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let tun: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(NetError::Tun)?;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq` behind its argument. `Request` has that structure's size (asserted
    // above) and the layout of the members this command uses, is exclusively borrowed, and lives until the call returns.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    if result == 0 {
        return Ok(tun.into());
    }
    let source = io::Error::last_os_error();
    match source.raw_os_error() {
        Some(libc::EBUSY) => Err(NetError::TapTaken { name: name.to_owned() }),
        Some(libc::EPERM) => Err(NetError::Tun(source)),
        _ => Err(fault(source)),
    }
}
