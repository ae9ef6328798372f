//! The ENTRYPOINT: started, watched, started again, and its output kept.

pub mod health;
pub mod log;
mod probe;
mod restart;
mod supervisor;

pub use supervisor::supervise;
