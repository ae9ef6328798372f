use form_api::image::Image;
use form_types::{Digest, Name};
use jiff::Timestamp;
use serde::Serialize;

use super::{failure, store};
use crate::{
    args::label,
    failure::Outcome,
    session::Session,
    ui::{Table, age, bytes, labels},
};

/// List images on the host
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Those built on this machine instead
    #[arg(long)]
    local: bool,
    /// Those alone that have this label; several must all be there
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = label, conflicts_with = "local")]
    labels: Vec<(String, String)>,
}

#[derive(Serialize)]
struct Local {
    name: Name,
    version: u32,
    digest: Digest,
    size_bytes: u64,
    stored_bytes: u64,
    created_at: Timestamp,
}

pub async fn run(args: &Args, session: &Session) -> Outcome {
    if args.local {
        return local(session);
    }
    let mut images = session.client()?.images().await?;
    images.retain(|image| args.labels.iter().all(|(key, value)| image.labels.get(key) == Some(value)));
    session.terminal.list(&images, &table(&images))?;
    Ok(0)
}

pub fn table(images: &[Image]) -> Table {
    let mut table = Table::new(&["IMAGE", "DIGEST", "STORED", "AGE", "USED BY"], &["SIZE", "BACK FOR", "KEEP", "LABELS"]);
    for image in images {
        let users: Vec<&str> = image.used_by.iter().map(Name::as_str).collect();
        table.row([
            reference(image),
            image.digest.short(),
            bytes(image.stored_bytes),
            age(image.created_at, Timestamp::now()),
            users.join(", "),
            bytes(image.size_bytes),
            image.kept_for.iter().map(Name::as_str).collect::<Vec<_>>().join(", "),
            if image.keep { "yes" } else { "" }.to_owned(),
            labels(&image.labels),
        ]);
    }
    table
}

fn reference(image: &Image) -> String {
    format!("{}:{}", image.name, image.version)
}

fn local(session: &Session) -> Outcome {
    let records = store()?.list().map_err(|error| failure(&error))?;
    let images: Vec<Local> = records
        .into_iter()
        .map(|record| Local {
            name: record.name,
            version: record.version,
            digest: record.digest,
            size_bytes: record.size,
            stored_bytes: record.stored_bytes,
            created_at: Timestamp::try_from(record.created).unwrap_or(Timestamp::UNIX_EPOCH),
        })
        .collect();
    let mut table = Table::new(&["IMAGE", "DIGEST", "STORED", "AGE"], &["SIZE"]);
    for image in &images {
        table.row([
            format!("{}:{}", image.name, image.version),
            image.digest.short(),
            bytes(image.stored_bytes),
            age(image.created_at, Timestamp::now()),
            bytes(image.size_bytes),
        ]);
    }
    session.terminal.list(&images, &table)?;
    Ok(0)
}
