//! For tests/fuzz: the server on bytes in memory, without sockets and threads.

use std::{
    fs::File,
    io::{self, Read, Write},
    sync::atomic::AtomicBool,
};

use form_nbd::wire::Terms;
use form_types::VolumeFormat;

use super::{
    negotiate,
    negotiate::{Offer, Security},
    transmit,
};
use crate::{contents::Contents, volumes::make_empty};

/// The first `size_bytes` of a volume whose file is open.
///
/// # Errors
/// When it is no such volume.
pub fn contents(file: File, format: VolumeFormat, size_bytes: u64, writable: bool) -> io::Result<Contents> {
    Contents::of_file(file, format, size_bytes, writable)
}

/// Makes an empty file a volume of zeros.
///
/// # Errors
/// Those of the file.
pub fn empty(file: &File, format: VolumeFormat, size_bytes: u64) -> io::Result<()> {
    make_empty(file, format, size_bytes)
}

/// What a server said.
#[derive(Debug, Default)]
pub struct Said {
    pub handshake: Vec<u8>,
    /// What was agreed on, and how many of the client's bytes that took.
    pub began: Option<(Terms, usize)>,
    pub replies: Vec<u8>,
}

struct Stream<'a> {
    client: &'a [u8],
    said: Vec<u8>,
}

impl Read for Stream<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.client.read(into)
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.said.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Serves a client that sends these bytes and then no more. One that has to use TLS and begins with it is hung up on: what follows is another's
/// to fuzz.
pub fn serve(contents: &Contents, name: &str, wants_tls: bool, client: &[u8]) -> Said {
    let offer = Offer { name, size: contents.size_bytes(), writable: contents.is_writable() };
    let security = if wants_tls { Security::Wanted } else { Security::None };
    let mut stream = Stream { client, said: Vec::new() };
    let no_tls = |_: &mut Stream<'_>| Err(io::ErrorKind::ConnectionAborted.into());
    let agreed = negotiate(&mut stream, &offer, security, &AtomicBool::new(false), no_tls).ok().flatten();
    let mut said = Said { handshake: std::mem::take(&mut stream.said), ..Said::default() };
    if let Some(terms) = agreed {
        said.began = Some((terms, client.len() - stream.client.len()));
        let _ = transmit::transmit(&mut stream, contents, terms);
        said.replies = stream.said;
    }
    said
}
