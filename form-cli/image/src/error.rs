//! Why a build failed, and what to do about it.

use std::{io, path::PathBuf};

use form_types::Digest;

use crate::{oci::OciError, store::StoreError};

#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("the build was cancelled")]
    Cancelled,
    #[error("`{tool}` is missing: install the package `{package}`")]
    MissingTool { tool: &'static str, package: &'static str },
    #[error(
        "user {user} has no range of subordinate ids in {file}: add one with `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}`"
    )]
    NoSubordinateIds { user: String, file: &'static str },
    #[error("the build sandbox cannot start: {reason}")]
    Sandbox { reason: String },
    #[error("`FROM {from}`: {reason}")]
    Base { from: String, reason: String },
    #[error("`FROM {from}`: {source}")]
    Registry { from: String, source: OciError },
    #[error("{from} cannot be taken in: {reason}")]
    Artifact { from: String, reason: String },
    #[error("no image can be made of {from}: {reason}")]
    Disk { from: String, reason: String },
    #[error("the image's own kernel cannot be used: {reason}")]
    OwnKernel { reason: String },
    #[error("{to} does not take the image")]
    Push { to: String, source: OciError },
    /// What a host said instead of a part of its image.
    #[error(transparent)]
    Host(Box<dyn std::error::Error + Send + Sync>),
    #[error("block {index} of {image} is damaged on the host: the 64 KiB at byte {} of its file system are not what they were", .index * form_bundle::BLOCK_SIZE as u64)]
    HostBlock { image: String, index: u64 },
    #[error("what the host sent is not the manifest of {image}: {reason}")]
    HostManifest { image: String, reason: String },
    #[error("{path} is there already")]
    Exists { path: PathBuf },
    #[error("interrupted: nothing was left of it")]
    Interrupted,
    #[error("line {line}: `COPY`: {reason}")]
    Copy { line: u32, reason: String },
    #[error("line {line}: `INSTALL`: {reason}")]
    Install { line: u32, reason: String },
    #[error("user `{user}`: {reason}")]
    Account { user: String, reason: String },
    /// A command of the Formfile failed. `tail` are the last lines that it wrote.
    #[error("{}`{text}` failed with exit code {exit_code}", line_prefix(*.line))]
    StepFailed { line: Option<u32>, text: String, exit_code: i32, tail: Vec<String> },
    #[error("`{program}` failed with {status}{}", tail_text(.tail))]
    Tool { program: &'static str, status: String, tail: Vec<String> },
    #[error("the file system cannot be edited: {reason}")]
    FileSystem { reason: String },
    #[error("the cache is damaged at {path}: {reason}; remove that directory and build again")]
    Cache { path: PathBuf, reason: String },
    #[error("block {0} is missing from the cache or damaged: run `form image verify --local`, or build with `--no-cache`")]
    Block(Digest),
    #[error("--locked: {}", .differences.join("; "))]
    Locked { differences: Vec<String> },
    #[error("the kernel package cannot be used: {reason}")]
    Kernel { reason: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot {action} {path}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("a record cannot be written")]
    Json(#[from] serde_json::Error),
}

fn line_prefix(line: Option<u32>) -> String {
    line.map_or_else(String::new, |line| format!("line {line}: "))
}

fn tail_text(tail: &[String]) -> String {
    tail.iter().map(|line| format!("\n  {line}")).collect()
}

/// Adds what was tried, and on which path, to an I/O error.
pub(crate) trait IoContext<T> {
    fn during(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, BuildError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn during(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, BuildError> {
        self.map_err(|source| BuildError::Io { action, path: path.into(), source })
    }
}

impl<T> IoContext<T> for Result<T, rustix::io::Errno> {
    fn during(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, BuildError> {
        self.map_err(io::Error::from).during(action, path)
    }
}
