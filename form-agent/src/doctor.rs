//! What a host lacks, what was left over on it, and how to mend both.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use form_api::{
    ApiError, ErrorCode,
    host::{Check, CheckStatus, DoctorReport},
};
use form_types::{Name, VmId};

use crate::{agent::Agent, cgroup, desired, driver::as_it_should_be, headroom, interface, machine, snapshot, vcpus, volume};

fn ok(name: &str, message: impl Into<String>) -> Check {
    Check { name: name.to_owned(), status: CheckStatus::Ok, message: message.into(), hint: None, fixable: false }
}

fn bad(status: CheckStatus, name: &str, message: impl Into<String>, hint: impl Into<String>) -> Check {
    Check { name: name.to_owned(), status, message: message.into(), hint: Some(hint.into()), fixable: false }
}

/// Every check, those of the machine first.
pub async fn examine(agent: &Arc<Agent>) -> DoctorReport {
    let task_agent = Arc::clone(agent);
    let mut checks = tokio::task::spawn_blocking(move || machine_checks(&task_agent)).await.unwrap_or_default();
    checks.extend(leftovers(agent).await.into_iter().map(|leftover| leftover.check()));
    DoctorReport { checks }
}

fn machine_checks(agent: &Agent) -> Vec<Check> {
    let mut checks = vec![kvm(), cgroup_check(), program("nft", "nftables")];
    let root = agent.store.root().display();
    checks.push(match agent.store.space() {
        Ok(space) if space.free < headroom::LOW => bad(
            CheckStatus::Problem,
            "disk",
            format!("the host's disk is full: {} MiB are free under {root}, and what VMs write fails", space.free >> 20),
            "`form destroy` or `form image rm` what nobody needs, or add space; then `form vm restart` what had errors",
        ),
        Ok(space) if space.free < 1 << 30 => bad(
            CheckStatus::Warning,
            "disk",
            format!("{} MiB are free under {root}", space.free >> 20),
            "remove images that nobody uses with `form image rm`",
        ),
        Ok(space) => ok("disk", format!("{} GiB of {} are free", space.free >> 30, space.total >> 30)),
        Err(error) => bad(CheckStatus::Problem, "disk", error.to_string(), format!("look at {root}")),
    });
    for (name, fault) in volume::describe::faults(agent) {
        checks.push(bad(CheckStatus::Problem, &name, fault, "see `form volume ls` and `form pool ls`"));
    }
    for (vm, found) in drifted(agent) {
        let name = format!("vm/{}", volume::describe::vm_name(agent, &vm));
        let hint = Some("form doctor --fix mends it".to_owned());
        checks.extend(found.into_iter().map(|message| Check {
            name: name.clone(),
            status: CheckStatus::Problem,
            message,
            hint: hint.clone(),
            fixable: true,
        }));
    }
    checks.extend(agent.store.pools().iter().filter_map(|pool| pool_check(pool)));
    if agent.identity().owner().is_none() {
        let hint = "form host add ADDRESS --token TOKEN, with the token that `form-agent init` prints";
        checks.push(bad(CheckStatus::Warning, "owner", "the host has no owner: only its own root can use it", hint));
    }
    checks
}

/// A pool that is not there, or nearly full: then guests see errors when they write.
fn pool_check(pool: &form_store::Pool) -> Option<Check> {
    let name = format!("pool/{}", pool.name());
    match pool.space() {
        Ok(space) if space.free < pool.settings().reserve_bytes => Some(bad(
            CheckStatus::Warning,
            &name,
            format!(
                "{} MiB are free in {}, less than is kept in reserve: nothing new is begun there",
                space.free >> 20,
                pool.directory().display()
            ),
            "add space, remove volumes that nobody needs, or keep less in reserve with `form pool set`",
        )),
        Ok(space) if space.free < headroom::LOW || (space.free < space.total / 20 && space.free < 10 << 30) => Some(bad(
            CheckStatus::Warning,
            &name,
            format!("{} MiB of {} are free in {}", space.free >> 20, space.total >> 20, pool.directory().display()),
            "add space, or remove volumes that nobody needs with `form volume rm`",
        )),
        Ok(_) => None,
        Err(error @ form_store::StoreError::PoolSilent { .. }) => Some(bad(
            CheckStatus::Problem,
            &name,
            error.to_string(),
            "look at the server and the network to it: the pool is there again as soon as it answers",
        )),
        Err(error @ form_store::StoreError::PoolMount { .. }) => Some(bad(
            CheckStatus::Problem,
            &name,
            error.to_string(),
            "mend that, and it is mounted by itself; or remove the pool: `form pool rm`",
        )),
        Err(error) => Some(bad(
            CheckStatus::Problem,
            &name,
            error.to_string(),
            "mount its file system, or remove the pool: `form pool rm`, or `pools:` in agent.yaml",
        )),
    }
}

