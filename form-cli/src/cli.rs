//! The command line as a whole.

use std::path::PathBuf;

use clap::{Args, Parser, builder::BoolishValueParser};
use clap_complete::engine::ArgValueCompleter;
use form_types::Name;

use crate::{
    args::Limit,
    cmd::Command,
    complete,
    ui::{Format, Wishes},
};

/// Build images from Formfiles and run them as microVMs on your hosts
#[derive(Debug, Parser)]
#[command(name = "form", version, max_term_width = 100, propagate_version = false, disable_help_subcommand = true)]
#[command(after_help = "Start with `form init` and `form deploy`. The guide is in docs/.")]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Everywhere")]
pub struct Global {
    /// How data is written
    #[arg(
        short,
        long,
        global = true,
        env = "FORM_OUTPUT",
        value_enum,
        value_name = "FORMAT",
        default_value = "table",
        hide_env_values = true
    )]
    pub output: Format,
    /// Only names on standard output, only errors on standard error
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Tables without their first line
    #[arg(long, global = true)]
    pub no_header: bool,
    /// The context to use instead of the current one
    #[arg(long, global = true, env = "FORM_CONTEXT", value_name = "NAME", hide_env_values = true, add = ArgValueCompleter::new(complete::contexts))]
    pub context: Option<Name>,
    /// The host to talk to: its name or address, or unix:/path
    #[arg(long, global = true, env = "FORM_HOST", value_name = "HOST", hide_env_values = true, add = ArgValueCompleter::new(complete::hosts))]
    pub host: Option<String>,
    /// How long to wait at most: 30, 90s, 5m, 1h
    #[arg(long, global = true, value_name = "TIME")]
    pub timeout: Option<Limit>,
    /// A file with your key's passphrase in its first line; FORM_PASSPHRASE holds the passphrase itself
    #[arg(
        long,
        global = true,
        env = "FORM_PASSPHRASE_FILE",
        value_name = "FILE",
        hide_env_values = true,
        value_hint = clap::ValueHint::FilePath
    )]
    pub passphrase_file: Option<PathBuf>,
    /// Do not wait for the operation's end
    #[arg(long, global = true)]
    pub no_wait: bool,
    /// Answer questions with yes
    #[arg(short, long, global = true, env = "FORM_YES", value_parser = BoolishValueParser::new(), hide_env_values = true)]
    pub yes: bool,
}

impl Global {
    pub const fn wishes(&self) -> Wishes {
        Wishes { format: self.output, quiet: self.quiet, no_header: self.no_header, yes: self.yes }
    }
}
