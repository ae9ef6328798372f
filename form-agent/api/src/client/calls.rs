//! Every path of the API as a method.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use form_types::{Digest, IdempotencyKey, ImageReference, Name, OperationId};
use futures_util::Stream;
use hyper::body::Bytes;
use tokio::time::Instant;

use super::{Client, ClientError, Follower, Lines, Tunnel, call::Call};
use crate::{
    bench::{BenchRequest, BenchRow},
    copy::{CopyQuery, SIZE_HEADER},
    deploy::{CreateVmRequest, DeployRequest, Plan, RollbackRequest, VmVersion},
    event::{Event, EventsQuery},
    exec::{EXEC_HEADER, ExecRequest},
    host::{ClaimRequest, DoctorReport, Host},
    image::{
        BlockFrame, BlocksReply, Image, ImageConfig, ImageSetRequest, ImportRequest, Kernel, ManifestReply, MissingReply, MissingRequest,
        ReadBlocksRequest, Verification,
    },
    interface::{DetachInterfaceRequest, Interface},
    operation::{Operation, OperationsQuery, WaitQuery},
    pool::{PoolCreateRequest, PoolSetRequest},
    snapshot::{RestoreRequest, Snapshot, SnapshotRequest},
    stats::{HealthReport, StatsQuery, VmStats},
    vm::{ForwardQuery, LogLine, LogsQuery, RenameRequest, SetRequest, SshAccess, Vm, VmDetail},
    volume::{
        AttachRequest, CloneRequest, CreateRequest, DetachRequest, ExportRequest, ImportQuery, MoveRequest, Pool, RemoveVolumeQuery,
        ResizeRequest, SetVolumeRequest, Volume, VolumeRestoreRequest, VolumeSnapshot, VolumeSnapshotRequest,
    },
};

/// An import writes and hashes the whole image: on a host in software emulation that takes a minute, on a busy one several.
const IMPORT: Duration = Duration::from_secs(10 * 60);

/// The longest that one question for an operation's end stays open.
const LONG_POLL: Duration = Duration::from_secs(20);

/// How long an agent may be away while somebody waits for an operation: it is restarted or upgraded.
const PATIENCE: Duration = Duration::from_secs(30);

/// An upload may take as long as it moves; the answer comes after its end.
const UPLOAD_LIMIT: Duration = Duration::from_secs(6 * 3600);

/// Path and query, with everything but unreserved characters (RFC 3986, section 2.3) percent-encoded in the values.
struct Query(String);

impl Query {
    fn new(path: &str) -> Self {
        Self(path.to_owned())
    }

    fn with<V: ToString>(mut self, key: &str, value: Option<V>) -> Self {
        if let Some(value) = value {
            self.0.push(if self.0.contains('?') { '&' } else { '?' });
            self.0.push_str(key);
            self.0.push('=');
            for byte in value.to_string().bytes() {
                if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                    self.0.push(char::from(byte));
                } else {
                    self.0.push_str(&format!("%{byte:02X}"));
                }
            }
        }
        self
    }

    fn flag(self, key: &str, value: bool) -> Self {
        self.with(key, value.then_some("true"))
    }
}

pub(super) fn logs_path(name: &Name, query: &LogsQuery) -> String {
    Query::new(&format!("/v1/vms/{name}/logs"))
        .flag("follow", query.follow)
        .with("tail", query.tail)
        .with("since", query.since)
        .flag("console", query.console)
        .with("after", query.after)
        .0
}

pub(super) fn events_path(query: &EventsQuery) -> String {
    Query::new("/v1/events")
        .with("after", query.after)
        .with("tail", query.tail)
        .flag("follow", query.follow)
        .with("vm", query.vm.as_ref())
        .with("operation", query.operation)
        .0
}

/// A fresh key for a request that nobody will repeat by hand.
fn fresh_key() -> Result<IdempotencyKey, ClientError> {
    IdempotencyKey::random().map_err(|error| ClientError::local("no randomness", error.to_string()))
}

/// # Errors
/// Every method fails with a [`ClientError`]: `Api` when the agent says no, the others when it could not be asked.
impl Client {
    pub async fn host(&self) -> Result<Host, ClientError> {
        self.read(&Call::get("/v1/host")).await
    }

    /// Makes the client's key the owner of an agent that has none.
    pub async fn claim(&self, request: &ClaimRequest) -> Result<Host, ClientError> {
        self.read(&Call::post("/v1/claim").json(request)?.signed(fresh_key()?).claim()).await
    }

