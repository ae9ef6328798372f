//! The virtio devices of a VM, from its configuration.

use std::num::NonZeroU64;
use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::MachineError;
use crate::config::{DiskConfig, DiskFormat, DiskLimits, NetworkConfig, RestoreConfig, VmConfig};
use crate::control::Metrics;
use crate::descriptors::Descriptors;
use crate::memory::chunks::Chunks;
use crate::virtio::balloon::{self, Balloon};
use crate::virtio::block::{self, Block, DiskBackend, Layer};
use crate::virtio::mem::{self, Mem, MemState, Region};
use crate::virtio::net::{self, Net};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Connector, Vsock};
use crate::virtio::{GuestMemory, VirtioDevice};

/// `VIRTIO_BLK_ID` has 20 bytes.
const SERIAL_MAX: usize = 20;

/// What the memory device is known by. It is in no configuration: it comes when the VM first gets more memory than it booted with.
pub const MEMORY: &str = "memory";

/// What the main thread keeps of the devices.
#[derive(Default)]
pub struct Handles {
    pub vsock: Option<Connector>,
    pub balloon: Option<balloon::Handle>,
    pub memory: Option<mem::Handle>,
    disks: Vec<DiskHandle>,
    networks: Vec<NetworkHandle>,
}

struct DiskHandle {
    id: String,
    counters: Arc<block::Counters>,
    limiter: block::Limiter,
}

struct NetworkHandle {
    id: String,
    counters: Arc<net::Counters>,
    limiter: net::Limiter,
}

impl Handles {
    pub fn add_disk(&mut self, disk: &Block) {
        self.disks.push(DiskHandle { id: disk.id().to_owned(), counters: disk.counters(), limiter: disk.limiter() });
    }

    pub fn add_network(&mut self, net: &Net) {
        self.networks.push(NetworkHandle { id: net.id().to_owned(), counters: net.counters(), limiter: net.limiter() });
    }

    pub fn remove(&mut self, id: &str) {
        self.disks.retain(|disk| disk.id != id);
        self.networks.retain(|network| network.id != id);
    }

    pub fn has_disk(&self, id: &str) -> bool {
        self.disks.iter().any(|disk| disk.id == id)
    }

    pub fn has_network(&self, id: &str) -> bool {
        self.networks.iter().any(|network| network.id == id)
    }

    /// `None` when there is no such disk.
    pub fn limit_disk(&self, id: &str, limits: DiskLimits) -> Option<()> {
        self.disks.iter().find(|disk| disk.id == id).map(|disk| disk.limiter.set(limits))
    }

    /// `None` when there is no such interface.
    pub fn limit_network(&self, id: &str, bytes_per_second: Option<NonZeroU64>) -> Option<()> {
        self.networks.iter().find(|network| network.id == id).map(|network| network.limiter.set(bytes_per_second))
    }

    /// Whether an interface has to be stopped and started again for a change of its limit to hold, or to be gone.
    pub fn changes_carrier(&self, id: &str, is_limited: bool) -> bool {
        self.networks.iter().any(|network| network.id == id && network.counters.changes_carrier(is_limited))
    }

    /// The interfaces whose packets the host's kernel moves.
    pub fn vhost_networks(&self) -> Vec<String> {
        self.networks.iter().filter(|network| network.counters.is_vhost()).map(|network| network.id.clone()).collect()
    }

    pub fn metrics(&self) -> Metrics {
        Metrics {
            disks: self.disks.iter().map(|disk| disk.counters.metrics(&disk.id)).collect(),
            networks: self.networks.iter().map(|network| network.counters.metrics(&network.id)).collect(),
            balloon_mib: self.balloon.as_ref().map_or(0, balloon::Handle::actual_mib),
            ..Metrics::default()
        }
    }
}

/// The part of a configuration that names devices.
pub struct Devices<'a> {
    disks: &'a [DiskConfig],
    networks: &'a [NetworkConfig],
    vsock_cid: Option<u64>,
    rng: bool,
    balloon: bool,
}

impl<'a> From<&'a VmConfig> for Devices<'a> {
    fn from(config: &'a VmConfig) -> Self {
        let VmConfig { disks, networks, vsock_cid, rng, balloon, .. } = config;
        Devices { disks, networks, vsock_cid: *vsock_cid, rng: *rng, balloon: *balloon }
    }
}

