//! One driver a VM: it alone starts, stops and removes it, and it goes on until what is agrees with what should be.

mod fork;
pub mod guest;
mod health;
pub mod launch;
pub mod let_go;
pub mod live;
mod pause;
pub mod process;
mod pulse;
mod restore;
mod session;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use form_api::{
    event::EventKind,
    vm::{Health, VmState},
};
use form_guest::protocol::{Phase, Reply, Request, ServicePhase, StatusReport};
use form_types::{Digest, Failpoint, Name, VmId, failpoint::reach, spec::RestartPolicy};
use form_vmm::control::{Client, ExitReason};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep_until},
};

use crate::{
    agent::Agent,
    cgroup, create,
    desired::{DesiredVm, Run},
    fleet::Observed,
    interface, memory,
    snapshot::restore::due as restore_due,
    vcpus,
    vm::SHUTDOWN_TIMEOUT_MS,
    volume,
};
use health::{fault, health_of, silence};
use process::{Process, RuntimeDirectory};
use session::{Session, Update};

/// Between two tries of a start that failed: doubles up to the last.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const LAST_BACKOFF: Duration = Duration::from_secs(60);

/// A guest that answers within this many tries to start is left alone; after that the driver gives up until it is asked again.
const MAX_FAILED_STARTS: u32 = 5;

/// What runs a kernel of its own for so long has started: nobody reports that it has.
const STEADY: Duration = Duration::from_secs(10);

/// How long a guest that is asked to stop while it boots may take.
const BOOTING_LIMIT: Duration = Duration::from_secs(1);

/// A VM process and the conversation with its guest.
struct Running {
    process: Process,
    session: Session,
    updates: mpsc::Receiver<Update>,
    /// The guest has to report by then.
    deadline: Option<Instant>,
    /// Whether it stands still; the session listens.
    paused: watch::Sender<bool>,
    /// It was ready when it was paused.
    was_ready: bool,
    /// The next try to pause it, or to let it go on.
    pause_again: Option<Instant>,
    /// The service has ended for good: when the guest then powers off, that was the end.
    service_ended: Option<Ending>,
    /// When this run of the agent saw it first.
    since: Instant,
}

impl Running {
    /// Whether our guest is in it.
    const fn has_guest(&self) -> bool {
        self.process.record.request.has_guest()
    }

    /// Whether its start counts as one that went well.
    fn has_started(&self) -> bool {
        if self.has_guest() { self.deadline.is_none() } else { self.since.elapsed() >= STEADY }
    }
}

/// How a service ended for good.
struct Ending {
    words: String,
    success: bool,
}

/// What is kept on disk of a VM that ended for good.
#[derive(serde::Serialize, serde::Deserialize)]
struct Ended {
    boot: Digest,
    fault: Option<String>,
}

impl Ending {
    fn of(status: &StatusReport) -> Option<Self> {
        let service = status.service.as_ref().filter(|service| service.phase == ServicePhase::Ended)?;
        let exit = service.last_exit.map_or_else(|| "ended".to_owned(), |exit| exit.to_string());
        let success = service.last_exit.is_some_and(form_guest::protocol::ExitStatus::success);
        Some(Self { words: format!("its service has ended: {exit}"), success })
    }
}

pub struct Driver {
    agent: Arc<Agent>,
    id: VmId,
    wake: Arc<Notify>,
    retry: Arc<AtomicBool>,
    running: Option<Running>,
    failed_starts: u32,
    /// The next try to start.
    not_before: Option<Instant>,
    /// What ran to its end, or failed too often, from this start: nothing is started from it again.
    finished: Option<Digest>,
}

/// What a look at the desired state says is to be done.
enum Next {
    Remove,
    Stop,
    Restart,
    Reset,
    Pause,
    Resume,
    Restore(Box<DesiredVm>, Name),
    /// What runs has become what it should be, without a start.
    Become(Box<DesiredVm>),
    Start(Box<DesiredVm>),
    Wait,
}

