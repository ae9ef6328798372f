//! From a configuration, or from a saved state, to a VM that is ready to run.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::{CpuId, KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::devices::{self, Handles};
use super::processors::Recipe;
use super::state::{self, DeviceState, MachineState};
use super::{Device, MachineError, saved};
use crate::bus::Bus;
use crate::config::{Fd, RestoreConfig, VmConfig};
use crate::cpu::{cpuid, features, registers, state as vcpu_state};
use crate::descriptors::Descriptors;
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS, Layout, MIB};
use crate::memory::GuestMemoryMmap;
use crate::memory::changes::{Changes, slot_of};
use crate::memory::chunks::FIRST_SLOT;
use crate::memory::image;
use crate::memory::touched::Touched;
use crate::pci::bus::PciBus;
use crate::pci::interrupts::{Interrupts, Router, io_error};
use crate::platform::hotplug::Hotplug;
use crate::platform::power::Power;
use crate::platform::processors::{MOST, Processors, ProcessorsState};
use crate::platform::serial::{SerialPort, Sink};
use crate::platform::{EVENT_IRQ, SERIAL_IRQ};
use crate::virtio::mem::{BLOCK, BLOCKS_MAX, MemState, Region};
use crate::virtio::pci::{Activations, BAR_SIZE, Doorbells, Host, VirtioPci};
use crate::virtio::{DeviceError, GuestMemory, KernelTerms, VirtioDevice};
use crate::{acpi, boot, log_ring, memory};

/// A VM with everything in place: the next step is the jail, then the threads.
pub struct Prepared {
    pub(super) vm: Arc<VmFd>,
    pub(super) memory: GuestMemory,
    /// What has changed in it since it was saved.
    pub(super) changes: Changes,
    pub(super) touched: Option<Arc<Touched>>,
    pub(super) vcpus: Vec<(u8, VcpuFd)>,
    pub(super) recipe: Recipe,
    pub(super) msr_indices: Vec<u32>,
    pub(super) bus: Bus,
    pub(super) devices: Vec<Device>,
    pub(super) surroundings: DeviceSurroundings,
    pub(super) handles: Handles,
}

/// What every device is connected to.
pub struct DeviceSurroundings {
    memory: GuestMemory,
    router: Arc<dyn Router>,
    doorbells: Arc<dyn Doorbells>,
    pub(super) activations: Arc<Activations>,
    pub(super) kernel: Arc<KernelTerms>,
    /// Where the memory of devices begins; all that the VM booted with lies below.
    pub(super) mmio64_start: u64,
    /// Where memory can be added.
    pub(super) growth: Region,
}

impl DeviceSurroundings {
    /// Puts a device into a free slot of the bus.
    ///
    /// # Errors
    /// When the slot is taken, or the operating system has no eventfd left.
    pub(super) fn place(&self, pci: &PciBus, slot: usize, device: Box<dyn VirtioDevice>) -> Result<Device, MachineError> {
        let id = device.id().to_owned();
        let host = Host {
            memory: self.memory.clone(),
            router: Arc::clone(&self.router),
            doorbells: Arc::clone(&self.doorbells),
            activations: Arc::clone(&self.activations),
            kernel: Arc::clone(&self.kernel),
        };
        // Slot 0 is the host bridge's, which has no memory.
        let address = self.mmio64_start + slot.saturating_sub(1) as u64 * BAR_SIZE;
        let device = VirtioPci::new(slot, device, address, host).map_err(|source| MachineError::Device { id, source })?;
        let device = Arc::new(Mutex::new(device));
        pci.add(slot, Arc::clone(&device) as _).ok_or(MachineError::Slots)?;
        Ok(Device { slot, device })
    }
}

fn kvm(context: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |source| MachineError::Kvm { context, source }
}

fn io(context: &'static str) -> impl FnOnce(std::io::Error) -> MachineError {
    move |source| MachineError::Io { context, source }
}

/// KVM's side of the doorbells.
struct KvmDoorbells(Arc<VmFd>);

impl Doorbells for KvmDoorbells {
    fn attach(&self, address: u64, event: &EventFd) -> std::io::Result<()> {
        self.0.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch).map_err(io_error)
    }

    fn detach(&self, address: u64, event: &EventFd) {
        // It was attached with these arguments, which is all that can be wrong.
        let _ = self.0.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch);
    }
}

