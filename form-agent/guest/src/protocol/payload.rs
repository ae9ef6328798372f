//! Binary payloads: log lines and exit statuses.

use super::{Frame, FrameError, FrameKind};

/// Where a line of the log comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum LogStream {
    Stdout = 0,
    Stderr = 1,
    /// `form-guest` itself: starts, exits, restarts, faults.
    Guest = 2,
}

/// One line of the log.
///
/// On the wire: sequence `u64`, milliseconds since 1970 `u64` (both little endian), stream `u8`, flags `u8` (bit 0: the line was cut
/// and goes on in the next one), the bytes without the newline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// Counts up by one from 0 at each boot; a gap means that the ring dropped lines before they were read.
    pub sequence: u64,
    pub timestamp_ms: u64,
    pub stream: LogStream,
    /// The line was longer than a line may be, and the next entry of this stream continues it.
    pub continues: bool,
    pub bytes: Vec<u8>,
}

impl LogLine {
    const FIXED: usize = 18;

    pub fn to_frame(&self) -> Frame {
        let mut payload = Vec::with_capacity(Self::FIXED + self.bytes.len());
        payload.extend_from_slice(&self.sequence.to_le_bytes());
        payload.extend_from_slice(&self.timestamp_ms.to_le_bytes());
        payload.push(self.stream as u8);
        payload.push(u8::from(self.continues));
        payload.extend_from_slice(&self.bytes);
        Frame::new(FrameKind::Log, payload)
    }

    /// # Errors
    /// [`FrameError::Malformed`].
    pub fn from_frame(frame: &Frame) -> Result<Self, FrameError> {
        let malformed = || FrameError::Malformed { kind: frame.kind, bytes: frame.payload.len() };
        let (sequence, rest) = frame.payload.split_first_chunk::<8>().ok_or_else(malformed)?;
        let (timestamp, rest) = rest.split_first_chunk::<8>().ok_or_else(malformed)?;
        let ([stream, flags], bytes) = rest.split_first_chunk::<2>().ok_or_else(malformed)?;
        let stream = match stream {
            0 => LogStream::Stdout,
            1 => LogStream::Stderr,
            2 => LogStream::Guest,
            _ => return Err(malformed()),
        };
        Ok(Self {
            sequence: u64::from_le_bytes(*sequence),
            timestamp_ms: u64::from_le_bytes(*timestamp),
            stream,
            continues: flags & 1 == 1,
            bytes: bytes.to_vec(),
        })
    }
}

/// How a process ended.
///
/// On the wire: one byte (0 exited, 1 killed by a signal), `i32` little endian. In JSON: `{"code":0}` or `{"signal":9}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExitStatus {
    Code(i32),
    Signal(i32),
}

impl ExitStatus {
    /// The command was found and could not be executed, as a shell says it.
    pub const NOT_EXECUTABLE: Self = Self::Code(126);
    /// There is no such command, as a shell says it.
    pub const NOT_FOUND: Self = Self::Code(127);

    pub const fn success(self) -> bool {
        matches!(self, Self::Code(0))
    }

    /// The number a shell would show: the code, or 128 and the signal. The peer may have made up either.
    pub const fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }

    pub fn to_frame(self) -> Frame {
        let (kind, number) = match self {
            Self::Code(code) => (0, code),
            Self::Signal(signal) => (1, signal),
        };
        let mut payload = vec![kind];
        payload.extend_from_slice(&number.to_le_bytes());
        Frame::new(FrameKind::Exit, payload)
    }

    /// # Errors
    /// [`FrameError::Malformed`].
    pub fn from_frame(frame: &Frame) -> Result<Self, FrameError> {
        match frame.payload.as_slice() {
            [0, number @ ..] if number.len() == 4 => Ok(Self::Code(number_of(number))),
            [1, number @ ..] if number.len() == 4 => Ok(Self::Signal(number_of(number))),
            _ => Err(FrameError::Malformed { kind: frame.kind, bytes: frame.payload.len() }),
        }
    }
}

fn number_of(bytes: &[u8]) -> i32 {
    bytes.first_chunk::<4>().map_or(0, |bytes| i32::from_le_bytes(*bytes))
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(formatter, "exit code {code}"),
            Self::Signal(signal) => write!(formatter, "signal {signal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_come_back() {
        let line =
            LogLine { sequence: 7, timestamp_ms: 1_700_000_000_123, stream: LogStream::Stderr, continues: true, bytes: vec![0xff, b'x'] };
        assert_eq!(LogLine::from_frame(&line.to_frame()), Ok(line.clone()));
        let mut short = line.to_frame();
        short.payload.truncate(17);
        assert!(LogLine::from_frame(&short).is_err());
        let mut odd = line.to_frame();
        odd.payload[16] = 3;
        assert!(LogLine::from_frame(&odd).is_err());
    }

    #[test]
    fn exit_statuses_come_back() {
        for status in [ExitStatus::Code(0), ExitStatus::Code(-1), ExitStatus::Signal(9)] {
            assert_eq!(ExitStatus::from_frame(&status.to_frame()), Ok(status));
        }
        assert!(ExitStatus::from_frame(&Frame::new(FrameKind::Exit, [0, 1])).is_err());
        assert!(ExitStatus::from_frame(&Frame::new(FrameKind::Exit, [2, 0, 0, 0, 0])).is_err());
        assert_eq!(ExitStatus::Signal(15).shell_code(), 143);
        // A guest may say that any number was a signal's.
        assert_eq!(ExitStatus::Signal(i32::MAX).shell_code(), i32::MAX);
    }
}
