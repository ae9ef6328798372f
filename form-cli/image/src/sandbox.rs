//! The build sandbox: a user namespace with a range of ids of its own, and in it mount, process, IPC and host name namespaces.
//!
//! Everything that touches the trees of layers runs inside, because only there their owners are what the image says. An ordinary user
//! is root inside and has the ids of `/etc/subuid` for the rest; root uses the range of `/etc/subuid`, or one that no other
//! software hands out, so that nothing inside ever has an id of the machine.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::{fs::chown, process::CommandExt},
    path::Path,
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use crate::{
    BuildError, Cancel,
    error::IoContext,
    tools::{self, search_path},
};

/// How many ids an image may use: 0 to 65535.
pub(crate) const IDS: u32 = 65536;
/// For root without a range in `/etc/subuid`. systemd's table of ids leaves 1879048192 to 2147352575 to nobody.
const ROOT_BASE: u32 = 1_879_048_192;
/// How much of the output a failure shows.
pub(crate) const TAIL_LINES: usize = 20;
/// A longer line is cut: a program that never ends a line must not fill our memory.
const MAX_LINE: u64 = 16 << 10;

/// Waits for the id maps, becomes root inside, and starts the real script as process 1 of its own process namespace.
/// `--pdeathsig` and `--kill-child`: when the builder dies in any way, everything inside dies with it.
const OUTER: &str = "printf r; read -r _; script=$1; shift; exec setpriv --reuid=0 --regid=0 --clear-groups --pdeathsig KILL \
    unshare --mount --pid --ipc --uts --fork --kill-child /bin/sh -euc \"$script\" sandbox \"$@\"";

#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    /// Who is root inside.
    root_uid: u32,
    root_gid: u32,
    map: Map,
}

#[derive(Clone, Debug)]
enum Map {
    /// We are root: one write to the map files.
    Direct { uid_base: u32, gid_base: u32 },
    /// `newuidmap`, which is allowed to.
    Helper { uid: u32, gid: u32, sub_uid: u32, sub_gid: u32 },
}

impl Sandbox {
    /// Finds out which ids may be used.
    ///
    /// # Errors
    /// When a program is missing, or an ordinary user has no range of ids.
    pub fn detect() -> Result<Self, BuildError> {
        tools::require(tools::ALWAYS)?;
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let user = user_name(uid);
        let sub_uid = subordinate_range("/etc/subuid", &user, uid);
        let sub_gid = subordinate_range("/etc/subgid", &user, uid);
        if uid == 0 {
            let (uid_base, gid_base) = (sub_uid.unwrap_or(ROOT_BASE), sub_gid.unwrap_or(ROOT_BASE));
            return Ok(Self { root_uid: uid_base, root_gid: gid_base, map: Map::Direct { uid_base, gid_base } });
        }
        tools::require(tools::UNPRIVILEGED)?;
        let sub_uid = sub_uid.ok_or_else(|| BuildError::NoSubordinateIds { user: user.clone(), file: "/etc/subuid" })?;
        let sub_gid = sub_gid.ok_or(BuildError::NoSubordinateIds { user, file: "/etc/subgid" })?;
        Ok(Self { root_uid: uid, root_gid: gid, map: Map::Helper { uid, gid, sub_uid, sub_gid } })
    }

