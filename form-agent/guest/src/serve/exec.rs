//! Running a command for the host, with a terminal or with pipes.

use std::{
    fs::File,
    io::{self, Read, Write},
    process::{Command, Stdio},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::Duration,
};

use form_guest::protocol::{ErrorKind, ExecRequest, ExitStatus, Frame, FrameKind, Reply, TtySize};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fd::{AsFd, OwnedFd},
    process::{Pid, Signal},
    termios::{Winsize, tcgetpgrp, tcsetwinsize},
};

use super::{Channel, Event};
use crate::{
    identity::Identity,
    machine::Machine,
    process::{Child, start_failure},
    sys,
    terminal::{self, Terminal},
};

const CHUNK: usize = 32 << 10;
/// How long output may stay away after the end of the process before we stop waiting for those it left behind.
const AFTER_END: Duration = Duration::from_millis(50);
/// Between the hang-up and the kill.
const HANG_UP_GRACE: Duration = Duration::from_secs(2);

/// A command that runs: where its input goes, and where its output comes from.
struct Running {
    child: Child,
    input: Option<File>,
    outputs: Vec<(FrameKind, File)>,
    /// Our end of its terminal.
    terminal: Option<File>,
}

pub fn exec(machine: &Arc<Machine>, channel: &Channel, request: &ExecRequest) -> io::Result<()> {
    if machine.stopping() {
        return channel.refuse(ErrorKind::Busy, "the machine is going down");
    }
    let identity = match Identity::lookup(request.user.as_deref()) {
        Ok(identity) => identity,
        Err(error) => return channel.refuse(ErrorKind::NotFound, error),
    };
    let shell = [identity.shell.clone(), "-l".to_owned()];
    let words: &[String] = if request.command.is_empty() { &shell } else { &request.command };
    let Some((program, arguments)) = words.split_first() else { return Ok(()) };
    let home = if std::path::Path::new(&identity.home).is_dir() { identity.home.as_str() } else { "/" };
    let workdir = request.workdir.as_deref().unwrap_or(home);
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(environment(machine, &identity, request)).current_dir(workdir);
    match start(machine, &mut command, &identity, request) {
        Ok(running) => {
            channel.reply(&Reply::Started { pid: running.child.pid.as_raw_nonzero().get().cast_unsigned() })?;
            session(channel, running)
        }
        Err(error) => {
            let (exit, message) = start_failure(program, workdir, &error);
            channel.reply(&Reply::Started { pid: 0 })?;
            channel.write(FrameKind::Stderr, format!("{message}\n").as_bytes())?;
            channel.send(&exit.to_frame())
        }
    }
}

fn environment(machine: &Machine, identity: &Identity, request: &ExecRequest) -> Vec<(String, String)> {
    let mut env = identity.env();
    env.extend(machine.settings.env.clone());
    let user = machine.settings.users.iter().find(|user| Some(&user.name) == identity.name.as_ref());
    env.extend(user.map(|user| user.env.clone()).unwrap_or_default());
    if let Some(tty) = &request.tty {
        env.push(("TERM".to_owned(), tty.term.clone().unwrap_or_else(|| "xterm-256color".to_owned())));
    }
    env.extend(request.env.clone());
    env
}

fn start(machine: &Machine, command: &mut Command, identity: &Identity, request: &ExecRequest) -> io::Result<Running> {
    match &request.tty {
        Some(size) => start_on_terminal(machine, command, identity, size),
        None => start_on_pipes(machine, command, identity, request.stdin),
    }
}

fn start_on_pipes(machine: &Machine, command: &mut Command, identity: &Identity, stdin: bool) -> io::Result<Running> {
    command.stdin(if stdin { Stdio::piped() } else { Stdio::null() }).stdout(Stdio::piped()).stderr(Stdio::piped());
    sys::prepare(command, &identity.launch(false));
    let mut child = machine.children.spawn(command)?;
    let input = child.stdin.take().map(|stdin| File::from(OwnedFd::from(stdin)));
    let stdout = child.stdout.take().map(|stdout| (FrameKind::Stdout, File::from(OwnedFd::from(stdout))));
    let stderr = child.stderr.take().map(|stderr| (FrameKind::Stderr, File::from(OwnedFd::from(stderr))));
    Ok(Running { child, input, outputs: stdout.into_iter().chain(stderr).collect(), terminal: None })
}

