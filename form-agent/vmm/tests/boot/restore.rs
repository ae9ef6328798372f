//! A VM is saved, its process killed, and another process goes on with it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use form_vmm::control::{ClientError, ErrorKind, SaveHow, VmState};

use crate::vm::{Shape, Tap, Vm, shape, vhost_net};
use crate::wanted;

const VSOCK_PORT: u32 = 1024;
/// Between the save and the restore.
const GONE: Duration = Duration::from_secs(15);
/// Where the identifier of the VM's generation is, in 16 bytes each.
const GENERATION: u64 = form_vmm::layout::GENERATION / 16;
/// A listener that answers each line with it and the guest's time of day; `sockaddr_vm` is family, reserved, port, cid, flags, zeros.
const ECHO: &str = "perl -e '$|=1; socket(L,40,1,0) or die; bind(L,pack(q(SSLLCx3),40,0,1024,0xffffffff,0)) or die; listen(L,5);
        print qq(VSOCK LISTENS\\n); while(accept(C,L)){ my $l=<C>; chomp $l; syswrite(C,qq(ECHO $l ).time()); close C }' &";

fn script() -> String {
    format!(
        "for m in virtio_blk virtio_net virtio-rng virtio_balloon; do insmod_virtio $m; done
        for m in vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport; do insmod $m; done
        ip link set eth0 up; rmmod virtio_net; insmod_virtio virtio_net
        ip link set eth0 up; ip addr add {guest}/24 dev eth0
        {ECHO}
        for d in vda vdb; do echo on-$d | dd of=/dev/$d bs=512 conv=sync,fsync 2>/dev/null; done
        first() {{ dd if=/dev/$1 bs=512 count=1 iflag=direct 2>/dev/null | tr -d '\\0'; }}
        echo $$ >/tmp/kept; n=0
        while :; do n=$((n+1))
          echo $n | dd of=/dev/vda bs=512 seek=8 conv=sync,notrunc,fsync 2>/dev/null
          ping -c 1 -W 2 {host} >/dev/null && p=pong || p=silence
          g=$(dd if=/dev/mem bs=16 skip={GENERATION} count=1 2>/dev/null | hexdump -v -e '/1 \"%02x\"')
          echo TICK $n GEN=$g $(first vda) $(first vdb) KEPT=$(cat /tmp/kept) RANDOM=$(head -c 8 /dev/hwrng | wc -c) $p CPUS=$(grep -c ^processor /proc/cpuinfo) END
          sleep 0.2
        done",
        guest = Tap::GUEST,
        host = Tap::HOST,
    )
}

struct Tick {
    number: u64,
    /// The identifier of the VM's generation, as its guest sees it.
    generation: String,
    whole: bool,
}

/// The last whole line that the loop printed.
fn last_tick(log: &str) -> Option<Tick> {
    let line = log.lines().rfind(|line| line.starts_with("TICK ") && line.trim_end().ends_with("END"))?;
    let words: Vec<&str> = line.split_whitespace().collect();
    Some(Tick {
        number: words.get(1)?.parse().ok()?,
        generation: words.get(2).filter(|word| word.len() == "GEN=".len() + 32).map(|word| (*word).to_owned()).unwrap_or_default(),
        whole: words.get(3..)? == ["on-vda", "on-vdb", "KEPT=1", "RANDOM=8", "pong", "CPUS=2", "END"],
    })
}

/// Has the guest answer over vsock. Gives how far its clock is behind the world's, in seconds: a guest in software emulation on a busy machine loses
/// some while it boots.
fn echo(vm: &Vm, text: &str) -> i64 {
    let mut stream = UnixStream::from(vm.client().vsock_connect(VSOCK_PORT).unwrap());
    writeln!(stream, "{text}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let time = answer.strip_prefix(&format!("ECHO {text} ")).unwrap_or_else(|| panic!("{answer}"));
    world() - time.parse::<i64>().unwrap()
}

fn world() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
}

