//! Boots real Linux guests in real VM processes, the way the daemon does it. Needs a KVM that can run guests, so these tests are
//! ignored (and shown as such) unless asked for:
//!
//! ```text
//! FORM_TEST_KVM=1 FORM_TEST_KERNEL=vmlinux FORM_TEST_MODULES=/lib/modules/VERSION cargo nextest run -p form-vmm --run-ignored all
//! ```
//!
//! `FORM_TEST_KERNEL` is an uncompressed kernel with PVH, `FORM_TEST_MODULES` the directory of its modules. Also needed: a static
//! busybox. Part of the tests needs root, as the daemon does.

mod guest;
mod memory;
mod plug;
mod processors;
mod restore;
mod vm;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use form_vmm::control::{ClientError, ErrorKind, ExitReason, VmState};
use form_vmm::descriptors::Descriptors;
use form_vmm::layout::Layout;
use form_vmm::machine::state::MachineState;
use form_vmm::machine::{Machine, Prepared};

use vm::{Shape, Vm, shape};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

const WHY: &str = "set FORM_TEST_KVM=1 to say that this machine's KVM runs guests";

#[track_caller]
fn wanted() {
    assert!(std::env::var_os("FORM_TEST_KVM").is_some_and(|value| value == "1"), "{WHY}");
}

#[test]
#[ignore = "boots a guest: FORM_TEST_KVM=1"]
fn kvm_a_guest_with_one_vcpu_boots_and_powers_off() {
    wanted();
    let vm = Vm::boot(&shape("echo CPUS=$(grep -c ^processor /proc/cpuinfo) MEM=$(awk '/MemTotal/{print $2}' /proc/meminfo); poweroff -f"));
    let (status, record) = vm.wait();
    assert_eq!(status.code(), Some(0));
    assert_eq!(record.unwrap().reason, ExitReason::PowerOff);
    assert!(vm.log().contains("CPUS=1 "), "{}", vm.log());
}

#[test]
#[ignore = "boots a guest: FORM_TEST_KVM=1"]
fn kvm_eight_vcpus_and_memory_on_both_sides_of_the_hole_are_used() {
    wanted();
    let script = "echo CPUS=$(grep -c ^processor /proc/cpuinfo) MEM=$(awk '/MemTotal/{print $2}' /proc/meminfo)
        free() { awk '/^Node/{zone=$4} /nr_free_pages/{print zone, $2}' /proc/zoneinfo | awk '/Normal/{print $2}'; }; before=$(free)
        mount -t tmpfs -o size=1g none /mnt; dd if=/dev/zero of=/mnt/x bs=1M count=256 2>/dev/null
        [ $((before - $(free))) -gt 50000 ] && echo HIGH MEMORY USED
        echo CORES=$(grep 'cpu cores' /proc/cpuinfo | sort -u | awk '{print $4}'); poweroff -f";
    let vm = Vm::boot(&Shape { vcpus: 8, memory_mib: 5120, ..shape(script) });
    vm.wait();
    let log = vm.log();
    assert!(log.contains("CPUS=8 MEM=50") && log.contains("CORES=8"), "{log}");
    assert!(log.contains("HIGH MEMORY USED"), "{log}");
}

#[test]
#[ignore = "boots guests: FORM_TEST_KVM=1"]
fn kvm_every_way_to_restart_is_seen_as_a_reset() {
    wanted();
    for how in ["", "reboot=a", "reboot=k", "reboot=t"] {
        let vm = Vm::boot(&Shape { cmdline: how, ..shape("reboot -f") });
        let (status, record) = vm.wait();
        assert_eq!((status.code(), record.map(|record| record.reason)), (Some(3), Some(ExitReason::Reset)), "{how}: {}", vm.log());
    }
}

#[test]
#[ignore = "boots a guest: FORM_TEST_KVM=1"]
fn kvm_the_guest_hears_the_power_button() {
    wanted();
    // Events are kept for who has the device open, from then on.
    let script = "insmod button; insmod evdev; while [ ! -e /dev/input/event0 ]; do sleep 0.1; done
        exec 3</dev/input/event0; echo LISTENING; dd bs=24 count=1 of=/tmp/event <&3 2>/dev/null; echo PRESSED; poweroff -f";
    let vm = Vm::boot(&shape(script));
    vm.await_line("LISTENING");
    vm.client().power_button().unwrap();
    let (status, record) = vm.wait();
    assert_eq!((status.code(), record.unwrap().reason), (Some(0), ExitReason::PowerOff));
    assert!(vm.log().contains("PRESSED"));
}

