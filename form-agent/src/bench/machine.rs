//! A VM to be measured: the real VM process, started and jailed as the agent does it.

use std::{
    cell::Cell,
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Child,
    time::{Duration, Instant},
};

use form_types::{VmId, spec::Resources};
use form_vmm::{
    config::{DiskConfig, DiskFormat, DiskLimits, Fd, NetworkConfig, RestoreConfig, VmConfig},
    control::{Client, ClientError, SaveHow},
    log_ring,
};

use super::{BenchError, Stop, io_error, smaps};
use crate::{
    cgroup,
    driver::process::{RuntimeDirectory, spawn},
    snapshot::precopy::rounds,
    vm,
};

/// Memory of a measured VM where nothing else is said, in MiB.
pub const MEMORY_MIB: u64 = 256;
/// Bytes of the ring for serial output.
const CONSOLE: u64 = 256 << 10;
/// Size of the disk, when there is one; nothing is ever in it.
const DISK: u64 = 1 << 30;
/// The longest wait for a guest's line. Generous: software emulation is slow.
const PATIENCE: Duration = Duration::from_secs(180);
/// Of the guest's network interface.
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The disk that comes and goes.
const HOTPLUG: &str = "hotplug";
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
    /// Disks beside that one.
    pub disks: Vec<OtherDisk>,
    /// The host's kernel moves its packets (vhost-net), and not the VM process.
    pub vhost: bool,
    pub memory_mib: u64,
    /// What its cgroup allows it: more where it is saved to files, which may lie in memory and count as its own.
    pub limit_mib: u64,
}

