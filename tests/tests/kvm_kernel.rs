//! VMs that run a kernel of their own, without Formation's guest. Runs as root where /dev/kvm runs guests: `tests/kvm-host` makes such a place.

use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, Instant},
};

use form_tests::{
    host::{Host, is_alive, wait},
    own_kernel,
};
use serde_json::Value;

/// What the Linux of the first test does: it tells what it finds, and powers off when the power button is pressed.
const INIT: &str = r#"
echo "command line: $(busybox cat /proc/cmdline)"
for disk in vda vdb; do
    echo "$disk $(busybox cat /sys/block/$disk/serial) ro=$(busybox cat /sys/block/$disk/ro) $(busybox head -c 18 /dev/$disk)"
done
echo "disks: $(busybox ls /sys/block | busybox grep -c ^vd)"
echo "mac $(busybox cat /sys/class/net/eth0/address)"
echo "files: $(busybox ls / | busybox grep -vE '\.ko$' | busybox tr '\n' ' ')"
for disk in vda vdb; do [ "$(busybox cat /sys/block/$disk/ro)" = 1 ] || echo "written by the VM" | busybox dd of=/dev/$disk conv=notrunc 2>/dev/null; done
busybox sync
echo "all is told"
busybox head -c 24 /dev/input/event0 >/dev/null
echo "the power button was pressed"
busybox poweroff -f
"#;

/// A console in software emulation is slow.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";

fn console(host: &Host, vm: &str) -> String {
    host.form(&["logs", vm, "--console"]).ok().stdout
}

fn volume(host: &Host, name: &str) -> Value {
    host.form(&["volume", "show", name, "-o", "json"]).ok().json()
}

fn import(host: &Host, name: &str, text: &str) {
    let mut disk = text.as_bytes().to_vec();
    disk.resize(1 << 20, 0);
    let path = host.path(name);
    fs::write(&path, disk).unwrap();
    let _ = host.form(&["volume", "import", name, path.to_str().unwrap()]).ok();
}

