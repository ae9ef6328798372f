//! `form-guest`: PID 1 and agent inside a VM. As process 1 it starts the machine; as `form-guest agent` it serves the host beside the
//! image's own init; as `form-guest sshd` it is the SSH server of images that have none; `form-guest measure` is for `form bench`.

mod accounts;
mod agent;
mod boot;
mod environment;
mod error;
mod files;
mod freeze;
mod hold;
mod identity;
mod init;
mod machine;
mod measure;
mod network;
mod new_identity;
mod power;
mod process;
mod processors;
mod report;
mod serve;
mod service;
mod settings;
mod sshd;
mod sys;
mod terminal;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        _ if std::process::id() == 1 => {
            // A kernel whose process 1 ends panics and says nothing useful: end the machine in order instead.
            let Err(_) = std::panic::catch_unwind(|| init::run());
            report::say(format_args!("process 1 has failed; the machine powers off"));
            power::halt(false)
        }
        Some("agent") => match agent::run() {
            Err(error) => {
                report::say(format_args!("{error}"));
                ExitCode::FAILURE
            }
        },
        Some("sshd") => sshd::run(),
        Some("measure") => measure::run(arguments),
        Some("--version") => {
            println!("form-guest {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        _ => {
            report::say(format_args!("this is the first process of a virtual machine; started by hand it knows `agent` and `--version`"));
            ExitCode::from(2)
        }
    }
}
