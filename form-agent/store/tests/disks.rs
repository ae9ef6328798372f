//! Disks of VMs, on a file system that shares blocks and on one that does not, and on full ones.

#[allow(dead_code)]
mod fixture;

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use fixture::{Mount, image, import, listing, rootfs};
use form_store::{DiskFormat, Store, StoreError};
use form_types::VmId;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, file::File as ImageFile, qcow2::Qcow2, raw::Raw};

const VM: VmId = VmId::from_bytes([7; 16]);
const MIB: u64 = 1 << 20;

fn open_raw(path: &Path, write: bool) -> FormatAccess<ImageFile> {
    let file = fs::OpenOptions::new().read(true).write(write).open(path).unwrap();
    let raw = Raw::open_image(ImageFile::try_from(file).unwrap(), write).unwrap();
    FormatAccess::new(raw)
}

fn open_overlay(path: &Path, backing: Option<&Path>) -> FormatAccess<ImageFile> {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let backing = backing.map(|path| open_raw(path, false));
    let builder = Qcow2::<ImageFile>::builder(ImageFile::try_from(file).unwrap()).backing(backing).write(true);
    FormatAccess::new(builder.open(DenyImplicitOpenGate::default()).unwrap())
}

#[test]
fn an_overlay_reads_the_image_and_keeps_what_is_written() {
    let root = Mount::tmpfs(64 << 20);
    let store = Store::open(root.path()).unwrap();
    let bytes = rootfs(&[Some(1), None, Some(2)]);
    let image = import(&store, "web", &bytes);
    let disk = store.create_disk(&VM, &image.digest, 64 * MIB).unwrap();
    assert_eq!((disk.format, disk.backing.as_slice(), disk.size_bytes), (DiskFormat::Qcow2, [image.rootfs.clone()].as_slice(), 64 * MIB));
    assert!(matches!(store.create_disk(&VM, &image.digest, 64 * MIB), Err(StoreError::DiskExists(VM))));
    let overlay = open_overlay(&disk.path, Some(&disk.backing[0]));
    assert_eq!(overlay.size(), 64 * MIB);
    let mut there = vec![0xaa; bytes.len() + 4096];
    overlay.read(there.as_mut_slice(), 0).unwrap();
    assert_eq!(there[..bytes.len()], bytes);
    assert!(there[bytes.len()..].iter().all(|byte| *byte == 0), "behind the image there are zeros");
    overlay.write(vec![9; 4096].as_slice(), 32 * MIB).unwrap();
    overlay.flush().unwrap();
    drop(overlay);
    assert!(matches!(store.remove(&image.digest, &[]), Err(StoreError::ImageInUse { .. })));

    drop(store);
    let store = Store::open(root.path()).unwrap();
    assert_eq!(store.open_disk(&VM).unwrap(), disk);
    assert!(matches!(store.grow_disk(&VM, MIB), Err(StoreError::DiskTooSmall { .. })));
    let grown = store.grow_disk(&VM, 128 * MIB).unwrap();
    let overlay = open_overlay(&grown.path, Some(&grown.backing[0]));
    let mut there = vec![0; 4096];
    overlay.read(there.as_mut_slice(), 32 * MIB).unwrap();
    assert_eq!((overlay.size(), there), (128 * MIB, vec![9; 4096]));
    assert_eq!(store.disks().unwrap(), [VM]);
    store.remove_disk(&VM).unwrap();
    store.remove_disk(&VM).unwrap();
    assert!(matches!(store.open_disk(&VM), Err(StoreError::NoDisk(VM))));
    assert_eq!(store.disks().unwrap(), []);
    assert!(!root.path().join("vms").join(VM.to_string()).exists());
    store.remove(&image.digest, &[]).unwrap();
}

/// XFS frees what was removed a little later.
fn settled_free(store: &Store) -> u64 {
    let mut last = 0;
    for _ in 0..50 {
        rustix::fs::sync();
        std::thread::sleep(std::time::Duration::from_millis(100));
        let now = store.space().unwrap().free;
        if now == last {
            break;
        }
        last = now;
    }
    last
}

#[test]
fn a_file_system_that_can_shares_the_blocks() {
    let root = Mount::xfs(512 << 20);
    let store = Store::open(root.path()).unwrap();
    let content: Vec<Option<u64>> = (1..=256).map(Some).collect();
    let bytes = rootfs(&content);
    let image = import(&store, "web", &bytes);
    let before = settled_free(&store);
    let disk = store.create_disk(&VM, &image.digest, 64 * MIB).unwrap();
    assert_eq!((disk.format, disk.backing.len(), fs::metadata(&disk.path).unwrap().len()), (DiskFormat::Raw, 0, 64 * MIB));
    assert_eq!(fs::read(&disk.path).unwrap()[..bytes.len()], bytes);
    // A new image that differs in one block takes that block alone.
    let mut next = content;
    next[100] = Some(1000);
    import(&store, "web", &rootfs(&next));
    let begun = std::time::Instant::now();
    loop {
        let taken = before.saturating_sub(settled_free(&store));
        if taken < 4 * MIB {
            break;
        }
        // What frees may wait for a processor longer than two looks are apart.
        assert!(begun.elapsed() < std::time::Duration::from_secs(60), "a disk and an image of 16 MiB took {taken} bytes");
    }
    // The copy is a copy: the image stays as it is, and may go.
    assert_eq!(fs::metadata(&disk.path).unwrap().mode() & 0o7777, 0o600);
    fs::write(&disk.path, b"changed").unwrap();
    assert!(store.verify(&image.digest).unwrap().damaged.is_empty());
    store.remove(&image.digest, &[]).unwrap();
    assert_eq!(store.grow_disk(&VM, 128 * MIB).unwrap().size_bytes, 128 * MIB);
    assert_eq!(fs::metadata(&disk.path).unwrap().len(), 128 * MIB);
}

