//! OCI image layouts (image specification 1.1, "OCI Image Layout Specification"): a directory, or a tar file of one.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufReader, BufWriter, Read, Write},
    os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use form_bundle::{Manifest, manifest::MEDIA_TYPE};
use form_types::{Digest, Name};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::{
    Artifact, Blob, pack, packs,
    take::{Source, Taken, Taking, renamed},
};
use crate::{
    BuildError, BuildEvent, BuildObserver, BuiltImage, Cancel, ImageStore, Original,
    block_store::BlockStore,
    error::IoContext,
    oci::{MAX_DOCUMENT, OCI_INDEX, OCI_MANIFEST, OciDigest},
};

const LAYOUT_FILE: &str = "oci-layout";
const INDEX_FILE: &str = "index.json";
const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// What is half done is called so, with something behind it.
const DRAFT: &str = ".form-export-";
/// A tar file with more names is no layout of ours.
const MAX_NAMES: usize = 100_000;
const MAX_INDEX: usize = 1000;

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    pub name: Name,
    pub version: u32,
    /// Of our own manifest: the image's digest.
    pub digest: Digest,
    /// Of the artifact's manifest.
    pub artifact: OciDigest,
    /// Bytes of all blobs.
    pub size: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    manifests: Vec<Blob>,
}

fn blob_path(digest: &OciDigest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Takes the files of a layout.
trait Sink {
    fn add(&mut self, path: &str, bytes: &[u8]) -> Result<(), BuildError>;
}

struct DirectorySink<'a>(&'a Path);

impl Sink for DirectorySink<'_> {
    fn add(&mut self, path: &str, bytes: &[u8]) -> Result<(), BuildError> {
        let path = self.0.join(path);
        let mut file = File::create(&path).during("create", &path)?;
        file.write_all(bytes).and_then(|()| file.sync_all()).during("write", &path)
    }
}

struct TarSink<'a, W: Write> {
    builder: tar::Builder<W>,
    path: &'a Path,
}

impl<W: Write> Sink for TarSink<'_, W> {
    fn add(&mut self, path: &str, bytes: &[u8]) -> Result<(), BuildError> {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(bytes.len() as u64);
        // No owner and no time: the same image is the same file.
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        self.builder.append_data(&mut header, path, bytes).during("write", self.path)
    }
}

/// Whether an image can be written to `to`: nothing is there, or an empty directory where one is wanted.
pub(crate) fn check_free(to: &Path, is_directory: bool) -> Result<(), BuildError> {
    let is_free = match fs::symlink_metadata(to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(error) => return Err(error).during("examine", to),
        Ok(meta) if is_directory && meta.is_dir() => fs::read_dir(to).during("list", to)?.next().is_none(),
        Ok(_) => false,
    };
    if is_free { Ok(()) } else { Err(BuildError::Exists { path: to.to_owned() }) }
}

/// Writes an image to `to`, which is not there yet: a directory (also an empty one that is there) or a tar file. It appears whole or not at all.
///
/// # Errors
/// When a block is damaged, something is at `to`, the disk is full, or it is cancelled.
pub(crate) fn export(
    original: &Original,
    to: &Path,
    is_directory: bool,
    cancel: &Cancel,
    observer: &mut dyn BuildObserver,
) -> Result<Exported, BuildError> {
    let exists = || BuildError::Exists { path: to.to_owned() };
    check_free(to, is_directory)?;
    let place = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut draft = tempfile::Builder::new();
    draft.prefix(DRAFT);
    if is_directory {
        let draft = draft.permissions(fs::Permissions::from_mode(0o755)).tempdir_in(place).during("create a directory in", place)?;
        fs::create_dir_all(draft.path().join("blobs/sha256")).during("create", draft.path())?;
        let exported = write(original, &mut DirectorySink(draft.path()), cancel, observer)?;
        match fs::rename(draft.path(), to) {
            Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory) => return Err(exists()),
            renamed => renamed.during("create", to)?,
        }
        return Ok(exported);
    }
    let draft = draft.permissions(fs::Permissions::from_mode(0o666)).tempfile_in(place).during("create a file in", place)?;
    let exported = {
        let mut sink = TarSink { builder: tar::Builder::new(BufWriter::with_capacity(1 << 20, draft.as_file())), path: to };
        let exported = write(original, &mut sink, cancel, observer)?;
        let TarSink { builder, .. } = sink;
        let flushed = builder.into_inner().and_then(|buffer| buffer.into_inner().map_err(|error| error.into_error()));
        flushed.and_then(File::sync_all).during("write", to)?;
        exported
    };
    match draft.persist_noclobber(to) {
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Err(exists()),
        Err(error) => Err(error.error).during("create", to),
        Ok(_) => Ok(exported),
    }
}

