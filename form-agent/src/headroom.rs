//! Some room on the disk that the agent keeps for itself: on a disk that is full to the last byte it could not even write down that a VM is
//! to be destroyed.

use std::{
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use rustix::fs::{FallocateFlags, fallocate};

/// What a few operations, their events and changes of the state need.
const SIZE: u64 = 8 << 20;

/// Below this much free space the disk is full: nothing new is begun, and what VMs write is about to fail.
pub const LOW: u64 = 64 << 20;

/// A file whose only use is to be removed.
pub struct Headroom {
    path: PathBuf,
}

impl Headroom {
    pub fn new(directory: &Path) -> Self {
        Self { path: directory.join("headroom") }
    }

    /// Takes the room while there is plenty.
    ///
    /// # Errors
    /// When the file cannot be made; there is none then.
    pub fn keep(&self, free: u64) -> io::Result<()> {
        if free < LOW + SIZE || self.path.exists() {
            return Ok(());
        }
        let file = fs::File::create(&self.path)?;
        let taken = fallocate(file.as_fd(), FallocateFlags::empty(), 0, SIZE);
        if let Err(error) = taken {
            let _ = fs::remove_file(&self.path);
            return Err(error.into());
        }
        Ok(())
    }

    /// Gives the room to what frees more.
    pub fn give(&self, free: u64) {
        if free < SIZE && fs::remove_file(&self.path).is_ok() {
            tracing::warn!("the disk is full: the agent's own {} MiB are used to free some", SIZE >> 20);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_taken_from_plenty_and_given_in_need() {
        let directory = tempfile::tempdir().unwrap();
        let headroom = Headroom::new(directory.path());
        let file = directory.path().join("headroom");
        headroom.keep(LOW).unwrap();
        assert!(!file.exists());
        headroom.keep(1 << 30).unwrap();
        assert_eq!(file.metadata().unwrap().len(), SIZE);
        headroom.give(LOW);
        assert!(file.exists());
        headroom.give(0);
        assert!(!file.exists());
    }
}
