//! Writes what is made from the command line's own description: completion scripts, man pages, the command reference. A test compares
//! the files that are checked in with what this writes.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use clap::{Arg, Command, CommandFactory};

use super::completion::{Shell, script};
use crate::{
    cli::Cli,
    failure::{Failure, Outcome},
    session::Session,
};

/// Write completions/, docs/man/ and docs/cli/ below a directory
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The project's root
    directory: PathBuf,
}

pub fn run(args: &Args, session: &Session) -> Outcome {
    for (path, content) in files()? {
        let path = args.directory.join(path);
        write(&path, &content)?;
        session.terminal.print(format!("{}\n", path.display()));
    }
    Ok(0)
}

fn write(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::io("write", path, &error);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    fs::write(path, content).map_err(failed)
}

/// Every generated file, by its path below the project's root.
pub fn files() -> Result<Vec<(PathBuf, Vec<u8>)>, Failure> {
    let mut files = vec![
        ("completions/form.bash".into(), script(Shell::Bash)?),
        ("completions/_form".into(), script(Shell::Zsh)?),
        ("completions/form.fish".into(), script(Shell::Fish)?),
    ];
    let mut root = Cli::command();
    root.build();
    man_pages(&root, "form", &mut files)?;
    files.push(("docs/cli.md".into(), reference(&root).into_bytes()));
    Ok(files)
}

fn man_pages(command: &Command, name: &str, files: &mut Vec<(PathBuf, Vec<u8>)>) -> Result<(), Failure> {
    let mut page = Vec::new();
    // `build` has given each command its full name.
    clap_mangen::Man::new(command.clone())
        .title(name.to_uppercase())
        .render(&mut page)
        .map_err(|error| Failure::failed(format!("the man page of {name} cannot be made: {error}")))?;
    files.push((format!("docs/man/{name}.1").into(), page));
    for verb in visible(command) {
        man_pages(verb, &format!("{name}-{}", verb.get_name()), files)?;
    }
    Ok(())
}

fn visible(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help")
}

fn reference(root: &Command) -> String {
    let mut text =
        String::from("# The command line\n\nMade by `form generate` from the program itself; edit the program, not this page.\n\n");
    text.push_str("## Flags of every command\n\n");
    flags(&mut text, root.get_arguments().filter(|argument| argument.is_global_set()));
    for verb in visible(root) {
        section(&mut text, verb, "form");
    }
    text
}

fn section(text: &mut String, command: &Command, parent: &str) {
    let name = format!("{parent} {}", command.get_name());
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    if command.has_subcommands() {
        for verb in visible(command) {
            section(text, verb, &name);
        }
        return;
    }
    let mut usage = name.clone();
    for argument in command.get_positionals() {
        let value = value_name(argument);
        let many = if argument.get_num_args().is_some_and(|range| range.max_values() > 1) { "…" } else { "" };
        // Writing to a String cannot fail, here and below.
        let _ = if argument.is_required_set() { write!(usage, " {value}{many}") } else { write!(usage, " [{value}{many}]") };
    }
    let _ = write!(text, "## {name}\n\n{about}.\n\n```text\n{usage}\n```\n\n");
    flags(text, command.get_positionals());
    flags(
        text,
        command
            .get_opts()
            .chain(command.get_arguments().filter(|argument| is_switch(argument)))
            .filter(|argument| !argument.is_global_set()),
    );
}

/// A flag without a value, which `get_opts` leaves out.
fn is_switch(argument: &Arg) -> bool {
    !argument.is_positional() && !argument.get_action().takes_values() && argument.get_id() != "help"
}

fn flags<'a>(text: &mut String, arguments: impl Iterator<Item = &'a Arg>) {
    let mut any = false;
    for argument in arguments.filter(|argument| !argument.is_hide_set()) {
        any = true;
        let _ = writeln!(text, "- `{}`: {}", spelling(argument), help(argument));
    }
    if any {
        text.push('\n');
    }
}

fn spelling(argument: &Arg) -> String {
    let value = if argument.get_action().takes_values() { format!(" {}", value_name(argument)) } else { String::new() };
    match (argument.get_short(), argument.get_long()) {
        (Some(short), Some(long)) => format!("-{short}, --{long}{value}"),
        (Some(short), None) => format!("-{short}{value}"),
        (None, Some(long)) => format!("--{long}{value}"),
        (None, None) => value_name(argument),
    }
}

fn value_name(argument: &Arg) -> String {
    argument
        .get_value_names()
        .and_then(|names| names.first())
        .map_or_else(|| argument.get_id().to_string().to_uppercase(), ToString::to_string)
}

fn help(argument: &Arg) -> String {
    let mut help = argument.get_help().map(ToString::to_string).unwrap_or_default();
    let choices: Vec<String> = argument.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect();
    if !choices.is_empty() && argument.get_action().takes_values() {
        let _ = write!(help, " ({})", choices.join(", "));
    }
    let defaults: Vec<String> = argument.get_default_values().iter().map(|value| format!("`{}`", value.to_string_lossy())).collect();
    if !defaults.is_empty() && argument.get_action().takes_values() {
        let _ = write!(help, ", default {}", defaults.join(", "));
    }
    if let Some(variable) = argument.get_env() {
        let _ = write!(help, ", or `{}` in the environment", variable.to_string_lossy());
    }
    help
}
