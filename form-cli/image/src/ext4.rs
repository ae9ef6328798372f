//! The ext4 file system of an image: made once, then edited in place through `debugfs`, without privileges and without a mount.
//!
//! Everything is deterministic: identifiers are fixed, every time is [`EPOCH`] or older, and blocks are given out in the order of the
//! paths. Files are laid out so that a change moves few 64 KiB blocks: see [`Layout`].

pub(crate) mod read;

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    thread::{self, JoinHandle},
    time::Duration,
};

use form_types::Digest;
use rustix::{
    fs::{self, FallocateFlags, SeekFrom},
    io::Errno,
};

use crate::{
    BuildError, Cancel,
    diff::{EPOCH, Entry, Kind, Meta},
    error::IoContext,
    index::Change,
    sandbox::last_lines,
    tarball::Spool,
    tools::search_path,
    tree_path::TreePath,
};

/// The size a file system is made with: under the smallest disk (5 GiB), and the guest grows it to its disk when it boots.
pub(crate) const BASE_SIZE: u64 = 4 << 30;
const FS_BLOCK: u64 = 4096;
/// File system blocks in a block of an image.
const ALIGNMENT: u64 = form_bundle::BLOCK_SIZE as u64 / FS_BLOCK;
/// Fixed, because they are part of the image's digest. Nothing looks for the root disk by UUID.
const UUID: &str = "f0a3a710-0000-4000-8000-000000000001";
const HASH_SEED: &str = "f0a3a710-0000-4000-8000-000000000002";
/// A file from this size on begins a block of its own.
const LARGE: u64 = 128 << 10;
/// Of the smaller ones as many begin a block too, chosen by their names, that about this many bytes lie between.
const REGION: u64 = 256 << 10;

