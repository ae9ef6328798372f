//! The nftables table of this agent, as the JSON that `nft -j -f -` reads (libnftables-json(5)). Rendering is pure; the table
//! is always replaced as a whole, in one transaction, so that packets meet either the old rules or the new ones.

use std::collections::{BTreeMap, BTreeSet};

use form_types::spec::Protocol;
use serde_json::{Value, json};

use crate::{
    address::{Ipv4Range, Ipv6Prefix},
    attachment::{Attachment, Mark},
};

/// What the rules depend on besides the VMs.
#[derive(Clone, Debug)]
pub struct RuleContext {
    pub mark: Mark,
    pub ipv4_range: Ipv4Range,
    pub ipv6_prefix: Ipv6Prefix,
    /// Where the DNS server of this agent listens; VMs ask port 53 of the gateway. `None`: there is none yet.
    pub dns_port: Option<u16>,
}

/// The whole transaction: make the table in case it is not there, remove it with all it holds, make it anew.
pub fn render(context: &RuleContext, attachments: &[Attachment]) -> Value {
    let table = Table { name: context.mark.table() };
    let mut commands = vec![
        json!({"metainfo": {"json_schema_version": 1}}),
        json!({"add": {"table": {"family": "inet", "name": table.name}}}),
        json!({"delete": {"table": {"family": "inet", "name": table.name}}}),
        json!({"add": {"table": {"family": "inet", "name": table.name}}}),
    ];
    table.sets(&mut commands, context, attachments);
    table.antispoof(&mut commands, context);
    table.forward(&mut commands, context, attachments);
    table.input(&mut commands, context);
    table.nat(&mut commands, context, attachments);
    json!({ "nftables": commands })
}

/// The transaction that removes the table, whether it is there or not.
pub fn render_removal(mark: &Mark) -> Value {
    let name = mark.table();
    json!({"nftables": [
        {"metainfo": {"json_schema_version": 1}},
        {"add": {"table": {"family": "inet", "name": name}}},
        {"delete": {"table": {"family": "inet", "name": name}}},
    ]})
}

struct Table {
    name: String,
}

