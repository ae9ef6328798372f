//! `form volume …`

pub mod attach;
pub mod clone;
pub mod create;
mod credentials;
pub mod detach;
pub mod export;
pub mod import;
pub mod ls;
pub mod relocate;
pub mod resize;
pub mod rm;
pub mod set;
pub mod show;
pub mod snapshot;
pub mod sync;
mod transfer;
pub mod unexport;

use clap::{Subcommand, ValueEnum};
use form_types::{
    DiskLimits, VolumeFormat,
    size::{Bytes, GIB},
};

use crate::{failure::Outcome, session::Session};

#[derive(Debug, Subcommand)]
pub enum Verb {
    Create(create::Args),
    Ls(ls::Args),
    Show(show::Args),
    Attach(attach::Args),
    Detach(detach::Args),
    Resize(resize::Args),
    Set(set::Args),
    Clone(clone::Args),
    Snapshot(snapshot::Args),
    Sync(sync::Args),
    Move(relocate::Args),
    Import(import::Args),
    Export(export::Args),
    Unexport(unexport::Args),
    Rm(rm::Args),
}

impl Verb {
    pub async fn run(self, session: &Session) -> Outcome {
        match self {
            Self::Create(args) => create::run(args, session).await,
            Self::Ls(args) => ls::run(&args, session).await,
            Self::Show(args) => show::run(&args, session).await,
            Self::Attach(args) => attach::run(args, session).await,
            Self::Detach(args) => detach::run(args, session).await,
            Self::Resize(args) => resize::run(&args, session).await,
            Self::Set(args) => set::run(&args, session).await,
            Self::Clone(args) => clone::run(args, session).await,
            Self::Snapshot(args) => snapshot::run(args, session).await,
            Self::Sync(args) => sync::run(args, session).await,
            Self::Move(args) => relocate::run(args, session).await,
            Self::Import(args) => import::run(args, session).await,
            Self::Export(args) => export::run(args, session).await,
            Self::Unexport(args) => unexport::run(args, session).await,
            Self::Rm(args) => rm::run(args, session).await,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
}

impl From<Format> for VolumeFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

/// `500 operations/s, 50 MiB/s`; none without limits.
pub fn limits_text(limits: DiskLimits) -> Option<String> {
    let iops = limits.iops.map(|iops| format!("{iops} operations/s"));
    let bytes = limits.bytes_per_second.map(|bytes| format!("{}/s", Bytes(bytes)));
    let parts: Vec<String> = iops.into_iter().chain(bytes).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// A size as it is written on the command line: `20G`, `512M`, `20` for GiB, `20971520B` to the byte.
fn size(text: &str) -> Result<Bytes, String> {
    let bytes = match text.strip_suffix(['b', 'B']).filter(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    {
        Some(number) => form_types::size::parse(number, 1),
        None => form_types::size::parse(text, GIB),
    };
    let bytes = bytes.map_err(|error| error.to_string())?;
    form_types::volume::check_size(bytes.0).map_err(|error| error.to_string())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("20", 20 << 30), ("1G", 1 << 30), ("512M", 512 << 20), ("16777728B", 16_777_728), ("1TiB", 1 << 40)] {
            assert_eq!(size(text), Ok(Bytes(bytes)), "{text}");
        }
        for bad in ["", "B", "1M", "16777217B", "x", "65T", "-1G"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