/// But for the last page, which names the save.
fn assert_same_memory(one: &File, other: &File) {
    let pages = one.metadata().unwrap().len() / 4096 - 1;
    let (mut left, mut right) = ([0; 4096], [0; 4096]);
    for page in 0..pages {
        one.read_exact_at(&mut left, page * 4096).unwrap();
        other.read_exact_at(&mut right, page * 4096).unwrap();
        assert_eq!(left, right, "page {page} is not as it was when the VM stood");
    }
}

const TRACK: SaveHow = SaveHow { onto: false, track: true };

/// Saves the paused VM to `state` and `memory`, upon a copy of the `earlier` memory: the same as if all of it were written. What is a save
/// of nothing that the VM knows is not built upon.
fn saved_upon(vm: &Vm, earlier: &File, state: &File, memory: &File) {
    let upon = SaveHow { onto: true, track: true };
    let copy = |from: &File, to: &File| {
        to.set_len(0).unwrap();
        let mut bytes = vec![0; from.metadata().unwrap().len() as usize];
        from.read_exact_at(&mut bytes, 0).unwrap();
        to.write_all_at(&bytes, 0).unwrap();
    };
    copy(earlier, memory);
    let (aside, how) = vm.client().save_aside(state.as_fd(), memory.as_fd(), upon).unwrap();
    let written = aside.wait().unwrap().unwrap();
    assert!(how.incremental, "all of it was written");
    let (other, whole) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let all = vm.client().save(other.as_fd(), whole.as_fd(), SaveHow::default()).unwrap();
    assert_eq!(all.written, None, "it was not asked");
    println!("MEASURED: {} KiB of {} KiB have changed", written / 1024, whole.metadata().unwrap().blocks() / 2);
    assert_same_memory(&whole, memory);
    form_vmm::machine::verify_memory(memory).unwrap();
    let how = vm.client().save(other.as_fd(), whole.as_fd(), SaveHow { onto: true, track: false }).unwrap();
    assert!(!how.incremental && how.written.is_some_and(|all| all > written), "{how:?}");
}

