//! A sparse file, compressed: what a snapshot keeps of a VM's memory when that was asked for.
//!
//! The file is cut into frames of 1 MiB, the last one shorter, each a zstd frame of its own (RFC 8878), so that one is read without the others and
//! with no more memory than one needs. Numbers are little-endian:
//!
//! | bytes | |
//! |---|---|
//! | 8 | `FORMZMEM` |
//! | 4 | version, 1 |
//! | 4 | bytes of a frame, 1 MiB |
//! | 8 | length of the file |
//! | 8 | bytes of it that are not zeros, in pages of 4 KiB |
//! | 4 | CRC-32 of the table |
//! | 24 | zeros |
//! | 4 | CRC-32 of all this |
//! | 8 for each frame | the table: bytes that it takes here, CRC-32 of what it holds |
//! | | the frames, one behind the other |
//!
//! A frame of zeros takes nothing. One that takes as much as it holds was not made smaller, and is as it was. The beginning is written last: a file
//! without it was never finished.

use std::{fs::File, io, os::unix::fs::FileExt};

use crc32fast::Hasher;
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use zstd::bulk::{Compressor, Decompressor};

#[cfg(test)]
mod tests;

const MAGIC: [u8; 8] = *b"FORMZMEM";
const VERSION: u32 = 1;
/// Bytes of the file in one frame.
pub const FRAME: usize = 1 << 20;
const HEADER: usize = 64;
/// Of the table, for one frame.
const ENTRY: usize = 8;
const PAGE: usize = 4096;
/// Read of the table at once.
const BUFFER: usize = 64 << 10;
/// The fastest: it writes about as fast as a disk does, and a restore waits for what is read, not for how it was written.
const LEVEL: i32 = 1;

static ZEROS: [u8; PAGE] = [0; PAGE];

/// What is known of a compressed file without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfolded {
    /// Of the file that was compressed, in bytes.
    pub length: u64,
    /// What of that is not zeros, in bytes: the room that it takes.
    pub data: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum CompressedError {
    #[error("cannot read the file with the compressed memory: {0}")]
    Read(#[source] io::Error),
    #[error("cannot write the unfolded memory: {0}")]
    Write(#[source] io::Error),
    #[error("the file is not one with compressed memory, or it was never finished")]
    Foreign,
    #[error("the compressed memory has version {found}, this agent reads {VERSION}: restore it with the release that made it")]
    Version { found: u32 },
    #[error("the compressed memory is damaged: the checksum of what describes it is wrong")]
    Table,
    #[error("the compressed memory unfolds to {found} bytes, the snapshot's has {expected}: it is another one's")]
    Other { expected: u64, found: u64 },
    #[error("the compressed memory is torn: {found} bytes of {expected}")]
    Torn { expected: u64, found: u64 },
    #[error("the compressed memory is damaged: the checksum of the MiB at {mebibyte} MiB is wrong")]
    Frame { mebibyte: u64 },
}

/// How many frames a file of this length has.
const fn frames(length: u64) -> u64 {
    length.div_ceil(FRAME as u64)
}

/// The bytes in frame `index` of a file of this length.
fn frame_bytes(length: u64, index: u64) -> usize {
    let left = length.saturating_sub(index * FRAME as u64);
    usize::try_from(left).map_or(FRAME, |left| left.min(FRAME))
}

fn is_zero(page: &[u8]) -> bool {
    page == &ZEROS[..page.len()]
}

/// Writes the beginning of a file from its table.
fn write_header(target: &File, unfolded: Unfolded, table: &[u8]) -> io::Result<()> {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(FRAME as u32).to_le_bytes());
    header[16..24].copy_from_slice(&unfolded.length.to_le_bytes());
    header[24..32].copy_from_slice(&unfolded.data.to_le_bytes());
    header[32..36].copy_from_slice(&crc32fast::hash(table).to_le_bytes());
    let own = crc32fast::hash(&header[..HEADER - 4]);
    header[HEADER - 4..].copy_from_slice(&own.to_le_bytes());
    target.write_all_at(table, HEADER as u64)?;
    target.sync_data()?;
    target.write_all_at(&header, 0)?;
    target.sync_all()
}

/// Compresses `source`, to which nobody writes, into `target`, which is empty: that is on stable storage then. Before each frame `go_on` is told the
/// bytes of `source` that are done, and may end it.
///
/// # Errors
/// Those of the two files, and of `go_on`.
pub fn write(source: &File, target: &File, mut go_on: impl FnMut(u64) -> io::Result<()>) -> io::Result<Unfolded> {
    let length = source.metadata()?.len();
    let count = usize::try_from(frames(length)).map_err(|_| io::ErrorKind::FileTooLarge)?;
    let mut compressor = Compressor::new(LEVEL)?;
    let mut table = Vec::with_capacity(count * ENTRY);
    let (mut plain, mut packed) = (vec![0; FRAME], Vec::with_capacity(FRAME));
    let mut at = (HEADER + count * ENTRY) as u64;
    let mut data_bytes = 0;
    // Everything before it is a hole.
    let mut data = 0;
    for index in 0..frames(length) {
        let from = index * FRAME as u64;
        go_on(from)?;
        let bytes = &mut plain[..frame_bytes(length, index)];
        if data < from {
            data = next_data(source, from)?;
        }
        if data >= from + FRAME as u64 {
            table.extend_from_slice(&[0; ENTRY]);
            continue;
        }
        source.read_exact_at(bytes, from)?;
        data = from;
        let pages: usize = bytes.chunks(PAGE).filter(|page| !is_zero(page)).map(<[u8]>::len).sum();
        if pages == 0 {
            table.extend_from_slice(&[0; ENTRY]);
            continue;
        }
        data_bytes += pages as u64;
        let stored = compressed(&mut compressor, bytes, &mut packed)?;
        target.write_all_at(stored, at)?;
        at += stored.len() as u64;
        table.extend_from_slice(&(stored.len() as u32).to_le_bytes());
        table.extend_from_slice(&crc32fast::hash(bytes).to_le_bytes());
    }
    go_on(length)?;
    let unfolded = Unfolded { length, data: data_bytes };
    // One of nothing but zeros has no frames behind its table.
    target.set_len(at)?;
    write_header(target, unfolded, &table)?;
    Ok(unfolded)
}

/// Where the first byte at `from` or behind it lies that is not in a hole.
fn next_data(file: &File, from: u64) -> io::Result<u64> {
    match seek(file, SeekFrom::Data(from)) {
        Ok(data) => Ok(data),
        Err(Errno::NXIO) => Ok(u64::MAX),
        // A file system that knows no holes.
        Err(Errno::INVAL) => Ok(from),
        Err(error) => Err(error.into()),
    }
}

/// What is stored of a frame.
fn compressed<'a>(compressor: &mut Compressor<'_>, plain: &'a [u8], packed: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
    packed.clear();
    packed.reserve(zstd::zstd_safe::compress_bound(plain.len()));
    compressor.compress_to_buffer(plain, packed)?;
    Ok(if packed.len() < plain.len() { packed } else { plain })
}

