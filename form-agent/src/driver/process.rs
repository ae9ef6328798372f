//! One VM process: started with its control socket, found again after a restart of the agent, ended, and cleaned up after.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    time::Duration,
};

use form_api::deploy::DeployRequest;
use form_types::{Digest, Failpoint, VmId, VolumeId, failpoint::reach, spec::Resources};
use form_vmm::{
    config::{RestoreConfig, VmConfig},
    control::{self, Client, ClientError, ExitRecord, VmState},
};
use jiff::Timestamp;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

use crate::identity::write_atomically;

/// How long a process that is adopted may take to say how it is. One that stands and is taken for one that runs would be ended, as its guest is not
/// heard of: on a busy host that says too little.
const ADOPTION: Duration = Duration::from_secs(30);
/// Likewise one that was being saved, which does not answer while it writes.
const ADOPTION_WHILE_SAVED: Duration = Duration::from_secs(2);

/// The argument of a VM process that says whose it is: what an agent finds those by that are on no record.
const NAME: &str = "--name";

/// What a restarted agent needs to find a VM process and to know what it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub vm: VmId,
    pub pid: i32,
    /// Clock ticks since boot (`/proc/PID/stat`, field 22): with the pid it names a process for good.
    pub start_time: u64,
    /// What it was started from ([`crate::desired::DesiredVm::boot_digest`]).
    pub boot: Digest,
    pub request: DeployRequest,
    pub uid: Option<u32>,
    pub started_at: Timestamp,
    /// Which it has open.
    #[serde(default)]
    pub volumes: Vec<VolumeId>,
    /// Not booted yet: nothing of the guest has run.
    pub booted: bool,
    /// How often a reset had been asked for when it was started.
    #[serde(default)]
    pub resets: u64,
    /// The start for which it was restored from a snapshot, instead of booted.
    #[serde(default)]
    pub restored: Option<u64>,
    /// The first line of the guest's log that is not in the host's: what a restored guest said before is.
    #[serde(default)]
    pub log_from: u64,
}

/// The volumes of a process since one came or left while it ran.
#[derive(Debug, Serialize, Deserialize)]
struct HeldVolumes {
    pid: i32,
    start_time: u64,
    volumes: Vec<VolumeId>,
}

/// What a process was told while it ran.
#[derive(Debug, Serialize, Deserialize)]
struct GivenMemory {
    pid: i32,
    start_time: u64,
    memory_mib: u64,
}

/// What a VM that runs was made: a start from `boot` would make the same.
#[derive(Debug, Serialize, Deserialize)]
struct Resized {
    pid: i32,
    start_time: u64,
    boot: Digest,
    resources: Resources,
}

/// The files of a running VM, in a directory of its own below `/run`.
#[derive(Clone, Debug)]
pub struct RuntimeDirectory(PathBuf);

