//! The build context: which of its files a `COPY` means. Nothing outside of it can be named, not even through a symbolic link.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::Read,
    os::unix::{ffi::OsStrExt, fs::FileTypeExt, fs::PermissionsExt},
    path::{Component, Path, PathBuf},
};

use form_types::{Digest, spec::CopySource};
use glob::Pattern;

use crate::{base::file_digest, diff::XattrValue};

/// A file that lists what `COPY` never takes: one glob a line, `#` comments, `!` takes back.
pub(crate) const IGNORE_FILE: &str = ".formignore";

/// One thing to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    /// Path below the destination; empty when the destination is its name.
    pub below: PathBuf,
    pub mode: u32,
    pub content: Content,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    File { source: PathBuf, digest: Digest },
    Inline(String),
    Directory,
    Symlink(XattrValue),
}

/// What a source turned out to be.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    /// Its last part: its name in a destination directory. `None` for a directory, whose content is copied.
    pub name: Option<OsString>,
    pub items: Vec<Item>,
}

pub(crate) struct Context {
    root: PathBuf,
    ignore: Vec<(Pattern, bool)>,
}

impl Context {
    /// # Errors
    /// When the directory or its ignore file cannot be read.
    pub fn open(root: &Path) -> Result<Self, String> {
        let root = root.canonicalize().map_err(|error| format!("the build context {} cannot be read: {error}", root.display()))?;
        let mut ignore = Vec::new();
        if let Ok(text) = fs::read_to_string(root.join(IGNORE_FILE)) {
            for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
                let (line, keep) = line.strip_prefix('!').map_or((line, false), |line| (line, true));
                let pattern = line.trim_start_matches("./").trim_matches('/');
                ignore.push((Pattern::new(pattern).map_err(|error| format!("{IGNORE_FILE}: `{line}`: {error}"))?, keep));
            }
        }
        Ok(Self { root, ignore })
    }

    fn is_ignored(&self, path: &Path) -> bool {
        let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
        let relative = path.strip_prefix(&self.root).unwrap_or(path);
        let mut ignored = false;
        for (pattern, keep) in &self.ignore {
            if relative.ancestors().any(|part| !part.as_os_str().is_empty() && pattern.matches_path_with(part, options)) {
                ignored = !keep;
            }
        }
        ignored
    }

    /// Everything that the sources of one `COPY` mean, in order.
    ///
    /// # Errors
    /// Says which source is wrong and why.
    pub fn find(&self, sources: &[CopySource]) -> Result<Vec<Found>, String> {
        let mut all = Vec::new();
        for source in sources {
            match source {
                CopySource::Inline { name, text } => {
                    let item = Item { below: PathBuf::new(), mode: 0o644, content: Content::Inline(text.clone()) };
                    all.push(Found { name: Some(name.into()), items: vec![item] });
                }
                CopySource::Path(pattern) => {
                    for path in self.expand(pattern)? {
                        all.push(self.take(&path, pattern)?);
                    }
                }
            }
        }
        Ok(all)
    }

    /// Paths that a source names: itself, or what its globs match.
    fn expand(&self, pattern: &str) -> Result<Vec<PathBuf>, String> {
        let mut paths = vec![self.root.clone()];
        for component in Path::new(pattern).components() {
            let part = match component {
                Component::CurDir => continue,
                Component::Normal(part) => part,
                Component::RootDir | Component::Prefix(_) => {
                    return Err(format!("`{pattern}` is absolute: a source is a path below the directory of the Formfile"));
                }
                Component::ParentDir => {
                    return Err(format!(
                        "`{pattern}` leaves the build context: put what is to be copied below the directory of the Formfile"
                    ));
                }
            };
            let text = part.to_string_lossy();
            if text.contains(['*', '?', '[']) {
                let glob = Pattern::new(&text).map_err(|error| format!("`{pattern}` is no glob: {error}"))?;
                let mut matched = Vec::new();
                for directory in &paths {
                    let Ok(entries) = fs::read_dir(directory) else { continue };
                    let fits = |entry: &fs::DirEntry| {
                        let name = entry.file_name();
                        let name = name.to_string_lossy();
                        glob.matches(&name) && (text.starts_with('.') || !name.starts_with('.'))
                    };
                    matched.extend(entries.flatten().filter(fits).map(|entry| entry.path()));
                }
                matched.sort();
                paths = matched;
            } else {
                paths = paths.into_iter().map(|path| path.join(part)).collect();
            }
        }
        let is_glob = pattern.contains(['*', '?', '[']);
        paths.retain(|path| !is_glob || (path.symlink_metadata().is_ok() && !self.is_ignored(path)));
        match paths.iter().find(|path| self.is_ignored(path)) {
            _ if paths.is_empty() => Err(format!("nothing matches `{pattern}` in {}", self.root.display())),
            Some(_) => Err(format!("`{pattern}` is left out by {IGNORE_FILE}")),
            None => Ok(paths),
        }
    }

    fn take(&self, path: &Path, pattern: &str) -> Result<Found, String> {
        let real = path.canonicalize().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => format!("`{pattern}` does not exist in {}", self.root.display()),
            _ => format!("`{pattern}` cannot be read: {error}"),
        })?;
        if !real.starts_with(&self.root) {
            return Err(format!("`{pattern}` is a symbolic link out of the build context: copy the file itself there"));
        }
        let mut items = Vec::new();
        if real.is_dir() {
            self.walk(&real, Path::new(""), &mut items)?;
            return Ok(Found { name: None, items });
        }
        items.push(self.item(&real, PathBuf::new(), false)?);
        Ok(Found { name: path.file_name().map(ToOwned::to_owned), items })
    }

    fn walk(&self, directory: &Path, below: &Path, items: &mut Vec<Item>) -> Result<(), String> {
        let cannot = |error: std::io::Error| format!("{} cannot be read: {error}", directory.display());
        let mut entries = fs::read_dir(directory).map_err(cannot)?.collect::<Result<Vec<_>, _>>().map_err(cannot)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            if self.is_ignored(&path) {
                continue;
            }
            let below = below.join(entry.file_name());
            let item = self.item(&path, below.clone(), true)?;
            let is_directory = item.content == Content::Directory;
            items.push(item);
            if is_directory {
                self.walk(&path, &below, items)?;
            }
        }
        Ok(())
    }

    fn item(&self, path: &Path, below: PathBuf, keep_links: bool) -> Result<Item, String> {
        let cannot = |error: std::io::Error| format!("{} cannot be read: {error}", path.display());
        let meta = fs::symlink_metadata(path).map_err(cannot)?;
        let file_type = meta.file_type();
        let mode = meta.permissions().mode() & 0o7777;
        let content = if file_type.is_dir() {
            Content::Directory
        } else if file_type.is_symlink() && keep_links {
            let target = fs::read_link(path).map_err(cannot)?;
            if !self.stays_inside(path, &target) {
                return Err(format!("{} is a symbolic link out of the build context (to {})", path.display(), target.display()));
            }
            Content::Symlink(XattrValue(target.as_os_str().as_bytes().to_vec()))
        } else if file_type.is_file() {
            Content::File { source: path.to_owned(), digest: file_digest(path).map_err(|error| format!("{error}: {}", path.display()))? }
        } else if file_type.is_fifo() || file_type.is_socket() || file_type.is_char_device() || file_type.is_block_device() {
            return Err(format!("{} is no file, directory or symbolic link", path.display()));
        } else {
            return Err(format!("{} has an unknown type", path.display()));
        };
        Ok(Item { below, mode, content })
    }

    /// By its words alone: the target need not exist.
    fn stays_inside(&self, link: &Path, target: &Path) -> bool {
        let mut depth = link.strip_prefix(&self.root).map_or(0, |relative| relative.components().count().saturating_sub(1));
        for component in target.components() {
            match component {
                Component::RootDir | Component::Prefix(_) => return false,
                Component::ParentDir if depth == 0 => return false,
                Component::ParentDir => depth -= 1,
                Component::Normal(_) => depth += 1,
                Component::CurDir => {}
            }
        }
        true
    }
}

