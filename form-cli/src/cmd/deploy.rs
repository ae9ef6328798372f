use std::time::Duration;

use form_api::{
    client::Client,
    deploy::DeployRequest,
    operation::{Operation, OperationsQuery},
    vm::{Vm, VmDetail, VmState},
};
use form_types::{IdempotencyKey, Name, spec::RestartPolicy};
use tokio::time::Instant;

use crate::{
    cmd::wait::{self, Condition},
    context::Target,
    deploy::{build::BuildArgs, plan_view, prepare, upload},
    failure::{Failure, Outcome},
    operation::settle,
    sandbox,
    session::Session,
    vm_view,
};

/// Build a Formfile and run it on a host
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    build: BuildArgs,
}

/// How long a VM may take to become ready when no `--timeout` is given.
const PATIENCE: Duration = Duration::from_secs(10 * 60);

pub async fn run(args: Args, session: &Session) -> Outcome {
    let (client, prepared) = prepare(session, &args.build).await?;
    let request = &prepared.request;
    let name = &request.spec.name;
    let plan = client.plan(request).await?;
    if plan.is_unchanged() {
        if let Some(operation) = under_way(&client, name).await? {
            session.terminal.note(format!("{name} is unchanged, and a {} of it is under way", operation.kind.as_str()));
            let _ = settle(session, &client, operation).await?;
        }
        let vm = client.vm(name).await?.vm;
        session.terminal.note(format!("{name} is unchanged: nothing to do"));
        if matches!(vm.state, VmState::Stopped | VmState::Failed) {
            session.terminal.warn(format!("{name} is {}; `form vm start {name}` starts it", vm.state.as_str()));
        }
        sandbox::publish(session, &client).await;
        return show(session, &vm);
    }
    session.terminal.note(plan_view::text(&plan, &session.terminal).trim_end());
    session.terminal.confirm("Go on?")?;
    upload(session, &client, &prepared).await?;

    let key = IdempotencyKey::random().map_err(|error| Failure::failed(format!("no randomness: {error}")))?;
    let operation = client.deploy(request, key).await?;
    carry_out(session, &client, request, operation).await
}

/// Follows what brings a VM to run to its end, and shows the VM.
///
/// # Errors
/// When it fails, or the time is over.
pub async fn carry_out(session: &Session, client: &Client, request: &DeployRequest, operation: Operation) -> Outcome {
    let name = &request.spec.name;
    let operation = settle(session, client, operation).await?;
    if !operation.status.is_final() {
        session.terminal.done(&operation, name.as_str(), &format!("{name}: {}", operation.status.as_str()))?;
        return Ok(0);
    }
    sandbox::publish(session, client).await;
    let vm = ready(session, client, request).await?;
    show(session, &vm)
}

/// What somebody asked for about this VM and is not done yet.
async fn under_way(client: &Client, name: &Name) -> Result<Option<Operation>, Failure> {
    let newest = client.operations(&OperationsQuery { limit: Some(50) }).await?;
    let subject = format!("vm/{name}");
    Ok(newest.into_iter().find(|operation| operation.subject == subject && !operation.status.is_final()))
}

/// Waits until it is as good as the Formfile says it can be.
async fn ready(session: &Session, client: &Client, request: &DeployRequest) -> Result<Vm, Failure> {
    let name = &request.spec.name;
    let detail = client.vm(name).await?;
    if session.global.no_wait || has_done_its_work(&detail) {
        return Ok(detail.vm);
    }
    let condition = match request.spec.healthcheck {
        _ if !request.has_guest() => Condition::Running,
        Some(_) => Condition::Healthy,
        None => Condition::Ready,
    };
    let step = session.terminal.step(format!("waiting until {name} is {}", condition.as_str()));
    let deadline = session.deadline().unwrap_or_else(|| Instant::now() + PATIENCE);
    let vm = wait::wait(client, name, condition, Some(deadline)).await?;
    step.done("");
    Ok(vm)
}

/// A service that may end and has ended well leaves a stopped VM behind.
fn has_done_its_work(detail: &VmDetail) -> bool {
    let may_end = detail.desired.spec.restart.policy != RestartPolicy::Always;
    may_end && detail.vm.state == VmState::Stopped && detail.vm.fault.is_none()
}

/// Shows a VM that is as it was asked for.
///
/// # Errors
/// When standard output is closed.
pub fn show(session: &Session, vm: &Vm) -> Outcome {
    let host = match session.target()? {
        Target::Local(_) => "localhost".to_owned(),
        Target::Remote(host) => host_part(&host.address).to_owned(),
    };
    session.terminal.done(vm, vm.name.as_str(), &vm_view::found_at(vm, &host).join("\n"))?;
    Ok(0)
}

/// An address without its port.
fn host_part(address: &str) -> &str {
    match address.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']')) => host,
        _ => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_loses_its_port() {
        assert_eq!(
            [host_part("a.example:7846"), host_part("10.0.0.1"), host_part("[::1]:1"), host_part("::1")],
            ["a.example", "10.0.0.1", "[::1]", "::1"]
        );
    }
}
