//! The rules by which a signed request changes volumes. Pure, as those of VMs: every replica derives the same writes.

use std::collections::BTreeMap;

use form_api::{
    deploy::{DeployRequest, GivenVolume},
    volume::{AttachRequest, CloneRequest, CreateRequest, ImportQuery, MoveRequest, ResizeRequest, SetVolumeRequest, VolumeRestoreRequest},
};
use form_state::{Claim, Refusal, Scalar, Table, View, Write};
use form_types::{
    DiskLimits, HostId, IdempotencyKey, Name, OperationId, PublicKey, VmId, VolumeFormat, VolumeId, limits::LimitError, volume,
};

use super::{DesiredVolume, MAX_ATTACHED, of_vm, volumes};
use crate::desired::{self, Authority};

/// Who asked, under which key, which host records it, and in whose name.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub signer: &'a PublicKey,
    pub key: &'a IdempotencyKey,
    pub claim: &'a Claim,
    pub authority: Authority,
}

/// Why a volume cannot be had so, in words for the one who asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeFault {
    #[error("there is no volume/{0}")]
    NoVolume(Name),
    #[error("there is no vm/{0}")]
    NoVm(Name),
    #[error("there is a volume/{0} already")]
    NameTaken(Name),
    #[error("volume/{volume} is attached to vm/{holder}, and one VM at a time has a volume")]
    Held { volume: Name, holder: String },
    #[error("volume/{0} is attached to no VM")]
    NotAttached(Name),
    #[error("vm/{vm} has volume/{holder} at {path}, where volume/{volume} was to be mounted")]
    PathTaken { vm: Name, path: String, holder: Name, volume: Name },
    #[error("{0} is no mount point: an absolute path without `.` and `..`, other than `/`, and not in /proc, /sys, /dev or /run")]
    Path(String),
    #[error("volume/{volume} lives on another host than vm/{vm}, and a VM has only volumes of its own host")]
    Elsewhere { volume: Name, vm: Name },
    #[error("volume/{0} is another host's: only the owner's key may change it from here")]
    NotYours(Name),
    #[error("a VM has at most {MAX_ATTACHED} volumes")]
    TooMany,
    #[error("volume/{name} has {has} bytes, and a volume is never made smaller")]
    Shrinks { name: Name, has: u64 },
    #[error("volume/{volume} lives in pool/{pool} already")]
    There { volume: Name, pool: Name },
    #[error("only a clone of a snapshot may have another size than the volume")]
    CloneSize,
    #[error(transparent)]
    Size(#[from] volume::VolumeSizeError),
    #[error(transparent)]
    Limit(#[from] LimitError),
}

impl From<VolumeFault> for Refusal {
    fn from(fault: VolumeFault) -> Self {
        Self::new(fault.to_string())
    }
}

fn json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| Refusal::new(error.to_string()))
}

fn name_of(text: &str) -> Result<Name, Refusal> {
    text.parse().map_err(|error: form_types::name::NameError| Refusal::new(error.to_string()))
}

