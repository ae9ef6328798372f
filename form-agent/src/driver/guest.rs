//! Talking to the guest of one VM, over the stream that its VM process hands out for a vsock port.

use std::{io, path::Path, time::Duration};

use form_guest::protocol::{Decoder, ErrorReply, Frame, FrameError, FrameKind, Reply, Request, VSOCK_PORT};
use form_vmm::control::Client;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error("the VM process does not answer: {0}")]
    Control(String),
    #[error("the guest cannot be reached: {0}")]
    Io(#[from] io::Error),
    #[error("the guest said something that is no frame: {0}")]
    Frame(#[from] FrameError),
    #[error("the guest said something unexpected: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the guest hung up")]
    HungUp,
    #[error("{}", .0.message)]
    Refused(ErrorReply),
    #[error("the guest answered something else")]
    Unexpected,
}

/// One connection: a request, and what it turns into.
pub struct Connection {
    stream: UnixStream,
    decoder: Decoder,
}

impl Connection {
    /// Connects to the guest behind the control socket at `control` and sends `request`.
    ///
    /// # Errors
    /// When nothing listens in the guest (yet), or the VM process is gone.
    pub async fn open(control: &Path, request: &Request) -> Result<Self, GuestError> {
        let control = control.to_owned();
        let fd = tokio::task::spawn_blocking(move || Client::connect(&control)?.vsock_connect(VSOCK_PORT))
            .await
            .map_err(|error| GuestError::Control(error.to_string()))?
            .map_err(|error| GuestError::Control(error.to_string()))?;
        let stream = std::os::unix::net::UnixStream::from(fd);
        stream.set_nonblocking(true)?;
        let mut connection = Self::over(UnixStream::from_std(stream)?);
        connection.send(&Frame::json(FrameKind::Request, request)?).await?;
        Ok(connection)
    }

    pub fn over(stream: UnixStream) -> Self {
        Self { stream, decoder: Decoder::default() }
    }

    /// # Errors
    /// When the frame is too long or the guest is gone.
    pub async fn send(&mut self, frame: &Frame) -> Result<(), GuestError> {
        Ok(self.stream.write_all(&frame.encode()?).await?)
    }

    /// The next frame; `None` when the guest closed the connection. Cancel safe.
    ///
    /// # Errors
    /// When the guest is gone or sends something else.
    pub async fn next(&mut self) -> Result<Option<Frame>, GuestError> {
        let mut buffer = [0; 16 * 1024];
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            let count = self.stream.read(&mut buffer).await?;
            if count == 0 {
                return Ok(None);
            }
            self.decoder.feed(&buffer[..count]);
        }
    }

    /// The reply to the request.
    ///
    /// # Errors
    /// What the guest refused, or that it is gone.
    pub async fn reply(&mut self) -> Result<Reply, GuestError> {
        let frame = self.next().await?.ok_or(GuestError::HungUp)?;
        match frame.kind {
            FrameKind::Reply => Ok(frame.parse()?),
            FrameKind::Error => Err(GuestError::Refused(frame.parse()?)),
            _ => Err(GuestError::Unexpected),
        }
    }

    /// The stream and the bytes already read from it, once raw bytes follow.
    pub fn into_raw(self) -> (UnixStream, Vec<u8>) {
        (self.stream, self.decoder.into_rest())
    }
}

/// One request, one reply, within `limit`.
///
/// # Errors
/// What the guest refused, that it is gone, or that it did not answer in time.
pub async fn ask(control: &Path, request: &Request, limit: Duration) -> Result<Reply, GuestError> {
    let exchange = async { Connection::open(control, request).await?.reply().await };
    tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| Err(GuestError::Io(io::ErrorKind::TimedOut.into())))
}