impl RuntimeDirectory {
    pub fn new(parent: &Path, vm: &VmId) -> Self {
        Self(parent.join(vm.to_string()))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn control(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    pub fn console(&self) -> PathBuf {
        self.0.join("console.ring")
    }

    fn exit_record(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    fn record(&self) -> PathBuf {
        self.0.join("process.json")
    }

    /// There while the VM stands still to be saved.
    fn saving(&self) -> PathBuf {
        self.0.join("saving")
    }

    /// Notes that the VM stands still to be saved: whoever finds it so lets it go on.
    ///
    /// # Errors
    /// When the note cannot be written.
    pub fn mark_saving(&self) -> io::Result<()> {
        fs::write(self.saving(), b"")
    }

    pub fn is_saving(&self) -> bool {
        self.saving().exists()
    }

    /// Takes the note back.
    pub fn unmark_saving(&self) {
        // It is not there for most.
        let _ = fs::remove_file(self.saving());
    }

    fn volumes(&self) -> PathBuf {
        self.0.join("volumes.json")
    }

    /// The volumes that the VM process has: those that it was started with, until one came or left.
    pub fn held_volumes(&self) -> Vec<VolumeId> {
        let Some(record) = self.read_record() else { return Vec::new() };
        let changed = fs::read(self.volumes()).ok().and_then(|bytes| serde_json::from_slice::<HeldVolumes>(&bytes).ok());
        // Of a process that is gone it says nothing.
        changed.filter(|held| (held.pid, held.start_time) == (record.pid, record.start_time)).map_or(record.volumes, |held| held.volumes)
    }

    /// Notes that they are others now.
    ///
    /// # Errors
    /// When there is no process, or it cannot be written.
    pub fn set_held_volumes(&self, volumes: Vec<VolumeId>) -> io::Result<()> {
        let record = self.read_record().ok_or(io::ErrorKind::NotFound)?;
        let held = HeldVolumes { pid: record.pid, start_time: record.start_time, volumes };
        write_atomically(&self.volumes(), 0o600, &serde_json::to_vec(&held)?)
    }

    fn memory_note(&self) -> PathBuf {
        self.0.join("memory.json")
    }

    /// What the VM process was last told that its guest should have, in MiB; none when that is what it was started with.
    pub fn memory(&self) -> Option<u64> {
        let record = self.read_record()?;
        let given = fs::read(self.memory_note()).ok().and_then(|bytes| serde_json::from_slice::<GivenMemory>(&bytes).ok())?;
        // Of a process that is gone it says nothing.
        ((given.pid, given.start_time) == (record.pid, record.start_time)).then_some(given.memory_mib)
    }

    /// Notes that it was told so.
    ///
    /// # Errors
    /// When there is no process, or it cannot be written.
    pub fn set_memory(&self, memory_mib: u64) -> io::Result<()> {
        let record = self.read_record().ok_or(io::ErrorKind::NotFound)?;
        let given = GivenMemory { pid: record.pid, start_time: record.start_time, memory_mib };
        write_atomically(&self.memory_note(), 0o600, &serde_json::to_vec(&given)?)
    }

    fn resized(&self) -> PathBuf {
        self.0.join("resized.json")
    }

    /// Notes that the VM that runs has these resources now, as if it had been started from `boot`.
    ///
    /// # Errors
    /// When there is no process, or it cannot be written.
    pub fn note_resized(&self, boot: Digest, resources: &Resources) -> io::Result<()> {
        let record = self.read_record().ok_or(io::ErrorKind::NotFound)?;
        let resized = Resized { pid: record.pid, start_time: record.start_time, boot, resources: resources.clone() };
        write_atomically(&self.resized(), 0o600, &serde_json::to_vec(&resized)?)
    }

    /// Takes the note back.
    pub fn forget_resized(&self) {
        // It is not there for most.
        let _ = fs::remove_file(self.resized());
    }

    fn output(&self) -> PathBuf {
        self.0.join("vmm.log")
    }

    /// The record of the process that was started here; none when there is none, or it cannot be read.
    pub fn read_record(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.record()).ok()?).ok()
    }

    /// How the process ended; none when it was killed before it could say.
    pub fn read_exit(&self) -> Option<ExitRecord> {
        serde_json::from_slice(&fs::read(self.exit_record()).ok()?).ok()
    }

    /// What the VM process said on its standard error, at most the last kilobyte.
    pub fn last_words(&self) -> String {
        let bytes = fs::read(self.output()).unwrap_or_default();
        String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(1024)..]).trim().to_owned()
    }

    /// # Errors
    /// When something in it cannot be removed.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("the VM process did not start the VM: {0}")]
    Boot(String),
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ProcessError {
    let what = what.into();
    move |source| ProcessError::Io { what, source }
}

/// A VM process that runs, or ran a moment ago.
pub struct Process {
    pub record: Record,
    /// It stood still when it was found.
    pub paused: bool,
    pub directory: RuntimeDirectory,
    pidfd: AsyncFd<OwnedFd>,
    /// Present when this agent started it: somebody has to collect its exit status.
    child: Option<Child>,
}

/// The start time of a process, in clock ticks since boot.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses and may hold anything.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_ascii_whitespace().nth(19).and_then(|field| field.parse().ok()).ok_or(io::ErrorKind::InvalidData.into())
}

fn pidfd(pid: i32) -> io::Result<AsyncFd<OwnedFd>> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let descriptor = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
    // SAFETY: an `OwnedFd` keeps its descriptor open, and always the same one, until it is dropped with the `AsyncFd`.
    Ok(unsafe { AsyncFd::register(descriptor) }?)
}

/// What a process is started with.
pub struct Launch<'a> {
    pub program: &'a Path,
    pub vm: VmId,
    pub boot: Digest,
    pub resets: u64,
    pub request: DeployRequest,
    pub uid: Option<u32>,
    pub volumes: Vec<VolumeId>,
    pub cgroup: Option<&'a Path>,
}

