//! Images and kernels, from upload to removal.

#[allow(dead_code)]
mod fixture;

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    time::{Duration, SystemTime},
};

use fixture::{Blocks, image, import, kernel, listing, noise, rootfs};
use form_bundle::{BLOCK_SIZE, KernelManifest};
use form_store::{ImageSettings, STALE_AFTER, Store, StoreError};
use form_types::{Digest, VmId};
use jiff::Timestamp;

#[test]
fn an_image_is_its_blocks_sparse_and_read_only() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let mut content = vec![Some(1), None, Some(2), Some(1)];
    content.extend([None; 60]);
    let bytes = rootfs(&content);
    let entry = import(&store, "web", &bytes);
    assert_eq!((entry.version, entry.size_bytes, entry.stored_bytes), (1, 64 << 16, 3 << 16));
    assert_eq!(fs::read(&entry.rootfs).unwrap(), bytes);
    let meta = fs::metadata(&entry.rootfs).unwrap();
    assert_eq!(meta.mode() & 0o7777, 0o444);
    assert!(meta.blocks() * 512 <= 4 << 16, "holes are holes: {} bytes", meta.blocks() * 512);
    store.check_sealed(&entry.digest).unwrap();
    assert!(store.verify(&entry.digest).unwrap().damaged.is_empty());
    assert_eq!(store.manifest(&entry.digest).unwrap().name.as_str(), "web");
    // The blocks that came in are used up.
    assert!(!listing(&root.path().join("vm-images/incoming")).iter().any(|(path, _)| path.is_file()));
}

#[test]
fn an_image_is_read_as_it_is_on_the_disk() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let bytes = rootfs(&[Some(1), None, Some(2)]);
    let entry = import(&store, "web", &bytes);
    let read = |blocks: &[u64]| store.read_blocks(&entry.digest, blocks);
    let plain = |number: usize| &bytes[number * BLOCK_SIZE..(number + 1) * BLOCK_SIZE];
    for (number, (digest, frame)) in [2, 0, 1].into_iter().zip(read(&[2, 0, 1]).unwrap()) {
        assert_eq!((digest, form_bundle::blocks::open(&digest, &frame).unwrap().as_slice()), (Digest::of(plain(number)), plain(number)));
    }
    for beyond in [3, u64::MAX] {
        assert!(matches!(read(&[0, beyond]), Err(StoreError::NoBlock(block)) if block == beyond));
    }
    let mut text = Vec::new();
    std::io::Read::read_to_end(&mut store.manifest_file(&entry.digest).unwrap(), &mut text).unwrap();
    assert_eq!(Digest::of(&text), entry.digest);

    // Its digest says that a block is not what it was, to whoever knows the manifest.
    fs::set_permissions(&entry.rootfs, Permissions::from_mode(0o644)).unwrap();
    let mut file = OpenOptions::new().write(true).open(&entry.rootfs).unwrap();
    file.write_all(b"damaged").unwrap();
    let (digest, frame) = read(&[0]).unwrap().remove(0);
    assert!(digest != Digest::of(plain(0)) && form_bundle::blocks::open(&digest, &frame).is_ok());
    store.remove(&entry.digest, &[]).unwrap();
    assert!(matches!(read(&[0]), Err(StoreError::NoImageDigest(_))));
    assert!(matches!(store.manifest_file(&entry.digest), Err(StoreError::NoImageDigest(_))));
}

#[test]
fn versions_count_up_and_are_never_given_twice() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let first = import(&store, "web", &rootfs(&[Some(1)]));
    let second = import(&store, "web", &rootfs(&[Some(2)]));
    assert_eq!(import(&store, "web", &rootfs(&[Some(1)])), first);
    assert_eq!((first.version, second.version, import(&store, "db", &rootfs(&[Some(1)])).version), (1, 2, 1));
    assert_eq!(store.image(&"web".parse().unwrap()).unwrap(), second);
    assert_eq!(store.image(&"web:1".parse().unwrap()).unwrap(), first);
    assert!(matches!(store.image(&"web:3".parse().unwrap()), Err(StoreError::NoImage(_))));
    store.remove(&second.digest, &[]).unwrap();
    drop(store);
    let store = Store::open(root.path()).unwrap();
    assert_eq!(import(&store, "web", &rootfs(&[Some(3)])).version, 3);
    let names: Vec<String> = store.images().unwrap().iter().map(|entry| format!("{}:{}", entry.name, entry.version)).collect();
    assert_eq!(names, ["db:1", "web:1", "web:3"]);
}

