//! Memory that is written while the VM goes on.
//!
//! Three ways. A thread writes it as it finds it, before the VM stands ([`precopy`]): what changes meanwhile is written again by whoever builds
//! upon that. What is left to write of a VM that stands is copied and written by a thread, if it is little; so the VM stands for as
//! long as that takes, however much memory it has. And if it is much, a copy of the process writes it ([`save_aside`] does either).
//!
//! Each writes to a pipe, `whole`, how it ended, four bytes: `errno` (little-endian), 0 when the file is whole; if that was asked for eight more,
//! the bytes of pages written.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use vm_memory::GuestMemoryBackend;

use super::GuestMemoryMmap;
use super::changes::Pages;
use super::image::{ImageError, Onto, SaveId};
use super::patch::{Carried, save_running};
use super::touched::{self, Touched};

/// What a VM stands for at most to be copied: about as long as the copy of the page tables of 2 GiB takes.
const CARRIED_MAX: usize = 16 << 20;
/// Of a thread that writes: buffers of some pages.
const STACK: usize = 128 * 1024;

/// The memory file, and the pipe for how it ended.
pub struct Aside {
    pub file: File,
    pub whole: OwnedFd,
    /// Whether the bytes of pages are wanted.
    pub counted: bool,
}

impl Aside {
    /// It allocates nothing: a copy of a process that cannot uses it.
    fn report(&self, result: &Result<u64, ImageError>) {
        let (errno, written) = match result {
            Ok(written) => (0, *written),
            Err(ImageError::Write(error)) => (error.raw_os_error().unwrap_or(libc::EIO), 0),
            Err(_) => (libc::EIO, 0),
        };
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&errno.to_le_bytes());
        bytes[4..].copy_from_slice(&written.to_le_bytes());
        let length = if self.counted { 12 } else { 4 };
        // SAFETY: the buffer is valid for its length, which is no less.
        unsafe { libc::write(self.whole.as_raw_fd(), bytes.as_ptr().cast(), length) };
    }

    fn in_thread(self, write: impl FnOnce(&File) -> Result<u64, ImageError> + Send + 'static) -> io::Result<()> {
        let work = move || {
            let result = write(&self.file);
            self.report(&result);
        };
        thread::Builder::new().name("save-aside".to_owned()).stack_size(STACK).spawn(work).map(|_| ())
    }
}

/// What a round of a copy writes.
pub enum Round {
    /// All of memory that was ever touched, if that can be told, to a file whose content does not matter.
    All(Option<Arc<Touched>>),
    /// These pages, upon a copy of an earlier save or the round before.
    Changed(Pages),
}

/// Writes memory of a VM that may run as it is found. The log of what changes must have been taken, or begun, before.
///
/// # Errors
/// When there is no thread to be had.
pub fn precopy(memory: GuestMemoryMmap, id: SaveId, round: Round, to: Aside) -> io::Result<()> {
    to.in_thread(move |file| match round {
        Round::All(touched) => {
            let pages = touched.map_or_else(|| memory.iter().map(touched::all).collect(), |touched| touched.pages(&memory));
            save_running(&memory, file, &id, &pages, true)
        }
        Round::Changed(pages) => save_running(&memory, file, &id, &pages, false),
    })
}

/// As [`Onto::save`]: when it returns the VM may go on, and its memory will be written as it was.
///
/// # Errors
/// When there is no thread, process or memory to be had.
pub fn save_aside(memory: &GuestMemoryMmap, id: &SaveId, onto: Onto<'_>, to: Aside) -> io::Result<()> {
    if let Onto::Earlier(pages) = onto
        && let Some(carried) = Carried::copy(memory, pages, CARRIED_MAX)
    {
        let id = *id;
        return to.in_thread(move |file| carried.save(file, &id));
    }
    by_copy_of_process(memory, id, onto, &to)
}

