//! The bytes of an open volume, whatever its format: for exports and copies.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use form_types::VolumeFormat;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping,
    file::File as ImageFile,
    format::{PreallocateMode, drivers::FormatDriverInstance},
    qcow2::Qcow2,
};
use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, seek},
    io::Errno,
};

use crate::{error::StoreError, lock, volumes::OpenVolume};

/// Zeros are written in pieces of this size where a file system has no better way.
const ZEROS: usize = 64 * 1024;

/// Consecutive bytes that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// At least 1.
    pub length: u64,
    /// They take no room, and read as zeros.
    pub is_hole: bool,
}

/// An open volume, to be read and written at any place by several threads. Its lock lives as long as this.
#[derive(Debug)]
pub struct Contents {
    file: File,
    /// None for raw, whose bytes are the file's.
    image: Option<Mutex<FormatAccess<ImageFile>>>,
    /// It only grows.
    size_bytes: AtomicU64,
    writable: bool,
}

impl Contents {
    /// `writable` as the volume was opened.
    ///
    /// # Errors
    /// When it is a qcow2 image that is damaged, or that needs other files.
    pub fn new(volume: OpenVolume, writable: bool) -> io::Result<Self> {
        let OpenVolume { file, format, size_bytes, .. } = volume;
        Self::of_file(file, format, size_bytes, writable)
    }

    pub(crate) fn of_file(file: File, format: VolumeFormat, size_bytes: u64, writable: bool) -> io::Result<Self> {
        let image = match format {
            VolumeFormat::Raw => None,
            VolumeFormat::Qcow2 => {
                let image = open_image(&file, writable)?;
                if image.size() < size_bytes {
                    let reason = format!("the image has {} of the volume's {size_bytes} bytes", image.size());
                    return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
                }
                Some(Mutex::new(FormatAccess::new(image)))
            }
        };
        Ok(Self { file, image, size_bytes: AtomicU64::new(size_bytes), writable })
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Makes the volume larger under whoever reads and writes it by this; that it has the size already is fine. One that is only read has to
    /// have been opened by [`crate::Pool::open_growable`].
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when others read it too; those of the file system. It has its old size then.
    pub fn grow(&self, size_bytes: u64) -> io::Result<()> {
        if size_bytes <= self.size_bytes() {
            return Ok(());
        }
        if self.writable {
            return self.grow_alone(size_bytes);
        }
        let lock = |write| match lock::take(&self.file, Path::new(""), write) {
            Err(StoreError::VolumeInUse { .. }) => Err(io::ErrorKind::WouldBlock.into()),
            taken => taken.map_err(io::Error::other),
        };
        lock(true)?;
        let grown = self.grow_alone(size_bytes);
        // Nobody can be in the way of less.
        lock(false)?;
        grown
    }

    fn grow_alone(&self, size_bytes: u64) -> io::Result<()> {
        match self.image() {
            None => {
                // A try that was interrupted may have come so far.
                if self.file.metadata()?.len() < size_bytes {
                    self.file.set_len(size_bytes)?;
                }
            }
            Some(mut image) => {
                // Who only reads has the image open so; who writes has parts of its tables in memory.
                if !self.writable {
                    *image = FormatAccess::new(open_image(&self.file, true)?);
                }
                let grown = if image.size() < size_bytes { image.resize_grow(size_bytes, PreallocateMode::None) } else { Ok(()) };
                let flushed = grown.and_then(|()| image.flush());
                if !self.writable {
                    *image = FormatAccess::new(open_image(&self.file, false)?);
                }
                flushed?;
            }
        }
        self.file.sync_all()?;
        self.size_bytes.store(size_bytes, Ordering::Release);
        Ok(())
    }

    pub const fn is_writable(&self) -> bool {
        self.writable
    }

    fn image(&self) -> Option<MutexGuard<'_, FormatAccess<ImageFile>>> {
        // What a panic left of an image's state is no worse than what a crash would leave on disk.
        self.image.as_ref().map(|image| image.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.size_bytes());
        if fits { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// # Errors
    /// Beyond the end, or the file system's.
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, into.len() as u64)?;
        match self.image() {
            Some(image) => image.read(into, offset),
            None => self.file.read_exact_at(into, offset),
        }
    }

    fn check_change(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.writable { self.check(offset, length) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }

    /// # Errors
    /// Beyond the end, not opened for writing, or the file system's.
    pub fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.check_change(offset, from.len() as u64)?;
        match self.image() {
            Some(image) => image.write(from, offset),
            None => self.file.write_all_at(from, offset),
        }
    }

    /// Everything that was written is on the disk when this returns.
    ///
    /// # Errors
    /// The file system's.
    pub fn flush(&self) -> io::Result<()> {
        match self.image() {
            Some(image) => {
                image.flush()?;
                image.sync()
            }
            None => self.file.sync_data(),
        }
    }

