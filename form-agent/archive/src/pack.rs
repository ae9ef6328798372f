//! From the file system into a stream.

use std::{
    ffi::OsStr,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    fs::{FileType, Mode, OFlags, Stat},
    io::Errno,
};
use tar::{Builder, EntryType, Header};

use crate::{
    ArchiveError, Summary,
    error::{failed, file},
    tree::{self, MAX_DEPTH},
};

/// What the kernel makes up as it is read (`/proc`) says that it has no bytes: it is read whole first, so much of it at most.
const MAX_MADE_UP: u64 = 16 << 20;

/// Opening waits for nobody at the other end of a pipe, and takes no terminal.
const OPEN: OFlags = OFlags::NONBLOCK.union(OFlags::NOCTTY);

/// What is at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tree {
    pub is_directory: bool,
    /// Content of all files in it, in bytes; unknown when looking took too long.
    pub bytes: Option<u64>,
}

/// Looks at everything below `path`, for `limit` at most, to say how much there is to send.
///
/// # Errors
/// When there is nothing at `path`, or it cannot be looked at.
pub fn measure(path: &Path, limit: Duration) -> Result<Tree, ArchiveError> {
    let metadata = look(path)?;
    if metadata.is_file() {
        return Ok(Tree { is_directory: false, bytes: Some(metadata.len()) });
    }
    let directory = tree::readable(path).map_err(failed("read", path))?;
    let bytes = bytes_below(&directory, path, 0, Instant::now() + limit)?;
    Ok(Tree { is_directory: true, bytes })
}

/// A file or a directory, or an error.
fn look(path: &Path) -> Result<Metadata, ArchiveError> {
    let metadata = fs::metadata(path).map_err(file("read", path))?;
    if metadata.is_file() || metadata.is_dir() {
        return Ok(metadata);
    }
    Err(ArchiveError::Invalid(format!("{} is neither a file nor a directory", path.display())))
}

fn bytes_below(directory: &OwnedFd, path: &Path, depth: usize, until: Instant) -> Result<Option<u64>, ArchiveError> {
    check_depth(depth, path)?;
    let mut bytes = 0_u64;
    for name in tree::list(directory).map_err(failed("read", path))? {
        let path = path.join(&name);
        let Some(stat) = tree::look(directory, &name).map_err(failed("read", &path))? else { continue };
        let more = match tree::kind(&stat) {
            FileType::Directory => match unless_gone(tree::readable_below(directory, &name)).map_err(failed("read", &path))? {
                Some(below) => bytes_below(&below, &path, depth + 1, until)?,
                None => Some(0),
            },
            FileType::RegularFile => Some(size(&stat)),
            _ => Some(0),
        };
        match more {
            Some(more) if Instant::now() < until => bytes = bytes.saturating_add(more),
            _ => return Ok(None),
        }
    }
    Ok(Some(bytes))
}

fn check_depth(depth: usize, path: &Path) -> Result<(), ArchiveError> {
    if depth <= MAX_DEPTH {
        return Ok(());
    }
    Err(ArchiveError::Invalid(format!("{} is deeper than {MAX_DEPTH} directories", path.display())))
}

