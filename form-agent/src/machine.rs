//! What this machine is.

use std::{fs, io};

/// Memory in MiB (`MemTotal` of `/proc/meminfo`).
///
/// # Errors
/// When the kernel does not say.
pub fn memory_mib() -> io::Result<u64> {
    meminfo_mib("MemTotal")
}

/// Memory in MiB that is free, or can be freed at once (`MemAvailable` of `/proc/meminfo`).
///
/// # Errors
/// When the kernel does not say.
pub fn available_memory_mib() -> io::Result<u64> {
    meminfo_mib("MemAvailable")
}

fn meminfo_mib(field: &str) -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = value.and_then(|value| value.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.map(|kib| kib / 1024).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/meminfo has no {field}")))
}

pub fn vcpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |count| count.get() as u32)
}

pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The machine's host name; none when it was never given one.
pub fn host_name() -> Option<String> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    (!name.is_empty() && name != "(none)").then_some(name)
}

/// Whether the processor says that it can run guests: a paravirtual `/dev/kvm` without it runs no ordinary ones.
pub fn virtualises() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = flags.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx")
}
