//! A log of fixed size that outlives its readers and its writer: a file with a header and a ring of bytes.
//!
//! The VM process maps it and appends; the daemon reads it through the file, at any time, also after the VM is gone.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | magic `FORMLOG\0` |
//! | 8 | 4 | version (1), little-endian as all that follows |
//! | 12 | 4 | offset of the ring: 4096 |
//! | 16 | 8 | capacity of the ring in bytes |
//! | 24 | 8 | bytes begun: raised before a write touches the ring |
//! | 32 | 8 | bytes written: raised after it |
//!
//! Byte `n` of the log lies at ring offset `n % capacity`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: [u8; 8] = *b"FORMLOG\0";
const VERSION: u32 = 1;
const HEADER: u64 = 4096;
const BEGUN: usize = 24;
const WRITTEN: usize = 32;
/// A ring that is larger is not one of ours.
const MAX_CAPACITY: u64 = 1 << 30;

#[derive(Debug, thiserror::Error)]
pub enum LogRingError {
    #[error("the log ring cannot be {context}")]
    Io {
        context: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("this is no log ring: {reason}")]
    Format { reason: &'static str },
    #[error("a log ring of {0} bytes is not possible: give 4096 to 1 GiB")]
    Capacity(u64),
}

fn io_error(context: &'static str) -> impl FnOnce(io::Error) -> LogRingError {
    move |source| LogRingError::Io { context, source }
}

/// Makes an empty log of `capacity` bytes in `file`, replacing what is there.
///
/// # Errors
/// When the file cannot be written.
pub fn create(file: &File, capacity: u64) -> Result<(), LogRingError> {
    if !(4096..=MAX_CAPACITY).contains(&capacity) {
        return Err(LogRingError::Capacity(capacity));
    }
    file.set_len(0).map_err(io_error("emptied"))?;
    file.set_len(HEADER + capacity).map_err(io_error("given its size"))?;
    let mut header = [0u8; 40];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
    header[16..24].copy_from_slice(&capacity.to_le_bytes());
    file.write_all_at(&header, 0).map_err(io_error("written"))
}

/// Reads and checks the header; returns the capacity.
fn capacity_of(file: &File) -> Result<u64, LogRingError> {
    let mut header = [0u8; 24];
    file.read_exact_at(&mut header, 0).map_err(io_error("read"))?;
    if header[..8] != MAGIC {
        return Err(LogRingError::Format { reason: "wrong magic" });
    }
    if u32_at(&header, 8) != VERSION || u64::from(u32_at(&header, 12)) != HEADER {
        return Err(LogRingError::Format { reason: "made by another version" });
    }
    let capacity = u64_at(&header, 16);
    let length = file.metadata().map_err(io_error("examined"))?.len();
    if !(1..=MAX_CAPACITY).contains(&capacity) || length != HEADER + capacity {
        return Err(LogRingError::Format { reason: "its size does not fit its header" });
    }
    Ok(capacity)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// The one writer of a log. It goes on where an earlier writer stopped.
pub struct Writer {
    base: NonNull<u8>,
    length: usize,
    capacity: u64,
}

// SAFETY: the mapping belongs to this value alone within the process, and `append` takes `&mut self`.
unsafe impl Send for Writer {}

impl Writer {
    /// Maps the log in `file`; the file may be closed afterwards.
    ///
    /// # Errors
    /// When it is no log ring or cannot be mapped.
    pub fn open(file: &File) -> Result<Self, LogRingError> {
        let capacity = capacity_of(file)?;
        let length = usize::try_from(HEADER + capacity).map_err(|_| LogRingError::Capacity(capacity))?;
        // SAFETY: a new shared mapping at an address of the kernel's choice; `capacity_of` checked that the file is `length` long.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(LogRingError::Io { context: "mapped", source: io::Error::last_os_error() });
        }
        let base = NonNull::new(base.cast()).ok_or(LogRingError::Format { reason: "mapped at address zero" })?;
        Ok(Writer { base, length, capacity })
    }

    /// Appends `bytes`. Of more than the ring holds, only the last part stays.
    pub fn append(&mut self, bytes: &[u8]) {
        let start = self.counter(WRITTEN).load(Ordering::Relaxed);
        let end = start.wrapping_add(bytes.len() as u64);
        self.counter(BEGUN).store(end, Ordering::Release);
        std::sync::atomic::fence(Ordering::SeqCst);
        let skip = (bytes.len() as u64).saturating_sub(self.capacity);
        let mut position = start.wrapping_add(skip) % self.capacity;
        let mut rest = &bytes[skip as usize..];
        while !rest.is_empty() {
            let count = rest.len().min((self.capacity - position) as usize);
            // SAFETY: `position + count <= capacity`, so the target lies in the mapping; source and target cannot overlap because
            // nothing else in this process refers to the mapping.
            unsafe {
                let target = self.base.as_ptr().add(HEADER as usize + position as usize);
                std::ptr::copy_nonoverlapping(rest.as_ptr(), target, count);
            }
            rest = &rest[count..];
            position = 0;
        }
        self.counter(WRITTEN).store(end, Ordering::Release);
    }

    fn counter(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: the header is mapped and page-aligned, both offsets are multiples of eight, and the mapping lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `open` with this length and nothing borrows from it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// A piece of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The position of the first byte. Larger than asked for when the bytes before it were overwritten already.
    pub start: u64,
    pub bytes: Vec<u8>,
}

impl Chunk {
    /// Where to go on reading.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

/// Reads a log, also while it is written and after its writer is gone. Any number of readers may work at once.
pub struct Reader {
    file: File,
    capacity: u64,
}

impl Reader {
    /// # Errors
    /// When `file` is no log ring.
    pub fn open(file: File) -> Result<Self, LogRingError> {
        let capacity = capacity_of(&file)?;
        Ok(Reader { file, capacity })
    }

    /// How many bytes the ring holds.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// How many bytes were ever written.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn written(&self) -> Result<u64, LogRingError> {
        self.counter(WRITTEN)
    }

    /// Reads up to `limit` bytes from position `from` on. An empty chunk means that nothing more has been written; a chunk that
    /// starts behind `from` means that bytes between were lost to the ring's end (or that `from` lies beyond the log).
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&self, from: u64, limit: usize) -> Result<Chunk, LogRingError> {
        let written = self.written()?;
        let oldest = written.saturating_sub(self.capacity);
        let start = from.clamp(oldest, written);
        let count = (written - start).min(limit as u64).min(self.capacity);
        let mut bytes = vec![0u8; count as usize];
        let position = start % self.capacity;
        let first = count.min(self.capacity - position) as usize;
        self.file.read_exact_at(&mut bytes[..first], HEADER + position).map_err(io_error("read"))?;
        self.file.read_exact_at(&mut bytes[first..], HEADER).map_err(io_error("read"))?;
        // What the writer began to overwrite meanwhile is not what was asked for.
        let safe = self.counter(BEGUN)?.saturating_sub(self.capacity);
        let torn = safe.saturating_sub(start).min(count) as usize;
        bytes.drain(..torn);
        Ok(Chunk { start: start + torn as u64, bytes })
    }

    /// The last `limit` bytes.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn tail(&self, limit: usize) -> Result<Chunk, LogRingError> {
        self.read(self.written()?.saturating_sub(limit as u64), limit)
    }

