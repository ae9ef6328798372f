//! Everything an agent is, in one place that handlers and drivers share.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use form_api::{
    ApiError, ErrorCode,
    host::Host,
    vm::{Vm, VmState},
};
use form_net::{Attachment, NameEntry, Network, PublishedPort};
use form_state::{Replica, View};
use form_store::Store;
use form_types::{ClusterId, Digest, HostId, ImageReference, Name, SecretKey, VmId};
use jiff::Timestamp;
use tokio::sync::watch;

use crate::{
    admit::Capacity,
    authorise::SignedRequest,
    config::{Config, Paths},
    desired::{self, DesiredVm},
    event::Events,
    fleet::{Fleet, Observed},
    headroom::{self, Headroom},
    identity::Identity,
    interface, machine, memory,
    operation::Operations,
    telemetry,
    vm::{self, Link, dns_name},
    volume::export::Exports,
};

/// What the daemon has opened by the time it can be an agent.
pub struct Parts {
    pub paths: Paths,
    pub config: Config,
    pub identity: Identity,
    pub name: String,
    pub replica: Replica,
    pub store: Store,
    pub network: Network,
    pub events: Arc<Events>,
    pub operations: Operations,
    pub exports: Exports,
    pub programs: Programs,
}

/// The programs that the agent starts or hands to guests.
#[derive(Clone, Debug)]
pub struct Programs {
    pub vmm: PathBuf,
    pub guest: PathBuf,
}

pub struct Agent {
    paths: Paths,
    config: Config,
    key: SecretKey,
    cluster: ClusterId,
    identity: Mutex<Identity>,
    name: String,
    started_at: Timestamp,
    replica: Replica,
    pub store: Store,
    pub network: Network,
    pub events: Arc<Events>,
    pub operations: Operations,
    /// The volumes that are served over NBD.
    pub exports: Exports,
    /// How the last export to a collector went.
    pub telemetry: telemetry::Status,
    pub fleet: Fleet,
    pub programs: Programs,
    /// Held from the look at what is free until it is taken, so that two deploys do not both get the last of it.
    admission: Mutex<()>,
    /// Held from the look for a free uid until the process that has it is on record.
    starting: Mutex<()>,
    /// Held while a volume changes hands, and while a VM that starts opens its own.
    volume_turn: Mutex<()>,
    /// Held of a VM while its disk is copied, and while a start of it opens it.
    disk_turns: Mutex<BTreeMap<VmId, Arc<Mutex<()>>>>,
    /// Of VMs that volumes come to and leave while they run.
    volume_turns: Mutex<BTreeMap<VmId, Arc<Mutex<()>>>>,
    /// Being made: on the disk and not in the state yet.
    made: Mutex<BTreeSet<VmId>>,
    /// Held while the firewall is replaced.
    rules: tokio::sync::Mutex<()>,
    log_changes: Mutex<BTreeMap<VmId, watch::Sender<u64>>>,
    headroom: Headroom,
}

pub fn internal(error: &dyn std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Internal, error.to_string())
}

impl Agent {
    pub fn new(parts: Parts) -> Self {
        Self {
            key: parts.identity.key().clone(),
            headroom: Headroom::new(&parts.paths.database()),
            cluster: parts.identity.cluster(),
            paths: parts.paths,
            config: parts.config,
            identity: Mutex::new(parts.identity),
            name: parts.name,
            started_at: Timestamp::now(),
            replica: parts.replica,
            store: parts.store,
            network: parts.network,
            events: parts.events,
            operations: parts.operations,
            exports: parts.exports,
            telemetry: telemetry::Status::default(),
            fleet: Fleet::new(),
            programs: parts.programs,
            admission: Mutex::default(),
            starting: Mutex::default(),
            volume_turn: Mutex::default(),
            disk_turns: Mutex::default(),
            volume_turns: Mutex::default(),
            made: Mutex::default(),
            rules: tokio::sync::Mutex::default(),
            log_changes: Mutex::default(),
        }
    }

    pub const fn paths(&self) -> &Paths {
        &self.paths
    }

    pub const fn config(&self) -> &Config {
        &self.config
    }

    pub const fn key(&self) -> &SecretKey {
        &self.key
    }

