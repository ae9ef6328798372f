//! What the state costs in memory, measured in a process of its own.

use std::process::Command;

use crate::{
    Clock, Table, Write,
    testing::{Host, id, request},
};

const CHILD: &str = "FORM_STATE_MEMORY_CHILD";

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The child's part: fifty VMs with requests of 60 KB, taken over by another replica, then overwritten in one batch.
#[test]
fn child_measures() {
    if std::env::var(CHILD).is_err() {
        return;
    }
    let (one, two) = (Host::new(1), Host::new(2));
    let base = resident_kib();
    for vm in 0..50 {
        one.put(vm, "request", format!("{vm}{}", "request ".repeat(7500)));
    }
    let (changes, clock) = one.replica.changes_after(&Clock::new(), usize::MAX).unwrap();
    assert!(two.replica.receive_all(&changes).iter().all(Result::is_ok));
    let one = one.reopen();
    for n in 0..240_u64 {
        one.replica.submit(request(1, "ann", &[Write::put(Table::Vms, id((n % 50) as u8), "epoch", n)])).unwrap();
    }
    let (changes, _) = one.replica.changes_after(&clock, usize::MAX).unwrap();
    assert!(two.replica.receive_all(&changes).iter().all(Result::is_ok));
    println!("\ngrown {}", resident_kib() - base);
}

#[test]
fn overwriting_a_loaded_document_does_not_eat_memory() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "memory_tests::child_measures", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let grown: u64 = text.lines().find_map(|line| line.strip_prefix("grown ")).unwrap_or_else(|| panic!("{output:?}")).parse().unwrap();
    println!("two replicas of 3 MB and 290 changes took {grown} KiB at most");
    assert!(grown < 92 << 10, "{grown} KiB");
}
