//! Whether a host can take a VM, and why not. Pure.

use std::collections::BTreeMap;

use form_api::{ApiError, ErrorCode, deploy::DeployRequest};
use form_types::{
    Name, Spec,
    spec::{Protocol, Resources},
};
use form_vmm::layout::CMDLINE_MAX;

use crate::{desired, headroom, label};

/// What the host has, and what is taken already by the other VMs.
#[derive(Clone, Debug, Default)]
pub struct Capacity {
    pub machine_vcpus: u32,
    pub vcpu_overcommit: u32,
    pub vcpus_taken: u32,
    /// Less what the host keeps for itself.
    pub memory_mib: u64,
    pub memory_taken_mib: u64,
    pub disk_free_bytes: u64,
    pub vms: u32,
    pub max_vms: u32,
    /// Published by other VMs.
    pub ports_taken: Vec<(Protocol, u16, Name)>,
}

/// Whether the request is one that a Formfile could have made: the parser checks the same for those who use it.
///
/// # Errors
/// `invalid`, naming the field.
pub fn check_valid(request: &DeployRequest) -> Result<(), ApiError> {
    let spec = &request.spec;
    let Resources { vcpus, memory_mib, disk_gib, .. } = spec.resources;
    let ranges = [
        ("vcpus", u64::from(vcpus), u64::from(*Resources::VCPUS.start())..=u64::from(*Resources::VCPUS.end())),
        ("memory_mib", memory_mib, desired::memory_of(request)),
        ("disk_gib", disk_gib, if request.has_guest() { Resources::DISK_GIB } else { 0..=0 }),
    ];
    for (field, value, range) in ranges {
        if !range.contains(&value) {
            let message = format!("resources.{field} is {value}: it must be between {} and {}", range.start(), range.end());
            return Err(ApiError::new(ErrorCode::Invalid, message));
        }
    }
    if spec.ports.iter().any(|port| port.port == 0 || port.host_port == Some(0)) {
        return Err(ApiError::new(ErrorCode::Invalid, "there is no port 0: ports are from 1 to 65535"));
    }
    if spec.replicas == 0 {
        return Err(ApiError::new(ErrorCode::Invalid, "replicas is 0: ask for 1, or destroy the VM"));
    }
    request.cmdline().map_or(Ok(()), |cmdline| check_own_kernel(request, cmdline))
}

/// Whether its labels are such as it may have that has those of `before`.
///
/// # Errors
/// `invalid`, with what is possible.
pub fn check_labels(request: &DeployRequest, before: Option<&DeployRequest>) -> Result<(), ApiError> {
    let none = BTreeMap::new();
    label::check_change(before.map_or(&none, |before| &before.spec.labels), &request.spec.labels)
}

/// What a kernel that knows nothing of us would not do is refused, never passed over.
fn check_own_kernel(request: &DeployRequest, cmdline: &str) -> Result<(), ApiError> {
    let invalid = |text: String| Err(ApiError::new(ErrorCode::Invalid, text));
    let DeployRequest { spec, passwd_hashes, .. } = request;
    let mut known = Spec::of_own_kernel(spec.name.clone(), spec.resources.vcpus, spec.resources.memory_mib);
    known.description.clone_from(&spec.description);
    known.ports.clone_from(&spec.ports);
    known.replicas = spec.replicas;
    known.restart.clone_from(&spec.restart);
    known.labels.clone_from(&spec.labels);
    if known != *spec || !passwd_hashes.is_empty() {
        let has = "description, vCPUs, memory, ports, restart policy and labels";
        return invalid(format!("of a spec a VM that runs a kernel of its own has name, {has}: the rest is for Formation's guest"));
    }
    if cmdline.len() >= CMDLINE_MAX {
        return invalid(format!("the kernel's command line has {} bytes: {} are possible", cmdline.len(), CMDLINE_MAX - 1));
    }
    if cmdline.chars().any(char::is_control) {
        return invalid("the kernel's command line has a control character in it: it is one line".to_owned());
    }
    Ok(())
}

