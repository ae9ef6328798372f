//! QUIC: each bidirectional stream carries one HTTP/1.1 exchange.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use form_types::SecretKey;
use quinn::{
    Connection, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime, TransportConfig,
    VarInt,
    crypto::{CryptoError, HmacKey},
};
use rustix::net::sockopt;
use rustls::pki_types::CertificateDer;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{GRACE, Limits, Peer, ServerError, Serving, http1};
use crate::{ALPN, tls};

/// Where to listen, and as whom.
#[derive(Debug)]
pub struct QuicConfig<'a> {
    pub bind: SocketAddr,
    pub key: &'a SecretKey,
    pub limits: Limits,
}

/// Serves `router` over QUIC from now on until `shutdown` is cancelled. Needs a tokio runtime.
///
/// # Errors
/// When the address cannot be bound or the key cannot be used.
pub fn quic(config: &QuicConfig<'_>, router: Router, shutdown: CancellationToken) -> Result<Serving, ServerError> {
    let mut server = ServerConfig::with_crypto(Arc::new(tls::server(config.key, &[ALPN])?));
    server.transport_config(Arc::new(transport(&config.limits)));
    server.max_incoming(config.limits.connections);
    let bind_error = |source| ServerError::Bind { address: config.bind, source };
    let socket = std::net::UdpSocket::bind(config.bind).map_err(bind_error)?;
    enlarge(&socket);
    let endpoint = Endpoint::new(endpoint(config.key), Some(server), socket, Arc::new(TokioRuntime)).map_err(bind_error)?;
    let address = endpoint.local_addr().map_err(bind_error)?;
    let task = tokio::spawn(accept(endpoint, router, config.limits, shutdown));
    Ok(Serving { address: Some(address), task })
}

/// Bytes of datagrams that may wait for the agent: what a thousand clients send when they connect at once. The kernel's default holds
/// less than a hundred, and who is not heard tries again after ever longer pauses.
const RECEIVE_BUFFER: usize = 4 << 20;

fn enlarge(socket: &std::net::UdpSocket) {
    // The first goes past the system's limit and needs the right to; with neither the default has to do.
    let _ = sockopt::set_socket_recv_buffer_size_force(socket, RECEIVE_BUFFER)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(socket, RECEIVE_BUFFER));
}

/// An agent that was killed and runs again tells clients of its former life so at once (RFC 9000, section 10.3, stateless reset), instead
/// of letting them wait for their idle time-out: the key that proves the reset is the same in every life.
fn endpoint(key: &SecretKey) -> EndpointConfig {
    let reset_key = blake3::derive_key("formation 2026 quic stateless reset", &key.to_bytes());
    let mut config = EndpointConfig::new(Arc::new(ResetKey(reset_key)));
    // The library's own ids hold a checksum under a key of the process, and packets with another's are dropped without a reset.
    config.cid_generator(|| Box::new(RandomIds));
    config
}

struct ResetKey([u8; 32]);

impl ResetKey {
    fn tag(&self, data: &[u8]) -> [u8; 32] {
        *blake3::keyed_hash(&self.0, data).as_bytes()
    }
}

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        let tag = self.tag(data);
        let length = tag.len().min(signature_out.len());
        signature_out[..length].copy_from_slice(&tag[..length]);
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        // blake3's comparison takes the same time whatever differs.
        match signature.try_into() {
            Ok(signature) if blake3::Hash::from_bytes(self.tag(data)) == blake3::Hash::from_bytes(signature) => Ok(()),
            _ => Err(CryptoError),
        }
    }
}

struct RandomIds;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut bytes = [0; 8];
        // Without entropy the id repeats; the library then asks for another, and no handshake could succeed anyhow.
        let _ = getrandom::fill(&mut bytes);
        ConnectionId::new(&bytes)
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

fn transport(limits: &Limits) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport.max_concurrent_bidi_streams(VarInt::from_u32(limits.streams));
    transport.max_concurrent_uni_streams(VarInt::from_u32(0));
    transport.datagram_receive_buffer_size(None);
    // A limit that does not fit is no limit that anybody meant: fall back to the library's own.
    transport.max_idle_timeout(limits.idle_timeout.try_into().ok());
    transport
}

async fn accept(endpoint: Endpoint, router: Router, limits: Limits, shutdown: CancellationToken) {
    let room = Arc::new(Semaphore::new(limits.connections));
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            () = shutdown.cancelled() => break,
        };
        let Some(incoming) = incoming else { break };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            // The client sees CONNECTION_REFUSED, which it reports as "busy, try again".
            incoming.refuse();
            continue;
        };
        let (router, shutdown) = (router.clone(), shutdown.clone());
        tokio::spawn(async move {
            connection(incoming, router, limits, shutdown).await;
            drop(permit);
        });
    }
    endpoint.set_server_config(None);
    let everybody = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    // Exchanges under way may end; what is still open after the grace is cut off.
    let _ = tokio::time::timeout(GRACE, room.acquire_many(everybody)).await;
    endpoint.close(VarInt::from_u32(0), b"the agent stops");
    let _ = tokio::time::timeout(GRACE, endpoint.wait_idle()).await;
}

async fn connection(incoming: Incoming, router: Router, limits: Limits, shutdown: CancellationToken) {
    let address = incoming.remote_address();
    let connection = match tokio::time::timeout(limits.header_timeout, async { incoming.await }).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::debug!(%address, %error, "handshake failed"),
        Err(_) => return tracing::debug!(%address, "handshake took too long"),
    };
    let Some(peer) = peer_of(&connection) else {
        return connection.close(VarInt::from_u32(1), b"no key");
    };
    let mut exchanges = tokio::task::JoinSet::new();
    loop {
        let stream = tokio::select! {
            stream = connection.accept_bi() => stream,
            () = shutdown.cancelled() => break,
        };
        let Ok((send, receive)) = stream else { break };
        while exchanges.try_join_next().is_some() {}
        exchanges.spawn(http1::serve(
            tokio::io::join(receive, send),
            peer,
            router.clone(),
            limits,
            false,
            // It ends all exchanges of its connection.
            CancellationToken::new(),
            shutdown.clone(),
        ));
    }
    // Streams end on their own when the connection is gone; upgraded ones were handed to tasks of their handlers.
    while exchanges.join_next().await.is_some() {}
}

fn peer_of(connection: &Connection) -> Option<Peer> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().and_then(tls::key_of).map(Peer::Key)
}
