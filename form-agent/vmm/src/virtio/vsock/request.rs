//! Packets (section 5.10.6): `struct virtio_vsock_hdr`, little endian, then `len` bytes.

use crate::memory::GuestMemoryMmap;
use crate::virtio::chain::{ChainError, Segments};

/// The length of a header.
pub const HEADER: usize = 44;
/// The host's address.
pub const HOST_CID: u64 = 2;
/// The longest payload of one packet that either side sends.
pub const PAYLOAD_MAX: usize = 64 * 1024;

pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will not receive any more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will not send any more.
pub const SHUTDOWN_SEND: u32 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    Unknown(u16),
}

impl Operation {
    fn from_number(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }

    fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(other) => other,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    /// Bytes behind the header.
    pub length: u32,
    pub kind: u16,
    pub operation: Operation,
    pub flags: u32,
    /// The size of the sender's receive buffer for this stream.
    pub buffer: u32,
    /// How many bytes the sender's user has taken out of it, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    pub fn decode(bytes: &[u8; HEADER]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            source_cid: u64_at(0),
            destination_cid: u64_at(8),
            source_port: u32_at(16),
            destination_port: u32_at(20),
            length: u32_at(24),
            kind: u16_at(28),
            operation: Operation::from_number(u16_at(30)),
            flags: u32_at(32),
            buffer: u32_at(36),
            forwarded: u32_at(40),
        }
    }

    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.number().to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }

    /// The answer to a packet that belongs to no stream (section 5.10.6.6.1).
    pub fn reset_for(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            length: 0,
            kind: self.kind,
            operation: Operation::Reset,
            flags: 0,
            buffer: 0,
            forwarded: 0,
        }
    }
}

/// What a packet that the guest sent is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet {
    /// Not addressed to us by this guest, or shorter than it says: passed over.
    Ignore,
    /// A kind of socket that we do not have: its sender is told so.
    Foreign(Header),
    /// The payload lies behind the header in the same chain.
    Stream(Header),
}

/// Reads the packet in the readable part of a chain.
///
/// # Errors
/// When guest memory cannot be reached.
pub fn parse(memory: &GuestMemoryMmap, packet: &Segments, guest_cid: u64) -> Result<Packet, ChainError> {
    if packet.len() < HEADER {
        return Ok(Packet::Ignore);
    }
    let mut bytes = [0; HEADER];
    packet.read(memory, 0, &mut bytes)?;
    let header = Header::decode(&bytes);
    let payload = packet.len() - HEADER;
    if header.source_cid != guest_cid || header.destination_cid != HOST_CID || header.length as usize > payload.min(PAYLOAD_MAX) {
        return Ok(Packet::Ignore);
    }
    if header.kind != TYPE_STREAM {
        return Ok(Packet::Foreign(header));
    }
    Ok(Packet::Stream(header))
}
