use clap_complete::engine::ArgValueCompleter;
use form_types::ImageReference;

use crate::{
    complete,
    failure::Outcome,
    session::Session,
    ui::{Record, bytes},
};

/// Show an image on the host
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME or NAME:VERSION
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: ImageReference,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let image = session.client()?.image(&args.image).await?;
    let users: Vec<&str> = image.used_by.iter().map(|name| name.as_str()).collect();
    let reference = format!("{}:{}", image.name, image.version);
    let record = Record::new(&reference)
        .field("image", &reference)
        .field("digest", image.digest)
        .field("size", bytes(image.size_bytes))
        .field("stored", bytes(image.stored_bytes))
        .field("created", image.created_at)
        .field("used by", users.join(", "));
    session.terminal.show(&image, &record)?;
    Ok(0)
}
