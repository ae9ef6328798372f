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

use super::qemu::{Link, ROOT_SERIAL};

/// Of the card that leads to this machine and the world; nothing else is on its network.
pub const MAC: &str = "52:54:00:12:34:56";

// QEMU's user network (its manual, "Network emulation"): these addresses are its defaults.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const NAMESERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);

/// The network between the hosts of a sandbox, a /24 in which a host's number is its address.
const PEERS: [u8; 3] = [10, 0, 3];

/// How long the agent may take to end. VMs go down with the machine in any case.
const SHUTDOWN_TIMEOUT_MS: u64 = 10_000;

/// `agent.yaml`, as far as a sandbox's differs from the defaults.
#[derive(Serialize)]
struct AgentConfig {
    owner: PublicKey,
}

/// The address of a host in the network of its sandbox's hosts.
fn peer_address(number: u32) -> Ipv4Addr {
    let [a, b, c] = PEERS;
    Ipv4Addr::new(a, b, c, u8::try_from(number).unwrap_or(u8::MAX))
}

/// The host belongs to `owner` from the first moment, and has a key that is known here: nobody needs to claim it.
///
/// # Errors
/// Never in practice: a key has a YAML form.
pub fn settings(
    name: &Name,
    spec: &Spec,
    owner: PublicKey,
    host_key: &SecretKey,
    link: Option<Link>,
) -> Result<Settings, serde_yaml::Error> {
    let outside = Interface {
        mac: MAC.to_owned(),
        name: "eth0".to_owned(),
        ipv4: Some(Route4 { address: ADDRESS, prefix: 24, gateway: Some(GATEWAY) }),
        ipv6: None,
        mtu: 1500,
        table: None,
    };
    let peers = link.map(|link| Interface {
        mac: link.mac(),
        name: "eth1".to_owned(),
        ipv4: Some(Route4 { address: peer_address(link.number), prefix: 24, gateway: None }),
        ipv6: None,
        mtu: 1500,
        table: None,
    });
    let env = |wanted: &dyn Fn(&EnvScope) -> bool| -> BTreeMap<String, String> {
        spec.env.iter().filter(|env| wanted(&env.scope)).map(|env| (env.key.clone(), env.value.clone())).collect()
    };
    let file = |path: &str, mode, content| File { path: path.to_owned(), mode, content };
    Ok(Settings {
        hostname: name.to_string(),
        root_serial: Some(ROOT_SERIAL.to_owned()),
        grow_root: true,
        interfaces: [outside].into_iter().chain(peers).collect(),
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
        new_identity: false,
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
        let link = Some(Link { number: 2, port: 40_001 });
        let settings = settings(&"box".parse().unwrap(), &spec, owner, &key, link).unwrap();
        let file = |path: &str| settings.files.iter().find(|file| file.path == path).unwrap();
        assert_eq!(file("/etc/formation/agent.yaml").content, format!("owner: {owner}\n"));
        assert_eq!(file("/etc/formation/host.key").mode, 0o600);
        assert!(SecretKey::from_hex(&file("/etc/formation/host.key").content).is_ok_and(|found| found.public() == key.public()));
        assert_eq!(settings.hostname, "box");
        let peers = settings.interfaces[1].ipv4.as_ref().unwrap();
        assert_eq!((settings.interfaces[1].mac.as_str(), peers.address.to_string().as_str()), ("52:54:00:12:35:02", "10.0.3.2"));
        assert_eq!(settings.service.unwrap().command, ["/usr/local/bin/form-agent", "run"]);
    }
}
