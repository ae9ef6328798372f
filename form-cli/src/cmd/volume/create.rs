use clap_complete::engine::ArgValueCompleter;
use form_api::volume::CreateRequest;
use form_types::{Name, size::Bytes};

use super::{Format, size};
use crate::{args::volume_name, complete, failure::Outcome, operation::settle, session::Session};

/// Make an empty volume
///
/// It takes room on the host only as it fills. A file system is made on it when it is first mounted.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The new volume's name
    #[arg(value_parser = volume_name)]
    name: Name,
    /// Its size: 20G, 512M, 20 for GiB, 20971520B to the byte
    #[arg(long, short, value_parser = size)]
    size: Bytes,
    /// How its bytes are kept
    #[arg(long, value_enum, default_value = "raw")]
    format: Format,
    /// The pool that it lives in
    #[arg(long, default_value = "local", add = ArgValueCompleter::new(complete::pools))]
    pool: Name,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let request = CreateRequest { name: args.name.clone(), size_bytes: args.size.0, format: args.format.into(), pool: Some(args.pool) };
    let operation = settle(session, &client, client.create_volume(&request).await?).await?;
    let made = if operation.status.is_final() { "made" } else { "make" };
    session.terminal.done(&operation, args.name.as_str(), &format!("{}: {made}, {}", args.name, args.size))?;
    Ok(0)
}
