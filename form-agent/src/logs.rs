//! The output of each VM's service, kept on the host: one JSON object a line, rotated at a size, one old file kept. It survives the
//! VM, and followers read the files, so a slow one costs nothing and misses nothing that is still there.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use form_api::vm::{LogCursor, LogLine, LogStream};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// A line as it is kept: with the run it belongs to and its number there, so that a restarted agent goes on where it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptLine {
    pub at: Timestamp,
    pub stream: LogStream,
    pub line: String,
    /// When the VM process of this run was started.
    pub run: Timestamp,
    pub sequence: u64,
}

impl KeptLine {
    pub const fn cursor(&self) -> LogCursor {
        LogCursor { run: self.run, sequence: self.sequence }
    }
}

impl From<KeptLine> for LogLine {
    fn from(kept: KeptLine) -> Self {
        let cursor = Some(kept.cursor());
        Self { at: kept.at, stream: kept.stream, line: kept.line, cursor }
    }
}

/// Longest line that is kept or read, in bytes of JSON.
const MAX_LINE: usize = 256 * 1024;

fn current(directory: &Path) -> PathBuf {
    directory.join("service.log")
}

fn previous(directory: &Path) -> PathBuf {
    directory.join("service.log.1")
}

pub struct Writer {
    directory: PathBuf,
    file: File,
    size: u64,
    limit: u64,
    changed: watch::Sender<u64>,
}

impl Writer {
    /// # Errors
    /// When the directory or file cannot be made.
    pub fn open(directory: &Path, limit: u64, changed: watch::Sender<u64>) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let mut file = OpenOptions::new().create(true).append(true).read(true).open(current(directory))?;
        let size = cut_torn_line(&mut file)?;
        Ok(Self { directory: directory.to_owned(), file, size, limit, changed })
    }

    /// # Errors
    /// When the disk is full, mostly. The line is then lost, the file stays sound.
    pub fn append(&mut self, line: &KeptLine) -> io::Result<()> {
        let mut json = serde_json::to_vec(line)?;
        json.push(b'\n');
        if self.size > 0 && self.size + json.len() as u64 > self.limit {
            fs::rename(current(&self.directory), previous(&self.directory))?;
            self.file = OpenOptions::new().create(true).append(true).read(true).open(current(&self.directory))?;
            self.size = 0;
        }
        if let Err(error) = self.file.write_all(&json) {
            // Half a line would make the next one unreadable.
            self.file.set_len(self.size)?;
            return Err(error);
        }
        self.size += json.len() as u64;
        self.changed.send_modify(|count| *count += 1);
        Ok(())
    }

    /// The number of the last line kept of `run`. Right after a rotation that line is in the older file.
    pub fn last_sequence(&self, run: Timestamp) -> Option<u64> {
        let last = last_line(&current(&self.directory)).or_else(|| last_line(&previous(&self.directory)))?;
        (last.run == run).then_some(last.sequence)
    }
}

fn last_line(path: &Path) -> Option<KeptLine> {
    let mut file = File::open(path).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(MAX_LINE as u64))).ok()?;
    let mut tail = Vec::new();
    file.take(MAX_LINE as u64).read_to_end(&mut tail).ok()?;
    let last = tail.trim_ascii_end().rsplit(|byte| *byte == b'\n').next()?;
    serde_json::from_slice(last).ok()
}

/// A crash may have left half a line at the end: it is cut off. Gives the size.
fn cut_torn_line(file: &mut File) -> io::Result<u64> {
    let size = file.metadata()?.len();
    let start = size.saturating_sub(MAX_LINE as u64);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(MAX_LINE as u64).read_to_end(&mut tail)?;
    let whole = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |position| position + 1);
    let size = start + whole as u64;
    file.set_len(size)?;
    Ok(size)
}

/// Reads the kept lines in order, across a rotation, and goes on with those that come.
pub struct Reader {
    directory: PathBuf,
    file: Option<BufReader<File>>,
    partial: Vec<u8>,
    reading_previous: bool,
}

impl Reader {
    pub fn new(directory: &Path) -> Self {
        let older = File::open(previous(directory)).ok();
        let reading_previous = older.is_some();
        let file = older.or_else(|| File::open(current(directory)).ok()).map(BufReader::new);
        Self { directory: directory.to_owned(), file, partial: Vec::new(), reading_previous }
    }

