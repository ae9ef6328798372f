//! The rules on a real replica: signed requests in, the view out.

use form_api::{
    deploy::Boot,
    sign::{self, ToSign},
};
use form_state::Replica;
use form_types::{ClusterId, Digest, SecretKey, spec};
use jiff::Timestamp;
use serde_json::{Value, json};
use std::sync::Arc;

use super::*;
use crate::{
    desired::AgentRules,
    testing::request,
    volume::{Attached, plan},
};

struct Host {
    replica: Replica,
    key: SecretKey,
    cluster: ClusterId,
    asked: std::cell::Cell<u8>,
    _directory: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let (key, cluster) = (SecretKey::from_bytes([3; 32]), ClusterId::from_bytes([5; 16]));
        let directory = tempfile::tempdir().unwrap();
        let replica =
            Replica::open(&directory.path().join("state.redb"), &key, cluster, Arc::new(AgentRules { cluster, founder: key.public() }))
                .unwrap();
        Self { replica, key, cluster, asked: std::cell::Cell::new(0), _directory: directory }
    }

    fn ask(&self, method: &str, path: &str, body: &impl serde::Serialize) -> Result<(), String> {
        self.ask_as(&self.key, method, path, body)
    }

    fn ask_as(&self, signer: &SecretKey, method: &str, path: &str, body: &impl serde::Serialize) -> Result<(), String> {
        let body = serde_json::to_string(body).unwrap();
        self.asked.set(self.asked.get() + 1);
        let to_sign = ToSign {
            cluster: Some(self.cluster),
            host: self.key.public(),
            method,
            path,
            body: body.as_bytes(),
            idempotency_key: IdempotencyKey::from_bytes([self.asked.get(); 16]),
        };
        let header = sign::sign_request(&to_sign, signer, Timestamp::now()).unwrap();
        let signed = form_state::SignedRequest { envelope: header, body: body.into_bytes() };
        self.replica.submit(signed).map(drop).map_err(|error| error.to_string())
    }

    fn deploy(&self, name: &str, volumes: &[(&str, &str, Option<u64>)]) -> Result<(), String> {
        self.ask("POST", "/v1/deploy", &wanted(name, volumes))
    }

    fn volume(&self, name: &str) -> DesiredVolume {
        existing(&name.parse().unwrap(), &self.replica.view()).unwrap()
    }

    fn holder(&self, name: &str) -> Option<(String, Option<String>)> {
        let Attached { vm, path, .. } = self.volume(name).attached?;
        Some((holder(&self.replica.view(), &vm), path))
    }

    fn starts(&self, name: &str) -> u64 {
        desired::vm_named(&self.replica.view(), &name.parse().unwrap()).unwrap().starts
    }
}

fn wanted(name: &str, volumes: &[(&str, &str, Option<u64>)]) -> DeployRequest {
    let mut wanted = request(name);
    wanted.spec.ports.clear();
    let volume = |(name, path, size): &(&str, &str, Option<u64>)| spec::Volume {
        name: name.parse().unwrap(),
        path: (*path).to_owned(),
        size_bytes: size.map(|gib| gib << 30),
    };
    wanted.spec.volumes = volumes.iter().map(volume).collect();
    wanted
}

fn at(vm: &str, path: &str) -> Option<(String, Option<String>)> {
    Some((vm.to_owned(), Some(path.to_owned())))
}

fn create(size: u64) -> Value {
    json!({"name": "data", "size_bytes": size})
}

