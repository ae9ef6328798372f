//! Manifests that are sent before the import that names them.

#[allow(dead_code)]
mod fixture;

use std::{collections::BTreeMap, fs};

use fixture::{Blocks, image, kernel, rootfs, spec};
use form_bundle::{
    Manifest,
    manifest::{HistoryEntry, Rootfs},
    travel,
};
use form_store::{ManifestWriter, Store, StoreError};
use form_types::Digest;

/// A manifest that is longer than any request's body may be, as that of an image of ten GiB is.
fn long_manifest() -> (Vec<u8>, Blocks) {
    let mut blocks = Blocks::default();
    let map = blocks.cut(&rootfs(&[Some(1), None, Some(2)]));
    let layer = |number: u32| HistoryEntry {
        text: format!("RUN {number} {}", "x".repeat(900)),
        layer: Digest::of(&number.to_le_bytes()),
        changed_blocks: 1,
    };
    let manifest = Manifest::new(&spec("large"), Rootfs::new(map), BTreeMap::new(), (0..9999).map(layer).collect()).unwrap();
    (manifest.encode().unwrap(), blocks)
}

fn send(writer: ManifestWriter, packed: &[u8]) -> Result<u64, StoreError> {
    let mut writer = writer;
    packed.chunks(10_000).try_for_each(|piece| writer.write(piece))?;
    writer.finish()
}

#[test]
fn a_long_manifest_is_sent_and_imported() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (text, blocks) = long_manifest();
    assert!(text.len() > 8 << 20);
    let digest = Digest::of(&text);
    assert!(matches!(store.import_uploaded(&digest), Err(StoreError::NoManifest(missing)) if missing == digest));
    let packed = travel::pack(&text).unwrap();
    assert_eq!(send(store.manifest_writer(&digest).unwrap(), &packed).unwrap(), text.len() as u64);
    assert!(matches!(store.import_uploaded(&digest), Err(StoreError::MissingBlocks(_))), "it waits for its blocks");
    blocks.upload(&store);
    drop(store);
    let store = Store::open(root.path()).unwrap();
    let entry = store.import_uploaded(&digest).unwrap();
    assert_eq!((entry.digest, entry.version), (digest, 1));
    assert_eq!(store.import_uploaded(&digest).unwrap(), entry, "a repeated import needs no manifest");
    assert_eq!(fs::read_dir(root.path().join("vm-images/incoming/manifests")).unwrap().count(), 0);

    let (text, blocks) = kernel();
    blocks.upload(&store);
    let digest = Digest::of(&text);
    assert!(matches!(store.import_kernel_uploaded(&digest), Err(StoreError::NoManifest(_))));
    send(store.manifest_writer(&digest).unwrap(), &travel::pack(&text).unwrap()).unwrap();
    assert_eq!(store.import_kernel_uploaded(&digest).unwrap().digest, digest);
}

/// Whatever the others have got to: each has the image and the kernel in the end.
#[test]
fn of_those_who_send_the_same_at_once_all_have_it() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (image_text, image_blocks) = image("web", &rootfs(&[Some(1), None, Some(2)]));
    let (kernel_text, kernel_blocks) = kernel();
    let (image, kernel) = (Digest::of(&image_text), Digest::of(&kernel_text));
    for _ in 0..20 {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    image_blocks.upload(&store);
                    send(store.manifest_writer(&image).unwrap(), &travel::pack(&image_text).unwrap()).unwrap();
                    store.import_uploaded(&image).unwrap();
                    kernel_blocks.upload(&store);
                    send(store.manifest_writer(&kernel).unwrap(), &travel::pack(&kernel_text).unwrap()).unwrap();
                    store.import_kernel_uploaded(&kernel).unwrap();
                });
            }
        });
        store.remove(&image, &[]).unwrap();
        store.remove_kernel(&kernel, std::time::Duration::ZERO).unwrap();
    }
}

#[test]
fn what_is_not_the_manifest_is_refused_and_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let (text, _) = long_manifest();
    let digest = Digest::of(&text);
    let packed = travel::pack(&text).unwrap();
    let sent = |packed: &[u8]| send(store.manifest_writer(&digest).unwrap(), packed).unwrap_err();
    assert!(matches!(sent(b"garbage"), StoreError::ManifestStream(_)));
    assert!(matches!(sent(&packed[..packed.len() / 2]), StoreError::Manifest(_)), "half of it");
    assert!(matches!(sent(&travel::pack(b"another text").unwrap()), StoreError::Manifest(_)));
    drop(store.manifest_writer(&digest).unwrap());
    assert!(fs::read_dir(root.path().join("vm-images/.tmp")).unwrap().next().is_none());
    assert!(matches!(store.import_uploaded(&digest), Err(StoreError::NoManifest(_))));

    // Torn on the disk after it came: asked for again.
    send(store.manifest_writer(&digest).unwrap(), &packed).unwrap();
    let path = root.path().join("vm-images/incoming/manifests").join(digest.to_string());
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1000).unwrap();
    assert!(matches!(store.import_uploaded(&digest), Err(StoreError::NoManifest(_))));
    assert!(!path.exists());
    send(store.manifest_writer(&digest).unwrap(), &packed).unwrap();
    assert_eq!(store.remove_stale_blocks(std::time::Duration::ZERO).unwrap(), 1, "one that nobody asks for goes as blocks do");
}
