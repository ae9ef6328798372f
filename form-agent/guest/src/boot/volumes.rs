//! Volumes: block devices with a serial, mounted where the Formfile says.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use form_guest::protocol::DeviceReport;
use form_types::settings::VolumeMount;

use crate::{
    boot::{
        devices::{self, BlockDevice},
        ext4,
    },
    error::{Context, Error},
    files,
    report::{BootReport, say},
};

const VOLUME_LIMIT: Duration = Duration::from_secs(10);

/// What has to be zeros at the beginning and at the end of a device before a file system is made on it: partition tables, RAID and LVM
/// labels and the superblocks of file systems are there.
const HEAD: u64 = 4 << 20;
const TAIL: u64 = 1 << 20;

/// Attaches all of them. One that is missing is fatal: what the service would write belongs there and not on the root disk.
pub fn attach_all(volumes: &[VolumeMount], report: &mut BootReport) {
    for volume in volumes {
        match attach(volume) {
            Ok((device, warning)) => {
                report.devices.push(device);
                if let Some(warning) = warning {
                    report.warn("volumes", warning);
                }
            }
            Err(error) => {
                let what = volume.path.as_ref().map_or_else(|| format!("volume {}", volume.serial), |path| format!("volume for {path}"));
                report.fatal("volumes", format_args!("{what}: {error}"));
            }
        }
    }
}

/// Finds one by its serial, waiting a moment for its device, makes a file system on it when it never held anything, and mounts it.
///
/// # Errors
/// When the device is not there, holds something else than ext4, or the path cannot be a mount point.
pub fn attach(volume: &VolumeMount) -> Result<(DeviceReport, Option<Error>), Error> {
    let Some(path) = &volume.path else {
        return Ok((devices::wait_for(&volume.serial, VOLUME_LIMIT)?.report(None), None));
    };
    let target = files::absolute(path)?;
    let device = devices::wait_for(&volume.serial, VOLUME_LIMIT)?;
    fs::create_dir_all(target).at("create", target)?;
    prepare(&device, volume, target)?;
    let warning = ext4::mount_device(&device, target, volume.read_only, true)?;
    Ok((device.report(Some(path)), warning))
}

/// What a device needs before it can be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// A file system, to be left as it is.
    Ext4,
    /// Nothing was ever written, or only what an earlier try to make a file system left.
    Nothing,
    Something,
}

fn prepare(device: &BlockDevice, volume: &VolumeMount, target: &Path) -> Result<(), Error> {
    let path = device.path();
    let name = || path.display().to_string();
    let content = File::open(&path).and_then(|file| content(&file, device.size_bytes, volume.is_blank)).at("read", &path)?;
    match content {
        Content::Ext4 => Ok(()),
        Content::Something => Err(Error::NotBlank { device: name() }),
        Content::Nothing if volume.read_only => Err(Error::BlankReadOnly { device: name() }),
        Content::Nothing => {
            say(format_args!("making a file system on {} ({})", name(), volume.serial));
            let make = || {
                let file = File::options().read(true).write(true).open(&path)?;
                ext4::make(&file, device.size_bytes, &identity(target)?)
            };
            make().at("make a file system on", &path)
        }
    }
}

/// `is_blank`: the host says that nothing was ever written. Only when that and what is here agree is it so.
fn content(file: &File, bytes: u64, is_blank: bool) -> io::Result<Content> {
    if ext4::is_ext4(file)? {
        return Ok(Content::Ext4);
    }
    if bytes >= ext4::LEAST_BYTES && ext4::is_interrupted(file)? {
        return Ok(Content::Nothing);
    }
    let is_zero = |from: u64, to: u64| -> io::Result<bool> {
        let mut buffer = vec![0; 1 << 16];
        let mut at = from;
        while at < to {
            let count = (to - at).min(buffer.len() as u64) as usize;
            file.read_exact_at(&mut buffer[..count], at)?;
            if buffer[..count].iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += count as u64;
        }
        Ok(true)
    };
    let nothing = is_blank && is_zero(0, bytes.min(HEAD))? && is_zero(bytes.saturating_sub(TAIL), bytes)?;
    Ok(if nothing { Content::Nothing } else { Content::Something })
}

/// Who owned the place in the image owns the volume: a service that is not root can write to it as it could before.
fn identity(target: &Path) -> io::Result<ext4::Identity> {
    let place = fs::metadata(target)?;
    let (mut uuid, mut hash_seed) = ([0; 16], [0; 16]);
    let mut random = File::open("/dev/urandom")?;
    random.read_exact(&mut uuid)?;
    random.read_exact(&mut hash_seed)?;
    // RFC 9562, section 5.4: version 4, variant 10.
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX));
    let mode = (place.mode() & 0o7777) as u16;
    Ok(ext4::Identity { uuid, hash_seed, now, owner: place.uid(), group: place.gid(), mode })
}

/// Waits until the volume is as large as the host says, and makes the file system that is mounted at `path` as large.
///
/// # Errors
/// When there is no such volume, or it stays smaller. That its file system could not grow is given back beside.
pub fn grow(serial: &str, size_bytes: u64, path: Option<&str>) -> Result<(DeviceReport, Option<Error>), Error> {
    let device = devices::wait_for_size(serial, size_bytes, VOLUME_LIMIT)?;
    let warning = path.and_then(|path| ext4::grow(&device, Path::new(path)).err());
    Ok((device.report(path), warning))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 32 << 20;

    fn disk(name: &str, bytes: u64) -> (std::path::PathBuf, File) {
        let path = std::env::temp_dir().join(format!("form-guest-volume-{}-{name}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("temporary file");
        file.set_len(bytes).expect("temporary file");
        (path, file)
    }

    #[test]
    fn only_what_never_held_anything_is_formatted() {
        let (path, file) = disk("content", BYTES);
        assert_eq!(content(&file, BYTES, true).expect("readable"), Content::Nothing);
        assert_eq!(content(&file, BYTES, false).expect("readable"), Content::Something, "the host knows of writes that do not show");
        // The label of another kind of content, wherever such are.
        for at in [0, 510, 1024, 65600, HEAD - 1, BYTES - TAIL, BYTES - 1] {
            file.write_all_at(&[1], at).expect("writable");
            assert_eq!(content(&file, BYTES, true).expect("readable"), Content::Something, "{at}");
            file.write_all_at(&[0], at).expect("writable");
        }
        ext4::make(&file, BYTES, &identity(Path::new("/tmp")).expect("random")).expect("made");
        assert_eq!(content(&file, BYTES, true).expect("readable"), Content::Ext4);
        assert_eq!(content(&file, BYTES, false).expect("readable"), Content::Ext4);
        fs::remove_file(path).expect("there");
    }

    #[test]
    fn a_device_shorter_than_what_is_looked_at_is_no_panic() {
        let (path, file) = disk("short", 512);
        assert_eq!(content(&file, 512, true).expect("readable"), Content::Nothing);
        assert!(ext4::make(&file, 512, &identity(Path::new("/tmp")).expect("random")).is_err());
        fs::remove_file(path).expect("there");
    }
}
