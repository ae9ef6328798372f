//! The daemon's end of the control socket.

use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::channel::Channel;
use super::{ControlReply, ControlRequest, ErrorKind, Metrics, SaveHow, VmState};
use crate::config::{DiskConfig, DiskLimits, Fd, NetworkConfig, RestoreConfig, VmConfig};
use crate::machine::Saved;
use crate::memory::image::SaveId;

/// How long a VM process may take to answer. Booting reads a kernel and an initramfs, which may come from a slow disk.
const TIMEOUT: Duration = Duration::from_secs(10);
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
/// A save writes all of a VM's memory.
const SAVE_TIMEOUT: Duration = Duration::from_secs(1800);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot reach the VM process")]
    Connect(#[source] io::Error),
    /// It may be alive and busy, or stopped by a debugger or a signal.
    #[error("the VM process did not answer within {0:?}")]
    TimedOut(Duration),
    #[error("the VM process is gone")]
    Gone,
    #[error("the VM process and this program do not understand each other: {0}")]
    Protocol(String),
    #[error("{message}")]
    Refused { kind: ErrorKind, message: String },
    #[error("cannot talk to the VM process")]
    Io(#[source] io::Error),
}

/// A connection to a VM process. Requests are answered in order, one at a time; clone-free sharing between threads is fine.
/// After `TimedOut` or `Protocol` the connection is used up (a late answer could be taken for another's): connect again.
pub struct Client {
    channel: Mutex<Option<Channel>>,
    timeout: Duration,
}

impl Client {
    /// # Errors
    /// [`ClientError::Connect`] when no VM process listens at `path`.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        Ok(Client::new(Channel::connect(path).map_err(ClientError::Connect)?))
    }

    /// Speaks over an existing connection.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        Client { channel: Mutex::new(Some(channel)), timeout: TIMEOUT }
    }

    /// Waits this long for each answer but that to `boot`, instead of ten seconds.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Client { timeout, ..self }
    }

    /// Boots the VM. Each `Fd` in `config` is an index into `fds`.
    ///
    /// # Errors
    /// When the VM cannot be made as configured; its process then ends.
    pub fn boot(&self, config: &VmConfig, fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let request = ControlRequest::Boot { config: Box::new(config.clone()) };
        self.done(&request, fds, self.timeout.max(BOOT_TIMEOUT))
    }

    /// Goes on with a saved VM. Each `Fd` in `config` is an index into `fds`.
    ///
    /// # Errors
    /// When the state cannot be used here; its process then ends.
    pub fn restore(&self, config: &RestoreConfig, fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let request = ControlRequest::Restore { config: Box::new(config.clone()) };
        self.done(&request, fds, self.timeout.max(BOOT_TIMEOUT))
    }

    /// Writes the paused VM to two files that are open for writing.
    ///
    /// # Errors
    /// When the VM is not paused, or a file cannot be written; the VM is as it was.
    pub fn save(&self, state: BorrowedFd<'_>, memory: BorrowedFd<'_>, how: SaveHow) -> Result<Saved, ClientError> {
        let request = ControlRequest::Save { state: Fd(0), memory: Fd(1), how };
        self.saved(&request, &[state, memory])
    }

    /// Of a process of an earlier release all of it was written, and it does not say how much.
    fn saved(&self, request: &ControlRequest, fds: &[BorrowedFd<'_>]) -> Result<Saved, ClientError> {
        match self.ask(request, fds, self.timeout.max(SAVE_TIMEOUT))? {
            (ControlReply::Done, _) => Ok(Saved { incremental: false, written: None }),
            (ControlReply::Saved { incremental, written_bytes }, _) => Ok(Saved { incremental, written: written_bytes }),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// The saves that the next one can build upon, the latest last.
    ///
    /// # Errors
    /// When the VM is not booted; [`ErrorKind::Invalid`] of a process of a release that always saved all.
    pub fn saves(&self) -> Result<Vec<SaveId>, ClientError> {
        match self.ask(&ControlRequest::Saves, &[], self.timeout)? {
            (ControlReply::Saves { ids }, _) => Ok(ids),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// As [`Client::save`], but the VM may go on before its memory is written. Wait for that with [`Aside::wait`].
    ///
    /// # Errors
    /// As [`Client::save`], and when there is no memory for a copy of the process.
    pub fn save_aside(&self, state: BorrowedFd<'_>, memory: BorrowedFd<'_>, how: SaveHow) -> Result<(Aside, Saved), ClientError> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| ClientError::Io(error.into()))?;
        let request = ControlRequest::SaveAside { state: Fd(0), memory: Fd(1), whole: Fd(2), how };
        let saved = self.saved(&request, &[state, memory, write.as_fd()])?;
        Ok((Aside(read), saved))
    }

    /// Copies memory of the running VM to a file that is open for reading and writing, or with `onto` what has changed since the save or the
    /// copy that it holds. Wait for it with [`Aside::wait`]; a save with `onto` to the same file writes what has changed then.
    ///
    /// # Errors
    /// When the VM does not run, or its memory cannot be logged; [`ErrorKind::Invalid`] of a process of a release that could not do that.
    pub fn precopy(&self, memory: BorrowedFd<'_>, onto: bool) -> Result<(Aside, Saved), ClientError> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| ClientError::Io(error.into()))?;
        let request = ControlRequest::Precopy { memory: Fd(0), whole: Fd(1), onto };
        let saved = self.saved(&request, &[memory, write.as_fd()])?;
        Ok((Aside(read), saved))
    }

    /// The state of the VM and the process id as the VM process sees it.
    ///
    /// # Errors
    /// When the VM process does not answer.
    pub fn status(&self) -> Result<(VmState, u32), ClientError> {
        match self.ask(&ControlRequest::Status, &[], self.timeout)? {
            (ControlReply::Status { state, pid }, _) => Ok((state, pid)),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// # Errors
    /// When the VM does not run.
    pub fn pause(&self) -> Result<(), ClientError> {
        self.done(&ControlRequest::Pause, &[], self.timeout)
    }

    /// # Errors
    /// When the VM is not paused.
    pub fn resume(&self) -> Result<(), ClientError> {
        self.done(&ControlRequest::Resume, &[], self.timeout)
    }

    /// Presses the power button: the guest's operating system decides what to do.
    ///
    /// # Errors
    /// When the VM does not run.
    pub fn power_button(&self) -> Result<(), ClientError> {
        self.done(&ControlRequest::PowerButton, &[], self.timeout)
    }

    /// Ends the VM and its process at once. Fine also when it is gone already.
    ///
    /// # Errors
    /// When the VM process does not answer.
    pub fn stop(&self) -> Result<(), ClientError> {
        match self.done(&ControlRequest::Stop, &[], self.timeout) {
            Err(ClientError::Gone) => Ok(()),
            other => other,
        }
    }

    /// A stream to `port` of the guest.
    ///
    /// # Errors
    /// `Refused` with [`ErrorKind::Refused`] while nothing listens there.
    pub fn vsock_connect(&self, port: u32) -> Result<OwnedFd, ClientError> {
        self.stream(&ControlRequest::VsockConnect { port })
    }

    /// A stream to the serial console, from now on. What was printed before is in the log ring.
    ///
    /// # Errors
    /// When the VM is not booted.
    pub fn console(&self) -> Result<OwnedFd, ClientError> {
        self.stream(&ControlRequest::Console)
    }

    /// Asks the balloon to take `mib` MiB from the guest.
    ///
    /// # Errors
    /// When the VM has no balloon.
    pub fn balloon(&self, mib: u64) -> Result<(), ClientError> {
        self.done(&ControlRequest::Balloon { mib }, &[], self.timeout)
    }

    /// Says how much memory the guest should have in all. How much it has is among [`Client::metrics`].
    ///
    /// # Errors
    /// When the VM does not run, or cannot have so much or so little while it does.
    pub fn memory(&self, mib: u64) -> Result<(), ClientError> {
        self.done(&ControlRequest::Memory { mib }, &[], self.timeout)
    }

    /// # Errors
    /// When the VM is not booted.
    pub fn metrics(&self) -> Result<Metrics, ClientError> {
        match self.ask(&ControlRequest::Metrics, &[], self.timeout)? {
            (ControlReply::Metrics(metrics), _) => Ok(*metrics),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// How many vCPUs the guest has, and how many it can have.
    ///
    /// # Errors
    /// When the VM is not booted; [`ErrorKind::Invalid`] of a process of a release that could not change them.
    pub fn vcpus(&self) -> Result<(u8, u8), ClientError> {
        match self.ask(&ControlRequest::Vcpus, &[], self.timeout)? {
            (ControlReply::Vcpus { count, most }, _) => Ok((count, most)),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Gives the running guest vCPUs until it has `count`. It has to be told to use them.
    ///
    /// # Errors
    /// When the VM does not run, cannot have so many, or KVM makes none.
    pub fn plug_vcpus(&self, count: u8) -> Result<(), ClientError> {
        self.done(&ControlRequest::PlugVcpus { count }, &[], self.timeout)
    }

    /// Asks the running guest for vCPUs until it has `count`. The result is at its end when it has no more, or the VM process is gone.
    ///
    /// # Errors
    /// When the VM does not run.
    pub fn unplug_vcpus(&self, count: u8) -> Result<OwnedFd, ClientError> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| ClientError::Io(error.into()))?;
        self.done(&ControlRequest::UnplugVcpus { count, gone: Fd(0) }, &[write.as_fd()], self.timeout)?;
        Ok(read)
    }

    /// Puts a disk into the running VM. Each `Fd` in `disk` is an index into `fds`.
    ///
    /// # Errors
    /// When the VM does not run, has a device of this id or no free slot, or the disk cannot be opened.
    pub fn plug(&self, disk: &DiskConfig, fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        self.done(&ControlRequest::Plug { disk: Box::new(disk.clone()) }, fds, self.timeout)
    }

    /// Puts a network interface into the running VM. `network.tap` is an index into `fds`.
    ///
    /// # Errors
    /// When the VM does not run, has a device of this id or no free slot, or the descriptor is no tap; [`ErrorKind::Invalid`] from a VM
    /// process that does not know this request.
    pub fn plug_network(&self, network: &NetworkConfig, fds: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        self.done(&ControlRequest::PlugNetwork { network: Box::new(network.clone()) }, fds, self.timeout)
    }

    /// Asks the guest for the disk or network interface `id`. The result is at its end when it is gone, or the VM process is.
    ///
    /// # Errors
    /// When the VM does not run; [`ErrorKind::NotFound`] when there is no such device.
    pub fn unplug(&self, id: &str) -> Result<OwnedFd, ClientError> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| ClientError::Io(error.into()))?;
        self.done(&ControlRequest::Unplug { id: id.to_owned(), gone: Fd(0) }, &[write.as_fd()], self.timeout)?;
        Ok(read)
    }

    /// Makes the disk `id` of the running VM `size_bytes` large.
    ///
    /// # Errors
    /// When the VM does not run, or the disk is larger already; [`ErrorKind::NotFound`] when there is no such disk.
    pub fn grow(&self, id: &str, size_bytes: u64) -> Result<(), ClientError> {
        self.done(&ControlRequest::Grow { id: id.to_owned(), size_bytes }, &[], self.timeout)
    }

    /// Gives the disk `id` these limits, running or paused.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such disk.
    pub fn limit_disk(&self, id: &str, limits: DiskLimits) -> Result<(), ClientError> {
        self.done(&ControlRequest::LimitDisk { id: id.to_owned(), limits }, &[], self.timeout)
    }

    /// Lets the network interface `id` move this many bytes in a second, each way; `None`: as many as it can.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such interface.
    pub fn limit_network(&self, id: &str, bytes_per_second: Option<NonZeroU64>) -> Result<(), ClientError> {
        self.done(&ControlRequest::LimitNetwork { id: id.to_owned(), bytes_per_second }, &[], self.timeout)
    }

    fn done(&self, request: &ControlRequest, fds: &[BorrowedFd<'_>], timeout: Duration) -> Result<(), ClientError> {
        match self.ask(request, fds, timeout)? {
            (ControlReply::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn stream(&self, request: &ControlRequest) -> Result<OwnedFd, ClientError> {
        let (reply, mut fds) = self.ask(request, &[], self.timeout)?;
        match (reply, fds.pop()) {
            (ControlReply::Done, Some(stream)) if fds.is_empty() => Ok(stream),
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn ask(
        &self,
        request: &ControlRequest,
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<(ControlReply, Vec<OwnedFd>), ClientError> {
        let mut slot = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken out, and put back only when the exchange is complete.
        let channel = slot.take().ok_or(ClientError::Gone)?;
        let deadline = Instant::now() + timeout;
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::TimedOut => ClientError::TimedOut(timeout),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Gone,
            io::ErrorKind::InvalidData => ClientError::Protocol(error.to_string()),
            _ => ClientError::Io(error),
        };
        channel.send(request, fds, deadline).map_err(failed)?;
        let (reply, fds) = channel.receive(deadline).map_err(failed)?.ok_or(ClientError::Gone)?;
        *slot = Some(channel);
        match reply {
            ControlReply::Error { kind, message } => Err(ClientError::Refused { kind, message }),
            other => Ok((other, fds)),
        }
    }
}

/// Memory that is being written while its VM goes on.
#[derive(Debug)]
pub struct Aside(OwnedFd);

impl Aside {
    /// Waits until it is whole, and the copy of the process is gone with what it held: its end closes the pipe. Gives the bytes of pages
    /// written, if the process says that.
    ///
    /// # Errors
    /// [`ClientError::Gone`] when the VM process ended first, [`ClientError::Io`] when the memory could not be written.
    pub fn wait(self) -> Result<Option<u64>, ClientError> {
        let mut said = Vec::new();
        // A process that goes on talking is not listened to for ever.
        File::from(self.0).take(13).read_to_end(&mut said).map_err(ClientError::Io)?;
        let errno = said.first_chunk().map(|errno| i32::from_le_bytes(*errno)).ok_or(ClientError::Gone)?;
        let written = match said.len() {
            4 => None,
            12 => said.last_chunk().map(|written| u64::from_le_bytes(*written)),
            _ => return Err(ClientError::Gone),
        };
        if errno == 0 { Ok(written) } else { Err(ClientError::Io(io::Error::from_raw_os_error(errno))) }
    }
}

fn unexpected(reply: &ControlReply) -> ClientError {
    ClientError::Protocol(format!("unexpected reply {reply:?}"))
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A client, and a VM process that answers each request as `answer` says.
    fn served(answer: impl Fn(ControlRequest, &Channel) + Send + 'static) -> Client {
        let (mine, yours) = Channel::pair().unwrap();
        thread::spawn(move || {
            let far = || Instant::now() + Duration::from_secs(5);
            while let Ok(Some((request, _))) = yours.receive(far()) {
                answer(request, &yours);
            }
        });
        Client::new(mine).with_timeout(Duration::from_millis(200))
    }

    fn reply(channel: &Channel, reply: &ControlReply, fds: &[BorrowedFd<'_>]) {
        channel.send(reply, fds, Instant::now() + Duration::from_secs(1)).unwrap();
    }

    #[test]
    fn answers_and_refusals_come_through() {
        let client = served(|request, channel| match request {
            ControlRequest::Status => reply(channel, &ControlReply::Status { state: VmState::Paused, pid: 9 }, &[]),
            ControlRequest::Console => reply(channel, &ControlReply::Done, &[channel.as_fd()]),
            ControlRequest::VsockConnect { .. } => {
                let error = ControlReply::Error { kind: ErrorKind::Refused, message: "nobody".into() };
                reply(channel, &error, &[]);
            }
            _ => reply(channel, &ControlReply::Done, &[]),
        });
        assert_eq!(client.status().unwrap(), (VmState::Paused, 9));
        client.pause().unwrap();
        client.console().unwrap();
        assert!(matches!(client.vsock_connect(1), Err(ClientError::Refused { kind: ErrorKind::Refused, .. })));
        // A refusal does not end the connection; a reply of another kind is an error.
        assert!(matches!(client.metrics(), Err(ClientError::Protocol(_))));
        client.resume().unwrap();
    }

    #[test]
    fn a_process_of_an_earlier_release_saves_all() {
        let how = SaveHow { onto: true, track: true };
        let plain = ControlRequest::Save { state: Fd(0), memory: Fd(1), how: SaveHow::default() };
        assert_eq!(serde_json::to_string(&plain).unwrap(), r#"{"request":"save","state":0,"memory":1}"#, "what it understands");
        let client = served(|request, channel| match request {
            ControlRequest::Saves => {
                reply(channel, &ControlReply::Error { kind: ErrorKind::Invalid, message: "not a request".into() }, &[]);
            }
            _ => reply(channel, &ControlReply::Done, &[]),
        });
        assert!(matches!(client.saves(), Err(ClientError::Refused { .. })));
        let file = tempfile::tempfile().unwrap();
        let saved = client.save(file.as_fd(), file.as_fd(), how).unwrap();
        assert_eq!(saved, Saved { incremental: false, written: None });
        for (said, written) in
            [(&[0; 4][..], Some(None)), (&[0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0], Some(Some(9))), (&[0; 3], None), (&[0; 13], None)]
        {
            let (read, write) = rustix::pipe::pipe().unwrap();
            rustix::io::write(&write, said).unwrap();
            drop(write);
            assert_eq!(Aside(read).wait().ok(), written);
        }
    }

    #[test]
    fn a_silent_process_times_out_and_its_late_answer_is_not_mistaken() {
        let client = served(|_, channel| {
            thread::sleep(Duration::from_millis(300));
            let _ = channel.send(&ControlReply::Done, &[], Instant::now() + Duration::from_secs(1));
        });
        assert!(matches!(client.pause(), Err(ClientError::TimedOut(_))));
        assert!(matches!(client.resume(), Err(ClientError::Gone)));
    }

    #[test]
    fn a_dead_process_is_gone_and_counts_as_stopped() {
        let (mine, yours) = Channel::pair().unwrap();
        drop(yours);
        let client = Client::new(mine);
        client.stop().unwrap();
        let (mine, yours) = Channel::pair().unwrap();
        drop(yours);
        assert!(matches!(Client::new(mine).status(), Err(ClientError::Gone)));
        assert!(matches!(Client::connect(Path::new("/nonexistent/socket")), Err(ClientError::Connect(_))));
    }
}
