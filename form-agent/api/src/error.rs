//! How the agent says no.

use std::fmt;

use form_types::OperationId;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The kind of an error: one HTTP status and one exit code of the CLI each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// 500, exit 1: something failed that should not.
    Internal,
    /// 422, exit 1: what was asked for was tried and failed.
    Failed,
    /// 400, exit 2: the request makes no sense.
    Invalid,
    /// 404, exit 3.
    NotFound,
    /// 401 or 403, exit 4.
    NotAllowed,
    /// 409, exit 5: a name, port or state is in the way.
    Conflict,
    /// 504, exit 6.
    TimedOut,
    /// 503, exit 7: not now, or not from here.
    Unavailable,
    /// 507, exit 1: no room (memory, disk, `max_vms`).
    NoRoom,
    /// 413, exit 2.
    TooLarge,
    /// 422, exit 1: understood, but this version does not do it.
    Unsupported,
}

impl ErrorCode {
    pub const fn http_status(self) -> u16 {
        match self {
            Self::Internal => 500,
            Self::Failed | Self::Unsupported => 422,
            Self::Invalid => 400,
            Self::NotFound => 404,
            Self::NotAllowed => 403,
            Self::Conflict => 409,
            Self::TimedOut => 504,
            Self::Unavailable => 503,
            Self::NoRoom => 507,
            Self::TooLarge => 413,
        }
    }

    /// The exit code of `form` (design, section 6).
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Internal | Self::Failed | Self::NoRoom | Self::Unsupported => 1,
            Self::Invalid | Self::TooLarge => 2,
            Self::NotFound => 3,
            Self::NotAllowed => 4,
            Self::Conflict => 5,
            Self::TimedOut => 6,
            Self::Unavailable => 7,
        }
    }
}

/// The body of every reply that is no success: `{"error": {…}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    pub error: ApiError,
}

/// What went wrong, in words for a person, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ApiError {
    pub code: ErrorCode,
    pub message: String,
    pub hint: Option<String>,
    /// The same request may succeed later.
    pub retryable: bool,
    pub operation: Option<OperationId>,
}

impl ApiError {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let retryable = matches!(code, ErrorCode::TimedOut | ErrorCode::Unavailable);
        Self { code, message: message.into(), hint: None, retryable, operation: None }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn operation(mut self, operation: OperationId) -> Self {
        self.operation = Some(operation);
        self
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}
