//! What the process gives up before the guest runs its first instruction.
//!
//! Two steps. [`prepare`] is for the whole process, while it has one thread: namespaces, user, capabilities, landlock. Then each
//! thread enters the seccomp filter of its kind by itself ([`enter_vcpu`], [`enter_worker`], [`enter_main`]). A system call that
//! the filter does not list kills the process.

mod namespaces;
mod seccomp;

use std::io;
use std::sync::OnceLock;

use landlock::{ABI, Access, AccessFs, AccessNet, RestrictionStatus, Ruleset, RulesetAttr, RulesetStatus, Scope};
use rustix::process::{DumpableBehavior, Gid, Uid, set_dumpable_behavior};
use rustix::thread::{CapabilitySet, CapabilitySets};

use self::seccomp::Filters;
use crate::config::JailConfig;
use crate::virtio::worker::WorkerKind;

/// The newest landlock whose access rights we know; older kernels enforce what they have.
const LANDLOCK: ABI = ABI::V6;

#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("cannot {context}")]
    Io {
        context: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot compile the system call filters")]
    Seccomp(#[source] seccompiler::BackendError),
    #[error("cannot deny the file system with landlock")]
    Landlock(#[from] landlock::RulesetError),
    #[error("this kernel has no landlock: start it with `lsm=landlock,...`, or configure the VM without it")]
    NoLandlock,
}

fn io(context: &'static str) -> impl FnOnce(rustix::io::Errno) -> JailError {
    move |error| JailError::Io { context, source: error.into() }
}

static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Gives up everything that is the whole process's. Must be called while it has one thread; threads made later inherit it.
///
/// # Errors
/// When a step is refused.
pub fn prepare(config: &JailConfig) -> Result<(), JailError> {
    if config.namespaces {
        namespaces::enter()?;
    }
    if config.uid.is_some() || config.gid.is_some() {
        change_user(config.uid, config.gid)?;
    }
    if *config == JailConfig::default() {
        return Ok(());
    }
    rustix::thread::set_no_new_privs(true).map_err(io("give up new privileges"))?;
    // A jailed root keeps none of its powers. Without any this changes nothing.
    let none = CapabilitySets { effective: CapabilitySet::empty(), permitted: CapabilitySet::empty(), inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, none).map_err(io("give up capabilities"))?;
    // No core dumps, and nobody of the same user may attach.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(io("forbid core dumps"))?;
    if config.landlock {
        deny_files()?;
    }
    if config.seccomp {
        let filters = Filters::compile().map_err(JailError::Seccomp)?;
        let _ = FILTERS.set(filters);
    }
    Ok(())
}

fn change_user(uid: Option<u32>, gid: Option<u32>) -> Result<(), JailError> {
    rustix::thread::set_thread_groups(&[]).map_err(io("leave the supplementary groups"))?;
    if let Some(gid) = gid.map(Gid::from_raw) {
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(io("change the group"))?;
    }
    if let Some(uid) = uid.map(Uid::from_raw) {
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(io("change the user"))?;
    }
    Ok(())
}

/// No rule is added, so nothing that landlock can deny is allowed.
fn deny_files() -> Result<(), JailError> {
    let status: RestrictionStatus = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .restrict_self()?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err(JailError::NoLandlock),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }
}

/// Puts the calling device thread under the filter of its kind, if the VM is jailed.
pub fn enter_worker(kind: WorkerKind) {
    if let Some(filters) = FILTERS.get() {
        enter(filters.worker(kind));
    }
}

/// Puts the calling vCPU thread under its filter, if the VM is jailed.
pub fn enter_vcpu() {
    if let Some(filters) = FILTERS.get() {
        enter(&filters.vcpu);
    }
}

/// Puts the main thread under its filter, if the VM is jailed. Threads that it makes later start under this filter.
pub fn enter_main() {
    if let Some(filters) = FILTERS.get() {
        enter(&filters.main);
    }
}

/// # Panics
/// When the kernel refuses the filter: a thread must not go on without it.
fn enter(filter: &seccompiler::BpfProgram) {
    if let Err(error) = seccompiler::apply_filter(filter) {
        panic!("cannot enter the system call filter: {error}");
    }
}

#[cfg(test)]
mod tests;
