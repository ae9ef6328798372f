//! The log: the newest lines in memory, with a number each, so that a reader that comes back goes on where it was.

use std::{
    collections::VecDeque,
    io::{Read, Write},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use form_guest::protocol::{LogLine, LogStream};

use crate::process::lock;

/// How many bytes of lines are kept.
const RING_BYTES: usize = 1 << 20;
/// What one entry costs besides its bytes.
const ENTRY_BYTES: usize = 64;
/// A longer line is cut, and goes on in the next entry.
const LINE_BYTES: usize = 16 << 10;
/// Lines that wait for a slow console before some are left out there.
const CONSOLE_LINES: usize = 512;

pub struct Log {
    ring: Mutex<Ring>,
    changed: Condvar,
    console: SyncSender<Vec<u8>>,
}

#[derive(Default)]
struct Ring {
    lines: VecDeque<Arc<LogLine>>,
    bytes: usize,
    next: u64,
    /// No more lines will come.
    closed: bool,
    /// How many readers there are.
    readers: usize,
    console_dropped: u64,
}

impl Log {
    /// An empty log. The other end gives what belongs on the console: see [`copy_to_console`].
    pub fn new() -> (Self, Receiver<Vec<u8>>) {
        let (console, receiver) = sync_channel(CONSOLE_LINES);
        (Self { ring: Mutex::default(), changed: Condvar::new(), console }, receiver)
    }

    pub fn push(&self, stream: LogStream, bytes: &[u8], continues: bool) {
        let mut ring = lock(&self.ring);
        let sequence = ring.next;
        ring.next += 1;
        ring.bytes += bytes.len() + ENTRY_BYTES;
        ring.lines.push_back(Arc::new(LogLine { sequence, timestamp_ms: now_ms(), stream, continues, bytes: bytes.to_vec() }));
        while ring.bytes > RING_BYTES
            && let Some(line) = ring.lines.pop_front()
        {
            ring.bytes -= line.bytes.len() + ENTRY_BYTES;
        }
        self.echo(&mut ring, bytes);
        drop(ring);
        self.changed.notify_all();
    }

    /// A line of our own.
    pub fn say(&self, message: std::fmt::Arguments<'_>) {
        self.push(LogStream::Guest, format!("form-guest: {message}").as_bytes(), false);
    }

    /// A slow console must not slow the service: lines it cannot take are counted and left out there.
    fn echo(&self, ring: &mut Ring, bytes: &[u8]) {
        let mut line = bytes.to_vec();
        line.push(b'\n');
        if ring.console_dropped > 0 {
            let note = format!("form-guest: {} lines are not shown here; the log has them\n", ring.console_dropped);
            line.splice(0..0, note.into_bytes());
        }
        match self.console.try_send(line) {
            Ok(()) => ring.console_dropped = 0,
            Err(TrySendError::Full(_)) => ring.console_dropped += 1,
            Err(TrySendError::Disconnected(_)) => {}
        }
    }

    pub fn next_sequence(&self) -> u64 {
        lock(&self.ring).next
    }

    /// Reads a stream to its end, line by line.
    pub fn read_lines(&self, stream: LogStream, mut from: impl Read) {
        let mut cutter = LineCutter::default();
        let mut buffer = vec![0; 8 << 10];
        loop {
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => cutter.feed(buffer.get(..count).unwrap_or_default(), |line, continues| self.push(stream, line, continues)),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        cutter.finish(|line| self.push(stream, line, false));
    }

    /// A reader of the lines from `from` on that are still there, of these the last `tail`.
    pub fn reader(self: &Arc<Self>, from: Option<u64>, tail: Option<u32>) -> Reader {
        let mut ring = lock(&self.ring);
        let oldest = ring.next - ring.lines.len() as u64;
        let start = from.unwrap_or(0).clamp(oldest, ring.next);
        let start = tail.map_or(start, |tail| start.max(ring.next.saturating_sub(tail.into())));
        ring.readers += 1;
        Reader { log: Arc::clone(self), position: start }
    }

    /// Whether somebody is reading.
    pub fn has_readers(&self) -> bool {
        lock(&self.ring).readers > 0
    }

    /// Tells the readers that nothing more comes, and waits until they have sent everything, at most `limit`.
    pub fn close(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut ring = lock(&self.ring);
        ring.closed = true;
        self.changed.notify_all();
        while ring.readers > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            ring = self.changed.wait_timeout(ring, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What [`Reader::next`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Line(Arc<LogLine>),
    /// Nothing new for now.
    Nothing,
    /// Everything was read and nothing more will come.
    End,
}

/// A position in the log.
pub struct Reader {
    log: Arc<Log>,
    position: u64,
}

impl Reader {
    /// The next line, waiting at most `limit` for it. Lines that the ring dropped are skipped: their numbers are missing.
    pub fn next(&mut self, limit: Duration) -> Next {
        let mut ring = lock(&self.log.ring);
        if !limit.is_zero() && self.position >= ring.next && !ring.closed {
            ring = self.log.changed.wait_timeout(ring, limit).unwrap_or_else(PoisonError::into_inner).0;
        }
        let oldest = ring.next - ring.lines.len() as u64;
        self.position = self.position.max(oldest);
        let offset = usize::try_from(self.position - oldest).unwrap_or(usize::MAX);
        match ring.lines.get(offset).cloned() {
            Some(line) => {
                self.position += 1;
                Next::Line(line)
            }
            None if ring.closed => Next::End,
            None => Next::Nothing,
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        lock(&self.log.ring).readers -= 1;
        self.log.changed.notify_all();
    }
}

/// Cuts bytes into lines.
#[derive(Default)]
struct LineCutter {
    partial: Vec<u8>,
}

impl LineCutter {
    fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8], bool)) {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, after) = rest.split_at(end);
            self.extend(line, &mut each);
            each(self.partial.strip_suffix(b"\r").unwrap_or(&self.partial), false);
            self.partial.clear();
            rest = after.get(1..).unwrap_or_default();
        }
        self.extend(rest, &mut each);
    }

    fn extend(&mut self, bytes: &[u8], each: &mut impl FnMut(&[u8], bool)) {
        let mut rest = bytes;
        while self.partial.len() + rest.len() > LINE_BYTES {
            let (part, after) = rest.split_at(LINE_BYTES - self.partial.len());
            self.partial.extend_from_slice(part);
            each(&self.partial, true);
            self.partial.clear();
            rest = after;
        }
        self.partial.extend_from_slice(rest);
    }

    fn finish(self, mut each: impl FnMut(&[u8])) {
        if !self.partial.is_empty() {
            each(&self.partial);
        }
    }
}

/// Writes what the log echoes, for ever.
pub fn copy_to_console(lines: &Receiver<Vec<u8>>) {
    while let Ok(line) = lines.recv() {
        let _ = std::io::stderr().write_all(&line);
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> Arc<Log> {
        Arc::new(Log::new().0)
    }

    fn rest(reader: &mut Reader) -> Vec<String> {
        let mut lines = Vec::new();
        while let Next::Line(line) = reader.next(Duration::ZERO) {
            lines.push(format!("{}:{}", line.sequence, String::from_utf8_lossy(&line.bytes)));
        }
        lines
    }

    #[test]
    fn readers_start_where_they_ask() {
        let log = log();
        for text in ["a", "b", "c", "d"] {
            log.push(LogStream::Stdout, text.as_bytes(), false);
        }
        assert_eq!(rest(&mut log.reader(None, None)), ["0:a", "1:b", "2:c", "3:d"]);
        assert_eq!(rest(&mut log.reader(Some(2), None)), ["2:c", "3:d"]);
        assert_eq!(rest(&mut log.reader(None, Some(1))), ["3:d"]);
        assert_eq!(rest(&mut log.reader(Some(1), Some(2))), ["2:c", "3:d"]);
        assert_eq!(rest(&mut log.reader(Some(99), Some(0))), [""; 0]);
        let mut follower = log.reader(None, Some(0));
        assert_eq!(follower.next(Duration::ZERO), Next::Nothing);
        log.push(LogStream::Stderr, b"e", false);
        assert_eq!(rest(&mut follower), ["4:e"]);
    }

    #[test]
    fn the_ring_forgets_the_oldest() {
        let log = log();
        let mut slow = log.reader(None, None);
        let line = vec![b'x'; LINE_BYTES];
        for _ in 0..200 {
            log.push(LogStream::Stdout, &line, false);
        }
        let Next::Line(first) = slow.next(Duration::ZERO) else { panic!("a line is there") };
        assert!(first.sequence > 100, "{}", first.sequence);
        assert!(lock(&log.ring).bytes <= RING_BYTES);
        assert_eq!(log.next_sequence(), 200);
    }

    #[test]
    fn closing_waits_for_readers_and_not_for_ever() {
        let log = log();
        let mut reader = log.reader(None, None);
        log.push(LogStream::Guest, b"last words", false);
        let start = Instant::now();
        log.close(Duration::from_millis(30));
        assert!(start.elapsed() >= Duration::from_millis(30));
        assert!(matches!(reader.next(Duration::from_secs(1)), Next::Line(_)));
        assert_eq!(reader.next(Duration::from_secs(60)), Next::End);
        drop(reader);
        log.close(Duration::from_secs(60));
    }

    #[test]
    fn lines_are_cut() {
        let cut = |pieces: &[&[u8]]| {
            let mut lines = Vec::new();
            let mut cutter = LineCutter::default();
            for piece in pieces {
                cutter.feed(piece, |line, continues| lines.push((line.to_vec(), continues)));
            }
            cutter.finish(|line| lines.push((line.to_vec(), false)));
            lines
        };
        assert_eq!(
            cut(&[b"a\r\n", b"b", b"c\n\nd"]),
            [(b"a".to_vec(), false), (b"bc".to_vec(), false), (vec![], false), (b"d".to_vec(), false)]
        );
        let long = vec![b'x'; LINE_BYTES + 5];
        assert_eq!(cut(&[&long, b"\n"]), [(vec![b'x'; LINE_BYTES], true), (vec![b'x'; 5], false)]);
        assert_eq!(cut(&[&long[..LINE_BYTES], b"\n"]), [(vec![b'x'; LINE_BYTES], false)]);
    }
}
