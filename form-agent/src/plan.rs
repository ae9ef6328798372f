//! What a deploy would change. Pure: desired before, desired after, a plan.

use form_api::deploy::{DeployRequest, FieldChange, Plan, PlanAction, PlannedVm};
use form_types::{
    Digest, Spec,
    spec::{Command, Env, EnvScope, Healthcheck, HealthcheckKind, Protocol, Restart, RestartPolicy},
};

/// The plan that leads from `before` (nothing for a new VM) to `after`. `root` names the file system of an image: an image's own digest
/// covers how it runs as well, and more memory is no reason to lose a disk.
pub fn plan(before: Option<&DeployRequest>, after: &DeployRequest, root: &impl Fn(&Digest) -> Digest) -> Plan {
    let name = after.spec.name.clone();
    let Some(before) = before else {
        let planned = PlannedVm { name, action: PlanAction::Create, changes: created(after, root), restarts: false, loses: Vec::new() };
        return Plan { vms: vec![planned] };
    };
    let changes = changes(before, after, root);
    let replaces_disk = replaces_disk(before, after, root);
    let action = if changes.is_empty() { PlanAction::Unchanged } else { PlanAction::Update };
    let loses = if replaces_disk { vec!["everything written to its root disk".to_owned()] } else { Vec::new() };
    Plan { vms: vec![PlannedVm { name, action, restarts: !changes.is_empty(), changes, loses }] }
}

/// Nothing to change, but what is there does not run: deploying it again means starting it again.
pub fn try_again(plan: &mut Plan) {
    for vm in &mut plan.vms {
        vm.action = PlanAction::Update;
        vm.restarts = true;
        vm.changes.push(FieldChange { field: "state".to_owned(), from: Some("failed".to_owned()), to: Some("running".to_owned()) });
    }
}

/// Whether the root disk is made anew from its image.
pub fn replaces_disk(before: &DeployRequest, after: &DeployRequest, root: &impl Fn(&Digest) -> Digest) -> bool {
    before.image().map(root) != after.image().map(root) || after.spec.resources.disk_gib < before.spec.resources.disk_gib
}

fn created(after: &DeployRequest, root: &impl Fn(&Digest) -> Digest) -> Vec<FieldChange> {
    described(after, root)
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(field, to)| FieldChange { field: field.to_owned(), from: None, to: Some(to) })
        .collect()
}

fn changes(before: &DeployRequest, after: &DeployRequest, root: &impl Fn(&Digest) -> Digest) -> Vec<FieldChange> {
    let (old, new) = (described(before, root), described(after, root));
    let mut changes: Vec<FieldChange> = old
        .into_iter()
        .zip(new)
        .filter(|((_, from), (_, to))| from != to)
        .map(|((field, from), (_, to))| FieldChange {
            field: field.to_owned(),
            from: (!from.is_empty()).then_some(from),
            to: (!to.is_empty()).then_some(to),
        })
        .collect();
    // A password's hash is nobody's business, but that it changed is.
    if before.passwd_hashes != after.passwd_hashes {
        changes.push(FieldChange { field: "passwords".to_owned(), from: None, to: None });
    }
    changes
}

/// Every part of a request that changes what runs, in words. What only describes the build is in the image's digest.
fn described(request: &DeployRequest, root: &impl Fn(&Digest) -> Digest) -> Vec<(&'static str, String)> {
    let spec = &request.spec;
    let json = |value: serde_json::Result<String>| value.unwrap_or_default();
    vec![
        ("image", request.image().map(|image| root(image).short()).unwrap_or_default()),
        ("kernel", request.kernel.short()),
        ("cmdline", request.cmdline().unwrap_or_default().to_owned()),
        ("vcpus", spec.resources.vcpus.to_string()),
        ("memory", format!("{} MiB", spec.resources.memory_mib)),
        ("disk", request.image().map(|_| format!("{} GiB", spec.resources.disk_gib)).unwrap_or_default()),
        ("ports", ports(spec)),
        ("entrypoint", words(&spec.entrypoint)),
        ("cmd", words(&spec.cmd)),
        ("workdir", spec.workdir.clone().unwrap_or_default()),
        ("run-as", spec.run_as.clone().unwrap_or_default()),
        ("env", environment(&spec.env)),
        ("users", if spec.users.is_empty() { String::new() } else { json(serde_json::to_string(&spec.users)) }),
        ("restart", restart(&spec.restart)),
        ("healthcheck", spec.healthcheck.as_ref().map(healthcheck).unwrap_or_default()),
        ("labels", spec.labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(", ")),
    ]
}

/// As in a Formfile: JSON, so that blanks in a word show.
fn words(words: &[String]) -> String {
    if words.is_empty() { String::new() } else { serde_json::to_string(words).unwrap_or_default() }
}

