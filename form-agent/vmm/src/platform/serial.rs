//! The serial console: a 16550 UART on COM1, whose output goes to a log and to whoever is attached.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::log_ring;

/// Where the guest's output goes for good.
pub enum Sink {
    Stdout,
    Ring(log_ring::Writer),
}

/// Output for attached consoles waits here until the main thread sends it; more than this is dropped, oldest first.
const ATTACHED_BUFFER: usize = 64 * 1024;
/// Typed input waits here until the guest reads it.
const INPUT_BUFFER: usize = 64 * 1024;

/// What attached consoles have not been sent yet.
pub struct Attached {
    /// Set while somebody is attached: otherwise nothing is kept.
    active: AtomicBool,
    output: Mutex<VecDeque<u8>>,
    /// Signalled when there is output to send.
    pub ready: EventFd,
}

impl Attached {
    fn new() -> io::Result<Self> {
        Ok(Attached { active: AtomicBool::new(false), output: Mutex::new(VecDeque::new()), ready: EventFd::new(libc::EFD_NONBLOCK)? })
    }

    pub fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Release);
        if !active {
            *self.output.lock().unwrap_or_else(PoisonError::into_inner) = VecDeque::new();
        }
    }

    /// Takes what has been printed since the last call.
    #[must_use]
    pub fn take(&self) -> Vec<u8> {
        Vec::from(std::mem::take(&mut *self.output.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn print(&self, bytes: &[u8]) {
        if !self.active.load(Ordering::Acquire) {
            return;
        }
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = output.is_empty();
        output.extend(bytes);
        let excess = output.len().saturating_sub(ATTACHED_BUFFER);
        output.drain(..excess);
        if was_empty {
            // The counter of an eventfd can only overflow after 2^64 signals.
            let _ = self.ready.write(1);
        }
    }
}

struct Output {
    sink: Sink,
    attached: Arc<Attached>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.sink {
            // A closed standard output must not stop the guest.
            Sink::Stdout => drop(io::stdout().write_all(bytes)),
            Sink::Ring(ring) => ring.append(bytes),
        }
        self.attached.print(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if matches!(self.sink, Sink::Stdout) {
            let _ = io::stdout().flush();
        }
        Ok(())
    }
}

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The saved state of the serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialPortState {
    pub baud_divisor: [u8; 2],
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub received: Vec<u8>,
    /// Typed, but not yet in the UART.
    pub waiting: Vec<u8>,
}

struct Inner {
    uart: Serial<Irq, NoEvents, Output>,
    waiting: VecDeque<u8>,
}

pub struct SerialPort {
    inner: Mutex<Inner>,
    attached: Arc<Attached>,
}

impl SerialPort {
    /// `interrupt` raises COM1's line.
    ///
    /// # Errors
    /// When the operating system has no eventfd left.
    pub fn new(sink: Sink, interrupt: EventFd) -> io::Result<Self> {
        let attached = Arc::new(Attached::new()?);
        let output = Output { sink, attached: Arc::clone(&attached) };
        let uart = Serial::new(Irq(interrupt), output);
        Ok(SerialPort { inner: Mutex::new(Inner { uart, waiting: VecDeque::new() }), attached })
    }

    #[must_use]
    pub fn attached(&self) -> Arc<Attached> {
        Arc::clone(&self.attached)
    }

    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn write(&self, register: u8, data: &[u8]) -> io::Result<()> {
        match data.first() {
            Some(value) => self.lock().uart.write(register, *value).map_err(into_io),
            None => Ok(()),
        }
    }

    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn read(&self, register: u8, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        let mut inner = self.lock();
        if let Some(first) = data.first_mut() {
            *first = inner.uart.read(register);
        }
        inner.feed()
    }

    /// Types `bytes`. What does not fit into the waiting room is dropped: nobody reads it.
    ///
    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn input(&self, bytes: &[u8]) -> io::Result<()> {
        let mut inner = self.lock();
        let room = INPUT_BUFFER.saturating_sub(inner.waiting.len());
        inner.waiting.extend(bytes.iter().take(room));
        inner.feed()
    }

    #[must_use]
    pub fn save(&self) -> SerialPortState {
        let inner = self.lock();
        let state = inner.uart.state();
        SerialPortState {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
            waiting: inner.waiting.iter().copied().collect(),
        }
    }

    /// A port with saved state.
    ///
    /// # Errors
    /// When the state cannot be one of a UART, or the operating system has no eventfd left.
    pub fn restore(state: &SerialPortState, sink: Sink, interrupt: EventFd) -> io::Result<Self> {
        let attached = Arc::new(Attached::new()?);
        let output = Output { sink, attached: Arc::clone(&attached) };
        let saved = SerialState {
            baud_divisor_low: state.baud_divisor[0],
            baud_divisor_high: state.baud_divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        };
        let uart = Serial::from_state(&saved, Irq(interrupt), NoEvents, output).map_err(into_io)?;
        let waiting = state.waiting.iter().copied().take(INPUT_BUFFER).collect();
        Ok(SerialPort { inner: Mutex::new(Inner { uart, waiting }), attached })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Moves typed bytes into the UART as far as it has room.
    fn feed(&mut self) -> io::Result<()> {
        let count = self.uart.fifo_capacity().min(self.waiting.len());
        if count == 0 {
            return Ok(());
        }
        let bytes: Vec<u8> = self.waiting.iter().take(count).copied().collect();
        // In loop-back mode the UART takes nothing; the bytes wait.
        let taken = self.uart.enqueue_raw_bytes(&bytes).map_err(into_io)?;
        self.waiting.drain(..taken);
        Ok(())
    }
}

fn into_io(error: vm_superio::serial::Error<io::Error>) -> io::Error {
    match error {
        vm_superio::serial::Error::Trigger(error) | vm_superio::serial::Error::IOError(error) => error,
        vm_superio::serial::Error::FullFifo => io::Error::new(io::ErrorKind::InvalidData, "the UART's queue is full"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> (SerialPort, EventFd) {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        log_ring::create(&file, 4096).unwrap();
        let sink = Sink::Ring(log_ring::Writer::open(&file).unwrap());
        (SerialPort::new(sink, interrupt.try_clone().unwrap()).unwrap(), interrupt)
    }

    #[test]
    fn output_reaches_an_attached_console() {
        let (port, _interrupt) = port();
        port.write(0, b"x").unwrap();
        let attached = port.attached();
        attached.set_active(true);
        for byte in b"hello" {
            port.write(0, &[*byte]).unwrap();
        }
        assert_eq!(attached.ready.read().unwrap(), 1);
        assert_eq!(attached.take(), b"hello");
        attached.set_active(false);
        port.write(0, b"y").unwrap();
        assert!(attached.take().is_empty());
    }

    #[test]
    fn more_input_than_the_uart_holds_waits_for_the_guest() {
        let (port, interrupt) = port();
        port.write(1, &[1]).unwrap();
        let typed: Vec<u8> = (0..200u8).collect();
        port.input(&typed).unwrap();
        assert!(interrupt.read().unwrap() > 0);
        let mut seen = Vec::new();
        for _ in 0..200 {
            let mut data = [0u8; 1];
            port.read(0, &mut data).unwrap();
            seen.push(data[0]);
        }
        assert_eq!(seen, typed);
    }

    #[test]
    fn saved_state_comes_back_with_unread_input() {
        let (port, interrupt) = port();
        port.input(&[7; 100]).unwrap();
        port.write(7, &[0x5A]).unwrap();
        let state = port.save();
        assert_eq!((state.received.len(), state.waiting.len()), (64, 36));
        let json = serde_json::to_string(&state).unwrap();
        let state: SerialPortState = serde_json::from_str(&json).unwrap();
        let port = SerialPort::restore(&state, Sink::Stdout, interrupt).unwrap();
        let mut data = [0u8; 1];
        port.read(7, &mut data).unwrap();
        assert_eq!(data, [0x5A]);
        assert_eq!(port.save(), state);
    }
}
