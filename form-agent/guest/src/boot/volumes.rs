//! Volumes: block devices with a serial, mounted where the Formfile says.

use std::{fs, path::Path, time::Duration};

use form_guest::protocol::DeviceReport;
use form_types::settings::VolumeMount;

use crate::{
    boot::{devices, ext4},
    error::{Context, Error},
    files,
    report::BootReport,
};

const VOLUME_LIMIT: Duration = Duration::from_secs(10);

/// Mounts all of them. One that is missing is fatal: what the service would write belongs there and not on the root disk.
pub fn mount_all(volumes: &[VolumeMount], report: &mut BootReport) {
    for volume in volumes {
        match mount(volume) {
            Ok((device, warning)) => {
                report.devices.push(device);
                if let Some(warning) = warning {
                    report.warn("volumes", warning);
                }
            }
            Err(error) => report.fatal("volumes", format_args!("volume for {}: {error}", volume.path)),
        }
    }
}

/// Mounts one, waiting a moment for its device.
///
/// # Errors
/// When the device is not there, is no ext4, or the path cannot be a mount point.
pub fn mount(volume: &VolumeMount) -> Result<(DeviceReport, Option<Error>), Error> {
    let target = files::absolute(&volume.path)?;
    let device = devices::wait_for(&volume.serial, VOLUME_LIMIT)?;
    fs::create_dir_all(target).at("create", target)?;
    let warning = ext4::mount_device(&device, target, volume.read_only, true)?;
    Ok((device.report(Some(&volume.path)), warning))
}

/// Unmounts what is mounted on `path`.
///
/// # Errors
/// When it is in use, or nothing is mounted there.
pub fn unmount(path: &str) -> Result<(), Error> {
    let target: &Path = files::absolute(path)?;
    rustix::mount::unmount(target, rustix::mount::UnmountFlags::NOFOLLOW).doing(format!("unmount {path} (end the programs that use it)"))
}
