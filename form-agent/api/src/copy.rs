//! Copying files and directories into a VM and out of it.
//!
//! After the Upgrade `form-copy` both sides send [`crate::exec::Frame`]s with a tar stream in them. In: the client sends `Stdin` frames and
//! `StdinClosed`; out: the agent sends `Stdout` frames. The last frame is the agent's: `Exit` with code 0 when all of it arrived, else
//! `Error`.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// The answer's header that says how much will come, in bytes of content.
pub const SIZE_HEADER: &str = "form-copy-bytes";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    In,
    Out,
}

impl Direction {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct CopyQuery {
    pub direction: Direction,
    /// In the VM, absolute. In: the top of the stream becomes this path, or goes below it when it is a directory.
    pub path: String,
    /// In: everything in the stream goes below the directory `path`, under its own name.
    #[serde(default)]
    pub contents: bool,
    /// In: `USER[:GROUP]` of the VM, names or numbers; root without it.
    pub owner: Option<String>,
    /// In: owners as the stream says.
    #[serde(default)]
    pub keep_owner: bool,
}
