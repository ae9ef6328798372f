use std::time::Duration;

use clap::ValueEnum;
use clap_complete::engine::ArgValueCompleter;
use form_api::{
    ErrorCode,
    client::Client,
    vm::{Health, Vm, VmDetail, VmState},
};
use form_types::Name;
use tokio::time::Instant;

use crate::{
    args::vm_reference,
    complete,
    failure::{Failure, Outcome},
    operation::with_log,
    session::Session,
};

/// Wait until something is as asked; fail at once when it never will be
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to watch: vm/NAME
    #[arg(value_name = "vm/NAME", value_parser = vm_reference, add = ArgValueCompleter::new(complete::vm_references))]
    name: Name,
    /// What to wait for
    #[arg(long = "for", value_name = "CONDITION", value_enum, default_value = "ready")]
    condition: Condition,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Condition {
    // Its processor runs
    Running,
    // Its guest has booted and started its service
    Ready,
    // Its HEALTHCHECK succeeds
    Healthy,
    // It does not run
    Stopped,
}

impl Condition {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Ready => "ready",
            Self::Healthy => "healthy",
            Self::Stopped => "stopped",
        }
    }
}

/// How often the agent is asked.
const PERIOD: Duration = Duration::from_millis(250);

/// How long an agent may be away in the meantime.
const PATIENCE: Duration = Duration::from_secs(30);

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let vm = wait(&client, &args.name, args.condition, session.deadline()).await?;
    report(session, &vm, args.condition)
}

pub fn report(session: &Session, vm: &Vm, condition: Condition) -> Outcome {
    session.terminal.done(vm, vm.name.as_str(), &format!("{}: {}", vm.name, condition.as_str()))?;
    Ok(0)
}

/// # Errors
/// When the VM can no longer come to be so, does not exist, or the time is over.
pub async fn wait(client: &Client, name: &Name, condition: Condition, deadline: Option<Instant>) -> Result<Vm, Failure> {
    let mut last_seen = Instant::now();
    loop {
        let now = match client.vm(name).await {
            Ok(detail) => {
                last_seen = Instant::now();
                judge(&detail, condition)
            }
            Err(error) if error.is_unreachable() && last_seen.elapsed() < PATIENCE => Judgement::NotYet,
            Err(error) => return Err(error.into()),
        };
        match now {
            Judgement::Met(vm) => return Ok(*vm),
            Judgement::Never(why) => {
                let failure = Failure::failed(format!("{name} will not be {}: {why}", condition.as_str()))
                    .hint(format!("`form logs {name} --console` shows its boot, `form vm show {name}` its state"));
                return Err(with_log(client, name, failure).await);
            }
            Judgement::Unknowable => {
                let text = format!(
                    "vm/{name} runs a kernel of its own without Formation's guest, which would say when it is {}",
                    condition.as_str()
                );
                return Err(Failure::new(ErrorCode::Conflict, text).hint(format!("`form wait vm/{name} --for=running`")));
            }
            Judgement::NotYet => {}
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(Failure::new(ErrorCode::TimedOut, format!("{name} is not {} yet", condition.as_str()))
                .hint("give it longer with --timeout, and see `form logs` for what it does"));
        }
        tokio::time::sleep(PERIOD).await;
    }
}

#[derive(Debug)]
enum Judgement {
    Met(Box<Vm>),
    NotYet,
    Never(String),
    /// Nobody in the VM would say so.
    Unknowable,
}

