//! The DSDT: what the guest cannot find by probing. The PCI root with its windows, the serial port, the power button, the soft-off
//! state, the generic event device that delivers events (ACPI 6.5, section 5.6.9), and the slots whose devices come and go with them.
//! Processors, which come and go likewise, are in [`super::processors`], the identifier of the VM's generation in [`super::generation`].

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable::NotCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Package, Path,
    ResourceTemplate, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::{generation, processors, table};
use crate::layout::{ECAM_BUSES, ECAM_SIZE, ECAM_START, Layout, MMIO32_END, MMIO32_START};
use crate::pci::bus::SLOTS;
use crate::platform::{EVENT_IRQ, HOTPLUG_PORT, PCI_CONFIG_PORT, POWER_PORT, SERIAL_IRQ, SERIAL_PORT, hotplug, power};

/// Notification value of a pressed button (ACPI 6.5, table 5.175).
const BUTTON_PRESSED: u8 = 0x80;
/// Notification values (ACPI 6.5, table 5.173): look at the device again; it is asked back.
pub const DEVICE_CHECK: u8 = 1;
pub const EJECT_REQUEST: u8 = 3;

/// Terms that are encoded already.
pub struct Encoded(pub Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

pub fn build(layout: &Layout, most_vcpus: u8) -> Vec<u8> {
    let mut body = Vec::new();
    pci_root(layout, &mut body);
    reserved(&mut body);
    serial(&mut body);
    power_button(&mut body);
    generation::add(&mut body);
    processors::add(most_vcpus, &mut body);
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
            &OpRegion::new("PHPR".into(), OpRegionSpace::SystemIO, &HOTPLUG_PORT, &12u8),
            &Field::new(
                "PHPR".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"PCIU", 32), FieldEntry::Named(*b"PCID", 32), FieldEntry::Named(*b"PCEJ", 32)],
            ),
            &slots(),
            &look_at_slots(),
        ],
    )
    .to_aml_bytes(body);
}

// The fields of the region are its registers in this order.
const _: () = assert!(hotplug::ADDED == 0 && hotplug::WANTED_BACK == 4 && hotplug::EJECT == 8);

fn slot_name(slot: u32) -> Path {
    Path::new(&format!("S{slot:02X}_"))
}

/// Each slot but the host bridge's, whose device the guest can eject.
fn slots() -> Encoded {
    let mut encoded = Vec::new();
    for slot in 1..SLOTS as u32 {
        let eject = Path::new("PCEJ");
        Device::new(
            slot_name(slot),
            vec![
                &Name::new("_ADR".into(), &(slot << 16)),
                &Name::new("_SUN".into(), &slot),
                &Method::new("_EJ0".into(), 1, true, vec![&Store::new(&eject, &(1u32 << slot))]),
            ],
        )
        .to_aml_bytes(&mut encoded);
    }
    Encoded(encoded)
}

/// Tells the guest which slots have a new device, and which device is wanted back.
fn look_at_slots() -> Encoded {
    let (added, wanted_back) = (Path::new("PCIU"), Path::new("PCID"));
    let mut each = Vec::new();
    for slot in 1..SLOTS as u32 {
        for (register, notification) in [(Local(0), DEVICE_CHECK), (Local(1), EJECT_REQUEST)] {
            And::new(&Local(2), &register, &(1u32 << slot)).to_aml_bytes(&mut each);
            If::new(&Local(2), vec![&Notify::new(&slot_name(slot), &notification)]).to_aml_bytes(&mut each);
        }
    }
    let mut encoded = Vec::new();
    Method::new("PSCN".into(), 0, true, vec![&Store::new(&Local(0), &added), &Store::new(&Local(1), &wanted_back), &Encoded(each)])
        .to_aml_bytes(&mut encoded);
    Encoded(encoded)
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
                    &And::new(&Local(1), &Local(0), &power::EVENT_PCI),
                    &If::new(&Local(1), vec![&MethodCall::new("\\_SB_.PCI0.PSCN".into(), vec![])]),
                    &And::new(&Local(1), &Local(0), &power::EVENT_PROCESSORS),
                    &If::new(&Local(1), vec![&MethodCall::new(processors::LOOK.into(), vec![])]),
                    &And::new(&Local(1), &Local(0), &power::EVENT_GENERATION),
                    &If::new(&Local(1), vec![&Notify::new(&Path::new(generation::DEVICE), &generation::CHANGED)]),
                ],
            ),
        ],
    )
    .to_aml_bytes(body);
}
