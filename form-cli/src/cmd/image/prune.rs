use form_api::{ErrorCode, image::Image};
use form_types::{ImageReference, Name};

use super::ls;
use crate::{
    failure::{Failure, Outcome},
    operation::{each, settle},
    session::Session,
    ui::{bytes, count},
};

/// Remove versions of images that no VM uses from the host
///
/// The newest version of each image stays, so that the next build sends only what is new, and so do those that `form rollback` can put
/// back; --all removes them too. An image that a VM or a snapshot needs, or that is to be kept (`form image set --keep`), stays in any case.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Also the newest version of an image that no VM uses, and those that a VM can go back to
    #[arg(long)]
    all: bool,
    /// Those alone of this image
    #[arg(long, value_name = "NAME")]
    image: Option<Name>,
    /// Show what would be removed
    #[arg(long)]
    dry_run: bool,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let images = unused(client.images().await?, &args);
    if args.dry_run {
        session.terminal.list(&images, &ls::table(&images))?;
        return Ok(0);
    }
    if images.is_empty() {
        session.terminal.note("Every image is used, the newest of its name, to be kept, or one to go back to: nothing to remove.");
        return Ok(0);
    }
    let references: Vec<ImageReference> =
        images.into_iter().map(|image| ImageReference { name: image.name, version: Some(image.version) }).collect();
    let listed = references.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    session.terminal.confirm(&format!("Remove {} ({listed}) from the host?", count(references.len(), "image")))?;
    let before = client.host().await?.disk_free_bytes;
    let outcome = each(session, &references, async |reference: ImageReference| {
        let removed = match client.remove_image(&reference).await {
            Ok(operation) => settle(session, &client, operation).await,
            Err(error) => Err(error.into()),
        };
        let operation = match removed {
            // Somebody has begun to use it, or a snapshot needs it.
            Err(failure) if failure.error.code == ErrorCode::Conflict => {
                session.terminal.note(format!("{reference}: kept, {}", failure.error.message));
                return Ok(());
            }
            removed => removed?,
        };
        session.terminal.done(&operation, &reference.to_string(), &format!("{reference}: removed"))?;
        Ok::<(), Failure>(())
    })
    .await;
    let after = client.host().await?.disk_free_bytes;
    session.terminal.note(format!("the host's disk has {} free, {} more than before", bytes(after), bytes(after.saturating_sub(before))));
    outcome
}

/// Those that are not used, without the newest of each name unless all are meant.
fn unused(images: Vec<Image>, args: &Args) -> Vec<Image> {
    let newest = |image: &Image| images.iter().all(|other| other.name != image.name || other.version <= image.version);
    let meant = |image: &&Image| {
        image.used_by.is_empty()
            && !image.keep
            && (args.all || (!newest(image) && image.kept_for.is_empty()))
            && args.image.as_ref().is_none_or(|name| *name == image.name)
    };
    images.iter().filter(meant).cloned().collect()
}

#[cfg(test)]
mod tests {
    use form_types::Digest;

    use super::*;

    fn image(name: &str, version: u32, used: bool) -> Image {
        let used_by = if used { vec!["vm".parse().unwrap()] } else { Vec::new() };
        Image {
            name: name.parse().unwrap(),
            version,
            digest: Digest::of(name.as_bytes()),
            size_bytes: 1,
            stored_bytes: 1,
            created_at: jiff::Timestamp::UNIX_EPOCH,
            used_by,
            kept_for: Vec::new(),
            labels: [].into(),
            keep: false,
        }
    }

    #[test]
    fn what_is_used_or_newest_stays() {
        let images =
            || vec![image("web", 1, false), image("web", 2, true), image("web", 3, false), image("old", 7, false), image("app", 1, true)];
        let left = |all: bool, name: Option<&str>| {
            let args = Args { all, image: name.map(|name| name.parse().unwrap()), dry_run: false };
            unused(images(), &args).iter().map(|image| format!("{}:{}", image.name, image.version)).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(left(false, None), "web:1");
        assert_eq!(left(true, None), "web:1 web:3 old:7");
        assert_eq!(left(true, Some("old")), "old:7");
        assert_eq!(left(true, Some("app")), "");

        let mut kept = images();
        kept[0].kept_for.push("vm".parse().unwrap());
        let args = |all| Args { all, image: None, dry_run: false };
        assert!(unused(kept.clone(), &args(false)).is_empty());
        assert_eq!(unused(kept.clone(), &args(true)).len(), 3);
        kept[2].keep = true;
        assert_eq!(unused(kept, &args(true)).len(), 2);
    }
}
