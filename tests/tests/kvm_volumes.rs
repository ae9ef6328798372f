//! Volumes of real guests: never the wrong disk, never lost. Runs as root where /dev/kvm runs guests: `tests/kvm-host` makes such a place.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use form_tests::host::{Host, wait};
use serde_json::Value;

const SERVE: &str = r#"["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"]"#;

/// Three of one size, and one that is larger than the root disk.
const VOLUMES: [(&str, &str, &str); 4] =
    [("one", "/v/one", "1G"), ("data", "/var/data", "37G"), ("two", "/v/two", "1G"), ("three", "/v/three", "1G")];

fn formfile(host: &Host, name: &str, port: u16, volumes: &[(&str, &str, &str)]) -> String {
    let path = host.app(name, SERVE, port);
    let mut text = fs::read_to_string(&path).unwrap();
    for (name, target, size) in volumes {
        text.push_str(&format!("VOLUME {name}:{target}:{size}\n"));
    }
    fs::write(&path, text).unwrap();
    path
}

fn sh(host: &Host, vm: &str, script: &str) -> String {
    host.form(&["exec", vm, "--", "/bin/busybox", "sh", "-c", script]).ok().stdout
}

fn volumes(host: &Host) -> Vec<Value> {
    host.form(&["volume", "ls", "-o", "json"]).ok().json().as_array().unwrap().clone()
}

fn volume(host: &Host, name: &str) -> Value {
    volumes(host).into_iter().find(|volume| volume["name"] == name).unwrap_or(Value::Null)
}

fn file(host: &Host, volume: &Value) -> PathBuf {
    host.root().join("var/lib/formation/volumes").join(volume["id"].as_str().unwrap()).join("volume.raw")
}

/// Every mounted volume is where the host says, by its serial, and holds its own name.
fn all_in_place(host: &Host, vm: &str, expected: usize) {
    let mounted = |volume: &Value| volume["attachment"]["vm"] == vm && volume["attachment"]["path"].is_string();
    let mounted: Vec<Value> = volumes(host).into_iter().filter(mounted).collect();
    let looks = mounted.iter().map(|volume| {
        let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("{volume}")).to_owned();
        let (device, path) = (text(&volume["attachment"]["device"]), text(&volume["attachment"]["path"]));
        assert_eq!(volume["attachment"]["state"], "attached");
        let serial = format!("/sys/block/{}/serial", device.replace("/dev/", ""));
        format!("echo $(busybox cat {path}/name) $(busybox cat {serial}) $(busybox grep -c '^{device} {path} ext4 ' /proc/mounts)")
    });
    let said = sh(host, vm, &looks.collect::<Vec<_>>().join("; "));
    let told = mounted.iter().map(|volume| {
        // A clone holds what its source holds.
        let held = if volume["name"] == "copy" { "data" } else { volume["name"].as_str().unwrap() };
        format!("{held} {} 1\n", volume["serial"].as_str().unwrap())
    });
    assert_eq!((said, mounted.len()), (told.collect::<String>(), expected));
}

/// In MiB, as the guest's own file system says.
fn file_system_size(host: &Host, vm: &str, path: &str) -> u64 {
    sh(host, vm, &format!("busybox df -m -P {path} | busybox tail -1 | busybox awk '{{ print $2 }}'")).trim().parse().unwrap()
}

fn is_ready_again(host: &Host, vm: &str) {
    wait("the VM is ready", || host.vm(vm)["ready"] == true);
}

