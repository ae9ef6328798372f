//! A VM that goes on from another one's snapshot becomes itself before its processes go on.

use std::{sync::Arc, time::Duration};

use form_api::{event::EventKind, vm::VmState};
use form_types::{Failpoint, failpoint::reach};
use tokio::time::{Instant, sleep};

use super::{Driver, guest::GuestError, live};
use crate::{agent::Agent, create, snapshot::Details};

/// How long the guest may take to be heard of.
const PATIENCE: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_millis(50);

impl Driver {
    /// Whether what runs has another VM's memory and does not know it yet.
    pub(super) fn is_another(&self) -> bool {
        let is_restored = self.running.as_ref().is_some_and(|running| running.process.record.restored.is_some());
        is_restored && create::is_new_clone(&self.agent, &self.id)
    }

    /// Has the guest take the identity of its VM. One that does not is ended: two machines that are one and the same must not run. Gives
    /// whether it runs on.
    pub(super) async fn become_itself(&mut self) -> bool {
        let (Some(running), Some(desired)) = (&self.running, self.agent.desired(&self.id)) else { return true };
        let control = running.process.control();
        let until = Instant::now() + PATIENCE;
        let told = loop {
            match live::new_identity(&control, &self.agent, &desired).await {
                // What was not understood or not done will not be when it is said again.
                Err(GuestError::Control(_) | GuestError::Io(_) | GuestError::HungUp) if Instant::now() < until => sleep(RETRY).await,
                told => break told,
            }
        };
        reach(Failpoint::ForkTold);
        if let Err(error) = told {
            let reason = format!("it does not take an identity of its own, and was ended: {error}");
            self.stop_now().await;
            self.end_for_good(desired.boot_digest(), &reason);
            return false;
        }
        create::is_itself(&self.agent, &self.id);
        self.drop_shared().await;
        true
    }

    /// What it went on from has served: later it goes back to snapshots of its own.
    pub(super) async fn drop_shared(&self) {
        let (agent, id) = (Arc::clone(&self.agent), self.id);
        if let Err(error) = tokio::task::spawn_blocking(move || remove_shared(&agent, &id)).await {
            tracing::warn!(vm = %self.id, "what it went on from stays until the agent is started again: {error}");
        }
    }

    /// A VM that cannot go on from what it was to go on from has nothing to start from either.
    pub(super) fn end_for_good(&mut self, boot: form_types::Digest, reason: &str) {
        self.finished = Some(boot);
        self.emit(EventKind::VmExited, reason);
        self.keep_ending(boot, Some(reason.to_owned()));
        self.agent.fleet.update(&self.id, |observed| {
            observed.state = VmState::Failed;
            observed.boot = Some(boot);
            observed.ready = false;
            observed.fault = Some(reason.to_owned());
            observed.gave_up = true;
        });
    }
}

fn remove_shared(agent: &Agent, id: &form_types::VmId) {
    for name in agent.store.snapshots(id).unwrap_or_default() {
        let is_shared = agent.store.snapshot(id, &name).is_ok_and(|entry| Details::of(&entry).is_ok_and(|details| details.is_shared));
        if is_shared && let Err(error) = agent.store.remove_snapshot(id, &name) {
            tracing::warn!(vm = %id, "what it went on from stays until the agent is started again: {error}");
        }
    }
}
