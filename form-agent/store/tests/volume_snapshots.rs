//! Snapshots of volumes: on a file system that shares blocks and on one that does not, damaged, on a full pool, and with the agent gone at
//! every step.

#[allow(dead_code)]
mod fixture;

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use fixture::{Mount, listing, noise};
use form_store::{Pool, Store, StoreError, VolumeSnapshotEntry, local_pool};
use form_types::{HostId, Name, OperationId, VolumeFormat, VolumeId};
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, file::File as ImageFile, qcow2::Qcow2};
use serde_json::json;

const DATA: VolumeId = VolumeId::from_bytes([7; 16]);
const COPY: VolumeId = VolumeId::from_bytes([8; 16]);
const ONCE: OperationId = OperationId::from_bytes([1; 16]);
const AGAIN: OperationId = OperationId::from_bytes([2; 16]);
const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB + 512;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn pool(store: &Store) -> Arc<Pool> {
    store.pool(&local_pool()).unwrap()
}

/// With it the bytes of a volume are written and read, whatever its format.
fn qcow2(path: &Path, write: bool) -> FormatAccess<ImageFile> {
    let file = fs::OpenOptions::new().read(true).write(write).open(path).unwrap();
    let builder = Qcow2::<ImageFile>::builder(ImageFile::try_from(file).unwrap()).backing(None).write(write);
    FormatAccess::new(builder.open(DenyImplicitOpenGate::default()).unwrap())
}

fn write(pool: &Pool, bytes: &[u8], at: u64) {
    let entry = pool.volume(&DATA).unwrap();
    match entry.format {
        VolumeFormat::Raw => fs::OpenOptions::new().write(true).open(&entry.path).unwrap().write_all_at(bytes, at).unwrap(),
        VolumeFormat::Qcow2 => {
            let image = qcow2(&entry.path, true);
            image.write(bytes, at).unwrap();
            image.flush().unwrap();
        }
    }
}

fn read_file(path: &Path, format: VolumeFormat, at: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    match format {
        VolumeFormat::Raw => fs::File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap(),
        VolumeFormat::Qcow2 => qcow2(path, false).read(bytes.as_mut_slice(), at).unwrap(),
    }
    bytes
}

fn read(pool: &Pool, id: &VolumeId, at: u64, count: usize) -> Vec<u8> {
    let entry = pool.volume(id).unwrap();
    read_file(&entry.path, entry.format, at, count)
}

fn take(pool: &Pool, called: &str) -> VolumeSnapshotEntry {
    let draft = pool.draft_snapshot(&DATA, &name(called), false).unwrap();
    draft.copy().unwrap();
    draft.publish(json!({"made": called})).unwrap();
    pool.snapshot(&DATA, &name(called)).unwrap()
}

fn restore(pool: &Pool, called: &str, operation: &OperationId) {
    pool.draft_restore(&DATA, &name(called), operation).unwrap();
    pool.settle_restore(&DATA, Some(operation)).unwrap();
}

