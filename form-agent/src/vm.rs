//! From what was asked for to what a VM process and its guest are told. Pure.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU64,
    os::fd::OwnedFd,
};

use form_api::deploy::DeployRequest;
use form_types::{
    DiskLimits, Name, VmId, VmLimits,
    settings::{File, Interface, Route4, Route6, Service, Settings, UserSettings, VolumeMount},
    spec::{EnvScope, Resources, User},
};
use form_vmm::config::{self as vmm_config, BackingFile, DiskConfig, DiskFormat, Fd, JailConfig, NetworkConfig, RestoreConfig, VmConfig};

/// The kernel's command line for every VM: the console is the serial port, a panic ends the VM so that the agent sees it.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";

/// vsock CID of every guest: each VM has a vsock device of its own, nothing else is on it.
pub const GUEST_CID: u64 = 3;

/// What a VM process knows a VM's root disk by.
pub const ROOT_DISK: &str = "root";

/// As many vCPUs as any VM can have while it runs.
const LEAST_ROOM: u32 = 4;

const DEFAULT_NETWORK: &str = "default";

/// How long a guest may take to stop its processes before they are killed.
pub const SHUTDOWN_TIMEOUT_MS: u64 = 10_000;

/// An interface of a VM: addresses that belong to it, and the gateway that is the same on every host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// `eth0`: what the guest should call it, and what the VM process knows it by.
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u16,
    pub ipv4: Ipv4Addr,
    pub ipv6: Ipv6Addr,
    pub gateway4: Ipv4Addr,
    pub gateway6: Ipv6Addr,
    /// As [`Interface::table`].
    pub table: Option<u8>,
}

impl Link {
    /// What the guest is told.
    pub fn interface(&self) -> Interface {
        Interface {
            mac: mac_text(&self.mac),
            name: self.name.clone(),
            ipv4: Some(Route4 { address: self.ipv4, prefix: 32, gateway: Some(self.gateway4) }),
            ipv6: Some(Route6 { address: self.ipv6, prefix: 128, gateway: Some(self.gateway6) }),
            mtu: u32::from(self.mtu),
            table: self.table,
        }
    }

    /// What the VM process is told, whose tap is `tap`.
    pub fn config(&self, tap: Fd, limits: VmLimits) -> NetworkConfig {
        let bytes_per_second = rate(limits.net_bytes_per_second);
        NetworkConfig { id: self.name.clone(), tap, vhost: None, mac: self.mac, mtu: self.mtu, bytes_per_second }
    }
}

/// Has the host's kernel move the packets of these interfaces, where it can: a descriptor for each, to be passed from position `first` on.
pub fn carried_by_kernel(networks: &mut [NetworkConfig], first: usize) -> Vec<OwnedFd> {
    let Some(opened) = networks.iter().map(|_| form_net::tap::vhost()).collect::<Option<Vec<_>>>() else { return Vec::new() };
    for (at, network) in (first..).zip(networks) {
        network.vhost = u16::try_from(at).ok().map(Fd);
    }
    opened
}

/// At most 20 bytes, derived from the VM's id, so that the guest finds its root disk by it.
pub fn root_serial(id: &VmId) -> String {
    format!("root-{}", id.short())
}

/// The segment that every VM of this version is in.
pub fn default_network() -> Name {
    DEFAULT_NETWORK.parse().expect("a constant that is a name")
}

pub fn dns_name(name: &Name) -> String {
    format!("{name}.{DEFAULT_NETWORK}.form.internal")
}

/// Whether root may log in with a password or over SSH.
pub fn root_login(users: &[User]) -> bool {
    users.is_empty() || users.iter().any(|user| !user.disable_root)
}

