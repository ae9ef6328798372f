//! The JSON messages. A field that is added later has a default, and unknown fields are ignored: hosts and guests of neighbouring
//! versions understand each other.

use std::{collections::BTreeMap, net::IpAddr};

use form_types::{
    settings::{Interface, VolumeMount},
    spec::Restart,
};
use serde::{Deserialize, Serialize};

use super::ExitStatus;

/// The first frame of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Answered with [`Reply::Ready`] when the start has come to an end, well or badly, or after `wait_ms` with what is true by then.
    Ready {
        wait_ms: u64,
    },
    /// Answered with [`Reply::Status`].
    Status,
    /// [`Reply::Status`] now, and again at each change of the phase, the service or its health.
    Watch,
    Logs(LogsRequest),
    Exec(ExecRequest),
    /// Ends the machine. The reply comes before; with `reboot` the VMM sees a reset instead of a power-off.
    Shutdown {
        reboot: bool,
    },
    /// Sets the wall clock: nanoseconds since 1970. The host sends it when it lets a paused machine go on, so it thaws file systems, too.
    SyncTime {
        unix_ns: u64,
    },
    /// Writes everything out, holds all processes and holds back writes to the file systems on disks until `Thaw`, `SyncTime`, `NewIdentity`,
    /// or `limit_ms` are over. Answered with [`Reply::Done`] when the file systems all stand still; refused when one does not, and nothing
    /// does then.
    Freeze {
        limit_ms: u64,
    },
    /// Lets writes go on; fine also when they do.
    Thaw,
    /// To a machine that goes on as a copy of another one, before anything else: what two machines must not share is made anew, and only
    /// then the processes that a `Freeze` holds go on.
    NewIdentity(Box<NewIdentity>),
    /// The machine has another name now: the kernel's, /etc/hostname and /etc/hosts.
    SetName {
        hostname: String,
        hosts: Vec<(IpAddr, Vec<String>)>,
    },
    /// What to do from now on when the service ends.
    SetRestart {
        restart: Restart,
    },
    /// Answered with [`Reply::Metrics`].
    Metrics,
    /// Raw bytes to and from this TCP port on the guest's loopback address.
    Forward {
        port: u16,
    },
    /// Writes a regular file (whole or not at all). `owner`: `USER[:GROUP]`, names or numbers; `None` is root.
    CopyIn {
        path: String,
        mode: u32,
        owner: Option<String>,
    },
    /// Reads a regular file.
    CopyOut {
        path: String,
    },
    /// Takes a tar stream as `Data` frames, as `form-archive` makes it. The top of it becomes `path`, or goes below it when that is a
    /// directory; with `contents` everything goes below the directory `path` under its own name. `owner`: `USER[:GROUP]`, names or
    /// numbers; `None` is root; with `keep_owner` what the stream says.
    Unpack {
        path: String,
        #[serde(default)]
        contents: bool,
        #[serde(default)]
        owner: Option<String>,
        #[serde(default)]
        keep_owner: bool,
    },
    /// Sends a file or a directory as such a stream.
    Pack {
        path: String,
    },
    /// Waits for a volume that was attached while the machine runs, and mounts it; answered with [`Reply::Mounted`].
    Mount(VolumeMount),
    /// Unmounts a volume, so that it can be taken away; [`ErrorKind::InUse`] when something uses it, unless with `force`. One that is not
    /// there or not mounted is fine.
    Unmount {
        serial: String,
        force: bool,
    },
    /// Waits until the volume has this size, and makes its file system as large; answered with [`Reply::Mounted`].
    Grow {
        serial: String,
        size_bytes: u64,
    },
    /// Waits for a network interface that was attached while the machine runs, and sets it up; answered with [`Reply::Interface`]. One
    /// that is set up already gets these addresses instead of those that it has.
    AddInterface(Interface),
    /// Takes a network interface out of use, so that it can be taken away; [`ErrorKind::InUse`] when something uses it, unless with
    /// `force`. One that is not there is fine.
    RemoveInterface {
        mac: String,
        /// As [`Interface::table`].
        #[serde(default)]
        table: Option<u8>,
        #[serde(default)]
        force: bool,
    },
    /// Waits until the machine has so many processors, and switches on those that are off; answered with [`Reply::Done`].
    UseProcessors {
        count: u32,
    },
    /// Answered with [`Reply::Synced`]: see [`super::synced_bytes`].
    Sync {
        token: u64,
    },
    /// Answered with [`Reply::Ssh`], when a server that is about to be started listens.
    Ssh,
}

