use clap_complete::engine::ArgValueCompleter;

use crate::{
    complete,
    context::ConfigFile,
    failure::{Failure, Outcome},
    session::Session,
};

/// Forget a host; its VMs run on, and it stays yours
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Its name or address
    #[arg(value_name = "HOST", add = ArgValueCompleter::new(complete::hosts))]
    name: String,
}

pub fn run(args: &Args, session: &Session) -> Outcome {
    let mut file = ConfigFile::load()?;
    let wanted = session.global.context.clone();
    let matches = |context: &crate::context::Context| wanted.as_ref().is_none_or(|name| *name == context.name);
    let removed = file.config.contexts.iter_mut().filter(|context| matches(context)).find_map(|context| {
        let index = context.hosts.iter().position(|host| host.is_called(&args.name))?;
        Some((context.name.clone(), context.hosts.remove(index)))
    });
    let Some((context, host)) = removed else {
        return Err(Failure::not_found(format!("no host `{}` has been added", args.name)).hint("`form host ls` lists them"));
    };
    session.terminal.confirm(&format!("Forget {} ({}) of the context {context}?", host.label(), host.address))?;
    file.save()?;
    session.terminal.done(&host, host.label(), &format!("{}: forgotten", host.label()))?;
    Ok(0)
}
