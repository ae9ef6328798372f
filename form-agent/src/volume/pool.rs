//! Pools: made, changed and removed, and what may be promised in them. A pool is its host's own matter: what is known of it is on disk
//! there, and not in the replicated state, which names for each volume the host and the pool.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use form_api::{
    ApiError, ErrorCode,
    operation::{Operation, OperationKind},
    pool::{PoolCreateRequest, PoolSetRequest},
    volume::PoolKind,
};
use form_store::{NfsExport, Pool, PoolSettings};
use form_types::{Name, OperationId, size::Bytes};
use serde::{Deserialize, Serialize};

use super::{DesiredVolume, volumes};
use crate::{
    agent::{Agent, internal},
    authorise::Caller,
    headroom, label,
    operation::{Begun, Opening, Record},
    serve::store_error,
};

/// What is asked of a pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Change {
    Create(PoolCreateRequest),
    Set(PoolSetRequest),
    Remove,
}

impl Change {
    const fn kind(&self) -> OperationKind {
        match self {
            Self::Create(_) => OperationKind::PoolCreate,
            Self::Set(_) => OperationKind::PoolSet,
            Self::Remove => OperationKind::PoolRemove,
        }
    }
}

/// What is remembered of a change under way.
#[derive(Debug, Serialize, Deserialize)]
struct Progress {
    name: Name,
    /// Of the pool that is made or removed.
    directory: PathBuf,
    change: Change,
}

/// Does what is asked of the pool `name`, and records it. Blocks until it is done.
///
/// # Errors
/// What stands in the way before anything is changed; what fails later is the operation's error.
pub fn change(agent: &Agent, caller: &Caller, name: &Name, change: Change) -> Result<Operation, ApiError> {
    let opening = Opening {
        kind: change.kind(),
        vm: None,
        subject: format!("pool/{name}"),
        actor: caller.actor.clone(),
        actor_key: caller.key,
        idempotency_key: caller.idempotency_key,
        request: caller.request.clone(),
    };
    // A repeated request is answered whatever has become of the pool by now.
    let repeated = agent.operations.get(OperationId::derive(&caller.key, &caller.idempotency_key)).is_ok();
    if !repeated {
        check(agent, name, &change)?;
    }
    let id = match agent.operations.begin(opening)? {
        Begun::Repeated(operation) => return Ok(*operation),
        Begun::New(id) => id,
    };
    let result = remember(agent, id, name, change).and_then(|progress| perform(agent, &progress));
    agent.operations.finish(id, result);
    agent.operations.get(id)
}

fn remember(agent: &Agent, id: OperationId, name: &Name, change: Change) -> Result<Progress, ApiError> {
    let directory = match &change {
        Change::Create(request) => match place(request)? {
            // Without links, as it is on record later.
            Place::Directory(path) => path.canonicalize().unwrap_or_else(|_| path.to_owned()),
            Place::Export(_) => agent.store.mount_point(name),
        },
        Change::Set(_) | Change::Remove => agent.store.pool(name).map_err(|error| store_error(&error))?.directory().to_owned(),
    };
    let progress = Progress { name: name.clone(), directory, change };
    agent.operations.remember(id, serde_json::to_value(&progress).map_err(|error| internal(&error))?)?;
    Ok(progress)
}

/// What is to be a pool.
enum Place<'a> {
    Directory(&'a Path),
    Export(NfsExport),
}

/// # Errors
/// When what is asked for does not go together.
fn place(request: &PoolCreateRequest) -> Result<Place<'_>, ApiError> {
    let invalid = |text: &str, hint: &str| Err(ApiError::new(ErrorCode::Invalid, text).hint(hint));
    match (request.kind, &request.path, &request.source, &request.options) {
        (PoolKind::Local, Some(path), None, None) => Ok(Place::Directory(path)),
        (PoolKind::Local, ..) => invalid("a local pool is a directory", "give a path, and neither a source nor options"),
        (PoolKind::Nfs, None, Some(source), options) => {
            let export = NfsExport::new(source, options.as_deref().unwrap_or_default());
            export.map(Place::Export).map_err(|error| ApiError::new(ErrorCode::Invalid, error.to_string()))
        }
        (PoolKind::Nfs, ..) => invalid("an nfs pool is an export of a server", "give a source like storage.example:/volumes, and no path"),
    }
}

/// Directories that no pool may be in or around, besides the store.
fn own_directories(agent: &Agent) -> Vec<PathBuf> {
    let paths = agent.paths();
    let parent = |path: PathBuf| path.parent().map_or_else(|| path.clone(), ToOwned::to_owned);
    vec![paths.data(), paths.logs(), paths.vm_runtime(), parent(paths.socket()), parent(paths.config())]
}

