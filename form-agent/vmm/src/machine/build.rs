//! From a configuration to a VM that is ready to run.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::{CpuId, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::MachineError;
use super::devices::{self, Handles};
use crate::bus::Bus;
use crate::config::VmConfig;
use crate::cpu::{cpuid, registers};
use crate::descriptors::Descriptors;
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS, Layout};
use crate::pci::bus::PciBus;
use crate::pci::interrupts::{Interrupts, Router, io_error};
use crate::platform::power::Power;
use crate::platform::serial::{SerialPort, Sink};
use crate::platform::{EVENT_IRQ, SERIAL_IRQ};
use crate::virtio::GuestMemory;
use crate::virtio::pci::{Activations, BAR_SIZE, Doorbells, Host, VirtioPci};
use crate::{acpi, boot, log_ring, memory};

const MAX_VCPUS: u8 = 128;

/// A VM with everything in place: the next step is the jail, then the threads.
pub struct Prepared {
    pub(super) vm: Arc<VmFd>,
    pub(super) memory: GuestMemory,
    pub(super) vcpus: Vec<VcpuFd>,
    pub(super) msr_indices: Vec<u32>,
    pub(super) bus: Bus,
    pub(super) devices: Vec<Arc<Mutex<VirtioPci>>>,
    pub(super) activations: Arc<Activations>,
    pub(super) handles: Handles,
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

impl Prepared {
    /// Builds the VM and loads its kernel.
    ///
    /// # Errors
    /// When the configuration cannot be satisfied.
    pub fn new(config: &VmConfig, fds: &mut Descriptors) -> Result<Self, MachineError> {
        if !(1..=MAX_VCPUS).contains(&config.vcpus) {
            return Err(MachineError::Invalid { what: "a number of vCPUs", value: config.vcpus.into(), allowed: "1 to 128" });
        }
        let hypervisor = open_kvm(fds.take(config.kvm, "kvm")?)?;
        let vm = Arc::new(hypervisor.create_vm().map_err(kvm("create a VM"))?);
        vm.set_tss_address(KVM_TSS).map_err(kvm("place the TSS"))?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(kvm("place the identity map"))?;
        vm.create_irq_chip().map_err(kvm("create the interrupt controllers"))?;

        let template = cpuid::template(&hypervisor, hypervisor.check_extension(Cap::TscDeadlineTimer)).map_err(kvm("read the CPUID"))?;
        let layout = Layout::new(config.memory_mib, cpuid::address_bits(&template))?;
        let memory = memory::map(&layout)?;
        register_memory(&vm, &memory)?;

        let mut kernel = File::from(fds.take(config.kernel, "kernel")?);
        let mut initramfs = Vec::with_capacity(config.initramfs.len());
        for segment in &config.initramfs {
            initramfs.push(File::from(fds.take(*segment, "initramfs")?));
        }
        let rsdp = acpi::write(&memory, &layout, config.vcpus)?;
        let entry = boot::load(&memory, &layout, &mut kernel, &mut initramfs, &config.cmdline, rsdp)?;
        let vcpus = create_vcpus(&vm, config.vcpus, &template, entry)?;
        let msr_indices = hypervisor.get_msr_index_list().map_err(kvm("list the model-specific registers"))?.as_slice().to_vec();

        let interrupts = Arc::new(Interrupts::new(Arc::clone(&vm)));
        let bus = Bus {
            serial: Arc::new(serial(config, fds, &interrupts)?),
            power: Arc::new(Power::new(interrupts.edge(EVENT_IRQ).map_err(io("connect the event line"))?)),
            pci: Arc::new(PciBus::default()),
        };
        let (backends, handles) = devices::build(config, fds)?;
        let activations = Arc::new(Activations::new().map_err(io("make an eventfd"))?);
        let doorbells: Arc<dyn Doorbells> = Arc::new(KvmDoorbells(Arc::clone(&vm)));
        let memory = GuestMemory::new(memory);
        let mut devices = Vec::with_capacity(backends.len());
        for (index, device) in backends.into_iter().enumerate() {
            let id = device.id().to_owned();
            let host = Host {
                memory: memory.clone(),
                router: Arc::clone(&interrupts) as Arc<dyn Router>,
                doorbells: Arc::clone(&doorbells),
                activations: Arc::clone(&activations),
            };
            let address = layout.mmio64_start + index as u64 * BAR_SIZE;
            let device = VirtioPci::new(index, device, address, host).map_err(|source| MachineError::Device { id, source })?;
            let device = Arc::new(Mutex::new(device));
            bus.pci.add(Arc::clone(&device) as _).ok_or(MachineError::Slots)?;
            devices.push(device);
        }
        Ok(Prepared { vm, memory, vcpus, msr_indices, bus, devices, activations, handles })
    }
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

fn register_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), MachineError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is mapped, and stays mapped: `Prepared` and after it `Machine` hold the memory beside the
        // vCPUs; the slots do not overlap because the regions of guest memory do not.
        unsafe { vm.set_user_memory_region(region) }.map_err(kvm("give the VM its memory"))?;
    }
    Ok(())
}

fn create_vcpus(vm: &VmFd, count: u8, template: &CpuId, entry: u64) -> Result<Vec<VcpuFd>, MachineError> {
    let mut vcpus = Vec::with_capacity(usize::from(count));
    for id in 0..count {
        let vcpu = vm.create_vcpu(u64::from(id)).map_err(kvm("create a vCPU"))?;
        let cpuid = cpuid::for_vcpu(template, id, count).map_err(|_| MachineError::Capability("room for all CPUID leaves"))?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm("set a vCPU's CPUID"))?;
        registers::set_common_state(&vcpu).map_err(kvm("set a vCPU's model-specific registers"))?;
        if id == 0 {
            registers::set_boot_state(&vcpu, entry).map_err(kvm("set the first vCPU's registers"))?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

fn serial(config: &VmConfig, fds: &mut Descriptors, interrupts: &Interrupts) -> Result<SerialPort, MachineError> {
    let sink = match config.console_log {
        Some(fd) => Sink::Ring(log_ring::Writer::open(&File::from(fds.take(fd, "console log")?))?),
        None => Sink::Stdout,
    };
    let interrupt = interrupts.edge(SERIAL_IRQ).map_err(io("connect the serial port's line"))?;
    SerialPort::new(sink, interrupt).map_err(io("make the serial port"))
}
