use clap_complete::engine::ArgValueCompleter;
use form_api::vm::RenameRequest;
use form_types::Name;

use crate::{args::vm_name, complete, failure::Outcome, operation::settle, session::Session};

/// Give a VM another name: for commands, in DNS, and in the VM itself
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    name: Name,
    /// Its new name
    #[arg(value_name = "NEW", value_parser = vm_name)]
    new: Name,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let Args { name, new } = args;
    let operation = settle(session, &client, client.rename(&name, &RenameRequest { name: new.clone() }).await?).await?;
    session.terminal.done(&operation, new.as_str(), &format!("{name}: renamed to {new}"))?;
    Ok(0)
}
