//! A raw image or block device behind one descriptor.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::FileExt,
    },
};

use super::{DiskBackend, Payload, lock};

/// How much is written at once where the storage cannot make zeros itself.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// A file whose bytes are the disk's.
pub struct RawFile {
    file: File,
    size: u64,
    /// The file can be read without waiting for the storage below it. One in memory (tmpfs) or on another host (NFS) cannot: there the kernel
    /// would hand each request to a thread of its own, which costs more than it gives.
    reads_now: bool,
    /// The storage said that it cannot punch holes: not asked again.
    no_holes: bool,
    /// The storage said that it cannot make ranges zero: not asked again.
    no_zero_range: bool,
}

impl RawFile {
    /// Takes the write lock of a file that will be written.
    ///
    /// # Errors
    /// When the size cannot be found, or somebody else holds the lock.
    pub fn new(file: OwnedFd, read_only: bool) -> io::Result<Self> {
        let mut file = File::from(file);
        if !read_only {
            lock::write_lock(&file)?;
        }
        // Works for files and for block devices, whose metadata says zero.
        let size = file.seek(SeekFrom::End(0))?;
        let reads_now = can_read_now(&file);
        Ok(Self { file, size, reads_now, no_holes: false, no_zero_range: false })
    }

    fn punch(&mut self, offset: u64, length: u64) -> io::Result<bool> {
        if !self.no_holes {
            let done = allocate(&self.file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length)?;
            self.no_holes = !done;
        }
        Ok(!self.no_holes)
    }

    fn zero_range(&mut self, offset: u64, length: u64) -> io::Result<bool> {
        if !self.no_zero_range {
            let done = allocate(&self.file, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, length)?;
            self.no_zero_range = !done;
        }
        Ok(!self.no_zero_range)
    }
}

/// Whether the file system knows `RWF_NOWAIT` for this file.
fn can_read_now(file: &File) -> bool {
    let mut byte = 0_u8;
    let vector = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: the one vector leads to `byte`, which outlives the call, and `file` keeps the descriptor open.
    let result = unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, 0, libc::RWF_NOWAIT) };
    result >= 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN)
}

/// One `fallocate`; `false` when the storage does not know the mode.
pub(super) fn allocate(file: &File, mode: libc::c_int, offset: u64, length: u64) -> io::Result<bool> {
    let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let length = libc::off_t::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
    loop {
        // SAFETY: fallocate takes no pointers, and `file` keeps the descriptor open.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => return Ok(false),
            _ => return Err(error),
        }
    }
}

impl DiskBackend for RawFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn grow(&mut self, size: u64) -> io::Result<()> {
        if size < self.size {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a disk is never made smaller"));
        }
        // An earlier try may have come so far. A block device is as large as it is: it refuses.
        if self.file.seek(SeekFrom::End(0))? < size {
            self.file.set_len(size)?;
        }
        self.size = size;
        Ok(())
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn file(&self) -> Option<RawFd> {
        self.reads_now.then(|| self.file.as_raw_fd())
    }

    fn read(&mut self, offset: u64, into: &Payload<'_>) -> io::Result<()> {
        into.iovecs()?.read_exact_at(self.file.as_raw_fd(), offset)
    }

    fn write(&mut self, offset: u64, from: &Payload<'_>) -> io::Result<()> {
        from.iovecs()?.write_all_at(self.file.as_raw_fd(), offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        // Where holes cannot be punched nothing is freed, and that is a valid discard.
        self.punch(offset, length).map(|_| ())
    }

    fn write_zeroes(&mut self, mut offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        if (unmap && self.punch(offset, length)?) || self.zero_range(offset, length)? {
            return Ok(());
        }
        let end = offset + length;
        while offset < end {
            let count = (end - offset).min(ZEROES.len() as u64) as usize;
            self.file.write_all_at(&ZEROES[..count], offset)?;
            offset += count as u64;
        }
        Ok(())
    }
}