fn kill(pid: u32) {
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    wait("the process is gone", || !form_tests::host::is_alive(pid));
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_volumes_outlive_everything_and_are_never_mistaken() {
    let host = Host::start();
    let web = formfile(&host, "web", 18091, &VOLUMES);
    let deployed = host.form(&["deploy", &web, "-y"]).ok();
    assert!(format!("{}{}", deployed.stdout, deployed.stderr).contains("new, 37 GiB"), "the plan says so: {deployed:?}");
    let write: Vec<String> = VOLUMES.iter().map(|(name, path, _)| format!("echo {name} > {path}/name")).collect();
    sh(&host, "web", &format!("{}; busybox sync", write.join("; ")));
    all_in_place(&host, "web", 4);
    let size = file_system_size(&host, "web", "/var/data");
    assert!(size > 36 << 10, "the file system was grown to its volume: {size} MiB");

    one_vm_at_a_time(&host);
    let host = kept_at_one_instant(host);
    let mut host = come_grow_and_go(host);

    // The agent is killed: the VM goes on, and the new agent knows its volumes.
    host.kill_agent();
    host.start_agent();
    is_ready_again(&host, "web");
    all_in_place(&host, "web", 4);
    let _ = host.form(&["volume", "detach", "one"]).ok();
    let _ = host.form(&["volume", "attach", "one", "web", "/v/one"]).ok();
    all_in_place(&host, "web", 4);

    // The host goes down: no process is left, and nothing below /run. Everything that was synced is there, each in its place.
    let (_, pid) = host.process(&host.vm("web"));
    host.kill_agent();
    kill(pid);
    fs::remove_dir_all(host.root().join("run")).unwrap();
    host.start_agent();
    is_ready_again(&host, "web");
    all_in_place(&host, "web", 4);

    redeployed_and_attached_by_hand(&host);
    destroyed(&host);
}

fn one_vm_at_a_time(host: &Host) {
    let other = formfile(host, "other", 18092, &[("data", "/data", "1G")]);
    for command in [&["deploy", other.as_str(), "-y"][..], &["volume", "rm", "data", "-y"]] {
        let refused = host.form(command).exits(5);
        assert!(refused.stderr.contains("data") && refused.stderr.contains("web"), "{}", refused.stderr);
    }
    let _ = host.form(&["volume", "attach", "nothing", "web"]).exits(3);
    let _ = host.form(&["volume", "clone", "data", "copy"]).exits(5);
    // A foreign program that heeds locks.
    let data = file(host, &volume(host, "data"));
    let foreign = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k"]).arg(data).output().unwrap();
    assert!(!foreign.status.success() && String::from_utf8_lossy(&foreign.stderr).contains("lock"), "{foreign:?}");
}

/// A file system that is unmounted when this is gone.
struct Mount(PathBuf);

impl Mount {
    fn new(path: PathBuf, options: &[&str]) -> Self {
        fs::create_dir_all(&path).unwrap();
        run("mount", &[options, &[path.to_str().unwrap()]].concat());
        Self(path)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["--lazy".as_ref(), self.0.as_os_str()]).status();
    }
}

fn run(program: &str, arguments: &[&str]) {
    let ran = Command::new(program).args(arguments).output().unwrap();
    assert!(ran.status.success(), "{program} {arguments:?}: {ran:?}");
}

/// Snapshots of a volume that the running guest writes to: it stands for a moment and goes on, whatever its agent does meanwhile.
fn kept_at_one_instant(mut host: Host) -> Host {
    let (_, pid) = host.process(&host.vm("web"));
    let image = host.path("xfs.img");
    fs::File::create(&image).unwrap().set_len(400 << 20).unwrap();
    run("mkfs.xfs", &["-q", "-m", "reflink=1", image.to_str().unwrap()]);
    let shares = Mount::new(host.path("shares"), &["-o", "loop", image.to_str().unwrap()]);
    let plain = Mount::new(host.path("plain"), &["-t", "tmpfs", "-o", "size=128m", "tmpfs"]);
    for (pool, mount) in [("shares", &shares), ("plain", &plain)] {
        let _ = host.form(&["pool", "create", pool, "--path", mount.0.to_str().unwrap()]).ok();
    }
    let _ = host.form(&["volume", "create", "log", "-s", "64M", "--format", "qcow2", "--pool", "shares"]).ok();
    let _ = host.form(&["volume", "attach", "log", "web", "/log"]).ok();
    // Nothing of it is asked to be on the disk.
    sh(&host, "web", "echo log > /log/name; echo first > /log/it");
    let one = ["volume", "snapshot", "create", "log", "-n", "one"];
    host.kill_agent();
    host.start_agent_with(Some("volume-snapshot.paused"));
    is_ready_again(&host, "web");
    let mut client = host.form_command(&one).spawn().unwrap();
    assert!(host.dies_at("volume-snapshot.paused", |_| false));
    let _ = (client.kill(), client.wait());
    host.start_agent();
    is_ready_again(&host, "web");
    assert_eq!(host.form(&["volume", "snapshot", "ls", "log", "-o", "name"]).ok().stdout, "", "nothing of it was kept");
    let _ = host.form(&one).ok();
    let shown = host.form(&["volume", "snapshot", "show", "log", "one", "-o", "json"]).ok().json();
    assert!(shown["consistency"] == "quiesced" && shown["pause_ms"].is_u64() && shown["fault"].is_null(), "{shown}");
    sh(&host, "web", "echo second > /log/it; busybox sync");
    let runs = host.form(&["volume", "snapshot", "restore", "log", "one", "-y"]).exits(5);
    assert!(runs.stderr.contains("vm/web runs with volume/log"), "{runs:?}");
    // One that stands already is not asked, and stays where it is.
    let _ = host.form(&["vm", "pause", "web"]).ok();
    let _ = host.form(&["volume", "snapshot", "create", "log", "-n", "two"]).ok();
    assert_eq!(host.vm("web")["state"], "paused");
    let shown = host.form(&["volume", "snapshot", "show", "log", "two", "-o", "json"]).ok().json();
    assert!(shown["consistency"] == "crash" && shown["pause_ms"].is_null(), "{shown}");
    let paused = host.form(&["volume", "sync", "log"]).exits(5);
    assert!(paused.stderr.contains("is paused"), "{paused:?}");
    let _ = host.form(&["vm", "resume", "web"]).ok();
    assert_eq!(host.form(&["volume", "sync", "log"]).ok().stdout, "log: in line already\n");

    let _ = host.form(&["volume", "detach", "log"]).ok();
    for (snapshot, held) in [("one", "first\n"), ("two", "second\n")] {
        let _ = host.form(&["volume", "snapshot", "restore", "log", snapshot, "-y"]).ok();
        let _ = host.form(&["volume", "attach", "log", "web", "/log"]).ok();
        assert_eq!(sh(&host, "web", "busybox cat /log/it"), held);
        all_in_place(&host, "web", 5);
        let _ = host.form(&["volume", "detach", "log"]).ok();
    }

    // Where blocks are not shared a VM would have to wait for a copy.
    let _ = host.form(&["volume", "create", "slow", "-s", "16M", "--pool", "plain"]).ok();
    let _ = host.form(&["volume", "attach", "slow", "web"]).ok();
    let waits = host.form(&["volume", "snapshot", "create", "slow"]).exits(5);
    assert!(waits.stderr.contains("stand still") && waits.stderr.contains("form volume move"), "{waits:?}");
    let _ = host.form(&["volume", "detach", "slow"]).ok();
    let _ = host.form(&["volume", "snapshot", "create", "slow"]).ok();
    let _ = host.form(&["volume", "rm", "log", "slow", "--snapshots", "-y"]).ok();
    let _ = host.form(&["pool", "rm", "shares", "plain", "-y"]).ok();
    assert_eq!(host.process(&host.vm("web")).1, pid, "it was never started again");
    all_in_place(&host, "web", 4);
    host
}

