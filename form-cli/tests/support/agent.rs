//! An agent that answers with what a test gives it, on a real Unix socket.

#[path = "copying.rs"]
mod copying;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use axum::{
    Router,
    body::Body,
    extract::{Path, Query, Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use form_api::{
    ApiError, ErrorCode,
    exec::{EXEC_HEADER, ExecRequest, Frame, HEADER},
    server::{self, CancellationToken, Limits},
    vm::LogsQuery,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A running agent; it ends when it is dropped.
pub struct Agent {
    pub socket: PathBuf,
    shutdown: CancellationToken,
    _directory: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Agent {
    pub fn start(vms: Vec<Value>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let shutdown = CancellationToken::new();
        let _entered = runtime.enter();
        server::unix(&socket, router(Arc::new(vms)), Limits::default(), shutdown.clone()).unwrap();
        drop(_entered);
        Self { socket, shutdown, _directory: directory, _runtime: runtime }
    }

    pub fn host(&self) -> String {
        format!("unix:{}", self.socket.display())
    }
}

pub const ID: &str = "00112233445566778899aabbccddeeff";
pub const OTHER_ID: &str = "ffeeddccbbaa99887766554433221100";

pub fn vm(name: &str, state: &str) -> Value {
    let digest = "ab".repeat(32);
    json!({
        "id": ID, "name": name, "host": ID, "host_name": "den", "image": format!("{name}:1"), "image_digest": digest, "state": state,
        "ready": state == "running", "health": "none", "ipv4": "10.0.0.7", "ipv6": null, "dns_name": format!("{name}.default.form.internal"),
        "ports": [{"port": 80, "protocol": "tcp", "host_port": 8080}], "vcpus": 1, "memory_mib": 512, "disk_gib": 5, "labels": {},
        "created_at": "2026-01-01T00:00:00Z", "started_at": null, "restarts": 0, "fault": if state == "failed" { json!("it broke") } else { json!(null) }
    })
}

fn volume(name: &str, vm: Option<&str>) -> Value {
    let attachment = vm.map(|vm| {
        json!({"vm": vm, "path": "/var/data", "read_only": false, "by_formfile": true, "state": "attached", "device": "/dev/vdb",
            "device_size_bytes": 10_u64 << 30, "synced_at": "2026-01-02T00:00:00Z"})
    });
    json!({
        "id": ID, "name": name, "host": ID, "host_name": "den", "pool": "local", "format": "raw", "size_bytes": 10_u64 << 30,
        "allocated_bytes": 1 << 20, "serial": "vol-0011223344556677", "limits": {"iops": null, "bytes_per_second": 52_428_800}, "attachment": attachment, "created_at": "2026-01-01T00:00:00Z",
        "fault": null
    })
}

fn snapshot(name: &str) -> Value {
    json!({
        "name": name, "vm": "web", "vm_id": ID, "host": ID, "host_name": "den", "created_at": "2026-01-01T00:00:00Z", "consistency": "quiesced",
        "memory_mib": 512, "vcpus": 1, "disk_bytes": 5_u64 << 30, "allocated_bytes": 1 << 20, "memory_kind": "incremental", "based_on": "earlier",
        "written_bytes": 3 << 20, "compressed": name != "full-disk", "unfolded_bytes": if name == "full-disk" { json!(null) } else { json!(93 << 20) },
        "volumes": ["data"], "pause_ms": 300, "image_digest": "ab".repeat(32),
        "fault": null
    })
}

async fn snapshots(State(vms): Vms, Path(name): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    find(&vms, &name)?;
    Ok(axum::Json(json!([snapshot("before")])))
}

async fn show_snapshot(State(vms): Vms, Path((vm, name)): Path<(String, String)>) -> Result<axum::Json<Value>, ApiError> {
    find(&vms, &vm)?;
    Ok(axum::Json(snapshot(&name)))
}

async fn create_snapshot(
    State(vms): Vms,
    Path(vm): Path<String>,
    axum::Json(body): axum::Json<Value>,
) -> Result<axum::Json<Value>, ApiError> {
    find(&vms, &vm)?;
    let mut made = operation("snapshot-create", &format!("vm/{vm}"), "completed");
    if body == json!({"name": "full-disk", "compress": true}) {
        made["steps"] = json!(["compressing memory", "its memory is kept uncompressed: there is no room left"]);
    }
    Ok(axum::Json(made))
}

async fn remove_snapshot(Path((vm, _)): Path<(String, String)>) -> axum::Json<Value> {
    axum::Json(operation("snapshot-remove", &format!("vm/{vm}"), "completed"))
}

async fn restore(State(vms): Vms, Path(vm): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    find(&vms, &vm)?;
    Ok(axum::Json(operation("vm-restore", &format!("vm/{vm}"), "completed")))
}

fn pool() -> Value {
    json!({
        "name": "local", "kind": "local", "host": ID, "host_name": "den", "path": "/var/lib/formation/volumes",
        "total_bytes": 100_u64 << 30, "free_bytes": 60_u64 << 30, "provisioned_bytes": 20_u64 << 30, "allocated_bytes": 2 << 20, "volumes": 2,
        "reserve_bytes": 10_u64 << 30, "limit_bytes": null, "labels": {"disk": "nvme"}, "removable": false,
        "fault": null
    })
}

async fn show_volume(Path(name): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    match name.as_str() {
        "data" => Ok(axum::Json(volume("data", Some("web")))),
        "spare" => Ok(axum::Json(volume("spare", None))),
        _ => Err(ApiError::new(ErrorCode::NotFound, format!("there is no volume/{name}")).hint("list them with `form volume ls`")),
    }
}

fn volume_snapshot(volume: &str, name: &str) -> Value {
    json!({
        "name": name, "volume": volume, "volume_id": ID, "host": ID, "host_name": "den", "pool": "local", "format": "raw",
        "created_at": "2026-01-01T00:00:00Z", "consistency": "quiesced", "size_bytes": 5_u64 << 30, "allocated_bytes": 2_u64 << 20,
        "pause_ms": 12, "fault": null
    })
}

async fn volume_snapshots(Path(volume): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    let _ = show_volume(Path(volume.clone())).await?;
    Ok(axum::Json(json!([volume_snapshot(&volume, "before")])))
}

async fn create_volume_snapshot(Path(volume): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    let _ = show_volume(Path(volume.clone())).await?;
    if volume == "data" {
        let text = "vm/web runs with volume/data, and would stand still until all of it is copied";
        return Err(ApiError::new(ErrorCode::Conflict, text).hint("`form vm stop web` first"));
    }
    Ok(axum::Json(operation("volume-snapshot-create", &format!("volume/{volume}"), "completed")))
}

async fn show_volume_snapshot(Path((volume, name)): Path<(String, String)>) -> Result<axum::Json<Value>, ApiError> {
    let _ = show_volume(Path(volume.clone())).await?;
    if name == "missing" {
        let error = ApiError::new(ErrorCode::NotFound, "there is no snapshot `missing` of this volume")
            .hint(format!("list them with `form volume snapshot ls {volume}`"));
        return Err(error);
    }
    Ok(axum::Json(volume_snapshot(&volume, &name)))
}

async fn remove_volume_snapshot(Path((volume, _)): Path<(String, String)>) -> axum::Json<Value> {
    axum::Json(operation("volume-snapshot-remove", &format!("volume/{volume}"), "completed"))
}

/// The size of the snapshot is part of what is signed.
async fn restore_volume(Path(volume): Path<String>, axum::Json(body): axum::Json<Value>) -> Result<axum::Json<Value>, ApiError> {
    let _ = show_volume(Path(volume.clone())).await?;
    if body != json!({"snapshot": "before", "size_bytes": 5_u64 << 30}) {
        return Err(ApiError::new(ErrorCode::Invalid, format!("not what was asked for: {body}")));
    }
    Ok(axum::Json(operation("volume-restore", &format!("volume/{volume}"), "completed")))
}

async fn sync_volume(Path(volume): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    let _ = show_volume(Path(volume.clone())).await?;
    if volume == "data" {
        return Err(ApiError::new(ErrorCode::TimedOut, "the guest of vm/web, which has volume/data, does not answer")
            .hint("see `form vm show web`"));
    }
    Ok(axum::Json(operation("volume-sync", &format!("volume/{volume}"), "completed")))
}

async fn clone_volume(Path(volume): Path<String>, axum::Json(body): axum::Json<Value>) -> Result<axum::Json<Value>, ApiError> {
    let _ = show_volume(Path(volume)).await?;
    if body != json!({"name": "copy", "snapshot": "before", "size_bytes": 5_u64 << 30}) && body != json!({"name": "copy"}) {
        return Err(ApiError::new(ErrorCode::Invalid, format!("not what was asked for: {body}")));
    }
    Ok(axum::Json(operation("volume-clone", "volume/copy", "completed")))
}

async fn show_pool(Path(name): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    match name.as_str() {
        "local" => Ok(axum::Json(pool())),
        _ => Err(ApiError::new(ErrorCode::NotFound, format!("there is no pool `{name}`")).hint("list them with `form pool ls`")),
    }
}

async fn set_volume(Path(name): Path<String>, axum::Json(body): axum::Json<Value>) -> Result<axum::Json<Value>, ApiError> {
    let _ = show_volume(Path(name.clone())).await?;
    // What is left out is not there, and what ends is null.
    if body != json!({"iops": null, "bytes_per_second": 52_428_800}) {
        return Err(ApiError::new(ErrorCode::Invalid, format!("not what was asked for: {body}")));
    }
    Ok(axum::Json(operation("volume-set", &format!("volume/{name}"), "completed")))
}

async fn create_pool() -> axum::Json<Value> {
    axum::Json(operation("pool-create", "pool/fast", "completed"))
}

async fn remove_pool(Path(name): Path<String>) -> axum::Json<Value> {
    axum::Json(operation("pool-remove", &format!("pool/{name}"), "completed"))
}

async fn set_pool(Path(name): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    let _ = show_pool(Path(name.clone())).await?;
    Ok(axum::Json(operation("pool-set", &format!("pool/{name}"), "completed")))
}

async fn remove_volume(Path(name): Path<String>, uri: axum::http::Uri) -> Result<axum::Json<Value>, ApiError> {
    if name == "spare" && uri.query() != Some("snapshots=true") {
        return Err(ApiError::new(ErrorCode::Conflict, "volume/spare has snapshots: before")
            .hint("remove them first: `form volume snapshot rm spare before`, or with it: `form volume rm spare --snapshots`"));
    }
    Ok(axum::Json(operation("volume-remove", &format!("volume/{name}"), "completed")))
}

fn detail(vm: &Value) -> Value {
    let digest = "ab".repeat(32);
    let spec = json!({
        "name": vm["name"], "description": null, "from": "scratch", "args": {}, "steps": [],
        "resources": {"vcpus": 1, "memory_mib": 512, "disk_gib": 5, "gpus": []}, "users": [], "run_as": null, "env": [], "workdir": null,
        "entrypoint": ["/app"], "cmd": [], "ports": [], "volumes": [], "networks": ["default"], "replicas": 1,
        "restart": {"policy": "always", "max_retries": null}, "healthcheck": null, "labels": {}, "model": null
    });
    let mut interfaces = vec![interface(vm, 0)];
    if INTERFACE_ATTACHED.load(Relaxed) {
        interfaces.push(interface(vm, 1));
    }
    json!({"vm": vm, "interfaces": interfaces, "desired": {"spec": spec, "passwd_hashes": {}, "image": digest, "kernel": digest}, "guest": null})
}

/// Whether somebody has attached one.
static INTERFACE_ATTACHED: AtomicBool = AtomicBool::new(false);

fn interface(vm: &Value, number: u8) -> Value {
    let device = (vm["state"] == "running").then(|| format!("eth{number}"));
    json!({
        "name": format!("eth{number}"), "vm": vm["name"], "network": "default", "mac": format!("52:00:00:00:00:0{number}"),
        "ipv4": format!("10.83.7.1{number}"), "ipv6": format!("fd00::1{number}"), "device": device,
        "state": if device.is_some() { "attached" } else { "recorded" }
    })
}

async fn interfaces(State(vms): Vms) -> axum::Json<Value> {
    axum::Json(vms.iter().map(|vm| interface(vm, 0)).collect())
}

async fn attach_interface(State(vms): Vms, Path(name): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    find(&vms, &name)?;
    INTERFACE_ATTACHED.store(true, Relaxed);
    Ok(axum::Json(operation("interface-attach", &format!("vm/{name}"), "completed")))
}

async fn detach_interface(
    State(vms): Vms,
    Path((name, which)): Path<(String, String)>,
    body: String,
) -> Result<axum::Json<Value>, ApiError> {
    find(&vms, &name)?;
    if which == "eth1" && !body.contains("true") {
        return Err(ApiError::new(
            ErrorCode::Conflict,
            "eth1 of vm/web: it cannot be detached: eth1 is in use: sh (process 7) at tcp 10.83.7.11:80",
        ));
    }
    Ok(axum::Json(operation("interface-detach", &format!("vm/{name}"), "completed")))
}

fn operation(kind: &str, subject: &str, status: &str) -> Value {
    let error =
        json!({"code": "no-room", "message": "no memory is left", "hint": "stop another VM", "retryable": false, "operation": null});
    json!({
        "id": ID, "kind": kind, "subject": subject, "actor": "local:0", "idempotency_key": ID, "status": status,
        "error": if status == "failed" { error } else { json!(null) }, "created_at": "2026-01-01T00:00:00Z", "started_at": null, "finished_at": null
    })
}

fn host() -> Value {
    json!({
        "id": ID, "name": "den", "public_key": "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "cluster": ID, "version": "0.1.0",
        "kernel": "6.1", "owner": null, "started_at": "2026-01-01T00:00:00Z", "now": "2026-01-01T00:00:00Z", "vcpus_total": 2,
        "vcpus_allocated": 1, "memory_total_mib": 4096, "memory_allocated_mib": 512, "disk_total_bytes": 1, "disk_free_bytes": 1,
        "vms": 1, "max_vms": 250
    })
}

/// One that is used, and two versions of one that is not.
fn images() -> Value {
    json!([image("web", 1, &["web"]), image("tool", 1, &[]), image("tool", 2, &[])])
}

fn image(name: &str, version: u32, used_by: &[&str]) -> Value {
    json!({
        "name": name, "version": version, "digest": "ab".repeat(32), "size_bytes": 65536, "stored_bytes": 65536,
        "created_at": "2026-01-01T00:00:00Z", "used_by": used_by
    })
}

/// Of a VM that runs, with rates; of another only what it was given.
fn stats(vm: &Value) -> Value {
    let runs = vm["state"] == "running";
    let of = |value: Value| if runs { value } else { json!(null) };
    let disk = json!({
        "id": "root", "reads": 10, "writes": 5, "flushes": 1, "errors": 0, "read_bytes": 40960, "written_bytes": 20480,
        "io_uring": true, "per_second": {"reads": 2.0, "writes": 1.0, "read_bytes": 8192.0, "written_bytes": 4096.0}
    });
    let network = json!({
        "id": "eth0", "backend": "vhost-net", "received_bytes": 3000, "sent_bytes": 700, "received_packets": 4, "sent_packets": 3, "dropped_packets": 0,
        "per_second": {"received_bytes": 1500.0, "sent_bytes": 70.0, "received_packets": 2.0, "sent_packets": 1.0}
    });
    json!({
        "id": ID, "name": vm["name"], "state": vm["state"], "at": "2026-01-01T00:00:00Z", "vcpus": 1, "uptime_ms": if runs { 90_000 } else { 0 },
        "cpu_ms": 1200, "cpu_percent": of(json!(12.5)), "memory_bytes": 536_870_912, "memory_used_bytes": of(json!(67_108_864)),
        "memory_percent": of(json!(12.5)), "resident_bytes": 0, "exits": 7, "exits_per_second": of(json!(1000.4)), "restarts": 0,
        "disks": if runs { json!([disk]) } else { json!([]) }, "networks": if runs { json!([network]) } else { json!([]) }
    })
}

async fn show_stats(State(vms): Vms, Path(name): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(stats(&find(&vms, &name)?)))
}

type Vms = State<Arc<Vec<Value>>>;

fn router(vms: Arc<Vec<Value>>) -> Router {
    Router::new()
        .route("/v1/vms", get(|State(vms): Vms| async move { axum::Json(Value::Array(vms.to_vec())) }))
        .route("/v1/vms/{name}", get(show).delete(destroy).patch(set))
        .route("/v1/vms/{name}/start", post(start))
        .route("/v1/vms/{name}/logs", get(logs))
        .route("/v1/vms/{name}/exec", get(exec))
        .route("/v1/vms/{name}/copy", get(copying::copy))
        .route("/v1/vms/{name}/ssh", get(ssh))
        .route("/v1/vms/{name}/forward", get(forward))
        .route("/v1/interfaces", get(interfaces))
        .route("/v1/vms/{name}/interfaces", post(attach_interface))
        .route("/v1/vms/{name}/interfaces/{interface}/detach", post(detach_interface))
        .route("/v1/stats", get(|State(vms): Vms| async move { axum::Json(Value::Array(vms.iter().map(stats).collect())) }))
        .route("/v1/vms/{name}/stats", get(show_stats))
        .route("/v1/volumes", get(async || axum::Json(json!([volume("data", Some("web")), volume("spare", None)]))))
        .route("/v1/volumes/{name}", delete(remove_volume).get(show_volume).patch(set_volume))
        .route("/v1/volumes/{name}/clone", post(clone_volume))
        .route("/v1/volumes/{name}/sync", post(sync_volume))
        .route("/v1/volumes/{name}/restore", post(restore_volume))
        .route("/v1/volumes/{name}/snapshots", get(volume_snapshots).post(create_volume_snapshot))
        .route("/v1/volumes/{name}/snapshots/{snapshot}", get(show_volume_snapshot).delete(remove_volume_snapshot))
        .route("/v1/volume-snapshots", get(async || axum::Json(json!([volume_snapshot("data", "before")]))))
        .route("/v1/pools", get(async || axum::Json(json!([pool()]))).post(create_pool))
        .route("/v1/pools/{name}", get(show_pool).patch(set_pool).delete(remove_pool))
        .route("/v1/operations/{id}", get(wait))
        .route("/v1/operations", get(async || axum::Json(json!([operation("vm-start", "vm/web", "completed")]))))
        .route("/v1/snapshots", get(async || axum::Json(json!([snapshot("before")]))))
        .route("/v1/vms/{name}/snapshots", get(snapshots).post(create_snapshot))
        .route("/v1/vms/{name}/snapshots/{snapshot}", get(show_snapshot).delete(remove_snapshot))
        .route("/v1/vms/{name}/restore", post(restore))
        .route("/v1/vms/{name}/versions", get(versions))
        .route("/v1/vms/{name}/rollback", post(rollback))
        .route("/v1/plan", post(plan))
        .route("/v1/events", get(events))
        .route("/v1/host", get(async || axum::Json(host())))
        .route(
            "/v1/doctor",
            get(async || {
                axum::Json(json!({"checks": [{"name": "kvm", "status": "ok", "message": "runs guests", "hint": null, "fixable": false}]}))
            }),
        )
        .route("/v1/images", get(async || axum::Json(images())))
        .route("/v1/images/{reference}", delete(remove_image).get(no_image))
        .route("/v1/kernels", get(async || axum::Json(kernels())))
        .route("/v1/kernels/{digest}", delete(remove_kernel))
        .fallback(async || ApiError::new(ErrorCode::NotFound, "there is no such thing").hint("look for what there is"))
        .route("/v1/bench", post(bench))
        .with_state(vms)
}

fn find(vms: &[Value], name: &str) -> Result<Value, ApiError> {
    let found = vms.iter().find(|vm| vm["name"] == name).cloned();
    found.ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("there is no vm/{name}")).hint("list them with `form ps`"))
}

async fn show(State(vms): Vms, Path(name): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(detail(&find(&vms, &name)?)))
}

