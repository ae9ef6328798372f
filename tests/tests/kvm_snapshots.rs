//! Snapshots of a real guest: what was on its disk and in its memory comes back, and an agent that is killed at any step leaves a VM that
//! runs and nothing half. Runs as root where /dev/kvm runs guests: `tests/kvm-host` makes such a place.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
    process::Stdio,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use form_tests::{
    disk::SmallDisk,
    host::{Host, SERVE, answers, wait},
};
use form_types::Failpoint::{self, *};
use serde_json::Value;

const PORT: u16 = 18094;

fn sh(host: &Host, script: &str) -> String {
    host.form(&["exec", "web", "--", "/bin/busybox", "sh", "-c", script]).ok().stdout
}

/// How many seconds the guest's clock is off, whatever time it takes to ask.
fn clock_difference(host: &Host) -> u64 {
    let world = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let before = world();
    let guest: u64 = sh(host, "busybox date +%s").trim().parse().unwrap();
    guest.abs_diff(guest.clamp(before, world()))
}

fn snapshots(host: &Host) -> Vec<Value> {
    host.form(&["vm", "snapshot", "ls", "-o", "json"]).ok().json().as_array().unwrap().clone()
}

fn snapshot(host: &Host, name: &str) -> Value {
    host.form(&["vm", "snapshot", "show", "web", name, "-o", "json"]).ok().json()
}

fn directory(host: &Host) -> PathBuf {
    host.root().join("var/lib/formation/snapshots").join(host.vm("web")["id"].as_str().unwrap())
}