    pub async fn doctor(&self) -> Result<DoctorReport, ClientError> {
        self.read(&Call::get("/v1/doctor")).await
    }

    pub async fn doctor_fix(&self) -> Result<DoctorReport, ClientError> {
        self.read(&Call::post("/v1/doctor/fix").signed(fresh_key()?)).await
    }

    /// Measures the host; rows come as they are ready. Dropping the answer ends the measuring.
    pub async fn bench(&self, request: &BenchRequest) -> Result<Lines<BenchRow>, ClientError> {
        self.lines(&Call::post("/v1/bench").json(request)?.signed(fresh_key()?).once()).await
    }

    pub async fn plan(&self, request: &DeployRequest) -> Result<Plan, ClientError> {
        self.read(&Call::post("/v1/plan").json(request)?).await
    }

    /// The same `key` with the same request gives back the same operation.
    pub async fn deploy(&self, request: &DeployRequest, key: IdempotencyKey) -> Result<Operation, ClientError> {
        self.read(&Call::post("/v1/deploy").json(request)?.signed(key)).await
    }

    /// What the VM can go back to, the latest first.
    pub async fn versions(&self, vm: &Name) -> Result<Vec<VmVersion>, ClientError> {
        self.read(&Call::get(format!("/v1/vms/{vm}/versions"))).await
    }

