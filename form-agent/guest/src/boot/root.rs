//! The root file system, and leaving the initramfs for it.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use form_types::settings::Settings;
use rustix::mount::mount_move;

use crate::{
    boot::{devices, ext4, modules},
    error::{Context, Error},
    report::BootReport,
};

const NEW_ROOT: &str = "/newroot";
/// How long a disk may take to appear. Under software emulation a device needs a second, and nothing else can happen without it.
const DISK_LIMIT: Duration = Duration::from_secs(15);

/// Makes the disk that the settings name the root of everything; with none the machine stays in its initramfs.
///
/// # Errors
/// When there is no such disk or it cannot be mounted: the machine cannot go on.
pub fn enter(settings: &Settings, report: &mut BootReport) -> Result<(), Error> {
    let Some(serial) = &settings.root_serial else {
        // The modules are in the kernel; their files would only hold memory.
        let _ = fs::remove_dir_all(modules::DIRECTORY);
        return super::mounts::temporary_directory();
    };
    let device = devices::wait_for(serial, DISK_LIMIT)?;
    fs::create_dir_all(NEW_ROOT).at("create", NEW_ROOT)?;
    if let Some(error) = ext4::mount_device(&device, Path::new(NEW_ROOT), false, settings.grow_root)? {
        report.warn("root", error);
    }
    report.devices.push(device.report(Some("/")));
    switch()
}

fn switch() -> Result<(), Error> {
    let new_root = Path::new(NEW_ROOT);
    for directory in ["dev", "proc", "sys", "run"] {
        let target = new_root.join(directory);
        fs::create_dir_all(&target).at("create", &target)?;
        mount_move(Path::new("/").join(directory), &target).doing(format!("move /{directory} to the new root"))?;
    }
    delete_initramfs(Path::new("/"))?;
    rustix::process::chdir(new_root).at("enter", new_root)?;
    mount_move(".", "/").doing("move the new root to /")?;
    rustix::process::chroot(".").doing("change the root")?;
    rustix::process::chdir("/").at("enter", "/")
}

/// Frees the memory of the initramfs. Never crosses into another file system; what cannot be deleted stays.
fn delete_initramfs(root: &Path) -> Result<(), Error> {
    let device = fs::symlink_metadata(root).at("look at", root)?.dev();
    let mut directories = vec![(root.to_owned(), false)];
    while let Some((directory, emptied)) = directories.pop() {
        if emptied {
            let _ = fs::remove_dir(&directory);
            continue;
        }
        if directory != root {
            directories.push((directory.clone(), true));
        }
        for path in entries(&directory) {
            match fs::symlink_metadata(&path) {
                Ok(metadata) if metadata.dev() != device => {}
                Ok(metadata) if metadata.is_dir() => directories.push((path, false)),
                _ => drop(fs::remove_file(&path)),
            }
        }
    }
    Ok(())
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).map(|entries| entries.filter_map(Result::ok).map(|entry| entry.path()).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_emptied_and_its_top_stays() {
        let root = std::env::temp_dir().join(format!("form-guest-initramfs-{}", std::process::id()));
        fs::create_dir_all(root.join("a/b/c")).expect("temporary directory");
        fs::write(root.join("a/b/file"), "x").expect("temporary file");
        std::os::unix::fs::symlink("/", root.join("link")).expect("temporary link");
        delete_initramfs(&root).expect("readable");
        assert_eq!(entries(&root), Vec::<PathBuf>::new());
        fs::remove_dir(&root).expect("empty");
    }
}
