//! The ACPI tables (ACPI 6.5), hardware-reduced: RSDP, XSDT, FADT, MADT, MCFG, DSDT.

mod dsdt;
pub mod generation;
mod processors;

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, sdt::Sdt};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{ACPI_END, ACPI_START, ECAM_BUSES, ECAM_START, IOAPIC, LOCAL_APIC, Layout};
use crate::memory::GuestMemoryMmap;
use crate::platform::{POWER_PORT, power};

const OEM: [u8; 6] = *b"FORMTN";
const OEM_TABLE: [u8; 8] = *b"FORMVMM ";
const OEM_REVISION: u32 = 1;
/// FADT `IAPC_BOOT_ARCH`: no VGA to probe, no CMOS clock. The keyboard controller's bit is off as well: it only resets.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("the ACPI tables need {0} bytes, more than their area has")]
    Space(u64),
    #[error("cannot write the ACPI tables into guest memory")]
    Write(#[source] GuestMemoryError),
}

/// How many vCPUs a guest starts with, and how many it can have.
#[derive(Clone, Copy, Debug)]
pub struct Vcpus {
    pub count: u8,
    pub most: u8,
}

/// Writes the tables and returns the address of the RSDP.
///
/// # Errors
/// When they do not fit.
pub fn write(memory: &GuestMemoryMmap, layout: &Layout, vcpus: Vcpus) -> Result<u64, AcpiError> {
    let mut place = Place { memory, at: ACPI_START + 64 };
    let dsdt = place.put(&dsdt::build(layout, vcpus.most))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(place.put(&fadt(dsdt))?);
    xsdt.add_entry(place.put(&madt(vcpus))?);
    xsdt.add_entry(place.put(&mcfg())?);
    let xsdt = place.put(&bytes_of(&xsdt))?;
    let rsdp = bytes_of(&Rsdp::new(OEM, xsdt));
    memory.write_slice(&rsdp, GuestAddress(ACPI_START)).map_err(AcpiError::Write)?;
    Ok(ACPI_START)
}

struct Place<'a> {
    memory: &'a GuestMemoryMmap,
    at: u64,
}

impl Place<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let address = self.at;
        let end = address + table.len() as u64;
        if end > ACPI_END {
            return Err(AcpiError::Space(end - ACPI_START));
        }
        self.memory.write_slice(table, GuestAddress(address)).map_err(AcpiError::Write)?;
        self.at = end.next_multiple_of(16);
        Ok(address)
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(offset: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(POWER_PORT + offset))
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::TmrValExt)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(power::RESET, 8, AccessSize::ByteAccess);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL, 8, AccessSize::ByteAccess);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS, 8, AccessSize::ByteAccess);
    fadt.pm_tmr_blk = u32::from(POWER_PORT + power::TIMER).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port(power::TIMER, 32, AccessSize::DwordAccess);
    bytes_of(&fadt.finalize())
}

/// A guest makes room for every vCPU that is enabled or online capable (ACPI 6.5, section 5.2.12.2).
fn madt(vcpus: Vcpus) -> Vec<u8> {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..vcpus.most {
        let status = if id < vcpus.count { EnabledStatus::Enabled } else { EnabledStatus::DisabledOnlineCapable };
        madt.add_structure(ProcessorLocalApic::new(id, id, status));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    bytes_of(&madt)
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, (ECAM_BUSES - 1) as u8);
    bytes_of(&mcfg)
}

