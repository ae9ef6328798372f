//! Network interfaces that come to a running guest and leave it, under an agent that dies. Runs as root where /dev/kvm runs guests:
//! `tests/kvm-host` makes such a place.

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::{Command, Stdio},
    time::Duration,
};

use form_tests::host::{Host, wait};
use form_types::Failpoint::{self, InterfacePlugged, InterfaceSubmitted, InterfaceTapMade, InterfaceUnplugged};
use serde_json::Value;

const SERVE: &str = r#"["/bin/busybox", "httpd", "-f", "-v", "-p", "80", "-h", "/www"]"#;

fn sh(host: &Host, vm: &str, script: &str) -> String {
    host.form(&["exec", vm, "--", "/bin/busybox", "sh", "-c", script]).ok().stdout
}

fn interfaces(host: &Host, vm: &str) -> Vec<Value> {
    host.form(&["net", "ls", vm, "-o", "json"]).ok().json().as_array().unwrap().clone()
}

/// Whether the guest's server answers at this address, asked from the host.
fn serves(address: &Value, port: u16) -> bool {
    let Some(address) = address.as_str().and_then(|text| text.parse::<std::net::IpAddr>().ok()) else { return false };
    let Ok(mut stream) = TcpStream::connect_timeout(&(address, port).into(), Duration::from_secs(5)) else { return false };
    let mut text = String::new();
    let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").is_ok() && stream.read_to_string(&mut text).is_ok() && text.contains("it works")
}

/// Every interface is in the guest as the host says, and reached at each of its addresses.
fn all_reached(host: &Host, vm: &str, expected: &[&str]) -> Vec<Value> {
    let found = interfaces(host, vm);
    let names: Vec<&str> = found.iter().map(|interface| interface["name"].as_str().unwrap()).collect();
    assert_eq!(names, expected, "{found:?}");
    for interface in &found {
        assert_eq!((interface["state"].as_str(), &interface["device"]), (Some("attached"), &interface["name"]), "{interface}");
        let mac = sh(host, vm, &format!("busybox cat /sys/class/net/{}/address", interface["device"].as_str().unwrap()));
        assert_eq!(Some(mac.trim()), interface["mac"].as_str());
        for address in [&interface["ipv4"], &interface["ipv6"]] {
            wait(&format!("{vm} answers at {address}"), || serves(address, 80));
        }
    }
    let doctor = host.form(&["doctor", "-o", "json"]);
    assert!(!doctor.stdout.contains("leftover/") && !doctor.stdout.contains("\"vm/"), "{doctor:?}");
    found
}