/// An empty VM and what its host can do.
struct Empty {
    hypervisor: Kvm,
    vm: Arc<VmFd>,
    cpuid: CpuId,
}

impl Empty {
    fn new(kvm_fd: OwnedFd) -> Result<Self, MachineError> {
        let hypervisor = open_kvm(kvm_fd)?;
        let vm = Arc::new(hypervisor.create_vm().map_err(kvm("create a VM"))?);
        vm.set_tss_address(KVM_TSS).map_err(kvm("place the TSS"))?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(kvm("place the identity map"))?;
        vm.create_irq_chip().map_err(kvm("create the interrupt controllers"))?;
        let cpuid = host_cpuid(&hypervisor)?;
        Ok(Empty { hypervisor, vm, cpuid })
    }

    fn layout(&self, memory_mib: u64) -> Result<Layout, MachineError> {
        Ok(Layout::new(memory_mib, cpuid::address_bits(&self.cpuid))?)
    }

    fn create_vcpus(&self, ids: &[u8]) -> Result<Vec<(u8, VcpuFd)>, MachineError> {
        ids.iter().map(|id| Ok((*id, self.vm.create_vcpu(u64::from(*id)).map_err(kvm("create a vCPU"))?))).collect()
    }

    /// How many vCPUs the guest can have: no more than KVM can make, and no less than it starts with.
    fn most_vcpus(&self, config: &VmConfig) -> u8 {
        let possible = u8::try_from(self.hypervisor.get_max_vcpus()).unwrap_or(u8::MAX).min(MOST);
        config.most_vcpus.unwrap_or(config.vcpus).min(possible).max(config.vcpus)
    }

    fn edge(&self, interrupts: &Interrupts, line: u32) -> Result<EventFd, MachineError> {
        interrupts.edge(line).map_err(io("connect an interrupt line"))
    }

    /// Where this VM's memory can grow: as far as addresses and KVM's slots go.
    fn growth(&self, layout: &Layout) -> Region {
        let (start, length) = layout.growth(cpuid::address_bits(&self.cpuid), BLOCK);
        let slots = self.hypervisor.get_nr_memslots().saturating_sub(FIRST_SLOT as usize);
        let blocks = (length / BLOCK).min(slots as u64).min(u64::from(BLOCKS_MAX));
        Region { start, blocks: blocks as u32 }
    }

    /// Puts the devices on the bus, in order; into `slots`, when these are given.
    fn finish(
        self,
        layout: &Layout,
        memory: GuestMemory,
        vcpus: Vec<(u8, VcpuFd)>,
        parts: Parts,
        slots: Option<&[usize]>,
    ) -> Result<Prepared, MachineError> {
        let Parts { interrupts, bus, backends, handles, recipe } = parts;
        let msr_indices = self.hypervisor.get_msr_index_list().map_err(kvm("list the model-specific registers"))?.as_slice().to_vec();
        let growth = self.growth(layout);
        let surroundings = DeviceSurroundings {
            memory: memory.clone(),
            router: interrupts,
            doorbells: Arc::new(KvmDoorbells(Arc::clone(&self.vm))),
            activations: Arc::new(Activations::new().map_err(io("make an eventfd"))?),
            kernel: Arc::default(),
            mmio64_start: layout.mmio64_start,
            growth,
        };
        let mut devices = Vec::with_capacity(backends.len());
        for (index, device) in backends.into_iter().enumerate() {
            let given = slots.and_then(|slots| slots.get(index).copied());
            let slot = given.or_else(|| bus.pci.free_slot()).ok_or(MachineError::Slots)?;
            devices.push(surroundings.place(&bus.pci, slot, device)?);
        }
        let (changes, touched) = (Changes::default(), Touched::open().map(Arc::new));
        Ok(Prepared { vm: self.vm, memory, changes, touched, vcpus, recipe, msr_indices, bus, devices, surroundings, handles })
    }
}

struct Parts {
    interrupts: Arc<Interrupts>,
    bus: Bus,
    backends: Vec<Box<dyn VirtioDevice>>,
    handles: Handles,
    recipe: Recipe,
}