fn write(original: &Original, sink: &mut dyn Sink, cancel: &Cancel, observer: &mut dyn BuildObserver) -> Result<Exported, BuildError> {
    sink.add(LAYOUT_FILE, LAYOUT)?;
    let config = Blob::of(MEDIA_TYPE, &original.text);
    sink.add(&blob_path(&config.digest), &original.text)?;
    let packs = packs(&original.manifest.rootfs.blocks);
    let (count, mut layers, mut size) = (packs.len(), Vec::new(), config.size);
    let mut written = std::collections::BTreeSet::new();
    for (index, digests) in packs.iter().enumerate() {
        if cancel.is_cancelled() {
            return Err(BuildError::Interrupted);
        }
        let bytes = pack(original, digests)?;
        let blob = Blob::of(super::PACK_TYPE, &bytes);
        // Two regions may hold the same.
        if written.insert(blob.digest) {
            sink.add(&blob_path(&blob.digest), &bytes)?;
            size += blob.size;
        }
        observer.event(BuildEvent::Output { line: &format!("pack {} of {count}", index + 1) });
        layers.push(blob);
    }
    let artifact = serde_json::to_vec(&Artifact::new(&original.name, config, layers))?;
    let descriptor = Blob::of(OCI_MANIFEST, &artifact);
    sink.add(&blob_path(&descriptor.digest), &artifact)?;
    let (artifact, size) = (descriptor.digest, size + descriptor.size);
    let index = Index { schema_version: 2, media_type: OCI_INDEX.to_owned(), manifests: vec![descriptor] };
    sink.add(INDEX_FILE, &serde_json::to_vec(&index)?)?;
    Ok(Exported { name: original.name.clone(), version: original.version, digest: original.digest, artifact, size })
}

/// A layout to read.
enum Layout {
    Directory(PathBuf),
    /// Where each file's bytes are.
    Archive(File, HashMap<String, (u64, u64)>),
}

/// A part of a file.
struct Part<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

impl Layout {
    fn open(path: &Path, taking: &Taking<'_>) -> Result<Self, BuildError> {
        if fs::metadata(path).during("read", path)?.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let file = File::open(path).during("read", path)?;
        let mut begin = [0; 6];
        let count = file.read_at(&mut begin, 0).during("read", path)?;
        if matches!(&begin[..count], [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd, ..] | [0xfd, b'7', b'z', b'X', b'Z', 0]) {
            return Err(taking.refuse("it is compressed: unpack it first (`gunzip`, `unzstd` or `unxz`)"));
        }
        let no_tar = |error: io::Error| taking.refuse(format!("it is no tar file of an OCI image layout: {error}"));
        let mut archive = tar::Archive::new(BufReader::new(&file));
        let mut files = HashMap::new();
        for entry in archive.entries_with_seek().map_err(no_tar)? {
            let entry = entry.map_err(no_tar)?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let name = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_owned();
            files.insert(name, (entry.raw_file_position(), entry.size()));
            if files.len() > MAX_NAMES {
                return Err(taking.refuse("it has too many files for an OCI image layout"));
            }
        }
        Ok(Self::Archive(file, files))
    }

