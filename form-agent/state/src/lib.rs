//! The state of a cluster: what should be, and what each host sees, in automerge documents that every host replicates.
//!
//! A change is made by a host, signed with its key, carries the user's signed request that allows it, and names the changes
//! it builds on by their hashes. Every replica derives for itself what the request allows and refuses anything else, so a
//! lying host can change nothing that its users did not ask for (after M. Kleppmann, "Making CRDTs Byzantine Fault
//! Tolerant", PaPoC 2022). Nothing here does network I/O.
//!
//! - [`Replica`] is the door: [`Replica::submit`], [`Replica::commit`], [`Replica::receive`], [`Replica::view`].
//! - [`Rules`] is what the agent supplies: who may write what.
//! - [`sync::Session`] brings two replicas together.
//! - [`vm`] reads and writes the records of virtual machines.

mod admit;
mod change;
mod compact;
#[cfg(test)]
mod crash_tests;
mod document;
mod error;
mod graph;
#[cfg(test)]
mod hostile_tests;
mod load;
mod log;
#[cfg(test)]
mod memory_tests;
mod refused;
mod replica;
mod rules;
pub mod sync;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod view;
pub mod vm;
mod write;

pub use change::{ChangeHash, DecodeError, MAX_CHANGE, MAX_SIGNED_CHANGE, SignedChange, SignedRequest};
pub use compact::compact;
pub use error::StateError;
pub use graph::Clock;
pub use log::Proof;
pub use refused::{Applied, Blame, Refused};
pub use replica::{ChangeSummary, Listener, Replica};
pub use rules::{Claim, Refusal, Rules};
pub use view::{Record, Tables, View};
pub use vm::{Run, VmRecord, Vms};
pub use write::{Document, MAX_FIELD_NAME, MAX_VALUE, MAX_WRITES, RecordId, Scalar, Scope, Table, Write, WriteError};
