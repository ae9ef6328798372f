//! One value of each kind that travels, for the OpenAPI document. They are values of the types themselves, so that they cannot be wrong.

use std::net::{Ipv4Addr, Ipv6Addr};

use form_api::{
    ApiError, ErrorCode,
    deploy::{Boot, CreateVmRequest, DeployRequest, FieldChange, Plan, PlanAction, PlannedVm, RollbackRequest, VmVersion},
    error::ErrorBody,
    event::{Event, EventKind},
    exec::{ExecRequest, Terminal},
    host::{Check, CheckStatus, ClaimRequest, DoctorReport, Host},
    image::{
        BlocksReply, DamagedBlock, Image, ImageConfig, ImageSetRequest, ImportRequest, Kernel, Layer, ManifestReply, MissingReply,
        MissingRequest, ReadBlocksRequest, Verification,
    },
    interface::{DetachInterfaceRequest, Interface, InterfaceState},
    operation::{Operation, OperationKind, OperationStatus},
    pool::{PoolCreateRequest, PoolSetRequest},
    snapshot::{Consistency, MemoryKind, RestoreRequest, Snapshot, SnapshotRequest},
    stats::{DiskRates, DiskStats, HealthReport, NetworkBackend, NetworkRates, NetworkStats, PartHealth, VmStats},
    vm::{
        GuestDevice, GuestReport, Health, LogCursor, LogLine, LogStream, PublishedPort, SshAccess, SshServer, SshUser, Vm, VmDetail,
        VmState,
    },
    volume::{
        AttachRequest, Attachment, AttachmentState, CloneRequest, CreateRequest, DetachRequest, ExportRequest, MoveRequest, Pool, PoolKind,
        ResizeRequest, SetVolumeRequest, Volume, VolumeRestoreRequest, VolumeSnapshot, VolumeSnapshotRequest,
    },
};
use form_types::{
    ClusterId, Digest, DiskLimits, HostId, IdempotencyKey, ImageReference, Name, OperationId, SecretKey, Spec, VmId, VmLimits,
    VolumeFormat, VolumeId,
    spec::{Port, Protocol, Resources, Restart, RestartPolicy},
};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::operation::Asked;

/// The examples by the name of their schema.
pub fn all() -> Vec<(&'static str, Value)> {
    // A name that does not parse would leave the examples out; a test looks that they are there.
    make().unwrap_or_default()
}

/// The moment at which all of this happens.
fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_767_225_600 + second).unwrap_or_default()
}

fn owner() -> SecretKey {
    SecretKey::from_bytes([1; 32])
}

fn host_key() -> SecretKey {
    SecretKey::from_bytes([2; 32])
}

