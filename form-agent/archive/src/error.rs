use std::{
    io,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

/// What somebody can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A path that should be there is not.
    NotFound,
    /// The file system is full, or the quota is.
    NoRoom,
    /// What is asked, or what the stream holds, makes no sense.
    Invalid,
    /// The stream broke off: the other side says why.
    Stream,
    /// The file system said no.
    Failed,
}

#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("there is no {}", .0.display())]
    Missing(PathBuf),
    #[error("there is no room left for {}", .0.display())]
    NoRoom(PathBuf),
    #[error("{0}")]
    Invalid(String),
    #[error("the copy broke off: {0}")]
    Stream(#[source] io::Error),
    #[error("cannot {action} {}: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
}

impl ArchiveError {
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing(_) => ErrorKind::NotFound,
            Self::NoRoom(_) => ErrorKind::NoRoom,
            Self::Invalid(_) => ErrorKind::Invalid,
            Self::Stream(_) => ErrorKind::Stream,
            Self::File { .. } => ErrorKind::Failed,
        }
    }
}

pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ArchiveError {
    move |source| match source.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT) => ArchiveError::Missing(path.to_owned()),
        Some(Errno::NOSPC | Errno::DQUOT) => ArchiveError::NoRoom(path.to_owned()),
        _ => ArchiveError::File { action, path: path.to_owned(), source },
    }
}

/// As [`file`], of what a system call said.
pub(crate) fn failed(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> ArchiveError {
    move |errno| file(action, path)(errno.into())
}
