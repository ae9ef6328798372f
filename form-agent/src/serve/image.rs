use std::collections::BTreeMap;

use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
};
use form_api::{
    ApiError, ErrorCode,
    event::EventKind,
    image::{
        BlockFrame, BlocksReply, DamagedBlock, Image, ImageConfig, ImageSetRequest, ImportRequest, Layer, ManifestReply, MissingReply,
        MissingRequest, Verification,
    },
    operation::{Operation, OperationKind},
    server::read_json,
};
use form_bundle::BLOCK_SIZE;
use form_store::{ImageEntry, ImageSettings, StoreError};
use form_types::{Digest, ImageReference, Name, OperationId};
use futures_util::StreamExt;

use super::{
    Segment, Shared, StreamBody, accepted, authorise_peer, blocking, changing,
    openapi::{Binary, ChangeHeaders, InTheWay, Missing, NoRoom, Refused, Unreadable},
    parsed, reading,
};
use crate::{
    agent::Agent,
    authorise::Caller,
    desired, heap, kept, label,
    operation::{Begun, Opening},
};

/// Blocks handed to the store at a time.
const BATCH: usize = 32;

/// The store's errors in the words of the API.
pub(crate) fn store_error(error: &StoreError) -> ApiError {
    let code = match error {
        StoreError::NoRoom { .. } => ErrorCode::NoRoom,
        StoreError::NoImage(_) | StoreError::NoImageDigest(_) | StoreError::NoKernel(_) | StoreError::NoDisk(_) => ErrorCode::NotFound,
        StoreError::NoPool(_) | StoreError::NoVolume(_) | StoreError::NoSnapshot(_) | StoreError::NoVolumeSnapshot(_) => {
            ErrorCode::NotFound
        }
        StoreError::SnapshotExists(_) | StoreError::VolumeSnapshotExists(_) | StoreError::NoSharing(_) => ErrorCode::Conflict,
        StoreError::VolumeSnapshotVersion { .. } | StoreError::VolumeSnapshotDamaged { .. } => ErrorCode::Failed,
        StoreError::SnapshotVersion { .. } | StoreError::SnapshotDamaged { .. } | StoreError::SnapshotMemory { .. } => ErrorCode::Failed,
        StoreError::NoBlock(_)
        | StoreError::Manifest(_)
        | StoreError::Kernel(_)
        | StoreError::Block(_)
        | StoreError::DiskTooSmall { .. } => ErrorCode::Invalid,
        StoreError::VolumeSize(_) | StoreError::VolumeShrinks { .. } | StoreError::VolumeTooLarge { .. } => ErrorCode::Invalid,
        StoreError::MissingBlocks(_) | StoreError::ImageInUse { .. } | StoreError::DiskExists(_) => ErrorCode::Conflict,
        StoreError::ImageKept(_) | StoreError::KernelWanted { .. } => ErrorCode::Conflict,
        StoreError::VolumeExists(_) | StoreError::VolumeInUse { .. } => ErrorCode::Conflict,
        StoreError::PoolExists { .. } | StoreError::PoolTaken { .. } | StoreError::PoolFixed(_) => ErrorCode::Conflict,
        StoreError::PoolInUse { .. } => ErrorCode::Conflict,
        StoreError::PoolPlace { .. } => ErrorCode::Invalid,
        StoreError::PoolAway { .. } | StoreError::PoolMount { .. } => ErrorCode::Failed,
        StoreError::PoolSilent { .. } => ErrorCode::TimedOut,
        StoreError::PoolExport(_) => ErrorCode::Invalid,
        StoreError::PoolOverlaps { .. } => ErrorCode::Conflict,
        StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::TimedOut => ErrorCode::TimedOut,
        StoreError::VolumeGone { .. } => ErrorCode::Failed,
        StoreError::ManifestStream(_) => ErrorCode::Invalid,
        StoreError::NoManifest(_) => ErrorCode::Conflict,
        StoreError::Io { .. } | StoreError::Locked(_) | StoreError::Initramfs(_) | StoreError::Damaged { .. } => ErrorCode::Internal,
    };
    ApiError::new(code, error.to_string())
}

