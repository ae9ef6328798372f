use clap_complete::engine::ArgValueCompleter;
use form_api::ErrorCode;
use form_types::{Digest, ImageReference};
use serde::Serialize;

use super::{failure, store};
use crate::{
    complete,
    failure::{Failure, Outcome},
    session::Session,
    ui::count,
};

/// Read every block of an image on the host and compare it with its digest
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME or NAME:VERSION
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: ImageReference,
    /// One built on this machine instead
    #[arg(long)]
    local: bool,
}

/// How many damaged blocks a sentence names.
const NAMED: usize = 5;

pub async fn run(args: &Args, session: &Session) -> Outcome {
    if args.local {
        return local(args, session);
    }
    let found = session.client()?.verify_image(&args.image).await?;
    let reference = format!("{}:{}", found.name, found.version);
    if found.damaged_blocks == 0 {
        session.terminal.done(&found, &reference, &format!("{reference}: all {} blocks are as they should be", found.blocks))?;
        return Ok(0);
    }
    if session.terminal.is_machine_readable() {
        session.terminal.data(&found)?;
    }
    let named: Vec<String> =
        found.damaged.iter().take(NAMED).map(|block| format!("block {} at byte {}", block.index, block.offset)).collect();
    let more = if found.damaged_blocks > named.len() as u64 { " and others" } else { "" };
    Err(Failure::new(
        ErrorCode::Failed,
        format!("{reference}: {} of {} blocks are damaged on the host: {}{more}", found.damaged_blocks, found.blocks, named.join(", ")),
    )
    .hint("destroy the VMs that use the image, remove it with `form image rm`, and deploy again; check the host's disk"))
}

#[derive(Serialize)]
struct Verified {
    image: ImageReference,
    blocks: u64,
    bad: Vec<Digest>,
}

fn local(args: &Args, session: &Session) -> Outcome {
    let report = store()?.verify(&args.image).map_err(|error| failure(&error))?;
    let verified = Verified { image: args.image.clone(), blocks: report.blocks, bad: report.bad };
    if verified.bad.is_empty() {
        let sentence = format!("{}: all {} blocks are as they should be", args.image, verified.blocks);
        session.terminal.done(&verified, &args.image.to_string(), &sentence)?;
        return Ok(0);
    }
    if session.terminal.is_machine_readable() {
        session.terminal.data(&verified)?;
    }
    let (bad, blocks) = (count(verified.bad.len(), "block"), verified.blocks);
    let first = verified.bad.first().map(Digest::short).unwrap_or_default();
    Err(Failure::failed(format!("{}: {bad} of {blocks} are missing or damaged, the first is {first}", args.image))
        .hint("build it again with `form build --no-cache`"))
}