fn judge(detail: &VmDetail, condition: Condition) -> Judgement {
    let vm = &detail.vm;
    let fault = || vm.fault.clone().unwrap_or_else(|| format!("it is {}", vm.state.as_str()));
    let met = match (condition, vm.state) {
        (Condition::Ready | Condition::Healthy, _) if !detail.desired.has_guest() => return Judgement::Unknowable,
        (Condition::Stopped, VmState::Stopped) => true,
        (Condition::Running, VmState::Running) => true,
        (Condition::Ready, VmState::Running) => vm.ready,
        (Condition::Healthy, VmState::Running) if detail.desired.spec.healthcheck.is_none() => {
            return Judgement::Never("its Formfile has no HEALTHCHECK".to_owned());
        }
        (Condition::Healthy, VmState::Running) => vm.health == Health::Healthy,
        (_, VmState::Failed) => return Judgement::Never(fault()),
        (Condition::Running | Condition::Ready | Condition::Healthy, VmState::Stopped) => return Judgement::Never(fault()),
        _ => false,
    };
    if met { Judgement::Met(Box::new(vm.clone())) } else { Judgement::NotYet }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn detail(state: &str, ready: bool, health: &str, healthcheck: bool) -> VmDetail {
        let digest = "0".repeat(64);
        let id = "0".repeat(32);
        let check = json!({"kind": "tcp", "port": 80, "path": null, "command": null, "interval_ms": 1, "timeout_ms": 1, "retries": 1, "start_period_ms": 0});
        let spec = json!({
            "name": "web", "description": null, "from": "scratch", "args": {}, "steps": [],
            "resources": {"vcpus": 1, "memory_mib": 512, "disk_gib": 5, "gpus": []}, "users": [], "run_as": null, "env": [], "workdir": null,
            "entrypoint": ["/app"], "cmd": [], "ports": [], "volumes": [], "networks": ["default"], "replicas": 1,
            "restart": {"policy": "always", "max_retries": null}, "healthcheck": if healthcheck { check } else { json!(null) }, "labels": {}, "model": null
        });
        serde_json::from_value(json!({
            "vm": {
                "id": id, "name": "web", "host": id, "host_name": "den", "image": "web:1", "image_digest": digest, "state": state, "ready": ready,
                "health": health, "ipv4": null, "ipv6": null, "dns_name": "web.default.form.internal", "ports": [], "vcpus": 1, "memory_mib": 512,
                "disk_gib": 5, "labels": {}, "created_at": "2026-01-01T00:00:00Z", "started_at": null, "restarts": 0, "fault": "it broke"
            },
            "desired": {"spec": spec, "passwd_hashes": {}, "image": digest, "kernel": digest},
            "guest": null
        }))
        .unwrap()
    }

    fn judged(state: &str, ready: bool, health: &str, condition: Condition) -> &'static str {
        match judge(&detail(state, ready, health, true), condition) {
            Judgement::Met(_) => "met",
            Judgement::NotYet => "not yet",
            Judgement::Never(_) => "never",
            Judgement::Unknowable => "unknowable",
        }
    }

    #[test]
    fn each_state_is_judged() {
        assert_eq!(judged("running", false, "none", Condition::Running), "met");
        assert_eq!(judged("running", false, "none", Condition::Ready), "not yet");
        assert_eq!(judged("running", true, "starting", Condition::Ready), "met");
        assert_eq!(judged("running", true, "unhealthy", Condition::Healthy), "not yet");
        assert_eq!(judged("running", true, "healthy", Condition::Healthy), "met");
        assert_eq!(judged("starting", false, "none", Condition::Ready), "not yet");
        assert_eq!(judged("stopped", false, "none", Condition::Ready), "never");
        assert_eq!(judged("failed", false, "none", Condition::Running), "never");
        assert_eq!(judged("stopping", true, "none", Condition::Stopped), "not yet");
        assert_eq!(judged("stopped", false, "none", Condition::Stopped), "met");
        assert_eq!(judged("failed", false, "none", Condition::Stopped), "never");
    }

    #[test]
    fn without_a_guest_only_what_the_host_sees_is_known() {
        let mut own = detail("running", false, "none", false);
        own.desired.boot = form_api::deploy::Boot::Own { cmdline: String::new() };
        assert!(matches!(judge(&own, Condition::Ready), Judgement::Unknowable));
        assert!(matches!(judge(&own, Condition::Healthy), Judgement::Unknowable));
        assert!(matches!(judge(&own, Condition::Running), Judgement::Met(_)));
    }

    #[test]
    fn no_healthcheck_is_never_healthy() {
        assert!(matches!(judge(&detail("running", true, "none", false), Condition::Healthy), Judgement::Never(_)));
    }
}
