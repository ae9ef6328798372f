use clap::ValueEnum;
use clap_complete::env::{Bash, Elvish, EnvCompleter, Fish, Powershell, Zsh};

use crate::{
    failure::{Failure, Outcome},
    session::Session,
};

/// Print the completion script of a shell; it completes live names
#[derive(Debug, clap::Args)]
#[command(after_help = "For bash: form completion bash > /etc/bash_completion.d/form")]
pub struct Args {
    /// The shell
    shell: Shell,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
    Elvish,
    Powershell,
}

pub fn run(args: &Args, session: &Session) -> Outcome {
    session.terminal.print_bytes(&script(args.shell)?);
    Ok(0)
}

/// The script that asks this program for completions as they are needed.
///
/// # Errors
/// Never in practice: it is written to memory.
pub fn script(shell: Shell) -> Result<Vec<u8>, Failure> {
    let completer: &dyn EnvCompleter = match shell {
        Shell::Bash => &Bash,
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
        Shell::Elvish => &Elvish,
        Shell::Powershell => &Powershell,
    };
    let mut script = Vec::new();
    completer
        .write_registration("COMPLETE", "form", "form", "form", &mut script)
        .map_err(|error| Failure::failed(format!("the script cannot be made: {error}")))?;
    Ok(script)
}
