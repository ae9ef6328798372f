//! The client of an agent: typed calls over QUIC or the Unix socket, with signing, time limits and safe repetition inside.

mod call;
mod calls;
mod error;
mod follow;
mod lines;
mod transport;

use std::{path::PathBuf, sync::Arc, time::Duration};

use form_types::{ClusterId, PublicKey, SecretKey};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::{sync::OnceCell, time::Instant};

use self::transport::{Quic, Transport};
pub use self::{
    error::ClientError,
    follow::{Followed, Follower},
    lines::Lines,
};

/// The bytes after an Upgrade: reads and writes, and can be closed for writing alone.
pub type Tunnel = TokioIo<Upgraded>;

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Until a connection stands.
    pub connect: Duration,
    /// Until an answer has begun.
    pub request: Duration,
    /// When no call may wait any longer, whatever its own limit.
    pub deadline: Option<Instant>,
}

impl Timeouts {
    /// What is left of `limit` before the deadline.
    pub(crate) fn bound(&self, limit: Duration) -> Duration {
        self.deadline.map_or(limit, |deadline| limit.min(deadline.saturating_duration_since(Instant::now())))
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: Duration::from_secs(10), request: Duration::from_secs(60), deadline: None }
    }
}

/// One agent, as seen from outside. Clones share their connection.
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    transport: Transport,
    timeouts: Timeouts,
    cluster: OnceCell<ClusterId>,
}

impl Client {
    /// The agent at `address` (`HOST`, `HOST:PORT`, `[IPV6]:PORT`; port 7846 without one), which must prove to have `host_key`. Connects
    /// with the first call, not before.
    pub fn quic(address: &str, host_key: PublicKey, identity: &SecretKey, timeouts: Timeouts) -> Self {
        Self::over(Transport::Quic(Box::new(Quic::new(address, host_key, identity))), timeouts)
    }

    /// The agent of this machine, on its socket. Nothing is signed: the kernel tells the agent who asks.
    pub fn unix(path: impl Into<PathBuf>, timeouts: Timeouts) -> Self {
        Self::over(Transport::Unix(path.into()), timeouts)
    }

    fn over(transport: Transport, timeouts: Timeouts) -> Self {
        Self { inner: Arc::new(Inner { transport, timeouts, cluster: OnceCell::new() }) }
    }

    /// Where it talks to, in words: an address or the path of a socket.
    pub fn target(&self) -> String {
        self.inner.transport.target()
    }

    /// Forgets a connection that has broken: the next call makes another.
    pub(crate) async fn reconnect(&self) {
        self.inner.transport.reset().await;
    }

    /// Says goodbye, so that the host need not wait for a silent client. Calls after it connect again.
    pub async fn close(&self) {
        self.inner.transport.close().await;
    }
}
