//! What a deploy means for volumes, as lines of its plan. Pure.

use form_api::deploy::{DeployRequest, FieldChange, PlanAction, PlannedVm};
use form_types::size::Bytes;

use super::rules::Deployed;

/// Adds to the plan of a VM what happens to its volumes, and to what they hold.
pub fn add(planned: &mut PlannedVm, request: &DeployRequest, deployed: &Deployed) {
    let mut changes = Vec::new();
    let mut change = |name: &form_types::Name, from: Option<String>, to: String| {
        changes.push(FieldChange { field: format!("volume {name}"), from, to: Some(to) });
    };
    for volume in &request.spec.volumes {
        if let Some(size) = deployed.new.get(&volume.name) {
            change(&volume.name, None, format!("new, {}, mounted at {}", Bytes(*size), volume.path));
        } else if let Some(there) = deployed.taken.iter().find(|there| there.name == volume.name) {
            let from =
                there.attached.as_ref().map(|attached| attached.path.clone().unwrap_or_else(|| "attached without a path".to_owned()));
            change(&volume.name, from, format!("kept with what it holds, {}, mounted at {}", Bytes(there.size_bytes), volume.path));
        }
    }
    for (volume, size) in &deployed.grown {
        change(&volume.name, Some(Bytes(volume.size_bytes).to_string()), Bytes(*size).to_string());
    }
    for volume in &deployed.left {
        let from = volume.attached.as_ref().and_then(|attached| attached.path.clone());
        change(&volume.name, from, "detached, and kept with what it holds".to_owned());
    }
    if changes.is_empty() {
        return;
    }
    if planned.action == PlanAction::Unchanged {
        planned.action = PlanAction::Update;
    }
    planned.restarts = planned.action == PlanAction::Update;
    planned.changes.extend(changes);
}
