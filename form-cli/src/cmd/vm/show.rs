use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{args::vm_name, complete, failure::Outcome, session::Session, vm_view};

/// Show everything about a VM
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VM
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    name: Name,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let detail = session.client()?.vm(&args.name).await?;
    session.terminal.show(&detail, &vm_view::record(&detail))?;
    Ok(0)
}
