//! Tar streams in both directions: how trees cross the border of the sandbox.
//!
//! Reading turns a stream into a [`Diff`] and puts the content of its files into a [`Spool`]; writing turns them back.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use form_types::Digest;
use tar::EntryType;

use crate::{
    BuildError,
    diff::{Diff, EPOCH, Entry, Kind, Meta, XattrValue},
    error::IoContext,
    sandbox::IDS,
    tree_path::TreePath,
};

/// What errors of a stream call it.
pub(crate) const STREAM: &str = "the tar stream";
const OPAQUE: &str = "user.overlay.opaque";
const XATTR_KEY: &str = "SCHILY.xattr.";

/// Contents of files, each in a plain file named by its digest. The editor of the file system reads them by name.
#[derive(Debug)]
pub(crate) struct Spool {
    directory: PathBuf,
}

impl Spool {
    /// # Errors
    /// When the directory cannot be made.
    pub fn create(directory: PathBuf) -> Result<Self, BuildError> {
        fs::create_dir_all(&directory).during("create", &directory)?;
        Ok(Self { directory })
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(digest.to_string())
    }

    /// Copies a stream in.
    ///
    /// # Errors
    /// Those of the stream and the disk.
    pub fn add(&self, reader: &mut dyn Read) -> Result<(u64, Digest), BuildError> {
        let temporary = self.directory.join("incoming");
        let mut file = File::create(&temporary).during("create", &temporary)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 128 << 10];
        let mut size = 0;
        loop {
            let count = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(BuildError::Io { action: "read", path: STREAM.into(), source }),
            };
            hasher.update(&buffer[..count]);
            file.write_all(&buffer[..count]).during("write", &temporary)?;
            size += count as u64;
        }
        let digest = Digest::from_bytes(*hasher.finalize().as_bytes());
        fs::rename(&temporary, self.path(&digest)).during("rename", &temporary)?;
        Ok((size, digest))
    }

    /// The content of a small file.
    ///
    /// # Errors
    /// When it is not there.
    pub fn read(&self, digest: &Digest) -> Result<Vec<u8>, BuildError> {
        let path = self.path(digest);
        fs::read(&path).during("read", path)
    }
}

/// How to read a stream.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The upper directory of an overlay: whiteouts remove.
    Overlay,
    /// A whole root file system.
    Root,
    /// A layer of an image of a registry: its whiteouts are names, which the caller understands.
    Layer,
}

fn stream_error(source: io::Error) -> BuildError {
    BuildError::Io { action: "read", path: STREAM.into(), source }
}

/// Reads a tar stream to its end.
///
/// Extension headers are read here and not by the `tar` crate, which ends a record at the first line break; but the value of an
/// extended attribute is any bytes.
///
/// # Errors
/// When the stream is broken, a path leaves the tree, or the disk is full.
pub(crate) fn read(stream: &mut dyn Read, origin: Origin, spool: &Spool) -> Result<Diff, BuildError> {
    let mut diff = Diff::default();
    let mut removed = Vec::new();
    read_each(stream, origin, spool, &mut removed, &mut |entry| {
        diff.entries.push(entry);
        Ok(())
    })?;
    diff.removed = removed;
    diff.normalise();
    // A layer's links may lead into what is below it.
    if origin == Origin::Root {
        check_links(&diff)?;
    }
    Ok(diff)
}

/// Reads a tar stream to its end, and hands on its entries as they come: with what is not normalised, and links that may lead nowhere.
///
/// # Errors
/// As [`read`], and those of `each`.
pub(crate) fn read_each(
    stream: &mut dyn Read,
    origin: Origin,
    spool: &Spool,
    removed: &mut Vec<TreePath>,
    each: &mut dyn FnMut(Entry) -> Result<(), BuildError>,
) -> Result<(), BuildError> {
    let mut archive = tar::Archive::new(stream);
    let mut extended = Extended::default();
    for entry in archive.entries().map_err(stream_error)?.raw(true) {
        let mut entry = entry.map_err(stream_error)?;
        if extended.take(&mut entry)? {
            continue;
        }
        let extended = std::mem::take(&mut extended);
        if let Some(entry) = read_entry(&mut entry, extended, origin, spool, removed)? {
            each(entry)?;
        }
    }
    Ok(())
}

