//! The records of virtual machines: what should run, where. What comes out of the document is checked again here, because
//! an author that the rules let write may still have written nonsense: such a record is skipped and reported.

use std::{collections::BTreeMap, net::Ipv4Addr};

use form_types::{HostId, Name, VmId};

use crate::{
    view::{Record, Tables},
    write::{RecordId, Scalar, Table, Write},
};

/// What a VM should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    Running,
    Stopped,
}

impl Run {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
        }
    }
}

/// A VM as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRecord {
    pub id: VmId,
    pub name: Name,
    /// The host that is to run it.
    pub host: HostId,
    /// How often it has been given to a host. A host runs its own epoch only, so that a VM never runs twice.
    pub epoch: u64,
    pub run: Run,
    /// The deploy request, as JSON.
    pub request: String,
    /// Who asked for it last: a public key, or `local:<uid>`.
    pub actor: String,
    /// RFC 3339, by the clock of the host that was asked.
    pub created_at: String,
    /// Grows with each deploy that changed something, from 1.
    pub generation: u64,
    /// How often a restart has been asked for.
    pub restarts: u64,
    pub ipv4: Option<Ipv4Addr>,
}

const NAME: &str = "name";
const HOST: &str = "host";
const EPOCH: &str = "epoch";
const RUN: &str = "run";
const REQUEST: &str = "request";
const ACTOR: &str = "actor";
const CREATED_AT: &str = "created_at";
const GENERATION: &str = "generation";
const RESTARTS: &str = "restarts";
const IPV4: &str = "ipv4";

/// What is wrong with a record of the document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordFault {
    #[error("field `{0}` is missing")]
    Missing(&'static str),
    #[error("field `{0}` is not what it must be: {1}")]
    Invalid(&'static str, String),
}

/// A VM that lost its name to an older claim: the smallest id wins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostClaim {
    pub name: Name,
    pub loser: VmId,
    pub winner: VmId,
}

/// All VMs of a document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vms {
    /// Also those that lost their names.
    pub records: BTreeMap<VmId, VmRecord>,
    /// Who holds which name.
    pub names: BTreeMap<Name, VmId>,
    pub lost: Vec<LostClaim>,
    /// Records that are no VMs.
    pub faults: Vec<(RecordId, RecordFault)>,
}

impl Vms {
    /// Reads the VMs of the cluster's tables.
    pub fn read(tables: &Tables) -> Self {
        let mut vms = Self::default();
        // Ids ascend, so the first claim of a name is the one that wins.
        for (id, record) in tables.table(Table::Vms) {
            match VmRecord::read(*id, record) {
                Ok(vm) => {
                    match vms.names.get(&vm.name) {
                        Some(winner) => vms.lost.push(LostClaim { name: vm.name.clone(), loser: vm.id, winner: *winner }),
                        None => {
                            vms.names.insert(vm.name.clone(), vm.id);
                        }
                    }
                    vms.records.insert(vm.id, vm);
                }
                Err(fault) => vms.faults.push((*id, fault)),
            }
        }
        vms
    }

    pub fn by_name(&self, name: &Name) -> Option<&VmRecord> {
        self.records.get(self.names.get(name)?)
    }
}

