//! Why a call gave no answer.

use form_types::PublicKey;

use crate::{ApiError, ErrorCode};

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers, or not as an agent does.
    #[error("{target} is unreachable: {reason}")]
    Unreachable { target: String, reason: String, hint: String },
    /// Somebody answers, with another key than the pinned one.
    #[error("the host at {address} shows the key {found}, not {expected}")]
    HostKeyChanged { address: String, expected: PublicKey, found: PublicKey },
    /// The agent said no.
    #[error("{0}")]
    Api(#[from] ApiError),
    #[error("{target} did not answer within {seconds} s")]
    TimedOut { target: String, seconds: u64 },
    /// What came is not what this version of the client understands.
    #[error("{target} answered what this version does not understand: {what}")]
    Protocol { target: String, what: String },
    /// Something on this side: no entropy, no socket, an upload that cannot be read.
    #[error("{what}: {source}")]
    Local { what: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
}

impl ClientError {
    pub(super) fn local(what: &'static str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Local { what, source: source.into() }
    }

    /// The same in the agent's own terms, for one way of reporting every error.
    pub fn to_api(&self) -> ApiError {
        let message = self.to_string();
        match self {
            Self::Api(error) => error.clone(),
            Self::Unreachable { hint, .. } => ApiError::new(ErrorCode::Unavailable, message).hint(hint.clone()),
            Self::HostKeyChanged { .. } => ApiError::new(ErrorCode::NotAllowed, message).hint(
                "somebody may be listening in between. If the host was set up anew, remove it (`form host rm`) and add it with its new token",
            ),
            Self::TimedOut { .. } => ApiError::new(ErrorCode::TimedOut, message).hint("the host is slow or overloaded: try again, or with a longer --timeout"),
            Self::Protocol { .. } => ApiError::new(ErrorCode::Failed, message).hint("compare `form version` with the agent's version in `form host show`"),
            Self::Local { .. } => ApiError::new(ErrorCode::Failed, message),
        }
    }

    /// Whether the agent could not be reached at all, so that asking again later may help.
    pub const fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}
