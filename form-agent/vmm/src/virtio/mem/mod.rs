//! virtio-mem (virtio 1.2, section 5.15): memory that the guest takes when it may have more, and gives back when it should have less.

mod blocks;
mod device;
mod request;
mod state;
#[cfg(test)]
mod tests;

pub use blocks::{BLOCK, BLOCKS_MAX, Region};
pub use device::{Handle, Mem};
pub use state::MemState;

/// Where the memory of blocks comes from. A block that is not plugged must be out of the guest's reach, and cost the host nothing.
pub trait Backing: Send + Sync {
    /// Gives the guest the block `index`.
    ///
    /// # Errors
    /// When the host has none; the guest does not have the block then.
    fn plug(&self, index: u32) -> std::io::Result<()>;

    /// Takes the block `index` and what it holds.
    ///
    /// # Errors
    /// When the host cannot; the guest has it still.
    fn unplug(&self, index: u32) -> std::io::Result<()>;
}
