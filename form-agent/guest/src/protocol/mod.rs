//! The protocol between host and guest.
//!
//! The guest listens on vsock port [`VSOCK_PORT`]. The host opens a connection and sends one [`FrameKind::Request`] frame; the
//! connection then becomes what the request asked for:
//!
//! | request | guest sends | host sends afterwards |
//! |---|---|---|
//! | `ready`, `status`, `metrics`, `sync_time`, `new_identity`, `set_name`, `set_restart`, `shutdown`, `mount`, `unmount`, `sync` | one `Reply` or `Error` | nothing |
//! | `watch` | a `Reply` (status) now and at every change | `Cancel` or hang-up ends it |
//! | `logs` | `Log` frames, then `End` (never with `follow`, except after `Cancel` or at power-off) | `Cancel` or hang-up |
//! | `exec` | `Reply` (started) or `Error`, then `Stdout`/`Stderr`, last `Exit` | `Stdin`, `StdinClose`, `Resize`, `Signal`; hang-up kills |
//! | `copy_in` | `Reply` (go on) or `Error`; after `End` again one of them | `Data` frames, `End` |
//! | `copy_out` | `Reply` (file), `Data` frames, `End`; an `Error` may come at any time | nothing |
//! | `unpack` | `Reply` (go on) or `Error`; then again one of them, an `Error` at any time | `Data` frames, `End` |
//! | `pack` | `Reply` (tree), `Data` frames, `End`; an `Error` may come at any time | `Cancel` or hang-up |
//! | `forward` | `Reply` (connected) or `Error`, then raw bytes | raw bytes |
//!
//! Without vsock the same frames travel over the virtio-serial port [`VIRTIO_PORT`]. It is one channel, so requests are served one
//! after another, and `forward` is refused. Whoever opens it first sends `sync` with a fresh token and skips everything up to the exact
//! bytes of [`synced_bytes`]: an earlier client may have left half an answer in the channel.

mod frame;
mod message;
mod payload;
mod stream;

pub use frame::{Decoder, Frame, FrameError, FrameKind, HEADER_BYTES, MAX_FRAME_BYTES};
pub use message::{
    DeviceReport, ErrorKind, ErrorReply, ExecRequest, Fault, FileInfo, HealthState, InterfaceReport, LogsRequest, Metrics, NewIdentity,
    Phase, ReadyReport, Reply, Request, ServicePhase, ServiceStatus, SshReport, SshServer, StatusReport, TreeInfo, TtySize, Uptime,
};
pub use payload::{ExitStatus, LogLine, LogStream};
pub use stream::{read_frame, synced_bytes, write_frame};

/// The version this build speaks; a guest says its own in every ready and status report. Raised when an old peer would misread a new one.
pub const VERSION: u32 = 1;
/// The vsock port of the guest.
pub const VSOCK_PORT: u32 = 1024;
/// The name of the virtio-serial port (`virtserialport,name=form.agent`).
pub const VIRTIO_PORT: &str = "form.agent";
