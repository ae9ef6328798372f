//! Memory that comes and goes while the guest runs, and while it is away.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use form_vmm::control::{ClientError, ErrorKind, MemoryMetrics, SaveHow};

use crate::vm::{Shape, Tap, Vm, shape, vhost_net};
use crate::wanted;

/// A file of 32 MiB fills memory that came, since that is where Linux puts what it can move; and the disk is read straight into it.
/// A tick comes only when packets do.
const SCRIPT: &str = "for m in virtio_blk virtio_net virtio_mem; do insmod_virtio $m; done
    echo auto-movable >/sys/module/memory_hotplug/parameters/online_policy
    echo online >/sys/devices/system/memory/auto_online_blocks
    mount -t tmpfs none /mnt; yes DISK | dd of=/dev/vda bs=1M count=8 iflag=fullblock conv=fsync 2>/dev/null
    ip link set eth0 up; ip addr add 10.99.7.2/24 dev eth0
    n=0
    while :; do n=$((n+1))
      until ping -c 1 -W 2 10.99.7.1 >/dev/null; do :; done
      mib=$(($(awk '/MemTotal/{print $2}' /proc/meminfo) / 1024))
      if [ $mib -gt 400 ] && [ ! -e /mnt/x ]; then
        for i in 1 2 3 4; do dd if=/dev/vda iflag=direct bs=8M 2>/dev/null; done >/mnt/x
      fi
      [ -e /mnt/x ] && sum=$(md5sum </mnt/x | cut -c1-32)-$(wc -c </mnt/x) || sum=none
      echo TICK $n ${mib} $sum END; sleep 0.3
    done";

/// The guest's own figure and what it reads in its file, of the last tick.
fn last(log: &str) -> Option<(u64, u64, String)> {
    let line = log.lines().rfind(|line| line.starts_with("TICK ") && line.trim_end().ends_with("END"))?;
    let mut words = line.split_whitespace().skip(1);
    let (number, mib) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some((number, mib, words.collect::<Vec<_>>().join(" ")))
}

fn refused(result: Result<(), ClientError>, expected: ErrorKind) {
    assert!(matches!(&result, Err(ClientError::Refused { kind, .. }) if *kind == expected), "{result:?}");
}

fn memory(vm: &Vm) -> MemoryMetrics {
    vm.client().metrics().unwrap().memory.unwrap()
}

/// Asks for so much, waits until the guest has it, and gives the figures of a tick after that.
fn resize(vm: &Vm, mib: u64) -> (u64, u64, String) {
    vm.client().memory(mib).unwrap();
    vm.await_metric("so much memory", |metrics| metrics.memory.is_some_and(|memory| memory.present_mib == mib));
    let before = last(&vm.log()).map_or(0, |tick| tick.0);
    vm.await_log("a tick", |log| last(log).is_some_and(|tick| tick.0 > before + 1));
    last(&vm.log()).unwrap()
}

