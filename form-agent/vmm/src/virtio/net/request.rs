//! How packets lie in descriptor chains (section 5.1.6).

use std::collections::VecDeque;

use super::tap::HEADER;
use crate::memory::GuestMemoryMmap;
use crate::virtio::chain::{Chain, ChainError, Segments};

/// The largest packet with its header: 64 KiB and an Ethernet header (section 5.1.6.3.1).
pub const PACKET_MAX: usize = 65550 + HEADER;
/// Ethernet header and one VLAN tag.
const ETHERNET: usize = 18;
/// Where the number of buffers stands in the header.
const NUM_BUFFERS_AT: usize = 10;

/// Whether a chain can be a packet to send: header and at least an Ethernet header, and not longer than a tap takes.
pub fn sendable(packet: &Segments) -> bool {
    (HEADER + 14..=PACKET_MAX).contains(&packet.len())
}

/// How packets are put into receive buffers, as negotiated.
#[derive(Clone, Copy, Debug)]
pub struct ReceiveMode {
    /// A packet may span several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    pub mergeable: bool,
    /// The tap may hand over packets longer than the MTU.
    pub large: bool,
    pub mtu: u16,
}

impl ReceiveMode {
    /// The longest packet with header that the tap hands over.
    pub fn packet_max(&self) -> usize {
        if self.large { PACKET_MAX } else { HEADER + ETHERNET + usize::from(self.mtu) }
    }
}

/// Receive chains taken from the ring and not yet filled.
#[derive(Debug, Default)]
pub struct Buffers {
    chains: VecDeque<Chain>,
    /// Emptied ones, kept for their vectors.
    spare: Vec<Chain>,
    capacity: usize,
}

impl Buffers {
    /// A chain to load the next one into.
    pub fn blank(&mut self) -> Chain {
        self.spare.pop().unwrap_or_default()
    }

    pub fn keep(&mut self, blank: Chain) {
        self.spare.push(blank);
    }

    pub fn push(&mut self, chain: Chain) {
        self.capacity += chain.writable.len();
        self.chains.push_back(chain);
    }

    pub fn chains(&self) -> u16 {
        self.chains.len() as u16
    }

    /// Forgets all chains, which go back to the ring; gives their number.
    pub fn clear(&mut self) -> u16 {
        let count = self.chains();
        self.spare.extend(self.chains.drain(..));
        self.capacity = 0;
        count
    }

    /// Whether the longest packet fits into what is here.
    pub fn enough(&self, mode: ReceiveMode) -> bool {
        if mode.mergeable { self.capacity >= mode.packet_max() } else { !self.chains.is_empty() }
    }

    /// The chains that the next packet may use.
    pub fn front(&self, mode: ReceiveMode) -> impl Iterator<Item = &Segments> {
        let mut room = 0;
        let longest = mode.packet_max();
        self.chains.iter().map(|chain| &chain.writable).take_while(move |segments| {
            let more = room == 0 || (mode.mergeable && room < longest);
            room += segments.len().max(1);
            more
        })
    }

    /// Gives a packet of `length` bytes, which lies in the front chains, to `used` (head and bytes of each chain) after its
    /// number of buffers was written.
    ///
    /// # Errors
    /// When guest memory cannot be written.
    pub fn take(&mut self, memory: &GuestMemoryMmap, length: usize, mut used: impl FnMut(u16, usize)) -> Result<(), ChainError> {
        let mut left = length;
        let mut count: u16 = 0;
        for chain in &self.chains {
            left -= left.min(chain.writable.len());
            count += 1;
            if left == 0 {
                break;
            }
        }
        let mut left = length;
        for at in 0..count {
            let Some(chain) = self.chains.pop_front() else { break };
            let here = left.min(chain.writable.len());
            left -= here;
            self.capacity -= chain.writable.len();
            let mut result = chain.writable.mark_written(memory, here);
            if at == 0 && result.is_ok() {
                result = chain.writable.write(memory, NUM_BUFFERS_AT, &count.to_le_bytes());
            }
            used(chain.head, here);
            self.spare.push(chain);
            result?;
        }
        Ok(())
    }
}