    /// What is at `offset`, of the next `length` bytes.
    ///
    /// # Errors
    /// Beyond the end, or the file system's.
    pub fn extent(&self, offset: u64, length: u64) -> io::Result<Extent> {
        self.check(offset, length.max(1))?;
        match self.image() {
            Some(image) => {
                let (mapping, run) = image.get_mapping(offset, length)?;
                Ok(Extent { length: run.clamp(1, length), is_hole: matches!(mapping, Mapping::Zero { .. }) })
            }
            None => self.extent_of_file(offset, length),
        }
    }

    fn extent_of_file(&self, offset: u64, length: u64) -> io::Result<Extent> {
        let end = offset + length;
        let data = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data.min(end),
            Err(Errno::NXIO) => end,
            Err(error) => return Err(error.into()),
        };
        if data > offset {
            return Ok(Extent { length: data - offset, is_hole: true });
        }
        // Somebody may have punched a hole between the two questions.
        let hole = seek(&self.file, SeekFrom::Hole(offset))?.clamp(offset + 1, end);
        Ok(Extent { length: hole - offset, is_hole: false })
    }

    /// Gives room back; what was there reads as zeros where the file system can give room back, and as it was where it cannot.
    ///
    /// # Errors
    /// Beyond the end, or the file system's.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_change(offset, length)?;
        let Some(mut image) = self.image() else { return self.punch(offset, length).or_else(as_it_was) };
        self.punch_clusters(&image, offset, length).or_else(as_it_was)?;
        image.discard_to_zero(offset, length).or_else(as_it_was)
    }

    /// Makes a range read as zeros; with `keep_room` it goes on taking room.
    ///
    /// # Errors
    /// Beyond the end, or the file system's.
    pub fn write_zeroes(&self, offset: u64, length: u64, keep_room: bool) -> io::Result<()> {
        self.check_change(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let tried = match self.image() {
            Some(image) if keep_room => image.write_zeroes(offset, length),
            Some(mut image) => self.punch_clusters(&image, offset, length).and_then(|()| image.discard_to_zero(offset, length)),
            None if keep_room => Ok(fallocate(&self.file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, length)?),
            None => self.punch(offset, length),
        };
        match tried {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.write_zero_bytes(offset, length),
            tried => tried,
        }
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        Ok(fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)?)
    }

    /// Punches holes where the range lies in clusters of the image, before these are given up: none of them can have become metadata by
    /// then, as the image is locked.
    fn punch_clusters(&self, image: &FormatAccess<ImageFile>, offset: u64, length: u64) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let (mapping, run) = image.get_mapping(offset + done, length - done)?;
            if run == 0 {
                break;
            }
            if let Mapping::Raw { offset: at, writable: true, .. } = mapping {
                self.punch(at, run)?;
            }
            done += run;
        }
        Ok(())
    }

    fn write_zero_bytes(&self, offset: u64, length: u64) -> io::Result<()> {
        let zeros = vec![0; ZEROS];
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let count = usize::try_from(end - at).unwrap_or(ZEROS).min(ZEROS);
            self.write_at(&zeros[..count], at)?;
            at += count as u64;
        }
        Ok(())
    }

    /// Makes everything durable, the file's size too.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.flush()?;
        self.file.sync_all()
    }
}

fn open_image(file: &File, writable: bool) -> io::Result<Qcow2<ImageFile>> {
    let storage = ImageFile::try_from(file.try_clone()?)?;
    Qcow2::<ImageFile>::builder(storage).backing(None).write(writable).open(DenyImplicitOpenGate::default())
}

/// A discard is a wish: who cannot, leaves things as they are.
fn as_it_was(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::Unsupported { Ok(()) } else { Err(error) }
}

impl Drop for Contents {
    fn drop(&mut self) {
        // Metadata of an image is cached.
        if self.writable
            && let Some(image) = self.image()
            && let Err(error) = image.flush()
        {
            tracing::warn!(%error, "a qcow2 volume could not be brought in order");
        }
    }
}

#[cfg(test)]
mod tests {
    use form_types::VolumeId;

    use super::*;
    use crate::{Store, local_pool};

    const MIB: u64 = 1 << 20;
    const ID: VolumeId = VolumeId::from_bytes([7; 16]);

    fn opened(format: VolumeFormat, check: impl FnOnce(&Contents)) {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let pool = store.pool(&local_pool()).unwrap();
        pool.create(&ID, format, 16 * MIB).unwrap();
        check(&Contents::new(pool.open_volume(&ID, false).unwrap(), true).unwrap());
        let again = Contents::new(pool.open_volume(&ID, true).unwrap(), false).unwrap();
        let mut bytes = [0; 4];
        again.read_at(&mut bytes, 8 * MIB - 2).unwrap();
        assert_eq!(bytes, [7, 7, 0, 0], "what was written stays, what was discarded is gone");
        assert!(!again.is_writable() && again.write_at(b"x", 0).is_err());
    }

