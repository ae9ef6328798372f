//! The PCI bus (PCI Local Bus 3.0, PCI Express 5.0 section 7): one root bus, endpoints without legacy interrupts.

pub mod bus;
pub mod config_space;
pub mod interrupts;
pub mod msix;

/// A PCI endpoint: one function in one slot.
pub trait PciDevice: Send {
    /// Reads four bytes of configuration space; `register` is a byte offset that is a multiple of four.
    fn read_config(&mut self, register: u16) -> u32;
    /// Writes one to four bytes to configuration space from `offset` on; they never cross a multiple of four.
    fn write_config(&mut self, offset: u16, data: &[u8]);
    /// Where the device's memory lies now: start and length, while the guest has it switched on.
    fn memory(&self) -> Option<(u64, u64)>;
    /// Reads from the device's memory; `offset` counts from its start.
    fn read_memory(&mut self, offset: u64, data: &mut [u8]);
    fn write_memory(&mut self, offset: u64, data: &[u8]);
}