#[test]
#[ignore = "boots a guest and restores it: FORM_TEST_KVM=1, root"]
fn kvm_a_saved_vm_goes_on_in_another_process() {
    wanted();
    let tap = Tap::new("formsave0");
    let whole = Shape {
        vcpus: 2,
        disk_mib: Some(8),
        qcow2_mib: Some(8),
        tap: Some(tap.name),
        vsock: true,
        rng: true,
        balloon: true,
        user: Some(4242),
        ..shape(&script())
    };
    let vm = Vm::boot(&whole);
    vm.await_log("a whole tick", |log| last_tick(log).is_some_and(|tick| tick.whole && tick.number >= 3));
    vm.await_line("VSOCK LISTENS");
    another_takes_over_its_packets(&vm);
    copied_while_it_runs(&vm);
    let behind = echo(&vm, "before");
    vm.client().balloon(16).unwrap();
    vm.await_metric("a balloon of 16 MiB", |metrics| metrics.balloon_mib == 16);

    let directory = tempfile::tempdir().unwrap();
    let create =
        |name: &str| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(directory.path().join(name)).unwrap();
    let (state, memory) = (create("state"), create("memory"));
    let refused = vm.client().save(state.as_fd(), memory.as_fd(), SaveHow::default());
    assert!(matches!(refused, Err(ClientError::Refused { kind: ErrorKind::WrongState, .. })), "{refused:?}");
    vm.client().pause().unwrap();
    let start = Instant::now();
    vm.client().save(state.as_fd(), memory.as_fd(), SaveHow::default()).unwrap();
    let metadata = memory.metadata().unwrap();
    println!(
        "MEASURED: save {} ms, state {} bytes, memory {} KiB of {} KiB",
        start.elapsed().as_millis(),
        state.metadata().unwrap().len(),
        metadata.blocks() / 2,
        metadata.len() / 1024
    );
    assert!(metadata.blocks() * 512 < metadata.len() * 3 / 4, "the memory file is not sparse");
    // It can also go on itself, and before its memory is written: that is the same as was written while it stood.
    let before = last_tick(&vm.log()).unwrap();
    let (state_aside, memory_aside) = (create("state aside"), create("memory aside"));
    let start = Instant::now();
    let (aside, saved) = vm.client().save_aside(state_aside.as_fd(), memory_aside.as_fd(), TRACK).unwrap();
    assert!(!saved.incremental);
    let stood = start.elapsed();
    vm.client().resume().unwrap();
    vm.await_log("a tick after the save", |log| last_tick(log).is_some_and(|tick| tick.number > before.number));
    aside.wait().unwrap().unwrap();
    println!("MEASURED: save aside {} ms", stood.as_millis());
    assert_eq!(memory_aside.metadata().unwrap().len(), metadata.len());
    assert_same_memory(&memory, &memory_aside);
    vm.client().balloon(4).unwrap();
    vm.await_metric("a balloon of 4 MiB", |metrics| metrics.balloon_mib == 4);
    vm.client().balloon(24).unwrap();
    vm.await_metric("a balloon of 24 MiB", |metrics| metrics.balloon_mib == 24);
    vm.client().pause().unwrap();
    saved_upon(&vm, &memory_aside, &state, &memory);
    let saved = last_tick(&vm.log()).unwrap();
    vm.kill();
    vm.wait();
    std::thread::sleep(GONE);

    damaged_states_are_refused(&vm, &whole, &state, &memory);
    let start = Instant::now();
    let again = Vm::restore(&vm, &whole, &state, &memory, true, true).unwrap();
    let restored = start.elapsed();
    again.await_log("a tick after the restore", |log| last_tick(log).is_some());
    println!("MEASURED: restore {} ms, first tick {} ms", restored.as_millis(), start.elapsed().as_millis());
    let log = again.log();
    let first = last_tick(&log).unwrap();
    assert!(first.number > saved.number, "{log}");
    // As it was at its start and while it went on itself; as another VM another one, which the tick that was under way may not have seen.
    assert_eq!(before.generation, saved.generation);
    assert!(!before.generation.is_empty() && before.generation.trim_matches('0') != "GEN=", "{}", before.generation);
    again.await_log("whole ticks after the restore", |log| last_tick(log).is_some_and(|tick| tick.whole && tick.number > first.number + 2));
    let later = last_tick(&again.log()).unwrap().generation;
    assert!(!later.is_empty() && later != saved.generation, "{later}");
    let lost = echo(&again, "after") - behind;
    assert!(lost.unsigned_abs() < GONE.as_secs() / 2, "the guest's clock lost {lost} s on the way, {behind} s before");
    again.client().balloon(8).unwrap();
    again.await_metric("a balloon of 8 MiB", |metrics| metrics.balloon_mib == 8);
    again.assert_jailed(4242);
    assert_eq!(again.carrier(), vhost_net().map(|_| true));
    assert_eq!(again.client().status().unwrap().0, VmState::Running);

    // What it went on from is built upon as what it saved itself.
    again.client().pause().unwrap();
    saved_upon(&again, &memory, &create("state upon"), &create("memory upon"));

    // Held where it stood until it is asked to go on.
    again.kill();
    again.wait();
    // On a host without vhost-net, from rings that its kernel moved packets through.
    let held = Vm::restore(&vm, &Shape { vhost: false, ..whole.clone() }, &state, &memory, false, false).unwrap();
    assert_eq!(held.client().status().unwrap().0, VmState::Paused);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(held.log(), "");
    held.client().resume().unwrap();
    held.await_log("a tick of the second copy", |log| {
        last_tick(log).is_some_and(|tick| tick.whole && ![&saved.generation, &later].contains(&&tick.generation))
    });
    assert_eq!(held.carrier(), None);
}

