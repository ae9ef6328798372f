//! What carries requests to an axum router: QUIC for everybody with a key, a Unix socket for the machine itself.

mod http1;
mod quic;
mod reply;
mod unix;

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

use form_types::PublicKey;
use tokio::task::JoinHandle;
pub use tokio_util::sync::CancellationToken;

pub use self::{
    quic::{QuicConfig, quic},
    reply::{ndjson, read_body, read_json, upgrade},
    unix::unix,
};
use crate::tls::TlsError;

/// Who asks: a request extension that both transports set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Over QUIC: whoever holds this key.
    Key(PublicKey),
    /// Over the Unix socket: a process of this machine, as the kernel says (`SO_PEERCRED`).
    Local { uid: u32, gid: u32, pid: Option<i32> },
}

/// How much a transport takes at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections; further ones are refused at once, with a reason the client understands.
    pub connections: usize,
    /// Exchanges at once on one QUIC connection; further ones wait in the client.
    pub streams: u32,
    /// How long a client may take to send a request's headers.
    pub header_timeout: Duration,
    /// How long a QUIC connection may be silent.
    pub idle_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 1024, streams: 256, header_timeout: Duration::from_secs(10), idle_timeout: Duration::from_secs(30) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on UDP {address}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("another agent answers on {0}: stop it, or use another directory")]
    InUse(PathBuf),
    #[error("{0} is in the way: it is no socket")]
    NoSocket(PathBuf),
    #[error("cannot make the socket {path}")]
    Socket { path: PathBuf, source: io::Error },
}

/// A transport that serves until its token is cancelled.
#[derive(Debug)]
pub struct Serving {
    address: Option<SocketAddr>,
    task: JoinHandle<()>,
}

impl Serving {
    /// The UDP address in use (the real port when 0 was asked for); `None` for a Unix socket.
    pub const fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Returns when the token was cancelled and the exchanges under way have ended or their grace is over.
    pub async fn finished(self) {
        // A panic in the accept loop has been reported by the runtime; there is nothing left to serve either way.
        let _ = self.task.await;
    }
}

/// How long exchanges may go on after the token was cancelled.
const GRACE: Duration = Duration::from_secs(2);
