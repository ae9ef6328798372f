//! Where things are in guest physical memory.
//!
//! RAM starts at zero and leaves a hole from 3 GiB to 4 GiB for the interrupt controllers, PCI configuration space and 32-bit
//! device memory; what does not fit below it goes on at 4 GiB. 64-bit device memory lies above all RAM.

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Start of the hole below 4 GiB; also the start of 32-bit device memory.
pub const HOLE_START: u64 = 3 * GIB;
pub const HOLE_END: u64 = 4 * GIB;
/// Memory-mapped PCI configuration space (PCI Firmware 3.3, section 4.1): 1 MiB a bus.
pub const ECAM_START: u64 = 0xE000_0000;
/// One bus for now; the 256 MiB behind the start are kept free for more.
pub const ECAM_BUSES: u64 = 1;
pub const ECAM_SIZE: u64 = ECAM_BUSES << 20;
/// 32-bit device memory ends where configuration space starts.
pub const MMIO32_START: u64 = HOLE_START;
pub const MMIO32_END: u64 = ECAM_START;
pub const IOAPIC: u32 = 0xFEC0_0000;
pub const LOCAL_APIC: u32 = 0xFEE0_0000;
/// Four pages KVM wants on Intel for real mode: identity map, then TSS.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
pub const KVM_TSS: usize = 0xFFFB_D000;

/// Conventional memory ends below the extended BIOS data area.
pub const LOW_RAM_END: u64 = 0x9_FC00;
pub const PVH_START_INFO: u64 = 0x6000;
pub const PVH_MODULES: u64 = 0x6100;
pub const PVH_MEMORY_MAP: u64 = 0x7000;
pub const CMDLINE: u64 = 0x2_0000;
/// What the Linux kernel reads at most on x86, with the closing zero.
pub const CMDLINE_MAX: usize = 2048;
/// A page of its own, for the identifier of the VM's generation (`acpi::generation`). No guest takes it for memory to use: it lies where a
/// PC has the firmware of its devices.
pub const GENERATION: u64 = 0xD_F000;
/// The tables, with the RSDP first, in the area that PC firmware uses for them.
pub const ACPI_START: u64 = 0xE_0000;
pub const ACPI_END: u64 = RESET_VECTOR;
/// Where a PC's CPU starts after a reset, F000:FFF0 in real mode: sixteen bytes.
pub const RESET_VECTOR: u64 = 0xF_FFF0;
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// Bounds of a VM's memory in MiB. The lower one is for test kernels; Linux wants 128.
pub const MIN_MEMORY_MIB: u64 = 16;
pub const MAX_MEMORY_MIB: u64 = 256 * 1024;

/// Guest memory and the windows around it for one size of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// RAM below the hole, in bytes.
    pub low_ram: u64,
    /// RAM from 4 GiB on, in bytes; 0 when all of it fits below.
    pub high_ram: u64,
    /// 64-bit device memory: start, and first address behind it.
    pub mmio64_start: u64,
    pub mmio64_end: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    #[error("{0} MiB of memory are not possible: give {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}")]
    Size(u64),
    #[error("{memory_mib} MiB of memory and the devices above it do not fit into this CPU's {bits} address bits")]
    AddressBits { memory_mib: u64, bits: u8 },
}

/// Room for 64-bit BARs: enough for large devices that are added later.
const MMIO64_SIZE: u64 = 64 * GIB;
/// The least that is worth having: 32 devices with 32 MiB each.
const MMIO64_LEAST: u64 = GIB;

/// Linux adds memory in blocks of up to so much: smaller ones only where what it booted with begins and ends at them.
const GROWTH_ALIGNMENT: u64 = 2 * GIB;