/// The kernel copies a page when one of the two processes writes to it, so this takes the time of copying page tables, and the copy up to as much
/// memory as the guest has. The copy ends with this process, which ignores `SIGCHLD`: nothing waits for it.
fn by_copy_of_process(memory: &GuestMemoryMmap, id: &SaveId, onto: Onto<'_>, to: &Aside) -> io::Result<()> {
    // SAFETY: the child goes on with this thread alone. It takes no lock that another thread may have held, allocates nothing, runs no
    // destructor, and ends by `_exit`.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            keep_only([to.file.as_raw_fd(), to.whole.as_raw_fd()]);
            to.report(&onto.save(memory, &to.file, id));
            // SAFETY: ends this copy of the process.
            unsafe { libc::_exit(0) }
        }
        _ => Ok(()),
    }
}

/// Closes everything else but standard streams: a copy of the process that held disks, the tap or the exit record would outlive what
/// their owners think. And ends with its parent.
fn keep_only(mut kept: [libc::c_int; 2]) {
    kept.sort_unstable();
    let [first, second] = kept.map(libc::c_int::cast_unsigned);
    let close = |from: u32, to: u32| {
        if from <= to {
            // SAFETY: nothing of this copy of the process uses what is closed.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    };
    // SAFETY: sets a property of this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    close(3, first.saturating_sub(1));
    close(first + 1, second.saturating_sub(1));
    close(second + 1, u32::MAX);
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::atomic::{AtomicBool, Ordering};

    use vm_memory::{Bytes, GuestAddress};

    use super::super::image::{PAGE, map, save, verify};
    use super::super::{map as anonymous, ours};
    use super::*;
    use crate::layout::{HOLE_END, Layout, MIB};

    const FIRST: SaveId = [7; 16];
    const SECOND: SaveId = [8; 16];

    fn layout() -> Layout {
        Layout { low_ram: 16 * MIB, high_ram: MIB, mmio64_start: 8 << 30, mmio64_end: 16 << 30 }
    }

    fn memory() -> GuestMemoryMmap {
        anonymous(&layout()).unwrap()
    }

    fn changed(memory: &GuestMemoryMmap) -> Pages {
        memory.iter().map(|region| ours(region).get_and_reset()).collect()
    }

    /// Gives what is written to the pipe once it is closed.
    fn aside(file: &File, counted: bool) -> (Aside, impl FnOnce() -> Vec<u8> + use<>) {
        let (mut ended, whole) = io::pipe().unwrap();
        let said = move || {
            let mut said = Vec::new();
            ended.read_to_end(&mut said).unwrap();
            said
        };
        (Aside { file: file.try_clone().unwrap(), whole: whole.into(), counted }, said)
    }

    fn written(bytes: u64) -> Vec<u8> {
        [[0; 4].as_slice(), &bytes.to_le_bytes()].concat()
    }

    fn restored(file: &File, id: &SaveId) -> GuestMemoryMmap {
        verify(file).unwrap();
        map(&layout().ram(), file.try_clone().unwrap(), id).unwrap()
    }

    #[test]
    fn a_copy_of_the_process_saves_what_was_while_this_one_goes_on() {
        let memory = memory();
        memory.write_slice(&[5; 1 << 20], GuestAddress(MIB)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let (to, said) = aside(&file, false);
        save_aside(&memory, &FIRST, Onto::New, to).unwrap();
        memory.write_slice(&[6; 1 << 20], GuestAddress(MIB)).unwrap();
        assert_eq!(said(), [0; 4]);
        let mut bytes = vec![0; 1 << 20];
        restored(&file, &FIRST).read_slice(&mut bytes, GuestAddress(MIB)).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 5), "the copy saw what was written after it was made");
    }

    #[test]
    fn who_cannot_write_says_why() {
        let memory = memory();
        memory.write_obj(1_u8, GuestAddress(0)).unwrap();
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let (to, said) = aside(&full, false);
        save_aside(&memory, &FIRST, Onto::New, to).unwrap();
        // The first thing done is to set the length, which a device has none of.
        assert_eq!(said(), libc::EINVAL.to_le_bytes());
        let (to, said) = aside(&full, true);
        save_aside(&memory, &SECOND, Onto::Earlier(&changed(&memory)), to).unwrap();
        assert_eq!(said(), [libc::ENOSPC.to_le_bytes().as_slice(), &[0; 8]].concat());
    }

    #[test]
    fn what_is_little_is_written_as_it_was() {
        let memory = memory();
        memory.write_slice(&[5; 3 * PAGE], GuestAddress(MIB)).unwrap();
        let file = tempfile::tempfile().unwrap();
        save(&memory, &file, &FIRST).unwrap();
        let _ = changed(&memory);
        memory.write_slice(&[6; PAGE], GuestAddress(MIB)).unwrap();
        memory.write_slice(&[0; PAGE], GuestAddress(MIB + PAGE as u64)).unwrap();
        memory.write_obj(7_u8, GuestAddress(HOLE_END + MIB - 1)).unwrap();
        let (to, said) = aside(&file, true);
        save_aside(&memory, &SECOND, Onto::Earlier(&changed(&memory)), to).unwrap();
        memory.write_slice(&[9; 3 * PAGE], GuestAddress(MIB)).unwrap();
        assert_eq!(said(), written(2 * PAGE as u64));
        let again = restored(&file, &SECOND);
        let byte = |at| again.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!([byte(MIB), byte(MIB + PAGE as u64), byte(MIB + 2 * PAGE as u64), byte(HOLE_END + MIB - 1)], [6, 0, 5, 7]);
    }

    #[test]
    fn what_is_much_is_written_by_a_copy_of_the_process() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        save(&memory, &file, &FIRST).unwrap();
        memory.write_slice(&vec![5; CARRIED_MAX], GuestAddress(0)).unwrap();
        memory.write_obj(5_u8, GuestAddress(HOLE_END)).unwrap();
        let pages = changed(&memory);
        let count: u32 = pages.iter().flatten().map(|word| word.count_ones()).sum();
        assert_eq!(count as usize * PAGE, CARRIED_MAX + PAGE);
        let (to, said) = aside(&file, true);
        save_aside(&memory, &SECOND, Onto::Earlier(&pages), to).unwrap();
        memory.write_obj(6_u8, GuestAddress(HOLE_END)).unwrap();
        assert_eq!(said(), written((CARRIED_MAX + PAGE) as u64));
        assert_eq!(restored(&file, &SECOND).read_obj::<u8>(GuestAddress(HOLE_END)).unwrap(), 5);
    }

    #[test]
    fn memory_that_changes_under_the_copy_is_whole_after_the_last_round() {
        let memory = memory();
        let (file, whole) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        memory.write_slice(&vec![1; 8 << 20], GuestAddress(4 * MIB)).unwrap();
        let is_done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in (0..).take_while(|_| !is_done.load(Ordering::Relaxed)) {
                    // All over it, pages of zeros among them.
                    let at = round * 37 % 4000 * PAGE as u64;
                    memory.write_slice(&[(round % 3) as u8; PAGE], GuestAddress(at)).unwrap();
                }
            });
            for round in 0..6 {
                let pages = changed(&memory);
                let (to, said) = aside(&file, true);
                let what = if round == 0 { Round::All(Touched::open().map(Arc::new)) } else { Round::Changed(pages) };
                precopy(memory.clone(), [round; 16], what, to).unwrap();
                assert_eq!(said()[..4], [0; 4]);
            }
            is_done.store(true, Ordering::Relaxed);
        });
        // It stands now.
        let (to, said) = aside(&file, true);
        save_aside(&memory, &SECOND, Onto::Earlier(&changed(&memory)), to).unwrap();
        assert_eq!(said()[..4], [0; 4]);
        save(&memory, &whole, &SECOND).unwrap();
        verify(&file).unwrap();
        let bytes = |mut file: &File| {
            let mut bytes = Vec::new();
            io::Seek::rewind(&mut file).unwrap();
            file.read_to_end(&mut bytes).unwrap();
            bytes
        };
        assert!(bytes(&file) == bytes(&whole));
    }
}
