//! The few system calls that have no safe wrapper. All `unsafe` of this crate is below this module.

mod child;
mod signals;
mod vsock;

use std::{fs::File, io};

use rustix::fd::{AsRawFd, OwnedFd};
use tokio::io::unix::AsyncFd;

pub use child::{Launch, prepare};
pub use signals::{Signals, block_signals};
pub use vsock::VsockListener;

/// Grows a mounted ext4 to this many blocks (`EXT4_IOC_RESIZE_FS`, ext4(5) and the kernel's `fs/ext4/ext4.h`).
pub fn ext4_resize(mount_point: &File, blocks: u64) -> rustix::io::Result<()> {
    const RESIZE: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<u64>(b'f', 16);
    // SAFETY: the opcode is `_IOW('f', 16, __u64)`, and `u64` is the type it reads.
    unsafe { rustix::ioctl::ioctl(mount_point, rustix::ioctl::Setter::<RESIZE, u64>::new(blocks)) }
}

/// Holds back writes to a mounted file system, after everything is written out (`FIFREEZE`, the kernel's `include/uapi/linux/fs.h`).
pub fn freeze(mount_point: &File) -> rustix::io::Result<()> {
    const FREEZE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<i32>(b'X', 119);
    // SAFETY: `_IOWR('X', 119, int)` is declared with an argument that the kernel never reads or writes.
    unsafe { rustix::ioctl::ioctl(mount_point, rustix::ioctl::NoArg::<FREEZE>::new()) }
}

/// Lets writes go on (`FITHAW`).
pub fn thaw(mount_point: &File) -> rustix::io::Result<()> {
    const THAW: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<i32>(b'X', 120);
    // SAFETY: `_IOWR('X', 120, int)` is declared with an argument that the kernel never reads or writes.
    unsafe { rustix::ioctl::ioctl(mount_point, rustix::ioctl::NoArg::<THAW>::new()) }
}

/// Adds entropy that counts in full to the kernel's random number generator and has it draw new keys from that at once
/// (`RNDADDENTROPY` and `RNDRESEEDCRNG`, random(4)).
pub fn reseed(random: &File, seed: &[u8; 32]) -> rustix::io::Result<()> {
    /// `struct rand_pool_info` with its bytes.
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: i32,
        buffer_bytes: i32,
        buffer: [u8; 32],
    }
    const ADD: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<[i32; 2]>(b'R', 3);
    const RESEED: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(b'R', 7);
    let info = PoolInfo { entropy_bits: 256, buffer_bytes: 32, buffer: *seed };
    // SAFETY: `_IOW('R', 0x03, int [2])` reads a `struct rand_pool_info` of which `buffer_bytes` says how long its buffer is: `info` is one.
    unsafe { rustix::ioctl::ioctl(random, rustix::ioctl::Setter::<ADD, PoolInfo>::new(info)) }?;
    // SAFETY: `_IO('R', 0x07)` has no argument.
    unsafe { rustix::ioctl::ioctl(random, rustix::ioctl::NoArg::<RESEED>::new()) }
}

/// A file that tasks wait for.
pub fn watched(file: File) -> io::Result<AsyncFd<File>> {
    // SAFETY: a `File` owns its descriptor and gives the same one for as long as it lives, and it is dropped with the `AsyncFd`.
    unsafe { AsyncFd::register(file) }.map_err(io::Error::from)
}

/// Joins a multicast group of a netlink socket (`NETLINK_ADD_MEMBERSHIP`, netlink(7)).
pub fn netlink_add_membership(socket: &OwnedFd, group: u32) -> io::Result<()> {
    let length = std::mem::size_of::<u32>() as libc::socklen_t;
    // SAFETY: the option's value is one `u32`, which `group` is, and the descriptor is open.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, (&raw const group).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
