//! `form context …`

pub mod choose;
pub mod ls;
pub mod show;

use clap::Subcommand;

use crate::{failure::Outcome, session::Session};

#[derive(Debug, Subcommand)]
pub enum Verb {
    Ls(ls::Args),
    #[command(name = "use")]
    Choose(choose::Args),
    Show(show::Args),
}

impl Verb {
    pub fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Ls(args) => ls::run(&args, session),
            Self::Choose(args) => choose::run(args, session),
            Self::Show(args) => show::run(&args, session),
        }
    }
}
