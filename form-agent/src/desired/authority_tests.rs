//! The rules, as replicas judge by them.

use std::sync::Arc;

use form_api::{
    deploy::{Boot, ForkOf, RollbackRequest},
    sign::{ToSign, sign_request},
};
use form_state::{Replica, StateError};
use form_types::{IdempotencyKey, SecretKey};

use super::*;
use crate::testing::request;

const CLUSTER: ClusterId = ClusterId::from_bytes([3; 16]);

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32])
}

/// The founder, and another host.
const FOUNDER: u8 = 1;
const OTHER: u8 = 2;
const OWNER: u8 = 3;
const STRANGER: u8 = 4;

struct Host {
    key: SecretKey,
    replica: Replica,
    directory: tempfile::TempDir,
}

impl Host {
    fn new(seed: u8) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key = key(seed);
        let replica = open(directory.path(), &key);
        Self { key, replica, directory }
    }

    fn ask(&self, signer: u8, method: &str, path: &str, body: &[u8], number: u32) -> Result<(), StateError> {
        let mut idempotency_key = [0; 16];
        idempotency_key[..4].copy_from_slice(&number.to_le_bytes());
        let to_sign = ToSign {
            cluster: Some(CLUSTER),
            host: self.key.public(),
            method,
            path,
            body,
            idempotency_key: IdempotencyKey::from_bytes(idempotency_key),
        };
        let envelope = sign_request(&to_sign, &key(signer), Timestamp::UNIX_EPOCH).unwrap();
        self.replica.submit(SignedRequest { envelope, body: body.to_vec() }).map(drop)
    }

    fn deploy(&self, signer: u8, name: &str, number: u32) -> Result<(), StateError> {
        self.ask(signer, "POST", "/v1/deploy", &serde_json::to_vec(&request(name)).unwrap(), number)
    }

    fn own(&self, owner: u8) -> Result<(), StateError> {
        self.replica.commit(None, owner_writes(&self.replica.view(), &key(owner).public())).map(drop)
    }

    fn names(&self) -> Vec<String> {
        vms(&self.replica.view()).values().map(|vm| vm.name().to_string()).collect()
    }
}

fn open(directory: &std::path::Path, key_of_host: &SecretKey) -> Replica {
    let rules = Arc::new(AgentRules { cluster: CLUSTER, founder: key(FOUNDER).public() });
    Replica::open(&directory.join("state.redb"), key_of_host, CLUSTER, rules).unwrap()
}

