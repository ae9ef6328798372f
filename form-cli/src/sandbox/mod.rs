//! Throw-away hosts: a machine in QEMU, real hardware virtualisation or not, that runs the agent and behind it VMs.
//!
//! Everything of a sandbox is in one directory, `~/.local/share/form/sandbox/NAME`: `sandbox.json` (what it is, written last when it
//! is made), `disk.raw` (root disk, with all VMs), `initramfs` (guest program, modules and the host's settings), `console.log`,
//! `qemu.log`, and while it runs `qemu.pid` and `qmp.sock`. QEMU needs no root and no tap: the host is reached through ports of the
//! loopback address that QEMU forwards.

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
    image::{HostImage, build as build_host_image},
    machine::{Machine, make, remove_context, require_programs, start, wait_until_it_answers, write_context},
    process::{State, stop},
    qemu::{Accelerator, DISK},
    record::Record,
};
use crate::{
    context::{Config, ContextKind},
    failure::Failure,
    session::Session,
};

/// What a sandbox is called when nobody says otherwise: its directory, its context and its host.
pub const DEFAULT_NAME: &str = "sandbox";

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
