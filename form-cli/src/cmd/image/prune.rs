use std::{cell::RefCell, collections::BTreeSet};

use form_api::{
    ErrorCode,
    client::{Client, ClientError},
    image::{Image, Kernel},
    operation::Operation,
};
use form_types::{ImageReference, Name};
use serde::Serialize;

use crate::{
    failure::{Failure, Outcome},
    operation::{each, settle},
    session::Session,
    ui::{Table, bytes, count},
};

/// Remove versions of images that no VM uses from the host, and kernels that nothing needs
///
/// The newest version of each image stays, so that the next build sends only what is new, and so do those that `form rollback` can put
/// back; --all removes them too. An image that a VM or a snapshot needs, or that is to be kept (`form image set --keep`), stays in any case.
/// So does a kernel that a VM, an image or a snapshot needs, and for a day one that was sent or asked for, whose VM may still come.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Also the newest version of an image that no VM uses, and those that a VM can go back to
    #[arg(long)]
    all: bool,
    /// Those alone of this image, and no kernels
    #[arg(long, value_name = "NAME")]
    image: Option<Name>,
    /// Show what would be removed
    #[arg(long)]
    dry_run: bool,
}

/// Something to be removed.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum Unused {
    Image(Image),
    Kernel(Kernel),
}

/// What programs get of a kernel that was removed.
#[derive(Serialize)]
struct RemovedKernel<'a> {
    #[serde(flatten)]
    operation: &'a Operation,
    kernel: &'a Kernel,
}

impl Unused {
    fn name(&self) -> String {
        match self {
            Self::Image(image) => reference(image).to_string(),
            Self::Kernel(kernel) => format!("kernel/{}", kernel.digest.short()),
        }
    }

    const fn bytes(&self) -> u64 {
        match self {
            Self::Image(image) => image.stored_bytes,
            Self::Kernel(kernel) => kernel.size_bytes,
        }
    }

    async fn remove(&self, client: &Client) -> Result<Operation, ClientError> {
        match self {
            Self::Image(image) => client.remove_image(&reference(image)).await,
            Self::Kernel(kernel) => client.remove_kernel(&kernel.digest).await,
        }
    }
}

fn reference(image: &Image) -> ImageReference {
    ImageReference { name: image.name.clone(), version: Some(image.version) }
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    let client = session.client()?;
    let images = unused(client.images().await?, &args);
    let kernels = if args.image.is_none() { kernels(&client).await? } else { Vec::new() };
    let (kernels, wanted) = needless(kernels, &images);
    if !wanted.is_empty() {
        let all: Vec<Unused> = wanted.into_iter().map(Unused::Kernel).collect();
        session.terminal.note(format!("{} sent or asked for within a day: kept for a VM that may come", counted(&all)));
    }
    let all: Vec<Unused> = images.into_iter().map(Unused::Image).chain(kernels.into_iter().map(Unused::Kernel)).collect();
    if args.dry_run {
        session.terminal.list(&all, &table(&all))?;
        return Ok(0);
    }
    if all.is_empty() {
        session.terminal.note("Every image is used, the newest of its name, to be kept, or one to go back to: nothing to remove.");
        return Ok(0);
    }
    let listed = all.iter().map(Unused::name).collect::<Vec<_>>().join(", ");
    session.terminal.confirm(&format!("Remove {} ({listed}) from the host?", counted(&all)))?;
    let before = client.host().await?.disk_free_bytes;
    let removed = RefCell::new(Vec::new());
    let outcome = each(session, &all, async |one: Unused| {
        let answer = match one.remove(&client).await {
            Ok(operation) => settle(session, &client, operation).await,
            Err(error) => Err(error.into()),
        };
        let operation = match answer {
            // Somebody has begun to use it, or a snapshot needs it.
            Err(failure) if failure.error.code == ErrorCode::Conflict => {
                session.terminal.note(format!("{}: kept, {}", one.name(), failure.error.message));
                return Ok(());
            }
            answer => answer?,
        };
        let sentence = format!("{}: removed", one.name());
        match &one {
            Unused::Image(_) => session.terminal.done(&operation, &one.name(), &sentence)?,
            Unused::Kernel(kernel) => session.terminal.done(
                &RemovedKernel { operation: &operation, kernel },
                &one.name(),
                &format!("{sentence} ({}, {})", kernel.release, bytes(kernel.size_bytes)),
            )?,
        }
        removed.borrow_mut().push(one);
        Ok::<(), Failure>(())
    })
    .await;
    let after = client.host().await?.disk_free_bytes;
    session.terminal.note(format!(
        "{} removed; the host's disk has {} free, {} more than before",
        counted(&removed.borrow()),
        bytes(after),
        bytes(after.saturating_sub(before))
    ));
    outcome
}

