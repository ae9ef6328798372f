//! Root disks of VMs: `<root>/vms/<id>/root/{disk.raw or disk.qcow2,disk.json}`, a copy-on-write layer on a sealed image.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use form_types::{Digest, Failpoint, Name, VmId, failpoint::reach};
use imago::{
    DenyImplicitOpenGate, FormatCreateBuilder, FormatDriverBuilder,
    file::File as ImageFile,
    format::{PreallocateMode, drivers::FormatDriverInstance},
    qcow2::Qcow2,
};
use serde::{Deserialize, Serialize};

use crate::{
    Store,
    blocks::read_dir,
    copy::share_or_copy,
    durable::{Draft, read_json, replace_file, retire, to_json, write_file},
    error::{Result, StoreError},
    hold,
};

pub(crate) const DISK: &str = "disk.json";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// A reflink copy of the image.
    Raw,
    /// An overlay on the image. The path in its header is for people: whoever opens it passes the backing files along.
    Qcow2,
}

/// What a VM's disk consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFiles {
    pub format: DiskFormat,
    /// Read-write.
    pub path: PathBuf,
    /// Read-only, raw, the nearest first; what lies beyond the end of one reads as zeros. Empty for a raw disk.
    pub backing: Vec<PathBuf>,
    /// The image that the disk was made from.
    pub image: Digest,
    pub size_bytes: u64,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub format: DiskFormat,
    pub image: Digest,
    pub size_bytes: u64,
}

impl Store {
    pub(crate) fn disk_dir(&self, vm: &VmId) -> PathBuf {
        self.vms.join(vm.to_string()).join("root")
    }

    /// Makes the root disk of a VM: a reflink copy of the image where the file system can, else a qcow2 overlay.
    ///
    /// # Errors
    /// [`StoreError::DiskExists`]; [`StoreError::DiskTooSmall`] when the image does not fit; [`StoreError::Damaged`] when the
    /// image is not as it was sealed; [`StoreError::NoRoom`]. Nothing is left behind then.
    pub fn create_disk(&self, vm: &VmId, image: &Digest, size_bytes: u64) -> Result<DiskFiles> {
        let _turn = hold(&self.locks.disks);
        let directory = self.disk_dir(vm);
        if directory.join(DISK).exists() {
            return Err(StoreError::DiskExists(*vm));
        }
        let entry = self.by_digest(image)?;
        self.check_sealed(image)?;
        if size_bytes < entry.size_bytes {
            return Err(StoreError::DiskTooSmall { wanted: size_bytes, least: entry.size_bytes });
        }
        let draft = Draft::new(&self.vms)?;
        let raw = draft.path().join(file_name(DiskFormat::Raw));
        let format = if reflink(&entry.rootfs, &raw, size_bytes)? {
            DiskFormat::Raw
        } else {
            overlay(&entry.rootfs, &draft.path().join(file_name(DiskFormat::Qcow2)), size_bytes)?;
            DiskFormat::Qcow2
        };
        let record = Record { format, image: *image, size_bytes };
        let path = draft.path().join(DISK);
        write_file(&path, &to_json(&path, &record)?, 0o600)?;
        reach(Failpoint::DiskDrafted);
        draft.publish(&directory)?;
        reach(Failpoint::DiskMade);
        Ok(self.disk_files(vm, record))
    }

    /// Makes the root disk of `vm` a copy of the one of `source`, which nobody may write to meanwhile. Blocks are shared where the file
    /// system can, else what is no hole is copied.
    ///
    /// # Errors
    /// [`StoreError::NoDisk`] of the source, and as [`Store::create_disk`]. Nothing is left behind then.
    pub fn clone_disk(&self, source: &VmId, vm: &VmId) -> Result<DiskFiles> {
        let DiskFiles { format, path: from, image, size_bytes, .. } = self.open_disk(source)?;
        let draft = Draft::new(&self.vms)?;
        let path = draft.path().join(file_name(format));
        let copy = || {
            let target = create(&path)?;
            share_or_copy(&File::open(&from)?, &target)?;
            target.sync_all()
        };
        copy().map_err(StoreError::io("write", &path))?;
        let record = Record { format, image, size_bytes };
        let entry = draft.path().join(DISK);
        write_file(&entry, &to_json(&entry, &record)?, 0o600)?;
        reach(Failpoint::DiskCopied);
        // What took long is done.
        let _turn = hold(&self.locks.disks);
        let directory = self.disk_dir(vm);
        if directory.join(DISK).exists() {
            return Err(StoreError::DiskExists(*vm));
        }
        if format == DiskFormat::Qcow2 {
            // Together with the source its image may have been removed.
            self.check_sealed(&image)?;
        }
        draft.publish(&directory)?;
        reach(Failpoint::DiskMade);
        Ok(self.disk_files(vm, record))
    }

    fn disk_files(&self, vm: &VmId, record: Record) -> DiskFiles {
        self.disk_files_in(&self.disk_dir(vm), record)
    }

    pub(crate) fn disk_files_in(&self, directory: &Path, record: Record) -> DiskFiles {
        let Record { format, image, size_bytes } = record;
        let backing = match format {
            DiskFormat::Raw => Vec::new(),
            DiskFormat::Qcow2 => vec![self.image_rootfs(&image)],
        };
        DiskFiles { format, path: directory.join(file_name(format)), backing, image, size_bytes }
    }

