//! What must stay small: the memory of VM processes and of the agent, the program of a VM, and what a redeploy moves. Times are not
//! tested: docs/bench.md says why.
//!
//! `FORM_TEST_RELEASE` names the directory of `form-vmm` as it is installed, and `form-guest`: `tests/run-system` builds it.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use form_tests::{
    host::{Host, SERVE, answers},
    programs::Programs,
    wire::CountingProxy,
};
use serde_json::Value;

/// What a VM process may have in memory outside its guest's, in bytes: what Firecracker needs.
const VMM_BYTES: u64 = 4_000_000;
const AGENT_BYTES: u64 = 30_000_000;
/// Of that, what is not a page of its program and its libraries. A development build brings twice as many of those into memory as a
/// release, of which 14 MB were measured (docs/bench.md); what the agent allocates is the same in both.
const AGENT_BYTES_OWN: u64 = AGENT_BYTES - 14_000_000;
const AGENT_BYTES_EACH_VM: u64 = 1_000_000;

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: tests/run-system sets it")).into()
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_what_is_enforced_is_within_its_budget() {
    // An emulated machine sets no example for huge pages: as on Debian.
    fs::write("/sys/kernel/mm/transparent_hugepage/enabled", "madvise").unwrap();
    let home = tempfile::tempdir().unwrap();
    let programs = Programs::new(home.path()).with_library(variable("FORM_TEST_RELEASE"));
    let kernel = variable("FORM_TEST_KERNEL");
    let mut command = programs.command("form-agent", ["--root".as_ref(), home.path().as_os_str(), "bench".as_ref()]);
    command.args(["--json", "--runs", "1", "--only", "first-instruction", "--only", "vmm-memory", "--only", "vmm-program"]);
    // Those of saved VMs are not enforced, and have to be there.
    command.args(["--only", "restore", "--only", "agent-memory", "--kernel"]).arg(kernel.parent().unwrap());
    let ran = programs.run(command).ok();
    let rows: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<&str> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    let enforced = ["vmm-memory", "vmm-program", "agent-memory", "agent-memory/vm"];
    let saved = ["snapshot", "snapshot/incremental", "restore"];
    assert!(enforced.iter().chain(&saved).all(|name| names.contains(name)), "{names:?}");
    for row in &rows {
        assert!(row["over"] == false && row["fault"].is_null() && row["samples"] == 1, "{row}");
        assert!(row["median"].as_f64() > Some(0.0), "{row}");
        assert!(row["unit"] != "MB" || row["name"] == "vmm-memory/anonymous" || row["median"].as_f64() <= row["budget"].as_f64(), "{row}");
    }
    let left = fs::read_dir("/sys/fs/cgroup").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    assert_eq!(left.filter(|name| name.starts_with("form-bench")).collect::<Vec<_>>(), Vec::<String>::new());
}

fn host() -> Host {
    let mut host = Host::with_library(&variable("FORM_TEST_RELEASE"));
    host.start_agent();
    host
}

