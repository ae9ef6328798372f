//! The few devices that are not on PCI, their ports and their interrupt lines.

pub mod hotplug;
pub mod i8042;
pub mod power;
pub mod processors;
pub mod serial;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3F8;
pub const SERIAL_IRQ: u32 = 4;
/// The power registers: see [`power`].
pub const POWER_PORT: u16 = 0x600;
pub const POWER_PORTS: u16 = 0x10;
/// The registers of PCI hotplug: see [`hotplug`].
pub const HOTPLUG_PORT: u16 = 0x610;
pub const HOTPLUG_PORTS: u16 = 0x10;
/// The registers of vCPU hotplug: see [`processors`].
pub const PROCESSORS_PORT: u16 = 0x640;
pub const PROCESSORS_PORTS: u16 = 0x40;
/// The generic event device raises this line (edge).
pub const EVENT_IRQ: u32 = 9;
pub const I8042_DATA: u16 = 0x60;
pub const I8042_COMMAND: u16 = 0x64;
/// PCI configuration mechanism #1.
pub const PCI_CONFIG_PORT: u16 = 0xCF8;