#[test]
fn an_interrupted_upload_sends_only_the_rest() {
    let root = tempfile::tempdir().unwrap();
    let (manifest, blocks) = image("web", &rootfs(&[Some(1), Some(2), Some(3)]));
    let all: Vec<Digest> = blocks.0.keys().copied().collect();
    let store = Store::open(root.path()).unwrap();
    store.put_block(&all[0], &blocks.0[&all[0]]).unwrap();
    store.put_block(&all[0], &blocks.0[&all[0]]).unwrap();
    assert!(matches!(store.import(&manifest), Err(StoreError::MissingBlocks(missing)) if missing == all[1..]));
    drop(store);
    let store = Store::open(root.path()).unwrap();
    let asked = [all.as_slice(), all.as_slice()].concat();
    assert_eq!(store.missing(&asked).unwrap(), all[1..], "each is named once, though asked twice");
    assert_eq!(blocks.upload(&store), 2);
    store.import(&manifest).unwrap();
    // A later version shares all but one block; a kernel may share too.
    let (_, next) = image("web", &rootfs(&[Some(1), Some(9), Some(3)]));
    assert_eq!(next.upload(&store), 1);
}

#[test]
fn hostile_blocks_and_manifests_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (_, blocks) = image("web", &rootfs(&[Some(1)]));
    let (digest, frame) = blocks.0.first_key_value().unwrap();
    assert!(matches!(store.put_block(&Digest::of(b"other"), frame), Err(StoreError::Block(_))));
    assert!(matches!(store.put_block(digest, b"garbage"), Err(StoreError::Block(_))));
    assert!(matches!(store.put_block(digest, &vec![0; 1 << 20]), Err(StoreError::Block(_))));
    assert!(matches!(store.import(b"{}"), Err(StoreError::Manifest(_))));
    assert!(matches!(store.import_kernel(b"{}"), Err(StoreError::Kernel(_))));
    // A manifest whose short block stands where a whole one belongs.
    let mut cut = Blocks::default();
    cut.cut(&noise(5, 100));
    let short = *cut.0.first_key_value().unwrap().0;
    let (manifest, blocks) = image("web", &rootfs(&[Some(1)]));
    let whole = *blocks.0.first_key_value().unwrap().0;
    let forged = String::from_utf8(manifest).unwrap().replace(&whole.to_string(), &short.to_string());
    cut.upload(&store);
    assert!(matches!(store.import(forged.as_bytes()), Err(StoreError::Damaged { .. })));
    assert!(store.images().unwrap().is_empty());
    assert!(fs::read_dir(root.path().join("vm-images/.tmp")).unwrap().next().is_none());
}

#[test]
fn a_torn_block_is_asked_for_again() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (manifest, blocks) = image("web", &rootfs(&[Some(1), Some(2)]));
    blocks.upload(&store);
    let (path, _) = listing(&root.path().join("vm-images/incoming")).remove(0);
    OpenOptions::new().write(true).open(path).unwrap().set_len(100).unwrap();
    assert!(matches!(store.import(&manifest), Err(StoreError::MissingBlocks(torn)) if torn.len() == 1));
    assert_eq!(blocks.upload(&store), 1);
    store.import(&manifest).unwrap();
}

#[test]
fn a_changed_image_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let bytes = rootfs(&[Some(1), None, Some(2)]);
    let entry = import(&store, "web", &bytes);
    // Copied back from a backup: the same bytes, another file.
    let copy = entry.rootfs.with_extension("copy");
    fs::copy(&entry.rootfs, &copy).unwrap();
    fs::rename(&copy, &entry.rootfs).unwrap();
    assert!(matches!(store.check_sealed(&entry.digest), Err(StoreError::Damaged { .. })));
    assert!(store.verify(&entry.digest).unwrap().damaged.is_empty());
    store.check_sealed(&entry.digest).unwrap();
    // One byte in the hole.
    fs::set_permissions(&entry.rootfs, Permissions::from_mode(0o644)).unwrap();
    let mut file = OpenOptions::new().write(true).open(&entry.rootfs).unwrap();
    file.seek(SeekFrom::Start(BLOCK_SIZE as u64 + 7)).unwrap();
    file.write_all(b"x").unwrap();
    drop(file);
    assert!(matches!(store.check_sealed(&entry.digest), Err(StoreError::Damaged { .. })));
    assert_eq!(store.verify(&entry.digest).unwrap().damaged, [1]);
    // A file that was cut short lacks its last blocks.
    let blocks = store.verify(&entry.digest).unwrap().blocks;
    OpenOptions::new().write(true).open(&entry.rootfs).unwrap().set_len((blocks - 1) * BLOCK_SIZE as u64).unwrap();
    assert_eq!(store.verify(&entry.digest).unwrap().damaged, [1, blocks - 1]);
    assert!(matches!(store.create_disk(&VmId::from_bytes([1; 16]), &entry.digest, 1 << 30), Err(StoreError::Damaged { .. })));
}

