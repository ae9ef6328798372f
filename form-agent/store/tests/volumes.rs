//! Volumes: on a file system that shares blocks and on one that does not, on full ones, and against foreign programs.

#[allow(dead_code)]
mod fixture;

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    process::Command,
    sync::Arc,
};

use fixture::{Mount, listing, noise};
use form_store::{Pool, Store, StoreError, local_pool};
use form_types::{VolumeFormat, VolumeId};
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, file::File as ImageFile, qcow2::Qcow2};

const DATA: VolumeId = VolumeId::from_bytes([7; 16]);
const COPY: VolumeId = VolumeId::from_bytes([8; 16]);
const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB + 512;

fn pool(store: &Store) -> Arc<Pool> {
    store.pool(&local_pool()).unwrap()
}

fn qcow2(path: &std::path::Path) -> FormatAccess<ImageFile> {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let builder = Qcow2::<ImageFile>::builder(ImageFile::try_from(file).unwrap()).backing(None).write(true);
    FormatAccess::new(builder.open(DenyImplicitOpenGate::default()).unwrap())
}

#[test]
fn a_volume_has_its_size_to_the_byte_and_keeps_what_is_written() {
    let root = Mount::tmpfs(64 << 20);
    for format in [VolumeFormat::Raw, VolumeFormat::Qcow2] {
        let store = Store::open(root.path()).unwrap();
        let entry = pool(&store).create(&DATA, format, SIZE).unwrap();
        assert_eq!((entry.size_bytes, entry.format), (SIZE, format));
        assert!(entry.allocated_bytes < MIB, "{entry:?} takes no room before it holds anything");
        assert_eq!(fs::metadata(&entry.path).unwrap().mode() & 0o7777, 0o600);
        assert!(matches!(pool(&store).create(&DATA, format, SIZE), Err(StoreError::VolumeExists(DATA))));
        assert!(pool(&store).open_volume(&DATA, false).unwrap().is_blank);
        match format {
            VolumeFormat::Raw => fs::OpenOptions::new().write(true).open(&entry.path).unwrap().write_all_at(b"kept", 40 * MIB).unwrap(),
            VolumeFormat::Qcow2 => {
                let image = qcow2(&entry.path);
                assert_eq!(image.size(), SIZE);
                image.write(b"kept".as_slice(), 40 * MIB).unwrap();
                image.flush().unwrap();
            }
        }
        drop(store);

        let store = Store::open(root.path()).unwrap();
        assert!(!pool(&store).open_volume(&DATA, true).unwrap().is_blank);
        assert!(matches!(pool(&store).grow(&DATA, 32 * MIB), Err(StoreError::VolumeShrinks { has: SIZE, .. })));
        assert!(matches!(pool(&store).grow(&DATA, SIZE + 1), Err(StoreError::VolumeSize(_))));
        let grown = pool(&store).grow(&DATA, 128 * MIB).unwrap();
        assert_eq!((grown.size_bytes, pool(&store).volume(&DATA).unwrap().size_bytes), (128 * MIB, 128 * MIB));
        let mut there = [0; 4];
        match format {
            VolumeFormat::Raw => fs::File::open(&entry.path).unwrap().read_exact_at(&mut there, 40 * MIB).unwrap(),
            VolumeFormat::Qcow2 => {
                let image = qcow2(&entry.path);
                assert_eq!(image.size(), 128 * MIB);
                image.read(there.as_mut_slice(), 40 * MIB).unwrap();
            }
        }
        assert_eq!(&there, b"kept");
        assert_eq!(pool(&store).volumes().unwrap(), [DATA]);
        pool(&store).remove(pool(&store).hold(&DATA).unwrap()).unwrap();
        pool(&store).remove(pool(&store).hold(&DATA).unwrap()).unwrap();
        assert_eq!(pool(&store).volumes().unwrap(), []);
        assert!(matches!(pool(&store).volume(&DATA), Err(StoreError::NoVolume(DATA))));
    }
}

