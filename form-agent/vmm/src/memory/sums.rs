//! Checksums of a memory file: one of each MiB of RAM, so that damage is found and its place is known.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crc32fast::Hasher;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::image::{ImageError, PAGE};

/// So many bytes have one checksum (CRC-32 as in IEEE 802.3), which takes four.
pub const CHUNK: u64 = 1 << 20;
/// Read or written at once.
const BUFFER: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// What the checksums of so much RAM take in the file: whole pages.
pub const fn table_bytes(ram: u64) -> u64 {
    (ram.div_ceil(CHUNK) * 4).next_multiple_of(PAGE as u64)
}

/// Checksums of what is told of page by page, written to a file as they come. It allocates nothing: a copy of a process that cannot uses it.
pub struct Sums<'a> {
    file: &'a File,
    /// Where the next ones go.
    at: u64,
    chunk: Hasher,
    /// Bytes of the present chunk.
    filled: u64,
    /// Of a chunk of zeros: most of a guest's memory needs not be read once more.
    zero_chunk: u32,
    table: Hasher,
    buffer: [u8; BUFFER],
    buffered: usize,
}

impl<'a> Sums<'a> {
    /// For a table at the offset `at` of `file`.
    pub fn new(file: &'a File, at: u64) -> Self {
        let mut zeros = Hasher::new();
        (0..CHUNK / PAGE as u64).for_each(|_| zeros.update(&ZEROS));
        let zero_chunk = zeros.finalize();
        Self { file, at, chunk: Hasher::new(), filled: 0, zero_chunk, table: Hasher::new(), buffer: [0; BUFFER], buffered: 0 }
    }

    pub fn page(&mut self, page: &[u8; PAGE]) -> io::Result<()> {
        self.chunk.update(page);
        self.filled += PAGE as u64;
        if self.filled == CHUNK { self.end_chunk() } else { Ok(()) }
    }

    /// So many bytes of zeros, whole pages.
    pub fn zeros(&mut self, bytes: usize) -> io::Result<()> {
        let mut left = bytes as u64;
        while left > 0 {
            if self.filled == 0 && left >= CHUNK {
                self.push(self.zero_chunk)?;
                left -= CHUNK;
            } else {
                self.page(&ZEROS)?;
                left -= PAGE as u64;
            }
        }
        Ok(())
    }

    fn end_chunk(&mut self) -> io::Result<()> {
        let sum = std::mem::take(&mut self.chunk).finalize();
        self.filled = 0;
        self.push(sum)
    }

    fn push(&mut self, sum: u32) -> io::Result<()> {
        self.buffer[self.buffered..self.buffered + 4].copy_from_slice(&sum.to_le_bytes());
        self.buffered += 4;
        if self.buffered == BUFFER { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        let bytes = &self.buffer[..self.buffered];
        self.table.update(bytes);
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        self.buffered = 0;
        Ok(())
    }

    /// Writes what is left, and gives the checksum of all of them.
    pub fn finish(mut self) -> io::Result<u32> {
        if self.filled > 0 {
            self.end_chunk()?;
        }
        self.flush()?;
        Ok(self.table.finalize())
    }
}

/// A table of which some checksums change. It allocates nothing.
pub struct Resum<'a> {
    file: &'a File,
    /// Where the buffer begins; what lies before it is done.
    at: u64,
    table: Hasher,
    buffer: [u8; BUFFER],
    /// Of the buffer; none before the first.
    used: usize,
    is_changed: bool,
}

impl<'a> Resum<'a> {
    /// Of the table at the offset `at` of `file`.
    pub fn new(file: &'a File, at: u64) -> Self {
        Self { file, at, table: Hasher::new(), buffer: [0; BUFFER], used: 0, is_changed: false }
    }

    fn next(&mut self) -> io::Result<usize> {
        if self.used == BUFFER {
            self.flush()?;
        }
        if self.used == 0 {
            // What lies behind the table fills up its page.
            self.file.read_exact_at(&mut self.buffer, self.at)?;
        }
        self.used += 4;
        Ok(self.used - 4)
    }

    /// The next one stays.
    pub fn keep(&mut self) -> io::Result<()> {
        self.next().map(|_| ())
    }

    /// The next one is another now, made of what it was.
    pub fn replace(&mut self, sum: impl FnOnce(u32) -> u32) -> io::Result<()> {
        let at = self.next()?;
        let b = &self.buffer[at..at + 4];
        let sum = sum(u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        self.buffer[at..at + 4].copy_from_slice(&sum.to_le_bytes());
        self.is_changed = true;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let bytes = &self.buffer[..self.used];
        self.table.update(bytes);
        if self.is_changed {
            self.file.write_all_at(bytes, self.at)?;
        }
        self.at += bytes.len() as u64;
        (self.used, self.is_changed) = (0, false);
        Ok(())
    }

    /// Writes what is left, and gives the checksum of all of them.
    pub fn finish(mut self) -> io::Result<u32> {
        self.flush()?;
        Ok(self.table.finalize())
    }
}

/// Compares all of the `ram` bytes at the beginning of `file` with the table behind them, whose own checksum is `table`.
///
/// # Errors
/// [`ImageError::Table`], [`ImageError::Checksum`].
pub fn verify(file: &File, ram: u64, table: u32) -> Result<(), ImageError> {
    let read = ImageError::Read;
    let sums = read_table(file, ram, table)?;
    let mut chunk = vec![0; CHUNK as usize];
    let zeros = crc32fast::hash(&chunk);
    // Everything before it is a hole.
    let mut data = 0;
    for (at, expected) in (0..ram).step_by(CHUNK as usize).zip(sums) {
        let length = CHUNK.min(ram - at);
        if data < at {
            data = match seek(file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => u64::MAX,
                Err(error) => return Err(read(error.into())),
            };
        }
        let found = if length == CHUNK && data >= at + CHUNK {
            zeros
        } else {
            let bytes = &mut chunk[..length as usize];
            file.read_exact_at(bytes, at).map_err(read)?;
            data = at;
            crc32fast::hash(bytes)
        };
        if found != expected {
            return Err(ImageError::Checksum { mebibyte: at / CHUNK });
        }
    }
    Ok(())
}

pub fn read_table(file: &File, ram: u64, expected: u32) -> Result<Vec<u32>, ImageError> {
    let count = ram.div_ceil(CHUNK);
    let mut hasher = Hasher::new();
    let mut sums = Vec::new();
    let mut buffer = [0; BUFFER];
    let mut left = usize::try_from(count * 4).map_err(|_| ImageError::Table)?;
    let mut at = ram;
    while left > 0 {
        let bytes = &mut buffer[..left.min(BUFFER)];
        file.read_exact_at(bytes, at).map_err(ImageError::Read)?;
        hasher.update(bytes);
        sums.extend(bytes.chunks_exact(4).map(|sum| u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]])));
        left -= bytes.len();
        at += bytes.len() as u64;
    }
    if hasher.finalize() == expected { Ok(sums) } else { Err(ImageError::Table) }
}