/// Whether it can be done now.
fn check(agent: &Agent, name: &Name, change: &Change) -> Result<(), ApiError> {
    match change {
        Change::Create(request) => {
            label::check_change(&BTreeMap::new(), &request.labels)?;
            let checked = match place(request)? {
                Place::Directory(path) => agent.store.check_pool(name, path, &agent.host_id(), &own_directories(agent)).map(drop),
                Place::Export(export) => agent.store.check_nfs_pool(name, &export),
            };
            checked.map_err(|error| store_error(&error))
        }
        Change::Set(request) => {
            let before = agent.store.pool(name).map_err(|error| store_error(&error))?.settings();
            label::check_set(&request.labels)?;
            let before_labels = before.labels.clone();
            label::check_change(&before_labels, &with_set(before, request).labels)
        }
        Change::Remove => {
            let pool = agent.store.pool(name).map_err(|error| store_error(&error))?;
            if !pool.was_made() {
                return Err(store_error(&form_store::StoreError::PoolFixed(name.clone())));
            }
            is_empty(agent, name)
        }
    }
}

/// The volumes of this host that live in a pool.
pub fn volumes_in(agent: &Agent, pool: &Name) -> Vec<DesiredVolume> {
    let own = agent.host_id();
    volumes(&agent.view()).into_values().filter(|volume| volume.host == own && volume.pool == *pool).collect()
}

fn is_empty(agent: &Agent, name: &Name) -> Result<(), ApiError> {
    let names: Vec<String> = volumes_in(agent, name).into_iter().map(|volume| volume.name.to_string()).collect();
    if names.is_empty() {
        return Ok(());
    }
    let hint = format!("remove them first: `form volume rm {}`, or take them elsewhere with `form volume move`", names.join(" "));
    let text = format!("pool/{name} is in use: it has the volumes {}", names.join(", "));
    Err(ApiError::new(ErrorCode::Conflict, text).hint(hint))
}

fn perform(agent: &Agent, progress: &Progress) -> Result<(), ApiError> {
    let Progress { name, directory, change } = progress;
    let done = match change {
        Change::Create(request) => {
            let settings = PoolSettings {
                reserve_bytes: request.reserve_bytes,
                limit_bytes: request.limit_bytes.filter(|limit| *limit > 0),
                labels: request.labels.clone(),
            };
            match place(request)? {
                Place::Directory(_) => agent.store.create_pool(name, directory, &agent.host_id(), &own_directories(agent), settings),
                Place::Export(export) => agent.store.create_nfs_pool(name, export, &agent.host_id(), settings),
            }
            .map(drop)
        }
        Change::Set(request) => {
            let pool = agent.store.pool(name).map_err(|error| store_error(&error))?;
            agent.store.set_pool(name, with_set(pool.settings(), request))
        }
        Change::Remove => {
            let _turn = agent.volume_turn();
            is_empty(agent, name)?;
            agent.store.remove_pool(name)
        }
    };
    done.map_err(|error| store_error(&error))
}

fn with_set(mut settings: PoolSettings, set: &PoolSetRequest) -> PoolSettings {
    if let Some(reserve) = set.reserve_bytes {
        settings.reserve_bytes = reserve;
    }
    if let Some(limit) = set.limit_bytes {
        settings.limit_bytes = (limit > 0).then_some(limit);
    }
    label::apply(&mut settings.labels, &set.labels);
    settings
}

/// Ends what an earlier run of the agent left unfinished: a pool that is on record is made, one that is to be removed goes.
pub fn resume(agent: &Agent, record: &Record) {
    let nothing = || {
        let text = "the agent was stopped before it changed anything";
        ApiError::new(ErrorCode::Failed, text).hint("run the same command again")
    };
    let progress: Option<Progress> = record.resume.clone().and_then(|resume| serde_json::from_value(resume).ok());
    let result = progress.map_or_else(
        || Err(nothing()),
        |progress| {
            let is_known = agent.store.pool(&progress.name).is_ok();
            let unmark = || {
                let (store, name, directory) = (&agent.store, &progress.name, &progress.directory);
                let undone = if *directory == store.mount_point(name) {
                    // A marker that stays on the export keeps no pool of this host from it.
                    store.unmount(name)
                } else {
                    store.unmark(name, directory, &agent.host_id())
                };
                undone.map_err(|error| store_error(&error))
            };
            match &progress.change {
                Change::Create(_) if is_known => Ok(()),
                Change::Create(_) => unmark().and_then(|()| Err(nothing())),
                Change::Remove if !is_known => unmark(),
                Change::Set(_) | Change::Remove => perform(agent, &progress),
            }
        },
    );
    agent.operations.finish(record.operation.id, result);
}