#[test]
fn a_disk_holds_at_least_the_image() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let image = import(&store, "web", &rootfs(&[Some(1), Some(2)]));
    let before = listing(root.path());
    assert!(matches!(store.create_disk(&VM, &image.digest, 65536), Err(StoreError::DiskTooSmall { least: 131_072, .. })));
    assert_eq!(listing(root.path()), before);
    assert!(store.space().unwrap().free > 0);
}

#[test]
fn a_full_file_system_leaves_nothing_and_the_next_try_works() {
    let root = Mount::tmpfs(4 << 20);
    let store = Store::open(root.path()).unwrap();
    let content: Vec<Option<u64>> = (1..=40).map(Some).collect();
    let (manifest, blocks) = image("web", &rootfs(&content));
    // 2.5 MiB of blocks fit, the image beside them does not.
    blocks.upload(&store);
    let before = listing(root.path());
    let free = store.space().unwrap().free;
    let error = store.import(&manifest).unwrap_err();
    assert!(error.is_no_room(), "{error}");
    assert!(error.to_string().contains("form image rm"), "{error}");
    let kept: Vec<_> = before.iter().filter(|(path, _)| !path.starts_with(root.path().join("vm-images/versions"))).collect();
    let after = listing(root.path());
    assert_eq!(after.iter().collect::<Vec<_>>(), kept);
    assert_eq!(store.space().unwrap().free, free);
    assert!(store.images().unwrap().is_empty());

    // Full to the last page: a block, a disk.
    let (_, more) = image("web", &rootfs(&(41..=80).map(Some).collect::<Vec<_>>()));
    let refused = more.0.iter().find_map(|(digest, frame)| store.put_block(digest, frame).err()).unwrap();
    assert!(refused.is_no_room(), "{refused}");
    assert!(store.remove_stale_blocks(std::time::Duration::ZERO).unwrap() > 40);
    let small = import(&store, "small", &rootfs(&[Some(1)]));
    fs::write(root.path().join("filler"), vec![1; 8 << 20]).unwrap_err();
    let before = listing(root.path());
    let error = store.create_disk(&VM, &small.digest, 64 * MIB).unwrap_err();
    assert!(error.is_no_room(), "{error}");
    assert_eq!(listing(root.path()), before);
    fs::remove_file(root.path().join("filler")).unwrap();
    store.create_disk(&VM, &small.digest, 64 * MIB).unwrap();
}

#[test]
fn a_copy_has_what_the_disk_has_and_goes_its_own_way() {
    const COPY: VmId = VmId::from_bytes([8; 16]);
    let root = Mount::tmpfs(64 << 20);
    let store = Store::open(root.path()).unwrap();
    let image = import(&store, "web", &rootfs(&[Some(1), None]));
    assert!(matches!(store.clone_disk(&VM, &COPY), Err(StoreError::NoDisk(VM))));
    let disk = store.create_disk(&VM, &image.digest, 64 * MIB).unwrap();
    let write = |path: &Path, byte: u8, at: u64| {
        let overlay = open_overlay(path, Some(&image.rootfs));
        overlay.write(vec![byte; 4096].as_slice(), at).unwrap();
        overlay.flush().unwrap();
    };
    write(&disk.path, 9, 32 * MIB);
    let copy = store.clone_disk(&VM, &COPY).unwrap();
    assert_eq!((copy.format, &copy.backing, copy.image, copy.size_bytes), (disk.format, &disk.backing, disk.image, disk.size_bytes));
    assert!(matches!(store.clone_disk(&VM, &COPY), Err(StoreError::DiskExists(COPY))));
    let (one, other) = (fs::metadata(&disk.path).unwrap(), fs::metadata(&copy.path).unwrap());
    assert!(other.blocks() <= one.blocks() && other.len() == one.len(), "holes stay holes");

    write(&copy.path, 7, 32 * MIB);
    let byte = |path: &Path| {
        let mut there = vec![0; 1];
        open_overlay(path, Some(&image.rootfs)).read(there.as_mut_slice(), 32 * MIB).unwrap();
        there[0]
    };
    assert_eq!((byte(&disk.path), byte(&copy.path)), (9, 7));
    // The copy needs the image as the disk did.
    store.remove_disk(&VM).unwrap();
    assert!(matches!(store.remove(&image.digest, &[]), Err(StoreError::ImageInUse { .. })));
    store.remove_disk(&COPY).unwrap();
    store.remove(&image.digest, &[]).unwrap();
}

#[test]
fn a_copy_for_which_there_is_no_room_leaves_nothing() {
    const COPY: VmId = VmId::from_bytes([8; 16]);
    let root = Mount::tmpfs(12 << 20);
    let store = Store::open(root.path()).unwrap();
    let image = import(&store, "web", &rootfs(&[Some(1)]));
    let disk = store.create_disk(&VM, &image.digest, 64 * MIB).unwrap();
    let overlay = open_overlay(&disk.path, Some(&image.rootfs));
    overlay.write(vec![9; 7 << 20].as_slice(), 0).unwrap();
    overlay.flush().unwrap();
    drop(overlay);
    let before = listing(root.path());
    assert!(store.clone_disk(&VM, &COPY).unwrap_err().is_no_room());
    assert_eq!(listing(root.path()), before);
}