/// A link that leads to nothing would be left out without a word.
fn check_links(diff: &Diff) -> Result<(), BuildError> {
    let leads_to_file = |target: &TreePath| {
        let found = diff.entries.binary_search_by(|entry| entry.path.cmp(target)).ok();
        found.is_some_and(|at| !matches!(diff.entries[at].kind, Kind::Link { .. } | Kind::Directory { .. }))
    };
    for entry in &diff.entries {
        if let Kind::Link { target } = &entry.kind
            && !leads_to_file(target)
        {
            let reason = format!("the hard link {} leads to {target}, which is no file of the archive: make the archive anew", entry.path);
            return Err(BuildError::FileSystem { reason });
        }
    }
    Ok(())
}

fn read_entry(
    entry: &mut tar::Entry<'_, impl Read>,
    extended: Extended,
    origin: Origin,
    spool: &Spool,
    removed: &mut Vec<TreePath>,
) -> Result<Option<Entry>, BuildError> {
    let header = entry.header();
    let entry_type = header.entry_type();
    let path = parse_path(&extended.path.unwrap_or_else(|| entry.header().path_bytes().into_owned()))?;
    if path.is_root() {
        // The root of an image is root's and has mode 0755, whatever the directory was that it was made in.
        return Ok(None);
    }
    let link = extended.link.or_else(|| header.link_name_bytes().map(|name| name.into_owned())).unwrap_or_default();
    let bad_link = link.is_empty() || link.len() > 4095 || link.contains(&0);
    if bad_link && matches!(entry_type, EntryType::Link | EntryType::Symlink) {
        return Err(BuildError::FileSystem { reason: format!("the link {path} has no usable target") });
    }
    let opaque = origin == Origin::Overlay && extended.xattrs.get(OPAQUE).is_some_and(|value| value.0 == b"y");
    let device = (header.device_major().ok().flatten().unwrap_or(0), header.device_minor().ok().flatten().unwrap_or(0));
    let number = |given: Option<u64>, own: io::Result<u64>| given.map_or_else(|| own.map_err(stream_error), Ok);
    let meta = Meta {
        mode: header.mode().map_err(stream_error)? & 0o7777,
        uid: narrow(number(extended.uid, header.uid())?, &path)?,
        gid: narrow(number(extended.gid, header.gid())?, &path)?,
        mtime: u32::try_from(number(extended.mtime, header.mtime())?).unwrap_or(EPOCH).min(EPOCH),
        xattrs: extended.xattrs.into_iter().filter(|(name, _)| is_kept(name)).collect(),
    };
    let kind = match entry_type {
        EntryType::Regular | EntryType::Continuous => {
            let size = header.entry_size().map_err(stream_error)?;
            if extended.size.is_some_and(|real| real != size) {
                return Err(BuildError::FileSystem {
                    reason: format!("{path} is larger than 8 GiB, which an image cannot hold: put it on a volume"),
                });
            }
            let (size, digest) = spool.add(entry)?;
            Kind::File { size, digest }
        }
        EntryType::Directory => Kind::Directory { opaque },
        EntryType::Link => Kind::Link { target: parse_path(&link)? },
        EntryType::Symlink => Kind::Symlink { target: XattrValue(link) },
        EntryType::Char if origin == Origin::Overlay && device == (0, 0) => {
            removed.push(path);
            return Ok(None);
        }
        EntryType::Char => Kind::Char { major: device.0, minor: device.1 },
        EntryType::Block => Kind::Block { major: device.0, minor: device.1 },
        EntryType::Fifo => Kind::Fifo,
        other => {
            return Err(BuildError::FileSystem {
                reason: format!("{path} has type {other:?} in the tar stream, which this version cannot store"),
            });
        }
    };
    Ok(Some(Entry { path, meta, kind }))
}

