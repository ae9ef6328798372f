//! The host's end: a tap that the daemon opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

/// The length of `struct virtio_net_hdr_v1`, the header before every packet (section 5.1.6).
pub const HEADER: usize = 12;

// Numbers of the tap's ioctls, from linux/if_tun.h: _IOW('T', nr, int) and _IOR('T', nr, unsigned int).
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
const TUN_F_TSO6: libc::c_uint = 4;
const TUN_F_TSO_ECN: libc::c_uint = 8;

/// What the guest can take: the tap then need not cut or check it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    pub checksum: bool,
    pub tso4: bool,
    pub tso6: bool,
    pub ecn: bool,
}

/// A tap, not blocking.
pub struct Tap {
    fd: OwnedFd,
    /// A socket in the place of a tap: it has no offloads to set.
    #[cfg(any(feature = "fuzzing", test))]
    socket: bool,
}

impl Tap {
    /// # Errors
    /// When `fd` is no tap with packet headers, or its settings cannot be changed.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: all zeros is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes one ifreq, which `request` is, and it outlives the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF as _, &raw mut request) })?;
        // SAFETY: TUNGETIFF has just written the flags, and any bits are a valid short.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & needed != needed {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the descriptor is a tun device without IFF_TAP, IFF_NO_PI and IFF_VNET_HDR: open the tap with these flags",
            ));
        }
        let length = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which `length` is.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const length) })?;
        // SAFETY: F_GETFL and F_SETFL take no pointers.
        let status = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
        // SAFETY: as above.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, status | libc::O_NONBLOCK) })?;
        Ok(Self {
            fd,
            #[cfg(any(feature = "fuzzing", test))]
            socket: false,
        })
    }

    /// A datagram socket that does not block in the place of a tap: each datagram is a packet with its header.
    #[cfg(any(feature = "fuzzing", test))]
    pub fn over_socket(fd: OwnedFd) -> Self {
        Self { fd, socket: true }
    }

    /// # Errors
    /// Those of the ioctl.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        #[cfg(any(feature = "fuzzing", test))]
        if self.socket {
            return Ok(());
        }
        let mut flags = 0;
        if offloads.checksum {
            flags |= TUN_F_CSUM;
            for (wanted, flag) in [(offloads.tso4, TUN_F_TSO4), (offloads.tso6, TUN_F_TSO6)] {
                if wanted {
                    flags |= flag;
                }
            }
            if offloads.ecn && flags & (TUN_F_TSO4 | TUN_F_TSO6) != 0 {
                flags |= TUN_F_TSO_ECN;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes a number, no pointer.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD as _, libc::c_ulong::from(flags)) }).map(|_| ())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
