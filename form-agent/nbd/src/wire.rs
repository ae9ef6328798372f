//! What travels in the NBD protocol: numbers, and the messages that are made of them. Reads no socket.
//!
//! The sections that are named here and beside it are those of the protocol's document (NetworkBlockDevice/nbd, `doc/proto.md`). All numbers
//! are big-endian.

/// "Newstyle negotiation": the server's first words.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Before every option of a client, and in the server's first words.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// "Handshake flags", of the server and of the client alike.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// The longest data of an option, in bytes: a name of the protocol's greatest length, and some queries.
pub const MAX_OPTION: u32 = 16 << 10;
/// The most bytes of one read or write: what the protocol's document asks clients to stay below ("Block size constraints").
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// "Option types".
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// "Option reply types".
pub mod option_reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR: u32 = 1 << 31;
    pub const UNSUPPORTED: u32 = ERROR + 1;
    pub const POLICY: u32 = ERROR + 2;
    pub const INVALID: u32 = ERROR + 3;
    pub const TLS_REQUIRED: u32 = ERROR + 5;
    pub const UNKNOWN: u32 = ERROR + 6;
}

/// What `NBD_REP_INFO` tells.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const BLOCK_SIZE: u16 = 3;
}

/// "Transmission flags".
pub mod export_flag {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// "Command flags".
pub mod command_flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
}

/// "Request types".
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// "Structured reply types".
pub mod chunk {
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    /// Of every chunk that brings an error.
    pub const IS_ERROR: u16 = 1 << 15;
    pub const ERROR: u16 = IS_ERROR + 1;
}

/// The states of `base:allocation`.
pub const STATE_HOLE: u32 = 1;
pub const STATE_ZERO: u32 = 1 << 1;

pub const BASE_ALLOCATION: &str = "base:allocation";

/// "Error values".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Failure {
    NotPermitted = 1,
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
    Overflow = 75,
}

/// Reads numbers and strings from a message one after the other.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length, and so many bytes of UTF-8.
    pub fn text(&mut self) -> Option<&'a str> {
        let length = self.u32()?;
        std::str::from_utf8(self.bytes(usize::try_from(length).ok()?)?).ok()
    }

    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The head of a client's option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHead {
    pub option: u32,
    /// At most [`MAX_OPTION`].
    pub length: u32,
}

impl OptionHead {
    pub const BYTES: usize = 16;

    /// None when it is none, or its data would be longer than anybody needs.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u64()? != OPTION_MAGIC {
            return None;
        }
        let head = Self { option: fields.u32()?, length: fields.u32()? };
        (head.length <= MAX_OPTION).then_some(head)
    }
}

/// One request of the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

/// A request that can be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Read { whole: bool },
    Write { durable: bool },
    Disconnect,
    Flush,
    Trim { durable: bool },
    WriteZeroes { durable: bool, keep_room: bool },
    BlockStatus { one: bool },
}

/// What was agreed on, and what is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    pub size: u64,
    pub writable: bool,
    /// Structured replies.
    pub structured: bool,
    /// Block status of [`BASE_ALLOCATION`].
    pub allocation: bool,
}

impl Request {
    pub const BYTES: usize = 28;

    /// None when it is none: then nobody knows where the next one begins.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != REQUEST_MAGIC {
            return None;
        }
        Some(Self { flags: fields.u16()?, command: fields.u16()?, cookie: fields.u64()?, offset: fields.u64()?, length: fields.u32()? })
    }

    /// Whether data follows it, of `length` bytes.
    pub const fn has_payload(&self) -> bool {
        self.command == command::WRITE
    }

    /// What is to be done.
    ///
    /// # Errors
    /// What the client is told ("Error values").
    pub fn check(&self, terms: &Terms) -> Result<Command, Failure> {
        let has = |flag| self.flags & flag != 0;
        let durable = has(command_flag::FUA);
        let (command, more) = match self.command {
            command::READ => (Command::Read { whole: has(command_flag::DF) }, if terms.structured { command_flag::DF } else { 0 }),
            command::WRITE => (Command::Write { durable }, 0),
            command::DISC => return Ok(Command::Disconnect),
            command::FLUSH => (Command::Flush, 0),
            command::TRIM => (Command::Trim { durable }, 0),
            command::WRITE_ZEROES => (Command::WriteZeroes { durable, keep_room: has(command_flag::NO_HOLE) }, command_flag::NO_HOLE),
            command::BLOCK_STATUS if terms.allocation => (Command::BlockStatus { one: has(command_flag::REQ_ONE) }, command_flag::REQ_ONE),
            _ => return Err(Failure::Invalid),
        };
        if self.flags & !(command_flag::FUA | more) != 0 {
            return Err(Failure::Invalid);
        }
        let writes = matches!(command, Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. });
        if writes && !terms.writable {
            return Err(Failure::NotPermitted);
        }
        if command == Command::Flush {
            return if self.offset == 0 && self.length == 0 { Ok(command) } else { Err(Failure::Invalid) };
        }
        if self.offset.checked_add(u64::from(self.length)).is_none_or(|end| end > terms.size) {
            let grows = matches!(command, Command::Write { .. } | Command::WriteZeroes { .. });
            return Err(if grows { Failure::NoSpace } else { Failure::Invalid });
        }
        match command {
            Command::Read { .. } if self.length > MAX_PAYLOAD => Err(Failure::Overflow),
            Command::BlockStatus { .. } if self.length == 0 => Err(Failure::Invalid),
            command => Ok(command),
        }
    }
}

