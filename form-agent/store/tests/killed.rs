//! SIGKILL at any moment: what has a name afterwards is whole, and nothing else is left.

#[allow(dead_code)]
mod fixture;

use std::{
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use fixture::{image, kernel, rootfs};
use form_store::Store;
use form_types::VmId;

/// Set in the process that is to be killed: the root of its store.
const VICTIM: &str = "FORM_STORE_VICTIM";
const KILLS: u64 = 12;

/// Makes and removes things until it is killed.
fn work(root: &Path) {
    let store = Store::open(root).unwrap();
    let (kernel, kernel_blocks) = kernel();
    let guest = std::env::current_exe().unwrap();
    for round in 0.. {
        let (manifest, blocks) = image("web", &rootfs(&[Some(round % 7), None, Some(round % 3), Some(50)]));
        blocks.upload(&store);
        let entry = store.import(&manifest).unwrap();
        let vm = VmId::from_bytes([u8::try_from(round % 5).unwrap(); 16]);
        store.remove_disk(&vm).unwrap();
        store.create_disk(&vm, &entry.digest, 8 << 20).unwrap();
        kernel_blocks.upload(&store);
        let entry = store.import_kernel(&kernel).unwrap();
        store.initramfs(&entry.digest, &guest).unwrap();
        if round % 2 == 0 {
            store.remove_kernel(&entry.digest).unwrap();
        }
        for vm in store.disks().unwrap().iter().filter(|_| round % 3 == 0) {
            store.remove_disk(vm).unwrap();
        }
        for image in store.images().unwrap() {
            let _ = store.remove(&image.digest, &[]);
        }
    }
}

#[test]
fn a_killed_store_opens_whole() {
    if let Ok(root) = std::env::var(VICTIM) {
        return work(Path::new(&root));
    }
    let root = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for kill in 0..KILLS {
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_killed_store_opens_whole"])
            .env(VICTIM, root.path())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while !root.path().join("vms").exists() && begun.elapsed() < Duration::from_secs(20) {
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(60 + kill * 37));
        assert!(victim.try_wait().unwrap().is_none(), "the process to be killed ended by itself");
        victim.kill().unwrap();
        victim.wait().unwrap();

        let store = Store::open(root.path()).unwrap();
        for place in ["vm-images", "kernel", "vms", "vm-images/incoming"] {
            assert!(!root.path().join(place).join(".tmp").exists(), "{place}");
        }
        for image in store.images().unwrap() {
            store.check_sealed(&image.digest).unwrap();
            store.verify(&image.digest).unwrap();
            seen += 1;
        }
        for kernel in store.kernels().unwrap() {
            store.check_kernel_sealed(&kernel.digest).unwrap();
            store.initramfs(&kernel.digest, Path::new("/bin/sh")).unwrap();
        }
        for vm in store.disks().unwrap() {
            let disk = store.open_disk(&vm).unwrap();
            assert!(disk.path.exists() && disk.backing.iter().all(|path| path.exists()));
        }
    }
    assert!(seen > 0, "no image was ever made: the test shows nothing");
}