#[test]
fn a_deploy_makes_keeps_grows_and_leaves_volumes() {
    let host = Host::new();
    host.deploy("web", &[("data", "/data", Some(20)), ("logs", "/logs", None)]).unwrap();
    let data = host.volume("data");
    assert_eq!((data.size_bytes, data.format, data.pool), (20 << 30, VolumeFormat::Raw, form_store::local_pool()));
    assert_eq!(host.volume("logs").size_bytes, volume::DEFAULT_BYTES);
    assert_ne!(data.id, host.volume("logs").id);
    assert_eq!((host.holder("data"), host.holder("logs")), (at("web", "/data"), at("web", "/logs")));

    // Another image, the same volumes: nothing changes for them, and they are the same ones.
    let mut rebuilt = wanted("web", &[("data", "/data", Some(20)), ("logs", "/logs", None)]);
    rebuilt.boot = Boot::Image(Digest::of(b"another image"));
    let view = host.replica.view();
    let vm = desired::vm_named(&view, &"web".parse().unwrap()).unwrap();
    assert!(deployed(&rebuilt, Some(&vm.id), &vm.host, &view).unwrap().is_nothing());
    host.ask("POST", "/v1/deploy", &rebuilt).unwrap();
    assert_eq!((host.volume("data").id, host.starts("web")), (data.id, 1));

    // A smaller size keeps what is there, a larger one grows it; what is not named any more is detached, and stays.
    host.deploy("web", &[("data", "/data", Some(10))]).unwrap();
    assert_eq!((host.volume("data").size_bytes, host.holder("logs"), host.starts("web")), (20 << 30, None, 2));
    host.deploy("web", &[("data", "/srv", Some(30))]).unwrap();
    assert_eq!((host.volume("data").size_bytes, host.volume("data").id), (30 << 30, data.id));
    assert_eq!((host.holder("data"), host.starts("web")), (at("web", "/srv"), 3));

    // What it left, another may take; what it has, nobody else.
    host.deploy("other", &[("logs", "/logs", None)]).unwrap();
    assert_eq!(host.holder("logs"), at("other", "/logs"));
    let refused = host.deploy("other", &[("data", "/data", None)]).unwrap_err();
    assert!(refused.contains("volume/data") && refused.contains("vm/web"), "{refused}");

    // A VM that is destroyed has nothing any more, and its volumes stay.
    host.ask("DELETE", "/v1/vms/web", &json!({})).unwrap();
    assert_eq!((host.holder("data"), host.volume("data").id), (None, data.id));
    host.deploy("other", &[("data", "/data", None)]).unwrap();
    assert_eq!((host.holder("data"), host.holder("logs")), (at("other", "/data"), None));
}

#[test]
fn three_volumes_on_one_path_are_one_too_many_twice() {
    let host = Host::new();
    let refused = host.deploy("web", &[("a", "/data", None), ("b", "/data", None), ("c", "/data", None)]).unwrap_err();
    assert!(refused.contains("volume/a") && refused.contains("/data"), "{refused}");
    assert!(volumes(&host.replica.view()).is_empty(), "nothing is half done");
    host.deploy("web", &[("a", "/data", None)]).unwrap();
    for name in ["b", "c"] {
        host.ask("POST", "/v1/volumes", &json!({"name": name, "size_bytes": 1 << 30})).unwrap();
        let refused = host.ask("POST", &format!("/v1/volumes/{name}/attach"), &json!({"vm": "web", "path": "/data"})).unwrap_err();
        assert!(refused.contains("volume/a"), "{refused}");
    }
    host.ask("POST", "/v1/volumes/b/attach", &json!({"vm": "web", "path": "/data/b"})).unwrap();
    // Attached by hand, so a deploy leaves it; and its path is taken for the Formfile.
    host.deploy("web", &[("a", "/data", None)]).unwrap();
    assert_eq!(host.holder("b"), at("web", "/data/b"));
    assert!(host.deploy("web", &[("a", "/data", None), ("c", "/data/b", None)]).is_err());
    for path in ["/", "data", "/data/../etc", "/data/", "/a//b", "/proc/x", "/dev", "/a\nb"] {
        assert!(host.ask("POST", "/v1/volumes/c/attach", &json!({"vm": "web", "path": path})).is_err(), "{path}");
    }
    assert_eq!(host.holder("c"), None);
}

