//! The kernel bundle, made from the distribution's cloud kernel package with the machine's own apt, which checks its signatures.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufReader, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use form_bundle::{
    BlockMap, KernelManifest, ModuleSet,
    kernel::{self, Dependencies, MANIFEST_FILE, Module, VMLINUX_FILE, module_path},
};
use form_types::Digest;
use lzma_rust2::XzReader;

use crate::{
    BuildError, BuildEvent, BuildObserver, CachePaths, Cancel,
    error::IoContext,
    layer::write_whole,
    sandbox::{LineReader, keep_tail},
    tools::{self, search_path},
};

/// The package that depends on the newest kernel for virtual machines.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
const MAX_VMLINUX: u64 = 512 << 20;
const MAX_MODULE: u64 = 64 << 20;

/// A kernel bundle in its directory form.
#[derive(Clone, Debug)]
pub struct KernelBundle {
    pub directory: PathBuf,
    pub digest: Digest,
    pub manifest: KernelManifest,
}

impl KernelBundle {
    /// Opens a bundle in a directory. Only the manifest is read.
    ///
    /// # Errors
    /// When there is no valid manifest, or a file is missing or of another size.
    pub fn open(directory: &Path) -> Result<Self, BuildError> {
        let path = directory.join(MANIFEST_FILE);
        let bytes = fs::read(&path).during("read", &path)?;
        let damaged = |reason: String| BuildError::Cache { path: directory.to_owned(), reason };
        let manifest = KernelManifest::decode(&bytes).map_err(|error| damaged(error.to_string()))?;
        for (name, file) in manifest.files() {
            if fs::metadata(directory.join(&name)).map_or(0, |meta| meta.len()) != file.size() {
                return Err(damaged(format!("{name} is missing or has another size")));
            }
        }
        Ok(Self { directory: directory.to_owned(), digest: Digest::of(&bytes), manifest })
    }

    /// The uncompressed ELF kernel.
    pub fn vmlinux(&self) -> PathBuf {
        self.directory.join(VMLINUX_FILE)
    }

    /// Every file with its blocks, for sending: path and map.
    pub fn files(&self) -> impl Iterator<Item = (PathBuf, &BlockMap)> {
        self.manifest.files().map(|(name, file)| (self.directory.join(name), file))
    }

    /// The first segment of an initramfs: the guest binary and the modules of a set in load order.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn initramfs(&self, guest: &[u8], set: ModuleSet) -> Result<Vec<u8>, BuildError> {
        let mut modules = Vec::new();
        for name in self.manifest.load_order(set) {
            let path = self.directory.join(module_path(name));
            modules.push((name.as_str(), fs::read(&path).during("read", path)?));
        }
        form_bundle::initramfs::system_segment(guest, modules.iter().map(|(name, bytes)| (*name, bytes.as_slice())))
            .map_err(|error| BuildError::Kernel { reason: error.to_string() })
    }
}

/// Names the newest bundle with the modules that this version wants.
fn current(paths: &CachePaths) -> PathBuf {
    paths.kernels().join(format!("current-{}", ModuleSet::recipe()))
}

/// The newest bundle in the cache; `None` when none was made yet.
pub fn cached(paths: &CachePaths) -> Option<KernelBundle> {
    let name = fs::read_to_string(current(paths)).ok()?;
    let digest: Digest = name.trim().parse().ok()?;
    KernelBundle::open(&paths.kernels().join(digest.to_string())).ok().filter(|bundle| bundle.digest == digest)
}

