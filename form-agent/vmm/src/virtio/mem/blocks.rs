//! The region in blocks: which of them the guest has, and how many it should have. Every rule of section 5.15.6 is here; nothing of it
//! touches memory but through [`Backing`].

use std::ops::Range;

use super::{
    Backing,
    request::{Answer, PlugState, Request},
};

/// Memory comes and goes in pieces of this many bytes. Linux on x86 adds and removes memory in sections of so many, and in a block of
/// this size no page of the guest lies beside a page that it must not touch.
pub const BLOCK: u64 = 128 << 20;

/// 256 GiB.
pub const BLOCKS_MAX: u32 = 2048;

/// Where blocks can be, in guest physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// A multiple of [`BLOCK`].
    pub start: u64,
    pub blocks: u32,
}

impl Region {
    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        u64::from(self.blocks) * BLOCK
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// Where the block `index` begins.
    #[must_use]
    pub fn address(&self, index: u32) -> u64 {
        self.start + u64::from(index) * BLOCK
    }

    /// The blocks that a request names; `None` when it names anything else.
    fn range(&self, address: u64, count: u16) -> Option<Range<u32>> {
        let offset = address.checked_sub(self.start).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let first = u32::try_from(offset / BLOCK).ok()?;
        let last = first.checked_add(u32::from(count))?;
        (count > 0 && last <= self.blocks).then_some(first..last)
    }
}

/// What the guest has and should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    region: Region,
    plugged: Vec<bool>,
    wanted: u32,
}

impl Blocks {
    /// None of them plugged, none wanted.
    pub fn new(region: Region) -> Self {
        Self { region, plugged: vec![false; region.blocks as usize], wanted: 0 }
    }

    pub fn region(&self) -> Region {
        self.region
    }

    /// How many blocks the guest should have.
    pub fn wanted(&self) -> u32 {
        self.wanted
    }

    /// `false` when the region has fewer.
    pub fn want(&mut self, blocks: u32) -> bool {
        let fits = blocks <= self.region.blocks;
        if fits {
            self.wanted = blocks;
        }
        fits
    }

    /// The blocks that the guest has, in order.
    pub fn plugged(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.plugged).filter(|(_, plugged)| **plugged).map(|(index, _)| index)
    }

    pub fn plugged_count(&self) -> u32 {
        self.plugged().count() as u32
    }

    /// Counts `index` as plugged, whose memory is there already.
    pub fn adopt(&mut self, index: u32) {
        if let Some(plugged) = self.plugged.get_mut(index as usize) {
            *plugged = true;
        }
    }

    fn state(&self, range: &Range<u32>) -> PlugState {
        let blocks = &self.plugged[range.start as usize..range.end as usize];
        match blocks.iter().filter(|plugged| **plugged).count() {
            0 => PlugState::Unplugged,
            count if count == blocks.len() => PlugState::Plugged,
            _ => PlugState::Mixed,
        }
    }

    /// Does what the driver asks for, if it may.
    pub fn perform(&mut self, request: Request, backing: &dyn Backing) -> Answer {
        match request {
            Request::Plug { address, count } => self.plug(address, count, backing),
            Request::Unplug { address, count } => {
                let named = self.region.range(address, count).filter(|range| self.state(range) == PlugState::Plugged);
                named.map_or(Answer::Error, |range| self.unplug(range, backing))
            }
            Request::UnplugAll => self.unplug(0..self.region.blocks, backing),
            Request::State { address, count } => {
                self.region.range(address, count).map_or(Answer::Error, |range| Answer::State(self.state(&range)))
            }
            Request::Unknown => Answer::Error,
        }
    }

    /// All of them or none.
    fn plug(&mut self, address: u64, count: u16, backing: &dyn Backing) -> Answer {
        let Some(range) = self.region.range(address, count).filter(|range| self.state(range) == PlugState::Unplugged) else {
            return Answer::Error;
        };
        if self.plugged_count() + u32::from(count) > self.wanted {
            return Answer::Refused;
        }
        for index in range.clone() {
            if let Err(error) = backing.plug(index) {
                eprintln!("memory: cannot give the guest {} MiB more: {error}", BLOCK >> 20);
                let _ = self.unplug(range.start..index, backing);
                return Answer::Busy;
            }
            self.plugged[index as usize] = true;
        }
        Answer::Done
    }

    /// Those of `range` that are plugged. What the host cannot take stays plugged, and the driver may ask again.
    fn unplug(&mut self, range: Range<u32>, backing: &dyn Backing) -> Answer {
        let mut answer = Answer::Done;
        for index in range {
            let plugged = &mut self.plugged[index as usize];
            if !*plugged {
                continue;
            }
            match backing.unplug(index) {
                Ok(()) => *plugged = false,
                Err(error) => {
                    eprintln!("memory: cannot take {} MiB back from the guest: {error}", BLOCK >> 20);
                    answer = Answer::Busy;
                }
            }
        }
        answer
    }
}
