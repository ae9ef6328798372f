//! What needs the kernel bundles of this host.

use std::collections::{BTreeMap, BTreeSet};

use form_api::ApiError;
use form_store::StoreError;
use form_types::Digest;
use serde_json::Value;

use crate::{agent::Agent, desired, kept, serve::store_error};

/// Who needs which kernel.
#[derive(Debug, Default)]
pub struct Needs {
    kernels: BTreeMap<Digest, BTreeSet<String>>,
    /// What cannot be read: it may need any of them.
    unknown: BTreeSet<String>,
}

impl Needs {
    /// Read anew. It holds as long as [`Agent::admission`] is held.
    ///
    /// # Errors
    /// When images or snapshots cannot be listed.
    pub fn of(agent: &Agent) -> Result<Self, ApiError> {
        let mut needs = Self::default();
        let view = agent.view();
        for vm in desired::vms(&view).into_values() {
            needs.add(vm.request.kernel, format!("vm/{}", vm.name()));
            for (kernel, image) in kept::kernels(agent, &vm) {
                needs.add(kernel, image.map_or_else(|| format!("vm/{}", vm.name()), |image| format!("image/{image}")));
            }
        }
        needs.of_images(agent)?;
        needs.of_snapshots(agent, &view)?;
        Ok(needs)
    }

    fn add(&mut self, kernel: Digest, who: String) {
        self.kernels.entry(kernel).or_default().insert(who);
    }

    /// As `vm/web`, in order.
    pub fn of_kernel(&self, kernel: &Digest) -> Vec<String> {
        let known = self.kernels.get(kernel).into_iter().flatten();
        known.chain(&self.unknown).collect::<BTreeSet<_>>().into_iter().cloned().collect()
    }

    fn of_images(&mut self, agent: &Agent) -> Result<(), ApiError> {
        for image in agent.store.images().map_err(|error| store_error(&error))? {
            let who = format!("image/{}:{}", image.name, image.version);
            match agent.store.manifest(&image.digest) {
                Ok(manifest) => manifest.kernel.into_iter().for_each(|kernel| self.add(kernel.bundle, who.clone())),
                // Removed while we looked.
                Err(StoreError::NoImageDigest(_)) => {}
                Err(_) => drop(self.unknown.insert(who)),
            }
        }
        Ok(())
    }

    fn of_snapshots(&mut self, agent: &Agent, view: &form_state::View) -> Result<(), ApiError> {
        for id in agent.store.vms_with_snapshots().map_err(|error| store_error(&error))? {
            let vm = desired::vm(view, &id).map_or_else(|| id.short(), |vm| vm.name().to_string());
            for name in agent.store.snapshots(&id).map_err(|error| store_error(&error))? {
                let who = format!("snapshot/{vm}/{name}");
                match agent.store.snapshot(&id, &name) {
                    Ok(snapshot) => match kernel_of(&snapshot.details) {
                        Some(kernel) => self.add(kernel, who),
                        None => drop(self.unknown.insert(who)),
                    },
                    Err(StoreError::NoSnapshot(_)) => {}
                    Err(_) => drop(self.unknown.insert(who)),
                }
            }
        }
        Ok(())
    }
}

/// Of a snapshot's record ([`crate::snapshot::Details`]), whatever else a later release has put into it.
fn kernel_of(details: &Value) -> Option<Digest> {
    details.pointer("/request/kernel")?.as_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_cannot_be_read_may_need_any_kernel() {
        let [one, other] = ["one", "other"].map(|text| Digest::of(text.as_bytes()));
        let mut needs = Needs::default();
        needs.add(one, "vm/web".to_owned());
        needs.add(one, "image/web:1".to_owned());
        assert_eq!((needs.of_kernel(&one), needs.of_kernel(&other)), (vec!["image/web:1".to_owned(), "vm/web".to_owned()], vec![]));
        needs.unknown.insert("snapshot/web/odd".to_owned());
        assert_eq!(needs.of_kernel(&one), ["image/web:1", "snapshot/web/odd", "vm/web"]);
        assert_eq!(needs.of_kernel(&other), ["snapshot/web/odd"]);
    }

    #[test]
    fn a_snapshot_of_another_release_says_its_kernel() {
        let kernel = Digest::of(b"kernel");
        let request = crate::testing::request("web");
        assert_eq!(kernel_of(&json!({"request": request, "later": true})), Some(kernel));
        assert_eq!(kernel_of(&json!({"request": {"kernel": "none"}})), None);
        assert_eq!(kernel_of(&json!({})), None);
    }
}
