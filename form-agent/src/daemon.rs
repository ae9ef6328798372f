//! The daemon: opens everything, adopts what runs, serves until it is told to stop. VMs outlive it.

use std::{error::Error, io::IsTerminal, sync::Arc, time::Duration};

use form_api::{
    ApiError, ErrorCode,
    client::{Client, Timeouts},
    event::EventKind,
    operation::OperationKind,
    server::{self, CancellationToken, Limits, QuicConfig},
};
use form_net::{Ipv4Range, Ipv6Prefix, Mark, Network, NetworkConfig};
use form_state::Replica;
use form_store::Store;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    agent::{Agent, Parts, Programs},
    config::{Config, Paths},
    database::Records,
    deploy,
    desired::AgentRules,
    event::Events,
    identity::Identity,
    interface, lifecycle, machine,
    operation::Operations,
    serve, snapshot, telemetry,
    volume::{self, export::Exports},
};

type Failure = Box<dyn Error>;

/// Blocks of uploads that were never finished are kept so long.
const STALE_UPLOAD: Duration = Duration::from_secs(24 * 60 * 60);

/// Work that is under way when the agent is told to stop may take so long: a server of volumes may have stopped answering.
const LAST_WORK: Duration = Duration::from_secs(60);

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_keep_alive(Duration::from_secs(2)).enable_all().build()?)
}

/// # Errors
/// What keeps the agent from running.
pub fn run(paths: Paths) -> Result<(), Failure> {
    // quinn finds out by a failed send that an interface has no segmentation offload, does without, and warns of it.
    let filter = tracing_subscriber::EnvFilter::try_from_env("FORM_LOG").unwrap_or_else(|_| "info,quinn_udp=error".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr).init();
    #[cfg(debug_assertions)]
    crate::failpoint::arm()?;
    let runtime = runtime()?;
    let result = runtime.block_on(serve_until_told(paths));
    // What is still at work then is gone on with, or taken back, by the next agent.
    runtime.shutdown_timeout(LAST_WORK);
    result
}

async fn serve_until_told(paths: Paths) -> Result<(), Failure> {
    let agent = Arc::new(open(paths).await?);
    // Also where a claim was cut off, the owner is configured, or an earlier version had no owner in its state.
    agent.record_owner()?;
    agent.network.ensure_host().await?;
    agent.network.serve_dns().await?;
    agent.apply_rules().await?;
    agent.keep_headroom();
    agent.events.emit(EventKind::HostStarted, None, None, format!("form-agent {} started", env!("CARGO_PKG_VERSION")));
    // Drivers first: they adopt what runs. Then what was asked for and not finished.
    agent.fleet.reconcile(&agent);
    resume_operations(&agent)?;

    let stop = CancellationToken::new();
    let router = serve::router(Arc::clone(&agent));
    let quic = QuicConfig { bind: agent.config().listen, key: agent.key(), limits: Limits::default() };
    let quic = server::quic(&quic, router.clone(), stop.clone())?;
    let unix = server::unix(&agent.paths().socket(), router, Limits::default(), stop.clone())?;
    let telemetry =
        agent.config().opentelemetry.clone().map(|settings| tokio::spawn(telemetry::export(Arc::clone(&agent), settings, stop.clone())));
    tracing::info!(quic = ?quic.address(), socket = %agent.paths().socket().display(), host = %agent.host_id().short(), "serving");
    told_to_stop().await?;
    tracing::info!("stopping; VMs go on");
    stop.cancel();
    quic.finished().await;
    unix.finished().await;
    if let Some(telemetry) = telemetry {
        telemetry.await?;
    }
    tokio::task::spawn_blocking(move || agent.exports.end_all()).await?;
    Ok(())
}

async fn told_to_stop() -> Result<(), Failure> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Calls `act` on a thread of its own when this program is told to stop.
///
/// # Errors
/// When the signals cannot be caught.
pub fn when_told_to_stop(act: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if runtime.block_on(told_to_stop()).is_ok() {
            act();
        }
    })?;
    Ok(())
}