fn ready(host: &Host, vm: &str) {
    wait("its guest is heard of", || host.vm(vm)["ready"] == true);
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_interfaces_come_and_go_and_are_as_recorded() {
    let mut host = Host::start();
    let web = host.app("web", SERVE, 18095);
    let _ = host.form(&["deploy", &web, "-y"]).ok();
    let (_, pid) = host.process(&host.vm("web"));
    let said = host.form(&["net", "attach", "web"]).ok().stdout;
    assert!(said.starts_with("web: eth1 attached: 10."), "{said}");
    let all = all_reached(&host, "web", &["eth0", "eth1"]);
    assert!(["mac", "ipv4", "ipv6"].iter().all(|field| all[0][*field] != all[1][*field]), "{all:?}");
    // What came to the second address was answered from there, by the interface it came in on.
    carried_by_kernel_but_for_a_limit(&host);
    assert_ne!(sh(&host, "web", "busybox cat /sys/class/net/eth1/statistics/tx_packets").trim(), "0");

    busy(&host, &all[1]);
    one_at_a_time(&host);
    wherever_the_agent_dies(&mut host);
    assert_eq!(host.process(&host.vm("web")).1, pid, "it was never started again");
    saved_and_copied(&host);

    // A start brings them.
    let before = interfaces(&host, "web");
    let _ = host.form(&["vm", "stop", "web"]).ok();
    let said = host.form(&["net", "attach", "web"]).ok().stdout;
    assert!(said.contains("eth2 attached from its next start on"), "{said}");
    let _ = host.form(&["vm", "start", "web"]).ok();
    assert_eq!(all_reached(&host, "web", &["eth0", "eth1", "eth2"])[..2], before[..]);
    let _ = host.form(&["net", "detach", "web", "eth1"]).ok();
    let _ = host.form(&["net", "detach", "web", "eth2"]).ok();
    all_reached(&host, "web", &["eth0"]);
    assert_eq!(sh(&host, "web", "busybox ls /sys/class/net | busybox grep -c eth"), "1\n");
    assert_eq!(sh(&host, "web", "busybox ip rule | busybox grep -c 'lookup 10[0-9]'; busybox true"), "0\n");
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
}

/// Name, backend and bytes each way of the interfaces of `web`.
fn traffic(host: &Host) -> Vec<(String, String, u64, u64)> {
    let stats = host.form(&["vm", "stats", "web", "-o", "json"]).ok().json();
    let networks = stats[0]["networks"].as_array().unwrap_or_else(|| panic!("{stats}"));
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let one =
        |of: &Value| (text(&of["id"]), text(&of["backend"]), of["received_bytes"].as_u64().unwrap(), of["sent_bytes"].as_u64().unwrap());
    networks.iter().map(one).collect()
}

/// The host's kernel moves the packets of both, and the VM process while there is a limit; each is counted once by whomever it was moved.
fn carried_by_kernel_but_for_a_limit(host: &Host) {
    let by_kernel = if std::path::Path::new("/dev/vhost-net").exists() { "vhost-net" } else { "form-vmm" };
    assert!(by_kernel == "vhost-net" || std::env::var_os("FORM_TEST_EMULATED").is_none(), "the emulated host has it");
    let mut before = traffic(host);
    for (limit, backend) in [(None, by_kernel), (Some("1Gbit"), "form-vmm"), (Some("none"), by_kernel)] {
        if let Some(limit) = limit {
            let _ = host.form(&["vm", "set", "web", "--net-bandwidth", limit]).ok();
        }
        all_reached(host, "web", &["eth0", "eth1"]);
        let now = traffic(host);
        assert_eq!(now.len(), 2, "{now:?}");
        for (now, before) in now.iter().zip(&before) {
            assert_eq!((&now.0, now.1.as_str()), (&before.0, backend), "with the limit {limit:?}");
            // One small page each time: less would be missing packets, far more some that are counted twice.
            let (received, sent) = (now.2.saturating_sub(before.2), now.3.saturating_sub(before.3));
            assert!((200..1 << 20).contains(&received) && (200..1 << 20).contains(&sent), "{before:?} {now:?}");
        }
        before = now;
    }
}

fn signal(pid: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &pid.to_string()]).status().unwrap().success());
}

/// What somebody listens at is not taken away, unless by force.
fn busy(host: &Host, second: &Value) {
    let (address, mac) = (second["ipv4"].as_str().unwrap(), &second["mac"]);
    sh(host, "web", &format!("busybox httpd -p {address}:81 -h /www"));
    wait("its other server answers", || serves(&second["ipv4"], 81));
    let refused = host.form(&["net", "detach", "web", "eth1"]).exits(5);
    let holder = format!("at tcp {address}:81");
    assert!(refused.stderr.contains("(process ") && refused.stderr.contains(&holder), "{}", refused.stderr);
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    all_reached(host, "web", &["eth0", "eth1"]);
    let refused = host.form(&["net", "detach", "web", "eth0"]).exits(5);
    assert!(refused.stderr.contains("first interface"), "{}", refused.stderr);
    let _ = host.form(&["net", "detach", "web", "eth7"]).exits(3);
    let _ = host.form(&["net", "attach", "nobody"]).exits(3);
    let _ = host.form(&["net", "detach", "web", "eth1", "--force"]).ok();
    all_reached(host, "web", &["eth0"]);
    let _ = host.form(&["net", "attach", "web"]).ok();
    assert_eq!(all_reached(host, "web", &["eth0", "eth1"])[1]["mac"], *mac, "it is the same one again");
    let refused = host.form(&["net", "detach", "web", "eth1"]).exits(5).stderr;
    let (_, pid) = refused.split_once("(process ").unwrap();
    sh(host, "web", &format!("busybox kill {}", pid.split(')').next().unwrap()));
    let _ = host.form(&["net", "detach", "web", "eth1"]).ok();
}

