//! Images made of disks: partitioned, whole, damaged, of what cannot be read or started here.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use form_image::{BuildError, BuildEvent, BuildOptions, Builder, BuiltImage, CachePaths, Cancel, Disk};
use form_types::Spec;

const MIB: u64 = 1 << 20;

struct Machine {
    directory: tempfile::TempDir,
}

fn silent(_: BuildEvent<'_>) {}

/// The smallest ELF file that says where its PVH entry is; with another note it says something else.
fn kernel(note: u32) -> Vec<u8> {
    let mut bytes = vec![0; 64 + 56];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    for (at, byte) in [(18, 62), (32, 64), (54, 56), (56, 1), (64, 4), (72, 120), (96, 20)] {
        bytes[at] = byte;
    }
    for word in [4, 4, note] {
        bytes.extend_from_slice(&u32::to_le_bytes(word));
    }
    bytes.extend_from_slice(b"Xen\0abcd");
    bytes
}

fn run(program: &str, words: &[&str], input: &str) {
    let mut command = Command::new(program);
    let paths = std::env::var("PATH").unwrap_or_default();
    command.args(words).env("PATH", format!("{paths}:/usr/sbin:/sbin")).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{program} {words:?}");
}

fn spec(text: &str) -> Spec {
    formfile::check("Formfile", text, &formfile::LowerOptions::default()).spec.unwrap()
}

impl Machine {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn builder(&self) -> Builder {
        Builder::new(CachePaths::new(self.path("cache")))
    }

    /// A system with one kernel of its own, whose modules are all built in but one.
    fn system(&self) -> PathBuf {
        let root = self.path("system");
        let write = |path: &str, bytes: &[u8]| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        write("etc/fstab", b"PARTUUID=1-1 / ext4 defaults 0 1\ntmpfs /scratch tmpfs size=1M 0 0\n");
        write("etc/machine-id", b"0123456789abcdef0123456789abcdef\n");
        write("etc/cloud/cloud.cfg", b"users: [default]\n");
        write("usr/bin/hello", b"#!/bin/sh\necho hello\n");
        write("boot/vmlinuz-6.1.0-9-x", &kernel(18));
        write("boot/vmlinuz-6.1.0-31-x", &kernel(18));
        let builtin = ["virtio_pci", "virtio_blk", "vmw_vsock_virtio_transport", "virtio_balloon", "virtio_rng", "virtio_console", "ext4"];
        let builtin: String = builtin.iter().map(|name| format!("kernel/x/{name}.ko\n")).collect();
        write("usr/lib/modules/6.1.0-31-x/modules.builtin", builtin.as_bytes());
        write("usr/lib/modules/6.1.0-31-x/kernel/net/virtio_net.ko", b"\0depends=\0");
        write("usr/lib/modules/6.1.0-31-x/kernel/other.ko", b"\0depends=virtio_net\0");
        symlink("usr/lib", root.join("lib")).unwrap();
        root
    }

    fn mke2fs(&self, name: &str, from: &Path, more: &[&str]) -> PathBuf {
        let path = self.path(name);
        let words = [&["-q", "-F", "-t", "ext4", "-d", from.to_str().unwrap()], more, &[path.to_str().unwrap(), "24M"]].concat();
        run("mke2fs", &words, "");
        path
    }

    /// A disk with these in its partitions, from the second MiB on.
    fn disk(&self, name: &str, label: &str, parts: &[&Path]) -> PathBuf {
        let path = self.path(name);
        let disk = File::create(&path).unwrap();
        disk.set_len((parts.len() as u64 * 24 + 4) * MIB).unwrap();
        let mut script = format!("label: {label}\n");
        for (index, part) in parts.iter().enumerate() {
            let begin = (index as u64 * 24 + 1) * MIB;
            script.push_str(&format!("start={}, size={}\n", begin / 512, 24 * MIB / 512));
            disk.write_all_at(&fs::read(part).unwrap(), begin).unwrap();
        }
        run("sfdisk", &["-q", path.to_str().unwrap()], &script);
        path
    }

    fn import(&self, path: &Path) -> Result<BuiltImage, BuildError> {
        let file = File::open(path).unwrap();
        let disk = Disk { size: file.metadata().unwrap().len(), file, from: "cloud.raw".to_owned() };
        self.builder().import_disk(&disk, &spec("NAME cloud\n"), &Cancel::new(), &mut silent)
    }

    /// Why a disk is refused; nothing of it is left.
    fn refuses(&self, path: &Path) -> String {
        let error = self.import(path).unwrap_err();
        assert!(matches!(error, BuildError::Disk { .. }), "{error:?}");
        assert_eq!(self.builder().store().list().unwrap().len(), 0);
        for place in ["cache/layers", "cache/own-kernels"] {
            assert!(fs::read_dir(self.path(place)).map_or(0, Iterator::count) == 0, "{place} after {error}");
        }
        error.to_string()
    }

    /// The text of a file of an image.
    fn text(&self, image: &str, path: &str) -> String {
        let disk = self.path("exported");
        self.builder().store().export(&image.parse().unwrap(), &disk).unwrap();
        let output = Command::new("/sbin/debugfs").args(["-R", &format!("cat {path}")]).arg(&disk).output().unwrap();
        fs::remove_file(disk).unwrap();
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn a_disk_becomes_an_image_with_its_own_kernel() {
    let machine = Machine::new();
    let system = machine.system();
    let root = machine.mke2fs("root", &system, &["-O", "metadata_csum_seed"]);
    let other = machine.path("vfat");
    fs::write(&other, vec![0; MIB as usize]).unwrap();
    let image = machine.import(&machine.disk("disk", "gpt", &[&other, &root])).unwrap();
    let own = image.manifest.kernel.clone().unwrap();
    assert_eq!((own.release.as_str(), image.version, image.spec.resources.disk_gib), ("6.1.0-31-x", 1, 5));
    assert_eq!(machine.text("cloud", "/usr/bin/hello"), "#!/bin/sh\necho hello\n");
    assert_eq!(machine.text("cloud", "/etc/fstab"), "# not here: PARTUUID=1-1 / ext4 defaults 0 1\ntmpfs /scratch tmpfs size=1M 0 0\n");
    assert_eq!(machine.text("cloud", "/etc/machine-id"), "");

    // The same files are the same image, wherever they lie: without a table, and with /boot in a partition of its own.
    assert!(machine.import(&root).unwrap().unchanged);
    let boot = machine.mke2fs("boot", &system.join("boot"), &[]);
    fs::remove_dir_all(system.join("boot")).unwrap();
    fs::create_dir(system.join("boot")).unwrap();
    let rest = machine.mke2fs("rest", &system, &[]);
    let split = machine.import(&machine.disk("split", "dos", &[&boot, &rest])).unwrap();
    assert_eq!(split.manifest.kernel, Some(own.clone()));

    // What is built on it boots with it too; where the bundle is not, it is made again, the same.
    let child = spec("NAME child\nFROM image:cloud:1\nCOPY <<note /etc/note\n  of a child\nnote\n");
    let child = machine.builder().build(&child, machine.directory.path(), &BuildOptions::default(), &mut silent).unwrap();
    assert_eq!(child.manifest.kernel, Some(own.clone()));
    let bundle = |image: &BuiltImage| machine.builder().own_kernel(&image.manifest, &own, &Cancel::new(), &mut silent);
    let first = bundle(&child).unwrap();
    assert_eq!(fs::read(first.vmlinux()).unwrap(), kernel(18));
    assert_eq!(first.manifest.modules.keys().collect::<Vec<_>>(), ["virtio_net"]);
    fs::remove_dir_all(machine.path("cache/own-kernels")).unwrap();
    assert_eq!(bundle(&child).unwrap().digest, own.bundle);

    // It travels, and is made anew where it arrives.
    let there = Machine::new();
    let original = machine.builder().original(&"cloud:1".parse().unwrap()).unwrap();
    machine.builder().export(&original, &machine.path("x.tar"), false, &Cancel::new(), &mut silent).unwrap();
    let renamed = "other".parse().unwrap();
    let arrived = there.builder().import(&machine.path("x.tar"), Some(&renamed), &Cancel::new(), &mut silent).unwrap();
    assert_eq!(arrived.manifest.kernel, Some(own.clone()));
    assert_eq!(there.builder().own_kernel(&arrived.manifest, &own, &Cancel::new(), &mut silent).unwrap().digest, own.bundle);

    // With the images their kernels go.
    let kernels = || fs::read_dir(machine.path("cache/own-kernels")).unwrap().count();
    machine.builder().prune(&mut silent).unwrap();
    assert_eq!(kernels(), 1);
    for name in ["cloud", "child"] {
        machine.builder().store().remove(&name.parse().unwrap()).unwrap();
    }
    machine.builder().prune(&mut silent).unwrap();
    assert_eq!(kernels(), 0);
}

#[test]
fn what_cannot_be_read_or_started_is_refused_with_the_reason() {
    let machine = Machine::new();
    let system = machine.system();
    let root = machine.mke2fs("root", &system, &[]);
    let disk = machine.disk("disk", "gpt", &[&root]);
    let at_root = |place: u64, bytes: &[u8]| {
        let copy = machine.path("changed");
        fs::copy(&disk, &copy).unwrap();
        OpenOptions::new().write(true).open(&copy).unwrap().write_all_at(bytes, MIB + place).unwrap();
        machine.refuses(&copy)
    };
    assert!(at_root(1024 + 0x60, &[0xc6]).contains("not unmounted cleanly"));
    assert!(at_root(1024 + 0x62, &[1]).contains("encrypted files"));
    assert!(at_root(1024 + 0x38, b"\0\0").contains("no partition"));
    let no_ext4 = |mark: &[u8], place: u64| {
        let mut bytes = vec![0; 1 << 20];
        bytes[place as usize..place as usize + mark.len()].copy_from_slice(mark);
        fs::write(machine.path("mark"), bytes).unwrap();
        machine.refuses(&machine.disk("marked", "gpt", &[&machine.path("mark")]))
    };
    assert!(no_ext4(b"LUKS\xba\xbe", 0).contains("partition 1 is encrypted (LUKS)"));
    assert!(no_ext4(b"XFSB", 0).contains("partition 1 is XFS"));
    assert!(no_ext4(b"_BHRfS_M", 0x1_0040).contains("partition 1 is Btrfs"));
    assert!(machine.refuses(&machine.disk("twice", "gpt", &[&root, &root])).contains("partitions 1, 2"));

    let cut = machine.path("cut");
    fs::copy(&disk, &cut).unwrap();
    OpenOptions::new().write(true).open(&cut).unwrap().set_len(20 * MIB).unwrap();
    assert!(machine.refuses(&cut).contains("cut short"));
    fs::write(&cut, "no disk").unwrap();
    assert!(machine.refuses(&cut).contains("no partition table"));

    let again = || machine.refuses(&machine.mke2fs("again", &system, &[]));
    fs::write(system.join("boot/vmlinuz-6.1.0-31-x"), kernel(17)).unwrap();
    assert!(again().contains("6.1.0-31-x was made without CONFIG_PVH"));
    fs::write(system.join("boot/vmlinuz-6.1.0-31-x"), "no kernel").unwrap();
    assert!(again().contains("no bzImage"));
    fs::write(system.join("boot/vmlinuz-6.1.0-31-x"), kernel(18)).unwrap();
    fs::remove_file(system.join("usr/lib/modules/6.1.0-31-x/kernel/net/virtio_net.ko")).unwrap();
    assert!(again().contains("no module `virtio_net`"));
    fs::remove_file(system.join("boot/vmlinuz-6.1.0-31-x")).unwrap();
    assert!(again().contains("6.1.0-9-x has no modules"));
    fs::remove_dir_all(system.join("boot")).unwrap();
    assert!(again().contains("linux-image-cloud-amd64"));
}