    fn counter(&self, offset: usize) -> Result<u64, LogRingError> {
        let mut bytes = [0u8; 8];
        self.file.read_exact_at(&mut bytes, offset as u64).map_err(io_error("read"))?;
        Ok(u64::from_le_bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(capacity: u64) -> (Writer, Reader) {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        create(&file, capacity).unwrap();
        (Writer::open(&file).unwrap(), Reader::open(file).unwrap())
    }

    #[test]
    fn what_is_written_is_read_in_pieces() {
        let (mut writer, reader) = ring(4096);
        assert_eq!(reader.read(0, 10).unwrap(), Chunk { start: 0, bytes: vec![] });
        writer.append(b"hello ");
        writer.append(b"world");
        let first = reader.read(0, 4).unwrap();
        assert_eq!(first.bytes, b"hell");
        assert_eq!(reader.read(first.next(), 100).unwrap().bytes, b"o world");
        assert_eq!(reader.tail(5).unwrap(), Chunk { start: 6, bytes: b"world".to_vec() });
    }

    #[test]
    fn a_slow_reader_learns_what_it_lost() {
        let (mut writer, reader) = ring(4096);
        let log: Vec<u8> = (0..10_000u32).map(|n| (n % 251) as u8).collect();
        for piece in log.chunks(333) {
            writer.append(piece);
        }
        let chunk = reader.read(17, usize::MAX).unwrap();
        assert_eq!(chunk.start, 10_000 - 4096);
        assert_eq!(chunk.bytes, log[10_000 - 4096..]);
    }

    #[test]
    fn a_write_larger_than_the_ring_keeps_its_end() {
        let (mut writer, reader) = ring(4096);
        let log: Vec<u8> = (0..9_001u32).map(|n| (n % 253) as u8).collect();
        writer.append(&log);
        assert_eq!(reader.read(0, usize::MAX).unwrap().bytes, log[9_001 - 4096..]);
    }

    #[test]
    fn a_second_writer_goes_on() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        create(&file, 4096).unwrap();
        Writer::open(&file).unwrap().append(b"one ");
        Writer::open(&file).unwrap().append(b"two");
        assert_eq!(Reader::open(file).unwrap().read(0, 100).unwrap().bytes, b"one two");
    }

    #[test]
    fn a_reader_beyond_the_end_comes_back() {
        let (mut writer, reader) = ring(4096);
        writer.append(b"abc");
        assert_eq!(reader.read(u64::MAX, 10).unwrap(), Chunk { start: 3, bytes: vec![] });
    }

    #[test]
    fn foreign_files_are_refused() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        assert!(matches!(Writer::open(&file), Err(LogRingError::Io { .. })));
        file.set_len(8192).unwrap();
        assert!(matches!(Writer::open(&file), Err(LogRingError::Format { .. })));
        create(&file, 4096).unwrap();
        file.set_len(8191).unwrap();
        assert!(matches!(Writer::open(&file), Err(LogRingError::Format { .. })));
        assert!(matches!(create(&file, 10), Err(LogRingError::Capacity(10))));
    }

    #[test]
    fn readers_never_see_torn_bytes() {
        let (mut writer, reader) = ring(4096);
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = std::sync::Arc::clone(&stop);
        // Byte n of the log is n % 256, so any chunk can be checked by its position.
        let thread = std::thread::spawn(move || {
            let mut next = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                let piece: Vec<u8> = (0..997).map(|n| (next + n) as u8).collect();
                writer.append(&piece);
                next += 997;
            }
        });
        let mut from = 0;
        for _ in 0..2_000 {
            let chunk = reader.read(from, 3000).unwrap();
            for (index, byte) in chunk.bytes.iter().enumerate() {
                assert_eq!(*byte, (chunk.start + index as u64) as u8);
            }
            from = chunk.next();
        }
        stop.store(true, Ordering::Relaxed);
        thread.join().unwrap();
    }
}
