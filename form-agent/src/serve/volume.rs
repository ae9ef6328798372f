use std::{io, sync::Arc, time::Duration};

use axum::{
    Json,
    body::Bytes,
    extract::{Request, State},
    http::StatusCode,
    response::Response,
};
use form_api::{
    ApiError,
    exec::Frame,
    operation::Operation,
    server::{self, read_json},
    volume::{
        AttachRequest, CloneRequest, CreateRequest, DetachRequest, ExportRequest, ImportQuery, MoveRequest, Piece, RemoveVolumeQuery,
        ResizeRequest, SetVolumeRequest, Volume,
    },
};
use form_types::Name;
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::mpsc::{self, Sender},
};

use super::{
    Segment, Shared, accepted, blocking, changing, no_body,
    openapi::{ChangeHeaders, InTheWay, Missing, NoRoom, Refused, Unreadable, UpgradeHeaders},
    parsed, query, reading,
    stream::read_frame,
};
use crate::{
    agent::{Agent, internal},
    authorise::{self, Caller},
    volume::{
        describe,
        operate::{self, Change},
        transfer::{self, Import},
        volumes,
    },
};

/// How long a transfer may stand still. Then its volume is let go.
const STANDSTILL: Duration = Duration::from_secs(120);

/// All volumes, by name.
#[utoipa::path(
    get,
    path = "/v1/volumes",
    operation_id = "list_volumes",
    tag = "volumes",
    responses((status = 200, description = "The volumes", body = Vec<Volume>), Refused),
    security((), ("key" = []))
)]
pub async fn list(State(agent): State<Shared>, request: Request) -> Result<Json<Vec<Volume>>, ApiError> {
    reading(&agent, request).await?;
    blocking(move || Ok(volumes(&agent.view()).values().map(|volume| describe::volume(&agent, volume)).collect())).await.map(Json)
}

/// One volume.
#[utoipa::path(
    get,
    path = "/v1/volumes/{name}",
    operation_id = "show_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume")),
    responses((status = 200, description = "The volume", body = Volume), Refused, Missing),
    security((), ("key" = []))
)]
pub async fn show(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Json<Volume>, ApiError> {
    reading(&agent, request).await?;
    let name = parsed(&name)?;
    blocking(move || Ok(describe::volume(&agent, &describe::volume_named(&agent, &name)?))).await.map(Json)
}

pub(super) type Accepted = Result<(StatusCode, Json<Operation>), ApiError>;

pub(super) async fn begin(agent: Arc<Agent>, caller: Caller, name: Name, change: Change) -> Accepted {
    let runtime = tokio::runtime::Handle::current();
    blocking(move || {
        // What it goes on with is a task of this runtime.
        let _entered = runtime.enter();
        operate::begin(&agent, &caller, &name, change)
    })
    .await
    .map(accepted)
}

pub(super) async fn change<T: DeserializeOwned>(agent: Shared, name: &str, request: Request, change: impl FnOnce(T) -> Change) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let body: T = read_json(&body)?;
    begin(agent, caller, parsed(name)?, change(body)).await
}

async fn bare_change(agent: Shared, name: &str, request: Request, change: Change) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    no_body(&body)?;
    begin(agent, caller, parsed(name)?, change).await
}

/// Makes an empty volume.
///
/// It takes room as it fills. A guest makes a file system on it when it first mounts it.
#[utoipa::path(
    post,
    path = "/v1/volumes",
    operation_id = "create_volume",
    tag = "volumes",
    params(ChangeHeaders),
    request_body(content = CreateRequest, description = "The new volume"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn create(State(agent): State<Shared>, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let body: CreateRequest = read_json(&body)?;
    begin(agent, caller, body.name.clone(), Change::Create(body)).await
}

/// Gives a volume to a VM.
///
/// One that runs has it when the operation is completed; any other from its next start on. One VM at a time has a volume.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/attach",
    operation_id = "attach_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    request_body(content = AttachRequest, description = "The VM, and where it mounts the volume"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn attach(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, &name, request, Change::Attach).await
}

/// Takes a volume from the VM that has it.
///
/// The guest of one that runs unmounts it before; while something there uses it, that is a conflict that names who does.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/detach",
    operation_id = "detach_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    request_body(content = Option<DetachRequest>, description = "How; without a body not by force"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn detach(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    let (caller, body) = changing(&agent, request).await?;
    let body: DetachRequest = if body.is_empty() { DetachRequest::default() } else { read_json(&body)? };
    begin(agent, caller, parsed(&name)?, Change::Detach(body)).await
}

