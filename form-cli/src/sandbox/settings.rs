//! What a sandbox's host is told at its start.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use form_types::{
    Name, PublicKey, SecretKey, Spec,
    settings::{File, Interface, Route4, Service, Settings},
    spec::EnvScope,
};
use serde::Serialize;

use super::qemu::ROOT_SERIAL;

/// Of the one network card; nothing else is on its network.
pub const MAC: &str = "52:54:00:12:34:56";

// QEMU's user network (its manual, "Network emulation"): these addresses are its defaults.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const NAMESERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);

/// How long the agent may take to end. VMs go down with the machine in any case.
const SHUTDOWN_TIMEOUT_MS: u64 = 10_000;

/// `agent.yaml`, as far as a sandbox's differs from the defaults.
#[derive(Serialize)]
struct AgentConfig {
    owner: PublicKey,
}

/// The host belongs to `owner` from the first moment, and has a key that is known here: nobody needs to claim it.
///
/// # Errors
/// Never in practice: a key has a YAML form.
pub fn settings(name: &Name, spec: &Spec, owner: PublicKey, host_key: &SecretKey) -> Result<Settings, serde_yaml::Error> {
    let env = |wanted: &dyn Fn(&EnvScope) -> bool| -> BTreeMap<String, String> {
        spec.env.iter().filter(|env| wanted(&env.scope)).map(|env| (env.key.clone(), env.value.clone())).collect()
    };
    let file = |path: &str, mode, content| File { path: path.to_owned(), mode, content };
    Ok(Settings {
        hostname: name.to_string(),
        root_serial: Some(ROOT_SERIAL.to_owned()),
        grow_root: true,
        interfaces: vec![Interface {
            mac: MAC.to_owned(),
            name: "eth0".to_owned(),
            ipv4: Some(Route4 { address: ADDRESS, prefix: 24, gateway: Some(GATEWAY) }),
            ipv6: None,
            mtu: 1500,
        }],
        nameservers: vec![IpAddr::V4(NAMESERVER)],
        search_domains: Vec::new(),
        hosts: Vec::new(),
        users: Vec::new(),
        root_login: false,
        files: vec![
            file("/etc/formation/agent.yaml", 0o644, serde_yaml::to_string(&AgentConfig { owner })?),
            file("/etc/formation/host.key", 0o600, format!("{}\n", host_key.to_hex())),
        ],
        volumes: Vec::new(),
        service: Some(Service {
            command: spec.entrypoint.iter().chain(&spec.cmd).cloned().collect(),
            workdir: spec.workdir.clone(),
            user: spec.run_as.clone(),
            env: env(&|scope| *scope == EnvScope::Service(spec.name.to_string())),
            restart: spec.restart.clone(),
            healthcheck: spec.healthcheck.clone(),
        }),
        env: env(&|scope| *scope == EnvScope::System),
        shutdown_timeout_ms: SHUTDOWN_TIMEOUT_MS,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::image;

    #[test]
    fn the_host_is_owned_and_known() {
        let (owner, key) = (SecretKey::from_bytes([1; 32]).public(), SecretKey::from_bytes([2; 32]));
        let spec = image::spec().unwrap();
        let settings = settings(&"box".parse().unwrap(), &spec, owner, &key).unwrap();
        let file = |path: &str| settings.files.iter().find(|file| file.path == path).unwrap();
        assert_eq!(file("/etc/formation/agent.yaml").content, format!("owner: {owner}\n"));
        assert_eq!(file("/etc/formation/host.key").mode, 0o600);
        assert!(SecretKey::from_hex(&file("/etc/formation/host.key").content).is_ok_and(|found| found.public() == key.public()));
        assert_eq!(settings.hostname, "box");
        assert_eq!(settings.service.unwrap().command, ["/usr/local/bin/form-agent", "run"]);
    }
}
