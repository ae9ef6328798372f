//! A VM to be measured: the real VM process, started and jailed as the agent does it.

use std::{
    cell::Cell,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use form_types::{VmId, spec::Resources};
use form_vmm::{
    config::{DiskConfig, DiskFormat, Fd, NetworkConfig, VmConfig},
    control::Client,
    log_ring,
};

use super::{BenchError, Stop, io_error, smaps};
use crate::{
    cgroup,
    driver::process::{RuntimeDirectory, spawn},
    vm,
};

/// Memory of every measured VM, in MiB.
const MEMORY_MIB: u64 = 256;
/// Bytes of the ring for serial output.
const CONSOLE: u64 = 256 << 10;
/// Size of the disk, when there is one; nothing is ever in it.
const DISK: u64 = 1 << 30;
/// The longest wait for a guest's line. Generous: software emulation is slow.
const PATIENCE: Duration = Duration::from_secs(180);
/// Between two looks at the serial output.
const LOOK: Duration = Duration::from_micros(200);

/// What a VM is made of, and where it is kept.
pub struct Setup<'a> {
    pub program: PathBuf,
    pub directory: &'a Path,
    pub uid: u32,
    pub stop: &'a Stop,
    /// Counts the VMs, to tell them apart.
    pub started: Cell<u8>,
    pub runtime: tokio::runtime::Runtime,
}

/// What runs in it.
pub struct Guest {
    pub kernel: PathBuf,
    pub initramfs: Option<PathBuf>,
    /// Disk, network, vsock, entropy and balloon, as the agent's VMs have them, or none.
    pub devices: bool,
}

/// A VM process with its guest, ended when dropped.
pub struct Machine<'a> {
    setup: &'a Setup<'a>,
    id: VmId,
    directory: RuntimeDirectory,
    child: Child,
    console: Option<log_ring::Reader>,
    begun: Instant,
}

/// What it took.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    pub time: Duration,
    /// Of the processor, in all threads of the VM process, its guest included.
    pub cpu: Duration,
}

impl<'a> Machine<'a> {
    /// Starts a VM process and its guest.
    ///
    /// # Errors
    /// When something cannot be made, or the VM process refuses.
    pub fn start(setup: &'a Setup<'a>, guest: &Guest) -> Result<Self, BenchError> {
        let number = setup.started.get().wrapping_add(1);
        setup.started.set(number);
        let id = VmId::from_bytes([number; 16]);
        let directory = RuntimeDirectory::new(setup.directory, &id);
        fs::create_dir_all(directory.path()).map_err(io_error("make a directory"))?;
        let files = Files::open(guest, &directory, setup.uid)?;
        let resources = Resources { vcpus: 1, memory_mib: MEMORY_MIB, disk_gib: 1, gpus: Vec::new() };
        let group = cgroup::create(&mark(), &id, &resources).map_err(io_error("make a cgroup"))?;
        let begun = Instant::now();
        let child = spawn(&setup.program, &directory).map_err(|error| BenchError::Machine(error.to_string()))?;
        // From here on dropping it ends the process.
        let mut machine = Self { setup, id, directory, child, console: None, begun };
        if let Some(group) = group {
            fs::write(group.join("cgroup.procs"), machine.child.id().to_string()).map_err(io_error("fill a cgroup"))?;
        }
        let client = Client::connect(&machine.directory.control()).map_err(|error| machine.refused(&error))?;
        let descriptors: Vec<_> = files.descriptors.iter().map(AsFd::as_fd).collect();
        client.boot(&files.config, &descriptors).map_err(|error| machine.refused(&error))?;
        let ring = fs::File::open(machine.directory.console()).map_err(io_error("open the console"))?;
        machine.console = Some(log_ring::Reader::open(ring).map_err(|error| BenchError::Machine(error.to_string()))?);
        Ok(machine)
    }

    fn refused(&self, error: &dyn std::fmt::Display) -> BenchError {
        BenchError::Machine(format!("{error} {}", self.directory.last_words()).trim_end().to_owned())
    }

    fn printed(&self) -> String {
        let tail = self.console.as_ref().and_then(|console| console.tail(4096).ok());
        tail.map_or_else(String::new, |tail| String::from_utf8_lossy(&tail.bytes).into_owned())
    }

