//! What an NBD server may answer, by another reading of the protocol than the server's own (NetworkBlockDevice/nbd, `doc/proto.md`).

use std::ops::Range;

pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;

const ACK: u32 = 1;
const ERROR: u32 = 1 << 31;
const INVALID: u32 = ERROR + 3;
const TLS_REQUIRED: u32 = ERROR + 5;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;

/// Big-endian numbers, one after the other.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn number(&mut self, bytes: usize) -> Option<u64> {
        Some(self.take(bytes)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }
}

/// What a client and a server agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    pub structured: bool,
    pub allocation: bool,
}

/// Whether the server said what it may in the handshake; gives what was agreed on when requests may follow.
///
/// # Panics
/// When it did not.
pub fn check_handshake(client: &[u8], said: &[u8], tls: bool, name: &str, size: u64) -> Option<Agreed> {
    let (mut client, mut said) = (Bytes(client), Bytes(said));
    assert_eq!(said.take(18), Some(&b"NBDMAGICIHAVEOPT\0\x03"[..]));
    let agreed = haggle(&mut client, &mut said, tls, name, size);
    assert!(said.0.is_empty(), "{} bytes that nobody asked for", said.0.len());
    agreed
}

fn haggle(client: &mut Bytes, said: &mut Bytes, tls: bool, name: &str, size: u64) -> Option<Agreed> {
    let flags = client.number(4)?;
    if flags != 1 && flags != 3 {
        return None;
    }
    let mut agreed = Agreed::default();
    loop {
        if client.number(8)? != OPTION_MAGIC {
            return None;
        }
        let (option, length) = (client.number(4)?, client.number(4)?);
        if length > 16 << 10 {
            return None;
        }
        let data = client.take(length as usize)?;
        if option == 1 {
            let good = !tls && (data.is_empty() || data == name.as_bytes());
            assert_eq!(good, !said.0.is_empty(), "an export by its name");
            if !good {
                return None;
            }
            assert_eq!(said.number(8), Some(size));
            said.number(2).expect("flags");
            said.take(if flags & 2 == 0 { 124 } else { 0 }).expect("zeros");
            return Some(agreed);
        }
        let replies = option_replies(said, option);
        let (last, _) = *replies.last().expect("an answer");
        if tls {
            let alone = matches!((option, last), (2, ACK) | (5, ACK | INVALID)) || (option != 2 && option != 5 && last == TLS_REQUIRED);
            assert!(alone && replies.len() == 1, "something is told before TLS: {replies:?}");
        }
        assert!(option != 5 || tls || last & ERROR != 0, "TLS that there is not");
        for (kind, data) in &replies {
            check_reply(option, *kind, data, name, size);
        }
        match (option, last) {
            (2 | 5, ACK) => return None,
            (7, ACK) => {
                assert!(replies.iter().any(|(kind, data)| *kind == 3 && data[..2] == [0, 0]), "an export without a size");
                return Some(agreed);
            }
            (8, ACK) => agreed.structured = true,
            (10, _) => agreed.allocation = last == ACK && replies.len() == 2,
            _ => {}
        }
    }
}

/// The kinds of answers to an option, and what they hold.
fn option_replies<'a>(said: &mut Bytes<'a>, option: u64) -> Vec<(u32, &'a [u8])> {
    let mut replies = Vec::new();
    loop {
        assert_eq!(said.number(8), Some(0x0003_e889_0455_65a9), "no answer to option {option}");
        assert_eq!(said.number(4), Some(option), "an answer to another option");
        let kind = said.number(4).expect("a kind") as u32;
        let length = said.number(4).expect("a length");
        replies.push((kind, said.take(length as usize).expect("an answer is cut off")));
        if kind == ACK || kind & ERROR != 0 {
            return replies;
        }
    }
}

