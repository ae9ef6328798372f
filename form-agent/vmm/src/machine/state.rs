//! The saved state of a VM, without guest memory and disks: every part is data of its own. [`super::saved`] is its file.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::MachineError;
use crate::cpu::state::VcpuState;
use crate::memory::image::SaveId;
use crate::platform::power::PowerState;
use crate::platform::processors::{MOST, ProcessorsState};
use crate::platform::serial::SerialPortState;
use crate::virtio::pci::VirtioPciState;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// The same as in the memory file that was written with it.
    pub save: SaveId,
    pub memory_mib: u64,
    pub vcpus: Vec<VcpuState>,
    /// Which vCPUs these are, and how many there can be. None in a state of version 1, whose
    /// VM has those that it started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processors: Option<ProcessorsState>,
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

impl MachineState {
    /// The registers of vCPU hotplug, which agree with the vCPUs that were saved.
    ///
    /// # Errors
    /// When no VM can be like this.
    pub fn processors(&self) -> Result<ProcessorsState, MachineError> {
        let count = u8::try_from(self.vcpus.len()).ok().filter(|count| (1..=MOST).contains(count));
        let count =
            count.ok_or(MachineError::Invalid { what: "a number of vCPUs", value: self.vcpus.len() as u64, allowed: "1 to 128" })?;
        let processors = self.processors.unwrap_or_else(|| ProcessorsState::new(count, count));
        if processors.is_sound() && processors.ids().len() == usize::from(count) { Ok(processors) } else { Err(MachineError::Processors) }
    }
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

    fn state(vcpus: usize, processors: Option<ProcessorsState>) -> MachineState {
        let vcpu = || VcpuState {
            cpuid: Vec::new(),
            mp_state: kvm_bindings::kvm_mp_state::default(),
            regs: kvm_bindings::kvm_regs::default(),
            sregs: kvm_bindings::kvm_sregs::default(),
            xsave: kvm_bindings::kvm_xsave::default(),
            xcrs: kvm_bindings::kvm_xcrs::default(),
            debug: kvm_bindings::kvm_debugregs::default(),
            lapic: kvm_bindings::kvm_lapic_state::default(),
            msrs: Vec::new(),
            events: kvm_bindings::kvm_vcpu_events::default(),
            tsc_khz: None,
        };
        MachineState {
            save: [3; 16],
            memory_mib: 256,
            vcpus: (0..vcpus).map(|_| vcpu()).collect(),
            processors,
            chips: Vec::new(),
            clock: ClockState { guest_ns: 0, world_ns: 0 },
            serial: SerialPortState::default(),
            power: PowerState { events: 0, timer_ns: 0 },
            pci_address: 0,
            devices: Vec::new(),
        }
    }

    #[test]
    fn the_vcpus_of_a_state_are_those_that_its_registers_name() {
        let with_a_gap = ProcessorsState { present: [0b101, 0, 0, 0], ..ProcessorsState::new(1, 4) };
        assert_eq!(state(2, Some(with_a_gap)).processors().unwrap().ids(), [0, 2]);
        // Of the first version: those that it started with, and no more.
        assert_eq!(state(3, None).processors().unwrap(), ProcessorsState::new(3, 3));
        for (vcpus, registers) in [(1, Some(with_a_gap)), (3, Some(with_a_gap)), (0, None), (129, None), (0, Some(with_a_gap))] {
            assert!(state(vcpus, registers).processors().is_err(), "{vcpus}");
        }
        let crooked = ProcessorsState { most: 2, ..with_a_gap };
        assert!(matches!(state(2, Some(crooked)).processors(), Err(MachineError::Processors)));
    }

    #[test]
    fn a_world_clock_that_went_back_counts_as_no_time() {
        let clock = ClockState { guest_ns: 5, world_ns: 1_000 };
        assert_eq!(clock.away(3_500), Duration::from_nanos(2_500));
        assert_eq!(clock.away(999), Duration::ZERO);
    }
}
