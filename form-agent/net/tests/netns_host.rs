//! The real thing: a host, two guests and an outside world, each a network namespace of its own. Needs root, `ip`, `nft`
//! and /dev/net/tun; a machine without them fails these tests, it does not skip them.

mod lab;

use std::{
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};

use form_net::{
    Attachment, GATEWAY_V4, Ipv4Range, Ipv6Prefix, Leftover, Mac, Mark, NetError, Network, NetworkConfig, PublishedPort, dns::NameEntry,
    port_in_use,
};
use form_types::{ClusterId, VmId, spec::Protocol};
use hickory_server::proto::op::ResponseCode;
use lab::{Guest, Lab};

const CLUSTER: ClusterId = ClusterId::from_bytes([3; 16]);
const MARK: &str = "0a1b2c";

fn attachment(name: &str, number: u8, network: &str, ports: &[(Protocol, u16, u16)]) -> Attachment {
    let vm = VmId::from_bytes([number; 16]);
    Attachment {
        vm,
        name: name.parse().unwrap(),
        network: network.parse().unwrap(),
        mac: Mac::of(&vm),
        ipv4: Ipv4Addr::new(10, 77, 0, number),
        ipv6: Ipv6Prefix::for_cluster(&CLUSTER).address(&vm),
        ports: ports.iter().map(|(protocol, host, guest)| PublishedPort { protocol: *protocol, host: *host, guest: *guest }).collect(),
    }
}

fn network(root: &std::path::Path) -> Network {
    Network::new(NetworkConfig {
        mark: Mark::new(MARK).unwrap(),
        root: root.to_owned(),
        ipv4_range: "10.77.0.0/16".parse::<Ipv4Range>().unwrap(),
        ipv6_prefix: Ipv6Prefix::for_cluster(&CLUSTER),
        dns_upstreams: Vec::new(),
    })
    .unwrap()
}

async fn start(network: &Network, attachment: &Attachment) -> Guest {
    Guest::start(network.attach(attachment).await.unwrap(), attachment)
}

#[test]
fn netns_published_ports_are_reached_from_everywhere() {
    Lab::run(|lab| async move {
        let network = network(lab.root());
        network.ensure_host().await.unwrap();
        let web = attachment("web", 1, "default", &[(Protocol::Tcp, 8080, 80), (Protocol::Udp, 5353, 53)]);
        let peer = attachment("peer", 2, "default", &[]);
        let stranger = attachment("stranger", 3, "other", &[]);
        let (guest, second, third) = (start(&network, &web).await, start(&network, &peer).await, start(&network, &stranger).await);
        network.set_rules(&[web.clone(), peer.clone(), stranger.clone()]).await.unwrap();
        guest.serve(80, "hello from 10.77.0.1\n");
        guest.serve_udp_echo(53);

        // The host itself: by loopback, by each address, and the VM directly.
        for address in ["127.0.0.1:8080", "192.0.2.1:8080", "[2001:db8::1]:8080", "10.77.0.1:80"] {
            assert_eq!(lab.host_get(address), Ok("hello from 10.77.0.1\n".to_owned()), "{address}");
        }
        assert_eq!(lab.host_udp("127.0.0.1", 5353), Ok("echo".to_owned()));
        // `localhost` may be ::1 first: refused at once, so that a client goes on to 127.0.0.1.
        assert!(lab.host_get("[::1]:8080").is_err());
        // From outside, over both protocols.
        for address in ["192.0.2.1:8080", "[2001:db8::1]:8080"] {
            assert_eq!(lab.outside_get(address), Ok("hello from 10.77.0.1\n".to_owned()), "{address}");
        }
        // A VM of the same network: directly, and by the published port; the VM itself by its published port.
        for address in ["10.77.0.1:80", "192.0.2.1:8080", "169.254.77.1:8080", &format!("[{}]:80", web.ipv6)] {
            assert_eq!(second.get(address), Ok("hello from 10.77.0.1\n".to_owned()), "{address}");
        }
        assert_eq!(guest.get("192.0.2.1:8080"), Ok("hello from 10.77.0.1\n".to_owned()));
        // A VM of another network: by the published port alone.
        assert_eq!(third.get("192.0.2.1:8080"), Ok("hello from 10.77.0.1\n".to_owned()));
        assert!(third.cannot_get("10.77.0.1:80"));
        assert!(third.cannot_get(&format!("[{}]:80", web.ipv6)));
        // From outside only what is published.
        lab.outside_sh("ip route add 10.77.0.0/16 via 192.0.2.1");
        assert!(lab.outside_cannot_get("10.77.0.1:80"));
        // Once the rules forget the VM its port is closed.
        network.set_rules(&[peer, stranger]).await.unwrap();
        assert!(lab.outside_cannot_get("192.0.2.1:8080"));
        network.teardown().await.unwrap();
    });
}

