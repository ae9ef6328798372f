//! Kernels for VMs that run nothing of Formation's: a program of a few instructions, and Linux with an initrd of busybox.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

/// What [`smallest`] says on the serial console.
pub const LINE: &str = "nothing but a kernel";

/// Where it is loaded and entered, in guest memory.
const BASE: u32 = 0x10_0000;

/// PVH enters it in 32-bit protected mode without paging (Xen: docs/misc/pvh.pandoc). With interrupts off nothing ever wakes its one vCPU: it costs
/// no time of a processor.
const CODE: [u8; 23] = [
    0xBE, 0x17, 0x00, 0x10, 0x00, // mov esi, the message     ; BASE and the length of this
    0x66, 0xBA, 0xF8, 0x03, // mov dx, 0x3F8                  ; the first serial port's data register
    0xAC, // next: lodsb
    0x84, 0xC0, // test al, al
    0x74, 0x03, // jz done                                    ; the line's end
    0xEE, // out dx, al
    0xEB, 0xF8, // jmp next
    0xFA, // done: cli
    0xF4, // wait: hlt
    0xEB, 0xFD, // jmp wait
    0x90, 0x90, // nop, nop
];

/// An ELF file (System V ABI, chapters 4 and 5) with one segment to load and the note that says where it is entered.
pub fn smallest() -> Vec<u8> {
    let mut content = CODE.to_vec();
    content.extend_from_slice(LINE.as_bytes());
    content.extend_from_slice(b"\n\0");
    content.resize(content.len().next_multiple_of(4), 0);
    // `XEN_ELFNOTE_PHYS32_ENTRY`
    let mut note: Vec<u8> = [4_u32, 8, 18].into_iter().flat_map(u32::to_le_bytes).collect();
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&u64::from(BASE).to_le_bytes());

    let (content_at, base) = (64 + 2 * 56_u64, u64::from(BASE));
    let note_at = content_at + content.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3E\0\x01\0\0\0".to_vec();
    file.extend([base, 64, 0].into_iter().flat_map(u64::to_le_bytes));
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 2, 0, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    for (kind, offset, address, length) in [(1_u32, content_at, base, content.len()), (4, note_at, 0, note.len())] {
        // Readable and executable.
        file.extend([kind, 5].into_iter().flat_map(u32::to_le_bytes));
        file.extend([offset, address, address, length as u64, length as u64, 4].into_iter().flat_map(u64::to_le_bytes));
    }
    file.extend(content);
    file.extend(note);
    file
}

/// The kernel of the bundle that `FORM_TEST_KERNEL` names.
///
/// # Panics
/// Without it: `make test-system` sets it.
pub fn linux() -> PathBuf {
    std::env::var_os("FORM_TEST_KERNEL").expect("FORM_TEST_KERNEL names a vmlinux; run `make test-system`").into()
}

/// An initrd for [`linux`]: busybox, the modules that guests load, and `init`, a script of what comes after they are loaded.
///
/// # Panics
/// When a file cannot be read.
pub fn initrd(init: &str) -> Vec<u8> {
    let directory = linux().parent().unwrap().to_owned();
    let manifest: Value = serde_json::from_slice(&fs::read(directory.join("kernel.json")).unwrap()).unwrap();
    let order: Vec<&str> = manifest["sets"]["guest"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let script = format!(
        "#!/bin/busybox sh\nPATH=/bin\nbusybox mount -t devtmpfs none /dev\nbusybox mount -t proc none /proc\nbusybox mount -t sysfs none /sys\n\
         for module in {}; do busybox insmod /$module.ko; done\n{init}\n",
        order.join(" ")
    );
    let mut archive = Vec::new();
    for name in ["bin", "dev", "proc", "sys"] {
        entry(&mut archive, name, 0o040_755, &[]);
    }
    entry(&mut archive, "bin/busybox", 0o100_755, &fs::read("/bin/busybox").unwrap());
    for module in &order {
        entry(&mut archive, &format!("{module}.ko"), 0o100_644, &module_file(&directory, module));
    }
    entry(&mut archive, "init", 0o100_755, script.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}

fn module_file(directory: &Path, module: &str) -> Vec<u8> {
    fs::read(directory.join("modules").join(format!("{module}.ko"))).unwrap()
}

/// One file of an archive in the format `newc` (cpio(5)).
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let inode = u32::try_from(archive.len()).unwrap();
    let (length, name_length) = (u32::try_from(content.len()).unwrap(), u32::try_from(name.len() + 1).unwrap());
    let numbers = [inode, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_length, 0];
    archive.extend_from_slice(b"070701");
    archive.extend(numbers.iter().flat_map(|number| format!("{number:08X}").into_bytes()));
    for part in [[name.as_bytes(), b"\0"].concat(), content.to_vec()] {
        archive.extend(part);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_points_at_its_message() {
        let address = u32::from_le_bytes(CODE[1..5].try_into().unwrap());
        assert_eq!(address as usize, BASE as usize + CODE.len());
        let file = smallest();
        let at = 64 + 2 * 56 + CODE.len();
        assert_eq!(&file[at..at + LINE.len() + 2], format!("{LINE}\n\0").as_bytes());
    }
}
