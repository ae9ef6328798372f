//! Block devices by serial: never by name, index or timing.

pub mod in_use;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use form_guest::protocol::DeviceReport;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::OwnedFd,
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink, recv, socket_with},
};

use crate::error::Error;

const SYS_BLOCK: &str = "/sys/block";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// `vda`
    pub name: String,
    pub serial: String,
    pub size_bytes: u64,
}

impl BlockDevice {
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    pub fn report(&self, mounted: Option<&str>) -> DeviceReport {
        DeviceReport {
            serial: self.serial.clone(),
            path: self.path().display().to_string(),
            size_bytes: self.size_bytes,
            mounted: mounted.map(str::to_owned),
        }
    }
}

/// The devices that are there now and have a serial.
pub fn list() -> Vec<BlockDevice> {
    list_in(Path::new(SYS_BLOCK))
}

fn list_in(sys_block: &Path) -> Vec<BlockDevice> {
    let Ok(entries) = fs::read_dir(sys_block) else { return Vec::new() };
    let mut devices: Vec<BlockDevice> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let directory = entry.path();
            // virtio_blk puts it beside the disk, NVMe beside the controller.
            let serial = ["serial", "device/serial"].iter().find_map(|file| fs::read_to_string(directory.join(file)).ok())?;
            let serial = serial.trim_matches(['\0', '\n', ' ']).to_owned();
            let sectors: u64 = fs::read_to_string(directory.join("size")).ok()?.trim().parse().ok()?;
            let name = entry.file_name().into_string().ok()?;
            (!serial.is_empty()).then_some(BlockDevice { name, serial, size_bytes: sectors.saturating_mul(512) })
        })
        .collect();
    devices.sort_by(|a, b| a.name.cmp(&b.name));
    devices
}

/// Waits until the device with this serial is there.
///
/// # Errors
/// [`Error::DeviceMissing`] after `limit`, naming those that are there.
pub fn wait_for(serial: &str, limit: Duration) -> Result<BlockDevice, Error> {
    let start = Instant::now();
    // Opened before the first look, so that nothing that appears after it is missed. Without it we only look more often.
    let events = uevents().ok();
    loop {
        let devices = list();
        if let Some(device) = devices.iter().find(|device| device.serial == serial) {
            return Ok(device.clone());
        }
        if start.elapsed() >= limit {
            return Err(missing(serial, start.elapsed(), &devices));
        }
        wait_for_event(events.as_ref(), Duration::from_millis(100));
    }
}

/// Waits until the device with this serial has at least this size.
///
/// # Errors
/// [`Error::DeviceMissing`] when there is none, [`Error::SizeMissing`] when it is smaller after `limit`.
pub fn wait_for_size(serial: &str, size_bytes: u64, limit: Duration) -> Result<BlockDevice, Error> {
    let start = Instant::now();
    let events = uevents().ok();
    loop {
        let device = wait_for(serial, Duration::ZERO)?;
        if device.size_bytes >= size_bytes {
            return Ok(device);
        }
        if start.elapsed() >= limit {
            let (has, waited_ms) = (device.size_bytes, start.elapsed().as_millis());
            return Err(Error::SizeMissing { device: device.path().display().to_string(), has, wanted: size_bytes, waited_ms });
        }
        wait_for_event(events.as_ref(), Duration::from_millis(100));
    }
}

fn missing(serial: &str, waited: Duration, devices: &[BlockDevice]) -> Error {
    let present = match devices {
        [] => "none with a serial".to_owned(),
        some => some.iter().map(|device| format!("`{}` ({})", device.serial, device.name)).collect::<Vec<_>>().join(", "),
    };
    Error::DeviceMissing { serial: serial.to_owned(), waited_ms: waited.as_millis(), present }
}

/// The kernel's announcements of devices.
pub fn uevents() -> rustix::io::Result<OwnedFd> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(netlink::KOBJECT_UEVENT),
    )?;
    bind(&socket, &netlink::SocketAddrNetlink::new(0, 1))?;
    Ok(socket)
}

/// Waits for the next one, or for `limit`.
pub fn wait_for_event(events: Option<&OwnedFd>, limit: Duration) {
    let Some(events) = events else { return std::thread::sleep(limit) };
    let timeout = Timespec { tv_sec: 0, tv_nsec: limit.subsec_nanos().into() };
    let mut fds = [PollFd::new(events, PollFlags::IN)];
    if poll(&mut fds, Some(&timeout)).is_err() {
        return std::thread::sleep(limit);
    }
    // What it says does not matter: whatever happened, we look again.
    let mut message = [0_u8; 4096];
    while recv(events, &mut message, RecvFlags::empty()).is_ok() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_from_sysfs() {
        let root = std::env::temp_dir().join(format!("form-guest-sys-{}", std::process::id()));
        for (name, file, serial) in
            [("vdb", "serial", "data\n"), ("vda", "serial", "root\0\0\n"), ("nvme0n1", "device/serial", "nv  \n"), ("loop0", "none", "")]
        {
            let directory = root.join(name);
            fs::create_dir_all(directory.join("device")).expect("temporary directory");
            fs::write(directory.join("size"), "2048\n").expect("temporary file");
            if !serial.is_empty() {
                fs::write(directory.join(file), serial).expect("temporary file");
            }
        }
        let devices = list_in(&root);
        fs::remove_dir_all(&root).expect("temporary directory");
        let found: Vec<_> = devices.iter().map(|device| (device.name.as_str(), device.serial.as_str(), device.size_bytes)).collect();
        assert_eq!(found, [("nvme0n1", "nv", 1 << 20), ("vda", "root", 1 << 20), ("vdb", "data", 1 << 20)]);
        let text = missing("gone", Duration::from_secs(1), &devices).to_string();
        assert!(text.contains("`gone`") && text.contains("`root` (vda)"), "{text}");
    }
}
