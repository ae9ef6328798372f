//! The main thread of a VM process: it answers the control socket, starts devices whose drivers are ready, carries the console
//! and ends the process.

mod consoles;
mod requests;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use self::consoles::Consoles;
use crate::config::{Fd, JailConfig, RestoreConfig, VmConfig};
use crate::control::channel::Channel;
use crate::control::{ControlReply, ControlRequest, ExitReason};
use crate::descriptors::Descriptors;
use crate::machine::{Machine, MachineError, Prepared, explain};
use crate::{exit, jail};

/// A process that nobody boots is left over from a daemon that died: it goes by itself.
const EMPTY_LIFE: Duration = Duration::from_secs(60);
/// More connections than a daemon and some tools need are an error in them.
const MAX_CONNECTIONS: usize = 32;
/// How long a reply may wait for a peer that does not read.
const REPLY_TIME: Duration = Duration::from_secs(1);

/// What can wait after a save waits until nobody has asked for anything for so long.
const SETTLED_AFTER: Duration = Duration::from_millis(100);

/// What woke the main thread.
#[derive(Clone, Copy)]
enum Source {
    Listener,
    Connection(usize),
    Exit,
    Activations,
    Ejected,
    Printed,
    Console(usize),
    Stdin,
}

pub struct Server {
    /// `SOCK_SEQPACKET`, bound and listening.
    listener: Option<OwnedFd>,
    connections: Vec<Arc<Channel>>,
    machine: Option<Machine>,
    consoles: Consoles,
    /// Standard input, while it types on the console.
    stdin: Option<File>,
    /// Who has memory copied while the VM runs, to save it upon that.
    copies_for: Option<Arc<Channel>>,
    /// Who asked for the end, and what to answer once the exit record is written.
    farewell: Option<(Arc<Channel>, ControlReply)>,
    born: Instant,
}

/// How the process ends.
type Ending = (ExitReason, Option<String>);

impl Server {
    /// A VM process that listens for its daemon, and, on its own, types standard input into the console.
    #[must_use]
    pub fn new(listener: Option<OwnedFd>, stdin: Option<File>) -> Self {
        Server {
            listener,
            connections: Vec::new(),
            machine: None,
            consoles: Consoles::default(),
            stdin,
            copies_for: None,
            farewell: None,
            born: Instant::now(),
        }
    }

    /// Boots the VM and starts its vCPUs.
    ///
    /// # Errors
    /// When the VM cannot be made as configured.
    pub fn boot(&mut self, config: &VmConfig, fds: Vec<OwnedFd>) -> Result<(), MachineError> {
        let mut fds = Descriptors::new(fds);
        record_exit(config.exit_record, &mut fds)?;
        let prepared = Prepared::new(config, &mut fds)?;
        drop(fds);
        self.enter(prepared, &config.jail)?.resume();
        Ok(())
    }

    /// Goes on with a saved VM, or holds it where it stood.
    ///
    /// # Errors
    /// When the state cannot be used here.
    pub fn restore(&mut self, config: &RestoreConfig, fds: Vec<OwnedFd>) -> Result<(), MachineError> {
        let mut fds = Descriptors::new(fds);
        record_exit(config.exit_record, &mut fds)?;
        let prepared = Prepared::restore(config, &mut fds)?;
        drop(fds);
        let machine = self.enter(prepared, &config.jail)?;
        if config.resume {
            machine.resume();
        }
        Ok(())
    }

    /// Gives up what the VM must not have, and starts its threads. It is paused then.
    fn enter(&mut self, prepared: Prepared, config: &JailConfig) -> Result<&Machine, MachineError> {
        jail::prepare(config)?;
        let machine = Machine::start(prepared)?;
        jail::enter_main();
        Ok(self.machine.insert(machine))
    }

    /// Serves until the VM ends; writes the exit record and returns the status to exit with.
    #[must_use]
    pub fn run(mut self) -> ExitCode {
        let (reason, message) = loop {
            match self.turn() {
                Ok(None) => {}
                Ok(Some(ending)) => break ending,
                Err(error) => break (ExitReason::Failed, Some(format!("the VM process cannot wait for events: {error}"))),
            }
        };
        self.end(reason, message)
    }

    /// Leaves the VM in a sound state, writes the exit record and says goodbye to those who wait for it.
    fn end(&mut self, reason: ExitReason, message: Option<String>) -> ExitCode {
        if let Some(message) = &message {
            eprintln!("form-vmm: {message}");
        }
        if let Some(machine) = &self.machine {
            machine.pause();
            self.consoles.send(&machine.serial().attached().take());
        }
        if let Err(error) = exit::record(reason, message) {
            eprintln!("form-vmm: cannot write the exit record: {error}");
        }
        if let Some((channel, last)) = self.farewell.take() {
            requests::reply(&channel, &last, &[]);
        }
        exit::status(reason)
    }

    /// Ends a process whose VM could not be booted.
    #[must_use]
    pub fn fail(mut self, error: &MachineError) -> ExitCode {
        self.end(ExitReason::Failed, Some(explain(error)))
    }