    /// Makes a directory that belongs to root inside.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create_dir(&self, path: &Path) -> Result<(), BuildError> {
        fs::create_dir(path).during("create", path)?;
        chown(path, Some(self.root_uid), Some(self.root_gid)).during("hand over", path)
    }

    /// Removes trees that hold files of other ids. `names` are below `directory`, whose owner is the caller.
    ///
    /// # Errors
    /// When the sandbox does not start or a file cannot be removed.
    pub fn remove(&self, directory: &Path, names: &[OsString]) -> Result<(), BuildError> {
        if names.is_empty() {
            return Ok(());
        }
        // What is in a tree belongs to ids inside; the directory above it belongs to us.
        let script = "for tree in \"$@\"; do if [ -d \"$tree\" ]; then find \"$tree\" -mindepth 1 -delete || chmod -R u+rwX \"$tree\"; rm -rf \"$tree\"/..?* \"$tree\"/.[!.]* \"$tree\"/*; fi; done";
        self.run(Job { directory, script, args: names, env: &[], input: Input::Null }, &Cancel::new())?;
        for name in names {
            let path = directory.join(name);
            if path.exists() {
                fs::remove_dir_all(&path).during("remove", &path)?;
            }
        }
        Ok(())
    }

    /// Runs a job whose output matters only when it fails.
    ///
    /// # Errors
    /// When the sandbox does not start, the job fails, or the build is cancelled.
    pub fn run(&self, job: Job<'_>, cancel: &Cancel) -> Result<(), BuildError> {
        let finished = self.run_with_output(job, cancel, |_| {})?;
        finished.success("sh")
    }

    /// Runs a job and hands each line of its output (both streams) to `each_line` as it comes.
    ///
    /// # Errors
    /// When the sandbox does not start or the build is cancelled. A failing job is no error here.
    pub fn run_with_output(&self, job: Job<'_>, cancel: &Cancel, mut each_line: impl FnMut(&str)) -> Result<Finished, BuildError> {
        let mut running = self.start(job, true)?;
        let lines = LineReader::start(running.stdout);
        let mut tail = Vec::new();
        while let Some(line) = lines.next(cancel, &mut running.child.0)? {
            each_line(&line);
            keep_tail(&mut tail, line);
        }
        let status = running.child.0.wait().during("wait for", "the sandbox")?;
        Ok(Finished { status, tail })
    }

    /// Runs a job and hands its standard output to `consume` as a stream.
    ///
    /// # Errors
    /// Those of `consume`; and when the sandbox does not start, the job fails, or the build is cancelled.
    pub fn read<T>(
        &self,
        job: Job<'_>,
        cancel: &Cancel,
        consume: impl FnOnce(&mut dyn Read) -> Result<T, BuildError>,
    ) -> Result<T, BuildError> {
        let mut running = self.start(job, false)?;
        let errors = running.child.0.stderr.take().map(|stderr| thread::spawn(move || last_lines(stderr)));
        let mut stream = CancellableRead { inner: BufReader::with_capacity(256 << 10, running.stdout), cancel };
        let result = consume(&mut stream);
        if result.is_err() || cancel.is_cancelled() {
            kill(&mut running.child.0);
        } else {
            // A consumer may stop before the end; the job must not die of a closed pipe.
            io::copy(&mut stream, &mut io::sink()).during("read", "the sandbox")?;
        }
        let status = running.child.0.wait().during("wait for", "the sandbox")?;
        let tail = errors.and_then(|errors| errors.join().ok()).unwrap_or_default();
        if cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
        }
        let value = result?;
        Finished { status, tail }.success("tar")?;
        Ok(value)
    }

    /// Runs a job and lets `produce` write its standard input.
    ///
    /// # Errors
    /// Those of `produce`; and when the sandbox does not start, the job fails, or the build is cancelled.
    pub fn write(
        &self,
        job: Job<'_>,
        cancel: &Cancel,
        produce: impl FnOnce(&mut dyn Write) -> Result<(), BuildError>,
    ) -> Result<(), BuildError> {
        let mut running = self.start(Job { input: Input::Pipe, ..job }, true)?;
        let output = running.stdout;
        let reader = thread::spawn(move || last_lines(output));
        let result = match running.child.0.stdin.take() {
            Some(mut stdin) => produce(&mut stdin),
            None => Err(BuildError::Sandbox { reason: "it has no standard input".to_owned() }),
        };
        if cancel.is_cancelled() {
            kill(&mut running.child.0);
        }
        let status = running.child.0.wait().during("wait for", "the sandbox")?;
        let tail = reader.join().unwrap_or_default();
        if cancel.is_cancelled() {
            return Err(BuildError::Cancelled);
        }
        // When the job died the writer only saw a closed pipe: the job's own words say more.
        Finished { status, tail }.success("tar")?;
        result
    }

    fn start(&self, job: Job<'_>, merge: bool) -> Result<Running, BuildError> {
        let script = if merge { format!("exec 2>&1; {}", job.script) } else { job.script.to_owned() };
        let script = match job.input {
            Input::Null => format!("exec </dev/null; {script}"),
            Input::Pipe => script,
        };
        let mut child = Command::new("unshare")
            .args(["--user", "--keep-caps", "--", "/bin/sh", "-euc", OUTER, "outer"])
            .arg(script)
            .args(job.args)
            .env_clear()
            .env("PATH", search_path())
            .env("LC_ALL", "C.UTF-8")
            .envs(job.env.iter().map(|(key, value)| (key, value)))
            .current_dir(job.directory)
            // Ctrl-C on a terminal reaches us alone; we then kill what runs inside.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .during("start", "unshare")?;
        match self.hand_over_ids(&mut child) {
            Ok(stdout) => {
                if merge {
                    // Nobody reads it: after the handshake everything goes to the other pipe.
                    drop(child.stderr.take());
                }
                Ok(Running { child: KilledChild(child), stdout })
            }
            Err(error) => {
                kill(&mut child);
                let mut words = String::new();
                if let Some(stderr) = child.stderr.take() {
                    // The pipe ends with the processes; the words are only for the message.
                    let _ = stderr.take(4096).read_to_string(&mut words);
                }
                let _ = child.wait();
                Err(if words.trim().is_empty() { error } else { BuildError::Sandbox { reason: format!("{error}: {}", words.trim()) } })
            }
        }
    }

    /// The other side writes one byte once it is in its namespace and reads a line once it may go on.
    fn hand_over_ids(&self, child: &mut Child) -> Result<ChildStdout, BuildError> {
        let no_start = || BuildError::Sandbox { reason: "this machine does not let you create user namespaces".to_owned() };
        let mut stdout = child.stdout.take().ok_or_else(no_start)?;
        stdout.read_exact(&mut [0]).map_err(|_| no_start())?;
        let pid = child.id();
        match self.map {
            Map::Direct { uid_base, gid_base } => {
                for (file, base) in [("uid_map", uid_base), ("gid_map", gid_base)] {
                    let path = format!("/proc/{pid}/{file}");
                    fs::write(&path, format!("0 {base} {IDS}\n")).during("write", path)?;
                }
            }
            Map::Helper { uid, gid, sub_uid, sub_gid } => {
                for (program, own, sub) in [("newuidmap", uid, sub_uid), ("newgidmap", gid, sub_gid)] {
                    let numbers = [pid, 0, own, 1, 1, sub, IDS - 1].map(|number| number.to_string());
                    let output = Command::new(program).args(numbers).env("PATH", search_path()).output().during("start", program)?;
                    if !output.status.success() {
                        return Err(BuildError::Sandbox { reason: String::from_utf8_lossy(&output.stderr).trim().to_owned() });
                    }
                }
            }
        }
        let stdin = child.stdin.as_mut().ok_or_else(no_start)?;
        stdin.write_all(b"\n").map_err(|_| no_start())?;
        Ok(stdout)
    }
}

