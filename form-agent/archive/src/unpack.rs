//! From a stream into the file system.

use std::{
    cmp::Reverse,
    collections::HashSet,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Read},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Component, Path, PathBuf},
    rc::Rc,
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags},
    io::Errno,
};
use tar::{Archive, Entry, EntryType};

use crate::{
    ArchiveError, Summary,
    error::{failed, file},
    gauge::{Gauge, Gauged},
    place::{Attributes, Ids, Place, beside},
    tree::{self, MAX_DEPTH},
};

/// Where a stream goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// As `cp` has it: below this directory when it is one, under the name that the stream gives; else as [`Target::Exactly`].
    Path(PathBuf),
    /// The one thing in the stream becomes this path, whatever the stream calls it. A directory goes into one that is there.
    Exactly(PathBuf),
    /// Everything, under its own names, below this directory.
    Into(PathBuf),
}

/// Whose the files will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Of who unpacks.
    Mine,
    Of {
        uid: u32,
        gid: u32,
    },
    /// As the stream says.
    Kept,
}

/// Unpacks all of `input`. Everything that was written is on the disk when `sync` asks for it.
///
/// # Errors
/// When the target cannot be, the file system refuses, or the stream breaks off; what was written of a new directory, or of one file,
/// is removed then. In a directory that was there before, files that had arrived whole stay.
pub fn unpack(mut input: impl Read, target: &Target, owner: Owner, sync: bool) -> Result<Summary, ArchiveError> {
    let mut unpacker = Unpacker::new(target, owner)?;
    let result = unpacker.all(&mut input);
    if let (Err(_), Some((temporary, _))) = (&result, &unpacker.staged) {
        // What cannot be removed bears our mark in its name.
        let _ = fs::remove_dir_all(unpacker.shown.join(temporary));
    }
    result?;
    if sync {
        unpacker.sync()?;
    }
    Ok(unpacker.summary)
}

/// Whether something can go there at all, before any of it has come.
///
/// # Errors
/// When the directory is missing that it would go into.
pub fn check(target: &Target) -> Result<(), ArchiveError> {
    Unpacker::new(target, Owner::Mine).map(drop)
}

struct Unpacker {
    owner: Owner,
    /// The directory in which all names begin, and what it is called.
    base: Rc<OwnedFd>,
    shown: PathBuf,
    /// Names go below it as they are; else the stream has one top, and this is about that.
    is_many: bool,
    /// What the top has to be called; else as the stream calls it.
    wanted: Option<OsString>,
    /// Only a directory may be the top: the path ends in `/`.
    is_directory_wanted: bool,
    /// What the top is called in `base`.
    top: Option<OsString>,
    /// A new directory is made under another name first: that, and its own.
    staged: Option<(OsString, OsString)>,
    /// Where the last entry went: the next one mostly goes there too.
    last: Option<(Vec<OsString>, Rc<OwnedFd>)>,
    /// Directories of ours for which no entry has come yet.
    implied: HashSet<Vec<OsString>>,
    /// Directories get mode and time when nothing is written into them any more.
    deferred: Vec<(Vec<OsString>, Attributes)>,
    summary: Summary,
}

impl Unpacker {
    fn new(target: &Target, owner: Owner) -> Result<Self, ArchiveError> {
        let (directory, wanted) = match target {
            Target::Into(directory) => (directory.as_path(), None),
            Target::Path(path) if path.is_dir() => (path.as_path(), None),
            Target::Path(path) | Target::Exactly(path) => {
                let name = path.file_name().ok_or_else(|| ArchiveError::Missing(path.clone()))?;
                let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                (parent.unwrap_or(Path::new(".")), Some(name.to_owned()))
            }
        };
        let path = match target {
            Target::Into(path) | Target::Path(path) | Target::Exactly(path) => path,
        };
        let base = tree::named(directory).map_err(|errno| match errno {
            Errno::NOTDIR => ArchiveError::Invalid(format!("{} is no directory", directory.display())),
            errno => failed("open", directory)(errno),
        })?;
        Ok(Self {
            owner,
            base: Rc::new(base),
            shown: directory.to_owned(),
            is_many: matches!(target, Target::Into(_)),
            is_directory_wanted: path.as_os_str().as_bytes().ends_with(b"/"),
            wanted,
            top: None,
            staged: None,
            last: None,
            implied: HashSet::new(),
            deferred: Vec::new(),
            summary: Summary::default(),
        })
    }

