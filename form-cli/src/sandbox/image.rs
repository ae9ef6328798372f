//! The image of a host: built from the Formfile in `examples/sandbox-host` and the programs of this installation.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use form_bundle::ModuleSet;
use form_image::{BuiltImage, ImageStore};
use form_types::{Digest, ImageReference, PublicKey, SecretKey, Spec};
use formfile::LowerOptions;

use super::{Host, Link, qemu::INITRAMFS, record::write_private, settings::settings};
use crate::{
    deploy::build::{self, BuildArgs},
    failure::Failure,
    formfile_source::{FILE_NAME, Source},
    session::Session,
};

/// Part of the program: whoever has only the programs can bring up a host.
const HOST_FORMFILE: &str = include_str!("../../../examples/sandbox-host/Formfile");

/// An image of a host and what it means.
pub struct HostImage {
    image: BuiltImage,
    pub spec: Spec,
    /// See [`installed_programs`].
    pub programs: Digest,
}

/// The meaning of [`HOST_FORMFILE`].
///
/// # Errors
/// Never in a released program: the file is checked when the program is tested.
pub fn spec() -> Result<Spec, Failure> {
    let checked = formfile::check(FILE_NAME, HOST_FORMFILE, &LowerOptions { build_args: BTreeMap::new() });
    checked.spec.ok_or_else(|| Failure::failed("the Formfile of sandbox hosts in this program has errors").hint("install another version"))
}

/// A program of this installation: `form-agent` beside this one, the others where the agent looks for them too.
fn program(name: &str) -> Result<PathBuf, Failure> {
    let exe = std::env::current_exe().ok();
    let beside = exe.as_deref().and_then(Path::parent);
    let library = std::env::var_os("FORM_LIBRARY").map(PathBuf::from);
    let directories = if name == "form-agent" {
        vec![beside.map(Path::to_owned), Some("/usr/local/bin".into()), Some("/usr/bin".into())]
    } else if library.is_some() {
        vec![library]
    } else {
        vec![beside.and_then(Path::parent).map(|prefix| prefix.join("lib/formation")), Some("/usr/lib/formation".into())]
    };
    find(name, directories.into_iter().flatten())
}

fn find(name: &str, directories: impl Iterator<Item = PathBuf>) -> Result<PathBuf, Failure> {
    let mut searched = Vec::new();
    for directory in directories {
        let path = directory.join(name);
        if path.is_file() {
            return Ok(path);
        }
        searched.push(directory.display().to_string());
    }
    Err(Failure::not_found(format!("{name} is not in {}", searched.join(", ")))
        .hint("install Formation whole, or name the directory of form-vmm and form-guest with FORM_LIBRARY"))
}

/// What is put on a host's disk of this installation.
const PROGRAMS: [&str; 3] = ["form-agent", "form-vmm", "form-guest"];

/// One digest of all programs of this installation that a host gets.
///
/// # Errors
/// When one is missing or cannot be read.
pub fn installed_programs() -> Result<Digest, Failure> {
    digest(program)
}

fn digest(place: impl Fn(&str) -> Result<PathBuf, Failure>) -> Result<Digest, Failure> {
    let mut digests = Vec::new();
    for name in PROGRAMS {
        let path = place(name)?;
        let bytes = fs::read(&path).map_err(|error| Failure::io("read", &path, &error))?;
        digests.extend_from_slice(Digest::of(&bytes).as_bytes());
    }
    Ok(Digest::of(&digests))
}

/// Builds the image, showing its steps.
///
/// # Errors
/// When a program is missing or the build fails.
pub async fn build(session: &Session) -> Result<HostImage, Failure> {
    let spec = spec()?;
    let context = tempfile::tempdir().map_err(|error| Failure::io("create a directory in", &std::env::temp_dir(), &error))?;
    let formfile = context.path().join(FILE_NAME);
    fs::write(&formfile, HOST_FORMFILE).map_err(|error| Failure::io("write", &formfile, &error))?;
    for name in PROGRAMS {
        let (from, to) = (program(name)?, context.path().join(name));
        let copied = fs::copy(&from, &to).and_then(|_| fs::set_permissions(&to, fs::Permissions::from_mode(0o755)));
        copied.map_err(|error| Failure::io("copy", &from, &error))?;
    }
    let programs = digest(|name| Ok(context.path().join(name)))?;
    let source = Source { path: formfile.clone(), text: HOST_FORMFILE.to_owned() };
    let args = BuildArgs { file: formfile, build_args: Vec::new(), locked: false, no_cache: false, refresh: false };
    let image = build::image(session, &args, &source, &spec).await?;
    forget_older(&image);
    Ok(HostImage { image, spec, programs })
}