/// `web` ran two images before, of which one is gone; what does not run ran nothing before.
async fn versions(State(vms): Vms, Path(name): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    let vm = find(&vms, &name)?;
    let version = |number: u32, there: bool| {
        let mut request = detail(&vm)["desired"].clone();
        request["spec"]["resources"]["memory_mib"] = json!(128 * number);
        json!({"image": format!("{name}:{number}"), "is_there": there, "deployed_at": "2026-01-01T00:00:00Z", "request": request})
    };
    let runs = vm["state"] == "running";
    Ok(axum::Json(if runs { json!([version(2, true), version(1, false)]) } else { json!([]) }))
}

/// As an agent plans: from what runs to what is asked for.
async fn plan(axum::Json(request): axum::Json<Value>) -> axum::Json<Value> {
    let memory = format!("{} MiB", request["spec"]["resources"]["memory_mib"]);
    axum::Json(json!({"vms": [{
        "name": request["spec"]["name"], "action": "update", "changes": [{"field": "memory", "from": "512 MiB", "to": memory}],
        "restarts": true, "loses": ["everything written to its root disk"]
    }]}))
}

/// Goes back to what has 256 MiB.
async fn rollback(Path(name): Path<String>, axum::Json(request): axum::Json<Value>) -> axum::Json<Value> {
    let fits = request["to"]["spec"]["resources"]["memory_mib"] == 256;
    axum::Json(operation("vm-rollback", &format!("vm/{name}"), if fits { "completed" } else { "failed" }))
}

