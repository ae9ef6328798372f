//! Volumes on an NFS server that stops answering: nothing else stands still. Runs as root where /dev/kvm runs guests: `tests/kvm-host` makes such
//! a place.

use std::{fs, process::Command};

use form_tests::{
    host::{Host, SERVE, answers, wait},
    nfs::{HOST, NfsServer, SERVER},
};
use serde_json::Value;

fn sh(host: &Host, script: &str) -> String {
    host.form(&["exec", "web", "--", "/bin/busybox", "sh", "-c", script]).ok().stdout
}

fn pool(host: &Host) -> Value {
    host.form(&["pool", "show", "shared", "-o", "json"]).ok().json()
}

fn is_mounted() -> bool {
    fs::read_to_string("/proc/mounts").unwrap().lines().any(|line| line.starts_with(&format!("{SERVER}:")))
}

/// What `form doctor` says of pools and volumes.
fn faults(host: &Host) -> String {
    let doctor = host.form(&["doctor", "-o", "json"]).json();
    let of_volumes = |check: &&Value| ["pool/", "volume/"].iter().any(|kind| check["name"].as_str().unwrap().starts_with(kind));
    doctor.as_array().unwrap().iter().filter(of_volumes).map(ToString::to_string).collect()
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_nfs_server_that_stops_answering_holds_up_nothing_else() {
    let mut host = Host::start();
    let server = NfsServer::start(&host.path("nfs"));
    let source = format!("{SERVER}:/volumes");
    refused(&host);
    let _ = host.form(&["pool", "create", "shared", "--kind", "nfs", "--source", &source]).ok();
    let shown = pool(&host);
    assert!(shown["kind"] == "nfs" && shown["source"] == source.as_str() && shown["fault"].is_null(), "{shown}");
    let inside = host.form(&["pool", "create", "again", "--kind", "nfs", "--source", &format!("{SERVER}:/")]).exits(5);
    assert!(inside.stderr.contains(&source), "{inside:?}");

    let app = host.app("web", SERVE, 18095);
    let _ = host.form(&["deploy", &app, "-y"]).ok();
    let _ = host.form(&["volume", "create", "data", "-s", "64M", "--pool", "shared"]).ok();
    let _ = host.form(&["volume", "attach", "data", "web", "/data"]).ok();
    sh(&host, "echo before > /data/it; busybox sync");
    // Its server clones files.
    let _ = host.form(&["volume", "snapshot", "create", "data", "-n", "one"]).ok();
    let in_use = host.form(&["pool", "rm", "shared", "-y"]).exits(5);
    assert!(in_use.stderr.contains("data"), "{in_use:?}");
    a_second_writer_is_kept_out(&host);
    let (_, pid) = host.process(&host.vm("web"));

    server.unplug();
    wait("the pool is known not to answer", || pool(&host)["silent"] == true);
    silent(&host);
    // The agent ends and starts without it.
    Command::new("kill").arg(host.agent_pid().unwrap().to_string()).status().unwrap();
    wait("the agent ends", || host.has_died());
    host.kill_agent();
    host.start_agent();
    wait("the VM is adopted", || host.vm("web")["ready"] == true);
    silent(&host);

    server.plug();
    wait("the pool answers again", || pool(&host)["fault"].is_null());
    assert_eq!(sh(&host, "busybox cat /data/it; echo after > /data/it; busybox sync; busybox cat /data/it"), "before\nafter\n");
    let mapped = || host.form(&["volume", "show", "data", "-o", "json"]).ok().json()["attachment"].clone();
    let before = mapped();
    assert_eq!(host.form(&["volume", "sync", "data"]).ok().stdout, "data: in line already\n");
    let after = mapped();
    assert!(before["device"].is_string() && after["device_size_bytes"] == 64 << 20, "{after}");
    assert!(before["synced_at"].is_string() && after["synced_at"].is_string() && before != after, "{before}, then {after}");
    assert_eq!((host.process(&host.vm("web")).1, faults(&host)), (pid, String::new()), "the VM went on");
    let _ = host.form(&["volume", "detach", "data"]).ok();
    let _ = host.form(&["volume", "snapshot", "restore", "data", "one", "-y"]).ok();
    let _ = host.form(&["volume", "attach", "data", "web", "/data"]).ok();
    assert_eq!(sh(&host, "busybox cat /data/it"), "before\n");

    let _ = host.form(&["destroy", "web", "-y"]).ok();
    let _ = host.form(&["volume", "rm", "data", "--snapshots", "-y"]).ok();
    // It goes, whether its server answers or not.
    server.unplug();
    wait("the pool is known not to answer", || pool(&host)["silent"] == true);
    let _ = host.form(&["pool", "rm", "shared", "-y"]).ok();
    assert!(!is_mounted());
    server.plug();
    host.is_clean();
    assert_eq!(faults(&host), "");
    // The marker that it could not take along keeps nobody of this host away.
    let _ = host.form(&["pool", "create", "again", "--kind", "nfs", "--source", &source, "--options", "vers=4.1"]).ok();
    let _ = host.form(&["pool", "rm", "again", "-y"]).ok();
    assert!(!is_mounted());
}

/// Each with what to do, and nothing left mounted.
fn refused(host: &Host) {
    let create =
        |source: &str, options: &str| host.form(&["pool", "create", "shared", "--kind", "nfs", "--source", source, "--options", options]);
    for (source, options, code, says) in [
        ("storage", "", 2, "SERVER:/PATH"),
        (&format!("{SERVER}:/volumes"), "hard", 2, "mount option"),
        (&format!("{SERVER}:/nothing"), "", 1, "no export /nothing"),
        (&format!("{HOST}:/volumes"), "", 6, "no NFS server answers"),
        ("no-such-server.invalid:/volumes", "", 1, "is not known"),
    ] {
        let refused = create(source, options).exits(code);
        assert!(refused.stderr.contains(says), "{refused:?}");
        assert!(!is_mounted());
    }
    let _ = host.form(&["pool", "show", "shared"]).exits(3);
}

fn a_second_writer_is_kept_out(host: &Host) {
    let volume = host.form(&["volume", "show", "data", "-o", "json"]).ok().json();
    let file = format!("{}/{}/volume.raw", pool(host)["path"].as_str().unwrap(), volume["id"].as_str().unwrap());
    let foreign = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 4k", &file]).output().unwrap();
    assert!(!foreign.status.success() && String::from_utf8_lossy(&foreign.stderr).contains("lock"), "{foreign:?}");
}

/// The server is away: that is said wherever somebody looks, and what needs it fails; everything else goes on.
fn silent(host: &Host) {
    let listed = host.form(&["pool", "ls"]).ok().stdout;
    assert!(listed.lines().any(|line| line.starts_with("shared") && line.contains("not-answering")), "{listed}");
    assert!(faults(host).contains("pool/shared is not answering"));
    let health =
        Command::new("curl").args(["-s", "--unix-socket", host.socket().to_str().unwrap(), "http://form/v1/health"]).output().unwrap();
    assert!(String::from_utf8_lossy(&health.stdout).contains("pool/shared is not answering"), "{health:?}");
    for command in
        [&["volume", "create", "more", "-s", "16M", "--pool", "shared"][..], &["volume", "snapshot", "create", "data", "-n", "two"]]
    {
        let failed = host.form(command).exits(6);
        assert!(failed.stderr.contains("pool/shared is not answering"), "{failed:?}");
    }
    let _ = host.form(&["volume", "create", "other", "-s", "16M"]).ok();
    let _ = host.form(&["volume", "rm", "other", "-y"]).ok();
    assert!(answers(18095), "the VM goes on");
    assert_eq!(sh(host, "busybox cat /www/index.html"), "it works\n");
}
