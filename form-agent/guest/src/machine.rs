//! What is true of this machine now: shared by the threads that change it and those that tell the host.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::Sender,
    },
    time::{Duration, Instant},
};

use form_guest::protocol::{HealthState, Phase, ServicePhase, ServiceStatus};
use form_types::{
    settings::{Interface, Settings},
    spec::Restart,
};

use crate::{
    process::{Children, lock},
    report::BootReport,
    service::log::Log,
    sshd::Keeper,
};

/// Who we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// PID 1: we end the machine ourselves.
    Init,
    /// Beside systemd, which we ask to.
    BesideSystemd,
    /// Beside another init.
    BesideInit,
}

/// Why the machine goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    Off,
    Restart,
    /// The service ended for good.
    ServiceEnded,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub phase: Phase,
    pub service: Option<ServiceStatus>,
    pub health: HealthState,
    pub health_message: Option<String>,
    /// Milliseconds after the kernel's start at which the phase was no longer `Starting`.
    pub started_after_ms: u64,
}

pub struct Machine {
    pub role: Role,
    pub settings: Settings,
    pub report: Mutex<BootReport>,
    pub log: Arc<Log>,
    pub children: Children,
    /// What RESTART was changed to since the start.
    pub restart: Mutex<Option<Restart>>,
    /// What it has instead of those of the settings, since it became another machine.
    pub interfaces: Mutex<Option<Vec<Interface>>>,
    pub sshd: Keeper,
    power: Sender<Power>,
    state: Mutex<(State, u64)>,
    changed: Condvar,
    /// How often the host has let the machine go on after a pause.
    resumes: AtomicU64,
}

impl Machine {
    pub fn new(role: Role, settings: Settings, report: BootReport, log: Arc<Log>, power: Sender<Power>) -> Self {
        let service = settings.service.as_ref().filter(|_| role == Role::Init).map(|_| ServiceStatus {
            phase: ServicePhase::Waiting,
            pid: None,
            last_exit: None,
            restarts: 0,
            started_ms: None,
        });
        let checked = settings.service.as_ref().is_some_and(|service| service.healthcheck.is_some()) && service.is_some();
        let health = if checked { HealthState::Starting } else { HealthState::None };
        let state = State { phase: Phase::Starting, service, health, health_message: None, started_after_ms: 0 };
        Self {
            role,
            settings,
            report: Mutex::new(report),
            log,
            children: Children::default(),
            restart: Mutex::default(),
            interfaces: Mutex::default(),
            sshd: Keeper::default(),
            power,
            resumes: AtomicU64::new(0),
            state: Mutex::new((state, 0)),
            changed: Condvar::new(),
        }
    }

    /// The settings with what has become of the interfaces.
    pub fn settings_now(&self) -> Settings {
        let settings = self.settings.clone();
        match lock(&self.interfaces).clone() {
            Some(interfaces) => Settings { interfaces, ..settings },
            None => settings,
        }
    }

    /// The state, and a number that grows with each change of it.
    pub fn state(&self) -> (State, u64) {
        lock(&self.state).clone()
    }

    /// Changes the state and wakes those who wait for it.
    pub fn update(&self, change: impl FnOnce(&mut State)) {
        let mut guard = lock(&self.state);
        let before = guard.0.clone();
        change(&mut guard.0);
        if before.phase == Phase::Stopping {
            guard.0.phase = Phase::Stopping;
        }
        if guard.0 != before {
            guard.1 += 1;
            drop(guard);
            self.changed.notify_all();
        }
    }

    /// Waits until `done` or for `limit`; gives the state then.
    pub fn wait(&self, limit: Duration, mut done: impl FnMut(&State, u64) -> bool) -> (State, u64) {
        let until = Instant::now() + limit;
        let mut guard = lock(&self.state);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || done(&guard.0, guard.1) {
                return guard.clone();
            }
            guard = self.changed.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The start has come to its end.
    pub fn started(&self) {
        let phase = if lock(&self.report).failed() { Phase::Failed } else { Phase::Ready };
        self.update(|state| {
            if state.phase == Phase::Starting {
                state.started_after_ms = crate::serve::uptime_ms();
            }
            state.phase = phase;
        });
    }

    /// The machine stood still and goes on.
    pub fn resumed(&self) {
        // Under the lock, so that nobody who waits misses it.
        let guard = lock(&self.state);
        self.resumes.fetch_add(1, Ordering::AcqRel);
        drop(guard);
        self.changed.notify_all();
    }

    pub fn resumes(&self) -> u64 {
        self.resumes.load(Ordering::Acquire)
    }

    pub fn stopping(&self) -> bool {
        lock(&self.state).0.phase == Phase::Stopping
    }

    /// Asks for the end of the machine.
    pub fn end(&self, how: Power) {
        // The receiver lives as long as the process.
        let _ = self.power.send(how);
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn machine(settings: Settings) -> Arc<Machine> {
        let (power, _) = std::sync::mpsc::channel();
        Arc::new(Machine::new(Role::Init, settings, BootReport::default(), Arc::new(Log::new().0), power))
    }

    #[test]
    fn waiting_ends_with_the_change_and_stopping_is_final() {
        let machine = machine(crate::settings::tests::empty());
        assert_eq!(machine.wait(Duration::from_millis(5), |state, _| state.phase != Phase::Starting).0.phase, Phase::Starting);
        std::thread::scope(|scope| {
            scope.spawn(|| machine.started());
            let (state, number) = machine.wait(Duration::from_secs(60), |state, _| state.phase != Phase::Starting);
            assert_eq!((state.phase, number), (Phase::Ready, 1));
        });
        machine.update(|state| state.phase = Phase::Stopping);
        machine.started();
        assert_eq!(machine.state().0.phase, Phase::Stopping);
    }

    #[test]
    fn a_fatal_fault_is_a_failed_start() {
        let machine = machine(crate::settings::tests::empty());
        lock(&machine.report).fatal("volumes", "gone");
        machine.started();
        assert_eq!(machine.state().0.phase, Phase::Failed);
    }
}
