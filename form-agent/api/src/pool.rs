//! Changes of pools: the places that volumes live in ([`crate::volume::Pool`]).

use std::{collections::BTreeMap, path::PathBuf};

use form_types::Name;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `POST /v1/pools`: a directory of the host becomes a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolCreateRequest {
    pub name: Name,
    /// Absolute, a directory that is there and can be written to, and neither in another pool nor around one.
    #[schema(value_type = String)]
    pub path: PathBuf,
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
