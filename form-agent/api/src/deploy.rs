//! Deploying: what should be, and the plan that leads there.

use std::{borrow::Cow, collections::BTreeMap};

use form_types::{Digest, ImageReference, Name, Spec};
use jiff::Timestamp;
use serde::{Deserialize, Serialize, Serializer, ser::SerializeStruct};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};

/// The VM that should run. What it boots has been uploaded before.
///
/// In JSON it has `image`, or `cmdline` in its place: a VM with a kernel of its own has no image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "WrittenRequest")]
pub struct DeployRequest {
    pub spec: Spec,
    /// User name to crypt(5) hash (sha512-crypt). The client keeps the hash it finds in [`crate::vm::VmDetail`] while the Formfile's password still
    /// verifies against it, so that an unchanged Formfile gives an unchanged request.
    pub passwd_hashes: BTreeMap<String, String>,
    pub boot: Boot,
    /// Digest of the kernel bundle.
    pub kernel: Digest,
}

/// What the kernel of a VM is there for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// An image, by the digest of its manifest: its root disk is made of it, and Formation's guest brings it up.
    Image(Digest),
    /// Whatever it does by itself: nothing of Formation's is in the VM, which has no root disk.
    Own {
        /// Of the kernel.
        cmdline: String,
    },
}

impl DeployRequest {
    /// None of a VM that runs a kernel of its own.
    pub const fn image(&self) -> Option<&Digest> {
        match &self.boot {
            Boot::Image(image) => Some(image),
            Boot::Own { .. } => None,
        }
    }

    /// Of a kernel of its own.
    pub fn cmdline(&self) -> Option<&str> {
        match &self.boot {
            Boot::Image(_) => None,
            Boot::Own { cmdline } => Some(cmdline),
        }
    }

    /// Whether Formation's guest runs in it, which reports, runs commands and takes changes.
    pub const fn has_guest(&self) -> bool {
        matches!(self.boot, Boot::Image(_))
    }
}

/// The VM that should run. What it boots has been uploaded before.
///
/// It has an image, or the command line of a kernel of its own: one of both.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = DeployRequest)]
struct WrittenRequest {
    spec: Spec,
    /// User name to crypt(5) hash (sha512-crypt). The client keeps the hash it finds while the Formfile's password still verifies against it, so
    /// that an unchanged Formfile gives an unchanged request.
    passwd_hashes: BTreeMap<String, String>,
    /// Digest of the image's manifest. Absent in a VM that runs a kernel of its own.
    #[serde(default)]
    image: Option<Digest>,
    /// Digest of the kernel bundle.
    kernel: Digest,
    /// Of a kernel of its own: nothing of Formation's is in the VM, which has no root disk. Absent when there is an image.
    #[serde(default)]
    cmdline: Option<String>,
}

impl TryFrom<WrittenRequest> for DeployRequest {
    type Error = &'static str;

    fn try_from(written: WrittenRequest) -> Result<Self, Self::Error> {
        let WrittenRequest { spec, passwd_hashes, image, kernel, cmdline } = written;
        let boot = match (image, cmdline) {
            (Some(image), None) => Boot::Image(image),
            (None, Some(cmdline)) => Boot::Own { cmdline },
            (None, None) => return Err("missing field `image`, or `cmdline` of a VM that runs a kernel of its own"),
            (Some(_), Some(_)) => return Err("`cmdline` is for a VM that runs a kernel of its own, which has no `image`"),
        };
        Ok(Self { spec, passwd_hashes, boot, kernel })
    }
}

/// As it always was for an image: digests are of this text.
impl Serialize for DeployRequest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("DeployRequest", 4)?;
        fields.serialize_field("spec", &self.spec)?;
        fields.serialize_field("passwd_hashes", &self.passwd_hashes)?;
        if let Some(image) = self.image() {
            fields.serialize_field("image", image)?;
        }
        fields.serialize_field("kernel", &self.kernel)?;
        if let Some(cmdline) = self.cmdline() {
            fields.serialize_field("cmdline", cmdline)?;
        }
        fields.end()
    }
}

impl PartialSchema for DeployRequest {
    fn schema() -> RefOr<Schema> {
        WrittenRequest::schema()
    }
}

impl ToSchema for DeployRequest {
    fn name() -> Cow<'static, str> {
        WrittenRequest::name()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        WrittenRequest::schemas(schemas);
    }
}

/// Makes a VM again what it was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RollbackRequest {
    /// The `request` of one of the [`VmVersion`]s that the host keeps of it.
    pub to: DeployRequest,
}