#[test]
fn a_volume_that_is_gone_is_never_made_anew() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (name, directory) = ("fast".parse().unwrap(), root.path().join("mnt/fast"));
    // Not mounted yet.
    store.add_pool("fast".parse().unwrap(), directory.clone()).unwrap();
    let fast = store.pool(&name).unwrap();
    let error = fast.ensure(&DATA, VolumeFormat::Raw, SIZE).unwrap_err().to_string();
    assert!(error.contains("mnt/fast"), "{error}");
    fs::create_dir_all(&directory).unwrap();
    fast.ensure(&DATA, VolumeFormat::Raw, SIZE).unwrap();
    fast.ensure(&DATA, VolumeFormat::Raw, SIZE).unwrap();

    // Unmounted, and an empty directory in its place.
    fs::rename(&directory, root.path().join("elsewhere")).unwrap();
    fs::create_dir(&directory).unwrap();
    for error in [
        fast.ensure(&DATA, VolumeFormat::Raw, SIZE).unwrap_err(),
        fast.create(&DATA, VolumeFormat::Raw, SIZE).unwrap_err(),
        fast.open_volume(&DATA, false).unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::VolumeGone { id: DATA, .. }), "{error}");
        assert!(error.to_string().contains("mounted"), "{error}");
    }
    fs::remove_dir(&directory).unwrap();
    fs::rename(root.path().join("elsewhere"), &directory).unwrap();
    fast.open_volume(&DATA, false).unwrap();

    // Truncated by somebody: not opened, so that nothing is written to what is left.
    let path = fast.volume(&DATA).unwrap().path;
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(MIB).unwrap();
    assert!(matches!(fast.open_volume(&DATA, false), Err(StoreError::Damaged { .. })));
    fs::remove_file(path).unwrap();
    assert!(matches!(fast.ensure(&DATA, VolumeFormat::Raw, SIZE), Err(StoreError::VolumeGone { .. })));
    fast.remove(fast.hold(&DATA).unwrap()).unwrap();
    fast.create(&DATA, VolumeFormat::Raw, SIZE).unwrap();
}

#[test]
fn what_cannot_be_noted_is_not_made() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let made = root.path().join("volumes-made");
    fs::rename(&made, root.path().join("elsewhere")).unwrap();
    let _ = pool(&store).create(&DATA, VolumeFormat::Raw, SIZE).unwrap_err();
    assert_eq!(pool(&store).volumes().unwrap(), [], "the caller was told that there is none");
    fs::rename(root.path().join("elsewhere"), &made).unwrap();
    pool(&store).create(&DATA, VolumeFormat::Raw, SIZE).unwrap();
}

#[test]
fn a_volume_of_a_pool_that_is_away_is_not_taken_for_removed() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (name, directory) = ("fast".parse().unwrap(), root.path().join("fast"));
    fs::create_dir(&directory).unwrap();
    store.add_pool("fast".parse().unwrap(), directory.clone()).unwrap();
    let fast = store.pool(&name).unwrap();
    fast.create(&DATA, VolumeFormat::Raw, SIZE).unwrap();
    fs::rename(&directory, root.path().join("elsewhere")).unwrap();
    let refused = fast.hold(&DATA).unwrap_err().to_string();
    assert!(refused.contains("/fast"), "{refused}");
    fs::rename(root.path().join("elsewhere"), &directory).unwrap();
    let held = fast.hold(&DATA).unwrap();
    assert!(matches!(fast.open_volume(&DATA, false), Err(StoreError::VolumeInUse { .. })), "nobody gets it while it is held");
    fast.remove(held).unwrap();
    assert_eq!(fast.volumes().unwrap(), []);
}

#[test]
fn a_clone_holds_the_same_and_is_its_own() {
    let (tmpfs, xfs) = (Mount::tmpfs(64 << 20), Mount::xfs(512 << 20));
    for (root, shares) in [(&tmpfs, false), (&xfs, true)] {
        let store = Store::open(root.path()).unwrap();
        let entry = pool(&store).create(&DATA, VolumeFormat::Raw, SIZE).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&entry.path).unwrap();
        file.write_all_at(&noise(1, 8 << 20), 0).unwrap();
        file.write_all_at(b"end", SIZE - 3).unwrap();
        file.sync_all().unwrap();
        let before = store.space().unwrap().free;
        let copy = pool(&store).clone_volume(&DATA, &COPY).unwrap();
        let taken = before.saturating_sub(store.space().unwrap().free);
        assert_eq!(copy.size_bytes, SIZE);
        assert_eq!(taken < 4 * MIB, shares, "the copy took {taken} bytes");
        assert!(taken < 16 * MIB, "holes stay holes: {taken}");
        assert_eq!(fs::read(&copy.path).unwrap(), fs::read(&entry.path).unwrap());
        fs::OpenOptions::new().write(true).open(&copy.path).unwrap().write_all_at(b"other", 0).unwrap();
        assert_eq!(fs::read(&entry.path).unwrap()[..8 << 20], noise(1, 8 << 20));
        assert!(matches!(pool(&store).clone_volume(&DATA, &COPY), Err(StoreError::VolumeExists(COPY))));
    }
}