/// The 18 bytes with which a server begins.
pub fn greeting() -> Vec<u8> {
    let mut bytes = INIT_MAGIC.to_be_bytes().to_vec();
    bytes.extend(OPTION_MAGIC.to_be_bytes());
    bytes.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    bytes
}

/// Appends an answer to an option.
pub fn put_option_reply(to: &mut Vec<u8>, option: u32, reply: u32, data: &[u8]) {
    to.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    to.extend(option.to_be_bytes());
    to.extend(reply.to_be_bytes());
    to.extend((data.len() as u32).to_be_bytes());
    to.extend(data);
}

pub const SIMPLE_REPLY_BYTES: usize = 16;

/// No failure: done.
pub fn simple_reply(cookie: u64, failure: Option<Failure>) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&failure.map_or(0, |failure| failure as u32).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

pub const CHUNK_HEAD_BYTES: usize = 20;

/// The head of one chunk of a structured reply, of `length` bytes after it.
pub fn chunk_head(cookie: u64, is_last: bool, kind: u16, length: u32) -> [u8; CHUNK_HEAD_BYTES] {
    let mut bytes = [0; CHUNK_HEAD_BYTES];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&(if is_last { chunk::DONE } else { 0 }).to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&length.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms { size: 1 << 30, writable: true, structured: true, allocation: true };

    fn request(command: u16, flags: u16, offset: u64, length: u32) -> Request {
        Request { flags, command, cookie: 7, offset, length }
    }

    #[test]
    fn heads_are_read_as_they_are_written() {
        let mut bytes = [0; OptionHead::BYTES];
        bytes[..8].copy_from_slice(b"IHAVEOPT");
        bytes[8..12].copy_from_slice(&option::GO.to_be_bytes());
        bytes[12..].copy_from_slice(&MAX_OPTION.to_be_bytes());
        assert_eq!(OptionHead::parse(&bytes), Some(OptionHead { option: option::GO, length: MAX_OPTION }));
        bytes[12..].copy_from_slice(&(MAX_OPTION + 1).to_be_bytes());
        assert_eq!(OptionHead::parse(&bytes), None, "nobody needs that much");
        bytes[0] = b'X';
        assert_eq!(OptionHead::parse(&bytes), None);
        let mut bytes = [0; Request::BYTES];
        assert_eq!(Request::parse(&bytes), None);
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[5] = 1;
        bytes[7] = 6;
        bytes[15] = 3;
        bytes[23] = 5;
        bytes[27] = 9;
        let expected = Request { flags: 1, command: 6, cookie: 3, offset: 5, length: 9 };
        assert_eq!(Request::parse(&bytes), Some(expected));
        assert_eq!(&greeting()[..16], b"NBDMAGICIHAVEOPT");
    }

    #[test]
    fn what_lies_outside_or_is_not_allowed_is_refused_with_the_right_number() {
        let end = TERMS.size;
        let read_only = Terms { writable: false, ..TERMS };
        let plain = Terms { structured: false, allocation: false, ..TERMS };
        for (asked, terms, answer) in [
            (request(0, 0, 0, 512), TERMS, Ok(Command::Read { whole: false })),
            (request(0, 4, 0, 512), TERMS, Ok(Command::Read { whole: true })),
            (request(0, 4, 0, 512), plain, Err(Failure::Invalid)),
            (request(0, 0, end - 1, 1), TERMS, Ok(Command::Read { whole: false })),
            (request(0, 0, end - 1, 2), TERMS, Err(Failure::Invalid)),
            (request(0, 0, u64::MAX, 2), TERMS, Err(Failure::Invalid)),
            (request(0, 0, 0, MAX_PAYLOAD + 1), TERMS, Err(Failure::Overflow)),
            (request(1, 1, 0, 1), TERMS, Ok(Command::Write { durable: true })),
            (request(1, 0, end, 1), TERMS, Err(Failure::NoSpace)),
            (request(1, 0, 0, 1), read_only, Err(Failure::NotPermitted)),
            (request(2, 0xffff, 9, 9), TERMS, Ok(Command::Disconnect)),
            (request(3, 0, 0, 0), read_only, Ok(Command::Flush)),
            (request(3, 0, 0, 1), TERMS, Err(Failure::Invalid)),
            (request(4, 1, 0, u32::MAX >> 4), TERMS, Ok(Command::Trim { durable: true })),
            (request(4, 0, 0, 1), read_only, Err(Failure::NotPermitted)),
            (request(5, 0, 0, 1), TERMS, Err(Failure::Invalid)),
            (request(6, 2, 0, 1), TERMS, Ok(Command::WriteZeroes { durable: false, keep_room: true })),
            (request(6, 16, 0, 1), TERMS, Err(Failure::Invalid)),
            (request(6, 0, end, 1), TERMS, Err(Failure::NoSpace)),
            (request(7, 8, 0, 1), TERMS, Ok(Command::BlockStatus { one: true })),
            (request(7, 0, 0, 0), TERMS, Err(Failure::Invalid)),
            (request(7, 0, 0, 1), plain, Err(Failure::Invalid)),
            (request(99, 0, 0, 1), TERMS, Err(Failure::Invalid)),
        ] {
            assert_eq!(asked.check(&terms), answer, "{asked:?} {terms:?}");
        }
    }
}
