//! The words on the wire between `form` and `form-agent`, and what carries them.
//!
//! One HTTP/1.1 exchange a QUIC stream (ALPN `form/1`), or plain HTTP/1.1 on the agent's Unix socket; JSON bodies; long answers
//! are NDJSON; exec, console and port forwarding use HTTP Upgrade and then bytes of their own.
//!
//! | method and path | request | reply |
//! |---|---|---|
//! | `GET /v1/host` | | [`host::Host`] |
//! | `POST /v1/claim` (signed) | [`host::ClaimRequest`] | [`host::Host`] |
//! | `GET /v1/doctor` | | [`host::DoctorReport`] |
//! | `POST /v1/doctor/fix` (signed) | | [`host::DoctorReport`] |
//! | `POST /v1/bench` (signed) | [`bench::BenchRequest`] | NDJSON of [`bench::BenchRow`] |
//! | `POST /v1/plan` | [`deploy::DeployRequest`] | [`deploy::Plan`] |
//! | `POST /v1/deploy` (signed) | [`deploy::DeployRequest`] | [`operation::Operation`] |
//! | `GET /v1/vms` | | `Vec<`[`vm::Vm`]`>` |
//! | `GET /v1/vms/{name}` | | [`vm::VmDetail`] |
//! | `POST /v1/vms/{name}/start` `stop` `restart` `pause` `resume` `reset` (signed) | | [`operation::Operation`] |
//! | `POST /v1/vms/{name}/rename` (signed) | [`vm::RenameRequest`] | [`operation::Operation`] |
//! | `PATCH /v1/vms/{name}` (signed) | [`vm::SetRequest`] | [`operation::Operation`] |
//! | `POST /v1/vms/{name}/restore` (signed) | [`snapshot::RestoreRequest`] | [`operation::Operation`] |
//! | `GET /v1/interfaces` | | `Vec<`[`interface::Interface`]`>` |
//! | `POST /v1/vms/{name}/interfaces` (signed) | | [`operation::Operation`] |
//! | `POST /v1/vms/{name}/interfaces/{interface}/detach` (signed) | [`interface::DetachInterfaceRequest`] | [`operation::Operation`] |
//! | `GET /v1/snapshots` | | `Vec<`[`snapshot::Snapshot`]`>` |
//! | `GET /v1/vms/{name}/snapshots` | | `Vec<`[`snapshot::Snapshot`]`>` |
//! | `POST /v1/vms/{name}/snapshots` (signed) | [`snapshot::SnapshotRequest`] | [`operation::Operation`] |
//! | `GET /v1/vms/{name}/snapshots/{snapshot}` | | [`snapshot::Snapshot`] |
//! | `DELETE /v1/vms/{name}/snapshots/{snapshot}` (signed) | | [`operation::Operation`] |
//! | `DELETE /v1/vms/{name}` (signed) | | [`operation::Operation`] |
//! | `GET /v1/stats` | query [`stats::StatsQuery`] | `Vec<`[`stats::VmStats`]`>` |
//! | `GET /v1/vms/{name}/stats` | query [`stats::StatsQuery`] | [`stats::VmStats`] |
//! | `GET /v1/health` | | [`stats::HealthReport`] |
//! | `GET /metrics` | | text for Prometheus |
//! | `GET /v1/vms/{name}/logs` | query [`vm::LogsQuery`] | NDJSON of [`vm::LogLine`] |
//! | `GET /v1/vms/{name}/exec` (signed, Upgrade `form-exec`) | header [`exec::EXEC_HEADER`] | [`exec::Frame`]s |
//! | `GET /v1/vms/{name}/copy` (signed, Upgrade `form-copy`) | query [`copy::CopyQuery`] | [`exec::Frame`]s |
//! | `GET /v1/vms/{name}/console` (signed, Upgrade `form-console`) | | bytes |
//! | `GET /v1/vms/{name}/forward` (signed, Upgrade `form-forward`) | query [`vm::ForwardQuery`] | bytes |
//! | `GET /v1/volumes` | | `Vec<`[`volume::Volume`]`>` |
//! | `GET /v1/volumes/{name}` | | [`volume::Volume`] |
//! | `POST /v1/volumes` (signed) | [`volume::CreateRequest`] | [`operation::Operation`] |
//! | `PATCH /v1/volumes/{name}` (signed) | [`volume::SetVolumeRequest`] | [`operation::Operation`] |
//! | `POST /v1/volumes/{name}/attach` (signed) | [`volume::AttachRequest`] | [`operation::Operation`] |
//! | `POST /v1/volumes/{name}/detach` (signed) | [`volume::DetachRequest`] | [`operation::Operation`] |
//! | `POST /v1/volumes/{name}/resize` (signed) | [`volume::ResizeRequest`] | [`operation::Operation`] |
//! | `POST /v1/volumes/{name}/clone` (signed) | [`volume::CloneRequest`] | [`operation::Operation`] |
//! | `POST /v1/volumes/{name}/move` (signed) | [`volume::MoveRequest`] | [`operation::Operation`] |
//! | `DELETE /v1/volumes/{name}` (signed) | | [`operation::Operation`] |
//! | `GET /v1/pools` | | `Vec<`[`volume::Pool`]`>` |
//! | `GET /v1/pools/{name}` | | [`volume::Pool`] |
//! | `POST /v1/pools` (signed) | [`pool::PoolCreateRequest`] | [`operation::Operation`] |
//! | `PATCH /v1/pools/{name}` (signed) | [`pool::PoolSetRequest`] | [`operation::Operation`] |
//! | `DELETE /v1/pools/{name}` (signed) | | [`operation::Operation`] |
//! | `GET /v1/images` | | `Vec<`[`image::Image`]`>` |
//! | `GET /v1/images/{reference}` | | [`image::Image`] |
//! | `GET /v1/images/{reference}/verify` | | [`image::Verification`] |
//! | `GET /v1/images/{reference}/manifest` | | the manifest's text |
//! | `POST /v1/images/{reference}/blocks` | [`image::ReadBlocksRequest`] | [`image::BlockFrame`]s |
//! | `PATCH /v1/images/{reference}` (signed) | [`image::ImageSetRequest`] | [`operation::Operation`] |
//! | `DELETE /v1/images/{reference}` (signed) | | [`operation::Operation`] |
//! | `POST /v1/images/missing` | [`image::MissingRequest`] | [`image::MissingReply`] |
//! | `PUT /v1/blocks` | stream of [`image::BlockFrame`] | [`image::BlocksReply`] |
//! | `PUT /v1/manifests/{digest}` | one zstd stream with the text | [`image::ManifestReply`] |
//! | `POST /v1/images` (signed) | [`image::ImportRequest`] | [`image::Image`] |
//! | `GET /v1/kernels/{digest}` | | [`image::Kernel`] |
//! | `POST /v1/kernels` (signed) | [`image::ImportRequest`] | [`image::Kernel`] |
//! | `GET /v1/operations` | query [`operation::OperationsQuery`] | `Vec<`[`operation::Operation`]`>` |
//! | `GET /v1/operations/{id}` | query [`operation::WaitQuery`] | [`operation::Operation`] |
//! | `GET /v1/events` | query [`event::EventsQuery`] | NDJSON of [`event::Event`] |

pub mod bench;
#[cfg(feature = "transport")]
pub mod client;
pub mod copy;
pub mod deploy;
pub mod error;
pub mod event;
pub mod exec;
pub mod host;
pub mod image;
pub mod interface;
pub mod operation;
pub mod pool;
#[cfg(feature = "transport")]
pub mod server;
pub mod sign;
pub mod snapshot;
pub mod stats;
#[cfg(feature = "transport")]
pub mod tls;
pub mod vm;
pub mod volume;

pub use error::{ApiError, ErrorCode};

/// The protocol between the CLI and an agent.
pub const ALPN: &[u8] = b"form/1";

/// UDP port of an agent, unless its configuration says another.
pub const DEFAULT_PORT: u16 = 7846;

/// The largest JSON body that an agent reads, in bytes. Block and kernel uploads are streams and have limits of their own.
pub const MAX_BODY: usize = 8 * 1024 * 1024;