/// The VM that runs gets volumes, has them grow, and gives them back, whatever its agent does meanwhile. It is the same VM afterwards.
fn come_grow_and_go(mut host: Host) -> Host {
    let (_, pid) = host.process(&host.vm("web"));
    let block_devices = || sh(&host, "web", "busybox ls /sys/block | busybox grep -c vd");
    let before = block_devices();
    for (name, format) in [("hot", "raw"), ("warm", "qcow2"), ("bare", "raw")] {
        let _ = host.form(&["volume", "create", name, "-s", "512M", "--format", format]).ok();
    }
    let said = host.form(&["volume", "attach", "hot", "web", "/hot"]).ok().stdout;
    assert!(said.contains("web has it at /hot (/dev/vd"), "{said}");
    let said = host.form(&["volume", "attach", "bare", "web"]).ok().stdout;
    assert!(said.contains("web has it as /dev/vd"), "{said}");
    let _ = host.form(&["volume", "attach", "warm", "web", "/warm"]).ok();
    sh(&host, "web", "echo hot > /hot/name; echo warm > /warm/name; busybox sync");
    all_in_place(&host, "web", 6);

    for name in ["hot", "warm"] {
        let said = host.form(&["volume", "resize", name, "1G"]).ok().stdout;
        assert!(said.contains("also in web"), "{said}");
        let size = file_system_size(&host, "web", &format!("/{name}"));
        assert!(size > 900, "{name}: {size} MiB");
    }

    held_back(&host);

    // One that stands still gets it when it goes on.
    let _ = host.form(&["volume", "detach", "bare"]).ok();
    let _ = host.form(&["vm", "pause", "web"]).ok();
    let said = host.form(&["volume", "attach", "bare", "web"]).ok().stdout;
    assert!(said.contains("runs without it"), "{said}");
    let refused = host.form(&["volume", "detach", "hot"]).exits(5);
    assert!(refused.stderr.contains("hot"), "{}", refused.stderr);
    let _ = host.form(&["vm", "resume", "web"]).ok();
    wait("it has the volume", || volume(&host, "bare")["attachment"]["state"] == "attached");

    // What somebody works in is not taken away, unless by force.
    // It is there when the command ends: what is only begun then may not have come to it yet.
    sh(&host, "web", "cd /hot || exit; busybox setsid busybox sleep 1000 >/dev/null 2>&1 &");
    let refused = host.form(&["volume", "detach", "hot"]).exits(5);
    assert!(refused.stderr.contains("busybox (process ") || refused.stderr.contains("sleep (process "), "{}", refused.stderr);
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    all_in_place(&host, "web", 6);
    let _ = host.form(&["volume", "detach", "hot", "--force"]).ok();
    let _ = host.form(&["volume", "detach", "warm", "bare"]).ok();
    assert_eq!(block_devices(), before, "no device is left in the guest");
    assert_eq!(volume(&host, "hot")["attachment"], Value::Null);
    let _ = host.form(&["volume", "detach", "hot"]).exits(5);
    let checked = Command::new("e2fsck").arg("-fp").arg(file(&host, &volume(&host, "hot"))).output().unwrap();
    assert!(checked.status.success() || checked.status.code() == Some(1), "{checked:?}");

    // A guest that refuses leaves nothing behind.
    let odd = host.path("odd.raw");
    fs::write(&odd, [b"no file system ".repeat(64).as_slice(), &vec![0; 32 << 20]].concat()).unwrap();
    let _ = host.form(&["volume", "import", "odd", odd.to_str().unwrap()]).ok();
    let refused = host.form(&["volume", "attach", "odd", "web", "/odd"]).exits(1);
    assert!(refused.stderr.contains("holds something that is no ext4"), "{}", refused.stderr);
    assert_eq!((volume(&host, "odd")["attachment"].clone(), block_devices()), (Value::Null, before.clone()));

    // The agent dies in the middle: the next one finishes what the state says.
    for (point, command) in
        [("volume.plugged", &["volume", "attach", "hot", "web", "/hot"][..]), ("volume.unplugged", &["volume", "detach", "hot"])]
    {
        host.kill_agent();
        host.start_agent_with(Some(point));
        is_ready_again(&host, "web");
        let mut client = host.form_command(command).spawn().unwrap();
        assert!(host.dies_at(point, |_| false), "{point}");
        let _ = (client.kill(), client.wait());
        host.start_agent();
        is_ready_again(&host, "web");
        wait("the guest has it", || volume(&host, "hot")["attachment"]["state"] == "attached");
        all_in_place(&host, "web", 5);
    }
    // The record of what it has is lost by somebody's hand: `form doctor` sees that, and mends it.
    let runtime = host.root().join("run/form-vm").join(host.vm("web")["id"].as_str().unwrap());
    fs::remove_file(runtime.join("volumes.json")).unwrap();
    assert_eq!(volume(&host, "hot")["attachment"]["state"], "needs-restart");
    let found = host.form(&["doctor", "-o", "json"]);
    assert!(found.stdout.contains("the record of the volumes that it has is not true"), "{found:?}");
    let _ = host.form(&["doctor", "--fix"]);
    all_in_place(&host, "web", 5);
    fs::remove_file(runtime.join("volumes.json")).unwrap();
    let mended = host.form(&["volume", "sync", "hot"]).ok().stdout;
    assert!(mended.contains("hot: vm/web: mended: the record of the volumes that it has is not true"), "{mended}");
    all_in_place(&host, "web", 5);
    let found = host.form(&["doctor", "-o", "json"]);
    assert!(!found.stdout.contains("vm/web"), "{found:?}");

    let _ = host.form(&["volume", "detach", "hot"]).ok();
    assert_eq!(sh(&host, "web", "busybox ls /sys/block | busybox grep -c vd"), before);
    let _ = host.form(&["volume", "rm", "hot", "warm", "bare", "odd", "-y"]).ok();
    assert_eq!(host.process(&host.vm("web")).1, pid, "it was never started again");
    all_in_place(&host, "web", 4);
    host
}

