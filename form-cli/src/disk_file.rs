//! Disks in files of this machine: raw, or qcow2 that needs no other file. Holes are neither read nor written.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use form_api::{ErrorCode, volume::Piece};
use form_types::VolumeFormat;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping, file::File as Storage, qcow2::Qcow2};
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

use crate::failure::Failure;

/// The first bytes of a qcow2 image (QEMU, `docs/interop/qcow2.rst`, "Header").
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// As much of the header as is read here.
const HEADER: u64 = 24;

type Image = FormatAccess<Storage>;

/// A disk to read.
pub struct DiskFile {
    path: PathBuf,
    file: File,
    /// None for raw.
    image: Option<Image>,
    size: u64,
    /// Of a qcow2 image: where its last cluster ends.
    end: u64,
}

impl DiskFile {
    /// A file that does not begin like a qcow2 image is raw.
    ///
    /// # Errors
    /// When it cannot be read, or is an image that needs another file.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let unreadable = |error: io::Error| Failure::io("read", path, &error);
        let mut file = File::open(path).map_err(unreadable)?;
        if file.metadata().map_err(unreadable)?.is_dir() {
            return Err(unreadable(io::ErrorKind::IsADirectory.into()));
        }
        let mut begin = Vec::new();
        (&mut file).take(HEADER).read_to_end(&mut begin).map_err(unreadable)?;
        // Its last cluster may be shorter in the file. The size of one is the word at 20, as the logarithm.
        let cluster =
            1_u64.checked_shl(begin.get(20..24).map_or(0, |word| word.iter().fold(0, |value, byte| (value << 8) | u32::from(*byte))));
        let length = file.metadata().map_err(unreadable)?.len();
        let end = cluster.and_then(|cluster| length.checked_next_multiple_of(cluster)).unwrap_or(length);
        let image = if begin.starts_with(&QCOW2_MAGIC) {
            let wrong = |error: io::Error| {
                Failure::failed(format!("the qcow2 image {} cannot be read: {error}", path.display()))
                    .hint("one that lies on another image is made whole by `qemu-img convert`")
            };
            Some(file.try_clone().and_then(open_image).map_err(wrong)?)
        } else {
            None
        };
        let size = match &image {
            Some(image) => image.size(),
            // Of a block device too.
            None => file.seek(io::SeekFrom::End(0)).map_err(unreadable)?,
        };
        Ok(Self { path: path.to_owned(), file, image, size, end })
    }

    pub const fn size(&self) -> u64 {
        self.size
    }

    pub const fn format(&self) -> VolumeFormat {
        if self.image.is_some() { VolumeFormat::Qcow2 } else { VolumeFormat::Raw }
    }

    /// Its plain bytes as a file: itself, or a copy in `directory` that has no name and is gone with it.
    ///
    /// # Errors
    /// When it cannot be read, or the disk of `directory` is full; when `go_on` says no.
    pub fn plain(self, directory: &Path, go_on: impl Fn() -> bool) -> Result<File, Failure> {
        if self.image.is_none() {
            return Ok(self.file);
        }
        let unwritable = |error: io::Error| Failure::io("write a copy of", &self.path, &error);
        let copy = tempfile::tempfile_in(directory).map_err(unwritable)?;
        copy.set_len(self.size).map_err(unwritable)?;
        let mut written = Ok(());
        self.pieces(|at, bytes| {
            written = copy.write_all_at(bytes, at);
            written.is_ok() && go_on()
        })?;
        written.map_err(unwritable)?;
        if go_on() { Ok(copy) } else { Err(Failure::failed("interrupted: nothing was left of it")) }
    }

    /// How many bytes come next that are alike, and whether they are a hole.
    fn extent(&self, at: u64) -> io::Result<(u64, bool)> {
        let rest = self.size - at;
        if let Some(image) = &self.image {
            let (mapping, length) = image.get_mapping(at, rest)?;
            // What lies behind the end would be read as zeros.
            if let Mapping::Raw { offset, .. } = &mapping
                && offset.saturating_add(length) > self.end
            {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it was cut short; fetch or copy it again"));
            }
            return Ok((length.clamp(1, rest), matches!(mapping, Mapping::Zero { .. } | Mapping::Eof { .. })));
        }
        let data = match seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok((rest, true)),
            // A device, or a file system that knows no holes.
            Err(_) => return Ok((rest, false)),
        };
        if data > at {
            return Ok((data.min(self.size) - at, true));
        }
        let end = seek(&self.file, SeekFrom::Hole(at)).unwrap_or(self.size);
        Ok((end.clamp(at + 1, self.size) - at, false))
    }

    /// Calls `each` with everything that is no hole and not zeros, in pieces, until it says that this is enough.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn pieces(&self, mut each: impl FnMut(u64, &[u8]) -> bool) -> Result<(), Failure> {
        let mut read = || -> io::Result<()> {
            let mut buffer = vec![0; Piece::MAX_BYTES];
            let mut at = 0;
            while at < self.size {
                let (length, is_hole) = self.extent(at)?;
                let end = at + length;
                while !is_hole && at < end {
                    let count = usize::try_from(end - at).unwrap_or(buffer.len()).min(buffer.len());
                    let piece = &mut buffer[..count];
                    match &self.image {
                        Some(image) => image.read(&mut *piece, at)?,
                        None => self.file.read_exact_at(piece, at)?,
                    }
                    if piece.iter().any(|byte| *byte != 0) && !each(at, piece) {
                        return Ok(());
                    }
                    at += count as u64;
                }
                at = end;
            }
            Ok(())
        };
        read().map_err(|error| Failure::io("read", &self.path, &error))
    }
}

