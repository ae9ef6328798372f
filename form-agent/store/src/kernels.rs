//! Stored kernel bundles: `<root>/kernel/<digest>/{kernel.json,vmlinux,modules/*.ko or initrd,entry.json}`, all read-only, and the part
//! of the initramfs that all VMs of a kernel share.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use form_bundle::{
    KernelManifest, ModuleSet, blocks, initramfs,
    kernel::{INITRD_FILE, MANIFEST_FILE, VMLINUX_FILE, module_path},
};
use form_types::{Digest, Failpoint, failpoint::reach};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    Store,
    blocks::read_dir,
    durable::{Draft, Seal, make_dir, read_json, retire, to_json, write_file},
    error::{Result, StoreError},
    hold,
    images::{digests_in, read_bounded},
};

const ENTRY: &str = "entry.json";
/// As `KernelManifest::decode` bounds it.
const MAX_MANIFEST: usize = 16 << 20;

/// A kernel bundle of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelEntry {
    /// Of the manifest's text.
    pub digest: Digest,
    /// As `uname -r` prints it.
    pub release: String,
    /// The kernel and all modules.
    pub size_bytes: u64,
    /// The uncompressed ELF kernel.
    pub vmlinux: PathBuf,
    /// What somebody brought along with a kernel of his own.
    pub initrd: Option<PathBuf>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    release: String,
    size_bytes: u64,
    vmlinux: Seal,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    initrd: Option<Seal>,
}

impl Store {
    fn kernel_dir(&self, digest: &Digest) -> PathBuf {
        self.kernels.join(digest.to_string())
    }

    /// Makes a kernel bundle of blocks that are all here, as [`Store::import`] does an image.
    ///
    /// # Errors
    /// As [`Store::import`].
    pub fn import_kernel(&self, manifest_text: &[u8]) -> Result<KernelEntry> {
        let manifest = KernelManifest::decode(manifest_text)?;
        let digest = Digest::of(manifest_text);
        let _turn = hold(&self.locks.images);
        if let Ok(entry) = self.want_kernel(&digest) {
            return Ok(entry);
        }
        let wanted: BTreeSet<Digest> = manifest.files().flat_map(|(_, map)| map.digests()).collect();
        let assembler = self.assembler(&wanted)?;
        let draft = Draft::new(&self.kernels)?;
        let modules = draft.path().join(form_bundle::kernel::MODULES_DIR);
        make_dir(&modules)?;
        for (path, map) in manifest.files() {
            assembler.write(&draft.path().join(path), map)?;
        }
        crate::durable::sync_dir(&modules)?;
        write_file(&draft.path().join(MANIFEST_FILE), manifest_text, 0o444)?;
        let record = Record {
            release: manifest.release.clone(),
            size_bytes: manifest.files().map(|(_, map)| map.size()).sum(),
            vmlinux: Seal::of(&draft.path().join(VMLINUX_FILE))?,
            initrd: manifest.initrd.as_ref().map(|_| Seal::of(&draft.path().join(INITRD_FILE))).transpose()?,
        };
        let entry = draft.path().join(ENTRY);
        write_file(&entry, &to_json(&entry, &record)?, 0o444)?;
        reach(Failpoint::KernelAssembled);
        draft.publish(&self.kernel_dir(&digest))?;
        reach(Failpoint::KernelPublished);
        for block in &wanted {
            self.incoming.remove(block);
        }
        self.kernel(&digest)
    }

    fn kernel_record(&self, digest: &Digest) -> Result<Record> {
        let path = self.kernel_dir(digest).join(ENTRY);
        if path.exists() { read_json(&path) } else { Err(StoreError::NoKernel(*digest)) }
    }

    /// # Errors
    /// [`StoreError::NoKernel`].
    pub fn kernel(&self, digest: &Digest) -> Result<KernelEntry> {
        let Record { release, size_bytes, vmlinux: _, initrd } = self.kernel_record(digest)?;
        let directory = self.kernel_dir(digest);
        let initrd = initrd.map(|_| directory.join(INITRD_FILE));
        Ok(KernelEntry { digest: *digest, release, size_bytes, vmlinux: directory.join(VMLINUX_FILE), initrd })
    }

    /// As [`Store::kernel`], for somebody who is about to make use of it: [`Store::remove_kernel`] leaves it for a while.
    ///
    /// # Errors
    /// [`StoreError::NoKernel`], or those of the file system.
    pub fn want_kernel(&self, digest: &Digest) -> Result<KernelEntry> {
        let _not_being_removed = hold(&self.locks.wanted);
        let entry = self.kernel(digest)?;
        self.note_wanted(digest)?;
        Ok(entry)
    }

    /// The time of the last change of its directory, in which nothing else changes, is when somebody wanted it.
    fn note_wanted(&self, digest: &Digest) -> Result<()> {
        let path = self.kernel_dir(digest);
        File::open(&path).and_then(|directory| directory.set_modified(SystemTime::now())).map_err(StoreError::io("note who wants", &path))
    }

