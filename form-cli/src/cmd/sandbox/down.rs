use form_types::Name;
use serde::Serialize;

use super::Which;
use crate::{
    context::ConfigFile,
    failure::Outcome,
    sandbox::{self, Record, Sandbox},
    session::Session,
};

/// Remove a sandbox with all its hosts and VMs; the context that was current before is current again
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    which: Which,
}

#[derive(Serialize)]
struct Removed {
    name: Name,
    /// Whether there was anything.
    removed: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let name = args.which.name;
    let config = ConfigFile::load()?.config;
    let sandbox = Sandbox::open(session, &config, &name).await?;
    let mut removed = sandbox.is_some();
    let mut previous = None;
    if let Some(sandbox) = sandbox {
        // A record that cannot be read is no reason to keep anything; the context before is forgotten then.
        previous = Record::load(&sandbox.directory).ok().flatten().and_then(|record| record.previous_context);
        sandbox.stop()?;
        sandbox.remove()?;
    }
    removed |= sandbox::remove_context(&name, previous)?;
    let sentence = if removed { format!("The sandbox {name} is gone") } else { format!("There is no sandbox {name}: nothing to remove") };
    session.terminal.done(&Removed { name: name.clone(), removed }, name.as_str(), &sentence)?;
    Ok(0)
}
