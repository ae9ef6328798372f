//! The virtio devices of a VM, from its configuration.

use std::sync::Arc;

use super::MachineError;
use crate::config::{DiskConfig, NetworkConfig, RestoreConfig, VmConfig};
use crate::control::Metrics;
use crate::descriptors::Descriptors;
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::{self, Balloon};
use crate::virtio::block::{self, Block, DiskBackend, Layer};
use crate::virtio::net::{self, Net};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Connector, Vsock};

/// `VIRTIO_BLK_ID` has 20 bytes.
const SERIAL_MAX: usize = 20;

/// What the main thread keeps of the devices.
#[derive(Default)]
pub struct Handles {
    pub vsock: Option<Connector>,
    pub balloon: Option<balloon::Handle>,
    disks: Vec<(String, Arc<block::Counters>)>,
    networks: Vec<(String, Arc<net::Counters>)>,
}

impl Handles {
    pub fn add_disk(&mut self, disk: &Block) {
        self.disks.push((disk.id().to_owned(), disk.counters()));
    }

    pub fn remove_disk(&mut self, id: &str) {
        self.disks.retain(|(known, _)| known != id);
    }

    pub fn has_disk(&self, id: &str) -> bool {
        self.disks.iter().any(|(known, _)| known == id)
    }

    pub fn metrics(&self) -> Metrics {
        Metrics {
            disks: self.disks.iter().map(|(id, counters)| counters.metrics(id)).collect(),
            networks: self.networks.iter().map(|(id, counters)| counters.metrics(id)).collect(),
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
    for disk in config.disks {
        let block = self::disk(disk, fds)?;
        handles.add_disk(&block);
        devices.push(Box::new(block));
    }
    for network in config.networks {
        let tap = fds.take(network.tap, "tap")?;
        let net = Net::new(network.id.clone(), tap, network.mac, network.mtu).map_err(device(&network.id))?;
        handles.networks.push((network.id.clone(), net.counters()));
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

/// One disk, whose files are among `fds`.
pub fn disk(disk: &DiskConfig, fds: &mut Descriptors) -> Result<Block, MachineError> {
    if disk.serial.len() > SERIAL_MAX {
        return Err(MachineError::Invalid {
            what: "a disk serial with a length",
            value: disk.serial.len() as u64,
            allowed: "at most 20 bytes",
        });
    }
    Ok(Block::new(disk.id.clone(), &disk.serial, backend(disk, fds)?, disk.read_only))
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
