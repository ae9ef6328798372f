//! One VM: built from its configuration, then run, paused, resumed and ended.

mod build;
mod devices;
pub mod state;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_ioctls::VmFd;

pub use self::build::Prepared;
use self::devices::Handles;
use self::state::MachineState;
use crate::control::{Metrics, VmState};
use crate::cpu::run::{Surroundings, Vcpus};
use crate::cpu::state::VcpuStateError;
use crate::exit::ExitSlot;
use crate::platform::power::Power;
use crate::platform::serial::SerialPort;
use crate::virtio::GuestMemory;
use crate::virtio::pci::{Activations, VirtioPci};
use crate::virtio::vsock::Connector;

#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("{what} of {value} is out of range: {allowed}")]
    Invalid { what: &'static str, value: u64, allowed: &'static str },
    #[error(transparent)]
    Descriptor(#[from] crate::descriptors::DescriptorError),
    #[error("cannot {context}")]
    Kvm {
        context: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("this kernel's KVM lacks {0}")]
    Capability(&'static str),
    #[error("cannot {context}")]
    Io {
        context: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Layout(#[from] crate::layout::LayoutError),
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    #[error(transparent)]
    Boot(#[from] crate::boot::BootError),
    #[error(transparent)]
    Acpi(#[from] crate::acpi::AcpiError),
    #[error("cannot set up device {id}")]
    Device {
        id: String,
        #[source]
        source: std::io::Error,
    },
    #[error("there are more devices than the PCI bus has slots")]
    Slots,
    #[error("cannot use the console log")]
    ConsoleLog(#[from] crate::log_ring::LogRingError),
    #[error("cannot give up privileges")]
    Jail(#[from] crate::jail::JailError),
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
}

/// The whole chain of causes on one line.
#[must_use]
pub fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let reason = error.to_string();
        // Some libraries say in each message what their source says again.
        if !text.contains(&reason) {
            text.push_str(": ");
            text.push_str(&reason);
        }
        cause = error.source();
    }
    text
}

/// A VM whose vCPUs have threads. It starts paused.
pub struct Machine {
    vm: Arc<VmFd>,
    vcpus: Vcpus,
    /// Keeps the VM's memory mapped as long as its vCPUs are there.
    _memory: GuestMemory,
    devices: Vec<Arc<Mutex<VirtioPci>>>,
    activations: Arc<Activations>,
    exit: Arc<ExitSlot>,
    serial: Arc<SerialPort>,
    power: Arc<Power>,
    handles: Handles,
    paused: AtomicBool,
    started: Instant,
}

impl Machine {
    /// Starts the vCPU threads, which stay at the gate. The jail must be entered before.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn start(prepared: Prepared) -> Result<Self, MachineError> {
        let Prepared { vm, memory, vcpus, msr_indices, bus, devices, activations, handles } = prepared;
        let exit = Arc::new(ExitSlot::new().map_err(|source| MachineError::Io { context: "make an eventfd", source })?);
        let (serial, power) = (Arc::clone(&bus.serial), Arc::clone(&bus.power));
        let around = Surroundings { bus: Arc::new(bus), exit: Arc::clone(&exit) };
        let vcpus =
            Vcpus::start(vcpus, msr_indices, &around).map_err(|source| MachineError::Io { context: "start the vCPU threads", source })?;
        Ok(Machine {
            vm,
            vcpus,
            _memory: memory,
            devices,
            activations,
            exit,
            serial,
            power,
            handles,
            paused: AtomicBool::new(true),
            started: Instant::now(),
        })
    }

    #[must_use]
    pub fn state(&self) -> VmState {
        match (self.exit.get(), self.paused.load(Ordering::Acquire)) {
            (Some(_), _) => VmState::Exited,
            (None, true) => VmState::Paused,
            (None, false) => VmState::Running,
        }
    }

    #[must_use]
    pub fn exit(&self) -> &Arc<ExitSlot> {
        &self.exit
    }

    #[must_use]
    pub fn activations(&self) -> &Arc<Activations> {
        &self.activations
    }

    #[must_use]
    pub fn serial(&self) -> &Arc<SerialPort> {
        &self.serial
    }

    /// Starts the devices whose drivers have become ready. Main thread only. While paused they wait for the resume.
    pub fn activate_devices(&self) {
        for index in self.activations.take() {
            if let Some(device) = self.devices.get(index).filter(|_| !self.paused.load(Ordering::Acquire)) {
                lock(device).activate();
            }
        }
    }

    /// Stops vCPUs, then devices: afterwards nothing changes guest memory, and no request is half done.
    pub fn pause(&self) {
        self.vcpus.pause();
        for device in &self.devices {
            lock(device).pause();
        }
        self.paused.store(true, Ordering::Release);
    }

    pub fn resume(&self) {
        self.paused.store(false, Ordering::Release);
        for device in &self.devices {
            lock(device).activate();
        }
        self.vcpus.resume();
    }

    /// # Errors
    /// When the interrupt cannot be raised.
    pub fn press_power_button(&self) -> std::io::Result<()> {
        self.power.press_button()
    }

    /// Connects to a port of the guest; see `vsock::Connector`.
    #[must_use]
    pub fn vsock_connector(&self) -> Option<Connector> {
        self.handles.vsock.clone()
    }

    /// Asks the balloon to hold `mib`; `None` without a balloon.
    #[must_use]
    pub fn set_balloon(&self, mib: u64) -> Option<std::io::Result<()>> {
        self.handles.balloon.as_ref().map(|balloon| balloon.set_target_mib(mib))
    }

    #[must_use]
    pub fn metrics(&self) -> Metrics {
        Metrics {
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            vcpu_exits: self.vcpus.exits(),
            ..self.handles.metrics()
        }
    }

    /// Everything but guest memory and disks. Call only while paused.
    ///
    /// # Errors
    /// When KVM does not give a part of it.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let devices = self.devices.iter().map(|device| {
            let device = lock(device);
            (device.id().to_owned(), device.save())
        });
        state::save(&self.vm, self.vcpus.save()?, self.serial.save(), devices.collect())
    }
}

pub(crate) fn lock(device: &Mutex<VirtioPci>) -> std::sync::MutexGuard<'_, VirtioPci> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