fn names(host: &Host) -> Vec<String> {
    let entries = fs::read_dir(directory(host)).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn create(host: &Host, name: &str) -> Value {
    let _ = host.form(&["vm", "snapshot", "create", "web", "--name", name]).ok();
    let made = snapshot(host, name);
    println!(
        "MEASURED: {name}: {}, stood still {} ms, {} KiB on disk",
        made["consistency"],
        made["pause_ms"],
        made["allocated_bytes"].as_u64().unwrap() / 1024
    );
    made
}

/// A shell that counts in its memory and tells the count to a file in memory, so that the disk has no part in it. By itself it comes nowhere near
/// [`LEAP`], however long a test takes: it has to be told to leap.
const COUNTER: &str = "busybox mkdir -p /dev/shm; echo 0 > /dev/shm/count; \
    (n=0; while :; do n=$((n+1)); test -e /dev/shm/leap && n=$((n+1000000)); \
    echo $n > /dev/shm/next; busybox mv /dev/shm/next /dev/shm/count; busybox sleep 0.2; done) \
    > /dev/null 2>&1 < /dev/null & echo started";
const LEAP: u64 = 1_000_000;

fn count(host: &Host) -> u64 {
    let said = sh(host, "busybox cat /dev/shm/count");
    said.trim().parse().unwrap_or_else(|_| panic!("no count: {said:?}"))
}

fn is_whole(host: &Host) {
    wait("it is ready", || host.vm("web")["ready"] == true);
    wait("it answers over its network", || answers(PORT));
    assert_eq!(sh(host, "busybox echo here; busybox touch /written && busybox sync && busybox echo written"), "here\nwritten\n");
}

fn deploy(host: &Host) {
    let web = host.app("web", SERVE, PORT);
    let _ = host.form(&["deploy", &web, "-y"]).ok();
    is_whole(host);
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_vm_goes_back_to_what_it_was() {
    let mut host = Host::start();
    deploy(&host);
    assert_eq!(sh(&host, &format!("{COUNTER}; echo before > /file; busybox sync; busybox hostname")), "started\nweb\n");
    wait("it counts", || count(&host) > 3);
    let before = count(&host);
    let made = create(&host, "before");
    assert_eq!((made["consistency"].as_str(), made["memory_mib"].as_u64(), &made["fault"]), (Some("quiesced"), Some(128), &Value::Null));
    is_whole(&host);
    let at_snapshot = count(&host);
    assert!(at_snapshot >= before);

    // It changes; also in what a restart would not bring back.
    sh(&host, "echo after > /file; busybox rm -f /www/index.html; busybox sync; echo 1000000 > /dev/shm/marker; echo > /dev/shm/leap");
    wait("it counts on, with a leap", || count(&host) > LEAP);
    let (address, later) = (host.vm("web")["ipv4"].clone(), count(&host));
    let refused = host.form(&["vm", "snapshot", "create", "web", "--name", "before"]).exits(5);
    assert!(refused.stderr.contains("before"), "{refused:?}");

    // And goes back, twice: the snapshot stays what it is.
    for round in 0..2 {
        let begun = std::time::Instant::now();
        let _ = host.form(&["vm", "snapshot", "restore", "web", "before", "-y"]).ok();
        println!("MEASURED: restore {} ms until the VM is ready, with the command", begun.elapsed().as_millis());
        let now = count(&host);
        // What it counted after the snapshot is forgotten; since the restore it counts again, for as long as it takes to look.
        assert!(now >= before && now < LEAP, "round {round}: the counter was {before} to {at_snapshot}, then {later}, and is {now}");
        assert_eq!(
            sh(&host, "busybox cat /file; busybox hostname; test -e /dev/shm/marker && echo marked || echo unmarked"),
            "before\nweb\nunmarked\n",
            "round {round}"
        );
        is_whole(&host);
        assert_eq!(host.vm("web")["ipv4"], address);
        assert!(clock_difference(&host) < 5, "the guest's clock is {} s off", clock_difference(&host));
        let earlier = count(&host);
        wait("the counter goes on", || count(&host) > earlier);
        sh(&host, &format!("echo {round} > /file; busybox sync"));
    }

    // A snapshot in use can go: what runs keeps what it has of it.
    let _ = host.form(&["vm", "snapshot", "rm", "web", "before", "-y"]).ok();
    assert_eq!((names(&host), snapshots(&host)), (Vec::new(), Vec::new()));
    is_whole(&host);

    // A process that is killed starts from its disk, not from a snapshot.
    let (_, pid) = host.process(&host.vm("web"));
    std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    wait("it is started again", || host.vm("web")["restarts"].as_u64() >= Some(1));
    is_whole(&host);
    assert_eq!(sh(&host, "busybox cat /file; test -e /dev/shm/count && echo counting || echo fresh"), "1\nfresh\n");

    paused_and_stopped(&host);
    what_cannot_be_restored_changes_nothing(&mut host);
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
    assert_eq!(fs::read_dir(host.root().join("var/lib/formation/snapshots")).unwrap().count(), 0, "a VM's snapshots go with it");
}

fn paused_and_stopped(host: &Host) {
    // One of its vCPUs has come while it ran.
    let _ = host.form(&["vm", "set", "web", "--vcpus", "2"]).ok();
    sh(host, "echo paused > /file; busybox sync");
    let _ = host.form(&["vm", "pause", "web"]).ok();
    assert_eq!(create(host, "paused")["consistency"], "crash");
    assert_eq!(host.vm("web")["state"], "paused", "it stays as it was");
    let _ = host.form(&["vm", "resume", "web"]).ok();
    is_whole(host);
    let _ = host.form(&["vm", "stop", "web"]).ok();
    let stopped = create(host, "stopped");
    assert_eq!((stopped["consistency"].as_str(), &stopped["memory_mib"]), (Some("stopped"), &Value::Null));
    assert_eq!(host.vm("web")["state"], "stopped");

    // From the memory of a paused one into a stopped VM; then the disk of the stopped one into a running VM.
    let _ = host.form(&["vm", "snapshot", "restore", "web", "paused", "-y"]).ok();
    is_whole(host);
    for count in ["2", "3", "1", "2"] {
        let _ = host.form(&["vm", "set", "web", "--vcpus", count]).ok();
        assert_eq!(sh(host, "busybox nproc").trim(), count);
    }
    sh(host, "echo lost > /file; busybox sync");
    let _ = host.form(&["vm", "snapshot", "restore", "web", "stopped", "-y"]).ok();
    is_whole(host);
    assert_eq!(sh(host, "busybox cat /file"), "paused\n");
    let _ = host.form(&["vm", "snapshot", "rm", "web", "stopped", "-y"]).ok();
}

fn what_cannot_be_restored_changes_nothing(host: &mut Host) {
    let (_, pid) = host.process(&host.vm("web"));
    let refused = |host: &Host, code: i32, words: &str| {
        let refused = host.form(&["vm", "snapshot", "restore", "web", "paused", "-y"]).exits(code);
        assert!(refused.stderr.contains(words), "{words}: {}", refused.stderr);
        assert_eq!(host.process(&host.vm("web")).1, pid, "the VM runs on");
    };
    let files = directory(host).join("paused");
    let damaged = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let path = files.join(name);
        let whole = fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        change(&mut bytes);
        fs::write(&path, bytes).unwrap();
        (path, whole)
    };
    for (name, change, words) in [
        ("state", &(|bytes: &mut Vec<u8>| bytes[100] ^= 1) as &dyn Fn(&mut Vec<u8>), "damaged"),
        ("state", &|bytes| bytes.truncate(bytes.len() - 1), "torn"),
        ("state", &|bytes| bytes[8] = 99, "version 99"),
        ("snapshot.json", &|bytes| bytes.truncate(bytes.len() / 2), "torn"),
        ("snapshot.json", &|bytes| *bytes = b"{}\n".to_vec(), "not a snapshot"),
    ] {
        let (path, whole) = damaged(name, change);
        refused(host, 1, words);
        fs::write(path, whole).unwrap();
    }
    // One bit of its memory. What was written to and holds the same again is as good as before.
    let memory = fs::OpenOptions::new().read(true).write(true).open(files.join("memory")).unwrap();
    let verified = |code: i32| host.form(&["vm", "snapshot", "show", "web", "paused", "--verify"]).exits(code);
    let _ = verified(0);
    let at = rustix::fs::seek(&memory, rustix::fs::SeekFrom::Data(1 << 20)).unwrap();
    let mut byte = [0];
    memory.read_exact_at(&mut byte, at).unwrap();
    memory.write_all_at(&[byte[0] ^ 1], at).unwrap();
    let place = format!("the MiB at {} MiB is wrong", at >> 20);
    refused(host, 1, &place);
    assert!(verified(1).stdout.contains(&place));
    memory.write_all_at(&byte, at).unwrap();
    let _ = verified(0);
    let length = memory.metadata().unwrap().len();
    memory.set_len(length - 4096).unwrap();
    refused(host, 1, "torn");
    assert!(snapshots(host)[0]["fault"].as_str().unwrap().contains("torn"));
    memory.set_len(length).unwrap();
    refused(host, 1, "never finished");

    let _ = host.form(&["vm", "set", "web", "--memory", "160M", "--restart"]).ok();
    let (_, pid) = host.process(&host.vm("web"));
    let changed = host.form(&["vm", "snapshot", "restore", "web", "paused", "-y"]).exits(5);
    assert!(changed.stderr.contains("128 MiB of memory and has 160"), "{changed:?}");
    assert_eq!(host.process(&host.vm("web")).1, pid);
    let _ = host.form(&["vm", "snapshot", "restore", "web", "nothing", "-y"]).exits(3);
}

/// The agent dies at `point` of a command and is started again. Gives whether the operation was completed.
fn dies_and_comes_back(host: &mut Host, point: Failpoint, command: &[&str], kind: &str) -> bool {
    println!("=== {} of {}", point.as_str(), command.join(" "));
    host.kill_agent();
    host.start_agent_with(Some(point.as_str()));
    wait("the VM is adopted", || host.vm("web")["ready"] == true);
    let mut client = host.form_command(command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let died = host.dies_at(point.as_str(), |_| false);
    let _ = (client.kill(), client.wait());
    assert!(died);
    // A VM process that writes its memory is done with that by now, or will be.
    std::thread::sleep(Duration::from_millis(200));
    host.start_agent();
    wait("the operation ends", || host.no_operation_is_under_way());
    is_whole(host);
    let operation = host.operations().into_iter().find(|operation| operation["kind"] == kind).unwrap();
    operation["status"] == "completed"
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_an_agent_that_dies_leaves_a_vm_that_runs_and_nothing_half() {
    let mut host = Host::start();
    deploy(&host);
    sh(&host, &format!("{COUNTER}; echo kept > /file; busybox sync"));
    wait("it counts", || count(&host) > 3);
    let (_, pid) = host.process(&host.vm("web"));
    let create_command = ["vm", "snapshot", "create", "web", "--name", "one"];
    for point in [SnapshotCopied, SnapshotPaused, SnapshotSaved, SnapshotDrafted] {
        assert!(!dies_and_comes_back(&mut host, point, &create_command, "snapshot-create"));
        assert_eq!((names(&host), host.process(&host.vm("web")).1), (Vec::new(), pid), "{}", point.as_str());
    }
    assert!(dies_and_comes_back(&mut host, SnapshotNamed, &create_command, "snapshot-create"));
    assert_eq!(names(&host), ["one"]);
    let before = count(&host);

    let restore_command = ["vm", "snapshot", "restore", "web", "one", "-y"];
    for point in [RestoreDrafted, RestoreEnded, RestoreHeld, RestoreSwapped, RestoreRecorded] {
        sh(&host, &format!("echo {} > /file; busybox sync", point.as_str()));
        assert!(dies_and_comes_back(&mut host, point, &restore_command, "vm-restore"), "{}", point.as_str());
        assert_eq!(sh(&host, "busybox cat /file"), "kept\n", "{}", point.as_str());
        let earlier = count(&host);
        wait("its memory came back with it", || count(&host) > earlier);
    }
    assert!(before > 3);

    assert!(dies_and_comes_back(&mut host, SnapshotRetired, &["vm", "snapshot", "rm", "web", "one", "-y"], "snapshot-remove"));
    assert_eq!(names(&host), Vec::<String>::new());

    // What is left although nobody makes it, doctor finds and removes.
    fs::create_dir_all(directory(&host).join("half.part")).unwrap();
    fs::write(directory(&host).join("half.part/memory"), [1; 4096]).unwrap();
    let found = host.form(&["doctor"]);
    assert!(format!("{}{}", found.stdout, found.stderr).contains("half.part"), "{found:?}");
    let _ = host.form(&["doctor", "--fix"]);
    assert_eq!(names(&host), Vec::<String>::new());
    let _ = host.form(&["doctor"]).ok();
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
}

fn in_memory(host: &Host, word: &str) {
    sh(host, &format!("busybox mkdir -p /dev/shm; echo {word} > /dev/shm/word; busybox cp /bin/busybox /dev/shm/{word}"));
    assert_eq!(remembered(host), word);
}

/// Read from memory, and whole, with what was put there before.
fn remembered(host: &Host) -> String {
    let differs = "for f in /dev/shm/*; do test $f = /dev/shm/word || busybox cmp /bin/busybox $f || echo $f; done";
    assert_eq!(sh(host, differs), "");
    sh(host, "busybox cat /dev/shm/word").trim().to_owned()
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_later_snapshot_holds_what_has_changed_and_needs_no_other() {
    let mut host = Host::new();
    let disk = SmallDisk::sharing(&host.path("disk"), &host.root().join("var/lib/formation"), 700);
    host.start_agent();
    deploy(&host);
    let kind = |made: &Value| {
        println!("MEASURED: {}: {} of memory written", made["name"], made["written_bytes"]);
        let text = |key: &str| made[key].as_str().map(str::to_owned);
        (text("memory_kind").unwrap(), text("based_on"), made["written_bytes"].as_u64().unwrap())
    };
    let restore = |host: &Host, name: &str| {
        let _ = host.form(&["vm", "snapshot", "show", "web", name, "--verify"]).ok();
        let _ = host.form(&["vm", "snapshot", "restore", "web", name, "-y"]).ok();
        is_whole(host);
        remembered(host)
    };
    in_memory(&host, "one");
    let (first, _, all) = kind(&create(&host, "one"));
    assert_eq!(first, "full");
    in_memory(&host, "two");
    let (second, base, written) = kind(&create(&host, "two"));
    assert_eq!((second.as_str(), base.as_deref()), ("incremental", Some("one")));
    assert!(written < all / 2, "{written} bytes of {all}");

    // One that comes to nothing: the next holds what had changed until then as well, by an agent that has just come to know the VM.
    in_memory(&host, "three");
    let create_command = ["vm", "snapshot", "create", "web", "--name", "three"];
    assert!(!dies_and_comes_back(&mut host, SnapshotDrafted, &create_command, "snapshot-create"));
    let (third, base, _) = kind(&create(&host, "three"));
    assert_eq!((third.as_str(), base.as_deref()), ("incremental", Some("two")));

    // Each is whole by itself; and a VM that goes on from one can build upon it.
    let _ = host.form(&["vm", "snapshot", "rm", "web", "one", "two", "-y"]).ok();
    assert_eq!(restore(&host, "three"), "three");
    in_memory(&host, "four");
    let (fourth, base, _) = kind(&create(&host, "four"));
    assert_eq!((fourth.as_str(), base.as_deref()), ("incremental", Some("three")));
    let _ = host.form(&["vm", "snapshot", "rm", "web", "three", "-y"]).ok();

    // What somebody wrote to is not built upon, whatever it holds.
    let memory = fs::OpenOptions::new().read(true).write(true).open(directory(&host).join("four/memory")).unwrap();
    let mut byte = [0];
    memory.read_exact_at(&mut byte, 5 << 20).unwrap();
    memory.write_all_at(&byte, 5 << 20).unwrap();
    drop(memory);
    assert_eq!(kind(&create(&host, "five")).0, "full");
    assert_eq!(restore(&host, "four"), "four");
    compressed(&mut host, &disk);
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
    drop(disk);
}

/// What the file of memory takes on the disk.
fn memory_bytes(host: &Host, file: &str) -> u64 {
    fs::metadata(directory(host).join(file)).unwrap().blocks() * 512
}

/// Of a VM with the snapshots `four` and `five`, which are not.
fn compressed(host: &mut Host, disk: &SmallDisk) {
    in_memory(host, "six");
    let (_, pid) = host.process(&host.vm("web"));
    let create_command = |name| ["vm", "snapshot", "create", "web", "--name", name, "--compress"];
    let _ = host.form(&create_command("six")).ok();
    let (six, plain) = (snapshot(host, "six"), memory_bytes(host, "five/memory"));
    let packed = memory_bytes(host, "six/memory.compressed");
    println!("MEASURED: memory takes {} KiB, compressed {} KiB", plain / 1024, packed / 1024);
    assert!(packed < plain / 2 && !directory(host).join("six/memory").exists(), "{packed} of {plain}: {six}");
    assert!(six["compressed"] == true && six["unfolded_bytes"].as_u64().unwrap() > packed, "{six}");
    let _ = host.form(&["vm", "snapshot", "show", "web", "six", "--verify"]).ok();

    // Wherever the agent dies, the next one compresses what is there, and the VM runs on.
    in_memory(host, "seven");
    for (point, name) in [(SnapshotCompressed, "seven"), (SnapshotExchanged, "eight")] {
        assert!(dies_and_comes_back(host, point, &create_command(name), "snapshot-create"));
        let made = snapshot(host, name);
        assert!(made["compressed"] == true && made["fault"].is_null(), "{made}");
        assert_eq!(names(host), ["eight", "five", "four", "seven", "six"].map(str::to_owned)[usize::from(name == "seven")..]);
    }
    let _ = host.form(&["vm", "snapshot", "rm", "web", "four", "five", "eight", "-y"]).ok();
    assert_eq!(host.process(&host.vm("web")).1, pid);

    // What is damaged, or finds no room, changes nothing.
    let refused = |host: &Host, words: &str| {
        let refused = host.form(&["vm", "snapshot", "restore", "web", "six", "-y"]);
        assert!(refused.code == Some(1) && refused.stderr.contains(words), "{words}: {refused:?}");
        assert_eq!(host.process(&host.vm("web")).1, pid, "the VM runs on");
    };
    let path = directory(host).join("six/memory.compressed");
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let (mut byte, middle) = ([0], file.metadata().unwrap().len() / 2);
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 1], middle).unwrap();
    refused(host, "the compressed memory is damaged: the checksum of the MiB at");
    file.write_all_at(&byte, middle).unwrap();
    drop(file);
    disk.fill_but(70 << 10);
    refused(host, "is compressed: a restore unfolds");
    disk.free();
    let _ = host.form(&["vm", "stop", "web"]).ok();
    let stopped = host.form(&create_command("nine")).exits(5);
    assert!(stopped.stderr.contains("no memory to compress"), "{stopped:?}");

    // Back to what it held, also when the agent dies with it unfolded.
    assert!(restores_at(host, RestoreDrafted, "six"));
    assert_eq!(remembered(host), "six");
    assert_eq!(fs::read_dir(host.root().join("var/lib/formation/vms/.tmp")).map_or(0, |entries| entries.count()), 0);
    // A copy goes on from it as well, with memory of its own.
    let _ = host.form(&["vm", "fork", "web", "other", "--snapshot", "six"]).ok();
    assert_eq!(host.form(&["exec", "other", "--", "/bin/busybox", "cat", "/dev/shm/word"]).ok().stdout, "six\n");
    let _ = host.form(&["destroy", "other", "-y"]).ok();
    // Nothing is built upon what is compressed.
    assert_eq!(create(host, "ten")["memory_kind"], "full");
    let _ = host.form(&["doctor"]).ok();
}

/// Of a stopped VM, for which nobody waits before.
fn restores_at(host: &mut Host, point: Failpoint, name: &str) -> bool {
    host.kill_agent();
    host.start_agent_with(Some(point.as_str()));
    let mut client =
        host.form_command(&["vm", "snapshot", "restore", "web", name, "-y"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let died = host.dies_at(point.as_str(), |_| false);
    let _ = (client.kill(), client.wait());
    host.start_agent();
    wait("the operation ends", || host.no_operation_is_under_way());
    is_whole(host);
    died
}

/// What a guest finds on its root disk, on the two volumes and in its memory; not what it remembers of the disks.
fn everything(host: &Host) -> String {
    sh(host, "echo 3 > /proc/sys/vm/drop_caches; busybox cat /file /data/file /log/file /dev/shm/file")
}

fn write_everywhere(host: &Host, word: &str) {
    // Nothing of it is asked to be on a disk.
    sh(host, &format!("busybox mkdir -p /dev/shm; for at in / /data/ /log/ /dev/shm/; do echo {word} > ${{at}}file; done"));
}

fn parts(host: &Host) -> Vec<String> {
    let parts = host.form(&["volume", "snapshot", "ls", "-o", "json"]).ok().json();
    parts
        .as_array()
        .unwrap()
        .iter()
        .map(|part| format!("{}/{}", part["volume"].as_str().unwrap(), part["name"].as_str().unwrap()))
        .collect()
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_volumes_go_back_with_their_vm() {
    let mut host = Host::start();
    deploy(&host);
    let disk = SmallDisk::sharing(&host.path("xfs.img"), &host.path("shares"), 400);
    let _ = host.form(&["pool", "create", "shares", "--path", host.path("shares").to_str().unwrap()]).ok();
    // Two that it can write to, and one that it can only read.
    for (name, format, pool) in [("data", "raw", "shares"), ("log", "qcow2", "shares"), ("given", "raw", "local")] {
        let _ = host.form(&["volume", "create", name, "-s", "32M", "--format", format, "--pool", pool]).ok();
    }
    let _ = host.form(&["volume", "attach", "data", "web", "/data"]).ok();
    let _ = host.form(&["volume", "attach", "given", "web", "--read-only"]).ok();
    let _ = host.form(&["volume", "attach", "log", "web", "/log"]).ok();
    write_everywhere(&host, "before");

    // An agent that dies with one of two kept keeps none.
    let create_command = ["vm", "snapshot", "create", "web", "--name", "one"];
    assert!(!dies_and_comes_back(&mut host, VolumeSnapshotNamed, &create_command, "snapshot-create"));
    assert_eq!((names(&host), parts(&host)), (Vec::new(), Vec::new()));
    let made = create(&host, "one");
    assert_eq!((&made["volumes"], &made["fault"]), (&serde_json::json!(["data", "log"]), &Value::Null));
    assert_eq!(parts(&host), ["data/one", "log/one"]);
    let own = host.form(&["volume", "snapshot", "rm", "data", "one", "-y"]).exits(5);
    assert!(own.stderr.contains("a part of that of vm/web"), "{own:?}");
    let fork = host.form(&["vm", "fork", "web", "other", "--snapshot", "one"]).exits(5);
    assert!(fork.stderr.contains("a fork has no volumes"), "{fork:?}");
    let fork = host.form(&["vm", "fork", "web", "other"]).exits(5);
    assert!(fork.stderr.contains("a fork has no volumes") && names(&host) == ["one"], "{fork:?}");

    // All of it goes back, also when the agent dies with one volume gone back and the other not.
    write_everywhere(&host, "after");
    assert_eq!(everything(&host), "after\n".repeat(4));
    let restore_command = ["vm", "snapshot", "restore", "web", "one", "-y"];
    assert!(dies_and_comes_back(&mut host, VolumeRestoreSwitched, &restore_command, "vm-restore"));
    assert_eq!(everything(&host), "before\n".repeat(4));
    // The guest goes on with its volumes: what it writes is theirs, and a volume comes and goes.
    write_everywhere(&host, "again");
    sh(&host, "busybox sync");
    assert_eq!(everything(&host), "again\n".repeat(4));
    let _ = host.form(&["doctor"]).ok();
    let _ = host.form(&["volume", "detach", "log"]).ok();
    let refused = |words: &str| {
        let refused = host.form(&restore_command).exits(5);
        assert!(refused.stderr.contains("volume/log") && refused.stderr.contains(words), "{words}: {}", refused.stderr);
    };
    refused("is detached");
    let _ = host.form(&["volume", "attach", "log", "web", "/elsewhere"]).ok();
    refused("was at /log and is at /elsewhere");
    let _ = host.form(&["volume", "detach", "log"]).ok();
    let _ = host.form(&["volume", "attach", "log", "web", "/log"]).ok();
    assert_eq!(everything(&host), "again\n".repeat(4));
    let _ = host.form(&restore_command).ok();
    assert_eq!(everything(&host), "before\n".repeat(4));

    // With the VM stopped; then there is no memory that remembers.
    let _ = host.form(&["vm", "stop", "web"]).ok();
    let stopped = create(&host, "stopped");
    assert_eq!(stopped["volumes"], serde_json::json!(["data", "log"]));
    let _ = host.form(&restore_command).ok();
    write_everywhere(&host, "lost");
    let _ = host.form(&["vm", "snapshot", "restore", "web", "stopped", "-y"]).ok();
    is_whole(&host);
    assert_eq!(sh(&host, "busybox cat /file /data/file /log/file"), "before\n".repeat(3));

    // What it kept goes with it, also when the agent dies on the way; and with the VM.
    assert!(dies_and_comes_back(&mut host, SnapshotRetired, &["vm", "snapshot", "rm", "web", "one", "-y"], "snapshot-remove"));
    assert_eq!((names(&host), parts(&host)), (vec!["stopped".to_owned()], vec!["data/stopped".to_owned(), "log/stopped".to_owned()]));
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    assert_eq!(parts(&host), Vec::<String>::new());
    let _ = host.form(&["volume", "rm", "data", "log", "given", "-y"]).ok();
    let _ = host.form(&["pool", "rm", "shares", "-y"]).ok();
    host.is_clean();
    drop(disk);
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_full_disk_or_a_guest_that_does_not_quiesce_costs_no_vm() {
    let mut host = Host::new();
    let disk = SmallDisk::mount(&host.path("disk"), &host.root().join("var/lib/formation"), 480);
    host.start_agent();
    deploy(&host);
    // More on its disk than the agent keeps in reserve for those who free room.
    sh(&host, "busybox dd if=/dev/urandom of=/big bs=1M count=20 conv=fsync 2>/dev/null");
    let (_, pid) = host.process(&host.vm("web"));
    let runs_on = |host: &Host| {
        assert_eq!(host.process(&host.vm("web")).1, pid, "it is another process");
        assert!(answers(PORT));
        assert_eq!(sh(host, "busybox echo here"), "here\n");
    };

    // Room to begin with, and not for all of its memory.
    disk.fill_but(72 << 10);
    let full = host.form(&["vm", "snapshot", "create", "web", "--name", "one"]);
    assert!(full.code != Some(0) && full.stderr.contains("disk is full"), "{full:?}");
    assert_eq!(names(&host), Vec::<String>::new());
    runs_on(&host);
    // None to begin with.
    disk.free();
    disk.fill_but(8 << 10);
    let full = host.form(&["vm", "snapshot", "create", "web", "--name", "one"]);
    assert!(full.code != Some(0) && full.stderr.contains("disk is full"), "{full:?}");
    runs_on(&host);

    // A guest whose file system somebody has frozen already cannot quiesce it.
    disk.free();
    sh(&host, "busybox fsfreeze --freeze /");
    assert_eq!(create(&host, "one")["consistency"], "crash");
    sh(&host, "busybox fsfreeze --unfreeze /");
    is_whole(&host);

    // Going back fails before anything is ended; and an agent that starts anew leaves it at that.
    disk.fill_but(1 << 10);
    let full = host.form(&["vm", "snapshot", "restore", "web", "one", "-y"]);
    assert!(full.code == Some(1) && full.stderr.contains("was not restored") && full.stderr.contains("no room"), "{full:?}");
    runs_on(&host);
    disk.free();
    host.kill_agent();
    host.start_agent();
    is_whole(&host);
    runs_on(&host);
    let _ = host.form(&["vm", "snapshot", "restore", "web", "one", "-y"]).ok();
    sh(&host, "busybox fsfreeze --unfreeze /");
    is_whole(&host);
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
}