fn check_reply(option: u64, kind: u32, data: &[u8], name: &str, size: u64) {
    let mut fields = Bytes(data);
    match (option, kind) {
        (_, ACK) => assert!(data.is_empty()),
        (3, 2) => {
            assert_eq!(fields.number(4), Some(name.len() as u64));
            assert_eq!(fields.0, name.as_bytes());
        }
        (6 | 7, 3) => match fields.number(2) {
            Some(0) => assert!(fields.number(8) == Some(size) && fields.0.len() == 2),
            Some(1) => assert_eq!(fields.0, name.as_bytes()),
            Some(3) => assert_eq!(fields.0.len(), 12),
            other => panic!("information of a kind that there is not: {other:?}"),
        },
        (9 | 10, 4) => assert_eq!(&data[4..], b"base:allocation"),
        _ => assert!(kind & ERROR != 0 && std::str::from_utf8(data).is_ok(), "{kind:#x} to option {option}"),
    }
}

/// What an export holds.
#[derive(Debug)]
pub struct Export {
    pub bytes: Vec<u8>,
    pub writable: bool,
    /// Of a write whose end never came: each byte is the old or the new one.
    half: Option<(usize, Vec<u8>)>,
}

struct Asked {
    flags: u64,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u64,
}

impl Export {
    pub const fn new(bytes: Vec<u8>, writable: bool) -> Self {
        Self { bytes, writable, half: None }
    }

    /// Whether it holds these bytes.
    pub fn is(&self, found: &[u8]) -> bool {
        match &self.half {
            None => self.bytes == found,
            Some((at, new)) => {
                let end = at + new.len();
                let either = (*at..end).all(|place| found[place] == self.bytes[place] || found[place] == new[place - at]);
                either && found[..*at] == self.bytes[..*at] && found[end..] == self.bytes[end..]
            }
        }
    }

    /// Follows the requests of a client and what is said to each.
    ///
    /// # Panics
    /// When an answer is not well-formed, not of the request, or tells something else than the export holds.
    pub fn check(&mut self, agreed: Agreed, client: &[u8], replies: &[u8]) {
        let (mut client, mut replies) = (Bytes(client), Bytes(replies));
        while let Some(asked) = next_request(&mut client) {
            let range = self.range(&asked);
            let mut payload = &[][..];
            if asked.command == WRITE {
                if asked.length > 32 << 20 {
                    break;
                }
                let Some(data) = client.take(asked.length as usize) else {
                    if let Some(range) = range.filter(|_| self.writable) {
                        self.half = Some((range.start, client.0.to_vec()));
                    }
                    break;
                };
                payload = data;
            }
            let error = if agreed.structured && matches!(asked.command, READ | STATUS) {
                self.chunks(&asked, range.as_ref(), &mut replies)
            } else {
                self.simple(&asked, range.as_ref(), &mut replies)
            };
            self.judge(&asked, agreed, range.is_some(), error);
            if let (0, Some(range)) = (error, range) {
                match asked.command {
                    WRITE => self.bytes[range].copy_from_slice(payload),
                    TRIM | ZEROES => self.bytes[range].fill(0),
                    _ => {}
                }
            }
        }
        assert!(replies.0.is_empty(), "{} bytes that nobody asked for", replies.0.len());
    }

    fn range(&self, asked: &Asked) -> Option<Range<usize>> {
        let end = asked.offset.checked_add(asked.length).filter(|end| *end <= self.bytes.len() as u64)?;
        Some(asked.offset as usize..end as usize)
    }

    /// Whether it had to fail, or must not.
    fn judge(&self, asked: &Asked, agreed: Agreed, inside: bool, error: u64) {
        let Asked { flags, command, length, .. } = *asked;
        let writes = matches!(command, WRITE | TRIM | ZEROES);
        let known = writes || matches!(command, READ | FLUSH) || (command == STATUS && agreed.allocation);
        let refused = !known || (writes && !self.writable) || (command != FLUSH && !inside);
        assert!(!refused || error != 0, "{command} is done, which cannot be");
        let empty = length == 0 && (command == STATUS || (command == FLUSH && asked.offset != 0));
        let plain = flags & !1 == 0 && !empty && (command != FLUSH || length == 0);
        assert!(refused || !plain || error == 0, "{command} fails with {error}");
        assert!([0, 1, 22, 28, 75].contains(&error), "{command} fails with {error}");
    }

