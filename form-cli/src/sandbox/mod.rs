//! Throw-away hosts: a machine in QEMU, real hardware virtualisation or not, that runs the agent and behind it VMs.
//!
//! Everything of a sandbox is in one directory, `~/.local/share/form/sandbox/NAME`: `sandbox.json` (what it is, written last when it
//! is made), `disk.raw` (root disk, with all VMs), `initramfs` (guest program, modules and the host's settings), `console.log`,
//! `qemu.log`, and while it runs `qemu.pid` and `qmp.sock`. A second host has the same in `NAME-2` below it, and so on. QEMU needs no
//! root and no tap: a host is reached through ports of the loopback address that QEMU forwards, and hosts reach each other through a
//! multicast group of that address, so that each of them may go away without the others.

mod forward;
mod holder;
mod image;
mod machine;
mod process;
mod qemu;
mod qmp;
mod record;
mod settings;

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use form_types::Name;
use rustix::fs::FlockOperation;

pub use self::{
    forward::{publish, publish_of},
    image::{HostImage, build as build_host_image, installed_programs},
    machine::{Machine, free_port, make, remove_context, require_programs, start, wait_until_it_answers, write_context},
    process::{State, stop},
    qemu::{Accelerator, DISK, Link},
    record::{Peers, Record},
};
use crate::{
    context::{Config, ContextKind},
    failure::Failure,
    session::Session,
};

/// What a sandbox is called when nobody says otherwise: its directory, its context and its host.
pub const DEFAULT_NAME: &str = "sandbox";

/// How many hosts a sandbox may have: more than one machine is for.
pub const MAX_HOSTS: u32 = 16;

/// One of the machines of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// From 1.
    pub number: u32,
    /// The sandbox's for the first, `NAME-2` for the second.
    pub name: Name,
    pub directory: PathBuf,
}

impl Host {
    /// The host `number` of the sandbox `name` in `sandbox`.
    ///
    /// # Errors
    /// When a host with that name would have too long a name.
    pub fn new(name: &Name, sandbox: &Path, number: u32) -> Result<Self, Failure> {
        if number == 1 {
            return Ok(Self { number, name: name.clone(), directory: sandbox.to_owned() });
        }
        let name: Name = format!("{name}-{number}").parse().map_err(|error| {
            Failure::usage(format!("the hosts of `{name}` cannot be named: {error}")).hint("take a shorter --name for the sandbox")
        })?;
        let directory = sandbox.join(name.as_str());
        Ok(Self { number, name, directory })
    }

    /// The first `count` hosts.
    ///
    /// # Errors
    /// As [`Host::new`].
    pub fn all(name: &Name, sandbox: &Path, count: u32) -> Result<Vec<Self>, Failure> {
        (1..=count).map(|number| Self::new(name, sandbox, number)).collect()
    }

    pub fn runs(&self) -> bool {
        State::of(&self.directory).process().is_some()
    }
}

/// The directory of one sandbox, held against other commands for as long as this lives.
#[derive(Debug)]
pub struct Sandbox {
    pub name: Name,
    pub directory: PathBuf,
    _lock: File,
}

impl Sandbox {
    /// Takes the sandbox `name`, making its directory when there is none.
    ///
    /// # Errors
    /// When there is no home directory, or it cannot be written.
    pub async fn create(session: &Session, config: &Config, name: &Name) -> Result<Self, Failure> {
        let directory = directory(config, name)?;
        loop {
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o700).create(&directory).map_err(|error| Failure::io("create", &directory, &error))?;
            if let Some(sandbox) = Self::lock(session, name, &directory).await? {
                return Ok(sandbox);
            }
        }
    }

    /// Takes the sandbox `name`; `None` when there is none.
    ///
    /// # Errors
    /// When there is no home directory, or the sandbox cannot be read.
    pub async fn open(session: &Session, config: &Config, name: &Name) -> Result<Option<Self>, Failure> {
        Self::lock(session, name, &directory(config, name)?).await
    }

    /// Waits for the directory's lock. It is free again when the file is dropped, however the process ends.
    async fn lock(session: &Session, name: &Name, directory: &Path) -> Result<Option<Self>, Failure> {
        let failed = |error: io::Error| Failure::io("lock", directory, &error);
        let file = match File::open(directory) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut told = false;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(failed(error.into())),
            }
            if !told {
                session.terminal.note(format!("waiting for another `form sandbox` command to end with `{name}`"));
                told = true;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // Whoever held the lock may have removed the directory, and somebody made another one.
        let held = file.metadata().map_err(failed)?;
        match fs::metadata(directory) {
            Ok(there) if (there.dev(), there.ino()) == (held.dev(), held.ino()) => {
                Ok(Some(Self { name: name.clone(), directory: directory.to_owned(), _lock: file }))
            }
            _ => Ok(None),
        }
    }

    /// Ends every host that runs, also ones that no record names.
    ///
    /// # Errors
    /// When one cannot be ended, or the directory cannot be read.
    pub fn stop(&self) -> Result<(), Failure> {
        stop(&self.directory)?;
        let failed = |error: io::Error| Failure::io("read", &self.directory, &error);
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_dir() {
                stop(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes the directory with all that is in it, and those above it that are empty then.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn remove(self) -> Result<(), Failure> {
        fs::remove_dir_all(&self.directory).map_err(|error| Failure::io("remove", &self.directory, &error))?;
        // `sandbox` and `form`; one that holds something else stays.
        let _ = self.directory.ancestors().skip(1).take(2).try_for_each(fs::remove_dir);
        Ok(())
    }
}

/// Where the sandbox `name` is: its context knows, else below `$XDG_DATA_HOME` or `~/.local/share`.
///
/// # Errors
/// When neither variable names a directory.
pub fn directory(config: &Config, name: &Name) -> Result<PathBuf, Failure> {
    let known = config.context(name).filter(|context| context.kind == ContextKind::Sandbox);
    if let Some(directory) = known.and_then(|context| context.sandbox.clone()) {
        return Ok(directory);
    }
    let absolute = |variable| std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
        .map(|data| data.join("form/sandbox").join(name.as_str()))
        .ok_or_else(|| Failure::failed("there is no place for a sandbox").hint("set HOME or XDG_DATA_HOME in the environment"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::Context;

    #[test]
    fn hosts_have_names_and_places() {
        let name: Name = "box".parse().unwrap();
        let hosts = Host::all(&name, Path::new("/srv/box"), 3).unwrap();
        let of = |number: usize| (hosts[number].name.as_str(), hosts[number].directory.to_str().unwrap());
        assert_eq!((of(0), of(1), of(2)), (("box", "/srv/box"), ("box-2", "/srv/box/box-2"), ("box-3", "/srv/box/box-3")));
        let long: Name = "b".repeat(62).parse().unwrap();
        assert!(Host::new(&long, Path::new("/srv"), 1).is_ok());
        assert_eq!(Host::new(&long, Path::new("/srv"), 2).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn the_context_knows_where_it_is() {
        let name: Name = "box".parse().unwrap();
        let mut config = Config::default();
        config.contexts.push(Context {
            name: name.clone(),
            kind: ContextKind::Sandbox,
            hosts: Vec::new(),
            sandbox: Some("/srv/box".into()),
        });
        assert_eq!(directory(&config, &name).unwrap(), Path::new("/srv/box"));
        config.contexts[0].kind = ContextKind::Cluster;
        assert!(directory(&config, &name).is_ok_and(|path| path.ends_with("form/sandbox/box")));
    }
}