/// The guest is held to the limits of a volume and of its network, and let go at once when they end.
fn held_back(host: &Host) {
    let device = volume(host, "bare")["attachment"]["device"].as_str().unwrap().to_owned();
    let read = format!("busybox dd if={device} of=/dev/null bs=64k count=256 iflag=direct");
    let _ = host.form(&["volume", "set", "bare", "--bandwidth", "4MiB"]).ok();
    let begun = Instant::now();
    sh(host, "web", &read);
    // 16 MiB at 4 MiB a second, less what may come at once.
    assert!(begun.elapsed() >= Duration::from_millis(3800), "{:?}", begun.elapsed());

    // What would take more than four minutes ends when the limit does.
    let _ = host.form(&["volume", "set", "bare", "--bandwidth", "64KiB"]).ok();
    let begun = Instant::now();
    let mut reader = host.form_command(&["exec", "web", "--", "/bin/busybox", "sh", "-c", &read]).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(reader.try_wait().unwrap().is_none(), "it waits");
    let _ = host.form(&["volume", "set", "bare", "--bandwidth", "none"]).ok();
    assert!(reader.wait().unwrap().success());
    assert!(begun.elapsed() < Duration::from_secs(200), "{:?}", begun.elapsed());

    sh(host, "web", "busybox dd if=/dev/zero of=/www/big bs=64k count=8");
    let _ = host.form(&["vm", "set", "web", "--net-bandwidth", "1Mbit"]).ok();
    let begun = Instant::now();
    assert!(form_tests::host::get(18091, "/big").unwrap().len() >= 512 << 10);
    // 512 KiB at 125 kB a second, less 128 KiB that may come at once.
    assert!(begun.elapsed() >= Duration::from_secs(3), "{:?}", begun.elapsed());
    let _ = host.form(&["vm", "set", "web", "--net-bandwidth", "none"]).ok();
    sh(host, "web", "busybox rm /www/big");
}