/// Whether there is room to begin something new in a pool: volumes are sparse, what counts is that there is room to begin with.
///
/// # Errors
/// `no-room`, with the figures; that the pool is not there.
pub fn has_room(pool: &Pool) -> Result<(), ApiError> {
    let space = pool.space().map_err(|error| store_error(&error))?;
    let reserve = pool.settings().reserve_bytes;
    if space.free >= headroom::LOW.max(reserve) {
        return Ok(());
    }
    let (name, place) = (pool.name(), pool.directory().display());
    let (text, hint) = if space.free < headroom::LOW {
        (String::new(), "remove volumes that nobody needs with `form volume rm`, or add space".to_owned())
    } else {
        let hint = format!("remove volumes that nobody needs, add space, or keep less in reserve: `form pool set {name} --reserve SIZE`");
        (format!(", and {} are kept in reserve", Bytes(reserve)), hint)
    };
    let text = format!("pool/{name} is full: {} MiB are free in {place}{text}", space.free >> 20);
    Err(ApiError::new(ErrorCode::NoRoom, text).hint(hint))
}

/// Whether a pool's volumes may together promise so many bytes more.
///
/// # Errors
/// `no-room`, with the figures.
pub fn may_promise(agent: &Agent, pool: &Pool, more_bytes: u64) -> Result<(), ApiError> {
    let limit = pool.settings().limit_bytes;
    if limit.is_none() {
        return Ok(());
    }
    fits(pool.name(), promised(pool, &volumes_in(agent, pool.name())), more_bytes, limit)
}

/// What these volumes may come to take together, with their snapshots. These take what they have for good: no more, and no less once the volume
/// has been written to.
pub fn promised(pool: &Pool, volumes: &[DesiredVolume]) -> u64 {
    let of_one = |volume: &DesiredVolume| volume.size_bytes.saturating_add(pool.snapshot_bytes(&volume.id));
    volumes.iter().map(of_one).fold(0, u64::saturating_add)
}

fn fits(name: &Name, promised: u64, more_bytes: u64, limit: Option<u64>) -> Result<(), ApiError> {
    match limit {
        Some(limit) if more_bytes > 0 && promised.saturating_add(more_bytes) > limit => {
            let text = format!(
                "pool/{name} has no room for {} more: its volumes and their snapshots promise {} of the {} that they may",
                Bytes(more_bytes),
                Bytes(promised),
                Bytes(limit)
            );
            let hint = format!("remove volumes that nobody needs, or raise the limit: `form pool set {name} --limit SIZE`");
            Err(ApiError::new(ErrorCode::NoRoom, text).hint(hint))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_of_what_is_promised() {
        let name: Name = "fast".parse().unwrap();
        assert!(fits(&name, 10 << 30, 22 << 30, Some(32 << 30)).is_ok());
        assert!(fits(&name, u64::MAX, u64::MAX, None).is_ok());
        assert!(fits(&name, 40 << 30, 0, Some(32 << 30)).is_ok(), "what is there stays");
        let error = fits(&name, 10 << 30, (22 << 30) + 512, Some(32 << 30)).unwrap_err();
        assert_eq!(error.code, ErrorCode::NoRoom);
        assert!(error.message.contains("10 GiB of the 32 GiB"), "{error}");
        assert!(fits(&name, u64::MAX, 512, Some(u64::MAX - 1)).is_err());
    }

    #[test]
    fn what_is_not_named_stays_as_it_is_set() {
        let settings = PoolSettings {
            reserve_bytes: 5,
            limit_bytes: Some(7),
            labels: [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())].into(),
        };
        let set = PoolSetRequest { labels: [("a".to_owned(), None), ("c".to_owned(), Some("3".to_owned()))].into(), ..Default::default() };
        let labels = [("b".to_owned(), "2".to_owned()), ("c".to_owned(), "3".to_owned())].into();
        let changed = with_set(settings, &set);
        assert_eq!(changed, PoolSettings { reserve_bytes: 5, limit_bytes: Some(7), labels });
        let none = with_set(changed, &PoolSetRequest { limit_bytes: Some(0), reserve_bytes: Some(0), ..Default::default() });
        assert_eq!((none.reserve_bytes, none.limit_bytes), (0, None));
    }
}
