//! A machine that stands still while the host copies it: its processes are held, its file systems on disks hold back writes, and never for
//! longer than the host said.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    sync::Mutex,
    thread,
    time::Duration,
};

use crate::{
    hold::{self, Hold},
    power::unescape,
    process::lock,
    report::say,
    sys,
};

/// No host may ask for longer.
const LIMIT: Duration = Duration::from_secs(120);

/// The limit is counted in such steps: the clock of a machine that was saved jumps when it goes on elsewhere, and one step is all that
/// this can cost.
const STEP: Duration = Duration::from_millis(100);

/// What stands still, in the order in which it was frozen.
struct Held {
    /// Of the freeze that may still add to it. Whoever ends one raises it.
    number: u64,
    frozen: Vec<File>,
    processes: Option<Hold>,
    /// Until it ends by itself.
    left: Duration,
}

static HELD: Mutex<Held> = Mutex::new(Held { number: 0, frozen: Vec::new(), processes: None, left: Duration::ZERO });

#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    #[error("{0} cannot be opened to freeze it: {1}")]
    Open(String, io::Error),
    #[error("{0} cannot be frozen: {1}")]
    Freeze(String, io::Error),
    #[error("no thread can be started that would end the freeze: {0}")]
    Thread(io::Error),
    #[error("the freeze was ended before it was complete")]
    Ended,
}

/// Writes everything out, holds all other processes and freezes all file systems on disks, for `limit` at most.
///
/// # Errors
/// When a file system cannot be frozen; nothing stands still then. A machine whose processes cannot be held is frozen all the same.
pub fn freeze(limit: Duration) -> Result<(), FreezeError> {
    let targets = disk_file_systems(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default());
    // What is written before writers are held back need not be written while they are.
    rustix::fs::sync();
    let hold = || match hold::hold() {
        Ok(hold) => Some(hold),
        Err(error) => {
            say(format_args!("processes cannot be held while the machine is copied: {error}"));
            None
        }
    };
    freeze_all(&HELD, &targets, limit, hold, sys::freeze)
}

/// Lets everything go on that [`freeze`] has stopped.
pub fn thaw() {
    thaw_all(&HELD);
}

/// Lets writes go on, and no process yet.
pub fn thaw_disks() {
    let mut guard = lock(&HELD);
    thaw_files(&mut guard);
}

fn freeze_all(
    held: &'static Mutex<Held>,
    targets: &[String],
    limit: Duration,
    hold: impl FnOnce() -> Option<Hold>,
    stop: impl Fn(&File) -> rustix::io::Result<()>,
) -> Result<(), FreezeError> {
    thaw_all(held);
    let number = lock(held).number;
    // First of all who ends it: from here on every way leads to a thaw.
    lock(held).left = limit.min(LIMIT);
    let watch = move || {
        while let Some(step) = next_step(held, number) {
            thread::sleep(step);
        }
        if lock(held).number == number {
            say(format_args!("the host did not thaw the file systems in time; they go on by themselves"));
            thaw_all(held);
        }
    };
    thread::Builder::new().name("thaw".to_owned()).spawn(watch).map_err(FreezeError::Thread)?;
    let processes = hold();
    {
        let mut guard = lock(held);
        if guard.number != number {
            processes.iter().for_each(hold::release);
            return Err(FreezeError::Ended);
        }
        guard.processes = processes;
    }
    for target in targets {
        let result = File::open(target).map_err(|error| FreezeError::Open(target.clone(), error)).and_then(|file| {
            // Not under the lock: it waits for writers, and the watch must not wait for it.
            stop(&file).map_err(|error| FreezeError::Freeze(target.clone(), error.into()))?;
            Ok(file)
        });
        let mut guard = lock(held);
        match result {
            Ok(file) if guard.number == number => guard.frozen.push(file),
            Ok(file) => {
                let _ = sys::thaw(&file);
                return Err(FreezeError::Ended);
            }
            Err(error) => {
                drop(guard);
                thaw_all(held);
                return Err(error);
            }
        }
    }
    if lock(held).number == number { Ok(()) } else { Err(FreezeError::Ended) }
}

/// How long to wait before the next look; none when it has ended or its time is over.
fn next_step(held: &Mutex<Held>, number: u64) -> Option<Duration> {
    let mut guard = lock(held);
    if guard.number != number {
        return None;
    }
    let step = guard.left.min(STEP);
    guard.left -= step;
    (!step.is_zero()).then_some(step)
}

