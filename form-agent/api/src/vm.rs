//! Virtual machines as the agent sees them now.

use std::{
    collections::BTreeMap,
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use form_types::{
    Digest, HostId, ImageReference, Name, VmId, VmLimits,
    limits::given,
    spec::{Protocol, Restart},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::{deploy::DeployRequest, interface::Interface};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    pub id: VmId,
    pub name: Name,
    pub host: HostId,
    pub host_name: String,
    /// None of a VM that runs a kernel of its own.
    pub image: Option<ImageReference>,
    pub image_digest: Option<Digest>,
    pub state: VmState,
    /// The guest has finished its boot and started its service. Never known of a VM that runs a kernel of its own.
    pub ready: bool,
    pub health: Health,
    #[schema(value_type = Option<String>, format = Ipv4, example = "10.83.7.12")]
    pub ipv4: Option<Ipv4Addr>,
    #[schema(value_type = Option<String>, format = Ipv6, example = "fd5e:1c2a:77b0::5f0c:1de2")]
    pub ipv6: Option<Ipv6Addr>,
    /// `web.default.form.internal`
    pub dns_name: String,
    pub ports: Vec<PublishedPort>,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// Of the root disk; 0 when there is none.
    pub disk_gib: u64,
    pub labels: BTreeMap<String, String>,
    pub created_at: Timestamp,
    /// Of the present run.
    pub started_at: Option<Timestamp>,
    /// How often it was started again without being asked to.
    pub restarts: u32,
    /// Why it is not as it should be.
    pub fault: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// Wanted, nothing made yet.
    Pending,
    Starting,
    Running,
    /// Stands still, with its memory as it was; nothing in it runs until it is resumed.
    Paused,
    Stopping,
    /// As asked, or because its service has ended and its restart policy lets it rest.
    Stopped,
    /// It does not run although it should; `fault` says why.
    Failed,
}

impl VmState {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// No HEALTHCHECK, or not running.
    None,
    Starting,
    Healthy,
    /// Its HEALTHCHECK fails, or its guest does not answer any more.
    Unhealthy,
}

impl Health {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PublishedPort {
    /// In the VM.
    pub port: u16,
    pub protocol: Protocol,
    /// On the host; `None` when it is exposed to other VMs only.
    pub host_port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDetail {
    pub vm: Vm,
    /// What was last asked for. Only who may deploy sees it.
    pub desired: DeployRequest,
    /// What it may do in a second (`form vm set`).
    #[serde(default)]
    pub limits: VmLimits,
    /// What its guest has of memory, in MiB, as long as that is not what it should have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_present_mib: Option<u64>,
    /// Its network interfaces, the first one first. Empty from an earlier release.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    /// What the guest found: devices by serial, its addresses, its kernel.
    pub guest: Option<GuestReport>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestReport {
    pub kernel: String,
    pub hostname: String,
    pub addresses: Vec<String>,
    pub devices: Vec<GuestDevice>,
    pub faults: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GuestDevice {
    pub serial: String,
    /// `/dev/vda`
    pub path: String,
    pub size_bytes: u64,
    /// When the guest last said so.
    #[serde(default)]
    pub reported_at: Option<Timestamp>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct LogsQuery {
    #[serde(default)]
    pub follow: bool,
    /// The last so many lines; all without it.
    pub tail: Option<usize>,
    /// Lines from this instant on.
    pub since: Option<Timestamp>,
    /// The serial console instead of the service's output.
    #[serde(default)]
    pub console: bool,
    /// Only what comes after the line with this cursor. When that line is no longer kept: everything that is.
    pub after: Option<LogCursor>,
}

/// Response header of a log: the cursor of the last line that comes before the first of the answer. A follower whose connection breaks
/// before it has got a line goes on from there. Absent when there is no such line.
pub const LOG_CURSOR_HEADER: &str = "form-log-cursor";

/// A line's place in its VM's log, for going on after it. Written `RUN.NUMBER`: nanoseconds since the Unix epoch, and the line's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogCursor {
    /// When the VM's run began that the line is of.
    pub run: Timestamp,
    /// The line's number in that run.
    pub sequence: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a log's cursor is a run and a line's number, as in 1767225600000000000.42")]
pub struct LogCursorError;

impl fmt::Display for LogCursor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.run.as_nanosecond(), self.sequence)
    }
}

impl FromStr for LogCursor {
    type Err = LogCursorError;

    fn from_str(text: &str) -> Result<Self, LogCursorError> {
        let (run, sequence) = text.split_once('.').ok_or(LogCursorError)?;
        let run = run.parse().ok().and_then(|nanoseconds| Timestamp::from_nanosecond(nanoseconds).ok()).ok_or(LogCursorError)?;
        Ok(Self { run, sequence: sequence.parse().map_err(|_| LogCursorError)? })
    }
}

impl TryFrom<String> for LogCursor {
    type Error = LogCursorError;

    fn try_from(text: String) -> Result<Self, LogCursorError> {
        text.parse()
    }
}

form_types::text_schema!(
    LogCursor,
    "^-?[0-9]{1,18}\\.[0-9]{1,19}$",
    "1767225600000000000.42",
    "A line's place in its VM's log: when the run began that it is of (nanoseconds since the Unix epoch), and the line's number there."
);

impl From<LogCursor> for String {
    fn from(cursor: LogCursor) -> Self {
        cursor.to_string()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogLine {
    pub at: Timestamp,
    pub stream: LogStream,
    /// Without its line feed; bytes that are no UTF-8 are replaced.
    pub line: String,
    /// `None` for the console, which is no log.
    #[serde(default)]
    pub cursor: Option<LogCursor>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LogStream {
    Stdout,
    Stderr,
    Console,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ForwardQuery {
    /// TCP port on the VM's loopback interface.
    pub port: u16,
}

/// What somebody has to know who wants to log in to a VM over SSH.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshAccess {
    pub vm: VmId,
    /// `web.default.form.internal`
    pub dns_name: String,
    pub server: SshServer,
    /// The path of the image's own server, when it has one.
    #[serde(default)]
    pub program: Option<String>,
    /// Whether anything in the VM listens on port 22.
    pub listening: bool,
    /// The VM's public host keys, as the guest itself says: algorithm and key, as in known_hosts.
    pub host_keys: Vec<String>,
    /// The users of the Formfile.
    pub users: Vec<SshUser>,
    /// Users of the guest that have a shell, those of the image and of the Formfile.
    pub accounts: Vec<String>,
    /// Whether root may log in (`disable_root` of the Formfile).
    pub root_login: bool,
}

/// Whose the SSH server of a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SshServer {
    /// The one that Formation brings for images that have none.
    Formation,
    /// The image's own.
    Image,
    /// None: no user of the Formfile has a key or a password to log in with.
    None,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshUser {
    pub name: String,
    /// It has authorised keys.
    pub key: bool,
    /// It may log in with its password.
    pub password: bool,
}

/// Gives a VM another name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenameRequest {
    pub name: Name,
}

/// Changes a VM without a Formfile; what is left out stays. The next deploy of its Formfile says again what the Formfile says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRequest {
    /// Label to its new value; `null` removes it.
    #[serde(default)]
    pub labels: BTreeMap<String, Option<String>>,
    /// At once, also for the service that runs.
    #[serde(default)]
    pub restart_policy: Option<Restart>,
    /// At once in a VM that runs, up to twice those that it started with, and to four at least; else at the next start.
    #[serde(default)]
    pub vcpus: Option<u32>,
    /// At once where the guest can, which is in steps of 128 MiB above what it was started with; else at the next start.
    #[serde(default)]
    pub memory_mib: Option<u64>,
    /// Operations a second of its root disk, reads and writes together; `null` ends the limit. At once, as the other limits, and no
    /// deploy changes them.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 1, maximum = 1_000_000_000)]
    pub disk_iops: Option<Option<u64>>,
    /// Of its root disk, read and written together; `null` ends the limit.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 1024, maximum = 1_099_511_627_776_i64)]
    pub disk_bytes_per_second: Option<Option<u64>>,
    /// Of each of its network interfaces, each way; `null` ends the limit.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>, minimum = 1024, maximum = 1_099_511_627_776_i64)]
    pub net_bytes_per_second: Option<Option<u64>>,
    /// Restart a running VM when a change needs it; without it such a change is a conflict.
    #[serde(default)]
    pub restart: bool,
}

impl SetRequest {
    /// Whether it asks for something that only a start brings.
    pub const fn needs_start(&self) -> bool {
        self.vcpus.is_some() || self.memory_mib.is_some()
    }

    pub fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.restart_policy.is_none() && !self.needs_start() && !self.limits()
    }

    /// Whether it says something of what the VM may do in a second.
    pub const fn limits(&self) -> bool {
        self.disk_iops.is_some() || self.disk_bytes_per_second.is_some() || self.net_bytes_per_second.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_survives_its_text() {
        let cursor = LogCursor { run: Timestamp::from_nanosecond(1_767_225_600_000_000_042).unwrap(), sequence: 7 };
        assert_eq!(cursor.to_string(), "1767225600000000042.7");
        assert_eq!(cursor.to_string().parse(), Ok(cursor));
        for bad in ["", "7", "7.", ".7", "x.7", "7.x", "7.-1", "99999999999999999999999999.1"] {
            assert_eq!(bad.parse::<LogCursor>(), Err(LogCursorError), "{bad}");
        }
    }
}
