//! PID 1's part: keeping the server process running.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use form_guest::protocol::ExitStatus;
use rustix::process::{Pid, Signal, kill_process};

use super::{PORT_TAKEN, rules};
use crate::{machine::Machine, process::lock, sys};

/// Where SSH servers listen.
pub const PORT: u16 = 22;

/// A process that lived this long had no trouble at its start.
const LIVED: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The server process of this machine.
#[derive(Default)]
pub struct Keeper {
    process: Mutex<Option<Pid>>,
}

impl Keeper {
    /// Starts the server where one is wanted, and again whenever it ends.
    pub fn start(machine: &Arc<Machine>) {
        let Some(rules) = rules::wanted(&machine.settings, Path::new("/")) else { return };
        let machine = Arc::clone(machine);
        thread::spawn(move || {
            let rules = match serde_json::to_vec(&rules) {
                Ok(rules) => rules,
                Err(error) => return machine.log.say(format_args!("there is no SSH server: {error}")),
            };
            let mut pause = Duration::from_secs(1);
            loop {
                let begun = Instant::now();
                let exit = run_once(&machine, &rules);
                if machine.stopping() {
                    return;
                }
                match exit {
                    Ok(ExitStatus::Code(code)) if code == i32::from(PORT_TAKEN) => {
                        return machine.log.say(format_args!("port {PORT} is taken, so there is no SSH server of ours"));
                    }
                    // By us, so that it comes back as another machine's.
                    Ok(ExitStatus::Signal(libc::SIGKILL)) => pause = Duration::ZERO,
                    Ok(exit) => machine.log.say(format_args!("the SSH server ended with {exit} and is started again")),
                    Err(error) => machine.log.say(format_args!("the SSH server cannot be started: {error}")),
                }
                if begun.elapsed() > LIVED {
                    pause = pause.min(Duration::from_secs(1));
                }
                thread::sleep(pause);
                pause = (pause * 2).clamp(Duration::from_secs(1), LONGEST_PAUSE);
            }
        });
    }

    /// Ends the server process, which comes back with what it then finds: other host keys, other randomness. Its clients are those of
    /// another machine.
    pub fn renew(&self) {
        if let Some(pid) = *lock(&self.process) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn run_once(machine: &Machine, rules: &[u8]) -> std::io::Result<ExitStatus> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("sshd").env_clear().env("PATH", crate::identity::DEFAULT_PATH).current_dir("/");
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    sys::prepare(&mut command, &sys::Launch::root());
    let mut child = machine.children.spawn(&mut command)?;
    *lock(&machine.sshd.process) = Some(child.pid);
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(rules);
    }
    let exit = child.wait();
    *lock(&machine.sshd.process) = None;
    Ok(exit)
}

/// Whether something in this machine listens on this TCP port.
pub fn listens(port: u16) -> bool {
    ["/proc/net/tcp6", "/proc/net/tcp"].iter().any(|path| fs::read_to_string(path).is_ok_and(|text| has_listener(&text, port)))
}

/// In a table of sockets as proc(5) describes it: local address and port, then the other end's, then the state; 0A listens.
fn has_listener(table: &str, port: u16) -> bool {
    let local_end = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let mut words = line.split_whitespace().skip(1);
        let local = words.next();
        local.is_some_and(|local| local.ends_with(&local_end)) && words.nth(1) == Some("0A")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_found_in_the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
                     0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000\n\
                     1: 0100007F:0050 0100007F:8D2C 01 00000000:00000000 00:00000000\n";
        assert!(has_listener(table, 22) && !has_listener(table, 80) && !has_listener(table, 0x8d2c) && !has_listener("", 22));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(port));
        drop(listener);
        assert!(!listens(port));
    }
}
