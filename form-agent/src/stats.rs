//! What the VMs of this host use: asked anew each time, kept nowhere.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use form_api::{
    stats::{DiskRates, DiskStats, NetworkBackend, NetworkRates, NetworkStats, VmStats},
    vm::VmState,
};
use form_guest::protocol::{Metrics as GuestMetrics, Reply, Request};
use form_net::tap::Traffic;
use form_types::VmId;
use form_vmm::control::{Client, Metrics, NetworkMetrics};
use futures_util::{
    future::join_all,
    stream::{self, StreamExt},
};
use jiff::Timestamp;

use crate::{
    agent::Agent,
    cgroup,
    desired::{self, DesiredVm},
    driver::{guest, process::RuntimeDirectory},
    fleet::Observed,
    interface,
};

/// How long a VM process, and then its guest, may take to say.
const LIMIT: Duration = Duration::from_secs(2);

/// The kernel counts processor time in hundredths of a second (`USER_HZ`) on every architecture of ours.
const TICK_US: u64 = 10_000;

const PAGE: u64 = 4096;

/// VM processes that are asked at the same time.
const AT_ONCE: usize = 16;

/// One look at a VM process.
#[derive(Clone, Debug)]
struct Look {
    at: Instant,
    cpu_us: u64,
    resident: u64,
    metrics: Metrics,
}

/// The VMs of this host, by name.
pub fn all_vms(agent: &Agent) -> Vec<DesiredVm> {
    let mut vms: Vec<DesiredVm> = desired::vms(&agent.view()).into_values().filter(|vm| vm.host == agent.host_id()).collect();
    vms.sort_by(|one, other| one.name().cmp(other.name()));
    vms
}

/// What each of `vms` uses; with an interval two looks at all of them, and rates.
pub async fn of(agent: &Arc<Agent>, vms: Vec<DesiredVm>, interval: Option<Duration>) -> Vec<VmStats> {
    let before = match interval {
        Some(interval) => {
            let before = look_at(agent, &vms).await;
            tokio::time::sleep(interval).await;
            before
        }
        None => vms.iter().map(|_| None).collect(),
    };
    let (after, guests) = tokio::join!(look_at(agent, &vms), join_all(vms.iter().map(|vm| ask_guest(agent, vm))));
    let looks = before.iter().zip(&after).zip(guests);
    vms.iter().zip(looks).map(|(vm, ((before, after), guest))| stats(agent, vm, before.as_ref(), after.as_ref(), guest)).collect()
}

async fn look_at(agent: &Arc<Agent>, vms: &[DesiredVm]) -> Vec<Option<Look>> {
    let looks = vms.iter().map(|vm| {
        let (agent, id) = (Arc::clone(agent), vm.id);
        async move { tokio::task::spawn_blocking(move || look(&agent, &id)).await.unwrap_or_default() }
    });
    // A VM process that does not answer holds up few others, and few threads are made.
    stream::iter(looks.collect::<Vec<_>>()).buffered(AT_ONCE).collect().await
}

fn look(agent: &Agent, vm: &VmId) -> Option<Look> {
    let directory = RuntimeDirectory::new(&agent.paths().vm_runtime(), vm);
    let mut metrics = Client::connect(&directory.control()).ok()?.with_timeout(LIMIT).metrics().ok()?;
    count_all(agent, vm, &mut metrics.networks);
    let pid = directory.read_record()?.pid;
    let cpu_us = cgroup::cpu_us(&agent.host_id().mark(), vm).or_else(|| process_cpu_us(pid))?;
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let resident = statm.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()? * PAGE;
    Some(Look { at: Instant::now(), cpu_us, resident, metrics })
}

/// The VM process sees only the packets that it moves itself. Where the host's kernel can take its place, or could until it failed, and whether or not
/// it does now, the tap's own counters tell of all, since it was made for this process.
fn count_all(agent: &Agent, vm: &VmId, networks: &mut [NetworkMetrics]) {
    for network in networks.iter_mut().filter(|network| network.vhost_net.is_some()) {
        let Some(number) = interface::number_of(&network.id) else { continue };
        let id = if number == 0 { *vm } else { interface::id_of(vm, number) };
        let Some(traffic) = Traffic::of_vm(&agent.network.tap_name(&id)) else { continue };
        network.received_bytes = traffic.received_bytes;
        network.sent_bytes = traffic.sent_bytes;
        network.received_packets = traffic.received_packets;
        network.sent_packets = traffic.sent_packets;
    }
}

