//! The smallest guest: a PVH kernel of eighteen instructions that says one line on the serial port. With five more it uses all its memory first,
//! and with five others it goes on and says dots.
//!
//! PVH enters it in 32-bit protected mode with flat segments and without paging (Xen: docs/misc/pvh.pandoc). Nobody has to stop
//! it: half a minute after its line its timer fires, and because it has no interrupt table that resets the VM.

/// What it says.
pub const LINE: &str = "first guest instruction";

/// Where it is loaded and entered, in guest memory.
const BASE: u32 = 0x10_0000;

const CODE: &[u8] = &[
    0xBE, 0x00, 0x00, 0x00, 0x00, // mov esi, the message
    0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3F8          ; the first serial port's data register
    0xAC, // next: lodsb                              ; a character
    0x84, 0xC0, // test al, al
    0x74, 0x03, // jz done                            ; the line's end
    0xEE, // out dx, al
    0xEB, 0xF8, // jmp next
    0xBF, 0x00, 0x00, 0xE0, 0xFE, // done: mov edi, 0xFEE00000   ; the local APIC
    0xC7, 0x87, 0xF0, 0x00, 0x00, 0x00, 0xFF, 0x01, 0x00, 0x00, // mov dword [edi+0xF0], 0x1FF   ; enabled
    0xC7, 0x87, 0xE0, 0x03, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, // mov dword [edi+0x3E0], 2      ; its clock divided by 8
    0xC7, 0x87, 0x20, 0x03, 0x00, 0x00, 0x20, 0x00, 0x00, 0x00, // mov dword [edi+0x320], 0x20   ; timer: once, vector 0x20
    0xC7, 0x87, 0x80, 0x03, 0x00, 0x00, 0xFF, 0xFF, 0xFF, 0xFF, // mov dword [edi+0x380], -1     ; counting starts
    0xB0, 0xFF, // mov al, 0xFF
    0xE6, 0x21, // out 0x21, al         ; nothing from the two 8259: a restored VM is told that it is one (VMGenID)
    0xE6, 0xA1, // out 0xA1, al
    0xFB, // sti
    0xF4, // wait: hlt
    0xEB, 0xFD, // jmp wait
];

/// How the code above ends: it waits for its timer.
const WAIT: &[u8] = &[0xF4, 0xEB, 0xFD];

/// What the guest says instead of waiting, again and again.
pub const TICK: &str = ".";

const TICKING: &[u8] = &[
    0xB9, 0x00, 0x00, 0x01, 0x00, // tick: mov ecx, 0x10000
    0x49, // next: dec ecx
    0x75, 0xFD, // jnz next
    0xB0, b'.', // mov al, '.'
    0xEE, // out dx, al
    0xEB, 0xF3, // jmp tick
];

/// Writes a word to each page from 2 MiB on, up to the address that follows at [`TOUCH_END`].
const TOUCH: &[u8] = &[
    0xBF, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
    0x89, 0x3F, // next: mov [edi], edi
    0x81, 0xC7, 0x00, 0x10, 0x00, 0x00, // add edi, 0x1000
    0x81, 0xFF, 0x00, 0x00, 0x00, 0x00, // cmp edi, the end
    0x72, 0xF0, // jb next
];
const TOUCH_END: usize = 15;

/// `XEN_ELFNOTE_PHYS32_ENTRY`: its descriptor is the address of the entry.
const ENTRY_NOTE: u32 = 18;

const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;

/// The instructions. With `touch` they begin with a write to each page below that address, in bytes; with `ticks` they end with saying [`TICK`].
fn code(touch: Option<u32>, ticks: bool) -> Vec<u8> {
    let mut code = Vec::new();
    if let Some(end) = touch {
        code.extend_from_slice(TOUCH);
        code[TOUCH_END..TOUCH_END + 4].copy_from_slice(&end.to_le_bytes());
    }
    let begin = code.len();
    code.extend_from_slice(CODE);
    if ticks {
        code.truncate(code.len() - WAIT.len());
        code.extend_from_slice(TICKING);
    }
    let message = BASE + u32::try_from(code.len()).unwrap_or(u32::MAX);
    code[begin + 1..begin + 5].copy_from_slice(&message.to_le_bytes());
    code
}

