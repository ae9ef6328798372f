use std::path::PathBuf;

use clap_complete::engine::ArgValueCompleter;
use form_image::{BuildEvent, Builder, Cancel};
use form_types::{Digest, ImageReference, Name};
use serde::Serialize;

use super::origin::Origin;
use crate::{
    complete,
    deploy::build::{self, cache, observed},
    failure::{Failure, Outcome},
    session::Session,
    ui::bytes,
};

/// Write an image to a file or directory
///
/// It is an image of this machine, or with --from-host one of the host, of which only the blocks that this machine lacks are fetched. What is written is an OCI image layout: a tar file, or a directory when PATH ends with / or is one that is empty. `form image import` takes it in on another
/// machine, with the same digest.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME or NAME:VERSION
    #[arg(add = ArgValueCompleter::new(complete::all_images))]
    image: ImageReference,
    /// What is not there yet: FILE.tar, or DIRECTORY/
    #[arg(value_name = "PATH", value_hint = clap::ValueHint::AnyPath)]
    to: PathBuf,
    /// The host's image, whether this machine has one of that name or not
    #[arg(long)]
    from_host: bool,
}

#[derive(Serialize)]
struct Exported {
    name: Name,
    version: u32,
    digest: Digest,
    artifact_digest: String,
    path: PathBuf,
    size_bytes: u64,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let origin = Origin::find(&args.image, args.from_host, session).await?;
    let is_directory = args.to.is_dir() || args.to.as_os_str().as_encoded_bytes().ends_with(b"/");
    let (builder, cancel) = (Builder::new(cache()?), Cancel::new());
    Builder::check_free(&args.to, is_directory).map_err(|error| build::failure(&error))?;
    let (image, to, stop) = (args.image.clone(), args.to.clone(), cancel.clone());
    let written = observed(session, &cancel, move |observer| {
        let text = format!("writing {image} to {}", to.display());
        observer.event(BuildEvent::StepStarted { index: 1, total: 1, line: None, text: &text });
        let original = origin.open(&builder, &stop, observer)?;
        let exported = builder.export(&original, &to, is_directory, &stop, observer)?;
        original.arrived()?;
        Ok(exported)
    });
    let written = written.await.map_err(|failure| no_room(failure, &args))?;
    let exported = Exported {
        name: written.name,
        version: written.version,
        digest: written.digest,
        artifact_digest: written.artifact.to_string(),
        path: args.to.clone(),
        size_bytes: written.size,
    };
    let path = args.to.display().to_string();
    let sentence = format!("{}:{}  {}  {} in {path}", exported.name, exported.version, exported.digest.short(), bytes(exported.size_bytes));
    session.terminal.done(&exported, &path, &sentence)?;
    Ok(0)
}

/// The disk that is full is the one that is written to, not the cache's.
fn no_room(failure: Failure, args: &Args) -> Failure {
    let in_cache = cache().is_ok_and(|paths| failure.error.message.contains(&paths.root().display().to_string()));
    if failure.error.message.contains("No space left on device") && !in_cache {
        return failure.hint(format!("free some space on the disk of {}; nothing was left there", args.to.display()));
    }
    failure
}
