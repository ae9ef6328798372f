//! What is measured, and `/metrics` in Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4), with names as its
//! conventions want them: base units, counters end in `_total`. Pure.

use std::{fmt::Write, sync::Arc};

use form_api::{
    ApiError, ErrorCode,
    host::Host,
    stats::{DiskStats, NetworkStats, VmStats},
    vm::VmState,
};

use crate::{agent::Agent, operation::Counts, stats};

/// What HTTP calls it.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Counter,
    Gauge,
}

/// Values of one name.
#[derive(Debug)]
pub struct Family {
    pub kind: Kind,
    pub name: &'static str,
    pub help: &'static str,
    /// Never empty.
    pub samples: Vec<Sample>,
}

#[derive(Debug)]
pub struct Sample {
    pub labels: Vec<(&'static str, String)>,
    pub value: f64,
}

#[derive(Default)]
struct Families(Vec<Family>);

impl Families {
    fn family<'a>(
        &mut self,
        kind: Kind,
        name: &'static str,
        help: &'static str,
        samples: impl IntoIterator<Item = (Vec<(&'static str, &'a str)>, f64)>,
    ) {
        let own = |labels: Vec<(&'static str, &str)>| labels.into_iter().map(|(label, value)| (label, value.to_owned())).collect();
        let samples: Vec<Sample> = samples.into_iter().map(|(labels, value)| Sample { labels: own(labels), value }).collect();
        if !samples.is_empty() {
            self.0.push(Family { kind, name, help, samples });
        }
    }
}

/// The whole page.
pub fn page(families: &[Family]) -> String {
    let mut page = String::new();
    for Family { kind, name, help, samples } in families {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        // Writing into a string does not fail.
        let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for Sample { labels, value } in samples {
            let labels: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let _ = writeln!(page, "{name}{labels} {value}");
        }
    }
    page
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Looks at the host and its VMs.
///
/// # Errors
/// When the host cannot be looked at.
pub async fn of(agent: &Arc<Agent>) -> Result<Vec<Family>, ApiError> {
    let vms = stats::of(agent, stats::all_vms(agent), None).await;
    let host_agent = Arc::clone(agent);
    let host = tokio::task::spawn_blocking(move || host_agent.host()).await;
    let host = host.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))??;
    Ok(families(&host, &agent.operations.counts(), &vms))
}

/// All there is.
fn families(host: &Host, counts: &Counts, vms: &[VmStats]) -> Vec<Family> {
    use Kind::{Counter, Gauge};
    let mut families = Families::default();
    let mib = |mib: u64| (mib << 20) as f64;
    let mut one = |kind, name: &'static str, help: &'static str, value: f64| families.family(kind, name, help, [(Vec::new(), value)]);
    one(Gauge, "form_agent_start_time_seconds", "When the agent was started, in seconds since 1970.", host.started_at.as_second() as f64);
    one(Gauge, "form_host_vcpus", "Processors of the host.", f64::from(host.vcpus_total));
    one(Gauge, "form_host_vcpus_allocated", "Virtual processors given to VMs.", f64::from(host.vcpus_allocated));
    one(Gauge, "form_host_memory_bytes", "Memory that VMs may have.", mib(host.memory_total_mib));
    one(Gauge, "form_host_memory_allocated_bytes", "Memory given to VMs.", mib(host.memory_allocated_mib));
    one(Gauge, "form_host_disk_bytes", "Size of the file system with images and disks.", host.disk_total_bytes as f64);
    one(Gauge, "form_host_disk_free_bytes", "What is free of it.", host.disk_free_bytes as f64);
    one(Gauge, "form_host_vms", "VMs of the host.", f64::from(host.vms));
    one(Gauge, "form_operations_executing", "Operations under way.", counts.executing as f64);
    families.family(Gauge, "form_build_info", "The agent's version.", [(vec![("version", host.version.as_str())], 1.0)]);
    let ended = [(vec![("status", "completed")], counts.completed as f64), (vec![("status", "failed")], counts.failed as f64)];
    families.family(Counter, "form_operations_total", "Operations that have ended.", ended);
    vm_families(&mut families, vms);
    device_families(&mut families, vms);
    families.0
}

fn vm_families(families: &mut Families, vms: &[VmStats]) {
    use Kind::{Counter, Gauge};
    let mut each = |kind, name: &'static str, help: &'static str, value: &dyn Fn(&VmStats) -> Option<f64>| {
        families.family(kind, name, help, vms.iter().filter_map(|vm| Some((vec![("vm", vm.name.as_str())], value(vm)?))));
    };
    // Counters of a VM that does not run are not zero, they are not there.
    let running = |value: fn(&VmStats) -> f64| move |vm: &VmStats| (vm.uptime_ms > 0).then(|| value(vm));
    each(Gauge, "form_vm_running", "1 while the VM runs.", &|vm| Some(f64::from(u8::from(vm.state == VmState::Running))));
    each(Gauge, "form_vm_paused", "1 while the VM is paused.", &|vm| Some(f64::from(u8::from(vm.state == VmState::Paused))));
    each(Gauge, "form_vm_vcpus", "Virtual processors of the VM.", &|vm| Some(f64::from(vm.vcpus)));
    each(Gauge, "form_vm_memory_bytes", "Memory given to the VM.", &|vm| Some(vm.memory_bytes as f64));
    each(Gauge, "form_vm_memory_used_bytes", "Memory in use, as the guest says.", &|vm| Some(vm.memory_used_bytes? as f64));
    each(Gauge, "form_vm_resident_memory_bytes", "Memory of the host that the VM takes.", &running(|vm| vm.resident_bytes as f64));
    each(Gauge, "form_vm_uptime_seconds", "How long the VM has run.", &running(|vm| vm.uptime_ms as f64 / 1000.0));
    each(
        Counter,
        "form_vm_cpu_seconds_total",
        "Processor time of the host that the VM has taken.",
        &running(|vm| vm.cpu_ms as f64 / 1000.0),
    );
    each(Counter, "form_vm_exits_total", "Exits of virtual processors to the VM process.", &running(|vm| vm.exits as f64));
    each(Counter, "form_vm_restarts_total", "Starts that nobody asked for.", &|vm| Some(f64::from(vm.restarts)));
}