async fn set(State(vms): Vms, Path(name): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    find(&vms, &name)?;
    Ok(axum::Json(operation("vm-set", &format!("vm/{name}"), "completed")))
}

async fn no_image(Path(reference): Path<String>) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is no image {reference}")).hint("list them with `form image ls`")
}

/// One that a VM needs, one that nothing does, one that only `tool:1` does, one that both versions of `tool` do, one that was asked for just now.
fn kernels() -> Value {
    let kernel = |number: u8, needed_by: &[&str], kept_until: Value| {
        json!({
            "digest": format!("{number:02}").repeat(32), "release": "6.1.0-cloud", "size_bytes": u64::from(number) << 20,
            "needed_by": needed_by, "kept_until": kept_until
        })
    };
    json!([
        kernel(1, &["vm/web"], json!(null)),
        kernel(2, &[], json!(null)),
        kernel(3, &["image/tool:1"], json!(null)),
        kernel(4, &["image/tool:1", "image/tool:2"], json!(null)),
        kernel(5, &[], json!("2100-01-01T00:00:00Z"))
    ])
}

/// A VM has begun to use the third.
async fn remove_kernel(Path(digest): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    match &digest[..2] {
        "02" => Ok(axum::Json(operation("kernel-remove", &format!("kernel/{}", &digest[..12]), "completed"))),
        _ => Err(ApiError::new(ErrorCode::Conflict, "the kernel is needed by vm/new")),
    }
}