impl Prepared {
    /// Builds the VM and loads its kernel.
    ///
    /// # Errors
    /// When the configuration cannot be satisfied.
    pub fn new(config: &VmConfig, fds: &mut Descriptors) -> Result<Self, MachineError> {
        if !(1..=MOST).contains(&config.vcpus) {
            return Err(MachineError::Invalid { what: "a number of vCPUs", value: config.vcpus.into(), allowed: "1 to 128" });
        }
        let empty = Empty::new(fds.take(config.kvm, "kvm")?)?;
        let layout = empty.layout(config.memory_mib)?;
        let memory = memory::map(&layout)?;
        register_memory(&empty.vm, &memory, &layout, 0)?;

        let mut kernel = File::from(fds.take(config.kernel, "kernel")?);
        let mut initramfs = Vec::with_capacity(config.initramfs.len());
        for segment in &config.initramfs {
            initramfs.push(File::from(fds.take(*segment, "initramfs")?));
        }
        let most = empty.most_vcpus(config);
        acpi::generation::set(&memory, super::random()?)?;
        let rsdp = acpi::write(&memory, &layout, acpi::Vcpus { count: config.vcpus, most })?;
        let entry = boot::load(&memory, &layout, &mut kernel, &mut initramfs, &config.cmdline, rsdp)?;
        let processors = ProcessorsState::new(config.vcpus, most);
        let vcpus = empty.create_vcpus(&processors.ids())?;
        let recipe = Recipe { cpuid: empty.cpuid.clone(), most, tsc_khz: None };
        set_up_vcpus(&vcpus, &recipe, entry)?;

        let interrupts = Arc::new(Interrupts::new(Arc::clone(&empty.vm)));
        let serial = SerialPort::new(sink(config.console_log, fds)?, empty.edge(&interrupts, SERIAL_IRQ)?);
        let hotplug = Hotplug::new().map_err(io("make an eventfd"))?;
        let bus = Bus {
            serial: Arc::new(serial.map_err(io("make the serial port"))?),
            power: Arc::new(Power::new(empty.edge(&interrupts, EVENT_IRQ)?)),
            pci: Arc::new(PciBus::default()),
            processors: Arc::new(Processors::new(&processors, hotplug.event.try_clone().map_err(io("make an eventfd"))?)),
            hotplug: Arc::new(hotplug),
        };
        let (backends, handles) = devices::build(&config.into(), fds)?;
        empty.finish(&layout, GuestMemory::new(memory), vcpus, Parts { interrupts, bus, backends, handles, recipe }, None)
    }

    /// Builds the VM that was saved, up to the instruction where it stood.
    ///
    /// # Errors
    /// When the state is torn, foreign or of another version, when this host cannot go on with it, or when the devices of the
    /// configuration are not those that were saved.
    pub fn restore(config: &RestoreConfig, fds: &mut Descriptors) -> Result<Self, MachineError> {
        let state = saved::read(&File::from(fds.take(config.state, "saved state")?))?;
        let empty = Empty::new(fds.take(config.kvm, "kvm")?)?;
        let processors = state.processors()?;
        check_host(&empty.cpuid, &state)?;
        let layout = empty.layout(state.memory_mib)?;
        let added = added_memory(&state, &layout, &empty.cpuid)?;
        let memory = image::map(&ranges(&layout, added.as_ref()), File::from(fds.take(config.memory, "memory")?), &state.save)?;
        // From the beginning: KVM itself writes to guest memory when it gets the state of a vCPU.
        let (flags, changes) =
            if config.track { (KVM_MEM_LOG_DIRTY_PAGES, Changes::since(state.save, &memory)) } else { (0, Changes::default()) };
        register_memory(&empty.vm, &memory, &layout, flags)?;
        // Not what it was when it was saved, and not what another copy of that is: before its first instruction.
        acpi::generation::set(&memory, super::random()?)?;
        let memory = GuestMemory::new(memory);

        let vcpus = empty.create_vcpus(&processors.ids())?;
        let recipe = Recipe::of_saved(&state.vcpus, processors.most)?;
        let away = state.clock.away(state::world_ns());
        for ((_, vcpu), saved) in vcpus.iter().zip(&state.vcpus) {
            vcpu_state::restore(vcpu, saved, away)?;
        }
        // After the local APICs, which they may interrupt at once.
        state::restore_chips(&empty.vm, &state.chips)?;

        let interrupts = Arc::new(Interrupts::new(Arc::clone(&empty.vm)));
        let serial = SerialPort::restore(&state.serial, sink(config.console_log, fds)?, empty.edge(&interrupts, SERIAL_IRQ)?);
        let power = Power::restore(state.power.in_a_new_generation(), empty.edge(&interrupts, EVENT_IRQ)?);
        let hotplug = Hotplug::new().map_err(io("make an eventfd"))?;
        let bus = Bus {
            serial: Arc::new(serial.map_err(io("restore the serial port"))?),
            power: Arc::new(power.map_err(io("restore the power registers"))?),
            pci: Arc::new(PciBus::default()),
            processors: Arc::new(Processors::new(&processors, hotplug.event.try_clone().map_err(io("make an eventfd"))?)),
            hotplug: Arc::new(hotplug),
        };
        bus.pci.set_address(state.pci_address);
        let (mut backends, mut handles) = devices::build(&config.into(), fds)?;
        if let Some(added) = &added {
            let device = devices::saved_memory(added, &empty.vm, &memory)?;
            handles.memory = Some(device.handle());
            // It came while the VM ran, so the configuration does not name it.
            backends.push(Box::new(device));
        }
        in_saved_order(&mut backends, &state.devices);
        check_devices(&backends, &state.devices)?;
        // Not the first free ones: a disk that was taken away before the save has left its slot empty.
        let slots: Vec<usize> = state.devices.iter().map(|device| device.slot).collect();
        let prepared = empty.finish(&layout, memory, vcpus, Parts { interrupts, bus, backends, handles, recipe }, Some(&slots))?;
        let prepared = Prepared { changes, ..prepared };
        if config.track {
            prepared.surroundings.kernel.must_note();
        }
        if added.is_some() {
            prepared.surroundings.kernel.forbid();
        }
        restore_devices(&prepared, &state.devices)?;
        state.clock.restore(&prepared.vm, away)?;
        Ok(prepared)
    }
}

