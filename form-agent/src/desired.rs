//! What should be: the VMs in the replicated state, and the rules by which a signed request changes them.
//!
//! The rules are pure: every replica derives the same writes from the same request, and refuses a change that says anything else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    sync::LazyLock,
};

use form_api::{
    deploy::{CreateVmRequest, DeployRequest, RollbackRequest},
    sign,
    snapshot::RestoreRequest,
    vm::{RenameRequest, SetRequest},
};
use form_net::{Ipv4Range, Ipv6Prefix, Mac};
use form_state::{Claim, Document, Record, RecordId, Refusal, Rules, Scalar, SignedRequest, Table, View, Write};
use form_types::{
    ClusterId, Digest, DiskLimits, HostId, Name, PublicKey, VmId, VmLimits,
    limits::{self, LimitError},
    spec::{Resources, Restart, RestartPolicy},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    interface, label,
    volume::{self, rules::Asked},
};

/// As [`form_vmm::config::VmConfig`] has them.
const MAX_VCPUS: u32 = 128;

/// [`DesiredVm::starts`] of a new VM.
const FIRST_START: u64 = 1;

/// Stands for the name where a name must not matter.
static BOOT_NAME: LazyLock<Name> = LazyLock::new(|| "vm".parse().expect("a constant that is a name"));

/// Whether a VM should run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Run {
    Running,
    /// Started, and standing still.
    Paused,
    Stopped,
}

impl Run {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// A start of a VM that goes on from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    pub snapshot: Name,
    /// Which start ([`DesiredVm::starts`]): those after it are from the disk.
    pub starts: u64,
}

/// One VM as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredVm {
    pub id: VmId,
    pub host: HostId,
    /// Grows when the VM moves: a host runs only its own epoch.
    pub epoch: u64,
    pub run: Run,
    /// Grows when somebody asks for a start or restart.
    pub starts: u64,
    /// Grows when somebody asks for a reset, together with `starts`: the guest is not asked to shut down then.
    pub resets: u64,
    /// What was last asked to go back to.
    pub restore: Option<Restore>,
    pub ipv4: Ipv4Addr,
    pub actor: PublicKey,
    pub created_at: Timestamp,
    pub request: DeployRequest,
    /// No part of the request: a deploy leaves them as they are.
    pub limits: VmLimits,
    /// Its network interfaces beside the first one, by number, with the IPv4 address of each. No part of the request either.
    pub interfaces: BTreeMap<u8, Ipv4Addr>,
}

impl DesiredVm {
    pub const fn name(&self) -> &Name {
        &self.request.spec.name
    }

    pub fn ipv6(&self, cluster: &ClusterId) -> Ipv6Addr {
        Ipv6Prefix::for_cluster(cluster).address(&self.id)
    }

    pub fn mac(&self) -> Mac {
        Mac::of(&self.id)
    }

    /// What a run of the VM is started from: when it differs from what runs, the VM has to be started again.
    pub fn boot_digest(&self) -> Digest {
        boot_digest(&self.request, self.starts)
    }

    /// The write that leads from one to the other; refused when the VM should be something else.
    fn turn(&self, from: Run, to: Run) -> Result<Vec<Write>, Refusal> {
        if self.run == from {
            Ok(vec![Write::put(Table::Vms, self.id, "run", to.as_str())])
        } else {
            Err(Refusal::new(format!("vm/{} should be {}, not {}", self.name(), self.run.as_str(), from.as_str())))
        }
    }

