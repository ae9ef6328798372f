//! Snapshots on disk: whole or not there, told apart when they are not what they were, and put in the place of a VM's disk in one step.

#[allow(dead_code)]
mod fixture;

use std::{fs, io::Write, os::unix::fs::FileExt, path::PathBuf};

use fixture::{Mount, import, rootfs};
use form_store::{DiskFormat, Store, StoreError};
use form_types::{Name, VmId};
use serde_json::json;

const VM: VmId = VmId::from_bytes([5; 16]);
const SIZE: u64 = 16 << 20;
/// Where something is written.
const AT: u64 = 1 << 19;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn store_with_disk(mount: &Mount) -> (Store, PathBuf) {
    let store = Store::open(mount.path()).unwrap();
    let entry = import(&store, "web", &rootfs(&[Some(1), None, Some(2)]));
    let disk = store.create_disk(&VM, &entry.digest, SIZE).unwrap();
    (store, disk.path)
}

fn make(store: &Store, of: &str, saved: bool) {
    let mut draft = store.draft_snapshot(&VM, &name(of)).unwrap();
    if saved {
        let (mut state, mut memory) = draft.create_saved().unwrap();
        state.write_all(b"state").unwrap();
        memory.write_all(b"memory").unwrap();
    }
    draft.copy_disk(store, &VM).unwrap();
    draft.publish(json!({"made": of})).unwrap();
}

fn directory(mount: &Mount) -> PathBuf {
    mount.path().join("snapshots").join(VM.to_string())
}

#[test]
fn memory_begins_with_an_earlier_ones_only_where_files_share_blocks() {
    for (mount, shares) in [(Mount::xfs(512 << 20), true), (Mount::tmpfs(64 << 20), false)] {
        let (store, _disk) = store_with_disk(&mount);
        make(&store, "before", true);
        let earlier = store.snapshot(&VM, &name("before")).unwrap().saved.unwrap().memory;
        let mut draft = store.draft_snapshot(&VM, &name("after")).unwrap();
        assert!(!draft.can_share().unwrap(), "it has no files yet");
        draft.create_saved().unwrap();
        assert_eq!(draft.can_share().unwrap(), shares);
        assert_eq!(draft.share_memory(&fs::File::open(&earlier).unwrap()).unwrap(), shares);
        let (_, memory) = draft.saved().unwrap();
        let begins = if shares { b"memory".to_vec() } else { Vec::new() };
        assert_eq!(fs::read(directory(&mount).join("after.part/memory")).unwrap(), begins);
        memory.write_all_at(b"M", 0).unwrap();
        draft.copy_disk(&store, &VM).unwrap();
        draft.publish(json!({})).unwrap();
        // Each is what it is, and goes when it is told to.
        let saved = store.snapshot(&VM, &name("before")).unwrap().saved.unwrap();
        assert_eq!((fs::read(saved.memory).unwrap(), saved.is_touched), (b"memory".to_vec(), false));
        store.remove_snapshot(&VM, &name("before")).unwrap();
        let after = store.snapshot(&VM, &name("after")).unwrap().saved.unwrap();
        assert!(fs::read(after.memory).unwrap().starts_with(b"M") && !after.is_touched);
    }
}