/// One of those.
pub struct OtherDisk {
    /// Its id too.
    pub serial: &'static str,
    pub format: DiskFormat,
    pub read_only: bool,
    pub file: fs::File,
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
        let (id, directory) = place(setup)?;
        let files = Files::open(guest, &directory, setup.uid)?;
        let descriptors: Vec<_> = files.descriptors.iter().map(AsFd::as_fd).collect();
        Self::begin(setup, id, directory, guest.limit_mib, |client| client.boot(&files.config, &descriptors))
    }

    /// Starts a VM process that goes on with a saved VM.
    ///
    /// # Errors
    /// As [`Machine::start`].
    pub fn restore(setup: &'a Setup<'a>, saved: &Saved) -> Result<Self, BenchError> {
        let (id, directory) = place(setup)?;
        let read = |path: &Path| fs::File::open(path).map_err(io_error(path.display().to_string()));
        let kvm = open_kvm()?;
        let (state, memory) = (read(&saved.state)?, read(&saved.memory)?);
        let (ring, exit) = records(&directory)?;
        let config = RestoreConfig {
            kvm: Fd(0),
            state: Fd(1),
            memory: Fd(2),
            disks: Vec::new(),
            networks: Vec::new(),
            vsock_cid: None,
            rng: false,
            balloon: false,
            console_log: Some(Fd(3)),
            exit_record: Some(Fd(4)),
            jail: vm::jail(setup.uid),
            resume: true,
            track: false,
        };
        let descriptors = [&kvm, &state, &memory, &ring, &exit].map(AsFd::as_fd);
        Self::begin(setup, id, directory, saved.memory_mib, |client| client.restore(&config, &descriptors))
    }

    /// Starts a VM process in the cgroup of a VM with `limit_mib` of memory, and has it do `first`.
    fn begin(
        setup: &'a Setup<'a>,
        id: VmId,
        directory: RuntimeDirectory,
        limit_mib: u64,
        first: impl FnOnce(&Client) -> Result<(), ClientError>,
    ) -> Result<Self, BenchError> {
        let resources = Resources { vcpus: 1, memory_mib: limit_mib, disk_gib: 1, gpus: Vec::new() };
        let group = cgroup::create(&mark(), &id, &resources).map_err(io_error("make a cgroup"))?;
        let begun = Instant::now();
        let child = spawn(&setup.program, &directory).map_err(|error| BenchError::Machine(error.to_string()))?;
        // From here on dropping it ends the process.
        let mut machine = Self { setup, id, directory, child, console: None, begun };
        if let Some(group) = group {
            fs::write(group.join("cgroup.procs"), machine.child.id().to_string()).map_err(io_error("fill a cgroup"))?;
        }
        let client = Client::connect(&machine.directory.control()).map_err(|error| machine.refused(&error))?;
        first(&client).map_err(|error| machine.refused(&error))?;
        let ring = fs::File::open(machine.directory.console()).map_err(io_error("open the console"))?;
        machine.console = Some(log_ring::Reader::open(ring).map_err(|error| BenchError::Machine(error.to_string()))?);
        Ok(machine)
    }

    fn refused(&self, error: &dyn std::fmt::Display) -> BenchError {
        BenchError::Machine(format!("{error} {}", self.directory.last_words()).trim_end().to_owned())
    }

    /// The end of what the guest has said on its console.
    pub fn printed(&self) -> String {
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

    /// Gives the guest a disk, and asks for it back. What each took until it was done.
    ///
    /// # Errors
    /// When the VM process refuses, or the guest takes too long.
    pub fn hotplug(&self) -> Result<(Spent, Spent), BenchError> {
        let failed = |error: ClientError| self.refused(&error);
        let path = self.directory.path().join("hotplug");
        let file = fs::File::options().read(true).write(true).create_new(true).open(&path).map_err(io_error("make a disk"))?;
        file.set_len(DISK).map_err(io_error("make a disk"))?;
        let disk = DiskConfig {
            id: HOTPLUG.to_owned(),
            serial: HOTPLUG.to_owned(),
            format: DiskFormat::Raw,
            file: Fd(0),
            backing: Vec::new(),
            read_only: false,
            limits: DiskLimits::default(),
        };
        let client = Client::connect(&self.directory.control()).map_err(failed)?;
        let came = self.spent(|| {
            client.plug(&disk, &[file.as_fd()]).map_err(failed)?;
            drop(file);
            // Its kernel looks for partitions as soon as it has it.
            let until = Instant::now() + PATIENCE;
            while !client.metrics().map_err(failed)?.disks.iter().any(|disk| disk.id == HOTPLUG && disk.reads > 0) {
                if Instant::now() > until {
                    return Err(BenchError::Guest { what: "did not take a disk", words: self.printed() });
                }
                std::thread::sleep(LOOK);
            }
            Ok(())
        })?;
        let went = self.spent(|| {
            let gone = client.unplug(HOTPLUG).map_err(failed)?;
            // Nothing is ever written to it.
            io::copy(&mut fs::File::from(gone), &mut io::sink()).map(|_| ()).map_err(io_error("wait for a disk to be let go"))
        })?;
        Ok((came, went))
    }

    /// How long the VM stands for its memory and devices to be saved, most of which is copied before. It is ended afterwards, whatever of its memory
    /// is written then.
    ///
    /// # Errors
    /// When the VM process refuses.
    pub fn pause(&self) -> Result<Spent, BenchError> {
        let failed = |error: ClientError| self.refused(&error);
        let (state, memory) = (create(&self.directory.path().join("state"))?, create(&self.directory.path().join("memory"))?);
        let client = Client::connect(&self.directory.control()).map_err(failed)?;
        if let Some(why) = rounds(&client, memory.as_fd(), false, |_, _| ()).map_err(failed)? {
            return Err(BenchError::Machine(format!("its memory was not copied before: {why}")));
        }
        // Who writes what is left is another thread, and the VM does not stand for it.
        let (begun, before) = (Instant::now(), times(self.child.id())?);
        client.pause().map_err(failed)?;
        client.save_aside(state.as_fd(), memory.as_fd(), SaveHow { onto: true, track: false }).map_err(failed)?;
        client.resume().map_err(failed)?;
        let (time, after) = (begun.elapsed(), times(self.child.id())?);
        let both = before.iter().filter_map(|(thread, before)| Some(after.get(thread)?.saturating_sub(*before)));
        Ok(Spent { time, cpu: both.sum() })
    }

    /// Pauses the VM and writes memory and devices to files that stay when it is gone. What that took, until the files were whole. With
    /// `track` what changes then is noted.
    ///
    /// # Errors
    /// When the VM process refuses.
    pub fn save(&self, memory_mib: u64, track: bool) -> Result<(Saved, Spent), BenchError> {
        let failed = |error: ClientError| self.refused(&error);
        let place = |name: &str| self.setup.directory.join(format!("{name}-{}", self.id));
        let saved = Saved { state: place("state"), memory: place("memory"), memory_mib };
        let (state, memory) = (create(&saved.state)?, create(&saved.memory)?);
        let client = Client::connect(&self.directory.control()).map_err(failed)?;
        let spent = self.spent(|| {
            client.pause().map_err(failed)?;
            client.save(state.as_fd(), memory.as_fd(), SaveHow { onto: false, track }).map_err(failed).map(|_| ())
        })?;
        Ok((saved, spent))
    }

    /// Lets the VM that was `saved` go on, and writes what has changed a moment later upon a copy of its file. What that took, without the copy.
    ///
    /// # Errors
    /// When the VM process refuses, or writes all of it.
    pub fn save_upon(&self, saved: &Saved) -> Result<Spent, BenchError> {
        let failed = |error: ClientError| self.refused(&error);
        let client = Client::connect(&self.directory.control()).map_err(failed)?;
        client.resume().map_err(failed)?;
        let later = self.directory.path().join("memory");
        fs::copy(&saved.memory, &later).map_err(io_error("copy a memory file"))?;
        let memory = fs::File::options().read(true).write(true).open(&later).map_err(io_error("open a memory file"))?;
        let state = create(&self.directory.path().join("state"))?;
        let spent = self.spent(|| {
            client.pause().map_err(failed)?;
            let how = client.save(state.as_fd(), memory.as_fd(), SaveHow { onto: true, track: true }).map_err(failed)?;
            if how.incremental { Ok(()) } else { Err(BenchError::Machine("all of the memory was written again".to_owned())) }
        })?;
        fs::remove_file(&later).map_err(io_error("remove a memory file"))?;
        Ok(spent)
    }

    fn spent(&self, act: impl FnOnce() -> Result<(), BenchError>) -> Result<Spent, BenchError> {
        let (begun, before) = (Instant::now(), cpu_time(self.child.id())?);
        act()?;
        // The block device's own thread ends with it, and takes its time along.
        Ok(Spent { time: begun.elapsed(), cpu: cpu_time(self.child.id())?.saturating_sub(before) })
    }

    /// Switches the host's end of its network on. Gives its index.
    ///
    /// # Errors
    /// When the kernel refuses, or the guest has no network.
    pub fn tap_up(&self) -> Result<u32, BenchError> {
        Ok(self.setup.runtime.block_on(form_net::tap::up(&tap_name()))?)
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

/// The files of a saved VM, gone when dropped.
pub struct Saved {
    state: PathBuf,
    memory: PathBuf,
    memory_mib: u64,
}

impl Drop for Saved {
    fn drop(&mut self) {
        for path in [&self.state, &self.memory] {
            // Else they go with the directory of all of it.
            let _ = fs::remove_file(path);
        }
    }
}

fn create(path: &Path) -> Result<fs::File, BenchError> {
    fs::File::options().read(true).write(true).create_new(true).open(path).map_err(io_error("make a file"))
}

/// An id and a directory for the next VM.
fn place(setup: &Setup<'_>) -> Result<(VmId, RuntimeDirectory), BenchError> {
    let number = setup.started.get().wrapping_add(1);
    setup.started.set(number);
    let id = VmId::from_bytes([number; 16]);
    let directory = RuntimeDirectory::new(setup.directory, &id);
    fs::create_dir_all(directory.path()).map_err(io_error("make a directory"))?;
    Ok((id, directory))
}

fn open_kvm() -> Result<fs::File, BenchError> {
    fs::File::options().read(true).write(true).open("/dev/kvm").map_err(io_error("open /dev/kvm"))
}

fn made(path: &Path) -> Result<fs::File, BenchError> {
    let options = fs::File::options().read(true).write(true).create(true).truncate(true).clone();
    options.open(path).map_err(io_error(path.display().to_string()))
}

/// The ring for serial output, and the exit record.
fn records(directory: &RuntimeDirectory) -> Result<(fs::File, fs::File), BenchError> {
    let ring = made(&directory.console())?;
    log_ring::create(&ring, CONSOLE).map_err(|error| BenchError::Machine(error.to_string()))?;
    Ok((ring, made(&directory.path().join("exit.json"))?))
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

/// The host's end of the guest's network.
fn tap_name() -> String {
    format!("fbench{}", std::process::id() % 1_000_000_000)
}

/// In the names of this process's cgroups.
fn mark() -> String {
    format!("bench-{}", std::process::id())
}

/// The time that all threads of a process had on a processor.
fn cpu_time(pid: u32) -> Result<Duration, BenchError> {
    Ok(times(pid)?.into_values().sum())
}

/// The time that each thread of a process had on a processor, to the nanosecond (`/proc/PID/task/TID/schedstat`, first number).
fn times(pid: u32) -> Result<HashMap<PathBuf, Duration>, BenchError> {
    let time = |task: &Path| -> io::Result<Duration> {
        let text = fs::read_to_string(task.join("schedstat"))?;
        let nanoseconds = text.split_ascii_whitespace().next().and_then(|word| word.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Duration::from_nanos(nanoseconds))
    };
    let read = || -> io::Result<HashMap<PathBuf, Duration>> {
        let mut times = HashMap::new();
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?.path();
            match time(&task) {
                Ok(time) => drop(times.insert(task, time)),
                // A thread that has just ended.
                Err(_) if !task.exists() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(times)
    };
    let times = read().map_err(io_error("read the VM process's time"))?;
    if times.values().all(Duration::is_zero) {
        return Err(BenchError::Machine("this kernel does not count the time of processes (CONFIG_SCHED_INFO)".to_owned()));
    }
    Ok(times)
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
        let kvm = open_kvm()?;
        let (ring, exit) = records(directory)?;
        let mut config = VmConfig {
            vcpus: 1,
            most_vcpus: Some(vm::most_vcpus(1)),
            memory_mib: guest.memory_mib,
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
            exit_record: Some(add(exit.into())),
            jail: vm::jail(uid),
        };
        if let Some(initramfs) = &guest.initramfs {
            config.initramfs.push(add(read(initramfs)?.into()));
        }
        if guest.devices {
            let disk = made(&directory.path().join("disk"))?;
            disk.set_len(DISK).map_err(io_error("make a disk"))?;
            let tap = form_net::tap::open(&tap_name())?;
            let (file, tap) = (add(disk.into()), add(tap));
            let serial = "bench".to_owned();
            let disk = DiskConfig {
                id: "root".to_owned(),
                serial,
                format: DiskFormat::Raw,
                file,
                backing: Vec::new(),
                read_only: false,
                limits: DiskLimits::default(),
            };
            config.disks.push(disk);
            for other in &guest.disks {
                let file = add(other.file.try_clone().map_err(io_error("pass a disk on"))?.into());
                let (id, serial) = (other.serial.to_owned(), other.serial.to_owned());
                let limits = DiskLimits::default();
                config.disks.push(DiskConfig {
                    id,
                    serial,
                    format: other.format,
                    file,
                    backing: Vec::new(),
                    read_only: other.read_only,
                    limits,
                });
            }
            let vhost = form_net::tap::vhost().filter(|_| guest.vhost).map(&mut add);
            config.networks.push(NetworkConfig { id: "eth0".to_owned(), tap, vhost, mac: MAC, mtu: form_net::MTU, bytes_per_second: None });
            config.vsock_cid = Some(vm::GUEST_CID);
        }
        Ok(Self { config, descriptors })
    }
}
