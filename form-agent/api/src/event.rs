//! What happened on a host, in order.

use form_types::{Name, OperationId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Grows by one; a follower resumes after the last one it saw. Starts anew when the agent's database does.
    pub cursor: u64,
    pub at: Timestamp,
    pub kind: EventKind,
    pub vm: Option<Name>,
    pub operation: Option<OperationId>,
    /// One line for a person.
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    OperationStarted,
    /// A step of an operation has begun: "making the root disk".
    OperationStep,
    OperationCompleted,
    OperationFailed,
    VmStarted,
    VmReady,
    VmPaused,
    VmResumed,
    VmHealthy,
    VmUnhealthy,
    VmExited,
    ImageImported,
    ImageRemoved,
    KernelRemoved,
    HostStarted,
    HostClaimed,
}

/// Response header of events: the cursor that the answer begins after. A follower whose connection breaks before it has got an event goes
/// on from there.
pub const EVENT_CURSOR_HEADER: &str = "form-event-cursor";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventsQuery {
    /// Events after this cursor; without it the newest `tail`.
    pub after: Option<u64>,
    pub tail: Option<usize>,
    #[serde(default)]
    pub follow: bool,
    pub vm: Option<Name>,
    pub operation: Option<OperationId>,
}
