use std::sync::Arc;

use clap_complete::engine::ArgValueCompleter;
use form_image::{BuildError, BuildEvent, Builder, Cancel, OciReference};
use form_types::{Digest, ImageReference, Name};
use serde::Serialize;

use super::origin::Origin;
use crate::{
    complete,
    context::registries,
    deploy::build::{self, cache, observed},
    failure::{Failure, Outcome},
    session::Session,
    ui::{bytes, count},
};

/// Send an image to an OCI registry
///
/// It is an image of this machine, or with --from-host one of the host. It travels as an artifact: `form image pull` takes it in on another machine, with the same digest; container tools cannot run it. What the
/// registry has of it is not sent again. Logins are those of ~/.docker/config.json.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME or NAME:VERSION
    #[arg(add = ArgValueCompleter::new(complete::all_images))]
    image: ImageReference,
    /// HOST[:PORT]/PATH[:TAG]
    reference: String,
    /// The host's image, whether this machine has one of that name or not
    #[arg(long)]
    from_host: bool,
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
    let origin = Origin::find(&args.image, args.from_host, session).await?;
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
        let original = Arc::new(origin.open(&builder, &stop, observer)?);
        let pushed = builder.push(&original, &reference, &registries, &stop, observer)?;
        original.arrived()?;
        Ok(pushed)
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