    fn read(id: &RecordId, record: &Record) -> Option<Self> {
        let text = |field: &str| record.get(field).and_then(Scalar::as_text);
        let number = |field: &str| record.get(field).and_then(Scalar::as_uint);
        let request: DeployRequest = serde_json::from_str(text("request")?).ok()?;
        if request.spec.name.as_str() != text("name")? {
            return None;
        }
        Some(Self {
            id: VmId::from_bytes(id.0),
            host: text("host")?.parse().ok()?,
            epoch: number("epoch")?,
            run: match text("run")? {
                "running" => Run::Running,
                "paused" => Run::Paused,
                _ => Run::Stopped,
            },
            starts: number("starts")?,
            resets: number("resets").unwrap_or(0),
            restore: text("restore")
                .and_then(|name| name.parse().ok())
                .zip(number("restore_starts"))
                .map(|(snapshot, starts)| Restore { snapshot, starts }),
            ipv4: text("ipv4")?.parse().ok()?,
            actor: text("actor")?.parse().ok()?,
            created_at: Timestamp::from_second(i64::try_from(number("created_at")?).ok()?).ok()?,
            request,
            limits: VmLimits {
                disk: read_disk_limits(record, DISK_IOPS, DISK_BYTES),
                net_bytes_per_second: number(NET_BYTES).filter(|bytes| *bytes > 0),
            },
            interfaces: interface::read(record),
        })
    }
}

/// Fields of a VM's record: what it may do in a second. 0 is no limit.
const DISK_IOPS: &str = "disk_iops";
const DISK_BYTES: &str = "disk_bytes_per_second";
const NET_BYTES: &str = "net_bytes_per_second";

/// The limits of a disk from two fields of a record, which are 0 or missing when there is none.
pub fn read_disk_limits(record: &Record, iops: &str, bytes_per_second: &str) -> DiskLimits {
    let number = |field: &str| record.get(field).and_then(Scalar::as_uint).filter(|limit| *limit > 0);
    DiskLimits { iops: number(iops), bytes_per_second: number(bytes_per_second) }
}

/// The limits with what `set` changes.
///
/// # Errors
/// When there cannot be such a limit.
pub fn with_limits(before: VmLimits, set: &SetRequest) -> Result<VmLimits, LimitError> {
    let disk = before.disk.with(set.disk_iops, set.disk_bytes_per_second);
    disk.check()?;
    let net_bytes_per_second = set.net_bytes_per_second.unwrap_or(before.net_bytes_per_second);
    net_bytes_per_second.map_or(Ok(()), limits::check_bytes_per_second)?;
    Ok(VmLimits { disk, net_bytes_per_second })
}

/// Only of those that differ: what two change at once and apart holds both.
fn limit_writes(id: VmId, before: VmLimits, after: VmLimits) -> Vec<Write> {
    let fields = |limits: VmLimits| {
        [(DISK_IOPS, limits.disk.iops), (DISK_BYTES, limits.disk.bytes_per_second), (NET_BYTES, limits.net_bytes_per_second)]
    };
    let changed = fields(before).into_iter().zip(fields(after)).filter(|(before, after)| before != after);
    changed.map(|(_, (field, limit))| Write::put(Table::Vms, id, field, limit.unwrap_or(0))).collect()
}

/// What can be changed while the VM runs is left out.
fn boot_digest(request: &DeployRequest, starts: u64) -> Digest {
    let mut boot = renamed(request, &BOOT_NAME);
    boot.spec.description = None;
    boot.spec.labels.clear();
    boot.spec.restart = Restart { policy: RestartPolicy::Always, max_retries: None };
    Digest::of(format!("{starts} {}", serde_json::to_string(&boot).unwrap_or_default()).as_bytes())
}

/// Whether a VM that was started from one would be started from the same by the other.
pub fn same_boot(one: &DeployRequest, other: &DeployRequest) -> bool {
    boot_digest(one, 0) == boot_digest(other, 0)
}

/// The request with so much memory.
pub fn with_memory(request: &DeployRequest, memory_mib: u64) -> DeployRequest {
    let mut changed = request.clone();
    changed.spec.resources.memory_mib = memory_mib;
    changed
}

/// How much memory such a VM may have, in MiB.
pub const fn memory_of(request: &DeployRequest) -> RangeInclusive<u64> {
    if request.has_guest() { Resources::MEMORY_MIB } else { Resources::OWN_KERNEL_MEMORY_MIB }
}

