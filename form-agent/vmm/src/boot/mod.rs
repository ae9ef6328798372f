//! Puts a kernel, its initramfs and its command line where the PVH entry expects them
//! (Xen: docs/misc/pvh.pandoc, public/arch-x86/hvm/start_info.h).

mod pvh;

use std::fs::File;

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{CMDLINE, CMDLINE_MAX, HIGH_RAM_START, Layout, RESET_VECTOR};
use crate::memory::GuestMemoryMmap;
use crate::platform::{POWER_PORT, power};

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("cannot load the kernel: give an uncompressed ELF kernel (vmlinux) that fits into the VM's memory")]
    Kernel(#[source] linux_loader::loader::Error),
    #[error("the kernel has no PVH entry point: build it with CONFIG_PVH=y")]
    NoPvhEntry,
    #[error("cannot read segment {segment} of the initramfs")]
    InitramfsRead {
        segment: usize,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot place segment {segment} of the initramfs in guest memory")]
    InitramfsPlace {
        segment: usize,
        #[source]
        source: GuestMemoryError,
    },
    #[error("the initramfs of {bytes} bytes does not fit behind the kernel, which ends at {kernel_end:#x}: give the VM more memory")]
    InitramfsSpace { bytes: u64, kernel_end: u64 },
    #[error("the kernel command line has {length} bytes, {limit} are possible", limit = CMDLINE_MAX - 1)]
    CmdlineLength { length: usize },
    #[error("the kernel command line holds a zero byte")]
    CmdlineZero,
    #[error("cannot write the {what} into guest memory")]
    Write {
        what: &'static str,
        #[source]
        source: GuestMemoryError,
    },
}

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub start: u64,
    pub bytes: u64,
}

/// Loads everything and returns the address where vCPU 0 starts (32-bit, paging off, `rbx` = start info).
///
/// # Errors
/// When a file is not what it should be or does not fit.
pub fn load(
    memory: &GuestMemoryMmap,
    layout: &Layout,
    kernel: &mut File,
    initramfs: &mut [File],
    cmdline: &str,
    rsdp: u64,
) -> Result<u64, BootError> {
    let (entry, kernel_end) = load_kernel(memory, kernel)?;
    let initramfs = load_initramfs(memory, layout, initramfs, kernel_end)?;
    write_cmdline(memory, cmdline)?;
    write_reset_vector(memory)?;
    pvh::write(memory, layout, initramfs, rsdp).map_err(|source| BootError::Write { what: "start info", source })?;
    Ok(entry)
}

fn load_kernel(memory: &GuestMemoryMmap, kernel: &mut File) -> Result<(u64, u64), BootError> {
    let loaded = Elf::load(memory, None, kernel, Some(GuestAddress(HIGH_RAM_START))).map_err(BootError::Kernel)?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok((entry.0, loaded.kernel_end)),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => Err(BootError::NoPvhEntry),
    }
}

/// Segments go one behind the other, each padded with zeros to four bytes, to the top of low memory.
fn load_initramfs(memory: &GuestMemoryMmap, layout: &Layout, segments: &mut [File], kernel_end: u64) -> Result<Option<Extent>, BootError> {
    let mut sizes = Vec::with_capacity(segments.len());
    for (segment, file) in segments.iter().enumerate() {
        let length = file.metadata().map_err(|source| BootError::InitramfsRead { segment, source })?.len();
        sizes.push(length);
    }
    let Some(extent) = place_initramfs(&sizes, layout.low_ram, kernel_end)? else { return Ok(None) };
    let mut at = extent.start;
    for (segment, (file, size)) in segments.iter_mut().zip(sizes).enumerate() {
        std::io::Seek::rewind(file).map_err(|source| BootError::InitramfsRead { segment, source })?;
        let count = usize::try_from(size).map_err(|_| BootError::InitramfsSpace { bytes: size, kernel_end })?;
        memory.read_exact_volatile_from(GuestAddress(at), file, count).map_err(|source| BootError::InitramfsPlace { segment, source })?;
        at += size.next_multiple_of(4);
    }
    Ok(Some(extent))
}

