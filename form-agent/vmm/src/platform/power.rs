//! Power registers, in the form of hardware-reduced ACPI (ACPI 6.5, sections 4.8.3.6, 4.8.3.7, 5.6.9): sleep control and status,
//! reset, the power management timer, and the register that tells the generic event device what happened.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

/// Offsets from `POWER_PORT`.
pub const SLEEP_CONTROL: u16 = 0;
pub const SLEEP_STATUS: u16 = 1;
pub const RESET: u16 = 2;
pub const EVENTS: u16 = 4;
pub const TIMER: u16 = 8;

/// The value that `RESET` wants.
pub const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of the state S5 (soft off), as `\_S5` says.
pub const SLEEP_TYPE_S5: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;
/// Bits of `EVENTS`; reading clears them.
pub const EVENT_POWER_BUTTON: u8 = 1 << 0;
/// The registers of PCI hotplug have something new.
pub const EVENT_PCI: u8 = 1 << 1;
/// The registers of vCPU hotplug have something new.
pub const EVENT_PROCESSORS: u8 = 1 << 2;
/// The identifier of the VM's generation is another.
pub const EVENT_GENERATION: u8 = 1 << 3;
/// ACPI 6.5, section 4.8.2.1.
const TIMER_HZ: u128 = 3_579_545;

/// What a write to a power register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    Off,
    Reset,
}

/// What is saved of the power registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowerState {
    /// Bits of `EVENTS` that the guest has not read.
    pub events: u8,
    /// How long the timer has run.
    pub timer_ns: u64,
}

impl PowerState {
    /// What a guest that goes on from this is told first. One that knows no such event overlooks it.
    #[must_use]
    pub fn in_a_new_generation(self) -> Self {
        PowerState { events: self.events | EVENT_GENERATION, ..self }
    }
}

pub struct Power {
    started: Instant,
    /// What the timer showed then.
    before: Duration,
    events: AtomicU8,
    interrupt: EventFd,
}

impl Power {
    /// `interrupt` raises the event device's line.
    #[must_use]
    pub fn new(interrupt: EventFd) -> Self {
        Power { started: Instant::now(), before: Duration::ZERO, events: AtomicU8::new(0), interrupt }
    }

    #[must_use]
    pub fn save(&self) -> PowerState {
        let timer_ns = u64::try_from(self.elapsed().as_nanos()).unwrap_or(u64::MAX);
        PowerState { events: self.events.load(Ordering::Acquire), timer_ns }
    }

    /// Registers with saved state. The interrupt of an event that the guest has not read may have been on its way: it is raised again.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn restore(state: PowerState, interrupt: EventFd) -> std::io::Result<Self> {
        if state.events != 0 {
            interrupt.write(1)?;
        }
        let before = Duration::from_nanos(state.timer_ns);
        Ok(Power { started: Instant::now(), before, events: AtomicU8::new(state.events), interrupt })
    }

    fn elapsed(&self) -> Duration {
        self.before.saturating_add(self.started.elapsed())
    }

    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn press_button(&self) -> std::io::Result<()> {
        self.raise(EVENT_POWER_BUTTON)
    }

    /// Has the event device tell the guest of an event.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn raise(&self, event: u8) -> std::io::Result<()> {
        self.events.fetch_or(event, Ordering::AcqRel);
        self.interrupt.write(1)
    }

    #[must_use]
    pub fn write(&self, register: u16, data: &[u8]) -> Option<PowerRequest> {
        match (register, data) {
            (SLEEP_CONTROL, [value, ..]) if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == SLEEP_TYPE_S5 => Some(PowerRequest::Off),
            (RESET, [RESET_VALUE, ..]) => Some(PowerRequest::Reset),
            _ => None,
        }
    }

    pub fn read(&self, register: u16, data: &mut [u8]) {
        data.fill(0);
        match register {
            EVENTS => {
                if let Some(first) = data.first_mut() {
                    *first = self.events.swap(0, Ordering::AcqRel);
                }
            }
            TIMER => {
                let ticks = self.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000;
                for (byte, value) in data.iter_mut().zip((ticks as u32).to_le_bytes()) {
                    *byte = value;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn power() -> Power {
        Power::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn only_s5_with_enable_powers_off() {
        let power = power();
        assert_eq!(power.write(SLEEP_CONTROL, &[(5 << 2) | 0x20]), Some(PowerRequest::Off));
        for value in [0, 5 << 2, 0x20, (3 << 2) | 0x20] {
            assert_eq!(power.write(SLEEP_CONTROL, &[value]), None);
        }
        assert_eq!(power.write(RESET, &[RESET_VALUE]), Some(PowerRequest::Reset));
        assert_eq!(power.write(RESET, &[]), None);
        assert_eq!(power.write(15, &[1, 2, 3, 4]), None);
    }

    #[test]
    fn a_button_press_is_seen_once_and_raises_the_line() {
        let power = power();
        power.press_button().unwrap();
        power.press_button().unwrap();
        assert_eq!(power.interrupt.read().unwrap(), 2);
        let mut data = [0u8; 1];
        power.read(EVENTS, &mut data);
        assert_eq!(data, [EVENT_POWER_BUTTON]);
        power.read(EVENTS, &mut data);
        assert_eq!(data, [0]);
    }

    #[test]
    fn saved_registers_come_back_with_their_interrupt() {
        let power = power();
        power.press_button().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let state = power.save();
        assert!(state.timer_ns >= 2_000_000);
        let again = Power::restore(state, EventFd::new(libc::EFD_NONBLOCK).unwrap()).unwrap();
        assert_eq!(again.interrupt.read().unwrap(), 1);
        assert!(again.save().timer_ns >= state.timer_ns);
        let mut data = [0u8; 1];
        again.read(EVENTS, &mut data);
        assert_eq!(data, [EVENT_POWER_BUTTON]);
        let quiet = Power::restore(again.save(), EventFd::new(libc::EFD_NONBLOCK).unwrap()).unwrap();
        assert!(quiet.interrupt.read().is_err());
        assert!(Power::restore(PowerState { events: 0, timer_ns: u64::MAX }, EventFd::new(0).unwrap()).is_ok());
    }

    #[test]
    fn a_new_generation_is_told_with_what_was_not_read() {
        for before in [0, EVENT_POWER_BUTTON] {
            let state = PowerState { events: before, timer_ns: 7 }.in_a_new_generation();
            let power = Power::restore(state, EventFd::new(libc::EFD_NONBLOCK).unwrap()).unwrap();
            assert_eq!(power.interrupt.read().unwrap(), 1);
            let mut data = [0u8; 1];
            power.read(EVENTS, &mut data);
            assert_eq!(data, [before | EVENT_GENERATION]);
        }
    }

    #[test]
    fn the_timer_goes_on() {
        let power = power();
        let mut early = [0u8; 4];
        power.read(TIMER, &mut early);
        std::thread::sleep(std::time::Duration::from_millis(5));
        let mut late = [0u8; 4];
        power.read(TIMER, &mut late);
        let ticks = u32::from_le_bytes(late) - u32::from_le_bytes(early);
        assert!(ticks >= 17_000, "{ticks} ticks in 5 ms");
    }
}