/// What a request to `/v1/volumes/…` changes; `words` is what follows.
///
/// # Errors
/// What the rules refuse.
pub fn derive(method: &str, words: &[&str], body: &[u8], asked: Asked<'_>, view: &View) -> Result<Vec<Write>, Refusal> {
    let named = |name: &str| -> Result<DesiredVolume, Refusal> {
        let volume = existing(&name_of(name)?, view)?;
        if asked.authority.is_over(&volume.host) { Ok(volume) } else { Err(VolumeFault::NotYours(volume.name).into()) }
    };
    match (method, words) {
        ("POST", []) => new(json(body)?, asked, view),
        ("POST", [name, "clone"]) => {
            let (source, request) = (named(name)?, json::<CloneRequest>(body)?);
            let size_bytes = clone_size(&source, &request)?;
            check_new(&request.name, size_bytes, view)?;
            let place = Place { host: &source.host, pool: &source.pool, format: source.format };
            let mut writes = created(&place, &request.name, size_bytes, asked);
            let id = VolumeId::derive(asked.signer, asked.key, request.name.as_str());
            writes.extend(limited(&id, DiskLimits::default(), source.limits));
            Ok(writes)
        }
        ("POST", [name, "attach"]) => {
            let (volume, request) = (named(name)?, json::<AttachRequest>(body)?);
            let vm = check_attach(&volume, &request, view)?;
            Ok(attached(&volume.id, &vm, request.path.as_deref(), request.read_only, false))
        }
        ("POST", [name, "detach"]) => {
            let volume = named(name)?;
            check_detach(&volume)?;
            Ok(vec![detached(&volume.id)])
        }
        ("POST", [name, "resize"]) => {
            let (volume, request) = (named(name)?, json::<ResizeRequest>(body)?);
            check_resize(&volume, request.size_bytes)?;
            Ok(vec![Write::put(Table::Volumes, volume.id, "size", request.size_bytes)])
        }
        ("PATCH", [name]) => {
            let volume = named(name)?;
            let limits = check_set(&volume, &json(body)?)?;
            Ok(limited(&volume.id, volume.limits, limits))
        }
        ("POST", [name, "move"]) => {
            let (volume, request) = (named(name)?, json::<MoveRequest>(body)?);
            check_move(&volume, &request.pool)?;
            Ok(vec![Write::put(Table::Volumes, volume.id, "pool", request.pool.as_str())])
        }
        ("POST", [name, "restore"]) => {
            let (volume, request) = (named(name)?, json::<VolumeRestoreRequest>(body)?);
            let size_bytes = restored_size(&volume, &request)?;
            let operation = OperationId::derive(asked.signer, asked.key);
            let put = |field: &str, value: Scalar| Write::put(Table::Volumes, volume.id, field, value);
            Ok(vec![put("size", size_bytes.into()), put(RESTORED, operation.to_string().into())])
        }
        ("DELETE", [name]) => {
            let volume = named(name)?;
            check_remove(&volume, view)?;
            Ok(vec![Write::remove(Table::Volumes, volume.id)])
        }
        _ => Err(Refusal::new(format!("{method} changes no volume so"))),
    }
}

/// What an import to the volume `name` changes; `path` has the query that says what it is like.
///
/// # Errors
/// What the rules refuse.
pub fn import(name: &str, path: &str, asked: Asked<'_>, view: &View) -> Result<Vec<Write>, Refusal> {
    let uri: http::Uri = path.parse().map_err(|_| Refusal::new("the path is none"))?;
    let query = axum::extract::Query::<ImportQuery>::try_from_uri(&uri).map_err(|error| Refusal::new(error.body_text()))?;
    new(query.0.volume(name_of(name)?), asked, view)
}

fn new(request: CreateRequest, asked: Asked<'_>, view: &View) -> Result<Vec<Write>, Refusal> {
    check_new(&request.name, request.size_bytes, view)?;
    request.limits.check().map_err(VolumeFault::from)?;
    let pool = request.pool.unwrap_or_else(form_store::local_pool);
    let host = HostId::of(&asked.claim.author);
    let mut writes = created(&Place { host: &host, pool: &pool, format: request.format }, &request.name, request.size_bytes, asked);
    let id = VolumeId::derive(asked.signer, asked.key, request.name.as_str());
    writes.extend(limited(&id, DiskLimits::default(), request.limits));
    Ok(writes)
}

/// # Errors
/// When there is none of this name.
pub fn existing(name: &Name, view: &View) -> Result<DesiredVolume, VolumeFault> {
    volumes(view).remove(name).ok_or_else(|| VolumeFault::NoVolume(name.clone()))
}

/// # Errors
/// When the name is taken, or no volume has such a size.
pub fn check_new(name: &Name, size_bytes: u64, view: &View) -> Result<(), VolumeFault> {
    volume::check_size(size_bytes)?;
    if volumes(view).contains_key(name) { Err(VolumeFault::NameTaken(name.clone())) } else { Ok(()) }
}

/// Gives the VM that would get it.
///
/// # Errors
/// When another VM has it, the VM is on another host or has too many, or the path is taken or no mount point.
pub fn check_attach(volume: &DesiredVolume, request: &AttachRequest, view: &View) -> Result<VmId, VolumeFault> {
    let vm = desired::vm_named(view, &request.vm).ok_or_else(|| VolumeFault::NoVm(request.vm.clone()))?;
    if let Some(attached) = &volume.attached {
        return Err(VolumeFault::Held { volume: volume.name.clone(), holder: holder(view, &attached.vm) });
    }
    if volume.host != vm.host {
        return Err(VolumeFault::Elsewhere { volume: volume.name.clone(), vm: vm.name().clone() });
    }
    let others = of_vm(view, &vm.id);
    if others.len() >= MAX_ATTACHED {
        return Err(VolumeFault::TooMany);
    }
    if let Some(path) = &request.path {
        check_path(path)?;
        path_free(&others, &vm.request.spec.name, &volume.name, path)?;
    }
    Ok(vm.id)
}

