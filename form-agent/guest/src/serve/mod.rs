//! Answering the host.

mod archive;
mod channel;
mod copy;
mod exec;
mod forward;
mod ssh;
mod status;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use form_guest::protocol::{DeviceReport, ErrorKind, FrameKind, LogsRequest, Phase, Reply, Request, VSOCK_PORT};
use form_types::settings::Interface;
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::{
    boot::{devices, handoff, volumes},
    error::{Context, Error},
    freeze,
    machine::{Machine, Power, Role},
    network::{self, names},
    new_identity,
    process::lock,
    processors,
    report::say,
    service::log::Next,
    sys::VsockListener,
};
pub use channel::{Channel, Event};
pub use status::uptime_ms;

const MAX_CONNECTIONS: usize = 64;
/// How often a stream with nothing to say looks whether the host is still there.
const GLANCE: Duration = Duration::from_millis(200);
/// A `ready` that waits longer is asked again.
const MAX_READY_WAIT: Duration = Duration::from_secs(600);

/// Starts the threads that listen, on what this machine has.
pub fn start(machine: &Arc<Machine>) {
    let vsock = VsockListener::bind(VSOCK_PORT);
    let port = Channel::port();
    if let (Err(vsock), Err(port)) = (&vsock, &port) {
        say(format_args!("the host cannot reach this machine: no vsock ({vsock}), no virtio-serial port ({port})"));
    }
    if let Ok(listener) = vsock {
        let machine = Arc::clone(machine);
        thread::spawn(move || listen(&machine, &listener));
    }
    if let Ok(channel) = port {
        let machine = Arc::clone(machine);
        thread::spawn(move || serve_port(&machine, &channel));
    }
}