/// The limit of the interface is set and gone, while the guest sends: from the host's kernel to us, and back.
fn another_takes_over_its_packets(vm: &Vm) {
    let by_kernel = vhost_net().map(|_| true);
    assert_eq!(vm.carrier(), by_kernel);
    for (limit, expected) in [(NonZeroU64::new(1 << 20), by_kernel.map(|_| false)), (None, by_kernel)] {
        vm.client().limit_network("net", limit).unwrap();
        assert_eq!(vm.carrier(), expected, "{limit:?}");
        let before = last_tick(&vm.log()).unwrap().number;
        vm.await_log("whole ticks with another carrier", |log| last_tick(log).is_some_and(|tick| tick.whole && tick.number > before + 2));
    }
}

/// What is left when it stands is little, and the file then holds what one holds that is written while it stands.
fn copied_while_it_runs(vm: &Vm) {
    let [state, memory, whole] = [(); 3].map(|()| tempfile::tempfile().unwrap());
    let carrier = vm.carrier();
    let round = |onto| {
        let before = last_tick(&vm.log()).unwrap().number;
        let (aside, how) = vm.client().precopy(memory.as_fd(), onto).unwrap();
        assert_eq!(how.incremental, onto);
        let written = aside.wait().unwrap().unwrap();
        vm.await_log("whole ticks after a round", |log| last_tick(log).is_some_and(|tick| tick.whole && tick.number > before + 1));
        written
    };
    let all = round(false);
    let changed = round(true);
    assert_eq!(vm.carrier(), carrier);
    vm.client().pause().unwrap();
    let refused = vm.client().precopy(memory.as_fd(), true);
    assert!(matches!(refused, Err(ClientError::Refused { kind: ErrorKind::WrongState, .. })), "{:?}", refused.err());
    let start = Instant::now();
    let (aside, how) = vm.client().save_aside(state.as_fd(), memory.as_fd(), SaveHow { onto: true, track: false }).unwrap();
    let stood = start.elapsed();
    let left = aside.wait().unwrap().unwrap();
    assert!(how.incremental && left > 0 && left < all && changed < all, "{how:?}: {all}, then {changed}, then {left}");
    vm.client().save(state.as_fd(), whole.as_fd(), SaveHow::default()).unwrap();
    assert_same_memory(&whole, &memory);
    form_vmm::machine::verify_memory(&memory).unwrap();
    println!(
        "MEASURED: copied {} KiB while it ran, then {} KiB, {} KiB were left, {} ms",
        all >> 10,
        changed >> 10,
        left >> 10,
        stood.as_millis()
    );
    vm.client().resume().unwrap();
    // Nobody wanted to know what changes after it.
    assert!(vm.client().saves().unwrap().is_empty());
    let before = last_tick(&vm.log()).unwrap().number;
    vm.await_log("whole ticks after the copy", |log| last_tick(log).is_some_and(|tick| tick.whole && tick.number > before + 1));
    // Nor when who had it copied is gone, and somebody else has connected.
    for onto in [false, true] {
        let (aside, how) = vm.connect().precopy(memory.as_fd(), onto).unwrap();
        assert!(!how.incremental);
        aside.wait().unwrap();
    }
}

fn damaged_states_are_refused(vm: &Vm, whole: &Shape, state: &File, memory: &File) {
    let refusal = |shape: &Shape| match Vm::restore(vm, shape, state, memory, true, false) {
        Err(ClientError::Refused { kind: ErrorKind::Invalid, message }) => message,
        other => panic!("{:?}", other.map(|_| ())),
    };
    let mut byte = [0];
    state.read_exact_at(&mut byte, 100).unwrap();
    state.write_all_at(&[!byte[0]], 100).unwrap();
    let message = refusal(whole);
    assert!(message.contains("damaged"), "{message}");
    state.write_all_at(&byte, 100).unwrap();
    let message = refusal(&Shape { rng: false, ..whole.clone() });
    assert!(message.contains("vsock, rng, balloon; the configuration gives root, data, net, vsock, balloon"), "{message}");
    let length = memory.metadata().unwrap().len();
    memory.set_len(length - 1).unwrap();
    let message = refusal(whole);
    assert!(message.contains("torn"), "{message}");
    memory.set_len(length).unwrap();
}
