//! How a VM is shown.

use form_api::vm::{Health, PublishedPort, Vm, VmDetail, VmState};
use form_types::{limits::BitRate, size::GIB, size::MIB, spec::Protocol};
use jiff::Timestamp;

use crate::{
    cmd::volume::limits_text,
    ui::{Record, Table, age, bytes, labels},
};

/// Where the image would be named.
const OWN_KERNEL: &str = "(own kernel)";

/// `running (healthy)`, `running (not ready)`, `failed`.
pub fn status(vm: &Vm) -> String {
    let detail = match (vm.state, vm.ready, vm.health) {
        (VmState::Running, false, _) if vm.image.is_some() => "not ready",
        (VmState::Running, true, Health::Starting) => "health unknown",
        (VmState::Running, true, health @ (Health::Healthy | Health::Unhealthy)) => health.as_str(),
        _ => return vm.state.as_str().to_owned(),
    };
    format!("{} ({detail})", vm.state.as_str())
}

/// `8080->80/tcp`; `80/tcp` when other VMs alone reach it.
pub fn port(port: &PublishedPort) -> String {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    match port.host_port {
        Some(host) => format!("{host}->{}/{protocol}", port.port),
        None => format!("{}/{protocol}", port.port),
    }
}

fn ports(vm: &Vm) -> String {
    vm.ports.iter().map(port).collect::<Vec<_>>().join(", ")
}

fn text(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

pub fn table(vms: &[Vm]) -> Table {
    let usual = ["NAME", "STATUS", "IMAGE", "ADDRESS", "PORTS", "AGE"];
    let mut table = Table::new(&usual, &["IPV6", "HOST", "VCPUS", "MEMORY", "DISK", "RESTARTS", "ID", "FAULT"]);
    let now = Timestamp::now();
    for vm in vms {
        table.row([
            vm.name.to_string(),
            status(vm),
            vm.image.as_ref().map_or_else(|| OWN_KERNEL.to_owned(), ToString::to_string),
            text(vm.ipv4),
            ports(vm),
            age(vm.created_at, now),
            text(vm.ipv6),
            vm.host_name.clone(),
            vm.vcpus.to_string(),
            bytes(vm.memory_mib * MIB),
            text(vm.image.as_ref().map(|_| bytes(vm.disk_gib * GIB))),
            vm.restarts.to_string(),
            vm.id.short(),
            text(vm.fault.as_ref()),
        ]);
    }
    table
}

/// `512 MiB`; `512 MiB (its guest has 640 MiB)`.
fn memory(detail: &VmDetail) -> String {
    let should = bytes(detail.vm.memory_mib * MIB);
    match detail.memory_present_mib {
        Some(present) => format!("{should} (its guest has {})", bytes(present * MIB)),
        None => should,
    }
}

pub fn record(detail: &VmDetail) -> Record {
    let vm = &detail.vm;
    let own = detail.desired.cmdline();
    let record = Record::new(vm.name.to_string())
        .field("name", &vm.name)
        .field("status", status(vm))
        .optional("fault", vm.fault.as_ref())
        .optional("description", detail.desired.spec.description.as_ref())
        .optional("image", vm.image.as_ref())
        .optional("kernel", own.map(|_| detail.desired.kernel.short()))
        .optional("command line", own)
        .optional("address", vm.ipv4)
        .optional("ipv6", vm.ipv6)
        .optional("mac", own.and(detail.interfaces.first()).map(|interface| &interface.mac))
        .field("dns", &vm.dns_name)
        .field("ports", ports(vm))
        .field("vcpus", vm.vcpus)
        .field("memory", memory(detail))
        .optional("disk", vm.image.as_ref().map(|_| bytes(vm.disk_gib * GIB)))
        .optional("disk limits", limits_text(detail.limits.disk))
        .optional("net limit", detail.limits.net_bytes_per_second.map(|bytes| format!("{} each way", BitRate::of_bytes(bytes))))
        .field("labels", labels(&vm.labels))
        .field("created", vm.created_at)
        .optional("started", vm.started_at)
        .field("restarts", vm.restarts)
        .field("host", &vm.host_name)
        .field("id", vm.id)
        .wide("image digest", text(vm.image_digest))
        .wide("kernel digest", detail.desired.kernel)
        .wide("host id", vm.host);
    let further = detail.interfaces.iter().skip(1).map(|interface| format!("{} {} {}", interface.name, interface.ipv4, interface.ipv6));
    let further: Vec<String> = further.collect();
    let record = if further.is_empty() { record } else { record.field("interfaces", further.join("\n")) };
    let Some(guest) = &detail.guest else { return record };
    let devices: Vec<String> =
        guest.devices.iter().map(|device| format!("{} {} {}", device.path, device.serial, bytes(device.size_bytes))).collect();
    record
        .field("guest kernel", &guest.kernel)
        .field("guest faults", guest.faults.join("\n"))
        .wide("guest name", &guest.hostname)
        .wide("guest addresses", guest.addresses.join("\n"))
        .wide("guest devices", devices.join("\n"))
}

/// Where to find it, in one line each: what a deploy ends with.
pub fn found_at(vm: &Vm, host: &str) -> Vec<String> {
    let mut lines = vec![format!("{}  {}", vm.name, status(vm))];
    if let Some(address) = vm.ipv4 {
        lines.push(format!("  address  {address}  ({})", vm.dns_name));
    }
    if let Some(address) = vm.ipv6 {
        lines.push(format!("  ipv6     {address}"));
    }
    for published in &vm.ports {
        let place = match (published.host_port, vm.ipv4) {
            (Some(port), _) => format!("  ({host}:{port})"),
            (None, _) => String::new(),
        };
        lines.push(format!("  port     {}{place}", port(published)));
    }
    lines
}
