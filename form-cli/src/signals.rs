//! Signals that end a program, or something that it does. They are listened for before what they end begins, and as long as it goes on: one that
//! comes while a frame is drawn must neither be lost nor kill the program.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

fn listen(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::failed(format!("signals cannot be handled: {error}")))
}

/// Ctrl-C, each time.
///
/// # Errors
/// When signals cannot be handled.
pub fn interrupts() -> Result<Signal, Failure> {
    listen(SignalKind::interrupt())
}

/// Comes when somebody wants the program to end: with its exit code, as a shell says it.
///
/// # Errors
/// When signals cannot be handled.
pub fn ended() -> Result<impl Future<Output = u8>, Failure> {
    let (interrupt, terminate) = (interrupts()?, listen(SignalKind::terminate())?);
    let mut signals = (interrupt, terminate, listen(SignalKind::hangup())?);
    Ok(async move {
        tokio::select! {
            _ = signals.0.recv() => 130,
            _ = signals.1.recv() => 143,
            _ = signals.2.recv() => 129,
        }
    })
}