/// Another image, the volumes in another order, one of them larger, one no longer there.
fn redeployed_and_attached_by_hand(host: &Host) {
    let changed = [("two", "/v/two", "1G"), ("data", "/var/data", "38G"), ("one", "/v/one", "1G")];
    let web = formfile(host, "web", 18091, &changed);
    let context = std::path::Path::new(&web).parent().unwrap();
    fs::write(context.join("index.html"), "another image\n").unwrap();
    let plan = host.form(&["plan", &web]).exits(8).stdout;
    assert!(plan.contains("37 GiB -> 38 GiB") && plan.contains("detached, and kept"), "{plan}");
    let _ = host.form(&["deploy", &web, "-y"]).ok();
    assert_eq!(sh(host, "web", "busybox cat /www/index.html"), "another image\n");
    all_in_place(host, "web", 3);
    let size = file_system_size(host, "web", "/var/data");
    assert!(size > 37 << 10, "{size} MiB");
    assert_eq!(volume(host, "three")["attachment"], Value::Null);
    let again = host.form(&["deploy", &web, "-y"]).ok();
    assert!(format!("{}{}", again.stdout, again.stderr).contains("unchanged"));

    // By hand: the one that was left, and, for the next start, a clone.
    let said = host.form(&["volume", "attach", "three", "web", "/again"]).ok().stdout;
    assert!(said.contains("web has it at /again (/dev/vd"), "{said}");
    all_in_place(host, "web", 4);
    let _ = host.form(&["volume", "create", "late", "-s", "16777728B"]).ok();
    let _ = host.form(&["volume", "attach", "late", "web", "/again"]).exits(5);
    let _ = host.form(&["vm", "stop", "web"]).ok();
    let _ = host.form(&["volume", "clone", "data", "copy"]).ok();
    let _ = host.form(&["volume", "attach", "copy", "web", "/copy"]).ok();
    let _ = host.form(&["volume", "attach", "late", "web", "--read-only"]).ok();
    let _ = host.form(&["vm", "start", "web"]).ok();
    let late = volume(host, "late");
    let device = late["attachment"]["device"].as_str().unwrap().replace("/dev/", "");
    assert_eq!(
        sh(host, "web", &format!("busybox cat /sys/block/{device}/size /sys/block/{device}/ro")),
        format!("{}\n1\n", 16_777_728 / 512)
    );
    all_in_place(host, "web", 5);
}

fn destroyed(host: &Host) {
    let destroyed = host.form(&["destroy", "web", "-y"]).ok();
    assert!(destroyed.stderr.contains("kept: volumes copy, data, late, one, three, two"), "{}", destroyed.stderr);
    for name in ["data", "copy", "one"] {
        let kept = volume(host, name);
        assert_eq!(kept["attachment"], Value::Null);
        let checked = Command::new("e2fsck").arg("-fn").arg(file(host, &kept)).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    }
    let other = formfile(host, "other", 18092, &[("data", "/data", "1G")]);
    let _ = host.form(&["deploy", &other, "-y"]).ok();
    assert_eq!(sh(host, "other", "busybox cat /data/name"), "data\n");
    let _ = host.form(&["destroy", "other", "--volumes", "-y"]).ok();
    let _ = host.form(&["volume", "show", "data"]).exits(3);
    let _ = host.form(&["volume", "rm", "one", "two", "three", "copy", "late", "-y"]).ok();
    host.is_clean();
    assert_eq!(fs::read_dir(host.root().join("var/lib/formation/volumes")).unwrap().count(), 1, "nothing but the place for drafts");
}