/// A frame, as the table says.
#[derive(Clone, Copy)]
struct Entry {
    /// Bytes in the file with compressed memory.
    stored: u32,
    sum: u32,
}

/// A compressed file whose beginning is sound.
pub struct Compressed<'a> {
    file: &'a File,
    unfolded: Unfolded,
    entries: Vec<Entry>,
}

impl<'a> Compressed<'a> {
    /// Reads the beginning of `file`, which has to unfold to `expected` bytes. What it claims is not believed: no more is allocated than a table of
    /// that many bytes takes.
    ///
    /// # Errors
    /// Foreign, of another version, damaged, torn, or another one's.
    pub fn open(file: &'a File, expected: u64) -> Result<Self, CompressedError> {
        let found = file.metadata().map_err(CompressedError::Read)?.len();
        if found < HEADER as u64 {
            return Err(CompressedError::Foreign);
        }
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).map_err(CompressedError::Read)?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if header[..8] != MAGIC {
            return Err(CompressedError::Foreign);
        }
        if word(8) != VERSION {
            return Err(CompressedError::Version { found: word(8) });
        }
        if crc32fast::hash(&header[..HEADER - 4]) != word(HEADER - 4) || word(12) as usize != FRAME {
            return Err(CompressedError::Table);
        }
        let unfolded = Unfolded { length: long(16), data: long(24) };
        if unfolded.length != expected {
            return Err(CompressedError::Other { expected, found: unfolded.length });
        }
        let entries = read_table(file, unfolded.length, word(32), found)?;
        let frames: u64 = entries.iter().map(|entry| u64::from(entry.stored)).sum();
        let whole = (HEADER + entries.len() * ENTRY) as u64 + frames;
        if whole != found {
            return Err(CompressedError::Torn { expected: whole, found });
        }
        Ok(Self { file, unfolded, entries })
    }

    pub const fn unfolded(&self) -> Unfolded {
        self.unfolded
    }

    /// Writes what was compressed to `target`, which is empty; what was zeros is a hole. It is not flushed.
    ///
    /// # Errors
    /// [`CompressedError::Frame`] with the first place that is damaged, [`CompressedError::Write`].
    pub fn unfold(&self, target: &File) -> Result<(), CompressedError> {
        target.set_len(self.unfolded.length).map_err(CompressedError::Write)?;
        self.each(0, |at, plain| write_pages(target, at, plain).map_err(CompressedError::Write))
    }

    /// As [`Compressed::unfold`], but only the last frame.
    ///
    /// # Errors
    /// As [`Compressed::unfold`].
    pub fn unfold_end(&self, target: &File) -> Result<(), CompressedError> {
        target.set_len(self.unfolded.length).map_err(CompressedError::Write)?;
        let last = self.entries.len().saturating_sub(1);
        self.each(last, |at, plain| write_pages(target, at, plain).map_err(CompressedError::Write))
    }

    /// Reads all of it, and compares it with its checksums.
    ///
    /// # Errors
    /// [`CompressedError::Frame`] with the first place that is damaged.
    pub fn verify(&self) -> Result<(), CompressedError> {
        self.each(0, |_, _| Ok(()))
    }

    /// Has `told` hear of every frame from `first` on that is not zeros: where in the unfolded file it lies, and what it holds.
    fn each(&self, first: usize, mut told: impl FnMut(u64, &[u8]) -> Result<(), CompressedError>) -> Result<(), CompressedError> {
        let mut decompressor = Decompressor::new().map_err(CompressedError::Read)?;
        let (mut packed, mut plain) = (vec![0; FRAME], Vec::with_capacity(FRAME));
        let mut at = (HEADER + self.entries.len() * ENTRY) as u64;
        for (index, entry) in self.entries.iter().enumerate() {
            // No more than a frame holds, which was looked at.
            let stored = &mut packed[..entry.stored as usize];
            let from = at;
            at += stored.len() as u64;
            if index < first || stored.is_empty() {
                continue;
            }
            self.file.read_exact_at(stored, from).map_err(CompressedError::Read)?;
            let mebibyte = index as u64;
            let length = frame_bytes(self.unfolded.length, mebibyte);
            let damaged = CompressedError::Frame { mebibyte };
            let bytes: &[u8] = if stored.len() == length {
                stored
            } else {
                plain.clear();
                match decompressor.decompress_to_buffer(stored, &mut plain) {
                    Ok(found) if found == length => &plain,
                    _ => return Err(damaged),
                }
            };
            if crc32fast::hash(bytes) != entry.sum {
                return Err(damaged);
            }
            told(mebibyte * FRAME as u64, bytes)?;
        }
        Ok(())
    }
}

