use std::path::PathBuf;

use form_image::{BuildEvent, Builder, Cancel};
use form_types::Name;

use crate::{
    cmd::build::show,
    deploy::build::{cache, observed},
    failure::{Failure, Outcome},
    session::Session,
};

/// Take an image in that `form image export` wrote
///
/// Every byte of it is checked, and it is here whole or not at all. `form vm create --image NAME` runs it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A tar file or directory: an OCI image layout
    #[arg(value_name = "PATH", value_hint = clap::ValueHint::AnyPath)]
    from: PathBuf,
    /// What to call it; by default what it was called. Under another name it has another digest
    name: Option<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    std::fs::metadata(&args.from).map_err(|error| Failure::io("read", &args.from, &error))?;
    let (builder, cancel) = (Builder::new(cache()?), Cancel::new());
    let stop = cancel.clone();
    let image = observed(session, &cancel, move |observer| {
        let text = format!("reading {}", args.from.display());
        observer.event(BuildEvent::StepStarted { index: 1, total: 1, line: None, text: &text });
        builder.import(&args.from, args.name.as_ref(), &stop, observer)
    });
    show(&image.await?, session)
}
