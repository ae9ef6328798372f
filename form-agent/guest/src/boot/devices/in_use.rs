//! Who uses a block device, and how it is let go.
//!
//! Formats: proc(5) (`mountinfo`, `swaps`, `maps`), the kernel's `Documentation/ABI/stable/sysfs-block` (`holders`).

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::makedev,
    mount::{UnmountFlags, unmount},
};

use super::{BlockDevice, SYS_BLOCK, list};
use crate::error::{Context, Error};

/// So many users are named.
const NAMED: usize = 5;

/// Unmounts what is mounted of the device with this serial, at `ours` by us. One that is not there is nobody's any more.
///
/// # Errors
/// [`Error::InUse`] naming who uses it: other mounts, swap, what is made of it, programs. With `force` it is unmounted nevertheless, and
/// those who use it get errors.
pub fn release(serial: &str, ours: Option<&str>, force: bool) -> Result<(), Error> {
    let Some(device) = list().into_iter().find(|device| device.serial == serial) else { return Ok(()) };
    let numbers = numbers(&device);
    let mounts = mounts(&fs::read_to_string("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?, &numbers);
    if force {
        // Not to lose what was written: whoever goes on writing does.
        rustix::fs::sync();
        // The last one may lie on the ones before.
        return mounts.iter().rev().try_for_each(|path| detach(path, UnmountFlags::DETACH));
    }
    let mut users = made_of(&device);
    users.extend(mounts.iter().filter(|path| Some(path.as_str()) != ours).map(|path| format!("mounted at {path}")));
    users.extend(swaps(&fs::read_to_string("/proc/swaps").unwrap_or_default(), &numbers));
    users.extend(programs(&numbers));
    if !users.is_empty() {
        return Err(in_use(&device, &users));
    }
    for path in &mounts {
        match unmount(path.as_str(), UnmountFlags::NOFOLLOW) {
            // Begun since.
            Err(rustix::io::Errno::BUSY) => {
                let users = programs(&numbers);
                return Err(in_use(&device, if users.is_empty() { &[] } else { &users }));
            }
            result => result.doing(format!("unmount {path}"))?,
        }
    }
    Ok(())
}

fn detach(path: &str, how: UnmountFlags) -> Result<(), Error> {
    unmount(path, UnmountFlags::NOFOLLOW | how).doing(format!("unmount {path}"))
}

fn in_use(device: &BlockDevice, users: &[String]) -> Error {
    let mut named = users.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if users.len() > NAMED {
        named.push_str(&format!(" and {} more", users.len() - NAMED));
    }
    if named.is_empty() {
        named.push_str("by whom is not to be seen");
    }
    Error::InUse { device: device.path().display().to_string(), users: named }
}

/// The device numbers of a disk and its partitions.
fn numbers(device: &BlockDevice) -> Vec<u64> {
    let disk = Path::new(SYS_BLOCK).join(&device.name);
    partitions(device, &disk).into_iter().chain([disk]).filter_map(|place| number(&fs::read_to_string(place.join("dev")).ok()?)).collect()
}

fn partitions(device: &BlockDevice, disk: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(disk).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&device.name)).map(|entry| entry.path()).collect()
}

/// `254:16`
fn number(text: &str) -> Option<u64> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Device mapper, MD and the like.
fn made_of(device: &BlockDevice) -> Vec<String> {
    let disk = Path::new(SYS_BLOCK).join(&device.name);
    let places = partitions(device, &disk).into_iter().chain([disk]);
    let holders = places.flat_map(|place| fs::read_dir(place.join("holders")).into_iter().flatten().flatten());
    holders.map(|holder| format!("part of {}", holder.file_name().to_string_lossy())).collect()
}

/// Where the devices are mounted, in the order in which they were.
fn mounts(mountinfo: &str, numbers: &[u64]) -> Vec<String> {
    let mounted = |line: &str| {
        let mut fields = line.split(' ');
        let device = number(fields.nth(2)?)?;
        let path = fields.nth(1)?;
        numbers.contains(&device).then(|| unescaped(path))
    };
    mountinfo.lines().filter_map(mounted).collect()
}

/// Spaces, tabs, newlines and backslashes are written in octal.
fn unescaped(path: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(path.to_owned(), |path, (from, to)| path.replace(from, to))
}

