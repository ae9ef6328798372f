use std::{path::PathBuf, time::Duration};

use clap_complete::engine::ArgValueCompleter;
use form_api::{
    client::Client,
    exec::Frame,
    volume::{ImportQuery, Piece},
};
use form_nbd::Uri;
use form_types::{
    Name,
    size::Bytes,
    volume::{LEAST_BYTES, SECTOR_BYTES},
};
use tokio::sync::mpsc;

use super::{
    Format, size,
    transfer::{ended, next, send},
};
use crate::{
    args::volume_name,
    complete,
    disk_source::DiskSource,
    failure::{Failure, Outcome},
    session::Session,
    signals,
    ui::bytes,
};

/// Make a volume of a disk in a file, or of what an NBD server has
///
/// The file is raw or qcow2, of this machine, and it is this machine that reaches the NBD server; holes are not sent. The volume is there when all of
/// it has arrived: an import that is interrupted leaves nothing.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("source").required(true).args(["file", "from"])))]
pub struct Args {
    /// The new volume's name
    #[arg(value_parser = volume_name)]
    name: Name,
    /// The file: a qcow2 image, or else the disk's bytes
    file: Option<PathBuf>,
    /// An export of an NBD server: nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH, or nbds://HOST:PORT/EXPORT?tls-certificates=DIRECTORY
    #[arg(long, value_name = "ADDRESS")]
    from: Option<Uri>,
    /// Make the volume larger than the disk is: 20G, 512M, 20 for GiB, 20971520B to the byte
    #[arg(long, short, value_parser = size)]
    size: Option<Bytes>,
    /// How the volume's bytes are kept
    #[arg(long, value_enum, default_value = "raw")]
    format: Format,
    /// The pool that it lives in
    #[arg(long, default_value = "local", add = ArgValueCompleter::new(complete::pools))]
    pool: Name,
}

/// How long the word of an agent that takes no more may still be on its way.
const LAST_WORD: Duration = Duration::from_millis(500);

pub async fn run(args: Args, session: &Session) -> Outcome {
    let disk = match (args.file, args.from) {
        (Some(file), _) => DiskSource::of_file(file)?,
        (None, Some(uri)) => {
            let connecting = tokio::task::spawn_blocking(|| DiskSource::of_export(uri));
            session.in_time(connecting).await?.map_err(|error| Failure::failed(error.to_string()))??
        }
        (None, None) => return Err(Failure::usage("say what the volume is to be made of: a file, or --from nbd://…")),
    };
    let size_bytes = wanted_size(disk.size(), args.size)?;
    let client = session.client()?;
    let query = ImportQuery { size_bytes, format: args.format.into(), pool: Some(args.pool) };
    let text = format!("{}: {}, {}", args.name, disk.describe(), bytes(disk.size()));
    let step = session.terminal.step(text);
    let interrupted = signals::ended()?;
    tokio::select! {
        imported = session.in_time(import(session, &client, &args.name, &query, disk)) => imported??,
        code = interrupted => {
            session.terminal.note("interrupted: no volume was made");
            return Ok(code);
        }
    }
    step.done("");
    let volume = client.volume(&args.name).await?;
    session.terminal.done(&volume, args.name.as_str(), &format!("{}: made, {}", args.name, bytes(size_bytes)))?;
    Ok(0)
}

/// That of the file, as volumes have sizes.
fn wanted_size(held: u64, asked: Option<Bytes>) -> Result<u64, Failure> {
    let least = held.max(LEAST_BYTES).checked_next_multiple_of(SECTOR_BYTES).unwrap_or(u64::MAX);
    let size = asked.map_or(least, |asked| asked.0);
    if size < held {
        return Err(Failure::usage(format!("the disk has {held} bytes, and {size} are less")).hint("leave --size out, or ask for more"));
    }
    form_types::volume::check_size(size).map_err(|error| Failure::usage(error.to_string()))?;
    Ok(size)
}

async fn import(session: &Session, client: &Client, name: &Name, query: &ImportQuery, disk: DiskSource) -> Result<(), Failure> {
    let tunnel = client.import_volume(name, query).await?;
    let (mut reader, mut writer) = tokio::io::split(tunnel);
    let bar = session.terminal.bar(disk.size());
    let progress = bar.handle();
    let (sender, mut pieces) = mpsc::channel::<(u64, Vec<u8>)>(16);
    let reading = tokio::task::spawn_blocking(move || disk.pieces(|at, bytes| sender.blocking_send((at, bytes.to_vec())).is_ok()));
    let sending = async {
        while let Some((offset, bytes)) = pieces.recv().await {
            progress.set_position(offset + bytes.len() as u64);
            send(&mut writer, Frame::Stdin(Piece::encode(offset, &bytes))).await?;
        }
        reading.await.map_err(|error| Failure::failed(error.to_string()))??;
        send(&mut writer, Frame::StdinClosed).await
    };
    // The agent sends one frame: that the volume is there, or why not.
    let answer = next(&mut reader);
    tokio::pin!(sending, answer);
    let answer = tokio::select! {
        answer = &mut answer => answer,
        sent = &mut sending => match sent {
            Ok(()) => answer.await,
            // Why the other side takes no more is worth more than that it does not.
            Err(failure) => tokio::time::timeout(LAST_WORD, &mut answer).await.ok().filter(Result::is_ok).unwrap_or(Err(failure)),
        },
    };
    ended(&answer?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_that_volumes_have() {
        assert_eq!(wanted_size(1, None).unwrap(), 16 << 20);
        assert_eq!(wanted_size((16 << 20) + 1, None).unwrap(), (16 << 20) + 512);
        assert_eq!(wanted_size(16 << 20, Some(Bytes(1 << 30))).unwrap(), 1 << 30);
        for (held, asked) in [(1 << 30, Some(Bytes(16 << 20))), (u64::MAX, None), (1 << 50, None)] {
            assert_eq!(wanted_size(held, asked).unwrap_err().exit_code(), 2, "{held} {asked:?}");
        }
    }
}