    fn all<R: Read>(&mut self, input: &mut R) -> Result<(), ArchiveError> {
        let gauge = Gauge::default();
        let mut archive = Archive::new(Gauged { input: &mut *input, gauge: &gauge });
        let mut entries = archive.entries().map_err(|error| gauge.judge(error))?;
        loop {
            gauge.headers();
            let before = gauge.taken();
            let Some(entry) = entries.next() else {
                // The end is a block of zeros (POSIX pax, "ustar Interchange Format"), behind what fills the last block of content.
                if gauge.taken() - before < 512 {
                    let missing = io::Error::new(io::ErrorKind::UnexpectedEof, "the end of the tar stream is missing");
                    return Err(ArchiveError::Stream(missing));
                }
                break;
            };
            let mut entry = entry.map_err(|error| gauge.judge(error))?;
            gauge.content();
            self.entry(&mut entry, &gauge)?;
            // What is not wanted is content too.
            io::copy(&mut entry, &mut io::sink()).map_err(|error| gauge.judge(error))?;
        }
        if !self.is_many && self.top.is_none() {
            return Err(ArchiveError::Invalid("the copy holds nothing".to_owned()));
        }
        // Only a stream that has come to its end is whole.
        io::copy(input, &mut io::sink()).map_err(ArchiveError::Stream)?;
        // The deepest first: what is above may close the way.
        self.deferred.sort_by_key(|(names, _)| Reverse(names.len()));
        for (names, attributes) in std::mem::take(&mut self.deferred) {
            let Some((name, parents)) = names.split_last() else { continue };
            let (parent, path) = (self.walk(parents)?, self.path(&names));
            let directory = tree::readable_below(&parent, name).map_err(failed("open", &path))?;
            attributes.apply(&File::from(directory), &path)?;
        }
        if let Some((temporary, name)) = self.staged.take() {
            let renamed = rustix::fs::renameat(&*self.base, &temporary, &*self.base, &name);
            renamed.map_err(|errno| {
                let error = failed("create", &self.shown.join(&name))(errno);
                self.staged = Some((temporary, name.clone()));
                error
            })?;
            self.top = Some(name);
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), ArchiveError> {
        let open = |path: &Path| tree::readable(path).and_then(|directory| rustix::fs::syncfs(&directory));
        open(&self.shown).map_err(failed("write", &self.shown))?;
        // It may be where another file system is mounted.
        let top = self.top.as_ref().map(|top| self.shown.join(top));
        match top.filter(|top| top.is_dir()) {
            Some(top) => open(&top).map_err(failed("write", &top)),
            None => Ok(()),
        }
    }

    /// What a person calls it.
    fn path(&self, names: &[OsString]) -> PathBuf {
        names.iter().enumerate().fold(self.shown.clone(), |path, (depth, name)| match &self.staged {
            Some((temporary, wanted)) if depth == 0 && name == temporary => path.join(wanted),
            _ => path.join(name),
        })
    }

    /// Where an entry goes, as names from `base` on.
    fn place_of<R: Read>(&mut self, entry: &Entry<'_, R>) -> Result<Vec<OsString>, ArchiveError> {
        let mut names = names_of(Path::new(OsStr::from_bytes(&entry.path_bytes())))?;
        if !self.is_many
            && let Some(first) = names.first_mut()
        {
            let top = match &self.top {
                Some(top) => top.clone(),
                None => self.begin(first, entry.header().entry_type())?,
            };
            *first = top;
        }
        Ok(names)
    }

    /// Decides what the top of the stream becomes.
    fn begin(&mut self, name: &OsStr, kind: EntryType) -> Result<OsString, ArchiveError> {
        let name = self.wanted.as_deref().unwrap_or(name).to_owned();
        let path = self.shown.join(&name);
        let before = tree::look(&self.base, &name).map_err(failed("open", &path))?;
        let is_directory = kind == EntryType::Directory;
        let refuse = |words: &str| Err(ArchiveError::Invalid(format!("{} {words}", path.display())));
        let is_named_directory = self.is_directory_wanted && self.wanted.is_some();
        let top = match before.map(|stat| tree::kind(&stat)) {
            None if is_directory => {
                let temporary = beside(&name);
                rustix::fs::mkdirat(&*self.base, &temporary, Mode::RWXU).map_err(failed("create", &path))?;
                self.implied.insert(vec![temporary.clone()]);
                self.staged = Some((temporary.clone(), name));
                temporary
            }
            None if is_named_directory => return Err(ArchiveError::Missing(path)),
            Some(kind) if is_named_directory && kind != FileType::Directory => return refuse("is no directory"),
            Some(FileType::Directory) if !is_directory => return refuse("is a directory"),
            Some(FileType::Directory) | None => name,
            Some(_) if is_directory => return refuse("is there already and is no directory"),
            // A link to what is no file is no place for one, as /dev/stdout.
            Some(FileType::Symlink) => match tree::beyond(&self.base, &name).map(|stat| tree::kind(&stat)) {
                None | Some(FileType::RegularFile) => name,
                Some(_) => return refuse("leads to what is no file"),
            },
            Some(_) => name,
        };
        self.top = Some(top.clone());
        Ok(top)
    }

    fn entry<R: Read>(&mut self, entry: &mut Entry<'_, R>, gauge: &Gauge) -> Result<(), ArchiveError> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        let is_plain = matches!(kind, EntryType::Directory | EntryType::Regular | EntryType::Continuous);
        let names = self.place_of(entry)?;
        let Some((name, parents)) = names.split_last() else { return Ok(()) };
        if !self.is_many && names.len() == 1 && !is_plain {
            return Err(ArchiveError::Invalid("the copy holds neither a file nor a directory".to_owned()));
        }
        let (parent, path) = (self.walk(parents)?, self.path(&names));
        let place = Place { parent: &parent, name, path: &path };
        let attributes = self.attributes(entry, gauge)?;
        match kind {
            EntryType::Directory => {
                if self.directory(&place, &names)? {
                    self.deferred.push((names, attributes));
                }
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.check_sparse(entry, gauge, &path)?;
                self.file(entry, gauge, &place, attributes)?;
            }
            EntryType::Symlink => {
                let link = link_name(entry)?;
                place.fill(|temporary| rustix::fs::symlinkat(&link, &*parent, temporary))?;
                place.own(attributes.owner)?;
            }
            EntryType::Link => {
                let mut original = names_of(&link_name(entry)?)?;
                if let (Some(first), Some(top), false) = (original.first_mut(), &self.top, self.is_many) {
                    first.clone_from(top);
                }
                self.hard_link(&place, &original)?;
            }
            _ => self.summary.skipped += 1,
        }
        Ok(())
    }

    /// Whether the directory is ours: one that was there before keeps mode, time and owner.
    fn directory(&mut self, place: &Place<'_>, names: &[OsString]) -> Result<bool, ArchiveError> {
        match rustix::fs::mkdirat(&**place.parent, place.name, Mode::RWXU) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => {
                tree::below(place.parent, place.name).map_err(|errno| not_through(errno, place.path))?;
                Ok(self.implied.remove(names))
            }
            Err(errno) => Err(failed("create", place.path)(errno)),
        }
    }