/// The kernel frees whole pages of the initramfs, so it starts on one.
fn place_initramfs(sizes: &[u64], low_ram: u64, kernel_end: u64) -> Result<Option<Extent>, BootError> {
    let bytes = sizes
        .iter()
        .try_fold(0u64, |sum, size| sum.checked_add(size.checked_next_multiple_of(4)?))
        .ok_or(BootError::InitramfsSpace { bytes: u64::MAX, kernel_end })?;
    if bytes == 0 {
        return Ok(None);
    }
    match low_ram.checked_sub(bytes).map(|start| start & !0xFFF) {
        Some(start) if start >= kernel_end.max(HIGH_RAM_START) => Ok(Some(Extent { start, bytes })),
        _ => Err(BootError::InitramfsSpace { bytes, kernel_end }),
    }
}

fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= CMDLINE_MAX {
        return Err(BootError::CmdlineLength { length: cmdline.len() });
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    if bytes.contains(&0) {
        return Err(BootError::CmdlineZero);
    }
    bytes.push(0);
    memory.write_slice(&bytes, GuestAddress(CMDLINE)).map_err(|source| BootError::Write { what: "command line", source })
}

/// Linux on hardware-reduced ACPI without EFI restarts by jumping to the firmware's reset vector. There is no firmware, so the code
/// there asks the power registers for the reset.
fn write_reset_vector(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let [low, high] = (POWER_PORT + power::RESET).to_le_bytes();
    // mov dx, RESET; mov al, RESET_VALUE; out dx, al; cli; hlt; jmp to the hlt
    let code = [0xBA, low, high, 0xB0, power::RESET_VALUE, 0xEE, 0xFA, 0xF4, 0xEB, 0xFD];
    memory.write_slice(&code, GuestAddress(RESET_VECTOR)).map_err(|source| BootError::Write { what: "reset vector", source })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::layout::MIB;

    fn file(bytes: &[u8]) -> File {
        let mut file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn segments_are_padded_to_four_bytes() {
        let layout = Layout::new(16, 40).unwrap();
        let memory = crate::memory::map(&layout).unwrap();
        let extent = load_initramfs(&memory, &layout, &mut [file(b"abcde"), file(b"f"), file(b"")], 2 * MIB).unwrap().unwrap();
        assert_eq!(extent, Extent { start: 16 * MIB - 4096, bytes: 12 });
        let mut bytes = [9u8; 12];
        memory.read_slice(&mut bytes, GuestAddress(extent.start)).unwrap();
        assert_eq!(&bytes, b"abcde\0\0\0f\0\0\0");
    }

    #[test]
    fn an_initramfs_that_would_cover_the_kernel_is_refused() {
        assert!(matches!(place_initramfs(&[4 * MIB], 16 * MIB, 13 * MIB), Err(BootError::InitramfsSpace { .. })));
        assert!(matches!(place_initramfs(&[17 * MIB], 16 * MIB, 2 * MIB), Err(BootError::InitramfsSpace { .. })));
        assert!(matches!(place_initramfs(&[u64::MAX, 9], 16 * MIB, 2 * MIB), Err(BootError::InitramfsSpace { .. })));
        assert_eq!(place_initramfs(&[], 16 * MIB, 2 * MIB).unwrap(), None);
    }

    #[test]
    fn a_kernel_that_is_none_is_refused() {
        let layout = Layout::new(16, 40).unwrap();
        let memory = crate::memory::map(&layout).unwrap();
        for bytes in [&b""[..], b"\x7fELF", b"MZ and so on", &[0u8; 4096]] {
            assert!(matches!(load_kernel(&memory, &mut file(bytes)), Err(BootError::Kernel(_))));
        }
    }

    #[test]
    fn the_command_line_is_bounded() {
        let layout = Layout::new(16, 40).unwrap();
        let memory = crate::memory::map(&layout).unwrap();
        write_cmdline(&memory, &"x".repeat(CMDLINE_MAX - 1)).unwrap();
        assert!(matches!(write_cmdline(&memory, &"x".repeat(CMDLINE_MAX)), Err(BootError::CmdlineLength { .. })));
        assert!(matches!(write_cmdline(&memory, "a\0b"), Err(BootError::CmdlineZero)));
    }
}
