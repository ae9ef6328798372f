use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{complete, context::ConfigFile, failure::Outcome, session::Session};

/// Choose the context that commands use from now on
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The context
    #[arg(add = ArgValueCompleter::new(complete::contexts))]
    name: Name,
}

pub fn run(args: Args, session: &Session) -> Outcome {
    let mut file = ConfigFile::load()?;
    let context = file.config.chosen(Some(&args.name))?.cloned();
    file.config.current = Some(args.name.clone());
    file.save()?;
    session.terminal.done(&context, args.name.as_str(), &format!("The current context is {}", args.name))?;
    Ok(0)
}