fn mac_text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// What the guest is told at its start.
pub fn settings(id: &VmId, request: &DeployRequest, links: &[Link], mut volumes: Vec<VolumeMount>, new_identity: bool) -> Settings {
    // What is mounted inside another has to come after it.
    volumes.sort_by(|one, other| one.path.cmp(&other.path));
    let spec = &request.spec;
    let scoped = |wanted: &dyn Fn(&EnvScope) -> bool| -> BTreeMap<String, String> {
        spec.env.iter().filter(|env| wanted(&env.scope)).map(|env| (env.key.clone(), env.value.clone())).collect()
    };
    let users = spec.users.iter().map(|user| UserSettings {
        name: user.name.clone(),
        passwd_hash: request.passwd_hashes.get(&user.name).cloned(),
        lock_passwd: user.lock_passwd,
        expire_passwd: user.chpasswd_expire && user.has_passwd,
        ssh_password_login: user.ssh_pwauth,
        ssh_authorized_keys: user.ssh_authorized_keys.clone(),
        sudo: user.sudo,
        shell: user.shell.clone(),
        groups: user.groups.clone(),
        env: scoped(&|scope| matches!(scope, EnvScope::User(name) if *name == user.name)),
    });
    let command: Vec<String> = spec.entrypoint.iter().chain(&spec.cmd).cloned().collect();
    let service = (!command.is_empty()).then(|| Service {
        command,
        workdir: spec.workdir.clone(),
        user: spec.run_as.clone(),
        env: scoped(&|scope| matches!(scope, EnvScope::Service(name) if name == spec.name.as_str())),
        restart: spec.restart.clone(),
        healthcheck: spec.healthcheck.clone(),
    });
    let name = spec.name.as_str();
    let first = || links.iter().take(1);
    Settings {
        hostname: name.to_owned(),
        root_serial: Some(root_serial(id)),
        grow_root: true,
        interfaces: links.iter().map(Link::interface).collect(),
        nameservers: first().map(|link| IpAddr::V4(link.gateway4)).collect(),
        search_domains: vec![format!("{DEFAULT_NETWORK}.form.internal")],
        hosts: first().map(|link| (IpAddr::V4(link.ipv4), vec![dns_name(&spec.name), name.to_owned()])).collect(),
        users: users.collect(),
        root_login: root_login(&spec.users),
        files: unit_environments(request, service.is_some()),
        volumes,
        service,
        env: scoped(&|scope| *scope == EnvScope::System),
        new_identity,
        shutdown_timeout_ms: SHUTDOWN_TIMEOUT_MS,
    }
}

/// `ENV --scope=service:NAME` of an image with systemd: a drop-in for that unit.
fn unit_environments(request: &DeployRequest, has_service: bool) -> Vec<File> {
    if has_service {
        return Vec::new();
    }
    let mut units: BTreeMap<&str, String> = BTreeMap::new();
    for env in &request.spec.env {
        if let EnvScope::Service(name) = &env.scope {
            let text = units.entry(name).or_insert_with(|| "[Service]\n".to_owned());
            // systemd.syntax(7): `%` is a specifier, quotes and backslashes are escaped.
            let value = env.value.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('\n', "\\n");
            text.push_str(&format!("Environment=\"{}={value}\"\n", env.key));
        }
    }
    units
        .into_iter()
        .map(|(name, content)| File { path: format!("/etc/systemd/system/{name}.service.d/10-form.conf"), mode: 0o644, content })
        .collect()
}

/// What every VM process gives up: it runs as `uid`, with nothing of the host in sight.
pub const fn jail(uid: u32) -> JailConfig {
    JailConfig { uid: Some(uid), gid: Some(uid), namespaces: true, seccomp: true, landlock: true }
}

/// The order in which a VM's descriptors are passed; [`config`] refers to them by these positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    pub format: DiskFormat,
    /// Read-only files behind a qcow2 overlay, all raw, the nearest first.
    pub backing: u16,
}

/// A volume behind its descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeDisk {
    /// For messages and metrics.
    pub name: Name,
    pub serial: String,
    pub format: DiskFormat,
    pub read_only: bool,
    pub limits: DiskLimits,
}

/// A limit as a VM process takes it.
pub fn rate(limit: Option<u64>) -> Option<NonZeroU64> {
    limit.and_then(NonZeroU64::new)
}

/// The same for those of a disk.
pub fn disk_limits(limits: DiskLimits) -> vmm_config::DiskLimits {
    vmm_config::DiskLimits { iops: rate(limits.iops), bytes_per_second: rate(limits.bytes_per_second) }
}

