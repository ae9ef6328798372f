//! Bad days of VMs that run: a full disk, a host that lost its power, services that never work. Runs as root where /dev/kvm runs guests:
//! `tests/kvm-host` makes such a place.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use form_tests::{
    disk::SmallDisk,
    host::{Host, SERVE, answers, is_alive, wait},
};

fn replace(file: &str, from: &str, to: &str) {
    let text = fs::read_to_string(file).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(file, text.replace(from, to)).unwrap();
}

fn kill(pid: u32) {
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    wait("the process is gone", || !is_alive(pid));
}

/// Of the VM `web`: no processor of it gets any time, as when its kernel spins.
fn a_guest_that_hangs_is_unhealthy_until_it_answers(host: &mut Host) {
    let signal = |pid: u32, name: &str| assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
    host.kill_agent();
    host.configure("guest_timeout_seconds: 8\n");
    host.start_agent();
    wait("it is healthy", || host.vm("web")["health"] == "healthy");
    let (_, pid) = host.process(&host.vm("web"));
    signal(pid, "-STOP");
    wait("it is missed", || host.vm("web")["health"] == "unhealthy");
    let hangs = host.vm("web");
    assert!(hangs["fault"].as_str().unwrap_or_default().contains("its guest does not answer"), "{hangs}");
    signal(pid, "-CONT");
    wait("it answers again", || host.vm("web")["health"] == "healthy" && host.vm("web")["fault"].is_null());
    let events = host.form(&["events", "--vm", "web"]).ok();
    assert!(events.stdout.contains("its guest does not answer"), "{events:?}");
    host.kill_agent();
    host.configure("");
    host.start_agent();
    wait("it is ready", || host.vm("web")["ready"] == true);
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_full_disk_fails_what_is_written_and_nothing_else() {
    let mut host = Host::new();
    let disk = SmallDisk::mount(&host.path("disk"), &host.root().join("var/lib/formation"), 320);
    host.start_agent();
    let web = host.app("web", SERVE, 18120);
    let _ = host.form(&["deploy", &web, "-y"]).ok();
    let (_, pid) = host.process(&host.vm("web"));
    let write = || host.form(&["exec", "web", "--", "/bin/busybox", "dd", "if=/dev/urandom", "of=/big", "bs=1M", "count=24", "conv=fsync"]);

    disk.fill_but(1 << 10);
    let failed = write();
    assert_ne!(failed.code, Some(0), "24 MiB were written to a disk that has one");
    // The agent and the VM are there, and everybody is told what is wrong.
    assert!(is_alive(pid), "the VM process has ended");
    let fault = host.vm("web")["fault"].as_str().unwrap_or_default().to_owned();
    assert!(fault.contains("disk is full"), "{fault}");
    let table = host.form(&["ps", "-o", "wide"]).ok();
    assert!(table.stdout.contains("disk is full"), "{table:?}");
    let doctor = host.form(&["doctor"]).exits(1);
    assert!(doctor.stdout.contains("disk is full"), "{doctor:?}");

    disk.free();
    let _ = host.form(&["vm", "restart", "web"]).ok();
    wait("it answers again", || answers(18120));
    let _ = write().ok();
    assert!(host.vm("web")["fault"].is_null(), "{}", host.vm("web"));
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
    let _ = host.form(&["doctor"]);
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_host_that_lost_its_power_comes_back_as_it_should_be() {
    let mut host = Host::start();
    let web = host.app("web", SERVE, 18121);
    let off = host.app("off", SERVE, 18122);
    for file in [&web, &off] {
        let _ = host.form(&["deploy", file, "-y"]).ok();
    }
    let _ = host.form(&["vm", "stop", "off"]).ok();
    let _ = host.form(&["exec", "web", "--", "/bin/sh", "-c", "echo kept >/kept; /bin/busybox sync"]).ok();
    let before = host.vm("web");
    let (_, pid) = host.process(&before);

    // What a power failure takes: every process, /run, taps, rules and cgroups.
    host.kill_agent();
    kill(pid);
    fs::remove_dir_all(host.root().join("run")).unwrap();
    let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
    for table in String::from_utf8_lossy(&tables.stdout).lines().filter_map(|line| line.strip_prefix("table inet form_")) {
        assert!(Command::new("nft").args(["delete", "table", "inet", &format!("form_{table}")]).status().unwrap().success());
    }
    for group in fs::read_dir("/sys/fs/cgroup").unwrap().flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("form-"))
    {
        for inner in fs::read_dir(group.path()).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
            fs::remove_dir(inner.path()).unwrap();
        }
        fs::remove_dir(group.path()).unwrap();
    }

    host.start_agent();
    wait("it answers again", || answers(18121));
    let after = host.vm("web");
    assert_eq!((&after["id"], &after["ipv4"]), (&before["id"], &before["ipv4"]));
    assert_eq!(host.form(&["exec", "web", "--", "/bin/busybox", "cat", "/kept"]).ok().stdout, "kept\n");
    assert_eq!(host.vm("off")["state"], "stopped");
    for name in ["web", "off"] {
        let _ = host.form(&["destroy", name, "-y"]).ok();
    }
    host.is_clean();
    let _ = host.form(&["doctor"]).ok();
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_service_that_never_works_is_told_and_can_be_mended_or_given_up() {
    let mut host = Host::start();
    // Ends, and is started again, and ends.
    let web = host.app("web", r#"["/bin/busybox", "sh", "-c", "echo not today; exit 7"]"#, 18123);
    let looping = host.form(&["deploy", &web, "-y"]).exits(1);
    assert!(looping.stderr.contains("keeps ending") && looping.stderr.contains("not today"), "{looping:?}");
    assert!(looping.stderr.contains("form destroy web"), "what to do is not said: {looping:?}");
    assert!(host.vm("web")["fault"].as_str().unwrap_or_default().contains("keeps ending"), "{}", host.vm("web"));

    // Runs, and never listens; and then it does.
    let _ = host.app("web", r#"["/bin/busybox", "sleep", "1000000"]"#, 18123);
    replace(&web, "--interval=2s --timeout=5s --start-period=30s", "--interval=1s --timeout=1s --start-period=3s --retries=2");
    let silent = host.form(&["deploy", &web, "-y"]).exits(1);
    assert!(silent.stderr.contains("healthcheck fails"), "{silent:?}");
    let _ = host.app("web", SERVE, 18123);
    let _ = host.form(&["deploy", &web, "-y"]).ok();
    assert!(answers(18123));
    a_guest_that_hangs_is_unhealthy_until_it_answers(&mut host);
    let _ = host.form(&["destroy", "web", "-y"]).ok();

    // Nobody has to wait for a deploy that he wants no more; and a VM process that dies while its guest boots is started again.
    let slow = host.app("slow", r#"["/bin/busybox", "sleep", "1000000"]"#, 18124);
    replace(&slow, "--start-period=30s", "--start-period=300s");
    let client = host.form_command(&["deploy", &slow, "-y"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait("the VM boots", || host.vm("slow")["started_at"].is_string());
    let (_, pid) = host.process(&host.vm("slow"));
    kill(pid);
    wait("it is started again and ready", || host.vm("slow")["ready"] == true);
    assert_ne!(host.process(&host.vm("slow")).1, pid);
    // The same once more follows the deploy that is under way.
    let mut second = host.form_command(&["deploy", &slow, "-y"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(second.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("a deploy of it is under way")));
    let begun = Instant::now();
    let _ = host.form(&["destroy", "slow", "-y"]).ok();
    // It did not wait for the healthcheck of the deploy, whose start period is longer than all of this.
    assert!(begun.elapsed() < Duration::from_secs(200), "it took {:?}", begun.elapsed());
    let deploy = client.wait_with_output().unwrap();
    for (code, said) in [
        (deploy.status.code(), String::from_utf8_lossy(&deploy.stderr).into_owned()),
        (second.wait().unwrap().code(), lines.collect::<Vec<_>>().join("\n")),
    ] {
        assert!(code == Some(5) && said.contains("vm/slow was destroyed before its deploy was done"), "{code:?}: {said}");
    }
    host.is_clean();
    let _ = host.form(&["doctor"]).ok();
}