/// At once, with the exit code and the words for it.
fn is_refused(host: &Host, command: &[&str]) {
    let ran = host.form(command).exits(5);
    assert!(ran.stderr.contains("vm/own runs a kernel of its own without Formation's guest"), "{command:?}: {ran:?}");
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_kernel_of_its_own_has_disks_and_a_console_and_nothing_of_ours() {
    let mut host = Host::start();
    import(&host, "data", "hello from a disk!");
    import(&host, "base", "only to be read...");
    let (kernel, initrd) = (own_kernel::linux(), host.path("initrd"));
    fs::write(&initrd, own_kernel::initrd(INIT)).unwrap();
    let create = [
        "vm",
        "create",
        "own",
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--memory",
        "256M",
        "--cmdline",
        CMDLINE,
    ];
    let disks = ["--volume", "data", "--volume", "base:ro", "--label", "tier=test"];

    let no_kernel = host.form(&["vm", "create", "own", "--kernel", "/bin/busybox"]).exits(2);
    assert!(no_kernel.stderr.contains("extract-vmlinux"), "{no_kernel:?}");
    let _ = host.form(&[&create[..], &["--volume", "nothing"]].concat()).exits(3);
    let _ = host.form(&[&create[..], &["--volume", "data", "--volume", "data"]].concat()).exits(5);
    let created = host.form(&[&create[..], &disks].concat()).ok();
    assert!(created.stdout.contains("own  running\n"), "{created:?}");
    wait("it has told all", || console(&host, "own").contains("all is told"));
    let (said, shown) = (console(&host, "own"), host.form(&["vm", "show", "own", "-o", "json"]).ok().json());
    for line in [
        format!("command line: {CMDLINE}"),
        format!(" {} ro=0 hello from a disk!", volume(&host, "data")["serial"].as_str().unwrap()),
        format!(" {} ro=1 only to be read...", volume(&host, "base")["serial"].as_str().unwrap()),
        "disks: 2".to_owned(),
        format!("mac {}", shown["interfaces"][0]["mac"].as_str().unwrap()),
        "files: bin dev init proc root sys ".to_owned(),
    ] {
        assert!(said.contains(&line), "{line:?} is not in\n{said}");
    }
    assert_eq!((&shown["vm"]["state"], &shown["vm"]["image"], &shown["guest"]), (&"running".into(), &Value::Null, &Value::Null));
    assert_eq!(volume(&host, "data")["attachment"]["state"], "attached");

    import(&host, "other", "another one");
    let exec = host.form(&["exec", "own", "--", "/bin/true"]).exits(125);
    assert!(exec.stderr.contains("vm/own runs a kernel of its own without Formation's guest, which runs commands"), "{exec:?}");
    for command in [
        &["cp", "own:/init", "/dev/null"][..],
        &["logs", "own"],
        &["wait", "vm/own", "--for", "ready"],
        &["vm", "set", "own", "--iops", "100"],
        &["vm", "clone", "own", "second"],
        &["vm", "fork", "own", "second"],
        &["volume", "attach", "other", "own"],
        &["volume", "sync", "data"],
        &["ssh", "own", "--", "true"],
    ] {
        is_refused(&host, command);
    }
    for change in [["--vcpus", "2"], ["--memory", "512M"]] {
        let ran = host.form(&[&["vm", "set", "own"], &change[..]].concat()).exits(5);
        assert!(ran.stderr.contains("it runs a kernel of its own without Formation's guest"), "{ran:?}");
    }

    let (_, pid) = host.process(&host.vm("own"));
    host.kill_agent();
    host.start_agent();
    wait("it is adopted", || host.vm("own")["state"] == "running");
    assert_eq!(host.process(&host.vm("own")).1, pid, "the same process");
    let _ = host.form(&["vm", "pause", "own"]).ok();
    assert_eq!(host.vm("own")["state"], "paused");
    let _ = host.form(&["vm", "resume", "own"]).ok();
    let _ = host.form(&["vm", "set", "own", "--label", "tier=front", "--restart-policy", "never"]).ok();
    let _ = host.form(&["vm", "stats", "own"]).ok();
    goes_back_to_a_snapshot(&host);

    let _ = host.form(&["vm", "stop", "own"]).ok();
    assert_eq!(host.vm("own")["state"], "stopped");
    let said = console(&host, "own");
    assert!(said.contains("the power button was pressed"), "{said}");
    let held = volume(&host, "data");
    let file = host.root().join("var/lib/formation/volumes").join(held["id"].as_str().unwrap()).join("volume.raw");
    assert!(fs::read(file).unwrap().starts_with(b"written by the VM"));

    let _ = host.form(&["volume", "attach", "other", "own"]).ok();
    let _ = host.form(&["destroy", "own", "-y"]).ok();
    assert_eq!(volume(&host, "data")["attachment"], Value::Null);
    host.is_clean();
}

/// One without disks: nobody quiesces it, and it goes on where it stood.
fn goes_back_to_a_snapshot(host: &Host) {
    let kernel = host.path("smallest");
    fs::write(&kernel, own_kernel::smallest()).unwrap();
    let _ = host.form(&["vm", "create", "tiny", "--kernel", kernel.to_str().unwrap(), "--memory", "16M"]).ok();
    let (_, pid) = host.process(&host.vm("tiny"));
    let _ = host.form(&["vm", "snapshot", "create", "tiny", "--name", "one"]).ok();
    let snapshot = host.form(&["vm", "snapshot", "show", "tiny", "one", "-o", "json"]).ok().json();
    assert_eq!((&snapshot["consistency"], &snapshot["fault"], &snapshot["disk_bytes"]), (&"crash".into(), &Value::Null, &0.into()));
    let _ = host.form(&["vm", "snapshot", "restore", "tiny", "one", "-y"]).ok();
    assert_eq!(host.vm("tiny")["state"], "running");
    assert!(!is_alive(pid), "another process goes on with its memory");
    // Another name, another process, and the same again.
    let _ = host.form(&["vm", "rename", "tiny", "small"]).ok();
    for verb in ["reset", "restart"] {
        let (_, pid) = host.process(&host.vm("small"));
        let _ = host.form(&["vm", verb, "small"]).ok();
        wait("it runs again", || host.vm("small")["state"] == "running");
        assert!(!is_alive(pid), "{verb}: another process");
    }
    let _ = host.form(&["destroy", "small", "-y"]).ok();
}

/// How many VMs run at once in [`kvm_many_vms_on_one_host`], unless `FORM_TEST_VMS` says another number. On a host in software emulation with
/// one processor each takes about a second to come and to go.
const MANY: usize = 40;
/// Likewise of Linux, with our guest, beside them: `FORM_TEST_LINUX_VMS`. Each takes some ten seconds there to be ready.
const LINUX: usize = 2;

fn how_many(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

/// What the agent has open.
fn open_files(host: &Host) -> Vec<String> {
    let open = fs::read_dir(format!("/proc/{}/fd", host.agent_pid().unwrap())).unwrap().flatten();
    let named = |link: String| -> String {
        let Some(inode) = link.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) else { return link };
        let find = |kind: &str| {
            let table = fs::read_to_string(format!("/proc/{}/net/{kind}", host.agent_pid().unwrap())).ok()?;
            let line = table.lines().find(|line| line.split_ascii_whitespace().any(|word| word == inode))?;
            Some(format!("{kind}: {line}"))
        };
        ["unix", "netlink", "udp", "udp6", "tcp", "tcp6"].into_iter().find_map(find).unwrap_or(link)
    };
    open.filter_map(|entry| Some(named(fs::read_link(entry.path()).ok()?.display().to_string()))).collect()
}

fn descriptors(host: &Host) -> usize {
    open_files(host).len()
}

/// In KiB.
fn memory(host: &Host) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", host.agent_pid().unwrap())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_many_vms_on_one_host() {
    let (small, linux) = (how_many("FORM_TEST_VMS", MANY), how_many("FORM_TEST_LINUX_VMS", LINUX));
    let many = small + linux;
    let mut host = Host::new();
    host.configure(&format!("max_vms: {many}\nvcpu_overcommit: {many}\n"));
    host.start_agent();
    let kernel = host.path("smallest");
    fs::write(&kernel, own_kernel::smallest()).unwrap();
    let kernel = kernel.to_str().unwrap();
    let small: Vec<String> = (1..=small).map(|number| format!("small-{number}")).collect();
    let linux: Vec<String> = (1..=linux).map(|number| format!("linux-{number}")).collect();
    let names: Vec<&String> = small.iter().chain(&linux).collect();
    let app = host.path("linux");
    fs::create_dir(&app).unwrap();
    fs::copy("/bin/busybox", app.join("busybox")).unwrap();
    let formfile =
        "NAME linux\nFROM scratch\nMEM 128\nCOPY --chmod=755 busybox /bin/busybox\nENTRYPOINT [\"/bin/busybox\", \"sleep\", \"1000000\"]\n";
    fs::write(app.join("Formfile"), formfile).unwrap();
    let _ = host.form(&["build", app.join("Formfile").to_str().unwrap()]).ok();
    let create = |name: &str, more: &[&str]| {
        let _ = host.form(&[&["vm", "create", name, "--kernel", kernel, "--memory", "16M", "--restart", "never"], more].concat()).ok();
    };
    // What is made once is there before anything is counted.
    create("first", &[]);
    let _ = host.form(&["destroy", "first", "-y"]).ok();
    host.is_clean();
    let before = (descriptors(&host), memory(&host));
    let said = |at: &str, begun: Instant| {
        let (seconds, kib, open) = (begun.elapsed().as_secs_f64(), memory(&host), descriptors(&host));
        println!("{many} VMs {at}: {seconds:.1} s; the agent has {kib} KiB and {open} descriptors (before: {} and {})", before.1, before.0);
    };

    let begun = Instant::now();
    for name in &small {
        create(name, &[]);
    }
    said("made", begun);
    for name in &linux {
        let _ = host.form(&["vm", "create", name, "--image", "linux", "--memory", "128M", "--timeout", "300s"]).ok();
    }
    said("made, those of Linux too", begun);
    let begun = Instant::now();
    let vms = host.form(&["ps", "-o", "json"]).ok().json();
    said("listed", begun);
    let running: BTreeSet<&str> =
        vms.as_array().unwrap().iter().filter(|vm| vm["state"] == "running").filter_map(|vm| vm["name"].as_str()).collect();
    assert_eq!(running, names.iter().map(|name| name.as_str()).collect(), "each runs");
    let refused = host.form(&["vm", "create", "one-more", "--kernel", kernel, "--memory", "16M"]);
    assert!(refused.code != Some(0) && refused.stderr.contains("is its limit"), "{refused:?}");
    for name in [&small[0], &small[small.len() - 1]] {
        assert!(host.form(&["logs", name, "--console"]).ok().stdout.contains(own_kernel::LINE));
    }
    for name in &linux {
        assert_eq!(host.form(&["exec", name, "--", "/bin/busybox", "hostname"]).ok().stdout, format!("{name}\n"));
    }

    let begun = Instant::now();
    // Each has twenty seconds to hear the power button, which it does not: not one after the other.
    let all: Vec<&str> = ["destroy", "-y"].into_iter().chain(names.iter().map(|name| name.as_str())).collect();
    let _ = host.form(&all).ok();
    // Of each this is removed after its process has ended.
    let kept = host.root().join("var/lib/formation/vms");
    for _ in 0..60 + many {
        if fs::read_dir(&kept).unwrap().flatten().all(|entry| entry.file_name() == ".tmp") {
            break;
        }
        std::thread::sleep(Duration::from_secs(2));
    }
    said("destroyed", begun);
    host.is_clean();

    let events = host.form(&["events", "-o", "json", "--tail", "100000"]).ok().stdout;
    let events: Vec<Value> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let cursors: Vec<u64> = events.iter().map(|event| event["cursor"].as_u64().unwrap()).collect();
    assert!(cursors.windows(2).all(|pair| pair[1] == pair[0] + 1), "lost or repeated in {cursors:?}");
    for name in &names {
        let of = |kind: &str| events.iter().filter(|event| event["vm"] == name.as_str() && event["kind"] == kind).count();
        assert_eq!((of("vm-started"), of("vm-ready")), (1, usize::from(linux.contains(name))), "{name}");
    }
    let at = |kind: &str, vm: &str| {
        let is_it = |event: &&Value| event["kind"] == kind && event["message"].as_str().unwrap().contains(&format!("vm-destroy vm/{vm}"));
        events.iter().find(is_it).unwrap_or_else(|| panic!("no {kind} of destroying {vm}"))["cursor"].as_u64().unwrap()
    };
    assert!(at("operation-started", &small[1]) < at("operation-completed", &small[0]), "one was waited for before the next was asked");
    // The connection of who has just asked is closed a moment after its answer.
    wait("nothing more is open than before", || {
        let left = open_files(&host);
        if left.len() > before.0 {
            println!("{} descriptors before, now {left:#?}", before.0);
        }
        left.len() <= before.0
    });
    let doctor = host.form(&["doctor", "-o", "json"]).json();
    assert!(doctor.as_array().unwrap().iter().all(|check| check["status"] != "problem"), "{doctor:#}");
}
