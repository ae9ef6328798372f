//! A VM process under test, with the daemon's files around it.

use std::cell::{Cell, RefCell};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use form_vmm::config::{DiskConfig, DiskFormat, DiskLimits, Fd, JailConfig, NetworkConfig, RestoreConfig, VmConfig};
use form_vmm::control::{Client, ClientError, ExitRecord, Metrics, launch};
use form_vmm::log_ring;
use imago::{FormatCreateBuilder, file::File as Storage, qcow2::Qcow2};

use crate::guest;

/// What a guest may take for anything, under software emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Clone)]
pub struct Shape {
    pub script: String,
    pub cmdline: &'static str,
    pub vcpus: u8,
    pub most_vcpus: Option<u8>,
    pub memory_mib: u64,
    pub disk_mib: Option<u64>,
    /// The disk lies on a file system on a device (ext4), whose reads wait, and not where temporary files are.
    pub on_device: bool,
    /// A second disk, in qcow2.
    pub qcow2_mib: Option<u64>,
    pub tap: Option<&'static str>,
    /// Has the host's kernel move packets, when the host can.
    pub vhost: bool,
    pub vsock: bool,
    pub rng: bool,
    pub balloon: bool,
    pub user: Option<u32>,
    /// Instead of the real kernel.
    pub kernel_bytes: Option<&'static [u8]>,
}

/// A small guest that runs `script`.
pub fn shape(script: &str) -> Shape {
    Shape {
        script: script.to_owned(),
        cmdline: "",
        vcpus: 1,
        most_vcpus: None,
        memory_mib: 256,
        disk_mib: None,
        on_device: false,
        qcow2_mib: None,
        tap: None,
        vhost: true,
        vsock: false,
        rng: false,
        balloon: false,
        user: None,
        kernel_bytes: None,
    }
}

pub struct Vm {
    directory: tempfile::TempDir,
    child: RefCell<Child>,
    client: Client,
    ended: Cell<Option<ExitStatus>>,
}

