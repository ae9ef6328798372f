//! What volumes hold, on its way to the host and from it.

use form_api::{
    ErrorCode,
    client::Tunnel,
    exec::{Frame, HEADER},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

use crate::failure::Failure;

pub async fn send(writer: &mut WriteHalf<Tunnel>, frame: Frame) -> Result<(), Failure> {
    writer.write_all(&frame.encode()).await.map_err(|error| broken(&error))?;
    writer.flush().await.map_err(|error| broken(&error))
}

pub async fn next(reader: &mut ReadHalf<Tunnel>) -> Result<Frame, Failure> {
    let mut header = [0; HEADER];
    reader.read_exact(&mut header).await.map_err(|error| broken(&error))?;
    let (kind, length) = Frame::parse_header(&header).map_err(|error| broken(&error))?;
    let mut payload = vec![0; length];
    reader.read_exact(&mut payload).await.map_err(|error| broken(&error))?;
    Frame::decode(kind, payload).map_err(|error| broken(&error))
}

/// What the agent's last frame says.
pub fn ended(frame: &Frame) -> Result<(), Failure> {
    match frame {
        Frame::Exit { code: 0 } => Ok(()),
        Frame::Error(message) => Err(Failure::failed(message.clone())),
        other => Err(Failure::failed(format!("the agent sent a frame that does not belong here: {other:?}"))),
    }
}

fn broken(reason: &dyn std::fmt::Display) -> Failure {
    Failure::new(ErrorCode::Unavailable, format!("the connection broke in the middle: {reason}"))
        .hint("nothing half was left behind; run the same command again")
}