    #[test]
    fn both_formats_read_write_discard_and_know_their_holes() {
        for format in [VolumeFormat::Raw, VolumeFormat::Qcow2] {
            opened(format, |contents| {
                let hole = |length| Extent { length, is_hole: true };
                let data = |length| Extent { length, is_hole: false };
                assert_eq!(contents.extent(0, 16 * MIB).unwrap(), hole(16 * MIB), "{format:?}");
                contents.write_at(&vec![7; 2 * MIB as usize], 7 * MIB).unwrap();
                assert_eq!(contents.extent(0, 16 * MIB).unwrap(), hole(7 * MIB), "{format:?}");
                assert_eq!(contents.extent(7 * MIB, 9 * MIB).unwrap(), data(2 * MIB), "{format:?}");
                assert_eq!(contents.extent(7 * MIB + 5, 10).unwrap(), data(10));
                contents.discard(8 * MIB, MIB).unwrap();
                // A qcow2 image has two kinds of zeros, which are two extents.
                let after = contents.extent(8 * MIB, 8 * MIB).unwrap();
                assert!(after.is_hole && after.length >= MIB, "{format:?}: {after:?}");
                contents.write_at(b"kept", 12 * MIB).unwrap();
                contents.write_zeroes(12 * MIB + 1, 2, true).unwrap();
                contents.write_zeroes(0, 0, false).unwrap();
                let mut bytes = [9; 4];
                contents.read_at(&mut bytes, 12 * MIB).unwrap();
                assert_eq!(&bytes, b"k\0\0t", "{format:?}");
                contents.write_zeroes(12 * MIB, MIB, false).unwrap();
                contents.read_at(&mut bytes, 12 * MIB).unwrap();
                assert_eq!(bytes, [0; 4]);
                contents.flush().unwrap();
                for (offset, length) in [(16 * MIB, 1), (16 * MIB - 1, 2), (u64::MAX, 2)] {
                    assert!(contents.read_at(&mut vec![0; length], offset).is_err());
                    assert!(contents.write_at(&vec![0; length], offset).is_err());
                    assert!(contents.discard(offset, length as u64).is_err());
                    assert!(contents.write_zeroes(offset, length as u64, false).is_err());
                    assert!(contents.extent(offset, length as u64).is_err());
                }
            });
        }
    }

    #[test]
    fn a_volume_grows_under_those_who_use_it() {
        for (format, writable) in [VolumeFormat::Raw, VolumeFormat::Qcow2].into_iter().flat_map(|format| [(format, true), (format, false)])
        {
            let root = tempfile::tempdir().unwrap();
            let store = Store::open(root.path()).unwrap();
            let pool = store.pool(&local_pool()).unwrap();
            pool.create(&ID, format, 16 * MIB).unwrap();
            Contents::new(pool.open_volume(&ID, false).unwrap(), true).unwrap().write_at(b"before", 0).unwrap();
            let contents = Contents::new(pool.open_growable(&ID, !writable).unwrap(), writable).unwrap();
            if writable {
                contents.write_at(b"last", 16 * MIB - 4).unwrap();
            }
            let mut bytes = [9; 4];
            assert!(contents.read_at(&mut bytes, 16 * MIB).is_err());
            // Far enough that a qcow2 image needs a larger table.
            let large = 64 << 30;
            if !writable {
                let other = pool.open_volume(&ID, true).unwrap();
                assert_eq!(contents.grow(large).unwrap_err().kind(), io::ErrorKind::WouldBlock, "who else reads is not disturbed");
                drop(other);
            }
            contents.grow(large).unwrap();
            contents.grow(16 * MIB).unwrap();
            pool.note_grown(&ID, large).unwrap();
            assert_eq!((contents.size_bytes(), pool.volume(&ID).unwrap().size_bytes), (large, large), "{format:?}");
            contents.read_at(&mut bytes, large - 4).unwrap();
            assert_eq!(bytes, [0; 4]);
            assert_eq!(contents.write_at(b"end", large - 3).is_ok(), writable);
            assert!(matches!(pool.open_volume(&ID, false), Err(crate::StoreError::VolumeInUse { .. })), "its lock is still held");
            drop(contents);
            let again = Contents::new(pool.open_volume(&ID, true).unwrap(), false).unwrap();
            again.read_at(&mut bytes, 2).unwrap();
            assert_eq!(&bytes, b"fore");
            again.read_at(&mut bytes, 16 * MIB - 4).unwrap();
            assert_eq!(&bytes, if writable { b"last" } else { &[0; 4] });
            again.read_at(&mut bytes[..3], large - 3).unwrap();
            assert_eq!(&bytes[..3], if writable { b"end" } else { &[0; 3] });
        }
    }
}
