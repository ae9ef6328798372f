//! Frames: `u32` length of what follows (little endian), one byte of kind, the payload.

use thiserror::Error;

/// The largest value of the length field: kind and payload together.
pub const MAX_FRAME_BYTES: usize = 1 << 20;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 5;

/// What a frame's payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// JSON [`super::Request`].
    Request = 0,
    /// JSON [`super::Reply`].
    Reply = 1,
    /// JSON [`super::ErrorReply`].
    Error = 2,
    /// Binary [`super::LogLine`].
    Log = 3,
    /// Bytes for the process's standard input.
    Stdin = 4,
    /// No payload: standard input ends.
    StdinClose = 5,
    /// JSON [`super::TtySize`].
    Resize = 6,
    /// One byte: a signal number for the process group.
    Signal = 7,
    /// Bytes of standard output; with a terminal everything comes here.
    Stdout = 8,
    /// Bytes of standard error.
    Stderr = 9,
    /// Binary [`super::ExitStatus`]; the last frame of an exec.
    Exit = 10,
    /// Bytes of a file.
    Data = 11,
    /// No payload: the stream of `Log` or `Data` frames is complete.
    End = 12,
    /// No payload: the host wants no more of a stream.
    Cancel = 13,
}

impl FrameKind {
    const ALL: [Self; 14] = [
        Self::Request,
        Self::Reply,
        Self::Error,
        Self::Log,
        Self::Stdin,
        Self::StdinClose,
        Self::Resize,
        Self::Signal,
        Self::Stdout,
        Self::Stderr,
        Self::Exit,
        Self::Data,
        Self::End,
        Self::Cancel,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }
}

/// Bytes that are no frame. The stream cannot be read any further.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    #[error("a frame of {0} bytes is over the limit of {MAX_FRAME_BYTES}: the peer does not speak this protocol")]
    TooLong(usize),
    #[error("a frame of no bytes: the peer does not speak this protocol")]
    Empty,
    #[error("frame kind {0} is unknown: the peer speaks a newer protocol")]
    UnknownKind(u8),
    #[error("a {kind:?} frame of {bytes} bytes is malformed")]
    Malformed { kind: FrameKind, bytes: usize },
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: FrameKind,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn new(kind: FrameKind, payload: impl Into<Vec<u8>>) -> Self {
        Self { kind, payload: payload.into() }
    }

    /// A frame with a JSON payload.
    ///
    /// # Errors
    /// When `value` has no JSON form (a map with keys that are no strings).
    pub fn json<T: serde::Serialize>(kind: FrameKind, value: &T) -> Result<Self, serde_json::Error> {
        Ok(Self { kind, payload: serde_json::to_vec(value)? })
    }

    /// Reads a JSON payload.
    ///
    /// # Errors
    /// When the payload is no such JSON.
    pub fn parse<T: serde::de::DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.payload)
    }

    /// The bytes on the wire.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] when the payload does not fit; cut streams into chunks.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        encode(self.kind, &self.payload)
    }
}

pub(super) fn encode(kind: FrameKind, payload: &[u8]) -> Result<Vec<u8>, FrameError> {
    let length = payload.len() + 1;
    let field = match u32::try_from(length) {
        Ok(field) if length <= MAX_FRAME_BYTES => field,
        _ => return Err(FrameError::TooLong(length)),
    };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&field.to_le_bytes());
    bytes.push(kind as u8);
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Reads a header. Gives the kind and the length of the payload.
pub(super) fn decode_header(header: [u8; HEADER_BYTES]) -> Result<(FrameKind, usize), FrameError> {
    let [a, b, c, d, kind] = header;
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    if length > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong(length));
    }
    let payload = length.checked_sub(1).ok_or(FrameError::Empty)?;
    Ok((FrameKind::from_byte(kind).ok_or(FrameError::UnknownKind(kind))?, payload))
}

/// Turns a stream of bytes, in pieces of any size, into frames. Never holds more than one frame and the last piece fed.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    read: usize,
}

impl Decoder {
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.read > 0 {
            self.buffer.drain(..self.read);
            self.read = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, `None` while it is not there yet.
    ///
    /// # Errors
    /// When the bytes are no frame; every further call gives the same error.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let unread = self.buffer.get(self.read..).unwrap_or_default();
        let Some((header, rest)) = unread.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let (kind, length) = decode_header(*header)?;
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let frame = Frame { kind, payload: payload.to_vec() };
        self.read += HEADER_BYTES + length;
        Ok(Some(frame))
    }

    /// What was fed and is no part of a frame given out: after a `forward` reply the raw bytes begin here.
    pub fn into_rest(mut self) -> Vec<u8> {
        self.buffer.split_off(self.read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_their_position() {
        for (position, kind) in FrameKind::ALL.iter().enumerate() {
            assert_eq!(*kind as usize, position);
        }
    }

    #[test]
    fn frames_survive_any_cutting() {
        let frames =
            [Frame::new(FrameKind::Stdin, *b"hello"), Frame::new(FrameKind::StdinClose, []), Frame::new(FrameKind::Data, vec![7; 70_000])];
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.encode().expect("fits")).collect();
        for piece in [1, 2, 3, 5, 4096, bytes.len()] {
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for chunk in bytes.chunks(piece) {
                decoder.feed(chunk);
                while let Some(frame) = decoder.next_frame().expect("valid") {
                    got.push(frame);
                }
            }
            assert_eq!(got, frames, "pieces of {piece}");
            assert!(decoder.into_rest().is_empty());
        }
    }

    #[test]
    fn bad_headers_are_refused() {
        let mut decoder = Decoder::default();
        decoder.feed(&[0, 0, 0, 0, 0]);
        assert_eq!(decoder.next_frame(), Err(FrameError::Empty));
        let mut decoder = Decoder::default();
        decoder.feed(&[0xff, 0xff, 0xff, 0xff, 0]);
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLong(0xffff_ffff)));
        let mut decoder = Decoder::default();
        decoder.feed(&[1, 0, 0, 0, 99]);
        assert_eq!(decoder.next_frame(), Err(FrameError::UnknownKind(99)));
    }

    #[test]
    fn the_limit_is_exact() {
        assert!(Frame::new(FrameKind::Data, vec![0; MAX_FRAME_BYTES - 1]).encode().is_ok());
        assert_eq!(Frame::new(FrameKind::Data, vec![0; MAX_FRAME_BYTES]).encode(), Err(FrameError::TooLong(MAX_FRAME_BYTES + 1)));
    }

    #[test]
    fn raw_bytes_after_the_last_frame_are_kept() {
        let mut decoder = Decoder::default();
        let mut bytes = Frame::new(FrameKind::Reply, *b"{}").encode().expect("fits");
        bytes.extend_from_slice(b"raw");
        decoder.feed(&bytes);
        assert!(decoder.next_frame().expect("valid").is_some());
        assert_eq!(decoder.into_rest(), b"raw");
    }
}
