//! The PVH start info with its module list and memory map.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::Extent;
use crate::layout::{CMDLINE, Layout, MemoryKind, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};
use crate::memory::GuestMemoryMmap;

const MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;
const TYPE_RAM: u32 = 1;
const TYPE_RESERVED: u32 = 2;

pub fn write(memory: &GuestMemoryMmap, layout: &Layout, initramfs: Option<Extent>, rsdp: u64) -> Result<(), GuestMemoryError> {
    let map = layout.memory_map();
    let mut at = PVH_MEMORY_MAP;
    for (addr, size, kind) in &map {
        let type_ = match kind {
            MemoryKind::Ram => TYPE_RAM,
            MemoryKind::Reserved => TYPE_RESERVED,
        };
        memory.write_obj(hvm_memmap_table_entry { addr: *addr, size: *size, type_, reserved: 0 }, GuestAddress(at))?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    if let Some(Extent { start, bytes }) = initramfs {
        let module = hvm_modlist_entry { paddr: start, size: bytes, cmdline_paddr: 0, reserved: 0 };
        memory.write_obj(module, GuestAddress(PVH_MODULES))?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: if initramfs.is_some() { PVH_MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    memory.write_obj(info, GuestAddress(PVH_START_INFO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_finds_memory_map_module_and_tables() {
        let layout = Layout::new(5 * 1024, 40).unwrap();
        let memory = crate::memory::map(&layout).unwrap();
        write(&memory, &layout, Some(Extent { start: 0x123_4000, bytes: 77 }), 0xE_0000).unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(PVH_START_INFO)).unwrap();
        assert_eq!((info.magic, info.version, info.nr_modules, info.rsdp_paddr), (MAGIC, 1, 1, 0xE_0000));
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x123_4000, 77));
        let mut ram = 0;
        for index in 0..u64::from(info.memmap_entries) {
            let entry: hvm_memmap_table_entry = memory.read_obj(GuestAddress(info.memmap_paddr + index * 24)).unwrap();
            if entry.type_ == TYPE_RAM {
                ram += entry.size;
            }
        }
        assert!(5 * (1 << 30) - ram <= 0x10_0000 - crate::layout::LOW_RAM_END);
    }
}
