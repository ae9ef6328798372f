use axum::{
    Json,
    extract::{Path, Request, State},
    http::StatusCode,
};
use form_api::{
    ApiError, ErrorCode,
    event::EventKind,
    image::{BlockFrame, BlocksReply, Image, ImportRequest, Kernel, ManifestReply, MissingReply, MissingRequest},
    operation::{Operation, OperationKind},
    server::read_json,
};
use form_store::{ImageEntry, StoreError};
use form_types::{Digest, ImageReference, Name};
use futures_util::StreamExt;

use super::{Shared, StreamBody, accepted, authorise_peer, blocking, changing, parsed, reading};
use crate::{
    agent::Agent,
    desired,
    operation::{Begun, Opening},
};

/// Blocks handed to the store at a time.
const BATCH: usize = 32;

/// The store's errors in the words of the API.
pub(crate) fn store_error(error: &StoreError) -> ApiError {
    let code = match error {
        StoreError::NoRoom { .. } => ErrorCode::NoRoom,
        StoreError::NoImage(_) | StoreError::NoImageDigest(_) | StoreError::NoKernel(_) | StoreError::NoDisk(_) => ErrorCode::NotFound,
        StoreError::NoPool(_) | StoreError::NoVolume(_) => ErrorCode::NotFound,
        StoreError::Manifest(_) | StoreError::Kernel(_) | StoreError::Block(_) | StoreError::DiskTooSmall { .. } => ErrorCode::Invalid,
        StoreError::VolumeSize(_) | StoreError::VolumeShrinks { .. } => ErrorCode::Invalid,
        StoreError::MissingBlocks(_) | StoreError::ImageInUse { .. } | StoreError::DiskExists(_) => ErrorCode::Conflict,
        StoreError::VolumeExists(_) | StoreError::VolumeInUse { .. } => ErrorCode::Conflict,
        StoreError::VolumeGone { .. } => ErrorCode::Failed,
        StoreError::ManifestStream(_) => ErrorCode::Invalid,
        StoreError::NoManifest(_) => ErrorCode::Conflict,
        StoreError::Io { .. } | StoreError::Locked(_) | StoreError::Initramfs(_) | StoreError::Damaged { .. } => ErrorCode::Internal,
    };
    ApiError::new(code, error.to_string())
}

fn users(agent: &Agent, digest: &Digest) -> Vec<Name> {
    desired::vms(&agent.view()).into_values().filter(|vm| vm.request.image == *digest).map(|vm| vm.name().clone()).collect()
}

fn described(agent: &Agent, entry: &ImageEntry) -> Image {
    Image {
        name: entry.name.clone(),
        version: entry.version,
        digest: entry.digest,
        size_bytes: entry.size_bytes,
        stored_bytes: entry.stored_bytes,
        created_at: entry.created_at,
        used_by: users(agent, &entry.digest),
    }
}

pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Image>>, ApiError> {
    reading(&agent, request).await?;
    blocking(move || {
        let images = agent.store.images().map_err(|error| store_error(&error))?;
        Ok(images.iter().map(|entry| described(&agent, entry)).collect())
    })
    .await
    .map(Json)
}

fn found(agent: &Agent, reference: &ImageReference) -> Result<ImageEntry, ApiError> {
    agent.store.image(reference).map_err(|error| store_error(&error).hint("list them with `form image ls`"))
}

pub async fn show(State(agent): State<Shared>, Path(reference): Path<String>, request: Request) -> Result<Json<Image>, ApiError> {
    reading(&agent, request).await?;
    let reference = parsed(&reference)?;
    blocking(move || Ok(described(&agent, &found(&agent, &reference)?))).await.map(Json)
}

pub async fn remove(
    State(agent): State<Shared>,
    Path(reference): Path<String>,
    request: Request,
) -> Result<(StatusCode, Json<Operation>), ApiError> {
    let (caller, _) = changing(&agent, request).await?;
    let reference: ImageReference = parsed(&reference)?;
    blocking(move || {
        agent.use_headroom();
        let opening = Opening {
            kind: OperationKind::ImageRemove,
            vm: None,
            subject: format!("image/{reference}"),
            actor: caller.actor,
            actor_key: caller.key,
            idempotency_key: caller.idempotency_key,
            request: caller.request,
        };
        let entry = found(&agent, &reference);
        if let Err(error) = &entry
            && agent.operations.get(form_types::OperationId::derive(&caller.key, &caller.idempotency_key)).is_err()
        {
            return Err(error.clone());
        }
        let id = match agent.operations.begin(opening)? {
            Begun::Repeated(operation) => return Ok(*operation),
            Begun::New(id) => id,
        };
        let result = entry.and_then(|entry| remove_entry(&agent, &entry));
        agent.operations.finish(id, result);
        agent.operations.get(id)
    })
    .await
    .map(accepted)
}

fn remove_entry(agent: &Agent, entry: &ImageEntry) -> Result<(), ApiError> {
    // Held so that no deploy begins to use it meanwhile.
    let _admission = agent.admission();
    let users = users(agent, &entry.digest);
    agent.store.remove(&entry.digest, &users).map_err(|error| store_error(&error))?;
    agent.events.emit(EventKind::ImageRemoved, None, None, format!("image {}:{} removed", entry.name, entry.version));
    Ok(())
}

pub async fn missing(State(agent): State<Shared>, request: Request) -> Result<Json<MissingReply>, ApiError> {
    let (_, body) = reading(&agent, request).await?;
    let wanted: MissingRequest = read_json(&body)?;
    blocking(move || {
        let missing = agent.store.missing(&wanted.blocks).map_err(|error| store_error(&error))?;
        Ok(Json(MissingReply { missing }))
    })
    .await
}

