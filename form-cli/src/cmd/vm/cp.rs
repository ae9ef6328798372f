use std::{
    ffi::OsString,
    io::{self, BufWriter, Read, Write},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use form_api::{
    ErrorCode,
    client::{Client, Tunnel},
    copy::{CopyQuery, Direction},
    exec::{Frame, HEADER},
};
use form_archive::{ArchiveError, Owner, Target};
use form_types::Name;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::mpsc,
};

use crate::{
    failure::{Failure, Outcome},
    session::Session,
    signals,
    ui::Bar,
};

/// Copy files and directories into a VM, or out of it
///
/// A path in a VM is written NAME:/PATH. Modes and times are kept. `-` is a tar stream: from standard input, all of whose entries go below
/// the directory that follows, or to standard output.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to copy: PATH, NAME:/PATH or -
    #[arg(value_name = "FROM")]
    from: Place,
    /// Where to: below it when it is a directory
    #[arg(value_name = "TO")]
    to: Place,
    /// Give the files in the VM to this user instead of root
    #[arg(long, value_name = "USER[:GROUP]", conflicts_with = "archive")]
    owner: Option<String>,
    /// Keep the numbers of owner and group of what goes in
    #[arg(short, long)]
    archive: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Local(PathBuf),
    Guest {
        vm: Name,
        path: String,
    },
    /// Standard input or output.
    Stream,
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "-" {
            return Ok(Self::Stream);
        }
        let Some((vm, path)) = text.split_once(':') else { return Ok(Self::Local(text.into())) };
        let Ok(vm) = vm.strip_prefix("vm/").unwrap_or(vm).parse::<Name>() else { return Ok(Self::Local(text.into())) };
        if path.starts_with('/') {
            Ok(Self::Guest { vm, path: path.to_owned() })
        } else {
            Err(format!("a path in a VM begins with `/`: {vm}:/{path} (a local file with a colon in its name is ./{text})"))
        }
    }
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    match (args.from, args.to) {
        (Place::Local(from), Place::Guest { vm, path }) => {
            let query = CopyQuery { direction: Direction::In, path, contents: false, owner: args.owner, keep_owner: args.archive };
            copy_in(session, &client, &vm, &query, Source::Path(from)).await
        }
        (Place::Stream, Place::Guest { vm, path }) => {
            let query = CopyQuery { direction: Direction::In, path, contents: true, owner: args.owner, keep_owner: args.archive };
            copy_in(session, &client, &vm, &query, Source::Stdin).await
        }
        (Place::Guest { vm, path }, to @ (Place::Local(_) | Place::Stream)) => copy_out(session, &client, &vm, path, to).await,
        (Place::Guest { .. }, Place::Guest { .. }) => Err(Failure::usage("only one of the two can be in a VM")
            .hint("copy to a local directory first, or pipe: form cp A:/X - | form cp - B:/Y")),
        _ => Err(Failure::usage("one of the two has to be in a VM").hint("write it as NAME:/PATH")),
    }
}

/// The other end of a pipe: tar streams are made and read by a thread of their own.
struct Pipe(mpsc::Sender<Vec<u8>>);

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.blocking_send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Drain {
    pieces: mpsc::Receiver<Option<Vec<u8>>>,
    rest: Vec<u8>,
    read: usize,
    ended: bool,
}

impl Read for Drain {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.read == self.rest.len() && !self.ended {
            match self.pieces.blocking_recv() {
                Some(Some(piece)) => (self.rest, self.read) = (piece, 0),
                Some(None) => self.ended = true,
                None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "not all of it came")),
            }
        }
        let count = Read::read(&mut &self.rest[self.read..], buffer)?;
        self.read += count;
        Ok(count)
    }
}

enum Source {
    Path(PathBuf),
    Stdin,
}

const CHUNK: usize = 64 * 1024;

/// How long it may take to find out how much there is to send.
const MEASURE: Duration = Duration::from_secs(2);

/// How long the word of an agent that has hung up may still be on its way.
const LAST_WORD: Duration = Duration::from_millis(500);

