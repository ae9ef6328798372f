use clap_complete::engine::ArgValueCompleter;
use form_api::volume::CreateRequest;
use form_types::{DiskLimits, Name, size::Bytes};

use super::{Format, size};
use crate::{
    args::{Ceiling, bandwidth, iops, volume_name},
    complete,
    failure::Outcome,
    operation::settle,
    session::Session,
};

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
    /// Most operations a second, reads and writes together
    #[arg(long, value_name = "COUNT", value_parser = iops)]
    iops: Option<Ceiling>,
    /// Most bytes a second, read and written together: 50MiB
    #[arg(long, value_name = "SIZE", value_parser = bandwidth)]
    bandwidth: Option<Ceiling>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let most = |limit: Option<Ceiling>| limit.and_then(|most| most.0);
    let request = CreateRequest {
        name: args.name.clone(),
        size_bytes: args.size.0,
        format: args.format.into(),
        pool: Some(args.pool),
        limits: DiskLimits { iops: most(args.iops), bytes_per_second: most(args.bandwidth) },
    };
    let operation = settle(session, &client, client.create_volume(&request).await?).await?;
    let made = if operation.status.is_final() { "made" } else { "make" };
    session.terminal.done(&operation, args.name.as_str(), &format!("{}: {made}, {}", args.name, args.size))?;
    Ok(0)
}
