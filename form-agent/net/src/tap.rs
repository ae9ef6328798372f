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

const VHOST: &str = "/dev/vhost-net";

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

/// The host's kernel as what moves packets between a tap and a VM (vhost-net), for one interface; opening it has the kernel load its module.
/// `None` when this host does not have it, or does not let us: the VM process moves them itself then.
#[must_use]
pub fn vhost() -> Option<OwnedFd> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(VHOST);
    opened.ok().map(OwnedFd::from)
}

/// What has come and gone through an interface of the host since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub received_bytes: u64,
    pub sent_bytes: u64,
    pub received_packets: u64,
    pub sent_packets: u64,
}

impl Traffic {
    /// Of the tap `name`, as its VM sees it: what the host sent there is what the VM received. `None` when there is no such interface.
    #[must_use]
    pub fn of_vm(name: &str) -> Option<Self> {
        let read = |what: &str| {
            let text = std::fs::read_to_string(format!("/sys/class/net/{name}/statistics/{what}")).ok()?;
            text.trim().parse().ok()
        };
        Some(Self {
            received_bytes: read("tx_bytes")?,
            sent_bytes: read("rx_bytes")?,
            received_packets: read("tx_packets")?,
            sent_packets: read("rx_packets")?,
        })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_has_sent_is_what_its_vm_has_received() {
        assert_eq!(Traffic::of_vm("no such tap"), None);
        // Of the loopback interface all comes back.
        let Some(all) = Traffic::of_vm("lo") else { return };
        assert_eq!((all.received_bytes, all.received_packets), (all.sent_bytes, all.sent_packets));
    }
}