fn make() -> Option<Vec<(&'static str, Value)>> {
    let name: Name = "web".parse().ok()?;
    let operation = operation(&name);
    let failed = Operation {
        status: OperationStatus::Failed,
        error: Some(refusal().operation(operation.id)),
        finished_at: Some(at(3)),
        ..operation.clone()
    };
    let deploy = deploy(&name);
    let earlier = VmVersion {
        image: Some(ImageReference { name: name.clone(), version: Some(1) }),
        is_there: true,
        deployed_at: Some(at(-86_400)),
        request: DeployRequest { boot: Boot::Image(digest("earlier image")), ..deploy.clone() },
    };
    let vm = vm(&name);
    let limits = DiskLimits { iops: Some(500), bytes_per_second: Some(50 << 20) };
    let of_vm = VmLimits { disk: limits, net_bytes_per_second: Some(12_500_000) };
    let (of_guest, interfaces) = (Some(guest()), vec![interface(&vm)]);
    let detail = VmDetail { vm: vm.clone(), desired: deploy.clone(), limits: of_vm, memory_present_mib: None, interfaces, guest: of_guest };
    let event = Event {
        cursor: 42,
        at: at(2),
        kind: EventKind::VmReady,
        vm: Some(name.clone()),
        operation: Some(operation.id),
        message: "web is ready".to_owned(),
    };
    let line = LogLine {
        at: at(4),
        stream: LogStream::Stdout,
        line: "listening on 0.0.0.0:80".to_owned(),
        cursor: Some(LogCursor { run: at(1), sequence: 0 }),
    };
    let exec = ExecRequest {
        command: vec!["/bin/sh".to_owned()],
        env: [("LANG".to_owned(), "C.UTF-8".to_owned())].into(),
        user: Some("ada".to_owned()),
        workdir: None,
        terminal: Some(Terminal { rows: 24, columns: 80, kind: "xterm-256color".to_owned() }),
    };
    let copy: Name = "data-copy".parse().ok()?;
    let (data, local): (Name, Name) = ("data".parse().ok()?, "local".parse().ok()?);
    let create = CreateRequest { name: data.clone(), size_bytes: 20 << 30, format: VolumeFormat::Raw, pool: Some(local.clone()), limits };
    let attach = AttachRequest { vm: name.clone(), path: Some("/var/lib/data".to_owned()), read_only: false };
    let fast: Name = "fast".parse().ok()?;
    let before: Name = "before-upgrade".parse().ok()?;
    let import = ImportRequest { manifest: digest("manifest") };
    let kernel = Kernel {
        digest: digest("kernel"),
        release: "6.1.0-56-cloud-amd64".to_owned(),
        size_bytes: 91_226_112,
        needed_by: vec!["vm/web".to_owned()],
        kept_until: None,
    };
    Some(vec![
        ("ApiError", json!(refusal())),
        ("AttachRequest", json!(attach)),
        ("DetachInterfaceRequest", json!(DetachInterfaceRequest { force: false })),
        ("Interface", json!(interface(&vm))),
        ("DetachRequest", json!(DetachRequest { force: false })),
        ("BlocksReply", json!(BlocksReply { stored: 32 })),
        ("CloneRequest", json!(CloneRequest { name: copy, snapshot: None, size_bytes: None })),
        ("CreateRequest", json!(create)),
        ("ClaimRequest", json!(ClaimRequest { secret: "5d".repeat(32) })),
        ("CreateVmRequest", json!(CreateVmRequest { vm: deploy.clone(), start: true, disk_of: None, fork_of: None, volumes: Vec::new() })),
        ("DeployRequest", json!(deploy)),
        ("ImageConfig", json!(image_config(&name))),
        ("DoctorReport", json!(doctor())),
        ("ErrorBody", json!(ErrorBody { error: refusal() })),
        ("Event", json!(event)),
        ("ExecRequest", json!(exec)),
        ("ExportRequest", json!(ExportRequest { writable: true, listen: Some("127.0.0.1:10809".parse().ok()?), client_certificate: None })),
        ("HealthReport", json!(health())),
        ("Host", json!(host())),
        ("Image", json!(image(&name))),
        ("ImageSetRequest", json!(image_set())),
        ("ImportRequest", json!(import)),
        ("Kernel", json!(kernel)),
        ("LogLine", json!(line)),
        ("MissingReply", json!(MissingReply { missing: vec![digest("block")] })),
        ("ManifestReply", json!(ManifestReply { bytes: 1_048_576 })),
        ("MissingRequest", json!(MissingRequest { blocks: vec![digest("block"), digest("another block")] })),
        ("Operation", json!(failed)),
        ("Plan", json!(plan(&name))),
        ("Pool", json!(pool(&local))),
        ("MoveRequest", json!(MoveRequest { pool: fast.clone() })),
        ("PoolCreateRequest", json!(pool_create(fast))),
        ("PoolSetRequest", json!(pool_set())),
        ("ReadBlocksRequest", json!(ReadBlocksRequest { blocks: vec![0, 1, 17] })),
        ("ResizeRequest", json!(ResizeRequest { size_bytes: 40 << 30 })),
        ("RestoreRequest", json!(RestoreRequest { snapshot: before.clone() })),
        ("RollbackRequest", json!(RollbackRequest { to: earlier.request.clone() })),
        ("SetVolumeRequest", json!(SetVolumeRequest { iops: Some(Some(500)), bytes_per_second: Some(None) })),
        ("Snapshot", json!(snapshot(&before, &data, &vm))),
        ("SnapshotRequest", json!(SnapshotRequest { name: Some(before.clone()), compress: true })),
        ("Spec", json!(spec(&name))),
        ("SshAccess", json!(ssh_access(&vm))),
        ("Verification", json!(verification(&name))),
        ("Vm", json!(vm)),
        ("VmDetail", json!(detail)),
        ("VmVersion", json!(earlier)),
        ("VmStats", json!(stats(&vm))),
        ("Volume", json!(volume(&data, &local, &name))),
        ("VolumeRestoreRequest", json!(VolumeRestoreRequest { snapshot: before.clone(), size_bytes: Some(10 << 30) })),
        ("VolumeSnapshot", json!(volume_snapshot(&before, volume(&data, &local, &name)))),
        ("VolumeSnapshotRequest", json!(VolumeSnapshotRequest { name: Some(before) })),
    ])
}

