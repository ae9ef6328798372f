//! NBD (NetworkBlockDevice/nbd, `doc/proto.md`): what a server and a client have in common, and a client that reads. The server is where the
//! volumes are, in `form-store`.

mod client;
pub mod socket;
pub mod tls;
mod uri;
pub mod wire;

pub use client::{Client, Error, Extent};
pub use socket::{Channel, Socket};
pub use uri::{BadUri, Place, Uri};
