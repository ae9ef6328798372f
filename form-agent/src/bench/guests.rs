//! The guests that are started: our own smallest one, and Linux with an initramfs of busybox.

use std::{
    fs,
    path::{Path, PathBuf},
};

use form_bundle::{
    KernelManifest, ModuleSet,
    initramfs::{Cpio, InitramfsError, MODULES_DIR},
    kernel::{MANIFEST_FILE, VMLINUX_FILE, module_path},
};

use super::{
    BenchError, first_program, io_error,
    machine::{Guest, MEMORY_MIB, OtherDisk},
};

/// What the Linux guest says when its first process runs.
pub const LINE: &str = "guest init runs";

/// Statically linked, as Debian's busybox-static installs it.
const BUSYBOX: &str = "/bin/busybox";

/// Nobody has to stop the guest: it powers off by itself.
const LIFE_SECONDS: u32 = 30;

/// A kernel bundle in a directory: of a store, or of the build cache.
pub struct Kernel {
    directory: PathBuf,
}

impl Kernel {
    pub fn open(directory: &Path) -> Result<Self, BenchError> {
        let kernel = Self { directory: directory.to_owned() };
        for file in [VMLINUX_FILE, MANIFEST_FILE] {
            if !directory.join(file).is_file() {
                return Err(BenchError::Missing(format!("{} is no kernel bundle: it has no {file}", directory.display())));
            }
        }
        Ok(kernel)
    }

    /// The bundle below `parent` that was made last.
    pub fn newest(parent: &Path) -> Result<Self, BenchError> {
        let bundles = fs::read_dir(parent).into_iter().flatten().flatten().filter(|entry| entry.path().join(MANIFEST_FILE).is_file());
        let newest = bundles.max_by_key(|entry| entry.metadata().and_then(|metadata| metadata.modified()).ok());
        match newest {
            Some(entry) => Self::open(&entry.path()),
            None => Err(BenchError::Missing("this host has no kernel yet: deploy something, or name a bundle with --kernel".to_owned())),
        }
    }

    /// The modules of a VM, in the order in which they are loaded.
    fn modules(&self) -> Result<Vec<(String, Vec<u8>)>, BenchError> {
        let path = self.directory.join(MANIFEST_FILE);
        let text = fs::read(&path).map_err(io_error(path.display().to_string()))?;
        let manifest = KernelManifest::decode(&text).map_err(|error| BenchError::Missing(format!("{}: {error}", path.display())))?;
        let read = |name: &String| {
            let path = self.directory.join(module_path(name));
            Ok((name.clone(), fs::read(&path).map_err(io_error(path.display().to_string()))?))
        };
        manifest.load_order(ModuleSet::Guest).iter().filter(|name| manifest.modules.contains_key(*name)).map(read).collect()
    }
}

/// A kernel, and nothing else.
fn bare(kernel: PathBuf) -> Guest {
    Guest { kernel, initramfs: None, devices: false, disks: Vec::new(), vhost: false, memory_mib: MEMORY_MIB, limit_mib: MEMORY_MIB }
}

/// The guest that does nothing but say its line.
pub fn first_program(directory: &Path) -> Result<Guest, BenchError> {
    let kernel = directory.join("first-program");
    fs::write(&kernel, first_program::elf(None, false)).map_err(io_error("write the first program"))?;
    Ok(bare(kernel))
}

/// The guest that has used each page of its `memory_mib` when it says its line.
pub fn full(directory: &Path, memory_mib: u32) -> Result<Guest, BenchError> {
    let kernel = directory.join(format!("full-{memory_mib}"));
    fs::write(&kernel, first_program::elf(Some(memory_mib << 20), false)).map_err(io_error("write the first program"))?;
    Ok(Guest { memory_mib: memory_mib.into(), limit_mib: 2 * u64::from(memory_mib), ..bare(kernel) })
}

/// As [`full`], and then says again and again that it runs.
pub fn ticking(directory: &Path, memory_mib: u32) -> Result<Guest, BenchError> {
    let kernel = directory.join(format!("ticking-{memory_mib}"));
    fs::write(&kernel, first_program::elf(Some(memory_mib << 20), true)).map_err(io_error("write the first program"))?;
    Ok(Guest { memory_mib: memory_mib.into(), limit_mib: 2 * u64::from(memory_mib), ..bare(kernel) })
}