#[test]
#[ignore = "boots a guest and restores it: FORM_TEST_KVM=1"]
fn kvm_memory_comes_and_goes_and_outlives_a_save() {
    wanted();
    let tap = Tap::new("formmem0");
    let with = Shape { disk_mib: Some(8), tap: Some(tap.name), user: Some(4242), ..shape(SCRIPT) };
    let vm = Vm::boot(&with);
    vm.await_log("a tick", |log| last(log).is_some_and(|tick| tick.1 < 256));
    let MemoryMetrics { booted_mib, step_mib, most_mib, wanted_mib, present_mib } = memory(&vm);
    assert_eq!((booted_mib, step_mib, wanted_mib, present_mib), (256, 128, 256, 256));
    assert!(most_mib > 4096, "{most_mib}");
    let by_kernel = vhost_net().map(|_| true);
    assert_eq!(vm.carrier(), by_kernel);
    for impossible in [128, 300, most_mib + 128, u64::MAX] {
        refused(vm.client().memory(impossible), ErrorKind::Invalid);
    }
    // What it has already changes nothing, not even the devices.
    vm.client().memory(256).unwrap();

    let directory = tempfile::tempdir().unwrap();
    let create = |name| File::options().read(true).write(true).create(true).truncate(false).open(directory.path().join(name)).unwrap();
    let (state, saved) = (create("state"), create("memory"));
    let (onto, track) = (SaveHow { onto: true, track: true }, SaveHow { onto: false, track: true });
    vm.client().pause().unwrap();
    vm.client().save_aside(state.as_fd(), saved.as_fd(), track).unwrap().0.wait().unwrap();
    vm.client().resume().unwrap();
    assert_eq!(vm.client().saves().unwrap().len(), 1);

    let (_, small, _) = last(&vm.log()).unwrap();
    let (_, grown, _) = resize(&vm, 512);
    assert!((small + 240..=small + 256).contains(&grown), "{small} and then {grown}");
    assert_eq!(vm.carrier(), by_kernel.map(|_| false), "the host's kernel does not know of memory that came");
    vm.await_log("the file", |log| last(log).is_some_and(|tick| tick.2.ends_with("-33554432 END")));
    let whole = last(&vm.log()).unwrap().2;
    vm.assert_jailed(4242);

    vm.client().pause().unwrap();
    refused(vm.client().memory(256), ErrorKind::WrongState);
    // There is other memory than before, so nothing can be built upon.
    let (aside, how) = vm.client().save_aside(state.as_fd(), saved.as_fd(), onto).unwrap();
    aside.wait().unwrap();
    assert!(!how.incremental);
    vm.kill();
    vm.wait();
    // A page of checksums, and one that says whose memory it is.
    assert_eq!(saved.metadata().unwrap().len(), (512 << 20) + 2 * 4096);

    let again = Vm::restore(&vm, &with, &state, &saved, true, true).unwrap();
    let before = memory(&again);
    assert_eq!((before.booted_mib, before.wanted_mib, before.present_mib, before.most_mib), (256, 512, 512, most_mib));
    again.await_log("a tick after the restore", |log| last(log).is_some_and(|tick| tick.2 == whole));
    assert_eq!(again.carrier(), by_kernel.map(|_| false));
    // What was added has no log.
    let upon = create("memory upon");
    std::fs::copy(directory.path().join("memory"), directory.path().join("memory upon")).unwrap();
    again.client().pause().unwrap();
    let how = again.client().save(tempfile::tempfile().unwrap().as_fd(), upon.as_fd(), onto).unwrap();
    assert!(!how.incremental);
    again.client().resume().unwrap();
    // What lies there moves to what stays.
    let (_, shrunk, sum) = resize(&again, 256);
    assert_eq!((shrunk, sum), (small, whole.clone()));
    let (_, between, sum) = resize(&again, 384);
    assert!((small + 120..=small + 128).contains(&between) && sum == whole, "{small}, {between}, {sum}");
    copied_while_it_goes(&again, &state, &upon);
    again.assert_jailed(4242);
}

/// Memory that goes between the copy and the save: all of what is left is written.
fn copied_while_it_goes(vm: &Vm, state: &File, whole: &File) {
    let copied = &tempfile::tempfile().unwrap();
    let onto = SaveHow { onto: true, track: true };
    for incremental in [false, true] {
        let (aside, how) = vm.client().precopy(copied.as_fd(), incremental).unwrap();
        assert_eq!(how.incremental, incremental);
        aside.wait().unwrap();
    }
    resize(vm, 256);
    let (aside, how) = vm.client().precopy(copied.as_fd(), true).unwrap();
    assert!(!how.incremental, "there is other memory than before");
    aside.wait().unwrap();
    vm.client().pause().unwrap();
    let (aside, how) = vm.client().save_aside(state.as_fd(), copied.as_fd(), onto).unwrap();
    assert!(how.incremental && aside.wait().unwrap().is_some_and(|left| left > 0));
    vm.client().save(state.as_fd(), whole.as_fd(), SaveHow::default()).unwrap();
    // But for the last page, which names the save.
    let bytes = |file: &File| {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize - 4096];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    assert!(bytes(copied) == bytes(whole), "it is not as it was when the VM stood");
    form_vmm::machine::verify_memory(copied).unwrap();
    vm.client().resume().unwrap();
}