/// What extension headers say about the entry behind them (POSIX pax, and the long names of GNU tar).
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    uid: Option<u64>,
    gid: Option<u64>,
    size: Option<u64>,
    mtime: Option<u64>,
    xattrs: BTreeMap<String, XattrValue>,
}

/// No extension is longer: a path, a target and the attributes of one file.
const MAX_EXTENSION: u64 = 4 << 20;

impl Extended {
    /// Uses an entry up when it is an extension header.
    fn take(&mut self, entry: &mut tar::Entry<'_, impl Read>) -> Result<bool, BuildError> {
        let entry_type = entry.header().entry_type();
        if !matches!(entry_type, EntryType::XHeader | EntryType::XGlobalHeader | EntryType::GNULongName | EntryType::GNULongLink) {
            return Ok(false);
        }
        let mut bytes = Vec::new();
        entry.take(MAX_EXTENSION + 1).read_to_end(&mut bytes).map_err(stream_error)?;
        if bytes.len() as u64 > MAX_EXTENSION {
            return Err(stream_error(io::Error::other("an extension header is too long")));
        }
        let text = |bytes: &[u8]| bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
        match entry_type {
            EntryType::GNULongName => self.path = Some(text(&bytes)),
            EntryType::GNULongLink => self.link = Some(text(&bytes)),
            EntryType::XHeader => self.records(&bytes).ok_or_else(|| stream_error(io::Error::other("a pax header is malformed")))?,
            _ => {}
        }
        Ok(true)
    }

    /// Records are `LENGTH KEY=VALUE\n`, where the length counts the whole record.
    fn records(&mut self, mut bytes: &[u8]) -> Option<()> {
        while !bytes.is_empty() {
            let blank = bytes.iter().position(|byte| *byte == b' ')?;
            let length: usize = std::str::from_utf8(&bytes[..blank]).ok()?.parse().ok()?;
            let record = bytes.get(blank + 1..length)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|byte| *byte == b'=')?;
            let (key, value) = (std::str::from_utf8(&record[..equals]).ok()?, &record[equals + 1..]);
            self.record(key, value)?;
            bytes = &bytes[length..];
        }
        Some(())
    }

    fn record(&mut self, key: &str, value: &[u8]) -> Option<()> {
        let number = || std::str::from_utf8(value).ok()?.parse::<u64>().ok();
        match key {
            "path" => self.path = Some(value.to_vec()),
            "linkpath" => self.link = Some(value.to_vec()),
            "uid" => self.uid = Some(number()?),
            "gid" => self.gid = Some(number()?),
            "size" => self.size = Some(number()?),
            "mtime" => {
                // Seconds with a fraction; before 1970 is 1970.
                let text = std::str::from_utf8(value).ok()?;
                let seconds = text.split('.').next()?;
                self.mtime = Some(if seconds.starts_with('-') { 0 } else { seconds.parse().ok()? });
            }
            // The stored bytes of a file with holes are a map and its pieces.
            _ if key.starts_with("GNU.sparse.") => return None,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_KEY) {
                    self.xattrs.insert(name.to_owned(), XattrValue(value.to_vec()));
                }
            }
        }
        Some(())
    }
}

fn parse_path(bytes: &[u8]) -> Result<TreePath, BuildError> {
    TreePath::parse(bytes).map_err(|error| BuildError::FileSystem { reason: error.to_string() })
}

fn narrow(id: u64, path: &TreePath) -> Result<u32, BuildError> {
    u32::try_from(id).map_err(|_| BuildError::FileSystem { reason: format!("{path} belongs to id {id}, which does not fit 32 bits") })
}

/// Capabilities and what users attach. Labels of the building machine (SELinux) and overlayfs' own marks are not of the image.
fn is_kept(name: &str) -> bool {
    name == "security.capability" || (name.starts_with("user.") && !name.starts_with("user.overlay."))
}

