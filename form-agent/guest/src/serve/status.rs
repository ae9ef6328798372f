//! What the kernel says of the machine.

use std::fs;

use form_guest::protocol::{Metrics, ReadyReport, StatusReport, VERSION};

use crate::{machine::Machine, network, process::lock};

/// Milliseconds since the kernel started.
pub fn uptime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0).saturating_mul(1000) + u64::try_from(now.tv_nsec / 1_000_000).unwrap_or(0)
}

pub fn ready(machine: &Machine) -> ReadyReport {
    let (state, _) = machine.state();
    let mut report = lock(&machine.report).clone();
    let addresses = network::addresses();
    if let Err(error) = &addresses {
        report.warn("network", error);
    }
    let system = rustix::system::uname();
    ReadyReport {
        protocol: VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        phase: state.phase,
        boot_id: read("/proc/sys/kernel/random/boot_id").trim().to_owned(),
        kernel: system.release().to_string_lossy().into_owned(),
        hostname: system.nodename().to_string_lossy().into_owned(),
        devices: report.devices,
        addresses: addresses.unwrap_or_default(),
        service: state.service,
        health: state.health,
        faults: report.faults,
        boot_ms: if state.started_after_ms == 0 { uptime_ms() } else { state.started_after_ms },
    }
}

pub fn status(machine: &Machine) -> StatusReport {
    let (state, _) = machine.state();
    let memory = Memory::parse(&read("/proc/meminfo"));
    StatusReport {
        protocol: VERSION,
        phase: state.phase,
        service: state.service,
        health: state.health,
        health_message: state.health_message,
        uptime_ms: uptime_ms(),
        memory_total_bytes: memory.total,
        memory_used_bytes: memory.total.saturating_sub(memory.available),
        load_hundredths: load(&read("/proc/loadavg")),
        next_log_sequence: machine.log.next_sequence(),
    }
}

pub fn metrics() -> Metrics {
    let memory = Memory::parse(&read("/proc/meminfo"));
    let cpu = Cpu::parse(&read("/proc/stat"));
    let (received, sent) = network_bytes(&read("/proc/net/dev"));
    let (disk_read, disk_written) = disk_bytes(&read("/proc/diskstats"));
    let root = rustix::fs::statvfs("/").ok();
    let blocks = |count: Option<u64>| count.unwrap_or(0).saturating_mul(root.as_ref().map_or(0, |root| root.f_frsize));
    Metrics {
        uptime_ms: uptime_ms(),
        cpus: cpu.count,
        cpu_busy_ms: cpu.busy_ms,
        cpu_steal_ms: cpu.steal_ms,
        memory_total_bytes: memory.total,
        memory_available_bytes: memory.available,
        root_total_bytes: blocks(root.as_ref().map(|root| root.f_blocks)),
        root_available_bytes: blocks(root.as_ref().map(|root| root.f_bavail)),
        network_received_bytes: received,
        network_sent_bytes: sent,
        disk_read_bytes: disk_read,
        disk_written_bytes: disk_written,
        processes: processes(),
    }
}

/// Kernel files: what cannot be read counts as empty.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn processes() -> u32 {
    let is_number = |entry: &fs::DirEntry| entry.file_name().to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    let count = fs::read_dir("/proc").map_or(0, |entries| entries.filter_map(Result::ok).filter(is_number).count());
    u32::try_from(count).unwrap_or(u32::MAX)
}

struct Memory {
    total: u64,
    available: u64,
}

impl Memory {
    fn parse(meminfo: &str) -> Self {
        let kib = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        Self { total: kib("MemTotal") * 1024, available: kib("MemAvailable") * 1024 }
    }
}

struct Cpu {
    count: u32,
    busy_ms: u64,
    steal_ms: u64,
}

impl Cpu {
    /// proc_stat(5); its unit is 10 ms on every architecture of ours (`USER_HZ`).
    fn parse(stat: &str) -> Self {
        let fields: Vec<u64> = stat
            .lines()
            .find_map(|line| line.strip_prefix("cpu "))
            .map(|rest| rest.split_whitespace().filter_map(|field| field.parse().ok()).collect())
            .unwrap_or_default();
        let field = |position: usize| fields.get(position).copied().unwrap_or(0);
        // user, nice, system, then irq and softirq
        let busy: u64 = [0, 1, 2, 5, 6].into_iter().map(field).sum();
        let count = stat.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu ")).count();
        Self { count: u32::try_from(count).unwrap_or(u32::MAX), busy_ms: busy * 10, steal_ms: field(7) * 10 }
    }
}

fn load(loadavg: &str) -> [u32; 3] {
    let mut fields = loadavg.split_whitespace().map(|field| field.replace('.', "").parse().unwrap_or(0));
    [(); 3].map(|()| fields.next().unwrap_or(0))
}

/// Received and sent by all interfaces but the loopback one.
fn network_bytes(dev: &str) -> (u64, u64) {
    dev.lines().filter_map(|line| line.split_once(':')).filter(|(name, _)| name.trim() != "lo").fold(
        (0, 0),
        |(received, sent), (_, rest)| {
            let field = |position| rest.split_whitespace().nth(position).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
            (received + field(0), sent + field(8))
        },
    )
}

/// Read from and written to whole virtio, NVMe and SCSI disks, not counting their partitions.
fn disk_bytes(diskstats: &str) -> (u64, u64) {
    let whole = |name: &str| {
        let virtio_or_scsi = (name.starts_with("vd") || name.starts_with("sd")) && !name.ends_with(|last: char| last.is_ascii_digit());
        virtio_or_scsi || name.starts_with("nvme") && !name.contains('p')
    };
    diskstats.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).fold((0, 0), |(read, written), fields| {
        let sectors = |position: usize| fields.get(position).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        if fields.get(2).is_some_and(|name| whole(name)) { (read + sectors(5) * 512, written + sectors(9) * 512) } else { (read, written) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_files() {
        let memory = Memory::parse("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  400 kB\n");
        assert_eq!((memory.total, memory.available), (1_024_000, 409_600));
        let cpu = Cpu::parse("cpu  10 1 2 1000 50 3 4 7 0 0\ncpu0 1 2\ncpu1 1 2\nintr 5\n");
        assert_eq!((cpu.count, cpu.busy_ms, cpu.steal_ms), (2, 200, 70));
        assert_eq!(load("0.15 1.02 12.00 1/100 42\n"), [15, 102, 1200]);
        let dev = "Inter-|\n face |bytes\n    lo: 9 0 0 0 0 0 0 0 9 0\n  eth0: 100 2 0 0 0 0 0 0 50 1\neth1:1 0 0 0 0 0 0 0 2 0\n";
        assert_eq!(network_bytes(dev), (101, 52));
        let disks =
            " 254 0 vda 5 0 8 1 3 0 16 1\n 254 1 vda1 5 0 8 1 3 0 16 1\n 259 0 nvme0n1 1 0 2 1 1 0 4 1\n 7 0 loop0 1 0 999 1 1 0 9 1\n";
        assert_eq!(disk_bytes(disks), (10 * 512, 20 * 512));
        assert_eq!(load(""), [0; 3]);
    }
}
