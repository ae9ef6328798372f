//! One host and its agent under real faults. Runs as root where /dev/kvm runs guests: `tests/kvm-host` makes such a place.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use form_tests::host::{Host, answers, get, is_alive, wait};

const SERVE: &str = r#"["/bin/busybox", "httpd", "-f", "-v", "-p", "80", "-h", "/www"]"#;

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_vm_outlives_its_agent_and_comes_back_when_its_process_is_killed() {
    let mut host = Host::start();
    let web = host.app("web", SERVE, 18081);
    let _ = host.form(&["deploy", &web, "-y"]).ok();
    assert!(answers(18081));
    let (_, pid) = host.process(&host.vm("web"));

    host.kill_agent();
    assert!(is_alive(pid) && answers(18081), "the VM goes on without its agent");
    host.start_agent();
    wait("the VM is adopted", || host.vm("web")["ready"] == true);
    assert_eq!(host.process(&host.vm("web")).1, pid, "the same process");
    let exec = host.form(&["exec", "web", "--", "/bin/busybox", "echo", "still here"]).ok();
    assert_eq!(exec.stdout, "still here\n");

    Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    wait("it is started again", || {
        let vm = host.vm("web");
        vm["ready"] == true && vm["restarts"].as_u64() >= Some(1)
    });
    wait("it answers again", || answers(18081));

    let _ = host.form(&["vm", "stop", "web"]).ok();
    assert_eq!(host.vm("web")["state"], "stopped");
    assert!(!answers(18081));
    let _ = host.form(&["vm", "start", "web"]).ok();
    wait("it answers after its start", || answers(18081));

    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_follower_of_a_log_gets_every_line_once_although_the_agent_is_killed() {
    let mut host = Host::start();
    let count = r#"["/bin/busybox", "sh", "-c", "i=0; while :; do echo line $i; i=$((i+1)); /bin/busybox sleep 0.1; done"]"#;
    let counter = host.app("counter", count, 18086);
    let formfile = fs::read_to_string(&counter).unwrap();
    let lines: Vec<&str> = formfile.lines().filter(|line| !line.starts_with("HEALTHCHECK") && !line.starts_with("EXPOSE")).collect();
    fs::write(&counter, lines.join("\n") + "\n").unwrap();
    let _ = host.form(&["deploy", &counter, "-y"]).ok();

    let (log, events) = (host.directory.path().join("followed.log"), host.directory.path().join("followed.events"));
    let follow =
        |args: &[&str], into: &Path| host.form_command(args).stdout(fs::File::create(into).unwrap()).stderr(Stdio::null()).spawn().unwrap();
    let mut followers = [follow(&["logs", "-f", "counter"], &log), follow(&["events", "-f", "-o", "name"], &events)];
    let count = |path: &Path| fs::read_to_string(path).unwrap().lines().count();
    for _ in 0..2 {
        let seen = (count(&log), count(&events));
        wait("lines come", || count(&log) > seen.0 + 5);
        host.kill_agent();
        std::thread::sleep(Duration::from_secs(2));
        host.start_agent();
        wait("lines come again", || count(&log) > seen.0 + 30 && count(&events) > seen.1);
    }
    for follower in &mut followers {
        follower.kill().unwrap();
        follower.wait().unwrap();
    }
    let text = fs::read_to_string(&log).unwrap();
    for (number, line) in text.lines().enumerate() {
        assert_eq!(line, format!("line {number}"), "lost or repeated in\n{text}");
    }
    let text = fs::read_to_string(&events).unwrap();
    let cursors: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert!(cursors.windows(2).all(|pair| pair[1] == pair[0] + 1), "lost or repeated in {cursors:?}");
    let _ = host.form(&["destroy", "counter", "-y"]).ok();
    host.is_clean();
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_an_agent_killed_in_the_middle_of_a_deploy_finishes_it() {
    let mut host = Host::start();
    let web = host.app("web", SERVE, 18082);
    for step in ["the state is written", "the VM boots"] {
        let before = host.agent_log().len();
        let mut deploy = host.form_command(&["deploy", &web, "-y"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        match step {
            "the state is written" => wait(step, || host.agent_log()[before..].contains("deploy vm/web")),
            _ => wait(step, || host.agent_log()[before..].contains("waiting for the guest to start")),
        }
        host.kill_agent();
        let _ = deploy.kill();
        let _ = deploy.wait();
        host.start_agent();
        wait("the operation ends", || {
            let operations = host.form(&["op", "ls", "-o", "json"]).ok().json();
            let deploys: Vec<_> = operations.as_array().unwrap().iter().filter(|operation| operation["kind"] == "deploy").collect();
            deploys.iter().all(|operation| ["completed", "failed"].contains(&operation["status"].as_str().unwrap()))
        });
        let _ = host.form(&["deploy", &web, "-y"]).ok();
        wait("it answers", || answers(18082));
        let _ = host.form(&["destroy", "web", "-y"]).ok();
        host.is_clean();
    }
}

/// `web` runs its first version, and nothing else of it was ever healthy.
fn goes_back(host: &Host, web: &str) {
    let page =
        |text: &str| get(18083, "/").is_ok_and(|answer| answer.contains("it works") && answer.contains("second") == (text == "second"));
    let offered = || {
        let versions = host.form(&["rollback", "web", "--list", "-o", "json"]).ok().json();
        let images = versions.as_array().unwrap().iter().map(|version| version["image"].as_str().unwrap().to_owned());
        images.collect::<Vec<_>>()
    };
    let first = host.vm("web");
    let nothing = host.form(&["rollback", "web", "-y"]).exits(5);
    assert!(nothing.stderr.contains("nothing that vm/web could go back to"), "{}", nothing.stderr);
    assert_eq!(offered(), Vec::<String>::new());

    // The third image: that of the broken version was the second.
    let _ = host.app("web", SERVE, 18083);
    fs::write(host.path("web").join("index.html"), "it works\nsecond\n").unwrap();
    let _ = host.form(&["deploy", web, "-y"]).ok();
    wait("the second page is served", || page("second"));
    assert_eq!((offered(), host.vm("web")["image"].as_str()), (vec!["web:1".to_owned()], Some("web:3")));

    let asked = host.form(&["rollback", "web"]).exits(2);
    assert!(asked.stderr.contains("lost: everything written to its root disk") && asked.stderr.contains("FORM_YES"), "{}", asked.stderr);
    let _ = host.form(&["rollback", "web", "-y"]).ok();
    wait("the first page is served", || page("first"));
    let back = host.vm("web");
    assert_eq!((&back["id"], &back["image_digest"], &back["ipv4"]), (&first["id"], &first["image_digest"], &first["ipv4"]));
    let newest = host.operations().into_iter().find(|operation| operation["subject"] == "vm/web").unwrap();
    assert_eq!((newest["kind"].as_str(), newest["status"].as_str()), (Some("vm-rollback"), Some("completed")), "{newest}");

    // And back from there, to the version that is named.
    assert_eq!(offered(), ["web:3"]);
    let _ = host.form(&["rollback", "web", "2", "-y"]).exits(3);
    let _ = host.form(&["vm", "rollback", "web", "web:3", "-y"]).ok();
    wait("the second page is served again", || page("second"));
    assert_eq!(offered(), ["web:1"]);
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_what_cannot_work_is_refused_or_taken_back_with_its_reason() {
    let host = Host::start();
    let web = host.app("web", SERVE, 18083);
    let _ = host.form(&["deploy", &web, "-y"]).ok();

    let other = host.app("other", SERVE, 18083);
    let taken = host.form(&["deploy", &other, "-y"]).exits(5);
    assert!(taken.stderr.contains("18083") && taken.stderr.contains("web"), "{}", taken.stderr);

    let greedy = fs::read_to_string(&other).unwrap().replace("MEM 128", "MEM 200G").replace("18083", "18084");
    fs::write(&other, greedy).unwrap();
    let _ = host.form(&["deploy", &other, "-y"]).exits(1);

    // The new version ends at once: the old one is put back.
    let _ = host.app("web", r#"["/bin/busybox", "sh", "-c", "echo broken on purpose; exit 9"]"#, 18083);
    let begun = host.form(&["deploy", &web, "-y", "--no-wait"]).ok();
    // Nobody takes away meanwhile what it goes back to.
    let used = host.form(&["image", "rm", "web:1", "-y"]).exits(5);
    assert!(used.stderr.contains("is used by web"), "{}", used.stderr);
    let (_, id) = begun.stderr.split_once("form op wait ").unwrap();
    let broken = host.form(&["op", "wait", &id[..32]]).exits(1);
    assert!(broken.stderr.contains("broken on purpose"), "{}", broken.stderr);
    wait("the old version answers", || answers(18083));

    goes_back(&host, &web);

    // A first version that ends at once stays, failed, until it is mended or removed.
    let never = host.app("never", r#"["/bin/busybox", "false"]"#, 18085);
    let _ = host.form(&["deploy", &never, "-y"]).exits(1);
    let _ = host.form(&["destroy", "never", "-y"]).ok();
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    let _ = host.form(&["destroy", "web", "-y"]).exits(3);
    host.is_clean();
}

/// `form cp` with the VM `web`.
fn copies_go_in_and_out(host: &Host) {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_str().unwrap().to_owned();
    let sh = |line: &str| host.form(&["exec", "web", "--", "/bin/busybox", "sh", "-c", line]).ok().stdout;
    fs::create_dir_all(place.path().join("tree/sub")).unwrap();
    fs::write(place.path().join("tree/run"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(place.path().join("tree/run"), fs::Permissions::from_mode(0o750)).unwrap();
    fs::write(place.path().join("tree/sub/large"), vec![5; 3_000_000]).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    let run = fs::File::open(place.path().join("tree/run")).unwrap();
    run.set_times(fs::FileTimes::new().set_modified(time)).unwrap();

    let _ = host.form(&["cp", &path("tree"), "web:/srv"]).ok();
    assert_eq!(sh("/bin/busybox stat -c '%a %u %Y' /srv/run; /bin/busybox wc -c < /srv/sub/large"), "750 0 1000000000\n3000000\n");
    let _ = host.form(&["cp", "web:/srv", &path("back")]).ok();
    let back = fs::metadata(place.path().join("back/run")).unwrap();
    assert_eq!((back.permissions().mode() & 0o7777, back.modified().unwrap()), (0o750, time));
    assert_eq!(fs::read(place.path().join("back/sub/large")).unwrap(), vec![5; 3_000_000]);

    // As a tar stream, out of one place and into another.
    let tar = host.form_command(&["cp", "web:/srv/sub", "-"]).output().unwrap();
    assert!(tar.status.success() && tar.stdout.len() > 3_000_000);
    fs::write(place.path().join("sub.tar"), &tar.stdout).unwrap();
    sh("/bin/busybox mkdir /in");
    let mut into = host.form_command(&["cp", "-", "web:/in"]);
    into.stdin(fs::File::open(place.path().join("sub.tar")).unwrap());
    assert!(into.status().unwrap().success());
    assert_eq!(sh("/bin/busybox ls -A /in; /bin/busybox ls /in/sub"), "sub\nlarge\n");

    let missing = host.form(&["cp", "web:/no/such", &path("x")]).exits(3);
    assert!(missing.stderr.contains("there is no /no/such in the guest"), "{}", missing.stderr);
    let missing = host.form(&["cp", &path("tree/run"), "web:/no/such/place"]).exits(3);
    assert!(missing.stderr.contains("there is no /no/such in the guest"), "{}", missing.stderr);
    sh("/bin/busybox mkdir /small; /bin/busybox mount -t tmpfs -o size=64k none /small");
    let full = host.form(&["cp", &path("tree/sub/large"), "web:/small/large"]).exits(1);
    assert!(full.stderr.contains("there is no room left for /small/large"), "{}", full.stderr);
    assert_eq!(sh("/bin/busybox ls -A /small"), "");

    // Killed in the middle: nothing half is left.
    let mut copy = host.form_command(&["cp", "-", "web:/in"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut pipe = copy.stdin.take().unwrap();
    pipe.write_all(&tar.stdout[..1_500_000]).unwrap();
    wait("the copy has begun", || sh("/bin/busybox ls -A /in/sub").lines().count() == 2);
    copy.kill().unwrap();
    copy.wait().unwrap();
    wait("what was half is gone", || sh("/bin/busybox ls -A /in/sub") == "large\n");
}

/// `form vm stats`, `/metrics` and `/v1/health` with the VM `web`.
fn counters_count(host: &Host) {
    let stats = |host: &Host| host.form(&["vm", "stats", "web", "-o", "json"]).ok().json()[0].clone();
    let before = stats(host);
    let work = "/bin/busybox dd if=/dev/zero of=/work bs=64k count=64 conv=fsync; /bin/busybox sync; /bin/busybox ping -c 3 169.254.77.1";
    let _ = host.form(&["exec", "web", "--", "/bin/busybox", "sh", "-c", work]).ok();
    let after = stats(host);
    let grown = |path: &str| after.pointer(path).unwrap().as_u64().unwrap() - before.pointer(path).unwrap().as_u64().unwrap();
    assert!(grown("/disks/0/written_bytes") >= 64 * 64 * 1024 && grown("/disks/0/writes") > 0, "{before}, then {after}");
    assert!(grown("/networks/0/sent_packets") >= 3 && grown("/networks/0/received_packets") >= 3, "{before}, then {after}");
    assert!(grown("/exits") > 0 && grown("/cpu_ms") > 0 && grown("/uptime_ms") > 0, "{before}, then {after}");
    let used = after["memory_used_bytes"].as_u64().unwrap();
    assert!(used > 4 << 20 && used < 128 << 20, "{after}");
    assert!(after["cpu_percent"].is_number() && after["resident_bytes"].as_u64() > Some(20 << 20), "{after}");
    let get = |path: &str| {
        let output = Command::new("curl").args(["-sS", "--unix-socket"]).arg(host.socket()).arg(format!("http://agent{path}")).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    let page = get("/metrics");
    assert!(
        page.contains(r#"form_vm_running{vm="web"} 1"#) && page.contains(r#"form_vm_disk_written_bytes_total{vm="web",disk="root"}"#),
        "{page}"
    );
    let health: serde_json::Value = serde_json::from_str(&get("/v1/health")).unwrap();
    assert!(health["healthy"] == true && health["total_operations"].as_u64() > Some(1), "{health}");
}

/// `form vm set --vcpus` of the VM `app`, which runs on in the process `pid`: with its agent, and with one that dies on the way.
fn vcpus_come_and_go(host: &mut Host, pid: u32) {
    let has = |host: &Host, count: &str| {
        let ran = host.form(&["exec", "app", "--", "/bin/busybox", "nproc"]).ok().stdout;
        let app = host.vm("app");
        assert_eq!((ran.trim(), app["vcpus"].to_string().as_str(), host.process(&app).1), (count, count, pid));
    };
    let set = |host: &Host, count: &str| host.form(&["vm", "set", "app", "--vcpus", count]);
    let _ = set(host, "3").ok();
    has(host, "3");
    let _ = set(host, "1").ok();
    has(host, "1");
    let refused = set(host, "5").exits(5).stderr;
    assert!(refused.contains("it can have 4 vCPUs until it is started again") && refused.contains("--restart"), "{refused}");
    // Both at once, or neither.
    let refused = host.form(&["vm", "set", "app", "--vcpus", "2", "--memory", "160M"]).exits(5).stderr;
    assert!(refused.contains("128 or 256 MiB without a start"), "{refused}");
    has(host, "1");
    for (count, memory) in [("2", 256), ("1", 128)] {
        let _ = host.form(&["vm", "set", "app", "--vcpus", count, "--memory", &format!("{memory}M")]).ok();
        has(host, count);
        assert_eq!(host.vm("app")["memory_mib"], memory);
    }

    // What is not in the state when the agent dies is taken back; what is stays, and is no reason for a start.
    for (point, count, ends) in
        [("vcpus.changed", "1", "failed"), ("vcpus.noted", "1", "failed"), ("lifecycle.submitted", "2", "completed")]
    {
        host.kill_agent();
        host.start_agent_with(Some(point));
        wait("it is ready", || host.vm("app")["ready"] == true);
        let mut client = host.form_command(&["vm", "set", "app", "--vcpus", "2"]).stderr(Stdio::null()).spawn().unwrap();
        assert!(host.dies_at(point, |_| false), "no {point}");
        let _ = (client.kill(), client.wait());
        host.start_agent();
        wait("the operation ends", || host.no_operation_is_under_way());
        let operations = host.operations();
        let last = operations.iter().find(|operation| operation["kind"] == "vm-set");
        assert!(last.is_some_and(|operation| operation["status"] == ends), "{point}: {last:?}");
        wait("it is ready again", || host.vm("app")["ready"] == true);
        // Of a VM that is just being put back nothing is said.
        wait("it is as it should be", || {
            let ran = host.form(&["exec", "app", "--", "/bin/busybox", "nproc"]).ok().stdout;
            let checks = host.form(&["doctor", "-o", "json"]).json();
            ran.trim() == count && !checks.as_array().unwrap().iter().any(|check| check["name"] == "vm/app")
        });
        has(host, count);
    }
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_vm_is_paused_renamed_set_and_reset() {
    let mut host = Host::start();
    let web = host.app("web", SERVE, 18086);
    let _ = host.form(&["deploy", &web, "-y"]).ok();
    let (_, pid) = host.process(&host.vm("web"));
    let guest = |host: &Host, vm: &str, words: &[&str]| {
        let ran = host.form(&[&["exec", vm, "--", "/bin/busybox"][..], words].concat()).ok();
        ran.stdout.trim().to_owned()
    };
    copies_go_in_and_out(&host);
    counters_count(&host);
    let boot_id = |host: &Host, vm: &str| guest(host, vm, &["cat", "/proc/sys/kernel/random/boot_id"]);
    let first_boot = boot_id(&host, "web");

    // Paused: nothing of it runs, it stays so without its agent, and nothing is asked of it.
    let _ = host.form(&["vm", "pause", "web"]).ok();
    let _ = host.form(&["vm", "pause", "web"]).ok();
    assert_eq!(host.vm("web")["state"], "paused");
    let refused = host.form(&["exec", "web", "--", "true"]).exits(125);
    assert!(refused.stderr.contains("vm/web is paused") && refused.stderr.contains("form vm resume web"), "{}", refused.stderr);
    let _ = host.form(&["vm", "start", "web"]).exits(5);
    let _ = host.form(&["vm", "set", "web", "--memory", "160M", "--restart"]).exits(5);
    host.kill_agent();
    host.start_agent();
    wait("it is found paused", || host.vm("web")["state"] == "paused");
    assert_eq!(host.process(&host.vm("web")).1, pid, "the same process");
    // Longer than the healthcheck's interval and time limit together.
    std::thread::sleep(std::time::Duration::from_secs(9));

    let _ = host.form(&["vm", "resume", "web"]).ok();
    wait("it is ready again", || host.vm("web")["ready"] == true);
    wait("it answers again", || answers(18086));
    wait("it is healthy", || host.vm("web")["health"] == "healthy");
    assert_eq!(boot_id(&host, "web"), first_boot, "it went on where it was");
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    // Whatever time it takes to ask.
    let asked = now();
    let clock: i64 = guest(&host, "web", &["date", "+%s"]).parse().unwrap();
    assert!((asked - 10..=now() + 1).contains(&clock), "the guest's clock says {clock}, the host's {asked} to {}", now());
    let events = host.form(&["events", "-o", "json"]).ok().stdout;
    assert!(events.contains("vm-paused") && events.contains("vm-resumed") && !events.contains("vm-unhealthy"), "{events}");

    // What needs no start happens in the running VM.
    let _ = host.form(&["vm", "rename", "web", "app"]).ok();
    let _ = host.form(&["vm", "show", "web"]).exits(3);
    assert_eq!(guest(&host, "app", &["hostname"]), "app");
    assert!(guest(&host, "app", &["cat", "/etc/hosts"]).contains("app.default.form.internal"));
    let _ = host.form(&["vm", "set", "app", "--label", "tier=front", "--restart-policy", "on-failure:2"]).ok();
    let app = host.vm("app");
    assert_eq!((app["labels"]["tier"].as_str(), host.process(&app).1), (Some("front"), pid));
    vcpus_come_and_go(&mut host, pid);
    let refused = host.form(&["vm", "set", "app", "--memory", "160M"]).exits(5);
    assert!(refused.stderr.contains("--restart") && refused.stderr.contains("128 or 256 MiB without a start"), "{}", refused.stderr);
    memory_comes_and_goes(&host, pid);
    let before: u64 = guest(&host, "app", &["awk", "/MemTotal/ {print $2}", "/proc/meminfo"]).parse().unwrap();
    let _ = host.form(&["vm", "set", "app", "--memory", "160M", "--restart"]).ok();
    let after: u64 = guest(&host, "app", &["awk", "/MemTotal/ {print $2}", "/proc/meminfo"]).parse().unwrap();
    assert!(after > before + 20_000, "{before} kB, then {after} kB");
    assert_eq!(guest(&host, "app", &["hostname"]), "app", "the new name is also that of the next start");

    let second_boot = boot_id(&host, "app");
    let _ = host.form(&["vm", "reset", "app"]).ok();
    let third_boot = boot_id(&host, "app");
    assert_eq!(guest(&host, "app", &["nproc"]), "2", "a start and a reset keep their number");
    assert!(second_boot != first_boot && third_boot != second_boot);

    // A paused VM shuts down as a running one does.
    let _ = host.form(&["vm", "pause", "app"]).ok();
    let _ = host.form(&["vm", "stop", "app"]).ok();
    let refused = host.form(&["vm", "resume", "app"]).exits(5);
    assert!(refused.stderr.contains("vm/app is stopped"), "{}", refused.stderr);
    let events = host.form(&["events", "-o", "json"]).ok().stdout;
    assert!(!events.contains("did not power off in time"), "{events}");
    let _ = host.form(&["destroy", "app", "-y"]).ok();
    host.is_clean();
}

/// `app` has 128 MiB from its start.
fn memory_comes_and_goes(host: &Host, pid: u32) {
    let app = host.vm("app");
    let has = || {
        let ran = host.form(&["exec", "app", "--", "/bin/busybox", "awk", "/MemTotal/ {print $2}", "/proc/meminfo"]).ok();
        let groups = std::fs::read_dir("/sys/fs/cgroup").unwrap().map(|group| group.unwrap().path().join(app["id"].as_str().unwrap()));
        let limit = groups.map(|group| group.join("memory.max")).find(|file| file.exists()).unwrap();
        let limit: u64 = std::fs::read_to_string(limit).unwrap().trim().parse().unwrap();
        (ran.stdout.trim().parse::<u64>().unwrap() >> 10, limit >> 20)
    };
    let (before, limit) = has();
    for (size, more) in [("256M", 128), ("128M", 0)] {
        let _ = host.form(&["vm", "set", "app", "--memory", size]).ok();
        let app = host.vm("app");
        assert_eq!((app["memory_mib"].as_u64(), host.process(&app).1), (Some(128 + more), pid), "{app}");
        let (after, limit_after) = has();
        assert!((before + more).abs_diff(after) < 4 && limit_after == limit + more, "{before} and {limit}, then {after} and {limit_after}");
    }
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_vms_are_made_of_an_image_and_of_a_stopped_vm() {
    let host = Host::start();
    let file = host.app("web", SERVE, 18087);
    let sh = |vm: &str, line: &str| host.form(&["exec", vm, "--", "/bin/busybox", "sh", "-c", line]).ok().stdout.trim().to_owned();
    let _ = host.form(&["build", &file]).ok();

    // The host has neither the image nor a kernel: both are sent, as by a deploy.
    let create = ["vm", "create", "one", "--image", "web", "-p", "18087:80", "-e", "COLOUR=red", "--memory", "160M", "-l", "tier=front"];
    let _ = host.form(&create).ok();
    wait("it answers", || answers(18087));
    let one = host.vm("one");
    assert_eq!(
        (one["memory_mib"].as_u64(), one["labels"]["tier"].as_str(), one["image"].as_str()),
        (Some(160), Some("front"), Some("web:1"))
    );
    assert_eq!(sh("one", "hostname; echo $COLOUR"), "one\nred");
    let again = host.form(&create).exits(5);
    assert!(again.stderr.contains("there is a vm/one already") && again.stderr.contains("form vm rm one"), "{}", again.stderr);
    let _ = host.form(&["vm", "create", "none", "--image", "nothing"]).exits(3);
    let _ = host.form(&["vm", "create", "none", "--image", "web:999999"]).exits(3);

    let refused = host.form(&["vm", "clone", "one", "two"]).exits(5);
    assert!(refused.stderr.contains("vm/one is running") && refused.stderr.contains("form vm stop one"), "{}", refused.stderr);
    let _ = sh("one", "mkdir -p /etc/ssh; echo key > /etc/ssh/ssh_host_x_key; echo kept > /kept");
    let machine_id = sh("one", "cat /etc/machine-id");
    let _ = host.form(&["vm", "stop", "one"]).ok();
    let _ = host.form(&["vm", "clone", "one", "two", "-p", "18088:80"]).ok();
    wait("the clone answers", || answers(18088));

    // What one had is there; who it was is not.
    assert_eq!(sh("two", "hostname; cat /kept; echo $COLOUR; ls -A /etc/ssh"), "two\nkept\nred");
    let own = sh("two", "cat /etc/machine-id");
    assert!(own.len() == 32 && own != machine_id, "{own} is not its own");
    let two = host.vm("two");
    assert!(two["ipv4"] != one["ipv4"] && two["ipv6"] != one["ipv6"] && two["id"] != one["id"], "{one} {two}");
    assert_ne!(sh("two", "cat /sys/class/net/eth0/address"), "");
    let _ = sh("two", "echo changed > /kept");
    let _ = host.form(&["vm", "start", "one"]).ok();
    assert_eq!(sh("one", "cat /kept /etc/machine-id /etc/ssh/ssh_host_x_key"), format!("kept\n{machine_id}\nkey"));
    assert_ne!(sh("one", "cat /sys/class/net/eth0/address"), sh("two", "cat /sys/class/net/eth0/address"));

    // A second start changes nothing of that.
    let _ = host.form(&["vm", "restart", "two"]).ok();
    assert_eq!(sh("two", "cat /kept /etc/machine-id"), format!("changed\n{own}"));

    let _ = host.form(&["destroy", "one", "-y"]).ok();
    let _ = host.form(&["vm", "create", "three", "--image", "web", "--no-start"]).ok();
    assert_eq!(host.vm("three")["state"], "stopped");
    // Of one that never ran there is no disk to copy.
    let _ = host.form(&["vm", "clone", "three", "four", "--no-start"]).ok();
    let _ = host.form(&["vm", "start", "four"]).ok();
    assert_eq!(sh("four", "hostname"), "four");
    let _ = host.form(&["destroy", "two", "three", "four", "-y"]).ok();
    host.is_clean();
}
