use clap_complete::engine::ArgValueCompleter;
use form_api::volume::SetVolumeRequest;
use form_types::Name;

use super::limits_text;
use crate::{
    args::{Ceiling, bandwidth, iops, volume_name},
    complete,
    failure::{Failure, Outcome},
    operation::settle,
    session::Session,
};

/// Change how much of a volume's host a VM may take
///
/// The limits hold at once, also in a VM that runs with it, and until they are changed again: whatever VM has the volume then.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    name: Name,
    /// Most operations a second, reads and writes together; none ends the limit
    #[arg(long, value_name = "COUNT|none", value_parser = iops)]
    iops: Option<Ceiling>,
    /// Most bytes a second, read and written together: 50MiB; none ends the limit
    #[arg(long, value_name = "SIZE|none", value_parser = bandwidth)]
    bandwidth: Option<Ceiling>,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    let request = SetVolumeRequest { iops: args.iops.map(|most| most.0), bytes_per_second: args.bandwidth.map(|most| most.0) };
    if request.is_empty() {
        return Err(Failure::usage("nothing is to be set").hint("say what: --iops, --bandwidth"));
    }
    let client = session.client()?;
    let operation = settle(session, &client, client.set_volume(&args.name, &request).await?).await?;
    let now = if operation.status.is_final() { limits_text(client.volume(&args.name).await?.limits) } else { None };
    let said = now.map_or_else(|| format!("{}: set", args.name), |limits| format!("{}: at most {limits}", args.name));
    session.terminal.done(&operation, args.name.as_str(), &said)?;
    Ok(0)
}
