//! Measurements of a host: what a VM and the agent itself cost there.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What can be measured. Each gives one or more [`BenchRow`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Measurement {
    /// From starting a VM process to the first instructions of its guest.
    FirstInstruction,
    /// From starting a VM process to the first process of a Linux guest.
    GuestInit,
    /// Memory of a VM process outside its guest's.
    VmmMemory,
    /// Size of the program that every VM process runs.
    VmmProgram,
    /// A disk that comes to a Linux guest that runs, and leaves it.
    Hotplug,
    /// How long a VM stands for its snapshot, and how that grows with its memory.
    Pause,
    /// Writing all of a VM, and going on with it in another process.
    Restore,
    /// A change of the state: signed, checked and on the disk; and reading all of it.
    State,
    /// Memory of an agent, and of one more VM on its record.
    AgentMemory,
    /// One `form ps`, from its start to its end.
    Ps,
    /// Questions about VMs, asked by several at once.
    Queries,
    /// Reading a volume over NBD, beside qemu-nbd.
    Nbd,
    /// Ten copies of a VM that start at once.
    Fork,
    /// A guest that reads its disks.
    Disk,
    /// TCP between the host and a guest, both ways.
    Network,
}

impl Measurement {
    pub const ALL: [Self; 15] = [
        Self::FirstInstruction,
        Self::GuestInit,
        Self::VmmMemory,
        Self::VmmProgram,
        Self::Hotplug,
        Self::Pause,
        Self::Restore,
        Self::State,
        Self::AgentMemory,
        Self::Ps,
        Self::Queries,
        Self::Nbd,
        Self::Fork,
        Self::Disk,
        Self::Network,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::FirstInstruction => "first-instruction",
            Self::GuestInit => "guest-init",
            Self::VmmMemory => "vmm-memory",
            Self::VmmProgram => "vmm-program",
            Self::Hotplug => "hotplug",
            Self::Pause => "pause",
            Self::Restore => "restore",
            Self::State => "state",
            Self::AgentMemory => "agent-memory",
            Self::Ps => "ps",
            Self::Queries => "queries",
            Self::Nbd => "nbd",
            Self::Fork => "fork",
            Self::Disk => "disk",
            Self::Network => "network",
        }
    }
}

impl fmt::Display for Measurement {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl FromStr for Measurement {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|measurement| measurement.as_str() == text).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.into_iter().map(Self::as_str).collect();
            format!("`{text}` is no measurement: there are {}", known.join(", "))
        })
    }
}

/// Asks for measurements. The answer is NDJSON of [`BenchRow`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BenchRequest {
    /// How often each is repeated, 1 to [`MAX_RUNS`].
    pub runs: u32,
    /// All of them when empty.
    pub only: Vec<Measurement>,
}

pub const DEFAULT_RUNS: u32 = 5;
pub const MAX_RUNS: u32 = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Unit {
    /// Time on the clock.
    #[serde(rename = "ms")]
    Milliseconds,
    /// Time of the processor: user, system and guest.
    #[serde(rename = "ms cpu")]
    CpuMilliseconds,
    /// On a machine whose processor does one instruction a nanosecond.
    #[serde(rename = "M instructions")]
    MillionInstructions,
    /// A million bytes.
    #[serde(rename = "MB")]
    Megabytes,
    /// One value divided by another.
    #[serde(rename = "times")]
    Times,
}

impl Unit {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::CpuMilliseconds => "ms cpu",
            Self::MillionInstructions => "M instructions",
            Self::Megabytes => "MB",
            Self::Times => "times",
        }
    }

    /// Whether a value over budget is a failure. Times depend on the machine and on who else uses it.
    pub const fn is_enforced(self) -> bool {
        match self {
            Self::Milliseconds | Self::CpuMilliseconds => false,
            Self::MillionInstructions | Self::Megabytes | Self::Times => true,
        }
    }
}

/// One measured value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct BenchRow {
    /// `guest-init`, `guest-init/time`.
    pub name: String,
    /// In words.
    pub what: String,
    pub unit: Unit,
    /// How many values the next three are of. 0 when it could not be measured; `fault` says why.
    pub samples: u32,
    pub min: f64,
    pub median: f64,
    pub max: f64,
    /// What the median should not exceed, in `unit`.
    pub budget: Option<f64>,
    /// Somebody else's value, in `unit`.
    pub peer: Option<Peer>,
    /// The median is over the budget, and the budget is enforced.
    pub over: bool,
    pub fault: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Peer {
    pub name: String,
    pub value: f64,
    /// Our median in parts of the peer's value.
    pub ratio: f64,
}

impl BenchRow {
    /// Whether it was measured and is within what is enforced.
    pub const fn is_good(&self) -> bool {
        !self.over && self.fault.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_measurement_has_one_name() {
        for measurement in Measurement::ALL {
            assert_eq!(measurement.as_str().parse(), Ok(measurement));
            assert_eq!(serde_json::to_value(measurement).unwrap(), measurement.as_str());
        }
        assert!("boot".parse::<Measurement>().unwrap_err().contains("first-instruction"));
    }

    #[test]
    fn times_are_compared_and_the_rest_is_enforced() {
        let enforced = [Unit::Milliseconds, Unit::CpuMilliseconds, Unit::MillionInstructions, Unit::Megabytes].map(Unit::is_enforced);
        assert_eq!(enforced, [false, false, true, true]);
        assert_eq!(serde_json::to_value(Unit::CpuMilliseconds).unwrap(), Unit::CpuMilliseconds.as_str());
    }
}