async fn copy_in(session: &Session, client: &Client, vm: &Name, query: &CopyQuery, source: Source) -> Outcome {
    let total = match &source {
        Source::Path(path) => form_archive::measure(path, MEASURE).map_err(|error| failure(&error))?.bytes,
        Source::Stdin => None,
    };
    let (tunnel, _) = client.copy(vm, query).await?;
    let bar = total.map(|total| session.terminal.bar(total));
    let (sender, mut pieces) = mpsc::channel::<Vec<u8>>(16);
    let packing = tokio::task::spawn_blocking(move || match source {
        Source::Path(path) => {
            let name = top_name(&path);
            form_archive::pack(&path, &name, BufWriter::with_capacity(CHUNK, Pipe(sender))).map(|summary| summary.skipped)
        }
        Source::Stdin => {
            let mut out = BufWriter::with_capacity(CHUNK, Pipe(sender));
            io::copy(&mut io::stdin().lock(), &mut out).and_then(|_| out.flush()).map(|()| 0).map_err(ArchiveError::Stream)
        }
    });
    let progress = bar.as_ref().map(Bar::handle);
    let (mut reader, mut writer) = tokio::io::split(tunnel);
    let sending = async {
        while let Some(piece) = pieces.recv().await {
            if let Some(progress) = &progress {
                progress.inc(piece.len() as u64);
            }
            for piece in piece.chunks(CHUNK) {
                send(&mut writer, Frame::Stdin(piece.to_vec())).await?;
            }
        }
        let skipped = packing.await.map_err(|error| Failure::failed(error.to_string()))?.map_err(|error| failure(&error))?;
        send(&mut writer, Frame::StdinClosed).await?;
        Ok::<u64, Failure>(skipped)
    };
    // The agent sends one frame: that all has arrived, or why not.
    let answer = next(&mut reader);
    tokio::pin!(sending, answer);
    let (mut skipped, mut sent) = (0, false);
    let answer = loop {
        tokio::select! {
            answer = &mut answer => break answer,
            result = &mut sending, if !sent => match result {
                Ok(count) => (skipped, sent) = (count, true),
                // Why the other side takes no more is worth more than that it does not.
                Err(failure) => break tokio::time::timeout(LAST_WORD, &mut answer).await.ok().filter(Result::is_ok).unwrap_or(Err(failure)),
            },
        }
    };
    match answer? {
        Frame::Exit { code: 0 } => {}
        Frame::Error(message) => return Err(Failure::failed(message)),
        other => return Err(unexpected(&other)),
    }
    if skipped > 0 {
        session.terminal.warn(format!("{skipped} sockets, pipes or devices were left out"));
    }
    Ok(0)
}

async fn copy_out(session: &Session, client: &Client, vm: &Name, path: String, to: Place) -> Outcome {
    let query = CopyQuery { direction: Direction::Out, path, contents: false, owner: None, keep_owner: false };
    let (tunnel, total) = client.copy(vm, &query).await?;
    let (mut reader, _writer) = tokio::io::split(tunnel);
    let Place::Local(target) = to else {
        loop {
            match next(&mut reader).await? {
                Frame::Stdout(bytes) => session.terminal.print_bytes(&bytes),
                Frame::Exit { code: 0 } => return Ok(0),
                Frame::Error(message) => return Err(Failure::failed(message)),
                other => return Err(unexpected(&other)),
            }
        }
    };
    // The name is what was asked for: what the guest calls it could be anything, as `.bashrc`.
    let target = if target.is_dir() { target.join(Path::new(&query.path).file_name().unwrap_or("root".as_ref())) } else { target };
    let bar = total.map(|total| session.terminal.bar(total));
    let progress = bar.as_ref().map(Bar::handle);
    let (sender, pieces) = mpsc::channel::<Option<Vec<u8>>>(16);
    let drain = Drain { pieces, rest: Vec::new(), read: 0, ended: false };
    let ended = signals::ended()?;
    let unpacking = tokio::task::spawn_blocking(move || form_archive::unpack(drain, &Target::Exactly(target), Owner::Mine, false));
    let received = async {
        loop {
            match next(&mut reader).await? {
                Frame::Stdout(bytes) => {
                    if let Some(progress) = &progress {
                        progress.inc(bytes.len() as u64);
                    }
                    if sender.send(Some(bytes)).await.is_err() {
                        // The thread has ended and says why.
                        return Ok(());
                    }
                }
                Frame::Exit { code: 0 } => {
                    let _ = sender.send(None).await;
                    return Ok(());
                }
                Frame::Error(message) => return Err(Failure::failed(message)),
                other => return Err(unexpected(&other)),
            }
        }
    };
    let received = tokio::select! {
        received = received => received.map(|()| None),
        code = ended => Ok(Some(code)),
    };
    // Without its end the thread takes back what it has begun.
    drop(sender);
    let unpacked = unpacking.await.map_err(|error| Failure::failed(error.to_string()))?;
    if let Some(code) = received? {
        session.terminal.note("interrupted: nothing half was left under a target's name");
        return Ok(code);
    }
    unpacked.map_err(|error| failure(&error))?;
    Ok(0)
}