fn open_image(file: File) -> io::Result<Image> {
    let builder = Qcow2::<Storage, Image>::builder(Storage::try_from(file)?).write(false);
    // Whatever other file its header names is refused.
    Ok(FormatAccess::new(builder.open(DenyImplicitOpenGate::default())?))
}

/// A disk that is being written. Until [`NewDiskFile::keep`] it has no name, and is gone when this is.
pub struct NewDiskFile {
    path: PathBuf,
    file: tempfile::NamedTempFile,
    image: Option<Image>,
}

impl NewDiskFile {
    /// # Errors
    /// When something is there already, or cannot be made there.
    pub fn create(path: &Path, format: VolumeFormat, size: u64) -> Result<Self, Failure> {
        if path.symlink_metadata().is_ok() {
            return Err(there(path));
        }
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let make = || {
            let file = tempfile::NamedTempFile::new_in(directory)?;
            let image = match format {
                VolumeFormat::Raw => {
                    file.as_file().set_len(size)?;
                    None
                }
                VolumeFormat::Qcow2 => {
                    let storage = || Storage::try_from(file.reopen()?);
                    Qcow2::<Storage>::create_builder(storage()?).size(size).create()?;
                    let image = Qcow2::<Storage>::builder(storage()?).backing(None).write(true).open(DenyImplicitOpenGate::default())?;
                    Some(FormatAccess::new(image))
                }
            };
            Ok(Self { path: path.to_owned(), file, image })
        };
        make().map_err(|error: io::Error| Failure::io("write", path, &error))
    }

    /// # Errors
    /// When there is no room, mostly.
    pub fn write(&self, piece: &Piece) -> Result<(), Failure> {
        let written = match &self.image {
            Some(image) => image.write(piece.bytes.as_slice(), piece.offset),
            None => self.file.as_file().write_all_at(&piece.bytes, piece.offset),
        };
        written.map_err(|error| Failure::io("write", &self.path, &error))
    }

    /// Gives the file its name, with everything that was written on the disk.
    ///
    /// # Errors
    /// When something of that name has come up meanwhile.
    pub fn keep(self) -> Result<(), Failure> {
        let Self { path, mut file, image } = self;
        let finish = || {
            if let Some(image) = image {
                image.flush()?;
            }
            file.flush()?;
            file.as_file().sync_all()
        };
        finish().map_err(|error| Failure::io("write", &path, &error))?;
        match file.persist_noclobber(&path) {
            Ok(_) => Ok(()),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Err(there(&path)),
            Err(error) => Err(Failure::io("write", &path, &error.error)),
        }
    }
}

