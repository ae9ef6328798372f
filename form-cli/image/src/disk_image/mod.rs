//! Images made of the disks of others: a cloud image as a distribution publishes it, or any disk with Linux on it.
//!
//! `partition` and `file_system` say what is on the disk, the files are read by [`crate::ext4::read`] and become the one layer of an image
//! of ours, `own_kernel` makes a kernel bundle of the kernel among them, and `settle` takes out what ties
//! the files to their disk.

mod file_system;
mod own_kernel;
mod partition;
mod settle;

use std::fs::File;

use form_bundle::{
    Manifest,
    manifest::{HistoryEntry, OwnKernel, Rootfs},
};
use form_types::Spec;

use self::{file_system::Kind, partition::Partition};
use crate::{
    BuildError, BuildEvent, BuildObserver, BuildOptions, Builder, BuiltImage, Cancel, base,
    build::{Work, lock},
    diff::Diff,
    error::IoContext,
    ext4::read,
    layer::LayerStore,
    sandbox::Sandbox,
    tarball::Spool,
    tree_path::TreePath,
};

/// A disk to make an image of.
#[derive(Debug)]
pub struct Disk {
    /// Its plain bytes.
    pub file: File,
    pub size: u64,
    /// What it is called in what is said about it.
    pub from: String,
}

/// The parts of a disk that make its system.
struct System {
    root: Partition,
    /// What is mounted at `/boot`, when that is not in the root.
    boot: Option<Partition>,
}

impl Disk {
    fn refuse(&self, reason: impl Into<String>) -> BuildError {
        BuildError::Disk { from: self.from.clone(), reason: reason.into() }
    }

    fn part(&self, part: Partition) -> Result<(File, u64, u64), BuildError> {
        Ok((self.file.try_clone().during("open", &self.from)?, part.begin, part.size))
    }

    /// Errors of a file system, with the partition that it is in.
    fn of_part(&self, part: Partition, error: BuildError) -> BuildError {
        match error {
            BuildError::FileSystem { reason } if part.number > 0 => self.refuse(format!("partition {}: {reason}", part.number)),
            BuildError::FileSystem { reason } => self.refuse(reason),
            error => error,
        }
    }

