use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap_complete::engine::ArgValueCompleter;
use form_api::{
    client::Client,
    exec::Frame,
    volume::{ExportRequest, Piece, Volume},
};
use form_nbd::Uri;
use form_types::{Name, VolumeFormat};
use tokio::sync::mpsc;

use super::{
    Format,
    credentials::NewCredentials,
    transfer::{ended, next},
};
use crate::{
    args::volume_name,
    complete,
    disk_file::NewDiskFile,
    failure::{Failure, Outcome},
    operation::settle,
    session::Session,
    signals,
    ui::bytes,
};

/// Serve a volume over NBD on its host, or write it to a file
///
/// No VM may run with it. With --nbd programs of the host reach it at the address that is printed, until `form volume unexport`, the end of the
/// agent, or until it is detached or removed. As long as they may write nothing else has the volume. With --tls programs of other machines reach it
/// too, when they show the certificate that is made for them.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("way").required(true).args(["nbd", "to"])))]
pub struct Args {
    /// The volume
    #[arg(value_parser = volume_name, add = ArgValueCompleter::new(complete::volumes))]
    name: Name,
    /// Serve it over NBD, on a Unix socket of its host
    #[arg(long)]
    nbd: bool,
    /// Let NBD clients write
    #[arg(long, requires = "nbd")]
    writable: bool,
    /// Serve it on this address of the host instead, of its loopback interface unless with --tls; port 0 is any
    #[arg(long, requires = "nbd", value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Serve it with TLS to who has the certificate and key that are written to this new directory, and to nobody else
    #[arg(long, requires = "listen", value_name = "DIRECTORY")]
    tls: Option<PathBuf>,
    /// Write it to a new file of this machine
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// How the file keeps the bytes
    #[arg(long, value_enum, default_value = "raw", conflicts_with = "nbd")]
    format: Format,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    match &args.to {
        Some(file) => to_file(session, &client, &args.name, file, args.format.into()).await,
        None => over_nbd(session, &client, &args).await,
    }
}

async fn over_nbd(session: &Session, client: &Client, args: &Args) -> Outcome {
    let name = &args.name;
    if args.tls.is_some() && session.global.no_wait {
        return Err(Failure::usage("the certificate of the server is known when it serves: leave --no-wait or --tls out"));
    }
    let credentials = args.tls.as_deref().map(NewCredentials::create).transpose()?;
    let client_certificate = credentials.as_ref().map(|new| new.certificate().to_owned());
    let request = ExportRequest { writable: args.writable, listen: args.listen, client_certificate };
    let operation = settle(session, client, client.export_volume(name, &request).await?).await?;
    match client.volume(name).await?.export {
        Some(mut export) => {
            if let (Some(new), Some(authority), Some(directory)) = (credentials, &export.authority, &args.tls) {
                new.keep(authority)?;
                export.uri = with_certificates(&export.uri, directory);
            }
            let how = if export.writable { "reading and writing" } else { "reading" };
            session.terminal.done(&export, &export.uri, &format!("{name}: exported for {how} at {}", export.uri))?;
        }
        // Not there yet, or gone again.
        None => session.terminal.done(&operation, name.as_str(), &format!("{name}: see `form volume show {name}`"))?,
    }
    Ok(0)
}

/// The address as a client of this machine is told it.
fn with_certificates(uri: &str, directory: &Path) -> String {
    let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
    match uri.parse::<Uri>() {
        Ok(uri) => Uri { certificates: Some(directory), ..uri }.to_string(),
        Err(_) => uri.to_owned(),
    }
}

async fn to_file(session: &Session, client: &Client, name: &Name, file: &Path, format: VolumeFormat) -> Outcome {
    let volume = client.volume(name).await?;
    let new = NewDiskFile::create(file, format, volume.size_bytes)?;
    let step = session.terminal.step(format!("{name}: {} to {}", bytes(volume.size_bytes), file.display()));
    let interrupted = signals::ended()?;
    tokio::select! {
        written = session.in_time(receive(session, client, &volume, new)) => written??,
        code = interrupted => {
            session.terminal.note("interrupted: no file was left");
            return Ok(code);
        }
    }
    step.done("");
    session.terminal.done(&volume, name.as_str(), &format!("{name}: written to {}", file.display()))?;
    Ok(0)
}

async fn receive(session: &Session, client: &Client, volume: &Volume, new: NewDiskFile) -> Result<(), Failure> {
    let (mut reader, _writer) = tokio::io::split(client.volume_contents(&volume.name).await?);
    let bar = session.terminal.bar(volume.size_bytes);
    let progress = bar.handle();
    let (sender, mut pieces) = mpsc::channel::<Piece>(16);
    let writing = tokio::task::spawn_blocking(move || {
        while let Some(piece) = pieces.blocking_recv() {
            new.write(&piece)?;
        }
        Ok::<NewDiskFile, Failure>(new)
    });
    let last = loop {
        match next(&mut reader).await? {
            Frame::Stdout(payload) => {
                let Some(piece) = Piece::decode(payload).filter(|piece| fits(piece, volume.size_bytes)) else {
                    return Err(Failure::failed("the agent sent bytes that lie outside of the volume"));
                };
                progress.set_position(piece.offset + piece.bytes.len() as u64);
                if sender.send(piece).await.is_err() {
                    break None;
                }
            }
            last => break Some(last),
        }
    };
    drop(sender);
    // Without a last frame the thread has ended, and says why.
    let new = writing.await.map_err(|error| Failure::failed(error.to_string()))??;
    if let Some(last) = last {
        ended(&last)?;
    }
    tokio::task::spawn_blocking(move || new.keep()).await.map_err(|error| Failure::failed(error.to_string()))?
}

fn fits(piece: &Piece, size: u64) -> bool {
    piece.offset.checked_add(piece.bytes.len() as u64).is_some_and(|end| end <= size)
}
