//! Going back to a snapshot. Everything is made and looked at while the old VM runs; only then it is ended, and only when another process
//! holds the restored one does its disk take the place of the old one. An agent that is killed at any step finds the old VM, or does it again
//! from the start.

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use form_api::{event::EventKind, vm::VmState};
use form_store::RestoredDisk;
use form_types::{Failpoint, Name, failpoint::reach};

use super::{
    Driver,
    launch::{self, LaunchError, Root, io_error},
    process::Process,
};
use crate::{
    agent::Agent,
    create,
    desired::DesiredVm,
    memory,
    snapshot::{
        restore,
        volumes::{Held, Restored},
    },
    vm::{self, VolumeDisk},
    volume::attach::Ready,
};

/// What is open before anything is ended.
pub struct Prepared {
    kvm: OwnedFd,
    state: fs::File,
    memory: fs::File,
    /// None of a VM that runs a kernel of its own.
    disk: Option<(Root, RestoredDisk)>,
    pub volumes: Restored,
    log_from: u64,
    /// Its next snapshot may build upon this one.
    track: bool,
}

/// What a restore comes to be.
enum Plan {
    /// Memory, devices and disk.
    GoOn(Box<Prepared>),
    /// The disk and the volumes alone: the VM did not run when the snapshot was made, and is started from them.
    Start(Box<(Option<RestoredDisk>, Restored)>),
}

fn prepare(agent: &Agent, desired: &DesiredVm, name: &Name) -> Result<Plan, LaunchError> {
    let refused = |error: form_api::ApiError| LaunchError::Restore(error.message);
    let (saved, details) = restore::check(agent, desired, name).map_err(refused)?;
    let restored = agent.store.restore_disk(&desired.id, name)?;
    let volumes = Restored::draft(agent, name, details.operation, details.volumes).map_err(refused)?;
    let Some(saved) = saved else { return Ok(Plan::Start(Box::new((restored, volumes)))) };
    let disk = match restored {
        Some(restored) => Some((Root::open(&restored.files)?, restored)),
        None => None,
    };
    Ok(Plan::GoOn(Box::new(Prepared {
        kvm: fs::File::options().read(true).write(true).open("/dev/kvm").map_err(io_error("/dev/kvm"))?.into(),
        state: fs::File::open(&saved.state).map_err(io_error("the saved state"))?,
        // The VM that runs goes on meanwhile, also when there is no room to unfold it.
        memory: agent.store.open_memory(&saved, name)?,
        // Such a disk, or none, is where files can share blocks; what was made for a fork is removed at once, and nothing is built upon what is
        // compressed.
        track: disk.as_ref().is_none_or(|(root, _)| !root.is_qcow2) && !details.is_shared && saved.compressed.is_none(),
        disk,
        volumes,
        log_from: details.next_log_sequence,
    })))
}

impl Driver {
    /// Ends what runs and goes on with what was saved. What cannot be restored leaves the VM as it is.
    pub(super) async fn restore(&mut self, desired: &DesiredVm, name: &Name) {
        let prepared = {
            let (agent, desired, name) = (Arc::clone(&self.agent), desired.clone(), name.clone());
            tokio::task::spawn_blocking(move || prepare(&agent, &desired, &name)).await.unwrap_or(Err(LaunchError::Stopping))
        };
        let plan = match prepared {
            Ok(plan) => plan,
            Err(error) => return self.give_up_restore(desired, name, &error),
        };
        reach(Failpoint::RestoreDrafted);
        // It goes back: what it would do to shut down is undone anyway.
        self.stop_now().await;
        reach(Failpoint::RestoreEnded);
        let boot = desired.boot_digest();
        self.begin_start(boot);
        let restored = match plan {
            Plan::GoOn(prepared) => launch::restore(&self.agent, desired, *prepared).await.map(Some),
            Plan::Start(disks) => {
                let (agent, desired) = (Arc::clone(&self.agent), desired.clone());
                let placed = tokio::task::spawn_blocking(move || place(&agent, &desired, *disks)).await;
                placed.unwrap_or(Err(LaunchError::Stopping)).map(|()| None)
            }
        };
        match restored {
            Ok(Some(process)) => {
                let started_at = process.record.started_at;
                self.agent.fleet.update(&self.id, |observed| observed.started_at = Some(started_at));
                self.emit(EventKind::VmStarted, format!("restored from the snapshot {name}"));
                self.attend(process);
            }
            Ok(None) => self.emit(EventKind::VmStarted, format!("its disk is that of the snapshot {name}")),
            Err(error) => {
                self.clean_up().await;
                self.give_up_restore(desired, name, &error);
            }
        }
    }