/// Frees the room of ranges that were never written: `mke2fs` reserves 98 MiB for a journal and tables of zeroes.
fn free_what_holds_nothing(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let end = file.metadata()?.len();
    let mut at = 0;
    while at < end {
        let hole = fs::seek(&file, SeekFrom::Hole(at))?;
        let data = match fs::seek(&file, SeekFrom::Data(hole)) {
            Ok(data) => data,
            Err(Errno::NXIO) => end,
            Err(error) => return Err(error.into()),
        };
        if data > hole {
            match fs::fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, hole, data - hole) {
                // A file system without holes keeps the room.
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        at = data;
    }
    Ok(())
}

/// A file system in a sparse file.
#[derive(Debug)]
pub(crate) struct Ext4 {
    path: PathBuf,
}

impl Ext4 {
    /// Makes an empty file system of `size` bytes, with `lost+found` alone in it.
    ///
    /// # Errors
    /// When `mke2fs` fails or the disk is full.
    pub fn create(path: PathBuf, size: u64) -> Result<Self, BuildError> {
        File::create(&path).and_then(|file| file.set_len(size)).during("create", &path)?;
        let extended = format!("hash_seed={HASH_SEED},lazy_itable_init=0,lazy_journal_init=0,nodiscard,root_owner=0:0");
        let mut command = program("mke2fs");
        command.args(["-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-J", "size=32", "-L", "form-root"]);
        // What mke2fs.conf of the machine says must not show in the image.
        command.env("MKE2FS_CONFIG", "/dev/null").args(["-O", FEATURES, "-i", "16384"]);
        command.args(["-U", UUID, "-E", &extended]).arg(&path);
        run(command, "mke2fs", &[0])?;
        free_what_holds_nothing(&path).during("make holes in", &path)?;
        Ok(Self { path })
    }

    /// Takes a file that holds a file system already.
    pub fn open(path: PathBuf) -> Self {
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the changes of a layer, grows the file system first when they do not fit, and checks it afterwards.
    ///
    /// # Errors
    /// When a program fails, the file system would be damaged, or the build is cancelled.
    pub fn apply(&self, changes: &[Change], spool: &Spool, cancel: &Cancel) -> Result<(), BuildError> {
        if changes.is_empty() {
            return Ok(());
        }
        self.make_room(changes)?;
        let mut editor = Editor::start(&self.path, spool)?;
        let done =
            changes.iter().try_for_each(|change| if cancel.is_cancelled() { Err(BuildError::Cancelled) } else { editor.change(change) });
        editor.finish(done)?;
        self.check()
    }

    /// Asks `e2fsck`, which changes nothing.
    ///
    /// # Errors
    /// When the file system is not clean.
    pub fn check(&self) -> Result<(), BuildError> {
        let mut command = program("e2fsck");
        command.args(["-f", "-n"]).arg(&self.path);
        run(command, "e2fsck", &[0])
    }

    /// Doubles the file system until the changes fit.
    fn make_room(&self, changes: &[Change]) -> Result<(), BuildError> {
        let (mut blocks, mut inodes) = (0, 0);
        for change in changes {
            if let Change::Create(entry) = change {
                inodes += 1;
                // One more for a directory entry, an extent block or the alignment's share.
                blocks += 2 + match &entry.kind {
                    Kind::File { size, .. } => size.div_ceil(FS_BLOCK) + if *size >= LARGE { ALIGNMENT } else { 1 },
                    _ => 0,
                };
            }
        }
        let mut space = Superblock::read(&self.path)?;
        while space.free_blocks < blocks + blocks / 50 + 1024 || space.free_inodes < inodes + 16 {
            let size = std::fs::metadata(&self.path).during("examine", &self.path)?.len();
            let larger = size.checked_mul(2).filter(|larger| *larger <= form_bundle::blocks::MAX_FILE_SIZE);
            let larger = larger.ok_or_else(|| BuildError::FileSystem { reason: "the image is larger than any disk".to_owned() })?;
            OpenOptions::new().write(true).open(&self.path).and_then(|file| file.set_len(larger)).during("grow", &self.path)?;
            let mut command = program("resize2fs");
            command.arg("-f").arg(&self.path);
            run(command, "resize2fs", &[0])?;
            space = Superblock::read(&self.path)?;
        }
        Ok(())
    }
}

const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

fn program(name: &'static str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", search_path()).env("LC_ALL", "C.UTF-8").env("E2FSPROGS_FAKE_TIME", EPOCH.to_string()).stdin(Stdio::null());
    command
}

fn run(mut command: Command, name: &'static str, good: &[i32]) -> Result<(), BuildError> {
    let output = command.output().during("start", name)?;
    if output.status.code().is_some_and(|code| good.contains(&code)) {
        return Ok(());
    }
    let tail = last_lines(output.stdout.as_slice().chain(output.stderr.as_slice()));
    Err(BuildError::Tool { program: name, status: output.status.to_string(), tail })
}

/// What the superblock says about room (kernel documentation: `filesystems/ext4/super`).
struct Superblock {
    free_blocks: u64,
    free_inodes: u64,
}

impl Superblock {
    fn read(path: &Path) -> Result<Self, BuildError> {
        let mut bytes = [0; 1024];
        File::open(path).and_then(|file| file.read_exact_at(&mut bytes, 1024)).during("read", path)?;
        let word = |at: usize| u64::from(u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        if (bytes[0x38], bytes[0x39]) != (0x53, 0xef) {
            return Err(BuildError::FileSystem { reason: format!("{} holds no ext4 file system", path.display()) });
        }
        Ok(Self { free_blocks: word(0x0c) | (word(0x158) << 32), free_inodes: word(0x10) })
    }
}

/// One `debugfs` that gets its commands line by line.
///
/// It reports errors as text only, so anything on its standard error beyond its version is a failure. Its standard output is made
/// line-buffered, because the layout asks it which blocks are free.
struct Editor<'a> {
    child: Child,
    commands: Option<BufWriter<ChildStdin>>,
    /// Lines that answer `ffb`.
    answers: mpsc::Receiver<String>,
    output: Option<JoinHandle<()>>,
    errors: Option<JoinHandle<Vec<String>>>,
    spool: &'a Spool,
    directory: Option<TreePath>,
    layout: Layout,
    values: usize,
    empty: Digest,
}

/// Where the next file goes.
///
/// `debugfs` gives out the first free block. Left alone, a file that grows by one block shifts every file behind it and so changes
/// every 64 KiB block of the image from there on. So a large file, and some small ones by the hashes of their paths, begin
/// at a 64 KiB boundary: what comes behind keeps its content when it moves, and a block with the same content has the same name.
/// The gaps are marked as used while the layer is written and freed at its end.
#[derive(Default)]
struct Layout {
    gaps: Vec<u64>,
    /// Plain bytes since the last boundary.
    since: u64,
}

impl<'a> Editor<'a> {
    fn start(image: &Path, spool: &'a Spool) -> Result<Self, BuildError> {
        // An empty file, for names that need a place before they are a link.
        let (_, empty) = spool.add(&mut std::io::empty())?;
        let image = std::path::absolute(image).during("resolve", image)?;
        let mut child = program("stdbuf")
            .args(["-oL", "debugfs", "-w", "-f", "-"])
            .arg(image)
            .current_dir(spool.directory())
            .process_group_of_its_own()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .during("start", "debugfs")?;
        let missing = || BuildError::FileSystem { reason: "debugfs has no pipes".to_owned() };
        let commands = BufWriter::new(child.stdin.take().ok_or_else(missing)?);
        let stdout = child.stdout.take().ok_or_else(missing)?;
        let stderr = child.stderr.take().ok_or_else(missing)?;
        let (sender, answers) = mpsc::channel();
        let output = thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                // Commands are echoed behind a prompt, so no file name can look like an answer.
                if let Some(blocks) = line.strip_prefix(b"Free blocks found:") {
                    let _ = sender.send(String::from_utf8_lossy(blocks).into_owned());
                }
            }
        });
        let errors = thread::spawn(move || error_lines(stderr));
        let mut editor = Self {
            child,
            commands: Some(commands),
            answers,
            output: Some(output),
            errors: Some(errors),
            spool,
            directory: None,
            layout: Layout::default(),
            values: 0,
            empty,
        };
        editor.send(format!("set_current_time @{EPOCH}").as_bytes())?;
        Ok(editor)
    }

    fn send(&mut self, command: &[u8]) -> Result<(), BuildError> {
        let Some(commands) = &mut self.commands else { return Ok(()) };
        commands.write_all(command).and_then(|()| commands.write_all(b"\n")).during("write to", "debugfs")
    }

    /// Makes a path the current directory, so that its entries need no path.
    fn enter(&mut self, directory: TreePath) -> Result<(), BuildError> {
        if self.directory.as_ref() != Some(&directory) {
            let mut command = b"cd ".to_vec();
            command.extend(quote(&[b"/", directory.as_bytes()].concat())?);
            self.send(&command)?;
            self.directory = Some(directory);
        }
        Ok(())
    }

    /// Sends `before NAME after` in the directory of `path`.
    fn at(&mut self, before: &str, path: &TreePath, style: Style, after: &[u8]) -> Result<(), BuildError> {
        self.enter(path.parent().unwrap_or_default())?;
        let mut command = before.as_bytes().to_vec();
        command.push(b' ');
        command.extend(style.name(path)?);
        if !after.is_empty() {
            command.push(b' ');
            command.extend_from_slice(after);
        }
        self.send(&command)
    }

    fn change(&mut self, change: &Change) -> Result<(), BuildError> {
        match change {
            Change::Remove { path, directory } => self.at(if *directory { "rmdir" } else { "rm" }, path, Style::Path, b""),
            Change::Create(entry) => self.create(entry),
            Change::Update { entry, old } => {
                self.fields(entry)?;
                for name in old.xattrs.keys().filter(|name| !entry.meta.xattrs.contains_key(*name)) {
                    self.at("ea_rm", &entry.path, Style::Path, &quote(name.as_bytes())?)?;
                }
                self.xattrs(&entry.path, &entry.meta)
            }
            Change::Links { path, links } => self.field(path, "links_count", &links.to_string()),
        }
    }

    fn create(&mut self, entry: &Entry) -> Result<(), BuildError> {
        let path = &entry.path;
        match &entry.kind {
            Kind::File { size, digest } => {
                self.place(path, *size)?;
                self.at(&format!("write {digest}"), path, Style::Name, b"")?;
            }
            Kind::Link { target } => {
                // `ln` cannot make a directory longer; a file can, and leaves room for the name when it goes.
                self.at(&format!("write {}", self.empty), path, Style::Name, b"")?;
                self.at("rm", path, Style::Path, b"")?;
                let mut command = b"ln ".to_vec();
                command.extend(quote(&[b"/", target.as_bytes()].concat())?);
                command.push(b' ');
                command.extend(Style::Path.name(path)?);
                self.enter(path.parent().unwrap_or_default())?;
                return self.send(&command);
            }
            Kind::Directory { .. } => self.at("mkdir", path, Style::Path, b"")?,
            Kind::Symlink { target } => self.at("symlink", path, Style::Path, &quote(&target.0)?)?,
            Kind::Char { major, minor } => self.at("mknod", path, Style::Name, format!("c {major} {minor}").as_bytes())?,
            Kind::Block { major, minor } => self.at("mknod", path, Style::Name, format!("b {major} {minor}").as_bytes())?,
            Kind::Fifo => self.at("mknod", path, Style::Name, b"p")?,
        }
        self.fields(entry)?;
        self.xattrs(path, &entry.meta)
    }

    fn fields(&mut self, entry: &Entry) -> Result<(), BuildError> {
        let Meta { mode, uid, gid, mtime, .. } = &entry.meta;
        let file_type = match entry.kind {
            Kind::File { .. } | Kind::Link { .. } => 0o100_000,
            Kind::Directory { .. } => 0o040_000,
            Kind::Symlink { .. } => 0o120_000,
            Kind::Char { .. } => 0o020_000,
            Kind::Block { .. } => 0o060_000,
            Kind::Fifo => 0o010_000,
        };
        let mode = if matches!(entry.kind, Kind::Symlink { .. }) { 0o777 } else { *mode };
        self.field(&entry.path, "mode", &format!("0{:o}", file_type | mode))?;
        self.field(&entry.path, "uid", &uid.to_string())?;
        self.field(&entry.path, "gid", &gid.to_string())?;
        self.field(&entry.path, "mtime", &format!("@{mtime}"))
    }

    fn field(&mut self, path: &TreePath, field: &str, value: &str) -> Result<(), BuildError> {
        self.at("sif", path, Style::Path, format!("{field} {value}").as_bytes())
    }

    fn xattrs(&mut self, path: &TreePath, meta: &Meta) -> Result<(), BuildError> {
        for (name, value) in &meta.xattrs {
            // A value is any bytes, so it travels in a file.
            let file = format!("xattr-{}", self.values);
            self.values += 1;
            let source = self.spool.directory().join(&file);
            std::fs::write(&source, &value.0).during("write", source)?;
            self.at(&format!("ea_set -f {file}"), path, Style::Path, &quote(name.as_bytes())?)?;
        }
        Ok(())
    }

    /// Moves on to a 64 KiB boundary where the layout says so.
    fn place(&mut self, path: &TreePath, size: u64) -> Result<(), BuildError> {
        let hash = Digest::of(path.as_bytes());
        let [first, second, ..] = hash.as_bytes();
        let one_in = (REGION / size.next_power_of_two().max(FS_BLOCK)).max(1);
        let chosen = u64::from(u16::from_le_bytes([*first, *second])) % one_in == 0;
        if self.layout.since > 0 && (chosen || size >= LARGE) {
            self.align()?;
            self.layout.since = 0;
        }
        self.layout.since += size.next_multiple_of(FS_BLOCK);
        Ok(())
    }

    fn align(&mut self) -> Result<(), BuildError> {
        // Free blocks may be scattered between those in use: four looks pass any ordinary hole.
        for _ in 0..4 {
            self.send(format!("ffb {ALIGNMENT}").as_bytes())?;
            if let Some(commands) = &mut self.commands {
                commands.flush().during("write to", "debugfs")?;
            }
            let Ok(answer) = self.answers.recv_timeout(Duration::from_secs(60)) else {
                return Err(BuildError::FileSystem { reason: "debugfs does not answer".to_owned() });
            };
            let free: Vec<u64> = answer.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            let Some(first) = free.first() else { return Ok(()) };
            let boundary = first.next_multiple_of(ALIGNMENT);
            for block in free.iter().filter(|block| **block < boundary) {
                self.send(format!("setb {block}").as_bytes())?;
                self.layout.gaps.push(*block);
            }
            if free.contains(&boundary) {
                break;
            }
        }
        Ok(())
    }

    /// Ends `debugfs`; the changes count only when it had nothing to say.
    fn finish(mut self, done: Result<(), BuildError>) -> Result<(), BuildError> {
        if done.is_err() {
            let _ = self.child.kill();
        } else {
            for block in std::mem::take(&mut self.layout.gaps) {
                self.send(format!("freeb {block}").as_bytes())?;
            }
        }
        let flushed = match self.commands.take() {
            Some(mut commands) => commands.flush().during("write to", "debugfs"),
            None => Ok(()),
        };
        let status = self.child.wait().during("wait for", "debugfs")?;
        if let Some(output) = self.output.take() {
            let _ = output.join();
        }
        let tail = self.errors.take().and_then(|errors| errors.join().ok()).unwrap_or_default();
        if matches!(done, Err(BuildError::Cancelled)) {
            return done;
        }
        // What debugfs said explains a broken pipe better than the pipe does.
        if !status.success() || !tail.is_empty() {
            return Err(BuildError::Tool { program: "debugfs", status: status.to_string(), tail });
        }
        done.and(flushed)
    }
}

