//! Copies of large files: blocks are shared where the file system can, holes stay holes elsewhere.

use std::{fs::File, io, os::unix::fs::FileExt};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

/// Makes `target`, which is empty, a copy of `source`. Nobody may write to either meanwhile.
///
/// # Errors
/// Those of the file system.
pub fn share_or_copy(source: &File, target: &File) -> io::Result<()> {
    match share(source, target)? {
        Some(()) => Ok(()),
        None => copy_sparse(source, target),
    }
}

/// Makes `target`, which is empty, a copy of `source` at this instant: both have the same blocks until one is written to. None when the file
/// system cannot do that.
///
/// # Errors
/// Those of the file system.
pub fn share(source: &File, target: &File) -> io::Result<Option<()>> {
    match rustix::fs::ioctl_ficlone(target, source) {
        Ok(()) => Ok(Some(())),
        Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => Err(error.into()),
        // Every file system has its own word for "cannot".
        Err(_) => Ok(None),
    }
}

/// So many bytes are copied or compared by hand at a time.
const AT_ONCE: usize = 1 << 20;

/// Copies what is not a hole.
fn copy_sparse(source: &File, target: &File) -> io::Result<()> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut at = 0;
    while at < length {
        let begin = match seek(source, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(source, SeekFrom::Hole(begin))?;
        let (mut from, mut to) = (begin, begin);
        while from < end {
            let count = usize::try_from((end - from).min(1 << 30)).unwrap_or(1 << 30);
            let copied = match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), count) {
                // From one kind of file system to another the kernel does not copy.
                Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                    let copied = copy_some(source, target, from, count)?;
                    (from, to) = (from + copied as u64, to + copied as u64);
                    copied
                }
                copied => copied?,
            };
            if copied == 0 {
                // It became shorter meanwhile, which the lock rules out for all who heed it.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = end;
    }
    Ok(())
}

/// Copies at most `count` bytes at `at` by hand; gives how many.
fn copy_some(source: &File, target: &File, at: u64, count: usize) -> io::Result<usize> {
    let mut bytes = vec![0; count.min(AT_ONCE)];
    let read = source.read_at(&mut bytes, at)?;
    target.write_all_at(&bytes[..read], at)?;
    Ok(read)
}

/// Whether both hold the same. What is a hole in both is not read.
///
/// # Errors
/// Those of the file system.
pub fn same(one: &File, other: &File) -> io::Result<bool> {
    let length = one.metadata()?.len();
    if other.metadata()?.len() != length {
        return Ok(false);
    }
    // Read from the disk again, as far as the kernel can be asked for that.
    let _ = rustix::fs::fadvise(other, 0, None, rustix::fs::Advice::DontNeed);
    let data_from = |file: &File, at| match seek(file, SeekFrom::Data(at)) {
        Ok(begin) => Ok(begin),
        Err(Errno::NXIO) => Ok(length),
        Err(error) => Err(io::Error::from(error)),
    };
    let (mut left, mut right) = (vec![0; AT_ONCE], vec![0; AT_ONCE]);
    let mut at = 0;
    while at < length {
        at = data_from(one, at)?.min(data_from(other, at)?);
        let count = usize::try_from(length - at).unwrap_or(AT_ONCE).min(AT_ONCE);
        one.read_exact_at(&mut left[..count], at)?;
        other.read_exact_at(&mut right[..count], at)?;
        if left[..count] != right[..count] {
            return Ok(false);
        }
        at += count as u64;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_the_same_when_all_their_bytes_are() {
        let file = |bytes: &[(&[u8], u64)]| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(5 << 20).unwrap();
            for (bytes, at) in bytes {
                file.write_all_at(bytes, *at).unwrap();
            }
            file
        };
        let data = file(&[(b"data", 3 << 20), (b"end", (5 << 20) - 3)]);
        assert!(same(&data, &file(&[(b"end", (5 << 20) - 3), (b"data", 3 << 20)])).unwrap());
        assert!(same(&data, &file(&[(&[0; 4096], 1 << 20), (b"data", 3 << 20), (b"end", (5 << 20) - 3)])).unwrap(), "zeros are a hole");
        assert!(!same(&data, &file(&[(b"data", 3 << 20)])).unwrap());
        assert!(!same(&file(&[]), &data).unwrap());
        let short = file(&[]);
        short.set_len(1 << 20).unwrap();
        assert!(!same(&short, &file(&[])).unwrap());
        assert!(same(&file(&[]), &file(&[])).unwrap());
    }
}
