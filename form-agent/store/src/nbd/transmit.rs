//! The transmission phase: one request after the other, answered in the order in which they come.

use std::io::{self, Read, Write};

use form_nbd::wire::{
    self, CHUNK_HEAD_BYTES, Command, Failure, MAX_PAYLOAD, Request, STATE_HOLE, STATE_ZERO, Terms, chunk, chunk_head, simple_reply,
};

use super::negotiate::ALLOCATION_ID;
use crate::contents::Contents;

/// Data passes through one buffer of this size for each connection, however much a client asks for.
const PIECE: usize = 256 * 1024;

/// Before the data in the buffer: the head of a chunk, and an offset.
const HEAD: usize = CHUNK_HEAD_BYTES + 8;

/// The most extents that one block status tells of; a client asks again for the rest.
const MAX_EXTENTS: usize = 1024;

/// Serves a client until it leaves.
///
/// # Errors
/// When the connection breaks, or the client sends what is no request.
pub fn transmit<S: Read + Write>(stream: S, contents: &Contents, terms: Terms) -> io::Result<()> {
    let mut client = Client { stream, contents, terms, buffer: vec![0; HEAD + PIECE] };
    loop {
        let mut head = [0; Request::BYTES];
        match client.stream.read_exact(&mut head) {
            // Some clients just go.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        let request = Request::parse(&head).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no NBD request"))?;
        if !client.answer(&request)? {
            return Ok(());
        }
    }
}

struct Client<'a, S> {
    stream: S,
    contents: &'a Contents,
    terms: Terms,
    buffer: Vec<u8>,
}

