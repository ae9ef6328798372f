//! What the host and a guest's `form-guest` say to each other.
//!
//! The binary of this crate is PID 1 and agent inside a VM; this library is only the protocol, so that the host's agent and the guest
//! cannot disagree about it. It is sans-I/O: [`protocol::Decoder`] turns bytes into frames and [`protocol::Frame::encode`] does the
//! reverse, whatever carries them (vsock, a virtio-serial port, a test's socket pair; blocking or asynchronous).

pub mod protocol;