/// Who a copy is from now on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewIdentity {
    pub hostname: String,
    pub hosts: Vec<(IpAddr, Vec<String>)>,
    /// By name, which stays: what they are from now on.
    pub interfaces: Vec<Interface>,
    pub root_serial: Option<String>,
    /// Random, and nobody else's.
    pub seed: [u8; 32],
    /// Nanoseconds since 1970.
    pub unix_ns: u64,
}

/// Lines from the ring: those from `from_sequence` on that it still has, of these the last `tail`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogsRequest {
    #[serde(default)]
    pub from_sequence: Option<u64>,
    #[serde(default)]
    pub tail: Option<u32>,
    #[serde(default)]
    pub follow: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The program and its arguments; a program without `/` is looked up in the `PATH` of its environment. Empty: the user's login shell.
    pub command: Vec<String>,
    /// Added to the user's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// `USER[:GROUP]`, names or numbers; `None` is root.
    #[serde(default)]
    pub user: Option<String>,
    /// `None`: the user's home, or `/` where there is none.
    #[serde(default)]
    pub workdir: Option<String>,
    /// A terminal of this size; `None`: three pipes.
    #[serde(default)]
    pub tty: Option<TtySize>,
    /// Whether `Stdin` frames will come; otherwise standard input is empty. With a terminal it is always open.
    #[serde(default)]
    pub stdin: bool,
}

/// The size of a terminal; in a `Resize` frame `term` is ignored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TtySize {
    pub rows: u16,
    pub cols: u16,
    /// For the variable `TERM`; `None` is `xterm-256color`.
    #[serde(default)]
    pub term: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Done,
    Ready(ReadyReport),
    Status(StatusReport),
    Metrics(Metrics),
    /// An exec's process runs.
    Started {
        pid: u32,
    },
    /// `forward` is connected; raw bytes follow.
    Connected,
    File(FileInfo),
    /// What a `pack` will send.
    Tree(TreeInfo),
    Mounted(DeviceReport),
    Interface(InterfaceReport),
    Synced {
        token: u64,
    },
    Ssh(SshReport),
}

/// Why a request was not done. `message` says what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    pub kind: ErrorKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request could not be read, or a value in it is out of range.
    Invalid,
    /// A user, file, port or device that does not exist.
    NotFound,
    /// This guest or this transport cannot do it.
    Unsupported,
    /// Too many connections, or the machine is going down.
    Busy,
    /// The attempt failed.
    Failed,
    /// Something in the machine uses it.
    InUse,
    /// The machine's file system is full.
    NoRoom,
}

/// How far the start has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Starting,
    /// Every step of the start is done, and the service was started or the image's init has finished its own start.
    Ready,
    /// A step without which the machine is not what was asked for has failed: see the faults.
    Failed,
    Stopping,
}

/// Something that went wrong, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The step: `modules`, `root`, `network`, `users`, `files`, `volumes`, `service`, …
    pub step: String,
    pub message: String,
    /// The machine is not what was asked for; otherwise a warning.
    pub fatal: bool,
}

/// A block device that the settings name by its serial, and where it really is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    pub serial: String,
    /// `/dev/vda`.
    pub path: String,
    pub size_bytes: u64,
    /// Where it is mounted.
    pub mounted: Option<String>,
}

/// A network interface as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceReport {
    /// `52:0a:…`: it is found by this.
    pub mac: String,
    /// `eth1`
    pub name: String,
    /// `ADDRESS/PREFIX`
    pub addresses: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyReport {
    pub protocol: u32,
    /// The version of `form-guest`.
    pub version: String,
    pub phase: Phase,
    /// The kernel's random identity of this boot.
    pub boot_id: String,
    pub kernel: String,
    pub hostname: String,
    pub devices: Vec<DeviceReport>,
    /// `ADDRESS/PREFIX` by interface, as the kernel has them.
    pub addresses: BTreeMap<String, Vec<String>>,
    /// `None`: the image's own init runs, or there is nothing to run.
    pub service: Option<ServiceStatus>,
    pub health: HealthState,
    pub faults: Vec<Fault>,
    /// From the kernel's start to the phase above being reached.
    pub boot_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServicePhase {
    /// Not started yet.
    Waiting,
    Running,
    /// It ended and will be started again.
    Restarting,
    /// It ended for good; the machine goes down.
    Ended,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    pub phase: ServicePhase,
    pub pid: Option<u32>,
    /// Of the last process that ended.
    pub last_exit: Option<ExitStatus>,
    /// How often it was started again since the boot.
    pub restarts: u32,
    /// Milliseconds since 1970 of the last start.
    pub started_ms: Option<u64>,
}

/// What the HEALTHCHECK says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HealthState {
    /// There is no healthcheck.
    None,
    Starting,
    Healthy,
    Unhealthy,
}