/// The request of a VM that has got another name, with what refers to the old one.
pub fn renamed(request: &DeployRequest, name: &Name) -> DeployRequest {
    DeployRequest { spec: request.spec.clone().renamed(name), ..request.clone() }
}

/// The request with what `set` changes.
///
/// # Errors
/// In words, when a value makes no sense.
pub fn with_set(request: &DeployRequest, set: &SetRequest) -> Result<DeployRequest, String> {
    let mut changed = request.clone();
    label::check(set.labels.keys())?;
    label::apply(&mut changed.spec.labels, &set.labels);
    if let Some(restart) = &set.restart_policy {
        changed.spec.restart = restart.clone();
    }
    if let Some(vcpus) = set.vcpus {
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(format!("{vcpus} vCPUs: 1 to {MAX_VCPUS} are possible"));
        }
        changed.spec.resources.vcpus = vcpus;
    }
    if let Some(memory) = set.memory_mib {
        let least = *memory_of(request).start();
        if memory < least {
            return Err(format!("{memory} MiB of memory: at least {least} are needed"));
        }
        changed.spec.resources.memory_mib = memory;
    }
    Ok(changed)
}

/// Every VM in the state, by id. A record that makes no sense is passed over: a host that lies harms only itself. Of two that
/// claim one name the smaller id has it.
pub fn vms(view: &View) -> BTreeMap<VmId, DesiredVm> {
    let mut names = BTreeSet::new();
    view.cluster()
        .table(Table::Vms)
        .filter_map(|(id, record)| DesiredVm::read(id, record))
        .filter(|vm| names.insert(vm.name().clone()))
        .map(|vm| (vm.id, vm))
        .collect()
}

/// The one of [`vms`] with this name; no other is read.
pub fn vm_named(view: &View, name: &Name) -> Option<DesiredVm> {
    who_has(name.as_str(), view.cluster().table(Table::Vms))
}

/// The one of [`vms`] with this id; no other is read.
pub fn vm(view: &View, id: &VmId) -> Option<DesiredVm> {
    let name = view.cluster().field(Table::Vms, *id, "name")?.as_text()?;
    who_has(name, view.cluster().table(Table::Vms)).filter(|vm| vm.id == *id)
}

fn who_has<'a>(name: &str, mut records: impl Iterator<Item = (&'a RecordId, &'a Record)>) -> Option<DesiredVm> {
    records.find_map(|(id, record)| {
        let claims = record.get("name").and_then(Scalar::as_text) == Some(name);
        claims.then(|| DesiredVm::read(id, record)).flatten()
    })
}

/// The keys that own the cluster, as its founder has recorded them.
pub fn owners(view: &View) -> BTreeSet<PublicKey> {
    let owners = view.cluster().table(Table::Owners).filter_map(|(id, record)| {
        let key: PublicKey = record.get(OWNER_KEY)?.as_text()?.parse().ok()?;
        (owner_id(&key) == *id).then_some(key)
    });
    owners.collect()
}

/// The writes that make `owner` the one owner; none when that is what the state says.
pub fn owner_writes(view: &View, owner: &PublicKey) -> Vec<Write> {
    let id = owner_id(owner);
    let others = view.cluster().table(Table::Owners).filter(|(other, _)| **other != id);
    let mut writes: Vec<Write> = others.map(|(other, _)| Write::remove(Table::Owners, *other)).collect();
    if !owners(view).contains(owner) {
        writes.push(Write::put(Table::Owners, id, OWNER_KEY, owner.to_string()));
    }
    writes
}

const OWNER_KEY: &str = "key";

/// The first half of the BLAKE3 hash of the key, as for a host.
fn owner_id(key: &PublicKey) -> RecordId {
    HostId::of(key).into()
}

/// The rules of this version: a VM or volume is changed by a request that an owner has signed, or the host that makes the change, for those who come
/// in through its Unix socket; a host does so with its own VMs and volumes only. Who the owner is, the founder says.
pub struct AgentRules {
    pub cluster: ClusterId,
    /// The host that the cluster began with: the root of trust, the same for every replica.
    pub founder: PublicKey,
}

