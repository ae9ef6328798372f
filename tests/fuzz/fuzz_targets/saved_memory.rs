//! Saved memory of VMs, as a VM process maps it and as a snapshot keeps it compressed: altered, it is refused or means what it says.

#![no_main]

use std::{fs::File, os::unix::fs::FileExt};

use arbitrary::Arbitrary;
use form_store::compressed::{self, Compressed, FRAME};
use form_vmm::memory::image;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
const ID: [u8; 16] = [7; 16];
/// Of a compressed file: its beginning, and of its table one entry.
const HEADER: usize = 64;
const ENTRY: usize = 8;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Runs of pages: the first, how many, and what they hold; nothing is noise.
    runs: Vec<(u16, u16, Option<u8>)>,
    pages: u16,
    is_compressed: bool,
    /// Changes of what lies in memory alone.
    damage: Vec<(u32, u8)>,
    /// Changes of what describes it.
    lies: Vec<(u32, Value)>,
    /// How much of what describes it fits together again.
    mended: Mended,
    length: Option<u32>,
    /// The length that a compressed file says is believed.
    believed: bool,
}

#[derive(Arbitrary, Debug)]
enum Value {
    Byte(u8),
    Word(u32),
    Long(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug, PartialEq)]
enum Mended {
    Nothing,
    /// The checksum of the trailer or header.
    Head,
    /// That of the table too.
    Table,
    /// Those of plain memory too.
    All,
}

fn crc(bytes: &[u8]) -> [u8; 4] {
    crc32fast::hash(bytes).to_le_bytes()
}

fn file(bytes: &[u8]) -> File {
    let file = File::from(memfd_create("memory", MemfdFlags::CLOEXEC).expect("a file in memory"));
    file.set_len(bytes.len() as u64).expect("a length");
    for (at, page) in (0..).step_by(PAGE).zip(bytes.chunks(PAGE)).filter(|(_, page)| page.iter().any(|byte| *byte != 0)) {
        file.write_all_at(page, at).expect("it can be written");
    }
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().expect("a length").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("it can be read");
    bytes
}