    /// A few bytes of a sparse file can stand for all that a disk holds: what we send ourselves has none.
    fn check_sparse<R: Read>(&self, entry: &mut Entry<'_, R>, gauge: &Gauge, path: &Path) -> Result<(), ArchiveError> {
        if entry.header().entry_type() == EntryType::GNUSparse && !self.is_many {
            return Err(ArchiveError::Invalid(format!("{} comes as a sparse file", path.display())));
        }
        let Some(extensions) = entry.pax_extensions().map_err(|error| gauge.judge(error))? else { return Ok(()) };
        for extension in extensions {
            if extension.map_err(|error| gauge.judge(error))?.key_bytes().starts_with(b"GNU.sparse.") {
                let words = format!("{} comes as a sparse file in the pax format: make the stream with `tar --format=gnu`", path.display());
                return Err(ArchiveError::Invalid(words));
            }
        }
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        gauge: &Gauge,
        place: &Place<'_>,
        attributes: Attributes,
    ) -> Result<(), ArchiveError> {
        let size = entry.size();
        let mut written = 0;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let temporary = beside(place.name);
        let opened = rustix::fs::openat(&**place.parent, &temporary, flags, Mode::RUSR | Mode::WUSR);
        let mut opened = File::from(opened.map_err(failed("create", place.path))?);
        let result = write(entry, gauge, &mut opened, place.path, &mut written).and_then(|()| {
            if written != size {
                return Err(ArchiveError::Stream(io::Error::new(io::ErrorKind::UnexpectedEof, "a file in it is cut off")));
            }
            attributes.apply(&opened, place.path)?;
            place.take(&temporary)
        });
        if result.is_err() {
            place.drop(&temporary);
        }
        self.summary.files += 1;
        self.summary.bytes += written;
        result
    }

