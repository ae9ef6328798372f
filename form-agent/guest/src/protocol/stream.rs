//! Frames over blocking streams, and getting back in step on a channel that others used before.

use std::io::{self, Read, Write};

use super::{
    Frame, FrameError, FrameKind, HEADER_BYTES, Reply,
    frame::{decode_header, encode},
};

impl From<FrameError> for io::Error {
    fn from(error: FrameError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// Reads one frame; `None` at the end of the stream between two frames.
///
/// # Errors
/// Those of the stream, `UnexpectedEof` in the middle of a frame, `InvalidData` with a [`FrameError`].
pub fn read_frame(stream: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut header = [0; HEADER_BYTES];
    let mut filled = 0;
    while filled < HEADER_BYTES {
        match stream.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let (kind, length) = decode_header(header)?;
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok(Some(Frame { kind, payload }))
}

/// Writes one frame, in one call so that it is not cut between two writers, and flushes.
///
/// # Errors
/// Those of the stream; `InvalidData` when the payload is too long.
pub fn write_frame(stream: &mut impl Write, kind: FrameKind, payload: &[u8]) -> io::Result<()> {
    stream.write_all(&encode(kind, payload)?)?;
    stream.flush()
}

/// The bytes with which a guest answers `sync` with `token`. A host that opens a virtio-serial port skips all bytes up to and with these.
///
/// # Errors
/// Never in practice: the message is short and has a JSON form.
pub fn synced_bytes(token: u64) -> Result<Vec<u8>, FrameError> {
    Frame::json(FrameKind::Reply, &Reply::Synced { token })
        .map_err(|_| FrameError::Malformed { kind: FrameKind::Reply, bytes: 0 })?
        .encode()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_over_a_stream() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, FrameKind::Stdout, b"one").expect("a vector takes all");
        write_frame(&mut bytes, FrameKind::End, b"").expect("a vector takes all");
        let mut stream = bytes.as_slice();
        assert_eq!(read_frame(&mut stream).expect("valid"), Some(Frame::new(FrameKind::Stdout, *b"one")));
        assert_eq!(read_frame(&mut stream).expect("valid"), Some(Frame::new(FrameKind::End, [])));
        assert_eq!(read_frame(&mut stream).expect("valid"), None);
        let mut cut = &bytes[..6];
        assert_eq!(read_frame(&mut cut).expect_err("cut").kind(), io::ErrorKind::UnexpectedEof);
        let mut cut = &bytes[..3];
        assert_eq!(read_frame(&mut cut).expect_err("cut").kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_token_is_found_in_rubbish() {
        let answer = synced_bytes(42).expect("short");
        let mut channel = vec![1, 2, 3];
        channel.extend_from_slice(&answer);
        assert_eq!(channel.windows(answer.len()).position(|window| window == answer), Some(3));
    }
}
