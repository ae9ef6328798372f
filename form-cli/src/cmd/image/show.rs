use clap_complete::engine::ArgValueCompleter;
use form_bundle::manifest::HistoryEntry;
use form_types::{Digest, ImageReference, Name};
use jiff::Timestamp;
use serde::Serialize;

use super::{failure, store};
use crate::{
    complete,
    failure::Outcome,
    session::Session,
    ui::{Record, bytes, labels},
};

/// Show an image on the host
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME or NAME:VERSION
    #[arg(add = ArgValueCompleter::new(complete::images))]
    image: ImageReference,
    /// One built on this machine instead, with its layers
    #[arg(long)]
    local: bool,
}

#[derive(Serialize)]
struct Local {
    name: Name,
    version: u32,
    digest: Digest,
    size_bytes: u64,
    stored_bytes: u64,
    created_at: Timestamp,
    /// What `uname -r` prints in its VMs, when it brings a kernel along.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<String>,
    packages: std::collections::BTreeMap<String, String>,
    /// The base first.
    layers: Vec<HistoryEntry>,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    if args.local {
        return local(&args.image, session);
    }
    let image = session.client()?.image(&args.image).await?;
    let users: Vec<&str> = image.used_by.iter().map(|name| name.as_str()).collect();
    let reference = format!("{}:{}", image.name, image.version);
    let record = Record::new(&reference)
        .field("image", &reference)
        .field("digest", image.digest)
        .field("size", bytes(image.size_bytes))
        .field("stored", bytes(image.stored_bytes))
        .field("created", image.created_at)
        .field("used by", users.join(", "));
    let kept_for: Vec<&str> = image.kept_for.iter().map(|name| name.as_str()).collect();
    let record = record
        .optional("back for", (!kept_for.is_empty()).then(|| kept_for.join(", ")))
        .optional("keep", image.keep.then_some("yes"))
        .optional("labels", (!image.labels.is_empty()).then(|| labels(&image.labels)));
    session.terminal.show(&image, &record)?;
    Ok(0)
}

fn local(image: &ImageReference, session: &Session) -> Outcome {
    let (found, manifest) = store()?.get(image).map_err(|error| failure(&error))?;
    let image = Local {
        name: found.name,
        version: found.version,
        digest: found.digest,
        size_bytes: found.size,
        stored_bytes: found.stored_bytes,
        created_at: Timestamp::try_from(found.created).unwrap_or(Timestamp::UNIX_EPOCH),
        kernel: manifest.kernel.map(|kernel| kernel.release),
        packages: manifest.packages,
        layers: manifest.history,
    };
    let reference = format!("{}:{}", image.name, image.version);
    let changed = |layer: &HistoryEntry| bytes(layer.changed_blocks * form_bundle::BLOCK_SIZE as u64);
    let layers: Vec<String> = image.layers.iter().map(|layer| format!("{} ({})", layer.text, changed(layer))).collect();
    let packages: Vec<String> = image.packages.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let record = Record::new(&reference)
        .field("image", &reference)
        .field("digest", image.digest)
        .field("size", bytes(image.size_bytes))
        .field("stored", bytes(image.stored_bytes))
        .field("created", image.created_at);
    let record = if let Some(release) = &image.kernel { record.field("kernel", release) } else { record };
    let record = record
        .field("layers", layers.join("\n"))
        .field("packages", if packages.is_empty() { String::new() } else { packages.len().to_string() })
        .wide("versions", packages.join("\n"));
    session.terminal.show(&image, &record)?;
    Ok(0)
}
