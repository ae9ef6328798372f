//! What a VM was when it was healthy: where a deploy that fails goes back to, and what `form rollback` offers.
//!
//! It is in the VM's directory, not in the replicated state: it is about this host's images, and a VM is well without it.

use std::collections::BTreeMap;

use form_api::{
    deploy::{DeployRequest, VmVersion},
    vm::SetRequest,
};
use form_types::{Digest, ImageReference, Name, VmId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    agent::Agent,
    authorise::SignedRequest,
    create::Wanted,
    desired::{self, DesiredVm},
    identity::write_atomically,
};

/// How many versions are kept of a VM beside the present one: a few mistakes in a row can be taken back, and a disk is not filled with images.
const MAX_EARLIER: usize = 5;

/// What became healthy last, as its user signed it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Previous {
    pub request: SignedRequest,
    pub boot: Digest,
    /// What was set since (`form vm set`), in order: going back to the deploy goes back to these as well.
    #[serde(default)]
    pub changes: Vec<SignedRequest>,
}

impl Previous {
    /// What the VM was by this, whatever it was called.
    pub fn request(&self) -> Option<DeployRequest> {
        let request = Wanted::read(&self.request)?.request;
        Some(self.changes.iter().fold(request, |request, change| {
            let set = serde_json::from_str::<SetRequest>(&change.body).ok();
            set.and_then(|set| desired::with_set(&request, &set).ok()).unwrap_or(request)
        }))
    }
}

/// Something that a VM was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Earlier {
    request: DeployRequest,
    #[serde(default)]
    image: Option<ImageReference>,
    /// When it became healthy.
    #[serde(default)]
    at: Option<Timestamp>,
}

/// `deployed.json` of a VM.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// All that there was in versions which had no `form rollback`.
    #[serde(flatten)]
    previous: Previous,
    #[serde(default)]
    image: Option<ImageReference>,
    #[serde(default)]
    at: Option<Timestamp>,
    /// The latest first. What another version of the agent wrote and this one does not understand is passed over.
    #[serde(default)]
    earlier: Vec<Value>,
}

impl Kept {
    /// Everything that is kept, the latest first, as it would be asked for under `name`.
    fn all(&self, name: &Name) -> Vec<Earlier> {
        let last = self.previous.request().map(|request| Earlier { request, image: self.image.clone(), at: self.at });
        let earlier = self.earlier.iter().filter_map(|value| serde_json::from_value::<Earlier>(value.clone()).ok());
        last.into_iter().chain(earlier).map(|one| Earlier { request: desired::renamed(&one.request, name), ..one }).collect()
    }

    /// What comes after `self` when `previous` has become healthy.
    fn followed_by(self, previous: Previous, image: Option<ImageReference>, at: Timestamp) -> Self {
        let earlier = match previous.request() {
            Some(new) => without(self.all(&new.spec.name), &new),
            None => Vec::new(),
        };
        let earlier = earlier.iter().take(MAX_EARLIER).filter_map(|one| serde_json::to_value(one).ok()).collect();
        Self { previous, image, at: Some(at), earlier }
    }
}

/// Each once, and `request` not at all.
fn without(all: Vec<Earlier>, request: &DeployRequest) -> Vec<Earlier> {
    let mut left: Vec<Earlier> = Vec::new();
    for one in all {
        if one.request != *request && left.iter().all(|other| other.request != one.request) {
            left.push(one);
        }
    }
    left
}

fn path(agent: &Agent, vm: &VmId) -> std::path::PathBuf {
    agent.vm_directory(vm).join("deployed.json")
}

fn read(agent: &Agent, vm: &VmId) -> Option<Kept> {
    serde_json::from_slice(&std::fs::read(path(agent, vm)).ok()?).ok()
}

fn write(agent: &Agent, vm: &VmId, kept: &Kept) {
    let written = serde_json::to_vec(kept).map_err(std::io::Error::from).and_then(|json| write_atomically(&path(agent, vm), 0o600, &json));
    if let Err(error) = written {
        tracing::warn!(vm = %vm, "a later deploy of it could not be taken back: {error}");
    }
}