/// What vanishes while we look, or becomes something else, was not there.
fn unless_gone<T>(result: rustix::io::Result<T>) -> rustix::io::Result<Option<T>> {
    match result {
        Ok(there) => Ok(Some(there)),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::INVAL | Errno::NXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

fn size(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// Writes what is at `path` (a link there is followed) as a stream with one entry at its top, called `name`.
///
/// # Errors
/// When something cannot be read, or `out` takes no more.
pub fn pack(path: &Path, name: &OsStr, out: impl Write) -> Result<Summary, ArchiveError> {
    let mut packer = Packer { archive: Builder::new(out), summary: Summary::default() };
    let name = Path::new(name);
    if look(path)?.is_dir() {
        let directory = tree::readable(path).map_err(failed("read", path))?;
        let stat = rustix::fs::fstat(&directory).map_err(failed("read", path))?;
        packer.directory(&directory, path, name, &stat, 0)?;
    } else {
        let opened = OpenOptions::new().read(true).custom_flags(OPEN.bits().cast_signed()).open(path).map_err(file("read", path))?;
        packer.file(opened, path, name)?;
    }
    packer.archive.finish().map_err(ArchiveError::Stream)?;
    packer.archive.into_inner().and_then(|mut out| out.flush()).map_err(ArchiveError::Stream)?;
    Ok(packer.summary)
}

struct Packer<W: Write> {
    archive: Builder<W>,
    summary: Summary,
}

fn header(stat: &Stat, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header.set_size(0);
    header.set_entry_type(kind);
    header
}

impl<W: Write> Packer<W> {
    fn directory(&mut self, directory: &OwnedFd, path: &Path, name: &Path, stat: &Stat, depth: usize) -> Result<(), ArchiveError> {
        check_depth(depth, path)?;
        self.archive.append_data(&mut header(stat, EntryType::Directory), name, io::empty()).map_err(ArchiveError::Stream)?;
        for child in tree::list(directory).map_err(failed("read", path))? {
            let (path, name) = (path.join(&child), name.join(&child));
            let Some(stat) = tree::look(directory, &child).map_err(failed("read", &path))? else { continue };
            match tree::kind(&stat) {
                FileType::Directory => {
                    if let Some(below) = unless_gone(tree::readable_below(directory, &child)).map_err(failed("read", &path))? {
                        self.directory(&below, &path, &name, &stat, depth + 1)?;
                    }
                }
                FileType::Symlink => {
                    if let Some(target) =
                        unless_gone(rustix::fs::readlinkat(directory, &child, Vec::new())).map_err(failed("read", &path))?
                    {
                        let target = OsStr::from_bytes(target.to_bytes());
                        self.archive.append_link(&mut header(&stat, EntryType::Symlink), name, target).map_err(ArchiveError::Stream)?;
                    }
                }
                FileType::RegularFile => {
                    let flags = OPEN | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let opened = unless_gone(rustix::fs::openat(directory, &child, flags, Mode::empty())).map_err(failed("read", &path))?;
                    if let Some(opened) = opened {
                        self.file(File::from(opened), &path, &name)?;
                    }
                }
                _ => self.summary.skipped += 1,
            }
        }
        Ok(())
    }

    fn file(&mut self, mut opened: File, path: &Path, name: &Path) -> Result<(), ArchiveError> {
        let stat = rustix::fs::fstat(opened.as_fd()).map_err(failed("read", path))?;
        if tree::kind(&stat) != FileType::RegularFile {
            self.summary.skipped += 1;
            return Ok(());
        }
        let mut header = header(&stat, EntryType::Regular);
        let mut size = size(&stat);
        if size == 0 {
            let mut made_up = Vec::new();
            Read::by_ref(&mut opened).take(MAX_MADE_UP).read_to_end(&mut made_up).map_err(file("read", path))?;
            size = made_up.len() as u64;
            if size == MAX_MADE_UP {
                return Err(ArchiveError::Invalid(format!("{} does not say how long it is, and does not end", path.display())));
            }
            header.set_size(size);
            self.archive.append_data(&mut header, name, made_up.as_slice()).map_err(ArchiveError::Stream)?;
        } else {
            header.set_size(size);
            let mut content = Content { file: opened, left: size, fault: None };
            let sent = self.archive.append_data(&mut header, name, &mut content);
            if let Some(fault) = content.fault {
                return Err(file("read", path)(fault));
            }
            sent.map_err(ArchiveError::Stream)?;
        }
        self.summary.files += 1;
        self.summary.bytes += size;
        Ok(())
    }
}

/// Exactly the bytes that were announced, while the file may grow. One that has become shorter is a fault.
struct Content {
    file: File,
    left: u64,
    /// Told apart from faults of the stream.
    fault: Option<io::Error>,
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if limit == 0 {
            return Ok(0);
        }
        let read = match self.file.read(buffer.get_mut(..limit).unwrap_or_default()) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter while it was read")),
            other => other,
        };
        match read {
            Ok(count) => {
                self.left -= count as u64;
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let kind = error.kind();
                self.fault = Some(error);
                Err(kind.into())
            }
        }
    }
}