/// In whose name a request changes VMs and volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authority {
    Owner,
    /// Over the VMs and volumes of this host.
    Host(HostId),
}

impl Authority {
    /// Over what lives on `host`.
    pub fn is_over(self, host: &HostId) -> bool {
        match self {
            Self::Owner => true,
            Self::Host(own) => own == *host,
        }
    }

    fn may_change(self, vm: &DesiredVm) -> Result<(), Refusal> {
        if self.is_over(&vm.host) {
            return Ok(());
        }
        Err(Refusal::new(format!("vm/{} is another host's: only the owner's key may change it from here", vm.name())))
    }
}

impl Rules for AgentRules {
    fn derive(&self, request: &SignedRequest, claim: &Claim, view: &View) -> Result<Vec<Write>, Refusal> {
        let signed = sign::decode(request.envelope.as_bytes()).map_err(|error| Refusal::new(error.message))?;
        let (envelope, signer) =
            signed.verify(sign::CONTEXT).map_err(|error| Refusal::new(error.to_string())).map(form_types::Verified::into_parts)?;
        if envelope.cluster != Some(self.cluster) || envelope.host != claim.author {
            return Err(Refusal::new("the request was made for another cluster or host"));
        }
        if envelope.body != Digest::of(&request.body) {
            return Err(Refusal::new("the body is not the one that was signed"));
        }
        let authority = self.authority(&signer, claim, view)?;
        let asked = Asked { signer: &signer, key: &envelope.idempotency_key, claim, authority };
        let path = envelope.path.split('?').next().unwrap_or_default();
        let words: Vec<&str> = path.split('/').skip(1).collect();
        match (envelope.method.as_str(), words.as_slice()) {
            ("POST", ["v1", "deploy"]) => {
                let deploy: DeployRequest = json(&request.body)?;
                if let Some(vm) = vm_named(view, &deploy.spec.name) {
                    authority.may_change(&vm)?;
                }
                self.deploy(&deploy, Run::Running, asked, view)
            }
            ("POST", ["v1", "vms", name, "rollback"]) => {
                let vm = existing(name, authority, view)?;
                let RollbackRequest { to } = json(&request.body)?;
                if to.spec.name != *vm.name() {
                    return Err(Refusal::new(format!("vm/{} goes back to what it was itself, not to vm/{}", vm.name(), to.spec.name)));
                }
                self.deploy(&to, Run::Running, asked, view)
            }
            ("POST", ["v1", "vms"]) => self.create(&json(&request.body)?, asked, view),
            ("POST", ["v1", "vms", name, "start" | "restart"]) => {
                let vm = existing(name, authority, view)?;
                let starts = vm.starts.saturating_add(1);
                Ok(vec![Write::put(Table::Vms, vm.id, "run", Run::Running.as_str()), Write::put(Table::Vms, vm.id, "starts", starts)])
            }
            ("POST", ["v1", "vms", name, "reset"]) => {
                let vm = existing(name, authority, view)?;
                Ok(vec![
                    Write::put(Table::Vms, vm.id, "run", Run::Running.as_str()),
                    Write::put(Table::Vms, vm.id, "starts", vm.starts.saturating_add(1)),
                    Write::put(Table::Vms, vm.id, "resets", vm.resets.saturating_add(1)),
                ])
            }
            ("POST", ["v1", "vms", name, "restore"]) => {
                let vm = existing(name, authority, view)?;
                let RestoreRequest { snapshot } = json(&request.body)?;
                let starts = vm.starts.saturating_add(1);
                Ok(vec![
                    Write::put(Table::Vms, vm.id, "run", Run::Running.as_str()),
                    Write::put(Table::Vms, vm.id, "starts", starts),
                    Write::put(Table::Vms, vm.id, "restore", snapshot.as_str()),
                    Write::put(Table::Vms, vm.id, "restore_starts", starts),
                ])
            }
            ("POST", ["v1", "vms", name, "pause"]) => existing(name, authority, view)?.turn(Run::Running, Run::Paused),
            ("POST", ["v1", "vms", name, "resume"]) => existing(name, authority, view)?.turn(Run::Paused, Run::Running),
            ("POST", ["v1", "vms", name, "rename"]) => {
                let vm = existing(name, authority, view)?;
                let new: RenameRequest = json(&request.body)?;
                if vm_named(view, &new.name).is_some() {
                    return Err(Refusal::new(format!("there is a vm/{} already", new.name)));
                }
                let text = serde_json::to_string(&renamed(&vm.request, &new.name)).map_err(|error| Refusal::new(error.to_string()))?;
                Ok(vec![Write::put(Table::Vms, vm.id, "name", new.name.as_str()), Write::put(Table::Vms, vm.id, "request", text)])
            }
            ("PATCH", ["v1", "vms", name]) => {
                let vm = existing(name, authority, view)?;
                let set: SetRequest = json(&request.body)?;
                let changed = with_set(&vm.request, &set).map_err(Refusal::new)?;
                let limits = with_limits(vm.limits, &set).map_err(|error| Refusal::new(error.to_string()))?;
                let text = serde_json::to_string(&changed).map_err(|error| Refusal::new(error.to_string()))?;
                let mut writes = vec![Write::put(Table::Vms, vm.id, "request", text)];
                writes.extend(limit_writes(vm.id, vm.limits, limits));
                Ok(writes)
            }
            ("POST", ["v1", "vms", name, "interfaces"]) => interface::rules::attach(&existing(name, authority, view)?, &self.cluster, view),
            ("POST", ["v1", "vms", name, "interfaces", which, "detach"]) => {
                interface::rules::detach(&existing(name, authority, view)?, which)
            }
            ("POST", ["v1", "vms", name, "stop"]) => {
                Ok(vec![Write::put(Table::Vms, existing(name, authority, view)?.id, "run", Run::Stopped.as_str())])
            }
            ("DELETE", ["v1", "vms", name]) => Ok(vec![Write::remove(Table::Vms, existing(name, authority, view)?.id)]),
            ("GET", ["v1", "volumes", name, "import"]) => volume::rules::import(name, &envelope.path, asked, view),
            (method, ["v1", "volumes", rest @ ..]) => volume::rules::derive(method, rest, &request.body, asked, view),
            _ => Err(Refusal::new(format!("{} {path} changes nothing in the state", envelope.method))),
        }
    }