fn agent(host: &Host) -> u32 {
    host.agent_pid().expect("an agent runs")
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_running_vms_cost_little_and_a_redeploy_moves_what_changed() {
    let host = host();
    let idle = resident(agent(&host));
    assert!(idle < AGENT_BYTES, "an idle agent has {idle} bytes");

    // Between form and the agent stands a socket that counts.
    let socket = host.directory.path().join("counted.sock");
    let proxy = CountingProxy::start(&socket, &host.socket());
    let deploy = |formfile: &str| {
        let mut command = host.form_command(&["deploy", formfile, "-y"]);
        command.env("FORM_HOST", format!("unix:{}", socket.display()));
        let before = proxy.passed();
        let _ = host.programs.run(command).ok();
        proxy.passed() - before
    };
    let web = host.app("web", SERVE, 18091);
    let context = Path::new(&web).parent().unwrap();
    fs::write(context.join("large"), noise(1, 12 << 20)).unwrap();
    fs::write(context.join("page"), noise(2, 256 << 10)).unwrap();
    let formfile = fs::read_to_string(&web).unwrap().replace("ENTRYPOINT", "COPY large /srv/large\nCOPY page /www/page\nENTRYPOINT");
    fs::write(&web, formfile).unwrap();
    let first = deploy(&web);
    assert!(first > 12 << 20, "noise cannot be compressed: {first} bytes went over the wire");

    // Another file, and a longer one: what lies behind it must not move.
    let changed: u64 = 300 << 10;
    fs::write(context.join("page"), noise(3, changed as usize)).unwrap();
    let again = deploy(&web);
    println!("first {first} bytes, again {again}");
    assert!(again >= changed, "all of it is new: {again} bytes went over the wire");
    assert!(again <= 2 * changed + (1 << 20), "{again} bytes went over the wire for {changed} that changed");
    assert!(answers(18091));

    let other = host.app("other", SERVE, 18092);
    let _ = deploy(&other);
    for name in ["web", "other"] {
        let (_, pid) = host.process(&host.vm(name));
        let outside = outside_guest(pid, 128 << 20);
        println!("{name}: {outside} bytes outside its guest");
        print_largest(pid);
        assert!(outside <= VMM_BYTES, "{name} has {outside} bytes outside its guest");
    }
    let busy = resident(agent(&host));
    let own = anonymous(agent(&host));
    println!("agent: {idle} bytes, with two VMs {busy}, of which {own} are its own");
    print_largest(agent(&host));
    assert!(own < AGENT_BYTES_OWN + 2 * AGENT_BYTES_EACH_VM, "with two VMs the agent has {own} bytes of its own");
    // From idle to the first VM more of the program itself comes into memory: that is not the VM's.
    let each = steady_growth(&host);
    assert!(each < AGENT_BYTES_EACH_VM, "a VM adds {each} bytes to the agent");
    for name in ["web", "other"] {
        let _ = host.form(&["destroy", name, "-y"]).ok();
    }
    host.is_clean();
}

/// What one more VM adds to an agent that has served uploads before, in bytes.
fn steady_growth(host: &Host) -> u64 {
    let third = host.app("third", SERVE, 18093);
    let before = resident(agent(host));
    let _ = host.form(&["deploy", &third, "-y"]).ok();
    let after = resident(agent(host));
    println!("agent: {before} bytes, with one more VM {after}");
    let _ = host.form(&["destroy", "third", "-y"]).ok();
    after.saturating_sub(before)
}

/// Bytes that no compressor makes smaller (xorshift).
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// `Rss` of all mappings when nothing is being done: the least of some moments.
fn resident(pid: u32) -> u64 {
    let look = |_| {
        std::thread::sleep(Duration::from_millis(500));
        sum_of_rss(fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap().lines())
    };
    (0..6).map(look).min().unwrap()
}

/// What a process has in memory that no file has: heap, stacks, what it changed of its program's data. In bytes.
fn anonymous(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

/// As [`resident`], without the mapping of the guest's memory, which has `guest` bytes.
fn outside_guest(pid: u32, guest: u64) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let size = |line: &str| line.strip_prefix("Size:")?.split_whitespace().next()?.parse::<u64>().ok();
    let start = lines.iter().position(|line| size(line) == Some(guest >> 10)).expect("a mapping of the guest's size");
    let rest = lines[start..].iter().position(|line| line.starts_with("VmFlags:")).map_or(lines.len(), |length| start + length);
    sum_of_rss(lines[..start].iter().chain(&lines[rest..]).copied())
}

/// What a process has in memory, by mapping: the largest, for a person who looks for the reason.
fn print_largest(pid: u32) {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut mappings: Vec<(u64, &str)> = Vec::new();
    for line in text.lines() {
        // `ADDRESSES PERMISSIONS OFFSET DEVICE INODE [NAME]`, then lines of `Name: value`.
        if let Some(kilobytes) = line.strip_prefix("Rss:") {
            let kilobytes = kilobytes.split_whitespace().next().and_then(|number| number.parse().ok());
            mappings.last_mut().unwrap().0 = kilobytes.unwrap_or(0);
        } else if line.split_whitespace().next().is_some_and(|first| !first.ends_with(':')) {
            mappings.push((0, line));
        }
    }
    mappings.sort_unstable_by_key(|(kilobytes, _)| std::cmp::Reverse(*kilobytes));
    for (kilobytes, mapping) in mappings.iter().take(12) {
        println!("  {kilobytes:>7} kB  {mapping}");
    }
}

fn sum_of_rss<'a>(lines: impl Iterator<Item = &'a str>) -> u64 {
    let kilobytes = lines.filter_map(|line| line.strip_prefix("Rss:")?.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.sum::<u64>() << 10
}
