//! The saved state of a VM, without guest memory and disks: every part is data of its own. [`super::saved`] is its file.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::MachineError;
use crate::cpu::state::VcpuState;
use crate::memory::image::SaveId;
use crate::platform::power::PowerState;
use crate::platform::serial::SerialPortState;
use crate::virtio::pci::VirtioPciState;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// The same as in the memory file that was written with it.
    pub save: SaveId,
    pub memory_mib: u64,
    pub vcpus: Vec<VcpuState>,
    /// The interrupt controllers that KVM keeps.
    pub chips: Vec<kvm_irqchip>,
    pub clock: ClockState,
    pub serial: SerialPortState,
    pub power: PowerState,
    /// The last value written to the port 0xCF8.
    pub pci_address: u32,
    /// In PCI order.
    pub devices: Vec<DeviceState>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// As in the configuration.
    pub id: String,
    /// Where on the bus the guest found it.
    pub slot: usize,
    pub state: VirtioPciState,
}

/// Time, as the guest and as the world saw it at the save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// `kvm-clock`, in nanoseconds since the VM's boot.
    pub guest_ns: u64,
    /// Nanoseconds since the Unix epoch.
    pub world_ns: u64,
}

impl ClockState {
    /// # Errors
    /// When KVM does not tell.
    pub fn save(vm: &VmFd) -> Result<Self, MachineError> {
        let clock = vm.get_clock().map_err(|source| MachineError::Kvm { context: "read the VM's clock", source })?;
        Ok(ClockState { guest_ns: clock.clock, world_ns: world_ns() })
    }

    /// How long the VM was away. A world clock that went back counts as no time at all: a guest's clocks never do.
    #[must_use]
    pub fn away(&self, now_ns: u64) -> Duration {
        Duration::from_nanos(now_ns.saturating_sub(self.world_ns))
    }

    /// Sets the VM's clock as if it had gone on all the time, so that the guest's time of day is right.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn restore(&self, vm: &VmFd, away: Duration) -> Result<(), MachineError> {
        let clock = kvm_clock_data { clock: self.guest_ns.saturating_add(nanoseconds(away)), ..Default::default() };
        vm.set_clock(&clock).map_err(|source| MachineError::Kvm { context: "set the VM's clock", source })
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Nanoseconds since the Unix epoch, now.
#[must_use]
pub fn world_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, nanoseconds)
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];

/// The interrupt controllers that KVM keeps.
///
/// # Errors
/// When KVM does not give them.
pub fn save_chips(vm: &VmFd) -> Result<Vec<kvm_irqchip>, MachineError> {
    let get = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(|source| MachineError::Kvm { context: "read an interrupt controller", source })?;
        Ok(chip)
    };
    CHIPS.into_iter().map(get).collect()
}

/// Sets the interrupt controllers of a VM that has not run yet.
///
/// # Errors
/// When KVM refuses.
pub fn restore_chips(vm: &VmFd, chips: &[kvm_irqchip]) -> Result<(), MachineError> {
    let set = |chip| vm.set_irqchip(chip).map_err(|source| MachineError::Kvm { context: "set an interrupt controller", source });
    chips.iter().try_for_each(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_world_clock_that_went_back_counts_as_no_time() {
        let clock = ClockState { guest_ns: 5, world_ns: 1_000 };
        assert_eq!(clock.away(3_500), Duration::from_nanos(2_500));
        assert_eq!(clock.away(999), Duration::ZERO);
    }
}