impl Process {
    /// Starts the process with an empty VM. The directory must be new.
    ///
    /// # Errors
    /// When a file, the socket or the process cannot be made; what was made is removed by [`RuntimeDirectory::remove`].
    pub fn start(launch: &Launch<'_>, directory: &RuntimeDirectory) -> Result<Self, ProcessError> {
        let mut child = spawn(launch.program, directory)?;
        reach(Failpoint::LaunchProcessSpawned);
        let pid = child.id() as i32;
        let started = (|| {
            if let Some(cgroup) = launch.cgroup {
                fs::write(cgroup.join("cgroup.procs"), pid.to_string()).map_err(io_error("the VM's cgroup"))?;
            }
            let record = Record {
                vm: launch.vm,
                pid,
                start_time: start_time(pid).map_err(io_error("the VM process's start time"))?,
                boot: launch.boot,
                request: launch.request.clone(),
                uid: launch.uid,
                started_at: Timestamp::now(),
                volumes: launch.volumes.clone(),
                booted: false,
                resets: launch.resets,
                restored: None,
                log_from: 0,
            };
            let pidfd = pidfd(pid).map_err(io_error("the VM process's pidfd"))?;
            write_record(directory, &record)?;
            reach(Failpoint::LaunchProcessRecorded);
            Ok((record, pidfd))
        })();
        match started {
            Ok((record, pidfd)) => Ok(Self { record, paused: false, directory: directory.clone(), pidfd, child: Some(child) }),
            Err(error) => {
                // It has no guest yet: killing it loses nothing.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Boots the VM with descriptors in the order of [`crate::vm::config`].
    ///
    /// # Errors
    /// What the VM process refused.
    pub fn boot(&mut self, config: &VmConfig, descriptors: &[BorrowedFd<'_>]) -> Result<(), ProcessError> {
        let refused = |error: &dyn std::fmt::Display| {
            let words = self.directory.last_words();
            ProcessError::Boot(if words.is_empty() { error.to_string() } else { format!("{error} ({words})") })
        };
        let client = Client::connect(&self.directory.control()).map_err(|error| refused(&error))?;
        client.boot(config, descriptors).map_err(|error| refused(&error))?;
        reach(Failpoint::LaunchBooted);
        self.record.booted = true;
        write_record(&self.directory, &self.record)?;
        reach(Failpoint::LaunchBootRecorded);
        Ok(())
    }

    /// Goes on with a saved VM, with descriptors in the order of [`crate::vm::restore_config`]. It stands still until it is resumed, and is
    /// on record only after [`Process::record_restored`].
    ///
    /// # Errors
    /// What the VM process refused.
    pub fn restore(&self, config: &RestoreConfig, descriptors: &[BorrowedFd<'_>]) -> Result<(), ProcessError> {
        let refused = |error: ClientError| ProcessError::Boot(error.to_string());
        let client = Client::connect(&self.directory.control()).map_err(refused)?;
        client.restore(config, descriptors).map_err(refused)
    }

    /// From now on a restarted agent finds it as what the VM is.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn record_restored(&mut self, starts: u64, log_from: u64) -> Result<(), ProcessError> {
        self.record.booted = true;
        self.record.restored = Some(starts);
        self.record.log_from = log_from;
        self.paused = true;
        write_record(&self.directory, &self.record)
    }

    /// Whether it was made what a start from `boot` would make, while it ran: then it is on record as that.
    pub fn was_made(&mut self, boot: Digest) -> bool {
        let noted = fs::read(self.directory.resized()).ok().and_then(|bytes| serde_json::from_slice::<Resized>(&bytes).ok());
        let record = &mut self.record;
        // Of a process that is gone it says nothing.
        let noted = noted.filter(|noted| (noted.pid, noted.start_time, noted.boot) == (record.pid, record.start_time, boot));
        let Some(noted) = noted else { return false };
        (record.boot, record.request.spec.resources) = (boot, noted.resources);
        match write_record(&self.directory, &self.record) {
            Ok(()) => self.directory.forget_resized(),
            // The note stays, and is looked at again.
            Err(error) => tracing::warn!(vm = %self.record.vm, "{error}"),
        }
        true
    }

    /// Takes it for what was started from `boot`: that start was given up, and it runs on.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn stays_for(&mut self, boot: Digest) -> Result<(), ProcessError> {
        self.record.boot = boot;
        write_record(&self.directory, &self.record)
    }

    /// Takes it for what was started from `boot` with `request`: it has become that since.
    ///
    /// # Errors
    /// When the record cannot be written.
    pub fn has_become(&mut self, boot: Digest, request: DeployRequest) -> Result<(), ProcessError> {
        (self.record.boot, self.record.request) = (boot, request);
        write_record(&self.directory, &self.record)
    }

    /// Finds the process that an earlier run of the agent started. None when it is gone, another process has its pid, or it never booted.
    pub fn adopt(directory: &RuntimeDirectory) -> Option<Self> {
        let record = directory.read_record()?;
        let pidfd = pidfd(record.pid).ok()?;
        let same = start_time(record.pid).is_ok_and(|time| time == record.start_time);
        let mut process = Self { record, paused: false, directory: directory.clone(), pidfd, child: None };
        if !same {
            return None;
        }
        match Client::connect(&directory.control()) {
            Ok(client) if process.record.booted => {
                // One that is too busy to say is one that runs.
                let is_saved = directory.is_saving();
                let status = client.with_timeout(if is_saved { ADOPTION_WHILE_SAVED } else { ADOPTION }).status();
                // One that writes its memory does not answer, and it stands.
                process.paused = status.map_or(is_saved, |(state, _)| state == VmState::Paused);
                directory.unmark_saving();
                Some(process)
            }
            _ => {
                process.kill();
                None
            }
        }
    }

    /// Returns when the process has ended.
    pub async fn exited(&self) {
        // A pidfd becomes readable when its process ends; an error can only mean that it is no pidfd any more.
        let _ = self.pidfd.readable().await;
    }

    pub fn kill(&self) {
        let _ = pidfd_send_signal(self.pidfd.get_ref().as_fd(), Signal::KILL);
    }

    /// Collects the exit status of a process that has ended; none when another run of the agent started it.
    pub fn reap(&mut self) -> Option<ExitStatus> {
        self.child.take()?.wait().ok()
    }

    pub fn control(&self) -> PathBuf {
        self.directory.control()
    }

    /// A new, empty file for the exit record, as the VM process gets it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create_exit_record(&self) -> io::Result<fs::File> {
        fs::File::create(self.directory.exit_record())
    }
}

/// Starts `program` as the process of an empty VM: it serves the control socket of `directory`, and what it says goes to a file there.
///
/// # Errors
/// When the directory, the socket, the file or the process cannot be made.
pub fn spawn(program: &Path, directory: &RuntimeDirectory) -> Result<Child, ProcessError> {
    fs::create_dir_all(directory.path()).map_err(io_error("the VM's runtime directory"))?;
    let listener = control_socket(directory).map_err(io_error("the VM's control socket"))?;
    let output = fs::File::create(directory.output()).map_err(io_error("the VM's output file"))?;
    let errors = output.try_clone().map_err(io_error("the VM's output file"))?;
    control::launch::command(program, listener)
        .arg(NAME)
        // The VM's id.
        .arg(directory.path().file_name().unwrap_or_default())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(io_error(format!("cannot start {}", program.display())))
}

/// VM processes of `vm`, on record or not.
pub fn processes_of(vm: &VmId) -> Vec<i32> {
    let mark = format!("\0{NAME}\0{vm}\0").into_bytes();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_one = |pid: &i32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(&mark));
    pids.filter(is_one).collect()
}

/// Ends every process of a VM that should have none, and waits until they are gone.
pub async fn end_strays(vm: &VmId) {
    let id = *vm;
    let found = tokio::task::spawn_blocking(move || processes_of(&id)).await.unwrap_or_default();
    for pid in found {
        tracing::warn!(vm = %vm, pid, "ending a VM process that no agent has on record");
        let Ok(descriptor) = pidfd(pid) else { continue };
        // The pid may be another's by now: what the descriptor names is what is looked at.
        if processes_of(vm).contains(&pid) {
            let _ = pidfd_send_signal(descriptor.get_ref().as_fd(), Signal::KILL);
            let _ = tokio::time::timeout(std::time::Duration::from_secs(5), descriptor.readable()).await;
        }
    }
}

fn write_record(directory: &RuntimeDirectory, record: &Record) -> Result<(), ProcessError> {
    let json = serde_json::to_vec_pretty(record).map_err(|error| ProcessError::Boot(error.to_string()))?;
    write_atomically(&directory.record(), 0o600, &json).map_err(io_error("the VM's process record"))
}

fn control_socket(directory: &RuntimeDirectory) -> io::Result<OwnedFd> {
    // One that an earlier process left behind leads nowhere.
    let _ = fs::remove_file(directory.control());
    control::launch::listen(&directory.control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_alone_does_not_name_a_process() {
        let own = std::process::id() as i32;
        let time = start_time(own).unwrap();
        assert!(time > 0);
        assert!(start_time(i32::MAX).is_err());
    }

    #[tokio::test]
    async fn a_record_of_a_process_that_is_gone_is_not_adopted() {
        let parent = tempfile::tempdir().unwrap();
        let vm = VmId::from_bytes([1; 16]);
        let directory = RuntimeDirectory::new(parent.path(), &vm);
        fs::create_dir_all(directory.path()).unwrap();
        assert!(Process::adopt(&directory).is_none());
        let record = Record {
            vm,
            pid: std::process::id() as i32,
            // This process, but as if its pid had been another's before.
            start_time: 1,
            boot: Digest::of(b"boot"),
            request: crate::testing::request("web"),
            uid: None,
            started_at: Timestamp::now(),
            volumes: Vec::new(),
            booted: true,
            resets: 0,
            restored: None,
            log_from: 0,
        };
        write_record(&directory, &record).unwrap();
        assert_eq!(directory.read_record(), Some(record));
        assert!(Process::adopt(&directory).is_none());
    }

    #[tokio::test]
    async fn a_process_that_answers_late_is_what_it_says() {
        use form_vmm::control::{ControlReply, ControlRequest, channel::Channel};
        use rustix::net::{SocketFlags, accept_with};

        let parent = tempfile::tempdir().unwrap();
        let vm = VmId::from_bytes([1; 16]);
        let directory = RuntimeDirectory::new(parent.path(), &vm);
        fs::create_dir_all(directory.path()).unwrap();
        let own = std::process::id() as i32;
        let record = Record {
            vm,
            pid: own,
            start_time: start_time(own).unwrap(),
            boot: Digest::of(b"boot"),
            request: crate::testing::request("web"),
            uid: None,
            started_at: Timestamp::now(),
            volumes: Vec::new(),
            booted: true,
            resets: 0,
            restored: None,
            log_from: 0,
        };
        write_record(&directory, &record).unwrap();
        let listener = control_socket(&directory).unwrap();
        std::thread::spawn(move || {
            let socket = loop {
                match accept_with(&listener, SocketFlags::NONBLOCK) {
                    Ok(socket) => break socket,
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            };
            let (channel, until) = (Channel::new(socket), std::time::Instant::now() + Duration::from_secs(60));
            channel.receive::<ControlRequest>(until).unwrap();
            std::thread::sleep(Duration::from_millis(2500));
            channel.send(&ControlReply::Status { state: VmState::Paused, pid: own as u32 }, &[], until).unwrap();
        });
        assert!(Process::adopt(&directory).unwrap().paused);
    }

    #[tokio::test]
    async fn what_was_made_of_a_process_while_it_ran_is_on_record() {
        let parent = tempfile::tempdir().unwrap();
        let vm = VmId::from_bytes([1; 16]);
        let directory = RuntimeDirectory::new(parent.path(), &vm);
        fs::create_dir_all(directory.path()).unwrap();
        let (small, large) = (Digest::of(b"small"), Digest::of(b"large"));
        let request = crate::testing::request("web");
        let resources = Resources { vcpus: 4, ..request.spec.resources.clone() };
        assert!(directory.note_resized(large, &resources).is_err(), "there is no process");
        let own = std::process::id() as i32;
        let record = Record {
            vm,
            pid: own,
            start_time: start_time(own).unwrap(),
            boot: small,
            request,
            uid: None,
            started_at: Timestamp::now(),
            volumes: Vec::new(),
            booted: true,
            resets: 0,
            restored: None,
            log_from: 0,
        };
        write_record(&directory, &record).unwrap();
        let process = |record: &Record| Process {
            record: record.clone(),
            paused: false,
            directory: directory.clone(),
            pidfd: pidfd(own).unwrap(),
            child: None,
        };
        assert!(!process(&record).was_made(large));
        directory.note_resized(large, &resources).unwrap();
        assert!(!process(&record).was_made(Digest::of(b"other")));
        // A process that had this pid before.
        assert!(!process(&Record { start_time: 1, ..record.clone() }).was_made(large));
        assert!(process(&record).was_made(large));
        let now = directory.read_record().unwrap();
        assert_eq!((now.boot, &now.request.spec.resources), (large, &resources));
        // The note has served.
        assert!(!process(&record).was_made(large));
        directory.note_resized(small, &resources).unwrap();
        directory.forget_resized();
        assert!(!process(&now).was_made(small));
    }
}