#[test]
fn one_vm_at_a_time_has_a_volume() {
    let host = Host::new();
    for vm in ["web", "db"] {
        host.deploy(vm, &[]).unwrap();
    }
    host.ask("POST", "/v1/volumes", &create(1 << 30)).unwrap();
    assert!(host.ask("POST", "/v1/volumes", &create(1 << 30)).unwrap_err().contains("already"));
    assert!(host.ask("POST", "/v1/volumes/data/attach", &json!({"vm": "nobody"})).unwrap_err().contains("vm/nobody"));
    host.ask("POST", "/v1/volumes/data/attach", &json!({"vm": "web"})).unwrap();
    assert_eq!(host.holder("data"), Some(("web".to_owned(), None)));
    for vm in ["web", "db"] {
        let refused = host.ask("POST", "/v1/volumes/data/attach", &json!({"vm": vm, "read_only": true})).unwrap_err();
        assert!(refused.contains("vm/web"), "{refused}");
    }
    assert!(host.ask("DELETE", "/v1/volumes/data", &json!({})).unwrap_err().contains("vm/web"));
    host.ask("POST", "/v1/volumes/data/detach", &json!({})).unwrap();
    assert!(host.ask("POST", "/v1/volumes/data/detach", &json!({})).is_err());
    host.ask("POST", "/v1/volumes/data/resize", &json!({"size_bytes": (2_u64 << 30) + 512})).unwrap();
    for size in [1 << 30, (2 << 30) + 513, u64::MAX] {
        assert!(host.ask("POST", "/v1/volumes/data/resize", &json!({"size_bytes": size})).is_err(), "{size}");
    }
    host.ask("POST", "/v1/volumes/data/clone", &json!({"name": "copy"})).unwrap();
    assert_eq!(host.volume("copy").size_bytes, (2 << 30) + 512);
    host.ask("DELETE", "/v1/volumes/data", &json!({})).unwrap();
    assert!(existing(&"data".parse().unwrap(), &host.replica.view()).is_err());
    for (method, path) in [("POST", "/v1/volumes/copy/format"), ("PUT", "/v1/volumes/copy"), ("DELETE", "/v1/volumes")] {
        assert!(host.ask(method, path, &json!({})).is_err(), "{method} {path}");
    }
    assert!(host.ask("POST", "/v1/volumes", &json!({"name": "data", "size_bytes": 1 << 30, "surprise": 1})).is_err());
}

#[test]
fn a_vm_has_as_many_as_its_bus_has_room_for() {
    let host = Host::new();
    let names: Vec<String> = (0..=MAX_ATTACHED).map(|number| format!("v{number}")).collect();
    let paths: Vec<String> = names.iter().map(|name| format!("/{name}")).collect();
    let all: Vec<(&str, &str, Option<u64>)> =
        names.iter().zip(&paths).map(|(name, path)| (name.as_str(), path.as_str(), Some(1))).collect();
    assert!(host.deploy("web", &all).is_err());
    host.deploy("web", &all[..MAX_ATTACHED]).unwrap();
    let serials: std::collections::BTreeSet<String> = volumes(&host.replica.view()).values().map(|volume| volume.id.serial()).collect();
    assert_eq!(serials.len(), MAX_ATTACHED, "equal in size, and yet each has its own serial");
    host.ask("POST", "/v1/volumes", &create(1 << 30)).unwrap();
    assert!(host.ask("POST", "/v1/volumes/data/attach", &json!({"vm": "web"})).is_err());
}