    fn hard_link(&mut self, place: &Place<'_>, original: &[OsString]) -> Result<(), ArchiveError> {
        let path = self.path(original);
        let (name, parents) = original.split_last().ok_or_else(|| ArchiveError::Invalid("the copy holds a link to nothing".to_owned()))?;
        let parent = self.walk(parents)?;
        let there = tree::look(&parent, name).map_err(failed("link to", &path))?;
        if there.map(|stat| tree::kind(&stat)) != Some(FileType::RegularFile) {
            return Err(ArchiveError::Invalid(format!("{} is no file to link to", path.display())));
        }
        place.fill(|temporary| rustix::fs::linkat(&*parent, name, &**place.parent, temporary, AtFlags::empty()))
    }

    /// Mode, time and owner.
    fn attributes<R: Read>(&self, entry: &Entry<'_, R>, gauge: &Gauge) -> Result<Attributes, ArchiveError> {
        let header = entry.header();
        let owner = match self.owner {
            Owner::Mine => None,
            Owner::Of { uid, gid } => Some(Ids { uid, gid }),
            Owner::Kept => {
                let id = |id: io::Result<u64>| {
                    let id = id.map_err(|error| gauge.judge(error))?;
                    // The last number stands for "leave it" (chown(2)).
                    let known = u32::try_from(id).ok().filter(|id| *id != u32::MAX);
                    known.ok_or_else(|| ArchiveError::Invalid(format!("the copy has the owner or group {id}")))
                };
                Some(Ids { uid: id(header.uid())?, gid: id(header.gid())? })
            }
        };
        // Set-id bits were granted to another owner.
        let bits = if self.owner == Owner::Kept { 0o7777 } else { 0o1777 };
        let mode = header.mode().map_err(|error| gauge.judge(error))? & bits;
        Ok(Attributes { mode, mtime: header.mtime().map_err(|error| gauge.judge(error))?, owner })
    }

    /// The directory with these names, made where it is missing. Never through a link: that leads anywhere.
    fn walk(&mut self, names: &[OsString]) -> Result<Rc<OwnedFd>, ArchiveError> {
        if let Some((last, directory)) = &self.last
            && last == names
        {
            return Ok(Rc::clone(directory));
        }
        let mut at = Rc::clone(&self.base);
        for (depth, name) in names.iter().enumerate() {
            let so_far = names.get(..=depth).unwrap_or_default();
            let path = self.path(so_far);
            if tree::look(&at, name).map_err(failed("open", &path))?.is_none() {
                rustix::fs::mkdirat(&*at, name, Mode::from_raw_mode(0o777)).map_err(failed("create", &path))?;
                self.implied.insert(so_far.to_vec());
            }
            at = Rc::new(tree::below(&at, name).map_err(|errno| not_through(errno, &path))?);
        }
        self.last = Some((names.to_vec(), Rc::clone(&at)));
        Ok(at)
    }
}

fn not_through(errno: Errno, path: &Path) -> ArchiveError {
    match errno {
        Errno::NOTDIR | Errno::LOOP => {
            ArchiveError::Invalid(format!("{} is no directory, and the copy has a directory of that name", path.display()))
        }
        errno => failed("open", path)(errno),
    }
}

fn write<R: Read>(entry: &mut Entry<'_, R>, gauge: &Gauge, opened: &mut File, path: &Path, written: &mut u64) -> Result<(), ArchiveError> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = match entry.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(gauge.judge(error)),
        };
        io::Write::write_all(opened, buffer.get(..count).unwrap_or_default()).map_err(file("write", path))?;
        *written += count as u64;
    }
}

fn link_name<R: Read>(entry: &Entry<'_, R>) -> Result<PathBuf, ArchiveError> {
    let name = entry.link_name_bytes().filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| ArchiveError::Invalid("the copy holds a link to nothing".to_owned()))?;
    Ok(PathBuf::from(OsStr::from_bytes(&name)))
}

/// The names of a path in a stream, which has no business outside.
fn names_of(path: &Path) -> Result<Vec<OsString>, ArchiveError> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name.to_owned()),
            Component::CurDir => {}
            _ => return Err(ArchiveError::Invalid(format!("the copy holds the path {}, which leads outside", path.display()))),
        }
    }
    // One for the file in the last of them.
    if names.len() > MAX_DEPTH + 2 {
        return Err(ArchiveError::Invalid(format!("the copy is deeper than {MAX_DEPTH} directories")));
    }
    Ok(names)
}