    fn system(&self, cancel: &Cancel) -> Result<System, BuildError> {
        let partitions = partition::partitions(&self.file, self.size).map_err(|error| self.refuse(error.to_string()))?;
        let (mut roots, mut boots, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for part in partitions {
            match file_system::of(&self.file, part.begin).during("read", &self.from)? {
                Some(Kind::Ext4) => {
                    let names = read::root_names(self.part(part)?, cancel).map_err(|error| self.of_part(part, error))?;
                    let has = |name: &str| names.iter().any(|found| found == name.as_bytes());
                    if has("etc") && has("usr") {
                        roots.push(part);
                    } else if names.iter().any(|name| name.starts_with(b"vmlinuz-")) {
                        boots.push(part);
                    }
                }
                Some(Kind::Other(kind)) => others.push(format!("partition {} is {kind}", part.number)),
                None => {}
            }
        }
        match (roots.as_slice(), boots.as_slice()) {
            ([root], []) => Ok(System { root: *root, boot: None }),
            ([root], [boot]) => Ok(System { root: *root, boot: Some(*boot) }),
            ([], _) if !others.is_empty() => {
                Err(self.refuse(format!("its root must be an ext4 file system without encryption, and {}", others.join(", "))))
            }
            ([], _) => Err(self.refuse("no partition of it holds the root of a Linux system in an ext4 file system")),
            ([_], _) => Err(self.refuse("several partitions of it hold kernels")),
            (roots, _) => {
                let numbers: Vec<String> = roots.iter().map(|part| part.number.to_string()).collect();
                Err(self.refuse(format!("partitions {} all look like the root of a system", numbers.join(", "))))
            }
        }
    }

    /// Its files, those of `/boot` included.
    fn files(&self, system: &System, spool: &Spool, cancel: &Cancel) -> Result<Diff, BuildError> {
        let limit = self.size.div_ceil(1 << 30);
        let read = |part: Partition| {
            read::read_within(self.part(part)?, spool, limit, cancel, &|_| true).map_err(|error| self.of_part(part, error))
        };
        let mut diff = read(system.root)?;
        if let Some(boot) = system.boot {
            let below = |path: &TreePath| TreePath::parse(&[b"boot/", path.as_bytes()].concat());
            for mut entry in read(boot)?.entries {
                entry.path = below(&entry.path).map_err(|error| self.refuse(error.to_string()))?;
                if let crate::diff::Kind::Link { target } = &mut entry.kind {
                    *target = below(target).map_err(|error| self.refuse(error.to_string()))?;
                }
                diff.entries.push(entry);
            }
        }
        base::clean_any(&mut diff, spool)?;
        settle::settle(&mut diff, spool)?;
        Ok(diff)
    }
}

impl Builder {
    /// Makes an image of a disk: its files, and the kernel among them, which the image boots with. `spec` says how it runs and is called; its disk
    /// is made as large as this one at least.
    ///
    /// # Errors
    /// When there is no system on the disk that can be read and started here, the cache's disk is full, or it is cancelled. No image is
    /// left then.
    pub fn import_disk(
        &self,
        disk: &Disk,
        spec: &Spec,
        cancel: &Cancel,
        observer: &mut dyn BuildObserver,
    ) -> Result<BuiltImage, BuildError> {
        let system = disk.system(cancel)?;
        let sandbox = Sandbox::detect()?;
        self.paths.create().during("create", self.paths.root())?;
        let _lock = lock(&self.paths.lock(), cancel, observer)?;
        LayerStore::new(self.paths.layers()).remove_leftovers(&sandbox)?;
        let options = BuildOptions { cancel: cancel.clone(), ..BuildOptions::default() };
        let context = std::env::temp_dir();
        let mut work = Work::new(self, (spec, &context), &options, sandbox, None);
        let made = self.image_of(disk, &system, &mut work, observer);
        let cleaned = work.clean();
        let manifest = made.map_err(|error| match error {
            BuildError::Cancelled => BuildError::Interrupted,
            BuildError::OwnKernel { reason } => disk.refuse(reason),
            error => error,
        })?;
        cleaned?;
        BuiltImage::keep(&self.store(), manifest)
    }

    fn image_of(
        &self,
        disk: &Disk,
        system: &System,
        work: &mut Work<'_>,
        observer: &mut dyn BuildObserver,
    ) -> Result<Manifest, BuildError> {
        let cancel = &work.options.cancel;
        let spool = work.spool()?;
        let diff = disk.files(system, &spool, cancel)?;
        // Before the long part: a disk that cannot be started is no image.
        let release = own_kernel::newest(&diff)?;
        let packages = crate::build::packages_of(&diff, &spool)?.unwrap_or_default();
        let version = own_kernel::package_version(&packages, &release);
        let bundle = own_kernel::bundle((&diff, &spool), &release, &version, &self.paths.own_kernels(), cancel)?;
        observer.event(BuildEvent::Output { line: &format!("it boots with its own kernel, {release}") });
        let text = format!("FROM {}", disk.from);
        let key = work.key("disk", &diff)?;
        if !work.cached(&key) {
            work.finish(key, &text, &diff, &spool)?;
        }
        let top = work.top()?;
        let mut spec = work.spec.clone();
        let smallest = disk.size.max(top.blocks.size()).div_ceil(1 << 30);
        spec.resources.disk_gib = spec.resources.disk_gib.max(smallest);
        let history = vec![HistoryEntry { text, layer: top.key, changed_blocks: top.changed_blocks }];
        let kernel = Some(OwnKernel { release, bundle: bundle.digest });
        Ok(Manifest { kernel, ..Manifest::new(&spec, Rootfs::new(top.blocks.clone()), packages, history)? })
    }
}