#[test]
#[ignore = "boots a guest: FORM_TEST_KVM=1"]
fn kvm_a_paused_guest_stands_still_and_goes_on() {
    wanted();
    // Four read at once what the first read said, and one makes stable what it wrote behind.
    let script = "insmod_virtio virtio_blk
        part() { dd if=/dev/vda bs=64k skip=$((16 * $1)) count=16 iflag=direct 2>/dev/null | md5sum; }
        for p in 0 1 2 3; do (was=$(part $p); while :; do [ \"$(part $p)\" = \"$was\" ] || echo BROKEN; done) & done
        (while :; do dd if=/dev/zero of=/dev/vda bs=64k seek=128 count=4 conv=fsync 2>/dev/null || echo BROKEN; done) &
        n=0; while :; do n=$((n+1)); echo TICK $n; sleep 0.2; done";
    let vm = Vm::boot(&Shape { vcpus: 2, disk_mib: Some(16), on_device: true, ..shape(script) });
    vm.await_line("TICK 5");
    let client = vm.client();
    assert!(client.metrics().unwrap().disks[0].io_uring, "this host has no io_uring");
    for _ in 0..3 {
        // Reads have to wait for the device from now on.
        std::fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
        client.pause().unwrap();
        assert_eq!(client.status().unwrap().0, VmState::Paused);
        assert!(matches!(client.pause(), Err(ClientError::Refused { kind: ErrorKind::WrongState, .. })));
        let (before, reads) = (vm.log(), client.metrics().unwrap().disks[0].reads);
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(vm.log(), before, "a paused guest printed");
        assert_eq!(client.metrics().unwrap().disks[0].reads, reads, "a paused guest read its disk");
        client.resume().unwrap();
        assert!(matches!(client.resume(), Err(ClientError::Refused { kind: ErrorKind::WrongState, .. })));
        let ticks = before.matches("TICK").count();
        vm.await_log("a tick after the pause", |log| log.matches("TICK").count() > ticks + 2);
        vm.await_disk_reads(reads + 16);
    }
    let disk = &client.metrics().unwrap().disks[0];
    assert!(!vm.log().contains("BROKEN") && disk.errors == 0 && disk.flushes > 0, "{disk:?}:\n{}", vm.log());
    client.stop().unwrap();
    let (status, record) = vm.wait();
    assert_eq!((status.code(), record.unwrap().reason), (Some(0), ExitReason::Stopped));
}

#[test]
#[ignore = "boots a guest: FORM_TEST_KVM=1"]
fn kvm_devices_work_from_inside_a_full_jail() {
    wanted();
    let script = "for m in virtio_blk virtio_net virtio-rng virtio_balloon; do insmod_virtio $m; done
        echo SERIAL=$(cat /sys/block/vda/serial)
        echo written-by-the-guest | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null
        echo RANDOM=$(head -c 64 /dev/hwrng | wc -c)
        echo DRIVERS=$(ls -d /sys/bus/virtio/drivers/*/virtio* | wc -l)
        echo MSIX=$(grep -c 'PCI-MSI.*virtio' /proc/interrupts)
        echo READY; sleep 1000";
    let vm = Vm::boot(&Shape { vcpus: 2, disk_mib: Some(8), rng: true, balloon: true, user: Some(4242), ..shape(script) });
    vm.await_line("READY");
    let log = vm.log();
    assert!(log.contains("SERIAL=TEST-SERIAL") && log.contains("RANDOM=64") && log.contains("DRIVERS=3"), "{log}");
    vm.assert_jailed(4242);
    let metrics = vm.client().metrics().unwrap();
    assert!(metrics.disks[0].writes > 0 && metrics.disks[0].flushes > 0 && metrics.vcpu_exits > 0, "{metrics:?}");
    vm.client().balloon(32).unwrap();
    vm.await_metric("a balloon of 32 MiB", |metrics| metrics.balloon_mib == 32);
    // A second connection finds the same VM: this is what a daemon does that was restarted.
    assert_eq!(vm.connect().status().unwrap().0, VmState::Running);
    vm.client().stop().unwrap();
    vm.wait();
    assert!(vm.disk_bytes().starts_with(b"written-by-the-guest"));
}

#[test]
#[ignore = "boots a guest: FORM_TEST_KVM=1"]
fn kvm_an_attached_console_reads_and_types() {
    wanted();
    let vm = Vm::boot(&shape("echo READY; read line; echo TYPED=$line; poweroff -f"));
    vm.await_line("READY");
    let console = vm.console();
    console.type_text("hello there\n");
    let (status, _) = vm.wait();
    assert_eq!(status.code(), Some(0));
    assert!(vm.log().contains("TYPED=hello there"), "{}", vm.log());
    assert!(console.read_to_end().contains("TYPED=hello there"));
}

#[test]
#[ignore = "starts VM processes: FORM_TEST_KVM=1"]
fn kvm_what_cannot_boot_says_why_and_leaves_a_record() {
    wanted();
    let vm = Vm::spawn();
    assert_eq!(vm.client().status().unwrap().0, VmState::Empty);
    assert!(matches!(vm.client().pause(), Err(ClientError::Refused { kind: ErrorKind::WrongState, .. })));
    let error = vm.try_boot(&Shape { kernel_bytes: Some(b"no kernel at all"), ..shape("") }).unwrap_err();
    let ClientError::Refused { kind: ErrorKind::Invalid, message } = error else { panic!("{error}") };
    assert!(message.contains("uncompressed ELF kernel"), "{message}");
    let (status, record) = vm.wait();
    let record = record.unwrap();
    assert_eq!((status.code(), record.reason), (Some(1), ExitReason::Failed));
    assert_eq!(record.message, Some(message));

    let vm = Vm::spawn();
    let error = vm.try_boot(&Shape { memory_mib: 300_000, ..shape("") }).unwrap_err();
    assert!(error.to_string().contains("300000 MiB"), "{error}");
}

#[test]
#[ignore = "boots a guest: FORM_TEST_KVM=1"]
fn kvm_a_killed_process_leaves_its_log_and_an_empty_record() {
    wanted();
    let vm = Vm::boot(&shape("echo READY; sleep 1000"));
    vm.await_line("READY");
    let (again, _fds) = vm::standalone_parts(&shape(""));
    assert!(matches!(vm.client().boot(&again, &[]), Err(ClientError::Refused { kind: ErrorKind::WrongState, .. })));
    vm.kill();
    let (status, record) = vm.wait();
    assert_eq!((status.signal(), record), (Some(9), None));
    assert!(vm.log().contains("READY"));
    assert!(matches!(vm.client().status(), Err(ClientError::Gone)));
}

#[test]
#[ignore = "boots a guest: FORM_TEST_KVM=1"]
fn kvm_a_paused_vm_can_be_saved_and_its_vcpus_set_up_again() {
    wanted();
    let (config, fds) =
        vm::standalone_parts(&Shape { vcpus: 2, disk_mib: Some(8), ..shape("insmod_virtio virtio_blk; echo READY; sleep 1000") });
    let hypervisor = kvm_ioctls::Kvm::new().unwrap();
    let prepared = Prepared::new(&config, &mut Descriptors::new(fds)).unwrap();
    let machine = Machine::start(prepared).unwrap();
    machine.resume();
    let attached = machine.serial().attached();
    attached.set_active(true);
    let mut printed = Vec::new();
    let start = std::time::Instant::now();
    while !String::from_utf8_lossy(&printed).contains("READY") {
        assert!(start.elapsed() < Duration::from_secs(150), "{}", String::from_utf8_lossy(&printed));
        machine.activate_devices();
        printed.extend(attached.take());
        std::thread::sleep(Duration::from_millis(20));
    }
    machine.pause();
    let json = serde_json::to_string(&machine.save().unwrap()).unwrap();
    let state: MachineState = serde_json::from_str(&json).unwrap();
    assert_eq!((state.vcpus.len(), state.devices.len(), state.devices[0].id.as_str()), (2, 1, "root"));
    // The guest's driver is at work: its queue has indices.
    assert!(state.devices[0].state.common.queues[0].next_used > 0, "{json}");

    let other = hypervisor.create_vm().unwrap();
    other.create_irq_chip().unwrap();
    let memory = form_vmm::memory::map(&Layout::new(config.memory_mib, 40).unwrap()).unwrap();
    let region = memory.iter().next().unwrap();
    let region = kvm_bindings::kvm_userspace_memory_region {
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the memory stays mapped until the end of this function, and the VM's vCPUs never run.
    unsafe { other.set_user_memory_region(region) }.unwrap();
    form_vmm::machine::state::restore_chips(&other, &state.chips).unwrap();
    for (id, saved) in (0..).zip(&state.vcpus) {
        let vcpu = other.create_vcpu(id).unwrap();
        form_vmm::cpu::state::restore(&vcpu, saved, Duration::ZERO).unwrap();
        let indices: Vec<u32> = saved.msrs.iter().map(|msr| msr.index).collect();
        let again = form_vmm::cpu::state::save(&vcpu, &indices).unwrap();
        assert_eq!((again.regs, again.mp_state, again.xcrs), (saved.regs, saved.mp_state, saved.xcrs));
        assert_eq!(again.sregs.cr3, saved.sregs.cr3);
    }
}