fn ssh_access(vm: &Vm) -> SshAccess {
    SshAccess {
        vm: vm.id,
        dns_name: vm.dns_name.clone(),
        server: SshServer::Formation,
        program: None,
        listening: true,
        host_keys: vec!["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f".to_owned()],
        users: vec![SshUser { name: "ada".to_owned(), key: true, password: false }],
        accounts: vec!["root".to_owned(), "ada".to_owned()],
        root_login: false,
    }
}

fn digest(of: &str) -> Digest {
    Digest::of(of.as_bytes())
}

fn refusal() -> ApiError {
    ApiError::new(ErrorCode::Conflict, "port 8080/tcp is taken by vm/shop").hint("publish another one, or destroy shop")
}

fn operation(name: &Name) -> Operation {
    let key = IdempotencyKey::from_bytes([0x7d; 16]);
    Operation {
        id: OperationId::derive(&owner().public(), &key),
        kind: OperationKind::Deploy,
        subject: "vm/web".to_owned(),
        actor: owner().public().to_string(),
        idempotency_key: key,
        request: Some(Asked::new("POST", "/v1/deploy", &serde_json::to_vec(&deploy(name)).unwrap_or_default()).shown),
        status: OperationStatus::Executing,
        steps: vec!["starting the VM".to_owned()],
        error: None,
        created_at: at(0),
        started_at: Some(at(0)),
        finished_at: None,
    }
}

fn spec(name: &Name) -> Spec {
    Spec {
        name: name.clone(),
        description: None,
        from: "debian:12".to_owned(),
        args: [].into(),
        steps: Vec::new(),
        resources: Resources { vcpus: 1, memory_mib: 512, disk_gib: 5, gpus: Vec::new() },
        users: Vec::new(),
        run_as: None,
        env: Vec::new(),
        workdir: None,
        entrypoint: vec!["python3".to_owned(), "-m".to_owned(), "http.server".to_owned(), "80".to_owned()],
        cmd: Vec::new(),
        ports: vec![Port { port: 80, protocol: Protocol::Tcp, host_port: Some(8080) }],
        volumes: Vec::new(),
        networks: Vec::new(),
        replicas: 1,
        restart: Restart { policy: RestartPolicy::Always, max_retries: None },
        healthcheck: None,
        labels: [("tier".to_owned(), "front".to_owned())].into(),
        model: None,
    }
}

fn deploy(name: &Name) -> DeployRequest {
    DeployRequest { spec: spec(name), passwd_hashes: [].into(), boot: Boot::Image(digest("image")), kernel: digest("kernel") }
}

fn image_config(name: &Name) -> ImageConfig {
    let layer = |step: &str, changed_bytes: u64| Layer { step: step.to_owned(), layer: digest(step), changed_bytes };
    ImageConfig {
        image: image(name),
        spec: spec(name),
        packages: [("nginx-light".to_owned(), "1.22.1-9+deb12u2".to_owned())].into(),
        layers: vec![layer("FROM debian:12", 163_446_784), layer("INSTALL nginx-light", 4_194_304)],
        kernel: None,
    }
}

fn plan(name: &Name) -> Plan {
    let change = FieldChange { field: "memory".to_owned(), from: Some("256 MiB".to_owned()), to: Some("512 MiB".to_owned()) };
    let vm = PlannedVm { name: name.clone(), action: PlanAction::Update, changes: vec![change], restarts: true, loses: Vec::new() };
    Plan { vms: vec![vm] }
}

fn vm(name: &Name) -> Vm {
    Vm {
        id: VmId::derive(&owner().public(), &IdempotencyKey::from_bytes([0x7d; 16]), name.as_str()),
        name: name.clone(),
        host: HostId::of(&host_key().public()),
        host_name: "den".to_owned(),
        image: Some(ImageReference { name: name.clone(), version: Some(2) }),
        image_digest: Some(digest("image")),
        state: VmState::Running,
        ready: true,
        health: Health::Healthy,
        ipv4: Some(Ipv4Addr::new(10, 83, 7, 12)),
        ipv6: Some(Ipv6Addr::new(0xfd5e, 0x1c2a, 0x77b0, 0, 0, 0, 0x5f0c, 0x1de2)),
        dns_name: format!("{name}.default.form.internal"),
        ports: vec![PublishedPort { port: 80, protocol: Protocol::Tcp, host_port: Some(8080) }],
        vcpus: 1,
        memory_mib: 512,
        disk_gib: 5,
        labels: [("tier".to_owned(), "front".to_owned())].into(),
        created_at: at(0),
        started_at: Some(at(1)),
        restarts: 0,
        fault: None,
    }
}

