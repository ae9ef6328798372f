//! What CPUID tells the guest: what KVM supports, with this VM's topology (Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
/// Extended topology: what a subleaf speaks of.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// The address bits of a CPU that does not tell.
const DEFAULT_ADDRESS_BITS: u8 = 36;

/// The leaves that every vCPU shares; what differs is filled in by [`for_vcpu`].
///
/// # Errors
/// When KVM does not tell.
pub fn template(kvm: &Kvm, tsc_deadline: bool) -> Result<CpuId, kvm_ioctls::Error> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            entry.ecx |= ECX_HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
        }
    }
    Ok(cpuid)
}

/// How many bits a guest physical address has.
#[must_use]
pub fn address_bits(cpuid: &CpuId) -> u8 {
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    leaf.map_or(DEFAULT_ADDRESS_BITS, |entry| (entry.eax & 0xFF) as u8)
}

/// The leaves as vCPU `id` of `count` sees them: one socket with `count` cores of one thread each; APIC ids count from 0.
///
/// # Errors
/// When there are more leaves than KVM takes.
pub fn for_vcpu(template: &CpuId, id: u8, count: u8) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let (id, count) = (u32::from(id), u32::from(count.max(1)));
    // APIC ids need this many bits; one bit more would name a second socket.
    let core_bits = u32::BITS - (count - 1).leading_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> =
        template.as_slice().iter().filter(|entry| !matches!(entry.function, 0xB | 0x1F)).copied().collect();
    for entry in &mut entries {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0xFFFF | id << 24 | count.next_power_of_two().min(128) << 16;
                entry.ecx |= ECX_X2APIC;
                entry.edx = if count > 1 { entry.edx | EDX_HTT } else { entry.edx & !EDX_HTT };
            }
            // Deterministic caches: cores in this package; caches of the first and second level belong to one core.
            4 if entry.eax & 0x1F != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level < 3 { 0 } else { (1 << core_bits) - 1 };
                entry.eax = entry.eax & !0xFFFF_C000 | ((1u32 << core_bits) - 1).min(63) << 26 | sharing << 14;
            }
            0x8000_0008 => entry.ecx = entry.ecx & !0xF0FF | core_bits << 12 | (count - 1),
            0x8000_001D if entry.eax & 0x1F != 0 => {
                let sharing = if entry.eax >> 5 & 7 < 3 { 0 } else { count - 1 };
                entry.eax = entry.eax & !0x03FF_C000 | sharing << 14;
            }
            0x8000_001E => {
                entry.eax = id;
                entry.ebx = id & 0xFF;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    if entries.iter().any(|entry| entry.function == 0 && entry.eax >= 0xB) {
        entries.push(topology(0, LEVEL_THREAD, 0, 1, id));
        entries.push(topology(1, LEVEL_CORE, core_bits, count, id));
        entries.push(topology(2, 0, 0, 0, id));
    }
    CpuId::from_entries(&entries)
}

/// A subleaf of leaf 0xB: to get the next level's id shift the APIC id by `shift`; `count` logical CPUs are on this level.
fn topology(index: u32, level: u32, shift: u32, count: u32, id: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function: 0xB,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: level << 8 | index,
        edx: id,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn seen(id: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
        let entries = [
            leaf(0, [0xD, 0, 0, 0]),
            leaf(1, [0, 0x0900_0800, 0, 0]),
            leaf(4, [0xFFFF_C121, 0, 0, 0]),
            leaf(0xB, [7, 7, 7, 7]),
            leaf(0x8000_0008, [0x3030, 0, 0xFFFF, 0]),
            leaf(0x8000_001E, [9, 9, 9, 9]),
        ];
        for_vcpu(&CpuId::from_entries(&entries).unwrap(), id, count).unwrap().as_slice().to_vec()
    }

    fn get(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_apic_id_everywhere() {
        for (id, count) in [(0, 1), (5, 8), (127, 128)] {
            let entries = seen(id, count);
            assert_eq!(get(&entries, 1, 0).ebx >> 24, u32::from(id));
            assert_eq!(get(&entries, 1, 0).ebx & 0xFFFF, 0x0800);
            assert_eq!(get(&entries, 0x8000_001E, 0).eax, u32::from(id));
            for index in 0..3 {
                assert_eq!(get(&entries, 0xB, index).edx, u32::from(id));
            }
        }
    }

    #[test]
    fn the_topology_is_one_socket_of_single_threaded_cores() {
        for (count, bits) in [(1u8, 0), (2, 1), (3, 2), (8, 3), (9, 4), (128, 7)] {
            let entries = seen(0, count);
            assert_eq!((get(&entries, 0xB, 0).eax, get(&entries, 0xB, 0).ebx), (0, 1));
            let cores = get(&entries, 0xB, 1);
            assert_eq!((cores.eax, cores.ebx, cores.ecx >> 8), (bits, u32::from(count), LEVEL_CORE));
            let amd = get(&entries, 0x8000_0008, 0);
            assert_eq!((amd.ecx & 0xFF, amd.ecx >> 12 & 0xF), (u32::from(count) - 1, bits));
            assert_eq!(get(&entries, 1, 0).edx & EDX_HTT != 0, count > 1);
        }
    }

    #[test]
    fn a_cpu_without_the_topology_leaf_gets_none() {
        let entries = for_vcpu(&CpuId::from_entries(&[leaf(0, [1, 0, 0, 0])]).unwrap(), 0, 4).unwrap();
        assert!(entries.as_slice().iter().all(|entry| entry.function != 0xB));
    }

    #[test]
    fn address_bits_come_from_the_cpu() {
        assert_eq!(address_bits(&CpuId::from_entries(&[leaf(0x8000_0008, [0x3028, 0, 0, 0])]).unwrap()), 40);
        assert_eq!(address_bits(&CpuId::from_entries(&[]).unwrap()), 36);
    }
}
