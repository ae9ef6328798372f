//! Files and directories in and out, as tar streams.

use std::{
    io::{self, BufWriter, Read, Write},
    time::Duration,
};

use form_archive::{ArchiveError, Owner, Target};
use form_guest::protocol::{ErrorKind, FrameKind, Reply, TreeInfo};

use super::Channel;
use crate::{files, identity::Identity};

const CHUNK: usize = 64 << 10;

/// How long the host waits to know how much will come.
const MEASURE: Duration = Duration::from_secs(2);

fn refuse(channel: &Channel, error: &ArchiveError) -> io::Result<()> {
    let kind = match error.kind() {
        form_archive::ErrorKind::NotFound => ErrorKind::NotFound,
        form_archive::ErrorKind::NoRoom => ErrorKind::NoRoom,
        form_archive::ErrorKind::Invalid | form_archive::ErrorKind::Stream | form_archive::ErrorKind::Failed => ErrorKind::Failed,
    };
    channel.refuse(kind, format_args!("{error} in the guest"))
}

pub fn unpack(channel: &Channel, path: &str, contents: bool, owner: Option<&str>, keep_owner: bool) -> io::Result<()> {
    let place = match files::absolute(path) {
        Ok(place) => place.to_owned(),
        Err(error) => return channel.refuse(ErrorKind::Invalid, error),
    };
    let owner = match (keep_owner, Identity::lookup(owner)) {
        (true, _) => Owner::Kept,
        (false, Ok(owner)) => Owner::Of { uid: owner.uid, gid: owner.gid },
        (false, Err(error)) => return channel.refuse(ErrorKind::NotFound, error),
    };
    let target = if contents { Target::Into(place) } else { Target::Path(place) };
    if let Err(error) = form_archive::check(&target) {
        return refuse(channel, &error);
    }
    channel.reply(&Reply::Done)?;
    let mut input = Input { channel, rest: Vec::new(), read: 0, ended: false };
    match form_archive::unpack(&mut input, &target, owner, true) {
        Ok(_) => channel.reply(&Reply::Done),
        Err(error) => {
            refuse(channel, &error)?;
            // What is still on its way is taken, so that the channel stays in step.
            io::copy(&mut input, &mut io::sink()).map(drop)
        }
    }
}

pub fn pack(channel: &Channel, path: &str) -> io::Result<()> {
    let place = match files::absolute(path) {
        Ok(place) => place,
        Err(error) => return channel.refuse(ErrorKind::Invalid, error),
    };
    let tree = match form_archive::measure(place, MEASURE) {
        Ok(tree) => tree,
        Err(error) => return refuse(channel, &error),
    };
    channel.reply(&Reply::Tree(TreeInfo { is_directory: tree.is_directory, bytes: tree.bytes }))?;
    let name = place.file_name().unwrap_or("root".as_ref());
    match form_archive::pack(place, name, BufWriter::with_capacity(CHUNK, Output(channel))) {
        Ok(_) => channel.write(FrameKind::End, &[]),
        Err(error) => refuse(channel, &error),
    }
}

/// The bytes of `Data` frames up to `End`; anything else breaks it off.
struct Input<'a> {
    channel: &'a Channel,
    rest: Vec<u8>,
    read: usize,
    ended: bool,
}

impl Read for Input<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.read == self.rest.len() && !self.ended {
            match self.channel.read()? {
                Some(frame) if frame.kind == FrameKind::Data => (self.rest, self.read) = (frame.payload, 0),
                Some(frame) if frame.kind == FrameKind::End => self.ended = true,
                _ => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the host ended it")),
            }
        }
        let count = self.rest.get(self.read..).unwrap_or_default().read(buffer)?;
        self.read += count;
        Ok(count)
    }
}

struct Output<'a>(&'a Channel);

impl Write for Output<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = bytes.get(..bytes.len().min(CHUNK)).unwrap_or_default();
        if self.0.cancelled() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.0.write(FrameKind::Data, piece)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
