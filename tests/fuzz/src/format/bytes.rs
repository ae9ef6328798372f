//! Alterations of encoded bytes.

use arbitrary::Arbitrary;

/// One alteration. Places are taken modulo the length.
#[derive(Arbitrary, Debug)]
pub enum Edit<'a> {
    Flip {
        at: u16,
        bit: u8,
    },
    Set {
        at: u16,
        value: u8,
    },
    /// A little-endian number over what is there.
    Number {
        at: u16,
        value: u64,
    },
    Insert {
        at: u16,
        bytes: &'a [u8],
    },
    Remove {
        at: u16,
        count: u8,
    },
    Copy {
        from: u16,
        count: u8,
        to: u16,
    },
    Cut {
        at: u16,
    },
}

/// The most alterations of one input: with more of them nothing of the sound input would be left.
const MAX_EDITS: usize = 16;

/// Makes these alterations, in their order.
pub fn alter(bytes: &mut Vec<u8>, edits: &[Edit]) {
    for edit in edits.iter().take(MAX_EDITS) {
        if bytes.is_empty() {
            bytes.push(0);
        }
        alter_once(bytes, edit);
    }
}

fn alter_once(bytes: &mut Vec<u8>, edit: &Edit) {
    let length = bytes.len();
    let place = |at: u16| usize::from(at) % length;
    match edit {
        Edit::Flip { at, bit } => bytes[place(*at)] ^= 1 << (bit % 8),
        Edit::Set { at, value } => bytes[place(*at)] = *value,
        Edit::Number { at, value } => {
            let at = place(*at);
            let end = (at + 8).min(length);
            bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        }
        Edit::Insert { at, bytes: more } => _ = bytes.splice(place(*at)..place(*at), more.iter().copied()),
        Edit::Remove { at, count } => {
            let at = place(*at);
            bytes.drain(at..(at + usize::from(*count)).min(length));
        }
        Edit::Copy { from, count, to } => {
            let from = place(*from);
            let piece = bytes[from..(from + usize::from(*count)).min(length)].to_vec();
            let to = place(*to);
            bytes.splice(to..to, piece);
        }
        Edit::Cut { at } => bytes.truncate(place(*at)),
    }
}
