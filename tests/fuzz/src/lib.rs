//! What the fuzz targets share: a guest in guarded memory, and the ways in which it may misbehave.

#[cfg(feature = "devices")]
pub mod device;