/// Brings a VM whose guest answers in line with the state, where that needs no start. Blocks.
pub fn as_it_should_be(agent: &Agent, id: &VmId) {
    volume::live::reconcile(agent, id);
    interface::live::reconcile(agent, id);
    vcpus::reconcile(agent, id);
}

impl Driver {
    pub fn new(agent: Arc<Agent>, id: VmId, wake: Arc<Notify>, retry: Arc<AtomicBool>) -> Self {
        Self { agent, id, wake, retry, running: None, failed_starts: 0, not_before: None, finished: None }
    }

    pub async fn run(mut self) {
        self.adopt().await;
        if !create::is_new_clone(&self.agent, &self.id) {
            self.drop_shared().await;
        }
        self.remember_ending();
        loop {
            match self.next() {
                Next::Remove => {
                    self.stop().await;
                    match self.remove().await {
                        Ok(()) => {
                            self.agent.fleet.forget(&self.id);
                            return;
                        }
                        Err(error) => {
                            tracing::error!(vm = %self.id, "cannot remove it: {error}");
                            self.not_before = Some(Instant::now() + LAST_BACKOFF);
                            self.wait().await;
                        }
                    }
                }
                Next::Stop => {
                    self.stop().await;
                    self.failed_starts = 0;
                    self.not_before = None;
                    self.agent.fleet.update(&self.id, |observed| {
                        observed.state = VmState::Stopped;
                        observed.fault = None;
                    });
                    self.wait().await;
                }
                Next::Restart => self.stop().await,
                Next::Reset => {
                    self.emit(EventKind::VmExited, "reset");
                    self.stop_now().await;
                }
                Next::Pause => self.pause().await,
                Next::Resume => self.resume().await,
                Next::Restore(desired, snapshot) => self.restore(&desired, &snapshot).await,
                Next::Become(desired) => self.has_become(&desired),
                Next::Start(desired) => self.start(&desired).await,
                Next::Wait => self.wait().await,
            }
        }
    }

    fn next(&mut self) -> Next {
        let desired = self.agent.desired(&self.id).filter(|vm| vm.host == self.agent.host_id());
        let Some(desired) = desired else { return Next::Remove };
        let boot = desired.boot_digest();
        if self.retry.swap(false, Ordering::AcqRel) {
            self.finished = None;
            self.failed_starts = 0;
            self.not_before = None;
        }
        self.take_resize(boot);
        match (&self.running, desired.run) {
            (_, Run::Stopped) => {
                let stopped = self.agent.fleet.observed(&self.id).is_some_and(|observed| observed.state == VmState::Stopped);
                if self.running.is_none() && stopped { Next::Wait } else { Next::Stop }
            }
            (Some(running), Run::Running | Run::Paused) => {
                let record = &running.process.record;
                if record.boot != boot {
                    if let Some(snapshot) = restore_due(&self.agent, &desired).cloned() {
                        return Next::Restore(Box::new(desired), snapshot);
                    }
                    if memory::makes_up(&self.agent, &desired, record) {
                        return Next::Become(Box::new(desired));
                    }
                    return if desired.resets > record.resets { Next::Reset } else { Next::Restart };
                }
                running.turn(desired.run)
            }
            (None, Run::Running | Run::Paused) if self.finished == Some(boot) => Next::Wait,
            (None, Run::Running | Run::Paused) => {
                if self.finished.is_some() {
                    self.finished = None;
                    self.failed_starts = 0;
                    self.not_before = None;
                }
                // A wait for the next try is for what was tried, not for what somebody asked for meanwhile.
                let is_new = self.agent.fleet.observed(&self.id).is_none_or(|observed| observed.boot != Some(boot));
                if !is_new && self.not_before.is_some_and(|time| time > Instant::now()) {
                    Next::Wait
                } else {
                    match restore_due(&self.agent, &desired).cloned() {
                        Some(snapshot) => Next::Restore(Box::new(desired), snapshot),
                        None => Next::Start(Box::new(desired)),
                    }
                }
            }
        }
    }

    /// What runs may have been made what it should be without a start.
    fn take_resize(&mut self, boot: Digest) {
        let Some(running) = &mut self.running else { return };
        if running.process.record.boot != boot && running.process.was_made(boot) {
            self.agent.fleet.update(&self.id, |observed| observed.boot = Some(boot));
        }
    }

