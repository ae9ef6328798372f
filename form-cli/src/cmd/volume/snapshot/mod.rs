//! `form volume snapshot …`

pub mod create;
pub mod ls;
pub mod restore;
pub mod rm;
pub mod show;

use clap::Subcommand;

use crate::{failure::Outcome, session::Session};

/// Keep what volumes hold at one instant, and go back to that
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::Args),
    Ls(ls::Args),
    Show(show::Args),
    Restore(restore::Args),
    Rm(rm::Args),
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    match args.verb {
        Verb::Create(args) => create::run(args, session).await,
        Verb::Ls(args) => ls::run(&args, session).await,
        Verb::Show(args) => show::run(&args, session).await,
        Verb::Restore(args) => restore::run(&args, session).await,
        Verb::Rm(args) => rm::run(args, session).await,
    }
}
