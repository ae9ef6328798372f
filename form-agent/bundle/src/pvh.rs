//! Whether a kernel can be entered as our VMM enters it: by the PVH entry, which a note in its ELF file names
//! (Xen, `docs/misc/pvh.pandoc`; Linux, `arch/x86/platform/pvh`).

use std::io::BufRead;

/// For who has a kernel that cannot be started.
pub const WHAT_TO_DO: &str =
    "give an uncompressed vmlinux that was made with CONFIG_PVH=y; Linux's `scripts/extract-vmlinux` takes it out of a bzImage";

/// `XEN_ELFNOTE_PHYS32_ENTRY`
const PHYS32_ENTRY: u64 = 18;
const PT_NOTE: u64 = 4;
/// `__NEW_UTS_LEN` of Linux.
const MAX_RELEASE: usize = 64;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let part = bytes.get(at..at.checked_add(N)?)?;
    Some(part.iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte)))
}

fn size<const N: usize>(bytes: &[u8], at: usize) -> Option<usize> {
    number::<N>(bytes, at).and_then(|value| usize::try_from(value).ok())
}

/// Whether a 64-bit ELF kernel for x86 has a PVH entry.
pub fn has_entry(kernel: &[u8]) -> bool {
    // Class 64, little-endian, machine x86-64.
    if !kernel.starts_with(b"\x7fELF\x02\x01") || number::<2>(kernel, 18) != Some(62) || kernel.len() < HEADER {
        return false;
    }
    let (Some(table), Some(length), Some(count)) = (size::<8>(kernel, 32), size::<2>(kernel, 54), size::<2>(kernel, 56)) else {
        return false;
    };
    length >= PROGRAM_HEADER
        && (0..count).any(|index| {
            let header = index.checked_mul(length).and_then(|offset| table.checked_add(offset));
            header.and_then(|header| notes(kernel, header)).is_some_and(has_note)
        })
}

/// The notes that a program header leads to.
fn notes(kernel: &[u8], header: usize) -> Option<&[u8]> {
    if number::<4>(kernel, header)? != PT_NOTE {
        return None;
    }
    let begin = size::<8>(kernel, header.checked_add(8)?)?;
    let length = size::<8>(kernel, header.checked_add(32)?)?;
    kernel.get(begin..begin.checked_add(length)?)
}

fn has_note(mut notes: &[u8]) -> bool {
    while let (Some(name), Some(content), Some(kind)) = (size::<4>(notes, 0), size::<4>(notes, 4), number::<4>(notes, 8)) {
        if kind == PHYS32_ENTRY && notes.get(12..16) == Some(b"Xen\0") && name == 4 && content >= 4 {
            return true;
        }
        let next = name.checked_next_multiple_of(4).zip(content.checked_next_multiple_of(4));
        let next = next.and_then(|(name, content)| 12_usize.checked_add(name)?.checked_add(content));
        match next.and_then(|next| notes.get(next..)) {
            Some(rest) => notes = rest,
            None => return false,
        }
    }
    false
}

/// As `uname -r` would print it, from the text that Linux has of itself; none of a kernel that is no Linux.
pub fn release(kernel: &[u8]) -> Option<String> {
    const AFTER_FIRST: &[u8] = b"inux version ";
    let mut rest = kernel;
    while rest.skip_until(b'L').ok()? > 0 {
        let Some(text) = rest.strip_prefix(AFTER_FIRST) else { continue };
        let length = text.iter().take(MAX_RELEASE + 1).take_while(|byte| byte.is_ascii_graphic()).count();
        if (1..=MAX_RELEASE).contains(&length) && text[0].is_ascii_digit() {
            return Some(String::from_utf8_lossy(&text[..length]).into_owned());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest kernel with notes: of this type.
    fn kernel(note: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER + PROGRAM_HEADER];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = 4;
        bytes[72] = 120;
        bytes[96] = 20 + 20;
        for kind in [6, note] {
            for word in [4_u32, 4, kind] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            bytes.extend_from_slice(b"Xen\0abcd");
        }
        bytes
    }

    #[test]
    fn the_note_is_found_behind_others() {
        assert!(has_entry(&kernel(18)));
        assert!(!has_entry(&kernel(17)));
        for short in 0..kernel(18).len() {
            assert!(!has_entry(&kernel(18)[..short]), "{short}");
        }
    }

    #[test]
    fn a_linux_says_its_release() {
        assert_eq!(release(b"..Linux version %s..Linux version 6.1.0-31-cloud-amd64 (debian)").as_deref(), Some("6.1.0-31-cloud-amd64"));
        assert_eq!(release(b"Linux version 6").as_deref(), Some("6"));
        for none in [b"".as_slice(), b"Linux version ", b"Linux version x", &[b"Linux version 6".as_slice(), &[b'1'; 65]].concat()] {
            assert_eq!(release(none), None);
        }
    }

    #[test]
    fn nothing_makes_it_panic() {
        for (one, other) in (0..160).flat_map(|one| (one..160).map(move |other| (one, other))) {
            for value in [0, 1, 0x7F, 0x80, 0xFF] {
                let mut bytes = kernel(17);
                (bytes[one], bytes[other]) = (value, value);
                let _ = has_entry(&bytes);
            }
        }
    }
}