fn environment(env: &[Env]) -> String {
    let one = |env: &Env| match &env.scope {
        EnvScope::System => format!("{}={:?}", env.key, env.value),
        scope => format!("{} {}={:?}", String::from(scope.clone()), env.key, env.value),
    };
    env.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn restart(restart: &Restart) -> String {
    match (restart.policy, restart.max_retries) {
        (RestartPolicy::Always, _) => "always".to_owned(),
        (RestartPolicy::Never, _) => "never".to_owned(),
        (RestartPolicy::OnFailure, None) => "on-failure".to_owned(),
        (RestartPolicy::OnFailure, Some(retries)) => format!("on-failure:{retries}"),
    }
}

fn healthcheck(check: &Healthcheck) -> String {
    let port = check.port.unwrap_or_default();
    let what = match (&check.kind, &check.command) {
        (HealthcheckKind::Http, _) => format!("http {port} {}", check.path.as_deref().unwrap_or("/")),
        (HealthcheckKind::Tcp, _) => format!("tcp {port}"),
        (HealthcheckKind::Command, Some(Command::Shell(text))) => text.clone(),
        (HealthcheckKind::Command, Some(Command::Exec(words_of_it))) => words(words_of_it),
        (HealthcheckKind::Command, None) => String::new(),
    };
    let Healthcheck { interval_ms, timeout_ms, retries, start_period_ms, .. } = check;
    format!("{what} (every {interval_ms} ms, {timeout_ms} ms each, {retries} failures, {start_period_ms} ms to start)")
}

fn ports(spec: &Spec) -> String {
    let one = |port: &form_types::spec::Port| {
        let protocol = if port.protocol == Protocol::Udp { "/udp" } else { "" };
        port.host_port.map_or_else(|| format!("{}{protocol}", port.port), |host| format!("{host}:{}{protocol}", port.port))
    };
    spec.ports.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use form_api::deploy::Boot;

    use super::*;
    use crate::testing::request;

    /// Every image has a file system of its own.
    fn own(image: &Digest) -> Digest {
        *image
    }

    #[test]
    fn new_unchanged_changed() {
        let web = request("web");
        assert_eq!(plan(None, &web, &own).vms[0].action, PlanAction::Create);
        assert!(plan(Some(&web), &web, &own).is_unchanged());

        let mut larger = web.clone();
        larger.spec.resources.memory_mib = 1024;
        let planned = &plan(Some(&web), &larger, &own).vms[0];
        assert_eq!(planned.action, PlanAction::Update);
        assert!(planned.restarts && planned.loses.is_empty());
        let change = &planned.changes[0];
        assert_eq!((change.field.as_str(), change.from.as_deref(), change.to.as_deref()), ("memory", Some("512 MiB"), Some("1024 MiB")));

        let mut rebuilt = web.clone();
        rebuilt.boot = Boot::Image(Digest::of(b"another"));
        assert_eq!(plan(Some(&web), &rebuilt, &own).vms[0].loses, ["everything written to its root disk"]);
    }

    #[test]
    fn the_same_file_system_keeps_the_disk() {
        let web = request("web");
        let mut larger = web.clone();
        larger.spec.resources.memory_mib = 1024;
        // The manifest holds the Formfile's meaning, so its digest changes too.
        larger.boot = Boot::Image(Digest::of(b"another manifest"));
        let one_root = |_: &Digest| Digest::of(b"root");
        let planned = &plan(Some(&web), &larger, &one_root).vms[0];
        assert_eq!(planned.changes.iter().map(|change| change.field.as_str()).collect::<Vec<_>>(), ["memory"]);
        assert!(planned.loses.is_empty() && !replaces_disk(&web, &larger, &one_root));
    }

    #[test]
    fn a_plan_reads_like_a_formfile() {
        let mut web = request("web");
        web.spec.env = vec![Env { scope: EnvScope::System, key: "A".to_owned(), value: "b c".to_owned() }];
        web.spec.healthcheck = Some(Healthcheck {
            kind: HealthcheckKind::Http,
            port: Some(80),
            path: Some("/up".to_owned()),
            command: None,
            interval_ms: 5000,
            timeout_ms: 1000,
            retries: 3,
            start_period_ms: 0,
        });
        let changes = &plan(None, &web, &own).vms[0].changes;
        let shown = |field: &str| changes.iter().find(|change| change.field == field).and_then(|change| change.to.clone()).unwrap();
        assert_eq!(shown("env"), r#"A="b c""#);
        assert_eq!(shown("healthcheck"), "http 80 /up (every 5000 ms, 1000 ms each, 3 failures, 0 ms to start)");
        assert_eq!(shown("restart"), "always");
        assert_eq!(shown("ports"), "8080:80");
    }

    #[test]
    fn a_password_is_never_shown() {
        let mut web = request("web");
        web.passwd_hashes.insert("ada".to_owned(), "$6$salt$secret".to_owned());
        let planned = plan(Some(&request("web")), &web, &own);
        assert_eq!(planned.vms[0].changes[0].field, "passwords");
        assert!(!serde_json::to_string(&planned).unwrap().contains("secret"));
    }
}