/// The host is at work on this machine: what stands still goes on standing, for as long as it may at most.
pub fn renew() {
    lock(&HELD).left = LIMIT;
}

fn thaw_all(held: &Mutex<Held>) {
    let mut guard = lock(held);
    guard.number += 1;
    thaw_files(&mut guard);
    // They would only wait for their file systems.
    if let Some(processes) = guard.processes.take() {
        hold::release(&processes);
    }
}

fn thaw_files(guard: &mut Held) {
    for file in guard.frozen.drain(..).rev() {
        if let Err(error) = sys::thaw(&file) {
            say(format_args!("a file system cannot be thawed: {error}"));
        }
    }
}

/// A mount point of each file system that is on a device and can be written, the last mounted first: one may lie in a file of another
/// (proc_pid_mountinfo(5)).
fn disk_file_systems(mountinfo: &str) -> Vec<String> {
    let mut devices = BTreeSet::new();
    let mut targets: Vec<String> = mountinfo
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let mut fields = after.split(' ').skip(1);
            let is_device = fields.next()?.starts_with("/dev/");
            let is_writable = fields.next()?.split(',').any(|option| option == "rw");
            let mut fields = before.split(' ').skip(2);
            let (device, target) = (fields.next()?, fields.nth(1)?);
            (is_device && is_writable && devices.insert(device.to_owned())).then(|| unescape(target))
        })
        .collect();
    targets.reverse();
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> &'static Mutex<Held> {
        Box::leak(Box::new(Mutex::new(Held { number: 0, frozen: Vec::new(), processes: None, left: Duration::ZERO })))
    }

    #[test]
    fn each_file_system_on_a_disk_once_and_the_last_first() {
        let text = "21 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
                    22 21 0:20 / /proc rw - proc proc rw\n\
                    23 21 254:16 / /srv/my\\040data rw shared:1 - ext4 /dev/vdb rw,discard\n\
                    24 21 254:0 /srv /bound rw - ext4 /dev/vda rw\n\
                    25 21 254:32 / /fixed ro - ext4 /dev/vdc ro\n\
                    26 21 0:22 / /run rw - tmpfs tmpfs rw\n";
        assert_eq!(disk_file_systems(text), ["/srv/my data", "/"]);
        assert!(disk_file_systems("nonsense\n1 2 - \n").is_empty());
    }

    #[test]
    fn what_cannot_be_frozen_leaves_nothing_frozen() {
        let held = nothing();
        let targets = ["/".to_owned(), "/tmp".to_owned()];
        freeze_all(held, &targets, LIMIT, || None, |_| Ok(())).expect("all are willing");
        assert_eq!(lock(held).frozen.len(), 2);
        let error =
            freeze_all(held, &["/".to_owned(), "/no/such/place".to_owned()], LIMIT, || None, |_| Ok(())).expect_err("one is not there");
        assert!(error.to_string().contains("/no/such/place"), "{error}");
        assert!(lock(held).frozen.is_empty());
        let error = freeze_all(held, &targets, LIMIT, || None, |_| Err(rustix::io::Errno::OPNOTSUPP)).expect_err("none can");
        assert!(matches!(error, FreezeError::Freeze(..)) && lock(held).frozen.is_empty());
    }

    #[test]
    fn a_freeze_ends_by_itself_also_when_it_is_not_complete() {
        let held = nothing();
        freeze_all(held, &["/".to_owned()], Duration::from_millis(500), || None, |_| Ok(())).expect("willing");
        let until = std::time::Instant::now() + Duration::from_secs(60);
        while !lock(held).frozen.is_empty() {
            assert!(std::time::Instant::now() < until, "still frozen");
            thread::sleep(Duration::from_millis(5));
        }
        // One file system takes longer than there is time: what was frozen before it goes on, and it as well.
        let slow = |_: &File| {
            let number = lock(held).number;
            let until = std::time::Instant::now() + Duration::from_secs(60);
            while lock(held).number == number && std::time::Instant::now() < until {
                thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        };
        let error = freeze_all(held, &["/".to_owned()], Duration::from_millis(20), || None, slow).expect_err("too slow");
        assert!(matches!(error, FreezeError::Ended) && lock(held).frozen.is_empty());
    }
}
