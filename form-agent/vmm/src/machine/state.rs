//! The saved state of a VM, without guest memory and disks. One version number covers all of it; every part is data of its own.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::MachineError;
use crate::cpu::state::VcpuState;
use crate::platform::serial::SerialPortState;
use crate::virtio::pci::VirtioPciState;

/// Raised when a change makes older states unreadable.
pub const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    pub version: u32,
    pub vcpus: Vec<VcpuState>,
    /// The interrupt controllers that KVM keeps.
    pub chips: Vec<kvm_irqchip>,
    pub clock: kvm_clock_data,
    pub serial: SerialPortState,
    /// In PCI order, with the id from the configuration.
    pub devices: Vec<(String, VirtioPciState)>,
}

pub(super) fn save(
    vm: &VmFd,
    vcpus: Vec<VcpuState>,
    serial: SerialPortState,
    devices: Vec<(String, VirtioPciState)>,
) -> Result<MachineState, MachineError> {
    let clock = vm.get_clock().map_err(|source| MachineError::Kvm { context: "read the VM's clock", source })?;
    Ok(MachineState { version: VERSION, vcpus, chips: save_chips(vm)?, clock, serial, devices })
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];

fn save_chips(vm: &VmFd) -> Result<Vec<kvm_irqchip>, MachineError> {
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
