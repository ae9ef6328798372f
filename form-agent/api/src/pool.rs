//! Changes of pools: the places that volumes live in ([`crate::volume::Pool`]).

use std::{collections::BTreeMap, path::PathBuf};

use form_types::Name;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::volume::PoolKind;

/// `POST /v1/pools`: a directory of the host, or an NFS export, becomes a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolCreateRequest {
    pub name: Name,
    #[serde(default)]
    pub kind: PoolKind,
    /// Of a `local` pool: absolute, a directory that is there and can be written to, and neither in another pool nor around one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub path: Option<PathBuf>,
    /// Of an `nfs` pool: `SERVER:/PATH`, which the agent mounts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Of an `nfs` pool, with commas between them: `vers=4.0|4.1|4.2`, `timeo=` (tenths of a second, 10 to 600), `retrans=` (0 to 5), `port=`,
    /// `rsize=`, `wsize=`, `nconnect=`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<String>,
    /// With less free room than this nothing new is begun in it.
    #[serde(default)]
    pub reserve_bytes: u64,
    /// The most that its volumes may promise together.
    #[serde(default)]
    pub limit_bytes: Option<u64>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// `PATCH /v1/pools/{name}`: what is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolSetRequest {
    /// With less free room than this nothing new is begun in it.
    #[serde(default)]
    pub reserve_bytes: Option<u64>,
    /// The most that its volumes may promise together; 0 for no limit.
    #[serde(default)]
    pub limit_bytes: Option<u64>,
    /// Label to its new value; `null` removes it.
    #[serde(default)]
    pub labels: BTreeMap<String, Option<String>>,
}

impl PoolSetRequest {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