/// Whether there is a KVM that runs guests.
pub fn kvm() -> Check {
    let hint_load = "load kvm-amd or kvm-intel, and switch virtualisation on in the firmware";
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return bad(CheckStatus::Problem, "kvm", format!("/dev/kvm cannot be opened: {error}"), hint_load);
    }
    if machine::virtualises() {
        ok("kvm", "/dev/kvm opens, and the processor virtualises")
    } else {
        bad(
            CheckStatus::Problem,
            "kvm",
            "/dev/kvm opens, but the processor shows neither svm nor vmx: such a paravirtual KVM cannot run ordinary guests",
            "use a machine with hardware virtualisation, or `form sandbox up`, which needs none",
        )
    }
}

fn cgroup_check() -> Check {
    if cgroup::is_available() {
        ok("cgroup", "cgroup v2 with the controllers cpu, memory and pids")
    } else {
        bad(
            CheckStatus::Problem,
            "cgroup",
            "/sys/fs/cgroup is not cgroup v2 with cpu, memory and pids: VMs run without limits",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    }
}

fn program(name: &str, package: &str) -> Check {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|directory| directory.join(name).is_file());
    if found {
        ok(name, format!("{name} is installed"))
    } else {
        bad(CheckStatus::Problem, name, format!("{name} is not installed"), format!("apt-get install {package}"))
    }
}

/// Something that bears this agent's name and that no VM needs.
enum Leftover {
    Network(form_net::Leftover),
    Cgroup(VmId),
    Runtime(VmId),
    Disk(VmId),
    Log(VmId),
    Snapshots(VmId),
    PartialSnapshot(PathBuf),
    /// A volume and its snapshot, which was one with a VM's that is not there.
    SnapshotPart(Name, Name),
    /// Of a volume that was to go back to a snapshot.
    Restore(Name),
}

/// VMs that run with other volumes, network interfaces or vCPUs than the state says, and how.
fn drifted(agent: &Agent) -> Vec<(VmId, Vec<String>)> {
    let all = agent.vms_on_disk().into_iter().map(|vm| {
        let mut found = volume::live::drift(agent, &vm);
        found.extend(interface::live::drift(agent, &vm));
        found.extend(vcpus::drift(agent, &vm));
        (vm, found)
    });
    all.filter(|(_, found)| !found.is_empty()).collect()
}

impl Leftover {
    fn check(&self) -> Check {
        let (name, what) = match self {
            Self::Network(leftover) => (leftover.to_string(), "it is on the network, and no VM needs it"),
            Self::Cgroup(id) => (format!("cgroup/{id}"), "a cgroup without a VM"),
            Self::Runtime(id) => (format!("runtime/{id}"), "a runtime directory without a VM"),
            Self::Disk(id) => (format!("disk/{id}"), "a root disk without a VM"),
            Self::Snapshots(id) => (format!("snapshots/{id}"), "snapshots without a VM"),
            Self::PartialSnapshot(path) => {
                let mut names = path.iter().rev().map(|name| name.to_string_lossy());
                let (name, vm) = (names.next().unwrap_or_default(), names.next().unwrap_or_default());
                (format!("snapshots/{vm}/{name}"), "a snapshot that was never finished")
            }
            Self::Log(id) => (format!("log/{id}"), "a log without a VM"),
            Self::SnapshotPart(volume, name) => (format!("volume/{volume}/{name}"), "a part of a snapshot of a VM that is not there"),
            Self::Restore(name) => (format!("volume/{name}"), "files of a restore that nobody is at work on"),
        };
        Check {
            name: format!("leftover/{name}"),
            status: CheckStatus::Problem,
            message: what.to_owned(),
            hint: Some("form doctor --fix removes it".to_owned()),
            fixable: true,
        }
    }
}

/// VMs that are wanted, or whose driver is still at work on them.
fn known(agent: &Agent) -> Vec<VmId> {
    let mut known: Vec<VmId> = desired::vms(&agent.view()).into_keys().collect();
    known.extend(agent.vms_on_disk().into_iter().filter(|id| agent.fleet.observed(id).is_some()));
    known
}

/// The ids of the taps that these VMs may have.
fn taps(agent: &Agent, known: &[VmId]) -> Vec<VmId> {
    let of_vm = |id: &VmId| match agent.desired(id) {
        Some(vm) => agent.attachments(&vm).into_iter().map(|(_, attachment)| attachment.vm).collect(),
        // Its driver is about to remove them.
        None => interface::all_ids(id),
    };
    known.iter().flat_map(of_vm).collect()
}