#[test]
fn an_image_in_use_stays() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let entry = import(&store, "web", &rootfs(&[Some(1)]));
    let error = store.remove(&entry.digest, &["shop".parse().unwrap()]).unwrap_err();
    assert_eq!(error.to_string(), "image `web:1` is used by shop");
    store.remove(&entry.digest, &[]).unwrap();
    assert!(matches!(store.remove(&entry.digest, &[]), Err(StoreError::NoImageDigest(_))));
    assert!(matches!(store.by_digest(&entry.digest), Err(StoreError::NoImageDigest(_))));
}

#[test]
fn what_a_killed_agent_left_is_removed() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    assert!(matches!(Store::open(root.path()), Err(StoreError::Locked(_))));
    let (_, blocks) = image("web", &rootfs(&[Some(1)]));
    blocks.upload(&store);
    drop(store);
    let before = listing(root.path());
    for place in ["vm-images/.tmp/3", "kernel/.tmp/0/modules", "vms/.tmp/7", "vm-images/incoming/.tmp/9"] {
        fs::create_dir_all(root.path().join(place)).unwrap();
        fs::write(root.path().join(place).join("half"), b"half").unwrap();
    }
    let store = Store::open(root.path()).unwrap();
    assert_eq!(listing(root.path()), before);
    // A day later nobody has asked for the block.
    assert_eq!(store.remove_stale_blocks(Duration::from_secs(60)).unwrap(), 0);
    assert_eq!(store.remove_stale_blocks(Duration::ZERO).unwrap(), 1);
}

#[test]
fn a_kernel_and_its_initramfs() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (manifest, blocks) = kernel();
    assert!(matches!(store.import_kernel(&manifest), Err(StoreError::MissingBlocks(_))));
    blocks.upload(&store);
    let entry = store.import_kernel(&manifest).unwrap();
    assert_eq!(store.import_kernel(&manifest).unwrap(), entry);
    assert_eq!(store.kernels().unwrap(), std::slice::from_ref(&entry));
    assert_eq!(fs::read(&entry.vmlinux).unwrap(), noise(102, 200_000));
    assert_eq!(blocks.upload(&store), 0, "a kernel's blocks are known");
    store.check_kernel_sealed(&entry.digest).unwrap();

    let guest = root.path().join("form-guest");
    fs::write(&guest, b"guest 1").unwrap();
    let first = store.initramfs(&entry.digest, &guest).unwrap();
    let bytes = fs::read(&first).unwrap();
    for part in [b"guest 1".as_slice(), &noise(100, 70_000), &noise(101, 70_000)] {
        assert!(bytes.windows(part.len()).any(|window| window == part));
    }
    assert_eq!(store.initramfs(&entry.digest, &guest).unwrap(), first);
    fs::write(&guest, b"guest 2").unwrap();
    let second = store.initramfs(&entry.digest, &guest).unwrap();
    assert!(second != first && second.exists() && !first.exists());

    // A module that was changed does not get into an initramfs.
    let module = entry.vmlinux.with_file_name("modules").join("virtio.ko");
    fs::set_permissions(&module, Permissions::from_mode(0o644)).unwrap();
    let mut changed = noise(100, 70_000);
    changed[69_999] ^= 1;
    fs::write(&module, changed).unwrap();
    fs::write(&guest, b"guest 3").unwrap();
    assert!(matches!(store.initramfs(&entry.digest, &guest), Err(StoreError::Damaged { .. })));
    store.remove_kernel(&entry.digest, Duration::ZERO).unwrap();
    assert!(matches!(store.kernel(&entry.digest), Err(StoreError::NoKernel(_))));
    assert!(!second.exists());
}

