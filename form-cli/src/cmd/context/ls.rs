use crate::{context::ConfigFile, failure::Outcome, session::Session, ui::Table};

/// List contexts; the current one has a star
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_: &Args, session: &Session) -> Outcome {
    let config = ConfigFile::load()?.config;
    let mut table = Table::new(&["NAME", "CURRENT", "KIND", "HOSTS"], &["SANDBOX"]);
    for context in &config.contexts {
        let hosts: Vec<&str> = context.hosts.iter().map(|host| host.label()).collect();
        table.row([
            context.name.to_string(),
            if config.current.as_ref() == Some(&context.name) { "*" } else { "" }.to_owned(),
            context.kind.as_str().to_owned(),
            hosts.join(", "),
            context.sandbox.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
        ]);
    }
    session.terminal.list(&config.contexts, &table)?;
    if config.contexts.is_empty() && !session.terminal.is_machine_readable() {
        session
            .terminal
            .note("No contexts: commands talk to the agent of this machine. `form host add ADDRESS --token TOKEN` adds another.");
    }
    Ok(0)
}
