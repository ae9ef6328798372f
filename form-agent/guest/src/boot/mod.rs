//! The steps of PID 1 up to the root file system.

pub mod devices;
pub mod ext4;
pub mod handoff;
pub mod memory;
pub mod modules;
pub mod mounts;
pub mod root;
pub mod volumes;