/// Reads block frames as they come. Each block is checked against its digest and kept: an upload that breaks off resumes.
pub async fn put_blocks(State(agent): State<Shared>, request: Request) -> Result<Json<BlocksReply>, ApiError> {
    let (parts, body) = request.into_parts();
    authorise_peer(&agent, &parts)?;
    let mut frames = Frames { stream: StreamBody::into_data_stream(body), buffer: Vec::new() };
    let mut stored = 0;
    loop {
        let mut batch = Vec::new();
        while batch.len() < BATCH {
            let Some(frame) = frames.next().await? else { break };
            batch.push(frame);
        }
        if batch.is_empty() {
            return Ok(Json(BlocksReply { stored }));
        }
        stored += batch.len() as u64;
        let agent = Shared::clone(&agent);
        blocking(move || {
            batch.iter().try_for_each(|(digest, block)| agent.store.put_block(digest, block)).map_err(|error| store_error(&error))
        })
        .await?;
    }
}

struct Frames {
    stream: axum::body::BodyDataStream,
    buffer: Vec<u8>,
}

impl Frames {
    /// Reads until `count` bytes are there; fewer only at the end of the body.
    async fn fill(&mut self, count: usize) -> Result<usize, ApiError> {
        while self.buffer.len() < count {
            match self.stream.next().await {
                Some(Ok(bytes)) => self.buffer.extend_from_slice(&bytes),
                Some(Err(error)) => return Err(ApiError::new(ErrorCode::Invalid, format!("the upload broke off: {error}"))),
                None => break,
            }
        }
        Ok(self.buffer.len().min(count))
    }

    async fn next(&mut self) -> Result<Option<(Digest, Vec<u8>)>, ApiError> {
        let torn = || ApiError::new(ErrorCode::Invalid, "the upload ends in the middle of a block");
        match self.fill(BlockFrame::HEADER).await? {
            0 => return Ok(None),
            BlockFrame::HEADER => {}
            _ => return Err(torn()),
        }
        let header: [u8; BlockFrame::HEADER] = self.buffer[..BlockFrame::HEADER].try_into().map_err(|_| torn())?;
        let (digest, length) = BlockFrame::parse_header(&header);
        let length = length as usize;
        if length > BlockFrame::MAX_COMPRESSED {
            return Err(ApiError::new(ErrorCode::TooLarge, format!("a block of {length} bytes is too large")));
        }
        let whole = BlockFrame::HEADER + length;
        if self.fill(whole).await? < whole {
            return Err(torn());
        }
        let block = self.buffer[BlockFrame::HEADER..whole].to_vec();
        self.buffer.drain(..whole);
        Ok(Some((digest, block)))
    }
}

/// Reads a manifest as it comes; what it names is looked at by the import.
pub async fn put_manifest(
    State(agent): State<Shared>,
    Path(digest): Path<String>,
    request: Request,
) -> Result<Json<ManifestReply>, ApiError> {
    let (parts, body) = request.into_parts();
    authorise_peer(&agent, &parts)?;
    let digest: Digest = parsed(&digest)?;
    let mut stream = StreamBody::into_data_stream(body);
    let mut writer = blocking(move || agent.store.manifest_writer(&digest).map_err(|error| store_error(&error))).await?;
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|error| ApiError::new(ErrorCode::Invalid, format!("the upload broke off: {error}")))?;
        writer = blocking(move || {
            writer.write(&piece).map_err(|error| store_error(&error))?;
            Ok(writer)
        })
        .await?;
    }
    let bytes = blocking(move || writer.finish().map_err(|error| store_error(&error))).await?;
    Ok(Json(ManifestReply { bytes }))
}

pub async fn import(State(agent): State<Shared>, request: Request) -> Result<Json<Image>, ApiError> {
    let (caller, body) = changing(&agent, request).await?;
    let import: ImportRequest = read_json(&body)?;
    blocking(move || {
        let opening = Opening {
            kind: OperationKind::ImageImport,
            vm: None,
            subject: format!("image/{}", import.manifest.short()),
            actor: caller.actor,
            actor_key: caller.key,
            idempotency_key: caller.idempotency_key,
            request: caller.request,
        };
        let begun = agent.operations.begin(opening)?;
        let imported = agent.store.import_uploaded(&import.manifest).map_err(|error| store_error(&error));
        if let Begun::New(id) = begun {
            if let Ok(entry) = &imported {
                agent.events.emit(EventKind::ImageImported, None, Some(id), format!("image {}:{} imported", entry.name, entry.version));
            }
            agent.operations.finish(id, imported.as_ref().map(|_| ()).map_err(Clone::clone));
        }
        Ok(described(&agent, &imported?))
    })
    .await
    .map(Json)
}

pub async fn kernel(State(agent): State<Shared>, Path(digest): Path<String>, request: Request) -> Result<Json<Kernel>, ApiError> {
    reading(&agent, request).await?;
    let digest: Digest = parsed(&digest)?;
    blocking(move || {
        let kernel = agent.store.kernel(&digest).map_err(|error| store_error(&error))?;
        Ok(Json(Kernel { digest, release: kernel.release, size_bytes: kernel.size_bytes }))
    })
    .await
}

pub async fn import_kernel(State(agent): State<Shared>, request: Request) -> Result<Json<Kernel>, ApiError> {
    let (_, body) = changing(&agent, request).await?;
    let import: ImportRequest = read_json(&body)?;
    blocking(move || {
        let kernel = agent.store.import_kernel_uploaded(&import.manifest).map_err(|error| store_error(&error))?;
        Ok(Json(Kernel { digest: kernel.digest, release: kernel.release, size_bytes: kernel.size_bytes }))
    })
    .await
}
