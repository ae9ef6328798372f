//! What a builder hands to a host: image manifests, the blocks they are made of, the kernel bundle, and the initramfs of a VM.
//!
//! Nothing here does I/O beyond the readers and byte slices it is handed. Everything that can come from outside is checked
//! when it is decoded: a value that exists is valid.

pub mod blocks;
pub mod initramfs;
pub mod kernel;
pub mod manifest;
pub mod pvh;
pub mod travel;

pub use blocks::{BLOCK_SIZE, BlockMap};
pub use kernel::{KernelManifest, ModuleSet};
pub use manifest::Manifest;
