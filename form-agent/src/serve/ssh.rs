use std::time::Duration;

use axum::{
    Json,
    extract::{Request, State},
};
use form_api::{
    ApiError,
    vm::{SshAccess, SshServer, SshUser},
};
use form_guest::protocol::{self, Reply, SshReport};
use form_types::{Name, spec::User};

use super::{
    Segment, Shared,
    openapi::{Impossible, InTheWay, Missing, Refused},
    parsed, reading,
    stream::{control_of, guest_error},
};
use crate::{
    action::Action,
    agent::internal,
    driver::guest,
    vm::{dns_name, root_login},
};

/// The guest itself waits for a server that it has just started.
const LIMIT: Duration = Duration::from_secs(30);

/// Who can log in to a VM over SSH, and the host keys that it is known by. The guest itself is asked.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/ssh",
    operation_id = "ssh_access",
    tag = "vms",
    params(("name" = Name, Path, description = "The VM")),
    responses((status = 200, description = "What an SSH client has to know", body = SshAccess), Refused, Missing, InTheWay, Impossible),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Json<SshAccess>, ApiError> {
    reading(&agent, request).await?;
    let name: Name = parsed(&name)?;
    let control = control_of(&agent, &name, Action::Forward)?;
    let desired = agent.vm_named(&name)?;
    let reply = guest::ask(&control, &protocol::Request::Ssh, LIMIT).await.map_err(|error| guest_error(&error))?;
    let Reply::Ssh(report) = reply else { return Err(internal(&"the guest answered something else")) };
    let SshReport { server, listening, host_keys, accounts } = report;
    let (server, program) = match server {
        protocol::SshServer::Ours => (SshServer::Formation, None),
        protocol::SshServer::Image { path } => (SshServer::Image, Some(path)),
        protocol::SshServer::None => (SshServer::None, None),
    };
    let users = &desired.request.spec.users;
    Ok(Json(SshAccess {
        vm: desired.id,
        dns_name: dns_name(&name),
        server,
        program,
        listening,
        host_keys,
        users: users.iter().map(user).collect(),
        accounts,
        root_login: root_login(users),
    }))
}

fn user(user: &User) -> SshUser {
    SshUser {
        name: user.name.clone(),
        key: !user.ssh_authorized_keys.is_empty(),
        password: user.has_passwd && user.ssh_pwauth && !user.lock_passwd,
    }
}