/// The VMs that have this image, and those that are just being made something else and may have to go back to it.
fn users(agent: &Agent, digest: &Digest) -> Vec<Name> {
    let goes_back = |vm: &desired::DesiredVm| {
        agent.operations.is_under_way(&format!("vm/{}", vm.name()))
            && kept::previous(agent, vm).is_some_and(|previous| previous.request().is_some_and(|request| request.image() == Some(digest)))
    };
    let vms = desired::vms(&agent.view()).into_values();
    vms.filter(|vm| vm.request.image() == Some(digest) || goes_back(vm)).map(|vm| vm.name().clone()).collect()
}

/// What VMs can go back to, read once for many images.
type KeptFor = BTreeMap<Digest, Vec<Name>>;

fn described(agent: &Agent, entry: &ImageEntry, kept_for: &KeptFor) -> Image {
    Image {
        name: entry.name.clone(),
        version: entry.version,
        digest: entry.digest,
        size_bytes: entry.size_bytes,
        stored_bytes: entry.stored_bytes,
        created_at: entry.created_at,
        used_by: users(agent, &entry.digest),
        kept_for: kept_for.get(&entry.digest).cloned().unwrap_or_default(),
        labels: entry.settings.labels.clone(),
        keep: entry.settings.keep,
    }
}

/// All images, by name and then version.
#[utoipa::path(
    get,
    path = "/v1/images",
    operation_id = "list_images",
    tag = "images",
    responses((status = 200, description = "The images", body = Vec<Image>), Refused),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Image>>, ApiError> {
    reading(&agent, request).await?;
    blocking(move || {
        let images = agent.store.images().map_err(|error| store_error(&error))?;
        let kept_for = kept::images(&agent);
        Ok(images.iter().map(|entry| described(&agent, entry, &kept_for)).collect())
    })
    .await
    .map(Json)
}

pub(super) fn found(agent: &Agent, reference: &ImageReference) -> Result<ImageEntry, ApiError> {
    agent.store.image(reference).map_err(|error| store_error(&error).hint("list them with `form image ls`"))
}

/// One image.
#[utoipa::path(
    get,
    path = "/v1/images/{reference}",
    operation_id = "show_image",
    tag = "images",
    params(("reference" = ImageReference, Path, description = "The image")),
    responses((status = 200, description = "The image", body = Image), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, Segment(reference): Segment, request: Request) -> Result<Json<Image>, ApiError> {
    reading(&agent, request).await?;
    let reference = parsed(&reference)?;
    blocking(move || Ok(described(&agent, &found(&agent, &reference)?, &kept::images(&agent)))).await.map(Json)
}

