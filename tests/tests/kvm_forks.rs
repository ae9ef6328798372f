//! Copies of running VMs: they go on in the middle of what they do, and are machines of their own before they do.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    process::Stdio,
    time::{Duration, Instant},
};

use form_tests::host::{Host, SERVE, answers, wait};
use form_types::Failpoint::{self, *};

const PORT: u16 = 18096;

fn sh(host: &Host, vm: &str, script: &str) -> String {
    host.form(&["exec", vm, "--", "/bin/busybox", "sh", "-c", script]).ok().stdout
}

/// A program that counts in its memory, and says with each number on which machine it thinks it is.
const COUNTER: &str = "busybox mkdir -p /dev/shm; : > /dev/shm/count; \
    (n=0; while :; do n=$((n+1)); echo $n $(busybox hostname) >> /dev/shm/count; busybox sleep 1; done) \
    > /dev/null 2>&1 < /dev/null & echo started";

/// What it has said: the last number as `name`, and the last of all.
fn counted(host: &Host, vm: &str, name: &str) -> (u64, u64) {
    let said = sh(host, vm, "busybox cat /dev/shm/count");
    let lines = || said.lines().filter_map(|line| line.split_once(' ')).map(|(number, who)| (number.parse::<u64>().unwrap(), who));
    (
        lines().filter(|(_, who)| *who == name).map(|(number, _)| number).max().unwrap_or(0),
        lines().map(|(number, _)| number).max().unwrap_or(0),
    )
}

/// Whether its web server answers on its own address.
fn serves(address: &str) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&format!("{address}:80").parse().unwrap(), Duration::from_secs(5)) else {
        return false;
    };
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut said = String::new();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").is_ok() && stream.read_to_string(&mut said).is_ok() && said.contains("200 OK")
}

/// What no two machines share.
fn identity(host: &Host, vm: &str) -> Vec<String> {
    let told = sh(
        host,
        vm,
        "busybox hostname; busybox cat /etc/hostname /etc/machine-id /sys/class/net/eth0/address /sys/block/vda/serial; echo; \
        busybox ip -4 -o addr show eth0 | busybox awk '{print $4}'; busybox ip -6 -o addr show eth0 | busybox awk '{print $4}' | busybox sort; \
        busybox head -c 16 /dev/urandom | busybox hexdump -v -e '/1 \"%02x\"'",
    );
    told.lines().map(str::to_owned).collect()
}

fn is_itself(host: &Host, name: &str) -> Vec<String> {
    let vm = host.vm(name);
    assert_eq!((&vm["state"], &vm["ready"], &vm["fault"]), (&"running".into(), &true.into(), &serde_json::Value::Null), "{vm}");
    let identity = identity(host, name);
    assert_eq!((identity[0].as_str(), identity[1].as_str()), (name, name));
    assert_eq!(identity[5], format!("{}/32", vm["ipv4"].as_str().unwrap()));
    wait("it serves on its own address", || serves(vm["ipv4"].as_str().unwrap()));
    assert_eq!(sh(host, name, "echo mine > /mine && busybox sync && busybox cat /mine"), "mine\n");
    identity
}

