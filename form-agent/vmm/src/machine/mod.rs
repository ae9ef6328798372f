//! One VM: built from its configuration or a saved state, then run, paused, saved, resumed and ended.

mod build;
mod devices;
mod memory;
mod plug;
mod processors;
mod save;
pub mod saved;
pub mod state;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use self::build::DeviceSurroundings;
pub use self::build::{Prepared, SavedSize, check_saved, verify_memory};
use self::devices::Handles;
use self::processors::Recipe;
pub use self::save::Saved;
use self::state::{ClockState, DeviceState, MachineState};
use crate::control::{Metrics, VmState};
use crate::cpu::run::{Surroundings, Vcpus};
use crate::cpu::state::VcpuStateError;
use crate::exit::ExitSlot;
use crate::memory::changes::Changes;
use crate::memory::image;
use crate::memory::touched::Touched;
use crate::pci::bus::PciBus;
use crate::platform::hotplug::Hotplug;
use crate::platform::power::Power;
use crate::platform::processors::Processors;
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
    #[error("there is a device {0} already")]
    Exists(String),
    #[error("there is no disk or network interface {0}")]
    NoDevice(String),
    #[error("there is no disk {0}")]
    NoDisk(String),
    #[error(
        "{wanted} MiB are not possible while the VM runs: it has {booted} MiB from its start, and can have up to {most} MiB in steps of {step} MiB"
    )]
    Resize { wanted: u64, booted: u64, step: u64, most: u64 },
    #[error("there is no network interface {0}")]
    NoNetwork(String),
    #[error("cannot use the console log")]
    ConsoleLog(#[from] crate::log_ring::LogRingError),
    #[error("cannot give up privileges")]
    Jail(#[from] crate::jail::JailError),
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    #[error(transparent)]
    Saved(#[from] saved::SavedStateError),
    #[error("the saved state names other vCPUs than it has")]
    Processors,
    #[error("this VM can have {most} vCPUs at most: start it again with more")]
    MostVcpus { most: u8 },
    #[error("this host's CPU lacks what the saved VM uses: {0}")]
    Features(String),
    #[error("the saved VM has the devices {saved}; the configuration gives {given}: configure it as it was saved")]
    OtherDevices { saved: String, given: String },
    #[error("cannot restore device {id}")]
    DeviceState {
        id: String,
        #[source]
        source: crate::virtio::DeviceError,
    },
    #[error("cannot make {id} larger")]
    Grow {
        id: String,
        #[source]
        source: crate::virtio::DeviceError,
    },
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

/// A device and its place on the PCI bus.
pub struct Device {
    slot: usize,
    device: Arc<Mutex<VirtioPci>>,
}

/// A VM whose vCPUs have threads. It starts paused.
pub struct Machine {
    vm: Arc<VmFd>,
    vcpus: Vcpus,
    /// How further vCPUs are made.
    recipe: Recipe,
    processors: Arc<Processors>,
    /// Who waits until there are no more vCPUs than this.
    leaving_vcpus: Vec<(u8, OwnedFd)>,
    /// Keeps the VM's memory mapped as long as its vCPUs are there.
    memory: GuestMemory,
    /// What has changed in it since it was saved.
    changes: Changes,
    /// Which of its pages were touched.
    touched: Option<Arc<Touched>>,
    devices: Vec<Device>,
    pci: Arc<PciBus>,
    surroundings: DeviceSurroundings,
    hotplug: Arc<Hotplug>,
    /// Devices that the guest was asked for, and who waits for that.
    leaving: Vec<(usize, OwnedFd)>,
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
        let Prepared { vm, memory, changes, touched, vcpus, recipe, msr_indices, bus, devices, surroundings, handles } = prepared;
        let exit = Arc::new(ExitSlot::new().map_err(|source| MachineError::Io { context: "make an eventfd", source })?);
        let (serial, power, pci, hotplug) =
            (Arc::clone(&bus.serial), Arc::clone(&bus.power), Arc::clone(&bus.pci), Arc::clone(&bus.hotplug));
        let processors = Arc::clone(&bus.processors);
        let around = Surroundings { bus: Arc::new(bus), exit: Arc::clone(&exit) };
        let vcpus = Vcpus::start(vcpus, recipe.most, msr_indices, around);
        let vcpus = vcpus.map_err(|source| MachineError::Io { context: "start the vCPU threads", source })?;
        Ok(Machine {
            vm,
            vcpus,
            recipe,
            processors,
            leaving_vcpus: Vec::new(),
            memory,
            changes,
            touched,
            devices,
            pci,
            surroundings,
            hotplug,
            leaving: Vec::new(),
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
        &self.surroundings.activations
    }

    /// Readable when [`Machine::end_ejected`] has something to do.
    #[must_use]
    pub fn ejected(&self) -> &EventFd {
        &self.hotplug.event
    }

    #[must_use]
    pub fn serial(&self) -> &Arc<SerialPort> {
        &self.serial
    }

    /// Starts the devices whose drivers have become ready. Main thread only. While paused they wait for the resume.
    pub fn activate_devices(&self) {
        for slot in self.surroundings.activations.take() {
            let device = self.devices.iter().find(|device| device.slot == slot);
            if let Some(device) = device.filter(|_| !self.paused.load(Ordering::Acquire)) {
                lock(&device.device).activate();
            }
        }
    }

    /// Stops vCPUs, then devices: afterwards nothing changes guest memory, and no request is half done.
    pub fn pause(&self) {
        self.vcpus.pause();
        for device in &self.devices {
            lock(&device.device).pause();
        }
        self.paused.store(true, Ordering::Release);
    }

    pub fn resume(&self) {
        self.paused.store(false, Ordering::Release);
        for device in &self.devices {
            lock(&device.device).activate();
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
            memory: Some(self.memory_metrics()),
            ..self.handles.metrics()
        }
    }

    /// Everything but guest memory and disks. Call only while paused.
    ///
    /// # Errors
    /// When KVM does not give a part of it.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let save: image::SaveId = random()?;
        let devices = self.devices.iter().map(|Device { slot, device }| {
            let device = lock(device);
            DeviceState { id: device.id().to_owned(), slot: *slot, state: device.save() }
        });
        Ok(MachineState {
            save,
            memory_mib: self.booted_mib(),
            vcpus: self.vcpus.save()?,
            processors: Some(self.processors.save()),
            chips: state::save_chips(&self.vm)?,
            clock: ClockState::save(&self.vm)?,
            serial: self.serial.save(),
            power: self.power.save(),
            pci_address: self.pci.address(),
            devices: devices.collect(),
        })
    }
}

fn random() -> Result<[u8; 16], MachineError> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| MachineError::Io { context: "draw a random number", source: error.into() })?;
    Ok(bytes)
}

pub(crate) fn lock(device: &Mutex<VirtioPci>) -> std::sync::MutexGuard<'_, VirtioPci> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