#[test]
fn a_snapshot_is_a_copy_and_a_disk_goes_back_to_it_twice() {
    // One that shares blocks, one that does not.
    for (mount, format) in [(Mount::xfs(512 << 20), DiskFormat::Raw), (Mount::tmpfs(64 << 20), DiskFormat::Qcow2)] {
        let (store, disk) = store_with_disk(&mount);
        let write = |text: &[u8; 5]| fs::OpenOptions::new().write(true).open(&disk).unwrap().write_all_at(text, AT).unwrap();
        let at = |path: &PathBuf| {
            let mut bytes = [0; 5];
            fs::File::open(path).unwrap().read_exact_at(&mut bytes, AT).unwrap();
            bytes
        };
        write(b"first");
        make(&store, "before", true);
        make(&store, "stopped", false);
        write(b"later");
        let entry = store.snapshot(&VM, &name("before")).unwrap();
        assert_eq!(
            (entry.disk.map(|(format, _)| format), entry.disk_bytes, &entry.details),
            (Some(format), SIZE, &json!({"made": "before"}))
        );
        let saved = entry.saved.unwrap();
        assert_eq!((fs::read(saved.state).unwrap(), fs::read(saved.memory).unwrap()), (b"state".to_vec(), b"memory".to_vec()));
        assert_eq!(store.snapshot(&VM, &name("stopped")).unwrap().saved, None);
        assert_eq!(store.snapshots(&VM).unwrap(), [name("before"), name("stopped")]);

        for _ in 0..2 {
            let restored = store.restore_disk(&VM, &name("before")).unwrap().unwrap();
            assert_eq!((at(&restored.files.path), at(&disk)), (*b"first", *b"later"), "nothing is changed yet");
            // A VM process has it open before it has its name.
            let open = fs::File::open(&restored.files.path).unwrap();
            restored.publish(&store, &VM).unwrap();
            let mut bytes = [0; 5];
            open.read_exact_at(&mut bytes, AT).unwrap();
            assert_eq!((bytes, at(&disk)), (*b"first", *b"first"));
            assert_eq!(store.open_disk(&VM).unwrap().path, disk);
            write(b"later");
        }
        drop(store.restore_disk(&VM, &name("before")).unwrap());
        assert_eq!(at(&disk), *b"later");
        let drafts = fs::read_dir(mount.path().join("vms/.tmp")).unwrap().count();
        assert_eq!(drafts, 0, "neither the old disk nor a dropped copy stays");

        // A VM that has lost its disk gets it, too.
        store.remove_disk(&VM).unwrap();
        store.restore_disk(&VM, &name("stopped")).unwrap().unwrap().publish(&store, &VM).unwrap();
        assert_eq!(at(&disk), *b"first");

        store.remove_snapshot(&VM, &name("before")).unwrap();
        assert!(matches!(store.remove_snapshot(&VM, &name("before")), Err(StoreError::NoSnapshot(_))));
        store.remove_snapshot(&VM, &name("stopped")).unwrap();
        assert!(!directory(&mount).exists());
    }
}

#[test]
fn a_vm_without_a_disk_has_snapshots() {
    let mount = Mount::tmpfs(64 << 20);
    let store = Store::open(mount.path()).unwrap();
    let mut draft = store.draft_snapshot(&VM, &name("forgotten")).unwrap();
    assert!(matches!(draft.copy_disk(&store, &VM), Err(StoreError::NoDisk(_))));
    assert!(matches!(draft.publish(json!(null)), Err(StoreError::SnapshotDamaged { .. })), "that it has none has to be said");
    let mut draft = store.draft_snapshot(&VM, &name("one")).unwrap();
    draft.has_no_disk();
    draft.copy_disk(&store, &VM).unwrap();
    let (mut state, _) = draft.create_saved().unwrap();
    state.write_all(b"state").unwrap();
    draft.publish(json!({"made": "one"})).unwrap();
    let entry = store.snapshot(&VM, &name("one")).unwrap();
    assert_eq!((entry.disk, entry.disk_bytes, entry.saved.is_some()), (None, 0, true));
    assert!(store.restore_disk(&VM, &name("one")).unwrap().is_none());
}

#[test]
fn another_vm_gets_a_snapshot_without_a_copy_of_it() {
    const OTHER: VmId = VmId::from_bytes([6; 16]);
    let mount = Mount::tmpfs(64 << 20);
    let (store, _) = store_with_disk(&mount);
    make(&store, "one", true);
    assert!(matches!(store.share_snapshot(&VM, &name("two"), &OTHER, json!(null)), Err(StoreError::NoSnapshot(_))));
    assert_eq!(store.vms_with_snapshots().unwrap(), [VM]);
    store.share_snapshot(&VM, &name("one"), &OTHER, json!({"shared": true})).unwrap();
    assert!(matches!(store.share_snapshot(&VM, &name("one"), &OTHER, json!(null)), Err(StoreError::SnapshotExists(_))));
    let (mine, its) = (store.snapshot(&VM, &name("one")).unwrap(), store.snapshot(&OTHER, &name("one")).unwrap());
    assert_eq!((mine.details, its.details), (json!({"made": "one"}), json!({"shared": true})));
    let inode = |saved: &form_store::SavedMemory| std::os::unix::fs::MetadataExt::ino(&fs::metadata(&saved.memory).unwrap());
    assert_eq!(inode(&mine.saved.unwrap()), inode(its.saved.as_ref().unwrap()));

    // Another name for it, and one name less, are no reason to read all of it.
    let is_touched = |vm: &VmId| store.snapshot(vm, &name("one")).unwrap().saved.unwrap().is_touched;
    assert_eq!((is_touched(&VM), is_touched(&OTHER)), (false, false));

    // It is whole whatever becomes of the first, and makes a disk for its own VM.
    store.remove_snapshot(&VM, &name("one")).unwrap();
    assert!(!is_touched(&OTHER));
    let memory = its.saved.unwrap().memory;
    assert_eq!(fs::read(&memory).unwrap(), b"memory");
    fs::OpenOptions::new().write(true).open(&memory).unwrap().write_all_at(b"memory", 0).unwrap();
    assert!(is_touched(&OTHER), "somebody wrote to it, be it the same");
    store.restore_disk(&OTHER, &name("one")).unwrap().unwrap().publish(&store, &OTHER).unwrap();
    assert!(store.open_disk(&OTHER).is_ok());
    store.remove_snapshots(&OTHER).unwrap();
    assert_eq!(store.vms_with_snapshots().unwrap(), []);
}

