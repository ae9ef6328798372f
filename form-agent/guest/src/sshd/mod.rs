//! An SSH server for images that have none of their own: a process beside PID 1, started only where a user of the settings can log in
//! with it. The protocol is `russh`'s; who may come in is decided by what sshd(8) would read: passwd, shadow and authorized_keys.

mod account;
mod authorized_keys;
mod connection;
mod flow;
mod host_key;
mod keeper;
mod modes;
mod password;
mod rules;
mod server;
mod session;

use std::{io, path::Path, process::ExitCode};

pub use keeper::{Keeper, PORT, listens};
pub use rules::{image_server, wanted};

use crate::report::say;

/// How the process ends when another program has the port.
const PORT_TAKEN: u8 = 98;

/// The process itself: reads its rules from standard input and serves until it is ended.
pub fn run() -> ExitCode {
    let rules = match serde_json::from_reader(io::stdin().lock()) {
        Ok(rules) => rules,
        Err(error) => {
            say(format_args!("sshd reads its rules from standard input, as form-guest gives them: {error}"));
            return ExitCode::from(2);
        }
    };
    match server::run(Path::new("/"), rules) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is_taken_port() => ExitCode::from(PORT_TAKEN),
        Err(error) => {
            say(format_args!("sshd: {error}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests;