#[test]
fn a_plan_says_what_happens_to_each() {
    let host = Host::new();
    host.deploy("web", &[("data", "/data", Some(10)), ("old", "/old", None)]).unwrap();
    let after = wanted("web", &[("data", "/data", Some(20)), ("new", "/new", Some(1))]);
    let view = host.replica.view();
    let vm = desired::vm_named(&view, &"web".parse().unwrap()).unwrap();
    let mut planned = crate::plan::plan(Some(&vm.request), &vm.request, &|image| *image).vms.remove(0);
    plan::add(&mut planned, &after, &deployed(&after, Some(&vm.id), &vm.host, &view).unwrap());
    let lines: Vec<String> = planned
        .changes
        .iter()
        .map(|change| format!("{}: {} -> {}", change.field, change.from.as_deref().unwrap_or("-"), change.to.as_deref().unwrap_or("-")))
        .collect();
    assert_eq!(
        lines,
        [
            "volume new: - -> new, 1 GiB, mounted at /new",
            "volume data: 10 GiB -> 20 GiB",
            "volume old: /old -> detached, and kept with what it holds",
        ]
    );
    assert!(planned.restarts && planned.action == form_api::deploy::PlanAction::Update);
}

#[test]
fn limits_are_kept_until_they_are_changed_and_go_along_to_clones() {
    let host = Host::new();
    let limits = |name: &str| host.volume(name).limits;
    let these = |iops, bytes_per_second| DiskLimits { iops, bytes_per_second };
    host.ask("POST", "/v1/volumes", &create(1 << 30)).unwrap();
    assert_eq!(limits("data"), DiskLimits::default());
    host.ask("PATCH", "/v1/volumes/data", &json!({"iops": 500})).unwrap();
    host.ask("PATCH", "/v1/volumes/data", &json!({"bytes_per_second": 1 << 20})).unwrap();
    assert_eq!(limits("data"), these(Some(500), Some(1 << 20)));
    host.deploy("web", &[("data", "/data", None)]).unwrap();
    host.ask("POST", "/v1/volumes/data/clone", &json!({"name": "copy"})).unwrap();
    host.ask("PATCH", "/v1/volumes/data", &json!({"iops": null})).unwrap();
    assert_eq!((limits("data"), limits("copy")), (these(None, Some(1 << 20)), these(Some(500), Some(1 << 20))));
    host.ask("POST", "/v1/volumes", &json!({"name": "new", "size_bytes": 1 << 30, "limits": {"iops": 7}})).unwrap();
    assert_eq!(limits("new"), these(Some(7), None));
    for bad in [json!({"iops": 0}), json!({"bytes_per_second": 1023}), json!({"iops": -1}), json!({"speed": 1})] {
        assert!(host.ask("PATCH", "/v1/volumes/data", &bad).is_err(), "{bad}");
        let new = json!({"name": "bad", "size_bytes": 1 << 30, "limits": bad});
        assert!(host.ask("POST", "/v1/volumes", &new).is_err(), "{new}");
    }
    assert!(host.ask("PATCH", "/v1/volumes/nothing", &json!({"iops": 1})).is_err());
}

#[test]
fn limits_of_a_vm_outlive_deploys_and_need_no_start() {
    let host = Host::new();
    let web = || desired::vm_named(&host.replica.view(), &"web".parse().unwrap()).unwrap();
    host.deploy("web", &[]).unwrap();
    let before = web();
    host.ask("PATCH", "/v1/vms/web", &json!({"net_bytes_per_second": 12_500_000, "disk_iops": 300})).unwrap();
    host.ask("PATCH", "/v1/vms/web", &json!({"disk_bytes_per_second": 4096, "disk_iops": null})).unwrap();
    let disk = DiskLimits { iops: None, bytes_per_second: Some(4096) };
    let limits = form_types::VmLimits { disk, net_bytes_per_second: Some(12_500_000) };
    assert_eq!((web().limits, web().boot_digest()), (limits, before.boot_digest()));
    let mut rebuilt = wanted("web", &[]);
    rebuilt.boot = Boot::Image(Digest::of(b"another image"));
    host.ask("POST", "/v1/deploy", &rebuilt).unwrap();
    assert_eq!(web().limits, limits);
    for bad in [json!({"net_bytes_per_second": 1}), json!({"disk_iops": 0}), json!({"disk_bytes_per_second": u64::MAX})] {
        assert!(host.ask("PATCH", "/v1/vms/web", &bad).is_err(), "{bad}");
    }
    // A copy of it may do as much.
    let copy = json!({"vm": wanted("copy", &[]), "start": false, "disk_of": "web"});
    host.ask("POST", "/v1/vms", &copy).unwrap();
    assert_eq!(desired::vm_named(&host.replica.view(), &"copy".parse().unwrap()).unwrap().limits, limits);
}