    /// Waits for whatever may change the answer of [`Driver::next`], and takes in what happened.
    async fn wait(&mut self) {
        let timer = async |time: Option<Instant>| match time {
            Some(time) => sleep_until(time).await,
            None => std::future::pending().await,
        };
        let Some(running) = &mut self.running else {
            tokio::select! {
                () = self.wake.notified() => {}
                () = timer(self.not_before) => self.not_before = None,
            }
            return;
        };
        tokio::select! {
            () = self.wake.notified() => {}
            () = running.process.exited() => self.process_exited().await,
            Some(update) = running.updates.recv() => self.guest_said(update),
            () = timer(running.pause_again) => running.pause_again = None,
            () = timer(running.deadline) => {
                let seconds = self.agent.config().boot_timeout_seconds;
                self.stop_now().await;
                self.start_failed(&format!("the guest did not report within {seconds} s of its start"));
            }
        }
    }

    fn name(&self) -> Option<Name> {
        let desired = self.agent.desired(&self.id).map(|vm| vm.name().clone());
        desired.or_else(|| self.running.as_ref().map(|running| running.process.record.request.spec.name.clone()))
    }

    fn emit(&self, kind: EventKind, message: impl Into<String>) {
        self.agent.events.emit(kind, self.name().as_ref(), None, message);
    }

    /// Takes over a VM process that an earlier run of the agent started, or cleans up what is left of it.
    async fn adopt(&mut self) {
        let directory = RuntimeDirectory::new(&self.agent.paths().vm_runtime(), &self.id);
        if !directory.path().exists() {
            // An agent that was killed while it cleaned up may have left what comes after the directory.
            if cgroup::exists(&self.agent.host_id().mark(), &self.id) {
                self.clean_up().await;
            }
            return;
        }
        // It asks the process, which may take its time.
        let adopted = tokio::task::spawn_blocking(move || Process::adopt(&directory)).await.unwrap_or_default();
        match adopted {
            Some(process) => {
                let record = &process.record;
                let state = match process.paused {
                    true => VmState::Paused,
                    false if !record.request.has_guest() => VmState::Running,
                    false => VmState::Starting,
                };
                tracing::info!(vm = %self.id, pid = record.pid, paused = process.paused, "adopted a running VM");
                let (boot, started_at, is_paused) = (record.boot, record.started_at, process.paused);
                self.agent.fleet.update(&self.id, |observed| {
                    observed.state = state;
                    observed.boot = Some(boot);
                    observed.started_at = Some(started_at);
                });
                self.note_restored(&process);
                self.attend(process);
                if !is_paused && self.is_another() {
                    self.become_itself().await;
                }
            }
            None => self.clean_up().await,
        }
    }

    /// Begins the conversation with the guest of a process that has booted.
    fn attend(&mut self, process: Process) {
        let paused = watch::Sender::new(process.paused);
        let has_guest = process.record.request.has_guest();
        let (session, updates) = match has_guest {
            true => Session::open(&self.agent, self.id, &process, paused.subscribe()),
            false => Session::with_nobody(),
        };
        // One that stands still says nothing.
        let deadline = (has_guest && !process.paused).then(|| self.boot_deadline());
        let (was_ready, pause_again, service_ended, since) = (false, None, None, Instant::now());
        let state = if process.paused { VmState::Paused } else { VmState::Running };
        self.running = Some(Running { process, session, updates, deadline, paused, was_ready, pause_again, service_ended, since });
        if !has_guest {
            // That its process runs is all that can be known.
            self.agent.fleet.update(&self.id, |observed| {
                observed.state = state;
                observed.fault = None;
            });
        }
    }

    fn boot_deadline(&self) -> Instant {
        Instant::now() + Duration::from_secs(self.agent.config().boot_timeout_seconds)
    }

