//! The keyboard controller, as far as an operating system uses it to reset the machine.

/// Pulse output line 0: the CPU's reset pin.
const RESET: u8 = 0xFE;

/// Whether this write to the command port is a request to reset.
#[must_use]
pub fn is_reset(data: &[u8]) -> bool {
    data.first() == Some(&RESET)
}

/// The status register: no output waiting, ready for a command, self-test passed.
pub const STATUS: u8 = 0x04;
