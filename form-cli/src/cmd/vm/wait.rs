use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{args::vm_name, cmd::wait, complete, failure::Outcome, session::Session};

/// Wait until a VM is as asked; fail at once when it never will be
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    name: Name,
    /// What to wait for
    #[arg(long = "for", value_name = "CONDITION", value_enum, default_value = "ready")]
    condition: wait::Condition,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let vm = wait::wait(&client, &args.name, args.condition, session.deadline()).await?;
    wait::report(session, &vm, args.condition)
}