    /// What ended for good before the agent was restarted stays ended.
    fn remember_ending(&mut self) {
        if self.running.is_some() {
            return;
        }
        let ended = std::fs::read(self.ended_file()).ok().and_then(|bytes| serde_json::from_slice::<Ended>(&bytes).ok());
        let Some(ended) = ended else { return };
        self.finished = Some(ended.boot);
        self.agent.fleet.update(&self.id, |observed| {
            observed.state = if ended.fault.is_some() { VmState::Failed } else { VmState::Stopped };
            observed.boot = Some(ended.boot);
            observed.fault = ended.fault;
            observed.gave_up = true;
        });
    }

    fn ended_file(&self) -> std::path::PathBuf {
        self.agent.vm_directory(&self.id).join("ended.json")
    }

    fn keep_ending(&self, boot: Digest, fault: Option<String>) {
        let written = serde_json::to_vec(&Ended { boot, fault })
            .map_err(std::io::Error::from)
            .and_then(|json| crate::identity::write_atomically(&self.ended_file(), 0o600, &json));
        if let Err(error) = written {
            tracing::warn!(vm = %self.id, "a restarted agent will start it again: {error}");
        }
    }

    async fn start(&mut self, desired: &DesiredVm) {
        self.begin_start(desired.boot_digest());
        match launch::launch(&self.agent, desired).await {
            Ok(process) => {
                let started_at = process.record.started_at;
                self.agent.fleet.update(&self.id, |observed| observed.started_at = Some(started_at));
                self.emit(EventKind::VmStarted, "started");
                self.attend(process);
            }
            Err(error) => {
                self.clean_up().await;
                self.start_failed(&error.to_string());
            }
        }
    }

    /// The process got while it ran what another start would have brought.
    fn has_become(&mut self, desired: &DesiredVm) {
        let Some(running) = &mut self.running else { return };
        let boot = desired.boot_digest();
        if let Err(error) = running.process.has_become(boot, desired.request.clone()) {
            // What it was given is noted, too: another agent comes to the same.
            tracing::warn!(vm = %self.id, "that it has become what it should be is not on record: {error}");
        }
        self.agent.fleet.update(&self.id, |observed| observed.boot = Some(boot));
    }

    fn begin_start(&self, boot: Digest) {
        // Not there for most: only a VM that has ended leaves it.
        let _ = std::fs::remove_file(self.ended_file());
        self.agent.fleet.update(&self.id, |observed| {
            observed.state = VmState::Starting;
            observed.boot = Some(boot);
            observed.started_at = None;
            observed.ready = false;
            observed.health = Health::None;
            observed.gave_up = false;
            observed.guest = None;
        });
    }

    /// Plans the next try, or gives up.
    fn start_failed(&mut self, reason: &str) {
        self.failed_starts += 1;
        let gave_up = self.failed_starts >= MAX_FAILED_STARTS;
        let backoff = (FIRST_BACKOFF * 2_u32.pow(self.failed_starts.min(10) - 1)).min(LAST_BACKOFF);
        self.not_before = Some(Instant::now() + backoff);
        if gave_up {
            self.finished = self.agent.fleet.observed(&self.id).and_then(|observed| observed.boot);
        }
        self.emit(EventKind::VmExited, reason);
        self.agent.fleet.update(&self.id, |observed| {
            observed.state = VmState::Failed;
            observed.ready = false;
            observed.fault = Some(reason.to_owned());
            observed.gave_up = gave_up;
            observed.restarts += u32::from(!gave_up);
        });
    }

    fn guest_said(&mut self, update: Update) {
        let Some(running) = &mut self.running else { return };
        match update {
            Update::Ready(report) => {
                running.deadline = None;
                self.failed_starts = 0;
                let fault = report.faults.iter().find(|fault| fault.fatal).map(|fault| format!("{}: {}", fault.step, fault.message));
                let failed = report.phase == Phase::Failed;
                let health = health_of(report.health);
                let guest = session::guest_report(*report);
                self.agent.fleet.update(&self.id, |observed| {
                    observed.state = VmState::Running;
                    observed.ready = !failed;
                    observed.health = health;
                    observed.fault = fault.clone();
                    observed.guest = Some(guest);
                    observed.gave_up = failed;
                });
                match fault {
                    Some(fault) if failed => self.emit(EventKind::VmUnhealthy, format!("the guest's start failed: {fault}")),
                    _ => self.emit(EventKind::VmReady, "ready"),
                }
                if !failed {
                    create::is_itself(&self.agent, &self.id);
                    // It asks the guest, which answers while this goes on.
                    let (agent, id) = (Arc::clone(&self.agent), self.id);
                    tokio::task::spawn_blocking(move || as_it_should_be(&agent, &id));
                    tokio::spawn(memory::reconcile(Arc::clone(&self.agent), self.id));
                }
                reach(Failpoint::GuestReady);
            }
            Update::Status(status) => self.status(&status),
            Update::Silent => self.silent(),
        }
    }