/// What to run inside. The script is for `/bin/sh -eu`; `args` are its `$1`, `$2`, …
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub directory: &'a Path,
    pub script: &'a str,
    pub args: &'a [OsString],
    pub env: &'a [(OsString, OsString)],
    pub input: Input,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    Null,
    Pipe,
}

struct Running {
    child: KilledChild,
    stdout: ChildStdout,
}

/// A process that does not outlive its owner.
struct KilledChild(Child);

impl Drop for KilledChild {
    fn drop(&mut self) {
        kill(&mut self.0);
        let _ = self.0.wait();
    }
}

/// A job that has ended.
pub(crate) struct Finished {
    pub status: ExitStatus,
    pub tail: Vec<String>,
}

impl Finished {
    /// As a shell counts: 128 and the signal when one ended it.
    pub fn exit_code(&self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    pub fn success(self, program: &'static str) -> Result<(), BuildError> {
        if self.status.success() { Ok(()) } else { Err(BuildError::Tool { program, status: self.status.to_string(), tail: self.tail }) }
    }
}

pub(crate) fn kill(child: &mut Child) {
    // It fails only when the process is gone already.
    let _ = child.kill();
}

pub(crate) fn keep_tail(tail: &mut Vec<String>, line: String) {
    if tail.len() == TAIL_LINES {
        tail.remove(0);
    }
    tail.push(line);
}

pub(crate) fn last_lines(stream: impl Read) -> Vec<String> {
    let mut tail = Vec::new();
    let mut reader = BufReader::new(stream);
    while let Some(line) = read_line(&mut reader) {
        keep_tail(&mut tail, line);
    }
    tail
}

/// One line without its end, at most [`MAX_LINE`] bytes; a carriage return starts the line anew, as it does on a terminal.
fn read_line(reader: &mut impl BufRead) -> Option<String> {
    let mut line = Vec::new();
    match reader.take(MAX_LINE).read_until(b'\n', &mut line) {
        Ok(count) if count > 0 => {}
        _ => return None,
    }
    let text = String::from_utf8_lossy(&line);
    let text = text.trim_end_matches(['\n', '\r']);
    Some(text.rsplit('\r').next().unwrap_or(text).to_owned())
}

/// Reads lines on a thread of its own, so that a silent program can be cancelled.
pub(crate) struct LineReader(mpsc::Receiver<String>);

impl LineReader {
    pub fn start(stream: impl Read + Send + 'static) -> Self {
        let (sender, receiver) = mpsc::sync_channel(256);
        thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            while let Some(line) = read_line(&mut reader) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self(receiver)
    }