/// A snapshot needs the newest.
async fn remove_image(Path(reference): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    match reference.as_str() {
        "tool:2" => Err(ApiError::new(ErrorCode::Conflict, "the image tool:2 is under a snapshot's disk")),
        "tool:1" | "web:1" => Ok(axum::Json(operation("image-remove", &format!("image/{reference}"), "completed"))),
        _ => Err(no_image(Path(reference)).await),
    }
}

/// What is not ready yet, or has failed, takes for ever.
async fn destroy(State(vms): Vms, Path(name): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    let (subject, mut id) = (format!("vm/{name}"), ID.to_owned());
    let status = match find(&vms, &name)?["state"].as_str() {
        Some("pending") => "executing",
        Some("failed") => {
            id = OTHER_ID.to_owned();
            "executing"
        }
        _ => "completed",
    };
    let mut operation = operation("vm-destroy", &subject, status);
    operation["id"] = json!(id);
    Ok(axum::Json(operation))
}

/// Starting depends on the state that the VM is in: a stopped one fails, a pending one goes on for ever.
async fn start(State(vms): Vms, Path(name): Path<String>) -> Result<Response, ApiError> {
    let subject = format!("vm/{name}");
    match find(&vms, &name)?["state"].as_str() {
        Some("stopped") => Ok(axum::Json(operation("vm-start", &subject, "failed")).into_response()),
        Some("pending") => Ok((StatusCode::ACCEPTED, axum::Json(operation("vm-start", &subject, "executing"))).into_response()),
        Some("failed") => Err(ApiError::new(ErrorCode::NotAllowed, "not yours")),
        _ => Ok(axum::Json(operation("vm-start", &subject, "completed")).into_response()),
    }
}