/// # Errors
/// When no VM has it.
pub fn check_detach(volume: &DesiredVolume) -> Result<(), VolumeFault> {
    if volume.attached.is_some() { Ok(()) } else { Err(VolumeFault::NotAttached(volume.name.clone())) }
}

/// # Errors
/// When it would be made smaller, or no volume has such a size.
pub fn check_resize(volume: &DesiredVolume, size_bytes: u64) -> Result<(), VolumeFault> {
    volume::check_size(size_bytes)?;
    if size_bytes < volume.size_bytes {
        return Err(VolumeFault::Shrinks { name: volume.name.clone(), has: volume.size_bytes });
    }
    Ok(())
}

/// Gives the limits that it would have.
///
/// # Errors
/// When there cannot be such a limit.
pub fn check_set(volume: &DesiredVolume, request: &SetVolumeRequest) -> Result<DiskLimits, VolumeFault> {
    let limits = volume.limits.with(request.iops, request.bytes_per_second);
    limits.check()?;
    Ok(limits)
}

/// # Errors
/// When it lives there already.
pub fn check_move(volume: &DesiredVolume, pool: &Name) -> Result<(), VolumeFault> {
    if volume.pool == *pool { Err(VolumeFault::There { volume: volume.name.clone(), pool: pool.clone() }) } else { Ok(()) }
}

/// The size of a clone. That of a snapshot is in the signed request, since the state knows nothing of snapshots; the host looks whether it is true.
///
/// # Errors
/// When a size is asked for without a snapshot that has it.
pub fn clone_size(source: &DesiredVolume, request: &CloneRequest) -> Result<u64, VolumeFault> {
    match request.size_bytes {
        Some(size_bytes) if request.snapshot.is_none() && size_bytes != source.size_bytes => Err(VolumeFault::CloneSize),
        asked => Ok(asked.unwrap_or(source.size_bytes)),
    }
}

/// The size that a volume has when it has gone back to a snapshot: see [`clone_size`].
///
/// # Errors
/// When no volume has such a size.
pub fn restored_size(volume: &DesiredVolume, request: &VolumeRestoreRequest) -> Result<u64, VolumeFault> {
    let size_bytes = request.size_bytes.unwrap_or(volume.size_bytes);
    volume::check_size(size_bytes)?;
    Ok(size_bytes)
}

/// # Errors
/// When a VM has it.
pub fn check_remove(volume: &DesiredVolume, view: &View) -> Result<(), VolumeFault> {
    match &volume.attached {
        Some(attached) => Err(VolumeFault::Held { volume: volume.name.clone(), holder: holder(view, &attached.vm) }),
        None => Ok(()),
    }
}

fn holder(view: &View, vm: &VmId) -> String {
    desired::vm(view, vm).map_or_else(|| vm.to_string(), |vm| vm.name().to_string())
}

fn check_path(path: &str) -> Result<(), VolumeFault> {
    let mut parts = path.split('/');
    let absolute = parts.next() == Some("");
    let parts: Vec<&str> = parts.collect();
    let kernels = parts.first().is_some_and(|first| ["proc", "sys", "dev", "run"].contains(first));
    let plain = parts.iter().all(|part| !part.is_empty() && *part != "." && *part != "..");
    if absolute && plain && !kernels && path.len() < 4096 && !path.contains(|letter: char| letter.is_control()) {
        Ok(())
    } else {
        Err(VolumeFault::Path(path.chars().take(80).collect()))
    }
}

fn path_free(others: &[DesiredVolume], vm: &Name, volume: &Name, path: &str) -> Result<(), VolumeFault> {
    let at_path = |other: &&DesiredVolume| other.attached.as_ref().is_some_and(|attached| attached.path.as_deref() == Some(path));
    match others.iter().filter(|other| other.name != *volume).find(at_path) {
        Some(other) => {
            Err(VolumeFault::PathTaken { vm: vm.clone(), path: path.to_owned(), holder: other.name.clone(), volume: volume.clone() })
        }
        None => Ok(()),
    }
}

