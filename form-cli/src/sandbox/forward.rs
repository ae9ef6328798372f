//! Ports that the sandbox's host publishes, reachable on this machine's loopback address through QEMU.

use std::{collections::BTreeSet, path::Path};

use form_api::client::Client;
use form_types::spec::Protocol;

use super::{
    Host, holder,
    qmp::{Qmp, QmpError},
};
use crate::{
    context::{Config, ConfigFile, ContextKind, KnownHost, Target},
    session::Session,
};

/// A port that is the same on this machine and on the sandbox's host.
type Port = (Protocol, u16);

/// Below it only root (or CAP_NET_BIND_SERVICE) may listen, unless the system is set otherwise.
const FIRST_FREE_PORT: u16 = 1024;

/// Forwards what the VMs of a sandbox publish, and stops forwarding what they no longer do. Does nothing for any other host.
///
/// What does not work is a warning: the VMs run, and `form vm port-forward` reaches them.
pub async fn publish(session: &Session, client: &Client) {
    if let Ok(Target::Remote(host)) = session.target() {
        publish_of(session, client, &host).await;
    }
}

/// As [`publish`], for this host.
pub async fn publish_of(session: &Session, client: &Client, host: &KnownHost) {
    let Ok(file) = ConfigFile::load() else { return };
    let Some((directory, agent)) = sandbox_of(&file.config, &host.public_key) else { return };
    let vms = match client.vms().await {
        Ok(vms) => vms,
        Err(error) => return session.terminal.warn(format!("published ports were not forwarded: {error}")),
    };
    let wanted = vms.iter().flat_map(|vm| &vm.ports).filter_map(|port| Some((port.protocol, port.host_port?))).collect();
    let result = tokio::task::spawn_blocking(move || forward(&directory, agent, &wanted)).await;
    match result {
        Ok(Ok(warnings)) => warnings.iter().for_each(|warning| session.terminal.warn(warning)),
        Ok(Err(error)) => session.terminal.warn(format!("published ports were not forwarded: {error}")),
        Err(error) => session.terminal.warn(format!("published ports were not forwarded: {error}")),
    }
}

/// The directory of this host of a sandbox, and the port that leads to its agent.
fn sandbox_of(config: &Config, key: &form_types::PublicKey) -> Option<(std::path::PathBuf, u16)> {
    let contexts = config.contexts.iter().filter(|context| context.kind == ContextKind::Sandbox);
    contexts
        .filter_map(|context| {
            let index = context.hosts.iter().position(|host| host.public_key == *key)?;
            let host = Host::new(&context.name, context.sandbox.as_ref()?, u32::try_from(index).ok()? + 1).ok()?;
            Some((host.directory, context.hosts[index].address.rsplit_once(':')?.1.parse().ok()?))
        })
        .next()
}

/// Makes QEMU forward `wanted` and nothing else but the agent's port. Gives what could not be done.
fn forward(directory: &Path, agent: u16, wanted: &BTreeSet<Port>) -> Result<Vec<String>, QmpError> {
    let mut qmp = Qmp::connect(directory)?;
    let mut there = parse(&qmp.human("info usernet")?);
    there.remove(&(Protocol::Udp, agent));
    for (protocol, port) in there.difference(wanted) {
        qmp.human(&format!("hostfwd_remove net {}:127.0.0.1:{port}", protocol.as_str()))?;
    }
    let mut warnings = Vec::new();
    for (protocol, port) in wanted.difference(&there) {
        let answer = qmp.human(&format!("hostfwd_add net {}:127.0.0.1:{port}-:{port}", protocol.as_str()))?;
        if !answer.trim().is_empty() {
            warnings.push(refused(*protocol, *port, holder::of(*protocol, *port)));
        }
    }
    Ok(warnings)
}

fn refused(protocol: Protocol, port: u16, holder: Option<String>) -> String {
    let name = protocol.as_str();
    match holder {
        Some(holder) => format!(
            "port {port}/{name} of this machine is taken by {holder}: free it and run `form ps`, or use `form vm port-forward` with another"
        ),
        None if port < FIRST_FREE_PORT => {
            format!(
                "port {port}/{name} of this machine is for root alone: publish one from {FIRST_FREE_PORT} on, or use `form vm port-forward`"
            )
        }
        None => {
            format!("port {port}/{name} of this machine is taken: free it and run `form ps`, or use `form vm port-forward` with another")
        }
    }
}

/// The ports that QEMU forwards, from what `info usernet` prints: a line each, `TCP[HOST_FORWARD] FD ADDRESS PORT …`.
fn parse(text: &str) -> BTreeSet<Port> {
    let row = |line: &str| {
        let mut fields = line.split_whitespace();
        let protocol = match fields.next()?.strip_suffix("[HOST_FORWARD]")? {
            "TCP" => Protocol::Tcp,
            "UDP" => Protocol::Udp,
            _ => return None,
        };
        Some((protocol, fields.nth(2)?.parse().ok()?))
    };
    text.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use form_types::SecretKey;

    use super::*;
    use crate::context::Context;

    #[test]
    fn forwardings_are_read() {
        let text = "Hub -1 (net):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
            TCP[HOST_FORWARD]  15       127.0.0.1    80       10.0.2.15  8080     0     0\r\n  \
            TCP[ESTABLISHED]   17       127.0.0.1    81       10.0.2.15  8081     0     0\r\n  \
            UDP[HOST_FORWARD]   9       127.0.0.1 17846       10.0.2.15  7846     0     0\r\n";
        assert_eq!(parse(text), BTreeSet::from([(Protocol::Tcp, 80), (Protocol::Udp, 17846)]));
        assert!(parse("").is_empty());
    }

    #[test]
    fn a_refusal_says_who_is_in_the_way() {
        assert!(refused(Protocol::Tcp, 8080, Some("nginx (process 7)".into())).contains("nginx (process 7)"));
        assert!(refused(Protocol::Tcp, 80, None).contains("root"));
        assert!(refused(Protocol::Udp, 8080, None).contains("8080/udp"));
    }

    #[test]
    fn only_hosts_of_sandboxes_are_forwarded_to() {
        let key = SecretKey::from_bytes([1; 32]).public();
        let host = KnownHost { name: "box".into(), address: "127.0.0.1:40000".into(), public_key: key };
        let second_key = SecretKey::from_bytes([3; 32]).public();
        let second = KnownHost { name: "box-2".into(), address: "127.0.0.1:40002".into(), public_key: second_key };
        let mut config = Config::default();
        config.contexts.push(Context {
            name: "box".parse().unwrap(),
            kind: ContextKind::Sandbox,
            hosts: vec![host, second],
            sandbox: Some("/srv/box".into()),
        });
        assert_eq!(sandbox_of(&config, &key), Some(("/srv/box".into(), 40_000)));
        assert_eq!(sandbox_of(&config, &second_key), Some(("/srv/box/box-2".into(), 40_002)));
        assert_eq!(sandbox_of(&config, &SecretKey::from_bytes([2; 32]).public()), None);
        config.contexts[0].kind = ContextKind::Cluster;
        assert_eq!(sandbox_of(&config, &key), None);
    }
}