#[test]
fn a_second_writer_is_kept_out_whoever_it_is() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let entry = pool(&store).create(&DATA, VolumeFormat::Raw, SIZE).unwrap();
    let open = pool(&store).open_volume(&DATA, false).unwrap();
    let refused = [
        pool(&store).open_volume(&DATA, false).map(drop),
        pool(&store).open_volume(&DATA, true).map(drop),
        pool(&store).grow(&DATA, 128 * MIB).map(drop),
        pool(&store).clone_volume(&DATA, &COPY).map(drop),
        pool(&store).hold(&DATA).map(drop),
    ];
    for result in refused {
        assert!(matches!(result, Err(StoreError::VolumeInUse { .. })), "{result:?}");
    }
    // A foreign program that heeds locks: refused while we have it ...
    let path = entry.path.to_str().unwrap();
    let write = || Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k", path]).output().expect("qemu-utils is installed");
    let said = String::from_utf8_lossy(&write().stderr).into_owned();
    assert!(said.contains("lock"), "{said}");
    drop(open);
    assert!(write().status.success());
    // ... and it keeps us out, by name.
    let piped = std::process::Stdio::piped;
    let mut other = Command::new("qemu-io").args(["-f", "raw", path]).stdin(piped()).stdout(piped()).spawn().unwrap();
    // It asks for commands once it has it. Whoever tries it out before may keep it from having it, and it does not try again.
    let mut prompt = [0; 9];
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    assert_eq!(&prompt, b"qemu-io> ");
    let refused = pool(&store).open_volume(&DATA, false).err();
    for reading in [pool(&store).open_volume(&DATA, true).map(drop), pool(&store).clone_volume(&DATA, &COPY).map(drop)] {
        assert!(matches!(reading, Err(StoreError::VolumeInUse { .. })), "it may write while we read: {reading:?}");
    }
    other.kill().unwrap();
    other.wait().unwrap();
    let refused = refused.expect("the other program has it").to_string();
    assert!(refused.contains("qemu-io") && refused.contains("pid"), "{refused}");
    // Readers beside each other.
    let _one = pool(&store).open_volume(&DATA, true).unwrap();
    let _two = pool(&store).open_volume(&DATA, true).unwrap();
    assert!(matches!(pool(&store).open_volume(&DATA, false), Err(StoreError::VolumeInUse { .. })));
}

/// It could be promised, never be made, and never be made smaller.
#[test]
fn what_the_file_system_cannot_hold_is_not_promised() {
    let root = Mount::ext4(64 << 20);
    let store = Store::open(root.path()).unwrap();
    pool(&store).can_hold(VolumeFormat::Raw, 1 << 40).unwrap();
    let error = pool(&store).can_hold(VolumeFormat::Raw, 64 << 40).unwrap_err();
    assert!(matches!(error, StoreError::VolumeTooLarge { .. }), "{error}");
    pool(&store).can_hold(VolumeFormat::Qcow2, 64 << 40).unwrap();
    assert_eq!(pool(&store).volumes().unwrap(), []);
}

#[test]
fn a_full_pool_leaves_nothing_and_the_next_try_works() {
    let root = Mount::tmpfs(4 << 20);
    let store = Store::open(root.path()).unwrap();
    let entry = pool(&store).create(&DATA, VolumeFormat::Raw, SIZE).unwrap();
    fs::OpenOptions::new().write(true).open(&entry.path).unwrap().write_all_at(&noise(1, 3 << 20), 0).unwrap();
    let before = listing(root.path());
    let error = pool(&store).clone_volume(&DATA, &COPY).unwrap_err();
    assert!(error.is_no_room(), "{error}");
    assert_eq!(listing(root.path()), before);
    fs::write(root.path().join("filler"), vec![1; 8 << 20]).unwrap_err();
    let before = listing(root.path());
    let error = pool(&store).create(&COPY, VolumeFormat::Qcow2, SIZE).unwrap_err();
    assert!(error.is_no_room(), "{error}");
    assert_eq!(listing(root.path()), before);
    fs::remove_file(root.path().join("filler")).unwrap();
    pool(&store).create(&COPY, VolumeFormat::Qcow2, SIZE).unwrap();
    assert!(pool(&store).space().unwrap().total >= 4 << 20);
}