/// Directories of snapshots, of whichever VM.
fn kept(host: &Host) -> usize {
    let vms = fs::read_dir(host.root().join("var/lib/formation/snapshots")).unwrap().flatten();
    // One of them may go just now.
    vms.map(|vm| fs::read_dir(vm.path()).map_or(0, Iterator::count)).sum()
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_copies_go_on_as_machines_of_their_own() {
    let mut host = Host::start();
    let web = host.app("web", SERVE, PORT);
    let _ = host.form(&["deploy", &web, "-y"]).ok();
    assert_eq!(sh(&host, "web", COUNTER), "started\n");
    wait("it counts", || counted(&host, "web", "web").1 > 3);
    let (_, pid) = host.process(&host.vm("web"));
    let begun = Instant::now();
    let _ = host.form(&["vm", "fork", "web", "-n", "2", "--label", "kind=copy"]).ok();
    println!("MEASURED: two copies run {} ms after the command began", begun.elapsed().as_millis());

    // Each is another machine, in all that two must not share.
    let all = [identity(&host, "web"), is_itself(&host, "web-1"), is_itself(&host, "web-2")];
    assert!(all.iter().all(|one| one.len() == 9), "{all:?}");
    for at in 0..all[0].len() {
        let distinct: std::collections::BTreeSet<&String> = all.iter().map(|one| &one[at]).collect();
        assert_eq!(distinct.len(), 3, "field {at}: {all:?}");
    }
    // Its program goes on, and never ran there under the old name: both copies stopped saying it at one and the same number.
    let (first, second) = (counted(&host, "web-1", "web"), counted(&host, "web-2", "web"));
    assert!(first.0 > 3 && first.0 == second.0, "{first:?} {second:?}");
    wait("the programs of the copies go on", || {
        counted(&host, "web-1", "web-1").0 > first.0 + 1 && counted(&host, "web-2", "web-2").0 > first.0 + 1
    });

    // The VM itself has noticed nothing but a moment's rest.
    assert_eq!(host.process(&host.vm("web")).1, pid);
    assert!(answers(PORT));
    wait("it counts on", || counted(&host, "web", "web").1 > first.0 + 3);
    assert_eq!(kept(&host), 0, "no snapshot stays");
    let labelled = host.form(&["vm", "show", "web-2", "-o", "json"]).ok().json();
    assert_eq!(labelled["desired"]["spec"]["labels"]["kind"], "copy", "{labelled}");

    let taken = host.form(&["vm", "fork", "web", "web-1"]).exits(5);
    assert!(taken.stderr.contains("there is a vm/web-1 already"), "{taken:?}");
    let _ = host.form(&["vm", "fork", "nobody", "other"]).exits(3);
    let _ = host.form(&["vm", "fork", "web", "other", "--snapshot", "none"]).exits(3);

    // One that is started again is the same machine, from its own disk.
    let _ = host.form(&["destroy", "web-2", "-y"]).ok();
    let (_, of_copy) = host.process(&host.vm("web-1"));
    std::process::Command::new("kill").args(["-9", &of_copy.to_string()]).status().unwrap();
    wait("it is started again", || host.vm("web-1")["restarts"].as_u64() >= Some(1) && host.vm("web-1")["ready"] == true);
    let again = is_itself(&host, "web-1");
    assert_eq!(again[..8], all[1][..8]);
    assert_eq!(sh(&host, "web-1", "test -e /dev/shm/count && echo counting || echo fresh"), "fresh\n");
    let _ = host.form(&["destroy", "web-1", "-y"]).ok();

    dies(&mut host);
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
}

/// The agent dies in the middle: there is a whole copy afterwards, or none.
fn dies(host: &mut Host) {
    let _ = host.form(&["vm", "snapshot", "create", "web", "--name", "one"]).ok();
    let command = ["vm", "fork", "web", "copy", "--snapshot", "one"];
    let points: [(Failpoint, bool); 4] = [(ForkShared, false), (RestoreHeld, true), (RestoreRecorded, true), (ForkTold, true)];
    for (point, comes) in points {
        println!("=== fork at {}", point.as_str());
        host.kill_agent();
        host.start_agent_with(Some(point.as_str()));
        wait("the VM is adopted", || host.vm("web")["ready"] == true);
        let mut client = host.form_command(&command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let died = host.dies_at(point.as_str(), |_| false);
        let _ = (client.kill(), client.wait());
        assert!(died);
        host.start_agent();
        wait("the operation ends", || host.no_operation_is_under_way());
        let there = host.form(&["vm", "ls", "-o", "name"]).ok().stdout.contains("copy");
        assert_eq!(there, comes, "{}", point.as_str());
        if comes {
            wait("the copy runs", || host.vm("copy")["ready"] == true);
            is_itself(host, "copy");
            assert!(counted(host, "copy", "web").0 > 3, "its memory came along");
            let _ = host.form(&["destroy", "copy", "-y"]).ok();
        }
        wait("the VM's own snapshot is all that is kept", || kept(host) == 1);
    }
    let _ = host.form(&["vm", "snapshot", "rm", "web", "one", "-y"]).ok();
}