fn start_on_terminal(machine: &Machine, command: &mut Command, identity: &Identity, size: &TtySize) -> io::Result<Running> {
    let Terminal { ours, theirs } = terminal::open(identity.uid, window(size))?;
    command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
    sys::prepare(command, &identity.launch(true));
    let child = machine.children.spawn(command)?;
    // The command holds copies of the terminal, and our end would never see its end while they are open here.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let ours = File::from(ours);
    Ok(Running { child, input: Some(ours.try_clone()?), outputs: vec![(FrameKind::Stdout, ours.try_clone()?)], terminal: Some(ours) })
}

fn window(size: &TtySize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Carries bytes both ways until the process has ended or the host has hung up.
fn session(channel: &Channel, mut running: Running) -> io::Result<()> {
    let finished = eventfd(0, EventfdFlags::CLOEXEC)?;
    let (to_input, input) = sync_channel::<Vec<u8>>(16);
    let mut to_input = running.input.take().map(|file| {
        thread::spawn(move || feed(file, &input));
        to_input
    });
    let outputs = std::mem::take(&mut running.outputs);
    let child = &running.child;
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let result = send_output(channel, outputs, child);
            if result.is_err() {
                hang_up(child);
            }
            let _ = rustix::io::write(&finished, &1_u64.to_ne_bytes());
            result
        });
        loop {
            match channel.wait(Some(finished.as_fd()), None) {
                Event::Other => break,
                Event::Nothing => continue,
                Event::Readable => {}
            }
            match channel.read() {
                Ok(Some(frame)) => handle(channel, &frame, &running, &mut to_input, &finished),
                Ok(None) | Err(_) => {
                    to_input = None;
                    hang_up(child);
                    break;
                }
            }
        }
        let exit = sender.join().unwrap_or_else(|_| Err(io::Error::other("the output thread failed")))?;
        // Only now, when nobody here reads the channel any more: on a port the next request may follow at once.
        channel.send(&exit.to_frame())
    })
}

/// What a terminal's end does to those who sit at it; and the end of those who do not listen.
fn hang_up(child: &Child) {
    child.signal_group(Signal::HUP);
    if child.wait_for(HANG_UP_GRACE).is_none() {
        child.signal_group(Signal::KILL);
    }
}

/// Writes input to the process until it takes no more.
fn feed(mut file: File, input: &Receiver<Vec<u8>>) {
    while let Ok(bytes) = input.recv() {
        if file.write_all(&bytes).is_err() {
            return;
        }
    }
}

fn handle(channel: &Channel, frame: &Frame, running: &Running, to_input: &mut Option<SyncSender<Vec<u8>>>, finished: &OwnedFd) {
    match frame.kind {
        FrameKind::Stdin => {
            if let Some(sender) = to_input
                && !pass_on(channel, sender, frame.payload.clone(), finished)
            {
                *to_input = None;
            }
        }
        FrameKind::StdinClose => match &running.terminal {
            // A terminal has no end of input: its end-of-file character does that.
            Some(_) => drop(to_input.as_ref().map(|sender| sender.try_send(vec![4]))),
            None => *to_input = None,
        },
        FrameKind::Resize => {
            if let (Some(terminal), Ok(size)) = (&running.terminal, frame.parse::<TtySize>()) {
                let _ = tcsetwinsize(terminal, window(&size));
            }
        }
        FrameKind::Signal => {
            if let Some(signal) = frame.payload.first().and_then(|number| Signal::from_named_raw(i32::from(*number))) {
                send_signal(running, signal);
            }
        }
        // Nothing else has a meaning here.
        _ => {}
    }
}

/// To whoever has the terminal, else to the whole group.
fn send_signal(running: &Running, signal: Signal) {
    let foreground: Option<Pid> = running.terminal.as_ref().and_then(|terminal| tcgetpgrp(terminal).ok());
    match foreground {
        Some(group) => drop(rustix::process::kill_process_group(group, signal)),
        None => running.child.signal_group(signal),
    }
}