fn host_cpuid(hypervisor: &Kvm) -> Result<CpuId, MachineError> {
    cpuid::template(hypervisor, hypervisor.check_extension(Cap::TscDeadlineTimer)).map_err(kvm("read the CPUID"))
}

/// How large a saved VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedSize {
    pub vcpus: usize,
    /// What it should have, together with what was added while it ran.
    pub memory_mib: u64,
}

/// Whether a saved VM could go on here, as far as that can be told without making it. `kvm` is `/dev/kvm`.
///
/// # Errors
/// When the files are torn, foreign, of another version or not of one save, or when this host's CPU lacks what the VM uses.
pub fn check_saved(state: &File, memory: &File, kvm: OwnedFd) -> Result<SavedSize, MachineError> {
    let saved = saved::read(state)?;
    saved.processors()?;
    let cpuid = host_cpuid(&open_kvm(kvm)?)?;
    check_host(&cpuid, &saved)?;
    let layout = Layout::new(saved.memory_mib, cpuid::address_bits(&cpuid))?;
    let added = added_memory(&saved, &layout, &cpuid)?;
    image::check(&ranges(&layout, added.as_ref()), memory, &saved.save).map_err(memory::MemoryError::Image)?;
    let wanted = added.map_or(0, |added| u64::from(added.wanted) * BLOCK / MIB);
    Ok(SavedSize { vcpus: saved.vcpus.len(), memory_mib: saved.memory_mib + wanted })
}

/// Reads a saved VM's memory, and compares it with its checksums.
///
/// # Errors
/// The first place that is damaged; that it has no checksums ([`image::ImageError::NoChecksums`]), being of an earlier release.
pub fn verify_memory(memory: &File) -> Result<(), image::ImageError> {
    image::verify(memory)
}

/// What was added to a saved VM while it ran: what its memory device says.
fn added_memory(state: &MachineState, layout: &Layout, host: &CpuId) -> Result<Option<MemState>, MachineError> {
    let Some(device) = state.devices.iter().find(|device| device.id == devices::MEMORY) else { return Ok(None) };
    let wrong = |source| MachineError::DeviceState { id: device.id.clone(), source };
    let added = MemState::read(&device.state.device).map_err(wrong)?;
    let (start, end) = (added.start, added.start + added.region().len());
    if start < layout.mmio64_end || end > 1u64 << cpuid::address_bits(host).clamp(32, 52) {
        let reason = format!("memory at {start:#x} to {end:#x} is not possible here");
        return Err(wrong(DeviceError::State { device: "memory", reason }));
    }
    Ok(Some(added))
}