/// Where a volume lives, and how.
struct Place<'a> {
    host: &'a HostId,
    pool: &'a Name,
    format: VolumeFormat,
}

fn created(place: &Place<'_>, name: &Name, size_bytes: u64, asked: Asked<'_>) -> Vec<Write> {
    let id = VolumeId::derive(asked.signer, asked.key, name.as_str());
    let put = |field: &str, value: Scalar| Write::put(Table::Volumes, id, field, value);
    vec![
        put("name", name.as_str().into()),
        put("host", place.host.to_string().into()),
        put("pool", place.pool.as_str().into()),
        put("format", place.format.as_str().into()),
        put("size", size_bytes.into()),
        put("actor", asked.signer.to_string().into()),
        put("created_at", u64::try_from(asked.claim.time).unwrap_or_default().into()),
    ]
}

/// Fields of a volume's record: what a VM may do with it in a second. 0 is no limit.
pub(super) const IOPS: &str = "iops";
pub(super) const BYTES_PER_SECOND: &str = "bytes_per_second";

/// Field of a volume's record: the operation by which it last went back to a snapshot.
pub(super) const RESTORED: &str = "restored";

/// Only of those limits that differ: what two change at once and apart holds both.
fn limited(id: &VolumeId, before: DiskLimits, after: DiskLimits) -> Vec<Write> {
    let fields = |limits: DiskLimits| [(IOPS, limits.iops), (BYTES_PER_SECOND, limits.bytes_per_second)];
    let changed = fields(before).into_iter().zip(fields(after)).filter(|(before, after)| before != after);
    changed.map(|(_, (field, limit))| Write::put(Table::Volumes, *id, field, limit.unwrap_or(0))).collect()
}

fn attached(id: &VolumeId, vm: &VmId, path: Option<&str>, read_only: bool, by_formfile: bool) -> Vec<Write> {
    vec![
        Write::put(Table::Volumes, *id, "vm", vm.to_string()),
        Write::put(Table::Volumes, *id, "path", path.unwrap_or_default()),
        Write::put(Table::Volumes, *id, "read_only", read_only),
        Write::put(Table::Volumes, *id, "by_formfile", by_formfile),
    ]
}

fn detached(id: &VolumeId) -> Write {
    Write::put(Table::Volumes, *id, "vm", "")
}

/// The volumes that a new VM, called `vm`, of `host` begins with.
///
/// # Errors
/// When one is not there, elsewhere, another VM's or named twice, or there are too many.
pub fn check_given(given: &[GivenVolume], vm: &Name, host: &HostId, view: &View) -> Result<Vec<DesiredVolume>, VolumeFault> {
    if given.len() > MAX_ATTACHED {
        return Err(VolumeFault::TooMany);
    }
    let one = |(index, given_volume): (usize, &GivenVolume)| {
        let volume = existing(&given_volume.name, view)?;
        if volume.host != *host {
            return Err(VolumeFault::Elsewhere { volume: volume.name, vm: vm.clone() });
        }
        if let Some(attached) = &volume.attached {
            return Err(VolumeFault::Held { holder: holder(view, &attached.vm), volume: volume.name });
        }
        if given[..index].iter().any(|other| other.name == volume.name) {
            return Err(VolumeFault::Held { holder: vm.to_string(), volume: volume.name });
        }
        Ok(volume)
    };
    given.iter().enumerate().map(one).collect()
}

/// The writes that give them to it.
///
/// # Errors
/// As [`check_given`].
pub fn given(given: &[GivenVolume], (id, name): (&VmId, &Name), host: &HostId, view: &View) -> Result<Vec<Write>, VolumeFault> {
    let volumes = check_given(given, name, host, view)?;
    let attach = |(volume, given): (&DesiredVolume, &GivenVolume)| attached(&volume.id, id, None, given.read_only, false);
    Ok(volumes.iter().zip(given).flat_map(attach).collect())
}

/// What a deploy does with the volumes of its Formfile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deployed {
    /// To be made, with their sizes.
    pub new: BTreeMap<Name, u64>,
    /// There already, and attached to the VM by this deploy.
    pub taken: Vec<DesiredVolume>,
    /// Made larger, with the new size.
    pub grown: Vec<(DesiredVolume, u64)>,
    /// No longer in the Formfile: detached, and kept.
    pub left: Vec<DesiredVolume>,
}

