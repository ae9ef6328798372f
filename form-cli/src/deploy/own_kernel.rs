//! A kernel that somebody brings along for one VM, with what it is started with: looked at before anything is sent.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use form_api::client::Client;
use form_bundle::{
    BlockMap, KernelManifest,
    kernel::{KernelError, MAX_KERNEL_BYTES},
    pvh,
};
use form_types::Digest;

use super::upload::upload_kernel_files;
use crate::{failure::Failure, session::Session};

/// What a kernel has nothing in common with but its name.
const UNKNOWN_RELEASE: &str = "unknown";

/// A kernel and its initrd, in files of this machine.
pub struct OwnKernel {
    pub digest: Digest,
    manifest: KernelManifest,
    vmlinux: PathBuf,
    initrd: Option<PathBuf>,
}

impl OwnKernel {
    /// Reads the files.
    ///
    /// # Errors
    /// When one cannot be read, or is nothing that a VM could be started with: what to do about it is said.
    pub fn read(vmlinux: PathBuf, initrd: Option<PathBuf>) -> Result<Self, Failure> {
        let kernel = fs::read(checked(&vmlinux)?).map_err(|error| unreadable(&vmlinux, &error))?;
        if !pvh::has_entry(&kernel) {
            let what = format!("{} is no ELF kernel with a PVH entry, and cannot be started", vmlinux.display());
            return Err(Failure::usage(what).hint(pvh::WHAT_TO_DO));
        }
        let release = pvh::release(&kernel).unwrap_or_else(|| UNKNOWN_RELEASE.to_owned());
        let kernel = BlockMap::build(kernel.as_slice(), |_, _| Ok(())).map_err(|error| unreadable(&vmlinux, &error))?;
        let map = |path: &PathBuf| -> Result<BlockMap, Failure> {
            let file = File::open(checked(path)?).map_err(|error| unreadable(path, &error))?;
            BlockMap::build(io::BufReader::new(file), |_, _| Ok(())).map_err(|error| unreadable(path, &error))
        };
        let manifest = KernelManifest::own(release, kernel, initrd.as_ref().map(map).transpose()?);
        manifest.check().map_err(|error| match error {
            KernelError::Size(file) => Failure::usage(format!("the {file} is empty or larger than 1 GiB")),
            error => Failure::failed(error.to_string()),
        })?;
        let digest = manifest.digest().map_err(|error| Failure::failed(format!("a manifest cannot be written: {error}")))?;
        Ok(Self { digest, manifest, vmlinux, initrd })
    }

    /// Brings them to the host, as far as they are not there.
    ///
    /// # Errors
    /// When the host does not take them, or a file has changed since it was read.
    pub async fn upload(&self, session: &Session, client: &Client) -> Result<(), Failure> {
        let initrd = self.initrd.iter().cloned().zip(&self.manifest.initrd);
        let files = std::iter::once((self.vmlinux.clone(), &self.manifest.vmlinux)).chain(initrd);
        upload_kernel_files(session, client, (&self.digest, &self.manifest), files).await
    }
}

/// A pipe could be read once only, and a directory not at all. What is too long is not read: a kernel is held in memory.
fn checked(path: &Path) -> Result<&Path, Failure> {
    let metadata = fs::metadata(path).map_err(|error| unreadable(path, &error))?;
    if !metadata.is_file() {
        return Err(Failure::usage(format!("{} is no file", path.display())));
    }
    if metadata.len() > MAX_KERNEL_BYTES {
        return Err(Failure::usage(format!("{} is longer than 1 GiB, and no kernel or initrd", path.display())));
    }
    Ok(path)
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::NotFound => Failure::not_found(format!("there is no file {}", path.display())),
        _ => Failure::failed(format!("{} cannot be read: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use form_api::ErrorCode;

    use super::*;

    /// An ELF file with nothing in it but the note that says where its PVH entry is, and a release.
    fn kernel() -> Vec<u8> {
        let mut bytes = vec![0; 120];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (bytes[18], bytes[32], bytes[54], bytes[56], bytes[64], bytes[72], bytes[96]) = (62, 64, 56, 1, 4, 120, 20);
        for word in [4_u32, 4, 18] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(b"Xen\0abcdLinux version 6.1.9 (somebody)");
        bytes
    }

    fn code(read: Result<OwnKernel, Failure>) -> Option<ErrorCode> {
        read.err().map(|failure| failure.error.code)
    }

    #[test]
    fn what_cannot_be_started_is_said_before_anything_is_sent() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("vmlinux"), kernel()).unwrap();
        fs::write(path("bzImage"), b"MZ and so on").unwrap();
        fs::write(path("initrd"), b"070701").unwrap();
        fs::write(path("empty"), b"").unwrap();

        let own = OwnKernel::read(path("vmlinux"), Some(path("initrd"))).unwrap();
        assert_eq!((own.manifest.release.as_str(), own.manifest.initrd.as_ref().map(BlockMap::size)), ("6.1.9", Some(6)));
        let alone = OwnKernel::read(path("vmlinux"), None).unwrap();
        assert_ne!(alone.digest, own.digest);
        assert_eq!(OwnKernel::read(path("vmlinux"), None).unwrap().digest, alone.digest, "the same files are the same kernel");

        assert_eq!(code(OwnKernel::read(path("bzImage"), None)), Some(ErrorCode::Invalid));
        assert_eq!(code(OwnKernel::read(path("empty"), None)), Some(ErrorCode::Invalid));
        assert_eq!(code(OwnKernel::read(path("vmlinux"), Some(path("empty")))), Some(ErrorCode::Invalid));
        // Without a byte on the disk, and more than this machine should ever hold.
        File::create(path("long")).unwrap().set_len(1 << 40).unwrap();
        let long = |vmlinux: &str, initrd| OwnKernel::read(path(vmlinux), initrd).err().map(|failure| failure.error.message);
        for refused in [long("long", None), long("vmlinux", Some(path("long")))] {
            assert!(refused.is_some_and(|message| message.contains("longer than 1 GiB")));
        }
        assert_eq!(code(OwnKernel::read(directory.path().to_owned(), None)), Some(ErrorCode::Invalid));
        assert_eq!(code(OwnKernel::read(path("vmlinux"), Some(path("nothing")))), Some(ErrorCode::NotFound));
    }
}