fn there(path: &Path) -> Failure {
    Failure::new(ErrorCode::Conflict, format!("{} is there already", path.display())).hint("choose another name, or remove it first")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_was_written_is_read_and_holes_are_not() {
        let place = tempfile::tempdir().unwrap();
        for format in [VolumeFormat::Raw, VolumeFormat::Qcow2] {
            let path = place.path().join(format.as_str());
            let new = NewDiskFile::create(&path, format, 8 * MIB).unwrap();
            assert!(!path.exists(), "it has no name yet");
            let written = [(0, vec![1; 100]), (3 * MIB, vec![2; Piece::MAX_BYTES]), (8 * MIB - 1, vec![3])];
            for (offset, bytes) in &written {
                new.write(&Piece { offset: *offset, bytes: bytes.clone() }).unwrap();
            }
            new.keep().unwrap();
            let disk = DiskFile::open(&path).unwrap();
            assert_eq!((disk.size(), disk.format()), (8 * MIB, format));
            let (mut whole, mut read) = (vec![0; 8 << 20], 0);
            let seen = disk.pieces(|at, bytes| {
                whole[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
                read += bytes.len();
                true
            });
            seen.unwrap();
            for (offset, bytes) in &written {
                assert!(whole[*offset as usize..].starts_with(bytes), "{format:?}");
            }
            assert_eq!(whole.iter().filter(|byte| **byte != 0).count(), 101 + Piece::MAX_BYTES);
            assert!(read <= 4 * Piece::MAX_BYTES, "{read} bytes of {format:?}");
            assert_eq!(NewDiskFile::create(&path, format, MIB).err().unwrap().exit_code(), 5, "nothing is overwritten");
        }
        drop(NewDiskFile::create(&place.path().join("x"), VolumeFormat::Raw, MIB).unwrap());
        assert_eq!(place.path().read_dir().unwrap().count(), 2, "what was not kept is gone");
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let torn = place.path().join("torn");
        std::fs::write(&torn, b"QFI\xfb and nothing more").unwrap();
        assert_eq!(DiskFile::open(&torn).err().unwrap().exit_code(), 1);
        assert_eq!(DiskFile::open(place.path()).err().unwrap().exit_code(), 1);
        assert_eq!(DiskFile::open(&place.path().join("nope")).err().unwrap().exit_code(), 3);
        // Cut short: what lies behind the end of the file is not taken for zeros.
        let cut = place.path().join("cut");
        let new = NewDiskFile::create(&cut, VolumeFormat::Qcow2, 8 * MIB).unwrap();
        new.write(&Piece { offset: 0, bytes: vec![7; Piece::MAX_BYTES] }).unwrap();
        new.keep().unwrap();
        let whole = DiskFile::open(&cut).unwrap().plain(place.path(), || true).unwrap();
        let mut bytes = vec![0; Piece::MAX_BYTES + 1];
        whole.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((whole.metadata().unwrap().len(), bytes.iter().filter(|byte| **byte == 7).count()), (8 * MIB, Piece::MAX_BYTES));
        let file = File::options().write(true).open(&cut).unwrap();
        file.set_len(file.metadata().unwrap().len() - (64 << 10)).unwrap();
        let error = DiskFile::open(&cut).unwrap().plain(place.path(), || true).unwrap_err();
        assert!(error.error.message.contains("cut short"), "{}", error.error.message);
        // On another image, whose path would be followed: the header says where its name is.
        let whole = place.path().join("whole");
        NewDiskFile::create(&whole, VolumeFormat::Qcow2, MIB).unwrap().keep().unwrap();
        let file = File::options().write(true).open(&whole).unwrap();
        file.write_all_at(&[&512_u64.to_be_bytes()[..], &11_u32.to_be_bytes()].concat(), 8).unwrap();
        file.write_all_at(b"/etc/passwd", 512).unwrap();
        assert!(DiskFile::open(&whole).is_err());
    }
}
