//! The kernel bundle: an uncompressed `vmlinux` and the modules that a guest or a sandbox host needs, from one kernel package.
//!
//! In a store it is a directory: `kernel.json` (this manifest), `vmlinux`, `modules/NAME.ko`. It travels as blocks, like an
//! image. Which modules a set needs and in which order they load is settled when the bundle is made.

use std::collections::{BTreeMap, BTreeSet};

use form_types::Digest;
use serde::{Deserialize, Serialize};

use crate::blocks::BlockMap;

pub const MEDIA_TYPE: &str = "application/vnd.formation.kernel.v1+json";
/// File names of the directory form.
pub const MANIFEST_FILE: &str = "kernel.json";
pub const VMLINUX_FILE: &str = "vmlinux";
pub const MODULES_DIR: &str = "modules";
pub const INITRD_FILE: &str = "initrd";

const MAX_MANIFEST_BYTES: usize = 16 << 20;
const MAX_MODULES: usize = 1000;
/// The longest file of a bundle: 1 GiB.
pub const MAX_KERNEL_BYTES: u64 = 1 << 30;

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("a kernel manifest of {0} bytes is too long: the limit is {MAX_MANIFEST_BYTES}")]
    TooLong(usize),
    #[error("this is no kernel manifest")]
    Json(#[from] serde_json::Error),
    #[error("the kernel manifest's media type is `{0}`: this version reads `{MEDIA_TYPE}`")]
    MediaType(String),
    #[error("`{0}` is no module name")]
    ModuleName(String),
    #[error("the kernel has no module `{0}` and does not have it built in")]
    MissingModule(String),
    #[error("the modules depend on each other in a circle at `{0}`")]
    Circle(String),
    #[error("module `{module}` would be loaded before `{needs}`, which it needs")]
    Order { module: String, needs: String },
    #[error("`{0}` is too large or empty")]
    Size(String),
    #[error("the kernel bundle has more than {MAX_MODULES} modules")]
    TooManyModules,
    #[error("the kernel manifest should have digest {expected} but has {found}")]
    Digest { expected: Digest, found: Digest },
}

/// Who loads the modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModuleSet {
    /// A VM.
    Guest,
    /// A sandbox host: a VM that itself runs VMs.
    Host,
}

