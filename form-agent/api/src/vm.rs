//! Virtual machines as the agent sees them now.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use form_types::{
    Digest, HostId, ImageReference, Name, VmId,
    spec::{Protocol, Restart},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::deploy::DeployRequest;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    pub id: VmId,
    pub name: Name,
    pub host: HostId,
    pub host_name: String,
    pub image: ImageReference,
    pub image_digest: Digest,
    pub state: VmState,
    /// The guest has finished its boot and started its service.
    pub ready: bool,
    pub health: Health,
    pub ipv4: Option<Ipv4Addr>,
    pub ipv6: Option<Ipv6Addr>,
    /// `web.default.form.internal`
    pub dns_name: String,
    pub ports: Vec<PublishedPort>,
    pub vcpus: u32,
    pub memory_mib: u64,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// No HEALTHCHECK, or not running.
    None,
    Starting,
    Healthy,
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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// In the VM.
    pub port: u16,
    pub protocol: Protocol,
    /// On the host; `None` when it is exposed to other VMs only.
    pub host_port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDetail {
    pub vm: Vm,
    /// What was last asked for. Only who may deploy sees it.
    pub desired: DeployRequest,
    /// What the guest found: devices by serial, its addresses, its kernel.
    pub guest: Option<GuestReport>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestReport {
    pub kernel: String,
    pub hostname: String,
    pub addresses: Vec<String>,
    pub devices: Vec<GuestDevice>,
    pub faults: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDevice {
    pub serial: String,
    /// `/dev/vda`
    pub path: String,
    pub size_bytes: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    pub at: Timestamp,
    pub stream: LogStream,
    /// Without its line feed; bytes that are no UTF-8 are replaced.
    pub line: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogStream {
    Stdout,
    Stderr,
    Console,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardQuery {
    /// TCP port on the VM's loopback interface.
    pub port: u16,
}

/// Gives a VM another name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenameRequest {
    pub name: Name,
}

/// Changes a VM without a Formfile; what is left out stays. The next deploy of its Formfile says again what the Formfile says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRequest {
    /// Label to its new value; `null` removes it.
    #[serde(default)]
    pub labels: BTreeMap<String, Option<String>>,
    /// At once, also for the service that runs.
    #[serde(default)]
    pub restart_policy: Option<Restart>,
    /// At the next start.
    #[serde(default)]
    pub vcpus: Option<u32>,
    /// At the next start.
    #[serde(default)]
    pub memory_mib: Option<u64>,
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
        self.labels.is_empty() && self.restart_policy.is_none() && !self.needs_start()
    }
}