#[test]
fn netns_guests_reach_the_world_but_not_the_host() {
    Lab::run(|lab| async move {
        let network = network(lab.root());
        network.ensure_host().await.unwrap();
        let web = attachment("web", 1, "default", &[]);
        let guest = start(&network, &web).await;
        network.set_rules(std::slice::from_ref(&web)).await.unwrap();
        lab.outside_serve(80);
        // Masqueraded: the outside sees the host's address.
        assert_eq!(guest.get("192.0.2.2:80"), Ok("hello to 192.0.2.1\n".to_owned()));
        assert_eq!(guest.get("[2001:db8::2]:80"), Ok("hello to 2001:db8::1\n".to_owned()));
        // A service of the host, on its address, on the gateway's, and on loopback.
        let _service = lab.host_serve(7000);
        assert!(lab.host_cannot_get("127.0.0.1:7000"), "it says nothing");
        guest.route_loopback_to_gateway();
        for address in ["192.0.2.1:7000", "169.254.77.1:7000", "[2001:db8::1]:7000", "127.0.0.1:7000"] {
            assert!(guest.cannot_get(address), "{address}");
        }
        // The metadata service of a cloud.
        lab.outside_sh("ip addr add 169.254.169.254/32 dev eth0");
        lab.host_sh("ip route add 169.254.169.254 via 192.0.2.2");
        assert!(guest.cannot_get("169.254.169.254:80"));
        network.teardown().await.unwrap();
    });
}

#[test]
fn netns_spoofed_packets_are_dropped() {
    Lab::run(|lab| async move {
        let network = network(lab.root());
        network.ensure_host().await.unwrap();
        let (web, peer) = (attachment("web", 1, "default", &[]), attachment("peer", 2, "default", &[]));
        let guest = start(&network, &web).await;
        let _second = start(&network, &peer).await;
        // The kernel's reverse path filter must not be what saves us.
        lab.host_sh("for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done");
        let (outside4, outside6) = ("192.0.2.2:9", "[2001:db8::2]:9");
        let heard = lab.outside_hears();
        guest.say("too early", web.ipv4.into(), outside4);
        assert_eq!(heard(0), []);

        network.set_rules(&[web.clone(), peer.clone()]).await.unwrap();
        guest.sh(&format!("ip addr add {}/32 dev eth0; ip addr add 198.51.100.7/32 dev eth0", peer.ipv4));
        guest.sh(&format!("ip addr add {}/128 dev eth0 nodad", peer.ipv6));
        let heard = lab.outside_hears();
        // First, so that the guest knows its gateway's MAC: it would ask for it with the false address else.
        guest.say("itself 4", web.ipv4.into(), outside4);
        guest.say("itself 6", web.ipv6.into(), outside6);
        guest.say("as another VM", peer.ipv4.into(), outside4);
        guest.say("as anybody", Ipv4Addr::new(198, 51, 100, 7).into(), outside4);
        guest.say("as another VM", peer.ipv6.into(), outside6);
        let itself = |text: &str, from: &str| (text.to_owned(), from.parse().unwrap());
        let mut found = heard(2);
        // Each looks for its own way first.
        found.sort();
        assert_eq!(found, [itself("itself 4", "192.0.2.1"), itself("itself 6", "2001:db8::1")]);

        // A foreign MAC with the right address.
        guest.sh("ip link set eth0 address 52:00:00:00:00:99");
        guest.route_to_gateway();
        let heard = lab.outside_hears();
        guest.say("with another MAC", web.ipv4.into(), outside4);
        assert_eq!(heard(0), []);
        network.teardown().await.unwrap();
    });
}

#[test]
fn netns_names_are_answered_in_the_guest() {
    Lab::run(|lab| async move {
        let network = network(lab.root());
        network.ensure_host().await.unwrap();
        network.serve_dns().await.unwrap();
        let (web, peer) = (attachment("web", 1, "default", &[]), attachment("peer", 2, "default", &[]));
        let guest = start(&network, &web).await;
        network.set_rules(&[web.clone(), peer.clone()]).await.unwrap();
        network.names().set([NameEntry::from(&web), NameEntry::from(&peer)]);
        for (name, kind, tcp, expected) in [
            ("peer.default.form.internal", "A", false, peer.ipv4.to_string()),
            ("peer.default.form.internal", "A", true, peer.ipv4.to_string()),
            ("peer.default.form.internal", "AAAA", false, peer.ipv6.to_string()),
            ("peer", "A", false, peer.ipv4.to_string()),
        ] {
            assert_eq!(guest.resolve(GATEWAY_V4.into(), name, kind, tcp).await, Ok(expected), "{name} {kind} {tcp}");
        }
        let none = guest.resolve(GATEWAY_V4.into(), "none.default.form.internal", "A", false).await;
        assert_eq!(none, Err(ResponseCode::NXDomain.to_string()));
        network.teardown().await.unwrap();
    });
}

