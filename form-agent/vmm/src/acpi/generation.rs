//! The identifier of the VM's generation (Microsoft, "Virtual Machine Generation ID"; Linux: `drivers/virt/vmgenid.c`): 16 random bytes in
//! guest memory, which are others whenever the VM goes on from what it was before: after a restore, and in each copy of it. A guest that is
//! told so draws its keys and random numbers anew.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, Name, Package, ZERO};
use vm_memory::{Bytes, GuestAddress};

use super::AcpiError;
use crate::layout::GENERATION;
use crate::memory::GuestMemoryMmap;

/// Where a guest finds the device.
pub const DEVICE: &str = "\\_SB_.VGEN";
/// Notification value: the identifier has changed.
pub const CHANGED: u8 = 0x80;

/// The device. `ADDR` is where the identifier is: the lower and the upper half of its address.
pub fn add(body: &mut Vec<u8>) {
    Device::new(
        DEVICE.into(),
        vec![
            &Name::new("_HID".into(), &"FORMVGEN"),
            // Guests know it by these two.
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("ADDR".into(), &Package::new(vec![&(GENERATION as u32), &((GENERATION >> 32) as u32)])),
        ],
    )
    .to_aml_bytes(body);
}

/// Makes `identifier` that of a VM whose vCPUs stand.
///
/// # Errors
/// When the VM has no memory there.
pub fn set(memory: &GuestMemoryMmap, identifier: [u8; 16]) -> Result<(), AcpiError> {
    memory.write_slice(&identifier, GuestAddress(GENERATION)).map_err(AcpiError::Write)
}
