//! Bringing a sandbox up, step by step, and taking its context away again.

use std::{
    fs,
    io::{self, Read, Seek, SeekFrom},
    net::UdpSocket,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use form_api::{
    ErrorCode,
    client::{Client, Timeouts},
};
use form_types::{Name, SecretKey};
use tokio::time::Instant;

use super::{
    Accelerator, Host, HostImage, Link, Record, Sandbox,
    image::{resize, write_initramfs},
    qemu::{CONSOLE, DISK, Launch, PROGRAM},
    qmp::Qmp,
};
use crate::{
    context::{Config, ConfigFile, Context, ContextKind, KnownHost, Target, load_or_create_identity},
    deploy::build,
    failure::Failure,
    session::Session,
};

/// QEMU's own messages.
const LOG: &str = "qemu.log";

/// How long QEMU may take until it serves its control socket.
const QEMU_PATIENCE: Duration = Duration::from_secs(30);

/// How long the host may take to answer when no `--timeout` is given; software emulation on a busy machine is slow.
const HOST_PATIENCE: Duration = Duration::from_secs(10 * 60);

/// How much of a log is shown with a failure.
const TAIL_LINES: usize = 20;
const TAIL_BYTES: u64 = 8 * 1024;

/// What each host of a sandbox has. `None` where nobody asked: what it has had, or the default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Machine {
    pub cpus: Option<u32>,
    pub memory_mib: Option<u64>,
    pub disk_gib: Option<u64>,
}

impl Machine {
    /// Whether a running sandbox is what was asked for.
    pub fn fits(&self, record: &Record) -> bool {
        self.cpus.is_none_or(|cpus| cpus == record.cpus)
            && self.memory_mib.is_none_or(|memory| memory == record.memory_mib)
            && self.disk_gib.is_none_or(|disk| disk == record.disk_gib)
    }

    /// Changes what a sandbox that does not run has.
    ///
    /// # Errors
    /// When its disk would become smaller.
    pub fn apply(&self, record: &mut Record) -> Result<(), Failure> {
        if let Some(disk_gib) = self.disk_gib {
            if disk_gib < record.disk_gib {
                return Err(Failure::new(
                    ErrorCode::Conflict,
                    format!("the sandbox has a disk of {} GiB, and a disk only grows", record.disk_gib),
                )
                .hint("`form sandbox down` removes it with all its VMs; then bring up a smaller one"));
            }
            record.disk_gib = disk_gib;
        }
        record.cpus = self.cpus.unwrap_or(record.cpus);
        record.memory_mib = self.memory_mib.unwrap_or(record.memory_mib);
        Ok(())
    }
}

/// Processors of a new sandbox: those of this machine, up to 4.
fn default_cpus() -> u32 {
    let there = std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX));
    there.min(4)
}

/// Makes a host that does not run yet; its record is for the caller to save, last: what has a record is complete.
///
/// # Errors
/// When there is no room for its disk, or no randomness for its key.
pub async fn make(host: &Host, image: &HostImage, machine: Machine) -> Result<Record, Failure> {
    let key = SecretKey::random().map_err(|error| Failure::failed(format!("no randomness: {error}")))?;
    let resources = &image.spec.resources;
    let cpus = machine.cpus.unwrap_or_else(default_cpus);
    let memory = machine.memory_mib.unwrap_or(resources.memory_mib);
    let disk_gib = machine.disk_gib.unwrap_or(resources.disk_gib);
    let mut record = Record::new(cpus, memory, disk_gib, free_port(None)?, Accelerator::detect(), &key);
    record.programs = Some(image.programs);
    fs::create_dir_all(&host.directory).map_err(|error| Failure::io("create", &host.directory, &error))?;
    image.write_disk(host.directory.join(DISK), disk_gib).await?;
    Ok(record)
}

/// A UDP port of the loopback address that nobody has: the wanted one if possible.
///
/// # Errors
/// When all are taken.
pub fn free_port(wanted: Option<u16>) -> Result<u16, Failure> {
    let bind = |port| UdpSocket::bind(("127.0.0.1", port)).and_then(|socket| socket.local_addr());
    let address = wanted.ok_or(io::ErrorKind::AddrInUse.into()).and_then(bind).or_else(|_: io::Error| bind(0));
    address.map(|address| address.port()).map_err(|error| Failure::failed(format!("no free port on 127.0.0.1: {error}")))
}

