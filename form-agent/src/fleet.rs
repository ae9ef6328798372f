//! The VMs of this host as they are now: one driver each, and a table that every read looks at.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use form_api::vm::{GuestReport, Health, VmState};
use form_types::{Digest, VmId};
use jiff::Timestamp;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

use crate::{agent::Agent, desired, driver};

/// A VM as its driver sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    pub state: VmState,
    pub ready: bool,
    pub health: Health,
    pub started_at: Option<Timestamp>,
    /// Started again without being asked to: the VM, and its service inside.
    pub restarts: u32,
    pub fault: Option<String>,
    pub guest: Option<GuestReport>,
    /// What it was last started from.
    pub boot: Option<Digest>,
    /// For this boot the driver will try no more by itself.
    pub gave_up: bool,
    /// What its guest has of memory, in MiB, as long as that is not what it should have.
    pub memory_mib: Option<u64>,
}

impl Observed {
    pub const fn new() -> Self {
        Self {
            state: VmState::Pending,
            ready: false,
            health: Health::None,
            started_at: None,
            restarts: 0,
            fault: None,
            guest: None,
            boot: None,
            gave_up: false,
            memory_mib: None,
        }
    }
}

struct Handle {
    wake: Arc<Notify>,
    retry: Arc<std::sync::atomic::AtomicBool>,
    task: JoinHandle<()>,
}

pub struct Fleet {
    drivers: Mutex<BTreeMap<VmId, Handle>>,
    table: RwLock<BTreeMap<VmId, Observed>>,
    changed: watch::Sender<u64>,
}

impl Fleet {
    pub fn new() -> Self {
        Self { drivers: Mutex::default(), table: RwLock::default(), changed: watch::Sender::new(0) }
    }

    pub fn observed(&self, vm: &VmId) -> Option<Observed> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).get(vm).cloned()
    }

    pub fn update(&self, vm: &VmId, change: impl FnOnce(&mut Observed)) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let observed = table.entry(*vm).or_insert_with(Observed::new);
        let before = observed.clone();
        change(observed);
        let differs = *observed != before;
        drop(table);
        if differs {
            self.changed.send_modify(|count| *count += 1);
        }
    }

    pub fn forget(&self, vm: &VmId) {
        self.table.write().unwrap_or_else(PoisonError::into_inner).remove(vm);
        self.drivers.lock().unwrap_or_else(PoisonError::into_inner).remove(vm);
        self.changed.send_modify(|count| *count += 1);
    }

    /// Changes whenever anything in the table does.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Makes sure that every VM of this host, wanted or left over, has a driver, and wakes them all.
    pub fn reconcile(&self, agent: &Arc<Agent>) {
        // Looked at before the state: what is in neither is left over.
        let made = agent.being_made().clone();
        let wanted = desired::vms(&agent.view());
        let mut drivers = self.drivers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ids: Vec<VmId> = wanted.values().filter(|vm| vm.host == agent.host_id()).map(|vm| vm.id).collect();
        ids.extend(agent.vms_on_disk().into_iter().filter(|id| !made.contains(id)));
        for id in ids {
            // A driver that panicked has ended: its VM gets a new one.
            if drivers.get(&id).is_some_and(|handle| !handle.task.is_finished()) {
                continue;
            }
            let (wake, retry) = (Arc::new(Notify::new()), Arc::new(std::sync::atomic::AtomicBool::new(false)));
            self.update(&id, |_| {});
            let driver = driver::Driver::new(Arc::clone(agent), id, Arc::clone(&wake), Arc::clone(&retry));
            drivers.insert(id, Handle { wake, retry, task: tokio::spawn(driver.run()) });
        }
        for handle in drivers.values() {
            handle.wake.notify_one();
        }
    }

    /// Tells the driver to try again what it gave up.
    pub fn retry(&self, vm: &VmId) {
        self.update(vm, |observed| {
            if observed.gave_up {
                *observed = Observed { boot: observed.boot, restarts: 0, ..Observed::new() };
            }
        });
        if let Some(handle) = self.drivers.lock().unwrap_or_else(PoisonError::into_inner).get(vm) {
            handle.retry.store(true, std::sync::atomic::Ordering::Release);
            handle.wake.notify_one();
        }
    }
}