/// Every new version of the programs makes a version of the image; nobody comes back for the old ones.
fn forget_older(image: &BuiltImage) {
    let Ok(cache) = build::cache() else { return };
    let store = ImageStore::new(&cache);
    for version in store.versions(&image.name).unwrap_or_default() {
        if version < image.version {
            // What stays takes room in the cache and does nothing else.
            let _ = store.remove(&ImageReference { name: image.name.clone(), version: Some(version) });
        }
    }
}

impl HostImage {
    /// Writes the root disk: sparse, `disk_gib` large; the host grows its file system to that at its start.
    ///
    /// # Errors
    /// When there is no room for it.
    pub async fn write_disk(&self, disk: PathBuf, disk_gib: u64) -> Result<(), Failure> {
        let store = ImageStore::new(&build::cache()?);
        let reference = ImageReference { name: self.image.name.clone(), version: Some(self.image.version) };
        let fresh = disk.with_extension("new");
        let written = tokio::task::spawn_blocking(move || -> Result<(), Failure> {
            store.export(&reference, &fresh).map_err(|error| build::failure(&error))?;
            fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).map_err(|error| Failure::io("protect", &fresh, &error))?;
            resize(&fresh, disk_gib)?;
            fs::rename(&fresh, &disk).map_err(|error| Failure::io("write", &disk, &error))
        });
        written.await.map_err(|error| Failure::failed(format!("the disk was not written: {error}")))?
    }
}

/// Makes a disk larger, never smaller.
///
/// # Errors
/// When it cannot be written.
pub fn resize(disk: &Path, disk_gib: u64) -> Result<(), Failure> {
    let failed = |error| Failure::io("resize", disk, &error);
    let file = fs::File::options().write(true).open(disk).map_err(failed)?;
    let before = file.metadata().map_err(failed)?.len();
    file.set_len(before.max(disk_gib << 30)).map_err(failed)
}

/// Writes the initramfs of a start: the guest program of this installation, the kernel's modules for a host, its settings.
///
/// # Errors
/// When a file cannot be read or written.
pub fn write_initramfs(
    host: &Host,
    kernel: &form_image::KernelBundle,
    owner: PublicKey,
    host_key: &SecretKey,
    link: Option<Link>,
) -> Result<(), Failure> {
    let path = program("form-guest")?;
    let guest = fs::read(&path).map_err(|error| Failure::io("read", &path, &error))?;
    let settings = settings(&host.name, &spec()?, owner, host_key, link).map_err(|error| Failure::failed(error.to_string()))?;
    let mut initramfs = kernel.initramfs(&guest, ModuleSet::Host).map_err(|error| build::failure(&error))?;
    let segment = form_bundle::initramfs::settings_segment(&settings).map_err(|error| Failure::failed(error.to_string()))?;
    initramfs.extend_from_slice(&segment);
    write_private(&host.directory.join(INITRAMFS), &initramfs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formfile_copies_the_programs_that_are_put_beside_it() {
        let spec = spec().unwrap();
        assert!(spec.ports.iter().any(|port| port.port == form_api::DEFAULT_PORT && port.host_port.is_none()));
        for name in PROGRAMS {
            assert!(HOST_FORMFILE.lines().any(|line| line.starts_with("COPY ") && line.contains(name)), "{name}");
        }
    }

    #[test]
    fn a_missing_program_is_named_with_its_places() {
        let empty = tempfile::tempdir().unwrap();
        let failure = find("form-vmm", [empty.path().to_owned(), "/nowhere".into()].into_iter()).unwrap_err();
        assert!(failure.error.message.contains("form-vmm") && failure.error.message.contains("/nowhere"));
        fs::write(empty.path().join("form-vmm"), "").unwrap();
        assert_eq!(find("form-vmm", [empty.path().to_owned()].into_iter()).unwrap(), empty.path().join("form-vmm"));
    }

    #[test]
    fn one_other_program_is_another_digest() {
        let directory = tempfile::tempdir().unwrap();
        let place = |name: &str| Ok(directory.path().join(name));
        assert!(digest(place).is_err(), "they are missing");
        PROGRAMS.iter().for_each(|name| fs::write(directory.path().join(name), name).unwrap());
        let before = digest(place).unwrap();
        assert_eq!(digest(place).unwrap(), before);
        fs::write(directory.path().join("form-guest"), "another").unwrap();
        assert_ne!(digest(place).unwrap(), before);
    }

    #[test]
    fn disks_only_grow() {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        fs::write(&disk, "x").unwrap();
        resize(&disk, 5).unwrap();
        resize(&disk, 1).unwrap();
        assert_eq!(fs::metadata(&disk).unwrap().len(), 5 << 30);
    }
}
