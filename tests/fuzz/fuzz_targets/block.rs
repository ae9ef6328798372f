//! A disk, raw or qcow2 over a raw file, in the hands of a hostile driver. Beside what the bench checks: a request never makes a
//! raw file longer, and never changes a file that lies behind another or a read-only disk.

#![no_main]

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    os::fd::OwnedFd,
    sync::OnceLock,
};

use arbitrary::Arbitrary;
use form_fuzz::device::{Parts, Target, input::Input, run};
use form_vmm::{
    config::DiskFormat,
    virtio::{
        VirtioDevice,
        block::{Block, Layer, open},
    },
};
use imago::{FormatCreateBuilder, file::File as Storage, qcow2::Qcow2};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

const SECTOR: u64 = 512;
const SECTORS: u64 = 128;
const SIZE: u64 = SECTOR * SECTORS;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Sector {
    Near(u8),
    End(i8),
    Any(u64),
}

impl Sector {
    fn number(self) -> u64 {
        match self {
            // On the disk, or a little behind it.
            Self::Near(sector) => u64::from(sector) % (SECTORS + 16),
            Self::End(offset) => SECTORS.wrapping_add_signed(i64::from(offset)),
            Self::Any(sector) => sector,
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Range {
    sector: Sector,
    sectors: u16,
    /// Overrides `sectors`.
    many: Option<u32>,
    flags: u8,
}

#[derive(Arbitrary, Debug)]
enum Request {
    /// With bytes that make no whole sector, when there are `more`.
    Read {
        sector: Sector,
        sectors: u8,
        more: Option<u16>,
    },
    Write {
        sector: Sector,
        sectors: u8,
        fill: u8,
        more: Option<u16>,
    },
    Flush,
    GetId {
        room: u8,
    },
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    Other {
        kind: u32,
        sector: u64,
        data: Vec<u8>,
        room: u16,
    },
}

/// Most requests are whole sectors, however often an input says otherwise.
fn odd(more: Option<u16>) -> u16 {
    more.filter(|more| more % 8 == 1).unwrap_or(0)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    bytes[0..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn ranges(kind: u32, ranges: &[Range]) -> Vec<u8> {
    let mut bytes = header(kind, 0);
    for range in ranges.iter().take(40) {
        bytes.extend(range.sector.number().to_le_bytes());
        bytes.extend(range.many.unwrap_or(u32::from(range.sectors % 1024)).to_le_bytes());
        bytes.extend(u32::from(range.flags).to_le_bytes());
    }
    bytes
}

#[derive(Default)]
struct Disk {
    /// A raw disk's file, and what has to stay as it is.
    raw: Option<File>,
    constant: Option<File>,
}

fn memory_file(content: &[u8], length: u64) -> File {
    let mut file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file in memory"));
    file.write_all(content).expect("room in memory");
    file.set_len(length).expect("room in memory");
    file
}

fn copy_of(file: &File) -> OwnedFd {
    OwnedFd::from(file.try_clone().expect("a descriptor"))
}

/// An empty overlay, as `imago` makes it.
fn overlay() -> &'static [u8] {
    static OVERLAY: OnceLock<Vec<u8>> = OnceLock::new();
    OVERLAY.get_or_init(|| {
        let mut file = memory_file(&[], 0);
        let storage = Storage::try_from(file.try_clone().expect("a descriptor")).expect("a file");
        let builder = Qcow2::<Storage>::create_builder(storage).size(SIZE).cluster_size(4096);
        builder.backing("behind".into(), "raw".into()).create().expect("an image");
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut bytes)).expect("a readable file");
        bytes
    })
}

/// What lies behind an overlay and in a disk at first.
fn content() -> &'static [u8] {
    static CONTENT: OnceLock<Vec<u8>> = OnceLock::new();
    CONTENT.get_or_init(|| (0..SIZE / 2).map(|at| (at / SECTOR) as u8 | 1).collect())
}

impl Target for Disk {
    type Request = Request;
    type Event = ();

    fn device(&mut self, variant: u8) -> Box<dyn VirtioDevice> {
        // Most can be written, and of those most are raw.
        let read_only = variant % 8 >= 6;
        let below = memory_file(content(), SIZE);
        let backend = if !matches!(variant % 8, 4 | 5 | 7) {
            let backend = open(Layer { file: copy_of(&below), format: DiskFormat::Raw }, Vec::new(), read_only);
            *if read_only { &mut self.constant } else { &mut self.raw } = Some(below);
            backend
        } else {
            let top = memory_file(overlay(), overlay().len() as u64);
            let behind = vec![Layer { file: copy_of(&below), format: DiskFormat::Raw }];
            self.constant = Some(below);
            open(Layer { file: OwnedFd::from(top), format: DiskFormat::Qcow2 }, behind, read_only)
        };
        let backend = backend.expect("the images are sound");
        Box::new(Block::new("disk".to_owned(), "vol-0123456789abcdef", backend, read_only).expect("an eventfd"))
    }

    fn parts(&self, request: &Request) -> Parts {
        let (readable, writable) = match request {
            Request::Read { sector, sectors, more } => (header(0, sector.number()), u32::from(*sectors) * 512 + u32::from(odd(*more)) + 1),
            Request::Write { sector, sectors, fill, more } => {
                let mut bytes = header(1, sector.number());
                bytes.resize(16 + usize::from(*sectors % 64) * 512 + usize::from(odd(*more)), *fill);
                (bytes, 1)
            }
            Request::Flush => (header(4, 0), 1),
            Request::GetId { room } => (header(8, 0), u32::from(*room) + 1),
            Request::Discard(list) => (ranges(11, list), 1),
            Request::WriteZeroes(list) => (ranges(13, list), 1),
            Request::Other { kind, sector, data, room } => {
                let mut bytes = header(*kind, *sector);
                bytes.extend(data);
                (bytes, u32::from(*room))
            }
        };
        Parts { queue: 0, readable, writable }
    }

    fn event(&mut self, (): &()) {}

    fn check(&mut self) {
        if let Some(raw) = &self.raw {
            assert_eq!(raw.metadata().expect("a file").len(), SIZE, "the disk changed its length");
        }
        if let Some(constant) = &mut self.constant {
            let mut bytes = Vec::new();
            constant.seek(SeekFrom::Start(0)).and_then(|_| constant.read_to_end(&mut bytes)).expect("a readable file");
            assert!(bytes.len() as u64 == SIZE && bytes.starts_with(content()), "a file that nobody may write was written");
        }
    }
}

fuzz_target!(|input: Input<Request, ()>| run::<Disk>(input));
