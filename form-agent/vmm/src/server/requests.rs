//! What each request does in each state of the VM.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::{DONE, REPLY_TIME, Served, Server};
use crate::config::Fd;
use crate::control::channel::Channel;
use crate::control::{ControlReply, ControlRequest, ErrorKind, ExitReason, SaveHow, VmState};
use crate::descriptors::Descriptors;
use crate::machine::saved::SavedStateError;
use crate::machine::{Machine, MachineError, Saved, explain};
use crate::memory::MemoryError;
use crate::memory::aside::Aside;
use crate::memory::image::ImageError;
use crate::virtio::vsock::Connector;

/// How long a guest may take to accept a vsock connection. Less than a client waits for its answer.
const VSOCK_TIME: Duration = Duration::from_secs(5);
/// Each waits on a thread of its own.
const VSOCK_WAITING: usize = 16;
static WAITING: AtomicUsize = AtomicUsize::new(0);

impl Server {
    pub(super) fn handle(&mut self, channel: &Arc<Channel>, request: ControlRequest, fds: Vec<OwnedFd>) -> Served {
        let state = self.machine.as_ref().map_or(VmState::Empty, Machine::state);
        match (request, &mut self.machine) {
            (ControlRequest::Boot { config }, None) => {
                let started = self.boot(&config, fds);
                self.started(channel, started)
            }
            (ControlRequest::Restore { config }, None) => {
                let started = self.restore(&config, fds);
                self.started(channel, started)
            }
            (ControlRequest::Boot { .. } | ControlRequest::Restore { .. }, Some(_)) => refuse(channel, state),
            (ControlRequest::Status, _) => reply(channel, &ControlReply::Status { state, pid: std::process::id() }, &[]),
            (ControlRequest::Stop, _) => {
                self.farewell = Some((Arc::clone(channel), DONE));
                Served::End((ExitReason::Stopped, None))
            }
            (_, None) => refuse(channel, state),
            (request, Some(machine)) => match (request, state) {
                (ControlRequest::Pause, VmState::Running) => {
                    machine.pause();
                    reply(channel, &DONE, &[])
                }
                (ControlRequest::Resume, VmState::Paused) => {
                    machine.resume();
                    reply(channel, &DONE, &[])
                }
                (ControlRequest::Pause | ControlRequest::Resume, _) => refuse(channel, state),
                (ControlRequest::PowerButton, VmState::Running) => answer(channel, machine.press_power_button()),
                (ControlRequest::PowerButton, _) => refuse(channel, state),
                (ControlRequest::Metrics, _) => reply(channel, &ControlReply::Metrics(Box::new(machine.metrics())), &[]),
                (ControlRequest::Vcpus, _) => {
                    let (count, most) = machine.vcpu_count();
                    reply(channel, &ControlReply::Vcpus { count, most }, &[])
                }
                (ControlRequest::PlugVcpus { count }, VmState::Running) => changed(channel, machine.plug_vcpus(count)),
                (ControlRequest::UnplugVcpus { count, gone }, VmState::Running) => {
                    changed(channel, unplug_vcpus(machine, count, gone, fds))
                }
                (ControlRequest::PlugVcpus { .. } | ControlRequest::UnplugVcpus { .. }, _) => refuse(channel, state),
                (ControlRequest::Balloon { mib }, _) => match machine.set_balloon(mib) {
                    Some(result) => answer(channel, result),
                    None => reply(channel, &error(ErrorKind::Invalid, "this VM has no balloon".to_owned()), &[]),
                },
                (ControlRequest::VsockConnect { port }, VmState::Running) => match machine.vsock_connector() {
                    Some(connector) => connect(channel, connector, port),
                    None => reply(channel, &error(ErrorKind::Invalid, "this VM has no vsock".to_owned()), &[]),
                },
                (ControlRequest::VsockConnect { .. }, _) => refuse(channel, state),
                (ControlRequest::Console, _) => {
                    machine.serial().attached().set_active(true);
                    match self.consoles.attach() {
                        Some(Ok(console)) => reply(channel, &DONE, &[console.as_fd()]),
                        Some(Err(problem)) => reply(channel, &error(ErrorKind::System, problem.to_string()), &[]),
                        None => reply(channel, &error(ErrorKind::Invalid, "too many consoles are attached".to_owned()), &[]),
                    }
                }
                (ControlRequest::Save { state, memory, how }, VmState::Paused) => {
                    saved(channel, how, save(machine, state, memory, how, fds))
                }
                (ControlRequest::SaveAside { state, memory, whole, how }, VmState::Paused) => {
                    saved(channel, how, save_aside(machine, [state, memory, whole], how, fds))
                }
                (ControlRequest::Precopy { memory, whole, onto }, VmState::Running) => {
                    let how = SaveHow { onto, track: true };
                    self.copies_for = Some(Arc::clone(channel));
                    saved(channel, how, aside(&mut Descriptors::new(fds), memory, whole, how).and_then(|to| machine.precopy(to, onto)))
                }
                (ControlRequest::Precopy { .. }, _) => refuse(channel, state),
                (ControlRequest::Saves, _) => reply(channel, &ControlReply::Saves { ids: machine.saves() }, &[]),
                (ControlRequest::Save { .. } | ControlRequest::SaveAside { .. }, _) => refuse(channel, state),
                (ControlRequest::Plug { disk }, VmState::Running) => changed(channel, machine.plug(&disk, &mut Descriptors::new(fds))),
                (ControlRequest::PlugNetwork { network }, VmState::Running) => {
                    changed(channel, machine.plug_network(&network, &mut Descriptors::new(fds)))
                }
                (ControlRequest::Unplug { id, gone }, VmState::Running) => changed(channel, unplug(machine, &id, gone, fds)),
                (ControlRequest::Grow { id, size_bytes }, VmState::Running) => changed(channel, machine.grow(&id, size_bytes)),
                (ControlRequest::Memory { mib }, VmState::Running) => changed(channel, machine.set_memory(mib)),
                (
                    ControlRequest::Memory { .. }
                    | ControlRequest::Plug { .. }
                    | ControlRequest::PlugNetwork { .. }
                    | ControlRequest::Unplug { .. }
                    | ControlRequest::Grow { .. },
                    _,
                ) => refuse(channel, state),
                (ControlRequest::LimitDisk { id, limits }, _) => changed(channel, machine.limit_disk(&id, limits)),
                (ControlRequest::LimitNetwork { id, bytes_per_second }, _) => {
                    changed(channel, machine.limit_network(&id, bytes_per_second))
                }
                (ControlRequest::Boot { .. } | ControlRequest::Restore { .. } | ControlRequest::Status | ControlRequest::Stop, _) => {
                    refuse(channel, state)
                }
            },
        }
    }

