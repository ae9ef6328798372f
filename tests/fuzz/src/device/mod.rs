//! A virtio device behind its real PCI transport, in the hands of a hostile driver. Workers run on the fuzzer's own thread
//! (`form_vmm::virtio::task::inline`), so an input always does the same.

pub mod bench;
pub mod driver;
pub mod host;
pub mod input;
pub mod memory;
pub mod permitted;

pub use bench::{Parts, Target, run};