/// User and system time of all threads (proc_pid_stat(5), fields 14 and 15).
fn process_cpu_us(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((user + system) * TICK_US)
}

async fn ask_guest(agent: &Agent, vm: &DesiredVm) -> Option<GuestMetrics> {
    agent.fleet.observed(&vm.id).filter(|observed| observed.state == VmState::Running && vm.request.has_guest())?;
    let control = RuntimeDirectory::new(&agent.paths().vm_runtime(), &vm.id).control();
    match guest::ask(&control, &Request::Metrics, LIMIT).await {
        Ok(Reply::Metrics(metrics)) => Some(metrics),
        _ => None,
    }
}

fn stats(agent: &Agent, vm: &DesiredVm, before: Option<&Look>, after: Option<&Look>, guest: Option<GuestMetrics>) -> VmStats {
    let observed = agent.fleet.observed(&vm.id).unwrap_or_else(Observed::new);
    let resources = &vm.request.spec.resources;
    let used = guest.map(|guest| (guest.memory_total_bytes.saturating_sub(guest.memory_available_bytes), guest.memory_total_bytes));
    let mut stats = VmStats {
        id: vm.id,
        name: vm.name().clone(),
        state: observed.state,
        at: Timestamp::now(),
        vcpus: resources.vcpus,
        uptime_ms: 0,
        cpu_ms: 0,
        cpu_percent: None,
        memory_bytes: resources.memory_mib << 20,
        memory_used_bytes: used.map(|(used, _)| used),
        memory_percent: used.filter(|(_, total)| *total > 0).map(|(used, total)| used as f64 * 100.0 / total as f64),
        resident_bytes: 0,
        exits: 0,
        exits_per_second: None,
        restarts: observed.restarts,
        disks: Vec::new(),
        networks: Vec::new(),
    };
    if let Some(after) = after {
        fill(&mut stats, before, after);
    }
    stats
}

/// Counters of the later look, and rates when the earlier one was at the same run.
fn fill(stats: &mut VmStats, before: Option<&Look>, after: &Look) {
    let before = before.filter(|before| before.metrics.uptime_ms <= after.metrics.uptime_ms && before.at < after.at);
    let seconds = before.map(|before| (after.at - before.at).as_secs_f64());
    let rate = |earlier: Option<u64>, later: u64| Some(later.saturating_sub(earlier?) as f64 / seconds?);
    let per_second = |earlier: u64, later: u64| later.saturating_sub(earlier) as f64 / seconds.unwrap_or(f64::INFINITY);
    stats.uptime_ms = after.metrics.uptime_ms;
    stats.cpu_ms = after.cpu_us / 1000;
    stats.cpu_percent = rate(before.map(|before| before.cpu_us), after.cpu_us).map(|us| us / 10_000.0);
    stats.resident_bytes = after.resident;
    stats.memory_bytes = after.metrics.memory.map_or(stats.memory_bytes, |memory| memory.present_mib << 20);
    stats.exits = after.metrics.vcpu_exits;
    stats.exits_per_second = rate(before.map(|before| before.metrics.vcpu_exits), after.metrics.vcpu_exits);
    let disks = after.metrics.disks.iter().map(|disk| DiskStats {
        id: disk.id.clone(),
        reads: disk.reads,
        writes: disk.writes,
        flushes: disk.flushes,
        errors: disk.errors,
        read_bytes: disk.read_bytes,
        written_bytes: disk.written_bytes,
        io_uring: disk.io_uring,
        per_second: before.and_then(|before| before.metrics.disks.iter().find(|earlier| earlier.id == disk.id)).map(|earlier| DiskRates {
            reads: per_second(earlier.reads, disk.reads),
            writes: per_second(earlier.writes, disk.writes),
            read_bytes: per_second(earlier.read_bytes, disk.read_bytes),
            written_bytes: per_second(earlier.written_bytes, disk.written_bytes),
        }),
    });
    let networks = after.metrics.networks.iter().map(|network| NetworkStats {
        id: network.id.clone(),
        backend: Some(if network.vhost_net == Some(true) { NetworkBackend::VhostNet } else { NetworkBackend::FormVmm }),
        received_bytes: network.received_bytes,
        sent_bytes: network.sent_bytes,
        received_packets: network.received_packets,
        sent_packets: network.sent_packets,
        dropped_packets: network.dropped,
        per_second: before.and_then(|before| before.metrics.networks.iter().find(|earlier| earlier.id == network.id)).map(|earlier| {
            NetworkRates {
                received_bytes: per_second(earlier.received_bytes, network.received_bytes),
                sent_bytes: per_second(earlier.sent_bytes, network.sent_bytes),
                received_packets: per_second(earlier.received_packets, network.received_packets),
                sent_packets: per_second(earlier.sent_packets, network.sent_packets),
            }
        }),
    });
    (stats.disks, stats.networks) = (disks.collect(), networks.collect());
}