/// Everything that is guest memory.
fn ranges(layout: &Layout, added: Option<&MemState>) -> Vec<(u64, u64)> {
    layout.ram().into_iter().chain(added.into_iter().flat_map(MemState::ranges)).collect()
}

/// Refuses a VM that was told of more than this host has.
fn check_host(host: &CpuId, state: &MachineState) -> Result<(), MachineError> {
    for vcpu in &state.vcpus {
        let missing = features::missing(&vcpu.cpuid, host.as_slice());
        if !missing.is_empty() {
            return Err(MachineError::Features(missing.into_iter().collect::<Vec<_>>().join(", ")));
        }
    }
    Ok(())
}

/// What came while the VM ran stands behind what it booted with.
fn in_saved_order(given: &mut [Box<dyn VirtioDevice>], saved: &[DeviceState]) {
    given.sort_by_key(|device| saved.iter().position(|saved| saved.id == device.id()).unwrap_or(usize::MAX));
}

/// The configuration names the devices that were saved, and no others.
fn check_devices(given: &[Box<dyn VirtioDevice>], saved: &[DeviceState]) -> Result<(), MachineError> {
    let given: Vec<&str> = given.iter().map(|device| device.id()).collect();
    let saved: Vec<&str> = saved.iter().map(|device| device.id.as_str()).collect();
    if given == saved { Ok(()) } else { Err(MachineError::OtherDevices { saved: saved.join(", "), given: given.join(", ") }) }
}

fn restore_devices(prepared: &Prepared, saved: &[DeviceState]) -> Result<(), MachineError> {
    for (device, saved) in prepared.devices.iter().zip(saved) {
        super::lock(&device.device).restore(&saved.state).map_err(|source| MachineError::DeviceState { id: saved.id.clone(), source })?;
        // Its memory may lie elsewhere than where it was made.
        prepared.bus.pci.refresh(device.slot);
    }
    Ok(())
}

fn open_kvm(fd: OwnedFd) -> Result<Kvm, MachineError> {
    // SAFETY: the descriptor is owned and handed over here; `Kvm` does nothing with it but ioctls that fail on other files.
    let hypervisor = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    match hypervisor.get_api_version() {
        12 => {}
        _ => return Err(MachineError::Capability("its stable interface (or the descriptor is not /dev/kvm)")),
    }
    for (capability, name) in [
        (Cap::Irqchip, "in-kernel interrupt controllers"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::IrqRouting, "interrupt routing"),
        (Cap::UserMemory, "user memory"),
        (Cap::ImmediateExit, "immediate exit"),
    ] {
        if !hypervisor.check_extension(capability) {
            return Err(MachineError::Capability(name));
        }
    }
    Ok(hypervisor)
}

/// What the VM boots with. Slots from [`FIRST_SLOT`] on are for what comes later.
fn register_memory(vm: &VmFd, memory: &GuestMemoryMmap, layout: &Layout, flags: u32) -> Result<(), MachineError> {
    let booted = memory.iter().take_while(|region| region.start_addr().0 < layout.mmio64_start);
    for (slot, region) in (0u32..FIRST_SLOT).zip(booted) {
        let region = kvm_userspace_memory_region { flags, ..slot_of(slot, region) };
        // SAFETY: the region is mapped, and stays mapped: `Prepared` and after it `Machine` hold the memory beside the
        // vCPUs; the slots do not overlap because the regions of guest memory do not.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("give the VM its memory"))?;
    }
    Ok(())
}

/// What firmware would have done.
fn set_up_vcpus(vcpus: &[(u8, VcpuFd)], recipe: &Recipe, entry: u64) -> Result<(), MachineError> {
    for (id, vcpu) in vcpus {
        recipe.set_up(*id, vcpu)?;
        if *id == 0 {
            registers::set_boot_state(vcpu, entry).map_err(kvm("set the first vCPU's registers"))?;
        }
    }
    Ok(())
}

fn sink(console_log: Option<Fd>, fds: &mut Descriptors) -> Result<Sink, MachineError> {
    Ok(match console_log {
        Some(fd) => Sink::Ring(log_ring::Writer::open(&File::from(fds.take(fd, "console log")?))?),
        None => Sink::Stdout,
    })
}