async fn open(paths: Paths) -> Result<Agent, Failure> {
    paths.create_all().map_err(|error| format!("cannot make the agent's directories: {error} (are you root?)"))?;
    let config = Config::load(&paths.config())?;
    let programs = Programs { vmm: config.program("form-vmm")?, guest: config.program("form-guest")? };
    let identity = Identity::open(&paths, config.owner)?;
    let cluster = identity.cluster();
    let records = Arc::new(Records::open(&paths.database())?);
    let events = Arc::new(Events::open(Arc::clone(&records))?);
    let rules = Arc::new(AgentRules { cluster, founder: identity.key().public() });
    let replica = Replica::open(&paths.database().join("state.redb"), identity.key(), cluster, rules)?;
    let store = Store::open(&paths.data())?;
    for (name, directory) in &config.pools {
        store.add_pool(name.clone(), directory.clone())?;
    }
    store.remove_stale_blocks(STALE_UPLOAD)?;
    let network = Network::new(NetworkConfig {
        mark: Mark::new(&identity.host_id().mark())?,
        root: paths.data(),
        ipv4_range: Ipv4Range::for_cluster(&cluster),
        ipv6_prefix: Ipv6Prefix::for_cluster(&cluster),
        dns_upstreams: config.dns_upstreams.clone(),
    })?;
    let name = config.name.clone().or_else(machine::host_name).unwrap_or_else(|| identity.host_id().short());
    let operations = Operations::open(records, Arc::clone(&events))?;
    // The store is open, so no other agent has a socket there.
    let exports = Exports::open(&paths.exports()).map_err(|error| format!("cannot make {}: {error}", paths.exports().display()))?;
    Ok(Agent::new(Parts { paths, config, identity, name, replica, store, network, events, operations, exports, programs }))
}

fn resume_operations(agent: &Arc<Agent>) -> Result<(), Failure> {
    for record in agent.operations.unfinished()? {
        let operation = &record.operation;
        tracing::info!(operation = %operation.id, "going on with {} {}", operation.kind.as_str(), operation.subject);
        match operation.kind {
            OperationKind::Deploy
            | OperationKind::VmRollback
            | OperationKind::VmCreate
            | OperationKind::VmClone
            | OperationKind::VmFork => deploy::resume(agent, &record),
            OperationKind::VmStart
            | OperationKind::VmStop
            | OperationKind::VmRestart
            | OperationKind::VmPause
            | OperationKind::VmResume
            | OperationKind::VmReset
            | OperationKind::VmRename
            | OperationKind::VmSet
            | OperationKind::VmRestore
            | OperationKind::VmDestroy => lifecycle::resume(agent, &record),
            OperationKind::SnapshotCreate | OperationKind::SnapshotRemove => snapshot::operate::resume(agent, &record),
            OperationKind::VolumeCreate
            | OperationKind::VolumeAttach
            | OperationKind::VolumeDetach
            | OperationKind::VolumeResize
            | OperationKind::VolumeSet
            | OperationKind::VolumeClone
            | OperationKind::VolumeMove
            | OperationKind::VolumeRestore
            | OperationKind::VolumeSync
            | OperationKind::VolumeSnapshotCreate
            | OperationKind::VolumeSnapshotRemove
            | OperationKind::VolumeImport
            | OperationKind::VolumeExport
            | OperationKind::VolumeUnexport
            | OperationKind::VolumeRemove => volume::operate::resume(agent, &record),
            OperationKind::InterfaceAttach | OperationKind::InterfaceDetach => interface::operate::resume(agent, &record),
            OperationKind::PoolCreate | OperationKind::PoolSet | OperationKind::PoolRemove => volume::pool::resume(agent, &record),
            OperationKind::ImageImport
            | OperationKind::ImageSet
            | OperationKind::ImageRemove
            | OperationKind::KernelRemove
            | OperationKind::Claim
            | OperationKind::DoctorFix
            | OperationKind::Bench => {
                let error =
                    ApiError::new(ErrorCode::Failed, "the agent was stopped in the middle of it").hint("run the same command again");
                agent.operations.finish(operation.id, Err(error));
            }
        }
    }
    Ok(())
}

/// # Errors
/// When no agent answers.
pub fn status(paths: &Paths) -> Result<(), Failure> {
    let socket = paths.socket();
    let host = runtime()?
        .block_on(async { Client::unix(&socket, Timeouts::default()).host().await })
        .map_err(|error| format!("no agent answers on {}: {error}", socket.display()))?;
    println!("host     {} ({})", host.name, host.id.short());
    println!("version  {}", host.version);
    println!("owner    {}", host.owner.map_or_else(|| "none yet".to_owned(), |owner| owner.to_string()));
    println!("vms      {} of {}", host.vms, host.max_vms);
    println!("memory   {} of {} MiB taken", host.memory_allocated_mib, host.memory_total_mib);
    Ok(())
}