fn swaps(swaps: &str, numbers: &[u64]) -> Vec<String> {
    let file = |line: &str| Some(unescaped(line.split_whitespace().next()?));
    let ours = |path: &String| fs::metadata(path).is_ok_and(|file| file.file_type().is_block_device() && numbers.contains(&file.rdev()));
    swaps.lines().skip(1).filter_map(file).filter(ours).map(|path| format!("swap on {path}")).collect()
}

/// Programs that have the device itself open, or something in a file system on it.
fn programs(numbers: &[u64]) -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids.into_iter().filter_map(|pid| user(Path::new("/proc").join(pid.to_string()).as_path(), pid, numbers)).collect()
}

fn user(process: &Path, pid: u32, numbers: &[u64]) -> Option<String> {
    let is_on = |path: &Path| {
        fs::metadata(path)
            .is_ok_and(|file| numbers.contains(&file.dev()) || (file.file_type().is_block_device() && numbers.contains(&file.rdev())))
    };
    let open = || fs::read_dir(process.join("fd")).into_iter().flatten().flatten().any(|fd| is_on(&fd.path()));
    // Field 4, in hexadecimal.
    let maps = || {
        let mapped = |line: &str| {
            let (major, minor) = line.split_whitespace().nth(3)?.split_once(':')?;
            Some(makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?))
        };
        let maps = fs::read_to_string(process.join("maps")).unwrap_or_default();
        maps.lines().filter_map(mapped).any(|device| numbers.contains(&device))
    };
    if !(["cwd", "root", "exe"].iter().any(|link| is_on(&process.join(link))) || open() || maps()) {
        return None;
    }
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    Some(format!("{} (process {pid})", name.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 254:16 / /var/data rw,relatime shared:9 - ext4 /dev/vdb rw
31 30 254:16 /sub /srv/with\\040space rw,relatime - ext4 /dev/vdb rw
32 22 0:25 / /proc rw - proc proc rw
33 22 broken";

    #[test]
    fn mounts_are_found_by_the_number_of_the_device() {
        let data = number("254:16\n").expect("a number");
        assert_eq!(data, makedev(254, 16));
        assert_eq!(mounts(MOUNTINFO, &[data]), ["/var/data", "/srv/with space"]);
        assert_eq!(mounts(MOUNTINFO, &[]), [""; 0]);
        assert_eq!(mounts("", &[data]), [""; 0]);
        assert!(number("254").is_none() && number("a:b").is_none());
    }

    #[test]
    fn a_program_is_found_by_each_way_to_use_a_file_system() {
        let path = std::env::temp_dir().join(format!("form-guest-in-use-{}", std::process::id()));
        let open = fs::File::create(&path).expect("made");
        let here = open.metadata().expect("there").dev();
        let own = std::process::id();
        let process = PathBuf::from(format!("/proc/{own}"));
        // The directory of the test program, its program and what it has open are in some file system.
        let name = user(&process, own, &[fs::metadata(process.join("exe")).expect("there").dev()]).expect("used");
        assert!(name.ends_with(&format!("(process {own})")), "{name}");
        assert_eq!(user(&process, own, &[makedev(4095, 77)]), None);
        assert!(programs(&[here]).iter().any(|user| user.ends_with(&format!("(process {own})"))));
        drop(open);
        fs::remove_file(path).expect("there");
    }

    #[test]
    fn who_uses_a_device_is_named_but_not_without_end() {
        let device = BlockDevice { name: "vdb".to_owned(), serial: "data".to_owned(), size_bytes: 0 };
        let users: Vec<String> = (1..=7).map(|pid| format!("sh (process {pid})")).collect();
        let text = in_use(&device, &users).to_string();
        assert!(text.starts_with("/dev/vdb is in use: sh (process 1), ") && text.ends_with("sh (process 5) and 2 more"), "{text}");
        assert!(in_use(&device, &[]).to_string().contains("not to be seen"));
        assert_eq!(swaps("Filename Type Size Used Priority\n/dev/null partition 1 0 -2\n", &[1]), [""; 0]);
    }

    #[test]
    fn a_device_that_is_not_there_is_free() {
        assert!(release("no-such-serial", None, false).is_ok());
    }
}
