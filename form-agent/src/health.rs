//! How the parts of this agent are.

use std::sync::Arc;

use form_api::{
    host::CheckStatus,
    stats::{HealthReport, PartHealth},
    vm::{Health, VmState},
};
use jiff::Timestamp;

use crate::{agent::Agent, desired, doctor, headroom};

fn part(name: &str, state: Result<String, String>) -> PartHealth {
    let healthy = state.is_ok();
    PartHealth { name: name.to_owned(), healthy, message: state.unwrap_or_else(|message| message) }
}

/// Looks at every part.
pub async fn report(agent: &Arc<Agent>) -> HealthReport {
    let task_agent = Arc::clone(agent);
    let mut parts = tokio::task::spawn_blocking(move || local_parts(&task_agent)).await.unwrap_or_default();
    let network = match agent.network.has_rules().await {
        Ok(true) => Ok("the firewall table is there".to_owned()),
        Ok(false) => Err("the firewall table is gone: restart the agent, and find out who removed it".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    parts.push(part("network", network));
    parts.push(part("vms", vms(agent)));
    if agent.config().opentelemetry.is_some() {
        let last = agent.telemetry.last().map(|last| last.map(|()| "the collector takes what it is sent".to_owned()));
        parts.push(part("opentelemetry", last.unwrap_or_else(|| Ok("nothing was sent yet".to_owned()))));
    }
    let counts = agent.operations.counts();
    HealthReport {
        healthy: !parts.is_empty() && parts.iter().all(|part| part.healthy),
        parts,
        total_operations: counts.total,
        error_rate_percent: counts.error_rate_percent(),
        at: Timestamp::now(),
    }
}

fn local_parts(agent: &Agent) -> Vec<PartHealth> {
    let database = agent.operations.list(1).map(|_| "operations and events can be read".to_owned()).map_err(|error| error.to_string());
    let store = match agent.store.space() {
        Ok(space) if space.free < headroom::LOW => Err(format!("only {} MiB are free", space.free >> 20)),
        Ok(space) => Ok(format!("{} GiB of {} are free", space.free >> 30, space.total >> 30)),
        Err(error) => Err(error.to_string()),
    };
    let kvm = doctor::kvm();
    let kvm = if kvm.status == CheckStatus::Ok { Ok(kvm.message) } else { Err(kvm.message) };
    let programs = [&agent.programs.vmm, &agent.programs.guest];
    let programs = match programs.into_iter().find(|program| !program.is_file()) {
        Some(missing) => Err(format!("{} is missing", missing.display())),
        None => Ok("form-vmm and form-guest are there".to_owned()),
    };
    vec![part("database", database), part("store", store), part("pools", pools(agent)), part("kvm", kvm), part("programs", programs)]
}

/// Whether volumes can be reached.
fn pools(agent: &Agent) -> Result<String, String> {
    let pools = agent.store.pools();
    let bad: Vec<String> = pools.iter().filter_map(|pool| pool.is_there().err()).map(|error| error.to_string()).collect();
    if bad.is_empty() { Ok(format!("of {} all are there", pools.len())) } else { Err(bad.join("; ")) }
}

fn vms(agent: &Agent) -> Result<String, String> {
    let mut bad = Vec::new();
    let vms = desired::vms(&agent.view());
    for vm in vms.values() {
        let Some(observed) = agent.fleet.observed(&vm.id) else { continue };
        if observed.state == VmState::Failed || observed.health == Health::Unhealthy {
            bad.push(vm.name().to_string());
        }
    }
    if bad.is_empty() {
        Ok(format!("of {} none has failed or is unhealthy", vms.len()))
    } else {
        Err(format!("failed or unhealthy: {}", bad.join(", ")))
    }
}
