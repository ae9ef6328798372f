//! Volumes: what should be, who has which, and what a VM is started with.

pub mod attach;
pub mod describe;
pub mod export;
pub mod live;
pub mod operate;
pub mod plan;
pub mod pool;
pub mod rules;
pub mod snapshot;
mod sync;
pub mod transfer;

use std::collections::{BTreeMap, BTreeSet};

use form_state::{Record, RecordId, Scalar, Table, View};
use form_types::{DiskLimits, HostId, Name, OperationId, VmId, VolumeFormat, VolumeId};
use jiff::Timestamp;

/// Most volumes of one VM: the slots of its bus, less those of the other devices.
pub const MAX_ATTACHED: usize = 24;

/// One volume as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredVolume {
    pub id: VolumeId,
    pub name: Name,
    pub host: HostId,
    pub pool: Name,
    pub format: VolumeFormat,
    pub size_bytes: u64,
    pub created_at: Timestamp,
    pub limits: DiskLimits,
    /// The last restore from a snapshot: what is in the pool is to be what that one made.
    pub restored: Option<OperationId>,
    /// The one VM that has it.
    pub attached: Option<Attached>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    pub vm: VmId,
    /// Where it is mounted; none for the bare device.
    pub path: Option<String>,
    pub read_only: bool,
    pub by_formfile: bool,
}

impl DesiredVolume {
    fn read(id: &RecordId, record: &Record, view: &View) -> Option<Self> {
        let text = |field: &str| record.get(field).and_then(Scalar::as_text);
        let number = |field: &str| record.get(field).and_then(Scalar::as_uint);
        let flag = |field: &str| record.get(field).and_then(Scalar::as_bool).unwrap_or(false);
        // A VM that is gone has nothing any more.
        let vm = text("vm").and_then(|text| text.parse::<VmId>().ok()).filter(|vm| view.cluster().record(Table::Vms, *vm).is_some());
        let attached = vm.map(|vm| Attached {
            vm,
            path: text("path").filter(|path| !path.is_empty()).map(str::to_owned),
            read_only: flag("read_only"),
            by_formfile: flag("by_formfile"),
        });
        Some(Self {
            id: VolumeId::from_bytes(id.0),
            name: text("name")?.parse().ok()?,
            host: text("host")?.parse().ok()?,
            pool: text("pool")?.parse().ok()?,
            format: if text("format")? == VolumeFormat::Qcow2.as_str() { VolumeFormat::Qcow2 } else { VolumeFormat::Raw },
            size_bytes: number("size")?,
            created_at: Timestamp::from_second(i64::try_from(number("created_at")?).ok()?).ok()?,
            limits: crate::desired::read_disk_limits(record, rules::IOPS, rules::BYTES_PER_SECOND),
            restored: text(rules::RESTORED).and_then(|text| text.parse().ok()),
            attached,
        })
    }

    pub fn is_of(&self, vm: &VmId) -> bool {
        self.attached.as_ref().is_some_and(|attached| attached.vm == *vm)
    }
}

/// Every volume in the state, by name. A record that makes no sense is passed over; of two that claim one name the smaller id has it.
pub fn volumes(view: &View) -> BTreeMap<Name, DesiredVolume> {
    let mut names = BTreeSet::new();
    view.cluster()
        .table(Table::Volumes)
        .filter_map(|(id, record)| DesiredVolume::read(id, record, view))
        .filter(|volume| names.insert(volume.name.clone()))
        .map(|volume| (volume.name.clone(), volume))
        .collect()
}

/// Those that a VM should have, in the order of their ids.
pub fn of_vm(view: &View, vm: &VmId) -> Vec<DesiredVolume> {
    let mut found: Vec<DesiredVolume> = volumes(view).into_values().filter(|volume| volume.is_of(vm)).collect();
    found.sort_by_key(|volume| volume.id);
    found
}
