//! Opens what a stand-alone VM is made of. In daemon mode the daemon has opened everything.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use form_vmm::config::{BackingFile, DiskConfig, DiskFormat, DiskLimits, Fd, JailConfig, NetworkConfig, VmConfig};
use form_vmm::control::launch;
use form_vmm::log_ring;
use form_vmm::server::Server;
use rustix::net::SocketType;

use crate::arguments::{Disk, Run, Tap};

/// Size of the log ring that `--console-log` makes.
const LOG_BYTES: u64 = 256 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("cannot open {}", path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot make {} a log ring", path.display())]
    Log {
        path: PathBuf,
        #[source]
        source: log_ring::LogRingError,
    },
    #[error("cannot listen on {}", path.display())]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot attach to tap {name}")]
    Tap {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("descriptor {0} is not a listening SOCK_SEQPACKET socket")]
    Listener(RawFd),
}

type Started = (Server, Option<(VmConfig, Vec<OwnedFd>)>);

/// Takes over the listening socket that the parent left open.
pub fn inherited_listener(fd: RawFd) -> Result<OwnedFd, OpenError> {
    let listener = match fd {
        // The simplest way to pass one descriptor: standard input, which nothing here reads in daemon mode.
        0 => std::io::stdin().as_fd().try_clone_to_owned().map_err(|_| OpenError::Listener(fd))?,
        ..3 => return Err(OpenError::Listener(fd)),
        // SAFETY: the parent passed this descriptor for this program to own, and nothing else here knows it; that it is open is
        // checked next, before anything is done with it.
        3.. => unsafe { OwnedFd::from_raw_fd(fd) },
    };
    let listening = rustix::net::sockopt::socket_acceptconn(&listener).unwrap_or(false);
    let seqpacket = rustix::net::sockopt::socket_type(&listener).is_ok_and(|kind| kind == SocketType::SEQPACKET);
    if listening && seqpacket {
        // Not for children, should there ever be one; and a connection that vanished must not block us.
        let _ = rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC);
        let _ = rustix::fs::fcntl_setfl(&listener, rustix::fs::OFlags::NONBLOCK);
        Ok(listener)
    } else {
        // Closing a descriptor that is not open would abort; it is not ours.
        std::mem::forget(listener);
        Err(OpenError::Listener(fd))
    }
}

/// Opens everything that `run` names.
pub fn standalone(run: &Run) -> Result<Started, OpenError> {
    let mut files = Files::default();
    let config = VmConfig {
        vcpus: run.cpus,
        most_vcpus: None,
        memory_mib: run.memory_mib,
        kvm: files.open(Path::new("/dev/kvm"), true)?,
        kernel: files.open(&run.kernel, false)?,
        initramfs: run.initramfs.iter().map(|path| files.open(path, false)).collect::<Result<_, _>>()?,
        cmdline: run.cmdline.clone(),
        disks: (0..).zip(&run.disks).map(|(index, disk)| files.disk(index, disk)).collect::<Result<_, _>>()?,
        networks: (0..).zip(&run.taps).map(|(index, tap)| files.tap(index, tap)).collect::<Result<_, _>>()?,
        vsock_cid: run.vsock_cid,
        rng: run.rng,
        balloon: run.balloon,
        console_log: run.console_log.as_deref().map(|path| files.log(path)).transpose()?,
        exit_record: run.exit_record.as_deref().map(|path| files.create(path)).transpose()?,
        jail: jail(run),
    };
    let listener = match &run.control {
        Some(path) => Some(launch::listen(path).map_err(|source| OpenError::Listen { path: path.clone(), source })?),
        None => None,
    };
    let stdin = rustix::io::dup(io::stdin()).ok().map(File::from);
    Ok((Server::new(listener, stdin), Some((config, files.0))))
}

/// What an ordinary user cannot have is left out.
fn jail(run: &Run) -> JailConfig {
    let root = rustix::process::geteuid().is_root();
    let user = run.user.filter(|_| run.jail);
    JailConfig {
        uid: user.map(|(uid, _)| uid),
        gid: user.map(|(_, gid)| gid),
        namespaces: run.jail && root,
        seccomp: run.jail,
        landlock: run.jail,
    }
}

#[derive(Default)]
struct Files(Vec<OwnedFd>);

impl Files {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> Fd {
        self.0.push(fd.into());
        Fd(self.0.len() as u16 - 1)
    }

    fn open(&mut self, path: &Path, write: bool) -> Result<Fd, OpenError> {
        let file = OpenOptions::new().read(true).write(write).custom_flags(libc::O_CLOEXEC).open(path);
        Ok(self.add(file.map_err(|source| OpenError::File { path: path.to_owned(), source })?))
    }

    fn create(&mut self, path: &Path) -> Result<Fd, OpenError> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        Ok(self.add(file.map_err(|source| OpenError::File { path: path.to_owned(), source })?))
    }

    /// A log that is there already goes on.
    fn log(&mut self, path: &Path) -> Result<Fd, OpenError> {
        let fd = self.create(path)?;
        let file = File::from(self.0.remove(usize::from(fd.0)));
        if file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
            log_ring::create(&file, LOG_BYTES).map_err(|source| OpenError::Log { path: path.to_owned(), source })?;
        }
        Ok(self.add(file))
    }

    fn disk(&mut self, index: u32, disk: &Disk) -> Result<DiskConfig, OpenError> {
        let mut backing = Vec::new();
        for path in &disk.backing {
            let format = if path.extension().is_some_and(|end| end == "qcow2") { DiskFormat::Qcow2 } else { DiskFormat::Raw };
            backing.push(BackingFile { file: self.open(path, false)?, format });
        }
        Ok(DiskConfig {
            id: format!("disk{index}"),
            serial: disk.serial.clone().unwrap_or_else(|| format!("disk{index}")),
            format: disk.format,
            file: self.open(&disk.path, !disk.read_only)?,
            backing,
            read_only: disk.read_only,
            limits: DiskLimits::default(),
        })
    }

    fn tap(&mut self, index: u8, tap: &Tap) -> Result<NetworkConfig, OpenError> {
        let fd = open_tap(&tap.name).map_err(|source| OpenError::Tap { name: tap.name.clone(), source })?;
        // Locally administered.
        let mac = tap.mac.unwrap_or([0x02, 0xF0, 0, 0, 0, index]);
        let tap_at = self.add(fd);
        // Not every host has it, and not everybody may use it: then packets are moved here.
        let vhost = OpenOptions::new().read(true).write(true).open("/dev/vhost-net").ok().map(|file| self.add(file));
        Ok(NetworkConfig { id: format!("net{index}"), tap: tap_at, vhost, mac, mtu: tap.mtu, bytes_per_second: None })
    }
}

fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK).open("/dev/net/tun")?;
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `ifreq` is plain data, for which all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives across the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file.into())
}
