//! An initramfs with busybox, the modules that the tests load, and a script.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Modules that scripts may load, by name, each before those that need it.
const MODULES: [&str; 12] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio-rng",
    "virtio_balloon",
    "button",
];
const MORE_MODULES: [&str; 5] = ["virtio_mem", "evdev", "vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"];
/// Speaks vsock, which busybox does not; it and what it needs.
const PERL: [&str; 5] = [
    "/usr/bin/perl",
    "/lib64/ld-linux-x86-64.so.2",
    "/lib/x86_64-linux-gnu/libc.so.6",
    "/lib/x86_64-linux-gnu/libm.so.6",
    "/lib/x86_64-linux-gnu/libcrypt.so.1",
];

const PROLOGUE: &str = "#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
insmod() { /bin/busybox insmod /modules/$1.ko || echo NO MODULE $1; }
loaded=
insmod_virtio() {
  if [ -z \"$loaded\" ]; then
    for m in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci failover net_failover; do insmod $m; done
    loaded=yes
  fi
  insmod $1
}
";

/// The kernel that the environment names.
pub fn kernel() -> PathBuf {
    std::env::var_os("FORM_TEST_KERNEL").expect("FORM_TEST_KERNEL: an uncompressed kernel with PVH").into()
}

/// Two segments, so that the VM has something to put together: programs and modules; the script.
pub fn initramfs(script: &str, perl: bool) -> [Vec<u8>; 2] {
    let mut base = Archive::default();
    for directory in ["bin", "dev", "proc", "sys", "tmp", "mnt", "modules"] {
        base.add(directory, 0o040_755, &[]);
    }
    base.add("bin/busybox", 0o100_755, &fs::read(busybox()).unwrap());
    base.link("bin/sh", "busybox");
    let modules = PathBuf::from(std::env::var_os("FORM_TEST_MODULES").expect("FORM_TEST_MODULES: the kernel's modules"));
    for name in MODULES.iter().chain(&MORE_MODULES) {
        let path = find(&modules, &format!("{name}.ko")).unwrap_or_else(|| panic!("no {name}.ko below {}", modules.display()));
        base.add(&format!("modules/{name}.ko"), 0o100_644, &fs::read(path).unwrap());
    }
    if perl {
        for directory in ["usr", "usr/bin", "lib64", "lib", "lib/x86_64-linux-gnu"] {
            base.add(directory, 0o040_755, &[]);
        }
        for path in PERL {
            base.add(&path[1..], 0o100_755, &fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}")));
        }
        base.link("bin/perl", "/usr/bin/perl");
    }
    let mut init = Archive::default();
    init.add("init", 0o100_755, format!("{PROLOGUE}{script}\n").as_bytes());
    [base.finish(), init.finish()]
}

fn busybox() -> PathBuf {
    let found = Command::new("sh").args(["-c", "command -v busybox"]).output().unwrap();
    assert!(found.status.success(), "a static busybox is needed (package busybox-static)");
    String::from_utf8(found.stdout).unwrap().trim().into()
}

/// The kernel takes `-` and `_` in the name of a module as the same, and so do those who store them.
fn find(directory: &Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(directory).ok()?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if let Some(found) = find(&path, name) {
                return Some(found);
            }
        } else if entry.file_name().to_string_lossy().replace('-', "_") == name.replace('-', "_") {
            return Some(path);
        }
    }
    None
}

/// A cpio archive in the "newc" format (Linux: Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let fields = [self.inode, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn link(&mut self, name: &str, target: &str) {
        self.add(name, 0o120_777, target.as_bytes());
    }

    /// One byte of padding is left out: the VM pads each segment.
    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes.truncate(self.bytes.len() - 1);
        self.bytes
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
