//! The thread that keeps the service running.

use std::{
    io,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use form_guest::protocol::{ExitStatus, HealthState, LogStream, ServicePhase, ServiceStatus};
use form_types::settings::Service;
use rustix::process::Signal;

use super::{
    health::Health,
    log::now_ms,
    probe::{CommandSetting, probe},
    restart::{Decision, Restarts},
};
use crate::{
    error::Error,
    identity::Identity,
    machine::{Machine, Power},
    process::{Child, lock, start_failure},
    sys,
};

/// How long the last lines of a service that ended may take to arrive.
const LAST_LINES: Duration = Duration::from_millis(500);

/// How long the host's word that the machine was paused may take.
const RESUME_NOTICE: Duration = Duration::from_secs(1);

/// How each process of the service is started.
struct Setting {
    identity: Identity,
    env: Vec<(String, String)>,
    workdir: String,
}

/// Runs the service until it ends for good or the machine goes down. To be called in a thread of its own.
pub fn supervise(machine: &Arc<Machine>, service: &Service) {
    let setting = match setting(machine, service) {
        Ok(setting) => Arc::new(setting),
        Err(error) => {
            lock(&machine.report).fatal("service", &error);
            machine.log.say(format_args!("{error}"));
            return machine.started();
        }
    };
    let mut restarts = Restarts::new(service.restart.clone());
    loop {
        let start = Instant::now();
        let exit = run_once(machine, service, &setting);
        if machine.stopping() {
            return;
        }
        machine.log.say(format_args!("the service ended with {exit}"));
        if let Some(rule) = lock(&machine.restart).take() {
            restarts.set_rule(rule);
        }
        match restarts.after(exit, start.elapsed()) {
            Decision::StartAgain { after } => {
                update(machine, |status| {
                    status.phase = ServicePhase::Restarting;
                    status.restarts = status.restarts.saturating_add(1);
                });
                machine.wait(after, |state, _| state.phase == form_guest::protocol::Phase::Stopping);
                if machine.stopping() {
                    return;
                }
            }
            Decision::GiveUp(reason) => {
                machine.log.say(format_args!("the service is not started again ({reason}); the machine powers off"));
                update(machine, |status| status.phase = ServicePhase::Ended);
                return machine.end(Power::ServiceEnded);
            }
        }
    }
}

fn setting(machine: &Machine, service: &Service) -> Result<Setting, Error> {
    let identity = Identity::lookup(service.user.as_deref())?;
    let mut env = identity.env();
    env.extend(machine.settings.env.clone());
    env.extend(service.env.clone());
    let workdir = service.workdir.clone().unwrap_or_else(|| "/".to_owned());
    Ok(Setting { identity, env, workdir })
}

fn update(machine: &Machine, change: impl FnOnce(&mut ServiceStatus)) {
    machine.update(|state| {
        if let Some(status) = &mut state.service {
            change(status);
        }
    });
}

/// Starts it, waits for its end, and clears away what it left behind.
fn run_once(machine: &Arc<Machine>, service: &Service, setting: &Arc<Setting>) -> ExitStatus {
    let child = match start(machine, service, setting) {
        Ok(child) => child,
        Err(error) => {
            let program = service.command.first().map_or("", String::as_str);
            let (exit, message) = start_failure(program, &setting.workdir, &error);
            machine.log.say(format_args!("{message}"));
            if machine.state().0.phase == form_guest::protocol::Phase::Starting {
                lock(&machine.report).fatal("service", message);
            }
            update(machine, |status| status.last_exit = Some(exit));
            machine.started();
            return exit;
        }
    };
    let pid = child.pid.as_raw_nonzero().get().cast_unsigned();
    machine.update(|state| {
        if let Some(status) = &mut state.service {
            *status = ServiceStatus { phase: ServicePhase::Running, pid: Some(pid), started_ms: Some(now_ms()), ..status.clone() };
        }
        if service.healthcheck.is_some() {
            state.health = HealthState::Starting;
            state.health_message = None;
        }
    });
    machine.started();
    if service.healthcheck.is_some() {
        let (machine, service, setting) = (Arc::clone(machine), service.clone(), Arc::clone(setting));
        thread::spawn(move || check_health(&machine, &service, &setting, pid));
    }
    let (child, readers) = read_output(machine, child);
    let exit = child.wait();
    update(machine, |status| {
        status.pid = None;
        status.last_exit = Some(exit);
    });
    if !machine.stopping() {
        child.signal_group(Signal::KILL);
    }
    wait_for_readers(readers);
    exit
}

fn start(machine: &Machine, service: &Service, setting: &Setting) -> io::Result<Child> {
    let Some((program, arguments)) = service.command.split_first() else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the command is empty"));
    };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(setting.env.iter().map(|(key, value)| (key, value))).current_dir(&setting.workdir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    sys::prepare(&mut command, &setting.identity.launch(false));
    machine.children.spawn(&mut command)
}

fn read_output(machine: &Machine, mut child: Child) -> (Child, Vec<thread::JoinHandle<()>>) {
    let mut readers = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let log = Arc::clone(&machine.log);
        readers.push(thread::spawn(move || log.read_lines(LogStream::Stdout, stdout)));
    }
    if let Some(stderr) = child.stderr.take() {
        let log = Arc::clone(&machine.log);
        readers.push(thread::spawn(move || log.read_lines(LogStream::Stderr, stderr)));
    }
    (child, readers)
}

/// Usually they end with the process. One that it handed its output to may go on writing for as long as it likes.
fn wait_for_readers(readers: Vec<thread::JoinHandle<()>>) {
    let until = Instant::now() + LAST_LINES;
    for reader in readers {
        while !reader.is_finished() && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Probes one run of the service until it ends.
fn check_health(machine: &Machine, service: &Service, setting: &Setting, pid: u32) {
    let Some(check) = &service.healthcheck else { return };
    let start = Instant::now();
    let mut health = Health::new(check);
    let command = CommandSetting {
        children: &machine.children,
        launch: setting.identity.launch(false),
        env: &setting.env,
        workdir: &setting.workdir,
    };
    let mut pause = Duration::from_millis(100);
    loop {
        let (state, _) = machine.wait(pause, |state, _| !runs(state, pid));
        if !runs(&state, pid) {
            return;
        }
        let (resumes, began) = (machine.resumes(), Instant::now());
        let result = probe(check, &command);
        // A probe whose time ran out may have stood still with the machine. The host says so as soon as the machine goes on.
        if result.is_err() && began.elapsed() >= Duration::from_millis(check.timeout_ms) {
            machine.wait(RESUME_NOTICE, |state, _| machine.resumes() != resumes || !runs(state, pid));
            if machine.resumes() != resumes {
                pause = Duration::from_millis(100);
                continue;
            }
        }
        let now = health.record(start.elapsed(), result.is_ok());
        let before = state.health;
        machine.update(|state| {
            if runs(state, pid) {
                state.health = now;
                state.health_message = result.clone().err();
            }
        });
        if now != before {
            match (now, &result) {
                (HealthState::Healthy, _) => machine.log.say(format_args!("the service is healthy")),
                (_, Err(reason)) => machine.log.say(format_args!("the service is unhealthy: {reason}")),
                _ => {}
            }
        }
        pause = health.pause();
    }
}

fn runs(state: &crate::machine::State, pid: u32) -> bool {
    state.phase != form_guest::protocol::Phase::Stopping && state.service.as_ref().is_some_and(|status| status.pid == Some(pid))
}
