use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    complete,
    context::ConfigFile,
    failure::{Failure, Outcome},
    session::Session,
    ui::Record,
};

/// Show a context and its hosts
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The context; the current one without it
    #[arg(add = ArgValueCompleter::new(complete::contexts))]
    name: Option<Name>,
}

pub fn run(args: &Args, session: &Session) -> Outcome {
    let config = ConfigFile::load()?.config;
    let Some(context) = config.chosen(args.name.as_ref().or(session.global.context.as_ref()))? else {
        return Err(Failure::not_found("there is no context").hint("`form host add ADDRESS --token TOKEN` makes one"));
    };
    let hosts: Vec<String> = context.hosts.iter().map(|host| format!("{}  {}  {}", host.label(), host.address, host.public_key)).collect();
    let record = Record::new(context.name.to_string())
        .field("name", &context.name)
        .field("current", if config.current.as_ref() == Some(&context.name) { "yes" } else { "no" })
        .field("kind", context.kind.as_str())
        .optional("sandbox", context.sandbox.as_ref().map(|path| path.display()))
        .field("hosts", hosts.join("\n"));
    session.terminal.show(context, &record)?;
    Ok(0)
}