async fn wait() -> axum::Json<Value> {
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    axum::Json(operation("vm-start", "vm/slow", "executing"))
}

async fn events() -> Response {
    let event = json!({"cursor": 1, "at": "2026-01-01T00:00:00Z", "kind": "operation-step", "vm": "slow", "operation": ID, "message": "making the root disk"});
    server::ndjson(futures_util::stream::iter([Ok::<_, ApiError>(event)]))
}

/// Three rows: a good one, one over its budget, one that could not be measured. With `only` it gives the first alone.
async fn bench(axum::Json(request): axum::Json<Value>) -> Response {
    let row = |name: &str, median: f64, over: bool, fault: Value| {
        json!({
            "name": name, "what": "memory", "unit": "MB", "samples": request["runs"], "min": 1.5, "median": median, "max": 123.4, "budget": 4.0,
            "peer": {"name": "another", "value": 4.0, "ratio": median / 4.0}, "over": over, "fault": fault
        })
    };
    let mut rows = vec![row("vmm-memory", 3.2, false, json!(null))];
    if request["only"] == json!([]) {
        rows.push(row("agent-memory", 12.0, true, json!(null)));
        rows.push(row("ps", 0.0, false, json!("no form")));
    }
    server::ndjson(futures_util::stream::iter(rows.into_iter().map(Ok::<_, ApiError>)))
}