/// What lies in the volume's directory, without the `.tmp` of the pool.
fn files(pool: &Pool) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(pool.directory().join(DATA.to_string()))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_volume_goes_back_to_what_it_held_and_to_its_size() {
    let (tmpfs, xfs) = (Mount::tmpfs(128 << 20), Mount::xfs(512 << 20));
    for (root, shares) in [(&tmpfs, false), (&xfs, true)] {
        for format in [VolumeFormat::Raw, VolumeFormat::Qcow2] {
            let store = Store::open(root.path()).unwrap();
            let pool = pool(&store);
            assert_eq!(pool.shares_blocks().unwrap(), shares);
            pool.create(&DATA, format, SIZE).unwrap();
            write(&pool, &noise(1, 8 << 20), 0);
            let free = store.space().unwrap().free;
            let entry = take(&pool, "one");
            let taken = free.saturating_sub(store.space().unwrap().free);
            assert_eq!(taken < 4 * MIB, shares, "the snapshot took {taken} bytes");
            assert_eq!((entry.size_bytes, entry.format, &entry.details), (SIZE, format, &json!({"made": "one"})));
            assert_eq!(fs::metadata(&entry.path).unwrap().mode() & 0o7777, 0o400, "nobody writes to it");
            assert!(pool.snapshot_bytes(&DATA) >= 8 * MIB);

            write(&pool, &noise(2, 8 << 20), 0);
            pool.grow(&DATA, 64 * MIB).unwrap();
            take(&pool, "two");
            assert_eq!(pool.snapshots(&DATA).unwrap(), [name("one"), name("two")]);
            for (round, operation) in [ONCE, AGAIN].iter().enumerate() {
                restore(&pool, "one", operation);
                assert_eq!(pool.volume(&DATA).unwrap().size_bytes, SIZE, "round {round}");
                assert_eq!(read(&pool, &DATA, 0, 8 << 20), noise(1, 8 << 20));
                assert_eq!(pool.unsettled(&DATA).unwrap(), Vec::<PathBuf>::new());
                // What is written to the volume now is not written to the snapshot.
                write(&pool, b"other", 0);
                pool.grow(&DATA, 48 * MIB).unwrap();
                assert_eq!(pool.volume(&DATA).unwrap().size_bytes, 48 * MIB, "the same file is still the volume's");
            }
            restore(&pool, "two", &ONCE);
            assert_eq!(pool.volume(&DATA).unwrap().size_bytes, 64 * MIB);
            assert_eq!(read(&pool, &DATA, 0, 8 << 20), noise(2, 8 << 20));
            assert_eq!(files(&pool).len(), 3, "record, file and snapshots: {:?}", files(&pool));

            let copy = pool.clone_snapshot(&DATA, &name("one"), &COPY).unwrap();
            assert_eq!((copy.size_bytes, copy.format), (SIZE, format));
            assert_eq!(read(&pool, &COPY, 0, 8 << 20), noise(1, 8 << 20));
            drop(pool.open_volume(&COPY, false).unwrap());
            assert!(matches!(pool.clone_snapshot(&DATA, &name("one"), &COPY), Err(StoreError::VolumeExists(COPY))));

            pool.remove_snapshot(&DATA, &name("one")).unwrap();
            assert!(matches!(pool.remove_snapshot(&DATA, &name("one")), Err(StoreError::NoVolumeSnapshot(_))));
            assert_eq!(read(&pool, &COPY, 0, 8 << 20), noise(1, 8 << 20), "what was made from it stays");
            for id in [DATA, COPY] {
                pool.remove(pool.hold(&id).unwrap()).unwrap();
            }
            assert_eq!(pool.snapshots(&DATA).unwrap(), [], "they go with their volume");
        }
    }
}

#[test]
fn at_one_instant_or_not_at_all() {
    let (tmpfs, xfs) = (Mount::tmpfs(64 << 20), Mount::xfs(512 << 20));
    for (root, shares) in [(&tmpfs, false), (&xfs, true)] {
        let store = Store::open(root.path()).unwrap();
        let pool = pool(&store);
        pool.create(&DATA, VolumeFormat::Raw, SIZE).unwrap();
        write(&pool, b"held", 0);
        let before = listing(root.path());
        let open = pool.open_volume(&DATA, false).unwrap();
        assert!(!pool.is_at_rest(&DATA).unwrap());
        let refused = pool.draft_snapshot(&DATA, &name("one"), false).map(drop);
        assert!(matches!(refused, Err(StoreError::VolumeInUse { .. })), "somebody may write to it");
        // Whoever writes stands still meanwhile.
        let draft = pool.draft_snapshot(&DATA, &name("one"), true).unwrap();
        match draft.share() {
            Ok(()) => draft.publish(json!(null)).unwrap(),
            Err(error) => {
                assert!(matches!(error, StoreError::NoSharing(_)), "{error}");
                drop(draft);
                assert_eq!(listing(root.path()), before);
            }
        }
        assert_eq!(pool.snapshots(&DATA).unwrap().len(), usize::from(shares));
        // It does not go back under somebody who writes.
        if shares {
            pool.draft_restore(&DATA, &name("one"), &ONCE).unwrap();
            assert!(matches!(pool.settle_restore(&DATA, Some(&ONCE)), Err(StoreError::VolumeInUse { .. })));
        }
        drop(open);
        pool.settle_restore(&DATA, Some(&ONCE)).unwrap();
        assert!(pool.is_at_rest(&DATA).unwrap());
    }
}

