//! Sound inputs and what can go wrong with them: a format is reached deep only by inputs that are nearly right.

mod bytes;
mod json;
pub mod nbd;
pub mod samples;

pub use bytes::{Edit, alter};
pub use json::{Alteration, Samples, alter_json};