    /// A process whose VM could not be made is good for nothing more.
    fn started(&mut self, channel: &Arc<Channel>, started: Result<(), MachineError>) -> Served {
        let Err(problem) = started else { return reply(channel, &DONE, &[]) };
        let message = explain(&problem);
        self.farewell = Some((Arc::clone(channel), error(kind_of_machine(&problem), message.clone())));
        Served::End((ExitReason::Failed, Some(message)))
    }
}

fn save(machine: &mut Machine, state: Fd, memory: Fd, how: SaveHow, fds: Vec<OwnedFd>) -> Result<Saved, MachineError> {
    let mut fds = Descriptors::new(fds);
    let state = File::from(fds.take(state, "state file")?);
    let memory = File::from(fds.take(memory, "memory file")?);
    // What the guest let go before it was paused is no part of it.
    machine.end_ejected();
    machine.save_to(&state, &memory, how)
}

fn save_aside(machine: &mut Machine, files: [Fd; 3], how: SaveHow, fds: Vec<OwnedFd>) -> Result<Saved, MachineError> {
    let [state, memory, whole] = files;
    let mut fds = Descriptors::new(fds);
    let state = File::from(fds.take(state, "state file")?);
    let memory = aside(&mut fds, memory, whole, how)?;
    machine.end_ejected();
    machine.save_aside(&state, memory, how)
}

fn aside(fds: &mut Descriptors, memory: Fd, whole: Fd, how: SaveHow) -> Result<Aside, MachineError> {
    let file = File::from(fds.take(memory, "memory file")?);
    Ok(Aside { file, whole: fds.take(whole, "pipe")?, counted: how.is_any() })
}