impl Vm {
    /// A VM process that waits for its configuration.
    pub fn spawn() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control");
        let listener = launch::listen(&socket).unwrap();
        let program = Path::new(env!("CARGO_BIN_EXE_form-vmm"));
        let child = launch::command(program, listener).spawn().unwrap();
        let client = Client::connect(&socket).unwrap().with_timeout(Duration::from_secs(60));
        Vm { directory, child: RefCell::new(child), client, ended: Cell::new(None) }
    }

    /// Boots and waits for the first line of the script's output. A nested guest hangs now and then under software emulation, with
    /// any VMM: one retry, said aloud.
    pub fn boot(shape: &Shape) -> Self {
        let shape = &Shape { script: format!("echo INIT-RUNS\n{}", shape.script), ..shape.clone() };
        for attempt in 1..=2 {
            let vm = Vm::spawn();
            vm.try_boot(shape).unwrap();
            if vm.wait_for(|| vm.log().contains("INIT-RUNS")) {
                return vm;
            }
            eprintln!("RETRY: attempt {attempt}: the guest did not reach its init within {PATIENCE:?}; its log:\n{}", vm.log());
        }
        panic!("the guest did not reach its init twice");
    }

    pub fn try_boot(&self, shape: &Shape) -> Result<(), ClientError> {
        let (config, fds) = parts(shape, self.directory.path(), true);
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        self.client.boot(&config, &borrowed)
    }

    /// A process that goes on with what `saved` left behind.
    pub fn restore(saved: &Vm, shape: &Shape, state: &File, memory: &File, resume: bool, track: bool) -> Result<Self, ClientError> {
        let vm = Vm::spawn();
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut add = |file: File| {
            fds.push(file.into());
            Fd(fds.len() as u16 - 1)
        };
        let own = vm.directory.path();
        let config = RestoreConfig {
            kvm: add(open_kvm()),
            state: add(state.try_clone().unwrap()),
            memory: add(memory.try_clone().unwrap()),
            disks: disks(shape, saved.directory.path(), &mut add),
            networks: networks(shape, &mut add),
            vsock_cid: shape.vsock.then_some(4),
            rng: shape.rng,
            balloon: shape.balloon,
            console_log: Some(add(log_file(own))),
            exit_record: Some(add(file(own, "record", &[]))),
            jail: jail(shape, true),
            resume,
            track,
        };
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        vm.client.restore(&config, &borrowed)?;
        Ok(vm)
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A further connection.
    pub fn connect(&self) -> Client {
        Client::connect(&self.directory.path().join("control")).unwrap()
    }

    pub fn console(&self) -> Console {
        Console(UnixStream::from(self.client.console().unwrap()))
    }

    /// What the guest has printed.
    pub fn log(&self) -> String {
        let reader = log_ring::Reader::open(File::open(self.directory.path().join("log")).unwrap()).unwrap();
        String::from_utf8_lossy(&reader.read(0, usize::MAX).unwrap().bytes).into_owned()
    }

    pub fn await_line(&self, text: &str) {
        self.await_log(text, |log| log.contains(text));
    }

    pub fn await_log(&self, what: &str, seen: impl Fn(&str) -> bool) {
        let seen = self.wait_for(|| seen(&self.log()));
        assert!(seen, "the guest did not print {what} (process: {:?}):\n{}", self.ended.get(), self.log());
    }

    pub fn await_metric(&self, what: &str, seen: impl Fn(&Metrics) -> bool) {
        assert!(self.wait_for(|| seen(&self.client.metrics().unwrap())), "no {what}: {:?}", self.client.metrics());
    }

    pub fn await_disk_reads(&self, count: u64) {
        self.await_metric("further disk reads", |metrics| metrics.disks[0].reads >= count);
    }

    pub fn disk_bytes(&self) -> Vec<u8> {
        fs::read(self.directory.path().join("disk")).unwrap()
    }

    pub fn kill(&self) {
        self.child.borrow_mut().kill().unwrap();
    }

    /// Waits for the process to end; returns how, and its record unless that is empty.
    pub fn wait(&self) -> (ExitStatus, Option<ExitRecord>) {
        assert!(self.wait_for(|| self.has_ended()), "the VM process did not end; its log:\n{}", self.log());
        let record = fs::read(self.directory.path().join("record")).unwrap();
        let record = (!record.is_empty()).then(|| serde_json::from_slice(&record).unwrap());
        (self.ended.get().unwrap(), record)
    }

    /// The kernel's own view of every thread of the process: no privileges, a filter, and nothing to see.
    /// Whether the host's kernel moves its packets; `None` when it cannot.
    pub fn carrier(&self) -> Option<bool> {
        self.client().metrics().unwrap().networks[0].vhost_net
    }

    pub fn assert_jailed(&self, user: u32) {
        let process = format!("/proc/{}", self.child.borrow().id());
        let mut names = Vec::new();
        for thread in fs::read_dir(format!("{process}/task")).unwrap() {
            let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
            let field = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
                line[name.len()..].split_whitespace().map(str::to_owned).collect::<Vec<_>>()
            };
            names.push(field("Name:").concat());
            assert_eq!(field("Uid:"), vec![user.to_string(); 4], "{status}");
            assert_eq!(field("Gid:"), vec![user.to_string(); 4], "{status}");
            assert!(field("Groups:").is_empty(), "{status}");
            assert_eq!(field("Seccomp:"), ["2"], "{status}");
            assert_eq!(field("NoNewPrivs:"), ["1"], "{status}");
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
                assert_eq!(field(set), ["0000000000000000"], "{status}");
            }
        }
        assert!(names.iter().any(|name| name == "vcpu0") && names.len() >= 4, "{names:?}");
        assert_eq!(fs::read_dir(format!("{process}/root")).unwrap().count(), 0, "the VM process sees files");
        for namespace in ["net", "mnt", "ipc", "uts"] {
            let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{namespace}")).unwrap();
            assert_ne!(of(&self.child.borrow().id().to_string()), of("self"), "{namespace}");
        }
        let open: Vec<_> = fs::read_dir(format!("{process}/fd"))
            .unwrap()
            .map(|fd| fs::read_link(fd.unwrap().path()).unwrap().to_string_lossy().into_owned())
            .collect();
        // Kernel and initramfs are loaded: their descriptors are closed.
        assert!(!open.iter().any(|path| path.ends_with("/base") || path.ends_with("/init") || path.contains("vmlinux")), "{open:?}");
    }

    fn has_ended(&self) -> bool {
        if self.ended.get().is_none() {
            self.ended.set(self.child.borrow_mut().try_wait().unwrap());
        }
        self.ended.get().is_some()
    }

    /// Asks until it is so, the process has ended, or patience has.
    fn wait_for(&self, done: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        loop {
            let ended = self.has_ended();
            if done() {
                return true;
            }
            if ended || start.elapsed() > PATIENCE {
                return false;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Configuration and descriptors of a VM that runs in this very process, without a jail.
pub fn standalone_parts(shape: &Shape) -> (VmConfig, Vec<OwnedFd>) {
    let directory = tempfile::tempdir().unwrap();
    // The files live on through their descriptors.
    parts(shape, directory.path(), false)
}

fn parts(shape: &Shape, directory: &Path, jailed: bool) -> (VmConfig, Vec<OwnedFd>) {
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut add = |file: File| {
        fds.push(file.into());
        Fd(fds.len() as u16 - 1)
    };
    let kernel = match shape.kernel_bytes {
        Some(bytes) => file(directory, "kernel", bytes),
        None => File::open(guest::kernel()).unwrap(),
    };
    let [base, init] = guest::initramfs(&shape.script, shape.vsock);
    let config = VmConfig {
        vcpus: shape.vcpus,
        most_vcpus: shape.most_vcpus,
        memory_mib: shape.memory_mib,
        kvm: add(open_kvm()),
        kernel: add(kernel),
        initramfs: vec![add(file(directory, "base", &base)), add(file(directory, "init", &init))],
        cmdline: format!("console=ttyS0 quiet panic=-1 {}", shape.cmdline),
        disks: disks(shape, directory, &mut add),
        networks: networks(shape, &mut add),
        vsock_cid: shape.vsock.then_some(3),
        rng: shape.rng,
        balloon: shape.balloon,
        console_log: Some(add(log_file(directory))),
        exit_record: Some(add(file(directory, "record", &[]))),
        jail: jail(shape, jailed),
    };
    (config, fds)
}

fn open_kvm() -> File {
    File::options().read(true).write(true).open("/dev/kvm").unwrap()
}

fn log_file(directory: &Path) -> File {
    let log = file(directory, "log", &[]);
    log_ring::create(&log, 256 * 1024).unwrap();
    log
}

fn jail(shape: &Shape, jailed: bool) -> JailConfig {
    let root = rustix::process::geteuid().is_root();
    JailConfig { uid: shape.user, gid: shape.user, namespaces: jailed && root, seccomp: jailed, landlock: jailed }
}

/// The disks of `shape` in `directory`, made when they are not there.
fn disks(shape: &Shape, directory: &Path, add: &mut dyn FnMut(File) -> Fd) -> Vec<DiskConfig> {
    let open = |name: &str| File::options().read(true).write(true).create(true).truncate(false).open(directory.join(name)).unwrap();
    let mut disks = Vec::new();
    let mut disk = |id: &str, serial: &str, format, file| {
        disks.push(DiskConfig {
            id: id.into(),
            serial: serial.into(),
            format,
            file: add(file),
            backing: Vec::new(),
            read_only: false,
            limits: DiskLimits::default(),
        });
    };
    if let Some(mib) = shape.disk_mib {
        let file = if shape.on_device { open_on_device(directory, mib) } else { open("disk") };
        file.set_len(mib << 20).unwrap();
        disk("root", "TEST-SERIAL", DiskFormat::Raw, file);
    }
    if let Some(mib) = shape.qcow2_mib {
        let file = open("disk.qcow2");
        if file.metadata().unwrap().len() == 0 {
            let storage = Storage::try_from(file.try_clone().unwrap()).unwrap();
            Qcow2::<Storage>::create_builder(storage).size(mib << 20).create().unwrap();
        }
        disk("data", "TEST-QCOW2", DiskFormat::Qcow2, file);
    }
    disks
}

/// A file of random bytes on an ext4 of its own, which is unmounted when the file is closed.
fn open_on_device(directory: &Path, mib: u64) -> File {
    let (image, place) = (directory.join("file-system"), directory.join("mounted"));
    File::create(&image).unwrap().set_len((mib + 16) << 20).unwrap();
    fs::create_dir(&place).unwrap();
    let run = |program: &str, arguments: &[&OsStr]| assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program}");
    run("mke2fs", &["-q".as_ref(), "-F".as_ref(), "-t".as_ref(), "ext4".as_ref(), image.as_ref()]);
    run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_ref(), place.as_ref()]);
    let mut file = File::options().read(true).write(true).create_new(true).open(place.join("disk")).unwrap();
    io::copy(&mut File::open("/dev/urandom").unwrap().take(mib << 20), &mut file).unwrap();
    run("umount", &["-l".as_ref(), place.as_ref()]);
    file
}