fn interface(vm: &Vm) -> Interface {
    Interface {
        name: "eth1".to_owned(),
        vm: vm.name.clone(),
        network: "default".parse().unwrap_or_else(|_| vm.name.clone()),
        mac: "52:0a:1b:2c:3d:4e".to_owned(),
        ipv4: Ipv4Addr::new(10, 83, 90, 4),
        ipv6: Ipv6Addr::new(0xfd5e, 0x1c2a, 0x77b0, 0, 0, 0, 0x91aa, 0x0042),
        device: Some("eth1".to_owned()),
        state: InterfaceState::Attached,
    }
}

fn guest() -> GuestReport {
    GuestReport {
        kernel: "6.1.0-56-cloud-amd64".to_owned(),
        hostname: "web".to_owned(),
        addresses: vec!["eth0 10.83.7.12/32".to_owned()],
        devices: vec![GuestDevice {
            serial: "root".to_owned(),
            path: "/dev/vda".to_owned(),
            size_bytes: 5 << 30,
            reported_at: Some(at(0)),
        }],
        faults: Vec::new(),
    }
}

fn host() -> Host {
    Host {
        id: HostId::of(&host_key().public()),
        name: "den".to_owned(),
        public_key: host_key().public(),
        cluster: ClusterId::from_bytes([0xc3; 16]),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: "6.1.0-56-amd64".to_owned(),
        owner: Some(owner().public()),
        started_at: at(0),
        now: at(60),
        vcpus_total: 8,
        vcpus_allocated: 1,
        memory_total_mib: 31_744,
        memory_allocated_mib: 512,
        disk_total_bytes: 250 << 30,
        disk_free_bytes: 200 << 30,
        vms: 1,
        max_vms: 250,
    }
}

fn health() -> HealthReport {
    let part = |name: &str, message: &str| PartHealth { name: name.to_owned(), healthy: true, message: message.to_owned() };
    let parts = vec![part("kvm", "/dev/kvm opens, and the processor virtualises"), part("vms", "of 1 none has failed or is unhealthy")];
    HealthReport { healthy: true, parts, total_operations: 120, error_rate_percent: 2.5, at: at(60) }
}

/// Looked at for a second.
fn stats(vm: &Vm) -> VmStats {
    let disk = DiskRates { reads: 12.0, writes: 3.0, read_bytes: 196_608.0, written_bytes: 24_576.0 };
    let network = NetworkRates { received_bytes: 1250.0, sent_bytes: 48_300.0, received_packets: 11.0, sent_packets: 40.0 };
    VmStats {
        id: vm.id,
        name: vm.name.clone(),
        state: vm.state,
        at: at(60),
        vcpus: 1,
        uptime_ms: 59_000,
        cpu_ms: 2310,
        cpu_percent: Some(1.5),
        memory_bytes: 512 << 20,
        memory_used_bytes: Some(61 << 20),
        memory_percent: Some(12.5),
        resident_bytes: 104 << 20,
        exits: 181_204,
        exits_per_second: Some(1043.0),
        restarts: 0,
        disks: vec![DiskStats {
            id: "root".to_owned(),
            reads: 2204,
            writes: 310,
            flushes: 12,
            errors: 0,
            read_bytes: 48_234_496,
            written_bytes: 2_146_304,
            io_uring: true,
            per_second: Some(disk),
        }],
        networks: vec![NetworkStats {
            id: "eth0".to_owned(),
            backend: Some(NetworkBackend::VhostNet),
            received_bytes: 30_412,
            sent_bytes: 1_204_010,
            received_packets: 310,
            sent_packets: 905,
            dropped_packets: 0,
            per_second: Some(network),
        }],
    }
}

fn doctor() -> DoctorReport {
    let check = Check {
        name: "cgroup".to_owned(),
        status: CheckStatus::Problem,
        message: "there is no cgroup v2 at /sys/fs/cgroup".to_owned(),
        hint: Some("boot with systemd.unified_cgroup_hierarchy=1".to_owned()),
        fixable: false,
    };
    DoctorReport { checks: vec![check] }
}

fn image(name: &Name) -> Image {
    Image {
        name: name.clone(),
        version: 2,
        digest: digest("image"),
        size_bytes: 1 << 30,
        stored_bytes: 187_432_960,
        created_at: at(0),
        used_by: vec![name.clone()],
        kept_for: Vec::new(),
        labels: [("stage".to_owned(), "production".to_owned())].into(),
        keep: true,
    }
}

