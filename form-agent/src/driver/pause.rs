//! Pausing a VM and letting it go on.

use std::{path::Path, time::Duration};

use form_api::{event::EventKind, vm::VmState};
use form_vmm::control::{Client, ClientError, ErrorKind};
use tokio::time::Instant;

use super::{Driver, Next, Running, as_it_should_be, live};
use crate::desired::Run;

/// Between two tries with a VM process that does not answer.
const RETRY: Duration = Duration::from_secs(2);

impl Running {
    /// What is to be done so that it runs, or stands still, as it should.
    pub(super) fn turn(&self, wanted: Run) -> Next {
        if self.pause_again.is_some() {
            return Next::Wait;
        }
        match (wanted, *self.paused.borrow()) {
            // A guest that is not heard of yet would never be.
            (Run::Paused, false) if self.deadline.is_none() => Next::Pause,
            (Run::Running, true) => Next::Resume,
            _ => Next::Wait,
        }
    }
}

/// One request to a VM process that changes its state; to be in that state already is fine.
pub(super) async fn ask(control: &Path, request: fn(&Client) -> Result<(), ClientError>) -> Result<(), String> {
    let control = control.to_owned();
    let asked = tokio::task::spawn_blocking(move || request(&Client::connect(&control)?)).await.map_err(|error| error.to_string())?;
    match asked {
        Ok(()) | Err(ClientError::Refused { kind: ErrorKind::WrongState, .. }) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

impl Driver {
    pub(super) async fn pause(&mut self) {
        let Some(running) = &mut self.running else { return };
        if let Err(error) = ask(&running.process.control(), Client::pause).await {
            tracing::warn!(vm = %self.id, "it cannot be paused: {error}");
            running.pause_again = Some(Instant::now() + RETRY);
            return;
        }
        running.paused.send_replace(true);
        running.was_ready = self.agent.fleet.observed(&self.id).is_some_and(|observed| observed.ready);
        self.agent.fleet.update(&self.id, |observed| {
            observed.state = VmState::Paused;
            observed.ready = false;
        });
        self.emit(EventKind::VmPaused, "paused");
    }

    pub(super) async fn resume(&mut self) {
        let deadline = self.boot_deadline();
        let Some(running) = &mut self.running else { return };
        if let Err(error) = ask(&running.process.control(), Client::resume).await {
            tracing::warn!(vm = %self.id, "it cannot be resumed: {error}");
            running.pause_again = Some(Instant::now() + RETRY);
            return;
        }
        if self.is_another() && !self.become_itself().await {
            return;
        }
        let Some(running) = &mut self.running else { return };
        running.paused.send_replace(false);
        let (known, was_ready, control) = (!running.process.paused, running.was_ready, running.process.control());
        running.process.paused = false;
        let known = known || !running.has_guest();
        if !known {
            // It was paused when this run of the agent found it: its guest has yet to say how it is.
            running.deadline = Some(deadline);
        }
        self.agent.fleet.update(&self.id, |observed| {
            observed.state = if known { VmState::Running } else { VmState::Starting };
            observed.ready = known && was_ready;
        });
        self.emit(EventKind::VmResumed, "resumed");
        if !self.running.as_ref().is_some_and(Running::has_guest) {
            return;
        }
        let (agent, id) = (std::sync::Arc::clone(&self.agent), self.id);
        tokio::spawn(async move {
            if let Err(error) = live::resumed(&control, &agent, &id).await {
                tracing::warn!(vm = %id, "the guest was not told that it stood still: {error}");
            }
            // It may have been given volumes meanwhile. One that has yet to say how it is gets them then.
            if known && was_ready {
                tokio::task::spawn_blocking(move || as_it_should_be(&agent, &id));
            }
        });
    }
}