/// A copy of the directory at every step of a restore is what a killed agent leaves.
#[test]
fn a_restore_that_is_broken_off_is_the_old_or_the_new() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let pool = pool(&store);
    for (format, smaller) in [(VolumeFormat::Raw, true), (VolumeFormat::Raw, false), (VolumeFormat::Qcow2, true)] {
        let [then, now] = if smaller { [16 * MIB, SIZE] } else { [SIZE, SIZE] };
        pool.create(&DATA, format, then).unwrap();
        write(&pool, b"then", 3 * MIB);
        take(&pool, "one");
        write(&pool, b"now!", 3 * MIB);
        if now > then {
            pool.grow(&DATA, now).unwrap();
        }
        let place = pool.directory().join(DATA.to_string());
        let holds = |size: u64, bytes: &[u8]| {
            assert_eq!(pool.volume(&DATA).unwrap().size_bytes, size);
            assert_eq!(read(&pool, &DATA, 3 * MIB, 4), bytes);
        };
        // Before the state knows: taken back, by whatever comes first.
        pool.draft_restore(&DATA, &name("one"), &ONCE).unwrap();
        assert!(pool.has_restore(&DATA, &ONCE) && !pool.has_restore(&DATA, &AGAIN));
        holds(now, b"now!");
        pool.settle_restore(&DATA, None).unwrap();
        assert!(!pool.has_restore(&DATA, &ONCE));
        pool.draft_restore(&DATA, &name("one"), &ONCE).unwrap();
        pool.settle_restore(&DATA, Some(&AGAIN)).unwrap();
        holds(now, b"now!");
        assert_eq!(files(&pool).len(), 3);
        // After it does: the file is where it is to be, and the record still says the other one.
        pool.draft_restore(&DATA, &name("one"), &ONCE).unwrap();
        let draft = place.join(format!("restore-{ONCE}"));
        let file = fs::read_dir(&draft).unwrap().map(|entry| entry.unwrap().file_name()).find(|name| name != "volume.json").unwrap();
        fs::rename(draft.join(&file), place.join(&file)).unwrap();
        holds(now, b"now!");
        pool.settle_restore(&DATA, Some(&ONCE)).unwrap();
        holds(then, b"then");
        assert_eq!(files(&pool).len(), 3);
        // The record says the new one, and the old one still takes room.
        write(&pool, b"now!", 3 * MIB);
        pool.draft_restore(&DATA, &name("one"), &AGAIN).unwrap();
        let draft = place.join(format!("restore-{AGAIN}"));
        let file = fs::read_dir(&draft).unwrap().map(|entry| entry.unwrap().file_name()).find(|name| name != "volume.json").unwrap();
        fs::rename(draft.join(&file), place.join(&file)).unwrap();
        fs::rename(draft.join("volume.json"), place.join("volume.json")).unwrap();
        holds(then, b"then");
        assert_eq!(pool.unsettled(&DATA).unwrap().len(), 2, "the draft and the old file");
        pool.settle_restore(&DATA, Some(&AGAIN)).unwrap();
        holds(then, b"then");
        assert_eq!((files(&pool).len(), pool.unsettled(&DATA).unwrap().len()), (3, 0));
        // Once more is nothing.
        pool.settle_restore(&DATA, Some(&AGAIN)).unwrap();
        pool.settle_restore(&DATA, None).unwrap();
        holds(then, b"then");
        pool.remove(pool.hold(&DATA).unwrap()).unwrap();
    }
}

#[test]
fn what_is_not_whole_is_told_and_not_gone_back_to() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let pool = pool(&store);
    pool.create(&DATA, VolumeFormat::Raw, SIZE).unwrap();
    assert!(matches!(pool.snapshot(&DATA, &name("one")), Err(StoreError::NoVolumeSnapshot(_))));
    let entry = take(&pool, "one");
    let again = pool.draft_snapshot(&DATA, &name("one"), false).map(drop);
    assert!(matches!(again, Err(StoreError::VolumeSnapshotExists(_))));
    let directory = entry.path.parent().unwrap();
    let refused = |wanted: &str| {
        let words = pool.snapshot(&DATA, &name("one")).unwrap_err().to_string();
        assert!(words.contains(wanted) && words.contains("`one`"), "{words}");
        assert!(pool.draft_restore(&DATA, &name("one"), &ONCE).is_err() && pool.clone_snapshot(&DATA, &name("one"), &COPY).is_err());
        assert_eq!(pool.snapshots(&DATA).unwrap(), [name("one")], "it is listed all the same");
    };
    let record = directory.join("snapshot.json");
    let whole = fs::read(&record).unwrap();
    let replaced = |from: &str, to: &str| String::from_utf8(whole.clone()).unwrap().replacen(from, to, 1).into_bytes();
    for (bytes, wanted) in [
        (replaced("\"version\":1", "\"version\":2"), "version 2"),
        (replaced("formation-volume-snapshot", "formation-snapshot"), "not a snapshot's"),
        (replaced("\"made\":\"one\"", "\"made\":\"two\""), "checksum"),
        (whole[..whole.len() - 1].to_vec(), "checksum"),
        (Vec::new(), "not a snapshot's"),
    ] {
        fs::remove_file(&record).unwrap();
        fs::write(&record, bytes).unwrap();
        refused(wanted);
    }
    // The file without a record, and the record without a file.
    fs::remove_file(&record).unwrap();
    refused("snapshot.json");
    fs::write(&record, &whole).unwrap();
    pool.snapshot(&DATA, &name("one")).unwrap();
    fs::OpenOptions::new().write(true).open(&entry.path).unwrap().set_len(MIB).unwrap();
    refused("volume.raw is torn");
    fs::remove_file(&entry.path).unwrap();
    refused("volume.raw");
    pool.remove_snapshot(&DATA, &name("one")).unwrap();
    assert_eq!(files(&pool), ["volume.json", "volume.raw"]);
}

