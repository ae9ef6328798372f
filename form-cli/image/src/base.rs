//! `FROM`: where an image begins.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{BufReader, Read, Write},
    os::unix::{ffi::OsStrExt, fs::FileTypeExt, fs::MetadataExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use form_types::{Digest, ImageReference};
use lzma_rust2::XzReader;

use crate::{
    BuildError, Cancel, OciReference,
    apt::{self, Source},
    copy,
    diff::{Diff, EPOCH, Entry, Kind, Meta, XattrValue},
    error::IoContext,
    index::Index,
    kernel::XZ_MEMORY_KIB,
    sandbox::{CancellableRead, LineReader, keep_tail, kill},
    tarball::{self, Origin, Spool},
    tools::{self, search_path},
    tree_path::TreePath,
};

/// What a `FROM` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Base {
    Scratch,
    Directory(PathBuf),
    Tarball(PathBuf),
    Image(ImageReference),
    Release { distribution: &'static str, codename: &'static str },
    Registry(OciReference),
}

/// Releases by the names people write: distribution, version, code name.
const RELEASES: &[(&str, &str, &str)] = &[
    ("debian", "11", "bullseye"),
    ("debian", "12", "bookworm"),
    ("debian", "13", "trixie"),
    ("ubuntu", "20.04", "focal"),
    ("ubuntu", "22.04", "jammy"),
    ("ubuntu", "24.04", "noble"),
];

/// What a machine needs besides what apt itself needs: certificates for TLS, names of protocols, `ip` and `ps` for people.
const PACKAGES: &str = "ca-certificates,iproute2,netbase,procps";