impl<'a> From<&'a RestoreConfig> for Devices<'a> {
    fn from(config: &'a RestoreConfig) -> Self {
        let RestoreConfig { disks, networks, vsock_cid, rng, balloon, .. } = config;
        Devices { disks, networks, vsock_cid: *vsock_cid, rng: *rng, balloon: *balloon }
    }
}

/// In PCI order: disks and networks as configured, then vsock, rng, balloon.
pub fn build(config: &Devices<'_>, fds: &mut Descriptors) -> Result<(Vec<Box<dyn VirtioDevice>>, Handles), MachineError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    let mut handles = Handles::default();
    block::provide_rings(config.disks.iter().filter(|disk| disk.format == DiskFormat::Raw).count());
    for disk in config.disks {
        let block = self::disk(disk, fds)?;
        handles.add_disk(&block);
        devices.push(Box::new(block));
    }
    for network in config.networks {
        let net = self::network(network, fds)?;
        handles.add_network(&net);
        devices.push(Box::new(net));
    }
    if let Some(cid) = config.vsock_cid {
        let vsock = Vsock::new(cid).map_err(device("vsock"))?;
        handles.vsock = Some(vsock.connector());
        devices.push(Box::new(vsock));
    }
    if config.rng {
        devices.push(Box::new(Rng::new("rng".to_owned())));
    }
    if config.balloon {
        let balloon = Balloon::new("balloon".to_owned());
        handles.balloon = Some(balloon.handle());
        devices.push(Box::new(balloon));
    }
    Ok((devices, handles))
}

/// The memory device, with nothing in its region.
pub fn memory(region: Region, vm: &Arc<VmFd>, memory: &GuestMemory) -> Mem {
    let chunks = Chunks::new(Box::new(Arc::clone(vm)), memory.clone(), region);
    Mem::new(MEMORY.to_owned(), region, Box::new(chunks))
}

/// The memory device as it was saved; what the guest had of it is in `memory`.
pub fn saved_memory(state: &MemState, vm: &Arc<VmFd>, memory: &GuestMemory) -> Result<Mem, MachineError> {
    let chunks = Chunks::new(Box::new(Arc::clone(vm)), memory.clone(), state.region());
    state.plugged.iter().try_for_each(|index| chunks.adopt(*index)).map_err(device(MEMORY))?;
    Ok(Mem::saved(MEMORY.to_owned(), state, Box::new(chunks)))
}

/// One disk, whose files are among `fds`.
pub fn disk(disk: &DiskConfig, fds: &mut Descriptors) -> Result<Block, MachineError> {
    if disk.serial.len() > SERIAL_MAX {
        return Err(MachineError::Invalid {
            what: "a disk serial with a length",
            value: disk.serial.len() as u64,
            allowed: "at most 20 bytes",
        });
    }
    let block = Block::new(disk.id.clone(), &disk.serial, backend(disk, fds)?, disk.read_only).map_err(device(&disk.id))?;
    block.limiter().set(disk.limits);
    Ok(block)
}

/// One network interface, whose tap is among `fds`.
pub fn network(network: &NetworkConfig, fds: &mut Descriptors) -> Result<Net, MachineError> {
    let tap = fds.take(network.tap, "tap")?;
    let vhost = network.vhost.map(|vhost| fds.take(vhost, "vhost-net")).transpose()?;
    let net = Net::new(network.id.clone(), tap, network.mac, network.mtu).map_err(device(&network.id))?.with_vhost(vhost);
    net.limiter().set(network.bytes_per_second);
    Ok(net)
}

fn device(id: &str) -> impl FnOnce(std::io::Error) -> MachineError {
    let id = id.to_owned();
    move |source| MachineError::Device { id, source }
}

fn backend(disk: &DiskConfig, fds: &mut Descriptors) -> Result<Box<dyn DiskBackend>, MachineError> {
    let image = Layer { file: fds.take(disk.file, "disk")?, format: disk.format };
    let mut behind = Vec::with_capacity(disk.backing.len());
    for layer in &disk.backing {
        behind.push(Layer { file: fds.take(layer.file, "backing file")?, format: layer.format });
    }
    block::open(image, behind, disk.read_only).map_err(device(&disk.id))
}