/// The table of a file of `found` bytes which unfolds to `length`. Each frame takes no more than it holds.
fn read_table(file: &File, length: u64, expected: u32, found: u64) -> Result<Vec<Entry>, CompressedError> {
    let count = frames(length);
    let end = count.checked_mul(ENTRY as u64).and_then(|bytes| bytes.checked_add(HEADER as u64)).ok_or(CompressedError::Table)?;
    if end > found {
        return Err(CompressedError::Torn { expected: end, found });
    }
    let mut entries = Vec::new();
    let (mut hasher, mut buffer) = (Hasher::new(), vec![0; BUFFER]);
    let mut at = HEADER as u64;
    while at < end {
        let bytes = usize::try_from(end - at).map_or(BUFFER, |left| left.min(BUFFER));
        let bytes = &mut buffer[..bytes];
        file.read_exact_at(bytes, at).map_err(CompressedError::Read)?;
        hasher.update(bytes);
        at += bytes.len() as u64;
        let word = |entry: &[u8], at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        entries.extend(bytes.chunks_exact(ENTRY).map(|entry| Entry { stored: word(entry, 0), sum: word(entry, 4) }));
    }
    let fit = (0..).zip(&entries).all(|(index, entry)| entry.stored as usize <= frame_bytes(length, index));
    if hasher.finalize() == expected && fit { Ok(entries) } else { Err(CompressedError::Table) }
}

/// Writes `plain` at `at` of `target`, which is zeros there, but for its pages of zeros.
fn write_pages(target: &File, at: u64, plain: &[u8]) -> io::Result<()> {
    let mut from = 0;
    while from < plain.len() {
        let run = |zero: bool| plain[from..].chunks(PAGE).take_while(|page| is_zero(page) == zero).map(<[u8]>::len).sum::<usize>();
        let zeros = run(true);
        if zeros > 0 {
            from += zeros;
            continue;
        }
        let data = run(false);
        target.write_all_at(&plain[from..from + data], at + from as u64)?;
        from += data;
    }
    Ok(())
}
