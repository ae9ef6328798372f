use form_image::BuiltImage;
use form_types::{Digest, Name};
use serde::Serialize;

use crate::{
    deploy::build::{self, BuildArgs},
    failure::Outcome,
    session::Session,
    ui::bytes,
};

/// Build the image of a Formfile on this machine
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    build: BuildArgs,
}

#[derive(Serialize)]
struct Built {
    name: Name,
    version: u32,
    digest: Digest,
    unchanged: bool,
    size_bytes: u64,
    stored_bytes: u64,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let (source, spec) = args.build.load(session)?;
    let image = build::image(session, &args.build, &source, &spec).await?;
    show(&image, session)
}

/// What was built, in one line.
pub fn show(image: &BuiltImage, session: &Session) -> Outcome {
    let blocks = &image.manifest.rootfs.blocks;
    let built = Built {
        name: image.name.clone(),
        version: image.version,
        digest: image.digest,
        unchanged: image.unchanged,
        size_bytes: blocks.size(),
        stored_bytes: blocks.stored_bytes(),
    };
    let reference = format!("{}:{}", built.name, built.version);
    let unchanged = if built.unchanged { " is unchanged" } else { "" };
    let sentence = format!("{reference}{unchanged}  {}  {}", built.digest.short(), bytes(built.stored_bytes));
    session.terminal.done(&built, &reference, &sentence)?;
    Ok(0)
}