fn listen(machine: &Arc<Machine>, listener: &VsockListener) {
    static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);
    loop {
        let socket = match listener.accept() {
            Ok((socket, true)) => socket,
            // A process of the guest: what we do for the host would make it root.
            Ok((_, false)) => continue,
            Err(_) => {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let machine = Arc::clone(machine);
        let channel = Channel::socket(socket);
        let result = thread::Builder::new().name("connection".to_owned()).spawn(move || {
            if CONNECTIONS.fetch_add(1, Ordering::Relaxed) < MAX_CONNECTIONS {
                let _ = serve_connection(&machine, &channel);
            } else {
                let _ = channel.refuse(ErrorKind::Busy, format_args!("{MAX_CONNECTIONS} connections are open; end some"));
            }
            CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = result {
            say(format_args!("cannot serve a connection: {error}"));
        }
    }
}

/// One request, as each vsock connection has.
fn serve_connection(machine: &Arc<Machine>, channel: &Channel) -> io::Result<()> {
    match channel.read()? {
        Some(frame) if frame.kind == FrameKind::Request => serve(machine, channel, frame.parse()),
        Some(frame) => channel.refuse(ErrorKind::Invalid, format_args!("a connection begins with a request, not with {:?}", frame.kind)),
        None => Ok(()),
    }
}

/// One request after another, as the port has.
fn serve_port(machine: &Arc<Machine>, channel: &Channel) {
    loop {
        match channel.read() {
            Ok(Some(frame)) if frame.kind == FrameKind::Request => drop(serve(machine, channel, frame.parse())),
            // What is left of a stream that has ended, as a late `Cancel`.
            Ok(Some(_)) => {}
            // Nobody is there, or someone who speaks otherwise.
            Ok(None) | Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn serve(machine: &Arc<Machine>, channel: &Channel, request: Result<Request, serde_json::Error>) -> io::Result<()> {
    let request = match request {
        Ok(request) => request,
        Err(error) => return channel.refuse(ErrorKind::Invalid, format_args!("this guest does not understand the request: {error}")),
    };
    match request {
        Request::Ready { wait_ms } => {
            wait_until_started(machine, channel, Duration::from_millis(wait_ms).min(MAX_READY_WAIT));
            channel.reply(&Reply::Ready(status::ready(machine)))
        }
        Request::Status => channel.reply(&Reply::Status(status::status(machine))),
        Request::Watch => watch(machine, channel),
        Request::Logs(request) => logs(machine, channel, &request),
        Request::Exec(request) => exec::exec(machine, channel, &request),
        Request::Shutdown { reboot } => {
            channel.reply(&Reply::Done)?;
            machine.end(if reboot { Power::Restart } else { Power::Off });
            Ok(())
        }
        Request::SyncTime { unix_ns } => {
            machine.resumed();
            freeze::thaw();
            done(channel, set_time(unix_ns))
        }
        Request::Freeze { limit_ms } => done(channel, freeze::freeze(Duration::from_millis(limit_ms))),
        Request::Thaw => {
            freeze::thaw();
            channel.reply(&Reply::Done)
        }
        Request::NewIdentity(identity) => done(channel, new_identity::become_another(machine, &identity)),
        Request::SetName { hostname, hosts } => done(channel, names::rename(&machine.settings_now(), hostname, hosts)),
        Request::SetRestart { restart } => {
            *lock(&machine.restart) = Some(restart);
            channel.reply(&Reply::Done)
        }
        Request::Metrics => channel.reply(&Reply::Metrics(status::metrics())),
        Request::Forward { port } => forward::forward(channel, port),
        Request::CopyIn { path, mode, owner } => copy::copy_in(channel, &path, mode, owner.as_deref()),
        Request::CopyOut { path } => copy::copy_out(channel, &path),
        Request::Unpack { path, contents, owner, keep_owner } => archive::unpack(channel, &path, contents, owner.as_deref(), keep_owner),
        Request::Pack { path } => archive::pack(channel, &path),
        Request::Mount(volume) => mounted(machine, channel, volumes::attach(&volume)),
        Request::Unmount { serial, force } => unmount(machine, channel, &serial, force),
        Request::Grow { serial, size_bytes } => {
            let path = mounted_at(machine, &serial);
            mounted(machine, channel, volumes::grow(&serial, size_bytes, path.as_deref()))
        }
        Request::AddInterface(interface) => add_interface(machine, channel, interface),
        Request::RemoveInterface { mac, table, force } => remove_interface(machine, channel, (&mac, table), force),
        Request::UseProcessors { count } => done(channel, processors::bring_online(count)),
        Request::Ssh => channel.reply(&Reply::Ssh(ssh::report(machine))),
        Request::Sync { token } => channel.reply(&Reply::Synced { token }),
    }
}

fn done<E: std::fmt::Display>(channel: &Channel, result: Result<(), E>) -> io::Result<()> {
    match result {
        Ok(()) => channel.reply(&Reply::Done),
        Err(error) => channel.refuse(ErrorKind::Failed, error),
    }
}

fn wait_until_started(machine: &Machine, channel: &Channel, limit: Duration) {
    let until = std::time::Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now()).min(GLANCE);
        let (state, _) = machine.wait(left, |state, _| state.phase != Phase::Starting);
        if state.phase != Phase::Starting || left.is_zero() || channel.cancelled() {
            return;
        }
    }
}

/// The status at each change, until the host has enough.
fn watch(machine: &Machine, channel: &Channel) -> io::Result<()> {
    let mut told = None;
    loop {
        let (_, number) = machine.wait(GLANCE, |_, number| told != Some(number));
        if told != Some(number) {
            channel.reply(&Reply::Status(status::status(machine)))?;
            told = Some(number);
        }
        if channel.cancelled() {
            return Ok(());
        }
    }
}

fn logs(machine: &Machine, channel: &Channel, request: &LogsRequest) -> io::Result<()> {
    let mut reader = machine.log.reader(request.from_sequence, request.tail);
    // Without following, it ends with what is there now, however fast the service writes.
    let end = machine.log.next_sequence();
    loop {
        match reader.next(if request.follow { GLANCE } else { Duration::ZERO }) {
            Next::Line(line) if request.follow || line.sequence < end => channel.send(&line.to_frame())?,
            Next::Nothing if request.follow => {}
            Next::Line(_) | Next::Nothing | Next::End => break,
        }
        if channel.cancelled() {
            break;
        }
    }
    channel.write(FrameKind::End, &[])
}

/// Sets the wall clock: nanoseconds since 1970.
///
/// # Errors
/// When the kernel does not take it.
pub fn set_time(unix_ns: u64) -> Result<(), Error> {
    let seconds =
        i64::try_from(unix_ns / 1_000_000_000).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput)).doing("read the time")?;
    let time = Timespec { tv_sec: seconds, tv_nsec: (unix_ns % 1_000_000_000).cast_signed() };
    clock_settime(ClockId::Realtime, time).doing("set the clock")
}

/// Notes what a volume is now.
fn mounted(machine: &Machine, channel: &Channel, done: Result<(DeviceReport, Option<Error>), Error>) -> io::Result<()> {
    match done {
        Ok((device, warning)) => {
            let mut report = lock(&machine.report);
            if let Some(warning) = warning {
                report.warn("volumes", warning);
            }
            report.devices.retain(|known| known.serial != device.serial);
            report.devices.push(device.clone());
            drop(report);
            channel.reply(&Reply::Mounted(device))
        }
        Err(error @ Error::DeviceMissing { .. }) => channel.refuse(ErrorKind::NotFound, error),
        Err(error) => channel.refuse(ErrorKind::Failed, error),
    }
}

fn mounted_at(machine: &Machine, serial: &str) -> Option<String> {
    lock(&machine.report).devices.iter().find(|device| device.serial == serial).and_then(|device| device.mounted.clone())
}

fn unmount(machine: &Machine, channel: &Channel, serial: &str, force: bool) -> io::Result<()> {
    match devices::in_use::release(serial, mounted_at(machine, serial).as_deref(), force) {
        Ok(()) => {
            lock(&machine.report).devices.retain(|device| device.serial != serial);
            channel.reply(&Reply::Done)
        }
        Err(error @ Error::InUse { .. }) => channel.refuse(ErrorKind::InUse, error),
        Err(error) => channel.refuse(ErrorKind::Failed, error),
    }
}

fn add_interface(machine: &Machine, channel: &Channel, interface: Interface) -> io::Result<()> {
    let mut interfaces = machine.settings_now().interfaces;
    interfaces.retain(|known| known.mac != interface.mac);
    interfaces.push(interface.clone());
    if machine.role == Role::BesideSystemd
        && let Err(error) = handoff::keep_interfaces(&interfaces)
    {
        return channel.refuse(ErrorKind::Failed, error);
    }
    match network::add(&interface) {
        Ok(report) => {
            *lock(&machine.interfaces) = Some(interfaces);
            channel.reply(&Reply::Interface(report))
        }
        Err(error @ Error::InterfaceMissing { .. }) => channel.refuse(ErrorKind::NotFound, error),
        Err(error) => channel.refuse(ErrorKind::Failed, error),
    }
}

fn remove_interface(machine: &Machine, channel: &Channel, (mac, table): (&str, Option<u8>), force: bool) -> io::Result<()> {
    match network::remove(mac, table, force) {
        Ok(()) => {
            let mut interfaces = machine.settings_now().interfaces;
            interfaces.retain(|known| known.mac != mac);
            *lock(&machine.interfaces) = Some(interfaces);
            channel.reply(&Reply::Done)
        }
        Err(error @ Error::InUse { .. }) => channel.refuse(ErrorKind::InUse, error),
        Err(error) => channel.refuse(ErrorKind::Failed, error),
    }
}

#[cfg(test)]
mod tests;