    fn file<'s>(&'s self, path: &str) -> io::Result<Box<dyn Read + 's>> {
        match self {
            Self::Directory(directory) => {
                // A pipe that nobody writes to would be waited for without end.
                let flags = OFlags::NONBLOCK.bits().cast_signed();
                let file = File::options().read(true).custom_flags(flags).open(directory.join(path))?;
                match file.metadata()?.is_file() {
                    true => Ok(Box::new(file)),
                    false => Err(io::Error::other("it is no ordinary file")),
                }
            }
            Self::Archive(file, files) => {
                let (at, left) = *files.get(path).ok_or(io::ErrorKind::NotFound)?;
                Ok(Box::new(Part { file, at, left }))
            }
        }
    }

    /// A short file; `None` when there is none.
    fn document(&self, path: &str, taking: &Taking<'_>) -> Result<Option<Vec<u8>>, BuildError> {
        let reader = match self.file(path) {
            Ok(reader) => reader,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(taking.refuse(format!("{path} cannot be read: {error}"))),
        };
        let mut bytes = Vec::new();
        let read = reader.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes);
        read.map_err(|error| taking.refuse(format!("{path} cannot be read: {error}")))?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(taking.refuse(format!("{path} is too long")));
        }
        Ok(Some(bytes))
    }

    /// The one image of ours that is in it.
    fn artifact(&self, taking: &Taking<'_>) -> Result<Artifact, BuildError> {
        let missing = |what: &str| taking.refuse(format!("it is no OCI image layout: {what} is missing or malformed"));
        if self.document(LAYOUT_FILE, taking)?.is_none() {
            return Err(missing(LAYOUT_FILE));
        }
        let index = self.document(INDEX_FILE, taking)?.ok_or_else(|| missing(INDEX_FILE))?;
        let index: Index = serde_json::from_slice(&index).map_err(|_| missing(INDEX_FILE))?;
        let mut found = Vec::new();
        for descriptor in index.manifests.iter().take(MAX_INDEX) {
            let path = blob_path(&descriptor.digest);
            let Some(bytes) = self.document(&path, taking)? else {
                return Err(taking.refuse(format!("{path} is missing")));
            };
            if OciDigest::of(&bytes) != descriptor.digest {
                return Err(taking.refuse(format!("{path} is damaged")));
            }
            found.extend(Artifact::parse(&bytes).map_err(|reason| taking.refuse(reason))?);
        }
        match (found.pop(), found.is_empty()) {
            (Some(artifact), true) => Ok(artifact),
            (Some(_), false) => Err(taking.refuse("it holds several images: write each to a file of its own")),
            (None, _) => Err(taking.refuse(
                "it holds no image that `form image export` wrote; one of a container tool gets here by a registry (`form image pull`), \
                 and the files of a machine by `FROM ./rootfs.tar`",
            )),
        }
    }
}

impl Source for Layout {
    fn open<'s>(&'s self, blob: &Blob) -> io::Result<Box<dyn Read + 's>> {
        self.file(&blob_path(&blob.digest))
    }
}

/// Takes the image of a layout into the store, under `name` when one is given. The caller holds the cache's lock.
///
/// # Errors
/// When it is none of ours, not whole, the disk is full, or it is cancelled; nothing of it is left then.
pub(crate) fn import(
    (store, blocks): (&ImageStore, &BlockStore),
    from: &Path,
    name: Option<&Name>,
    cancel: &Cancel,
    observer: &mut dyn BuildObserver,
) -> Result<BuiltImage, BuildError> {
    let shown = from.display().to_string();
    let taking = Taking { from: &shown, cancel };
    let layout = Layout::open(from, &taking)?;
    let artifact = layout.artifact(&taking)?;
    take((store, blocks), &artifact, &layout, name, &taking, observer)
}

/// Takes an image whose blobs are in `source`.
///
/// # Errors
/// As [`import`].
pub(crate) fn take(
    (store, blocks): (&ImageStore, &BlockStore),
    artifact: &Artifact,
    source: &dyn Source,
    name: Option<&Name>,
    taking: &Taking<'_>,
    observer: &mut dyn BuildObserver,
) -> Result<BuiltImage, BuildError> {
    let (manifest, taken) = take_blocks(blocks, artifact, source, taking, observer)?;
    let manifest = match name {
        Some(name) => renamed(manifest, name)?,
        None => manifest,
    };
    let image = BuiltImage::keep(store, manifest)?;
    taken.keep();
    Ok(image)
}

/// Takes the blocks of an image alone. They go again unless they are kept.
///
/// # Errors
/// As [`import`].
pub(crate) fn take_blocks<'b>(
    blocks: &'b BlockStore,
    artifact: &Artifact,
    source: &dyn Source,
    taking: &Taking<'_>,
    observer: &mut dyn BuildObserver,
) -> Result<(Manifest, Taken<'b>), BuildError> {
    let manifest = taking.manifest(artifact, source)?;
    let mut taken = Taken::new(blocks, &manifest.rootfs.blocks);
    let count = artifact.layers.len();
    for (index, blob) in artifact.layers.iter().enumerate() {
        taken.pack(taking, source, blob, index + 1)?;
        observer.event(BuildEvent::Output { line: &format!("pack {} of {count}: checked", index + 1) });
    }
    taken.check(taking)?;
    Ok((manifest, taken))
}
