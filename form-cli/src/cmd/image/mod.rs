//! `form image …`

pub mod export;
pub mod history;
pub mod import;
pub mod ls;
mod origin;
pub mod prune;
pub mod pull;
pub mod push;
pub mod rm;
pub mod set;
pub mod show;
pub mod verify;

use clap::Subcommand;
use form_image::{Builder, ImageStore, StoreError};

use crate::{
    deploy::build::cache,
    failure::{Failure, Outcome},
    session::Session,
};

#[derive(Debug, Subcommand)]
pub enum Verb {
    Ls(ls::Args),
    Show(show::Args),
    History(history::Args),
    Set(set::Args),
    Rm(rm::Args),
    Prune(prune::Args),
    Pull(pull::Args),
    Push(push::Args),
    Export(export::Args),
    Import(import::Args),
    Verify(verify::Args),
}

impl Verb {
    pub async fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Ls(args) => ls::run(&args, session).await,
            Self::Show(args) => show::run(&args, session).await,
            Self::History(args) => history::run(&args, session).await,
            Self::Set(args) => set::run(args, session).await,
            Self::Rm(args) => rm::run(args, session).await,
            Self::Prune(args) => prune::run(args, session).await,
            Self::Pull(args) => pull::run(args, session).await,
            Self::Push(args) => push::run(args, session).await,
            Self::Export(args) => export::run(args, session).await,
            Self::Import(args) => import::run(args, session).await,
            Self::Verify(args) => verify::run(&args, session).await,
        }
    }
}

/// The images that were built on this machine.
pub fn store() -> Result<ImageStore, Failure> {
    Ok(Builder::new(cache()?).store())
}

pub fn failure(error: &StoreError) -> Failure {
    let text = match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    };
    match error {
        StoreError::NotFound(_) => Failure::not_found(text).hint("`form image ls --local` lists them"),
        _ => Failure::failed(text),
    }
}
