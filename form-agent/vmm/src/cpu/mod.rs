//! Virtual CPUs: what they are, how they start, and the threads that run them.

pub mod cpuid;
pub mod features;
pub mod registers;
pub mod run;
pub mod state;