/// The last deploy of this VM that became healthy, as its user signed it. A signed request holds for the name that it was made for, so
/// what a VM had under another name is no way back.
pub fn previous(agent: &Agent, vm: &DesiredVm) -> Option<Previous> {
    let previous = read(agent, &vm.id)?.previous;
    (Wanted::read(&previous.request)?.name() == vm.name()).then_some(previous)
}

/// Remembers that the VM became healthy by `request`, and what it was before.
pub fn keep(agent: &Agent, vm: &VmId, request: &SignedRequest, boot: Digest) {
    if Wanted::read(request).is_some_and(|wanted| !wanted.request.has_guest()) {
        // Nothing can be deployed over it.
        return;
    }
    let previous = Previous { request: request.clone(), boot, changes: Vec::new() };
    let image = Wanted::read(request).and_then(|wanted| reference(agent, wanted.request.image()?));
    let now = Timestamp::now();
    let kept = match read(agent, vm) {
        Some(kept) => kept.followed_by(previous, image, now),
        None => Kept { previous, image, at: Some(now), earlier: Vec::new() },
    };
    write(agent, vm, &kept);
}

/// Remembers what was set after the last deploy, so that it is not lost when a later deploy is taken back.
pub fn keep_change(agent: &Agent, vm: &VmId, change: &SignedRequest) {
    let Some(desired) = agent.desired(vm) else { return };
    if let Some(mut kept) = read(agent, vm) {
        kept.previous.boot = desired.boot_digest();
        kept.previous.changes.push(change.clone());
        write(agent, vm, &kept);
    }
}

fn reference(agent: &Agent, image: &Digest) -> Option<ImageReference> {
    let entry = agent.store.by_digest(image).ok()?;
    Some(ImageReference { name: entry.name, version: Some(entry.version) })
}

/// What the VM can go back to, the latest first: what became healthy and is not what it should be now.
pub fn versions(agent: &Agent, vm: &DesiredVm) -> Vec<VmVersion> {
    let all = read(agent, &vm.id).map(|kept| kept.all(vm.name())).unwrap_or_default();
    let version = |one: Earlier| {
        let there = one.request.image().and_then(|image| reference(agent, image));
        VmVersion {
            is_there: there.is_some() && agent.store.kernel(&one.request.kernel).is_ok(),
            image: there.or(one.image),
            deployed_at: one.at,
            request: one.request,
        }
    };
    without(all, &vm.request).into_iter().map(version).collect()
}

/// The images that VMs of this host can go back to, with the names of those VMs.
pub fn images(agent: &Agent) -> BTreeMap<Digest, Vec<Name>> {
    let mut images: BTreeMap<Digest, Vec<Name>> = BTreeMap::new();
    for vm in desired::vms(&agent.view()).into_values().filter(|vm| vm.host == agent.host_id()) {
        let all = read(agent, &vm.id).map(|kept| kept.all(vm.name())).unwrap_or_default();
        for image in
            without(all, &vm.request).iter().filter_map(|one| one.request.image()).filter(|image| Some(*image) != vm.request.image())
        {
            let names = images.entry(*image).or_default();
            if !names.contains(vm.name()) {
                names.push(vm.name().clone());
            }
        }
    }
    images
}

/// The kernels that this VM can go back to, each with the image that it is for; none of the version that a deploy which fails goes back to,
/// whatever has become of its image.
pub fn kernels(agent: &Agent, vm: &DesiredVm) -> Vec<(Digest, Option<ImageReference>)> {
    let Some(kept) = read(agent, &vm.id) else { return Vec::new() };
    let last = kept.previous.request().map(|request| (request.kernel, None));
    let earlier = kept.all(vm.name()).into_iter().filter_map(|one| {
        let image = reference(agent, one.request.image()?)?;
        Some((one.request.kernel, Some(image)))
    });
    last.into_iter().chain(earlier).collect()
}

#[cfg(test)]
mod tests {
    use form_api::deploy::{Boot, RollbackRequest};
    use serde_json::json;

    use super::*;
    use crate::testing::request;

    fn signed(body: &impl Serialize) -> SignedRequest {
        SignedRequest { header: "signature".to_owned(), body: serde_json::to_string(body).unwrap() }
    }

