//! What a client runs: a shell, a command, the image's sftp-server; as its user, with a terminal or with pipes.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read, Write},
    os::unix::{ffi::OsStringExt, process::ExitStatusExt},
    path::Path,
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use russh::{ChannelId, Pty, Sig, server::Handle};
use rustix::{
    fd::OwnedFd,
    process::{Pid, Signal},
    termios::{Winsize, tcgetpgrp, tcsetwinsize},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest, unix::AsyncFd},
    process::{Child, ChildStdin, Command},
    task::{AbortHandle, JoinSet},
};

use super::{
    flow::{Flow, Input, Stream},
    modes,
};
use crate::{
    identity::Identity,
    process::start_failure,
    sys,
    terminal::{self, Terminal},
};

const CHUNK: usize = 16 << 10;
/// How long output may stay away after the end of the process before we stop waiting for those it left behind.
const AFTER_END: Duration = Duration::from_millis(100);
/// Ctrl-D: what ends the input of a terminal.
const END_OF_FILE: u8 = 4;

/// The terminal that a client asked for.
#[derive(Clone, Debug)]
pub struct TerminalWish {
    pub kind: String,
    pub size: Winsize,
    pub modes: Vec<(Pty, u32)>,
}

/// Everything about a process that is to be started.
pub struct Launch<'a> {
    pub identity: &'a Identity,
    pub work: Work,
    pub env: Vec<(String, String)>,
    pub terminal: Option<TerminalWish>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// A login shell.
    Shell,
    /// A line for the shell.
    Line(Vec<u8>),
    /// A program with its path and nothing else.
    Program(String),
}

/// A process that runs for a channel. Its terminal hangs up when this is dropped.
pub struct Session {
    group: Option<Pid>,
    terminal: Option<Arc<OwnedFd>>,
    task: AbortHandle,
}

/// Where what comes and goes is carried.
pub struct Way {
    pub handle: Handle,
    pub channel: ChannelId,
    pub flow: Arc<Flow>,
    pub input: Arc<Input>,
}

/// What has just been started.
struct Running {
    child: Child,
    input: Sink,
    outputs: Vec<(Stream, Source)>,
    terminal: Option<Arc<OwnedFd>>,
}

/// Where output comes from.
enum Source {
    Pipe(Box<dyn AsyncRead + Send + Unpin>),
    Terminal(Arc<AsyncFd<File>>),
}

/// Where input goes.
enum Sink {
    Pipe(ChildStdin),
    Terminal(Arc<AsyncFd<File>>),
}

impl Session {
    /// Starts the process. One that cannot be started is a session too: it says why, and ends with the status that a shell would give.
    pub fn start(launch: &Launch<'_>, way: Way) -> Self {
        match spawn(launch) {
            Ok(running) => {
                let group = running.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
                let terminal = running.terminal.clone();
                let task = tokio::spawn(carry(running, way)).abort_handle();
                Self { group, terminal, task }
            }
            Err(error) => {
                let (program, home) = (program(launch), launch.identity.home.clone());
                let (exit, message) = start_failure(&program, directory(&home), &error);
                let code = u32::try_from(exit.shell_code()).unwrap_or(255);
                Self::refuse(format!("{message}\n"), code, way)
            }
        }
    }

    /// Says something to the client instead, and ends with this status.
    pub fn refuse(message: String, code: u32, way: Way) -> Self {
        let task = tokio::spawn(async move {
            way.input.close(&way.flow);
            let Way { handle, channel, flow, .. } = way;
            flow.send(&handle, channel, Stream::Error, message.into_bytes()).await;
            finish(&handle, channel, ExitStatus::from_raw(code.cast_signed() << 8)).await;
        });
        Self { group: None, terminal: None, task: task.abort_handle() }
    }

    pub fn resize(&self, size: Winsize) {
        if let Some(terminal) = &self.terminal {
            let _ = tcsetwinsize(terminal, size);
        }
    }