/// Starts QEMU and leaves it running, out of reach of this shell's end.
///
/// # Errors
/// When QEMU is missing or does not start, with what it said.
pub async fn start(session: &Session, host: &Host, record: &mut Record, link: Option<Link>) -> Result<(), Failure> {
    let kernel = build::kernel(session).await?;
    let owner = load_or_create_identity()?.public();
    record.port = free_port(Some(record.port))?;
    record.accelerator = Accelerator::detect();
    record.save(&host.directory)?;
    resize(&host.directory.join(DISK), record.disk_gib)?;
    write_initramfs(host, &kernel, owner, &record.host_key()?, link)?;
    let launch = Launch {
        name: host.name.as_str(),
        directory: &host.directory,
        kernel: &kernel.vmlinux(),
        accelerator: record.accelerator,
        cpus: record.cpus,
        memory_mib: record.memory_mib,
        port: record.port,
        link,
    };
    let mut child = spawn(&launch)?;
    let deadline = Instant::now() + QEMU_PATIENCE;
    loop {
        let ended = child.try_wait().map_err(|error| Failure::failed(format!("QEMU is lost: {error}")))?;
        if let Some(status) = ended {
            let failure = Failure::failed(format!("QEMU did not start: {status}"));
            return Err(failure.tail("what QEMU said", tail(&host.directory.join(LOG))));
        }
        let directory = host.directory.clone();
        let connected = tokio::task::spawn_blocking(move || Qmp::connect(&directory).map(drop));
        if matches!(connected.await, Ok(Ok(()))) {
            return Ok(());
        }
        if Instant::now() > deadline {
            super::stop(&host.directory)?;
            return Err(Failure::new(ErrorCode::TimedOut, format!("QEMU did not get ready in {} s", QEMU_PATIENCE.as_secs()))
                .tail("what QEMU said", tail(&host.directory.join(LOG))));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// QEMU in a session of its own: neither Ctrl-C nor the end of the terminal is for it.
fn spawn(launch: &Launch<'_>) -> Result<Child, Failure> {
    let path = launch.directory.join(LOG);
    let log = fs::File::create(&path).map_err(|error| Failure::io("create", &path, &error))?;
    let said = log.try_clone().map_err(|error| Failure::io("use", &path, &error))?;
    Command::new("setsid")
        .arg(PROGRAM)
        .args(launch.arguments())
        .current_dir(launch.directory)
        .stdin(Stdio::null())
        .stdout(said)
        .stderr(log)
        .spawn()
        .map_err(|error| Failure::failed(format!("setsid cannot be started: {error}")).hint("apt-get install util-linux"))
}

/// Whether this machine has what starts a sandbox.
///
/// # Errors
/// When a program is missing, naming the Debian package that has it.
pub fn require_programs() -> Result<(), Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    for (program, package) in [(PROGRAM, "qemu-system-x86"), ("setsid", "util-linux")] {
        if !std::env::split_paths(&path).any(|directory| directory.join(program).is_file()) {
            return Err(Failure::not_found(format!("{program} is not installed, and a sandbox needs it"))
                .hint(format!("apt-get install --no-install-recommends {package}")));
        }
    }
    Ok(())
}

/// Waits until the agent answers.
///
/// # Errors
/// When QEMU ends, or the time is over; with the end of the host's console.
pub async fn wait_until_it_answers(session: &Session, host: &Host, record: &Record) -> Result<Client, Failure> {
    let timeouts = Timeouts { connect: Duration::from_secs(5), request: Duration::from_secs(20), deadline: None };
    let client: Client = session.connect(&Target::Remote(record.known_host(&host.name)?), timeouts)?;
    let deadline = session.deadline().unwrap_or_else(|| Instant::now() + HOST_PATIENCE);
    let console = || tail(&host.directory.join(CONSOLE));
    loop {
        let error = match client.host().await {
            Ok(_) => return Ok(client),
            Err(error) if error.is_unreachable() => error,
            Err(error) => return Err(error.into()),
        };
        if !host.runs() {
            return Err(Failure::failed(format!("the host {} ended before it answered", host.name))
                .tail("the end of its console", console())
                .hint("`form sandbox up` tries again; `form sandbox down` removes it"));
        }
        if Instant::now() > deadline {
            return Err(Failure::new(ErrorCode::TimedOut, format!("the host {} does not answer: {error}", host.name))
                .tail("the end of its console", console())
                .hint("it runs on: `form sandbox up` waits for it again, `form sandbox down` removes it"));
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// The last lines of a log; empty when there is none.
fn tail(path: &Path) -> Vec<String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text.lines().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect();
    lines.into_iter().rev().take(TAIL_LINES).rev().collect()
}

/// Makes the sandbox's context, or mends it, and makes it the current one. The one that was current before is remembered.
///
/// # Errors
/// When the settings cannot be read or written.
pub fn write_context(sandbox: &Sandbox, first: &mut Record, hosts: Vec<KnownHost>) -> Result<(), Failure> {
    let mut file = ConfigFile::load()?;
    let before = file.config.current.clone();
    if before.as_ref() != Some(&sandbox.name) {
        first.previous_context = before;
        first.save(&sandbox.directory)?;
    }
    enter(&mut file.config, sandbox, hosts);
    file.save()
}

fn enter(config: &mut Config, sandbox: &Sandbox, hosts: Vec<KnownHost>) {
    let context = config.context_or_new(&sandbox.name);
    *context = Context { name: sandbox.name.clone(), kind: ContextKind::Sandbox, hosts, sandbox: Some(sandbox.directory.clone()) };
    config.current = Some(sandbox.name.clone());
}

/// Takes the context of the sandbox away; the one before it is current again, if it still is there.
///
/// # Errors
/// When the settings cannot be read or written.
pub fn remove_context(name: &Name, previous: Option<Name>) -> Result<bool, Failure> {
    let mut file = ConfigFile::load()?;
    let removed = leave(&mut file.config, name, previous);
    if removed {
        file.save()?;
    }
    Ok(removed)
}

fn leave(config: &mut Config, name: &Name, previous: Option<Name>) -> bool {
    let before = config.contexts.len();
    config.contexts.retain(|context| context.name != *name || context.kind != ContextKind::Sandbox);
    let removed = config.contexts.len() < before;
    if removed && config.current.as_ref() == Some(name) {
        config.current = previous.filter(|previous| config.context(previous).is_some());
    }
    removed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record::new(2, 2048, 20, 40_000, Accelerator::Software, &SecretKey::from_bytes([1; 32]))
    }

    #[test]
    fn what_runs_must_be_what_is_asked_for() {
        let mut record = record();
        assert!(Machine::default().fits(&record));
        assert!(Machine { memory_mib: Some(2048), ..Machine::default() }.fits(&record));
        assert!(!Machine { cpus: Some(3), ..Machine::default() }.fits(&record));
        Machine { cpus: Some(3), memory_mib: Some(4096), disk_gib: Some(30) }.apply(&mut record).unwrap();
        assert_eq!((record.cpus, record.memory_mib, record.disk_gib), (3, 4096, 30));
        let smaller = Machine { disk_gib: Some(29), ..Machine::default() };
        assert_eq!(smaller.apply(&mut record).unwrap_err().exit_code(), 5);
    }

    #[test]
    fn a_port_is_kept_while_it_is_free() {
        let port = free_port(None).unwrap();
        assert_eq!(free_port(Some(port)).unwrap(), port);
        let _taken = UdpSocket::bind(("127.0.0.1", port)).unwrap();
        assert_ne!(free_port(Some(port)).unwrap(), port);
    }

    #[test]
    fn the_context_before_comes_back() {
        let [home, name]: [Name; 2] = ["home", "box"].map(|name| name.parse().unwrap());
        let mut config = Config::default();
        config.context_or_new(&home);
        let before = config.clone();
        config.contexts.push(Context { name: name.clone(), kind: ContextKind::Sandbox, hosts: Vec::new(), sandbox: None });
        config.current = Some(name.clone());
        assert!(leave(&mut config, &name, Some(home.clone())));
        assert_eq!(config, before);
        // A cluster of that name is not ours to take away.
        assert!(!leave(&mut config, &home, None));
        assert_eq!(config, before);
    }

    #[test]
    fn the_last_lines_of_a_log() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        assert!(tail(&path).is_empty());
        let text: String = (0..5000).map(|number| format!("line {number}\r\n\r\n")).collect();
        fs::write(&path, text).unwrap();
        let lines = tail(&path);
        assert_eq!((lines.len(), lines[TAIL_LINES - 1].as_str(), lines[0].as_str()), (TAIL_LINES, "line 4999", "line 4980"));
    }
}
