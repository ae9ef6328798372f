//! What the fuzz targets share: a guest in guarded memory and the ways in which it may misbehave; sound inputs, altered.

#[cfg(feature = "devices")]
pub mod device;
#[cfg(feature = "formats")]
pub mod format;