impl Layout {
    /// # Errors
    /// When the size is out of bounds or does not fit into `address_bits` of guest physical address.
    pub fn new(memory_mib: u64, address_bits: u8) -> Result<Self, LayoutError> {
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&memory_mib) {
            return Err(LayoutError::Size(memory_mib));
        }
        let memory = memory_mib * MIB;
        let low_ram = memory.min(HOLE_START);
        let high_ram = memory - low_ram;
        let limit = 1u64 << address_bits.clamp(32, 52);
        let mmio64_start = (HOLE_END + high_ram).next_multiple_of(GIB);
        let mmio64_end = (mmio64_start + MMIO64_SIZE).min(limit);
        if mmio64_end < mmio64_start + MMIO64_LEAST {
            return Err(LayoutError::AddressBits { memory_mib, bits: address_bits });
        }
        Ok(Layout { low_ram, high_ram, mmio64_start, mmio64_end })
    }

    /// The ranges of RAM that are backed by memory: start and length.
    #[must_use]
    pub fn ram(&self) -> Vec<(u64, u64)> {
        let mut ranges = vec![(0, self.low_ram)];
        if self.high_ram > 0 {
            ranges.push((HOLE_END, self.high_ram));
        }
        ranges
    }

    /// Where memory can be added while the VM runs: above everything else, as far as `address_bits` and [`MAX_MEMORY_MIB`] go. Start,
    /// and length in bytes, which may be 0; both are multiples of `block`.
    #[must_use]
    pub fn growth(&self, address_bits: u8, block: u64) -> (u64, u64) {
        let start = self.mmio64_end.next_multiple_of(GROWTH_ALIGNMENT);
        let room = (1u64 << address_bits.clamp(32, 52)).saturating_sub(start);
        let most = (MAX_MEMORY_MIB * MIB).saturating_sub(self.low_ram + self.high_ram);
        (start, room.min(most) / block * block)
    }

    /// What the guest is told (PVH memory map, as E820): start, length, kind.
    #[must_use]
    pub fn memory_map(&self) -> Vec<(u64, u64, MemoryKind)> {
        let mut map = vec![
            (0, LOW_RAM_END, MemoryKind::Ram),
            (LOW_RAM_END, HIGH_RAM_START - LOW_RAM_END, MemoryKind::Reserved),
            (HIGH_RAM_START, self.low_ram - HIGH_RAM_START, MemoryKind::Ram),
            (ECAM_START, ECAM_SIZE, MemoryKind::Reserved),
        ];
        if self.high_ram > 0 {
            map.push((HOLE_END, self.high_ram, MemoryKind::Ram));
        }
        map
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    Ram,
    Reserved,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(mib: u64, bits: u8) -> Layout {
        let layout = Layout::new(mib, bits).unwrap_or_else(|error| panic!("{mib} MiB: {error}"));
        let ram = layout.ram();
        assert_eq!(ram.iter().map(|(_, length)| length).sum::<u64>(), mib * MIB);
        let mut previous_end = 0;
        for (start, length) in &ram {
            assert!(*start >= previous_end && *length > 0);
            previous_end = start + length;
            assert!(previous_end <= HOLE_START || *start >= HOLE_END, "RAM reaches into the hole");
        }
        assert!(layout.mmio64_start >= previous_end && layout.mmio64_start >= HOLE_END);
        assert!(layout.mmio64_end > layout.mmio64_start && layout.mmio64_end <= 1 << bits);
        // Every RAM entry of the guest's map is backed, and no two entries overlap.
        let mut map = layout.memory_map();
        map.sort_by_key(|(start, ..)| *start);
        for pair in map.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0);
        }
        for (start, length, kind) in map {
            if kind == MemoryKind::Ram {
                assert!(ram.iter().any(|(from, size)| start >= *from && start + length <= from + size));
            }
        }
        let (start, length) = layout.growth(bits, 128 * MIB);
        assert!(start >= layout.mmio64_end && start.is_multiple_of(2 * GIB) && length.is_multiple_of(128 * MIB));
        assert!(length == 0 || start + length <= 1 << bits && mib * MIB + length <= MAX_MEMORY_MIB * MIB);
        layout
    }

    #[test]
    fn memory_can_grow_as_far_as_addresses_go() {
        let grown = |mib, bits| check(mib, bits).growth(bits, 128 * MIB);
        assert_eq!(grown(256, 40), (68 * GIB, MAX_MEMORY_MIB * MIB - 256 * MIB));
        assert_eq!(grown(3073, 40), (70 * GIB, (MAX_MEMORY_MIB - 3200) * MIB));
        assert_eq!(grown(262_144, 40).1, 0);
        assert_eq!(grown(256, 37), (68 * GIB, 60 * GIB));
        assert_eq!(grown(256, 36).1, 0);
    }

    #[test]
    fn every_size_fits_around_the_hole() {
        for mib in [16, 128, 256, 1024, 3071, 3072, 3073, 4096, 5120, 65_536, 262_143, 262_144] {
            for bits in [39, 40, 46, 48, 52] {
                check(mib, bits);
            }
        }
    }

    #[test]
    fn the_hole_splits_ram_exactly_at_three_gib() {
        assert_eq!(check(3072, 40).high_ram, 0);
        let layout = check(3073, 40);
        assert_eq!((layout.low_ram, layout.high_ram), (3 * GIB, MIB));
        assert_eq!(layout.ram()[1], (4 * GIB, MIB));
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        assert_eq!(Layout::new(15, 40), Err(LayoutError::Size(15)));
        assert_eq!(Layout::new(262_145, 48), Err(LayoutError::Size(262_145)));
        assert_eq!(Layout::new(u64::MAX, 48), Err(LayoutError::Size(u64::MAX)));
    }

    #[test]
    fn a_cpu_with_few_address_bits_is_refused() {
        assert_eq!(Layout::new(65_536, 36), Err(LayoutError::AddressBits { memory_mib: 65_536, bits: 36 }));
        check(1024, 36);
    }

    #[test]
    fn the_fixed_places_do_not_overlap() {
        const { assert!(PVH_START_INFO + 0x38 <= PVH_MODULES) };
        const { assert!(PVH_MODULES < PVH_MEMORY_MAP) };
        const { assert!(CMDLINE + CMDLINE_MAX as u64 <= LOW_RAM_END) };
        const { assert!(GENERATION >= LOW_RAM_END && GENERATION.is_multiple_of(4096) && GENERATION + 4096 <= ACPI_START) };
        const { assert!(ECAM_START + (256 << 20) <= IOAPIC as u64) };
    }
}
