//! How a command fails: what a person and a program need to know, and the exit code.

use std::{io, path::Path};

use form_api::{ApiError, ErrorCode, client::ClientError};
use form_types::OperationId;

/// An error on its way to the user. Everything fallible in this program ends as one.
#[derive(Debug)]
pub struct Failure {
    pub error: ApiError,
    /// What led to it, last line last: output of a failed build step, the guest's log.
    pub tail: Option<Tail>,
}

#[derive(Debug)]
pub struct Tail {
    /// "last lines of web's log"
    pub title: String,
    pub lines: Vec<String>,
}

/// What a command gives back: its exit code.
pub type Outcome = Result<u8, Failure>;

impl Failure {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        ApiError::new(code, message).into()
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Invalid, message)
    }

    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Failed, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::NotFound, message)
    }

    /// An input or output error of this machine, with the path and what was tried.
    pub fn io(action: &str, path: &Path, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::NotFound => ErrorCode::NotFound,
            io::ErrorKind::PermissionDenied => ErrorCode::NotAllowed,
            _ => ErrorCode::Failed,
        };
        Self::new(code, format!("cannot {action} {}: {error}", path.display()))
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.error.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn operation(mut self, operation: OperationId) -> Self {
        self.error.operation = Some(operation);
        self
    }

    #[must_use]
    pub fn tail(mut self, title: impl Into<String>, lines: Vec<String>) -> Self {
        if !lines.is_empty() {
            self.tail = Some(Tail { title: title.into(), lines });
        }
        self
    }

    pub const fn exit_code(&self) -> u8 {
        self.error.code.exit_code()
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self { error, tail: None }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        error.to_api().into()
    }
}
