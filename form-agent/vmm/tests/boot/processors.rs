//! vCPUs that come and go while the guest runs.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use form_vmm::control::{ClientError, ErrorKind, SaveHow};

use crate::vm::{Shape, Vm, shape};
use crate::wanted;

/// Uses each vCPU that comes, as form-guest does, and says which do their part whenever that changes. A vCPU that runs counts its ticks.
const SCRIPT: &str = "cpus=/sys/devices/system/cpu
    seen=
    while :; do
      for c in $cpus/cpu[0-9]*; do [ -e $c/online ] && [ $(cat $c/online) = 0 ] && echo 1 >$c/online; done
      now=\"$(ls -d $cpus/cpu[0-9]* | wc -l) ONLINE=$(cat $cpus/online) NPROC=$(nproc) POSSIBLE=$(cat $cpus/possible)\"
      if [ \"$now\" != \"$seen\" ]; then
        ran=; for i in $(seq 0 7); do [ -e $cpus/cpu$i ] && taskset $((1 << i)) true && ran=$ran$i; done
        echo \"PRESENT=$now RAN=$ran END\"
      fi
      seen=$now; echo TICK; sleep 0.2
    done";

fn await_vcpus(vm: &Vm, said: &str) {
    vm.await_log(said, |log| log.lines().rfind(|line| line.starts_with("PRESENT=")) == Some(&format!("PRESENT={said} END")));
}

fn unplug(vm: &Vm, count: u8) {
    let mut gone = File::from(vm.client().unplug_vcpus(count).unwrap());
    let mut nothing = Vec::new();
    gone.read_to_end(&mut nothing).unwrap();
    assert!(nothing.is_empty());
    assert_eq!(vm.client().vcpus().unwrap().0, count);
}

fn refused(result: Result<(), ClientError>, expected: ErrorKind) {
    assert!(matches!(&result, Err(ClientError::Refused { kind, .. }) if *kind == expected), "{result:?}");
}

#[test]
#[ignore = "boots a guest and restores it: FORM_TEST_KVM=1, root"]
fn kvm_vcpus_come_and_go_while_the_guest_runs() {
    wanted();
    let with = Shape { most_vcpus: Some(3), user: Some(4242), ..shape(SCRIPT) };
    let vm = Vm::boot(&with);
    await_vcpus(&vm, "1 ONLINE=0 NPROC=1 POSSIBLE=0-2 RAN=0");
    assert_eq!(vm.client().vcpus().unwrap(), (1, 3));
    for count in [0, 4, 255] {
        refused(vm.client().plug_vcpus(count), ErrorKind::Invalid);
    }
    refused(vm.client().unplug_vcpus(0).map(drop), ErrorKind::Invalid);

    vm.client().plug_vcpus(2).unwrap();
    await_vcpus(&vm, "2 ONLINE=0-1 NPROC=2 POSSIBLE=0-2 RAN=01");
    assert_eq!(vm.client().vcpus().unwrap(), (2, 3));
    unplug(&vm, 1);
    await_vcpus(&vm, "1 ONLINE=0 NPROC=1 POSSIBLE=0-2 RAN=0");
    unplug(&vm, 1);
    // The same one again, and one that was never there.
    vm.client().plug_vcpus(3).unwrap();
    await_vcpus(&vm, "3 ONLINE=0-2 NPROC=3 POSSIBLE=0-2 RAN=012");
    vm.assert_jailed(4242);
    unplug(&vm, 2);
    await_vcpus(&vm, "2 ONLINE=0-1 NPROC=2 POSSIBLE=0-2 RAN=01");
    let restored = restored(&vm, &with);
    restored.client().plug_vcpus(3).unwrap();
    await_vcpus(&restored, "3 ONLINE=0-2 NPROC=3 POSSIBLE=0-2 RAN=012");
    unplug(&restored, 1);
    await_vcpus(&restored, "1 ONLINE=0 NPROC=1 POSSIBLE=0-2 RAN=0");
}

/// Paused with two of three, one of them let go: saved, and gone on with in another process.
fn restored(vm: &Vm, with: &Shape) -> Vm {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| File::options().read(true).write(true).create_new(true).open(directory.path().join(name)).unwrap();
    let (state, memory) = (file("state"), file("memory"));
    for _ in 0..2 {
        vm.client().pause().unwrap();
        refused(vm.client().plug_vcpus(3), ErrorKind::WrongState);
        refused(vm.client().unplug_vcpus(1).map(drop), ErrorKind::WrongState);
        vm.client().save(state.as_fd(), memory.as_fd(), SaveHow::default()).unwrap();
        vm.client().resume().unwrap();
    }
    let ticks = vm.log().matches("TICK").count();
    vm.await_log("ticks after the pause", |log| log.matches("TICK").count() > ticks + 2);
    vm.client().pause().unwrap();
    vm.client().save(state.as_fd(), memory.as_fd(), SaveHow::default()).unwrap();
    vm.kill();
    vm.wait();
    let restored = Vm::restore(vm, with, &state, &memory, true, false).unwrap();
    assert_eq!(restored.client().vcpus().unwrap(), (2, 3));
    restored.await_log("ticks after the restore", |log| log.matches("TICK").count() > 3);
    restored
}