    pub const fn cluster(&self) -> ClusterId {
        self.cluster
    }

    pub fn host_id(&self) -> HostId {
        HostId::of(&self.key.public())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn identity(&self) -> MutexGuard<'_, Identity> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn admission(&self) -> MutexGuard<'_, ()> {
        self.admission.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn starting(&self) -> MutexGuard<'_, ()> {
        self.starting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Not [`Agent::admission`], for which deploys wait: a pool may be slow.
    pub fn volume_turn(&self) -> MutexGuard<'_, ()> {
        self.volume_turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever opens or copies the disk of a VM holds this meanwhile.
    pub fn disk_turn(&self, vm: &VmId) -> Arc<Mutex<()>> {
        Arc::clone(self.disk_turns.lock().unwrap_or_else(PoisonError::into_inner).entry(*vm).or_default())
    }

    /// Whoever gives a volume to this VM while it runs, or takes one from it, holds this meanwhile. Taken before [`Agent::volume_turn`].
    pub fn volumes_of(&self, vm: &VmId) -> Arc<Mutex<()>> {
        Arc::clone(self.volume_turns.lock().unwrap_or_else(PoisonError::into_inner).entry(*vm).or_default())
    }

    /// The VMs of which something is on the disk before they are in the state: nobody's leftovers.
    pub fn being_made(&self) -> MutexGuard<'_, BTreeSet<VmId>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn view(&self) -> Arc<View> {
        self.replica.view()
    }

    /// The VM as it should be; none when nobody wants it.
    pub fn desired(&self, id: &VmId) -> Option<DesiredVm> {
        desired::vm(&self.view(), id)
    }

    /// Records what a signed request asks for. Blocks until it is on the disk.
    ///
    /// # Errors
    /// What the rules refuse, or the database's.
    pub fn submit(&self, request: &SignedRequest) -> Result<(), ApiError> {
        let request = form_state::SignedRequest { envelope: request.header.clone(), body: request.body.clone().into_bytes() };
        self.replica.submit(request).map(drop).map_err(|error| internal(&error))
    }

    /// Records the owner in the state, where every replica can see by whom requests may be signed.
    ///
    /// # Errors
    /// What the rules refuse, or the database's.
    pub fn record_owner(&self) -> Result<(), ApiError> {
        let Some(owner) = self.identity().owner() else { return Ok(()) };
        let writes = desired::owner_writes(&self.view(), &owner);
        if writes.is_empty() { Ok(()) } else { self.replica.commit(None, writes).map(drop).map_err(|error| internal(&error)) }
    }

    /// What is kept of a VM, on disk: its root disk, and what it was made from.
    pub fn vm_directory(&self, vm: &VmId) -> PathBuf {
        self.paths.vms().join(vm.to_string())
    }

    /// The file system of an image: images with the same one differ only in how they run. An image that is gone has its own.
    pub fn root_of(&self, image: &Digest) -> Digest {
        self.store.manifest(image).ok().and_then(|manifest| manifest.rootfs.digest().ok()).unwrap_or(*image)
    }

    pub fn log_directory(&self, vm: &VmId) -> PathBuf {
        self.paths.logs().join(vm.to_string())
    }

    /// Counts the lines that a VM's log got.
    pub fn log_changes(&self, vm: &VmId) -> watch::Sender<u64> {
        let mut all = self.log_changes.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(*vm).or_insert_with(|| watch::Sender::new(0)).clone()
    }

    /// The VM is gone for good.
    pub fn forget_disk_turn(&self, vm: &VmId) {
        self.disk_turns.lock().unwrap_or_else(PoisonError::into_inner).remove(vm);
        self.volume_turns.lock().unwrap_or_else(PoisonError::into_inner).remove(vm);
    }

    pub fn forget_log(&self, vm: &VmId) {
        self.log_changes.lock().unwrap_or_else(PoisonError::into_inner).remove(vm);
    }

    /// Every VM that has something on this host, wanted or not.
    pub fn vms_on_disk(&self) -> Vec<VmId> {
        let mut found = self.store.disks().unwrap_or_default();
        for directory in [self.paths.vm_runtime(), self.paths.logs(), self.paths.vms(), self.paths.snapshots()] {
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            found.extend(entries.filter_map(|entry| entry.file_name().to_str()?.parse::<VmId>().ok()));
        }
        found.sort();
        found.dedup();
        found
    }

    /// Those of the VM's interfaces, the first one first.
    pub fn links(&self, vm: &DesiredVm) -> Vec<Link> {
        let link = |(number, attachment): (u8, Attachment)| Link {
            name: interface::name_of(number),
            mac: attachment.mac.0,
            mtu: form_net::MTU,
            ipv4: attachment.ipv4,
            ipv6: attachment.ipv6,
            gateway4: form_net::GATEWAY_V4,
            gateway6: form_net::GATEWAY_V6,
            table: (number > 0).then(|| interface::table_of(number)),
        };
        self.attachments(vm).into_iter().map(link).collect()
    }

    /// The VM's interfaces by number, the first one first.
    pub fn attachments(&self, vm: &DesiredVm) -> Vec<(u8, Attachment)> {
        let first = self.attachment(vm);
        let further: Vec<(u8, Attachment)> = vm
            .interfaces
            .iter()
            .map(|(number, ipv4)| {
                let id = interface::id_of(&vm.id, *number);
                let ipv6 = form_net::Ipv6Prefix::for_cluster(&self.cluster).address(&id);
                let (mac, ports) = (form_net::Mac::of(&id), Vec::new());
                (*number, Attachment { vm: id, mac, ipv4: *ipv4, ipv6, ports, ..first.clone() })
            })
            .collect();
        std::iter::once((0, first)).chain(further).collect()
    }

    fn attachment(&self, vm: &DesiredVm) -> Attachment {
        let published = vm
            .request
            .spec
            .ports
            .iter()
            .filter_map(|port| port.host_port.map(|host| PublishedPort { protocol: port.protocol, host, guest: port.port }));
        Attachment {
            vm: vm.id,
            name: vm.name().clone(),
            network: vm::default_network(),
            mac: vm.mac(),
            ipv4: vm.ipv4,
            ipv6: vm.ipv6(&self.cluster),
            ports: published.collect(),
        }
    }

    /// Puts the firewall and the names in force that the VMs with a runtime directory need.
    ///
    /// # Errors
    /// What `nft` says.
    pub async fn apply_rules(&self) -> Result<(), form_net::NetError> {
        let _one_at_a_time = self.rules.lock().await;
        let vms: Vec<Vec<(u8, Attachment)>> = desired::vms(&self.view())
            .into_values()
            .filter(|vm| self.paths.vm_runtime().join(vm.id.to_string()).exists())
            .map(|vm| self.attachments(&vm))
            .collect();
        // A name means the first interface.
        self.network.names().set(vms.iter().flat_map(|vm| vm.first()).map(|(_, attachment)| NameEntry {
            name: attachment.name.clone(),
            network: attachment.network.clone(),
            ipv4: attachment.ipv4,
            ipv6: attachment.ipv6,
        }));
        let attachments: Vec<Attachment> = vms.into_iter().flatten().map(|(_, attachment)| attachment).collect();
        self.network.set_rules(&attachments).await
    }

    /// The VM as a client sees it.
    pub fn vm(&self, desired: &DesiredVm) -> Vm {
        let observed = self.fleet.observed(&desired.id).unwrap_or_else(Observed::new);
        let spec = &desired.request.spec;
        let image = desired.request.image().map(|image| {
            let entry = self.store.by_digest(image).ok();
            let name = entry.as_ref().map_or_else(|| spec.name.clone(), |entry| entry.name.clone());
            ImageReference { name, version: entry.map(|entry| entry.version) }
        });
        let ports = spec.ports.iter().map(|port| form_api::vm::PublishedPort {
            port: port.port,
            protocol: port.protocol,
            host_port: port.host_port,
        });
        Vm {
            id: desired.id,
            name: spec.name.clone(),
            host: desired.host,
            host_name: self.name.clone(),
            image,
            image_digest: desired.request.image().copied(),
            state: observed.state,
            ready: observed.ready,
            health: observed.health,
            ipv4: Some(desired.ipv4),
            ipv6: Some(desired.ipv6(&self.cluster)),
            dns_name: dns_name(&spec.name),
            ports: ports.collect(),
            vcpus: spec.resources.vcpus,
            memory_mib: spec.resources.memory_mib,
            disk_gib: spec.resources.disk_gib,
            labels: spec.labels.clone(),
            created_at: desired.created_at,
            started_at: observed.started_at,
            restarts: observed.restarts,
            fault: observed.fault.or_else(|| self.full_disk(observed.state)),
        }
    }

    /// What is wrong with every VM that runs on a host whose disk is full.
    fn full_disk(&self, state: VmState) -> Option<String> {
        let is_full = matches!(state, VmState::Running | VmState::Starting) && self.free() < headroom::LOW / 8;
        is_full.then(|| "the host's disk is full: what it writes fails (see `form doctor`)".to_owned())
    }

    /// Bytes that are free for VMs and images.
    fn free(&self) -> u64 {
        self.store.space().map_or(u64::MAX, |space| space.free)
    }

    /// Keeps some room on the disk for the agent itself, while there is enough.
    pub fn keep_headroom(&self) {
        if let Err(error) = self.headroom.keep(self.free()) {
            tracing::warn!("no room can be kept for the agent itself: {error}");
        }
    }

    /// Before something that frees room: on a disk that is full to the last byte it could not even be written down.
    pub fn use_headroom(&self) {
        self.headroom.give(self.free());
    }

    pub fn vm_named(&self, name: &Name) -> Result<DesiredVm, ApiError> {
        desired::vm_named(&self.view(), name)
            .ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("there is no vm/{name}")).hint("list them with `form ps`"))
    }

    /// What is free, as it would be without the VM called `except`.
    ///
    /// # Errors
    /// When the machine cannot be asked.
    pub fn capacity(&self, except: Option<&Name>) -> Result<Capacity, ApiError> {
        let others: Vec<DesiredVm> =
            desired::vms(&self.view()).into_values().filter(|vm| vm.host == self.host_id() && Some(vm.name()) != except).collect();
        let (memory_total, vcpus) = (machine::memory_mib().map_err(|error| internal(&error))?, machine::vcpus());
        let disk = self.store.space().map_err(|error| internal(&error))?;
        let ports = others.iter().flat_map(|vm| {
            let published = vm.request.spec.ports.iter();
            published.filter_map(|port| Some((port.protocol, port.host_port?, vm.name().clone())))
        });
        Ok(Capacity {
            machine_vcpus: vcpus,
            vcpu_overcommit: self.config.vcpu_overcommit,
            vcpus_taken: others.iter().map(|vm| vm.request.spec.resources.vcpus).sum(),
            memory_mib: memory_total.saturating_sub(self.config.memory_reserve_mib),
            memory_taken_mib: others.iter().map(|vm| memory::held_mib(self, &vm.id, vm.request.spec.resources.memory_mib)).sum(),
            disk_free_bytes: disk.free,
            vms: others.len() as u32,
            max_vms: self.config.max_vms,
            ports_taken: ports.collect(),
        })
    }

    /// # Errors
    /// When the machine cannot be asked.
    pub fn host(&self) -> Result<Host, ApiError> {
        let capacity = self.capacity(None)?;
        let disk = self.store.space().map_err(|error| internal(&error))?;
        Ok(Host {
            id: self.host_id(),
            name: self.name.clone(),
            public_key: self.key.public(),
            cluster: self.cluster,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: machine::kernel_release(),
            owner: self.identity().owner(),
            started_at: self.started_at,
            now: Timestamp::now(),
            vcpus_total: capacity.machine_vcpus,
            vcpus_allocated: capacity.vcpus_taken,
            memory_total_mib: capacity.memory_mib,
            memory_allocated_mib: capacity.memory_taken_mib,
            disk_total_bytes: disk.total,
            disk_free_bytes: disk.free,
            vms: capacity.vms,
            max_vms: capacity.max_vms,
        })
    }

    /// Removes a VM's log.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove_log(&self, vm: &VmId) -> io::Result<()> {
        self.forget_log(vm);
        match std::fs::remove_dir_all(self.log_directory(vm)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