    /// The next line; `None` at the end. Kills `child` when the build is cancelled.
    pub fn next(&self, cancel: &Cancel, child: &mut Child) -> Result<Option<String>, BuildError> {
        loop {
            if cancel.is_cancelled() {
                kill(child);
                return Err(BuildError::Cancelled);
            }
            match self.0.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => return Ok(Some(line)),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }
}

pub(crate) struct CancellableRead<'a, R> {
    pub inner: R,
    pub cancel: &'a Cancel,
}

impl<R: Read> Read for CancellableRead<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() { Err(io::Error::other("cancelled")) } else { self.inner.read(buffer) }
    }
}

fn user_name(uid: u32) -> String {
    let from_passwd = fs::read_to_string("/etc/passwd").ok().and_then(|text| {
        let line = text.lines().find(|line| line.split(':').nth(2).and_then(|field| field.parse().ok()) == Some(uid))?;
        line.split(':').next().map(str::to_owned)
    });
    from_passwd.or_else(|| env::var("USER").ok()).unwrap_or_else(|| uid.to_string())
}

/// The first range of enough ids for a user by name or number (subuid(5)).
fn subordinate_range(file: &str, user: &str, uid: u32) -> Option<u32> {
    find_range(&fs::read_to_string(file).ok()?, user, uid)
}

fn find_range(text: &str, user: &str, uid: u32) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let owner = fields.next()?;
        let start: u32 = fields.next()?.parse().ok()?;
        let count: u32 = fields.next()?.trim().parse().ok()?;
        let ours = owner == user || owner.parse() == Ok(uid);
        (ours && count >= IDS - 1 && start.checked_add(IDS).is_some()).then_some(start)
    })
}

/// An argument list from anything that is text.
pub(crate) fn args<S: AsRef<OsStr>>(list: impl IntoIterator<Item = S>) -> Vec<OsString> {
    list.into_iter().map(|word| word.as_ref().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found() {
        let text = "ada:100000:65536\n1001:300000:65536\nbob:1:10\n";
        assert_eq!(find_range(text, "ada", 1000), Some(100_000));
        assert_eq!(find_range(text, "eve", 1001), Some(300_000));
        assert_eq!(find_range(text, "bob", 1002), None);
    }

    #[test]
    fn runs_as_root_inside_with_ids_of_its_own() {
        let sandbox = Sandbox::detect().unwrap();
        let directory = tempfile::tempdir().unwrap();
        sandbox.create_dir(&directory.path().join("tree")).unwrap();
        let script = "id -u; cd tree; touch a; chown 33:65534 a; stat -c %u:%g a; chmod 0 a; echo oops >&2; exit 7";
        let mut lines = Vec::new();
        let job = Job { directory: directory.path(), script, args: &[], env: &[], input: Input::Null };
        let finished = sandbox.run_with_output(job, &Cancel::new(), |line| lines.push(line.to_owned())).unwrap();
        assert_eq!(lines, ["0", "33:65534", "oops"]);
        assert_eq!((finished.exit_code(), finished.tail.len()), (7, 3));
        sandbox.remove(directory.path(), &args(["tree"])).unwrap();
        assert!(!directory.path().join("tree").exists());
    }

    #[test]
    fn a_cancelled_job_is_killed_whole() {
        let sandbox = Sandbox::detect().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let cancel = Cancel::new();
        let job = Job { directory: directory.path(), script: "echo up; sleep 1000 & sleep 1000", args: &[], env: &[], input: Input::Null };
        let result = sandbox.run_with_output(job, &cancel, |_| cancel.cancel());
        assert!(matches!(result, Err(BuildError::Cancelled)));
    }
}