/// Linux up to its first process. With `devices` the VM has them and that process loads their drivers before it says its line.
pub fn linux(kernel: &Kernel, directory: &Path, devices: bool) -> Result<Guest, BenchError> {
    let modules = if devices { kernel.modules()? } else { Vec::new() };
    let archive = initramfs(&busybox()?, &modules, None).map_err(|error| BenchError::Missing(error.to_string()))?;
    let path = directory.join(if devices { "devices.cpio" } else { "init.cpio" });
    fs::write(&path, archive).map_err(io_error("write the initramfs"))?;
    let kernel = kernel.directory.join(VMLINUX_FILE);
    Ok(Guest { initramfs: Some(path), devices, ..bare(kernel) })
}

/// As [`linux`] with devices, and then it does what `commands` say, a shell's; `measure` is the program `form-guest measure`.
pub fn measuring(kernel: &Kernel, directory: &Path, program: &Path, commands: &str, disks: Vec<OtherDisk>) -> Result<Guest, BenchError> {
    let program = fs::read(program).map_err(io_error(program.display().to_string()))?;
    let archive = initramfs(&busybox()?, &kernel.modules()?, Some((&program, commands)));
    let path = directory.join("measure.cpio");
    fs::write(&path, archive.map_err(|error| BenchError::Missing(error.to_string()))?).map_err(io_error("write the initramfs"))?;
    let kernel = kernel.directory.join(VMLINUX_FILE);
    Ok(Guest { initramfs: Some(path), devices: true, disks, ..bare(kernel) })
}

fn busybox() -> Result<Vec<u8>, BenchError> {
    fs::read(BUSYBOX).map_err(|error| {
        BenchError::Missing(format!("the guest is made of {BUSYBOX}, which cannot be read ({error}): install the package busybox-static"))
    })
}

fn initramfs(busybox: &[u8], modules: &[(String, Vec<u8>)], work: Option<(&[u8], &str)>) -> Result<Vec<u8>, InitramfsError> {
    let mut archive = Cpio::new();
    for directory in ["bin", "dev", "sys", MODULES_DIR] {
        archive.directory(directory, 0o755)?;
    }
    archive.file("bin/busybox", 0o755, busybox)?;
    let mut script = "#!/bin/busybox sh\n".to_owned();
    for (name, content) in modules {
        let path = format!("{MODULES_DIR}/{name}.ko");
        archive.file(&path, 0o644, content)?;
        script.push_str(&format!("/bin/busybox insmod /{path}\n"));
    }
    script.push_str(&format!("echo '{LINE}'\n"));
    if let Some((program, commands)) = work {
        archive.file("bin/form-guest", 0o755, program)?;
        script.push_str("/bin/busybox mount -t devtmpfs none /dev\n/bin/busybox mount -t sysfs none /sys\n");
        script.push_str(&format!("measure() {{ /bin/form-guest measure \"$@\"; }}\n{commands}"));
    }
    script.push_str(&format!("/bin/busybox sleep {LIFE_SECONDS}\n/bin/busybox poweroff -f\n"));
    archive.file("init", 0o755, script.as_bytes())?;
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_in_order_before_the_line() {
        let modules = [("b_first".to_owned(), b"1".to_vec()), ("a_second".to_owned(), b"2".to_vec())];
        let archive = String::from_utf8(initramfs(b"busybox", &modules, Some((b"guest", "measure network 1\n"))).unwrap()).unwrap();
        let places = ["insmod /modules/b_first.ko", "insmod /modules/a_second.ko", LINE, "measure network 1", "poweroff"]
            .map(|text| archive.find(text).unwrap());
        assert!(places.is_sorted(), "{places:?}");
    }

    #[test]
    fn a_directory_that_is_no_bundle_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Kernel::newest(directory.path()).is_err_and(|error| error.to_string().contains("--kernel")));
        fs::write(directory.path().join(VMLINUX_FILE), "x").unwrap();
        assert!(Kernel::open(directory.path()).is_err_and(|error| error.to_string().contains(MANIFEST_FILE)));
    }
}
