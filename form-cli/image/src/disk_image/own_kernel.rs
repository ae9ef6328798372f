//! The kernel that an image brings along: found among its files and made into a bundle, now and again on every machine that the image
//! comes to. The same files give the same bundle.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use form_bundle::{
    Manifest, ModuleSet,
    kernel::VMLINUX_FILE,
    manifest::{OwnKernel, is_release},
};
use form_types::Digest;

use crate::{
    BuildError, BuildObserver, Builder, Cancel, KernelBundle,
    block_store::BlockStore,
    build::lock,
    diff::{Diff, Kind},
    error::IoContext,
    ext4::read,
    kernel::assemble,
    tarball::Spool,
    tree_path::TreePath,
};

/// Where modules lie, by age of the distribution. Whichever it is, the bundle is the same.
const MODULES: [&str; 2] = ["lib/modules/", "usr/lib/modules/"];

fn refuse(reason: impl Into<String>) -> BuildError {
    BuildError::OwnKernel { reason: reason.into() }
}

fn text(path: &TreePath) -> Option<&str> {
    std::str::from_utf8(path.as_bytes()).ok()
}

/// The newest kernel with modules, as a boot loader would take it.
pub(super) fn newest(diff: &Diff) -> Result<String, BuildError> {
    let paths = || diff.entries.iter().filter_map(|entry| text(&entry.path));
    let kernels: Vec<&str> = paths().filter_map(|path| path.strip_prefix("boot/vmlinuz-")).filter(|release| is_release(release)).collect();
    let has_modules = |release: &&str| MODULES.iter().any(|parent| paths().any(|path| path == format!("{parent}{release}")));
    if kernels.is_empty() {
        return Err(refuse(
            "there is no boot/vmlinuz-RELEASE in it: install a kernel package, such as linux-image-cloud-amd64 of Debian, where it is made",
        ));
    }
    let newest = kernels.iter().copied().filter(has_modules).max_by(|a, b| by_number(a, b));
    newest.map(str::to_owned).ok_or_else(|| refuse(format!("its kernel {} has no modules in lib/modules", kernels.join(", "))))
}

/// Numbers by their value, what is between them by its letters: 6.1.0-9 comes before 6.1.0-31.
fn by_number(a: &str, b: &str) -> Ordering {
    fn parts(text: &str) -> Vec<(u64, &str)> {
        text.split_inclusive(|character: char| !character.is_ascii_digit())
            .map(|part| {
                let digits = part.trim_end_matches(|character: char| !character.is_ascii_digit());
                (digits.parse().unwrap_or(0), &part[digits.len()..])
            })
            .collect()
    }
    parts(a).cmp(&parts(b)).then_with(|| a.cmp(b))
}

/// Whether a path is needed for the bundle of this release, or leads to what is.
fn is_part(path: &TreePath, release: &str) -> bool {
    let Some(path) = text(path) else { return false };
    let wanted = [format!("boot/vmlinuz-{release}"), format!("lib/modules/{release}"), format!("usr/lib/modules/{release}")];
    wanted.iter().any(|wanted| {
        let below = path.strip_prefix(wanted.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        below || wanted.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'))
    })
}

/// Makes the bundle of the kernel `release` among these files in `place`, beside others.
pub(super) fn bundle(
    (diff, spool): (&Diff, &Spool),
    release: &str,
    package_version: &str,
    place: &Path,
    cancel: &Cancel,
) -> Result<KernelBundle, BuildError> {
    fs::create_dir_all(place).during("create", place)?;
    let work = tempfile::Builder::new().prefix("tmp-").tempdir_in(place).during("create", place)?;
    let unpacked = work.path().join("unpacked");
    unpack((diff, spool), release, &unpacked, cancel)?;
    let made = work.path().join("bundle");
    let digest = assemble(&unpacked, package_version, &[ModuleSet::Guest], &made).map_err(|error| match error {
        BuildError::Kernel { reason } => refuse(format!("{release}: {reason}")),
        error => error,
    })?;
    let vmlinux = made.join(VMLINUX_FILE);
    if !form_bundle::pvh::has_entry(&fs::read(&vmlinux).during("read", &vmlinux)?) {
        return Err(refuse(format!("{release} was made without CONFIG_PVH, and cannot be started here")));
    }
    let target = place.join(digest.to_string());
    if let Ok(bundle) = KernelBundle::open(&target) {
        return Ok(bundle);
    }
    if target.exists() {
        fs::remove_dir_all(&target).during("remove", &target)?;
    }
    fs::rename(&made, &target).during("rename", &target)?;
    KernelBundle::open(&target)
}

/// Lays out kernel and modules as their package does.
fn unpack((diff, spool): (&Diff, &Spool), release: &str, to: &Path, cancel: &Cancel) -> Result<(), BuildError> {
    let files: BTreeMap<&TreePath, &Kind> = diff.entries.iter().map(|entry| (&entry.path, &entry.kind)).collect();
    let mut found = false;
    for (path, kind) in &files {
        if cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
        }
        let Some(path) = text(path) else { continue };
        let Some(place) = place_of(path, release) else { continue };
        let kind = if let Kind::Link { target } = kind { files.get(target).copied() } else { Some(*kind) };
        let Some(Kind::File { digest, .. }) = kind else { continue };
        found |= place.starts_with("boot");
        let place = to.join(place);
        let parent = place.parent().unwrap_or(to);
        fs::create_dir_all(parent).during("create", parent)?;
        fs::copy(spool.path(digest), &place).during("write", &place)?;
    }
    if found { Ok(()) } else { Err(refuse(format!("boot/vmlinuz-{release} is no file in it"))) }
}