#[test]
fn what_was_begun_and_not_finished_is_gone() {
    let mount = Mount::tmpfs(64 << 20);
    let (store, _) = store_with_disk(&mount);
    let draft = store.draft_snapshot(&VM, &name("one")).unwrap();
    assert!(matches!(store.draft_snapshot(&VM, &name("one")), Err(StoreError::SnapshotExists(_))), "one is being made");
    assert_eq!(store.partial_snapshots().unwrap(), Vec::<PathBuf>::new(), "somebody is at work on it");
    assert_eq!(store.snapshots(&VM).unwrap(), []);
    drop(draft);
    assert!(!directory(&mount).exists());
    // One without a disk is none.
    let draft = store.draft_snapshot(&VM, &name("one")).unwrap();
    assert!(draft.publish(json!(null)).is_err());
    assert!(!directory(&mount).exists());

    make(&store, "one", false);
    assert!(matches!(store.draft_snapshot(&VM, &name("one")), Err(StoreError::SnapshotExists(_))));
    let half = directory(&mount).join("two.part");
    fs::create_dir(&half).unwrap();
    assert_eq!(store.partial_snapshots().unwrap(), [half.as_path()]);
    store.remove_partial_snapshots().unwrap();
    assert!(!half.exists());
    fs::create_dir(&half).unwrap();
    drop(store);
    let store = Store::open(mount.path()).unwrap();
    assert!(!half.exists(), "the next start removes it");
    assert_eq!(store.snapshots(&VM).unwrap(), [name("one")]);
    store.remove_snapshots(&VM).unwrap();
    assert_eq!(store.vms_with_snapshots().unwrap(), []);
}

#[test]
fn a_torn_a_foreign_and_a_newer_snapshot_are_told_apart() {
    let mount = Mount::tmpfs(64 << 20);
    let (store, _) = store_with_disk(&mount);
    make(&store, "one", true);
    let files = directory(&mount).join("one");
    let refusal = |file: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let whole = fs::read(files.join(file)).unwrap();
        fs::write(files.join(file), change(whole.clone())).unwrap();
        let error = store.snapshot(&VM, &name("one")).unwrap_err();
        assert!(store.restore_disk(&VM, &name("one")).is_err());
        fs::write(files.join(file), whole).unwrap();
        store.snapshot(&VM, &name("one")).unwrap();
        error.to_string()
    };
    let cut = |bytes: Vec<u8>| bytes[..bytes.len() - 1].to_vec();
    for file in ["state", "memory", "disk.qcow2", "snapshot.json"] {
        let words = refusal(file, &cut);
        assert!(words.contains(file) && words.contains("torn") && words.contains("`one`"), "{words}");
    }
    let replace =
        |from: &'static str, to: &'static str| move |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replacen(from, to, 1).into_bytes();
    let words = refusal("snapshot.json", &replace("\"version\":1", "\"version\":3"));
    assert!(words.contains("version 3") && words.contains("reads 2"), "{words}");
    let words = refusal("snapshot.json", &replace("formation-snapshot", "something-else"));
    assert!(words.contains("not a snapshot"), "{words}");
    let words = refusal("snapshot.json", &replace("\"made\":\"one\"", "\"made\":\"two\""));
    assert!(words.contains("checksum"), "{words}");
    for bytes in [&b""[..], b"\n", b"{}", b"{}\n{}", b"\xff\xff"] {
        let words = refusal("snapshot.json", &|_| bytes.to_vec());
        assert!(words.contains("not a snapshot"), "{words}");
    }
    fs::remove_file(files.join("memory")).unwrap();
    let words = store.snapshot(&VM, &name("one")).unwrap_err().to_string();
    assert!(words.contains("memory") && words.contains("form vm snapshot rm"), "{words}");
    store.remove_snapshot(&VM, &name("one")).unwrap();
    assert!(matches!(store.snapshot(&VM, &name("one")), Err(StoreError::NoSnapshot(_))));
}