#[test]
fn netns_leftovers_are_found_and_removed() {
    Lab::run(|lab| async move {
        let (web, gone) = (attachment("web", 1, "default", &[]), attachment("gone", 2, "default", &[]));
        let before = lab.host_sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding");
        let network = network(lab.root());
        network.ensure_host().await.unwrap();
        network.ensure_host().await.unwrap();
        let kept = network.attach(&web).await.unwrap();
        assert!(matches!(network.attach(&web).await, Err(NetError::TapTaken { .. })));
        let held = network.attach(&gone).await.unwrap();
        let clash = Attachment { vm: VmId::from_bytes([9; 16]), ..gone.clone() };
        assert!(matches!(network.attach(&clash).await, Err(NetError::AddressTaken { .. })));
        network.set_rules(&[web.clone(), gone.clone()]).await.unwrap();
        // Somebody else's: never touched.
        lab.host_sh("ip tuntap add form0a1b2d00000 mode tap; nft add table inet form_0a1b2d; nft add table inet filter");

        let leftovers = network.leftovers(&[web.vm]).await.unwrap();
        assert_eq!(leftovers, [Leftover::Tap { name: network.tap_name(&gone.vm) }]);
        network.remove(&leftovers[0]).await.unwrap();
        network.remove(&leftovers[0]).await.unwrap();
        assert_eq!(network.leftovers(&[web.vm]).await.unwrap(), []);
        drop(held);
        // The tap goes with its last descriptor, and the kernel takes its time over it.
        drop(kept);
        let begun = Instant::now();
        while lab.host_sh("ip -o link").contains(&network.tap_name(&web.vm)) {
            assert!(begun.elapsed() < Duration::from_secs(60), "the tap stays");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }

        // Another process of the same agent: the table of a run that is over is left over too.
        let doctor = crate::network(lab.root());
        assert_eq!(doctor.leftovers(&[]).await.unwrap(), [Leftover::Table { name: "form_0a1b2c".to_owned() }]);
        doctor.remove(&Leftover::Table { name: "form_0a1b2c".to_owned() }).await.unwrap();
        assert_eq!(doctor.leftovers(&[]).await.unwrap(), []);

        network.ensure_host().await.unwrap();
        lab.host_sh("nft delete table inet form_0a1b2d");
        network.teardown().await.unwrap();
        network.teardown().await.unwrap();
        assert_eq!(lab.host_sh("nft list tables"), "table inet filter\n");
        assert!(lab.host_sh("ip -o link").contains("form0a1b2d00000"));
        assert_eq!(lab.host_sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding"), before);
        assert_eq!(std::fs::read_dir(lab.root().join("formnet")).unwrap().count(), 0);
    });
}

#[test]
fn netns_many_vms_end_at_once() {
    Lab::run(|lab| async move {
        let network = Arc::new(network(lab.root()));
        network.ensure_host().await.unwrap();
        // More interfaces than the kernel lists in one message.
        let all: Vec<Attachment> = (1..=60).map(|number| attachment(&format!("vm{number}"), number, "default", &[])).collect();
        let mut taps = Vec::new();
        for attachment in &all {
            taps.push(network.attach(attachment).await.unwrap());
        }
        let mut tasks = tokio::task::JoinSet::new();
        for id in all.iter().map(|attachment| attachment.vm) {
            let network = Arc::clone(&network);
            tasks.spawn(async move {
                network.leftovers(&[]).await?;
                network.detach(&[id]).await
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap().unwrap();
        }
        assert!(network.leftovers(&[]).await.unwrap().iter().all(|left| !matches!(left, Leftover::Tap { .. })));
        network.teardown().await.unwrap();
    });
}

#[test]
fn netns_a_taken_port_is_named_with_its_holder() {
    Lab::run(|lab| async move {
        let _service = lab.host_serve(8080);
        let user = port_in_use(Protocol::Tcp, 8080).unwrap().unwrap();
        assert_eq!(user.process.unwrap().0, std::process::id());
        assert_eq!(port_in_use(Protocol::Udp, 8080).unwrap(), None);
        assert_eq!(port_in_use(Protocol::Tcp, 8081).unwrap(), None);
    });
}