fn device_families(families: &mut Families, vms: &[VmStats]) {
    let mut disks = |name: &'static str, help: &'static str, value: fn(&DiskStats) -> u64| {
        let of_one = |vm: &'_ VmStats| -> Vec<_> { vm.disks.iter().map(|disk| (disk.id.clone(), value(disk) as f64)).collect() };
        let all: Vec<_> = vms.iter().flat_map(|vm| of_one(vm).into_iter().map(move |(id, value)| (vm.name.as_str(), id, value))).collect();
        let samples = all.iter().map(|(vm, id, value)| (vec![("vm", *vm), ("disk", id.as_str())], *value));
        families.family(Kind::Counter, name, help, samples);
    };
    disks("form_vm_disk_reads_total", "Read requests.", |disk| disk.reads);
    disks("form_vm_disk_writes_total", "Write requests.", |disk| disk.writes);
    disks("form_vm_disk_flushes_total", "Flush requests.", |disk| disk.flushes);
    disks("form_vm_disk_errors_total", "Requests that failed.", |disk| disk.errors);
    disks("form_vm_disk_read_bytes_total", "Bytes read.", |disk| disk.read_bytes);
    disks("form_vm_disk_written_bytes_total", "Bytes written.", |disk| disk.written_bytes);
    let mut networks = |name: &'static str, help: &'static str, value: fn(&NetworkStats) -> u64| {
        let of_one =
            |vm: &'_ VmStats| -> Vec<_> { vm.networks.iter().map(|network| (network.id.clone(), value(network) as f64)).collect() };
        let all: Vec<_> = vms.iter().flat_map(|vm| of_one(vm).into_iter().map(move |(id, value)| (vm.name.as_str(), id, value))).collect();
        let samples = all.iter().map(|(vm, id, value)| (vec![("vm", *vm), ("interface", id.as_str())], *value));
        families.family(Kind::Counter, name, help, samples);
    };
    networks("form_vm_network_receive_bytes_total", "Bytes that the guest received.", |network| network.received_bytes);
    networks("form_vm_network_transmit_bytes_total", "Bytes that the guest sent.", |network| network.sent_bytes);
    networks("form_vm_network_receive_packets_total", "Packets that the guest received.", |network| network.received_packets);
    networks("form_vm_network_transmit_packets_total", "Packets that the guest sent.", |network| network.sent_packets);
    networks("form_vm_network_dropped_packets_total", "Packets that were dropped.", |network| network.dropped_packets);
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use form_types::{ClusterId, HostId, SecretKey};
    use jiff::Timestamp;

    use super::*;
    use crate::stats::tests::{empty, filled};

    fn host() -> Host {
        Host {
            id: HostId::from_bytes([1; 16]),
            name: "den".to_owned(),
            public_key: SecretKey::from_bytes([1; 32]).public(),
            cluster: ClusterId::from_bytes([2; 16]),
            version: "0.1.0".to_owned(),
            kernel: "6.1".to_owned(),
            owner: None,
            started_at: Timestamp::UNIX_EPOCH,
            now: Timestamp::UNIX_EPOCH,
            vcpus_total: 4,
            vcpus_allocated: 2,
            memory_total_mib: 1024,
            memory_allocated_mib: 512,
            disk_total_bytes: 1 << 40,
            disk_free_bytes: 1 << 39,
            vms: 2,
            max_vms: 250,
        }
    }

    fn whole_page() -> String {
        let counts = Counts { total: 5, completed: 3, failed: 1, executing: 1 };
        page(&families(&host(), &counts, &[filled("web"), empty("db")]))
    }

    #[test]
    fn samples_carry_their_labels() {
        let page = whole_page();
        for line in [
            r#"form_vm_cpu_seconds_total{vm="web"} 1.1"#,
            r#"form_vm_disk_read_bytes_total{vm="web",disk="root"} 4505600"#,
            r#"form_vm_network_transmit_packets_total{vm="web",interface="eth0"} 1100"#,
            r#"form_vm_running{vm="db"} 0"#,
            r#"form_operations_total{status="failed"} 1"#,
            "form_host_memory_bytes 1073741824",
        ] {
            assert!(page.lines().any(|found| found == line), "{line} is missing in\n{page}");
        }
        assert!(!page.contains(r#"form_vm_cpu_seconds_total{vm="db"}"#), "a VM that does not run has no counters");
        assert_eq!(escaped("a\"b\\c\nd"), r#"a\"b\\c\nd"#);
    }

    /// promtool comes with Debian's package `prometheus`.
    #[test]
    fn promtool_finds_nothing_wrong() {
        let mut promtool = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("promtool of the package prometheus: run `make packages`");
        promtool.stdin.take().unwrap().write_all(whole_page().as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
    }
}
