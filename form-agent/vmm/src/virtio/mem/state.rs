//! What the device keeps beside its queue.

use serde::{Deserialize, Serialize};

use super::blocks::{BLOCK, BLOCKS_MAX, Blocks, Region};
use crate::virtio::DeviceError;

pub const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemState {
    pub version: u32,
    /// Where the region begins, and how many blocks it has.
    pub start: u64,
    pub blocks: u32,
    /// How many of them the guest should have.
    pub wanted: u32,
    /// Those that it has, ascending.
    pub plugged: Vec<u32>,
}

impl MemState {
    pub fn new(blocks: &Blocks) -> Self {
        let Region { start, blocks: count } = blocks.region();
        Self { version: VERSION, start, blocks: count, wanted: blocks.wanted(), plugged: blocks.plugged().collect() }
    }

    /// # Errors
    /// When `state` is of another version, malformed, or contradicts itself.
    pub fn read(state: &serde_json::Value) -> Result<Self, DeviceError> {
        let refuse = |reason: String| DeviceError::State { device: "memory", reason };
        let state: Self = serde_json::from_value(state.clone()).map_err(|error| refuse(error.to_string()))?;
        if state.version != VERSION {
            return Err(refuse(format!("version {}, this program knows {VERSION}", state.version)));
        }
        let in_region = state.plugged.iter().all(|index| *index < state.blocks) && state.wanted <= state.blocks;
        let ascending = state.plugged.windows(2).all(|pair| pair[0] < pair[1]);
        let fits =
            state.blocks <= BLOCKS_MAX && state.start.is_multiple_of(BLOCK) && state.start.checked_add(state.region().len()).is_some();
        if in_region && ascending && fits { Ok(state) } else { Err(refuse("its blocks contradict each other".to_owned())) }
    }

    #[must_use]
    pub fn region(&self) -> Region {
        Region { start: self.start, blocks: self.blocks }
    }

    /// What the guest has: start and length of each block.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.plugged.iter().map(|index| (self.region().address(*index), BLOCK))
    }

    pub fn blocks(&self) -> Blocks {
        let mut blocks = Blocks::new(self.region());
        self.plugged.iter().for_each(|index| blocks.adopt(*index));
        blocks.want(self.wanted);
        blocks
    }
}