fn memory(input: &Input) -> Vec<u8> {
    let pages = usize::from(input.pages % 520) + 1;
    let mut bytes = vec![0; pages * PAGE];
    for (first, count, value) in input.runs.iter().take(16) {
        let from = usize::from(*first) % pages;
        let run = &mut bytes[from * PAGE..(from + usize::from(*count)).min(pages) * PAGE];
        match value {
            Some(value) => run.fill(*value),
            None => run.chunks_exact_mut(8).zip(1_u64..).for_each(|(bytes, number)| {
                let noise = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                bytes.copy_from_slice(&(noise ^ noise >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_le_bytes());
            }),
        }
    }
    bytes
}

/// Changes bytes of `area`; gives whether there was anything to change.
fn damage(area: &mut [u8], changes: &[(u32, u8)]) -> bool {
    let before = area.to_vec();
    for (at, value) in changes.iter().take(if area.is_empty() { 0 } else { 16 }) {
        area[*at as usize % before.len()] = *value;
    }
    area != before
}

/// The same with numbers, of any size, in several areas.
fn lie(areas: &mut [&mut [u8]], changes: &[(u32, Value)]) -> bool {
    let count: usize = areas.iter().map(|area| area.len()).sum();
    for (at, value) in changes.iter().take(16) {
        let bytes = match value {
            Value::Byte(value) => vec![*value],
            Value::Word(value) => value.to_le_bytes().to_vec(),
            Value::Long(value) => value.to_le_bytes().to_vec(),
        };
        let places = areas.iter_mut().flat_map(|area| area.iter_mut()).skip(*at as usize % count);
        places.zip(bytes).for_each(|(place, byte)| *place = byte);
    }
    !changes.is_empty()
}

/// As the VM process writes it: RAM, a checksum of each MiB, filled up to a page, and the trailer.
fn image_of(ram: &[u8]) -> (Vec<u8>, usize) {
    let table: Vec<u8> = ram.chunks(MIB).flat_map(crc).collect();
    let mut bytes = [ram, &table].concat();
    bytes.resize(bytes.len().next_multiple_of(PAGE) + PAGE, 0);
    let at = bytes.len() - PAGE;
    bytes[at..at + 8].copy_from_slice(b"FORMVMEM");
    bytes[at + 8..at + 24].copy_from_slice(&ID);
    bytes[at + 24] = 1;
    bytes[at + 28..at + 36].copy_from_slice(&(ram.len() as u64).to_le_bytes());
    bytes[at + 36..at + 40].copy_from_slice(&crc(&table));
    let own = crc(&bytes[at..at + 40]);
    bytes[at + 40..at + 44].copy_from_slice(&own);
    (bytes, at)
}

fn plain(input: &Input) {
    let sound = memory(input);
    let (ram, table) = (sound.len(), sound.len().div_ceil(MIB) * 4);
    let (whole, trailer) = image_of(&sound);
    let mut bytes = whole.clone();
    let damaged = damage(&mut bytes[..ram], &input.damage);
    let (before, after) = bytes.split_at_mut(trailer);
    let lied = lie(&mut [&mut after[..48], &mut before[ram..ram + table]], &input.lies);
    if input.mended == Mended::All {
        let sums: Vec<u8> = bytes[..ram].chunks(MIB).flat_map(crc).collect();
        bytes[ram..ram + table].copy_from_slice(&sums);
    }
    if matches!(input.mended, Mended::Table | Mended::All) {
        let sum = crc(&bytes[ram..ram + table]);
        bytes[trailer + 36..trailer + 40].copy_from_slice(&sum);
    }
    if input.mended != Mended::Nothing {
        let own = crc(&bytes[trailer..trailer + 40]);
        bytes[trailer + 40..trailer + 44].copy_from_slice(&own);
    }
    let cut = input.length.is_some();
    bytes.truncate(input.length.map_or(bytes.len(), |length| length as usize % bytes.len()));

    let file = file(&bytes);
    let verified = image::verify(&file).is_ok();
    let untouched = !lied && !cut;
    if untouched && input.mended != Mended::All {
        assert_eq!(verified, !damaged, "damage is found, and only damage");
    }
    assert!(!untouched || input.mended != Mended::All || verified);
    let checked = image::check(&[(0, ram as u64)], &file, &ID);
    assert!(!untouched || checked.is_ok());
    if let (Ok(()), Ok(id)) = (checked, image::save_of(&file)) {
        assert_eq!(id, ID);
        let mapped = image::map(&[(0, ram as u64)], file, &ID).expect("what is in order can be mapped");
        let mut found = vec![0; ram];
        mapped.memory_read(&mut found);
        assert!(found == bytes[..ram], "something else is mapped than the file holds");
        if untouched && !damaged {
            let again = self::file(&[]);
            image::save(&mapped, &again, &ID).expect("it can be saved");
            assert!(contents(&again) == whole, "what was mapped is saved otherwise");
        }
    }
}

trait Read {
    fn memory_read(&self, into: &mut [u8]);
}

impl<M: GuestMemoryBackend> Read for M {
    fn memory_read(&self, into: &mut [u8]) {
        self.read_slice(into, GuestAddress(0)).expect("it is mapped");
    }
}

fn packed(input: &Input) {
    let sound = memory(input);
    let packed = file(&[]);
    let unfolded = compressed::write(&file(&sound), &packed, |_| Ok(())).expect("it can be compressed");
    let filled = sound.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0)).count();
    assert_eq!((unfolded.length, unfolded.data), (sound.len() as u64, (filled * PAGE) as u64));
    let mut bytes = contents(&packed);
    let table = sound.len().div_ceil(FRAME) * ENTRY;
    let (head, frames) = bytes.split_at_mut(HEADER + table);
    let damaged = damage(frames, &input.damage);
    let lied = lie(&mut [head], &input.lies);
    if matches!(input.mended, Mended::Table | Mended::All) {
        let sum = crc(&bytes[HEADER..HEADER + table]);
        bytes[32..36].copy_from_slice(&sum);
    }
    if input.mended != Mended::Nothing {
        let own = crc(&bytes[..HEADER - 4]);
        bytes[HEADER - 4..HEADER].copy_from_slice(&own);
    }
    let cut = input.length.is_some();
    bytes.truncate(input.length.map_or(bytes.len(), |length| length as usize % bytes.len()));
    let said = bytes.get(16..24).and_then(|said| said.try_into().ok()).map(u64::from_le_bytes);
    let expected = said.filter(|_| input.believed).unwrap_or(sound.len() as u64);

    let file = file(&bytes);
    let (target, end) = (self::file(&[]), self::file(&[]));
    match Compressed::open(&file, expected) {
        Err(error) => assert!(lied || cut, "it is sound: {error}"),
        Ok(opened) => {
            assert_eq!(opened.unfolded().length, expected);
            // A sparse file may say that it is large; one that is looked at is not.
            if expected > 16 * MIB as u64 {
                return;
            }
            let verified = opened.verify();
            assert_eq!(verified.is_ok(), opened.unfold(&target).is_ok());
            let end_is_sound = opened.unfold_end(&end).is_ok();
            assert!(verified.is_err() || end_is_sound);
            if verified.is_ok() {
                let found = contents(&target);
                let last = found.len().saturating_sub(1) / FRAME * FRAME;
                let end = contents(&end);
                assert!(end[last..] == found[last..] && end[..last].iter().all(|byte| *byte == 0));
                assert!(lied || cut || found == sound, "damage was not found");
            }
            assert!(lied || cut || damaged || verified.is_ok());
        }
    }
}

fuzz_target!(|input: Input| if input.is_compressed { packed(&input) } else { plain(&input) });