impl Drop for Editor<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

trait OwnGroup {
    fn process_group_of_its_own(&mut self) -> &mut Self;
}

impl OwnGroup for Command {
    fn process_group_of_its_own(&mut self) -> &mut Self {
        use std::os::unix::process::CommandExt;
        self.process_group(0)
    }
}

fn error_lines(stream: impl Read) -> Vec<String> {
    last_lines(stream).into_iter().filter(|line| !line.trim().is_empty() && !line.starts_with("debugfs 1.")).collect()
}

/// How `debugfs` reads a name.
#[derive(Clone, Copy)]
enum Style {
    /// `write` and `mknod` take a bare name: a slash would become part of it.
    Name,
    /// Everything else takes a path; without the `./` a name such as `<12>` would be an inode number.
    Path,
}

impl Style {
    fn name(self, path: &TreePath) -> Result<Vec<u8>, BuildError> {
        match self {
            Self::Name => quote(path.name()),
            Self::Path if path.is_root() => Ok(b"/".to_vec()),
            Self::Path => quote(&[b"./", path.name()].concat()),
        }
    }
}

/// One argument for `debugfs`: in quotes, a quote doubled. A line break ends a command whatever is around it.
fn quote(bytes: &[u8]) -> Result<Vec<u8>, BuildError> {
    if bytes.contains(&b'\n') || bytes.contains(&0) {
        let name = String::from_utf8_lossy(bytes).escape_debug().to_string();
        return Err(BuildError::FileSystem {
            reason: format!("the name `{name}` has a line break in it, which an image cannot hold: rename or remove the file"),
        });
    }
    let mut quoted = Vec::with_capacity(bytes.len() + 2);
    quoted.push(b'"');
    for byte in bytes {
        if *byte == b'"' {
            quoted.push(b'"');
        }
        quoted.push(*byte);
    }
    quoted.push(b'"');
    Ok(quoted)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn an_empty_file_system_takes_little_room() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let ext4 = Ext4::create(path.clone(), BASE_SIZE).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), BASE_SIZE);
        assert!(metadata.blocks() * 512 < 8 << 20, "{} bytes", metadata.blocks() * 512);
        let mut check = program("e2fsck");
        check.args(["-f", "-n"]).arg(&ext4.path);
        run(check, "e2fsck", &[0]).unwrap();
    }
}