    /// To whoever has the terminal, else to the whole group.
    pub fn signal(&self, signal: &Sig) {
        let Some(signal) = number(signal) else { return };
        let foreground = self.terminal.as_ref().and_then(|terminal| tcgetpgrp(terminal).ok());
        if let Some(group) = foreground.or(self.group) {
            let _ = rustix::process::kill_process_group(group, signal);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A home that is not there is no reason to stay out.
fn directory(home: &str) -> &str {
    if Path::new(home).is_dir() { home } else { "/" }
}

fn program(launch: &Launch<'_>) -> String {
    match &launch.work {
        Work::Program(path) => path.clone(),
        Work::Shell | Work::Line(_) => launch.identity.shell.clone(),
    }
}

fn spawn(launch: &Launch<'_>) -> io::Result<Running> {
    let identity = launch.identity;
    let mut command = std::process::Command::new(program(launch));
    match &launch.work {
        Work::Shell => {
            // A shell whose name begins with a dash is a login shell.
            let name = identity.shell.rsplit('/').next().unwrap_or_default();
            std::os::unix::process::CommandExt::arg0(&mut command, format!("-{name}"));
        }
        Work::Line(line) => {
            command.arg("-c").arg(OsString::from_vec(line.clone()));
        }
        Work::Program(_) => {}
    }
    command.env_clear().envs(launch.env.iter().map(|(key, value)| (key, value))).current_dir(directory(&identity.home));
    match &launch.terminal {
        Some(wish) => spawn_on_terminal(command, identity, wish),
        None => spawn_on_pipes(command, identity),
    }
}

fn spawn_on_pipes(mut command: std::process::Command, identity: &Identity) -> io::Result<Running> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    sys::prepare(&mut command, &identity.launch(false));
    let mut child = Command::from(command).spawn()?;
    let missing = || io::Error::other("a pipe is missing");
    let input = Sink::Pipe(child.stdin.take().ok_or_else(missing)?);
    let stdout = Source::Pipe(Box::new(child.stdout.take().ok_or_else(missing)?));
    let stderr = Source::Pipe(Box::new(child.stderr.take().ok_or_else(missing)?));
    Ok(Running { child, input, outputs: vec![(Stream::Out, stdout), (Stream::Error, stderr)], terminal: None })
}

fn spawn_on_terminal(mut command: std::process::Command, identity: &Identity, wish: &TerminalWish) -> io::Result<Running> {
    let Terminal { ours, theirs } = terminal::open(identity.uid, wish.size)?;
    modes::set(&ours, &wish.modes)?;
    if let Ok(name) = rustix::pty::ptsname(&ours, Vec::new()) {
        command.env("SSH_TTY", OsString::from_vec(name.into_bytes()));
    }
    command.env("TERM", &wish.kind);
    command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
    sys::prepare(&mut command, &identity.launch(true));
    // The command goes with its copies of the terminal, and our end sees theirs.
    let child = Command::from(command).spawn()?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    let control = Arc::new(ours.try_clone()?);
    let ours = Arc::new(sys::watched(File::from(ours))?);
    let outputs = vec![(Stream::Out, Source::Terminal(Arc::clone(&ours)))];
    Ok(Running { child, input: Sink::Terminal(ours), outputs, terminal: Some(control) })
}

/// Carries bytes until the process has ended and everything it wrote is on its way; tells how it ended.
async fn carry(running: Running, way: Way) {
    let Running { mut child, input, outputs, .. } = running;
    let Way { handle, channel, flow, input: from_client } = way;
    let feeder = tokio::spawn(feed(input, Arc::clone(&from_client), Arc::clone(&flow)));
    // Ended with this task.
    let _feeder = Aborted(feeder.abort_handle());
    let mut readers = JoinSet::new();
    let activity = Arc::new(tokio::sync::Notify::new());
    for (stream, mut source) in outputs {
        let (flow, handle, activity) = (Arc::clone(&flow), handle.clone(), Arc::clone(&activity));
        readers.spawn(async move {
            let mut buffer = vec![0; CHUNK];
            while let Some(count) = source.read(&mut buffer).await {
                let bytes = buffer.get(..count).unwrap_or_default().to_vec();
                if !flow.send(&handle, channel, stream, bytes).await {
                    return;
                }
                activity.notify_one();
            }
        });
    }
    let status = child.wait().await;
    // A process that it left behind may hold its output for as long as it likes.
    while !readers.is_empty() {
        tokio::select! {
            _ = readers.join_next() => {}
            () = activity.notified() => {}
            () = tokio::time::sleep(AFTER_END), if !flow.is_sending() => break,
        }
    }
    readers.abort_all();
    from_client.close(&flow);
    finish(&handle, channel, status.unwrap_or_else(|_| ExitStatus::from_raw(255 << 8))).await;
}

struct Aborted(AbortHandle);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Writes to the process what the client sends, until it takes no more.
async fn feed(mut sink: Sink, from_client: Arc<Input>, flow: Arc<Flow>) {
    while let Some(bytes) = from_client.next(&flow).await {
        if sink.write_all(&bytes).await.is_err() {
            return from_client.close(&flow);
        }
    }
    // A terminal has no end of input: its end-of-file character does that.
    if let Sink::Terminal(_) = &sink {
        let _ = sink.write_all(&[END_OF_FILE]).await;
    }
}

/// How it ended, and that nothing follows. A client that has gone need not know.
async fn finish(handle: &Handle, channel: ChannelId, status: ExitStatus) {
    let _ = handle.eof(channel).await;
    let _ = match status.signal() {
        Some(signal) => handle.exit_signal_request(channel, name(signal), status.core_dumped(), String::new(), String::new()).await,
        None => handle.exit_status_request(channel, u32::from(status.code().unwrap_or(255).to_le_bytes()[0])).await,
    };
    let _ = handle.close(channel).await;
}

impl Source {
    /// `None` at the end.
    async fn read(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let read = match self {
            Self::Pipe(pipe) => pipe.read(buffer).await,
            // Once nobody has the other end open, reading gives EIO.
            Self::Terminal(terminal) => terminal.async_io(Interest::READABLE, |mut file| file.read(buffer)).await,
        };
        read.ok().filter(|count| *count > 0)
    }
}

impl Sink {
    async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(bytes).await,
            Self::Terminal(terminal) => {
                while !bytes.is_empty() {
                    let count = terminal.async_io(Interest::WRITABLE, |mut file| file.write(bytes)).await?;
                    bytes = bytes.get(count..).unwrap_or_default();
                }
                Ok(())
            }
        }
    }
}