    fn turn(&mut self) -> io::Result<Option<Ending>> {
        let sources = self.wait()?;
        if self.machine.is_none() && self.connections.is_empty() && self.born.elapsed() > EMPTY_LIFE {
            return Ok(Some((ExitReason::Failed, Some("nobody booted the VM".to_owned()))));
        }
        if let Some(machine) = self.machine.as_mut().filter(|_| sources.is_empty()) {
            machine.settle();
        }
        let mut gone = Vec::new();
        for source in sources {
            match source {
                Source::Listener => self.accept(),
                Source::Connection(index) => match self.serve(index) {
                    Served::Stay => {}
                    Served::Gone => gone.push(index),
                    Served::End(ending) => return Ok(Some(ending)),
                },
                Source::Exit => {
                    if let Some(ending) = self.machine.as_ref().and_then(|machine| machine.exit().get()) {
                        return Ok(Some(ending));
                    }
                }
                Source::Activations => {
                    if let Some(machine) = &self.machine {
                        machine.activate_devices();
                    }
                }
                Source::Ejected => {
                    if let Some(machine) = &mut self.machine {
                        machine.end_ejected();
                    }
                }
                Source::Printed => self.print(),
                Source::Console(index) => {
                    if let Some(machine) = &self.machine {
                        self.consoles.carry(index, machine.serial());
                    }
                }
                Source::Stdin => self.type_stdin(),
            }
        }
        for index in gone.into_iter().rev() {
            let channel = self.connections.swap_remove(index);
            self.leave_copy(&channel);
        }
        if let (true, Some(machine)) = (self.consoles.reap(), &self.machine) {
            machine.serial().attached().set_active(false);
        }
        Ok(None)
    }

    /// Waits until something happens. Connections and consoles come with their indices, in ascending order.
    fn wait(&self) -> io::Result<Vec<Source>> {
        let mut polled = Vec::with_capacity(8);
        let mut sources = Vec::with_capacity(8);
        let mut watch = |fd, flags, source| {
            polled.push(PollFd::from_borrowed_fd(fd, flags));
            sources.push(source);
        };
        let attached = self.machine.as_ref().map(|machine| machine.serial().attached());
        if let Some(machine) = &self.machine {
            watch(borrow(&machine.exit().event), PollFlags::IN, Source::Exit);
            watch(borrow(&machine.activations().event), PollFlags::IN, Source::Activations);
            watch(borrow(machine.ejected()), PollFlags::IN, Source::Ejected);
        }
        if let Some(attached) = &attached {
            watch(borrow(&attached.ready), PollFlags::IN, Source::Printed);
        }
        for (index, (fd, flags)) in self.consoles.watch().enumerate() {
            watch(fd, flags, Source::Console(index));
        }
        if let Some(stdin) = self.stdin.as_ref().filter(|_| self.machine.is_some()) {
            watch(stdin.as_fd(), PollFlags::IN, Source::Stdin);
        }
        for (index, connection) in self.connections.iter().enumerate() {
            watch(connection.as_fd(), PollFlags::IN, Source::Connection(index));
        }
        if let Some(listener) = &self.listener {
            watch(listener.as_fd(), PollFlags::IN, Source::Listener);
        }
        let timeout = match &self.machine {
            None => Some(Timespec { tv_sec: EMPTY_LIFE.as_secs() as i64 + 1, tv_nsec: 0 }),
            Some(machine) => machine.is_unsettled().then_some(Timespec { tv_sec: 0, tv_nsec: SETTLED_AFTER.subsec_nanos().into() }),
        };
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        }
        let woken = polled.iter().zip(sources).filter(|(polled, _)| !polled.revents().is_empty());
        Ok(woken.map(|(_, source)| source).collect())
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        // A peer that went away meanwhile is no error.
        match rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) if self.connections.len() < MAX_CONNECTIONS => self.connections.push(Arc::new(Channel::new(socket))),
            Ok(_) | Err(_) => {}
        }
    }

    fn serve(&mut self, index: usize) -> Served {
        let channel = Arc::clone(&self.connections[index]);
        match channel.receive::<ControlRequest>(Instant::now()) {
            Ok(Some((request, fds))) => self.handle(&channel, request, fds),
            // Nothing there after all.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Served::Stay,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                let message = format!("not a request: {error}");
                requests::reply(&channel, &requests::error(crate::control::ErrorKind::Invalid, message), &[])
            }
            Ok(None) | Err(_) => Served::Gone,
        }
    }

    /// Nobody saves the VM any more upon what was copied for a peer that is gone: what changes need not be known.
    fn leave_copy(&mut self, channel: &Arc<Channel>) {
        if self.copies_for.take_if(|copies_for| Arc::ptr_eq(copies_for, channel)).is_some()
            && let Some(machine) = &mut self.machine
        {
            machine.leave_copy();
        }
    }

    fn print(&mut self) {
        if let Some(machine) = &self.machine {
            let attached = machine.serial().attached();
            // The counter says no more than that there is something.
            let _ = attached.ready.read();
            self.consoles.send(&attached.take());
        }
    }

    fn type_stdin(&mut self) {
        let mut bytes = [0u8; 512];
        let count = match self.stdin.as_mut().map(|stdin| stdin.read(&mut bytes)) {
            Some(Ok(count)) => count,
            Some(Err(error)) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => return,
            _ => 0,
        };
        match &self.machine {
            Some(machine) if count > 0 => drop(machine.serial().input(&bytes[..count])),
            _ => self.stdin = None,
        }
    }
}

fn record_exit(record: Option<Fd>, fds: &mut Descriptors) -> Result<(), MachineError> {
    if let Some(record) = record {
        exit::record_to(File::from(fds.take(record, "exit record")?));
    }
    Ok(())
}

enum Served {
    Stay,
    Gone,
    End(Ending),
}

fn borrow(event: &vmm_sys_util::eventfd::EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor belongs to `event`, which the result borrows.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The reply `Done`, for whom it matters.
const DONE: ControlReply = ControlReply::Done;
