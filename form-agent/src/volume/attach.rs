//! The volumes of a VM that is being started: made when they never were, grown, opened and locked.

use form_store::{OpenVolume, StoreError};
use form_types::{Name, VolumeFormat, settings::VolumeMount};
use form_vmm::config::DiskFormat;

use super::{DesiredVolume, of_vm};
use crate::{agent::Agent, desired::DesiredVm, vm::VolumeDisk};

/// A volume that is open for a VM.
pub struct Ready {
    pub volume: DesiredVolume,
    pub open: OpenVolume,
    pub read_only: bool,
    pub path: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("volume/{name}: {source}")]
    Store { name: Name, source: StoreError },
    #[error("volume/{name} is exported over NBD, at {uri}: end that with `form volume unexport {name}`")]
    Exported { name: Name, uri: String },
}

/// Opens all volumes that the VM should have, in the order of their ids. Blocks, also while a volume changes hands: what the state says
/// of them holds until they are locked.
///
/// # Errors
/// When one cannot be had: in use elsewhere, gone, no room.
pub fn open(agent: &Agent, vm: &DesiredVm) -> Result<Vec<Ready>, AttachError> {
    let wanted = of_vm(&agent.view(), &vm.id);
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    // A pool that does not answer is waited for before it is anybody's turn.
    for volume in wanted {
        let there = agent.store.pool(&volume.pool).and_then(|pool| pool.is_there());
        there.map_err(|source| AttachError::Store { name: volume.name, source })?;
    }
    let _turn = agent.volume_turn();
    of_vm(&agent.view(), &vm.id).into_iter().map(|volume| open_one(agent, volume)).collect()
}

/// Opens one volume for the VM that has it. Under the volumes' turn.
///
/// # Errors
/// As [`open`].
pub fn open_one(agent: &Agent, volume: DesiredVolume) -> Result<Ready, AttachError> {
    let (read_only, path) = volume.attached.as_ref().map_or((true, None), |attached| (attached.read_only, attached.path.clone()));
    // Both may read.
    if let Some(export) = agent.exports.of(&volume.id).filter(|export| export.writable || !read_only) {
        return Err(AttachError::Exported { name: volume.name, uri: export.uri });
    }
    let open = || {
        let pool = agent.store.pool(&volume.pool)?;
        // What a restore that was interrupted left to do.
        pool.settle_restore(&volume.id, volume.restored.as_ref())?;
        let entry = pool.ensure(&volume.id, volume.format, volume.size_bytes)?;
        if entry.size_bytes < volume.size_bytes {
            pool.grow(&volume.id, volume.size_bytes)?;
        }
        pool.open_volume(&volume.id, read_only)
    };
    match open() {
        Ok(open) => Ok(Ready { volume, open, read_only, path }),
        Err(source) => Err(AttachError::Store { name: volume.name, source }),
    }
}

impl Ready {
    /// What the VM process is told.
    pub fn disk(&self) -> VolumeDisk {
        let format = match self.open.format {
            VolumeFormat::Raw => DiskFormat::Raw,
            VolumeFormat::Qcow2 => DiskFormat::Qcow2,
        };
        VolumeDisk {
            name: self.volume.name.clone(),
            serial: self.volume.id.serial(),
            format,
            read_only: self.read_only,
            limits: self.volume.limits,
        }
    }

    /// What the guest is told.
    pub fn mount(&self) -> VolumeMount {
        VolumeMount { serial: self.volume.id.serial(), path: self.path.clone(), read_only: self.read_only, is_blank: self.open.is_blank }
    }
}