#[test]
fn volumes_are_changed_by_who_may_change_vms() {
    let host = Host::new();
    let (owner, stranger) = (SecretKey::from_bytes([4; 32]), SecretKey::from_bytes([6; 32]));
    host.replica.commit(None, desired::owner_writes(&host.replica.view(), &owner.public())).unwrap();
    host.deploy("web", &[]).unwrap();
    host.ask_as(&owner, "POST", "/v1/volumes", &create(1 << 30)).unwrap();
    let asked = [
        ("POST", "/v1/volumes", json!({"name": "mine", "size_bytes": 1 << 30})),
        ("POST", "/v1/volumes/data/attach", json!({"vm": "web"})),
        ("POST", "/v1/volumes/data/resize", json!({"size_bytes": 2_u64 << 30})),
        ("POST", "/v1/volumes/data/clone", json!({"name": "copy"})),
        ("PATCH", "/v1/volumes/data", json!({"iops": 100})),
        ("POST", "/v1/volumes/data/detach", json!({})),
        ("DELETE", "/v1/volumes/data", json!({})),
        ("POST", "/v1/deploy", json!(wanted("web", &[("data", "/data", None)]))),
    ];
    for (method, path, body) in &asked {
        let refused = host.ask_as(&stranger, method, path, body).unwrap_err();
        assert!(refused.contains("does not own"), "{method} {path}: {refused}");
    }
    assert_eq!((host.volume("data").size_bytes, host.holder("data")), (1 << 30, None));
    for (method, path, body) in &asked[..7] {
        host.ask_as(&owner, method, path, body).unwrap();
    }
    assert_eq!(volumes(&host.replica.view()).keys().map(Name::as_str).collect::<Vec<_>>(), ["copy", "mine"]);
}

/// Its own volumes, that is; and a VM has only those of its own host.
#[test]
fn a_host_changes_its_own_volumes_only() {
    let host = Host::new();
    host.ask("POST", "/v1/volumes", &create(1 << 30)).unwrap();
    host.deploy("web", &[]).unwrap();
    let (view, elsewhere) = (host.replica.view(), HostId::of(&SecretKey::from_bytes([9; 32]).public()));
    let (data, web) = (host.volume("data"), desired::vm_named(&host.replica.view(), &"web".parse().unwrap()).unwrap());
    let key = IdempotencyKey::from_bytes([99; 16]);
    let signer = host.key.public();
    let claim = Claim { author: signer, time: 0, document: form_state::Document::Cluster };
    let ask = |authority| {
        let asked = Asked { signer: &signer, key: &key, claim: &claim, authority };
        derive("DELETE", &["data"], b"", asked, &view).map_err(|refusal| refusal.0)
    };
    assert!(ask(Authority::Owner).is_ok() && ask(Authority::Host(data.host)).is_ok());
    assert!(ask(Authority::Host(elsewhere)).unwrap_err().contains("another host's"));

    let request = AttachRequest { vm: "web".parse().unwrap(), path: None, read_only: false };
    let moved = DesiredVolume { host: elsewhere, ..data };
    assert!(matches!(check_attach(&moved, &request, &view), Err(VolumeFault::Elsewhere { .. })));
    let with_data = wanted("web", &[("data", "/data", None)]);
    assert!(deployed(&with_data, Some(&web.id), &web.host, &view).is_ok());
    assert!(matches!(deployed(&with_data, Some(&web.id), &elsewhere, &view), Err(VolumeFault::Elsewhere { .. })));
}