    /// Waits until the guest has said `line`.
    ///
    /// # Errors
    /// When the VM ends before, or takes too long.
    pub fn wait_for(&mut self, line: &str) -> Result<Spent, BenchError> {
        loop {
            if self.printed().contains(line) {
                let time = self.begun.elapsed();
                return Ok(Spent { time, cpu: cpu_time(self.child.id())? });
            }
            self.setup.stop.check()?;
            let ended = self.child.try_wait().map_err(io_error("wait for the VM process"))?;
            if ended.is_some() || self.begun.elapsed() > PATIENCE {
                let what = if ended.is_some() { "ended" } else { "said nothing for minutes" };
                let words = format!("{}{}", self.printed(), self.directory.last_words());
                return Err(BenchError::Guest { what, words: words.trim().to_owned() });
            }
            std::thread::sleep(LOOK);
        }
    }

    /// What the VM process has in memory beside its guest's.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn memory(&self) -> Result<smaps::Resident, BenchError> {
        let text = fs::read_to_string(format!("/proc/{}/smaps", self.child.id())).map_err(io_error("read the VM process's memory"))?;
        Ok(smaps::outside_guest(&text, MEMORY_MIB << 20)?)
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Err(error) = self.setup.runtime.block_on(cgroup::remove(&mark(), &self.id)) {
            eprintln!("form-agent: a cgroup of the measurement is left: {error}");
        }
        let _ = self.directory.remove();
    }
}

/// In the names of this process's cgroups.
fn mark() -> String {
    format!("bench-{}", std::process::id())
}

/// The time that all threads of a process had on a processor, to the nanosecond (`/proc/PID/task/TID/schedstat`, first number).
fn cpu_time(pid: u32) -> Result<Duration, BenchError> {
    let read = || -> io::Result<u64> {
        let mut sum = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let text = fs::read_to_string(task?.path().join("schedstat"))?;
            sum += text.split_ascii_whitespace().next().and_then(|word| word.parse::<u64>().ok()).ok_or(io::ErrorKind::InvalidData)?;
        }
        Ok(sum)
    };
    match read().map_err(io_error("read the VM process's time"))? {
        0 => Err(BenchError::Machine("this kernel does not count the time of processes (CONFIG_SCHED_INFO)".to_owned())),
        nanoseconds => Ok(Duration::from_nanos(nanoseconds)),
    }
}

/// Everything that a VM process is given.
struct Files {
    config: VmConfig,
    descriptors: Vec<OwnedFd>,
}

impl Files {
    fn open(guest: &Guest, directory: &RuntimeDirectory, uid: u32) -> Result<Self, BenchError> {
        let mut descriptors: Vec<OwnedFd> = Vec::new();
        let mut add = |file: OwnedFd| {
            descriptors.push(file);
            Fd(descriptors.len() as u16 - 1)
        };
        let read = |path: &Path| fs::File::open(path).map_err(io_error(path.display().to_string()));
        let made = |path: PathBuf| {
            let options = fs::File::options().read(true).write(true).create(true).truncate(true).clone();
            options.open(&path).map_err(io_error(path.display().to_string()))
        };
        let kvm = fs::File::options().read(true).write(true).open("/dev/kvm").map_err(io_error("open /dev/kvm"))?;
        let ring = made(directory.console())?;
        log_ring::create(&ring, CONSOLE).map_err(|error| BenchError::Machine(error.to_string()))?;
        let mut config = VmConfig {
            vcpus: 1,
            memory_mib: MEMORY_MIB,
            kvm: add(kvm.into()),
            kernel: add(read(&guest.kernel)?.into()),
            initramfs: Vec::new(),
            cmdline: vm::CMDLINE.to_owned(),
            disks: Vec::new(),
            networks: Vec::new(),
            vsock_cid: None,
            rng: guest.devices,
            balloon: guest.devices,
            console_log: Some(add(ring.into())),
            exit_record: Some(add(made(directory.path().join("exit.json"))?.into())),
            jail: vm::jail(uid),
        };
        if let Some(initramfs) = &guest.initramfs {
            config.initramfs.push(add(read(initramfs)?.into()));
        }
        if guest.devices {
            let disk = made(directory.path().join("disk"))?;
            disk.set_len(DISK).map_err(io_error("make a disk"))?;
            let tap = form_net::tap::open(&format!("fbench{}", std::process::id() % 1_000_000_000))?;
            let (file, tap) = (add(disk.into()), add(tap));
            let serial = "bench".to_owned();
            let disk = DiskConfig { id: "root".to_owned(), serial, format: DiskFormat::Raw, file, backing: Vec::new(), read_only: false };
            config.disks.push(disk);
            config.networks.push(NetworkConfig { id: "eth0".to_owned(), tap, mac: [2, 0, 0, 0, 0, 1], mtu: form_net::MTU });
            config.vsock_cid = Some(vm::GUEST_CID);
        }
        Ok(Self { config, descriptors })
    }
}
