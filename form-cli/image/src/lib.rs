//! Builds images: the mechanism behind `form build` and `form deploy`.
//!
//! A build is a chain of layers. Each layer is made in a user-namespace sandbox or from the build context, is captured as the
//! difference to its parent, and is written into an ext4 file system which is a copy of its parent's, edited in place. Layers are
//! named by what went into them, so an unchanged step is never done twice.
//!
//! Everything here is synchronous and prints nothing: progress goes to a [`BuildObserver`], and a [`Cancel`] flag stops a build.

mod accounts;
mod apt;
mod artifact;
mod base;
mod block_store;
mod build;
mod context;
mod copy;
mod diff;
mod disk_image;
mod error;
mod ext4;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod index;
pub mod kernel;
mod layer;
mod lockfile;
mod observer;
mod oci;
mod original;
mod paths;
mod sandbox;
mod steps;
mod store;
mod tarball;
mod tools;
mod travel;
mod tree_path;

pub use artifact::layout::Exported;
pub use build::{BuildOptions, Builder, BuiltImage};
pub use disk_image::Disk;
pub use error::BuildError;
pub use kernel::KernelBundle;
pub use observer::{BuildEvent, BuildObserver, Cancel};
pub use oci::{OciDigest, OciDigestError, OciError, OciReference, Pushed, Registries};
pub use original::{Frame, HostImage, Original};
pub use paths::CachePaths;
pub use store::{ImageRecord, ImageStore, StoreError, VerifyReport};
pub use travel::Pulled;
