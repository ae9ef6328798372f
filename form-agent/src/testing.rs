//! Values that several unit tests need.

use form_api::deploy::{Boot, DeployRequest};
use form_types::{Digest, HostId, SecretKey, VmId, VmLimits, spec};
use jiff::Timestamp;

use crate::desired::{DesiredVm, Run};

pub fn request(name: &str) -> DeployRequest {
    let spec = spec::Spec {
        name: name.parse().unwrap(),
        description: None,
        from: "debian:12".to_owned(),
        args: Default::default(),
        steps: Vec::new(),
        resources: spec::Resources { vcpus: 1, memory_mib: 512, disk_gib: 5, gpus: Vec::new() },
        users: Vec::new(),
        run_as: None,
        env: Vec::new(),
        workdir: None,
        entrypoint: vec!["/bin/app".to_owned()],
        cmd: Vec::new(),
        ports: vec![spec::Port { port: 80, protocol: spec::Protocol::Tcp, host_port: Some(8080) }],
        volumes: Vec::new(),
        networks: Vec::new(),
        replicas: 1,
        restart: spec::Restart { policy: spec::RestartPolicy::Always, max_retries: None },
        healthcheck: None,
        labels: Default::default(),
        model: None,
    };
    DeployRequest { spec, passwd_hashes: Default::default(), boot: Boot::Image(Digest::of(b"image")), kernel: Digest::of(b"kernel") }
}

/// A VM that should run, started once.
/// Of a VM that runs a kernel of its own.
pub fn own_kernel(name: &str) -> DeployRequest {
    let spec = spec::Spec::of_own_kernel(name.parse().unwrap(), 1, 512);
    let boot = Boot::Own { cmdline: "console=ttyS0".to_owned() };
    DeployRequest { spec, passwd_hashes: Default::default(), boot, kernel: Digest::of(b"own kernel") }
}

pub fn vm(name: &str) -> DesiredVm {
    DesiredVm {
        id: VmId::from_bytes([1; 16]),
        host: HostId::from_bytes([2; 16]),
        epoch: 1,
        run: Run::Running,
        starts: 1,
        resets: 0,
        restore: None,
        ipv4: [10, 64, 0, 2].into(),
        actor: SecretKey::from_bytes([3; 32]).public(),
        created_at: Timestamp::UNIX_EPOCH,
        request: request(name),
        interfaces: std::collections::BTreeMap::new(),
        limits: VmLimits::default(),
    }
}