    fn simple(&self, asked: &Asked, range: Option<&Range<usize>>, replies: &mut Bytes) -> u64 {
        assert_eq!(replies.number(4), Some(0x6744_6698), "no simple reply to {}", asked.command);
        let error = replies.number(4).expect("a number");
        assert_eq!(replies.number(8), Some(asked.cookie), "an answer to something else");
        if let (READ, 0, Some(range)) = (asked.command, error, range) {
            assert!(replies.take(range.len()) == Some(&self.bytes[range.clone()]), "something else is read than was written");
        }
        error
    }

    /// A structured reply.
    fn chunks(&self, asked: &Asked, range: Option<&Range<usize>>, replies: &mut Bytes) -> u64 {
        let (mut error, mut came) = (0, Vec::new());
        loop {
            assert_eq!(replies.number(4), Some(0x668e_33ef), "no structured reply to {}", asked.command);
            let (flags, kind) = (replies.number(2).expect("flags"), replies.number(2).expect("a kind"));
            assert_eq!(replies.number(8), Some(asked.cookie), "an answer to something else");
            let length = replies.number(4).expect("a length");
            let mut data = Bytes(replies.take(length as usize).expect("a chunk is cut off"));
            match (asked.command, kind) {
                (_, 0) => assert!(flags & 1 == 1 && length == 0),
                (READ, 1 | 2) => {
                    let at = data.number(8).expect("an offset") as usize;
                    let count = if kind == 2 { data.number(4).expect("a length") as usize } else { data.0.len() };
                    let expected = self.bytes.get(at..at + count).expect("it lies outside of the export");
                    assert!(count > 0 && range.is_some_and(|range| range.start <= at && at + count <= range.end), "nobody asked for that");
                    let same = if kind == 2 { data.0.is_empty() && is_zero(expected) } else { data.0 == expected };
                    assert!(same, "something else is read than was written");
                    came.push(at..at + count);
                }
                (STATUS, 5) => {
                    self.status(asked, range.expect("a status of what is not there").clone(), data);
                    came.push(0..0);
                }
                (_, 0x8001) => {
                    error = data.number(4).expect("a number");
                    assert!(error != 0 && data.number(2) == Some(data.0.len() as u64));
                }
                other => panic!("a chunk of a kind that there is not: {other:?}"),
            }
            if flags & 1 == 1 {
                break;
            }
        }
        if let (READ, 0, Some(range)) = (asked.command, error, range) {
            assert!(asked.flags & 4 == 0 || came.len() <= 1, "it was to come in one piece");
            came.sort_by_key(|piece| piece.start);
            let end = came.iter().fold(range.start, |end, piece| if piece.start == end { piece.end } else { usize::MAX });
            assert_eq!(end, range.end, "not every byte came once");
        }
        assert!(asked.command == READ || error != 0 || came.len() == 1, "no block status");
        error
    }

    fn status(&self, asked: &Asked, range: Range<usize>, mut data: Bytes) {
        assert_eq!(data.number(4), Some(1), "a context that was not agreed on");
        let mut at = range.start;
        let mut count = 0;
        while let (Some(length), Some(state)) = (data.number(4), data.number(4)) {
            let end = at + length as usize;
            assert!(length > 0 && end <= range.end && state <= 3, "an extent of nothing, or outside");
            assert!(state & 2 == 0 || is_zero(&self.bytes[at..end]), "a hole where something was written");
            at = end;
            count += 1;
        }
        assert!(data.0.is_empty() && count > 0 && (asked.flags & 8 == 0 || count == 1));
    }
}

fn next_request(client: &mut Bytes) -> Option<Asked> {
    let mut fields = Bytes(client.take(28)?);
    if fields.number(4)? != u64::from(REQUEST_MAGIC) {
        return None;
    }
    let (flags, command) = (fields.number(2)?, fields.number(2)? as u16);
    let asked = Asked { flags, command, cookie: fields.number(8)?, offset: fields.number(8)?, length: fields.number(4)? };
    (command != DISC).then_some(asked)
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}