/// A Formfile may say what this version cannot run: that is refused here, never ignored.
///
/// # Errors
/// `unsupported`, naming the instruction.
pub fn check_supported(request: &DeployRequest) -> Result<(), ApiError> {
    let spec = &request.spec;
    let unsupported = |what: &str, hint: &str| Err(ApiError::new(ErrorCode::Unsupported, what).hint(hint));
    if spec.replicas != 1 {
        return unsupported("REPLICAS above 1 is not supported by this version", "deploy one instance a name");
    }
    if spec.networks.iter().any(|network| network.as_str() != "default") {
        return unsupported("NETWORK other than `default` is not supported by this version", "remove the NETWORK instruction");
    }
    if let Some(gpu) = spec.resources.gpus.first() {
        return unsupported(&format!("this host has no GPU {}", gpu.model), "remove the GPU instruction");
    }
    if spec.healthcheck.is_some() && spec.entrypoint.is_empty() && spec.cmd.is_empty() {
        return unsupported("HEALTHCHECK without ENTRYPOINT or CMD is not supported by this version", "remove the HEALTHCHECK instruction");
    }
    if spec.model.as_ref().is_some_and(|model| model.required) {
        return unsupported("MODEL required:… is not supported by this version", "use MODEL preferred:…, or remove it");
    }
    Ok(())
}