    /// What a guest said last is no longer true when it says nothing any more.
    fn silent(&self) {
        let Some(name) = self.name() else { return };
        // One that stops says less and less.
        let goes_on = |observed: &Observed| observed.state == VmState::Running && !observed.gave_up;
        if !self.agent.fleet.observed(&self.id).as_ref().is_some_and(goes_on) {
            return;
        }
        let fault = silence(name.as_str());
        self.emit(EventKind::VmUnhealthy, format!("unhealthy: {fault}"));
        self.agent.fleet.update(&self.id, |observed| {
            observed.health = Health::Unhealthy;
            observed.fault = Some(fault);
        });
    }

    fn status(&mut self, status: &StatusReport) {
        let Some(running) = &mut self.running else { return };
        running.service_ended = Ending::of(status).or(running.service_ended.take());
        let health = health_of(status.health);
        let before = self.agent.fleet.observed(&self.id).map(|observed| observed.health);
        let restarts = status.service.as_ref().map_or(0, |service| service.restarts);
        self.agent.fleet.update(&self.id, |observed| {
            observed.health = health;
            observed.restarts = observed.restarts.max(restarts);
            if observed.state == VmState::Running && !observed.gave_up {
                observed.fault = fault(observed.fault.take(), status);
            }
        });
        if before != Some(health) {
            match health {
                Health::Healthy => self.emit(EventKind::VmHealthy, "healthy"),
                Health::Unhealthy => {
                    self.emit(EventKind::VmUnhealthy, format!("unhealthy: {}", status.health_message.as_deref().unwrap_or("no answer")));
                }
                Health::None if before == Some(Health::Unhealthy) => self.emit(EventKind::VmHealthy, "its guest answers again"),
                Health::None | Health::Starting => {}
            }
        }
    }

    /// The VM process is gone and nobody asked for it.
    async fn process_exited(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        // The last words of the guest may still be on their way to the log.
        running.session.drain().await;
        while let Ok(update) = running.updates.try_recv() {
            if let Update::Status(status) = update {
                running.service_ended = Ending::of(&status).or(running.service_ended.take());
            }
        }
        let status = running.process.reap();
        let exit = running.process.directory.read_exit();
        let words = running.process.directory.last_words();
        let boot = running.process.record.boot;
        // It may have been set anew since the start.
        let desired = self.agent.desired(&self.id);
        let restart = desired.as_ref().map_or(&running.process.record.request, |desired| &desired.request).spec.restart.clone();
        let policy = restart.policy;
        let has_started = running.has_started();
        self.clean_up().await;
        let reason = match exit.as_ref().map(|exit| (exit.reason, exit.message.clone().unwrap_or_default())) {
            None => {
                let how = status.map_or_else(|| "was killed".to_owned(), |status| format!("ended unexpectedly ({status})"));
                if words.is_empty() { format!("the VM process {how}") } else { format!("the VM process {how}: {words}") }
            }
            Some((ExitReason::PowerOff, _)) => {
                running.service_ended.as_ref().map_or_else(|| "the guest powered itself off".to_owned(), |ending| ending.words.clone())
            }
            Some((ExitReason::Reset, message)) if message.is_empty() => "the guest restarted itself".to_owned(),
            Some((ExitReason::Reset, message)) => format!("the guest restarted itself ({message})"),
            Some((ExitReason::Stopped, _)) => "the VM process was told to stop".to_owned(),
            Some((ExitReason::Failed, message)) => format!("the VM process failed: {message}"),
            Some((ExitReason::Panicked, message)) => format!("the VM process panicked: {message}"),
        };
        let clean = matches!(exit.as_ref().map(|exit| exit.reason), Some(ExitReason::PowerOff));
        let again = match policy {
            // The guest has already restarted the service as often as its policy says.
            _ if running.service_ended.is_some() => false,
            RestartPolicy::Always => true,
            RestartPolicy::OnFailure => !clean,
            RestartPolicy::Never => matches!(exit.as_ref().map(|exit| exit.reason), Some(ExitReason::Reset)),
        };
        if again && has_started {
            self.failed_starts = 0;
            self.not_before = None;
            self.emit(EventKind::VmExited, format!("{reason}; starting it again"));
            self.agent.fleet.update(&self.id, |observed| {
                observed.state = VmState::Starting;
                observed.ready = false;
                observed.restarts += 1;
            });
        } else if again {
            self.start_failed(&reason);
        } else {
            self.finished = Some(boot);
            self.emit(EventKind::VmExited, &reason);
            let ok = clean && running.service_ended.as_ref().is_none_or(|ending| ending.success);
            self.keep_ending(boot, (!ok).then(|| reason.clone()));
            self.agent.fleet.update(&self.id, |observed| {
                observed.state = if ok { VmState::Stopped } else { VmState::Failed };
                observed.ready = false;
                observed.health = Health::None;
                observed.fault = (!ok || running.service_ended.is_some()).then(|| reason.clone());
                observed.gave_up = true;
            });
        }
    }

