//! Netlink messages as bytes (netlink(7), rtnetlink(7)). No I/O.

pub const REQUEST: u16 = 1;
pub const ACK: u16 = 4;
pub const DUMP: u16 = 0x300;
/// `NLM_F_CREATE | NLM_F_REPLACE`
pub const CREATE_OR_REPLACE: u16 = 0x500;

pub const TYPE_ERROR: u16 = 2;
pub const TYPE_DONE: u16 = 3;

const HEADER: usize = 16;

/// Rounds up to the alignment of netlink.
const fn aligned(length: usize) -> usize {
    (length + 3) & !3
}

/// A message being put together.
pub struct Builder(Vec<u8>);

impl Builder {
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    /// Adds an attribute; `value` is far below the 64 KiB that would not fit.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.resize(aligned(self.0.len()), 0);
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.0.resize(aligned(self.0.len()), 0);
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        if let Some(field) = self.0.first_chunk_mut::<4>() {
            *field = length.to_ne_bytes();
        }
        self.0
    }
}

/// A message that came in.
#[derive(Debug, PartialEq, Eq)]
pub struct Message<'a> {
    pub kind: u16,
    pub payload: &'a [u8],
}

/// The messages of one datagram; stops at the first that does not fit.
pub fn messages(mut bytes: &[u8]) -> Vec<Message<'_>> {
    let mut found = Vec::new();
    while let (Some(length), Some(kind)) = (u32_at(bytes, 0), u16_at(bytes, 4)) {
        let length = length as usize;
        let Some(payload) = bytes.get(HEADER..length) else { break };
        found.push(Message { kind, payload });
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
    }
    found
}

/// The attributes behind the fixed part of a payload; stops at the first that does not fit.
pub fn attributes(payload: &[u8], fixed: usize) -> Vec<(u16, &[u8])> {
    let mut rest = payload.get(aligned(fixed)..).unwrap_or_default();
    let mut found = Vec::new();
    while let (Some(length), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let length = usize::from(length);
        let Some(value) = rest.get(4..length) else { break };
        // The upper two bits say how it is nested and ordered.
        found.push((kind & 0x3fff, value));
        rest = rest.get(aligned(length)..).unwrap_or_default();
    }
    found
}

pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|field| u16::from_ne_bytes(*field))
}

pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|field| u32::from_ne_bytes(*field))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_can_be_read() {
        let one =
            Builder::new(20, REQUEST | ACK, &[2, 24, 0, 0, 7, 0, 0, 0]).attribute(3, b"eth0\0").attribute(4, &9_u32.to_ne_bytes()).finish();
        assert_eq!(one.len() % 4, 0);
        let two = Builder::new(TYPE_DONE, 0, &[0; 4]).finish();
        let datagram = [one, two].concat();
        let found = messages(&datagram);
        assert_eq!(found.iter().map(|message| message.kind).collect::<Vec<_>>(), [20, TYPE_DONE]);
        assert_eq!(attributes(found[0].payload, 8), [(3, &b"eth0\0"[..]), (4, &9_u32.to_ne_bytes()[..])]);
    }

    #[test]
    fn rubbish_ends_the_reading() {
        for bytes in [&[][..], &[1, 0, 0, 0], &[255; 40], &[0; 64]] {
            // A length of zero would otherwise never end.
            assert!(messages(bytes).len() <= 4, "{bytes:?}");
            assert!(attributes(bytes, 0).len() <= 16);
        }
    }
}