/// Without these no guest comes up.
const GUEST_REQUIRED: &[&str] =
    &["virtio_pci", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport", "virtio_balloon", "virtio_rng", "virtio_console", "ext4"];

/// Taken when the kernel has them. Where ext4 is a module, what it computes checksums with is another that it does not name.
const GUEST_WANTED: &[&str] = &["crc32c_generic", "virtio_mem", "virtiofs", "overlay", "button", "evdev"];

const HOST_REQUIRED: &[&str] = &[
    "kvm_amd",
    "kvm_intel",
    "wireguard",
    "tun",
    "veth",
    "loop",
    "nf_tables",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_ct",
    "nft_redir",
    "nft_reject_inet",
    "nft_fib_inet",
    "nft_log",
    "nft_limit",
];

/// Each costs an emulated host up to a second of its start: only what the agent uses.
const HOST_WANTED: &[&str] = &["nft_fib_ipv4", "nft_fib_ipv6", "nft_counter"];

impl ModuleSet {
    pub const ALL: [Self; 2] = [Self::Guest, Self::Host];

    /// A short name of what the sets look for: a bundle that an earlier version made for other sets has another.
    pub fn recipe() -> String {
        let names = Self::ALL.into_iter().flat_map(|set| set.names().chain([("/", false)])).map(|(name, _)| name);
        Digest::of(names.collect::<Vec<_>>().join(" ").as_bytes()).short()
    }

    /// The names to look for, and whether a kernel without them is refused.
    fn names(self) -> impl Iterator<Item = (&'static str, bool)> {
        let host = matches!(self, Self::Host);
        let required = GUEST_REQUIRED.iter().chain(HOST_REQUIRED.iter().filter(move |_| host));
        let wanted = GUEST_WANTED.iter().chain(HOST_WANTED.iter().filter(move |_| host));
        required.map(|name| (*name, true)).chain(wanted.map(|name| (*name, false)))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelManifest {
    pub media_type: String,
    /// As `uname -r` prints it: `6.1.0-31-cloud-amd64`.
    pub release: String,
    /// Version of the package it came from.
    pub package_version: String,
    pub vmlinux: BlockMap,
    /// Of a kernel that somebody brought along for a VM of his own: what it is started with. Bundles for images have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<BlockMap>,
    /// By name, `-` written as `_`.
    pub modules: BTreeMap<String, Module>,
    /// Load order of each set.
    pub sets: BTreeMap<ModuleSet, Vec<String>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Module {
    pub file: BlockMap,
    /// Modules that must be there before it.
    pub needs: Vec<String>,
}

impl KernelManifest {
    /// Of a kernel that somebody brought along: no modules, and nothing of a package is known.
    pub fn own(release: String, vmlinux: BlockMap, initrd: Option<BlockMap>) -> Self {
        let (modules, sets) = (BTreeMap::new(), BTreeMap::new());
        Self { media_type: MEDIA_TYPE.to_owned(), release, package_version: String::new(), vmlinux, initrd, modules, sets }
    }

    /// The canonical bytes: what is stored, sent and hashed.
    ///
    /// # Errors
    /// Never in practice: every field has a JSON form.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }

    /// Names the bundle.
    ///
    /// # Errors
    /// As [`KernelManifest::encode`].
    pub fn digest(&self) -> Result<Digest, serde_json::Error> {
        Ok(Digest::of(&self.encode()?))
    }

    /// Reads a manifest that may come from anyone.
    ///
    /// # Errors
    /// When it is too long, no kernel manifest, or does not hold together.
    pub fn decode(bytes: &[u8]) -> Result<Self, KernelError> {
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(KernelError::TooLong(bytes.len()));
        }
        let manifest: Self = serde_json::from_slice(bytes)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// As [`KernelManifest::decode`], for bytes that must have this digest.
    ///
    /// # Errors
    /// As [`KernelManifest::decode`], and when the digest is another one.
    pub fn decode_verified(bytes: &[u8], expected: &Digest) -> Result<Self, KernelError> {
        let found = Digest::of(bytes);
        if found != *expected {
            return Err(KernelError::Digest { expected: *expected, found });
        }
        Self::decode(bytes)
    }

    /// The modules of a set, each behind those it needs.
    pub fn load_order(&self, set: ModuleSet) -> &[String] {
        self.sets.get(&set).map_or(&[], Vec::as_slice)
    }

    /// Every file of the directory form with its blocks: path and map.
    pub fn files(&self) -> impl Iterator<Item = (String, &BlockMap)> {
        let modules = self.modules.iter().map(|(name, module)| (module_path(name), &module.file));
        let initrd = self.initrd.iter().map(|initrd| (INITRD_FILE.to_owned(), initrd));
        std::iter::once((VMLINUX_FILE.to_owned(), &self.vmlinux)).chain(initrd).chain(modules)
    }

    /// Checks what [`KernelManifest::decode`] promises.
    ///
    /// # Errors
    /// When names, sizes, counts or load orders do not hold together.
    pub fn check(&self) -> Result<(), KernelError> {
        if self.media_type != MEDIA_TYPE {
            return Err(KernelError::MediaType(self.media_type.chars().take(100).collect()));
        }
        if self.modules.len() > MAX_MODULES {
            return Err(KernelError::TooManyModules);
        }
        for (path, file) in self.files() {
            if file.size() == 0 || file.size() > MAX_KERNEL_BYTES {
                return Err(KernelError::Size(path));
            }
        }
        for name in self.modules.keys() {
            check_module_name(name)?;
        }
        for order in self.sets.values() {
            let mut loaded = BTreeSet::new();
            for name in order {
                let module = self.modules.get(name).ok_or_else(|| KernelError::MissingModule(name.clone()))?;
                if let Some(needs) = module.needs.iter().find(|needs| !loaded.contains(needs.as_str())) {
                    return Err(KernelError::Order { module: name.clone(), needs: needs.clone() });
                }
                loaded.insert(name.as_str());
            }
        }
        Ok(())
    }
}

/// Where a module lies in the directory form.
pub fn module_path(name: &str) -> String {
    format!("{MODULES_DIR}/{name}.ko")
}

fn check_module_name(name: &str) -> Result<(), KernelError> {
    let fits = !name.is_empty() && name.len() <= 64 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if fits { Ok(()) } else { Err(KernelError::ModuleName(name.chars().take(80).collect())) }
}

/// What `modules.dep` and `modules.builtin` of a kernel say.
#[derive(Debug, Default)]
pub struct Dependencies {
    /// Name to path below the modules' directory and the names of what it needs directly or indirectly.
    loadable: BTreeMap<String, (String, Vec<String>)>,
    builtin: BTreeSet<String>,
}

impl Dependencies {
    /// Reads the two files as text (modules.dep(5), modules.builtin: one path a line). Lines of another form are left out.
    pub fn parse(modules_dep: &str, modules_builtin: &str) -> Self {
        let mut found = Self::default();
        for line in modules_dep.lines() {
            let Some((path, needs)) = line.split_once(':') else { continue };
            let needs = needs.split_whitespace().map(module_name).collect();
            found.loadable.insert(module_name(path), (path.to_owned(), needs));
        }
        found.builtin = modules_builtin.lines().map(module_name).collect();
        found
    }

    /// The path of a module below `/lib/modules/RELEASE`.
    pub fn path(&self, name: &str) -> Option<&str> {
        self.loadable.get(name).map(|(path, _)| path.as_str())
    }

    /// What a module needs loaded before it.
    pub fn needs(&self, name: &str) -> &[String] {
        self.loadable.get(name).map_or(&[], |(_, needs)| needs)
    }

    /// The modules of a set in load order; built-in ones are left out.
    ///
    /// # Errors
    /// When the kernel lacks a module that the set cannot do without, or its dependencies are broken.
    pub fn resolve(&self, set: ModuleSet) -> Result<Vec<String>, KernelError> {
        let mut order = Vec::new();
        for (name, required) in set.names() {
            if self.loadable.contains_key(name) {
                self.visit(name, &mut order, &mut BTreeSet::new())?;
            } else if required && !self.builtin.contains(name) {
                return Err(KernelError::MissingModule(name.to_owned()));
            }
        }
        Ok(order)
    }

    fn visit(&self, name: &str, order: &mut Vec<String>, open: &mut BTreeSet<String>) -> Result<(), KernelError> {
        if order.iter().any(|loaded| loaded == name) {
            return Ok(());
        }
        if !open.insert(name.to_owned()) {
            return Err(KernelError::Circle(name.to_owned()));
        }
        let (_, needs) = self.loadable.get(name).ok_or_else(|| KernelError::MissingModule(name.to_owned()))?;
        for needed in needs {
            self.visit(needed, order, open)?;
        }
        order.push(name.to_owned());
        Ok(())
    }
}

/// `kernel/drivers/virtio/virtio-pci.ko.xz` is the module `virtio_pci`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/virtio/virtio.ko:\nkernel/virtio/virtio_ring.ko: kernel/virtio/virtio.ko\n\
        kernel/virtio/virtio_pci.ko: kernel/virtio/virtio_ring.ko kernel/virtio/virtio.ko\n\
        kernel/block/virtio_blk.ko.xz: kernel/virtio/virtio_ring.ko kernel/virtio/virtio.ko\n\
        kernel/net/vmw-vsock-virtio-transport.ko:\n";
    const BUILTIN: &str =
        "kernel/fs/ext4/ext4.ko\nkernel/virtio_net.ko\nkernel/virtio_balloon.ko\nkernel/virtio-rng.ko\nkernel/virtio_console.ko\n";

    #[test]
    fn ext4_as_a_module_has_its_checksums() {
        let modular = format!("{DEP}kernel/fs/ext4/ext4.ko:\nkernel/crypto/crc32c_generic.ko:\n");
        let order = Dependencies::parse(&modular, BUILTIN).resolve(ModuleSet::Guest).unwrap();
        assert!(order.iter().any(|name| name == "ext4") && order.iter().any(|name| name == "crc32c_generic"), "{order:?}");
    }

    #[test]
    fn modules_load_behind_what_they_need() {
        let found = Dependencies::parse(DEP, BUILTIN);
        let order = found.resolve(ModuleSet::Guest).unwrap();
        assert_eq!(order, ["virtio", "virtio_ring", "virtio_pci", "virtio_blk", "vmw_vsock_virtio_transport"]);
        assert_eq!(found.path("virtio_blk"), Some("kernel/block/virtio_blk.ko.xz"));
        assert!(matches!(found.resolve(ModuleSet::Host), Err(KernelError::MissingModule(name)) if name == "kvm_amd"));
    }

    #[test]
    fn circles_are_refused() {
        let found = Dependencies::parse("a/virtio_pci.ko: a/x.ko\na/x.ko: a/virtio_pci.ko\n", "");
        assert!(matches!(found.resolve(ModuleSet::Guest), Err(KernelError::Circle(_))));
    }

    fn manifest() -> KernelManifest {
        let mut file = BlockMap::new(10);
        file.push(0, Digest::of(b"x"));
        let module = |needs: &[&str]| Module { file: file.clone(), needs: needs.iter().map(ToString::to_string).collect() };
        KernelManifest {
            media_type: MEDIA_TYPE.to_owned(),
            release: "6.1".to_owned(),
            package_version: "6.1-1".to_owned(),
            vmlinux: file.clone(),
            initrd: None,
            modules: [("a".to_owned(), module(&[])), ("b".to_owned(), module(&["a"]))].into(),
            sets: [(ModuleSet::Guest, vec!["a".to_owned(), "b".to_owned()])].into(),
        }
    }

    #[test]
    fn survives_the_wire() {
        let manifest = manifest();
        let bytes = manifest.encode().unwrap();
        assert_eq!(KernelManifest::decode_verified(&bytes, &manifest.digest().unwrap()).unwrap(), manifest);
        assert_eq!(manifest.load_order(ModuleSet::Guest), ["a", "b"]);
        assert_eq!(manifest.files().map(|(path, _)| path).collect::<Vec<_>>(), ["vmlinux", "modules/a.ko", "modules/b.ko"]);
    }

    #[test]
    fn an_own_kernel_has_an_initrd_and_no_modules() {
        // The digests of bundles without one are of a text that does not name it.
        assert!(!String::from_utf8(manifest().encode().unwrap()).unwrap().contains("initrd"));
        let file = manifest().vmlinux;
        let own = KernelManifest::own("6.1".to_owned(), file.clone(), Some(file.clone()));
        assert_eq!(KernelManifest::decode(&own.encode().unwrap()).unwrap(), own);
        assert_eq!(own.files().map(|(path, _)| path).collect::<Vec<_>>(), ["vmlinux", "initrd"]);
        let empty = KernelManifest::own("6.1".to_owned(), file, Some(BlockMap::new(0)));
        assert!(matches!(KernelManifest::decode(&empty.encode().unwrap()), Err(KernelError::Size(path)) if path == "initrd"));
    }

    #[test]
    fn broken_manifests_are_refused() {
        let mut wrong_order = manifest();
        wrong_order.sets.insert(ModuleSet::Guest, vec!["b".to_owned(), "a".to_owned()]);
        assert!(matches!(KernelManifest::decode(&wrong_order.encode().unwrap()), Err(KernelError::Order { .. })));
        let mut escape = manifest();
        let module = escape.modules["a"].clone();
        escape.modules.insert("../../etc/x".to_owned(), module);
        assert!(matches!(KernelManifest::decode(&escape.encode().unwrap()), Err(KernelError::ModuleName(_))));
        let mut empty = manifest();
        empty.vmlinux = BlockMap::new(0);
        assert!(matches!(KernelManifest::decode(&empty.encode().unwrap()), Err(KernelError::Size(_))));
    }
}
