use clap_complete::engine::ArgValueCompleter;
use form_api::image::ImageSetRequest;
use form_types::ImageReference;

use crate::{
    args::new_label,
    complete,
    failure::{Failure, Outcome},
    operation::settle,
    session::Session,
};

/// Set labels of an image on the host, and whether it is to be kept
///
/// They are the host's own and belong to one version: they change no digest, and do not travel with the image.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME:VERSION, or NAME for its newest version
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: ImageReference,
    /// Have `form image rm` and `form image prune` leave it, also with --all
    #[arg(long)]
    keep: bool,
    /// Let it be removed again
    #[arg(long, conflicts_with = "keep")]
    no_keep: bool,
    /// Set a label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = new_label)]
    labels: Vec<(String, String)>,
    /// Remove a label
    #[arg(long = "remove-label", value_name = "KEY")]
    removed: Vec<String>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let removed = args.removed.into_iter().map(|key| (key, None));
    let labels = args.labels.into_iter().map(|(key, value)| (key, Some(value))).chain(removed).collect();
    let keep = (args.keep || args.no_keep).then_some(args.keep);
    let request = ImageSetRequest { keep, labels };
    if request.is_empty() {
        return Err(Failure::usage("nothing is to be set").hint("say what: --keep, --no-keep, --label, --remove-label"));
    }
    let client = session.client()?;
    // The version that is meant now, whatever is built meanwhile.
    let image = client.image(&args.image).await?;
    let reference = ImageReference { name: image.name, version: Some(image.version) };
    let operation = settle(session, &client, client.set_image(&reference, &request).await?).await?;
    session.terminal.done(&operation, &reference.to_string(), &format!("{reference}: set"))?;
    Ok(0)
}
