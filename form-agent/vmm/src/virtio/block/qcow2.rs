//! A qcow2 image, usually an overlay, over files that were passed as descriptors. Paths in image headers are never followed.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, file::File as Storage, format::PreallocateMode, qcow2::Qcow2,
    raw::Raw,
};

use super::{DiskBackend, Payload, lock, raw};
use crate::config::DiskFormat;

/// Data passes through a buffer of ours, since guest memory may change under a Rust slice.
const BUFFER: usize = 256 * 1024;

/// One file of a chain of images.
pub struct Layer {
    pub file: OwnedFd,
    pub format: DiskFormat,
}

type Image = FormatAccess<Storage>;

pub struct Qcow2Image {
    image: Image,
    /// The same open file as the image's own, for holes.
    file: File,
    buffer: Vec<u8>,
    read_only: bool,
}

impl Qcow2Image {
    /// `backing` lies behind the image, the nearest first.
    ///
    /// # Errors
    /// When an image is malformed, needs a file that was not passed, or somebody else writes to it.
    pub fn open(file: OwnedFd, backing: Vec<Layer>, read_only: bool) -> io::Result<Self> {
        let file = File::from(file);
        if !read_only {
            lock::write_lock(&file)?;
        }
        let mut behind = None;
        for layer in backing.into_iter().rev() {
            let storage = Storage::try_from(File::from(layer.file))?;
            behind = Some(match layer.format {
                // What lies behind raw data cannot be seen.
                DiskFormat::Raw if behind.is_some() => return Err(invalid("a raw image cannot have a backing file")),
                DiskFormat::Raw => FormatAccess::new(Raw::open_image(storage, false)?),
                DiskFormat::Qcow2 => open_qcow2(storage, behind, false)?,
            });
        }
        let image = open_qcow2(Storage::try_from(file.try_clone()?)?, behind, !read_only)?;
        Ok(Self { image, file, buffer: vec![0; BUFFER], read_only })
    }

    /// Punches holes where the range lies in clusters of this image. Before the clusters are given up, so that none of them
    /// can have become metadata; should the machine fail in between, the range reads as zeros, as it was to be.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut done = 0;
        while done < length {
            let (mapping, run) = self.image.get_mapping(offset + done, length - done)?;
            if run == 0 {
                break;
            }
            // Only this image's own clusters are writable: backing files are opened for reading.
            if let Mapping::Raw { offset: at, writable: true, .. } = mapping {
                raw::allocate(&self.file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, run)?;
            }
            done += run;
        }
        Ok(())
    }

    fn write_zero_bytes(&mut self, mut offset: u64, length: u64) -> io::Result<()> {
        self.buffer.fill(0);
        let end = offset + length;
        while offset < end {
            let count = (end - offset).min(BUFFER as u64) as usize;
            self.image.write(&self.buffer[..count], offset)?;
            offset += count as u64;
        }
        Ok(())
    }
}

fn open_qcow2(storage: Storage, behind: Option<Image>, write: bool) -> io::Result<Image> {
    let mut builder = Qcow2::<Storage, Image>::builder(storage).write(write);
    if behind.is_some() {
        builder = builder.backing(behind);
    }
    // Whatever else the header names is refused: a backing file that was not passed, an external data file.
    Ok(FormatAccess::new(builder.open(DenyImplicitOpenGate::default())?))
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}

impl DiskBackend for Qcow2Image {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn grow(&mut self, size: u64) -> io::Result<()> {
        if size < self.image.size() {
            return Err(invalid("a disk is never made smaller"));
        }
        if size > self.image.size() {
            self.image.resize_grow(size, PreallocateMode::None)?;
            self.image.flush()?;
        }
        Ok(())
    }

    fn can_discard(&self) -> bool {
        !self.read_only
    }

    fn read(&mut self, offset: u64, into: &Payload<'_>) -> io::Result<()> {
        let mut done = 0;
        while done < into.len() {
            let count = BUFFER.min(into.len() - done);
            let piece = &mut self.buffer[..count];
            self.image.read(&mut *piece, offset + done as u64)?;
            into.copy_to_guest(done, piece)?;
            done += count;
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, from: &Payload<'_>) -> io::Result<()> {
        let mut done = 0;
        while done < from.len() {
            let count = BUFFER.min(from.len() - done);
            let piece = &mut self.buffer[..count];
            from.copy_from_guest(done, piece)?;
            self.image.write(&*piece, offset + done as u64)?;
            done += count;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.image.flush()?;
        self.image.sync()
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.punch(offset, length)?;
        match self.image.discard_to_zero(offset, length) {
            // Version 2 of the format cannot say that a cluster is zero: it stays, as a hole.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let result = if unmap {
            self.punch(offset, length)?;
            self.image.discard_to_zero(offset, length)
        } else {
            self.image.write_zeroes(offset, length)
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.write_zero_bytes(offset, length),
            result => result,
        }
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        // Metadata is cached; the guest asked for what matters to it, so this only keeps the image tidy.
        if !self.read_only
            && let Err(error) = self.image.flush()
        {
            eprintln!("a qcow2 image (descriptor {}) could not be brought in order: {error}", self.file.as_raw_fd());
        }
    }
}
