//! Tests of Formation as a whole: of the workspace's shape, and of the built programs.

pub mod disk;
pub mod host;
pub mod nfs;
pub mod own_kernel;
pub mod programs;
pub mod wire;