async fn logs(State(vms): Vms, Path(name): Path<String>, Query(query): Query<LogsQuery>) -> Result<Response, ApiError> {
    find(&vms, &name)?;
    let line = |number: usize| json!({"at": "2026-01-01T00:00:00Z", "stream": "stdout", "line": format!("line {number}\u{1b}[31m")});
    let count = if query.follow { usize::MAX } else { 3 };
    let from = 3usize.saturating_sub(query.tail.unwrap_or(3));
    Ok(server::ndjson(futures_util::stream::iter((from..count).map(move |number| Ok::<_, ApiError>(line(number))))))
}

/// Runs nothing: says what it was asked, and gives standard input back.
async fn exec(State(vms): Vms, Path(name): Path<String>, mut request: Request<Body>) -> Result<Response, ApiError> {
    find(&vms, &name)?;
    let asked = request.headers().get(EXEC_HEADER).unwrap().clone();
    let (response, upgraded) = server::upgrade(&mut request, "form-exec")?;
    tokio::spawn(async move {
        let asked: ExecRequest = serde_json::from_slice(&base64_url(asked.as_bytes())).unwrap();
        let Ok(mut tunnel) = upgraded.await else { return };
        if asked.command[0] == "broken" {
            let _ = tunnel.write_all(&Frame::Error("the guest does not answer".to_owned()).encode()).await;
            return;
        }
        let tty =
            asked.terminal.map(|terminal| format!(" on {} of {}x{}", terminal.kind, terminal.columns, terminal.rows)).unwrap_or_default();
        let said = format!("{:?} as {:?}{tty}\n", asked.command, asked.user);
        let _ = tunnel.write_all(&Frame::Stderr(said.into_bytes()).encode()).await;
        loop {
            let mut header = [0; HEADER];
            tunnel.read_exact(&mut header).await.unwrap();
            let (kind, length) = Frame::parse_header(&header).unwrap();
            let mut payload = vec![0; length];
            tunnel.read_exact(&mut payload).await.unwrap();
            match Frame::decode(kind, payload).unwrap() {
                // As a terminal line would: Ctrl-D ends it.
                Frame::Stdin(bytes) if !tty.is_empty() && bytes.contains(&4) => break,
                Frame::Stdin(bytes) => tunnel.write_all(&Frame::Stdout(bytes).encode()).await.unwrap(),
                Frame::StdinClosed => break,
                _ => {}
            }
        }
        let _ = tunnel.write_all(&Frame::Exit { code: 42 }.encode()).await;
        let _ = tunnel.shutdown().await;
    });
    Ok(response)
}

