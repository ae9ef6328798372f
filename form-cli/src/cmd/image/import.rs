use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use form_image::{BuildEvent, Builder, BuiltImage, Cancel, Disk};
use form_types::{Name, Spec};

use crate::{
    cmd::build::show,
    deploy::build::{cache, observed},
    disk_file::DiskFile,
    failure::{Failure, Outcome},
    session::Session,
    signals,
};

/// Take an image in: one that `form image export` wrote, or the disk of a cloud image
///
/// Every byte of an image of ours is checked. Of a disk, raw or qcow2, the files of its system become the image, and the kernel among them is what
/// its VMs boot with. It is here whole or not at all. `form vm create --image NAME` runs it.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "A disk is known by its content. It needs an ext4 root with a kernel package installed, as the cloud images of Debian \
    and Ubuntu have it; neither cloud-init nor DHCP is used: users, names and addresses are given as to every VM."
)]
pub struct Args {
    /// An OCI image layout, as a tar file or directory; or a disk, raw or qcow2
    #[arg(value_name = "PATH", value_hint = clap::ValueHint::AnyPath)]
    from: PathBuf,
    /// What to call it; by default what it was called, or what the disk's file is called. Under another name it has another digest
    name: Option<Name>,
}

pub async fn run(args: Args, session: &Session) -> Outcome {
    std::fs::metadata(&args.from).map_err(|error| Failure::io("read", &args.from, &error))?;
    let image = if is_disk(&args.from)? { disk(args, session).await? } else { layout(args, session).await? };
    show(&image, session)
}

async fn layout(args: Args, session: &Session) -> Result<BuiltImage, Failure> {
    let (builder, cancel) = (Builder::new(cache()?), Cancel::new());
    let stop = cancel.clone();
    observed(session, &cancel, move |observer| {
        let text = format!("reading {}", args.from.display());
        observer.event(BuildEvent::StepStarted { index: 1, total: 1, line: None, text: &text });
        builder.import(&args.from, args.name.as_ref(), &stop, observer)
    })
    .await
}

async fn disk(args: Args, session: &Session) -> Result<BuiltImage, Failure> {
    let from = args.from.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let name = match args.name {
        Some(name) => name,
        None => named_after(&args.from)?,
    };
    let spec = spec(&name, &from)?;
    let (paths, cancel) = (cache()?, Cancel::new());
    std::fs::create_dir_all(paths.root()).map_err(|error| Failure::io("create", paths.root(), &error))?;
    let file = DiskFile::open(&args.from)?;
    let size = file.size();
    let (root, stop) = (paths.root().to_owned(), cancel.clone());
    let step = session.terminal.step(format!("reading {}", args.from.display()));
    let mut interrupts = signals::interrupts()?;
    let mut reading = tokio::task::spawn_blocking(move || file.plain(&root, || !stop.is_cancelled()));
    let file = loop {
        tokio::select! {
            read = &mut reading => break read.map_err(|error| Failure::failed(format!("the reader stopped: {error}")))??,
            _ = interrupts.recv() => cancel.cancel(),
        }
    };
    step.done("");
    let (builder, stop) = (Builder::new(paths), cancel.clone());
    observed(session, &cancel, move |observer| {
        let text = format!("making an image of {from}");
        observer.event(BuildEvent::StepStarted { index: 1, total: 1, line: None, text: &text });
        builder.import_disk(&Disk { file, size, from }, &spec, &stop, observer)
    })
    .await
}

/// Whether it is a disk and no archive. A tar file says so at 257 (POSIX.1-2017, pax, "ustar Interchange Format").
fn is_disk(path: &Path) -> Result<bool, Failure> {
    let unreadable = |error| Failure::io("read", path, &error);
    if path.is_dir() {
        return Ok(false);
    }
    let mut begin = Vec::new();
    File::open(path).and_then(|file| file.take(1024 + 0x3a).read_to_end(&mut begin)).map_err(unreadable)?;
    let at = |place: usize, mark: &[u8]| begin.get(place..).is_some_and(|rest| rest.starts_with(mark));
    Ok(at(0, b"QFI\xfb") || (!at(257, b"ustar") && (at(510, &[0x55, 0xaa]) || at(512, b"EFI PART") || at(1024 + 0x38, &[0x53, 0xef]))))
}

/// `debian-12-generic-amd64.qcow2` is called `debian-12-generic-amd64`.
fn named_after(path: &Path) -> Result<Name, Failure> {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    stem.parse().map_err(|error| {
        Failure::usage(format!("`{stem}` cannot be the image's name: {error}"))
            .hint(format!("say what to call it: `form image import {} NAME`", path.display()))
    })
}

/// How it runs: as a Formfile without anything would. Its own init is process 1.
fn spec(name: &Name, from: &str) -> Result<Spec, Failure> {
    let text = format!("NAME {name}\n");
    let checked = formfile::check("Formfile", &text, &formfile::LowerOptions { build_args: BTreeMap::new() });
    let mut spec = checked.spec.ok_or_else(|| Failure::failed(format!("there is no Formfile for an image called {name}")))?;
    from.clone_into(&mut spec.from);
    Ok(spec)
}
