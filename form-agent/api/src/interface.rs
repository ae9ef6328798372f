//! Network interfaces of VMs.

use std::net::{Ipv4Addr, Ipv6Addr};

use form_types::Name;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Interface {
    /// `eth0` is the first one, which every VM keeps.
    #[schema(pattern = "^eth[0-7]$")]
    pub name: String,
    pub vm: Name,
    /// VMs of one network reach each other.
    pub network: Name,
    /// `52:0a:1b:2c:3d:4e`
    pub mac: String,
    #[schema(value_type = String, format = Ipv4, example = "10.83.7.12")]
    pub ipv4: Ipv4Addr,
    #[schema(value_type = String, format = Ipv6, example = "fd5e:1c2a:77b0::5f0c:1de2")]
    pub ipv6: Ipv6Addr,
    /// What the guest calls it; `None` as long as the guest has not said so.
    pub device: Option<String>,
    pub state: InterfaceState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum InterfaceState {
    /// Its guest has set it up.
    Attached,
    /// The VM runs, and its guest has not said that it has it.
    Waiting,
    /// The VM has it from its next start on.
    Recorded,
}

impl InterfaceState {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Waiting => "waiting",
            Self::Recorded => "recorded",
        }
    }
}

/// `POST /v1/vms/{name}/interfaces/{interface}/detach`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DetachInterfaceRequest {
    /// Take it away from what uses it, and from a guest that does not answer.
    #[serde(default)]
    pub force: bool,
}