/// Of one that runs. In the one that failed nobody can log in.
async fn ssh(State(vms): Vms, Path(name): Path<String>) -> Result<axum::Json<Value>, ApiError> {
    let state = find(&vms, &name)?["state"].clone();
    let (server, listening) = match state.as_str() {
        Some("running") => ("formation", true),
        Some("failed") => ("none", false),
        other => {
            let message = format!("vm/{name} is {}", other.unwrap_or_default());
            return Err(ApiError::new(ErrorCode::Conflict, message).hint(format!("start it with `form vm start {name}`")));
        }
    };
    let user = |name: &str, key: bool| json!({"name": name, "key": key, "password": !key});
    Ok(axum::Json(json!({
        "vm": ID, "dns_name": format!("{name}.default.form.internal"), "server": server, "program": null, "listening": listening,
        "host_keys": ["ssh-ed25519 AAAA"], "users": [user("ada", true), user("bob", false)], "accounts": ["root", "ada", "bob"],
        "root_login": false
    })))
}

/// Gives everything back.
async fn forward(State(vms): Vms, Path(name): Path<String>, mut request: Request<Body>) -> Result<Response, ApiError> {
    find(&vms, &name)?;
    let (response, upgraded) = server::upgrade(&mut request, "form-forward")?;
    tokio::spawn(async move {
        let Ok(mut tunnel) = upgraded.await else { return };
        let mut buffer = [0; 64];
        while let Ok(count @ 1..) = tunnel.read(&mut buffer).await {
            tunnel.write_all(&buffer[..count]).await.unwrap();
        }
        let _ = tunnel.shutdown().await;
    });
    Ok(response)
}

fn base64_url(text: &[u8]) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'-' => 62,
        _ => 63,
    };
    let mut bytes = Vec::new();
    for group in text.chunks(4) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 6 | u32::from(value(*byte))) << (6 * (4 - group.len()));
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    bytes
}
