//! The manifest of an image, after the idea of the OCI image layout with media types of our own: one JSON document that
//! names everything else by digest. Its own digest is the image's digest: it holds no version number and no time, so the
//! same inputs give the same image wherever and whenever they are built.

use std::collections::BTreeMap;

use form_types::{Digest, Name, Spec};
use serde::{Deserialize, Serialize};

use crate::blocks::{BLOCK_SIZE, BlockMap};

pub const MEDIA_TYPE: &str = "application/vnd.formation.image.manifest.v1+json";
pub const ROOTFS_MEDIA_TYPE: &str = "application/vnd.formation.image.rootfs.v1.ext4+blocks";

/// A longer manifest is refused before it is parsed. 256 GiB of distinct data fit.
pub const MAX_MANIFEST_BYTES: usize = 320 << 20;

const MAX_HISTORY: usize = 10_000;
const MAX_PACKAGES: usize = 100_000;

#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("a manifest of {0} bytes is too long: the limit is {MAX_MANIFEST_BYTES}")]
    TooLong(usize),
    #[error("this is no image manifest")]
    Json(#[from] serde_json::Error),
    #[error("the manifest's media type is `{0}`: this version reads `{MEDIA_TYPE}`")]
    MediaType(String),
    #[error("the root file system is of type `{0}`: this version reads `{ROOTFS_MEDIA_TYPE}`")]
    RootfsType(String),
    #[error("the root file system has {0} bytes: it must be a whole number of {BLOCK_SIZE}-byte blocks, and not empty")]
    RootfsSize(u64),
    #[error("`{0}` is no kernel release")]
    Release(String),
    #[error("the manifest has too many {0}")]
    TooMany(&'static str),
    #[error("the manifest should have digest {expected} but has {found}")]
    Digest { expected: Digest, found: Digest },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub media_type: String,
    pub name: Name,
    /// Digest of the spec it was built from, without its passwords: a hash of a password does not belong in an image.
    pub spec_digest: Digest,
    /// How to run it. Lines of the Formfile are zero here, so that moving a step down a line is no new image.
    pub config: Spec,
    pub rootfs: Rootfs,
    /// What the base's package manager says is installed: name and version.
    pub packages: BTreeMap<String, String>,
    /// Base first.
    pub history: Vec<HistoryEntry>,
    /// The kernel that it brings along and boots with; without one it boots with that of the machine that deploys it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<OwnKernel>,
}

/// A kernel that lies in an image's own file system, as `boot/vmlinuz-RELEASE` and `lib/modules/RELEASE`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnKernel {
    /// As `uname -r` prints it.
    pub release: String,
    /// Of the kernel bundle ([`crate::KernelManifest`]) that is made of these files.
    pub bundle: Digest,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rootfs {
    pub media_type: String,
    pub blocks: BlockMap,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistoryEntry {
    /// The step in the words of the Formfile: `FROM debian:12`, `COPY app.py /srv/`.
    pub text: String,
    /// The key of the layer in the builder's cache.
    pub layer: Digest,
    /// Blocks of the file system that this layer changed or added.
    pub changed_blocks: u64,
}

impl Rootfs {
    pub fn new(blocks: BlockMap) -> Self {
        Self { media_type: ROOTFS_MEDIA_TYPE.to_owned(), blocks }
    }

    /// Names the file system alone: two images with the same one differ only in how they run.
    ///
    /// # Errors
    /// Never in practice: every field has a JSON form.
    pub fn digest(&self) -> Result<Digest, serde_json::Error> {
        Ok(Digest::of(&serde_json::to_vec(self)?))
    }
}

impl Manifest {
    /// The manifest of `spec` built into `rootfs`. Passwords and line numbers are left out.
    ///
    /// # Errors
    /// Never in practice: every field of a spec has a JSON form.
    pub fn new(
        spec: &Spec,
        rootfs: Rootfs,
        packages: BTreeMap<String, String>,
        history: Vec<HistoryEntry>,
    ) -> Result<Self, serde_json::Error> {
        let mut config = spec.clone();
        for user in &mut config.users {
            user.passwd = None;
        }
        for step in &mut config.steps {
            step.line = 0;
        }
        Ok(Self {
            media_type: MEDIA_TYPE.to_owned(),
            name: spec.name.clone(),
            spec_digest: config.digest()?,
            config,
            rootfs,
            packages,
            history,
            kernel: None,
        })
    }

    /// The canonical bytes: what is stored, sent and hashed.
    ///
    /// # Errors
    /// Never in practice: every field has a JSON form.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }

    /// The image's digest.
    ///
    /// # Errors
    /// As [`Manifest::encode`].
    pub fn digest(&self) -> Result<Digest, serde_json::Error> {
        Ok(Digest::of(&self.encode()?))
    }

    /// Reads a manifest that may come from anyone. Its digest is that of `bytes`: compare it with the one you asked for.
    ///
    /// # Errors
    /// When it is too long, no manifest, of another type, or its sizes and counts do not hold together.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLong(bytes.len()));
        }
        let manifest: Self = serde_json::from_slice(bytes)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// As [`Manifest::decode`], for bytes that must have this digest.
    ///
    /// # Errors
    /// As [`Manifest::decode`], and when the digest is another one.
    pub fn decode_verified(bytes: &[u8], expected: &Digest) -> Result<Self, ManifestError> {
        let found = Digest::of(bytes);
        if found != *expected {
            return Err(ManifestError::Digest { expected: *expected, found });
        }
        Self::decode(bytes)
    }

    fn check(&self) -> Result<(), ManifestError> {
        if self.media_type != MEDIA_TYPE {
            return Err(ManifestError::MediaType(self.media_type.chars().take(100).collect()));
        }
        if self.rootfs.media_type != ROOTFS_MEDIA_TYPE {
            return Err(ManifestError::RootfsType(self.rootfs.media_type.chars().take(100).collect()));
        }
        let size = self.rootfs.blocks.size();
        if size == 0 || !size.is_multiple_of(BLOCK_SIZE as u64) {
            return Err(ManifestError::RootfsSize(size));
        }
        if let Some(kernel) = self.kernel.as_ref().filter(|kernel| !is_release(&kernel.release)) {
            return Err(ManifestError::Release(kernel.release.chars().take(100).collect()));
        }
        if self.history.len() > MAX_HISTORY {
            return Err(ManifestError::TooMany("layers"));
        }
        if self.packages.len() > MAX_PACKAGES {
            return Err(ManifestError::TooMany("packages"));
        }
        Ok(())
    }
}

/// Whether this can be what `uname -r` prints: it becomes part of paths.
pub fn is_release(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._+-~".contains(&byte);
    (1..=64).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with('.')
}

#[cfg(test)]
mod tests {
    use form_types::spec::{Command, Resources, Restart, RestartPolicy, Secret, Step, StepAction, User};

    use super::*;

    fn spec() -> Spec {
        Spec {
            name: "web".parse().unwrap(),
            description: None,
            from: "scratch".to_owned(),
            args: BTreeMap::new(),
            steps: vec![Step {
                action: StepAction::Run { command: Command::Shell("true".to_owned()), env: vec![], workdir: None },
                line: 3,
            }],
            resources: Resources { vcpus: 1, memory_mib: 512, disk_gib: 5, gpus: vec![] },
            users: vec![User {
                name: "ada".to_owned(),
                sudo: false,
                shell: "/bin/sh".to_owned(),
                groups: vec![],
                ssh_authorized_keys: vec![],
                lock_passwd: false,
                ssh_pwauth: true,
                disable_root: true,
                chpasswd_expire: true,
                has_passwd: true,
                passwd: Some(Secret::new("hunter2")),
            }],
            run_as: None,
            env: vec![],
            workdir: None,
            entrypoint: vec![],
            cmd: vec![],
            ports: vec![],
            volumes: vec![],
            networks: vec![],
            replicas: 1,
            restart: Restart { policy: RestartPolicy::Always, max_retries: None },
            healthcheck: None,
            labels: BTreeMap::new(),
            model: None,
        }
    }

    fn manifest(spec: &Spec, size: u64) -> Manifest {
        let mut blocks = BlockMap::new(size);
        blocks.push(0, Digest::of(b"block"));
        Manifest::new(spec, Rootfs::new(blocks), BTreeMap::new(), vec![]).unwrap()
    }

    #[test]
    fn survives_the_wire() {
        let manifest = manifest(&spec(), 1 << 20);
        let bytes = manifest.encode().unwrap();
        assert_eq!(Manifest::decode_verified(&bytes, &manifest.digest().unwrap()).unwrap(), manifest);
        assert!(matches!(Manifest::decode_verified(&bytes, &Digest::of(b"other")), Err(ManifestError::Digest { .. })));
    }

    #[test]
    fn passwords_and_lines_are_no_part_of_an_image() {
        let plain = spec();
        let mut other = spec();
        other.users[0].passwd = Some(Secret::new("correct horse"));
        other.steps[0].line = 99;
        assert_eq!(manifest(&plain, 1 << 20).digest().unwrap(), manifest(&other, 1 << 20).digest().unwrap());
    }

    #[test]
    fn broken_manifests_are_refused() {
        assert!(matches!(Manifest::decode(b"{}"), Err(ManifestError::Json(_))));
        let odd = manifest(&spec(), 65537).encode().unwrap();
        assert!(matches!(Manifest::decode(&odd), Err(ManifestError::RootfsSize(65537))));
        let mut other = manifest(&spec(), 1 << 20);
        other.media_type = "text/plain".to_owned();
        assert!(matches!(Manifest::decode(&other.encode().unwrap()), Err(ManifestError::MediaType(_))));
        let mut other = manifest(&spec(), 1 << 20);
        other.rootfs.media_type = "text/plain".to_owned();
        assert!(matches!(Manifest::decode(&other.encode().unwrap()), Err(ManifestError::RootfsType(_))));
        for release in ["", "../6.1", "6.1/..", "a b", &"6".repeat(65)] {
            let mut other = manifest(&spec(), 1 << 20);
            other.kernel = Some(OwnKernel { release: release.to_owned(), bundle: Digest::of(b"x") });
            assert!(matches!(Manifest::decode(&other.encode().unwrap()), Err(ManifestError::Release(_))), "{release}");
        }
    }

    #[test]
    fn an_image_without_a_kernel_of_its_own_is_what_it_always_was() {
        let mut manifest = manifest(&spec(), 1 << 20);
        assert!(!String::from_utf8(manifest.encode().unwrap()).unwrap().contains("kernel"));
        manifest.kernel = Some(OwnKernel { release: "6.1.0-31-cloud-amd64".to_owned(), bundle: Digest::of(b"x") });
        assert_eq!(Manifest::decode(&manifest.encode().unwrap()).unwrap(), manifest);
    }
}
