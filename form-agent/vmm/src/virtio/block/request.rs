//! Block requests as the driver writes them (virtio 1.2, section 5.2.6), read from a descriptor chain.

use crate::memory::GuestMemoryMmap;
use crate::virtio::chain::{Chain, ChainError};

pub const SECTOR: u64 = 512;

/// `struct virtio_blk_req` before the data: type, reserved, sector.
pub const HEADER: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`.
pub const RANGE: usize = 16;
/// The length of what GET_ID answers.
pub const SERIAL: usize = 20;

/// Ranges of one discard; `max_discard_seg` and `max_write_zeroes_seg` tell the driver.
pub const RANGES_MAX: usize = 32;
/// 2 GiB; a discard costs the host little.
pub const DISCARD_SECTORS_MAX: u32 = 1 << 22;
/// 32 MiB; where the storage cannot make zeros, they are written.
pub const ZEROES_SECTORS_MAX: u32 = 1 << 16;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const FLAG_UNMAP: u32 = 1;

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What the disk is, as far as a request can be right or wrong about it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// In sectors of 512 bytes.
    pub sectors: u64,
    pub read_only: bool,
    pub discard: bool,
}

/// Bytes of the disk, inside its bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub length: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fills all writable bytes but the last, which is the status.
    Read {
        offset: u64,
    },
    /// Writes all readable bytes behind the header.
    Write {
        offset: u64,
    },
    Flush,
    GetId,
    Discard(Vec<Extent>),
    WriteZeroes {
        extents: Vec<Extent>,
        unmap: bool,
    },
}

/// What to do with a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Perform(Operation),
    /// Well formed, but not to be done.
    Refuse(Status),
}

/// What a request takes from the limits of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    pub operations: u64,
    pub bytes: u64,
}

impl Request {
    /// Zeros count as if they were written, which they are where the storage cannot make them. What is discarded is not moved, but each
    /// of its ranges is an operation of the storage.
    pub fn cost(&self, chain: &Chain) -> Cost {
        let (operations, bytes) = match self {
            Self::Perform(Operation::Read { .. }) => (1, chain.writable.len().saturating_sub(1) as u64),
            Self::Perform(Operation::Write { .. }) => (1, chain.readable.len().saturating_sub(HEADER) as u64),
            Self::Perform(Operation::Discard(extents)) => (extents.len().max(1) as u64, 0),
            Self::Perform(Operation::WriteZeroes { extents, .. }) => {
                (extents.len().max(1) as u64, extents.iter().map(|extent| extent.length).sum())
            }
            Self::Perform(Operation::Flush | Operation::GetId) | Self::Refuse(_) => (1, 0),
        };
        Cost { operations, bytes }
    }
}

/// A chain that is no block request: there is no place for a status.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("a block request with {readable} readable and {writable} writable bytes: too short for header and status")]
    TooShort { readable: usize, writable: usize },
    #[error(transparent)]
    Chain(#[from] ChainError),
}

/// Reads the request in `chain`. Header and data may be cut into descriptors anywhere.
///
/// # Errors
/// When there is no room for header or status.
pub fn parse(memory: &GuestMemoryMmap, chain: &Chain, limits: Limits) -> Result<Request, RequestError> {
    let (readable, writable) = (chain.readable.len(), chain.writable.len());
    if readable < HEADER || writable < 1 {
        return Err(RequestError::TooShort { readable, writable });
    }
    let mut header = [0; HEADER];
    chain.readable.read(memory, 0, &mut header)?;
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64_at(&header, 8);
    let data_out = (readable - HEADER) as u64;
    let data_in = (writable - 1) as u64;

    Ok(match kind {
        T_IN => match extent(sector, data_in, limits) {
            Some(extent) => Request::Perform(Operation::Read { offset: extent.offset }),
            None => Request::Refuse(Status::IoError),
        },
        T_OUT if limits.read_only => Request::Refuse(Status::IoError),
        T_OUT => match extent(sector, data_out, limits) {
            Some(extent) => Request::Perform(Operation::Write { offset: extent.offset }),
            None => Request::Refuse(Status::IoError),
        },
        T_FLUSH => Request::Perform(Operation::Flush),
        T_GET_ID => Request::Perform(Operation::GetId),
        T_DISCARD | T_WRITE_ZEROES if limits.read_only => Request::Refuse(Status::IoError),
        T_DISCARD if !limits.discard => Request::Refuse(Status::Unsupported),
        T_DISCARD => ranges(memory, chain, limits, DISCARD_SECTORS_MAX, 0)?
            .map_or_else(Request::Refuse, |(extents, _)| Request::Perform(Operation::Discard(extents))),
        T_WRITE_ZEROES => ranges(memory, chain, limits, ZEROES_SECTORS_MAX, FLAG_UNMAP)?
            .map_or_else(Request::Refuse, |(extents, unmap)| Request::Perform(Operation::WriteZeroes { extents, unmap })),
        _ => Request::Refuse(Status::Unsupported),
    })
}

/// Whole sectors inside the disk.
fn extent(sector: u64, length: u64, limits: Limits) -> Option<Extent> {
    if !length.is_multiple_of(SECTOR) {
        return None;
    }
    let end = sector.checked_add(length / SECTOR)?;
    // The offset is computed only of a sector that exists: of others it may be more than a number holds.
    if end > limits.sectors { None } else { Some(Extent { offset: sector * SECTOR, length }) }
}

type Ranges = Result<(Vec<Extent>, bool), Status>;

fn ranges(memory: &GuestMemoryMmap, chain: &Chain, limits: Limits, sectors_max: u32, allowed: u32) -> Result<Ranges, ChainError> {
    let length = chain.readable.len() - HEADER;
    if length == 0 || !length.is_multiple_of(RANGE) || length / RANGE > RANGES_MAX {
        return Ok(Err(Status::IoError));
    }
    let mut bytes = [0; RANGES_MAX * RANGE];
    let bytes = &mut bytes[..length];
    chain.readable.read(memory, HEADER, bytes)?;
    let mut extents = Vec::with_capacity(length / RANGE);
    let mut unmap = true;
    for range in bytes.chunks_exact(RANGE) {
        let sectors = u32::from_le_bytes([range[8], range[9], range[10], range[11]]);
        let flags = u32::from_le_bytes([range[12], range[13], range[14], range[15]]);
        // Section 5.2.6.2: unknown flags, and unmap in a discard, are unsupported.
        if flags & !allowed != 0 {
            return Ok(Err(Status::Unsupported));
        }
        if sectors > sectors_max {
            return Ok(Err(Status::IoError));
        }
        match extent(u64_at(range, 0), u64::from(sectors) * SECTOR, limits) {
            Some(extent) if extent.length > 0 => extents.push(extent),
            Some(_) => {}
            None => return Ok(Err(Status::IoError)),
        }
        // One range that shall stay allocated keeps all of the request so.
        unmap &= flags & FLAG_UNMAP != 0;
    }
    Ok(Ok((extents, unmap)))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut array = [0; 8];
    array.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(array)
}
