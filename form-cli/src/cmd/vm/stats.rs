use std::{collections::BTreeSet, time::Duration};

use clap_complete::engine::ArgValueCompleter;
use form_api::{
    client::Client,
    stats::{DiskRates, NetworkBackend, NetworkRates, StatsQuery, VmStats},
};
use form_types::{Name, size::Bytes};

use crate::{
    args::vm_name,
    complete,
    failure::{Failure, Outcome},
    session::Session,
    signals,
    ui::{Table, bytes, span},
};

/// Show what VMs use: processor, memory, disks, network
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The VMs; all without a name
    #[arg(value_parser = vm_name, add = ArgValueCompleter::new(complete::vms))]
    names: Vec<Name>,
    /// Go on until Ctrl-C
    #[arg(short, long)]
    watch: bool,
}

/// What rates are of.
const INTERVAL_MS: u64 = 1000;

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    if !args.watch {
        let stats = ask(&client, &args.names).await?;
        session.terminal.list(&stats, &table(&stats))?;
        return Ok(0);
    }
    let mut interrupts = signals::interrupts()?;
    loop {
        tokio::select! {
            stats = ask(&client, &args.names) => {
                let stats = stats?;
                session.terminal.repaint(&stats, &table(&stats))?;
            }
            _ = interrupts.recv() => return Ok(0),
        }
    }
}

async fn ask(client: &Client, names: &[Name]) -> Result<Vec<VmStats>, Failure> {
    let query = StatsQuery { interval_ms: Some(INTERVAL_MS) };
    if let [name] = names {
        return Ok(vec![client.stats(name, &query).await?]);
    }
    let all = client.all_stats(&query).await?;
    if let Some(missing) = names.iter().find(|name| !all.iter().any(|vm| vm.name == **name)) {
        return Err(Failure::not_found(format!("there is no vm/{missing}")).hint("list them with `form ps`"));
    }
    Ok(all.into_iter().filter(|vm| names.is_empty() || names.contains(&vm.name)).collect())
}

pub fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}%"))
}

/// Bytes a second, without figures nobody reads.
pub fn rate(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{}/s", Bytes(value.round() as u64)))
}

pub fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0}"))
}

/// The sum over all disks, while each of them has rates.
pub fn disks(vm: &VmStats, value: fn(&DiskRates) -> f64) -> Option<f64> {
    if vm.disks.is_empty() { None } else { vm.disks.iter().map(|disk| disk.per_second.as_ref().map(value)).sum() }
}

pub fn networks(vm: &VmStats, value: fn(&NetworkRates) -> f64) -> Option<f64> {
    if vm.networks.is_empty() { None } else { vm.networks.iter().map(|network| network.per_second.as_ref().map(value)).sum() }
}

/// Who moves the packets of its interfaces, each once.
fn backends(vm: &VmStats) -> String {
    let names: BTreeSet<&str> = vm.networks.iter().filter_map(|network| network.backend).map(NetworkBackend::as_str).collect();
    if names.is_empty() { "-".to_owned() } else { names.into_iter().collect::<Vec<_>>().join(",") }
}

fn table(all: &[VmStats]) -> Table {
    let usual = ["NAME", "CPU", "MEMORY", "MEM%", "DISK READ", "WRITTEN", "NET IN", "OUT", "UPTIME"];
    let wide = [
        "STATE",
        "HOST MEMORY",
        "EXITS/S",
        "READS/S",
        "WRITES/S",
        "PACKETS IN/S",
        "OUT/S",
        "DISK ERRORS",
        "DROPPED",
        "NETWORK BY",
        "RESTARTS",
    ];
    let mut table = Table::new(&usual, &wide);
    for vm in all {
        let used = vm.memory_used_bytes.map_or_else(|| "-".to_owned(), bytes);
        table.row([
            vm.name.to_string(),
            percent(vm.cpu_percent),
            format!("{used} of {}", bytes(vm.memory_bytes)),
            percent(vm.memory_percent),
            rate(disks(vm, |rates| rates.read_bytes)),
            rate(disks(vm, |rates| rates.written_bytes)),
            rate(networks(vm, |rates| rates.received_bytes)),
            rate(networks(vm, |rates| rates.sent_bytes)),
            if vm.uptime_ms == 0 { vm.state.as_str().to_owned() } else { span(Duration::from_millis(vm.uptime_ms)) },
            vm.state.as_str().to_owned(),
            bytes(vm.resident_bytes),
            number(vm.exits_per_second),
            number(disks(vm, |rates| rates.reads)),
            number(disks(vm, |rates| rates.writes)),
            number(networks(vm, |rates| rates.received_packets)),
            number(networks(vm, |rates| rates.sent_packets)),
            vm.disks.iter().map(|disk| disk.errors).sum::<u64>().to_string(),
            vm.networks.iter().map(|network| network.dropped_packets).sum::<u64>().to_string(),
            backends(vm),
            vm.restarts.to_string(),
        ]);
    }
    table
}