/// # Errors
/// `no-room` with the numbers, or `conflict` with the VM that has the port.
pub fn admit(request: &DeployRequest, is_new: bool, capacity: &Capacity) -> Result<(), ApiError> {
    let resources = &request.spec.resources;
    let no_room = |what: String, hint: &str| Err(ApiError::new(ErrorCode::NoRoom, what).hint(hint));
    if is_new && capacity.vms >= capacity.max_vms {
        return no_room(
            format!("the host runs {} VMs, and {} is its limit", capacity.vms, capacity.max_vms),
            "destroy one, or raise max_vms in agent.yaml",
        );
    }
    let vcpus = capacity.machine_vcpus.saturating_mul(capacity.vcpu_overcommit);
    if capacity.vcpus_taken.saturating_add(resources.vcpus) > vcpus {
        return no_room(
            format!("VCPU {} does not fit: {} of {vcpus} virtual CPUs are taken", resources.vcpus, capacity.vcpus_taken),
            "ask for fewer, or destroy another VM",
        );
    }
    let memory_free = capacity.memory_mib.saturating_sub(capacity.memory_taken_mib);
    if resources.memory_mib > memory_free {
        return no_room(
            format!("MEM {} MiB does not fit: {memory_free} of {} MiB are free for VMs", resources.memory_mib, capacity.memory_mib),
            "ask for less, or destroy another VM",
        );
    }
    // Disks are sparse: what counts is that there is room to begin with.
    if capacity.disk_free_bytes < headroom::LOW {
        return no_room(
            format!("the host's disk is full: {} MiB are free", capacity.disk_free_bytes >> 20),
            "free some: `form image prune` and `form image rm` remove images, `form destroy` VMs",
        );
    }
    for port in &request.spec.ports {
        let Some(host_port) = port.host_port else { continue };
        let taken = capacity.ports_taken.iter().find(|(protocol, taken, _)| (*protocol, *taken) == (port.protocol, host_port));
        if let Some((protocol, _, owner)) = taken {
            let what = format!("port {host_port}/{} of the host is published by vm/{owner}", protocol.as_str());
            return Err(ApiError::new(ErrorCode::Conflict, what).hint("publish another host port with EXPOSE HOSTPORT:PORT"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use form_api::deploy::Boot;
    use form_types::spec::Volume;

    use super::*;
    use crate::testing::request;

    fn roomy() -> Capacity {
        Capacity { machine_vcpus: 2, vcpu_overcommit: 4, memory_mib: 4096, disk_free_bytes: 1 << 30, max_vms: 10, ..Capacity::default() }
    }

    #[test]
    fn every_limit_refuses_with_its_reason() {
        let web = request("web");
        assert_eq!(admit(&web, true, &roomy()), Ok(()));
        let code = |capacity: Capacity| admit(&web, true, &capacity).map_err(|error| error.code);
        assert_eq!(code(Capacity { vms: 10, ..roomy() }), Err(ErrorCode::NoRoom));
        assert_eq!(code(Capacity { vcpus_taken: 8, ..roomy() }), Err(ErrorCode::NoRoom));
        assert_eq!(code(Capacity { memory_taken_mib: 3585, ..roomy() }), Err(ErrorCode::NoRoom));
        assert_eq!(code(Capacity { memory_taken_mib: 3584, ..roomy() }), Ok(()));
        assert_eq!(code(Capacity { disk_free_bytes: 1, ..roomy() }), Err(ErrorCode::NoRoom));
        let other: Name = "other".parse().unwrap();
        assert_eq!(code(Capacity { ports_taken: vec![(Protocol::Tcp, 8080, other.clone())], ..roomy() }), Err(ErrorCode::Conflict));
        assert_eq!(code(Capacity { ports_taken: vec![(Protocol::Udp, 8080, other)], ..roomy() }), Ok(()));
        // A VM that is there already does not count against max_vms when it changes.
        assert_eq!(admit(&web, false, &Capacity { vms: 10, ..roomy() }), Ok(()));
    }

    #[test]
    fn what_no_formfile_says_is_refused() {
        let changed = |change: fn(&mut form_types::Spec)| {
            let mut web = request("web");
            change(&mut web.spec);
            check_valid(&web).map_err(|error| error.code)
        };
        assert_eq!(changed(|_| {}), Ok(()));
        let wrong: [fn(&mut form_types::Spec); 7] = [
            |spec| spec.resources.vcpus = 0,
            |spec| spec.resources.vcpus = u32::MAX,
            |spec| spec.resources.memory_mib = 127,
            |spec| spec.resources.disk_gib = u64::MAX,
            |spec| spec.ports[0].port = 0,
            |spec| spec.ports[0].host_port = Some(0),
            |spec| spec.replicas = 0,
        ];
        for (number, change) in wrong.into_iter().enumerate() {
            assert_eq!(changed(change), Err(ErrorCode::Invalid), "{number}");
        }
    }

    #[test]
    fn an_own_kernel_has_no_more_than_it_can_use() {
        let own = crate::testing::own_kernel("web");
        assert_eq!(check_valid(&own), Ok(()));
        let changed = |change: fn(&mut DeployRequest)| {
            let mut own = own.clone();
            change(&mut own);
            check_valid(&own).map_err(|error| error.code)
        };
        let allowed: [fn(&mut DeployRequest); 4] = [
            |own| own.spec.resources.memory_mib = 16,
            |own| own.spec.ports = crate::testing::request("web").spec.ports,
            |own| drop(own.spec.labels.insert("a".to_owned(), "b".to_owned())),
            |own| own.boot = Boot::Own { cmdline: String::new() },
        ];
        assert!(allowed.into_iter().all(|change| changed(change) == Ok(())));
        let wrong: [fn(&mut DeployRequest); 8] = [
            |own| own.spec.resources.memory_mib = 15,
            |own| own.spec.resources.disk_gib = 5,
            |own| own.spec.entrypoint = vec!["/bin/sh".to_owned()],
            |own| own.spec.volumes = vec![Volume { name: "data".parse().unwrap(), path: "/data".to_owned(), size_bytes: None }],
            |own| drop(own.passwd_hashes.insert("ada".to_owned(), "$6$".to_owned())),
            |own| own.boot = Boot::Own { cmdline: "x".repeat(2048) },
            |own| own.boot = Boot::Own { cmdline: "a\nb".to_owned() },
            |own| own.boot = Boot::Own { cmdline: "a\0b".to_owned() },
        ];
        for (number, change) in wrong.into_iter().enumerate() {
            assert_eq!(changed(change), Err(ErrorCode::Invalid), "{number}");
        }
    }

    #[test]
    fn what_cannot_run_is_refused_by_name() {
        let mut web = request("web");
        web.spec.replicas = 2;
        assert!(check_supported(&web).unwrap_err().message.contains("REPLICAS"));
        let mut web = request("web");
        web.spec.networks = vec!["backend".parse().unwrap()];
        assert!(check_supported(&web).unwrap_err().message.contains("NETWORK"));
    }
}