fn image_set() -> ImageSetRequest {
    ImageSetRequest { keep: Some(true), labels: [("stage".to_owned(), Some("production".to_owned())), ("old".to_owned(), None)].into() }
}

fn verification(name: &Name) -> Verification {
    let damaged = DamagedBlock { index: 17, offset: 17 << 16, digest: Some(digest("block")) };
    Verification { name: name.clone(), version: 2, digest: digest("image"), blocks: 16_384, damaged_blocks: 1, damaged: vec![damaged] }
}

fn snapshot(name: &Name, volume: &Name, vm: &Vm) -> Snapshot {
    Snapshot {
        name: name.clone(),
        vm: vm.name.clone(),
        vm_id: vm.id,
        host: vm.host,
        host_name: vm.host_name.clone(),
        created_at: Some(at(60)),
        consistency: Some(Consistency::Quiesced),
        memory_mib: Some(vm.memory_mib),
        vcpus: Some(vm.vcpus),
        disk_bytes: Some(vm.disk_gib << 30),
        allocated_bytes: Some(151_519_232),
        memory_kind: Some(MemoryKind::Incremental),
        based_on: "earlier".parse().ok(),
        written_bytes: Some(11_534_336),
        compressed: true,
        unfolded_bytes: Some(97_517_568),
        volumes: vec![volume.clone()],
        pause_ms: Some(310),
        image_digest: vm.image_digest,
        fault: None,
    }
}

fn volume(name: &Name, pool: &Name, vm: &Name) -> Volume {
    let id = VolumeId::derive(&owner().public(), &IdempotencyKey::from_bytes([0x7d; 16]), name.as_str());
    let attachment = Attachment {
        vm: vm.clone(),
        path: Some("/var/lib/data".to_owned()),
        read_only: false,
        by_formfile: true,
        state: AttachmentState::Attached,
        device: Some("/dev/vdb".to_owned()),
        device_size_bytes: Some(20 << 30),
        synced_at: Some(at(0)),
    };
    Volume {
        id,
        name: name.clone(),
        host: HostId::of(&host_key().public()),
        host_name: "den".to_owned(),
        pool: pool.clone(),
        format: VolumeFormat::Raw,
        size_bytes: 20 << 30,
        allocated_bytes: Some(187_432_960),
        serial: id.serial(),
        limits: DiskLimits { iops: Some(500), bytes_per_second: Some(50 << 20) },
        attachment: Some(attachment),
        snapshots: 1,
        export: None,
        created_at: at(0),
        fault: None,
    }
}

fn volume_snapshot(name: &Name, volume: Volume) -> VolumeSnapshot {
    VolumeSnapshot {
        name: name.clone(),
        volume: volume.name,
        volume_id: volume.id,
        host: volume.host,
        host_name: volume.host_name,
        pool: volume.pool,
        format: volume.format,
        created_at: Some(at(60)),
        consistency: Some(Consistency::Quiesced),
        size_bytes: Some(10 << 30),
        allocated_bytes: Some(151_519_232),
        pause_ms: Some(12),
        fault: None,
    }
}

fn pool_create(name: Name) -> PoolCreateRequest {
    let labels = [("disk".to_owned(), "nvme".to_owned())].into();
    let (source, options) = (Some("storage.example:/volumes".to_owned()), Some("vers=4.2".to_owned()));
    PoolCreateRequest {
        name,
        kind: PoolKind::Nfs,
        path: None,
        source,
        options,
        reserve_bytes: 10 << 30,
        limit_bytes: Some(400 << 30),
        labels,
    }
}

fn pool_set() -> PoolSetRequest {
    PoolSetRequest { reserve_bytes: Some(20 << 30), limit_bytes: None, labels: [("disk".to_owned(), None)].into() }
}

fn pool(name: &Name) -> Pool {
    Pool {
        name: name.clone(),
        kind: PoolKind::Local,
        host: HostId::of(&host_key().public()),
        host_name: "den".to_owned(),
        path: "/var/lib/formation/volumes".into(),
        source: None,
        options: None,
        total_bytes: 250 << 30,
        free_bytes: 200 << 30,
        provisioned_bytes: 20 << 30,
        allocated_bytes: 187_432_960,
        volumes: 1,
        snapshots: 1,
        reserve_bytes: 10 << 30,
        limit_bytes: None,
        labels: [].into(),
        removable: false,
        silent: false,
        fault: None,
    }
}
