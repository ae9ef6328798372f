use clap_complete::engine::ArgValueCompleter;
use form_image::{BuildEvent, Builder, StoreError};
use form_types::ImageReference;
use serde::Serialize;

use super::{failure, store};
use crate::{
    complete,
    deploy::build::{self, cache},
    failure::{Failure, Outcome},
    operation::{each, settle},
    session::Session,
    ui::bytes,
};

/// Remove images that no VM uses from the host
///
/// A VM that ran from one before cannot go back to it then (`form rollback`).
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME:VERSION; with --local also NAME for all its versions
    #[arg(required = true, add = ArgValueCompleter::new(complete::images))]
    images: Vec<ImageReference>,
    /// Those built on this machine instead, and what only they needed
    #[arg(long)]
    local: bool,
}

#[derive(Serialize)]
struct Removed {
    image: ImageReference,
    versions: Vec<u32>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    if args.local {
        // Before the question: nobody is asked about what is not there.
        for reference in &args.images {
            store()?.get(reference).map(drop).or_else(|error| missing(&error))?;
        }
    }
    let names: Vec<String> = args.images.iter().map(ToString::to_string).collect();
    let place = if args.local { "this machine" } else { "the host" };
    session.terminal.confirm(&format!("Remove {} from {place}?", names.join(", ")))?;
    if args.local {
        return local(&args, session).await;
    }
    let client = session.client()?;
    each(session, &args.images, async |reference: ImageReference| {
        let operation = settle(session, &client, client.remove_image(&reference).await?).await?;
        session.terminal.done(&operation, &reference.to_string(), &format!("{reference}: removed"))
    })
    .await
}

/// One that is damaged can be removed all the same.
fn missing(error: &StoreError) -> Result<(), Failure> {
    match error {
        StoreError::NotFound(_) => Err(failure(error)),
        _ => Ok(()),
    }
}

async fn local(args: &Args, session: &Session) -> Outcome {
    let code = each(session, &args.images, async |reference: ImageReference| {
        let versions = store()?.remove(&reference).map_err(|error| failure(&error))?;
        session.terminal.done(&Removed { image: reference.clone(), versions }, &reference.to_string(), &format!("{reference}: removed"))
    })
    .await?;
    let freed = Builder::new(cache()?).prune(&mut |_: BuildEvent<'_>| {}).map_err(|error| build::failure(&error))?;
    session.terminal.note(format!("{} freed", bytes(freed)));
    Ok(code)
}