    /// The same key again gives back the operation that the first request began.
    pub async fn rollback(&self, vm: &Name, request: &RollbackRequest, key: IdempotencyKey) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/vms/{vm}/rollback")).json(request)?.signed(key)).await
    }

    /// Makes a VM that is not there yet. The same `key` with the same request gives back the same operation.
    pub async fn create_vm(&self, request: &CreateVmRequest, key: IdempotencyKey) -> Result<Operation, ClientError> {
        self.read(&Call::post("/v1/vms").json(request)?.signed(key)).await
    }

    pub async fn vms(&self) -> Result<Vec<Vm>, ClientError> {
        self.read(&Call::get("/v1/vms")).await
    }

    pub async fn vm(&self, name: &Name) -> Result<VmDetail, ClientError> {
        self.read(&Call::get(format!("/v1/vms/{name}"))).await
    }

    /// Who can log in to a VM over SSH, and how it is known to be that VM. Waits for a server that is being started.
    pub async fn ssh_access(&self, name: &Name) -> Result<SshAccess, ClientError> {
        self.read(&Call::get(format!("/v1/vms/{name}/ssh"))).await
    }

    pub async fn start(&self, name: &Name) -> Result<Operation, ClientError> {
        self.vm_verb(name, "start").await
    }

    pub async fn stop(&self, name: &Name) -> Result<Operation, ClientError> {
        self.vm_verb(name, "stop").await
    }

    pub async fn restart(&self, name: &Name) -> Result<Operation, ClientError> {
        self.vm_verb(name, "restart").await
    }

    pub async fn pause(&self, name: &Name) -> Result<Operation, ClientError> {
        self.vm_verb(name, "pause").await
    }

    pub async fn resume(&self, name: &Name) -> Result<Operation, ClientError> {
        self.vm_verb(name, "resume").await
    }

    /// Off and on again without asking the guest.
    pub async fn reset(&self, name: &Name) -> Result<Operation, ClientError> {
        self.vm_verb(name, "reset").await
    }

    pub async fn rename(&self, name: &Name, request: &RenameRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/vms/{name}/rename")).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn set(&self, name: &Name, request: &SetRequest) -> Result<Operation, ClientError> {
        self.read(&Call::patch(format!("/v1/vms/{name}")).json(request)?.signed(fresh_key()?)).await
    }

    /// Puts a VM back to what it was when a snapshot was made.
    pub async fn restore(&self, name: &Name, request: &RestoreRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/vms/{name}/restore")).json(request)?.signed(fresh_key()?)).await
    }

    /// Those of all VMs.
    pub async fn all_snapshots(&self) -> Result<Vec<Snapshot>, ClientError> {
        self.read(&Call::get("/v1/snapshots")).await
    }

    pub async fn snapshots(&self, vm: &Name) -> Result<Vec<Snapshot>, ClientError> {
        self.read(&Call::get(format!("/v1/vms/{vm}/snapshots"))).await
    }

    pub async fn snapshot(&self, vm: &Name, name: &Name) -> Result<Snapshot, ClientError> {
        self.read(&Call::get(format!("/v1/vms/{vm}/snapshots/{name}"))).await
    }

    /// As [`Client::snapshot`], after the host has compared its memory with its checksums.
    pub async fn verified_snapshot(&self, vm: &Name, name: &Name) -> Result<Snapshot, ClientError> {
        let path = Query::new(&format!("/v1/vms/{vm}/snapshots/{name}")).with("verify", Some(true));
        self.read(&Call::get(path.0)).await
    }

    pub async fn create_snapshot(&self, vm: &Name, request: &SnapshotRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/vms/{vm}/snapshots")).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn remove_snapshot(&self, vm: &Name, name: &Name) -> Result<Operation, ClientError> {
        self.read(&Call::delete(format!("/v1/vms/{vm}/snapshots/{name}")).signed(fresh_key()?)).await
    }

    async fn vm_verb(&self, name: &Name, verb: &str) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/vms/{name}/{verb}")).signed(fresh_key()?)).await
    }

    pub async fn destroy(&self, name: &Name) -> Result<Operation, ClientError> {
        self.read(&Call::delete(format!("/v1/vms/{name}")).signed(fresh_key()?)).await
    }

    pub async fn logs(&self, name: &Name, query: &LogsQuery) -> Result<Lines<LogLine>, ClientError> {
        self.lines(&Call::get(logs_path(name, query))).await
    }

    /// As [`Client::logs`]; with `follow` it goes on past a restart of the agent, with no line lost or repeated.
    pub async fn follow_logs(&self, name: &Name, query: &LogsQuery) -> Result<Follower<LogLine>, ClientError> {
        Follower::begin(self.clone(), (name.clone(), query.clone())).await
    }

    /// Opens a tunnel of [`crate::exec::Frame`]s.
    pub async fn exec(&self, name: &Name, request: &ExecRequest) -> Result<Tunnel, ClientError> {
        let json = serde_json::to_vec(request).map_err(|error| ClientError::local("the request has no JSON form", error))?;
        let call = Call::get(format!("/v1/vms/{name}/exec")).header(EXEC_HEADER, URL_SAFE_NO_PAD.encode(json)).signed(fresh_key()?);
        self.tunnel(call, "form-exec").await
    }

    /// Opens a tunnel of [`crate::exec::Frame`]s with a tar stream in them: see [`crate::copy`]. Beside it the bytes of content that will
    /// come out.
    pub async fn copy(&self, name: &Name, query: &CopyQuery) -> Result<(Tunnel, Option<u64>), ClientError> {
        let path = Query::new(&format!("/v1/vms/{name}/copy"))
            .with("direction", Some(query.direction.as_str()))
            .with("path", Some(&query.path))
            .flag("contents", query.contents)
            .with("owner", query.owner.as_ref())
            .flag("keep_owner", query.keep_owner);
        let (tunnel, headers) = self.tunnel_with_headers(Call::get(path.0).signed(fresh_key()?), "form-copy").await?;
        let size = headers.get(SIZE_HEADER).and_then(|size| size.to_str().ok()?.parse().ok());
        Ok((tunnel, size))
    }

    /// Opens the serial console: what is written is typed, what is read was printed.
    pub async fn console(&self, name: &Name) -> Result<Tunnel, ClientError> {
        self.tunnel(Call::get(format!("/v1/vms/{name}/console")).signed(fresh_key()?), "form-console").await
    }

    /// Opens a connection to a port of the VM's loopback interface.
    pub async fn forward(&self, name: &Name, query: &ForwardQuery) -> Result<Tunnel, ClientError> {
        let path = Query::new(&format!("/v1/vms/{name}/forward")).with("port", Some(query.port));
        self.tunnel(Call::get(path.0).signed(fresh_key()?), "form-forward").await
    }

    pub async fn all_stats(&self, query: &StatsQuery) -> Result<Vec<VmStats>, ClientError> {
        let path = Query::new("/v1/stats").with("interval_ms", query.interval_ms);
        self.read(&Call::get(path.0).limit(self.stats_limit(query))).await
    }

    pub async fn stats(&self, name: &Name, query: &StatsQuery) -> Result<VmStats, ClientError> {
        let path = Query::new(&format!("/v1/vms/{name}/stats")).with("interval_ms", query.interval_ms);
        self.read(&Call::get(path.0).limit(self.stats_limit(query))).await
    }

    fn stats_limit(&self, query: &StatsQuery) -> Duration {
        self.inner.timeouts.request + Duration::from_millis(query.interval_ms.unwrap_or(0))
    }

    pub async fn health(&self) -> Result<HealthReport, ClientError> {
        self.read(&Call::get("/v1/health")).await
    }

    pub async fn interfaces(&self) -> Result<Vec<Interface>, ClientError> {
        self.read(&Call::get("/v1/interfaces")).await
    }

    pub async fn attach_interface(&self, vm: &Name) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/vms/{vm}/interfaces")).signed(fresh_key()?)).await
    }

    /// `interface`: `eth1`.
    pub async fn detach_interface(&self, vm: &Name, interface: &str, request: &DetachInterfaceRequest) -> Result<Operation, ClientError> {
        let path = format!("/v1/vms/{vm}/interfaces/{interface}/detach");
        self.read(&Call::post(path).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn volumes(&self) -> Result<Vec<Volume>, ClientError> {
        self.read(&Call::get("/v1/volumes")).await
    }

    pub async fn volume(&self, name: &Name) -> Result<Volume, ClientError> {
        self.read(&Call::get(format!("/v1/volumes/{name}"))).await
    }

    pub async fn create_volume(&self, request: &CreateRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post("/v1/volumes").json(request)?.signed(fresh_key()?)).await
    }

    pub async fn attach_volume(&self, name: &Name, request: &AttachRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/volumes/{name}/attach")).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn detach_volume(&self, name: &Name, request: &DetachRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/volumes/{name}/detach")).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn resize_volume(&self, name: &Name, request: &ResizeRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/volumes/{name}/resize")).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn set_volume(&self, name: &Name, request: &SetVolumeRequest) -> Result<Operation, ClientError> {
        self.read(&Call::patch(format!("/v1/volumes/{name}")).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn clone_volume(&self, name: &Name, request: &CloneRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/volumes/{name}/clone")).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn move_volume(&self, name: &Name, request: &MoveRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/volumes/{name}/move")).json(request)?.signed(fresh_key()?)).await
    }

    /// Serves a volume over NBD on its host; where, [`Client::volume`] says then.
    pub async fn export_volume(&self, name: &Name, request: &ExportRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/volumes/{name}/export")).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn unexport_volume(&self, name: &Name) -> Result<Operation, ClientError> {
        self.read(&Call::delete(format!("/v1/volumes/{name}/export")).signed(fresh_key()?)).await
    }

    /// Makes a volume of what is sent: see [`crate::volume`].
    pub async fn import_volume(&self, name: &Name, query: &ImportQuery) -> Result<Tunnel, ClientError> {
        let path = Query::new(&format!("/v1/volumes/{name}/import"))
            .with("size_bytes", Some(query.size_bytes))
            .with("format", Some(query.format.as_str()))
            .with("pool", query.pool.as_ref());
        self.tunnel(Call::get(path.0).signed(fresh_key()?), "form-import").await
    }

    /// Reads a volume: see [`crate::volume`].
    pub async fn volume_contents(&self, name: &Name) -> Result<Tunnel, ClientError> {
        self.tunnel(Call::get(format!("/v1/volumes/{name}/contents")).signed(fresh_key()?), "form-contents").await
    }

    pub async fn remove_volume(&self, name: &Name, how: RemoveVolumeQuery) -> Result<Operation, ClientError> {
        let path = Query::new(&format!("/v1/volumes/{name}"));
        let path = path.with("snapshots", how.snapshots.then_some(true)).with("lost", how.lost.then_some(true));
        self.read(&Call::delete(path.0).signed(fresh_key()?)).await
    }

    /// Brings a volume in line; the operation's events say what there was to mend.
    pub async fn sync_volume(&self, name: &Name) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/volumes/{name}/sync")).signed(fresh_key()?)).await
    }

    pub async fn all_volume_snapshots(&self) -> Result<Vec<VolumeSnapshot>, ClientError> {
        self.read(&Call::get("/v1/volume-snapshots")).await
    }

    pub async fn volume_snapshots(&self, volume: &Name) -> Result<Vec<VolumeSnapshot>, ClientError> {
        self.read(&Call::get(format!("/v1/volumes/{volume}/snapshots"))).await
    }

    pub async fn volume_snapshot(&self, volume: &Name, name: &Name) -> Result<VolumeSnapshot, ClientError> {
        self.read(&Call::get(format!("/v1/volumes/{volume}/snapshots/{name}"))).await
    }

    pub async fn create_volume_snapshot(&self, volume: &Name, request: &VolumeSnapshotRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/volumes/{volume}/snapshots")).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn remove_volume_snapshot(&self, volume: &Name, name: &Name) -> Result<Operation, ClientError> {
        self.read(&Call::delete(format!("/v1/volumes/{volume}/snapshots/{name}")).signed(fresh_key()?)).await
    }

    /// Puts a volume back to what it held when a snapshot was made.
    pub async fn restore_volume(&self, volume: &Name, request: &VolumeRestoreRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post(format!("/v1/volumes/{volume}/restore")).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn pools(&self) -> Result<Vec<Pool>, ClientError> {
        self.read(&Call::get("/v1/pools")).await
    }

    pub async fn pool(&self, name: &Name) -> Result<Pool, ClientError> {
        self.read(&Call::get(format!("/v1/pools/{name}"))).await
    }

    pub async fn create_pool(&self, request: &PoolCreateRequest) -> Result<Operation, ClientError> {
        self.read(&Call::post("/v1/pools").json(request)?.signed(fresh_key()?)).await
    }

    pub async fn set_pool(&self, name: &Name, request: &PoolSetRequest) -> Result<Operation, ClientError> {
        self.read(&Call::patch(format!("/v1/pools/{name}")).json(request)?.signed(fresh_key()?)).await
    }

    /// Its volumes have to be gone; its directory stays.
    pub async fn remove_pool(&self, name: &Name) -> Result<Operation, ClientError> {
        self.read(&Call::delete(format!("/v1/pools/{name}")).signed(fresh_key()?)).await
    }

    pub async fn images(&self) -> Result<Vec<Image>, ClientError> {
        self.read(&Call::get("/v1/images")).await
    }

    pub async fn image(&self, reference: &ImageReference) -> Result<Image, ClientError> {
        self.read(&Call::get(format!("/v1/images/{reference}"))).await
    }

    pub async fn image_config(&self, reference: &ImageReference) -> Result<ImageConfig, ClientError> {
        self.read(&Call::get(format!("/v1/images/{reference}/config"))).await
    }

    /// Has the host read the whole image and compare it with its digests.
    pub async fn verify_image(&self, reference: &ImageReference) -> Result<Verification, ClientError> {
        self.read(&Call::get(format!("/v1/images/{reference}/verify")).limit(IMPORT)).await
    }

    /// The text of an image's manifest; its BLAKE3 is the image's digest, which is for the caller to check. At most `most` bytes.
    pub async fn image_manifest(&self, reference: &ImageReference, most: usize) -> Result<Vec<u8>, ClientError> {
        self.bytes(&Call::get(format!("/v1/images/{reference}/manifest")), most, IMPORT).await
    }

    /// Blocks of an image, each as the digest of what the host has and its zstd frame, in the order asked. The frames are for the caller
    /// to check.
    pub async fn read_blocks(
        &self,
        reference: &ImageReference,
        request: &ReadBlocksRequest,
    ) -> Result<Vec<(Digest, Vec<u8>)>, ClientError> {
        let most = request.blocks.len() * (BlockFrame::HEADER + BlockFrame::MAX_COMPRESSED);
        let answer = self.bytes(&Call::post(format!("/v1/images/{reference}/blocks")).json(request)?, most, IMPORT).await?;
        let frames = BlockFrame::split(&answer).filter(|frames| frames.len() == request.blocks.len());
        frames.ok_or_else(|| self.protocol("what it sent is not the blocks that were asked for".to_owned()))
    }

    pub async fn set_image(&self, reference: &ImageReference, request: &ImageSetRequest) -> Result<Operation, ClientError> {
        self.read(&Call::patch(format!("/v1/images/{reference}")).json(request)?.signed(fresh_key()?)).await
    }

    pub async fn remove_image(&self, reference: &ImageReference) -> Result<Operation, ClientError> {
        self.read(&Call::delete(format!("/v1/images/{reference}")).signed(fresh_key()?)).await
    }

    pub async fn missing(&self, request: &MissingRequest) -> Result<MissingReply, ClientError> {
        self.read(&Call::post("/v1/images/missing").json(request)?).await
    }

    /// Uploads blocks: `frames` is the byte stream of [`crate::image::BlockFrame`]s, cut anywhere.
    pub async fn put_blocks<S>(&self, frames: S) -> Result<BlocksReply, ClientError>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        let response = self.send_stream(&Call::put("/v1/blocks").limit(UPLOAD_LIMIT), frames).await?;
        self.json(response).await
    }

    /// Uploads a manifest for the import that names it: `packed` is its text as one zstd stream.
    pub async fn put_manifest(&self, digest: &Digest, packed: Vec<u8>) -> Result<ManifestReply, ClientError> {
        let call = Call::put(format!("/v1/manifests/{digest}")).bytes(packed).limit(UPLOAD_LIMIT);
        self.read(&call).await
    }

    pub async fn import(&self, request: &ImportRequest) -> Result<Image, ClientError> {
        self.read(&Call::post("/v1/images").json(request)?.signed(fresh_key()?).limit(IMPORT)).await
    }

    pub async fn kernels(&self) -> Result<Vec<Kernel>, ClientError> {
        self.read(&Call::get("/v1/kernels")).await
    }

    /// Removes a kernel bundle that nothing needs.
    pub async fn remove_kernel(&self, digest: &Digest) -> Result<Operation, ClientError> {
        self.read(&Call::delete(format!("/v1/kernels/{digest}")).signed(fresh_key()?)).await
    }

    /// One that the caller is about to make use of: it is not removed for a day.
    pub async fn kernel(&self, digest: &Digest) -> Result<Kernel, ClientError> {
        self.read(&Call::get(format!("/v1/kernels/{digest}"))).await
    }

    /// Makes a kernel bundle of blocks that are all there.
    pub async fn import_kernel(&self, request: &ImportRequest) -> Result<Kernel, ClientError> {
        self.read(&Call::post("/v1/kernels").json(request)?.signed(fresh_key()?).limit(IMPORT)).await
    }

    pub async fn operations(&self, query: &OperationsQuery) -> Result<Vec<Operation>, ClientError> {
        self.read(&Call::get(Query::new("/v1/operations").with("limit", query.limit).0)).await
    }

    pub async fn operation(&self, id: &OperationId, query: &WaitQuery) -> Result<Operation, ClientError> {
        let path = Query::new(&format!("/v1/operations/{id}")).with("wait_ms", query.wait_ms);
        let limit = self.inner.timeouts.request + Duration::from_millis(query.wait_ms.unwrap_or(0));
        self.read(&Call::get(path.0).limit(limit)).await
    }

    /// Waits until the operation is final, whether it completed or failed, at most until `deadline`; outlives a restart of the agent.
    ///
    /// # Errors
    /// `TimedOut` at the deadline, and whatever the asking itself fails with.
    pub async fn wait_operation(&self, id: &OperationId, deadline: Option<Instant>) -> Result<Operation, ClientError> {
        let begun = Instant::now();
        // Since when nobody answers. Not since the last answer: a question stays open for long, and a lost connection shows late.
        let mut away_since: Option<Instant> = None;
        loop {
            let left = deadline.map_or(LONG_POLL, |deadline| deadline.saturating_duration_since(Instant::now()).min(LONG_POLL));
            let wait_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
            match self.operation(id, &WaitQuery { wait_ms: Some(wait_ms) }).await {
                Ok(operation) if operation.status.is_final() => return Ok(operation),
                Ok(_) => away_since = None,
                Err(error) if error.is_unreachable() && away_since.get_or_insert_with(Instant::now).elapsed() < PATIENCE => {
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
                Err(error) => return Err(error),
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(ClientError::TimedOut { target: format!("operation {id}"), seconds: begun.elapsed().as_secs() });
            }
        }
    }

    pub async fn events(&self, query: &EventsQuery) -> Result<Lines<Event>, ClientError> {
        self.lines(&Call::get(events_path(query))).await
    }

    /// As [`Client::events`]; with `follow` it goes on past a restart of the agent, with no event lost or repeated.
    pub async fn follow_events(&self, query: &EventsQuery) -> Result<Follower<Event>, ClientError> {
        Follower::begin(self.clone(), query.clone()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_encoded() {
        let query = Query::new("/x").with("a", Some("2026-01-01T00:00:00+01:00 &")).with("b", None::<u64>).flag("c", true).flag("d", false);
        assert_eq!(query.0, "/x?a=2026-01-01T00%3A00%3A00%2B01%3A00%20%26&c=true");
    }
}