#[test]
fn a_full_file_system_leaves_nothing_half() {
    let mount = Mount::tmpfs(6 << 20);
    let (store, disk) = store_with_disk(&mount);
    let file = fs::OpenOptions::new().write(true).open(&disk).unwrap();
    file.write_all_at(&vec![1; 3 << 20], 1 << 20).unwrap();
    let mut draft = store.draft_snapshot(&VM, &name("one")).unwrap();
    let error = draft.copy_disk(&store, &VM).unwrap_err();
    assert!(error.is_no_room(), "{error}");
    drop(draft);
    assert!(!directory(&mount).exists());
}

#[test]
fn an_image_below_a_snapshots_disk_is_in_use() {
    let mount = Mount::tmpfs(64 << 20);
    let (store, _) = store_with_disk(&mount);
    let image = store.images().unwrap().remove(0);
    make(&store, "one", false);
    store.remove_disk(&VM).unwrap();
    let error = store.remove(&image.digest, &[]).unwrap_err();
    assert!(matches!(&error, StoreError::ImageInUse { .. }) && error.to_string().contains("snapshot"), "{error}");
    store.remove_snapshot(&VM, &name("one")).unwrap();
    store.remove(&image.digest, &[]).unwrap();
}

/// As much memory as a test reads quickly: text, a hole, noise, and the end.
fn memory(file: &fs::File) -> Vec<u8> {
    let mut bytes = vec![0; (5 << 20) + 4096];
    bytes[..10 * 50_000].copy_from_slice(&b"again and ".repeat(50_000));
    bytes[3 << 20..(3 << 20) + (1 << 19)].copy_from_slice(&fixture::noise(7, 1 << 19));
    bytes[5 << 20..].fill(9);
    for at in [0, 3 << 20, 5 << 20] {
        file.write_all_at(&bytes[at..bytes.len().min(at + (1 << 19))], at as u64).unwrap();
    }
    bytes
}

fn make_with_memory(store: &Store, of: &str) -> Vec<u8> {
    let mut draft = store.draft_snapshot(&VM, &name(of)).unwrap();
    let (mut state, file) = draft.create_saved().unwrap();
    state.write_all(b"state").unwrap();
    let bytes = memory(file);
    draft.copy_disk(store, &VM).unwrap();
    draft.publish(json!({"made": of})).unwrap();
    bytes
}

fn files(mount: &Mount, of: &str) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory(mount).join(of)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn compressed_memory_is_smaller_and_is_unfolded_to_what_it_was() {
    const OTHER: VmId = VmId::from_bytes([6; 16]);
    for mount in [Mount::xfs(512 << 20), Mount::tmpfs(64 << 20)] {
        let (store, _) = store_with_disk(&mount);
        let bytes = make_with_memory(&store, "one");
        let before = store.snapshot(&VM, &name("one")).unwrap();
        let mut told = Vec::new();
        let compressed = store.compress_snapshot(&VM, &name("one"), |done| {
            // Until the end it is what it was, and another one of this name cannot be begun.
            let now = store.snapshot(&VM, &name("one")).unwrap();
            assert_eq!((now.saved.unwrap().compressed, store.partial_snapshots().unwrap().len()), (None, 0));
            told.push(done);
            Ok(())
        });
        assert!(compressed.unwrap() && told.len() == 7 && told.last() == Some(&(bytes.len() as u64)), "{told:?}");
        let entry = store.snapshot(&VM, &name("one")).unwrap();
        let saved = entry.saved.clone().unwrap();
        let unfolded = saved.compressed.unwrap();
        assert_eq!((unfolded.length, saved.is_touched), (bytes.len() as u64, false));
        assert!(unfolded.data > 900 << 10 && unfolded.data < 1100 << 10, "{unfolded:?}");
        assert!(entry.allocated_bytes + (300 << 10) < before.allocated_bytes, "{entry:?}");
        assert_eq!((entry.disk, entry.details, fs::read(&saved.state).unwrap()), (before.disk, before.details, b"state".to_vec()));
        let disk = if matches!(before.disk, Some((DiskFormat::Raw, _))) { "disk.raw" } else { "disk.qcow2" };
        assert_eq!(files(&mount, "one"), [disk, "memory.compressed", "snapshot.json", "state"]);
        assert!(!directory(&mount).join("one.part").exists());
        assert!(!store.compress_snapshot(&VM, &name("one"), |_| panic!("it is already")).unwrap());

        // Twice, in files that nobody finds afterwards; another VM that it is shared with as well.
        store.share_snapshot(&VM, &name("one"), &OTHER, json!(null)).unwrap();
        let shared = store.snapshot(&OTHER, &name("one")).unwrap().saved.unwrap();
        for saved in [&saved, &shared] {
            let file = store.open_memory(saved, &name("one")).unwrap();
            let mut found = vec![0; bytes.len()];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == bytes && file.metadata().unwrap().len() == bytes.len() as u64);
            assert_eq!(std::os::unix::fs::MetadataExt::nlink(&file.metadata().unwrap()), 0);
            saved.verify_compressed(&name("one")).unwrap();
        }
        assert_eq!(fs::read_dir(mount.path().join("vms/.tmp")).unwrap().count(), 0);
        let end = store.open_end_of_memory(&saved, &name("one")).unwrap();
        let mut found = vec![0; 4096];
        end.read_exact_at(&mut found, 5 << 20).unwrap();
        assert_eq!((found, end.metadata().unwrap().len()), (vec![9; 4096], bytes.len() as u64));
        store.restore_disk(&VM, &name("one")).unwrap().unwrap().publish(&store, &VM).unwrap();
        // What did not run has none.
        make(&store, "stopped", false);
        assert!(!store.compress_snapshot(&VM, &name("stopped"), |_| panic!("there is nothing")).unwrap());
    }
}

