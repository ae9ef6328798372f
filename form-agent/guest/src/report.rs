//! What the start found and what went wrong in it: kept for the host's ready request, and said on the console at once.

use std::{fmt::Display, io::Write};

use form_guest::protocol::{DeviceReport, Fault};
use serde::{Deserialize, Serialize};

/// Handed from PID 1 to the agent (through a file when the image's own init runs in between).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct BootReport {
    pub faults: Vec<Fault>,
    pub devices: Vec<DeviceReport>,
}

impl BootReport {
    /// Something is not as it should be, and the machine works without it.
    pub fn warn(&mut self, step: &str, message: impl Display) {
        self.add(step, message.to_string(), false);
    }

    /// The machine is not what was asked for.
    pub fn fatal(&mut self, step: &str, message: impl Display) {
        self.add(step, message.to_string(), true);
    }

    fn add(&mut self, step: &str, message: String, fatal: bool) {
        say(format_args!("{}{step}: {message}", if fatal { "FAILED " } else { "warning: " }));
        self.faults.push(Fault { step: step.to_owned(), message, fatal });
    }

    /// Notes the fault of a step that may fail. Gives whether it went well.
    pub fn warn_on<T, E: Display>(&mut self, step: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.warn(step, error)).ok()
    }

    /// Notes the fault of a step that must not fail.
    pub fn fatal_on<T, E: Display>(&mut self, step: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.fatal(step, error)).ok()
    }

    pub fn failed(&self) -> bool {
        self.faults.iter().any(|fault| fault.fatal)
    }
}

/// One line on the console. A console that does not take it is no reason to stop.
pub fn say(message: std::fmt::Arguments<'_>) {
    let line = format!("form-guest: {message}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}