impl<S: Read + Write> Client<'_, S> {
    /// Whether another request may follow.
    fn answer(&mut self, request: &Request) -> io::Result<bool> {
        let command = request.check(&self.terms);
        if request.has_payload() {
            let result = self.take_payload(request, command)?;
            return self.done(request, result).map(|()| true);
        }
        let (from, length) = (request.offset, u64::from(request.length));
        let contents = self.contents;
        let result = match command {
            Ok(Command::Disconnect) => return Ok(false),
            Ok(Command::Read { whole }) => return self.read(request, whole).map(|()| true),
            Ok(Command::BlockStatus { one }) => return self.block_status(request, one).map(|()| true),
            Ok(Command::Flush) => contents.flush().map_err(|error| failure(&error)),
            Ok(Command::Trim { durable }) => self.changed(contents.discard(from, length), durable),
            Ok(Command::WriteZeroes { durable, keep_room }) => self.changed(contents.write_zeroes(from, length, keep_room), durable),
            // It has a payload.
            Ok(Command::Write { .. }) => Err(Failure::Invalid),
            Err(failure) => Err(failure),
        };
        self.done(request, result).map(|()| true)
    }

    fn changed(&self, result: io::Result<()>, durable: bool) -> Result<(), Failure> {
        result.and_then(|()| if durable { self.contents.flush() } else { Ok(()) }).map_err(|error| failure(&error))
    }

    /// The answer to everything that gives back no data. A read that fails with structured replies has a chunk for that instead.
    fn done(&mut self, request: &Request, result: Result<(), Failure>) -> io::Result<()> {
        let structured = self.terms.structured && matches!(request.command, wire::command::READ | wire::command::BLOCK_STATUS);
        match result {
            Err(failure) if structured => {
                let mut bytes = chunk_head(request.cookie, true, chunk::ERROR, 6).to_vec();
                bytes.extend((failure as u32).to_be_bytes());
                // No message.
                bytes.extend([0; 2]);
                self.stream.write_all(&bytes)
            }
            result => self.stream.write_all(&simple_reply(request.cookie, result.err())),
        }
    }

    /// Takes the data of a write, whether it can be written or not: the next request is behind it.
    fn take_payload(&mut self, request: &Request, command: Result<Command, Failure>) -> io::Result<Result<(), Failure>> {
        if request.length > MAX_PAYLOAD {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a write is longer than was agreed"));
        }
        let mut result = command.map(drop);
        let mut at = request.offset;
        let mut left = request.length as usize;
        while left > 0 {
            let piece = &mut self.buffer[..left.min(PIECE)];
            self.stream.read_exact(piece)?;
            if result.is_ok() {
                result = self.contents.write_at(piece, at).map_err(|error| failure(&error));
            }
            // What does not fit in a number is refused already.
            at = at.saturating_add(piece.len() as u64);
            left -= piece.len();
        }
        if result.is_ok() && command == Ok(Command::Write { durable: true }) {
            result = self.contents.flush().map_err(|error| failure(&error));
        }
        Ok(result)
    }

    fn read(&mut self, request: &Request, whole: bool) -> io::Result<()> {
        let too_long_for_one = whole && request.length as usize > PIECE;
        match (too_long_for_one, self.terms.structured) {
            (true, _) => self.done(request, Err(Failure::Overflow)),
            (false, true) => self.read_in_chunks(request, whole),
            (false, false) => self.read_in_one(request),
        }
    }

    /// A simple reply: once it has begun there is no way to say that the rest cannot be read, but to hang up.
    fn read_in_one(&mut self, request: &Request) -> io::Result<()> {
        let head = simple_reply(request.cookie, None);
        let (mut at, end) = (request.offset, request.offset + u64::from(request.length));
        let mut lead = head.len();
        loop {
            let count = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            if let Err(error) = self.contents.read_at(&mut self.buffer[HEAD..HEAD + count], at) {
                return if lead > 0 { self.done(request, Err(failure(&error))) } else { Err(error) };
            }
            self.buffer[HEAD - lead..HEAD].copy_from_slice(&head[..lead]);
            self.stream.write_all(&self.buffer[HEAD - lead..HEAD + count])?;
            lead = 0;
            at += count as u64;
            if at == end {
                return Ok(());
            }
        }
    }

    /// A structured reply: holes are told of, not sent.
    fn read_in_chunks(&mut self, request: &Request, whole: bool) -> io::Result<()> {
        let (mut at, end) = (request.offset, request.offset + u64::from(request.length));
        if at == end {
            return self.stream.write_all(&chunk_head(request.cookie, true, chunk::NONE, 0));
        }
        while at < end {
            let extent = match self.contents.extent(at, end - at) {
                Ok(extent) => extent,
                Err(error) => return self.done(request, Err(failure(&error))),
            };
            // In one chunk there cannot be both.
            let is_hole = extent.is_hole && (!whole || extent.length == end - at);
            let length = if whole { end - at } else { extent.length };
            if is_hole {
                // No longer than what was asked for.
                let length = u32::try_from(length).unwrap_or(u32::MAX);
                let mut bytes = chunk_head(request.cookie, at + u64::from(length) == end, chunk::OFFSET_HOLE, 12).to_vec();
                bytes.extend(at.to_be_bytes());
                bytes.extend(length.to_be_bytes());
                self.stream.write_all(&bytes)?;
                at += u64::from(length);
                continue;
            }
            let count = usize::try_from(length).unwrap_or(PIECE).min(PIECE);
            if let Err(error) = self.contents.read_at(&mut self.buffer[HEAD..HEAD + count], at) {
                return self.done(request, Err(failure(&error)));
            }
            let next = at + count as u64;
            self.buffer[..CHUNK_HEAD_BYTES].copy_from_slice(&chunk_head(request.cookie, next == end, chunk::OFFSET_DATA, count as u32 + 8));
            self.buffer[CHUNK_HEAD_BYTES..HEAD].copy_from_slice(&at.to_be_bytes());
            self.stream.write_all(&self.buffer[..HEAD + count])?;
            at = next;
        }
        Ok(())
    }

    fn block_status(&mut self, request: &Request, one: bool) -> io::Result<()> {
        let (mut at, end) = (request.offset, request.offset + u64::from(request.length));
        let mut found: Vec<(u32, u32)> = Vec::new();
        while at < end && found.len() < MAX_EXTENTS {
            let extent = match self.contents.extent(at, end - at) {
                Ok(extent) => extent,
                Err(error) => return self.done(request, Err(failure(&error))),
            };
            let state = if extent.is_hole { STATE_HOLE | STATE_ZERO } else { 0 };
            // No longer than what was asked for.
            let length = u32::try_from(extent.length).unwrap_or(u32::MAX);
            match found.last_mut() {
                Some((last, same)) if *same == state => *last = last.saturating_add(length),
                Some(_) if one => break,
                _ => found.push((length, state)),
            }
            at += u64::from(length);
        }
        let mut bytes = chunk_head(request.cookie, true, chunk::BLOCK_STATUS, 4 + 8 * found.len() as u32).to_vec();
        bytes.extend(ALLOCATION_ID.to_be_bytes());
        for (length, state) in found {
            bytes.extend(length.to_be_bytes());
            bytes.extend(state.to_be_bytes());
        }
        self.stream.write_all(&bytes)
    }
}

fn failure(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => Failure::NoSpace,
        io::ErrorKind::InvalidInput => Failure::Invalid,
        _ => Failure::Io,
    }
}
