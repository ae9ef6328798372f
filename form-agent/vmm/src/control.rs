//! The words between the daemon and a VM process: one JSON message a datagram on a `SOCK_SEQPACKET` Unix socket, each with
//! at most 253 descriptors (`SCM_RIGHTS`). The daemon binds the socket and passes its listening end to the process, so a
//! daemon that restarts connects to the same path again and finds the VM as it is.

pub mod channel;
mod client;
pub mod launch;

pub use client::{Aside, Client, ClientError};

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use crate::config::{DiskConfig, DiskLimits, Fd, NetworkConfig, RestoreConfig, VmConfig};
use crate::memory::image::SaveId;

/// The longest message, in bytes.
pub const MAX_MESSAGE: usize = 256 * 1024;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum ControlRequest {
    /// The first message of a VM's life, with all descriptors. A second one is an error.
    Boot {
        config: Box<VmConfig>,
    },
    /// Instead of `Boot`: goes on with a VM that `Save` wrote.
    Restore {
        config: Box<RestoreConfig>,
    },
    Status,
    /// Writes the paused VM to two passed files, opened for writing: its state, and its memory as a sparse file. Both are whole and on
    /// stable storage when the reply comes; the VM stays paused.
    /// With either of `how` the reply is `Saved`, else `Done`, which is all that earlier releases say.
    Save {
        state: Fd,
        memory: Fd,
        #[serde(flatten)]
        how: SaveHow,
    },
    /// As `Save`, but the memory is written later: when the reply comes only the state is whole, and the VM may go on. How
    /// the memory ended is written to the pipe `whole`: `errno` in four bytes, little-endian, 0 when it is whole. Nothing is written when
    /// the VM process ended first. With either of `how` eight bytes follow: how many bytes of pages were written.
    SaveAside {
        state: Fd,
        memory: Fd,
        whole: Fd,
        #[serde(flatten)]
        how: SaveHow,
    },
    /// Copies the memory of the running VM to a passed file, so that little is left for a save with `onto` that is given the same file next. What changes
    /// meanwhile is known: asked again, with `onto`, only that is written. With `onto` at first, too, the file holds a copy of an
    /// earlier save's. How it ended is written to the pipe `whole`, as for `SaveAside`, with the bytes of pages. The reply is `Saved`. All of that is
    /// over when the connection is closed.
    Precopy {
        memory: Fd,
        whole: Fd,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        onto: bool,
    },
    /// The saves that the next one can build upon.
    Saves,
    /// All vCPUs and devices stop at a consistent point.
    Pause,
    Resume,
    /// The ACPI power button: asks the guest's operating system to power off.
    PowerButton,
    /// Ends the VM at once, as pulling the plug does.
    Stop,
    /// Connects to `port` of the guest over vsock. The reply carries one connected stream socket; refused while nothing listens there.
    VsockConnect {
        port: u32,
    },
    /// The serial console: the reply carries one stream socket; what is written to it is typed, what the guest prints is read.
    Console,
    /// Asks the balloon to take `mib` from the guest.
    Balloon {
        mib: u64,
    },
    Metrics,
    /// The guest of the running VM should have `mib` of memory in all. It is told, and takes or gives as it can; `Metrics` say how far it is.
    Memory {
        mib: u64,
    },
    /// How many vCPUs the guest has, and how many it can have.
    Vcpus,
    /// Gives the running guest vCPUs until it has `count`, and tells it. Any that it was asked for are its own again.
    PlugVcpus {
        count: u8,
    },
    /// Asks the running guest for vCPUs until it has `count`. What is written to `gone` is nothing: it is closed when the guest has no more
    /// than that.
    UnplugVcpus {
        count: u8,
        gone: Fd,
    },
    /// Puts a disk into the running VM and tells its guest.
    Plug {
        disk: Box<DiskConfig>,
    },
    /// Puts a network interface into the running VM and tells its guest.
    PlugNetwork {
        network: Box<NetworkConfig>,
    },
    /// Asks the guest for the disk or network interface `id`. What is written to `gone` is nothing: it is closed when the guest has let the device go and
    /// its files are closed. Asking again is fine.
    Unplug {
        id: String,
        gone: Fd,
    },
    /// Makes the disk `id` larger, and tells the guest of the running VM.
    Grow {
        id: String,
        size_bytes: u64,
    },
    /// The disk `id` has these limits from now on, and no others.
    LimitDisk {
        id: String,
        limits: DiskLimits,
    },
    /// The network interface `id` may move this many bytes in a second from now on, each way.
    LimitNetwork {
        id: String,
        bytes_per_second: Option<NonZeroU64>,
    },
}

/// What a save builds upon, and what may build upon it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveHow {
    /// The file for the memory holds a copy of an earlier save's: if the VM process knows what has changed since, it writes only that.
    /// Otherwise all of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub onto: bool,
    /// From now on the VM process notes what changes, so that a later save can build upon this one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub track: bool,
}

impl SaveHow {
    #[must_use]
    pub const fn is_any(self) -> bool {
        self.onto || self.track
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum ControlReply {
    Done,
    Status {
        state: VmState,
        pid: u32,
    },
    Metrics(Box<Metrics>),
    Vcpus {
        count: u8,
        most: u8,
    },
    /// How a VM was saved. `written_bytes` are those of pages; none while a copy of the process writes them.
    Saved {
        incremental: bool,
        written_bytes: Option<u64>,
    },
    /// The latest last.
    Saves {
        ids: Vec<SaveId>,
    },
    Error {
        kind: ErrorKind,
        message: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// Not allowed in the VM's present state.
    WrongState,
    /// Malformed, or a value out of range.
    Invalid,
    /// There is no such device.
    NotFound,
    /// Nothing listens on that vsock port (yet).
    Refused,
    /// KVM or the operating system said no.
    System,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Waiting for `Boot`.
    Empty,
    Running,
    Paused,
    /// The exit record is written; the process is about to leave.
    Exited,
}

/// How a VM process ended, as JSON in the exit record. An empty record means that the process was killed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    pub reason: ExitReason,
    pub message: Option<String>,
    /// Seconds since the Unix epoch.
    pub at: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (ACPI reset register, i8042, triple fault). The daemon starts it again.
    Reset,
    /// `ControlRequest::Stop`.
    Stopped,
    /// The VMM met an error it could not go on after.
    Failed,
    /// The VMM panicked.
    Panicked,
}

/// Counters since boot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    pub uptime_ms: u64,
    pub vcpu_exits: u64,
    pub disks: Vec<DiskMetrics>,
    pub networks: Vec<NetworkMetrics>,
    /// What the balloon holds now, in MiB.
    pub balloon_mib: u64,
    /// `None` from a VM process that knows no memory but that it booted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryMetrics>,
}

/// Memory of the guest, in MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMetrics {
    /// What it booted with, which it keeps.
    pub booted_mib: u64,
    /// More comes and goes in steps of so much.
    pub step_mib: u64,
    /// The most that it can have while it runs.
    pub most_mib: u64,
    /// What it should have.
    pub wanted_mib: u64,
    /// What it has.
    pub present_mib: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMetrics {
    pub id: String,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub errors: u64,
    /// Reads that have to wait and flushes are left to the kernel (io_uring) while the disk goes on; an earlier VM process does not say.
    #[serde(default)]
    pub io_uring: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkMetrics {
    pub id: String,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    pub received_packets: u64,
    pub sent_packets: u64,
    pub dropped: u64,
    /// Whether the host's kernel moves its packets now (vhost-net), none of which are counted here; the tap counts all. `None` when it never could.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_net: Option<bool>,
}