fn one_at_a_time(host: &Host) {
    // The VM process takes nothing until both have asked: the first change is under way when the second one comes.
    let (_, pid) = host.process(&host.vm("web"));
    signal(pid, "-STOP");
    let _ = host.form(&["net", "attach", "web", "--no-wait"]).ok();
    let refused = host.form(&["net", "attach", "web"]);
    signal(pid, "-CONT");
    let refused = refused.exits(5);
    let (_, id) = refused.stderr.split_once("form op wait ").unwrap();
    let _ = host.form(&["op", "wait", &id[..32]]).ok();
    all_reached(host, "web", &["eth0", "eth1"]);
    let _ = host.form(&["net", "detach", "web", "eth1"]).ok();
}

fn wherever_the_agent_dies(host: &mut Host) {
    let steps: [(Failpoint, &[&str]); 4] = [
        (InterfaceSubmitted, &["net", "attach", "web"]),
        (InterfaceTapMade, &["net", "attach", "web"]),
        (InterfacePlugged, &["net", "attach", "web"]),
        (InterfaceUnplugged, &["net", "detach", "web", "eth1"]),
    ];
    for (point, command) in steps {
        println!("=== {}", point.as_str());
        if point != InterfaceSubmitted && point != InterfaceUnplugged {
            let _ = host.form(&["net", "detach", "web", "eth1"]).ok();
        }
        host.kill_agent();
        host.start_agent_with(Some(point.as_str()));
        ready(host, "web");
        let mut client = host.form_command(command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let died = host.dies_at(point.as_str(), |_| false);
        let _ = (client.kill(), client.wait());
        assert!(died, "{command:?} does not come to {}", point.as_str());
        host.start_agent();
        wait("the operation ends", || host.no_operation_is_under_way());
        ready(host, "web");
        // In the state before the VM has it, and as long as the VM has it: it has it in the end.
        wait("the guest has it", || interfaces(host, "web").iter().filter(|interface| interface["state"] == "attached").count() == 2);
        all_reached(host, "web", &["eth0", "eth1"]);
    }
}

/// It goes back with what it had; a copy has interfaces of its own.
fn saved_and_copied(host: &Host) {
    let _ = host.form(&["vm", "snapshot", "create", "web", "--name", "one"]).ok();
    let _ = host.form(&["net", "detach", "web", "eth1"]).ok();
    let refused = host.form(&["vm", "snapshot", "restore", "web", "one", "-y"]).exits(5);
    assert!(refused.stderr.contains("eth0, eth1 and has eth0"), "{}", refused.stderr);
    let _ = host.form(&["net", "attach", "web"]).ok();
    let _ = host.form(&["vm", "snapshot", "restore", "web", "one", "-y"]).ok();
    let own = all_reached(host, "web", &["eth0", "eth1"]);
    let _ = host.form(&["vm", "fork", "web", "copy"]).ok();
    let copied = all_reached(host, "copy", &["eth0", "eth1"]);
    for (own, copied) in own.iter().zip(&copied) {
        assert!(["mac", "ipv4", "ipv6"].iter().all(|field| own[*field] != copied[*field]), "{own} {copied}");
    }
    all_reached(host, "web", &["eth0", "eth1"]);
    let _ = host.form(&["destroy", "copy", "-y"]).ok();
    let _ = host.form(&["vm", "snapshot", "rm", "web", "one", "-y"]).ok();
}
