//! The steps from a VM that should run to a VM process that has booted, and back to nothing.

use std::{
    fs, io,
    io::Write,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::{Arc, PoisonError},
};

use form_bundle::initramfs;
use form_net::NetError;
use form_store::{DiskFiles, DiskFormat as StoredFormat, StoreError};
use form_types::{Digest, Failpoint, VmId, VolumeId, failpoint::reach};
use form_vmm::{config::DiskFormat, log_ring};
use rustix::fs::{MemfdFlags, memfd_create};

use super::{
    process::{self, Launch, Process, ProcessError, RuntimeDirectory},
    restore::{self, Prepared},
};
use crate::{
    agent::Agent,
    cgroup, create,
    desired::DesiredVm,
    interface, plan, snapshot,
    vm::{self, Disk, VolumeDisk},
    volume::attach::{self, AttachError, Ready},
};

/// Serial output kept for `form vm console` and for a VM that failed, in bytes.
const CONSOLE_RING: u64 = 256 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("its disk: {0}")]
    Store(#[from] StoreError),
    #[error(transparent)]
    Volume(#[from] AttachError),
    #[error("its network: {0}")]
    Network(#[from] NetError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error("{0}")]
    Restore(String),
    #[error("its settings: {0}")]
    Settings(String),
    #[error("the agent is stopping")]
    Stopping,
}

pub fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> LaunchError {
    move |source| LaunchError::Io { what, source }
}

/// Files that are open before the VM process starts.
struct Files {
    kvm: OwnedFd,
    kernel: OwnedFd,
    /// Segments that the guest's kernel reads as one.
    initramfs: Vec<OwnedFd>,
    /// None of a VM that runs a kernel of its own.
    root: Option<Root>,
    /// Locked for this VM as long as they, or the copies that the VM process gets, are open.
    volumes: Vec<Ready>,
}

/// A root disk that is open.
pub struct Root {
    pub disk: fs::File,
    pub is_qcow2: bool,
    pub backing: Vec<fs::File>,
}

impl Root {
    /// # Errors
    /// When a file cannot be opened.
    pub fn open(files: &DiskFiles) -> Result<Self, LaunchError> {
        Ok(Self {
            disk: fs::File::options().read(true).write(true).open(&files.path).map_err(io_error("its root disk"))?,
            is_qcow2: files.format == StoredFormat::Qcow2,
            backing: files.backing.iter().map(fs::File::open).collect::<io::Result<_>>().map_err(io_error("its image"))?,
        })
    }

    /// What the VM process is told.
    pub fn config(&self) -> Disk {
        let format = if self.is_qcow2 { DiskFormat::Qcow2 } else { DiskFormat::Raw };
        Disk { format, backing: self.backing.len() as u16 }
    }

    /// In the order in which they are passed.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(&self.disk).chain(&self.backing).map(AsFd::as_fd)
    }
}

/// Makes what is missing, and boots.
pub async fn launch(agent: &Arc<Agent>, desired: &DesiredVm) -> Result<Process, LaunchError> {
    let files = {
        let (agent, desired) = (Arc::clone(agent), desired.clone());
        tokio::task::spawn_blocking(move || prepare_files(&agent, &desired)).await.map_err(|_| LaunchError::Stopping)??
    };
    reach(Failpoint::LaunchOpened);
    let volumes = files.volumes.iter().map(|ready| ready.volume.id).collect();
    start(agent, desired, volumes, move |agent, desired, taps, uid, process| boot(agent, desired, &files, taps, uid, process)).await
}

/// Has a process hold what was saved.
pub async fn restore(agent: &Arc<Agent>, desired: &DesiredVm, prepared: Prepared) -> Result<Process, LaunchError> {
    let volumes = prepared.volumes.ids();
    start(agent, desired, volumes, move |agent, desired, taps, uid, process| restore::hold(agent, desired, prepared, taps, uid, process))
        .await
}

/// Makes everything around a process and the process itself, and has `fill` make its VM.
async fn start(
    agent: &Arc<Agent>,
    desired: &DesiredVm,
    volumes: Vec<VolumeId>,
    fill: impl FnOnce(&Agent, &DesiredVm, &[OwnedFd], u32, &mut Process) -> Result<(), LaunchError> + Send + 'static,
) -> Result<Process, LaunchError> {
    // The rules are for every VM with a runtime directory: from here on another VM's change keeps this one's.
    let directory = RuntimeDirectory::new(&agent.paths().vm_runtime(), &desired.id);
    fs::create_dir_all(directory.path()).map_err(io_error("the VM's runtime directory"))?;
    reach(Failpoint::LaunchDirectoryMade);
    agent.apply_rules().await?;
    reach(Failpoint::LaunchRulesSet);
    let mut taps = Vec::new();
    for (_, attachment) in agent.attachments(desired) {
        taps.push(agent.network.attach(&attachment).await?);
    }
    reach(Failpoint::LaunchTapMade);
    let (agent, desired) = (Arc::clone(agent), desired.clone());
    let started = move || {
        let (mut process, uid) = start_process(&agent, &desired, volumes)?;
        match fill(&agent, &desired, &taps, uid, &mut process) {
            Ok(()) => Ok(process),
            Err(error) => {
                process.kill();
                process.reap();
                Err(error)
            }
        }
    };
    tokio::task::spawn_blocking(started).await.map_err(|_| LaunchError::Stopping)?
}

fn prepare_files(agent: &Agent, desired: &DesiredVm) -> Result<Files, LaunchError> {
    let request = &desired.request;
    let root = match request.image() {
        Some(image) => Some(open_root(agent, desired, image)?),
        None => {
            // What is noted of a VM is beside its disk.
            fs::create_dir_all(agent.vm_directory(&desired.id)).map_err(io_error("the VM's directory"))?;
            None
        }
    };
    agent.store.check_kernel_sealed(&request.kernel)?;
    let entry = agent.store.kernel(&request.kernel)?;
    let kernel = fs::File::open(&entry.vmlinux).map_err(io_error("the kernel"))?;
    let volumes = attach::open(agent, desired)?;
    let open = |path: &PathBuf| fs::File::open(path).map(OwnedFd::from).map_err(io_error("the initramfs"));
    let initramfs = if request.has_guest() {
        let mounts = volumes.iter().map(Ready::mount).collect();
        let settings = vm::settings(&desired.id, request, &agent.links(desired), mounts, create::is_new_clone(agent, &desired.id));
        let segment = initramfs::settings_segment(&settings).map_err(|error| LaunchError::Settings(error.to_string()))?;
        let settings = in_memory("form-settings", &segment).map_err(io_error("the settings in memory"))?;
        vec![open(&agent.store.initramfs(&request.kernel, &agent.programs.guest)?)?, settings]
    } else {
        entry.initrd.iter().map(open).collect::<Result<_, _>>()?
    };
    Ok(Files {
        kvm: fs::File::options().read(true).write(true).open("/dev/kvm").map_err(io_error("/dev/kvm"))?.into(),
        kernel: kernel.into(),
        initramfs,
        root,
        volumes,
    })
}

fn open_root(agent: &Agent, desired: &DesiredVm, image: &Digest) -> Result<Root, LaunchError> {
    {
        // Somebody may be copying it.
        let turn = agent.disk_turn(&desired.id);
        let _held = turn.lock().unwrap_or_else(PoisonError::into_inner);
        prepare_disk(agent, desired, image)?;
    }
    Root::open(&agent.store.open_disk(&desired.id)?)
}

/// The root disk: made from the image when there is none, or when another image or a smaller disk is asked for. Whatever else keeps
/// it from being opened is an error: what a VM has written is removed only when the plan said so.
fn prepare_disk(agent: &Agent, desired: &DesiredVm, image: &Digest) -> Result<(), LaunchError> {
    let size = desired.request.spec.resources.disk_gib << 30;
    let made_from = made_from(agent, &desired.id);
    match agent.store.open_disk(&desired.id) {
        Ok(_) => {
            let before = fs::read(&made_from).map_err(io_error("the VM's record of its disk"))?;
            let before = serde_json::from_slice(&before).map_err(|error| LaunchError::Settings(error.to_string()))?;
            if plan::replaces_disk(&before, &desired.request, &|image| agent.root_of(image)) {
                agent.store.remove_disk(&desired.id)?;
                reach(Failpoint::DiskRetired);
                agent.store.create_disk(&desired.id, image, size)?;
            } else {
                agent.store.grow_disk(&desired.id, size)?;
            }
        }
        Err(StoreError::NoDisk(_)) => {
            // Written first: a disk without its record could not be told from one that has to be replaced.
            fs::create_dir_all(agent.vm_directory(&desired.id)).map_err(io_error("the VM's directory"))?;
            record_disk(&made_from, desired)?;
            reach(Failpoint::DiskRecorded);
            agent.store.create_disk(&desired.id, image, size)?;
        }
        Err(error) => return Err(error.into()),
    }
    record_disk(&made_from, desired)
}

/// What the root disk of a VM was made from: its request then.
pub fn made_from(agent: &Agent, vm: &VmId) -> PathBuf {
    agent.vm_directory(vm).join("made-from.json")
}

fn record_disk(path: &std::path::Path, desired: &DesiredVm) -> Result<(), LaunchError> {
    let json = serde_json::to_vec(&desired.request).map_err(|error| LaunchError::Settings(error.to_string()))?;
    crate::identity::write_atomically(path, 0o600, &json).map_err(io_error("the VM's record of its disk"))
}

/// What holds secrets (password hashes) never touches a disk.
fn in_memory(name: &str, content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = fs::File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    Ok(file.into())
}

/// A process with an empty VM, and the uid that it will have.
fn start_process(agent: &Agent, desired: &DesiredVm, volumes: Vec<VolumeId>) -> Result<(Process, u32), LaunchError> {
    let directory = RuntimeDirectory::new(&agent.paths().vm_runtime(), &desired.id);
    // Until the process's record holds the uid.
    let _turn = agent.starting();
    let uid = free_uid(agent);
    let group =
        cgroup::create(&agent.host_id().mark(), &desired.id, &desired.request.spec.resources).map_err(io_error("the VM's cgroup"))?;
    reach(Failpoint::LaunchCgroupMade);
    let launch = Launch {
        program: &agent.programs.vmm,
        vm: desired.id,
        boot: desired.boot_digest(),
        resets: desired.resets,
        request: desired.request.clone(),
        uid: Some(uid),
        volumes,
        cgroup: group.as_deref(),
    };
    Ok((Process::start(&launch, &directory)?, uid))
}

/// Where the serial console's output goes, and where the process says how it ended.
pub fn records(process: &Process) -> Result<(fs::File, fs::File), LaunchError> {
    let ring = fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(process.directory.console())
        .map_err(io_error("the console's log"))?;
    log_ring::create(&ring, CONSOLE_RING).map_err(|error| LaunchError::Settings(error.to_string()))?;
    let exit_record = process.create_exit_record().map_err(io_error("the exit record"))?;
    Ok((ring, exit_record))
}

fn boot(agent: &Agent, desired: &DesiredVm, files: &Files, taps: &[OwnedFd], uid: u32, process: &mut Process) -> Result<(), LaunchError> {
    let (ring, exit_record) = records(process)?;
    let volumes: Vec<VolumeDisk> = files.volumes.iter().map(Ready::disk).collect();
    let parts = (files.initramfs.len() as u16, files.root.as_ref().map(Root::config));
    let mut config = vm::config(&desired.id, &desired.request, &agent.links(desired), parts, &volumes, desired.limits, vm::jail(uid));
    let mut descriptors: Vec<BorrowedFd<'_>> = vec![files.kvm.as_fd(), files.kernel.as_fd(), ring.as_fd(), exit_record.as_fd()];
    descriptors.extend(taps.first().map(AsFd::as_fd));
    descriptors.extend(files.initramfs.iter().map(AsFd::as_fd));
    descriptors.extend(files.root.iter().flat_map(Root::descriptors));
    descriptors.extend(files.volumes.iter().map(|ready| ready.open.file.as_fd()));
    descriptors.extend(taps.iter().skip(1).map(AsFd::as_fd));
    let by_kernel = vm::carried_by_kernel(&mut config.networks, descriptors.len());
    descriptors.extend(by_kernel.iter().map(AsFd::as_fd));
    Ok(process.boot(&config, &descriptors)?)
}

/// The lowest uid of the configured range that no VM process has.
fn free_uid(agent: &Agent) -> u32 {
    let runtime = agent.paths().vm_runtime();
    let entries = fs::read_dir(&runtime).into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<VmId>().ok());
    let used: Vec<u32> = ids.filter_map(|id| RuntimeDirectory::new(&runtime, &id).read_record()?.uid).collect();
    (agent.config().vm_uid_base..).find(|uid| !used.contains(uid)).unwrap_or(agent.config().vm_uid_base)
}