    /// Asks the guest to power off, and ends the VM when it does not.
    async fn stop(&mut self) {
        let Some(running) = &self.running else { return };
        self.agent.fleet.update(&self.id, |observed| {
            observed.state = VmState::Stopping;
            observed.ready = false;
        });
        let control = running.process.control();
        // Only a guest that runs can shut down.
        if *running.paused.borrow()
            && let Err(error) = pause::ask(&control, Client::resume).await
        {
            tracing::warn!(vm = %self.id, "it does not go on to shut down: {error}");
        }
        let shutdown = Request::Shutdown { reboot: false };
        let listens = running.has_guest() && matches!(guest::ask(&control, &shutdown, Duration::from_secs(3)).await, Ok(Reply::Done));
        if !listens {
            // A guest that does not listen may still know a power button.
            let _ = tokio::task::spawn_blocking(move || Client::connect(&control)?.power_button()).await;
        }
        reach(Failpoint::StopAsked);
        // One that never reported and does not answer has no service yet: there is nothing to wait long for.
        let is_booting = running.deadline.is_some() && !listens;
        let limit = if is_booting { BOOTING_LIMIT } else { Duration::from_millis(SHUTDOWN_TIMEOUT_MS) + Duration::from_secs(10) };
        if tokio::time::timeout(limit, running.process.exited()).await.is_err() {
            self.emit(EventKind::VmExited, "the guest did not power off in time and was ended");
        }
        self.stop_now().await;
    }

    /// Ends the VM process, whatever the guest does.
    async fn stop_now(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        running.process.kill();
        running.process.exited().await;
        running.session.drain().await;
        running.process.reap();
        reach(Failpoint::StopProcessGone);
        self.clean_up().await;
        self.agent.fleet.update(&self.id, |observed| {
            observed.ready = false;
            observed.health = Health::None;
            observed.started_at = None;
            observed.guest = None;
        });
    }

    /// Removes what a run leaves outside the VM's own directory. Failures are logged: `form doctor` finds what stays.
    async fn clean_up(&self) {
        let directory = RuntimeDirectory::new(&self.agent.paths().vm_runtime(), &self.id);
        launch::clean_up(&self.agent, &self.id, &directory).await;
        self.agent.fleet.update(&self.id, |observed| observed.memory_mib = None);
    }

    /// Removes everything of a VM that nobody wants any more.
    async fn remove(&self) -> Result<(), launch::LaunchError> {
        self.clean_up().await;
        launch::remove(&self.agent, &self.id).await
    }
}