fn meta(key: &str) -> Value {
    json!({"meta": {"key": key}})
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn matches(op: &str, left: Value, right: Value) -> Value {
    json!({"match": {"op": op, "left": left, "right": right}})
}

fn ct_state(states: &[&str]) -> Value {
    matches("in", json!({"ct": {"key": "state"}}), json!(states))
}

fn ct_dnat() -> Value {
    matches("in", json!({"ct": {"key": "status"}}), json!("dnat"))
}

fn prefix(address: &str, length: u8) -> Value {
    json!({"prefix": {"addr": address, "len": length}})
}

fn network_set(network: &form_types::Name) -> String {
    format!("net-{network}")
}

impl Table {
    fn chain(&self, commands: &mut Vec<Value>, name: &str, kind: &str, hook: &str, priority: i32) {
        commands.push(json!({"add": {"chain": {
            "family": "inet", "table": self.name, "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
        }}}));
    }

    fn rule(&self, commands: &mut Vec<Value>, chain: &str, expressions: Vec<Value>) {
        commands.push(json!({"add": {"rule": {"family": "inet", "table": self.name, "chain": chain, "expr": expressions}}}));
    }

    fn set(&self, commands: &mut Vec<Value>, name: &str, kind: Value, elements: Vec<Value>) {
        let mut set = json!({"family": "inet", "table": self.name, "name": name, "type": kind});
        if !elements.is_empty() {
            set["elem"] = elements.into();
        }
        commands.push(json!({"add": {"set": set}}));
    }

    fn sets(&self, commands: &mut Vec<Value>, context: &RuleContext, attachments: &[Attachment]) {
        let tap = |attachment: &Attachment| context.mark.tap(&attachment.vm);
        let bound = |address: &dyn Fn(&Attachment) -> String| {
            attachments.iter().map(|vm| json!({"concat": [tap(vm), vm.mac.to_string(), address(vm)]})).collect::<Vec<_>>()
        };
        self.set(commands, "bound4", json!(["ifname", "ether_addr", "ipv4_addr"]), bound(&|vm| vm.ipv4.to_string()));
        self.set(commands, "bound6", json!(["ifname", "ether_addr", "ipv6_addr"]), bound(&|vm| vm.ipv6.to_string()));
        let macs = attachments.iter().map(|vm| json!({"concat": [tap(vm), vm.mac.to_string()]})).collect();
        self.set(commands, "macs", json!(["ifname", "ether_addr"]), macs);
        let unique = |text: BTreeSet<String>| text.into_iter().map(Value::from).collect::<Vec<_>>();
        self.set(commands, "vms4", json!("ipv4_addr"), unique(attachments.iter().map(|vm| vm.ipv4.to_string()).collect()));
        self.set(commands, "vms6", json!("ipv6_addr"), unique(attachments.iter().map(|vm| vm.ipv6.to_string()).collect()));
        let mut networks = BTreeMap::<_, BTreeSet<String>>::new();
        for attachment in attachments {
            networks.entry(&attachment.network).or_default().insert(tap(attachment));
        }
        for (network, taps) in networks {
            self.set(commands, &network_set(network), json!("ifname"), unique(taps));
        }
    }

    fn taps(context: &RuleContext, key: &str) -> Value {
        matches("==", meta(key), format!("{}*", context.mark.tap_prefix()).into())
    }

    /// A VM sends from its own MAC and addresses alone, before anything else looks at the packet.
    fn antispoof(&self, commands: &mut Vec<Value>, context: &RuleContext) {
        let from_vm = || Self::taps(context, "iifname");
        let drop = || json!({"drop": null});
        let source = |protocol: &str| json!({"concat": [meta("iifname"), payload("ether", "saddr"), payload(protocol, "saddr")]});
        self.chain(commands, "antispoof", "filter", "prerouting", -310);
        let mac = json!({"concat": [meta("iifname"), payload("ether", "saddr")]});
        self.rule(commands, "antispoof", vec![from_vm(), matches("!=", mac, "@macs".into()), drop()]);
        // 127/8 is never on a wire; the taps have route_localnet on, so it would reach services of the host.
        for field in ["saddr", "daddr"] {
            let loopback = matches("==", payload("ip", field), prefix("127.0.0.0", 8));
            self.rule(commands, "antispoof", vec![from_vm(), loopback, drop()]);
        }
        let known4 = matches("==", source("ip"), "@bound4".into());
        let known6 = matches("==", source("ip6"), "@bound6".into());
        let return_ = || json!({"return": null});
        self.rule(commands, "antispoof", vec![from_vm(), known4, return_()]);
        self.rule(commands, "antispoof", vec![from_vm(), known6, return_()]);
        // Neighbour discovery: from a link-local address, or from none while a VM checks that its own is free. To the host
        // only: `forward` refuses link-local sources.
        let neighbour = matches(
            "==",
            payload("icmpv6", "type"),
            json!({"set": [
                "nd-router-solicit", "nd-neighbor-solicit", "nd-neighbor-advert", "mld2-listener-report", "mld-listener-report",
            ]}),
        );
        let local = matches("==", payload("ip6", "saddr"), json!({"set": [prefix("fe80::", 10), prefix("::", 128)]}));
        self.rule(commands, "antispoof", vec![from_vm(), local, neighbour, return_()]);
        let ip = matches("==", meta("protocol"), json!({"set": ["ip", "ip6"]}));
        self.rule(commands, "antispoof", vec![from_vm(), ip, drop()]);
    }

    fn forward(&self, commands: &mut Vec<Value>, context: &RuleContext, attachments: &[Attachment]) {
        let (from_vm, to_vm) = (|| Self::taps(context, "iifname"), || Self::taps(context, "oifname"));
        let (accept, drop) = (|| json!({"accept": null}), || json!({"drop": null}));
        self.chain(commands, "forward", "filter", "forward", 0);
        self.rule(commands, "forward", vec![from_vm(), ct_state(&["established", "related"]), accept()]);
        self.rule(commands, "forward", vec![to_vm(), ct_state(&["established", "related"]), accept()]);
        // Link-local addresses are not routed. Among them are the metadata services of clouds, which would hand the
        // host's credentials to a guest.
        let metadata = matches("==", payload("ip", "daddr"), prefix("169.254.0.0", 16));
        self.rule(commands, "forward", vec![from_vm(), metadata, drop()]);
        for field in ["saddr", "daddr"] {
            let local = matches("==", payload("ip6", field), prefix("fe80::", 10));
            self.rule(commands, "forward", vec![from_vm(), local, drop()]);
        }
        self.rule(commands, "forward", vec![to_vm(), ct_dnat(), accept()]);
        let networks: BTreeSet<_> = attachments.iter().map(|vm| network_set(&vm.network)).collect();
        for network in networks {
            let inside = |key: &str| matches("==", meta(key), format!("@{network}").into());
            self.rule(commands, "forward", vec![inside("iifname"), inside("oifname"), accept()]);
        }
        self.rule(commands, "forward", vec![to_vm(), drop()]);
        self.rule(commands, "forward", vec![from_vm(), accept()]);
    }

    /// Of the host itself a VM reaches DNS, ICMP and what it is answered; published ports never come here, they are forwarded.
    fn input(&self, commands: &mut Vec<Value>, context: &RuleContext) {
        let from_vm = || Self::taps(context, "iifname");
        let accept = || json!({"accept": null});
        self.chain(commands, "input", "filter", "input", 0);
        self.rule(commands, "input", vec![from_vm(), ct_state(&["established", "related"]), accept()]);
        if let Some(port) = context.dns_port {
            for protocol in ["udp", "tcp"] {
                let dns = || matches("==", payload(protocol, "dport"), port.into());
                self.rule(commands, "input", vec![from_vm(), dns(), accept()]);
                // A neighbour of the host that routes the gateway's address here is no VM.
                let not_from = |name: String| matches("!=", meta("iifname"), name.into());
                let strangers = [not_from("lo".to_owned()), not_from(format!("{}*", context.mark.tap_prefix()))];
                let gateway = matches("==", payload("ip", "daddr"), crate::address::GATEWAY_V4.to_string().into());
                self.rule(commands, "input", [strangers.as_slice(), &[gateway, dns(), json!({"drop": null})]].concat());
            }
        }
        let icmp = matches("==", meta("l4proto"), json!({"set": ["icmp", "ipv6-icmp"]}));
        self.rule(commands, "input", vec![from_vm(), icmp, accept()]);
        // Refused rather than dropped: a program in the VM learns at once that there is nothing for it.
        self.rule(commands, "input", vec![from_vm(), json!({"reject": {"type": "icmpx", "expr": "admin-prohibited"}})]);
    }

    fn nat(&self, commands: &mut Vec<Value>, context: &RuleContext, attachments: &[Attachment]) {
        self.chain(commands, "prerouting", "nat", "prerouting", -110);
        self.chain(commands, "output", "nat", "output", -110);
        self.chain(commands, "postrouting", "nat", "postrouting", 90);
        if let Some(port) = context.dns_port {
            let gateway = || matches("==", payload("ip", "daddr"), crate::address::GATEWAY_V4.to_string().into());
            for protocol in ["udp", "tcp"] {
                let dns = matches("==", payload(protocol, "dport"), 53.into());
                let address = crate::address::GATEWAY_V4.to_string();
                let translate = json!({"dnat": {"family": "ip", "addr": address, "port": port}});
                self.rule(commands, "prerouting", vec![Self::taps(context, "iifname"), gateway(), dns, translate]);
            }
        }
        for attachment in attachments {
            self.publish(commands, attachment);
        }
        let masquerade = || json!({"masquerade": null});
        // A connection to 127.0.0.1 on the host keeps that source through DNAT; the VM could not answer it. The gateway's address, and
        // not what masquerade would choose: that needs an address of global scope, and a host without a network has none.
        let loopback = matches("==", payload("ip", "saddr"), prefix("127.0.0.0", 8));
        let gateway = json!({"snat": {"family": "ip", "addr": crate::address::GATEWAY_V4.to_string()}});
        self.rule(commands, "postrouting", vec![Self::taps(context, "oifname"), loopback, gateway]);
        let range = prefix(&context.ipv4_range.base().to_string(), context.ipv4_range.prefix());
        let from4 = matches("==", payload("ip", "saddr"), "@vms4".into());
        let outside4 = matches("!=", payload("ip", "daddr"), range);
        self.rule(commands, "postrouting", vec![from4, outside4, masquerade()]);
        let from6 = matches("==", payload("ip6", "saddr"), "@vms6".into());
        let outside6 = matches("!=", payload("ip6", "daddr"), prefix(&context.ipv6_prefix.base().to_string(), 64));
        self.rule(commands, "postrouting", vec![from6, outside6, masquerade()]);
    }

    /// A port on every address of the host, for packets from outside, from VMs, and from the host itself.
    fn publish(&self, commands: &mut Vec<Value>, attachment: &Attachment) {
        let local = || matches("==", json!({"fib": {"result": "type", "flags": "daddr"}}), "local".into());
        for port in &attachment.ports {
            let protocol = match port.protocol {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            };
            let here = || matches("==", payload(protocol, "dport"), port.host.into());
            let to = |family: &str, address: String| json!({"dnat": {"family": family, "addr": address, "port": port.guest}});
            let family = |version: &str| matches("==", meta("nfproto"), version.into());
            for chain in ["prerouting", "output"] {
                let to4 = to("ip", attachment.ipv4.to_string());
                self.rule(commands, chain, vec![family("ipv4"), local(), here(), to4]);
                // ::1 is left out: IPv6 has no route_localnet, so the replies could not come back to it. A client that is
                // refused there goes on to 127.0.0.1.
                let not_loopback = matches("!=", payload("ip6", "daddr"), "::1".into());
                let to6 = to("ip6", attachment.ipv6.to_string());
                self.rule(commands, chain, vec![family("ipv6"), not_loopback, local(), here(), to6]);
            }
        }
        if !attachment.ports.is_empty() {
            // A VM that calls its own published port gets its packets from the gateway: it would not take them from itself.
            for (protocol, address) in [("ip", attachment.ipv4.to_string()), ("ip6", attachment.ipv6.to_string())] {
                let own = |field: &str| matches("==", payload(protocol, field), address.clone().into());
                self.rule(commands, "postrouting", vec![own("saddr"), own("daddr"), json!({"masquerade": null})]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use form_types::VmId;

    use super::*;
    use crate::{address::Mac, attachment::PublishedPort};

    fn context(dns_port: Option<u16>) -> RuleContext {
        RuleContext {
            mark: Mark::new("0a1b2c").unwrap(),
            ipv4_range: "10.77.0.0/16".parse().unwrap(),
            ipv6_prefix: Ipv6Prefix::for_cluster(&form_types::ClusterId::from_bytes([1; 16])),
            dns_port,
        }
    }

    fn attachment(number: u8, network: &str, ports: Vec<PublishedPort>) -> Attachment {
        let vm = VmId::from_bytes([number; 16]);
        Attachment {
            vm,
            name: "web".parse().unwrap(),
            network: network.parse().unwrap(),
            mac: Mac::of(&vm),
            ipv4: [10, 77, 0, number].into(),
            ipv6: Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, number.into()),
            ports,
        }
    }

    fn commands(rules: &Value) -> &[Value] {
        rules["nftables"].as_array().unwrap()
    }

    fn rules_of<'a>(rules: &'a Value, chain: &str) -> Vec<&'a Value> {
        commands(rules).iter().map(|command| &command["add"]["rule"]).filter(|rule| rule["chain"] == chain).collect()
    }

    #[test]
    fn the_table_is_replaced_and_nothing_else_is_touched() {
        let rules = render(&context(Some(5300)), &[attachment(1, "default", vec![])]);
        let table = json!({"table": {"family": "inet", "name": "form_0a1b2c"}});
        assert_eq!(commands(&rules)[1..4], [json!({"add": table}), json!({"delete": table}), json!({"add": table})]);
        for command in &commands(&rules)[4..] {
            let object = command["add"].as_object().unwrap().values().next().unwrap();
            assert_eq!((&object["family"], &object["table"]), (&json!("inet"), &json!("form_0a1b2c")), "{command}");
        }
        assert_eq!(commands(&render_removal(&context(None).mark))[1..], [json!({"add": table}), json!({"delete": table})]);
    }

    #[test]
    fn rendering_is_deterministic_and_complete_without_vms() {
        let empty = render(&context(None), &[]);
        assert_eq!(empty, render(&context(None), &[]));
        assert!(!empty.to_string().contains("elem"));
        assert!(rules_of(&empty, "prerouting").is_empty() && rules_of(&empty, "output").is_empty());
        // Even then nothing that comes from a tap of ours gets through.
        assert_eq!(rules_of(&empty, "antispoof").last().unwrap()["expr"][2], json!({"drop": null}));
    }

    #[test]
    fn a_published_port_is_translated_from_outside_and_from_the_host() {
        let port = PublishedPort { protocol: Protocol::Udp, host: 5353, guest: 53 };
        let rules = render(&context(None), &[attachment(1, "default", vec![port])]);
        for chain in ["prerouting", "output"] {
            let found = rules_of(&rules, chain);
            assert_eq!(found.len(), 2);
            let expressions = found[0]["expr"].as_array().unwrap();
            assert_eq!(expressions[2]["match"], json!({"op": "==", "left": payload("udp", "dport"), "right": 5353}));
            assert_eq!(expressions[3]["dnat"], json!({"family": "ip", "addr": "10.77.0.1", "port": 53}));
            assert_eq!(found[1]["expr"][4]["dnat"], json!({"family": "ip6", "addr": "fd01::1", "port": 53}));
        }
    }

    #[test]
    fn each_network_is_a_set_of_taps() {
        let rules =
            render(&context(None), &[attachment(1, "default", vec![]), attachment(2, "default", vec![]), attachment(3, "other", vec![])]);
        let set = |name: &str| {
            let found = commands(&rules).iter().find(|command| command["add"]["set"]["name"] == name).unwrap();
            found["add"]["set"]["elem"].as_array().unwrap().len()
        };
        assert_eq!((set("net-default"), set("net-other"), set("bound4"), set("bound6"), set("macs")), (2, 1, 3, 3, 3));
    }
}
