//! What a build reads that somebody else made: tarballs, kernel images, kernel modules.

#![no_main]

use std::{
    io::{Read, Write},
    path::PathBuf,
};

use arbitrary::Arbitrary;
use form_fuzz::format::{Edit, alter};
use form_image::fuzzing::{kernel_image, kernel_module, tar};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Tar {
        root: bool,
        bytes: &'a [u8],
    },
    /// Entries with sound headers.
    Entries {
        entries: Vec<Entry<'a>>,
        root: bool,
        edits: Vec<Edit<'a>>,
    },
    Kernel {
        sectors: u8,
        /// Between the set-up code and the payload.
        gap: u8,
        /// What the header says, when it lies.
        offset: Option<u32>,
        length: Option<u32>,
        payload: Packed<'a>,
        edits: Vec<Edit<'a>>,
    },
    KernelBytes(&'a [u8]),
    Module {
        before: &'a [u8],
        depends: &'a str,
        after: &'a [u8],
        packed: Compression,
        edits: Vec<Edit<'a>>,
    },
}

/// How a kernel or a module is compressed.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
    Lz4,
}

#[derive(Arbitrary, Debug)]
struct Packed<'a> {
    is_elf: bool,
    content: &'a [u8],
    repeat: u8,
    compression: Compression,
    edits: Vec<Edit<'a>>,
}

#[derive(Arbitrary, Debug)]
struct Entry<'a> {
    kind: u8,
    name: Name<'a>,
    link: Name<'a>,
    mode: u32,
    ids: [u32; 2],
    size: Option<u32>,
    device: [u8; 2],
    /// Records of an extension header before it.
    records: Vec<Record<'a>>,
    /// Its name in a GNU extension before it.
    long: Option<(bool, Name<'a>)>,
    content: &'a [u8],
}

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    /// One of a few, so that entries meet.
    Known(u8),
    Below(u8, &'a [u8]),
    Bytes(&'a [u8]),
}

#[derive(Arbitrary, Debug)]
struct Record<'a> {
    key: u8,
    value: Value<'a>,
    length: Option<u16>,
}

#[derive(Arbitrary, Debug)]
enum Value<'a> {
    Number(u64),
    Time(i32, u16),
    Name(Name<'a>),
    Bytes(&'a [u8]),
}

const NAMES: [&str; 10] = ["a", "b", "c", "a/b", "./a/b/c", "/a", "a-b", "../a", "d/", "."];
const KEYS: [&str; 9] = [
    "path",
    "linkpath",
    "uid",
    "gid",
    "size",
    "mtime",
    "SCHILY.xattr.user.overlay.opaque",
    "SCHILY.xattr.security.capability",
    "SCHILY.xattr.user.x",
];

impl Name<'_> {
    fn bytes(&self) -> Vec<u8> {
        let known = |number: u8| NAMES[usize::from(number) % NAMES.len()].as_bytes();
        match self {
            Self::Known(number) => known(*number).to_vec(),
            Self::Below(number, name) => [known(*number), b"/", *name].concat(),
            Self::Bytes(name) => name.to_vec(),
        }
    }
}

impl Record<'_> {
    /// `LENGTH KEY=VALUE`, where the length counts itself.
    fn bytes(&self) -> Vec<u8> {
        let value = match &self.value {
            Value::Number(number) => number.to_string().into_bytes(),
            Value::Time(seconds, fraction) => format!("{seconds}.{fraction}").into_bytes(),
            Value::Name(name) => name.bytes(),
            Value::Bytes(bytes) => bytes.to_vec(),
        };
        let rest = [b" ", KEYS[usize::from(self.key) % KEYS.len()].as_bytes(), b"=", &value, b"\n"].concat();
        let mut length = rest.len() + 1;
        while length != rest.len() + length.to_string().len() {
            length = rest.len() + length.to_string().len();
        }
        [self.length.map_or(length, usize::from).to_string().as_bytes(), &rest].concat()
    }
}