impl VolumeDisk {
    /// The disk, whose descriptor is `file`.
    pub fn config(&self, file: Fd) -> DiskConfig {
        DiskConfig {
            id: format!("volume/{}", self.name),
            serial: self.serial.clone(),
            format: self.format,
            file,
            backing: Vec::new(),
            read_only: self.read_only,
            limits: disk_limits(self.limits),
        }
    }
}

/// The root disk, if there is one, at descriptor `first`, its backing files behind it, then the volumes.
fn disks(id: &VmId, first: u16, disk: Option<Disk>, volumes: &[VolumeDisk], limits: DiskLimits) -> Vec<DiskConfig> {
    let root = disk.map(|disk| DiskConfig {
        id: ROOT_DISK.to_owned(),
        serial: root_serial(id),
        format: disk.format,
        file: Fd(first),
        backing: (0..disk.backing).map(|index| BackingFile { file: Fd(first + 1 + index), format: DiskFormat::Raw }).collect(),
        read_only: false,
        limits: disk_limits(limits),
    });
    let behind = first + disk.map_or(0, |disk| 1 + disk.backing);
    let of_volumes = (behind..).zip(volumes).map(|(file, volume)| volume.config(Fd(file)));
    root.into_iter().chain(of_volumes).collect()
}

/// The first interface, whose tap is the descriptor `first`, and the others, whose taps come from `others` on.
fn networks(links: &[Link], first: u16, others: u16, limits: VmLimits) -> Vec<NetworkConfig> {
    std::iter::once(first).chain(others..).zip(links).map(|(tap, link)| link.config(Fd(tap), limits)).collect()
}

/// How many vCPUs a VM that starts with `vcpus` can have while it runs. A guest sets memory aside for each that may come: measured half a MiB.
pub fn most_vcpus(vcpus: u32) -> u8 {
    let most = vcpus.saturating_mul(2).clamp(LEAST_ROOM, *Resources::VCPUS.end());
    u8::try_from(most.max(vcpus)).unwrap_or(u8::MAX)
}

/// The descriptor of the first segment of an initramfs.
const FIRST_SEGMENT: u16 = 5;

/// Nobody would listen behind the vsock of a VM without our guest.
fn vsock_cid(request: &DeployRequest) -> Option<u64> {
    request.has_guest().then_some(GUEST_CID)
}

/// Descriptors are passed as: kvm, kernel, log ring, exit record, the first interface's tap, the segments of the initramfs, root disk, its
/// backing files, volumes, the other interfaces' taps.
pub fn config(
    id: &VmId,
    request: &DeployRequest,
    links: &[Link],
    (segments, disk): (u16, Option<Disk>),
    volumes: &[VolumeDisk],
    limits: VmLimits,
    jail: JailConfig,
) -> VmConfig {
    let resources = &request.spec.resources;
    let disks = disks(id, FIRST_SEGMENT + segments, disk, volumes, limits.disk);
    let behind = FIRST_SEGMENT + segments + disk.map_or(0, |disk| 1 + disk.backing) + volumes.len() as u16;
    VmConfig {
        vcpus: u8::try_from(resources.vcpus).unwrap_or(u8::MAX),
        most_vcpus: Some(most_vcpus(resources.vcpus)),
        memory_mib: resources.memory_mib,
        kvm: Fd(0),
        kernel: Fd(1),
        initramfs: (FIRST_SEGMENT..FIRST_SEGMENT + segments).map(Fd).collect(),
        cmdline: request.cmdline().unwrap_or(CMDLINE).to_owned(),
        disks,
        networks: networks(links, 4, behind, limits),
        vsock_cid: vsock_cid(request),
        rng: true,
        balloon: true,
        console_log: Some(Fd(2)),
        exit_record: Some(Fd(3)),
        jail,
    }
}

