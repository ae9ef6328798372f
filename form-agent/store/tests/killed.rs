//! SIGKILL at any moment: what has a name afterwards is whole, and nothing else is left.

#[allow(dead_code)]
mod fixture;

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use fixture::{image, kernel, rootfs};
use form_store::{Store, local_pool};
use form_types::{VmId, VolumeFormat, VolumeId};

/// Set in the process that is to be killed: the root of its store.
const VICTIM: &str = "FORM_STORE_VICTIM";
/// What it says once it is at work.
const BEGUN: &str = "the victim is at work";
const KILLS: u64 = 12;
const VOLUME_BYTES: u64 = 16 << 20;

/// Makes and removes things until it is killed.
fn work(root: &Path) {
    let store = Store::open(root).unwrap();
    let (kernel, kernel_blocks) = kernel();
    let guest = std::env::current_exe().unwrap();
    println!("{BEGUN}");
    for round in 0.. {
        let (manifest, blocks) = image("web", &rootfs(&[Some(round % 7), None, Some(round % 3), Some(50)]));
        blocks.upload(&store);
        let entry = store.import(&manifest).unwrap();
        churn_volumes(&store, u8::try_from(round % 5).unwrap());
        let vm = VmId::from_bytes([u8::try_from(round % 5).unwrap(); 16]);
        store.remove_disk(&vm).unwrap();
        store.create_disk(&vm, &entry.digest, 8 << 20).unwrap();
        kernel_blocks.upload(&store);
        let entry = store.import_kernel(&kernel).unwrap();
        store.initramfs(&entry.digest, &guest).unwrap();
        if round % 2 == 0 {
            store.remove_kernel(&entry.digest, Duration::ZERO).unwrap();
        }
        for vm in store.disks().unwrap().iter().filter(|_| round % 3 == 0) {
            store.remove_disk(vm).unwrap();
        }
        for image in store.images().unwrap() {
            let _ = store.remove(&image.digest, &[]);
        }
    }
}

/// Makes, grows, clones and removes volumes; those that are not removed are found by the next round.
fn churn_volumes(store: &Store, number: u8) {
    let pool = store.pool(&local_pool()).unwrap();
    let (id, copy) = (VolumeId::from_bytes([number; 16]), VolumeId::from_bytes([number + 100; 16]));
    let format = if number.is_multiple_of(2) { VolumeFormat::Raw } else { VolumeFormat::Qcow2 };
    let entry = pool.ensure(&id, format, VOLUME_BYTES).unwrap();
    pool.grow(&id, entry.size_bytes + (1 << 20)).unwrap();
    pool.remove(pool.hold(&copy).unwrap()).unwrap();
    pool.clone_volume(&id, &copy).unwrap();
    if number.is_multiple_of(3) {
        pool.remove(pool.hold(&id).unwrap()).unwrap();
    }
}

#[test]
fn a_killed_store_opens_whole() {
    if let Ok(root) = std::env::var(VICTIM) {
        return work(Path::new(&root));
    }
    let root = tempfile::tempdir().unwrap();
    let (mut seen, mut volumes) = (0, 0);
    for kill in 0..KILLS * 10 {
        // A slow machine may have come to nothing before each of them.
        if kill >= KILLS && seen > 0 && volumes > 0 {
            break;
        }
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_killed_store_opens_whole", "--nocapture"])
            .env(VICTIM, root.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(said.any(|line| line.ends_with(BEGUN)), "the process to be killed does not begin");
        thread::sleep(Duration::from_millis(60 + kill * 37));
        assert!(victim.try_wait().unwrap().is_none(), "the process to be killed ended by itself");
        victim.kill().unwrap();
        victim.wait().unwrap();

        let store = Store::open(root.path()).unwrap();
        for place in ["vm-images", "kernel", "vms", "volumes", "volumes-made/local", "vm-images/incoming"] {
            let half_made = std::fs::read_dir(root.path().join(place).join(".tmp")).map_or(0, Iterator::count);
            assert_eq!(half_made, 0, "{place}");
        }
        for image in store.images().unwrap() {
            store.check_sealed(&image.digest).unwrap();
            assert!(store.verify(&image.digest).unwrap().damaged.is_empty());
            seen += 1;
        }
        for kernel in store.kernels().unwrap() {
            store.check_kernel_sealed(&kernel.digest).unwrap();
            store.initramfs(&kernel.digest, Path::new("/bin/sh")).unwrap();
        }
        let pool = store.pool(&local_pool()).unwrap();
        for id in pool.volumes().unwrap() {
            let volume = pool.open_volume(&id, false).unwrap();
            assert!(volume.is_blank && volume.size_bytes >= VOLUME_BYTES);
            drop(volume);
            // What was interrupted can be done again.
            pool.grow(&id, 1 << 40).unwrap();
            volumes += 1;
            pool.remove(pool.hold(&id).unwrap()).unwrap();
        }
        for vm in store.disks().unwrap() {
            let disk = store.open_disk(&vm).unwrap();
            assert!(disk.path.exists() && disk.backing.iter().all(|path| path.exists()));
        }
    }
    assert!(seen > 0 && volumes > 0, "{seen} images and {volumes} volumes were found: the test shows nothing");
}
