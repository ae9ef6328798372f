//! `form host …`

pub mod add;
pub mod ls;
pub mod rm;
pub mod show;

use clap::Subcommand;
use form_api::host::Host;
use form_types::size::MIB;
use jiff::Timestamp;

use crate::{
    failure::Outcome,
    session::Session,
    ui::{Record, age, bytes},
};

#[derive(Debug, Subcommand)]
pub enum Verb {
    Add(add::Args),
    Ls(ls::Args),
    Show(show::Args),
    Rm(rm::Args),
}

impl Verb {
    pub async fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Add(args) => add::run(args, session).await,
            Self::Ls(args) => ls::run(&args, session).await,
            Self::Show(args) => show::run(&args, session).await,
            Self::Rm(args) => rm::run(&args, session),
        }
    }
}

fn record(host: &Host, address: &str) -> Record {
    let memory = format!("{} of {} given to VMs", bytes(host.memory_allocated_mib * MIB), bytes(host.memory_total_mib * MIB));
    // Clocks that differ break signatures: better seen here than there.
    let skew = Timestamp::now().as_second() - host.now.as_second();
    let skew = if skew.abs() > 5 { format!("{skew} s behind this machine's") } else { String::new() };
    Record::new(host.name.clone())
        .field("name", &host.name)
        .field("address", address)
        .field("version", &host.version)
        .field("kernel", &host.kernel)
        .field("up", age(host.started_at, host.now))
        .field("clock", skew)
        .field("vms", format!("{} of at most {}", host.vms, host.max_vms))
        .field("vcpus", format!("{} given to VMs, {} there", host.vcpus_allocated, host.vcpus_total))
        .field("memory", memory)
        .field("disk", format!("{} of {} free", bytes(host.disk_free_bytes), bytes(host.disk_total_bytes)))
        .field("owner", host.owner.map_or_else(|| "nobody yet".to_owned(), |key| key.to_string()))
        .field("public key", host.public_key)
        .wide("id", host.id)
        .wide("cluster", host.cluster)
}