    /// Notes why it is not done. The VM that runs stays; one that was ended starts again from the disk that it had.
    fn give_up_restore(&mut self, desired: &DesiredVm, name: &Name, error: &LaunchError) {
        let reason = error.to_string();
        tracing::error!(vm = %self.id, snapshot = %name, "it is not restored: {reason}");
        if let Err(error) = restore::note(&self.agent, &self.id, desired.starts, Some(reason.clone())) {
            // Without the note it would be tried for ever.
            self.start_failed(&format!("{reason}; and that cannot be noted: {error}"));
            return;
        }
        self.emit(EventKind::VmUnhealthy, format!("the snapshot {name} was not restored: {reason}"));
        let boot = desired.boot_digest();
        if create::is_new_clone(&self.agent, &self.id) {
            return self.end_for_good(boot, &format!("it cannot go on from the snapshot {name}: {reason}"));
        }
        if let Some(running) = &mut self.running {
            if let Err(error) = running.process.stays_for(boot) {
                tracing::warn!(vm = %self.id, "a restarted agent will start it again: {error}");
            }
            self.agent.fleet.update(&self.id, |observed| observed.boot = Some(boot));
        } else {
            self.agent.fleet.update(&self.id, |observed| observed.state = VmState::Stopped);
        }
    }

    /// After a restart of the agent: what runs was restored, so that is done.
    pub(super) fn note_restored(&self, process: &Process) {
        let Some(starts) = process.record.restored else { return };
        if let Err(error) = restore::note(&self.agent, &self.id, starts, None) {
            tracing::warn!(vm = %self.id, "should its process end, it will go back to its snapshot again: {error}");
        }
    }
}

/// Of a snapshot without memory.
fn place(agent: &Agent, desired: &DesiredVm, (disk, volumes): (Option<RestoredDisk>, Restored)) -> Result<(), LaunchError> {
    let _turn = agent.volume_turn();
    let mut held = hold_volumes(agent, desired, &volumes)?;
    disk.map_or(Ok(()), |disk| disk.publish(&agent.store, &desired.id))?;
    reach(Failpoint::RestoreSwapped);
    volumes.settle(&mut held)?;
    restore::note(agent, &desired.id, desired.starts, None).map_err(io_error("the note of its restore"))
}

fn hold_volumes(agent: &Agent, desired: &DesiredVm, volumes: &Restored) -> Result<Held, LaunchError> {
    volumes.hold(agent, desired).map_err(|error| LaunchError::Restore(error.message))
}

/// Has `process` hold the saved VM, gives it its disks, and writes down that it is what the VM is now.
pub fn hold(
    agent: &Agent,
    desired: &DesiredVm,
    prepared: Prepared,
    taps: &[OwnedFd],
    uid: u32,
    process: &mut Process,
) -> Result<(), LaunchError> {
    let (ring, exit_record) = launch::records(process)?;
    let disk = prepared.disk.as_ref().map(|(root, _)| root.config());
    // Until the volumes are what they were then, nobody else opens them.
    let _turn = agent.volume_turn();
    let mut held = hold_volumes(agent, desired, &prepared.volumes)?;
    let volumes: Vec<VolumeDisk> = held.ready.iter().map(Ready::disk).collect();
    let (request, links) = (&desired.request, agent.links(desired));
    let mut config = vm::restore_config((&desired.id, request), &links, disk, &volumes, desired.limits, vm::jail(uid), prepared.track);
    let mut descriptors: Vec<BorrowedFd<'_>> =
        vec![prepared.kvm.as_fd(), prepared.state.as_fd(), prepared.memory.as_fd(), ring.as_fd(), exit_record.as_fd()];
    descriptors.extend(taps.first().map(AsFd::as_fd));
    descriptors.extend(prepared.disk.iter().flat_map(|(root, _)| root.descriptors()));
    descriptors.extend(held.ready.iter().map(|ready| ready.open.file.as_fd()));
    descriptors.extend(taps.iter().skip(1).map(AsFd::as_fd));
    let by_kernel = vm::carried_by_kernel(&mut config.networks, descriptors.len());
    descriptors.extend(by_kernel.iter().map(AsFd::as_fd));
    process.restore(&config, &descriptors)?;
    memory::restored(agent, &desired.id).map_err(io_error("its limit of memory"))?;
    reach(Failpoint::RestoreHeld);
    if let Some((_, restored)) = prepared.disk {
        restored.publish(&agent.store, &desired.id)?;
    }
    reach(Failpoint::RestoreSwapped);
    prepared.volumes.settle(&mut held)?;
    process.record_restored(desired.starts, prepared.log_from)?;
    reach(Failpoint::RestoreRecorded);
    // Before its first instruction: from then on its memory and the snapshot's disk do not fit any more.
    restore::note(agent, &desired.id, desired.starts, None).map_err(io_error("the note of its restore"))
}
