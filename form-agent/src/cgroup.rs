//! One cgroup (v2) a VM: what it may use of the host, and one place that holds all its threads. `docs.kernel.org/admin-guide/cgroup-v2`.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use form_types::{VmId, spec::Resources};

use crate::vm::most_vcpus;

const ROOT: &str = "/sys/fs/cgroup";

/// Memory of a VM process outside its guest's, in bytes: what the VMM needs, and some cache of the disk file.
const OVERHEAD: u64 = 128 << 20;

/// Threads beside one for each vCPU that it can have.
const THREADS: u32 = 64;

fn parent(mark: &str) -> PathBuf {
    Path::new(ROOT).join(format!("form-{mark}"))
}

/// Whether cgroups are the unified hierarchy (v2) with the controllers we use.
pub fn is_available() -> bool {
    let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).unwrap_or_default();
    ["cpu", "memory", "pids"].iter().all(|wanted| controllers.split_whitespace().any(|controller| controller == *wanted))
}

/// The VM's cgroup with its limits; none on a host without cgroup v2 (`form doctor` says so).
pub fn create(mark: &str, vm: &VmId, resources: &Resources) -> io::Result<Option<PathBuf>> {
    if !is_available() {
        return Ok(None);
    }
    let parent = parent(mark);
    fs::create_dir_all(&parent)?;
    for directory in [Path::new(ROOT), &parent] {
        fs::write(directory.join("cgroup.subtree_control"), "+cpu +memory +pids")?;
    }
    let group = parent.join(vm.to_string());
    fs::create_dir_all(&group)?;
    fs::write(group.join("memory.max"), limit(resources.memory_mib).to_string())?;
    fs::write(group.join("pids.max"), (u32::from(most_vcpus(resources.vcpus)) + THREADS).to_string())?;
    fs::write(group.join("cpu.max"), cpu_limit(resources.vcpus))?;
    Ok(Some(group))
}

/// Time of the host's processors in each tenth of a second, in microseconds: half a processor for what is no vCPU.
fn cpu_limit(vcpus: u32) -> String {
    format!("{} 100000", u64::from(vcpus) * 100_000 + 50_000)
}

/// The VM that runs has so many vCPUs from now on. Nothing where there are no cgroups.
///
/// # Errors
/// When the limit cannot be changed.
pub fn set_vcpus(mark: &str, vm: &VmId, vcpus: u32) -> io::Result<()> {
    let file = parent(mark).join(vm.to_string()).join("cpu.max");
    if file.exists() { fs::write(file, cpu_limit(vcpus)) } else { Ok(()) }
}

/// Memory of the VM's processes, in bytes.
const fn limit(memory_mib: u64) -> u64 {
    (memory_mib << 20) + OVERHEAD
}

/// VMs that may have their memory twice now. Their limits are left alone meanwhile.
static DOUBLED: Mutex<BTreeSet<VmId>> = Mutex::new(BTreeSet::new());

fn doubled() -> MutexGuard<'static, BTreeSet<VmId>> {
    DOUBLED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A VM that runs may have so much from now on. `false`: not yet, since it may have its memory twice for now.
///
/// # Errors
/// When the limit cannot be changed.
pub fn set_memory(mark: &str, vm: &VmId, memory_mib: u64) -> io::Result<bool> {
    let doubled = doubled();
    if doubled.contains(vm) {
        return Ok(false);
    }
    let file = parent(mark).join(vm.to_string()).join("memory.max");
    if file.exists() {
        fs::write(file, limit(memory_mib).to_string())?;
    }
    Ok(true)
}

/// As long as this is there, the VM's processes may have its memory twice: a copy of the process writes it while the VM goes on.
#[derive(Debug)]
pub struct Twice {
    vm: VmId,
    file: PathBuf,
    usual: u64,
}

impl Twice {
    /// `memory_mib` is what the VM has.
    ///
    /// # Errors
    /// When the limit cannot be changed.
    pub fn allow(mark: &str, vm: &VmId, memory_mib: u64) -> io::Result<Self> {
        let file = parent(mark).join(vm.to_string()).join("memory.max");
        let mut doubled = doubled();
        if file.exists() {
            fs::write(&file, limit(memory_mib * 2).to_string())?;
        }
        doubled.insert(*vm);
        Ok(Self { vm: *vm, file, usual: limit(memory_mib) })
    }
}

impl Drop for Twice {
    fn drop(&mut self) {
        doubled().remove(&self.vm);
        if self.file.exists()
            && let Err(error) = fs::write(&self.file, self.usual.to_string())
        {
            tracing::warn!(file = %self.file.display(), %error, "a VM may use twice its memory until it is started again");
        }
    }
}

/// Whether the VM has a cgroup.
pub fn exists(mark: &str, vm: &VmId) -> bool {
    parent(mark).join(vm.to_string()).exists()
}

/// Processor time that the VM's cgroup has taken, in microseconds; none where there are no cgroups.
pub fn cpu_us(mark: &str, vm: &VmId) -> Option<u64> {
    let stat = fs::read_to_string(parent(mark).join(vm.to_string()).join("cpu.stat")).ok()?;
    stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?.trim().parse().ok()
}

/// Removes the VM's cgroup, and ours when it was the last. A process that has just ended may hold it for a moment.
pub async fn remove(mark: &str, vm: &VmId) -> io::Result<()> {
    let group = parent(mark).join(vm.to_string());
    for attempt in 1.. {
        match fs::remove_dir(&group) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) if attempt == 20 => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    // Fails while other VMs have theirs in it, and that is right.
    let _ = fs::remove_dir(parent(mark));
    Ok(())
}

/// Cgroups of this agent that belong to no VM in `known`.
pub fn leftovers(mark: &str, known: &[VmId]) -> Vec<VmId> {
    let entries = fs::read_dir(parent(mark)).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|id| !known.contains(id)).collect()
}