#[test]
fn a_snapshot_that_cannot_be_compressed_is_what_it_was() {
    let mount = Mount::tmpfs(64 << 20);
    let (store, _) = store_with_disk(&mount);
    let bytes = make_with_memory(&store, "one");
    for end in [0, 1 << 20, 3 << 20, bytes.len() as u64] {
        let full = |done: u64| if done == end { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(()) };
        let error = store.compress_snapshot(&VM, &name("one"), full).unwrap_err();
        assert!(error.is_no_room() && error.to_string().contains("memory.compressed"), "{error}");
        assert_eq!(files(&mount, "one"), ["disk.qcow2", "memory", "snapshot.json", "state"]);
        assert!(!directory(&mount).join("one.part").exists());
    }
    // The file system itself says so.
    let taken = mount.path().join("taken");
    let mut filler = fs::File::create(&taken).unwrap();
    while filler.write_all(&[1; 64 << 10]).is_ok() {}
    filler.set_len(filler.metadata().unwrap().len() - (128 << 10)).unwrap();
    let error = store.compress_snapshot(&VM, &name("one"), |_| Ok(())).unwrap_err();
    assert!(error.is_no_room(), "{error}");
    let saved = store.snapshot(&VM, &name("one")).unwrap().saved.unwrap();
    assert!(saved.compressed.is_none() && !saved.is_touched && !directory(&mount).join("one.part").exists());
    // Nor can it be unfolded there.
    drop(filler);
    fs::remove_file(&taken).unwrap();
    store.compress_snapshot(&VM, &name("one"), |_| Ok(())).unwrap();
    let mut filler = fs::File::create(&taken).unwrap();
    while filler.write_all(&[1; 64 << 10]).is_ok() {}
    let saved = store.snapshot(&VM, &name("one")).unwrap().saved.unwrap();
    let error = store.open_memory(&saved, &name("one")).unwrap_err();
    assert!(error.is_no_room(), "{error}");
    assert_eq!(fs::read_dir(mount.path().join("vms/.tmp")).unwrap().count(), 0);
    drop(filler);
    fs::remove_file(&taken).unwrap();
    store.open_memory(&saved, &name("one")).unwrap();
    store.remove_snapshots(&VM).unwrap();
    assert!(matches!(store.compress_snapshot(&VM, &name("one"), |_| Ok(())), Err(StoreError::NoSnapshot(_))));
    assert_eq!(store.vms_with_snapshots().unwrap(), []);
}