fn is_refused(result: Result<(), StateError>, word: &str) {
    match result {
        Err(StateError::Refused(refusal)) => assert!(refusal.0.contains(word), "{refusal}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_the_owner_and_the_host_itself_change_vms() {
    let host = Host::new(FOUNDER);
    host.own(OWNER).unwrap();
    assert_eq!(owners(&host.replica.view()), [key(OWNER).public()].into());
    host.deploy(OWNER, "web", 1).unwrap();
    // Who came in through the Unix socket: the host has signed.
    host.deploy(FOUNDER, "local", 2).unwrap();
    is_refused(host.deploy(STRANGER, "evil", 3), "does not own");
    for (method, path) in [("POST", "/v1/vms/web/stop"), ("POST", "/v1/vms/web/start"), ("DELETE", "/v1/vms/web")] {
        is_refused(host.ask(STRANGER, method, path, b"", 4), "does not own");
    }
    host.ask(OWNER, "DELETE", "/v1/vms/web", b"", 5).unwrap();
    assert_eq!(host.names(), ["local"]);
}

#[test]
fn every_interface_has_an_address_of_its_own_and_copies_get_as_many() {
    let host = Host::new(FOUNDER);
    host.own(OWNER).unwrap();
    host.deploy(OWNER, "web", 1).unwrap();
    let web = || vm_named(&host.replica.view(), &"web".parse().unwrap()).unwrap();
    let boot = web().boot_digest();
    is_refused(host.ask(STRANGER, "POST", "/v1/vms/web/interfaces", b"", 2), "does not own");
    for number in 3..10 {
        host.ask(OWNER, "POST", "/v1/vms/web/interfaces", b"", number).unwrap();
    }
    is_refused(host.ask(OWNER, "POST", "/v1/vms/web/interfaces", b"", 10), "cannot have more");
    let before = web().interfaces;
    assert_eq!(before.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6, 7]);
    host.ask(OWNER, "POST", "/v1/vms/web/interfaces/eth3/detach", b"", 11).unwrap();
    is_refused(host.ask(OWNER, "POST", "/v1/vms/web/interfaces/eth3/detach", b"", 12), "no network interface");
    is_refused(host.ask(OWNER, "POST", "/v1/vms/web/interfaces/eth0/detach", b"", 13), "first interface");
    assert_eq!(web().interfaces.len(), 6);
    // A deploy leaves them as they are, and they are no reason for a start.
    host.deploy(OWNER, "web", 14).unwrap();
    assert_eq!((web().interfaces.len(), web().boot_digest()), (6, boot));

    let create =
        CreateVmRequest { vm: request("copy"), start: false, disk_of: Some("web".parse().unwrap()), fork_of: None, volumes: Vec::new() };
    host.ask(OWNER, "POST", "/v1/vms", &serde_json::to_vec(&create).unwrap(), 15).unwrap();
    let copy = || vm_named(&host.replica.view(), &"copy".parse().unwrap()).unwrap();
    assert_eq!(copy().interfaces.keys().collect::<Vec<_>>(), web().interfaces.keys().collect::<Vec<_>>());
    assert_eq!(interface::taken(&host.replica.view()).len(), 14);
    // What was detached since does not come again with the same request.
    host.ask(OWNER, "POST", "/v1/vms/copy/interfaces/eth1/detach", b"", 16).unwrap();
    assert_eq!(copy().interfaces.len(), 5);
    host.ask(OWNER, "POST", "/v1/vms/web/interfaces", b"", 17).unwrap();
    assert_eq!(web().interfaces[&3], before[&3], "it gets its address again while nobody else has it");
}

#[test]
fn another_owner_takes_the_place_of_the_first_and_a_restart_forgets_neither() {
    let host = Host::new(FOUNDER);
    host.own(OWNER).unwrap();
    assert!(owner_writes(&host.replica.view(), &key(OWNER).public()).is_empty());
    host.own(STRANGER).unwrap();
    assert_eq!(owners(&host.replica.view()), [key(STRANGER).public()].into());
    is_refused(host.deploy(OWNER, "web", 1), "does not own");
    let Host { key: secret, replica, directory } = host;
    drop(replica);
    assert_eq!(owners(&open(directory.path(), &secret).view()), [key(STRANGER).public()].into());
}

#[test]
fn nobody_but_the_founder_says_who_owns() {
    let other = Host::new(OTHER);
    is_refused(other.own(OTHER), "without a request");
    // Nor does a host that is not the founder let anybody in where no owner is recorded.
    is_refused(other.deploy(OWNER, "web", 1), "does not own");
    other.deploy(OTHER, "own", 2).unwrap();
    let founder = Host::new(FOUNDER);
    let forged = Write::put(Table::Owners, owner_id(&key(OWNER).public()), OWNER_KEY, key(STRANGER).public().to_string());
    is_refused(founder.replica.commit(None, vec![forged]).map(drop), "hash");
    let vm = Write::put(Table::Vms, VmId::from_bytes([9; 16]), "run", "running");
    is_refused(founder.replica.commit(None, vec![vm]).map(drop), "nothing else");
}

/// The state of a version that recorded no owner is taken as it is, and goes on under the owner that is recorded at the next start.
#[test]
fn a_state_without_an_owner_goes_on() {
    let host = Host::new(FOUNDER);
    host.deploy(OWNER, "web", 1).unwrap();
    host.own(OWNER).unwrap();
    is_refused(host.deploy(STRANGER, "evil", 2), "does not own");
    host.ask(OWNER, "POST", "/v1/vms/web/stop", b"", 3).unwrap();
    assert_eq!(host.names(), ["web"]);
}

#[test]
fn a_host_changes_its_own_vms_only() {
    let view = {
        let founder = Host::new(FOUNDER);
        founder.own(OWNER).unwrap();
        founder.deploy(OWNER, "web", 1).unwrap();
        founder.replica.view()
    };
    let vm = vm_named(&view, &"web".parse().unwrap()).unwrap();
    assert!(Authority::Owner.may_change(&vm).is_ok());
    assert!(Authority::Host(HostId::of(&key(FOUNDER).public())).may_change(&vm).is_ok());
    let refusal = Authority::Host(HostId::of(&key(OTHER).public())).may_change(&vm).unwrap_err();
    assert!(refusal.0.contains("another host's"), "{refusal}");
}

/// What the history costs: prints the figures, and fails when a host could not live with them.
#[test]
fn slow_a_thousand_deploys_and_destroys_leave_a_state_that_loads() {
    let host = Host::new(FOUNDER);
    host.own(OWNER).unwrap();
    let path = host.directory.path().join("state.redb");
    let size = || std::fs::metadata(&path).unwrap().len() >> 10;
    for round in 0..1000_u32 {
        let begun = std::time::Instant::now();
        let name = format!("vm-{}", round % 10);
        host.deploy(OWNER, &name, 2 * round).unwrap();
        host.ask(OWNER, "DELETE", &format!("/v1/vms/{name}"), b"", 2 * round + 1).unwrap();
        if [0, 99, 499, 999].contains(&round) {
            println!("round {round}: {:?}, {} KiB", begun.elapsed(), size());
        }
    }
    assert!(host.names().is_empty());
    let Host { key: secret, replica, directory } = host;
    drop(replica);
    let before = size();
    let begun = std::time::Instant::now();
    let replica = open(directory.path(), &secret);
    let first = begun.elapsed();
    drop(replica);
    let begun = std::time::Instant::now();
    let again = open(directory.path(), &secret);
    println!("opened in {first:?}, again in {:?}; {before} KiB became {} KiB", begun.elapsed(), size());
    assert_eq!(again.generation(), 2001);
    assert!(size() < 32 << 10, "{} KiB", size());
}

#[test]
fn a_restore_is_one_start_of_the_vm() {
    let host = Host::new(FOUNDER);
    host.own(OWNER).unwrap();
    host.deploy(OWNER, "web", 1).unwrap();
    host.ask(OWNER, "POST", "/v1/vms/web/stop", b"", 2).unwrap();
    let vm = || vm_named(&host.replica.view(), &"web".parse().unwrap()).unwrap();
    let before = vm();
    assert_eq!(before.restore, None);
    is_refused(host.ask(STRANGER, "POST", "/v1/vms/web/restore", br#"{"snapshot":"one"}"#, 3), "own");
    is_refused(host.ask(OWNER, "POST", "/v1/vms/web/restore", br#"{"snapshot":"../one"}"#, 4), "not a name");
    host.ask(OWNER, "POST", "/v1/vms/web/restore", br#"{"snapshot":"one"}"#, 5).unwrap();
    let restored = vm();
    assert_eq!((restored.run, restored.starts), (Run::Running, before.starts + 1));
    assert_eq!(restored.restore, Some(Restore { snapshot: "one".parse().unwrap(), starts: restored.starts }));
    assert_ne!(restored.boot_digest(), before.boot_digest());
    // The next start is from the disk again.
    host.ask(OWNER, "POST", "/v1/vms/web/restart", b"", 6).unwrap();
    assert!(vm().restore.is_some_and(|restore| restore.starts < vm().starts));
}

#[test]
fn a_vm_is_created_once_and_its_request_leads_back_to_it() {
    let host = Host::new(FOUNDER);
    host.own(OWNER).unwrap();
    let create = |name: &str, start: bool, disk_of: Option<&str>| {
        let disk_of = disk_of.map(|name| name.parse().unwrap());
        serde_json::to_vec(&CreateVmRequest { vm: request(name), start, disk_of, fork_of: None, volumes: Vec::new() }).unwrap()
    };
    let ask = |body: &[u8], number: u32| host.ask(OWNER, "POST", "/v1/vms", body, number);
    let web = create("web", true, None);
    ask(&web, 1).unwrap();
    is_refused(ask(&web, 2), "there is a vm/web already");
    let before = vm_named(&host.replica.view(), &"web".parse().unwrap()).unwrap();

    // A deploy that failed is taken back with the request that made the VM.
    let mut larger = request("web");
    larger.spec.resources.memory_mib = 1024;
    host.ask(OWNER, "POST", "/v1/deploy", &serde_json::to_vec(&larger).unwrap(), 3).unwrap();
    ask(&web, 1).unwrap();
    assert_eq!(vm_named(&host.replica.view(), &"web".parse().unwrap()), Some(before));
    // Under another name it is another's: that request means it no more.
    host.ask(OWNER, "POST", "/v1/vms/web/rename", br#"{"name":"app"}"#, 4).unwrap();
    is_refused(ask(&web, 1), "there is a vm/app already");

    ask(&create("copy", false, Some("app")), 5).unwrap();
    let copy = vm_named(&host.replica.view(), &"copy".parse().unwrap()).unwrap();
    assert_eq!((copy.run, copy.starts), (Run::Stopped, 1));
    is_refused(ask(&create("other", true, Some("nobody")), 6), "there is no vm/nobody");
    is_refused(host.ask(STRANGER, "POST", "/v1/vms", &create("evil", true, None), 7), "does not own");
}

#[test]
fn a_rollback_is_a_deploy_of_the_vm_that_is_named() {
    let host = Host::new(FOUNDER);
    host.own(OWNER).unwrap();
    let vm = || vm_named(&host.replica.view(), &"web".parse().unwrap());
    let to = |name: &str| {
        serde_json::to_vec(&RollbackRequest { to: DeployRequest { boot: Boot::Image(Digest::of(b"old")), ..request(name) } }).unwrap()
    };
    let ask = |signer: u8, body: &[u8], number: u32| host.ask(signer, "POST", "/v1/vms/web/rollback", body, number);
    is_refused(ask(OWNER, &to("web"), 1), "there is no vm/web");
    host.deploy(OWNER, "web", 2).unwrap();
    let before = vm().unwrap();
    is_refused(ask(STRANGER, &to("web"), 3), "own");
    is_refused(ask(OWNER, &to("other"), 4), "not to vm/other");
    is_refused(ask(OWNER, &serde_json::to_vec(&request("web")).unwrap(), 5), "unknown field");
    assert_eq!(vm(), Some(before.clone()));
    ask(OWNER, &to("web"), 6).unwrap();
    let after = vm().unwrap();
    assert_eq!((after.id, after.request.image(), after.run), (before.id, Some(&Digest::of(b"old")), Run::Running));
    // A later deploy that fails is taken back with it.
    host.deploy(OWNER, "web", 7).unwrap();
    ask(OWNER, &to("web"), 6).unwrap();
    assert_eq!(vm(), Some(after));
}

#[test]
fn a_fork_goes_on_from_a_snapshot_once() {
    let host = Host::new(FOUNDER);
    host.own(OWNER).unwrap();
    let vm = |name: &str| vm_named(&host.replica.view(), &name.parse().unwrap());
    let fork = |name: &str, of: &str, start: bool, disk_of: Option<&str>| {
        let fork_of = Some(ForkOf { vm: of.parse().unwrap(), snapshot: "one".parse().unwrap() });
        let disk_of = disk_of.map(|name| name.parse().unwrap());
        serde_json::to_vec(&CreateVmRequest { vm: request(name), start, disk_of, fork_of, volumes: Vec::new() }).unwrap()
    };
    let ask = |body: &[u8], number: u32| host.ask(OWNER, "POST", "/v1/vms", body, number);
    is_refused(ask(&fork("web-1", "web", true, None), 1), "there is no vm/web");
    let web = CreateVmRequest { vm: request("web"), start: true, disk_of: None, fork_of: None, volumes: Vec::new() };
    ask(&serde_json::to_vec(&web).unwrap(), 2).unwrap();
    is_refused(ask(&fork("web-1", "web", false, None), 3), "is started");
    is_refused(ask(&fork("web-1", "web", true, Some("web")), 4), "a copy of a disk or");
    ask(&fork("web-1", "web", true, None), 5).unwrap();
    let made = vm("web-1").unwrap();
    assert_eq!(made.restore, Some(Restore { snapshot: "one".parse().unwrap(), starts: made.starts }));
    assert_ne!((made.id, made.ipv4), (vm("web").unwrap().id, vm("web").unwrap().ipv4));

    // What is submitted again later, to take back a deploy, is a start from its own disk; also when the other VM is gone.
    host.ask(OWNER, "POST", "/v1/vms/web-1/restart", b"", 6).unwrap();
    host.ask(OWNER, "DELETE", "/v1/vms/web", b"", 7).unwrap();
    ask(&fork("web-1", "web", true, None), 5).unwrap();
    assert!(vm("web-1").unwrap().restore.is_some_and(|restore| restore.starts < vm("web-1").unwrap().starts));
}

#[test]
fn one_vm_is_found_as_among_all_of_them() {
    let host = Host::new(FOUNDER);
    host.own(OWNER).unwrap();
    for (number, name) in ["web", "shop", "mail"].into_iter().enumerate() {
        host.deploy(OWNER, name, number as u32 + 1).unwrap();
    }
    host.ask(OWNER, "DELETE", "/v1/vms/mail", b"", 9).unwrap();
    let view = host.replica.view();
    let all = vms(&view);
    assert_eq!(all.len(), 2);
    for (id, one) in &all {
        assert_eq!((vm(&view, id).as_ref(), vm_named(&view, one.name()).as_ref()), (Some(one), Some(one)));
    }
    assert_eq!((vm(&view, &VmId::from_bytes([1; 16])), vm_named(&view, &"mail".parse().unwrap())), (None, None));

    // Two that claim one name: the smaller id has it, unless what it says makes no sense.
    let (id, record) = view.cluster().table(Table::Vms).next().map(|(id, record)| (*id, record.clone())).unwrap();
    let name = record["name"].as_text().unwrap().to_owned();
    let has_it = |records: &[(RecordId, Record)]| who_has(&name, records.iter().map(|(id, record)| (id, record))).map(|vm| vm.id);
    let (first, second) = ((id, record.clone()), (RecordId([0xff; 16]), record.clone()));
    assert_eq!(has_it(&[first.clone(), second.clone()]), Some(VmId::from_bytes(id.0)));
    let mut nonsense = first;
    nonsense.1.remove("request");
    assert_eq!(has_it(&[nonsense, second]), Some(VmId::from_bytes([0xff; 16])));
}