#[test]
fn a_full_pool_leaves_nothing_and_the_next_try_works() {
    let root = Mount::tmpfs(10 << 20);
    let store = Store::open(root.path()).unwrap();
    let pool = pool(&store);
    pool.create(&DATA, VolumeFormat::Raw, SIZE).unwrap();
    write(&pool, &noise(1, 3 << 20), 0);
    take(&pool, "one");
    write(&pool, &noise(2, 3 << 20), 0);
    fs::write(root.path().join("filler"), vec![1; 2 << 20]).unwrap();
    let before = listing(root.path());
    let draft = pool.draft_snapshot(&DATA, &name("two"), false).unwrap();
    let error = draft.copy().unwrap_err();
    assert!(error.is_no_room(), "{error}");
    drop(draft);
    assert_eq!(listing(root.path()), before);
    let error = pool.draft_restore(&DATA, &name("one"), &ONCE).unwrap_err();
    assert!(error.is_no_room(), "{error}");
    assert_eq!(listing(root.path()), before);
    assert_eq!(read(&pool, &DATA, 0, 3 << 20), noise(2, 3 << 20), "and the volume is what it was");
    fs::remove_file(root.path().join("filler")).unwrap();
    restore(&pool, "one", &ONCE);
    assert_eq!(read(&pool, &DATA, 0, 3 << 20), noise(1, 3 << 20));
}

#[test]
fn snapshots_move_with_their_volume_and_keep_a_pool_in_use() {
    let root = tempfile::tempdir().unwrap();
    let (store, place) = (Store::open(&root.path().join("store")).unwrap(), root.path().join("fast"));
    fs::create_dir(&place).unwrap();
    let from = pool(&store);
    let host = HostId::from_bytes([3; 16]);
    let fast = store.create_pool(&name("fast"), &place, &host, &[], form_store::PoolSettings::default()).unwrap();
    for format in [VolumeFormat::Raw, VolumeFormat::Qcow2] {
        from.create(&DATA, format, SIZE).unwrap();
        write(&from, b"then", 5 * MIB);
        take(&from, "one");
        write(&from, b"now!", 5 * MIB);
        restore(&from, "one", &ONCE);
        write(&from, b"more", 5 * MIB);
        let held = fast.copy_from(&from, &DATA).unwrap().unwrap();
        drop(held);
        from.remove(from.hold(&DATA).unwrap()).unwrap();
        assert_eq!(read(&fast, &DATA, 5 * MIB, 4), b"more");
        let entry = fast.snapshot(&DATA, &name("one")).unwrap();
        assert_eq!((entry.details, entry.size_bytes), (json!({"made": "one"}), SIZE));
        assert_eq!(read_file(&entry.path, format, 5 * MIB, 4), b"then");
        assert_eq!(fs::metadata(&entry.path).unwrap().mode() & 0o7777, 0o400);
        // Also when somebody took the volume's own files away.
        fs::remove_file(place.join(DATA.to_string()).join("volume.json")).unwrap();
        let refused = store.remove_pool(&name("fast"));
        assert!(matches!(refused, Err(StoreError::PoolInUse { .. })), "{refused:?}");
        fast.remove(fast.hold(&DATA).unwrap()).unwrap();
    }
    // A snapshot that cannot be read does not move half.
    from.create(&DATA, VolumeFormat::Raw, SIZE).unwrap();
    let entry = take(&from, "one");
    fs::remove_file(&entry.path).unwrap();
    let before = listing(&place);
    assert!(matches!(fast.copy_from(&from, &DATA), Err(StoreError::VolumeSnapshotDamaged { .. })));
    assert_eq!(listing(&place), before);
}
