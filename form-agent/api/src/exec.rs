//! Running a command in a VM: what is asked in the opening request's header, and the frames that follow the Upgrade.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Request header with the JSON of [`ExecRequest`] as URL-safe base64 without padding: an Upgrade has no body.
pub const EXEC_HEADER: &str = "form-exec";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    pub command: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub user: Option<String>,
    pub workdir: Option<String>,
    /// With a pseudo-terminal.
    pub terminal: Option<Terminal>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Terminal {
    pub rows: u16,
    pub columns: u16,
    /// `TERM`
    pub kind: String,
}

/// After the Upgrade both sides send frames: one byte of kind, a length (u32, little-endian), the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Client to agent.
    Stdin(Vec<u8>),
    StdinClosed,
    Resize {
        rows: u16,
        columns: u16,
    },
    /// A signal number for the process group.
    Signal(u8),
    /// Agent to client.
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// The last frame: the command's exit code, 128 + n after signal n, 125 when the guest could not try, 126 and 127 as in a shell.
    Exit {
        code: u8,
    },
    /// The last frame when the exec itself failed.
    Error(String),
}

/// The longest payload of a frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;
pub const HEADER: usize = 5;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    #[error("a frame of {0} bytes is longer than {MAX_PAYLOAD}")]
    TooLong(usize),
    #[error("no frame has the kind {0}")]
    Kind(u8),
    #[error("the payload of a frame of kind {0} has the wrong shape")]
    Shape(u8),
}

impl Frame {
    pub fn encode(&self) -> Vec<u8> {
        let (kind, payload): (u8, &[u8]) = match self {
            Self::Stdin(bytes) => (1, bytes),
            Self::StdinClosed => (2, &[]),
            Self::Resize { rows, columns } => (3, &[rows.to_le_bytes(), columns.to_le_bytes()].concat()),
            Self::Signal(number) => (4, &[*number]),
            Self::Stdout(bytes) => (5, bytes),
            Self::Stderr(bytes) => (6, bytes),
            Self::Exit { code } => (7, &[*code]),
            Self::Error(message) => (8, message.as_bytes()),
        };
        let mut frame = Vec::with_capacity(HEADER + payload.len());
        frame.push(kind);
        frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    /// The kind and payload length in a frame's first [`HEADER`] bytes.
    ///
    /// # Errors
    /// When the length is over [`MAX_PAYLOAD`].
    pub fn parse_header(header: &[u8; HEADER]) -> Result<(u8, usize), FrameError> {
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if length > MAX_PAYLOAD { Err(FrameError::TooLong(length)) } else { Ok((header[0], length)) }
    }

    /// # Errors
    /// When there is no such kind, or its payload has another shape.
    pub fn decode(kind: u8, payload: Vec<u8>) -> Result<Self, FrameError> {
        match (kind, payload.as_slice()) {
            (1, _) => Ok(Self::Stdin(payload)),
            (2, []) => Ok(Self::StdinClosed),
            (3, [r0, r1, c0, c1]) => Ok(Self::Resize { rows: u16::from_le_bytes([*r0, *r1]), columns: u16::from_le_bytes([*c0, *c1]) }),
            (4, [number]) => Ok(Self::Signal(*number)),
            (5, _) => Ok(Self::Stdout(payload)),
            (6, _) => Ok(Self::Stderr(payload)),
            (7, [code]) => Ok(Self::Exit { code: *code }),
            (8, _) => Ok(Self::Error(String::from_utf8_lossy(&payload).into_owned())),
            (1..=8, _) => Err(FrameError::Shape(kind)),
            _ => Err(FrameError::Kind(kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_survives_the_wire() {
        let frames = [
            Frame::Stdin(vec![0, 255]),
            Frame::StdinClosed,
            Frame::Resize { rows: 24, columns: 300 },
            Frame::Signal(2),
            Frame::Stdout(b"out".to_vec()),
            Frame::Stderr(vec![]),
            Frame::Exit { code: 130 },
            Frame::Error("no such user".to_owned()),
        ];
        for frame in frames {
            let bytes = frame.encode();
            let (kind, length) = Frame::parse_header(bytes[..HEADER].try_into().unwrap()).unwrap();
            assert_eq!(length, bytes.len() - HEADER);
            assert_eq!(Frame::decode(kind, bytes[HEADER..].to_vec()), Ok(frame));
        }
        assert_eq!(Frame::parse_header(&[1, 255, 255, 255, 255]), Err(FrameError::TooLong(u32::MAX as usize)));
        assert_eq!(Frame::decode(3, vec![1]), Err(FrameError::Shape(3)));
        assert_eq!(Frame::decode(9, vec![]), Err(FrameError::Kind(9)));
    }
}