/// A header (POSIX ustar) and its content, in whole blocks.
fn framed(header: &mut [u8; 512], content: &[u8]) -> Vec<u8> {
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut bytes = header.to_vec();
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn extension(kind: u8, content: &[u8]) -> Vec<u8> {
    let mut header = [0; 512];
    header[..1].copy_from_slice(b"x");
    header[100..107].copy_from_slice(b"0000644");
    header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    framed(&mut header, content)
}

impl Entry<'_> {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Some((link, name)) = &self.long {
            bytes.extend(extension(if *link { b'K' } else { b'L' }, &name.bytes()));
        }
        if !self.records.is_empty() {
            bytes.extend(extension(b'x', &self.records.iter().take(8).flat_map(Record::bytes).collect::<Vec<u8>>()));
        }
        let mut header = [0; 512];
        let mut put = |at: usize, room: usize, bytes: &[u8]| {
            let length = bytes.len().min(room);
            header[at..at + length].copy_from_slice(&bytes[..length]);
        };
        put(0, 100, &self.name.bytes());
        put(100, 8, format!("{:07o}", self.mode & 0o7_777_777).as_bytes());
        put(108, 8, format!("{:07o}", self.ids[0] & 0o7_777_777).as_bytes());
        put(116, 8, format!("{:07o}", self.ids[1] & 0o7_777_777).as_bytes());
        let kind = b"0123456xgLKS7"[usize::from(self.kind) % 13];
        let content = if kind == b'0' || self.size.is_some() { self.content } else { &[] };
        put(124, 12, format!("{:011o}", self.size.unwrap_or(content.len() as u32)).as_bytes());
        put(136, 12, b"00000000000");
        put(156, 1, &[kind]);
        put(157, 100, &self.link.bytes());
        put(257, 8, b"ustar\x0000");
        put(329, 8, format!("{:07o}", self.device[0]).as_bytes());
        put(337, 8, format!("{:07o}", self.device[1]).as_bytes());
        bytes.extend(framed(&mut header, content));
        bytes
    }
}

impl Compression {
    fn pack(self, plain: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        match self {
            Self::None => packed = plain.to_vec(),
            Self::Gzip => {
                let _ = flate2::read::GzEncoder::new(plain, flate2::Compression::fast()).read_to_end(&mut packed);
            }
            Self::Xz => _ = lzma_rs::xz_compress(&mut { plain }, &mut packed),
            Self::Zstd => packed = form_bundle::travel::pack(plain).unwrap_or_default(),
            Self::Lz4 => {
                let block = lz4_flex::block::compress(plain);
                let _ = packed.write_all(&[0x02, 0x21, 0x4c, 0x18]);
                packed.extend((block.len() as u32).to_le_bytes());
                packed.extend(block);
            }
        }
        packed
    }
}

impl Packed<'_> {
    fn bytes(&self) -> Vec<u8> {
        let mut plain = if self.is_elf { b"\x7fELF".to_vec() } else { Vec::new() };
        plain.extend(self.content.repeat(self.repeat.into()));
        let mut packed = self.compression.pack(&plain);
        alter(&mut packed, &self.edits);
        // The length of what comes out, for the kernel's own unpacker.
        packed.extend((plain.len() as u32).to_le_bytes());
        packed
    }
}

/// A bzImage (kernel documentation: the boot protocol, fields `setup_sects`, `payload_offset`, `payload_length`).
fn bz_image(sectors: u8, gap: u8, offset: Option<u32>, length: Option<u32>, payload: &[u8]) -> Vec<u8> {
    let setup = (if sectors == 0 { 4 } else { usize::from(sectors) } + 1) * 512;
    let mut image = vec![0; setup + usize::from(gap)];
    image[0x1f1] = sectors;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x248..0x24c].copy_from_slice(&offset.unwrap_or(gap.into()).to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&length.unwrap_or(payload.len() as u32).to_le_bytes());
    image.extend(payload);
    image
}

/// In memory, and of this process.
fn directory() -> PathBuf {
    PathBuf::from(format!("/dev/shm/form-fuzz-image-{}", std::process::id()))
}

fn read(bytes: &[u8], root: bool) {
    let directory = directory();
    let _ = tar(bytes, root, &directory);
    let _ = std::fs::remove_dir_all(directory);
}

fuzz_target!(|input: Input| match input {
    Input::Tar { root, bytes } => read(bytes, root),
    Input::Entries { entries, root, edits } => {
        let mut bytes: Vec<u8> = entries.iter().take(16).flat_map(Entry::bytes).collect();
        bytes.extend([0; 1024]);
        alter(&mut bytes, &edits);
        read(&bytes, root);
    }
    Input::Kernel { sectors, gap, offset, length, payload, edits } => {
        let mut image = bz_image(sectors % 8, gap, offset, length, &payload.bytes());
        alter(&mut image, &edits);
        let _ = kernel_image(&image);
    }
    Input::KernelBytes(bytes) => _ = kernel_image(bytes),
    Input::Module { before, depends, after, packed, edits } => {
        let plain = [before, b"\0depends=", depends.as_bytes(), b"\0", after].concat();
        let mut bytes = packed.pack(&plain);
        alter(&mut bytes, &edits);
        let _ = kernel_module(&bytes);
    }
});
