//! Files as 64 KiB blocks, each named by the BLAKE3 digest of its plain bytes.
//!
//! A block of zeros has no name: it is neither stored nor sent, so a sparse file of any size costs what is in it.
//! On the wire and in stores a block is one zstd frame.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    io::{self, Read},
};

use form_types::Digest;
use serde::{Deserialize, Serialize};
use zstd::bulk::{Compressor, Decompressor};

/// Bytes in a block; only the last block of a file may be shorter.
pub const BLOCK_SIZE: usize = 64 << 10;

/// The largest file that a block map describes: the largest disk of a Formfile.
pub const MAX_FILE_SIZE: u64 = 64 << 40;

/// No block compresses to more than this (zstd's own bound for 64 KiB): longer input is refused unread.
pub const MAX_COMPRESSED: usize = BLOCK_SIZE + (BLOCK_SIZE >> 8) + 64;

/// The most blocks that a decoded map may name: 256 GiB of data. It bounds what a hostile manifest can make us hold.
const MAX_BLOCKS: u64 = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("a compressed block of {0} bytes is too long: the limit is {MAX_COMPRESSED}")]
    CompressedTooLong(usize),
    #[error("the block is no zstd frame of at most {BLOCK_SIZE} bytes")]
    Decompress(#[source] io::Error),
    #[error("the block cannot be compressed")]
    Compress(#[source] io::Error),
    #[error("a block should have digest {expected} but has {found}: send it again, or check the disk it came from")]
    Digest { expected: Digest, found: Digest },
}

/// What is wrong with a block map that came from outside.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BlockMapError {
    #[error("a file of {0} bytes is larger than {MAX_FILE_SIZE}")]
    FileTooLarge(u64),
    #[error("run {0} of the block list is empty, overlaps the one before it or lies beyond the end of the file")]
    Run(usize),
    #[error("the block list names more than {MAX_BLOCKS} blocks")]
    TooManyBlocks,
}

static ZEROS: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];

/// Whether a block holds only zeros.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(BLOCK_SIZE).all(|part| part == &ZEROS[..part.len()])
}

/// The fastest: on a network of one's own the 4 % that the default level saves of a kernel take longer to find than to send.
const LEVEL: i32 = 1;