fn saved(channel: &Channel, how: SaveHow, result: Result<Saved, MachineError>) -> Served {
    match result {
        Ok(Saved { incremental, written }) if how.is_any() => {
            reply(channel, &ControlReply::Saved { incremental, written_bytes: written }, &[])
        }
        other => changed(channel, other.map(|_| ())),
    }
}

fn unplug(machine: &mut Machine, id: &str, gone: Fd, fds: Vec<OwnedFd>) -> Result<(), MachineError> {
    let gone = Descriptors::new(fds).take(gone, "pipe")?;
    machine.unplug(id, gone)
}

fn unplug_vcpus(machine: &mut Machine, count: u8, gone: Fd, fds: Vec<OwnedFd>) -> Result<(), MachineError> {
    let gone = Descriptors::new(fds).take(gone, "pipe")?;
    machine.unplug_vcpus(count, gone)
}

fn changed(channel: &Channel, result: Result<(), MachineError>) -> Served {
    match result {
        Ok(()) => reply(channel, &DONE, &[]),
        Err(problem) => reply(channel, &error(kind_of_machine(&problem), explain(&problem)), &[]),
    }
}

fn kind_of_machine(problem: &MachineError) -> ErrorKind {
    match problem {
        MachineError::NoDevice(_) | MachineError::NoDisk(_) | MachineError::NoNetwork(_) => ErrorKind::NotFound,
        MachineError::Kvm { .. }
        | MachineError::Io { .. }
        | MachineError::Device { .. }
        | MachineError::Grow { .. }
        | MachineError::Saved(SavedStateError::Write(_) | SavedStateError::Read(_))
        | MachineError::Memory(MemoryError::Image(ImageError::Write(_) | ImageError::Read(_))) => ErrorKind::System,
        _ => ErrorKind::Invalid,
    }
}

/// Waits for the guest on a thread of its own, which answers by itself. Meanwhile the client waits, so replies keep their order.
fn connect(channel: &Arc<Channel>, connector: Connector, port: u32) -> Served {
    if WAITING.fetch_add(1, Ordering::AcqRel) >= VSOCK_WAITING {
        WAITING.fetch_sub(1, Ordering::AcqRel);
        return reply(channel, &error(ErrorKind::Refused, "too many vsock connections are being made".to_owned()), &[]);
    }
    let connection = Arc::clone(channel);
    let thread = std::thread::Builder::new().name("vsock-connect".to_owned()).stack_size(128 * 1024).spawn(move || {
        match connector.connect(port, VSOCK_TIME) {
            Ok(stream) => reply(&connection, &DONE, &[stream.as_fd()]),
            Err(problem) => reply(&connection, &error(kind_of(&problem), problem.to_string()), &[]),
        };
        WAITING.fetch_sub(1, Ordering::AcqRel);
    });
    match thread {
        Ok(_) => Served::Stay,
        Err(problem) => {
            WAITING.fetch_sub(1, Ordering::AcqRel);
            reply(channel, &error(ErrorKind::System, problem.to_string()), &[])
        }
    }
}

fn kind_of(problem: &io::Error) -> ErrorKind {
    match problem.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::TimedOut => ErrorKind::Refused,
        io::ErrorKind::InvalidInput => ErrorKind::Invalid,
        _ => ErrorKind::System,
    }
}

pub(super) fn error(kind: ErrorKind, message: String) -> ControlReply {
    ControlReply::Error { kind, message }
}

fn answer(channel: &Channel, result: io::Result<()>) -> Served {
    match result {
        Ok(()) => reply(channel, &DONE, &[]),
        Err(problem) => reply(channel, &error(kind_of(&problem), problem.to_string()), &[]),
    }
}

fn refuse(channel: &Channel, state: VmState) -> Served {
    let now = match state {
        VmState::Empty => "not booted",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Exited => "ending",
    };
    reply(channel, &error(ErrorKind::WrongState, format!("not possible: the VM is {now}")), &[])
}

/// A peer that does not take its reply loses the connection.
pub(super) fn reply(channel: &Channel, reply: &ControlReply, fds: &[BorrowedFd<'_>]) -> Served {
    match channel.send(reply, fds, Instant::now() + REPLY_TIME) {
        Ok(()) => Served::Stay,
        Err(_) => Served::Gone,
    }
}