/// The same VM from what was saved of it, to be held where it stood. Descriptors are passed as: kvm, state, memory, log ring, exit record,
/// the first interface's tap, root disk, its backing files, volumes, the other interfaces' taps. With `track` its next snapshot can build
/// upon the one that it goes on from.
pub fn restore_config(
    (id, request): (&VmId, &DeployRequest),
    links: &[Link],
    disk: Option<Disk>,
    volumes: &[VolumeDisk],
    limits: VmLimits,
    jail: JailConfig,
    track: bool,
) -> RestoreConfig {
    let disks = disks(id, 6, disk, volumes, limits.disk);
    let behind = 6 + disk.map_or(0, |disk| 1 + disk.backing) + volumes.len() as u16;
    RestoreConfig {
        kvm: Fd(0),
        state: Fd(1),
        memory: Fd(2),
        disks,
        networks: networks(links, 5, behind, limits),
        vsock_cid: vsock_cid(request),
        rng: true,
        balloon: true,
        console_log: Some(Fd(3)),
        exit_record: Some(Fd(4)),
        jail,
        resume: false,
        track,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::request;
    use form_types::{VolumeId, spec::Env};

    fn links() -> [Link; 2] {
        let first = Link {
            name: "eth0".to_owned(),
            mac: [2, 0xf0, 0, 0, 0, 1],
            mtu: 1500,
            ipv4: Ipv4Addr::new(10, 77, 0, 2),
            ipv6: "fd00::2".parse().unwrap(),
            gateway4: Ipv4Addr::new(169, 254, 77, 1),
            gateway6: "fe80::1".parse().unwrap(),
            table: None,
        };
        let second = Link { name: "eth3".to_owned(), mac: [2, 0xf0, 0, 0, 0, 3], table: Some(103), ..first.clone() };
        [first, second]
    }

    const LIMITS: VmLimits =
        VmLimits { disk: DiskLimits { iops: Some(7), bytes_per_second: Some(1 << 20) }, net_bytes_per_second: Some(1 << 21) };

    #[test]
    fn there_is_room_for_as_many_vcpus_again_and_for_four_at_least() {
        assert_eq!([1, 2, 3, 4, 8, 64, 100, 128].map(most_vcpus), [4, 4, 6, 8, 16, 128, 128, 128]);
    }

    #[test]
    fn environment_goes_where_its_scope_says() {
        let mut web = request("web");
        let env = |scope, key: &str| Env { scope, key: key.to_owned(), value: "1".to_owned() };
        web.spec.env = vec![
            env(EnvScope::System, "A"),
            env(EnvScope::Service("web".to_owned()), "B"),
            env(EnvScope::Service("nginx".to_owned()), "C"),
        ];
        let id = VmId::from_bytes([7; 16]);
        let told = settings(&id, &web, &links(), Vec::new(), false);
        assert_eq!(told.env.keys().collect::<Vec<_>>(), ["A"]);
        assert_eq!(told.service.as_ref().unwrap().env.keys().collect::<Vec<_>>(), ["B"]);
        assert!(told.files.is_empty());

        web.spec.entrypoint.clear();
        let told = settings(&id, &web, &links(), Vec::new(), false);
        assert!(told.service.is_none());
        assert_eq!(told.files.len(), 2);
        assert_eq!(told.files[0].path, "/etc/systemd/system/nginx.service.d/10-form.conf");
        assert_eq!(told.interfaces[0].mac, "02:f0:00:00:00:01");
        assert_eq!(
            told.interfaces.iter().map(|one| (one.name.as_str(), one.table)).collect::<Vec<_>>(),
            [("eth0", None), ("eth3", Some(103))]
        );
        assert_eq!((told.hosts.len(), told.nameservers.len()), (1, 1));
    }

    /// Every descriptor that a configuration means, in their order.
    fn used(config: &VmConfig) -> Vec<u16> {
        let mut used = vec![config.kvm.0, config.kernel.0, config.console_log.unwrap().0, config.exit_record.unwrap().0];
        used.push(config.networks[0].tap.0);
        used.extend(config.initramfs.iter().map(|fd| fd.0));
        used.extend(
            config.disks.iter().flat_map(|disk| std::iter::once(disk.file.0).chain(disk.backing.iter().map(|backing| backing.file.0))),
        );
        used.extend(config.networks.iter().skip(1).map(|network| network.tap.0));
        used
    }

    #[test]
    fn descriptors_are_all_different() {
        let id = VmId::from_bytes([7; 16]);
        let disk = Some(Disk { format: DiskFormat::Qcow2, backing: 1 });
        let config = config(&id, &request("web"), &links(), (2, disk), &[volume("data"), volume("other")], LIMITS, JailConfig::default());
        let iops: Vec<Option<u64>> = config.disks.iter().map(|disk| disk.limits.iops.map(NonZeroU64::get)).collect();
        assert_eq!(iops, [Some(7), Some(100), Some(100)]);
        assert_eq!(config.networks[0].bytes_per_second.map(NonZeroU64::get), LIMITS.net_bytes_per_second);
        assert!(root_serial(&id).len() <= 20);
        assert_eq!(used(&config), (0..12).collect::<Vec<_>>());
        assert_eq!((config.cmdline.as_str(), config.vsock_cid), (CMDLINE, Some(GUEST_CID)));
    }

    #[test]
    fn nothing_of_ours_is_in_a_vm_with_a_kernel_of_its_own() {
        let id = VmId::from_bytes([7; 16]);
        let own = crate::testing::own_kernel("web");
        for segments in 0..2 {
            let config = config(&id, &own, &links(), (segments, None), &[volume("data")], LIMITS, JailConfig::default());
            assert_eq!(used(&config), (0..7 + segments).collect::<Vec<_>>());
            assert_eq!((config.cmdline.as_str(), config.vsock_cid, config.initramfs.len()), ("console=ttyS0", None, segments.into()));
            assert_eq!(config.disks.iter().map(|disk| disk.id.as_str()).collect::<Vec<_>>(), ["volume/data"]);
        }
        let restored = restore_config((&id, &own), &links(), None, &[volume("data")], LIMITS, JailConfig::default(), false);
        assert_eq!((restored.disks.len(), restored.disks[0].file.0, restored.vsock_cid), (1, 6, None));
    }

    fn volume(name: &str) -> VolumeDisk {
        VolumeDisk {
            name: name.parse().unwrap(),
            serial: VolumeId::from_bytes([name.len() as u8; 16]).serial(),
            format: DiskFormat::Raw,
            read_only: false,
            limits: DiskLimits { iops: Some(100), bytes_per_second: None },
        }
    }

    #[test]
    fn a_restored_vm_has_the_devices_of_a_booted_one() {
        let id = VmId::from_bytes([7; 16]);
        let disk = Some(Disk { format: DiskFormat::Qcow2, backing: 1 });
        let volumes = [volume("data"), volume("other")];
        let booted = config(&id, &request("web"), &links(), (2, disk), &volumes, LIMITS, JailConfig::default());
        let restored = restore_config((&id, &request("web")), &links(), disk, &volumes, LIMITS, JailConfig::default(), true);
        let disks = |disks: &[DiskConfig]| {
            disks.iter().map(|disk| (disk.id.clone(), disk.serial.clone(), disk.format, disk.limits)).collect::<Vec<_>>()
        };
        assert_eq!(disks(&restored.disks), disks(&booted.disks));
        let macs = |networks: &[NetworkConfig]| {
            networks.iter().map(|network| (network.id.clone(), network.mac, network.bytes_per_second)).collect::<Vec<_>>()
        };
        assert_eq!(macs(&restored.networks), macs(&booted.networks));
        assert_eq!((restored.vsock_cid, restored.rng, restored.balloon), (booted.vsock_cid, booted.rng, booted.balloon));
        let mut used = vec![restored.kvm.0, restored.state.0, restored.memory.0];
        used.extend([restored.console_log.unwrap().0, restored.exit_record.unwrap().0, restored.networks[0].tap.0]);
        used.extend([restored.disks[0].file.0, restored.disks[0].backing[0].file.0]);
        used.extend(restored.disks[1..].iter().map(|disk| disk.file.0));
        used.push(restored.networks[1].tap.0);
        assert_eq!(used, (0..11).collect::<Vec<_>>());
    }
}
