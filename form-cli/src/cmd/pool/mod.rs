//! `form pool …`

pub mod create;
pub mod ls;
pub mod rm;
pub mod set;
pub mod show;

use clap::Subcommand;
use form_types::size::{Bytes, GIB};

use crate::{failure::Outcome, session::Session};

#[derive(Debug, Subcommand)]
pub enum Verb {
    Create(create::Args),
    Ls(ls::Args),
    Show(show::Args),
    Set(set::Args),
    Rm(rm::Args),
}

impl Verb {
    pub async fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Create(args) => create::run(args, session).await,
            Self::Ls(args) => ls::run(&args, session).await,
            Self::Show(args) => show::run(&args, session).await,
            Self::Set(args) => set::run(args, session).await,
            Self::Rm(args) => rm::run(args, session).await,
        }
    }
}

/// An amount of room as it is written on the command line: `10GiB`, `512M`, `20` for GiB, `0`.
fn amount(text: &str) -> Result<Bytes, String> {
    form_types::size::parse(text, GIB).map_err(|error| error.to_string())
}
