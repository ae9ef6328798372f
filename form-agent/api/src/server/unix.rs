//! The Unix socket: plain HTTP/1.1 for processes of the machine, which the kernel names.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::Router;
use rustix::{
    event::{PollFd, PollFlags},
    time::Timespec,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::sync::CancellationToken;

use super::{GRACE, Limits, Peer, ServerError, Serving, http1, reply};
use crate::{ApiError, ErrorCode};

/// Between two looks at a client that has said all that it will say.
const LISTENS: Duration = Duration::from_secs(1);

/// Who may use the socket besides root.
const GROUP: &str = "formation";

/// Serves `router` on the socket `path` (mode 0660, group `formation` where there is one) until `shutdown` is cancelled. A socket that
/// nobody answers on any more is replaced. Needs a tokio runtime.
///
/// # Errors
/// When somebody answers on the socket, something else than a socket is there, or the socket cannot be made.
pub fn unix(path: &Path, router: Router, limits: Limits, shutdown: CancellationToken) -> Result<Serving, ServerError> {
    let listener = bind(path)?;
    let task = tokio::spawn(accept(listener, path.to_owned(), router, limits, shutdown));
    Ok(Serving { address: None, task })
}

fn bind(path: &Path) -> Result<UnixListener, ServerError> {
    let failed = |source| ServerError::Socket { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(ServerError::NoSocket(path.to_owned())),
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => return Err(ServerError::InUse(path.to_owned())),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // Made beside its place and renamed over it: nobody ever meets the socket with wrong permissions, or none at all.
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let _ = fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(failed)?;
    let ready = fs::set_permissions(&fresh, fs::Permissions::from_mode(0o660)).and_then(|()| {
        if let Some(group) = group_id(GROUP) {
            // Without the right to do so (an agent of an ordinary user in a test) the socket stays its owner's.
            let _ = std::os::unix::fs::chown(&fresh, None, Some(group));
        }
        fs::rename(&fresh, path)
    });
    if let Err(error) = ready {
        let _ = fs::remove_file(&fresh);
        return Err(failed(error));
    }
    Ok(listener)
}

/// The id of a group in `/etc/group` (group(5)).
fn group_id(name: &str) -> Option<u32> {
    fs::read_to_string("/etc/group").ok()?.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

async fn accept(listener: UnixListener, path: PathBuf, router: Router, limits: Limits, shutdown: CancellationToken) {
    let room = Arc::new(Semaphore::new(limits.connections));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: going on at once would spin.
                tracing::warn!(%error, "cannot take a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            tokio::spawn(refuse(stream));
            continue;
        };
        let (router, shutdown) = (router.clone(), shutdown.clone());
        tokio::spawn(async move {
            let cred = match stream.peer_cred() {
                Ok(cred) => cred,
                Err(error) => return tracing::warn!(%error, "a connection without credentials"),
            };
            let peer = Peer::Local { uid: cred.uid(), gid: cred.gid(), pid: cred.pid() };
            let (stream, has_left) = (Arc::new(stream), CancellationToken::new());
            let counted = Counted { stream: Arc::clone(&stream), _permit: permit };
            let served = http1::serve(counted, peer, router, limits, true, has_left.clone(), shutdown);
            let watched = async {
                left(&stream).await;
                has_left.cancel();
                std::future::pending().await
            };
            tokio::select! {
                () = served => {}
                () = watched => {}
            }
        });
    }
    // Removed first: who comes now finds no socket instead of one that never answers.
    let _ = fs::remove_file(&path);
    drop(listener);
    let everybody = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    let _ = tokio::time::timeout(GRACE, room.acquire_many(everybody)).await;
}

/// Until the client has closed the connection. HTTP reads nothing while an answer is under way, and so does not notice before it writes. One
/// that has only said all that it will say (shutdown(2)) still listens.
async fn left(stream: &UnixStream) {
    while stream.ready(Interest::READABLE).await.is_ok() {
        let mut asked = [PollFd::new(stream, PollFlags::empty())];
        let found = rustix::event::poll(&mut asked, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        if found.is_err() || asked[0].revents().contains(PollFlags::HUP) {
            return;
        }
        // It is ready for as long as nobody reads what is there, or for ever.
        tokio::time::sleep(LISTENS).await;
    }
}

/// A connection with its place among the [`Limits::connections`], which it keeps when an Upgrade takes it out of HTTP.
struct Counted {
    stream: Arc<UnixStream>,
    _permit: OwnedSemaphorePermit,
}

impl AsyncRead for Counted {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(context))?;
            match self.stream.try_read_buf(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(drop)),
            }
        }
    }
}

impl Counted {
    fn write_when_ready(&self, context: &mut Context<'_>, write: impl Fn(&UnixStream) -> io::Result<usize>) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(context))?;
            match write(&self.stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }
}

impl AsyncWrite for Counted {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.write_when_ready(context, |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(self: Pin<&mut Self>, context: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.write_when_ready(context, |stream| stream.try_write_vectored(slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing is kept back.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(rustix::net::shutdown(&*self.stream, rustix::net::Shutdown::Write).map_err(io::Error::from))
    }
}

/// Says no in HTTP to whatever is asked.
async fn refuse(mut stream: UnixStream) {
    let error = ApiError::new(ErrorCode::Unavailable, "the agent has too many connections").hint("try again in a moment");
    let answer = reply::raw(&error);
    let _ = tokio::time::timeout(Duration::from_secs(1), async {
        // An answer before the question is none: clients take it for a broken connection.
        let _ = stream.read(&mut [0; 1024]).await?;
        stream.write_all(&answer).await?;
        stream.shutdown().await?;
        // Closing with the request unread would reset the connection before the client has read the answer.
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
    })
    .await;
}
