use std::io::IsTerminal;

use clap_complete::engine::ArgValueCompleter;
use form_types::Name;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{args::vm_name, complete, failure::Outcome, session::Session};

/// Use a VM's serial console; Ctrl-] leaves it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    name: Name,
}

/// Ctrl-]
const LEAVE: u8 = 0x1d;

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let tunnel = client.console(&args.name).await?;
    let tty = std::io::stdin().is_terminal();
    if tty {
        session.terminal.note(format!("The console of {}. Ctrl-] leaves it.", args.name));
    }
    let raw = if tty { Some(session.terminal.raw_mode()?) } else { None };
    let (mut reader, mut writer) = tokio::io::split(tunnel);
    let mut stdin = tokio::io::stdin();
    let (mut typed, mut printed) = (vec![0; 1024], vec![0; 16 * 1024]);
    let mut reading = true;
    loop {
        tokio::select! {
            read = reader.read(&mut printed) => match read {
                Ok(0) | Err(_) => break,
                Ok(length) => session.terminal.print_bytes(&printed[..length]),
            },
            read = stdin.read(&mut typed), if reading => match read {
                Ok(0) | Err(_) => reading = false,
                Ok(length) if tty && typed[..length].contains(&LEAVE) => break,
                // A console that takes nothing has ended, which the reader sees.
                Ok(length) => drop(writer.write_all(&typed[..length]).await),
            },
        }
    }
    drop(raw);
    if tty {
        session.terminal.note("");
    }
    Ok(0)
}