    /// Of its own accord a host changes nothing, but that the founder says who owns the cluster.
    fn permit(&self, claim: &Claim, writes: &[Write], _view: &View) -> Result<(), Refusal> {
        if writes.is_empty() {
            return Ok(());
        }
        if claim.document != Document::Cluster || claim.author != self.founder {
            return Err(Refusal::new("a host changes nothing without a request"));
        }
        writes.iter().try_for_each(|write| match write {
            Write::Remove { table: Table::Owners, .. } => Ok(()),
            Write::Put { table: Table::Owners, id, field, value } if field == OWNER_KEY => {
                let key = value.as_text().and_then(|text| text.parse::<PublicKey>().ok());
                if key.is_some_and(|key| owner_id(&key) == *id) {
                    Ok(())
                } else {
                    Err(Refusal::new("an owner's record holds the key that its id is the hash of"))
                }
            }
            _ => Err(Refusal::new("without a request the founder of a cluster says who owns it, and nothing else")),
        })
    }
}

impl AgentRules {
    /// Before the founder has recorded an owner (a version before this one recorded none), it vouches for whom it let in: it could as well
    /// sign itself.
    fn authority(&self, signer: &PublicKey, claim: &Claim, view: &View) -> Result<Authority, Refusal> {
        if *signer == claim.author {
            return Ok(Authority::Host(HostId::of(signer)));
        }
        let owners = owners(view);
        if owners.contains(signer) || (owners.is_empty() && claim.author == self.founder) {
            return Ok(Authority::Owner);
        }
        Err(Refusal::new(format!("the key {signer} does not own this cluster")))
    }

