//! Disks that come, grow and go while the guest runs.

use std::fs::{self, File};
use std::io::Read;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use form_vmm::config::{DiskConfig, DiskFormat, DiskLimits, Fd};
use form_vmm::control::{ClientError, ErrorKind, SaveHow};
use imago::{FormatCreateBuilder, file::File as Storage, qcow2::Qcow2};

use crate::vm::{Shape, Vm, shape};
use crate::wanted;

/// Tells the disks that there are whenever that changes, and writes its serial to each new one.
const SCRIPT: &str = "for m in virtio_blk virtio-rng; do insmod_virtio $m; done
    list() { for d in /sys/block/vd*; do echo \"$(cat $d/serial)=$(cat $d/size)\"; done | sort | tr '\\n' ' '; }
    seen=
    while :; do now=$(list)
      if [ \"$now\" != \"$seen\" ]; then
        for d in /sys/block/vd*; do cat $d/serial | dd of=/dev/${d##*/} bs=512 conv=sync,notrunc,fsync 2>/dev/null; done
        echo \"DISKS $now RANDOM=$(head -c 8 /dev/hwrng | wc -c) END\"
      fi
      seen=$now; sleep 0.1
    done";

fn disk(id: &str, format: DiskFormat) -> DiskConfig {
    DiskConfig {
        id: id.into(),
        serial: format!("SERIAL-{id}"),
        format,
        file: Fd(0),
        backing: Vec::new(),
        read_only: false,
        limits: DiskLimits::default(),
    }
}

fn file(directory: &Path, name: &str) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(directory.join(name)).unwrap()
}

fn refused(result: Result<(), ClientError>, expected: ErrorKind) {
    assert!(matches!(&result, Err(ClientError::Refused { kind, .. }) if *kind == expected), "{result:?}");
}

fn await_disks(vm: &Vm, disks: &str) {
    vm.await_log(disks, |log| log.lines().rfind(|line| line.starts_with("DISKS ")) == Some(&format!("DISKS {disks}  RANDOM=8 END")));
}

/// Asks for a disk and waits until it is gone.
fn unplug(vm: &Vm, id: &str) {
    let mut gone = File::from(vm.client().unplug(id).unwrap());
    let mut nothing = Vec::new();
    gone.read_to_end(&mut nothing).unwrap();
    assert!(nothing.is_empty());
    assert!(vm.client().metrics().unwrap().disks.iter().all(|disk| disk.id != id));
    refused(vm.client().unplug(id).map(|_| ()), ErrorKind::NotFound);
}

#[test]
#[ignore = "boots a guest: FORM_TEST_KVM=1"]
fn kvm_disks_come_and_grow_and_go_while_the_guest_runs() {
    wanted();
    let with = Shape { disk_mib: Some(8), qcow2_mib: Some(8), rng: true, user: Some(4242), ..shape(SCRIPT) };
    let vm = Vm::boot(&with);
    await_disks(&vm, "TEST-QCOW2=16384 TEST-SERIAL=16384");
    let (client, directory) = (vm.client(), tempfile::tempdir().unwrap());

    let raw = file(directory.path(), "raw");
    raw.set_len(4 << 20).unwrap();
    client.plug(&disk("raw", DiskFormat::Raw), &[raw.as_fd()]).unwrap();
    await_disks(&vm, "SERIAL-raw=8192 TEST-QCOW2=16384 TEST-SERIAL=16384");
    refused(client.plug(&disk("raw", DiskFormat::Raw), &[raw.as_fd()]), ErrorKind::Invalid);
    refused(client.plug(&disk("nothing", DiskFormat::Raw), &[]), ErrorKind::Invalid);
    // Somebody else's process has the lock of what it writes to.
    refused(client.plug(&disk("twice", DiskFormat::Raw), &[file(directory.path(), "raw").as_fd()]), ErrorKind::System);

    let qcow2 = file(directory.path(), "qcow2");
    Qcow2::<Storage>::create_builder(Storage::try_from(qcow2.try_clone().unwrap()).unwrap()).size(4 << 20).create().unwrap();
    client.plug(&disk("qcow2", DiskFormat::Qcow2), &[qcow2.as_fd()]).unwrap();
    await_disks(&vm, "SERIAL-qcow2=8192 SERIAL-raw=8192 TEST-QCOW2=16384 TEST-SERIAL=16384");
    vm.assert_jailed(4242);

    // Limits come and go inside the jail as well.
    let limits = DiskLimits { iops: NonZeroU64::new(50), bytes_per_second: NonZeroU64::new(1 << 20) };
    for id in ["raw", "qcow2", "root"] {
        client.limit_disk(id, limits).unwrap();
        client.limit_disk(id, DiskLimits::default()).unwrap();
    }
    refused(client.limit_disk("nothing", limits), ErrorKind::NotFound);
    refused(client.limit_network("raw", None), ErrorKind::NotFound);

    for id in ["raw", "qcow2"] {
        client.grow(id, 6 << 20).unwrap();
        refused(client.grow(id, 5 << 20), ErrorKind::System);
    }
    await_disks(&vm, "SERIAL-qcow2=12288 SERIAL-raw=12288 TEST-QCOW2=16384 TEST-SERIAL=16384");
    assert_eq!(raw.metadata().unwrap().len(), 6 << 20);
    refused(client.grow("nothing", 6 << 20), ErrorKind::NotFound);

    // In another order than they came; one that was there from the start as well.
    drop((raw, qcow2));
    unplug(&vm, "raw");
    await_disks(&vm, "SERIAL-qcow2=12288 TEST-QCOW2=16384 TEST-SERIAL=16384");
    assert!(fs::read(directory.path().join("raw")).unwrap().starts_with(b"SERIAL-raw"));
    unplug(&vm, "data");
    unplug(&vm, "qcow2");
    await_disks(&vm, "TEST-SERIAL=16384");

    // Its files are closed and nobody's any more: it can come again, more than once.
    for _ in 0..3 {
        let raw = file(directory.path(), "raw");
        client.plug(&disk("raw", DiskFormat::Raw), &[raw.as_fd()]).unwrap();
        await_disks(&vm, "SERIAL-raw=12288 TEST-SERIAL=16384");
        drop(raw);
        unplug(&vm, "raw");
        await_disks(&vm, "TEST-SERIAL=16384");
    }
    slots_without_a_device_stay_empty_in_a_restored_vm(&vm, &with, directory.path());
}

/// The disk behind the first one is gone, and what comes after it is where it was.
fn slots_without_a_device_stay_empty_in_a_restored_vm(vm: &Vm, with: &Shape, directory: &Path) {
    let (state, memory) = (file(directory, "state"), file(directory, "memory"));
    vm.client().pause().unwrap();
    refused(vm.client().plug(&disk("late", DiskFormat::Raw), &[memory.as_fd() as BorrowedFd<'_>]), ErrorKind::WrongState);
    vm.client().save(state.as_fd(), memory.as_fd(), SaveHow::default()).unwrap();
    vm.kill();
    vm.wait();
    let Err(error) = Vm::restore(vm, with, &state, &memory, true, false) else { panic!("restored with a disk that it did not have") };
    assert!(error.to_string().contains("root, rng") && error.to_string().contains("root, rng, data"), "{error}");
    let restored = Vm::restore(vm, &Shape { qcow2_mib: None, ..with.clone() }, &state, &memory, true, false).unwrap();
    let raw = file(directory, "raw");
    restored.client().plug(&disk("raw", DiskFormat::Raw), &[raw.as_fd()]).unwrap();
    await_disks(&restored, "SERIAL-raw=12288 TEST-SERIAL=16384");
    unplug(&restored, "raw");
    await_disks(&restored, "TEST-SERIAL=16384");
}
