//! The DSDT: what the guest cannot find by probing. The PCI root with its windows, the serial port, the power button, the soft-off
//! state, and the generic event device that delivers events (ACPI 6.5, section 5.6.9); hotplug hangs itself on that device.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable::NotCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package, Path,
    ResourceTemplate, Store, ZERO,
};

use super::table;
use crate::layout::{ECAM_BUSES, ECAM_SIZE, ECAM_START, Layout, MMIO32_END, MMIO32_START};
use crate::platform::{EVENT_IRQ, PCI_CONFIG_PORT, POWER_PORT, SERIAL_IRQ, SERIAL_PORT, power};

/// Notification value of a pressed button (ACPI 6.5, table 5.175).
const BUTTON_PRESSED: u8 = 0x80;

pub fn build(layout: &Layout) -> Vec<u8> {
    let mut body = Vec::new();
    pci_root(layout, &mut body);
    reserved(&mut body);
    serial(&mut body);
    power_button(&mut body);
    events(&mut body);
    // One value is enough for the sleep control register; old interpreters want four.
    Name::new("_S5_".into(), &Package::new(vec![&power::SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut body);
    table(*b"DSDT", 6, &body)
}

fn pci_root(layout: &Layout, body: &mut Vec<u8>) {
    Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, (ECAM_BUSES - 1) as u16),
                    &IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8),
                    &AddressSpace::new_io(0x1000u16, 0xFFFFu16, None),
                    &AddressSpace::new_memory(NotCacheable, true, MMIO32_START as u32, (MMIO32_END - 1) as u32, None),
                    &AddressSpace::new_memory(NotCacheable, true, layout.mmio64_start, layout.mmio64_end - 1, None),
                ]),
            ),
        ],
    )
    .to_aml_bytes(body);
}

/// Configuration space must be reserved by a motherboard resource, or the guest will not use it (PCI Firmware 3.3, section 4.1.2).
fn reserved(body: &mut Vec<u8>) {
    Device::new(
        "_SB_.MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&Memory32Fixed::new(true, ECAM_START as u32, ECAM_SIZE as u32)])),
        ],
    )
    .to_aml_bytes(body);
}

fn serial(body: &mut Vec<u8>) {
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, SERIAL_IRQ),
                    &IO::new(SERIAL_PORT, SERIAL_PORT, 0, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(body);
}

fn power_button(body: &mut Vec<u8>) {
    Device::new("_SB_.PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C")), &Name::new("_UID".into(), &ZERO)])
        .to_aml_bytes(body);
}

fn events(body: &mut Vec<u8>) {
    let pending = Path::new("EVTS");
    Device::new(
        "_SB_.GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, EVENT_IRQ)])),
            &OpRegion::new("EVTR".into(), OpRegionSpace::SystemIO, &(POWER_PORT + power::EVENTS), &1u8),
            &Field::new(
                "EVTR".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 8)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &pending),
                    &And::new(&Local(1), &Local(0), &power::EVENT_POWER_BUTTON),
                    &If::new(&Local(1), vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &BUTTON_PRESSED)]),
                ],
            ),
        ],
    )
    .to_aml_bytes(body);
}