    /// A new VM. The request that made one may be submitted again: a later deploy of it is taken back so.
    fn create(&self, create: &CreateVmRequest, asked: Asked<'_>, view: &View) -> Result<Vec<Write>, Refusal> {
        let name = &create.vm.spec.name;
        let id = VmId::derive(asked.signer, asked.key, name.as_str());
        let run = if create.start { Run::Running } else { Run::Stopped };
        // A copy of a VM may do as much as that.
        let mut limits = VmLimits::default();
        let mut interfaces = BTreeMap::new();
        if create.vm.has_guest() && !create.volumes.is_empty() {
            return Err(Refusal::new("only a VM that runs a kernel of its own is made with volumes"));
        }
        match vms(view).into_values().find(|vm| vm.id == id || vm.name() == name) {
            Some(vm) if vm.id == id && vm.name() == name => asked.authority.may_change(&vm)?,
            Some(vm) => return Err(Refusal::new(format!("there is a vm/{} already", vm.name()))),
            None => {
                let source = match (&create.disk_of, &create.fork_of) {
                    (None, None) => {
                        let mut writes = self.deploy(&create.vm, run, asked, view)?;
                        writes.extend(volume::rules::given(&create.volumes, (&id, name), &HostId::of(&asked.claim.author), view)?);
                        return Ok(writes);
                    }
                    _ if !create.vm.has_guest() => {
                        return Err(Refusal::new("a VM that runs a kernel of its own is no copy of another one"));
                    }
                    (Some(source), None) => source,
                    (None, Some(fork)) if create.start => &fork.vm,
                    _ => return Err(Refusal::new("a VM is a copy of a disk or goes on from a snapshot, and what goes on is started")),
                };
                let source = existing(source.as_str(), asked.authority, view)?;
                if source.host != HostId::of(&asked.claim.author) {
                    return Err(Refusal::new(format!("vm/{} is another host's, and its disk is there", source.name())));
                }
                (limits, interfaces) = (source.limits, source.interfaces);
            }
        }
        let is_new = vm_named(view, name).is_none();
        let mut writes = self.deploy(&create.vm, run, asked, view)?;
        writes.extend(limit_writes(id, VmLimits::default(), limits));
        if is_new {
            writes.extend(interface::rules::copy(&interfaces, &id, &self.cluster, view)?);
        }
        if let Some(fork) = create.fork_of.as_ref().filter(|_| is_new) {
            writes.push(Write::put(Table::Vms, id, "restore", fork.snapshot.as_str()));
            writes.push(Write::put(Table::Vms, id, "restore_starts", FIRST_START));
        }
        Ok(writes)
    }