fn networks(shape: &Shape, add: &mut dyn FnMut(File) -> Fd) -> Vec<NetworkConfig> {
    let network = |name| NetworkConfig {
        id: "net".into(),
        tap: add(Tap::open(name)),
        vhost: vhost_net().filter(|_| shape.vhost).map(&mut *add),
        mac: [2, 0, 0, 0, 0, 9],
        mtu: 1500,
        bytes_per_second: None,
    };
    shape.tap.map(network).into_iter().collect()
}

/// None when the host does not have it; the emulated one does.
pub fn vhost_net() -> Option<File> {
    let opened = File::options().read(true).write(true).open("/dev/vhost-net");
    assert!(opened.is_ok() || std::env::var_os("FORM_TEST_EMULATED").is_none(), "{opened:?}");
    opened.ok()
}

/// A tap with an address, gone with this value.
pub struct Tap {
    pub name: &'static str,
}

impl Tap {
    pub const HOST: &'static str = "10.99.7.1";
    pub const GUEST: &'static str = "10.99.7.2";

    pub fn new(name: &'static str) -> Self {
        let tap = Tap { name };
        ip(&["tuntap", "add", name, "mode", "tap", "vnet_hdr"]);
        ip(&["addr", "add", &format!("{}/24", Tap::HOST), "dev", name]);
        ip(&["link", "set", name, "up"]);
        tap
    }

    fn open(name: &str) -> File {
        let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
        // SAFETY: `ifreq` is plain data, for which all zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *target = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives across the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        assert_eq!(result, 0, "{name}: {}", std::io::Error::last_os_error());
        file
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // It goes with the machine at the latest.
        let _ = Command::new("ip").args(["link", "del", self.name]).status();
    }
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {}", arguments.join(" "));
}

fn file(directory: &Path, name: &str, content: &[u8]) -> File {
    let path = directory.join(name);
    let mut file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    file.write_all(content).unwrap();
    file
}

impl Drop for Vm {
    fn drop(&mut self) {
        let mut child = self.child.borrow_mut();
        // Mostly gone already.
        let _ = child.kill();
        let _ = child.wait();
    }
}

pub struct Console(UnixStream);

impl Console {
    pub fn type_text(&self, text: &str) {
        (&self.0).write_all(text.as_bytes()).unwrap();
    }

    /// Reads until the VM process has ended.
    pub fn read_to_end(&self) -> String {
        let mut text = Vec::new();
        (&self.0).read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }
}