// What zstd works in is several blocks large. Made anew for each block, its pages would cost more than the block itself.
thread_local! {
    static COMPRESSOR: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Lets `work` use what this thread keeps, making it before the first use.
fn kept<T, R>(
    kept: &RefCell<Option<T>>,
    make: impl FnOnce() -> io::Result<T>,
    work: impl FnOnce(&mut T) -> io::Result<R>,
) -> io::Result<R> {
    let mut kept = kept.borrow_mut();
    let made = match kept.take() {
        Some(made) => made,
        None => make()?,
    };
    work(kept.insert(made))
}

/// One zstd frame with the plain bytes of a block. The same bytes give the same frame with the same library.
///
/// # Errors
/// When the library cannot allocate.
pub fn compress(plain: &[u8]) -> Result<Vec<u8>, BlockError> {
    let compressed = COMPRESSOR.with(|own| kept(own, || Compressor::new(LEVEL), |compressor| compressor.compress(plain)));
    compressed.map_err(BlockError::Compress)
}

/// The plain bytes of a compressed block, at most [`BLOCK_SIZE`] whatever the frame claims.
///
/// # Errors
/// When the frame is too long, broken, or unfolds to more than a block.
pub fn decompress(frame: &[u8]) -> Result<Vec<u8>, BlockError> {
    if frame.len() > MAX_COMPRESSED {
        return Err(BlockError::CompressedTooLong(frame.len()));
    }
    let plain = DECOMPRESSOR.with(|own| kept(own, Decompressor::new, |decompressor| decompressor.decompress(frame, BLOCK_SIZE)));
    plain.map_err(BlockError::Decompress)
}

/// Unfolds a compressed block and checks its name.
///
/// # Errors
/// As [`decompress`], and when the digest is another one.
pub fn open(expected: &Digest, frame: &[u8]) -> Result<Vec<u8>, BlockError> {
    let plain = decompress(frame)?;
    verify(expected, &plain)?;
    Ok(plain)
}

/// Checks the name of plain bytes.
///
/// # Errors
/// When the digest is another one.
pub fn verify(expected: &Digest, plain: &[u8]) -> Result<(), BlockError> {
    let found = Digest::of(plain);
    if found == *expected { Ok(()) } else { Err(BlockError::Digest { expected: *expected, found }) }
}

/// Reads one block, short only at the end of the input; empty when there is no more.
///
/// # Errors
/// Those of the reader.
pub fn read_block(reader: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    reader.take(BLOCK_SIZE as u64).read_to_end(buffer)?;
    Ok(())
}

/// Which blocks make up a file. Blocks that no run covers are zeros.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, try_from = "RawBlockMap")]
pub struct BlockMap {
    size: u64,
    runs: Vec<Run>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBlockMap {
    size: u64,
    runs: Vec<Run>,
}

/// Blocks that follow each other, from block number `start` on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    start: u64,
    digests: Vec<Digest>,
}

impl TryFrom<RawBlockMap> for BlockMap {
    type Error = BlockMapError;

    fn try_from(raw: RawBlockMap) -> Result<Self, BlockMapError> {
        if raw.size > MAX_FILE_SIZE {
            return Err(BlockMapError::FileTooLarge(raw.size));
        }
        let count = raw.size.div_ceil(BLOCK_SIZE as u64);
        let mut next = 0;
        let mut total: u64 = 0;
        for (index, run) in raw.runs.iter().enumerate() {
            let length = run.digests.len() as u64;
            let end = run.start.checked_add(length).ok_or(BlockMapError::Run(index))?;
            if length == 0 || run.start < next || end > count {
                return Err(BlockMapError::Run(index));
            }
            total += length;
            next = end;
        }
        if total > MAX_BLOCKS { Err(BlockMapError::TooManyBlocks) } else { Ok(Self { size: raw.size, runs: raw.runs }) }
    }
}

impl BlockMap {
    /// A file of zeros.
    pub const fn new(size: u64) -> Self {
        Self { size, runs: Vec::new() }
    }

    /// Cuts a reader into blocks and hands each that is not zeros to `keep`: its digest and its plain bytes.
    ///
    /// # Errors
    /// Those of the reader and of `keep`.
    pub fn build(mut reader: impl Read, mut keep: impl FnMut(&Digest, &[u8]) -> io::Result<()>) -> io::Result<Self> {
        let mut map = Self::new(0);
        let mut buffer = Vec::with_capacity(BLOCK_SIZE);
        for index in 0.. {
            read_block(&mut reader, &mut buffer)?;
            if buffer.is_empty() {
                break;
            }
            map.size += buffer.len() as u64;
            if !is_zero(&buffer) {
                let digest = Digest::of(&buffer);
                keep(&digest, &buffer)?;
                map.push(index, digest);
            }
        }
        Ok(map)
    }

    /// Adds a block behind all that are there. The caller goes through the file from its begin to its end.
    pub fn push(&mut self, index: u64, digest: Digest) {
        match self.runs.last_mut() {
            Some(run) if run.start + run.digests.len() as u64 == index => run.digests.push(digest),
            _ => self.runs.push(Run { start: index, digests: vec![digest] }),
        }
    }

    /// Bytes of the file, zeros included.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Plain bytes of block `index`: [`BLOCK_SIZE`], less for the last one.
    pub fn block_len(&self, index: u64) -> usize {
        let begin = index.saturating_mul(BLOCK_SIZE as u64);
        self.size.saturating_sub(begin).min(BLOCK_SIZE as u64) as usize
    }

    /// The stored blocks in order: block number and digest.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Digest)> {
        self.runs.iter().flat_map(|run| (run.start..).zip(&run.digests))
    }

    /// The digest of block `index`; `None` is zeros.
    pub fn get(&self, index: u64) -> Option<&Digest> {
        let after = self.runs.partition_point(|run| run.start <= index);
        let run = self.runs.get(after.checked_sub(1)?)?;
        run.digests.get(usize::try_from(index - run.start).ok()?)
    }

    /// Each distinct block once.
    pub fn digests(&self) -> BTreeSet<Digest> {
        self.iter().map(|(_, digest)| *digest).collect()
    }

    /// How many blocks are stored, repeated ones counted each time.
    pub fn stored_blocks(&self) -> u64 {
        self.runs.iter().map(|run| run.digests.len() as u64).sum()
    }

    /// Plain bytes of the stored blocks: what the file takes when it is kept sparse.
    pub fn stored_bytes(&self) -> u64 {
        self.iter().map(|(index, _)| self.block_len(index) as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map_of(bytes: &[u8]) -> BlockMap {
        BlockMap::build(bytes, |_, _| Ok(())).unwrap()
    }

    #[test]
    fn zeros_are_not_stored_and_the_last_block_is_short() {
        let mut bytes = vec![0; 3 * BLOCK_SIZE + 10];
        bytes[2 * BLOCK_SIZE] = 1;
        bytes[3 * BLOCK_SIZE + 9] = 2;
        let map = map_of(&bytes);
        assert_eq!(map.iter().map(|(index, _)| index).collect::<Vec<_>>(), [2, 3]);
        assert_eq!((map.size(), map.block_len(3), map.stored_bytes()), (bytes.len() as u64, 10, BLOCK_SIZE as u64 + 10));
        assert_eq!(map.get(0), None);
        assert_eq!(map.get(3), Some(&Digest::of(&bytes[3 * BLOCK_SIZE..])));
        assert_eq!(map.get(4), None);
        let text = serde_json::to_string(&map).unwrap();
        assert_eq!(serde_json::from_str::<BlockMap>(&text).unwrap(), map);
    }

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        for length in [0, 1, BLOCK_SIZE, BLOCK_SIZE + 1] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes), "{length}");
            for place in [0, length / 2, length.saturating_sub(1)] {
                if let Some(byte) = bytes.get_mut(place) {
                    *byte = 1;
                    assert!(!is_zero(&bytes), "{length} {place}");
                    bytes[place] = 0;
                }
            }
        }
    }

    #[test]
    fn hostile_maps_are_refused() {
        let digest = Digest::of(b"x");
        for bad in [
            format!(r#"{{"size":{},"runs":[]}}"#, u64::MAX),
            format!(r#"{{"size":65536,"runs":[{{"start":1,"digests":["{digest}"]}}]}}"#),
            format!(r#"{{"size":65536,"runs":[{{"start":18446744073709551615,"digests":["{digest}"]}}]}}"#),
            r#"{"size":65536,"runs":[{"start":0,"digests":[]}]}"#.to_owned(),
            format!(r#"{{"size":131072,"runs":[{{"start":0,"digests":["{digest}"]}},{{"start":0,"digests":["{digest}"]}}]}}"#),
        ] {
            assert!(serde_json::from_str::<BlockMap>(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn frames_are_checked() {
        let plain = vec![7; BLOCK_SIZE];
        let frame = compress(&plain).unwrap();
        assert_eq!(open(&Digest::of(&plain), &frame).unwrap(), plain);
        assert!(matches!(open(&Digest::of(b"other"), &frame), Err(BlockError::Digest { .. })));
        assert!(matches!(decompress(b"no frame"), Err(BlockError::Decompress(_))));
        assert_eq!(decompress(&frame).unwrap(), plain, "what a broken frame left behind is of no consequence");
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        assert!(bomb.len() < MAX_COMPRESSED);
        assert!(matches!(decompress(&bomb), Err(BlockError::Decompress(_))));
        assert!(matches!(decompress(&vec![0; MAX_COMPRESSED + 1]), Err(BlockError::CompressedTooLong(_))));
    }

    #[test]
    fn incompressible_blocks_stay_under_the_limit() {
        let mut state = 1u64;
        let plain: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(BLOCK_SIZE)
        .collect();
        let frame = compress(&plain).unwrap();
        assert!(frame.len() <= MAX_COMPRESSED);
        assert_eq!(decompress(&frame).unwrap(), plain);
    }
}
