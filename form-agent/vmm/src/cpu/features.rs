//! Whether this host's CPU has everything that a saved VM was told it has.

use std::collections::BTreeSet;

use kvm_bindings::kvm_cpuid_entry2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        }
    }
}

/// A register of CPUID whose bits are features, and the bits that are not the host's: they follow the guest's own registers, or this
/// program sets them.
struct Word {
    leaf: u32,
    index: u32,
    register: Register,
    ignored: u32,
}

const fn word(leaf: u32, index: u32, register: Register, ignored: u32) -> Word {
    Word { leaf, index, register, ignored }
}

/// MONITOR, x2APIC, OSXSAVE, hypervisor.
const IGNORED_1_ECX: u32 = 1 << 3 | 1 << 21 | 1 << 27 | 1 << 31;
/// APIC, HTT.
const IGNORED_1_EDX: u32 = 1 << 9 | 1 << 28;
/// OSPKE.
const IGNORED_7_ECX: u32 = 1 << 4;
/// The local APIC's bit again.
const IGNORED_8000_0001_EDX: u32 = 1 << 9;

const WORDS: [Word; 17] = [
    word(0x1, 0, Register::Ecx, IGNORED_1_ECX),
    word(0x1, 0, Register::Edx, IGNORED_1_EDX),
    word(0x7, 0, Register::Ebx, 0),
    word(0x7, 0, Register::Ecx, IGNORED_7_ECX),
    word(0x7, 0, Register::Edx, 0),
    word(0x7, 1, Register::Eax, 0),
    word(0x7, 1, Register::Edx, 0),
    word(0xD, 0, Register::Eax, 0),
    word(0xD, 0, Register::Edx, 0),
    word(0xD, 1, Register::Eax, 0),
    word(0x4000_0001, 0, Register::Eax, 0),
    word(0x8000_0001, 0, Register::Ecx, 0),
    word(0x8000_0001, 0, Register::Edx, IGNORED_8000_0001_EDX),
    word(0x8000_0007, 0, Register::Edx, 0),
    word(0x8000_0008, 0, Register::Ebx, 0),
    word(0x8000_000A, 0, Register::Edx, 0),
    word(0x8000_0021, 0, Register::Eax, 0),
];

/// Names of the bits that people look for; Intel SDM volume 2A, CPUID, and AMD APM volume 3, appendix E.
const NAMES: [(u32, u32, Register, u8, &str); 44] = [
    (0x1, 0, Register::Ecx, 0, "SSE3"),
    (0x1, 0, Register::Ecx, 1, "PCLMULQDQ"),
    (0x1, 0, Register::Ecx, 5, "VMX"),
    (0x1, 0, Register::Ecx, 9, "SSSE3"),
    (0x1, 0, Register::Ecx, 12, "FMA"),
    (0x1, 0, Register::Ecx, 13, "CMPXCHG16B"),
    (0x1, 0, Register::Ecx, 17, "PCID"),
    (0x1, 0, Register::Ecx, 19, "SSE4.1"),
    (0x1, 0, Register::Ecx, 20, "SSE4.2"),
    (0x1, 0, Register::Ecx, 22, "MOVBE"),
    (0x1, 0, Register::Ecx, 23, "POPCNT"),
    (0x1, 0, Register::Ecx, 24, "TSC deadline timer"),
    (0x1, 0, Register::Ecx, 25, "AES"),
    (0x1, 0, Register::Ecx, 26, "XSAVE"),
    (0x1, 0, Register::Ecx, 28, "AVX"),
    (0x1, 0, Register::Ecx, 29, "F16C"),
    (0x1, 0, Register::Ecx, 30, "RDRAND"),
    (0x7, 0, Register::Ebx, 0, "FSGSBASE"),
    (0x7, 0, Register::Ebx, 3, "BMI1"),
    (0x7, 0, Register::Ebx, 5, "AVX2"),
    (0x7, 0, Register::Ebx, 7, "SMEP"),
    (0x7, 0, Register::Ebx, 8, "BMI2"),
    (0x7, 0, Register::Ebx, 9, "ERMS"),
    (0x7, 0, Register::Ebx, 10, "INVPCID"),
    (0x7, 0, Register::Ebx, 16, "AVX-512F"),
    (0x7, 0, Register::Ebx, 18, "RDSEED"),
    (0x7, 0, Register::Ebx, 19, "ADX"),
    (0x7, 0, Register::Ebx, 20, "SMAP"),
    (0x7, 0, Register::Ebx, 29, "SHA"),
    (0x7, 0, Register::Ebx, 30, "AVX-512BW"),
    (0x7, 0, Register::Ebx, 31, "AVX-512VL"),
    (0x7, 0, Register::Ecx, 2, "UMIP"),
    (0x7, 0, Register::Ecx, 3, "PKU"),
    (0x7, 0, Register::Ecx, 9, "VAES"),
    (0x7, 0, Register::Ecx, 16, "LA57"),
    (0x7, 0, Register::Edx, 22, "AMX-BF16"),
    (0x7, 0, Register::Edx, 24, "AMX-TILE"),
    (0x7, 0, Register::Edx, 26, "IBRS"),
    (0x8000_0001, 0, Register::Ecx, 2, "SVM"),
    (0x8000_0001, 0, Register::Ecx, 5, "LZCNT"),
    (0x8000_0001, 0, Register::Ecx, 6, "SSE4a"),
    (0x8000_0001, 0, Register::Edx, 26, "1 GiB pages"),
    (0x8000_0001, 0, Register::Edx, 27, "RDTSCP"),
    (0x8000_0007, 0, Register::Edx, 8, "invariant TSC"),
];