/// Gives the bundle of the cache, or makes one. `refresh` makes one when apt knows another version.
///
/// # Errors
/// When a tool is missing, apt fails or has no such package, or the package is not as expected.
pub fn ensure(paths: &CachePaths, refresh: bool, cancel: &Cancel, observer: &mut dyn BuildObserver) -> Result<KernelBundle, BuildError> {
    let have = cached(paths);
    if let Some(bundle) = have.as_ref().filter(|_| !refresh) {
        return Ok(bundle.clone());
    }
    tools::require(tools::KERNEL)?;
    paths.create().during("create", paths.root())?;
    let (package, version) = newest_package()?;
    if let Some(bundle) = have.filter(|bundle| bundle.manifest.package_version == version) {
        return Ok(bundle);
    }
    let work = tempfile::Builder::new().prefix("tmp-").tempdir_in(paths.kernels()).during("create", paths.kernels())?;
    // apt may download as another user, who must be able to reach a directory it owns: /tmp is such a place.
    let download = tempfile::tempdir().during("create", std::env::temp_dir())?;
    fs::set_permissions(download.path(), fs::Permissions::from_mode(0o755)).during("open up", download.path())?;
    let mut apt = Command::new("apt-get");
    apt.args(["-q", "download"]).arg(format!("{package}={version}")).current_dir(download.path());
    observed("apt-get", apt, cancel, observer)?;
    let archive = fs::read_dir(download.path())
        .during("list", download.path())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| BuildError::Kernel { reason: format!("apt downloaded no file for {package}") })?;
    let unpacked = work.path().join("unpacked");
    let mut dpkg = Command::new("dpkg-deb");
    dpkg.arg("--extract").arg(&archive).arg(&unpacked);
    observed("dpkg-deb", dpkg, cancel, observer)?;
    let bundle = work.path().join("bundle");
    let digest = assemble(&unpacked, &version, &ModuleSet::ALL, &bundle)?;
    let target = paths.kernels().join(digest.to_string());
    if target.exists() {
        fs::remove_dir_all(&target).during("remove", &target)?;
    }
    fs::rename(&bundle, &target).during("rename", &target)?;
    write_whole(&current(paths), digest.to_string().as_bytes())?;
    KernelBundle::open(&target)
}

