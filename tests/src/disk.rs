//! File systems in a file, to be filled up.

use std::{
    fs,
    io::{ErrorKind, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::Command,
};

use rustix::fs::FallocateFlags;

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A small ext4 on a loop device, mounted as long as this lives.
pub struct SmallDisk {
    mounted_at: PathBuf,
}

impl SmallDisk {
    /// One of `mebibytes` at `place`, which is made.
    ///
    /// # Panics
    /// Without root, or without loop devices.
    pub fn mount(image: &Path, place: &Path, mebibytes: u64) -> Self {
        // Nothing is kept for root: full is full.
        Self::made_by("mke2fs", &["-q", "-F", "-t", "ext4", "-m", "0"], image, place, mebibytes)
    }

    /// As [`SmallDisk::mount`], an XFS, whose files share blocks. It has 300 MiB at least.
    ///
    /// # Panics
    /// As [`SmallDisk::mount`].
    pub fn sharing(image: &Path, place: &Path, mebibytes: u64) -> Self {
        Self::made_by("mkfs.xfs", &["-q", "-m", "reflink=1"], image, place, mebibytes)
    }

    fn made_by(program: &str, arguments: &[&str], image: &Path, place: &Path, mebibytes: u64) -> Self {
        fs::File::create(image).unwrap().set_len(mebibytes << 20).unwrap();
        fs::create_dir_all(place).unwrap();
        let (image, at) = (image.to_str().unwrap(), place.to_str().unwrap());
        run(program, &[arguments, &[image]].concat());
        run("mount", &["-o", "loop", image, at]);
        Self { mounted_at: place.to_owned() }
    }

    fn ballast(&self) -> PathBuf {
        self.mounted_at.join("ballast")
    }

    /// Fills it up but for so many KiB.
    ///
    /// # Panics
    /// When it cannot be filled.
    pub fn fill_but(&self, kibibytes: u64) {
        let free = || {
            let figures = rustix::fs::statvfs(&self.mounted_at).unwrap();
            figures.f_bavail * figures.f_frsize
        };
        let mut ballast = fs::File::create(self.ballast()).unwrap();
        // The file system needs some room for its own tables: what is asked for at once has to leave it. Somebody else may be writing
        // at the same time, and take room that was free a moment ago.
        for _ in 0..100 {
            let length = ballast.metadata().unwrap().len();
            let bytes = free().saturating_sub((kibibytes << 10).max(1 << 20));
            if bytes == 0 {
                break;
            }
            match rustix::fs::fallocate(&ballast, FallocateFlags::empty(), length, bytes) {
                Ok(()) => break,
                Err(rustix::io::Errno::NOSPC) => {}
                Err(error) => panic!("{error}"),
            }
        }
        ballast.seek(SeekFrom::End(0)).unwrap();
        while free() > kibibytes << 10 {
            match ballast.write_all(&[0xff; 4096]) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => panic!("{error}"),
            }
        }
        ballast.sync_all().unwrap();
    }

    /// Makes the room free again.
    ///
    /// # Panics
    /// When it was not filled.
    pub fn free(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: an agent that is killed a moment later may still have files open.
        let _ = Command::new("umount").args(["-l", self.mounted_at.to_str().unwrap_or_default()]).status();
    }
}
