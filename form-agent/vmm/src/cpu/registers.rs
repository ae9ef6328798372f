//! The state in which a vCPU starts: 32-bit protected mode without paging, as the PVH entry wants it.

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::layout::PVH_START_INFO;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const RFLAGS_RESERVED: u64 = 2;

const MSR_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2FF;
/// Memory is write-back unless a variable range says otherwise; enabled.
const MTRR_WRITE_BACK: u64 = 6 | 1 << 11;

/// Local vector table of the local APIC, and the delivery modes of a machine in virtual wire mode (Intel SDM 3A, section 11.5.1).
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const MODE_EXTINT: u32 = 7 << 8;
const MODE_NMI: u32 = 4 << 8;

/// Registers of the vCPU that boots.
///
/// # Errors
/// When KVM refuses a register.
pub fn set_boot_state(vcpu: &VcpuFd, entry: u64) -> Result<(), kvm_ioctls::Error> {
    let mut system = vcpu.get_sregs()?;
    let flat = kvm_segment { limit: 0xFFFF_FFFF, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: 0x18, type_: 3, ..flat };
    system.cs = kvm_segment { selector: 0x10, type_: 0xB, ..flat };
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.tr = kvm_segment { selector: 0x20, limit: 0x67, type_: 0xB, present: 1, ..Default::default() };
    system.cr0 = CR0_PE | CR0_ET;
    system.cr4 = 0;
    system.efer = 0;
    vcpu.set_sregs(&system)?;
    vcpu.set_regs(&kvm_regs { rip: entry, rbx: PVH_START_INFO, rflags: RFLAGS_RESERVED, ..Default::default() })
}

/// What firmware would leave behind on every CPU.
///
/// # Errors
/// When KVM refuses.
pub fn set_common_state(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entries = [
        kvm_msr_entry { index: MSR_MISC_ENABLE, data: MISC_ENABLE_FAST_STRING, ..Default::default() },
        kvm_msr_entry { index: MSR_MTRR_DEF_TYPE, data: MTRR_WRITE_BACK, ..Default::default() },
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    if vcpu.set_msrs(&msrs)? != entries.len() {
        return Err(kvm_ioctls::Error::new(libc::EINVAL));
    }
    let mut apic = vcpu.get_lapic()?;
    set_delivery(&mut apic, APIC_LVT0, MODE_EXTINT);
    set_delivery(&mut apic, APIC_LVT1, MODE_NMI);
    vcpu.set_lapic(&apic)
}

fn set_delivery(apic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let mut bytes = [0u8; 4];
    for (byte, value) in bytes.iter_mut().zip(&apic.regs[register..]) {
        *byte = *value as u8;
    }
    let value = u32::from_le_bytes(bytes) & !0x700 | mode;
    for (target, byte) in apic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
        *target = byte as _;
    }
}