/// Makes a volume larger. In a VM that runs with it the disk and its file system grow with it.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/resize",
    operation_id = "resize_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    request_body(content = ResizeRequest, description = "The new size"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn resize(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, &name, request, Change::Resize).await
}

/// Changes what a VM may do with a volume in a second; what is left out stays.
///
/// In a VM that runs with it that holds at once.
#[utoipa::path(
    patch,
    path = "/v1/volumes/{name}",
    operation_id = "set_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    request_body(content = SetVolumeRequest, description = "What to change"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn set(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, &name, request, Change::Set).await
}

/// Makes a new volume that holds what another holds now, or held when a snapshot of it was made.
///
/// No VM may run with the other one, unless it is a snapshot that is copied.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/clone",
    operation_id = "clone_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume to copy"), ChangeHeaders),
    request_body(content = CloneRequest, description = "The name of the new one"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn clone(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, &name, request, Change::Clone).await
}

/// Moves a volume to another pool of its host, with its snapshots. No VM may run with it, and it may not be exported.
///
/// It is copied and compared before the first one is removed: at every moment one of the two is the volume, whole.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/move",
    operation_id = "move_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    request_body(content = MoveRequest, description = "Where to"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn relocate(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, &name, request, Change::Move).await
}

/// Brings a volume in line with what should be: its files, its export, and the VM that runs with it, whose guest then writes everything out.
///
/// What there was to mend the steps of the operation say, among the events. A guest that does not answer ends it with `timed-out`, a VM that is
/// paused with `conflict`.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/sync",
    operation_id = "sync_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn sync(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    bare_change(agent, &name, request, Change::Sync).await
}

/// Serves a volume over NBD to programs of the host, on a Unix socket or on a port of the loopback interface; with TLS to one client elsewhere.
///
/// It ends with the agent, when the volume is detached or removed, or when it is asked to. As long as clients may write, nothing else has the
/// volume.
#[utoipa::path(
    post,
    path = "/v1/volumes/{name}/export",
    operation_id = "export_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    request_body(content = ExportRequest, description = "Where, and for what"),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn export(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    change(agent, &name, request, Change::Export).await
}

/// Ends the export of a volume, and hangs up on its clients.
#[utoipa::path(
    delete,
    path = "/v1/volumes/{name}/export",
    operation_id = "unexport_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn unexport(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    bare_change(agent, &name, request, Change::Unexport).await
}

/// Who asks for an Upgrade. Its signature is over the query: there is no body.
fn upgrading(agent: &Agent, request: Request) -> Result<(Request, Caller), ApiError> {
    let (parts, body) = request.into_parts();
    let caller = authorise::change(agent, &parts, &Bytes::new())?;
    Ok((Request::from_parts(parts, body), caller))
}

