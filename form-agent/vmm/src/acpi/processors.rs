//! The processors in the DSDT (ACPI 6.5, section 8.4): a device for each vCPU that the guest can have, which says whether it is there,
//! and can be let go. Each has a bit of its own in the registers ([`crate::platform::processors`]), so that no two methods get in each
//! other's way.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, BufferData, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method, Name, Notify, OpRegion,
    OpRegionSpace, Path, Return, Store, ZERO,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};

use super::dsdt::{DEVICE_CHECK, EJECT_REQUEST, Encoded};
use crate::platform::processors::{ADDED, EJECT, PRESENT, WANTED_BACK, WORDS};
use crate::platform::{PROCESSORS_PORT, PROCESSORS_PORTS};

/// The method that looks which processors came, and which are wanted back.
pub const LOOK: &str = "\\_SB_.CPUS.CSCN";
/// Present, enabled, shown, working (ACPI 6.5, section 6.3.7).
const IS_THERE: u8 = 0xF;
/// Of `_HID` (ACPI 6.5, section 5.6.7): a processor, and what holds them.
const PROCESSOR: &str = "ACPI0007";
const CONTAINER: &str = "ACPI0010";

// The fields of the region are the registers in this order.
const _: () = assert!(PRESENT == 0 && ADDED == 0x10 && WANTED_BACK == 0x20 && EJECT == 0x30 && WORDS == 4);

fn processor(id: u8) -> Path {
    Path::new(&format!("C0{id:02X}"))
}

/// The register of this kind that has the bit of `id`: present, added, wanted back, eject.
fn register(kind: char, id: u8) -> Path {
    Path::new(&format!("CP{kind}{}", id / 32))
}

fn bit(id: u8) -> u32 {
    1 << (id % 32)
}

pub fn add(most: u8, body: &mut Vec<u8>) {
    let mut names = Vec::new();
    for kind in [b'P', b'A', b'W', b'E'] {
        names.extend((0..WORDS as u8).map(|word| FieldEntry::Named([b'C', b'P', kind, b'0' + word], 32)));
    }
    let mut processors = Vec::new();
    for id in 0..most {
        describe(id, &mut processors);
    }
    Device::new(
        "_SB_.CPUS".into(),
        vec![
            &Name::new("_HID".into(), &CONTAINER),
            &Name::new("_UID".into(), &ZERO),
            &OpRegion::new("CPUR".into(), OpRegionSpace::SystemIO, &PROCESSORS_PORT, &(PROCESSORS_PORTS as u8)),
            &Field::new("CPUR".into(), FieldAccessType::DWord, FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes, names),
            &Encoded(processors),
            &look(most),
        ],
    )
    .to_aml_bytes(body);
}

fn describe(id: u8, encoded: &mut Vec<u8>) {
    let (present, eject) = (register('P', id), register('E', id));
    let mut apic = Vec::new();
    ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut apic);
    let (hid, uid, mat) = (Name::new("_HID".into(), &PROCESSOR), Name::new("_UID".into(), &id), BufferData::new(apic));
    let mat = Name::new("_MAT".into(), &mat);
    let own_bit = bit(id);
    let is_there = And::new(&Local(0), &present, &own_bit);
    let (here, gone) = (Return::new(&IS_THERE), Return::new(&ZERO));
    let if_there = If::new(&Local(0), vec![&here]);
    let status = Method::new("_STA".into(), 0, false, vec![&is_there, &if_there, &gone]);
    let let_go = Store::new(&eject, &own_bit);
    let ejection = Method::new("_EJ0".into(), 1, true, vec![&let_go]);
    let mut parts: Vec<&dyn Aml> = vec![&hid, &uid, &mat, &status];
    if id != 0 {
        parts.push(&ejection);
    }
    Device::new(processor(id), parts).to_aml_bytes(encoded);
}

/// Reading a register clears it, so each is read once.
fn look(most: u8) -> Encoded {
    let mut each = Vec::new();
    for id in 0..most {
        if id.is_multiple_of(32) {
            Store::new(&Local(0), &register('A', id)).to_aml_bytes(&mut each);
            Store::new(&Local(1), &register('W', id)).to_aml_bytes(&mut each);
        }
        for (word, notification) in [(Local(0), DEVICE_CHECK), (Local(1), EJECT_REQUEST)] {
            And::new(&Local(2), &word, &bit(id)).to_aml_bytes(&mut each);
            If::new(&Local(2), vec![&Notify::new(&processor(id), &notification)]).to_aml_bytes(&mut each);
        }
    }
    let mut encoded = Vec::new();
    Method::new("CSCN".into(), 0, true, vec![&Encoded(each)]).to_aml_bytes(&mut encoded);
    Encoded(encoded)
}