/// Milliseconds since the kernel started.
pub type Uptime = u64;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    pub protocol: u32,
    pub phase: Phase,
    pub service: Option<ServiceStatus>,
    pub health: HealthState,
    /// What the last probe said when it failed.
    pub health_message: Option<String>,
    pub uptime_ms: Uptime,
    pub memory_total_bytes: u64,
    /// Without caches the kernel would give back.
    pub memory_used_bytes: u64,
    /// Over 1, 5 and 15 minutes, in hundredths.
    pub load_hundredths: [u32; 3],
    /// The sequence the next line of the log will get.
    pub next_log_sequence: u64,
}

/// Counters since the boot; differences are the reader's business.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    pub uptime_ms: Uptime,
    pub cpus: u32,
    /// Time of all CPUs not spent idle or waiting for disks.
    pub cpu_busy_ms: u64,
    /// Time that the host gave to others.
    pub cpu_steal_ms: u64,
    pub memory_total_bytes: u64,
    pub memory_available_bytes: u64,
    pub root_total_bytes: u64,
    pub root_available_bytes: u64,
    pub network_received_bytes: u64,
    pub network_sent_bytes: u64,
    pub disk_read_bytes: u64,
    pub disk_written_bytes: u64,
    pub processes: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    pub size_bytes: u64,
    pub mode: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeInfo {
    pub is_directory: bool,
    /// Content of all files in it, in bytes; `None` when that is not known soon.
    pub bytes: Option<u64>,
}

/// What there is to connect to over SSH.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshReport {
    pub server: SshServer,
    /// Whether anything listens on port 22.
    pub listening: bool,
    /// Public host keys as in known_hosts: algorithm and key.
    pub host_keys: Vec<String>,
    /// Users of the image that have a shell.
    pub accounts: Vec<String>,
}

/// Whose the SSH server of a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum SshServer {
    /// That of `form-guest`.
    Ours,
    /// The image's own; whether it runs is the image's matter.
    Image { path: String },
    /// None: no user of the settings could log in.
    None,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_a_stable_json_form() {
        let cases = [
            (Request::Status, r#"{"request":"status"}"#),
            (Request::Ready { wait_ms: 5 }, r#"{"request":"ready","wait_ms":5}"#),
            (Request::Logs(LogsRequest::default()), r#"{"request":"logs","from_sequence":null,"tail":null,"follow":false}"#),
            (Request::Freeze { limit_ms: 9 }, r#"{"request":"freeze","limit_ms":9}"#),
            (Request::Thaw, r#"{"request":"thaw"}"#),
            (Request::UseProcessors { count: 4 }, r#"{"request":"use_processors","count":4}"#),
            (
                Request::RemoveInterface { mac: "52:54:00:00:00:01".into(), table: Some(101), force: true },
                r#"{"request":"remove_interface","mac":"52:54:00:00:00:01","table":101,"force":true}"#,
            ),
            (Request::Ssh, r#"{"request":"ssh"}"#),
            (Request::Shutdown { reboot: false }, r#"{"request":"shutdown","reboot":false}"#),
        ];
        for (request, text) in cases {
            assert_eq!(serde_json::to_string(&request).expect("has a JSON form"), text);
            assert_eq!(serde_json::from_str::<Request>(text).expect("reads back"), request);
        }
    }

    #[test]
    fn short_requests_take_defaults_and_new_fields_are_ignored() {
        let text = r#"{"request":"exec","command":["id"],"colour":"blue"}"#;
        let Request::Exec(exec) = serde_json::from_str(text).expect("valid") else { panic!("not an exec") };
        assert_eq!(exec, ExecRequest { command: vec!["id".into()], ..ExecRequest::default() });
    }

    #[test]
    fn exit_statuses_in_json() {
        assert_eq!(serde_json::to_string(&ExitStatus::Signal(9)).expect("has a JSON form"), r#"{"signal":9}"#);
    }
}