/// Makes a volume of what the client sends: an Upgrade to `form-import`.
///
/// The volume is there when all of it has arrived, and not before. The signature is over the query: there is no body.
#[utoipa::path(
    get,
    path = "/v1/volumes/{name}/import",
    operation_id = "import_volume",
    tag = "streams",
    params(("name" = Name, Path, description = "The new volume"), ImportQuery, UpgradeHeaders, ChangeHeaders),
    responses((status = 101, description = "Frames as of an exec. The client sends 1: an offset (u64, little-endian) and the bytes that lie there, at most 32768, in any order; what is not sent reads as zeros; and 2 at the end. The host's one frame is 7 with code 0 when the volume is there, else 8"), Refused, Missing, InTheWay, NoRoom),
    security((), ("key" = [], "signature" = []))
)]
pub async fn import(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Response, ApiError> {
    let (mut request, caller) = upgrading(&agent, request)?;
    let wanted: ImportQuery = query(request.uri())?;
    let volume = wanted.volume(parsed(&name)?);
    let (response, upgraded) = server::upgrade(&mut request, "form-import")?;
    let import = blocking(move || Import::begin(&agent, &caller, volume)).await?;
    tokio::spawn(async move {
        if let Ok(client) = upgraded.await {
            receive(client, import).await;
        }
    });
    Ok(response)
}

/// Takes what the client sends, and tells it how that went.
async fn receive(client: impl AsyncRead + AsyncWrite + Send, import: Import) {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (sender, pieces) = mpsc::channel(16);
    let mut filling = tokio::task::spawn_blocking(move || import.receive(pieces));
    let result = tokio::select! {
        result = &mut filling => result,
        () = take_pieces(&mut from_client, sender) => filling.await,
    };
    let last = match result.unwrap_or_else(|error| Err(internal(&error))) {
        Ok(()) => Frame::Exit { code: 0 },
        Err(error) => Frame::Error(error.to_string()),
    };
    let _ = tokio::time::timeout(STANDSTILL, async {
        to_client.write_all(&last.encode()).await?;
        to_client.shutdown().await?;
        // What is still on its way is taken, so that the client reads its answer and no reset.
        tokio::io::copy(&mut from_client, &mut tokio::io::sink()).await
    })
    .await;
}

/// Until the end, or until there will be none.
async fn take_pieces(from_client: &mut (impl AsyncRead + Unpin + Send), sender: Sender<Option<Piece>>) {
    while let Ok(Ok(frame)) = tokio::time::timeout(STANDSTILL, read_frame(from_client)).await {
        let piece = match frame {
            Frame::Stdin(payload) => match Piece::decode(payload) {
                Some(piece) => Some(piece),
                None => return,
            },
            Frame::StdinClosed => None,
            _ => return,
        };
        let is_end = piece.is_none();
        if sender.send(piece).await.is_err() || is_end {
            return;
        }
    }
}

/// Reads everything that a volume holds: an Upgrade to `form-contents`. No VM may run with it meanwhile, and nobody write to it.
#[utoipa::path(
    get,
    path = "/v1/volumes/{name}/contents",
    operation_id = "volume_contents",
    tag = "streams",
    params(("name" = Name, Path, description = "The volume"), UpgradeHeaders, ChangeHeaders),
    responses((status = 101, description = "Frames as of an exec. The host sends 5: an offset (u64, little-endian) and the bytes that lie there, from the first on; what is not sent reads as zeros. Its last frame is 7 with code 0 when all was sent, else 8"), Refused, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn contents(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Result<Response, ApiError> {
    let (mut request, _) = upgrading(&agent, request)?;
    let name: Name = parsed(&name)?;
    let (response, upgraded) = server::upgrade(&mut request, "form-contents")?;
    let contents = blocking(move || transfer::open(&agent, &name)).await?;
    tokio::spawn(async move {
        let Ok(mut client) = upgraded.await else { return };
        let (sender, mut pieces) = mpsc::channel::<Piece>(16);
        let reading = tokio::task::spawn_blocking(move || transfer::send(&contents, &sender));
        while let Some(piece) = pieces.recv().await {
            let frame = Frame::Stdout(Piece::encode(piece.offset, &piece.bytes));
            if !sent(&mut client, &frame).await {
                return;
            }
        }
        let last = match reading.await.map_err(io::Error::other).flatten() {
            Ok(()) => Frame::Exit { code: 0 },
            Err(error) => Frame::Error(format!("the volume cannot be read: {error}")),
        };
        let _ = sent(&mut client, &last).await;
        let _ = client.shutdown().await;
    });
    Ok(response)
}

async fn sent(client: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> bool {
    matches!(tokio::time::timeout(STANDSTILL, client.write_all(&frame.encode())).await, Ok(Ok(())))
}

/// Removes a volume that no VM has, with everything it holds. One that has snapshots is in the way of that, unless they go as well. One
/// whose pool is gone for good is forgotten with `lost`.
#[utoipa::path(
    delete,
    path = "/v1/volumes/{name}",
    operation_id = "remove_volume",
    tag = "volumes",
    params(("name" = Name, Path, description = "The volume"), RemoveVolumeQuery, ChangeHeaders),
    responses((status = 200, description = "The operation, which is final already", body = Operation), (status = 202, description = "The operation, which goes on", body = Operation), Refused, Unreadable, Missing, InTheWay),
    security((), ("key" = [], "signature" = []))
)]
pub async fn remove(State(agent): State<Shared>, Segment(name): Segment, request: Request) -> Accepted {
    let RemoveVolumeQuery { snapshots, lost } = query(request.uri())?;
    let change = match (lost, snapshots) {
        // They are lost with it.
        (true, _) => Change::Forget,
        (false, true) => Change::RemoveWithSnapshots,
        (false, false) => Change::Remove,
    };
    bare_change(agent, &name, request, change).await
}