#[test]
fn compressed_memory_that_is_not_what_it_was_is_not_unfolded() {
    let mount = Mount::tmpfs(64 << 20);
    let (store, _) = store_with_disk(&mount);
    let bytes = make_with_memory(&store, "one");
    store.compress_snapshot(&VM, &name("one"), |_| Ok(())).unwrap();
    let path = directory(&mount).join("one/memory.compressed");
    let whole = fs::read(&path).unwrap();
    let refused = |at: usize, words: &str| {
        let mut other = whole.clone();
        other[at] ^= 0x41;
        fs::write(&path, other).unwrap();
        let saved = store.snapshot(&VM, &name("one")).unwrap().saved.unwrap();
        assert!(saved.is_touched);
        for error in [store.open_memory(&saved, &name("one")).unwrap_err(), saved.verify_compressed(&name("one")).unwrap_err()] {
            let error = error.to_string();
            assert!(error.contains("`one`") && error.contains(words), "{error}");
        }
        fs::write(&path, &whole).unwrap();
        let file = store.open_memory(&saved, &name("one")).unwrap();
        assert_eq!(file.metadata().unwrap().len(), bytes.len() as u64);
    };
    refused(0, "not one with compressed memory");
    refused(8, "version 64, this agent reads 1");
    refused(40, "describes it");
    refused(70, "describes it");
    refused(whole.len() - 100_000, "the checksum of the MiB at 3 MiB is wrong");
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let error = store.snapshot(&VM, &name("one")).unwrap_err().to_string();
    assert!(error.contains("memory.compressed is torn"), "{error}");

    // A release before this one knows by its version that it cannot read it; and one after it is not taken for this.
    fs::write(&path, &whole).unwrap();
    let record = directory(&mount).join("one/snapshot.json");
    let text = fs::read_to_string(&record).unwrap();
    assert!(text.starts_with("{\"format\":\"formation-snapshot\",\"version\":2,"), "{text}");
    fs::write(&record, text.replacen("\"version\":2", "\"version\":3", 1)).unwrap();
    let error = store.snapshot(&VM, &name("one")).unwrap_err().to_string();
    assert!(error.contains("version 3") && error.contains("reads 2"), "{error}");
}

#[test]
fn who_has_looked_at_a_snapshot_reads_its_memory_also_when_it_is_compressed_just_then() {
    let mount = Mount::tmpfs(64 << 20);
    let (store, _) = store_with_disk(&mount);
    let bytes = make_with_memory(&store, "one");
    let before = store.snapshot(&VM, &name("one")).unwrap().saved.unwrap();
    assert!(store.compress_snapshot(&VM, &name("one"), |_| Ok(())).unwrap() && !before.memory.exists());
    let read = |file: fs::File| {
        let mut found = vec![0; bytes.len()];
        file.read_exact_at(&mut found, 0).map(|()| found)
    };
    assert!(read(store.open_memory(&before, &name("one")).unwrap()).unwrap() == bytes);
    let end = store.open_end_of_memory(&before, &name("one")).unwrap();
    assert_eq!(read(end).unwrap()[5 << 20..], bytes[5 << 20..]);
    before.verify_compressed(&name("one")).unwrap();
    let (_, unfolded) = before.open(&name("one")).unwrap();
    assert_eq!(unfolded.unwrap().length, bytes.len() as u64);
    // What is damaged is still found, and what is gone is gone.
    fs::write(directory(&mount).join("one/memory.compressed"), b"torn").unwrap();
    assert!(matches!(before.verify_compressed(&name("one")), Err(StoreError::SnapshotMemory { .. })));
    store.remove_snapshot(&VM, &name("one")).unwrap();
    assert!(matches!(store.open_memory(&before, &name("one")), Err(StoreError::Io { .. })));
}

#[test]
fn a_snapshot_is_shared_also_while_it_is_compressed() {
    const OTHER: VmId = VmId::from_bytes([6; 16]);
    let mount = Mount::tmpfs(64 << 20);
    let (store, _) = store_with_disk(&mount);
    let name = name("one");
    for _ in 0..30 {
        let bytes = make_with_memory(&store, "one");
        std::thread::scope(|scope| {
            let compressing = scope.spawn(|| store.compress_snapshot(&VM, &name, |_| Ok(())).unwrap());
            let mut is_last = false;
            while !is_last {
                is_last = compressing.is_finished();
                store.share_snapshot(&VM, &name, &OTHER, json!(null)).unwrap();
                let saved = store.snapshot(&OTHER, &name).unwrap().saved.unwrap();
                assert!(!saved.is_touched && is_last <= saved.compressed.is_some());
                store.remove_snapshots(&OTHER).unwrap();
            }
        });
        let saved = store.snapshot(&VM, &name).unwrap().saved.unwrap();
        assert_eq!(store.open_memory(&saved, &name).unwrap().metadata().unwrap().len(), bytes.len() as u64);
        store.remove_snapshot(&VM, &name).unwrap();
    }
}
