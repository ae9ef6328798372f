//! What should be: the VMs in the replicated state, and the rules by which a signed request changes them.
//!
//! The rules are pure: every replica derives the same writes from the same request, and refuses a change that says anything else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use form_api::{deploy::DeployRequest, sign};
use form_net::{Ipv4Range, Ipv6Prefix, Mac};
use form_state::{Claim, Record, RecordId, Refusal, Rules, Scalar, SignedRequest, Table, View, Write};
use form_types::{ClusterId, Digest, HostId, Name, PublicKey, VmId};
use jiff::Timestamp;

/// Whether a VM should run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    Running,
    Stopped,
}

impl Run {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
        }
    }
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
    pub ipv4: Ipv4Addr,
    pub actor: PublicKey,
    pub created_at: Timestamp,
    pub request: DeployRequest,
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
            run: if text("run")? == "running" { Run::Running } else { Run::Stopped },
            starts: number("starts")?,
            ipv4: text("ipv4")?.parse().ok()?,
            actor: text("actor")?.parse().ok()?,
            created_at: Timestamp::from_second(i64::try_from(number("created_at")?).ok()?).ok()?,
            request,
        })
    }
}

fn boot_digest(request: &DeployRequest, starts: u64) -> Digest {
    Digest::of(format!("{starts} {}", serde_json::to_string(request).unwrap_or_default()).as_bytes())
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

pub fn vm_named(view: &View, name: &Name) -> Option<DesiredVm> {
    vms(view).into_values().find(|vm| vm.name() == name)
}

/// The rules of this version. `owner` is who may ask; the host itself may, for those who come in through its Unix socket.
pub struct AgentRules {
    pub cluster: ClusterId,
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
        let path = envelope.path.split('?').next().unwrap_or_default();
        let words: Vec<&str> = path.split('/').skip(1).collect();
        match (envelope.method.as_str(), words.as_slice()) {
            ("POST", ["v1", "deploy"]) => {
                let deploy: DeployRequest = serde_json::from_slice(&request.body).map_err(|error| Refusal::new(error.to_string()))?;
                self.deploy(&deploy, &signer, &VmId::derive(&signer, &envelope.idempotency_key, deploy.spec.name.as_str()), claim, view)
            }
            ("POST", ["v1", "vms", name, "start" | "restart"]) => {
                let vm = existing(name, view)?;
                let starts = vm.starts.saturating_add(1);
                Ok(vec![Write::put(Table::Vms, vm.id, "run", Run::Running.as_str()), Write::put(Table::Vms, vm.id, "starts", starts)])
            }
            ("POST", ["v1", "vms", name, "stop"]) => {
                Ok(vec![Write::put(Table::Vms, existing(name, view)?.id, "run", Run::Stopped.as_str())])
            }
            ("DELETE", ["v1", "vms", name]) => Ok(vec![Write::remove(Table::Vms, existing(name, view)?.id)]),
            _ => Err(Refusal::new(format!("{} {path} changes nothing in the state", envelope.method))),
        }
    }

    fn permit(&self, _claim: &Claim, writes: &[Write], _view: &View) -> Result<(), Refusal> {
        if writes.is_empty() { Ok(()) } else { Err(Refusal::new("a host changes nothing without a request")) }
    }
}

impl AgentRules {
    fn deploy(&self, deploy: &DeployRequest, signer: &PublicKey, new_id: &VmId, claim: &Claim, view: &View) -> Result<Vec<Write>, Refusal> {
        let name = &deploy.spec.name;
        let text = serde_json::to_string(deploy).map_err(|error| Refusal::new(error.to_string()))?;
        if let Some(vm) = vm_named(view, name) {
            let mut writes = vec![
                Write::put(Table::Vms, vm.id, "request", text),
                Write::put(Table::Vms, vm.id, "run", Run::Running.as_str()),
                Write::put(Table::Vms, vm.id, "actor", signer.to_string()),
            ];
            if vm.run == Run::Stopped {
                writes.push(Write::put(Table::Vms, vm.id, "starts", vm.starts.saturating_add(1)));
            }
            return Ok(writes);
        }
        let taken = vms(view).values().map(|vm| vm.ipv4).collect();
        let ipv4 = Ipv4Range::for_cluster(&self.cluster).assign(new_id, &taken).map_err(|error| Refusal::new(error.to_string()))?;
        let put = |field: &str, value: Scalar| Write::put(Table::Vms, *new_id, field, value);
        Ok(vec![
            put("name", name.as_str().into()),
            put("request", text.into()),
            put("host", HostId::of(&claim.author).to_string().into()),
            put("epoch", 1_u64.into()),
            put("run", Run::Running.as_str().into()),
            put("starts", 1_u64.into()),
            put("ipv4", ipv4.to_string().into()),
            put("actor", signer.to_string().into()),
            put("created_at", u64::try_from(claim.time).unwrap_or_default().into()),
        ])
    }
}

fn existing(name: &str, view: &View) -> Result<DesiredVm, Refusal> {
    let name: Name = name.parse().map_err(|error: form_types::name::NameError| Refusal::new(error.to_string()))?;
    vm_named(view, &name).ok_or_else(|| Refusal::new(format!("there is no vm/{name}")))
}
