//! `form sandbox …`

pub mod down;
pub mod status;
pub mod up;

use std::{os::unix::fs::MetadataExt, path::PathBuf};

use clap::Subcommand;
use form_types::{
    Name,
    size::{GIB, MIB},
};
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    failure::{Failure, Outcome},
    sandbox::{Accelerator, DISK, Record, Sandbox, State},
    session::Session,
    ui::{self, age, bytes},
};

#[derive(Debug, Subcommand)]
pub enum Verb {
    Up(up::Args),
    Down(down::Args),
    Status(status::Args),
}

impl Verb {
    pub async fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Up(args) => up::run(args, session).await,
            Self::Down(args) => down::run(args, session).await,
            Self::Status(args) => status::run(args, session).await,
        }
    }
}

/// Which sandbox is meant.
#[derive(Clone, Debug, clap::Args)]
pub struct Which {
    /// The sandbox: also the name of its host and of its context
    #[arg(long, default_value = crate::sandbox::DEFAULT_NAME)]
    name: Name,
}

/// A sandbox as it is now.
#[derive(Debug, Serialize)]
struct Report {
    name: Name,
    /// `running`, `stopped` or `crashed`.
    status: &'static str,
    /// Whether its agent answers.
    answers: bool,
    address: String,
    accelerator: Accelerator,
    cpus: u32,
    memory_mib: u64,
    disk_gib: u64,
    /// Of the programs in it.
    version: String,
    pid: Option<i32>,
    up_since: Option<Timestamp>,
    /// Memory of this machine that it holds now.
    resident_bytes: Option<u64>,
    /// Room on this machine's disk that its disk takes now.
    disk_used_bytes: Option<u64>,
    directory: PathBuf,
}

impl Report {
    fn new(name: &Name, directory: PathBuf, record: &Record, answers: bool) -> Self {
        let state = State::of(&directory);
        let process = state.process();
        let disk = std::fs::metadata(directory.join(DISK)).ok();
        Self {
            name: name.clone(),
            status: state.as_str(),
            answers,
            address: record.address(),
            accelerator: record.accelerator,
            cpus: record.cpus,
            memory_mib: record.memory_mib,
            disk_gib: record.disk_gib,
            version: record.version.clone(),
            pid: process.map(|process| process.pid.as_raw_nonzero().get()),
            up_since: process.and_then(|process| Timestamp::try_from(process.since?).ok()),
            resident_bytes: process.and_then(|process| process.resident_bytes()),
            disk_used_bytes: disk.map(|metadata| metadata.blocks() * 512),
            directory,
        }
    }

    fn of(sandbox: &Sandbox, record: &Record) -> Self {
        Self::new(&sandbox.name, sandbox.directory.clone(), record, true)
    }

    fn record(&self) -> ui::Record {
        let runs = self.up_since.is_some() || self.pid.is_some();
        let status = if runs && !self.answers { "running (its agent does not answer)" } else { self.status };
        let used = |used: Option<u64>| used.map(|used| format!(", {} of this machine's used", bytes(used))).unwrap_or_default();
        ui::Record::new(self.name.to_string())
            .field("name", &self.name)
            .field("status", status)
            .field("address", &self.address)
            .optional("up", self.up_since.map(|since| age(since, Timestamp::now())))
            .field("runs on", self.accelerator.as_str())
            .field("cpus", self.cpus)
            .field("memory", format!("{}{}", bytes(self.memory_mib * MIB), used(self.resident_bytes)))
            .field("disk", format!("{}{}", bytes(self.disk_gib * GIB), used(self.disk_used_bytes)))
            .field("version", &self.version)
            .field("directory", self.directory.display())
            .optional("process", self.pid)
    }
}

fn incomplete(name: &Name) -> Failure {
    Failure::new(form_api::ErrorCode::Unavailable, format!("the sandbox `{name}` is not complete"))
        .hint("`form sandbox up` is making it, or makes it anew; `form sandbox down` removes what there is")
}