fn ids_in(directory: &Path) -> Vec<VmId> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

async fn leftovers(agent: &Arc<Agent>) -> Vec<Leftover> {
    let known = known(agent);
    let mut found: Vec<Leftover> = match agent.network.leftovers(&taps(agent, &known)).await {
        // The table is this agent's for as long as it runs.
        Ok(leftovers) => {
            leftovers.into_iter().filter(|leftover| matches!(leftover, form_net::Leftover::Tap { .. })).map(Leftover::Network).collect()
        }
        Err(error) => {
            tracing::warn!("the network cannot be examined: {error}");
            Vec::new()
        }
    };
    found.extend(cgroup::leftovers(&agent.host_id().mark(), &known).into_iter().map(Leftover::Cgroup));
    let orphans = |directory: &Path| -> Vec<VmId> { ids_in(directory).into_iter().filter(|id| !known.contains(id)).collect() };
    found.extend(orphans(&agent.paths().vm_runtime()).into_iter().map(Leftover::Runtime));
    found.extend(orphans(&agent.paths().vms()).into_iter().map(Leftover::Disk));
    found.extend(orphans(&agent.paths().logs()).into_iter().map(Leftover::Log));
    found.extend(orphans(&agent.paths().snapshots()).into_iter().map(Leftover::Snapshots));
    match agent.store.partial_snapshots() {
        Ok(paths) => found.extend(paths.into_iter().map(Leftover::PartialSnapshot)),
        Err(error) => tracing::warn!("the snapshots cannot be examined: {error}"),
    }
    let task_agent = Arc::clone(agent);
    let unsettled = tokio::task::spawn_blocking(move || volume::snapshot::unsettled(&task_agent)).await.unwrap_or_default();
    found.extend(unsettled.into_iter().map(Leftover::Restore));
    let task_agent = Arc::clone(agent);
    let parts = tokio::task::spawn_blocking(move || snapshot::volumes::left_over(&task_agent)).await.unwrap_or_default();
    found.extend(parts.into_iter().map(|(volume, name)| Leftover::SnapshotPart(volume, name)));
    found
}

/// Removes what is left over, and brings VMs in line with the volumes that they should have.
///
/// # Errors
/// What could not be removed, the rest is.
pub async fn fix(agent: &Arc<Agent>) -> Result<(), ApiError> {
    let mut failed = Vec::new();
    for leftover in leftovers(agent).await {
        let result = match &leftover {
            Leftover::Network(network) => agent.network.remove(network).await.map_err(|error| error.to_string()),
            Leftover::Cgroup(id) => cgroup::remove(&agent.host_id().mark(), id).await.map_err(|error| error.to_string()),
            Leftover::PartialSnapshot(_) => agent.store.remove_partial_snapshots().map_err(|error| error.to_string()),
            Leftover::Restore(name) => {
                let (agent, name) = (Arc::clone(agent), name.clone());
                let settled = tokio::task::spawn_blocking(move || volume::snapshot::settle(&agent, &name)).await;
                settled.map_err(|error| error.to_string()).and_then(|settled| settled.map_err(|error| error.message))
            }
            Leftover::SnapshotPart(volume, name) => {
                let (agent, volume, name) = (Arc::clone(agent), volume.clone(), name.clone());
                let removed = tokio::task::spawn_blocking(move || snapshot::volumes::remove_left_over(&agent, &volume, &name)).await;
                removed.map_err(|error| error.to_string()).and_then(|removed| removed.map_err(|error| error.message))
            }
            // A driver knows how: it adopts or kills what runs there, and then removes everything.
            Leftover::Runtime(_) | Leftover::Disk(_) | Leftover::Log(_) | Leftover::Snapshots(_) => {
                agent.fleet.reconcile(agent);
                Ok(())
            }
        };
        if let Err(error) = result {
            failed.push(format!("{}: {error}", leftover.check().name));
        }
    }
    let task_agent = Arc::clone(agent);
    let still_drifted = tokio::task::spawn_blocking(move || {
        for (vm, _) in drifted(&task_agent) {
            as_it_should_be(&task_agent, &vm);
        }
        drifted(&task_agent)
            .into_iter()
            .map(|(vm, found)| format!("vm/{}: {}", volume::describe::vm_name(&task_agent, &vm), found.join(", ")))
            .collect::<Vec<_>>()
    });
    failed.extend(still_drifted.await.map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?);
    if failed.is_empty() { Ok(()) } else { Err(ApiError::new(ErrorCode::Failed, failed.join("; "))) }
}