/// The program as an ELF file (System V ABI, chapters 4 and 5): one segment to load, one note. With `touch` it writes to each page of memory
/// below that address before it says its line; with `ticks` it goes on and says [`TICK`].
pub fn elf(touch: Option<u32>, ticks: bool) -> Vec<u8> {
    let mut content = code(touch, ticks);
    content.extend_from_slice(LINE.as_bytes());
    content.extend_from_slice(b"\n\0");
    content.resize(content.len().next_multiple_of(4), 0);
    let mut note = Vec::new();
    for word in [4, 8, ENTRY_NOTE] {
        note.extend_from_slice(&u32::to_le_bytes(word));
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&u64::from(BASE).to_le_bytes());

    let content_at = ELF_HEADER + 2 * PROGRAM_HEADER;
    let note_at = content_at + content.len() as u64;
    // 64 bits, little-endian, version 1; an executable for x86-64.
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3E\0\x01\0\0\0".to_vec();
    // Entry, program headers, section headers.
    for word in [u64::from(BASE), ELF_HEADER, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(&0_u32.to_le_bytes());
    // Sizes and counts: this header, program headers, section headers.
    for half in [ELF_HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    // PT_LOAD, readable and executable; PT_NOTE, readable.
    file.extend(program_header([1, 5], content_at, u64::from(BASE), content.len() as u64));
    file.extend(program_header([4, 4], note_at, 0, note.len() as u64));
    file.extend(content);
    file.extend(note);
    file
}

fn program_header(kind_and_flags: [u32; 2], offset: u64, address: u64, size: u64) -> Vec<u8> {
    let mut header = kind_and_flags.map(u32::to_le_bytes).concat();
    for word in [offset, address, address, size, size, 4] {
        header.extend_from_slice(&word.to_le_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_points_at_its_message() {
        for (touch, begin) in [(None, 0), (Some(0x8000_0000), TOUCH.len())] {
            let code = code(touch, false);
            let address = u32::from_le_bytes(code[begin + 1..begin + 5].try_into().unwrap());
            assert_eq!((address - BASE) as usize, code.len());
            let file = elf(touch, false);
            let at = (ELF_HEADER + 2 * PROGRAM_HEADER) as usize + code.len();
            assert_eq!(&file[at..at + LINE.len() + 2], format!("{LINE}\n\0").as_bytes());
        }
        // The loop ends where it should, and leads back to its first instruction.
        let touching = code(Some(0x8000_0000), false);
        assert_eq!(touching[TOUCH_END - 2..TOUCH_END + 4], [0x81, 0xFF, 0, 0, 0, 0x80]);
        assert_eq!(TOUCH.len() as i8 + touching[TOUCH.len() - 1] as i8, 5);
        assert!(CODE.ends_with(WAIT), "what is left out where it ticks");
        assert_eq!(TICKING.len() as i8 + TICKING[TICKING.len() - 1] as i8, 0);
        assert!(code(None, true).ends_with(TICKING) && !code(None, true).contains(&0xF4));
    }

    #[test]
    fn the_headers_lead_to_code_and_note() {
        let file = elf(None, false);
        let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
        assert_eq!((word(24), word(32)), (BASE as usize, 64));
        let (load, note) = (64, 64 + 56);
        assert_eq!(file[word(load + 8)..][..CODE.len()], code(None, false));
        assert_eq!((word(load + 16), word(load + 32)), (BASE as usize, word(note + 8) - word(load + 8)));
        assert_eq!(word(note + 8) + word(note + 32), file.len());
        assert_eq!(word(word(note + 8) + 16), BASE as usize);
    }
}
