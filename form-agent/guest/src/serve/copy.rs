//! Files in and out.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

use form_guest::protocol::{ErrorKind, FileInfo, FrameKind, Reply};

use super::Channel;
use crate::{files, identity::Identity};

const CHUNK: usize = 64 << 10;

pub fn copy_in(channel: &Channel, path: &str, mode: u32, owner: Option<&str>) -> io::Result<()> {
    let path = match files::absolute(path) {
        Ok(path) => path,
        Err(error) => return channel.refuse(ErrorKind::Invalid, error),
    };
    let owner = match Identity::lookup(owner) {
        Ok(owner) => owner,
        Err(error) => return channel.refuse(ErrorKind::NotFound, error),
    };
    let (temporary, mut file) = match create_beside(path) {
        Ok(created) => created,
        Err(error) => return channel.refuse(ErrorKind::Failed, format_args!("cannot create {}: {error}", path.display())),
    };
    channel.reply(&Reply::Done)?;
    let result = receive(channel, &mut file).and_then(|whole| {
        if !whole {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the host ended the copy"));
        }
        fchown(&file, Some(owner.uid), Some(owner.gid))?;
        file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    match result {
        Ok(()) => channel.reply(&Reply::Done),
        Err(error) => {
            let _ = fs::remove_file(&temporary);
            channel.refuse(ErrorKind::Failed, format_args!("cannot write {}: {error}", path.display()))
        }
    }
}

fn create_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    if path.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let temporary = path.with_file_name(format!(".{}.form-copy", name.to_string_lossy()));
    let _ = fs::remove_file(&temporary);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    Ok((temporary, file))
}

/// Writes what comes. A fault of the file is told after the whole was taken, so that the channel stays in step.
fn receive(channel: &Channel, file: &mut File) -> io::Result<bool> {
    let mut result = Ok(());
    loop {
        match channel.read()? {
            Some(frame) if frame.kind == FrameKind::Data => result = result.and_then(|()| file.write_all(&frame.payload)),
            Some(frame) if frame.kind == FrameKind::End => return result.map(|()| true),
            _ => return Ok(false),
        }
    }
}

pub fn copy_out(channel: &Channel, path: &str) -> io::Result<()> {
    let opened = files::absolute(path).map_err(io::Error::other).and_then(|path| {
        // Not to hang on a pipe that nobody writes to.
        let file = OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed()).open(path)?;
        let metadata = file.metadata()?;
        if metadata.is_file() { Ok((file, metadata)) } else { Err(io::Error::other("it is no regular file")) }
    });
    let (mut file, metadata) = match opened {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return channel.refuse(ErrorKind::NotFound, format_args!("there is no file {path} in the guest"));
        }
        Err(error) => return channel.refuse(ErrorKind::Failed, format_args!("cannot read {path}: {error}")),
    };
    channel.reply(&Reply::File(FileInfo { size_bytes: metadata.len(), mode: metadata.mode() & 0o7777 }))?;
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return channel.write(FrameKind::End, &[]),
            Ok(count) => channel.write(FrameKind::Data, buffer.get(..count).unwrap_or_default())?,
            Err(error) => return channel.refuse(ErrorKind::Failed, format_args!("cannot read {path}: {error}")),
        }
    }
}