    /// When a kernel came here, or was last wanted ([`Store::want_kernel`]; or its blocks were, by [`Store::missing`] or an import).
    ///
    /// # Errors
    /// [`StoreError::NoKernel`], or those of the file system.
    pub fn kernel_wanted_at(&self, digest: &Digest) -> Result<Timestamp> {
        let path = self.kernel_dir(digest);
        let modified = match fs::metadata(&path).and_then(|meta| meta.modified()) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(StoreError::NoKernel(*digest)),
            modified => modified.map_err(StoreError::io("look at", &path))?,
        };
        Ok(Timestamp::try_from(modified).unwrap_or(Timestamp::UNIX_EPOCH))
    }

    /// Every kernel, by release.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn kernels(&self) -> Result<Vec<KernelEntry>> {
        let mut found: Vec<KernelEntry> = digests_in(&self.kernels)?.iter().filter_map(|digest| self.kernel(digest).ok()).collect();
        found.sort_by(|a, b| (&a.release, a.digest).cmp(&(&b.release, b.digest)));
        Ok(found)
    }

    /// The kernel's manifest, checked against the digest.
    ///
    /// # Errors
    /// When there is no such kernel, or the manifest was changed on disk.
    pub fn kernel_manifest(&self, digest: &Digest) -> Result<KernelManifest> {
        let path = self.kernel_dir(digest).join(MANIFEST_FILE);
        if !path.exists() {
            return Err(StoreError::NoKernel(*digest));
        }
        Ok(KernelManifest::decode_verified(&read_bounded(&path, MAX_MANIFEST)?, digest)?)
    }

    /// As [`Store::check_sealed`], for the kernel that a VM is about to boot. Modules are rehashed when an initramfs is made.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] with what is different.
    pub fn check_kernel_sealed(&self, digest: &Digest) -> Result<()> {
        let (record, directory) = (self.kernel_record(digest)?, self.kernel_dir(digest));
        record.vmlinux.check(&directory.join(VMLINUX_FILE))?;
        record.initrd.map_or(Ok(()), |initrd| initrd.check(&directory.join(INITRD_FILE)))
    }

    /// Removes a kernel and its initramfs, unless somebody wanted it within the last `age` ([`crate::STALE_AFTER`] is a good age): he may be about
    /// to name it. Whether a VM, an image or a snapshot needs it is for the caller to know. A VM that runs has long read it.
    ///
    /// # Errors
    /// [`StoreError::NoKernel`], [`StoreError::KernelWanted`], or those of the file system.
    pub fn remove_kernel(&self, digest: &Digest, age: Duration) -> Result<()> {
        let _turn = hold(&self.locks.images);
        let _not_being_read = hold(&self.locks.initramfs);
        let _not_being_wanted = hold(&self.locks.wanted);
        let wanted_at = self.kernel_wanted_at(digest)?;
        let now = Timestamp::now();
        if wanted_at > now {
            // The clock was wrong then, and nobody knows by how much.
            self.note_wanted(digest)?;
        }
        let until = wanted_at.min(now).saturating_add(age).unwrap_or(Timestamp::MAX);
        if until > now {
            return Err(StoreError::KernelWanted { kernel: *digest, until });
        }
        retire(&self.initramfs_dir(digest), &self.kernels)?;
        retire(&self.kernel_dir(digest), &self.kernels)
    }

    fn initramfs_dir(&self, digest: &Digest) -> PathBuf {
        self.kernels.join("initramfs").join(digest.to_string())
    }

    /// The first segment of a VM's initramfs: the kernel's modules and the guest binary at `guest`. It is made once, and anew
    /// when the guest binary changes. The settings of the VM go behind it ([`initramfs::settings_segment`]).
    ///
    /// # Errors
    /// When there is no such kernel, a module was changed on disk, the guest binary cannot be read, or there is no room.
    pub fn initramfs(&self, kernel: &Digest, guest: &Path) -> Result<PathBuf> {
        let init = fs::read(guest).map_err(StoreError::io("read the guest binary", guest))?;
        let directory = self.initramfs_dir(kernel);
        let target = directory.join(Digest::of(&init).to_string());
        let path = target.join("system.cpio");
        let _turn = hold(&self.locks.initramfs);
        if path.exists() {
            return Ok(path);
        }
        let manifest = self.kernel_manifest(kernel)?;
        let mut modules = Vec::new();
        for name in manifest.load_order(ModuleSet::Guest) {
            if let Some(module) = manifest.modules.get(name) {
                modules.push((name.as_str(), self.read_module(kernel, name, &module.file)?));
            }
        }
        let segment = initramfs::system_segment(&init, modules.iter().map(|(name, bytes)| (*name, bytes.as_slice())))?;
        let draft = Draft::new(&self.kernels)?;
        write_file(&draft.path().join("system.cpio"), &segment, 0o444)?;
        draft.publish(&target)?;
        for other in read_dir(&directory)? {
            if other != target {
                retire(&other, &self.kernels)?;
            }
        }
        Ok(path)
    }

    fn read_module(&self, kernel: &Digest, name: &str, map: &form_bundle::BlockMap) -> Result<Vec<u8>> {
        let path = self.kernel_dir(kernel).join(module_path(name));
        let bytes = fs::read(&path).map_err(StoreError::io("read", &path))?;
        let damaged = |reason: &str| StoreError::Damaged { what: path.display().to_string(), reason: reason.to_owned() };
        if bytes.len() as u64 != map.size() {
            return Err(damaged("its size is another one"));
        }
        for (index, block) in bytes.chunks(blocks::BLOCK_SIZE).enumerate() {
            let sound = match map.get(index as u64) {
                Some(digest) => Digest::of(block) == *digest,
                None => blocks::is_zero(block),
            };
            if !sound {
                return Err(damaged("it is not what it was"));
            }
        }
        Ok(bytes)
    }
}
