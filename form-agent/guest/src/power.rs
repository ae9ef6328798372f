//! Ending the machine.

use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use form_guest::protocol::Phase;
use rustix::{
    mount::{MountFlags, UnmountFlags, mount_remount, unmount},
    process::{Pid, Signal, kill_process_group},
    system::{RebootCommand, reboot},
};

use crate::{
    freeze,
    machine::{Machine, Power, Role},
    report::say,
    sys,
};

/// How long the host may take to fetch the last lines of the log.
const LAST_LOG: Duration = Duration::from_secs(2);

/// Does what was asked for; with an init beside us, by asking it.
pub fn end(machine: &Machine, how: Power) -> ! {
    match machine.role {
        Role::Init => end_as_init(machine, how),
        Role::BesideSystemd | Role::BesideInit => end_by_init(machine, how),
    }
}

fn end_as_init(machine: &Machine, how: Power) -> ! {
    machine.update(|state| state.phase = Phase::Stopping);
    machine.log.say(format_args!("{}", if how == Power::Restart { "the machine restarts" } else { "the machine powers off" }));
    if how == Power::ServiceEnded {
        let until = Instant::now() + LAST_LOG;
        while !machine.log.has_readers() && Instant::now() < until {
            thread::sleep(Duration::from_millis(20));
        }
    }
    stop_everything(machine, Duration::from_millis(machine.settings.shutdown_timeout_ms));
    machine.log.close(LAST_LOG);
    // What the last readers were given must leave the socket before it goes with us.
    thread::sleep(Duration::from_millis(50));
    halt(how == Power::Restart)
}

/// SIGTERM to all, SIGKILL to those that stay.
fn stop_everything(machine: &Machine, limit: Duration) {
    // What the host holds back could not act on it, nor write anything.
    freeze::thaw();
    signal_all(Signal::TERM);
    // A stopped process cannot act on it.
    signal_all(Signal::CONT);
    // Shells that somebody sits at do not end by SIGTERM.
    signal_all(Signal::HUP);
    if !wait_until_alone(machine, limit) {
        machine.log.say(format_args!("some processes did not end within {} ms and are killed", limit.as_millis()));
        signal_all(Signal::KILL);
        wait_until_alone(machine, Duration::from_secs(2));
    }
}

/// To every process but PID 1 (kill(2) with -1, which is what the group of process 1 means).
fn signal_all(signal: Signal) {
    // Nobody may be left.
    let _ = kill_process_group(Pid::INIT, signal);
}

/// All that run are descendants of PID 1, so there are none when it has no child.
fn wait_until_alone(machine: &Machine, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    while machine.children.collect() {
        if Instant::now() >= until {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
    true
}

/// Writes everything to the disks and ends the machine at once. Processes must have ended.
pub fn halt(restart: bool) -> ! {
    rustix::fs::sync();
    unmount_disks();
    rustix::fs::sync();
    let result = reboot(if restart { RebootCommand::Restart } else { RebootCommand::PowerOff });
    say(format_args!("the kernel does not end the machine: {result:?}"));
    loop {
        thread::sleep(Duration::from_secs(60));
    }
}

/// Takes the file systems on disks off, the last mounted first; what is in use, as the root is, becomes read-only.
fn unmount_disks() {
    for target in disk_mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()) {
        if target != "/" && unmount(&target, UnmountFlags::empty()).is_ok() {
            continue;
        }
        if let Err(error) = mount_remount(&target, MountFlags::RDONLY, "") {
            say(format_args!("{target} cannot be unmounted cleanly: {error}; its journal will be replayed at the next start"));
        }
    }
}

/// The mount points whose source is a device, in reverse order (proc_pid_mountinfo(5)).
fn disk_mounts(mountinfo: &str) -> Vec<String> {
    let mut targets: Vec<String> = mountinfo
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            after.split(' ').nth(1).filter(|source| source.starts_with("/dev/"))?;
            Some(unescape(before.split(' ').nth(4)?))
        })
        .collect();
    targets.reverse();
    targets
}

/// Blanks and such are written as three octal digits.
pub fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(char::from(byte));
                plain.push_str(part.get(3..).unwrap_or_default());
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

/// The image's init ends its services in its own order. When it does not within the time, we end the machine.
fn end_by_init(machine: &Machine, how: Power) -> ! {
    machine.update(|state| state.phase = Phase::Stopping);
    let verb = if how == Power::Restart { "reboot" } else { "poweroff" };
    let words: &[&str] = if machine.role == Role::BesideSystemd { &["systemctl", "--no-block", verb] } else { &[verb] };
    if let Err(reason) = ask(machine, words) {
        say(format_args!("`{verb}` could not be asked for ({reason}); the machine ends without it"));
        thread::sleep(Duration::from_secs(1));
    } else {
        // We are ended by it on its way.
        thread::sleep(Duration::from_millis(machine.settings.shutdown_timeout_ms).saturating_add(Duration::from_secs(30)));
        say(format_args!("the image's init does not come to an end; the machine ends without it"));
    }
    halt(how == Power::Restart)
}

fn ask(machine: &Machine, words: &[&str]) -> Result<(), String> {
    let Some((program, arguments)) = words.split_first() else { return Ok(()) };
    let mut command = Command::new(program);
    command.args(arguments);
    sys::prepare(&mut command, &sys::Launch::root());
    let child = machine.children.spawn(&mut command).map_err(|error| error.to_string())?;
    match child.wait() {
        status if status.success() => Ok(()),
        status => Err(status.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_on_disks_last_first() {
        let text = "21 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
                    22 21 0:20 / /proc rw - proc proc rw\n\
                    23 21 254:16 / /srv/my\\040data rw shared:1 - ext4 /dev/vdb rw\n\
                    24 21 0:22 / /run rw - tmpfs tmpfs rw\n";
        assert_eq!(disk_mounts(text), ["/srv/my data", "/"]);
        assert_eq!(unescape("a\\134b\\x"), "a\\b\\x");
    }
}
