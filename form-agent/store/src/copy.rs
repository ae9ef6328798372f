//! Copies of large files: blocks are shared where the file system can, holes stay holes elsewhere.

use std::{fs::File, io};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

/// Makes `target`, which is empty, a copy of `source`. Nobody may write to either meanwhile.
///
/// # Errors
/// Those of the file system.
pub fn share_or_copy(source: &File, target: &File) -> io::Result<()> {
    match rustix::fs::ioctl_ficlone(target, source) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => Err(error.into()),
        // Every file system has its own word for "cannot".
        Err(_) => copy_sparse(source, target),
    }
}

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
            if rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), count)? == 0 {
                // It became shorter meanwhile, which the lock rules out for all who heed it.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        at = end;
    }
    Ok(())
}
