//! The agent beside the image's own init.

use std::{
    convert::Infallible,
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, mpsc::channel},
    thread,
    time::Duration,
};

use form_guest::protocol::LogStream;

use crate::{
    boot::handoff::{DIRECTORY, ImageInit, image_init},
    error::Error,
    machine::{Machine, Power, Role},
    power,
    process::lock,
    report::{BootReport, say},
    serve,
    service::log,
    settings, sshd, sys,
};

/// How long to wait when the image's init does not answer yet.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// # Errors
/// When PID 1 has left nothing to go by.
pub fn run() -> Result<Infallible, Error> {
    let directory = Path::new(DIRECTORY);
    let settings = settings::load(&directory.join("settings.json"))?;
    let report = fs::read(directory.join("report.json")).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let role = if image_init() == Some(ImageInit::Systemd) { Role::BesideSystemd } else { Role::BesideInit };
    let signals = sys::block_signals().ok();
    let (power, powers) = channel();
    // What we say goes to the journal by standard error; the log's copy for a console is not needed.
    let log = Arc::new(log::Log::new().0);
    let report = report.unwrap_or_else(|| {
        let mut report = BootReport::default();
        report.warn("init", "the report of the start is lost");
        report
    });
    let machine = Arc::new(Machine::new(role, settings, report, log, power));
    if let Some(signals) = signals {
        let machine = Arc::clone(&machine);
        thread::spawn(move || watch_signals(&machine, &signals));
    }
    serve::start(&machine);
    sshd::Keeper::start(&machine);
    if role == Role::BesideSystemd {
        let follower = Arc::clone(&machine);
        thread::spawn(move || follow_journal(&follower));
        wait_for_systemd(&machine);
    }
    machine.started();
    let how = powers.recv().unwrap_or(Power::Off);
    power::end(&machine, how)
}

/// Our init ends us with SIGTERM; it reaps what we leave behind.
fn watch_signals(machine: &Machine, signals: &sys::Signals) {
    loop {
        if signals.wait() == libc::SIGCHLD {
            machine.children.collect();
        } else {
            machine.update(|state| state.phase = form_guest::protocol::Phase::Stopping);
            machine.log.close(Duration::from_secs(1));
            std::process::exit(0);
        }
    }
}

/// Waits until systemd has finished its start, and notes the units that failed.
fn wait_for_systemd(machine: &Machine) {
    loop {
        match ask(machine, &["is-system-running", "--wait"]).as_deref().map(str::trim) {
            Some("running") => return,
            Some("degraded") => {
                let failed = ask(machine, &["list-units", "--failed", "--plain", "--no-legend", "--no-pager"]).unwrap_or_default();
                let units: Vec<&str> = failed.lines().filter_map(|line| line.split_whitespace().next()).collect();
                return lock(&machine.report).warn("init", format_args!("these units failed: {}; see `journalctl -b`", units.join(" ")));
            }
            Some("maintenance") => return lock(&machine.report).fatal("init", "systemd is in maintenance mode; see `journalctl -b`"),
            _ => thread::sleep(ASK_AGAIN),
        }
    }
}

fn ask(machine: &Machine, words: &[&str]) -> Option<String> {
    let mut command = Command::new("systemctl");
    command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    sys::prepare(&mut command, &sys::Launch::root());
    let mut child = machine.children.spawn(&mut command).ok()?;
    let text = child.stdout.take().and_then(|stdout| std::io::read_to_string(stdout).ok());
    child.wait();
    text
}

/// The journal of this boot is the log of such a machine.
fn follow_journal(machine: &Machine) {
    loop {
        let mut command = Command::new("journalctl");
        command.args(["--boot", "--follow", "--lines=all", "--output=short", "--no-hostname", "--quiet"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        sys::prepare(&mut command, &sys::Launch::root());
        match machine.children.spawn(&mut command) {
            Ok(mut child) => {
                if let Some(stdout) = child.stdout.take() {
                    machine.log.read_lines(LogStream::Stdout, stdout);
                }
                child.wait();
            }
            Err(error) => return say(format_args!("the journal cannot be read: {error}")),
        }
        if machine.stopping() {
            return;
        }
        thread::sleep(Duration::from_secs(1));
    }
}