/// Where a file of the image lies in the package, when the bundle needs it.
fn place_of(path: &str, release: &str) -> Option<PathBuf> {
    if path.strip_prefix("boot/vmlinuz-") == Some(release) {
        return Some(path.into());
    }
    let inner = MODULES.iter().find_map(|parent| path.strip_prefix(parent)?.strip_prefix(release)?.strip_prefix('/'))?;
    let file = inner.rsplit('/').next().unwrap_or(inner);
    let needed = inner == "modules.builtin" || (inner.starts_with("kernel/") && file.contains(".ko"));
    needed.then(|| PathBuf::from(format!("{}{release}/{inner}", MODULES[0])))
}

impl Builder {
    /// The bundle of the kernel that `image` brings along: from the cache, or made of the image's files, whose blocks are here.
    ///
    /// # Errors
    /// When a block of the image is missing, its files no longer give that bundle, or it is cancelled.
    pub fn own_kernel(
        &self,
        image: &Manifest,
        own: &OwnKernel,
        cancel: &Cancel,
        observer: &mut dyn BuildObserver,
    ) -> Result<KernelBundle, BuildError> {
        let place = self.paths.own_kernels();
        let have = |digest: &Digest| KernelBundle::open(&place.join(digest.to_string())).ok().filter(|bundle| bundle.digest == *digest);
        if let Some(bundle) = have(&own.bundle) {
            return Ok(bundle);
        }
        self.paths.create().during("create", self.paths.root())?;
        let _lock = lock(&self.paths.lock(), cancel, observer)?;
        let work = tempfile::Builder::new().prefix("tmp-").tempdir_in(&place).during("create", &place)?;
        let disk = work.path().join("disk");
        BlockStore::new(self.paths.blocks()).restore(&image.rootfs.blocks, &disk, cancel)?;
        let file = fs::File::open(&disk).during("open", &disk)?;
        let size = image.rootfs.blocks.size();
        let spool = Spool::create(work.path().join("spool"))?;
        let wanted = |path: &TreePath| is_part(path, &own.release);
        let diff = read::read_within((file, 0, size), &spool, size.div_ceil(1 << 30), cancel, &wanted)?;
        let bundle = bundle((&diff, &spool), &own.release, &package_version(&image.packages, &own.release), &place, cancel)?;
        if bundle.digest != own.bundle {
            return Err(refuse(format!("the files of {} in the image are not those that it was made of", own.release)));
        }
        Ok(bundle)
    }

    /// Removes the bundles that are not `wanted`, and what an earlier process left. The cache is locked.
    pub(crate) fn discard_kernels(&self, wanted: &BTreeSet<Digest>) -> Result<(), BuildError> {
        let place = self.paths.own_kernels();
        let names: BTreeSet<String> = wanted.iter().map(ToString::to_string).collect();
        for entry in fs::read_dir(&place).during("list", &place)?.flatten() {
            if !entry.file_name().to_str().is_some_and(|name| names.contains(name)) {
                fs::remove_dir_all(entry.path()).during("remove", entry.path())?;
            }
        }
        Ok(())
    }
}

/// What the package manager calls the kernel's version.
pub(super) fn package_version(packages: &BTreeMap<String, String>, release: &str) -> String {
    packages.get(&format!("linux-image-{release}")).cloned().unwrap_or_else(|| release.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::{Entry, Meta};

    fn with(paths: &[&str]) -> Diff {
        let entry = |path: &&str| Entry {
            path: TreePath::parse(path.as_bytes()).unwrap(),
            meta: Meta::new(0o755, 0, 0),
            kind: Kind::Directory { opaque: false },
        };
        Diff { removed: vec![], entries: paths.iter().map(entry).collect() }
    }

    #[test]
    fn the_newest_kernel_with_modules_is_taken() {
        let diff = with(&[
            "boot/vmlinuz-6.1.0-9-cloud-amd64",
            "boot/vmlinuz-6.1.0-31-cloud-amd64",
            "boot/vmlinuz-6.1.0-40-cloud-amd64",
            "boot/vmlinuz-a b",
            "lib/modules/6.1.0-9-cloud-amd64",
            "usr/lib/modules/6.1.0-31-cloud-amd64",
        ]);
        assert_eq!(newest(&diff).unwrap(), "6.1.0-31-cloud-amd64");
        let error = |paths: &[&str]| newest(&with(paths)).unwrap_err().to_string();
        assert!(error(&["boot", "etc"]).contains("linux-image-cloud-amd64"));
        assert!(error(&["boot/vmlinuz-6.1"]).contains("no modules"));
        assert_eq!(by_number("6.12.0-9", "6.2.0-10"), Ordering::Greater);
        assert_eq!(by_number("6.1-rc1", "6.1-rc1"), Ordering::Equal);
    }

    #[test]
    fn only_what_the_bundle_needs_is_read() {
        let is_part = |path: &str| is_part(&TreePath::parse(path.as_bytes()).unwrap(), "6.1");
        for path in ["boot", "boot/vmlinuz-6.1", "usr", "usr/lib", "lib/modules/6.1/kernel/x.ko", "usr/lib/modules/6.1"] {
            assert!(is_part(path), "{path}");
        }
        for path in ["boot/vmlinuz-6.12", "bin", "usr/library", "lib/modules/6.12/kernel", "boot/initrd.img-6.1"] {
            assert!(!is_part(path), "{path}");
        }
        assert_eq!(place_of("usr/lib/modules/6.1/kernel/a.ko.xz", "6.1"), Some("lib/modules/6.1/kernel/a.ko.xz".into()));
        assert_eq!(place_of("lib/modules/6.1/build", "6.1"), None);
    }
}
