use form_types::{Digest, ImageReference};
use serde::Serialize;

use super::{failure, store};
use crate::{
    failure::{Failure, Outcome},
    session::Session,
    ui::count,
};

/// Read every block of an image built on this machine and compare it with its name
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME or NAME:VERSION
    image: ImageReference,
}

#[derive(Serialize)]
struct Verified {
    image: ImageReference,
    blocks: u64,
    bad: Vec<Digest>,
}

pub fn run(args: &Args, session: &Session) -> Outcome {
    let report = store()?.verify(&args.image).map_err(|error| failure(&error))?;
    if !report.bad.is_empty() && !session.terminal.is_machine_readable() {
        return Err(Failure::failed(format!(
            "{}: {} of {} are missing or damaged",
            args.image,
            count(report.bad.len(), "block"),
            report.blocks
        ))
        .hint("build it again with `form build --no-cache`"));
    }
    let verified = Verified { image: args.image.clone(), blocks: report.blocks, bad: report.bad };
    session.terminal.done(
        &verified,
        &args.image.to_string(),
        &format!("{}: all {} blocks are as they should be", args.image, report.blocks),
    )?;
    Ok(u8::from(!verified.bad.is_empty()))
}