    fn deploy(&self, deploy: &DeployRequest, run: Run, asked: Asked<'_>, view: &View) -> Result<Vec<Write>, Refusal> {
        let Asked { signer, key, claim, .. } = asked;
        let name = &deploy.spec.name;
        let new_id = &VmId::derive(signer, key, name.as_str());
        let text = serde_json::to_string(deploy).map_err(|error| Refusal::new(error.to_string()))?;
        if let Some(vm) = vm_named(view, name) {
            if vm.request.has_guest() != deploy.has_guest() {
                return Err(Refusal::new(format!("vm/{name} runs a kernel of its own, or is to: that is decided when a VM is made")));
            }
            let mut writes = vec![
                Write::put(Table::Vms, vm.id, "request", text),
                Write::put(Table::Vms, vm.id, "run", run.as_str()),
                Write::put(Table::Vms, vm.id, "actor", signer.to_string()),
            ];
            let (of_volumes, needs_start) = volume::rules::deploy(deploy, (&vm.id, &vm.host), false, asked, view)?;
            writes.extend(of_volumes);
            if vm.run == Run::Stopped || needs_start {
                writes.push(Write::put(Table::Vms, vm.id, "starts", vm.starts.saturating_add(1)));
            }
            return Ok(writes);
        }
        let taken = interface::taken(view);
        let ipv4 = Ipv4Range::for_cluster(&self.cluster).assign(new_id, &taken).map_err(|error| Refusal::new(error.to_string()))?;
        let put = |field: &str, value: Scalar| Write::put(Table::Vms, *new_id, field, value);
        let host = HostId::of(&claim.author);
        let mut writes = vec![
            put("name", name.as_str().into()),
            put("request", text.into()),
            put("host", host.to_string().into()),
            put("epoch", 1_u64.into()),
            put("run", run.as_str().into()),
            put("starts", FIRST_START.into()),
            put("ipv4", ipv4.to_string().into()),
            put("actor", signer.to_string().into()),
            put("created_at", u64::try_from(claim.time).unwrap_or_default().into()),
        ];
        writes.extend(volume::rules::deploy(deploy, (new_id, &host), true, asked, view)?.0);
        Ok(writes)
    }
}

fn json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| Refusal::new(error.to_string()))
}

fn existing(name: &str, authority: Authority, view: &View) -> Result<DesiredVm, Refusal> {
    let name: Name = name.parse().map_err(|error: form_types::name::NameError| Refusal::new(error.to_string()))?;
    let vm = vm_named(view, &name).ok_or_else(|| Refusal::new(format!("there is no vm/{name}")))?;
    authority.may_change(&vm)?;
    Ok(vm)
}

#[cfg(test)]
mod authority_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::request;
    use form_types::spec::{Env, EnvScope};

    #[test]
    fn what_changes_in_a_running_vm_needs_no_start() {
        let mut web = request("web");
        let env = |scope| Env { scope, key: "A".to_owned(), value: "1".to_owned() };
        web.spec.env = vec![env(EnvScope::Service("web".to_owned())), env(EnvScope::Service("nginx".to_owned()))];
        let boot = boot_digest(&web, 1);
        let app = renamed(&web, &"app".parse().unwrap());
        assert_eq!(app.spec.env[0].scope, EnvScope::Service("app".to_owned()), "its service is still its service");
        assert_eq!(app.spec.env[1].scope, EnvScope::Service("nginx".to_owned()));
        assert_eq!(boot_digest(&app, 1), boot);

        let set = SetRequest {
            labels: [("tier".to_owned(), Some("front".to_owned()))].into(),
            restart_policy: Some(Restart { policy: RestartPolicy::Never, max_retries: None }),
            ..SetRequest::default()
        };
        let live = with_set(&web, &set).unwrap();
        assert_eq!((live.spec.labels["tier"].as_str(), live.spec.restart.policy), ("front", RestartPolicy::Never));
        assert_eq!(boot_digest(&live, 1), boot);
        let gone = with_set(&live, &SetRequest { labels: [("tier".to_owned(), None)].into(), ..SetRequest::default() }).unwrap();
        assert!(gone.spec.labels.is_empty());

        let larger = with_set(&web, &SetRequest { memory_mib: Some(1024), ..SetRequest::default() }).unwrap();
        assert_ne!(boot_digest(&larger, 1), boot);
        assert_ne!(boot_digest(&web, 2), boot);
    }

    #[test]
    fn a_set_that_makes_no_sense_is_refused() {
        let label = |label: &str| SetRequest { labels: [(label.to_owned(), None)].into(), ..SetRequest::default() };
        for bad in [
            SetRequest { vcpus: Some(0), ..SetRequest::default() },
            SetRequest { vcpus: Some(129), ..SetRequest::default() },
            SetRequest { memory_mib: Some(1), ..SetRequest::default() },
            label(""),
            label("a b"),
        ] {
            assert!(with_set(&request("web"), &bad).is_err(), "{bad:?}");
        }
    }
}