    pub(crate) fn disk_record(&self, vm: &VmId) -> Result<Record> {
        let path = self.disk_dir(vm).join(DISK);
        if path.exists() { read_json(&path) } else { Err(StoreError::NoDisk(*vm)) }
    }

    /// The disk of a VM. For an overlay the image below is checked against its seal.
    ///
    /// # Errors
    /// [`StoreError::NoDisk`], [`StoreError::Damaged`].
    pub fn open_disk(&self, vm: &VmId) -> Result<DiskFiles> {
        let record = self.disk_record(vm)?;
        if record.format == DiskFormat::Qcow2 {
            self.check_sealed(&record.image)?;
        }
        Ok(self.disk_files(vm, record))
    }

    /// Makes the disk of a VM that does not run larger; the guest grows its file system at the next start.
    ///
    /// # Errors
    /// [`StoreError::DiskTooSmall`] when it is larger already.
    pub fn grow_disk(&self, vm: &VmId, size_bytes: u64) -> Result<DiskFiles> {
        let _turn = hold(&self.locks.disks);
        let mut record = self.disk_record(vm)?;
        if size_bytes < record.size_bytes {
            return Err(StoreError::DiskTooSmall { wanted: size_bytes, least: record.size_bytes });
        }
        let path = self.disk_dir(vm).join(file_name(record.format));
        let grow = || {
            let file = OpenOptions::new().read(true).write(true).open(&path)?;
            match record.format {
                DiskFormat::Raw => file.set_len(size_bytes)?,
                DiskFormat::Qcow2 => {
                    let storage = ImageFile::try_from(file.try_clone()?)?;
                    let image = Qcow2::<ImageFile>::builder(storage).backing(None).write(true).open(DenyImplicitOpenGate::default())?;
                    image.resize_grow(size_bytes, PreallocateMode::None)?;
                    image.flush()?;
                }
            }
            file.sync_all()
        };
        grow().map_err(StoreError::io("grow", &path))?;
        record.size_bytes = size_bytes;
        let entry = self.disk_dir(vm).join(DISK);
        replace_file(&self.vms, &entry, &to_json(&entry, &record)?, 0o600)?;
        Ok(self.disk_files(vm, record))
    }

    /// Removes the disk of a VM; that there is none is fine.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_disk(&self, vm: &VmId) -> Result<()> {
        let _turn = hold(&self.locks.disks);
        retire(&self.disk_dir(vm), &self.vms)?;
        // Fails unless it is empty: whatever else is kept of the VM stays.
        let _ = fs::remove_dir(self.vms.join(vm.to_string()));
        Ok(())
    }

    /// The VMs that have a disk here.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn disks(&self) -> Result<Vec<VmId>> {
        let mut found: Vec<VmId> = read_dir(&self.vms)?
            .iter()
            .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
            .filter(|vm| self.disk_dir(vm).join(DISK).exists())
            .collect();
        found.sort();
        Ok(found)
    }

    /// The VMs whose disks would be worth nothing without this image.
    pub(crate) fn overlays_of(&self, image: &Digest) -> Result<Vec<VmId>> {
        let mut users = Vec::new();
        for vm in self.disks()? {
            let record = self.disk_record(&vm)?;
            if record.format == DiskFormat::Qcow2 && record.image == *image {
                users.push(vm);
            }
        }
        for vm in self.vms_with_snapshots()? {
            let is_overlay = |name: &Name| self.snapshot(&vm, name).is_ok_and(|entry| entry.overlays(image));
            if !users.contains(&vm) && self.snapshots(&vm)?.iter().any(is_overlay) {
                users.push(vm);
            }
        }
        Ok(users)
    }
}

pub(crate) const fn file_name(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Raw => "disk.raw",
        DiskFormat::Qcow2 => "disk.qcow2",
    }
}

pub fn create(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Whether the file system could share the image's blocks with a new file. If not there is no new file.
fn reflink(image: &Path, path: &Path, size_bytes: u64) -> Result<bool> {
    let fault = || StoreError::io("write", path);
    let source = File::open(image).map_err(StoreError::io("read", image))?;
    let file = create(path).map_err(fault())?;
    match rustix::fs::ioctl_ficlone(&file, &source) {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            return Err(fault()(error.into()));
        }
        // Every file system has its own word for "cannot": EOPNOTSUPP, EXDEV, EINVAL, ENOTTY.
        Err(_) => {
            drop(file);
            fs::remove_file(path).map_err(fault())?;
            return Ok(false);
        }
    }
    file.set_len(size_bytes).and_then(|()| file.sync_all()).map_err(fault())?;
    Ok(true)
}

fn overlay(image: &Path, path: &Path, size_bytes: u64) -> Result<()> {
    let make = || {
        let file = create(path)?;
        let storage = ImageFile::try_from(file.try_clone()?)?;
        Qcow2::<ImageFile>::create_builder(storage).size(size_bytes).backing(image.display().to_string(), "raw".to_owned()).create()?;
        file.sync_all()
    };
    make().map_err(StoreError::io("write", path))
}
