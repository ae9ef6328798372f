//! Holding back every other process while the host copies the machine: a copy of it becomes itself before any of them runs in it.
//!
//! By the freezer of cgroup v2 (kernel documentation, `admin-guide/cgroup-v2.rst`, `cgroup.freeze`). Processes that share our own group,
//! or sit in the root, are moved into a group of their own for the time.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::process::lock;

const CGROUPS: &str = "/sys/fs/cgroup";
const HELD: &str = "form-held";
/// A frozen group may hold a process that waits in the kernel. That one cannot run a program's instructions either: it is not waited for.
const SETTLE: Duration = Duration::from_millis(300);
/// Processes that start others while they are being moved.
const PASSES: u32 = 20;

/// What stands still.
#[derive(Debug, Default)]
pub struct Hold {
    frozen: Vec<PathBuf>,
    moved: Vec<String>,
    /// Where those that were moved came from.
    own: PathBuf,
}

static IS_HELD: Mutex<bool> = Mutex::new(false);
static LET_GO: Condvar = Condvar::new();

/// Waits while processes are held: none is started meanwhile.
pub fn wait_for_release() {
    let mut held = lock(&IS_HELD);
    while *held {
        held = LET_GO.wait(held).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Holds back all processes but this one.
///
/// # Errors
/// When there is no cgroup v2, or it cannot be used; none is held then.
pub fn hold() -> io::Result<Hold> {
    *lock(&IS_HELD) = true;
    hold_in(Path::new(CGROUPS), &fs::read_to_string("/proc/self/cgroup")?, others).inspect_err(|_| open_gate())
}

fn open_gate() {
    *lock(&IS_HELD) = false;
    LET_GO.notify_all();
}

/// Lets them go on.
pub fn release(hold: &Hold) {
    release_in(Path::new(CGROUPS), hold);
    open_gate();
}

fn hold_in(root: &Path, own: &str, others: impl Fn(&str) -> bool) -> io::Result<Hold> {
    // cgroups(7): the one hierarchy of version 2 has the number 0.
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).ok_or(io::ErrorKind::Unsupported)?.trim();
    let own = root.join(own);
    let held = root.join(HELD);
    let mut hold = Hold { own: own.clone(), ..Hold::default() };
    let result = (|| {
        match fs::create_dir(&held) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        freeze(&mut hold, held.clone())?;
        for group in aside(root, &own)? {
            freeze(&mut hold, group)?;
        }
        for _ in 0..PASSES {
            let before = hold.moved.len();
            for directory in [root, own.as_path()] {
                for pid in fs::read_to_string(directory.join("cgroup.procs"))?.lines().filter(|pid| others(pid)) {
                    // It may have ended, or be one of the kernel's that stay where they are.
                    if !hold.moved.iter().any(|moved| moved == pid) && fs::write(held.join("cgroup.procs"), pid).is_ok() {
                        hold.moved.push(pid.to_owned());
                    }
                }
            }
            if hold.moved.len() == before {
                break;
            }
        }
        Ok(())
    })();
    match result {
        Ok(()) => {
            settle(&hold);
            Ok(hold)
        }
        Err(error) => {
            release_in(root, &hold);
            Err(error)
        }
    }
}

fn freeze(hold: &mut Hold, group: PathBuf) -> io::Result<()> {
    match fs::write(group.join("cgroup.freeze"), "1") {
        Ok(()) => hold.frozen.push(group),
        // It ended meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !group.exists() => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

/// The groups that our own is not below: beside the way from the root to it, and below it.
fn aside(root: &Path, own: &Path) -> io::Result<Vec<PathBuf>> {
    let mut groups = Vec::new();
    for directory in own.ancestors().take_while(|directory| directory.starts_with(root)) {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() && !own.starts_with(&path) && path.file_name().is_none_or(|name| name != HELD) {
                groups.push(path);
            }
        }
    }
    Ok(groups)
}

fn settle(hold: &Hold) {
    let until = Instant::now() + SETTLE;
    let stands = |group: &PathBuf| fs::read_to_string(group.join("cgroup.events")).is_ok_and(|events| events.contains("frozen 1"));
    while Instant::now() < until && !hold.frozen.iter().all(stands) {
        thread::sleep(Duration::from_millis(2));
    }
}

fn release_in(root: &Path, hold: &Hold) {
    for group in &hold.frozen {
        let _ = fs::write(group.join("cgroup.freeze"), "0");
    }
    let held = root.join(HELD);
    // Also those that were started by one that was moved, before it stood still.
    let inside = fs::read_to_string(held.join("cgroup.procs")).unwrap_or_default();
    for pid in inside.lines() {
        let _ = fs::write(hold.own.join("cgroup.procs"), pid);
    }
    let _ = fs::remove_dir(held);
}

/// Whether this is another process, and none of the kernel's: those have no program.
fn others(pid: &str) -> bool {
    pid != std::process::id().to_string() && fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like the groups of a machine with systemd; its files take what is written.
    fn groups() -> PathBuf {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("form-guest-cgroup-{}-{number}", std::process::id()));
        for (group, pids) in [
            ("", "2\n"),
            ("init.scope", "1\n"),
            ("user.slice", ""),
            ("user.slice/session", "30\n"),
            ("system.slice", ""),
            ("system.slice/ssh.service", "20\n"),
            ("system.slice/form-guest.service", "10\n11\n12\n"),
        ] {
            let path = root.join(group);
            fs::create_dir_all(&path).expect("temporary directory");
            fs::write(path.join("cgroup.procs"), pids).expect("temporary file");
            fs::write(path.join("cgroup.events"), "populated 1\nfrozen 1\n").expect("temporary file");
        }
        root
    }

    fn frozen(root: &Path) -> Vec<String> {
        let groups = ["", "init.scope", "user.slice", "system.slice", "system.slice/ssh.service", "system.slice/form-guest.service", HELD];
        let is_frozen = |group: &&str| fs::read_to_string(root.join(group).join("cgroup.freeze")).is_ok_and(|text| text == "1");
        groups.into_iter().filter(is_frozen).map(str::to_owned).collect()
    }

    #[test]
    fn everything_stands_still_but_this_process_and_what_it_is_in() {
        let root = groups();
        // 2 is the kernel's, 10 is this process.
        let hold = hold_in(&root, "0::/system.slice/form-guest.service\n", |pid| !["2", "10"].contains(&pid)).expect("held");
        assert_eq!(frozen(&root), ["init.scope", "user.slice", "system.slice/ssh.service", HELD]);
        assert_eq!(hold.moved, ["11", "12"]);
        release_in(&root, &hold);
        assert_eq!(frozen(&root), Vec::<String>::new());
        let _ = fs::remove_dir_all(root);
    }

    #[test]
    fn without_an_init_of_the_images_own_all_others_are_moved_out_of_the_root() {
        let root = groups();
        let hold = hold_in(&root, "0::/\n", |pid| pid != "10").expect("held");
        assert_eq!(frozen(&root), ["init.scope", "user.slice", "system.slice", HELD]);
        assert_eq!(hold.moved, ["2"]);
        let _ = fs::remove_dir_all(root);
    }

    #[test]
    fn a_machine_that_cannot_hold_them_holds_none() {
        let root = groups();
        assert!(hold_in(&root, "4:memory:/\n", |_| true).is_err());
        fs::remove_file(root.join("system.slice/ssh.service/cgroup.procs")).expect("there");
        fs::create_dir(root.join("user.slice/cgroup.freeze")).expect("temporary directory");
        assert!(hold_in(&root, "0::/system.slice/form-guest.service\n", |_| false).is_err());
        assert_eq!(frozen(&root), Vec::<String>::new());
        let _ = fs::remove_dir_all(root);
    }
}