#[cfg(test)]
pub mod tests {
    use form_vmm::control::DiskMetrics;

    use super::*;

    /// Of a VM that does not run.
    pub fn empty(name: &str) -> VmStats {
        VmStats {
            id: VmId::from_bytes([1; 16]),
            name: name.parse().unwrap(),
            state: VmState::Stopped,
            at: Timestamp::UNIX_EPOCH,
            vcpus: 1,
            uptime_ms: 0,
            cpu_ms: 0,
            cpu_percent: None,
            memory_bytes: 512 << 20,
            memory_used_bytes: None,
            memory_percent: None,
            resident_bytes: 0,
            exits: 0,
            exits_per_second: None,
            restarts: 0,
            disks: Vec::new(),
            networks: Vec::new(),
        }
    }

    fn look(at: Instant, uptime_ms: u64, count: u64) -> Look {
        let disk = DiskMetrics { id: "root".to_owned(), reads: count, read_bytes: count * 4096, ..DiskMetrics::default() };
        let network = NetworkMetrics { id: "eth0".to_owned(), sent_packets: count, ..NetworkMetrics::default() };
        let metrics = Metrics { uptime_ms, vcpu_exits: count, disks: vec![disk], networks: vec![network], ..Metrics::default() };
        Look { at, cpu_us: count * 1000, resident: 5 << 20, metrics }
    }

    pub fn filled(name: &str) -> VmStats {
        let start = Instant::now();
        let mut stats = empty(name);
        fill(&mut stats, Some(&look(start, 1000, 100)), &look(start + Duration::from_secs(2), 3000, 1100));
        stats
    }

    #[test]
    fn rates_are_of_the_time_between_two_looks() {
        let stats = filled("web");
        // 1000 times 1 ms of processor time in two seconds.
        assert_eq!((stats.cpu_ms, stats.cpu_percent), (1100, Some(50.0)));
        assert_eq!((stats.exits, stats.exits_per_second), (1100, Some(500.0)));
        let disk = stats.disks[0].per_second.unwrap();
        assert_eq!((disk.reads, disk.read_bytes, disk.writes), (500.0, 500.0 * 4096.0, 0.0));
        assert_eq!(stats.networks[0].per_second.unwrap().sent_packets, 500.0);
    }

    #[test]
    fn a_restart_between_two_looks_gives_no_rates() {
        let start = Instant::now();
        let mut stats = empty("web");
        fill(&mut stats, Some(&look(start, 90_000, 5000)), &look(start + Duration::from_secs(1), 300, 10));
        assert_eq!((stats.exits, stats.exits_per_second, stats.cpu_percent), (10, None, None));
        assert!(stats.disks[0].per_second.is_none() && stats.networks[0].per_second.is_none());
    }

    #[test]
    fn processor_time_of_this_process() {
        let begin = process_cpu_us(std::process::id() as i32).unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while process_cpu_us(std::process::id() as i32).unwrap() < begin + 2 * TICK_US {
            assert!(Instant::now() < until, "no processor time is counted");
        }
        assert!(process_cpu_us(i32::MAX).is_none());
    }
}