/// Signals as RFC 4254, section 6.10, names them, and others that OpenSSH sends or that end programs: `NAME@domain` (same section).
const SIGNALS: [(&str, i32); 16] = [
    ("ABRT", libc::SIGABRT),
    ("ALRM", libc::SIGALRM),
    ("FPE", libc::SIGFPE),
    ("HUP", libc::SIGHUP),
    ("ILL", libc::SIGILL),
    ("INT", libc::SIGINT),
    ("KILL", libc::SIGKILL),
    ("PIPE", libc::SIGPIPE),
    ("QUIT", libc::SIGQUIT),
    ("SEGV", libc::SIGSEGV),
    ("TERM", libc::SIGTERM),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("BUS@formation", libc::SIGBUS),
    ("SYS@formation", libc::SIGSYS),
    ("TRAP@formation", libc::SIGTRAP),
];

fn number(signal: &Sig) -> Option<Signal> {
    let name = match signal {
        Sig::ABRT => "ABRT",
        Sig::ALRM => "ALRM",
        Sig::FPE => "FPE",
        Sig::HUP => "HUP",
        Sig::ILL => "ILL",
        Sig::INT => "INT",
        Sig::KILL => "KILL",
        Sig::PIPE => "PIPE",
        Sig::QUIT => "QUIT",
        Sig::SEGV => "SEGV",
        Sig::TERM => "TERM",
        Sig::USR1 => "USR1",
        Sig::Custom(name) => name,
    };
    SIGNALS.iter().find(|(known, _)| *known == name).and_then(|(_, number)| Signal::from_named_raw(*number))
}

fn name(signal: i32) -> Sig {
    let known = SIGNALS.iter().find(|(_, number)| *number == signal).map(|(name, _)| (*name).to_owned());
    Sig::Custom(known.unwrap_or_else(|| format!("{signal}@formation")))
}
