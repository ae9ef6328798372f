use std::path::PathBuf;

use form_api::{pool::PoolCreateRequest, volume::PoolKind};
use form_types::{Name, size::Bytes};

use super::amount;
use crate::{
    args::{new_label, pool_name},
    failure::{Failure, Outcome},
    operation::settle,
    session::Session,
};

/// Make a directory of the host, or an NFS export, a pool
///
/// A file in it says from then on whose it is. While that file is not there (its file system is not mounted) the pool is unavailable, and
/// nothing is made in the directory. The agent mounts an NFS export by itself, now and whenever it starts. While its server does not answer
/// the pool is not-answering, and what is asked of its volumes fails; everything else goes on.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The new pool's name
    #[arg(value_parser = pool_name)]
    name: Name,
    /// What the pool is
    #[arg(long, value_enum, default_value = "local")]
    kind: Kind,
    /// Of kind local: the directory on the host, which has to be there: absolute, not in another pool, writable
    #[arg(long, value_name = "DIR", conflicts_with = "source")]
    path: Option<PathBuf>,
    /// Of kind nfs: the export that the host mounts
    #[arg(long, value_name = "SERVER:/PATH")]
    source: Option<String>,
    /// Of kind nfs, with commas between them: vers=, timeo=, retrans=, port=, rsize=, wsize=, nconnect=
    #[arg(long, value_name = "OPTIONS", requires = "source")]
    options: Option<String>,
    /// Begin nothing new in it with less free room than this
    #[arg(long, value_name = "SIZE", value_parser = amount)]
    reserve: Option<Bytes>,
    /// The most that its volumes may promise together
    #[arg(long, value_name = "SIZE", value_parser = amount)]
    limit: Option<Bytes>,
    /// Set a label
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = new_label)]
    labels: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    /// A directory of the host
    Local,
    /// An export of an NFS server
    Nfs,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    match (args.kind, &args.path, &args.source) {
        (Kind::Local, None, _) => return Err(Failure::usage("a local pool is a directory").hint("say which: --path DIR")),
        (Kind::Nfs, _, None) => return Err(Failure::usage("an nfs pool is an export of a server").hint("say which: --source SERVER:/PATH")),
        _ => {}
    }
    let client = session.client()?;
    let request = PoolCreateRequest {
        name: args.name.clone(),
        kind: match args.kind {
            Kind::Local => PoolKind::Local,
            Kind::Nfs => PoolKind::Nfs,
        },
        path: args.path,
        source: args.source,
        options: args.options,
        reserve_bytes: args.reserve.unwrap_or_default().0,
        limit_bytes: args.limit.map(|limit| limit.0),
        labels: args.labels.into_iter().collect(),
    };
    let operation = settle(session, &client, client.create_pool(&request).await?).await?;
    let place = match (&request.path, &request.source) {
        (Some(path), _) => format!("in {}", path.display()),
        (None, source) => format!("on {}", source.as_deref().unwrap_or_default()),
    };
    session.terminal.done(&operation, args.name.as_str(), &format!("{}: made, {place}", args.name))?;
    Ok(0)
}