/// Writes the entries of a layer as a tar stream that `tar -x` in the sandbox can unpack. Device nodes are left out, with all their
/// names: no user namespace may make them, and no build step needs them.
///
/// # Errors
/// Those of the stream; and when a content is not in the spool.
pub(crate) fn write(diff: &Diff, spool: &Spool, stream: &mut dyn Write) -> Result<(), BuildError> {
    let mut archive = tar::Builder::new(stream);
    let is_device = |entry: &&Entry| matches!(entry.kind, Kind::Char { .. } | Kind::Block { .. });
    let devices: BTreeSet<&TreePath> = diff.entries.iter().filter(is_device).map(|entry| &entry.path).collect();
    for entry in &diff.entries {
        if matches!(&entry.kind, Kind::Link { target } if devices.contains(target)) {
            continue;
        }
        write_entry(entry, spool, &mut archive)?;
    }
    archive.finish().map_err(write_error)
}

fn write_error(source: io::Error) -> BuildError {
    BuildError::Io { action: "write", path: STREAM.into(), source }
}

fn write_entry(entry: &Entry, spool: &Spool, archive: &mut tar::Builder<&mut dyn Write>) -> Result<(), BuildError> {
    let largest = entry.meta.uid.max(entry.meta.gid);
    if largest >= IDS {
        let reason = format!("{} belongs to id {largest}: the build sandbox has the ids 0 to {}", entry.path, IDS - 1);
        return Err(BuildError::FileSystem { reason });
    }
    let mut header = tar::Header::new_gnu();
    header.set_mode(entry.meta.mode);
    header.set_uid(entry.meta.uid.into());
    header.set_gid(entry.meta.gid.into());
    header.set_mtime(entry.meta.mtime.into());
    header.set_size(0);
    let records: Vec<(String, &[u8])> =
        entry.meta.xattrs.iter().map(|(name, value)| (format!("{XATTR_KEY}{name}"), value.0.as_slice())).collect();
    if !records.is_empty() {
        archive.append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), *value))).map_err(write_error)?;
    }
    // The leading `./` keeps names such as `-C` from being anything but names.
    let path = Path::new(".").join(entry.path.to_path());
    match &entry.kind {
        Kind::File { size, digest } => {
            header.set_entry_type(EntryType::Regular);
            header.set_size(*size);
            let source = spool.path(digest);
            let file = File::open(&source).during("open", source)?;
            archive.append_data(&mut header, path, file).map_err(write_error)
        }
        Kind::Directory { .. } => {
            header.set_entry_type(EntryType::Directory);
            archive.append_data(&mut header, path, io::empty()).map_err(write_error)
        }
        Kind::Link { target } => {
            header.set_entry_type(EntryType::Link);
            archive.append_link(&mut header, path, Path::new(".").join(target.to_path())).map_err(write_error)
        }
        Kind::Symlink { target } => {
            use std::os::unix::ffi::OsStrExt;
            header.set_entry_type(EntryType::Symlink);
            archive.append_link(&mut header, path, Path::new(std::ffi::OsStr::from_bytes(&target.0))).map_err(write_error)
        }
        Kind::Fifo => {
            header.set_entry_type(EntryType::Fifo);
            archive.append_data(&mut header, path, io::empty()).map_err(write_error)
        }
        Kind::Char { .. } | Kind::Block { .. } => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &[u8]) -> TreePath {
        TreePath::parse(text).unwrap()
    }

    #[test]
    fn there_and_back() {
        let directory = tempfile::tempdir().unwrap();
        let spool = Spool::create(directory.path().join("spool")).unwrap();
        let (size, digest) = spool.add(&mut &b"content"[..]).unwrap();
        let mut meta = Meta::new(0o4755, 1000, 65535);
        meta.xattrs.insert("security.capability".to_owned(), XattrValue(vec![1, 0, 0, 2, 0, b'\n', 255]));
        let long = [b"dir/".as_slice(), &[b'n'; 200]].concat();
        let mut diff = Diff {
            removed: vec![],
            entries: vec![
                Entry { path: path(b"dir"), meta: Meta::new(0o1777, 0, 0), kind: Kind::Directory { opaque: false } },
                Entry { path: path(b"dir/sp ace\n\"q\xff"), meta: meta.clone(), kind: Kind::File { size, digest } },
                Entry { path: path(&long), meta, kind: Kind::Link { target: path(b"dir/sp ace\n\"q\xff") } },
                Entry { path: path(b"sym"), meta: Meta::new(0o777, 0, 0), kind: Kind::Symlink { target: XattrValue(vec![b't'; 300]) } },
                Entry { path: path(b"pipe"), meta: Meta::new(0o600, 0, 0), kind: Kind::Fifo },
            ],
        };
        diff.normalise();
        let mut with_devices = diff.clone();
        let device = Kind::Char { major: 1, minor: 3 };
        with_devices.entries.push(Entry { path: path(b"null"), meta: Meta::new(0o666, 0, 0), kind: device });
        let other_name = Kind::Link { target: path(b"null") };
        with_devices.entries.push(Entry { path: path(b"zilch"), meta: Meta::new(0o666, 0, 0), kind: other_name });
        let mut bytes = Vec::new();
        write(&with_devices, &spool, &mut bytes).unwrap();
        let mut back = read(&mut bytes.as_slice(), Origin::Root, &spool).unwrap();
        // A link's own attributes are those of its file, and a stream does not repeat extended ones.
        for entry in &mut back.entries {
            if matches!(entry.kind, Kind::Link { .. }) {
                entry.meta = diff.entries.iter().find(|other| other.path == entry.path).unwrap().meta.clone();
            }
        }
        assert_eq!(back, diff);
    }

    /// A root file system of empty files and these hard links, read.
    fn read_links(links: &[(&str, &str)]) -> Result<Diff, BuildError> {
        let mut bytes = Vec::new();
        let mut archive = tar::Builder::new(&mut bytes);
        let mut header = tar::Header::new_gnu();
        for number in [0, 1] {
            header.set_size(0);
            header.set_mode(0o755);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            let (kind, name) = [(EntryType::Regular, "file"), (EntryType::Directory, "directory")][number];
            header.set_entry_type(kind);
            archive.append_data(&mut header, name, io::empty()).unwrap();
        }
        header.set_entry_type(EntryType::Link);
        for (name, target) in links {
            archive.append_link(&mut header, name, target).unwrap();
        }
        drop(archive);
        let directory = tempfile::tempdir().unwrap();
        let spool = Spool::create(directory.path().to_owned()).unwrap();
        read(&mut bytes.as_slice(), Origin::Root, &spool)
    }

    #[test]
    fn hard_links_lead_to_files_of_the_archive() {
        assert_eq!(read_links(&[("a", "file"), ("b", "a")]).unwrap().entries.len(), 4);
        for (links, culprit) in [
            (vec![("a", "missing")], "/a"),
            (vec![("a", "b"), ("b", "a")], "/a"),
            (vec![("a", "a")], "/a"),
            (vec![("a", "directory")], "/a"),
        ] {
            let error = read_links(&links).unwrap_err().to_string();
            assert!(error.contains("hard link") && error.contains(culprit), "{error}");
        }
    }

    #[test]
    fn whiteouts_remove_and_late_times_are_clamped() {
        let mut bytes = Vec::new();
        let mut archive = tar::Builder::new(&mut bytes);
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(EntryType::Char);
        header.set_device_major(0).unwrap();
        header.set_device_minor(0).unwrap();
        header.set_size(0);
        header.set_mode(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(4_000_000_000);
        archive.append_data(&mut header, "gone", io::empty()).unwrap();
        header.set_entry_type(EntryType::Directory);
        archive.append_pax_extensions([(format!("{XATTR_KEY}{OPAQUE}").as_str(), b"y".as_slice())]).unwrap();
        archive.append_data(&mut header, "new", io::empty()).unwrap();
        drop(archive);
        let directory = tempfile::tempdir().unwrap();
        let spool = Spool::create(directory.path().to_owned()).unwrap();
        let diff = read(&mut bytes.as_slice(), Origin::Overlay, &spool).unwrap();
        assert_eq!(diff.removed, [path(b"gone")]);
        assert_eq!((diff.entries[0].meta.mtime, diff.entries[0].meta.xattrs.len()), (EPOCH, 0));
        assert_eq!(diff.entries[0].kind, Kind::Directory { opaque: true });
    }
}