    fn version(number: u32) -> DeployRequest {
        DeployRequest { boot: Boot::Image(Digest::of(&number.to_le_bytes())), ..request("web") }
    }

    fn previous(request: &DeployRequest) -> Previous {
        Previous { request: signed(request), boot: Digest::of(b"boot"), changes: Vec::new() }
    }

    fn first(request: &DeployRequest) -> Kept {
        Kept { previous: previous(request), image: None, at: None, earlier: Vec::new() }
    }

    fn names(all: &[Earlier]) -> Vec<Digest> {
        all.iter().filter_map(|one| one.request.image().copied()).collect()
    }

    fn offered(kept: &Kept, present: &DeployRequest) -> Vec<Digest> {
        names(&without(kept.all(&present.spec.name), present))
    }

    fn images(numbers: &[u32]) -> Vec<Digest> {
        numbers.iter().filter_map(|number| version(*number).image().copied()).collect()
    }

    #[test]
    fn the_latest_come_first_and_the_oldest_go() {
        let mut kept = first(&version(1));
        assert_eq!(offered(&kept, &version(1)), []);
        for number in 2..=9 {
            kept = kept.followed_by(previous(&version(number)), None, Timestamp::UNIX_EPOCH);
        }
        assert_eq!(offered(&kept, &version(9)), images(&[8, 7, 6, 5, 4]));
        // A version that was asked for and did not become healthy is not among them, and the last healthy one is.
        assert_eq!(offered(&kept, &version(10)), images(&[9, 8, 7, 6, 5, 4]));
        // Gone back to: it is the present one, once.
        kept = kept.followed_by(previous(&version(6)), None, Timestamp::UNIX_EPOCH);
        assert_eq!(offered(&kept, &version(6)), images(&[9, 8, 7, 5, 4]));
        // The same deployed again pushes nothing out.
        kept = kept.followed_by(previous(&version(6)), None, Timestamp::UNIX_EPOCH);
        assert_eq!(offered(&kept, &version(6)), images(&[9, 8, 7, 5, 4]));
    }

    #[test]
    fn what_was_set_belongs_to_the_version_and_another_name_is_no_hindrance() {
        let mut kept = first(&version(1));
        let set = SetRequest { memory_mib: Some(1024), ..SetRequest::default() };
        kept.previous.changes.push(signed(&set));
        kept.previous.changes.push(signed(&json!({"unknown": 1})));
        kept = kept.followed_by(previous(&version(2)), None, Timestamp::UNIX_EPOCH);
        let app: Name = "app".parse().unwrap();
        let all = kept.all(&app);
        assert_eq!((all[1].request.spec.resources.memory_mib, &all[1].request.spec.name), (1024, &app));
        assert_eq!(all[1].request.image(), version(1).image());
    }

    #[test]
    fn a_rollback_is_itself_something_to_go_back_from() {
        let rollback = Previous { request: signed(&RollbackRequest { to: version(1) }), ..previous(&version(1)) };
        let kept = first(&version(1)).followed_by(previous(&version(2)), None, Timestamp::UNIX_EPOCH);
        let kept = kept.followed_by(rollback, None, Timestamp::UNIX_EPOCH);
        assert_eq!(offered(&kept, &version(1)), images(&[2]));
    }

    #[test]
    fn files_of_other_versions_are_understood() {
        // As it was written before there was a rollback.
        let old = json!({"request": {"header": "h", "body": serde_json::to_string(&version(3)).unwrap()}, "boot": Digest::of(b"boot")});
        let kept: Kept = serde_json::from_value(old).unwrap();
        assert_eq!(names(&kept.all(&"web".parse().unwrap())), images(&[3]));
        let mut newer = serde_json::to_value(kept.followed_by(previous(&version(4)), None, Timestamp::UNIX_EPOCH)).unwrap();
        newer["earlier"].as_array_mut().unwrap().insert(0, json!({"request": {"shape": "of the future"}}));
        newer["later"] = json!(1);
        let kept: Kept = serde_json::from_value(newer.clone()).unwrap();
        assert_eq!(names(&kept.all(&"web".parse().unwrap())), images(&[4, 3]));
        // And an agent of before reads what this one writes.
        assert!(serde_json::from_value::<Previous>(newer).is_ok());
    }
}