/// Removes what a run leaves behind outside the VM's own directory. What cannot be removed is logged, and `form doctor` finds it.
pub async fn clean_up(agent: &Arc<Agent>, id: &VmId, directory: &RuntimeDirectory) {
    let complain = |what: &str, error: &dyn std::fmt::Display| tracing::warn!(vm = %id, "cannot remove its {what}: {error}");
    // One that an agent started and was killed before it could write down has a copy of none of what follows, but is a process.
    process::end_strays(id).await;
    if let Err(error) = agent.network.detach(&interface::all_ids(id)).await {
        complain("tap", &error);
    }
    reach(Failpoint::CleanTapRemoved);
    keep_console(agent, id, directory);
    if let Err(error) = directory.remove() {
        complain("runtime directory", &error);
    }
    reach(Failpoint::CleanDirectoryRemoved);
    if let Err(error) = cgroup::remove(&agent.host_id().mark(), id).await {
        complain("cgroup", &error);
    }
    reach(Failpoint::CleanCgroupRemoved);
    if let Err(error) = agent.apply_rules().await {
        complain("firewall rules", &error);
    }
}

/// The serial output of the last run stays readable: it tells why a guest did not start.
fn keep_console(agent: &Agent, id: &VmId, directory: &RuntimeDirectory) {
    let kept: PathBuf = agent.log_directory(id).join("console.log");
    let copy = || -> io::Result<()> {
        let ring = log_ring::Reader::open(fs::File::open(directory.console())?).map_err(io::Error::other)?;
        let tail = ring.tail(CONSOLE_RING as usize).map_err(io::Error::other)?;
        fs::create_dir_all(agent.log_directory(id))?;
        fs::write(kept, tail.bytes)
    };
    if let Err(error) = copy()
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::debug!(vm = %id, "its console is lost: {error}");
    }
}

/// Removes the disk, the directory and the log of a VM that nobody wants any more.
pub async fn remove(agent: &Arc<Agent>, id: &VmId) -> Result<(), LaunchError> {
    let (agent, id) = (Arc::clone(agent), *id);
    tokio::task::spawn_blocking(move || {
        agent.store.remove_disk(&id)?;
        reach(Failpoint::RemoveDiskRemoved);
        agent.store.remove_snapshots(&id)?;
        // What stays of it in a pool that is away is logged, and keeps no VM from going.
        let _ = snapshot::volumes::remove_of_vm(&agent, &id);
        remove_directory(&agent.vm_directory(&id)).map_err(io_error("its directory"))?;
        reach(Failpoint::RemoveDirectoryRemoved);
        agent.remove_log(&id).map_err(io_error("its log"))?;
        reach(Failpoint::RemoveLogRemoved);
        agent.forget_disk_turn(&id);
        Ok(())
    })
    .await
    .map_err(|_| LaunchError::Stopping)?
}

fn remove_directory(path: &std::path::Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