/// An agent of an earlier release lists none, and removes none.
async fn kernels(client: &Client) -> Result<Vec<Kernel>, ClientError> {
    match client.kernels().await {
        Err(ClientError::Api(error)) if matches!(error.code, ErrorCode::Invalid | ErrorCode::NotFound) => Ok(Vec::new()),
        answer => answer,
    }
}

/// `2 images (120 MiB) and 1 kernel (87 MiB)`
fn counted(all: &[Unused]) -> String {
    let of = |noun: &str, is_meant: fn(&&Unused) -> bool| {
        let found: Vec<&Unused> = all.iter().filter(is_meant).collect();
        let sum = found.iter().fold(0_u64, |sum, one| sum.saturating_add(one.bytes()));
        (!found.is_empty()).then(|| format!("{} ({})", count(found.len(), noun), bytes(sum)))
    };
    let parts = [of("image", |one| matches!(one, Unused::Image(_))), of("kernel", |one| matches!(one, Unused::Kernel(_)))];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() { "nothing".to_owned() } else { parts.join(" and ") }
}

fn table(all: &[Unused]) -> Table {
    let mut table = Table::new(&["NAME", "DIGEST", "STORED"], &["RELEASE"]);
    for one in all {
        let (digest, release) = match one {
            Unused::Image(image) => (image.digest, String::new()),
            Unused::Kernel(kernel) => (kernel.digest, kernel.release.clone()),
        };
        table.row([one.name(), digest.short(), bytes(one.bytes()), release]);
    }
    table
}

/// Those that nothing needs once `images` are gone, and those of them that somebody wanted lately.
fn needless(kernels: Vec<Kernel>, images: &[Image]) -> (Vec<Kernel>, Vec<Kernel>) {
    let gone: BTreeSet<String> = images.iter().map(|image| format!("image/{}", reference(image))).collect();
    let needless = kernels.into_iter().filter(|kernel| kernel.needed_by.iter().all(|who| gone.contains(who)));
    needless.partition(|kernel| kernel.kept_until.is_none())
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

    #[test]
    fn a_kernel_goes_with_the_last_that_needs_it() {
        let kernel = |needed_by: &[&str], is_wanted: bool| Kernel {
            digest: Digest::of(b"kernel"),
            release: "6.1".to_owned(),
            size_bytes: 1,
            needed_by: needed_by.iter().map(|who| (*who).to_owned()).collect(),
            kept_until: is_wanted.then_some(jiff::Timestamp::MAX),
        };
        let images = [image("web", 1, false), image("old", 7, false)];
        let found = |needed_by: &[&str], is_wanted: bool| {
            let (needless, wanted) = needless(vec![kernel(needed_by, is_wanted)], &images);
            (needless.len(), wanted.len())
        };
        assert_eq!(found(&[], false), (1, 0));
        assert_eq!(found(&[], true), (0, 1));
        assert_eq!(found(&["image/web:1", "image/old:7"], false), (1, 0));
        assert_eq!(found(&["image/web:1", "image/web:2"], false), (0, 0));
        assert_eq!(found(&["image/web:1", "vm/web"], true), (0, 0));
        assert_eq!(found(&["snapshot/web/before"], false), (0, 0));
    }

    #[test]
    fn images_and_kernels_are_counted_with_their_bytes() {
        let image = || Unused::Image(image("web", 1, false));
        let kernel = Kernel { digest: Digest::of(b"k"), release: String::new(), size_bytes: 3 << 20, needed_by: vec![], kept_until: None };
        assert_eq!(counted(&[]), "nothing");
        assert_eq!(counted(&[image(), image()]), "2 images (2 B)");
        assert_eq!(counted(&[image(), Unused::Kernel(kernel)]), "1 image (1 B) and 1 kernel (3 MiB)");
    }
}
