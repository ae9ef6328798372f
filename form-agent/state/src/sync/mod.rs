//! How two replicas come to the same state, without I/O: a [`Session`] per peer makes and takes messages, the caller carries
//! them and tells the time.
//!
//! Each side says how far it has come (its clock: per document and author the last change), and sends what the other lacks.
//! Nothing hangs on a message's arriving: a clock is said again now and then, and what was sent but not acknowledged by a
//! later clock is sent again. A message may come late, twice, out of order or from a liar.

mod message;
mod session;

pub use message::{MAX_MESSAGE, MessageError};
pub use session::{Event, Fault, Session, Time};

#[cfg(test)]
mod tests;
