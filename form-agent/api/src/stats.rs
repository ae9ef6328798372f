//! What VMs use: counters since their start, and how fast they grow.

use form_types::{Name, VmId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::vm::VmState;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct StatsQuery {
    /// Look twice, so many milliseconds apart, and say what happened per second; without it there are counters only.
    #[param(minimum = 1, maximum = 10_000)]
    pub interval_ms: Option<u64>,
}

/// The longest interval of one request, in milliseconds.
pub const MAX_INTERVAL_MS: u64 = 10_000;

/// One VM. Of one that does not run everything is zero or unknown. Percentages and rates are of the interval that was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmStats {
    pub id: VmId,
    pub name: Name,
    pub state: VmState,
    pub at: Timestamp,
    pub vcpus: u32,
    /// Of the present run.
    pub uptime_ms: u64,
    /// Processor time that the VM has taken from its host.
    pub cpu_ms: u64,
    /// 100 is one processor of the host.
    pub cpu_percent: Option<f64>,
    /// What the VM was given.
    pub memory_bytes: u64,
    /// As its guest has it: without caches that it would give back. Unknown while the guest does not answer.
    pub memory_used_bytes: Option<u64>,
    pub memory_percent: Option<f64>,
    /// What it takes of the host's memory now.
    pub resident_bytes: u64,
    /// How often its processors left the guest for the VM process.
    pub exits: u64,
    pub exits_per_second: Option<f64>,
    /// Started again without being asked to.
    pub restarts: u32,
    pub disks: Vec<DiskStats>,
    pub networks: Vec<NetworkStats>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskStats {
    pub id: String,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub errors: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// Whether reads that have to wait and flushes are left to the host's kernel (io_uring), so that other requests go on meanwhile.
    #[serde(default)]
    pub io_uring: bool,
    pub per_second: Option<DiskRates>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskRates {
    pub reads: f64,
    pub writes: f64,
    pub read_bytes: f64,
    pub written_bytes: f64,
}

/// Who moves the packets of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkBackend {
    /// The host's kernel (vhost-net).
    VhostNet,
    /// The VM process: the host does not have vhost-net, or the interface has a limit, or the VM got memory while it ran, or its driver does not
    /// negotiate what vhost-net needs.
    FormVmm,
}

impl NetworkBackend {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::VhostNet => "vhost-net",
            Self::FormVmm => "form-vmm",
        }
    }
}

/// As the guest sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NetworkStats {
    pub id: String,
    /// None from an agent of an earlier release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<NetworkBackend>,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    pub received_packets: u64,
    pub sent_packets: u64,
    pub dropped_packets: u64,
    pub per_second: Option<NetworkRates>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NetworkRates {
    pub received_bytes: f64,
    pub sent_bytes: f64,
    pub received_packets: f64,
    pub sent_packets: f64,
}

/// How the parts of an agent are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HealthReport {
    /// Every part is.
    pub healthy: bool,
    pub parts: Vec<PartHealth>,
    /// Operations ever asked for.
    pub total_operations: u64,
    /// Those of the operations on record that failed, of those that have ended.
    pub error_rate_percent: f64,
    pub at: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PartHealth {
    /// `database`, `store`, `kvm`, `network`, `programs`, `vms`.
    pub name: String,
    pub healthy: bool,
    /// One line: what is well, or what is wrong.
    pub message: String,
}
