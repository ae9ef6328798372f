//! The vocabulary of Formation: what every other crate means by a name, an id, a size, a key, a spec.
//!
//! Nothing here does I/O. A value of one of these types is valid by construction: parse at the edge, trust inside.

pub mod digest;
pub mod failpoint;
pub mod id;
pub mod key;
pub mod label;
pub mod limits;
pub mod measure;
pub mod name;
#[cfg(feature = "openapi")]
mod schema;
pub mod settings;
pub mod signed;
pub mod size;
pub mod spec;
pub mod volume;

pub use digest::Digest;
pub use failpoint::Failpoint;
pub use id::{ClusterId, HostId, IdempotencyKey, OperationId, VmId, VolumeId};
pub use key::{PublicKey, SecretKey, Signature};
pub use limits::{DiskLimits, VmLimits};
pub use name::{ImageReference, Name};
pub use signed::{Signed, SignedError, Verified};
pub use spec::Spec;
pub use volume::VolumeFormat;