/// Something that a VM was before, and became healthy as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmVersion {
    /// Its image; without it the image is gone and nobody knows any more which version it was.
    pub image: Option<ImageReference>,
    /// The host still has image and kernel: the VM can go back to it.
    pub is_there: bool,
    /// When the VM became healthy as this.
    pub deployed_at: Option<Timestamp>,
    /// What was asked for, with what was set later.
    pub request: DeployRequest,
}

/// A VM that is not there yet, made without a Formfile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVmRequest {
    /// As for a deploy; that there is a VM of this name is a conflict.
    pub vm: DeployRequest,
    /// Start it; without it the VM is there and stopped.
    #[serde(default = "yes")]
    #[schema(default = true)]
    pub start: bool,
    /// Its root disk is a copy of the one that this stopped VM has. The image has to be the one that disk was made from.
    #[serde(default)]
    pub disk_of: Option<Name>,
    /// It goes on from a snapshot of another VM, with an identity of its own. Instead of `disk_of`, and always started.
    #[serde(default)]
    pub fork_of: Option<ForkOf>,
    /// Volumes of the host that nobody has, as disks that are found by their serials. Only of a VM that runs a kernel of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<GivenVolume>,
}

/// A volume that a VM has from its first start on, as a disk that nobody mounts for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GivenVolume {
    pub name: Name,
    /// The VM cannot write to it.
    #[serde(default)]
    pub read_only: bool,
}

/// A snapshot that a new VM is made from. With memory in it the new VM goes on where the other one stood; without it starts from the disk.
/// Apart from name, labels, restart policy and ports it has to be what the other one was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkOf {
    pub vm: Name,
    pub snapshot: Name,
}

const fn yes() -> bool {
    true
}

/// What a deploy would do: plain data, made by the agent, rendered by the CLI.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    pub vms: Vec<PlannedVm>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedVm {
    pub name: Name,
    pub action: PlanAction,
    pub changes: Vec<FieldChange>,
    /// The VM is stopped and started again.
    pub restarts: bool,
    /// What is gone afterwards, in words: "everything written to its root disk".
    pub loses: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PlanAction {
    Create,
    Update,
    Unchanged,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldChange {
    /// `image`, `vcpus`, `memory`, `disk`, `ports`, `entrypoint`, `env`, `users` …
    pub field: String,
    /// `None` when it was not there before.
    pub from: Option<String>,
    pub to: Option<String>,
}

impl Plan {
    pub fn is_unchanged(&self) -> bool {
        self.vms.iter().all(|vm| vm.action == PlanAction::Unchanged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = r#"{"name":"web","description":null,"from":"scratch","args":{},"steps":[],"resources":{"vcpus":1,"memory_mib":512,"disk_gib":5,"gpus":[]},"users":[],"run_as":null,"env":[],"workdir":null,"entrypoint":[],"cmd":[],"ports":[],"volumes":[],"networks":["default"],"replicas":1,"restart":{"policy":"always","max_retries":null},"healthcheck":null,"labels":{},"model":null}"#;

    fn written(rest: &str) -> String {
        format!(r#"{{"spec":{SPEC},"passwd_hashes":{{}},{rest}}}"#)
    }

    #[test]
    fn a_request_has_an_image_or_a_command_line() {
        let digest = "ab".repeat(32);
        // Digests are of this text: not a byte of it may ever change.
        let of_image = written(&format!(r#""image":"{digest}","kernel":"{digest}""#));
        let request: DeployRequest = serde_json::from_str(&of_image).unwrap();
        assert!(request.has_guest() && request.image().is_some() && request.cmdline().is_none());
        assert_eq!(serde_json::to_string(&request).unwrap(), of_image);

        let own = written(&format!(r#""kernel":"{digest}","cmdline":"console=ttyS0""#));
        let request: DeployRequest = serde_json::from_str(&own).unwrap();
        assert!(!request.has_guest() && request.image().is_none());
        assert_eq!(request.cmdline(), Some("console=ttyS0"));
        assert_eq!(serde_json::to_string(&request).unwrap(), own);

        for (wrong, says) in [
            (format!(r#""kernel":"{digest}""#), "missing field `image`"),
            (format!(r#""image":"{digest}","kernel":"{digest}","cmdline":"""#), "no `image`"),
            (format!(r#""image":"{digest}","kernel":"{digest}","initrd":"x""#), "unknown field"),
        ] {
            let error = serde_json::from_str::<DeployRequest>(&written(&wrong)).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