    /// The next line that is there; none when all are read for now.
    ///
    /// # Errors
    /// When the files cannot be read.
    pub fn next(&mut self) -> io::Result<Option<KeptLine>> {
        loop {
            let Some(file) = &mut self.file else {
                match File::open(current(&self.directory)) {
                    Ok(file) => self.file = Some(BufReader::new(file)),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(error),
                }
                continue;
            };
            file.read_until(b'\n', &mut self.partial)?;
            if self.partial.ends_with(b"\n") {
                let line = serde_json::from_slice(&self.partial);
                self.partial.clear();
                // A damaged line is skipped: the others are still worth reading.
                if let Ok(line) = line {
                    return Ok(Some(line));
                }
                continue;
            }
            if self.reading_previous || self.was_rotated()? {
                self.reading_previous = false;
                self.partial.clear();
                self.file = None;
                continue;
            }
            return Ok(None);
        }
    }

    fn was_rotated(&self) -> io::Result<bool> {
        let Some(file) = &self.file else { return Ok(false) };
        match fs::metadata(current(&self.directory)) {
            Ok(now) => Ok(now.ino() != file.get_ref().metadata()?.ino()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The last `count` lines that are kept now.
///
/// # Errors
/// When the files cannot be read.
pub fn tail(directory: &Path, count: usize) -> io::Result<Vec<LogLine>> {
    let mut reader = Reader::new(directory);
    let mut lines = VecDeque::new();
    while let Some(kept) = reader.next()? {
        if lines.len() == count {
            lines.pop_front();
        }
        if count > 0 {
            lines.push_back(kept.into());
        }
    }
    Ok(lines.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(sequence: u64) -> KeptLine {
        let (at, run) = (Timestamp::UNIX_EPOCH, Timestamp::UNIX_EPOCH);
        KeptLine { at, stream: LogStream::Stdout, line: format!("line {sequence}"), run, sequence }
    }

    #[test]
    fn a_writer_killed_in_a_rotation_repeats_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(directory.path(), 400, watch::Sender::new(0)).unwrap();
        writer.append(&line(7)).unwrap();
        drop(writer);
        // Renamed, and the new file not yet written to.
        fs::rename(current(directory.path()), previous(directory.path())).unwrap();
        let writer = Writer::open(directory.path(), 400, watch::Sender::new(0)).unwrap();
        assert_eq!(writer.last_sequence(Timestamp::UNIX_EPOCH), Some(7));
    }

    #[test]
    fn lines_of_an_earlier_version_are_read() {
        let text = r#"{"at":"1970-01-01T00:00:00Z","stream":"stdout","line":"line 3","run":"1970-01-01T00:00:00Z","sequence":3}"#;
        assert_eq!(serde_json::from_str::<KeptLine>(text).unwrap(), line(3));
    }

    #[test]
    fn a_reader_follows_across_rotations_and_a_writer_resumes() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = Writer::open(directory.path(), 400, watch::Sender::new(0)).unwrap();
        let mut reader = Reader::new(directory.path());
        assert_eq!(reader.next().unwrap(), None);
        let mut read = Vec::new();
        for sequence in 0..20 {
            writer.append(&line(sequence)).unwrap();
            while let Some(kept) = reader.next().unwrap() {
                read.push(kept.sequence);
            }
        }
        assert_eq!(read, (0..20).collect::<Vec<_>>());
        drop(writer);
        // A torn write at the end, as after a power cut.
        OpenOptions::new().append(true).open(current(directory.path())).unwrap().write_all(b"{\"at\":").unwrap();
        let mut writer = Writer::open(directory.path(), 400, watch::Sender::new(0)).unwrap();
        assert_eq!(writer.last_sequence(Timestamp::UNIX_EPOCH), Some(19));
        assert_eq!(writer.last_sequence(Timestamp::now()), None);
        writer.append(&line(20)).unwrap();
        assert_eq!(reader.next().unwrap().unwrap().sequence, 20);
        let last: Vec<_> = tail(directory.path(), 2).unwrap().into_iter().map(|line| line.line).collect();
        assert_eq!(last, ["line 19", "line 20"]);
        let size = fs::metadata(current(directory.path())).unwrap().len() + fs::metadata(previous(directory.path())).unwrap().len();
        assert!(size <= 800, "{size}");
    }
}
