use crate::{
    failure::Outcome,
    session::Session,
    ui::{Table, bytes},
};

/// List pools: the places that volumes live in
#[derive(Debug, clap::Args)]
pub struct Args {}

pub async fn run(_: &Args, session: &Session) -> Outcome {
    let pools = session.client()?.pools().await?;
    let mut table = Table::new(
        &["NAME", "KIND", "STATE", "VOLUMES", "PROMISED", "USED", "FREE", "TOTAL"],
        &["RESERVE", "LIMIT", "PATH", "SOURCE", "HOST", "FAULT"],
    );
    for pool in &pools {
        table.row([
            pool.name.to_string(),
            pool.kind.as_str().to_owned(),
            pool.state().to_owned(),
            pool.volumes.to_string(),
            bytes(pool.provisioned_bytes),
            bytes(pool.allocated_bytes),
            bytes(pool.free_bytes),
            bytes(pool.total_bytes),
            if pool.reserve_bytes > 0 { bytes(pool.reserve_bytes) } else { String::new() },
            pool.limit_bytes.map(bytes).unwrap_or_default(),
            pool.path.display().to_string(),
            pool.source.clone().unwrap_or_default(),
            pool.host_name.clone(),
            pool.fault.clone().unwrap_or_default(),
        ]);
    }
    session.terminal.list(&pools, &table)?;
    Ok(0)
}