fn text<'a>(record: &'a Record, field: &'static str) -> Result<&'a str, RecordFault> {
    match record.get(field) {
        None => Err(RecordFault::Missing(field)),
        Some(Scalar::Text(text)) => Ok(text),
        Some(_) => Err(RecordFault::Invalid(field, "it is no text".to_owned())),
    }
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(record: &Record, field: &'static str) -> Result<T, RecordFault> {
    text(record, field)?.parse().map_err(|error: T::Err| RecordFault::Invalid(field, error.to_string()))
}

fn number(record: &Record, field: &'static str) -> Result<u64, RecordFault> {
    match record.get(field) {
        None => Err(RecordFault::Missing(field)),
        Some(Scalar::Uint(number)) => Ok(*number),
        Some(_) => Err(RecordFault::Invalid(field, "it is no whole number".to_owned())),
    }
}

impl VmRecord {
    /// # Errors
    /// [`RecordFault`] names the field that is missing or makes no sense. Unknown fields are let be: a newer version's.
    pub fn read(id: RecordId, record: &Record) -> Result<Self, RecordFault> {
        let run = match text(record, RUN)? {
            "running" => Run::Running,
            "stopped" => Run::Stopped,
            other => return Err(RecordFault::Invalid(RUN, format!("`{}`", other.chars().take(40).collect::<String>()))),
        };
        Ok(Self {
            id: VmId::from_bytes(id.0),
            name: parsed(record, NAME)?,
            host: parsed(record, HOST)?,
            epoch: number(record, EPOCH)?,
            run,
            request: text(record, REQUEST)?.to_owned(),
            actor: text(record, ACTOR)?.to_owned(),
            created_at: text(record, CREATED_AT)?.to_owned(),
            generation: number(record, GENERATION)?,
            restarts: number(record, RESTARTS)?,
            ipv4: record.contains_key(IPV4).then(|| parsed(record, IPV4)).transpose()?,
        })
    }

    /// The writes that make the record, or bring it to this. What is there already is dropped when they are committed.
    /// (An address once given is kept: `ipv4: None` writes nothing.)
    pub fn writes(&self) -> Vec<Write> {
        let put = |field: &str, value: Scalar| Write::put(Table::Vms, self.id, field, value);
        let mut writes = vec![
            put(NAME, self.name.as_str().into()),
            put(HOST, self.host.to_string().into()),
            put(EPOCH, self.epoch.into()),
            put(RUN, self.run.as_str().into()),
            put(REQUEST, self.request.as_str().into()),
            put(ACTOR, self.actor.as_str().into()),
            put(CREATED_AT, self.created_at.as_str().into()),
            put(GENERATION, self.generation.into()),
            put(RESTARTS, self.restarts.into()),
        ];
        writes.extend(self.ipv4.map(|address| put(IPV4, address.to_string().into())));
        writes
    }

    /// The write that asks for it to run or to stop.
    pub fn write_run(id: VmId, run: Run) -> Write {
        Write::put(Table::Vms, id, RUN, run.as_str())
    }

    pub fn write_restarts(id: VmId, restarts: u64) -> Write {
        Write::put(Table::Vms, id, RESTARTS, restarts)
    }

    pub fn remove(id: VmId) -> Write {
        Write::remove(Table::Vms, id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(id: u8, name: &str) -> VmRecord {
        VmRecord {
            id: VmId::from_bytes([id; 16]),
            name: name.parse().unwrap(),
            host: HostId::from_bytes([9; 16]),
            epoch: 1,
            run: Run::Running,
            request: "{}".to_owned(),
            actor: "local:0".to_owned(),
            created_at: "2026-01-01T00:00:00Z".to_owned(),
            generation: 1,
            restarts: 0,
            ipv4: Some(Ipv4Addr::new(10, 0, 0, 2)),
        }
    }

    fn tables(writes: &[Write]) -> Tables {
        let mut records: BTreeMap<RecordId, Record> = BTreeMap::new();
        for write in writes {
            if let Write::Put { id, field, value, .. } = write {
                records.entry(*id).or_default().insert(field.clone(), value.clone());
            }
        }
        let mut tables = Tables::default();
        for (id, record) in records {
            tables.set(Table::Vms, id, Some(record));
        }
        tables
    }

    #[test]
    fn a_record_survives_its_writes() {
        let vms = Vms::read(&tables(&vm(1, "web").writes()));
        assert_eq!(vms.by_name(&"web".parse().unwrap()), Some(&vm(1, "web")));
        assert!(vms.lost.is_empty() && vms.faults.is_empty());
    }

    #[test]
    fn the_smallest_id_keeps_a_name() {
        let vms = Vms::read(&tables(&[vm(2, "web").writes(), vm(1, "web").writes(), vm(3, "db").writes()].concat()));
        let name: Name = "web".parse().unwrap();
        let (winner, loser) = (VmId::from_bytes([1; 16]), VmId::from_bytes([2; 16]));
        assert_eq!(vms.by_name(&name).map(|vm| vm.id), Some(winner));
        assert_eq!(vms.lost, [LostClaim { name, loser, winner }]);
        assert_eq!(vms.records.len(), 3);
    }

    #[test]
    fn nonsense_is_skipped_and_reported() {
        let bad = |field: &str, value: Scalar| {
            [vm(1, "web").writes(), vec![Write::put(Table::Vms, VmId::from_bytes([1; 16]), field, value)]].concat()
        };
        for writes in [
            bad("name", "Not A Name".into()),
            bad("name", 7_u64.into()),
            bad("run", "flying".into()),
            bad("host", "x".into()),
            bad("epoch", "1".into()),
            bad("ipv4", "1.2.3".into()),
            vec![VmRecord::write_run(VmId::from_bytes([1; 16]), Run::Running)],
        ] {
            let vms = Vms::read(&tables(&writes));
            assert_eq!((vms.records.len(), vms.names.len(), vms.faults.len()), (0, 0, 1), "{writes:?}");
        }
        let unknown = Vms::read(&tables(&bad("from_the_future", true.into())));
        assert_eq!(unknown.records.len(), 1);
    }
}