/// Gives input to the feeder. A process that reads nothing holds the host back, but must not hide that it has ended.
fn pass_on(channel: &Channel, sender: &SyncSender<Vec<u8>>, mut bytes: Vec<u8>, finished: &OwnedFd) -> bool {
    loop {
        match sender.try_send(bytes) {
            Ok(()) => return true,
            Err(TrySendError::Disconnected(_)) => return false,
            Err(TrySendError::Full(back)) => bytes = back,
        }
        let mut fds = [PollFd::new(finished, PollFlags::IN), PollFd::new(channel, PollFlags::RDHUP)];
        let pause = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        if poll(&mut fds, Some(&pause)).is_ok_and(|count| count > 0) {
            return false;
        }
    }
}

/// Sends output until the process has ended and everything it wrote is on its way. Gives how it ended.
fn send_output(channel: &Channel, outputs: Vec<(FrameKind, File)>, child: &Child) -> io::Result<ExitStatus> {
    carry(outputs, |kind, bytes| channel.write(kind, bytes), |outputs, ended| wait_for_output(outputs, child, ended))?;
    Ok(child.wait())
}

/// Reads outputs as `wait` says that there is something, until the process has ended and nothing more comes. `wait` is told whether
/// the end is known.
fn carry(
    mut outputs: Vec<(FrameKind, File)>,
    mut write: impl FnMut(FrameKind, &[u8]) -> io::Result<()>,
    mut wait: impl FnMut(&[(FrameKind, File)], bool) -> io::Result<Ready>,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut ended = false;
    loop {
        let known = ended;
        let ready = wait(&outputs, known)?;
        ended |= ready.ended;
        // The answer that tells of the end may have looked at an output before the last bytes came: whoever knew of the end has seen them.
        if ready.outputs.is_empty() && ended && (known || outputs.is_empty()) {
            return Ok(());
        }
        for position in ready.outputs.into_iter().rev() {
            let Some((kind, file)) = outputs.get_mut(position) else { continue };
            match file.read(&mut buffer) {
                // A terminal whose other end is closed gives EIO.
                Ok(0) | Err(_) => drop(outputs.remove(position)),
                Ok(count) => write(*kind, buffer.get(..count).unwrap_or_default())?,
            }
        }
    }
}

struct Ready {
    outputs: Vec<usize>,
    ended: bool,
}

fn wait_for_output(outputs: &[(FrameKind, File)], child: &Child, ended: bool) -> io::Result<Ready> {
    let mut fds: Vec<PollFd<'_>> = outputs.iter().map(|(_, file)| PollFd::new(file, PollFlags::IN)).collect();
    if !ended {
        fds.push(PollFd::new(&child.ended, PollFlags::IN));
    }
    let pause = Timespec { tv_sec: 0, tv_nsec: AFTER_END.subsec_nanos().into() };
    loop {
        match poll(&mut fds, ended.then_some(&pause)) {
            Err(rustix::io::Errno::INTR) => {}
            result => {
                result?;
                break;
            }
        }
    }
    let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
    Ok(Ready {
        outputs: (0..outputs.len()).filter(|position| fds.get(*position).is_some_and(is_ready)).collect(),
        ended: !ended && fds.last().is_some_and(is_ready),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_while_one_was_asking_is_carried_too() {
        let (ours, theirs) = rustix::pipe::pipe().expect("a pipe");
        File::from(theirs).write_all(b"its last words").expect("fits");
        let mut heard = Vec::new();
        // The first answer looked at the output before the words came, and at the process after them.
        let mut answers = [Ready { outputs: vec![], ended: true }, Ready { outputs: vec![0], ended: false }].into_iter();
        let wait = |outputs: &[(FrameKind, File)], ended: bool| match answers.next() {
            Some(answer) => Ok(answer),
            None => Ok(Ready { outputs: (0..outputs.len()).collect(), ended: !ended }),
        };
        let write = |_, bytes: &[u8]| {
            heard.extend_from_slice(bytes);
            Ok(())
        };
        carry(vec![(FrameKind::Stdout, File::from(ours))], write, wait).expect("all carried");
        assert_eq!(heard, b"its last words");
    }

    #[test]
    fn an_output_that_others_hold_open_is_waited_for_no_longer_than_said() {
        let (ours, _theirs) = rustix::pipe::pipe().expect("a pipe");
        let mut asked = 0;
        let wait = |_: &[(FrameKind, File)], _: bool| {
            asked += 1;
            Ok(Ready { outputs: vec![], ended: asked == 1 })
        };
        carry(vec![(FrameKind::Stdout, File::from(ours))], |_, _| Ok(()), wait).expect("the end");
        assert_eq!(asked, 2);
    }
}