/// Runs a program and passes on what it says.
fn observed(name: &'static str, mut command: Command, cancel: &Cancel, observer: &mut dyn BuildObserver) -> Result<(), BuildError> {
    command.env("PATH", search_path()).env("LC_ALL", "C.UTF-8").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().during("start", name)?;
    let mut tail = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        let lines = LineReader::start(stderr);
        let result = loop {
            match lines.next(cancel, &mut child) {
                Ok(Some(line)) => {
                    observer.event(BuildEvent::Output { line: &line });
                    keep_tail(&mut tail, line);
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if result.is_err() {
            let _ = child.wait();
            return result;
        }
    }
    let status = child.wait().during("wait for", name)?;
    if status.success() { Ok(()) } else { Err(BuildError::Tool { program: name, status: status.to_string(), tail }) }
}

/// Name and version of the kernel package that the meta package stands for.
fn newest_package() -> Result<(String, String), BuildError> {
    let show = |package: &str| -> Result<String, BuildError> {
        let output = Command::new("apt-cache")
            .args(["show", "--no-all-versions", package])
            .env("PATH", search_path())
            .env("LC_ALL", "C.UTF-8")
            .output();
        let output = output.during("start", "apt-cache")?;
        if output.status.success() && !output.stdout.is_empty() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(BuildError::Kernel {
            reason: format!(
                "this machine's apt does not know `{package}`: run `apt-get update`; on a system other than Debian name its mirror in /etc/apt/sources.list.d"
            ),
        })
    };
    let field = |text: &str, name: &str| text.lines().find_map(|line| line.strip_prefix(name).map(|value| value.trim().to_owned()));
    let meta = show(META_PACKAGE)?;
    let depends = field(&meta, "Depends:").unwrap_or_default();
    let package = depends.split([',', ' ', '|']).find(|word| word.starts_with("linux-image-")).map(str::to_owned);
    let package = package.ok_or_else(|| BuildError::Kernel { reason: format!("`{META_PACKAGE}` depends on no kernel") })?;
    let version =
        field(&show(&package)?, "Version:").ok_or_else(|| BuildError::Kernel { reason: format!("`{package}` has no version") })?;
    Ok((package, version))
}

/// Makes the directory form from an unpacked package, or from what an image has of one.
///
/// # Errors
/// When the package has no kernel, no modules, or not those that a set needs.
pub(crate) fn assemble(unpacked: &Path, package_version: &str, wanted: &[ModuleSet], target: &Path) -> Result<Digest, BuildError> {
    let (release, modules_root) = find_modules(unpacked)?;
    let image_path = unpacked.join("boot").join(format!("vmlinuz-{release}"));
    let image = fs::read(&image_path).during("read", &image_path)?;
    fs::create_dir_all(target.join(kernel::MODULES_DIR)).during("create", target)?;
    let vmlinux = extract_vmlinux(&image)?;
    let broken = |error: kernel::KernelError| BuildError::Kernel { reason: error.to_string() };
    let dependencies = read_dependencies(&modules_root)?;
    let mut sets = BTreeMap::new();
    let mut modules = BTreeMap::new();
    for set in wanted.iter().copied() {
        let order = dependencies.resolve(set).map_err(broken)?;
        for name in &order {
            let Some(path) = dependencies.path(name) else { continue };
            let bytes = read_module(&modules_root.join(path))?;
            let file = write_file(&target.join(module_path(name)), &bytes)?;
            modules.insert(name.clone(), Module { file, needs: dependencies.needs(name).to_vec() });
        }
        sets.insert(set, order);
    }
    let manifest = KernelManifest {
        media_type: kernel::MEDIA_TYPE.to_owned(),
        release,
        package_version: package_version.to_owned(),
        vmlinux: write_file(&target.join(VMLINUX_FILE), &vmlinux)?,
        initrd: None,
        modules,
        sets,
    };
    manifest.check().map_err(broken)?;
    write_whole(&target.join(MANIFEST_FILE), &manifest.encode()?)?;
    fs::set_permissions(target, fs::Permissions::from_mode(0o755)).during("open up", target)?;
    Ok(manifest.digest()?)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<BlockMap, BuildError> {
    fs::write(path, bytes).during("write", path)?;
    BlockMap::build(bytes, |_, _| Ok(())).during("read", path)
}

/// The one directory below `lib/modules`, wherever the package has it.
fn find_modules(unpacked: &Path) -> Result<(String, PathBuf), BuildError> {
    for parent in ["lib/modules", "usr/lib/modules"] {
        let Ok(entries) = fs::read_dir(unpacked.join(parent)) else { continue };
        if let Some(entry) = entries.flatten().find(|entry| entry.path().is_dir()) {
            return Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
    }
    Err(BuildError::Kernel { reason: "the package has no modules".to_owned() })
}

/// The package has no `modules.dep`: that file is made where a kernel is installed. Each module says itself what it needs.
fn read_dependencies(modules_root: &Path) -> Result<Dependencies, BuildError> {
    let builtin_path = modules_root.join("modules.builtin");
    let builtin = fs::read_to_string(&builtin_path).during("read", builtin_path)?;
    let mut waiting = vec![modules_root.join("kernel")];
    let mut dep = String::new();
    let mut direct: BTreeMap<String, (String, Vec<String>)> = BTreeMap::new();
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(&directory).during("list", &directory)?.flatten() {
            let path = entry.path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.file_name().is_some_and(|name| name.to_string_lossy().contains(".ko")) {
                let relative = path.strip_prefix(modules_root).unwrap_or(&path).to_string_lossy().into_owned();
                let name = kernel_name(&relative);
                direct.insert(name, (relative, module_needs(&read_module(&path)?)));
            }
        }
    }
    for (relative, needs) in direct.values() {
        let paths: Vec<&str> = needs.iter().filter_map(|name| direct.get(name).map(|(path, _)| path.as_str())).collect();
        dep.push_str(&format!("{relative}: {}\n", paths.join(" ")));
    }
    Ok(Dependencies::parse(&dep, &builtin))
}

fn kernel_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// The `depends=` of a module's `.modinfo`: names separated by commas, in zero-terminated text.
fn module_needs(bytes: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = bytes.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = &bytes[at + KEY.len()..];
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    let text = String::from_utf8_lossy(&value[..end]);
    text.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// What a module in a file of these bytes needs.
#[cfg(feature = "fuzzing")]
pub(crate) fn module(bytes: &[u8]) -> Result<Vec<String>, String> {
    unpack(bytes, MAX_MODULE).map(|plain| module_needs(&plain))
}

/// A module's plain bytes: modules come plain, or compressed with xz, zstd or gzip.
fn read_module(path: &Path) -> Result<Vec<u8>, BuildError> {
    let bytes = fs::read(path).during("read", path)?;
    let bad = |reason: String| BuildError::Kernel { reason: format!("{}: {reason}", path.display()) };
    unpack(&bytes, MAX_MODULE).map_err(bad)
}

/// The ELF kernel inside a bzImage (kernel documentation: `arch/x86/boot`, fields `setup_sects`, `payload_offset`, `payload_length`).
///
/// # Errors
/// When it is no bzImage, or its payload is compressed in a way that is not known here.
pub(crate) fn extract_vmlinux(image: &[u8]) -> Result<Vec<u8>, BuildError> {
    let refuse = |reason: &str| BuildError::Kernel { reason: reason.to_owned() };
    if image.starts_with(b"\x7fELF") {
        return Ok(image.to_vec());
    }
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(refuse("the kernel image is no bzImage"));
    }
    let word = |at: usize| image.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes).unwrap_or(0) as usize;
    let sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let begin = (sectors + 1) * 512 + word(0x248);
    let payload =
        begin.checked_add(word(0x24c)).and_then(|end| image.get(begin..end)).ok_or_else(|| refuse("the kernel image is cut short"))?;
    // The last four bytes are the length of what comes out, for the kernel's own unpacker.
    let payload = payload.get(..payload.len().saturating_sub(4)).unwrap_or_default();
    let vmlinux = unpack(payload, MAX_VMLINUX).map_err(|reason| refuse(&format!("the kernel image: {reason}")))?;
    if vmlinux.starts_with(b"\x7fELF") { Ok(vmlinux) } else { Err(refuse("the kernel image holds no ELF kernel")) }
}

/// What unpacking xz may take: the dictionary of a kernel has 128 MiB, and `xz -9` makes one of 64.
pub(crate) const XZ_MEMORY_KIB: u32 = 512 << 10;

/// Unpacks by the first bytes; what is not compressed stays.
fn unpack(bytes: &[u8], limit: u64) -> Result<Vec<u8>, String> {
    let plain = |reader: &mut dyn Read| -> Result<Vec<u8>, String> {
        let mut plain = Vec::new();
        reader.take(limit + 1).read_to_end(&mut plain).map_err(|error| error.to_string())?;
        if plain.len() as u64 > limit { Err("it unfolds to too much".to_owned()) } else { Ok(plain) }
    };
    match bytes {
        [0x02, 0x21, 0x4c, 0x18, ..] => unpack_lz4_legacy(&bytes[4..], limit),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => plain(&mut zstd::Decoder::new(bytes).map_err(|error| error.to_string())?.single_frame()),
        [0x1f, 0x8b, ..] => plain(&mut flate2::read::GzDecoder::new(bytes)),
        // Kernels come with the filter for branches of x86 before it (Linux: `scripts/xz_wrap.sh`).
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => plain(&mut XzReader::new_mem_limit(bytes, false, XZ_MEMORY_KIB)),
        _ => Ok(bytes.to_vec()),
    }
}

/// The frame that Linux uses (LZ4 frame format, "legacy frame"): blocks of 8 MiB, each behind its compressed length.
fn unpack_lz4_legacy(mut bytes: &[u8], limit: u64) -> Result<Vec<u8>, String> {
    const BLOCK: usize = 8 << 20;
    let mut plain = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        // Another frame may follow directly.
        if length == 0x184c_2102 {
            bytes = rest;
            continue;
        }
        let block = rest.get(..length).ok_or("an LZ4 block is cut short")?;
        let begin = plain.len();
        if begin as u64 + BLOCK as u64 > limit {
            return Err("it unfolds to too much".to_owned());
        }
        plain.resize(begin + BLOCK, 0);
        let count = lz4_flex::block::decompress_into(block, &mut plain[begin..]).map_err(|error| error.to_string())?;
        plain.truncate(begin + count);
        bytes = &rest[length..];
    }
    Ok(plain)
}

/// Reads the whole of a bundle and compares it with its manifest.
///
/// # Errors
/// When a file differs.
pub fn verify(bundle: &KernelBundle) -> Result<(), BuildError> {
    for (path, file) in bundle.files() {
        let found = BlockMap::build(BufReader::new(File::open(&path).during("open", &path)?), |_, _| Ok(())).during("read", &path)?;
        if found != *file {
            return Err(BuildError::Cache { path: bundle.directory.clone(), reason: format!("{} is not what it was", path.display()) });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use lzma_rust2::{FilterType, XzOptions, XzWriter};

    use super::*;

    fn lz4(blocks: &[&[u8]]) -> Vec<u8> {
        let mut bytes = vec![0x02, 0x21, 0x4c, 0x18];
        for block in blocks {
            let packed = lz4_flex::block::compress(block);
            bytes.extend_from_slice(&u32::try_from(packed.len()).unwrap().to_le_bytes());
            bytes.extend(packed);
        }
        bytes
    }

    fn bz_image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * 512 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32 + 4).to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&[0; 4]);
        image
    }

    #[test]
    fn kernels_are_found_in_their_images() {
        let kernel = [b"\x7fELF".as_slice(), &[7; 100_000]].concat();
        for payload in [lz4(&[&kernel[..50_000], &kernel[50_000..]]), zstd::bulk::compress(&kernel, 1).unwrap()] {
            assert_eq!(extract_vmlinux(&bz_image(&payload)).unwrap(), kernel);
        }
        assert!(extract_vmlinux(&bz_image(&lz4(&[b"no kernel"]))).is_err());
        assert!(extract_vmlinux(b"short").is_err());
        let mut cut = bz_image(&lz4(&[&kernel]));
        cut.truncate(cut.len() - 40);
        assert!(extract_vmlinux(&cut).is_err());
    }

    /// As Debian's ordinary kernel is packed: with the filter for branches of x86, and a dictionary of 128 MiB.
    #[test]
    fn a_kernel_in_xz_is_unpacked() {
        // Calls, whose distances the filter changes.
        let kernel: Vec<u8> =
            b"\x7fELF".iter().copied().chain((0..20_000u32).flat_map(|at| [0xE8, at as u8, (at >> 8) as u8, 0, 0])).collect();
        let mut options = XzOptions::with_preset(1);
        options.prepend_pre_filter(FilterType::BcjX86, 0);
        options.lzma_options.dict_size = 128 << 20;
        let mut packed = XzWriter::new(Vec::new(), options).unwrap();
        packed.write_all(&kernel).unwrap();
        let packed = packed.finish().unwrap();
        assert!(packed.len() < kernel.len());
        assert!(extract_vmlinux(&bz_image(&packed)).unwrap() == kernel);
        assert!(unpack(&packed, 1000).unwrap_err().contains("too much"));
        assert!(unpack(&packed[..packed.len() / 2], MAX_VMLINUX).is_err());
    }

    #[test]
    fn bombs_are_refused() {
        let bomb = zstd::bulk::compress(&vec![0; 32 << 20], 1).unwrap();
        assert!(unpack(&bomb, 1 << 20).is_err());
        assert!(unpack(&lz4(&[&vec![0; 8 << 20]]), 1 << 20).is_err());
    }

    #[test]
    fn modules_say_what_they_need() {
        assert_eq!(module_needs(b"license=GPL\0depends=virtio,virtio-ring\0name=x\0"), ["virtio", "virtio_ring"]);
        assert!(module_needs(b"x\0depends=\0").is_empty());
    }
}