#[test]
fn a_kernel_that_somebody_wants_is_not_removed() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (manifest, blocks) = kernel();
    blocks.upload(&store);
    let digest = store.import_kernel(&manifest).unwrap().digest;
    let directory = File::open(root.path().join("kernel").join(digest.to_string())).unwrap();
    let days_ago = |days: i64| {
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(Timestamp::now().as_second() - days * 86_400).unwrap());
        directory.set_modified(then).unwrap();
    };
    let remove = || store.remove_kernel(&digest, STALE_AFTER);
    let is_wanted = |what: &str| match remove() {
        Err(StoreError::KernelWanted { kernel, until }) => assert!(kernel == digest && until > Timestamp::now(), "{what}"),
        other => panic!("{what}: {other:?}"),
    };
    is_wanted("it has just come");
    days_ago(2);
    store.want_kernel(&digest).unwrap();
    is_wanted("somebody asked whether it is here");
    days_ago(2);
    store.import_kernel(&manifest).unwrap();
    is_wanted("it was sent once more");
    days_ago(2);
    let known = KernelManifest::decode(&manifest).unwrap();
    let asked: Vec<Digest> = known.files().flat_map(|(_, map)| map.digests()).collect();
    assert_eq!(store.missing(&asked).unwrap(), []);
    is_wanted("somebody was told that he need not send its blocks");
    // The clock was wrong when it came: it is wanted now, and not for ever.
    days_ago(-700);
    is_wanted("it comes from the future");
    assert!(store.kernel_wanted_at(&digest).unwrap() <= Timestamp::now());

    // To look at it is not to want it; two may remove it at once.
    days_ago(2);
    assert_eq!(store.kernels().unwrap().len(), 1);
    store.check_kernel_sealed(&digest).unwrap();
    let both = std::thread::scope(|scope| [scope.spawn(remove), scope.spawn(remove)].map(|one| one.join().unwrap()));
    assert_eq!(both.iter().filter(|one| one.is_ok()).count(), 1, "{both:?}");
    assert!(both.iter().any(|one| matches!(one, Err(StoreError::NoKernel(_)))), "{both:?}");
    assert!(matches!(store.want_kernel(&digest), Err(StoreError::NoKernel(_))));
    assert_eq!(store.missing(&asked).unwrap().len(), asked.iter().collect::<std::collections::BTreeSet<_>>().len());
}

#[test]
fn what_is_to_be_kept_stays_until_it_is_not_and_labels_change_no_digest() {
    let root = tempfile::tempdir().unwrap();
    let open = || Store::open(root.path()).unwrap();
    let store = open();
    let bytes = rootfs(&[Some(1)]);
    let entry = import(&store, "web", &bytes);
    assert_eq!(entry.settings, ImageSettings::default());
    let set = |change: fn(&mut ImageSettings)| open().set_image(&entry.digest, change).unwrap();
    drop(store);
    let changed = set(|settings| {
        settings.keep = true;
        settings.labels.insert("stage".to_owned(), "production".to_owned());
    });
    assert_eq!((changed.digest, changed.settings.keep), (entry.digest, true));

    let store = open();
    assert_eq!(store.images().unwrap(), std::slice::from_ref(&changed));
    let error = store.remove(&entry.digest, &[]).unwrap_err();
    assert!(matches!(&error, StoreError::ImageKept(_)) && error.to_string().contains("form image set web:1 --no-keep"), "{error}");
    // The same image once more is the one that is there, with what is set of it.
    assert_eq!(import(&store, "web", &bytes), changed);
    assert!(store.verify(&entry.digest).unwrap().damaged.is_empty());

    // Nobody knows what was set: then it stays.
    let settings = root.path().join("vm-images").join(entry.digest.to_string()).join("settings.json");
    fs::write(&settings, b"{\"keep\":").unwrap();
    assert!(matches!(store.remove(&entry.digest, &[]), Err(StoreError::ImageKept(_))));
    drop(store);
    assert_eq!(set(|settings| settings.keep = false).settings, ImageSettings::default());
    open().remove(&entry.digest, &[]).unwrap();
    assert!(!settings.exists());
    let gone = open().set_image(&entry.digest, |_| ()).unwrap_err();
    assert!(matches!(gone, StoreError::NoImageDigest(_)), "{gone}");
}