/// Written into the image's dpkg configuration, so that `INSTALL` keeps to it.
const DPKG_OPTIONS: &[&str] = &[
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/lintian/*",
];

impl Base {
    /// Understands the argument of `FROM`; paths are below the build context. `default` is the registry of names without one.
    ///
    /// The names of distributions are theirs, whichever registry is configured: `FROM debian:12` means one thing.
    ///
    /// # Errors
    /// When it is none of ours.
    pub fn parse(from: &str, context: &Path, default: Option<&str>) -> Result<Self, BuildError> {
        let refuse = |reason: String| BuildError::Base { from: from.to_owned(), reason };
        if from == "scratch" {
            return Ok(Self::Scratch);
        }
        if let Some(reference) = from.strip_prefix("image:") {
            return reference.parse().map(Self::Image).map_err(|error: form_types::name::ImageReferenceError| refuse(error.to_string()));
        }
        if from.starts_with("./") || from.starts_with("../") || from.starts_with('/') || from == "." {
            let path = context.join(from);
            let meta = fs::metadata(&path).map_err(|error| refuse(format!("{} cannot be read: {error}", path.display())))?;
            return Ok(if meta.is_dir() { Self::Directory(path) } else { Self::Tarball(path) });
        }
        let (name, tag) = from.split_once(':').unwrap_or((from, ""));
        if RELEASES.iter().any(|(distribution, ..)| *distribution == name) {
            let found =
                RELEASES.iter().find(|(distribution, version, codename)| *distribution == name && (*version == tag || *codename == tag));
            let names = || RELEASES.iter().map(|(distribution, version, _)| format!("`{distribution}:{version}`")).collect::<Vec<_>>();
            return match found {
                Some((distribution, _, codename)) => Ok(Self::Release { distribution, codename }),
                None => {
                    let names = names().join(", ");
                    Err(refuse(format!("there are {names}; an image of this name in a registry is written with its host, `HOST/{from}`")))
                }
            };
        }
        OciReference::parse(from, default).map(Self::Registry).map_err(|source| BuildError::Registry { from: from.to_owned(), source })
    }
}

/// The machine's sources for a release.
///
/// # Errors
/// When the machine has none.
pub(crate) fn release_sources(from: &str, codename: &str) -> Result<Vec<Source>, BuildError> {
    tools::require(tools::BOOTSTRAP)?;
    let sources = apt::for_release(&apt::machine_sources(Path::new("/etc/apt"))?, codename);
    if sources.is_empty() {
        let reason = format!(
            "no mirror is configured for `{codename}`: bases come from the mirrors of this machine's apt, and none of them has this suite; \
             add a `deb` line for `{codename} main` to /etc/apt/sources.list.d/{codename}.list"
        );
        return Err(BuildError::Base { from: from.to_owned(), reason });
    }
    Ok(sources)
}

/// Bootstraps a release. Each line of progress goes to `each_line`.
///
/// # Errors
/// When `mmdebstrap` fails, or the build is cancelled.
pub(crate) fn bootstrap(
    codename: &str,
    sources: &[Source],
    spool: &Spool,
    cancel: &Cancel,
    mut each_line: impl FnMut(&str),
) -> Result<Diff, BuildError> {
    let mode = if rustix::process::geteuid().is_root() { "root" } else { "unshare" };
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--variant=minbase", "--format=tar", "--architectures=amd64"])
        .arg(format!("--mode={mode}"))
        .arg(format!("--include={PACKAGES}"));
    command.args(DPKG_OPTIONS.iter().map(|option| format!("--dpkgopt={option}")));
    for (key, value) in apt::fetch_options()? {
        command.arg(format!("--aptopt={key} \"{value}\""));
    }
    command.args([codename, "-", "-"]).env("PATH", search_path()).env("LC_ALL", "C.UTF-8").env("SOURCE_DATE_EPOCH", EPOCH.to_string());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().during("start", "mmdebstrap")?;
    let missing = || BuildError::Sandbox { reason: "mmdebstrap has no pipes".to_owned() };
    let lines: String = sources.iter().map(|source| source.line() + "\n").collect();
    // It reads all of them before it does anything; when it died first, its status says why.
    let _ = child.stdin.take().ok_or_else(missing)?.write_all(lines.as_bytes());
    let stdout = child.stdout.take().ok_or_else(missing)?;
    let progress = LineReader::start(child.stderr.take().ok_or_else(missing)?);
    let mut tail = Vec::new();
    let (result, status) = thread::scope(|scope| {
        let reader = scope.spawn(|| tarball::read(&mut BufReader::with_capacity(256 << 10, stdout), Origin::Root, spool));
        let progress = loop {
            match progress.next(&Cancel::new(), &mut child) {
                Ok(Some(line)) if !cancel.is_cancelled() => {
                    each_line(&line);
                    keep_tail(&mut tail, line);
                }
                Ok(None) => break Ok(()),
                Ok(Some(_)) => break Err(BuildError::Cancelled),
                Err(error) => break Err(error),
            }
        };
        if progress.is_err() {
            terminate(&mut child);
        }
        let status = child.wait().during("wait for", "mmdebstrap");
        let diff = reader.join().unwrap_or_else(|_| Err(BuildError::FileSystem { reason: "reading the base failed".to_owned() }));
        (progress.and(diff), status)
    });
    let status = status?;
    if cancel.is_cancelled() {
        return Err(BuildError::Cancelled);
    }
    if !status.success() {
        return Err(BuildError::Tool { program: "mmdebstrap", status: status.to_string(), tail });
    }
    let mut diff = result?;
    clean_release(&mut diff);
    clean_any(&mut diff, spool)?;
    Ok(diff)
}

/// Lets a program remove its temporary directory before it is killed.
fn terminate(child: &mut std::process::Child) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(10) {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    kill(child);
}

/// Drops what the bootstrap leaves behind and what differs from one to the next.
fn clean_release(diff: &mut Diff) {
    const FILES: &[&str] = &[
        "etc/apt/apt.conf.d/99mmdebstrap",
        "etc/hostname",
        "var/cache/ldconfig/aux-cache",
        "var/lib/dbus/machine-id",
        "var/lib/systemd/random-seed",
    ];
    const BELOW: &[&str] = &[
        "var/lib/apt/lists/",
        "var/cache/apt/",
        "tmp/",
        "var/tmp/",
        "usr/share/man/",
        "usr/share/info/",
        "usr/share/lintian/",
        "usr/share/locale/",
    ];
    diff.entries.retain(|entry| {
        let path = String::from_utf8_lossy(entry.path.as_bytes());
        let directory = matches!(entry.kind, Kind::Directory { .. });
        let log = path.starts_with("var/log/") && !directory;
        let old = (path.starts_with("var/lib/dpkg/") || path.starts_with("var/cache/debconf/") || path.starts_with("etc/"))
            && (path.ends_with("-old") || is_account_backup(&path));
        let document = path.starts_with("usr/share/doc/") && !directory && !path.ends_with("/copyright");
        let below = BELOW.iter().any(|prefix| path.starts_with(prefix)) && path != "usr/share/locale/locale.alias";
        !(log || old || document || below || FILES.contains(&path.as_ref()))
    });
}

/// `shadow` and its like write the file before a change beside the file.
fn is_account_backup(path: &str) -> bool {
    matches!(path, "etc/passwd-" | "etc/group-" | "etc/shadow-" | "etc/gshadow-" | "etc/subuid-" | "etc/subgid-")
}

/// Brings any base into the form that the sandbox and the guest expect: mount points, nothing in them, no identity.
///
/// # Errors
/// Those of the spool.
pub(crate) fn clean_any(diff: &mut Diff, spool: &Spool) -> Result<(), BuildError> {
    const MOUNT_POINTS: &[&str] = &["dev", "proc", "sys", "run"];
    diff.entries.retain(|entry| {
        let path = entry.path.as_bytes();
        let mounted = MOUNT_POINTS.iter().any(|point| path.strip_prefix(point.as_bytes()).is_some_and(|rest| rest.starts_with(b"/")));
        let lost = path == b"lost+found" || path.starts_with(b"lost+found/");
        !(mounted || lost)
    });
    let have = |diff: &Diff, path: &TreePath| diff.entries.iter().any(|entry| entry.path == *path);
    let path = |text: &str| TreePath::parse(text.as_bytes()).map_err(|error| BuildError::FileSystem { reason: error.to_string() });
    for (name, mode) in [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("tmp", 0o1777)] {
        let path = path(name)?;
        if !have(diff, &path) {
            diff.entries.push(Entry { path, meta: Meta::new(mode, 0, 0), kind: Kind::Directory { opaque: false } });
        }
    }
    if have(diff, &path("etc")?) {
        let (size, digest) = spool.add(&mut std::io::empty())?;
        // Empty means: not known yet. The guest fills in the resolver, and the machine's identity is made at its first boot.
        for name in ["etc/resolv.conf", "etc/machine-id"] {
            let path = path(name)?;
            if name == "etc/resolv.conf" || have(diff, &path) {
                diff.entries.push(Entry { path, meta: Meta::new(0o644, 0, 0), kind: Kind::File { size, digest } });
            }
        }
    }
    diff.normalise();
    Ok(())
}

/// Makes a directory with all that lead to it, unless the base has it.
///
/// # Errors
/// When the way to it is a circle of links, or blocked by a file.
pub(crate) fn make_directory(diff: &mut Diff, path: &str) -> Result<(), BuildError> {
    let fail = |reason: String| BuildError::FileSystem { reason };
    let mut index = Index::new();
    index.apply(diff);
    let path = TreePath::parse(path.as_bytes()).map_err(|error| fail(error.to_string()))?;
    let path = index.resolve(&path).ok_or_else(|| fail(format!("{path} leads through a circle of symbolic links in the image")))?;
    diff.entries.extend(copy::directory_diff(&index, &path).map_err(fail)?.entries);
    diff.normalise();
    Ok(())
}

/// Reads a root file system from a directory. What belongs to the caller belongs to root in the image.
///
/// # Errors
/// When something in it cannot be read.
pub(crate) fn from_directory(root: &Path, spool: &Spool, cancel: &Cancel) -> Result<Diff, BuildError> {
    let mut diff = Diff::default();
    let mut names: HashMap<(u64, u64), TreePath> = HashMap::new();
    let (own_uid, own_gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let mut waiting = vec![TreePath::root()];
    while let Some(directory) = waiting.pop() {
        let source = root.join(directory.to_path());
        for found in fs::read_dir(&source).during("list", &source)? {
            if cancel.is_cancelled() {
                return Err(BuildError::Cancelled);
            }
            let found = found.during("list", &source)?;
            let path = directory.join(found.file_name().as_bytes());
            let source = found.path();
            let file = fs::symlink_metadata(&source).during("examine", &source)?;
            let meta = Meta {
                mode: file.mode() & 0o7777,
                uid: if file.uid() == own_uid { 0 } else { file.uid() },
                gid: if file.gid() == own_gid { 0 } else { file.gid() },
                mtime: u32::try_from(file.mtime()).unwrap_or(EPOCH).min(EPOCH),
                xattrs: read_xattrs(&source),
            };
            let file_type = file.file_type();
            let number = file.rdev();
            let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
            let kind = if file_type.is_dir() {
                waiting.push(path.clone());
                Kind::Directory { opaque: false }
            } else if file_type.is_symlink() {
                Kind::Symlink { target: XattrValue(fs::read_link(&source).during("read", &source)?.as_os_str().as_bytes().to_vec()) }
            } else if file_type.is_char_device() {
                Kind::Char { major, minor }
            } else if file_type.is_block_device() {
                Kind::Block { major, minor }
            } else if file_type.is_fifo() {
                Kind::Fifo
            } else if file_type.is_socket() {
                continue;
            } else if let Some(target) = names.get(&(file.dev(), file.ino())) {
                Kind::Link { target: target.clone() }
            } else {
                if file.nlink() > 1 {
                    names.insert((file.dev(), file.ino()), path.clone());
                }
                let (size, digest) = spool.add(&mut File::open(&source).during("open", &source)?)?;
                Kind::File { size, digest }
            };
            diff.entries.push(Entry { path, meta, kind });
        }
    }
    diff.normalise();
    clean_any(&mut diff, spool)?;
    Ok(diff)
}

/// Capabilities and `user.` attributes; a file system without any has none.
fn read_xattrs(path: &Path) -> BTreeMap<String, XattrValue> {
    let mut xattrs = BTreeMap::new();
    let mut names = vec![0; 64 << 10];
    let Ok(length) = rustix::fs::llistxattr(path, &mut names[..]) else { return xattrs };
    for name in names[..length].split(|byte| *byte == 0).filter_map(|name| std::str::from_utf8(name).ok()) {
        if name != "security.capability" && !name.starts_with("user.") {
            continue;
        }
        let mut value = vec![0; 64 << 10];
        if let Ok(length) = rustix::fs::lgetxattr(path, name, &mut value[..]) {
            value.truncate(length);
            xattrs.insert(name.to_owned(), XattrValue(value));
        }
    }
    xattrs
}

/// Reads a root file system from a tar file: plain, or compressed with gzip, zstd or xz, told by its first bytes.
///
/// # Errors
/// When it is no tar file.
pub(crate) fn from_tarball(path: &Path, spool: &Spool, cancel: &Cancel) -> Result<Diff, BuildError> {
    let mut file = BufReader::new(File::open(path).during("open", path)?);
    let mut magic = [0; 6];
    let count = file.read(&mut magic).during("read", path)?;
    std::io::Seek::rewind(&mut file).during("read", path)?;
    let reader = CancellableRead { inner: file, cancel };
    let mut diff = match &magic[..count] {
        [0x1f, 0x8b, ..] => tarball::read(&mut flate2::read::MultiGzDecoder::new(reader), Origin::Root, spool),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => tarball::read(&mut zstd::Decoder::new(reader).during("read", path)?, Origin::Root, spool),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => tarball::read(&mut XzReader::new_mem_limit(reader, true, XZ_MEMORY_KIB), Origin::Root, spool),
        _ => tarball::read(&mut { reader }, Origin::Root, spool),
    }
    .map_err(|error| if cancel.is_cancelled() { BuildError::Cancelled } else { error })?;
    clean_any(&mut diff, spool)?;
    Ok(diff)
}

/// The digest of a file's content.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn file_digest(path: &Path) -> Result<Digest, BuildError> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).during("open", path)?;
    hasher.update_reader(file).during("read", path)?;
    Ok(Digest::from_bytes(*hasher.finalize().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_understood_or_refused_with_a_word() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("rootfs.tar"), b"").unwrap();
        let parse = |from: &str| Base::parse(from, directory.path(), None);
        assert_eq!(parse("debian:12").unwrap(), Base::Release { distribution: "debian", codename: "bookworm" });
        assert_eq!(parse("debian:bookworm").unwrap(), parse("debian:12").unwrap());
        assert!(matches!(parse("./rootfs.tar").unwrap(), Base::Tarball(_)));
        assert!(matches!(parse(".").unwrap(), Base::Directory(_)));
        assert!(matches!(parse("image:web:3").unwrap(), Base::Image(_)));
        assert!(matches!(parse("registry.example/library/nginx:1").unwrap(), Base::Registry(_)));
        assert!(matches!(parse("nginx:1"), Err(BuildError::Registry { source: crate::OciError::NoRegistry { .. }, .. })));
        assert!(parse("./missing").unwrap_err().to_string().contains("cannot be read"));
        assert!(parse("image:Web").unwrap_err().to_string().contains("is not a name"));
    }

    #[test]
    fn distributions_keep_their_names_whatever_registry_is_configured() {
        let parse = |from: &str| Base::parse(from, Path::new("/nonexistent"), Some("registry.example/team"));
        assert!(matches!(parse("debian:12").unwrap(), Base::Release { .. }));
        assert!(matches!(parse("nginx:1").unwrap(), Base::Registry(reference) if reference.to_string() == "registry.example/team/nginx:1"));
        assert!(matches!(parse("registry.example/debian:12").unwrap(), Base::Registry(_)));
        let error = parse("debian:12-slim").unwrap_err().to_string();
        assert!(error.contains("`debian:12`") && error.contains("`HOST/debian:12-slim`"), "{error}");
    }

    #[test]
    fn a_suite_without_a_mirror_is_refused_with_a_way_out() {
        let error = release_sources("ubuntu:20.04", "focal").unwrap_err().to_string();
        assert!(error.contains("no mirror is configured") && error.contains("sources.list.d"), "{error}");
    }
}