#[test]
fn a_volume_moves_to_another_pool_of_its_host() {
    let host = Host::new();
    host.ask("POST", "/v1/volumes", &json!({"name": "data", "size_bytes": 16 << 20})).unwrap();
    let before = host.volume("data");
    host.ask("POST", "/v1/volumes/data/move", &json!({"pool": "fast"})).unwrap();
    assert_eq!(host.volume("data"), DesiredVolume { pool: "fast".parse().unwrap(), ..before });
    let error = host.ask("POST", "/v1/volumes/data/move", &json!({"pool": "fast"})).unwrap_err();
    assert!(error.contains("pool/fast already"), "{error}");
    host.ask("POST", "/v1/volumes/nope/move", &json!({"pool": "local"})).unwrap_err();
    host.ask("POST", "/v1/volumes/data/move", &json!({"pool": "../local"})).unwrap_err();
}

/// The state knows nothing of snapshots: their size is in what is signed, and the host looks whether it is true.
#[test]
fn a_volume_goes_back_and_is_cloned_with_the_size_that_a_snapshot_had() {
    let host = Host::new();
    host.ask("POST", "/v1/volumes", &json!({"name": "data", "size_bytes": 32 << 20, "format": "qcow2", "limits": {"iops": 500}})).unwrap();
    host.deploy("web", &[]).unwrap();
    host.ask("POST", "/v1/volumes/data/attach", &json!({"vm": "web", "path": "/data"})).unwrap();
    let before = host.volume("data");
    assert_eq!(before.restored, None);
    host.ask("POST", "/v1/volumes/data/restore", &json!({"snapshot": "one"})).unwrap();
    let once = host.volume("data");
    let operation = OperationId::derive(&host.key.public(), &IdempotencyKey::from_bytes([host.asked.get(); 16]));
    assert_eq!(once, DesiredVolume { restored: Some(operation), ..before.clone() }, "whoever has it keeps it");
    // Smaller and larger.
    for size in [16 << 20, 64 << 20] {
        host.ask("POST", "/v1/volumes/data/restore", &json!({"snapshot": "one", "size_bytes": size})).unwrap();
        let now = host.volume("data");
        assert_eq!((now.size_bytes, &now.attached), (size, &before.attached));
        assert_ne!(now.restored, once.restored, "each is another");
    }
    for bad in [
        json!({"snapshot": "one", "size_bytes": (16 << 20) + 1}),
        json!({"snapshot": "one", "size_bytes": 0}),
        json!({"snapshot": "../one"}),
        json!({"snapshot": "one", "force": true}),
        json!({}),
    ] {
        assert!(host.ask("POST", "/v1/volumes/data/restore", &bad).is_err(), "{bad}");
    }
    assert!(host.ask("POST", "/v1/volumes/nope/restore", &json!({"snapshot": "one"})).is_err());

    host.ask("POST", "/v1/volumes/data/clone", &json!({"name": "then", "snapshot": "one", "size_bytes": 16 << 20})).unwrap();
    let then = host.volume("then");
    assert_eq!((then.size_bytes, then.format, then.limits.iops, then.restored), (16 << 20, VolumeFormat::Qcow2, Some(500), None));
    host.ask("POST", "/v1/volumes/data/clone", &json!({"name": "same", "snapshot": "one"})).unwrap();
    assert_eq!(host.volume("same").size_bytes, 64 << 20);
    let error = host.ask("POST", "/v1/volumes/data/clone", &json!({"name": "large", "size_bytes": 1 << 30})).unwrap_err();
    assert!(error.contains("clone of a snapshot"), "{error}");
    // A request for nothing but snapshots says nothing to the state.
    assert!(host.ask("POST", "/v1/volumes/data/snapshots", &json!({"name": "one"})).is_err());
    assert!(host.ask("DELETE", "/v1/volumes/data/snapshots/one", &json!({})).is_err());
    host.ask("DELETE", "/v1/volumes/then?snapshots=true", &json!({})).unwrap();
    assert!(!volumes(&host.replica.view()).contains_key(&"then".parse().unwrap()));
}
