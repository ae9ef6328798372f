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
    sandbox::{Accelerator, DISK, Host, Record, State},
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
    /// The sandbox: also the name of its first host and of its context
    #[arg(long, default_value = crate::sandbox::DEFAULT_NAME)]
    name: Name,
}

/// A sandbox as it is now.
#[derive(Debug, Serialize)]
struct Report {
    name: Name,
    directory: PathBuf,
    hosts: Vec<HostReport>,
}

/// One of its hosts.
#[derive(Debug, Serialize)]
struct HostReport {
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

impl HostReport {
    fn new(host: &Host, record: &Record, answers: bool) -> Self {
        let state = State::of(&host.directory);
        let process = state.process();
        let disk = std::fs::metadata(host.directory.join(DISK)).ok();
        Self {
            name: host.name.clone(),
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
            directory: host.directory.clone(),
        }
    }

    fn runs(&self) -> bool {
        self.pid.is_some()
    }

    fn status(&self) -> &'static str {
        if self.runs() && !self.answers { "running (its agent does not answer)" } else { self.status }
    }

    fn age(&self) -> Option<String> {
        self.up_since.map(|since| age(since, Timestamp::now()))
    }

    fn record(&self) -> ui::Record {
        let used = |used: Option<u64>| used.map(|used| format!(", {} of this machine's used", bytes(used))).unwrap_or_default();
        ui::Record::new(self.name.to_string())
            .field("name", &self.name)
            .field("status", self.status())
            .field("address", &self.address)
            .optional("up", self.age())
            .field("runs on", self.accelerator.as_str())
            .field("cpus", self.cpus)
            .field("memory", format!("{}{}", bytes(self.memory_mib * MIB), used(self.resident_bytes)))
            .field("disk", format!("{}{}", bytes(self.disk_gib * GIB), used(self.disk_used_bytes)))
            .field("version", &self.version)
            .field("directory", self.directory.display())
            .optional("process", self.pid)
    }
}

impl Report {
    /// One host as a record, several as a table.
    fn show(&self, session: &Session) -> Result<(), Failure> {
        match self.hosts.as_slice() {
            [host] => session.terminal.show(self, &host.record()),
            _ if session.terminal.is_machine_readable() => session.terminal.show(self, &ui::Record::new(self.name.to_string())),
            hosts => session.terminal.list(hosts, &table(hosts)),
        }
    }
}

fn table(hosts: &[HostReport]) -> ui::Table {
    let mut table = ui::Table::new(&["NAME", "STATUS", "ADDRESS", "UP", "CPUS", "MEMORY", "DISK"], &["VERSION", "DIRECTORY", "PROCESS"]);
    for host in hosts {
        table.row([
            host.name.to_string(),
            host.status().to_owned(),
            host.address.clone(),
            host.age().unwrap_or_default(),
            host.cpus.to_string(),
            bytes(host.memory_mib * MIB),
            bytes(host.disk_gib * GIB),
            host.version.clone(),
            host.directory.display().to_string(),
            host.pid.map(|pid| pid.to_string()).unwrap_or_default(),
        ]);
    }
    table
}

fn incomplete(name: &Name) -> Failure {
    Failure::new(form_api::ErrorCode::Unavailable, format!("the sandbox `{name}` is not complete"))
        .hint("`form sandbox up` is making it, or makes it anew; `form sandbox down` removes what there is")
}
