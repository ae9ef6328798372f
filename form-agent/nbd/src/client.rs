//! A client that reads an export from its beginning to its end, without its holes.

use std::{
    io::{self, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::pki_types::ServerName;

use crate::{
    socket::{Channel, Socket},
    tls,
    uri::{Place, Uri},
    wire::{
        self, BASE_ALLOCATION, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields, INIT_MAGIC, MAX_PAYLOAD, OPTION_MAGIC, OPTION_REPLY_MAGIC,
        REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STATE_ZERO, STRUCTURED_REPLY_MAGIC, chunk, command, export_flag, info, option, option_reply,
    },
};

/// How long it may take until the server has said what it serves.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// How long a server may take for its answer to a request.
const ANSWER: Duration = Duration::from_secs(60);

/// The longest answer to an option that is read, and the longest message of an error.
const MAX_REPLY: u32 = 64 << 10;

/// The most extents of one answer that are looked at.
const MAX_EXTENTS: u32 = 1 << 20;

/// Of one question for what is data and what is not: as much as every server answers for.
const MAX_QUESTION: u64 = 1 << 30;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{place} cannot be reached: {source}")]
    Unreachable { place: String, source: io::Error },
    #[error("the connection broke in the middle: {0}")]
    Broken(#[source] io::Error),
    #[error("the server took too long for an answer")]
    Silent,
    #[error("there is no export {0:?} on this server")]
    Unknown(String),
    #[error("the server asks for TLS")]
    WantsTls,
    #[error("the server has no TLS")]
    NoTls,
    #[error("the server refuses: {0}")]
    Refused(String),
    #[error("TLS: {0}")]
    Tls(String),
    #[error("what is there speaks no NBD: {0}")]
    Nonsense(&'static str),
    #[error("the server cannot read its disk at {at}: error {number}")]
    Disk { at: u64, number: u32 },
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        // In TLS 1.3 a client hears only after its handshake that it is not let in.
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match (tls, error.kind()) {
            (Some(rustls::Error::AlertReceived(alert)), _) => {
                Self::Tls(format!("the server does not accept this client's certificate ({alert:?})"))
            }
            (Some(other), _) => Self::Tls(other.to_string()),
            (None, io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => Self::Silent,
            (None, _) => Self::Broken(error),
        }
    }
}

/// Consecutive bytes that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// At least 1.
    pub length: u64,
    /// They read as zeros.
    pub is_hole: bool,
}

/// An export, open for reading.
#[derive(Debug)]
pub struct Client {
    channel: Channel,
    size: u64,
    structured: bool,
    /// The number of `base:allocation` on this connection.
    allocation: Option<u32>,
    most: u32,
    cookie: u64,
}

/// What a server said to an option.
enum Said {
    Acknowledged,
    /// With its kind ([`option_reply`]) and what it says.
    Refused(u32, String),
}

impl Client {
    /// Reaches the export of this address.
    ///
    /// # Errors
    /// When it cannot be reached or is not what it should be.
    pub fn connect(uri: &Uri) -> Result<Self, Error> {
        Self::begin(open(&uri.place)?, uri)
    }

    fn begin(socket: Socket, uri: &Uri) -> Result<Self, Error> {
        let mut channel = Channel::new(Arc::new(socket))?;
        channel.wait_until(Instant::now() + HANDSHAKE);
        let mut client = Self { channel, size: 0, structured: false, allocation: None, most: MAX_PAYLOAD, cookie: 0 };
        client.greet()?;
        if uri.tls {
            client.secure(uri)?;
        }
        client.structured = matches!(client.ask(option::STRUCTURED_REPLY, &[], |_, _| Ok(()))?, Said::Acknowledged);
        if client.structured {
            client.choose_allocation(&uri.export)?;
        }
        client.go(&uri.export)?;
        client.channel.wait_for_each(Some(ANSWER))?;
        Ok(client)
    }

    /// Of the export, in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// What is at `offset`, which is in the export.
    ///
    /// # Errors
    /// When the server does not say.
    pub fn extent(&mut self, offset: u64) -> Result<Extent, Error> {
        let rest = self.size.checked_sub(offset).filter(|rest| *rest > 0).ok_or(Error::Nonsense("it ends before that"))?;
        let Some(id) = self.allocation else { return Ok(Extent { length: rest, is_hole: false }) };
        let length = u32::try_from(rest.min(MAX_QUESTION)).unwrap_or(u32::MAX);
        self.request(command::BLOCK_STATUS, offset, length)?;
        let mut found: Option<Extent> = None;
        loop {
            let chunk = self.chunk(offset)?;
            if chunk.kind == chunk::BLOCK_STATUS {
                if chunk.length < 4 || chunk.length % 8 != 4 || chunk.length / 8 > MAX_EXTENTS {
                    return Err(Error::Nonsense("a block status of an odd length"));
                }
                let mut bytes = vec![0; chunk.length as usize];
                self.read_exact(&mut bytes)?;
                let mut fields = Fields(&bytes);
                if fields.u32() == Some(id) {
                    let mut extents = std::iter::from_fn(|| Some((fields.u32()?, fields.u32()?)));
                    let (first, state) = extents.next().filter(|(first, _)| *first > 0).ok_or(Error::Nonsense("an empty block status"))?;
                    let is_hole = state & STATE_ZERO != 0;
                    let alike: u64 =
                        extents.take_while(|(_, more)| (more & STATE_ZERO != 0) == is_hole).map(|(more, _)| u64::from(more)).sum();
                    found = Some(Extent { length: (u64::from(first) + alike).min(rest), is_hole });
                }
            } else {
                self.skip(&chunk)?;
            }
            if chunk.is_last {
                return found.ok_or(Error::Nonsense("no block status"));
            }
        }
    }

    /// Fills `into` with what is at `offset`.
    ///
    /// # Errors
    /// When the server cannot read it, or the connection breaks.
    pub fn read_at(&mut self, into: &mut [u8], offset: u64) -> Result<(), Error> {
        let mut done = 0;
        while done < into.len() {
            let count = (into.len() - done).min(self.most as usize);
            self.read_some(&mut into[done..done + count], offset + done as u64)?;
            done += count;
        }
        Ok(())
    }

    fn read_some(&mut self, into: &mut [u8], offset: u64) -> Result<(), Error> {
        self.request(command::READ, offset, into.len() as u32)?;
        if !self.structured {
            let mut head = [0; wire::SIMPLE_REPLY_BYTES];
            self.read_exact(&mut head)?;
            let mut fields = Fields(&head);
            let (magic, number, cookie) = (fields.u32(), fields.u32().unwrap_or_default(), fields.u64());
            if magic != Some(SIMPLE_REPLY_MAGIC) || cookie != Some(self.cookie) {
                return Err(Error::Nonsense("no reply"));
            }
            return if number == 0 { self.read_exact(into) } else { Err(Error::Disk { at: offset, number }) };
        }
        // Each byte comes once; how many came is enough to know that none is missing.
        let mut came = 0;
        loop {
            let chunk = self.chunk(offset)?;
            let least = match chunk.kind {
                chunk::OFFSET_DATA => 8,
                chunk::OFFSET_HOLE => 12,
                _ => 0,
            };
            if least == 0 {
                self.skip(&chunk)?;
            } else {
                let mut head = [0; 12];
                if chunk.length < least || (least == 12 && chunk.length != 12) {
                    return Err(Error::Nonsense("a chunk of an odd length"));
                }
                self.read_exact(&mut head[..least as usize])?;
                let mut fields = Fields(&head);
                let at = fields.u64().and_then(|at| at.checked_sub(offset)).and_then(|at| usize::try_from(at).ok());
                let count = if least == 12 { fields.u32().unwrap_or_default() } else { chunk.length - 8 } as usize;
                let place =
                    at.and_then(|at| into.get_mut(at..at.checked_add(count)?)).ok_or(Error::Nonsense("bytes that nobody asked for"))?;
                match least {
                    12 => place.fill(0),
                    _ => self.channel.read_exact(place)?,
                }
                came += count;
            }
            if chunk.is_last {
                return if came == into.len() { Ok(()) } else { Err(Error::Nonsense("fewer or more bytes than were asked for")) };
            }
        }
    }

    fn read_exact(&mut self, into: &mut [u8]) -> Result<(), Error> {
        Ok(self.channel.read_exact(into)?)
    }

    fn greet(&mut self) -> Result<(), Error> {
        let mut greeting = [0; 18];
        self.read_exact(&mut greeting)?;
        let mut fields = Fields(&greeting);
        if (fields.u64(), fields.u64()) != (Some(INIT_MAGIC), Some(OPTION_MAGIC)) {
            return Err(Error::Nonsense("another greeting"));
        }
        let flags = fields.u16().unwrap_or_default();
        if flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(Error::Nonsense("a server of before the fixed newstyle negotiation"));
        }
        let ours = u32::from(FLAG_FIXED_NEWSTYLE | (flags & FLAG_NO_ZEROES));
        self.channel.write_all(&ours.to_be_bytes())?;
        Ok(())
    }

    fn secure(&mut self, uri: &Uri) -> Result<(), Error> {
        match self.ask(option::STARTTLS, &[], |_, _| Ok(()))? {
            Said::Acknowledged => {}
            Said::Refused(..) => return Err(Error::NoTls),
        }
        let directory = uri.certificates.as_deref().ok_or_else(|| {
            Error::Tls(
                "say with `tls-certificates=DIRECTORY` in the address where ca-cert.pem, client-cert.pem and client-key.pem are".to_owned(),
            )
        })?;
        let config = tls::client(directory).map_err(|error| Error::Tls(error.to_string()))?;
        let host = match &uri.place {
            Place::Tcp { host, .. } => host.clone(),
            Place::Unix(_) => "localhost".to_owned(),
        };
        let name = ServerName::try_from(host).map_err(|error| Error::Tls(error.to_string()))?;
        Ok(self.channel.secure_client(config, name)?)
    }

    /// Sends an option and hears what is said until it is acknowledged or refused.
    fn ask(&mut self, option: u32, data: &[u8], mut hear: impl FnMut(u32, &[u8]) -> Result<(), Error>) -> Result<Said, Error> {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        self.channel.write_all(&bytes)?;
        loop {
            let mut head = [0; 20];
            self.read_exact(&mut head)?;
            let mut fields = Fields(&head);
            let (magic, to) = (fields.u64(), fields.u32());
            let (Some(kind), Some(length)) = (fields.u32(), fields.u32()) else { return Err(Error::Nonsense("no answer")) };
            if (magic, to) != (Some(OPTION_REPLY_MAGIC), Some(option)) || length > MAX_REPLY {
                return Err(Error::Nonsense("an answer to something else"));
            }
            let mut said = vec![0; length as usize];
            self.read_exact(&mut said)?;
            match kind {
                option_reply::ACK => return Ok(Said::Acknowledged),
                kind if kind & option_reply::ERROR != 0 => return Ok(Said::Refused(kind, printable(&said))),
                kind => hear(kind, &said)?,
            }
        }
    }

    fn choose_allocation(&mut self, export: &str) -> Result<(), Error> {
        let data = [&text(export)[..], &1_u32.to_be_bytes(), &text(BASE_ALLOCATION)].concat();
        let mut id = None;
        let hear = |kind: u32, said: &[u8]| {
            if kind == option_reply::META_CONTEXT && said.get(4..) == Some(BASE_ALLOCATION.as_bytes()) {
                id = Fields(said).u32();
            }
            Ok(())
        };
        // A server that refuses knows of no holes.
        if let Said::Acknowledged = self.ask(option::SET_META_CONTEXT, &data, hear)? {
            self.allocation = id;
        }
        Ok(())
    }

    fn go(&mut self, export: &str) -> Result<(), Error> {
        let data = [&text(export)[..], &1_u16.to_be_bytes(), &info::BLOCK_SIZE.to_be_bytes()].concat();
        let (mut told, mut most) = (None, None);
        let hear = |kind: u32, said: &[u8]| {
            let mut fields = Fields(said);
            match (kind, fields.u16()) {
                (option_reply::INFO, Some(info::EXPORT)) => told = fields.u64().zip(fields.u16()),
                (option_reply::INFO, Some(info::BLOCK_SIZE)) => most = fields.u32().and(fields.u32()).and(fields.u32()),
                _ => {}
            }
            Ok(())
        };
        match self.ask(option::GO, &data, hear)? {
            Said::Acknowledged => {}
            Said::Refused(option_reply::UNKNOWN, _) => return Err(Error::Unknown(export.to_owned())),
            Said::Refused(option_reply::TLS_REQUIRED, _) => return Err(Error::WantsTls),
            Said::Refused(option_reply::UNSUPPORTED, _) => return self.begin_the_oldest_way(export),
            Said::Refused(_, why) => return Err(Error::Refused(why)),
        }
        let (size, _) = told.filter(|(_, flags)| flags & export_flag::HAS_FLAGS != 0).ok_or(Error::Nonsense("an export without a size"))?;
        self.size = size;
        self.most = most.unwrap_or(MAX_PAYLOAD).clamp(512, MAX_PAYLOAD);
        Ok(())
    }

    /// `NBD_OPT_EXPORT_NAME`: what is not there is hung up on.
    fn begin_the_oldest_way(&mut self, export: &str) -> Result<(), Error> {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(option::EXPORT_NAME.to_be_bytes());
        bytes.extend(text(export));
        self.channel.write_all(&bytes)?;
        let mut told = [0; 10];
        match self.channel.read_exact(&mut told) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Error::Unknown(export.to_owned())),
            read => read.map_err(Error::from)?,
        }
        self.size = Fields(&told).u64().unwrap_or_default();
        Ok(())
    }

    fn request(&mut self, command: u16, offset: u64, length: u32) -> Result<(), Error> {
        self.cookie += 1;
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(0_u16.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        self.channel.write_all(&bytes)?;
        Ok(())
    }

    /// The head of the next chunk of the answer; an error that it brings is one of reading at `offset`.
    fn chunk(&mut self, offset: u64) -> Result<Chunk, Error> {
        let mut head = [0; wire::CHUNK_HEAD_BYTES];
        self.read_exact(&mut head)?;
        let mut fields = Fields(&head);
        let (magic, flags, kind) = (fields.u32(), fields.u16().unwrap_or_default(), fields.u16().unwrap_or_default());
        let (cookie, length) = (fields.u64(), fields.u32().unwrap_or_default());
        if (magic, cookie) != (Some(STRUCTURED_REPLY_MAGIC), Some(self.cookie)) {
            return Err(Error::Nonsense("no reply"));
        }
        if kind & chunk::IS_ERROR != 0 {
            if !(6..=MAX_REPLY).contains(&length) {
                return Err(Error::Nonsense("an error of an odd length"));
            }
            let mut bytes = vec![0; length as usize];
            self.read_exact(&mut bytes)?;
            return Err(Error::Disk { at: offset, number: Fields(&bytes).u32().unwrap_or_default() });
        }
        Ok(Chunk { kind, length, is_last: flags & chunk::DONE != 0 })
    }

    /// Passes over what a chunk brings that is of no use.
    fn skip(&mut self, chunk: &Chunk) -> Result<(), Error> {
        if chunk.length > MAX_REPLY {
            return Err(Error::Nonsense("a chunk that nobody asked for"));
        }
        self.read_exact(&mut vec![0; chunk.length as usize])
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The server sees the end of the connection as well.
        let _ = self.request(command::DISC, 0, 0);
    }
}

struct Chunk {
    kind: u16,
    length: u32,
    is_last: bool,
}

fn open(place: &Place) -> Result<Socket, Error> {
    let failed = |source: io::Error| {
        let place = match place {
            Place::Unix(path) => path.display().to_string(),
            Place::Tcp { host, port } => format!("{host} (port {port})"),
        };
        Error::Unreachable { place, source }
    };
    match place {
        Place::Unix(path) => UnixStream::connect(path).map(Socket::Unix).map_err(failed),
        Place::Tcp { host, port } => {
            let addresses = (host.as_str(), *port).to_socket_addrs().map_err(failed)?;
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for address in addresses {
                match TcpStream::connect_timeout(&address, HANDSHAKE) {
                    Ok(stream) => {
                        stream.set_nodelay(true)?;
                        return Ok(Socket::Tcp(stream));
                    }
                    Err(error) => last = error,
                }
            }
            Err(failed(last))
        }
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// What a server says, as a terminal may show it.
fn printable(said: &[u8]) -> String {
    String::from_utf8_lossy(said).chars().filter(|character| !character.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests;