impl Deployed {
    /// Whether the VM has to be started to get what it should have.
    pub fn is_nothing(&self) -> bool {
        self.new.is_empty() && self.taken.is_empty() && self.grown.is_empty() && self.left.is_empty()
    }
}

/// What deploying `request` as the VM `vm` (none: a new one) of `host` means for the volumes.
///
/// # Errors
/// When another VM has one of them, one lives on another host, or a path is taken.
pub fn deployed(request: &DeployRequest, vm: Option<&VmId>, host: &HostId, view: &View) -> Result<Deployed, VolumeFault> {
    let all = volumes(view);
    let wanted = &request.spec.volumes;
    let mine: Vec<DesiredVolume> = vm.map(|vm| of_vm(view, vm)).unwrap_or_default();
    let left = mine
        .iter()
        .filter(|volume| volume.attached.as_ref().is_some_and(|attached| attached.by_formfile))
        .filter(|volume| wanted.iter().all(|wanted| wanted.name != volume.name))
        .cloned()
        .collect();
    let mut deployed = Deployed { left, ..Deployed::default() };
    let stay: Vec<DesiredVolume> = mine.iter().filter(|volume| !deployed.left.contains(volume)).cloned().collect();
    if stay.iter().filter(|volume| wanted.iter().all(|wanted| wanted.name != volume.name)).count() + wanted.len() > MAX_ATTACHED {
        return Err(VolumeFault::TooMany);
    }
    for (index, volume) in wanted.iter().enumerate() {
        check_path(&volume.path)?;
        let others: Vec<DesiredVolume> =
            stay.iter().filter(|other| wanted.iter().all(|wanted| wanted.name != other.name)).cloned().collect();
        path_free(&others, &request.spec.name, &volume.name, &volume.path)?;
        if let Some(other) = wanted[..index].iter().find(|other| other.path == volume.path || other.name == volume.name) {
            let (vm, path, holder) = (request.spec.name.clone(), volume.path.clone(), other.name.clone());
            return Err(VolumeFault::PathTaken { vm, path, holder, volume: volume.name.clone() });
        }
        let Some(there) = all.get(&volume.name) else {
            let size = volume.size_bytes.unwrap_or(volume::DEFAULT_BYTES);
            volume::check_size(size)?;
            deployed.new.insert(volume.name.clone(), size);
            continue;
        };
        if there.host != *host {
            return Err(VolumeFault::Elsewhere { volume: volume.name.clone(), vm: request.spec.name.clone() });
        }
        match &there.attached {
            Some(attached) if Some(&attached.vm) != vm => {
                return Err(VolumeFault::Held { volume: volume.name.clone(), holder: holder(view, &attached.vm) });
            }
            Some(attached) if attached.path.as_ref() == Some(&volume.path) && !attached.read_only && attached.by_formfile => {}
            _ => deployed.taken.push(there.clone()),
        }
        if let Some(size) = volume.size_bytes.filter(|size| *size > there.size_bytes) {
            volume::check_size(size)?;
            deployed.grown.push((there.clone(), size));
        }
    }
    Ok(deployed)
}

/// The writes of a deploy, and whether a running VM has to be started again for them.
///
/// # Errors
/// As [`deployed`].
pub fn deploy(
    request: &DeployRequest,
    (vm, host): (&VmId, &HostId),
    is_new: bool,
    asked: Asked<'_>,
    view: &View,
) -> Result<(Vec<Write>, bool), VolumeFault> {
    let deployed = deployed(request, (!is_new).then_some(vm), host, view)?;
    let place = Place { host, pool: &form_store::local_pool(), format: VolumeFormat::Raw };
    let mut writes = Vec::new();
    for volume in &request.spec.volumes {
        let mut attach = |id: &VolumeId| writes.extend(attached(id, vm, Some(&volume.path), false, true));
        if let Some(size) = deployed.new.get(&volume.name) {
            attach(&VolumeId::derive(asked.signer, asked.key, volume.name.as_str()));
            writes.extend(created(&place, &volume.name, *size, asked));
        } else if let Some(there) = deployed.taken.iter().find(|there| there.name == volume.name) {
            attach(&there.id);
        }
    }
    writes.extend(deployed.grown.iter().map(|(volume, size)| Write::put(Table::Volumes, volume.id, "size", *size)));
    writes.extend(deployed.left.iter().map(|volume| detached(&volume.id)));
    Ok((writes, !deployed.is_nothing()))
}

#[cfg(test)]
mod tests;
