//! Where the guest's port and memory accesses go.

use std::sync::Arc;

use crate::control::ExitReason;
use crate::layout::{ECAM_SIZE, ECAM_START};
use crate::pci::bus::PciBus;
use crate::platform::hotplug::Hotplug;
use crate::platform::power::{Power, PowerRequest};
use crate::platform::processors::Processors;
use crate::platform::serial::SerialPort;
use crate::platform::{
    HOTPLUG_PORT, HOTPLUG_PORTS, I8042_COMMAND, PCI_CONFIG_PORT, POWER_PORT, POWER_PORTS, PROCESSORS_PORT, PROCESSORS_PORTS, SERIAL_PORT,
    i8042,
};

const ECAM_END: u64 = ECAM_START + ECAM_SIZE;
const SERIAL_END: u16 = SERIAL_PORT + 8;
const PCI_CONFIG_END: u16 = PCI_CONFIG_PORT + 8;
const POWER_END: u16 = POWER_PORT + POWER_PORTS;
const HOTPLUG_END: u16 = HOTPLUG_PORT + HOTPLUG_PORTS;
const PROCESSORS_END: u16 = PROCESSORS_PORT + PROCESSORS_PORTS;

pub struct Bus {
    pub serial: Arc<SerialPort>,
    pub power: Arc<Power>,
    pub pci: Arc<PciBus>,
    pub hotplug: Arc<Hotplug>,
    pub processors: Arc<Processors>,
}

impl Bus {
    /// Returns how the VM ends, if this write ends it.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        match port {
            SERIAL_PORT..SERIAL_END => {
                // A string instruction arrives as several bytes for one register. Raising the line only fails when its counter is
                // full, and then it is raised already.
                for byte in data {
                    let _ = self.serial.write((port - SERIAL_PORT) as u8, std::slice::from_ref(byte));
                }
            }
            PCI_CONFIG_PORT..PCI_CONFIG_END => self.pci.write_port(port - PCI_CONFIG_PORT, data),
            POWER_PORT..POWER_END => {
                return self.power.write(port - POWER_PORT, data).map(|request| match request {
                    PowerRequest::Off => ExitReason::PowerOff,
                    PowerRequest::Reset => ExitReason::Reset,
                });
            }
            HOTPLUG_PORT..HOTPLUG_END => {
                for slot in self.hotplug.write(port - HOTPLUG_PORT, data) {
                    self.pci.remove(slot);
                    self.hotplug.gone(slot);
                }
            }
            PROCESSORS_PORT..PROCESSORS_END => self.processors.write(port - PROCESSORS_PORT, data),
            I8042_COMMAND if i8042::is_reset(data) => return Some(ExitReason::Reset),
            _ => {}
        }
        None
    }

    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL_PORT..SERIAL_END => {
                for byte in data {
                    let _ = self.serial.read((port - SERIAL_PORT) as u8, std::slice::from_mut(byte));
                }
            }
            PCI_CONFIG_PORT..PCI_CONFIG_END => self.pci.read_port(port - PCI_CONFIG_PORT, data),
            POWER_PORT..POWER_END => self.power.read(port - POWER_PORT, data),
            HOTPLUG_PORT..HOTPLUG_END => self.hotplug.read(port - HOTPLUG_PORT, data),
            PROCESSORS_PORT..PROCESSORS_END => self.processors.read(port - PROCESSORS_PORT, data),
            I8042_COMMAND => data.fill(i8042::STATUS),
            // Nobody there: the bus floats high.
            _ => data.fill(0xFF),
        }
    }

    pub fn write_memory(&self, address: u64, data: &[u8]) {
        match address {
            ECAM_START..ECAM_END => self.pci.write_ecam(address - ECAM_START, data),
            _ => drop(self.pci.write_memory(address, data)),
        }
    }

    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        match address {
            ECAM_START..ECAM_END => self.pci.read_ecam(address - ECAM_START, data),
            _ => {
                if !self.pci.read_memory(address, data) {
                    data.fill(0xFF);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::power;
    use crate::platform::processors::ProcessorsState;
    use crate::platform::serial::Sink;
    use vmm_sys_util::eventfd::EventFd;

    fn bus() -> Bus {
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Bus {
            serial: Arc::new(SerialPort::new(Sink::Stdout, event()).unwrap()),
            power: Arc::new(Power::new(event())),
            pci: Arc::new(PciBus::default()),
            hotplug: Arc::new(Hotplug::new().unwrap()),
            processors: Arc::new(Processors::new(&ProcessorsState::new(1, 2), event())),
        }
    }

    #[test]
    fn the_ways_out() {
        let bus = bus();
        assert_eq!(bus.write_port(POWER_PORT + power::SLEEP_CONTROL, &[0x34]), Some(ExitReason::PowerOff));
        assert_eq!(bus.write_port(POWER_PORT + power::RESET, &[1]), Some(ExitReason::Reset));
        assert_eq!(bus.write_port(0x64, &[0xFE]), Some(ExitReason::Reset));
        assert_eq!(bus.write_port(0x64, &[0x20]), None);
    }

    #[test]
    fn any_port_and_address_can_be_touched() {
        let bus = bus();
        for port in (0..=u16::MAX).filter(|port| !(SERIAL_PORT..SERIAL_END).contains(port)) {
            for length in [1usize, 2, 4] {
                bus.read_port(port, &mut vec![0; length]);
                bus.write_port(port, &vec![0xA5; length]);
            }
        }
        for address in [0xC000_0000, ECAM_START, ECAM_END - 1, ECAM_END, 0xFEC0_0000, 1 << 40, u64::MAX] {
            for length in [1usize, 2, 4, 8] {
                bus.read_memory(address, &mut vec![0; length]);
                bus.write_memory(address, &vec![0xA5; length]);
            }
        }
    }
}
