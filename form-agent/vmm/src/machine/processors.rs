//! vCPUs that come and go while the VM runs.

use std::os::fd::OwnedFd;

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;

use super::{Machine, MachineError};
use crate::cpu::state::VcpuState;
use crate::cpu::{cpuid, registers, state};
use crate::platform::power::EVENT_PROCESSORS;

/// How the vCPUs of this VM are made.
pub struct Recipe {
    /// What they have in common: the host's, or what the VM was saved with.
    pub(super) cpuid: CpuId,
    /// How many the guest can have: what CPUID says of its topology.
    pub(super) most: u8,
    /// The frequency of their time stamp counters, where it is not the host's.
    pub(super) tsc_khz: Option<u32>,
}

impl Recipe {
    /// Those that come are as those that were saved.
    pub(super) fn of_saved(vcpus: &[VcpuState], most: u8) -> Result<Self, MachineError> {
        let first = vcpus.first().ok_or(MachineError::Processors)?;
        let cpuid = CpuId::from_entries(&first.cpuid).map_err(|_| MachineError::Capability("room for all CPUID leaves"))?;
        Ok(Recipe { cpuid, most, tsc_khz: first.tsc_khz })
    }

    /// Makes a new vCPU what it is when a machine is switched on.
    pub(super) fn set_up(&self, id: u8, vcpu: &VcpuFd) -> Result<(), MachineError> {
        let cpuid = cpuid::for_vcpu(&self.cpuid, id, self.most).map_err(|_| MachineError::Capability("room for all CPUID leaves"))?;
        vcpu.set_cpuid2(&cpuid).map_err(|source| MachineError::Kvm { context: "set a vCPU's CPUID", source })?;
        registers::set_common_state(vcpu)
            .map_err(|source| MachineError::Kvm { context: "set a vCPU's model-specific registers", source })?;
        Ok(state::restore_tsc_frequency(vcpu, self.tsc_khz)?)
    }
}

impl Machine {
    /// How many vCPUs the guest has, and how many it can have.
    #[must_use]
    pub fn vcpu_count(&self) -> (u8, u8) {
        (self.processors.present().len() as u8, self.processors.most())
    }

    /// Gives the guest vCPUs until it has `count`, and tells it. What it was asked to let go of these it keeps.
    ///
    /// # Errors
    /// When it cannot have so many, or KVM makes none; those that were made before are there.
    pub fn plug_vcpus(&mut self, count: u8) -> Result<(), MachineError> {
        let most = self.processors.most();
        if !(1..=most).contains(&count) {
            return Err(MachineError::MostVcpus { most });
        }
        // One that was let go just now is a thread that runs on until it is held.
        self.park_ejected_vcpus();
        let present = self.processors.present();
        present.iter().take(count.into()).for_each(|id| self.processors.keep(*id));
        let missing = usize::from(count).saturating_sub(present.len());
        let absent: Vec<u8> = (0..most).filter(|id| !present.contains(id)).take(missing).collect();
        let made = absent.into_iter().try_for_each(|id| self.make_present(id));
        self.tell_of_vcpus()?;
        made
    }

    fn make_present(&mut self, id: u8) -> Result<(), MachineError> {
        if !self.vcpus.plug_again(id) {
            let vcpu = self.vm.create_vcpu(id.into()).map_err(|source| MachineError::Kvm { context: "create a vCPU", source })?;
            self.recipe.set_up(id, &vcpu)?;
            self.vcpus.add(id, vcpu).map_err(|source| MachineError::Io { context: "start a vCPU thread", source })?;
        }
        self.processors.announce(id);
        Ok(())
    }

    /// Asks the guest for vCPUs until it has `count`, those with the highest ids; `gone` is closed when it has.
    ///
    /// # Errors
    /// When `count` is 0, or the guest cannot be told.
    pub fn unplug_vcpus(&mut self, count: u8, gone: OwnedFd) -> Result<(), MachineError> {
        if count == 0 {
            return Err(MachineError::Invalid { what: "a number of vCPUs", value: 0, allowed: "1 to 128" });
        }
        let present = self.processors.present();
        present.iter().skip(count.into()).for_each(|id| self.processors.ask(*id));
        self.leaving_vcpus.push((count, gone));
        self.note_leaving();
        self.tell_of_vcpus()
    }

    fn tell_of_vcpus(&self) -> Result<(), MachineError> {
        self.power.raise(EVENT_PROCESSORS).map_err(|source| MachineError::Io { context: "raise an interrupt", source })
    }

    /// Holds the threads of the vCPUs that the guest let go.
    pub(super) fn park_ejected_vcpus(&mut self) {
        self.processors.take_gone().for_each(|id| self.vcpus.park(id));
        self.note_leaving();
    }

    fn note_leaving(&mut self) {
        let (count, _) = self.vcpu_count();
        self.leaving_vcpus.retain(|(wanted, _)| count > *wanted);
    }
}