/// A table header with `body` behind it.
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(signature, 36, revision, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(body);
    table.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryBackend;

    struct Table {
        signature: [u8; 4],
        bytes: Vec<u8>,
    }

    fn read(memory: &GuestMemoryMmap, at: u64) -> Table {
        let length: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
        Table { signature: bytes[..4].try_into().unwrap(), bytes }
    }

    fn tables(count: u8, most: u8, mib: u64) -> Vec<Table> {
        let layout = Layout::new(mib, 46).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let rsdp = write(&memory, &layout, Vcpus { count, most }).unwrap();
        assert_eq!(rsdp % 16, 0);
        let mut head = [0u8; 36];
        memory.read_slice(&mut head, GuestAddress(rsdp)).unwrap();
        assert_eq!(&head[..8], b"RSD PTR ");
        assert_eq!(head[..20].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!(head.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let xsdt = read(&memory, u64::from_le_bytes(head[24..32].try_into().unwrap()));
        assert_eq!(&xsdt.signature, b"XSDT");
        let mut found: Vec<Table> = xsdt.bytes[36..]
            .chunks(8)
            .map(|entry| u64::from_le_bytes(entry.try_into().unwrap()))
            .inspect(|at| assert!(memory.address_in_range(GuestAddress(*at))))
            .map(|at| read(&memory, at))
            .collect();
        let dsdt = u64::from_le_bytes(found[0].bytes[140..148].try_into().unwrap());
        found.push(read(&memory, dsdt));
        found
    }

    #[test]
    fn every_table_is_reachable_and_sound() {
        for (count, most, mib) in [(1, 1, 128), (1, 4, 256), (8, 16, 5120), (128, 128, 262_144)] {
            let signatures: Vec<_> = tables(count, most, mib).iter().map(|table| table.signature).collect();
            assert_eq!(signatures, [*b"FACP", *b"APIC", *b"MCFG", *b"DSDT"]);
        }
    }

    #[test]
    fn the_madt_lists_each_vcpu_and_the_ioapic() {
        let tables = tables(100, 128, 1024);
        let mut rest = &tables[1].bytes[44..];
        let (mut cpus, mut ioapics) = (Vec::new(), 0);
        while let [kind, length, ..] = *rest {
            match kind {
                0 => cpus.push((rest[2], rest[3], u32::from_le_bytes(rest[4..8].try_into().unwrap()))),
                1 => ioapics += 1,
                other => panic!("unexpected entry {other}"),
            }
            rest = &rest[usize::from(length)..];
        }
        // Enabled, or disabled and online capable.
        assert_eq!(cpus, (0..128).map(|id| (id, id, if id < 100 { 1 } else { 2 })).collect::<Vec<_>>());
        assert_eq!(ioapics, 1);
    }

    fn places(bytes: &[u8], pattern: &[u8]) -> usize {
        bytes.windows(pattern.len()).filter(|window| *window == pattern).count()
    }

    #[test]
    fn the_dsdt_has_a_processor_for_each_vcpu_that_the_guest_can_have() {
        for (count, most) in [(1u8, 1u8), (1, 4), (4, 40)] {
            let tables = tables(count, most, 256);
            let dsdt = &tables[3].bytes;
            assert_eq!(places(dsdt, b"\x08_HID\x0DACPI0007\0"), usize::from(most));
            for id in 0..most {
                // A local APIC with this number and id, enabled (ACPI 6.5, sections 5.2.12.2 and 6.2.10).
                assert_eq!(places(dsdt, &[0, 8, id, id, 1, 0, 0, 0]), 1, "vCPU {id} of {most}");
                assert!(places(dsdt, format!("C0{id:02X}").as_bytes()) >= 1);
            }
            // The first one is there for good.
            let slots = crate::pci::bus::SLOTS - 1;
            assert_eq!(places(dsdt, b"_EJ0"), slots + usize::from(most) - 1);
        }
    }

    #[test]
    fn the_dsdt_says_where_the_identifier_of_the_generation_is() {
        let dsdt = &tables(1, 1, 256)[3].bytes;
        for name in [&b"\x08_CID\x0DVM_Gen_Counter\0"[..], b"\x08_DDN\x0DVM_Gen_Counter\0"] {
            assert_eq!(places(dsdt, name), 1);
        }
        // A package of two integers: a double word, and zero.
        let [a, b, c, d] = (crate::layout::GENERATION as u32).to_le_bytes();
        assert_eq!(places(dsdt, &[&b"\x08ADDR\x12"[..], &[8, 2, 0x0C, a, b, c, d, 0]].concat()), 1);
        // When bit 3 is set: notify it, with 0x80.
        assert_eq!(places(dsdt, b"\x7B\x60\x0A\x08\x61"), 1);
        assert_eq!(places(dsdt, b"\x86\x5C\x2E_SB_VGEN\x0A\x80"), 1);
    }

    #[test]
    fn the_identifier_lies_in_memory_that_the_guest_is_told_to_leave_alone() {
        let layout = Layout::new(256, 46).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        generation::set(&memory, [0xA5; 16]).unwrap();
        write(&memory, &layout, Vcpus { count: 128, most: 128 }).unwrap();
        let mut page = [0xFF; 4096];
        memory.read_slice(&mut page, GuestAddress(crate::layout::GENERATION)).unwrap();
        assert_eq!((&page[..16], page[16..].iter().any(|byte| *byte != 0)), (&[0xA5; 16][..], false));
        let place = crate::layout::GENERATION..crate::layout::GENERATION + 4096;
        let mut entries = layout.memory_map().into_iter();
        let (.., kind) = entries.find(|(start, length, _)| *start <= place.start && place.end <= start + length).unwrap();
        assert_eq!(kind, crate::layout::MemoryKind::Reserved);
    }

    #[test]
    fn the_fadt_names_the_power_registers() {
        let fadt = &tables(1, 1, 128)[0].bytes;
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_ne!(flags & (1 << 20), 0, "hardware-reduced");
        assert_ne!(flags & (1 << 10), 0, "reset register");
        assert_eq!(u64::from_le_bytes(fadt[120..128].try_into().unwrap()), u64::from(POWER_PORT + power::RESET));
        assert_eq!(fadt[128], power::RESET_VALUE);
        assert_eq!(u64::from_le_bytes(fadt[248..256].try_into().unwrap()), u64::from(POWER_PORT + power::SLEEP_CONTROL));
    }
}