impl Content {
    /// What of it the key of a layer depends on.
    pub fn identity(&self) -> (&'static str, String) {
        match self {
            Self::File { digest, .. } => ("file", digest.to_string()),
            Self::Inline(text) => ("file", Digest::of(text.as_bytes()).to_string()),
            Self::Directory => ("directory", String::new()),
            Self::Symlink(target) => ("symlink", target.clone().into()),
        }
    }

    /// A reader of a file's content; `None` for what has none.
    pub fn open(&self) -> std::io::Result<Option<Box<dyn Read + '_>>> {
        match self {
            Self::File { source, .. } => Ok(Some(Box::new(File::open(source)?))),
            Self::Inline(text) => Ok(Some(Box::new(text.as_bytes()))),
            Self::Directory | Self::Symlink(_) => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::create_dir_all(root.join("src/deep")).unwrap();
        for (name, text) in [("a.py", "a"), ("b.py", "b"), (".hidden.py", "h"), ("src/x", "x"), ("src/deep/y", "y"), ("secret.key", "k")] {
            fs::write(root.join(name), text).unwrap();
        }
        std::os::unix::fs::symlink("deep/y", root.join("src/link")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.join("out")).unwrap();
        std::os::unix::fs::symlink("a.py", root.join("in")).unwrap();
        fs::write(root.join(IGNORE_FILE), "# keys\n*.key\nsrc/deep\n!src/deep/y\n").unwrap();
        directory
    }

    fn find(directory: &tempfile::TempDir, source: &str) -> Result<Vec<Found>, String> {
        Context::open(directory.path()).unwrap().find(&[CopySource::Path(source.to_owned())])
    }

    #[test]
    fn globs_directories_and_links() {
        let directory = context();
        let names: Vec<_> = find(&directory, "*.py").unwrap().into_iter().map(|found| found.name.unwrap()).collect();
        assert_eq!(names, ["a.py", "b.py"]);
        let found = find(&directory, "src").unwrap();
        let below: Vec<_> = found[0].items.iter().map(|item| item.below.display().to_string()).collect();
        assert_eq!(below, ["link", "x"]);
        let linked = find(&directory, "in").unwrap();
        assert_eq!(linked[0].name.as_deref(), Some("in".as_ref()));
        assert!(matches!(linked[0].items[0].content, Content::File { .. }));
    }

    #[test]
    fn nothing_outside_is_taken() {
        let directory = context();
        for (source, word) in [
            ("/etc/passwd", "absolute"),
            ("../x", "leaves"),
            ("src/../../x", "leaves"),
            ("out", "symbolic link out"),
            ("none", "does not exist"),
            ("*.c", "nothing matches"),
            ("secret.key", "left out"),
        ] {
            let error = find(&directory, source).unwrap_err();
            assert!(error.contains(word), "{source}: {error}");
        }
        std::os::unix::fs::symlink("../../etc", directory.path().join("src/escape")).unwrap();
        assert!(find(&directory, "src").unwrap_err().contains("symbolic link out"));
    }
}
