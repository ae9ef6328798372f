//! A file or a directory as a tar stream, and a tar stream as a file or a directory: what `form cp` and the guest send each other.
//!
//! Modes (without set-id bits, unless owners are kept too) and times (to the second) are kept, links are links. Sockets, pipes and devices
//! are left out. Neither the stream is trusted nor who else may write to the file system meanwhile: no entry reaches outside the target,
//! through `..` or through a link. What is interrupted leaves no half file under its name: a file is written beside its place and moved
//! there, and so is a directory that is new.

mod error;
mod gauge;
mod pack;
mod place;
mod tree;
mod unpack;

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

pub use error::{ArchiveError, ErrorKind};
pub use pack::{Tree, measure, pack};
pub use unpack::{Owner, Target, check, unpack};

/// What went through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub files: u64,
    /// Content of the files.
    pub bytes: u64,
    /// Sockets, pipes and devices: left out.
    pub skipped: u64,
}
