use clap_complete::engine::ArgValueCompleter;
use form_image::{BuildError, BuildEvent, Builder, Cancel, OciReference};
use form_types::{Digest, ImageReference, Name};
use serde::Serialize;

use super::{failure, store};
use crate::{
    complete,
    context::registries,
    deploy::build::{self, cache, observed},
    failure::{Failure, Outcome},
    session::Session,
    ui::{bytes, count},
};

/// Send an image of this machine to an OCI registry
///
/// It travels as an artifact: `form image pull` takes it in on another machine, with the same digest; container tools cannot run it. What the
/// registry has of it is not sent again. Logins are those of ~/.docker/config.json.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME or NAME:VERSION
    #[arg(add = ArgValueCompleter::new(complete::local_images))]
    image: ImageReference,
    /// HOST[:PORT]/PATH[:TAG]
    reference: String,
}

#[derive(Serialize)]
struct Pushed {
    name: Name,
    version: u32,
    digest: Digest,
    reference: String,
    artifact_digest: String,
    sent_blobs: usize,
    sent_bytes: u64,
    kept_blobs: usize,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    store()?.get(&args.image).map_err(|error| failure(&error))?;
    let registries = registries()?;
    let reference = OciReference::parse(&args.reference, registries.default.as_deref())
        .map_err(|source| build::failure(&BuildError::Push { to: args.reference.clone(), source }))?;
    if reference.digest.is_some() {
        return Err(Failure::usage(format!("`{reference}` names what is there already by its digest")).hint("push to a tag: HOST/PATH:TAG"));
    }
    let (builder, cancel) = (Builder::new(cache()?), Cancel::new());
    let stop = cancel.clone();
    let sent = observed(session, &cancel, move |observer| {
        let text = format!("sending {} to {reference}", args.image);
        observer.event(BuildEvent::StepStarted { index: 1, total: 1, line: None, text: &text });
        builder.push(&args.image, &reference, &registries, &stop, observer)
    });
    let sent = sent.await?;
    let pushed = Pushed {
        name: sent.name,
        version: sent.version,
        digest: sent.digest,
        reference: sent.reference,
        artifact_digest: sent.artifact.to_string(),
        sent_blobs: sent.sent_blobs,
        sent_bytes: sent.sent_bytes,
        kept_blobs: sent.kept_blobs,
    };
    let sentence = format!(
        "{}:{}  {}  {} sent ({}), {} there already",
        pushed.name,
        pushed.version,
        pushed.artifact_digest,
        count(pushed.sent_blobs, "blob"),
        bytes(pushed.sent_bytes),
        pushed.kept_blobs
    );
    session.terminal.done(&pushed, &pushed.reference, &sentence)?;
    Ok(0)
}
