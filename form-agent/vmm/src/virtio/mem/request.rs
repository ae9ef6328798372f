//! Requests and answers as bytes (section 5.15.6).

use crate::memory::GuestMemoryMmap;
use crate::virtio::{
    chain::{Chain, ChainError},
    ring::Fault,
};

/// `struct virtio_mem_req`.
const REQUEST: usize = 24;
/// `struct virtio_mem_resp`.
pub const RESPONSE: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Plug {
        address: u64,
        /// Blocks.
        count: u16,
    },
    Unplug {
        address: u64,
        count: u16,
    },
    UnplugAll,
    State {
        address: u64,
        count: u16,
    },
    /// Of a later specification, or garbage.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlugState {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// `VIRTIO_MEM_RESP_ACK`.
    Done,
    /// `VIRTIO_MEM_RESP_NACK`: more than the guest should have.
    Refused,
    /// `VIRTIO_MEM_RESP_BUSY`: the host cannot now.
    Busy,
    /// `VIRTIO_MEM_RESP_ERROR`: a request that makes no sense.
    Error,
    State(PlugState),
}

impl Request {
    pub fn parse(bytes: &[u8; REQUEST]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut address = [0; 8];
        address.copy_from_slice(&bytes[8..16]);
        let (address, count) = (u64::from_le_bytes(address), half(16));
        match half(0) {
            0 => Self::Plug { address, count },
            1 => Self::Unplug { address, count },
            2 => Self::UnplugAll,
            3 => Self::State { address, count },
            _ => Self::Unknown,
        }
    }

    /// # Errors
    /// When the chain has no room for a request and its answer.
    pub fn read(memory: &GuestMemoryMmap, chain: &Chain) -> Result<Self, Fault> {
        if chain.readable.len() < REQUEST || chain.writable.len() < RESPONSE {
            return Err(Fault::Request("a memory request without room for itself or its answer"));
        }
        let mut bytes = [0; REQUEST];
        chain.readable.read(memory, 0, &mut bytes).map_err(malformed)?;
        Ok(Self::parse(&bytes))
    }
}

impl Answer {
    pub fn bytes(self) -> [u8; RESPONSE] {
        let mut bytes = [0; RESPONSE];
        bytes[0] = match self {
            Self::Done | Self::State(_) => 0,
            Self::Refused => 1,
            Self::Busy => 2,
            Self::Error => 3,
        };
        if let Self::State(state) = self {
            bytes[8] = state as u8;
        }
        bytes
    }

    /// Gives the number of bytes written.
    ///
    /// # Errors
    /// When the chain's memory is not there any more: the guest gave it away.
    pub fn write(self, memory: &GuestMemoryMmap, chain: &Chain) -> Result<usize, Fault> {
        chain.writable.write(memory, 0, &self.bytes()).map_err(malformed)?;
        Ok(RESPONSE)
    }
}

fn malformed(source: ChainError) -> Fault {
    Fault::Chain { index: 0, source }
}