/// What an image is, besides its blocks: how to run it, and what it was built from.
#[utoipa::path(
    get,
    path = "/v1/images/{reference}/config",
    operation_id = "image_config",
    tag = "images",
    params(("reference" = ImageReference, Path, description = "The image")),
    responses((status = 200, description = "The image", body = ImageConfig), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn config(State(agent): State<Shared>, Segment(reference): Segment, request: Request) -> Result<Json<ImageConfig>, ApiError> {
    reading(&agent, request).await?;
    let reference = parsed(&reference)?;
    blocking(move || {
        let entry = found(&agent, &reference)?;
        let manifest = agent.store.manifest(&entry.digest).map_err(|error| store_error(&error))?;
        let layers = manifest.history.into_iter().map(|step| Layer {
            step: step.text,
            layer: step.layer,
            changed_bytes: step.changed_blocks.saturating_mul(BLOCK_SIZE as u64),
        });
        let layers = layers.collect();
        Ok(ImageConfig {
            image: described(&agent, &entry, &kept::images(&agent)),
            spec: manifest.config,
            packages: manifest.packages,
            layers,
            kernel: manifest.kernel.map(|kernel| kernel.bundle),
        })
    })
    .await
    .map(Json)
}

/// Reads the whole image and compares every block with its digest.
///
/// It takes as long as the disk needs.
#[utoipa::path(
    get,
    path = "/v1/images/{reference}/verify",
    operation_id = "verify_image",
    tag = "images",
    params(("reference" = ImageReference, Path, description = "The image")),
    responses((status = 200, description = "What was found", body = Verification), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn verify(State(agent): State<Shared>, Segment(reference): Segment, request: Request) -> Result<Json<Verification>, ApiError> {
    reading(&agent, request).await?;
    let reference = parsed(&reference)?;
    blocking(move || {
        let entry = found(&agent, &reference)?;
        let comparison = agent.store.verify(&entry.digest).map_err(|error| store_error(&error))?;
        let map = agent.store.manifest(&entry.digest).map_err(|error| store_error(&error))?.rootfs.blocks;
        let damaged = comparison.damaged.iter().take(Verification::MAX_LISTED).map(|index| DamagedBlock {
            index: *index,
            offset: index.saturating_mul(BLOCK_SIZE as u64),
            digest: map.get(*index).copied(),
        });
        Ok(Verification {
            name: entry.name,
            version: entry.version,
            digest: entry.digest,
            blocks: comparison.blocks,
            damaged_blocks: comparison.damaged.len() as u64,
            damaged: damaged.collect(),
        })
    })
    .await
    .map(Json)
}

/// Removes an image that no VM uses.
#[utoipa::path(
    delete,
    path = "/v1/images/{reference}",
    operation_id = "remove_image",
    tag = "images",
    params(("reference" = ImageReference, Path, description = "The image"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn remove(
    State(agent): State<Shared>,
    Segment(reference): Segment,
    request: Request,
) -> Result<(StatusCode, Json<Operation>), ApiError> {
    let (caller, _) = changing(&agent, request).await?;
    let reference: ImageReference = parsed(&reference)?;
    blocking(move || {
        agent.use_headroom();
        operate(&agent, &caller, OperationKind::ImageRemove, &reference, |entry| remove_entry(&agent, entry))
    })
    .await
    .map(accepted)
}

/// Does something with an image and records it. Blocks until it is done.
fn operate(
    agent: &Agent,
    caller: &Caller,
    kind: OperationKind,
    reference: &ImageReference,
    act: impl FnOnce(&ImageEntry) -> Result<(), ApiError>,
) -> Result<Operation, ApiError> {
    let opening = Opening {
        kind,
        vm: None,
        subject: format!("image/{reference}"),
        actor: caller.actor.clone(),
        actor_key: caller.key,
        idempotency_key: caller.idempotency_key,
        request: caller.request.clone(),
    };
    let entry = found(agent, reference);
    // A repeated request is answered whatever has become of the image by now.
    if let Err(error) = &entry
        && agent.operations.get(OperationId::derive(&caller.key, &caller.idempotency_key)).is_err()
    {
        return Err(error.clone());
    }
    let id = match agent.operations.begin(opening)? {
        Begun::Repeated(operation) => return Ok(*operation),
        Begun::New(id) => id,
    };
    agent.operations.finish(id, entry.and_then(|entry| act(&entry)));
    agent.operations.get(id)
}

/// Sets labels of an image, and whether it is to be kept.
///
/// Both are the host's own: they are no part of the image, and belong to this one version of it.
#[utoipa::path(
    patch,
    path = "/v1/images/{reference}",
    operation_id = "set_image",
    tag = "images",
    params(("reference" = ImageReference, Path, description = "The image"), ChangeHeaders),
    request_body(content = ImageSetRequest, description = "What is to be changed"),
    responses((status = 200, description = "The operation, which is final", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn set(
    State(agent): State<Shared>,
    Segment(reference): Segment,
    request: Request,
) -> Result<(StatusCode, Json<Operation>), ApiError> {
    let (caller, body) = changing(&agent, request).await?;
    let reference: ImageReference = parsed(&reference)?;
    let wanted: ImageSetRequest = read_json(&body)?;
    label::check_set(&wanted.labels)?;
    blocking(move || {
        operate(&agent, &caller, OperationKind::ImageSet, &reference, |entry| {
            let mut checked = Ok(());
            let change = |settings: &mut ImageSettings| {
                let mut labels = settings.labels.clone();
                label::apply(&mut labels, &wanted.labels);
                checked = label::check_change(&settings.labels, &labels);
                if checked.is_ok() {
                    settings.labels = labels;
                    settings.keep = wanted.keep.unwrap_or(settings.keep);
                }
            };
            agent.store.set_image(&entry.digest, change).map_err(|error| store_error(&error))?;
            checked
        })
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

/// Which of these blocks have to be uploaded.
#[utoipa::path(
    post,
    path = "/v1/images/missing",
    operation_id = "missing_blocks",
    tag = "images",
    request_body(content = MissingRequest, description = "Blocks of a manifest"),
    responses((status = 200, description = "Those that the host lacks, in the order asked", body = MissingReply), Refused, Unreadable),
    security((), ("key" = []))
)]
pub async fn missing(State(agent): State<Shared>, request: Request) -> Result<Json<MissingReply>, ApiError> {
    let (_, body) = reading(&agent, request).await?;
    let wanted: MissingRequest = read_json(&body)?;
    blocking(move || {
        let missing = agent.store.missing(&wanted.blocks).map_err(|error| store_error(&error))?;
        Ok(Json(MissingReply { missing }))
    })
    .await
}

/// Uploads blocks. What has arrived is kept for a day, so that an upload that broke off goes on.
#[utoipa::path(
    put,
    path = "/v1/blocks",
    operation_id = "put_blocks",
    tag = "images",
    request_body(content = inline(Binary), description = "Frames without padding: the digest (32 bytes), the length of what follows (u32, little-endian), the block compressed with zstd", content_type = "application/octet-stream"),
    responses((status = 200, description = "How many were stored", body = BlocksReply), Refused, Unreadable, NoRoom),
    security((), ("key" = []))
)]
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
        if batch.is_empty() && stored == 0 {
            return Err(ApiError::new(ErrorCode::Invalid, "no blocks were sent"));
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

/// Uploads the text of a manifest, whatever its length. What it names is looked at by the import.
#[utoipa::path(
    put,
    path = "/v1/manifests/{digest}",
    operation_id = "put_manifest",
    tag = "images",
    params(("digest" = Digest, Path, description = "BLAKE3 of the text")),
    request_body(content = inline(Binary), description = "The manifest's text", content_type = "application/octet-stream"),
    responses((status = 200, description = "How long it is", body = ManifestReply), Refused, Unreadable, NoRoom),
    security((), ("key" = []))
)]
pub async fn put_manifest(
    State(agent): State<Shared>,
    Segment(digest): Segment,
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

/// Makes an image of blocks that are all there.
#[utoipa::path(
    post,
    path = "/v1/images",
    operation_id = "import_image",
    tag = "images",
    params(ChangeHeaders),
    request_body(content = ImportRequest, description = "The manifest"),
    responses((status = 200, description = "The image", body = Image), Refused, Unreadable, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
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
            request: caller.request.clone(),
        };
        let begun = agent.operations.begin(opening)?;
        let imported = agent.store.import_uploaded(&import.manifest).map_err(|error| store_error(&error));
        // The upload before it and the import itself needed much.
        heap::give_back();
        if let Begun::New(id) = begun {
            if let Ok(entry) = &imported {
                agent.events.emit(EventKind::ImageImported, None, Some(id), format!("image {}:{} imported", entry.name, entry.version));
            }
            agent.operations.finish(id, imported.as_ref().map(|_| ()).map_err(Clone::clone));
        }
        Ok(described(&agent, &imported?, &kept::images(&agent)))
    })
    .await
    .map(Json)
}