fn name(word: &Word, bit: u8) -> String {
    let known = NAMES
        .iter()
        .find(|(leaf, index, register, named, _)| (*leaf, *index, *register, *named) == (word.leaf, word.index, word.register, bit));
    match known {
        Some((.., name)) => (*name).to_owned(),
        None => format!("bit {bit} of {:?} in CPUID leaf {:#x}.{}", word.register, word.leaf, word.index),
    }
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|entry| entry.function == leaf && entry.index == index)
}

/// The maker of a CPU, as leaf 0 spells it.
fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let bytes = find(entries, 0, 0).map(|entry| [entry.ebx, entry.edx, entry.ecx].map(u32::to_le_bytes).concat());
    bytes.map_or_else(String::new, |bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// What `host` (the CPUID that KVM supports) lacks of what `guest` (the CPUID of a saved vCPU) shows; empty when the VM can go on here.
#[must_use]
pub fn missing(guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> BTreeSet<String> {
    let mut missing = BTreeSet::new();
    let (theirs, ours) = (vendor(guest), vendor(host));
    if theirs != ours {
        missing.insert(format!("a CPU of {theirs} (this one is of {ours})"));
    }
    for word in &WORDS {
        let of = |entries| find(entries, word.leaf, word.index).map_or(0, |entry| word.register.of(entry));
        let lacking = of(guest) & !of(host) & !word.ignored;
        missing.extend((0..32).filter(|bit| lacking >> bit & 1 != 0).map(|bit| name(word, bit)));
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn amd() -> kvm_cpuid_entry2 {
        leaf(0, [0xD, 0x6874_7541, 0x444D_4163, 0x6974_6E65])
    }

    #[test]
    fn a_host_with_all_and_more_lacks_nothing() {
        let guest = [amd(), leaf(1, [0, 0, 1 << 25, 1]), leaf(7, [0, 1 << 5, 0, 0])];
        let host = [amd(), leaf(1, [9, 9, 3 << 25, 3]), leaf(7, [0, u32::MAX, 0, 0]), leaf(0xD, [7, 0, 0, 0])];
        assert!(missing(&guest, &host).is_empty());
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let guest = [amd(), leaf(1, [0, 0, 1 << 25 | 1 << 28, 0]), leaf(7, [0, 1 << 5, 1 << 31, 0])];
        let host = [amd(), leaf(1, [0, 0, 1 << 25, 0])];
        let missing: Vec<_> = missing(&guest, &host).into_iter().collect();
        assert_eq!(missing, ["AVX", "AVX2", "bit 31 of Ecx in CPUID leaf 0x7.0"]);
    }

    #[test]
    fn another_maker_is_named() {
        let intel = leaf(0, [0xD, 0x756E_6547, 0x6C65_746E, 0x4965_6E69]);
        let missing = missing(&[amd()], &[intel]);
        assert_eq!(missing.into_iter().collect::<Vec<_>>(), ["a CPU of AuthenticAMD (this one is of GenuineIntel)"]);
    }

    #[test]
    fn bits_that_follow_the_guests_own_registers_do_not_count() {
        let guest = [amd(), leaf(1, [0, 0, IGNORED_1_ECX, IGNORED_1_EDX]), leaf(7, [0, 0, IGNORED_7_ECX, 0])];
        assert!(missing(&guest, &[amd()]).is_empty());
    }
}