/// What the top of a local tree is called: the name it has where it is.
fn top_name(path: &Path) -> OsString {
    let name = path.file_name().map(ToOwned::to_owned).or_else(|| path.canonicalize().ok()?.file_name().map(ToOwned::to_owned));
    name.unwrap_or_else(|| "root".into())
}

async fn send(writer: &mut WriteHalf<Tunnel>, frame: Frame) -> Result<(), Failure> {
    writer.write_all(&frame.encode()).await.map_err(|error| broken(&error))?;
    writer.flush().await.map_err(|error| broken(&error))
}

async fn next(reader: &mut ReadHalf<Tunnel>) -> Result<Frame, Failure> {
    let mut header = [0; HEADER];
    reader.read_exact(&mut header).await.map_err(|error| broken(&error))?;
    let (kind, length) = Frame::parse_header(&header).map_err(|error| broken(&error))?;
    let mut payload = vec![0; length];
    reader.read_exact(&mut payload).await.map_err(|error| broken(&error))?;
    Frame::decode(kind, payload).map_err(|error| broken(&error))
}

fn broken(reason: &dyn std::fmt::Display) -> Failure {
    Failure::new(ErrorCode::Unavailable, format!("the connection broke in the middle of the copy: {reason}"))
        .hint("nothing half was left under the target's name; copy it again")
}

fn unexpected(frame: &Frame) -> Failure {
    Failure::failed(format!("the agent sent a frame that does not belong here: {frame:?}"))
}

fn failure(error: &ArchiveError) -> Failure {
    let code = match error.kind() {
        form_archive::ErrorKind::NotFound => ErrorCode::NotFound,
        form_archive::ErrorKind::NoRoom => ErrorCode::NoRoom,
        form_archive::ErrorKind::Invalid | form_archive::ErrorKind::Stream | form_archive::ErrorKind::Failed => ErrorCode::Failed,
    };
    Failure::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let guest = |vm: &str, path: &str| Place::Guest { vm: vm.parse().unwrap(), path: path.to_owned() };
        assert_eq!("web:/etc/hosts".parse(), Ok(guest("web", "/etc/hosts")));
        assert_eq!("vm/web:/".parse(), Ok(guest("web", "/")));
        assert_eq!("-".parse(), Ok(Place::Stream));
        for local in ["a", "./a:b", "/x:/y", "Web:/x", ":/x"] {
            assert_eq!(local.parse(), Ok(Place::Local(local.into())), "{local}");
        }
        assert!("web:etc".parse::<Place>().unwrap_err().contains("web:/etc"));
    }

    #[test]
    fn the_top_of_a_tree_has_its_own_name() {
        assert_eq!(top_name(Path::new("/a/b/")), "b");
        assert_eq!(top_name(Path::new("/")), "root");
        let here = std::env::current_dir().unwrap();
        assert_eq!(top_name(Path::new(".")), here.file_name().unwrap());
    }
}
