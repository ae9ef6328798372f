use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

/// Bytes that do not become smaller.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Seven whole frames and one page: text, a hole, noise, zeros that were written, a page in the middle of zeros, a hole, two bytes, and the end.
fn sparse() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(7 * MIB + 4096).unwrap();
    file.write_all_at(&b"again and ".repeat(100_000), 0).unwrap();
    file.write_all_at(&noise(FRAME), 2 * MIB).unwrap();
    file.write_all_at(&vec![0; FRAME], 3 * MIB).unwrap();
    file.write_all_at(&[1; PAGE], 4 * MIB + 8192).unwrap();
    file.write_all_at(b"ab", 7 * MIB - 1).unwrap();
    file.write_all_at(b"end", 7 * MIB + 4093).unwrap();
    file
}

fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn file_of(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn pack(source: &File) -> (File, Unfolded) {
    let target = tempfile::tempfile().unwrap();
    let unfolded = write(source, &target, |_| Ok(())).unwrap();
    (target, unfolded)
}

/// What it unfolds to.
fn unfold(file: &File, expected: u64) -> Result<File, CompressedError> {
    let target = tempfile::tempfile().unwrap();
    let compressed = Compressed::open(file, expected)?;
    compressed.verify()?;
    compressed.unfold(&target)?;
    Ok(target)
}

#[test]
fn what_is_unfolded_is_what_was_and_zeros_take_nothing() {
    let source = sparse();
    let (packed, unfolded) = pack(&source);
    let length = 7 * MIB + 4096;
    // Of the text 245 pages are touched; noise; one page; two bytes beside each other in two pages; the last page is one of the two.
    assert_eq!(unfolded, Unfolded { length, data: (245 + 256 + 1 + 1 + 1) * PAGE as u64 });
    let size = packed.metadata().unwrap().len();
    assert!(size > MIB && size < MIB + 4096, "the noise and little else: {size}");
    let target = unfold(&packed, length).unwrap();
    assert!(bytes(&target) == bytes(&source));
    assert!(target.metadata().unwrap().blocks() * 512 <= unfolded.data + 64 * 1024, "zeros are holes");

    let end = tempfile::tempfile().unwrap();
    Compressed::open(&packed, length).unwrap().unfold_end(&end).unwrap();
    assert_eq!(bytes(&end)[length as usize - 4096..], bytes(&source)[length as usize - 4096..]);
    assert!(end.metadata().unwrap().len() == length && end.metadata().unwrap().blocks() * 512 <= 64 * 1024);
}

#[test]
fn files_of_every_length_come_back() {
    for length in [0, 1, 4095, 4096, MIB - 1, MIB, MIB + 1, 3 * MIB] {
        let empty = tempfile::tempfile().unwrap();
        empty.set_len(length).unwrap();
        let (packed, unfolded) = pack(&empty);
        assert_eq!(unfolded, Unfolded { length, data: 0 });
        assert_eq!(packed.metadata().unwrap().len(), 64 + length.div_ceil(MIB) * 8, "nothing but the table");
        assert!(bytes(&unfold(&packed, length).unwrap()) == bytes(&empty));
        let full = file_of(&noise(length as usize));
        let (packed, _) = pack(&full);
        assert!(bytes(&unfold(&packed, length).unwrap()) == bytes(&full));
    }
}

#[test]
fn every_byte_that_is_another_is_found() {
    let source = sparse();
    let (packed, Unfolded { length, .. }) = pack(&source);
    let whole = bytes(&packed);
    let places = (0..256).chain((256..whole.len()).step_by(9973)).chain(whole.len() - 64..whole.len());
    for at in places {
        let mut other = whole.clone();
        other[at] ^= 0x41;
        let error = unfold(&file_of(&other), length).err().unwrap_or_else(|| panic!("byte {at} is not missed"));
        let expected = match at {
            0..8 => matches!(error, CompressedError::Foreign),
            8..12 => matches!(error, CompressedError::Version { .. }),
            12..128 => matches!(error, CompressedError::Table),
            _ => matches!(error, CompressedError::Frame { .. }),
        };
        assert!(expected, "byte {at}: {error}");
    }
}

#[test]
fn a_file_that_is_cut_or_grown_is_torn() {
    let (packed, Unfolded { length, .. }) = pack(&sparse());
    let whole = bytes(&packed);
    let boundaries = [0, 1, 8, 63, 64, 65, 127, 128, 129, whole.len() / 2, whole.len() - 1];
    for cut in boundaries {
        let error = unfold(&file_of(&whole[..cut]), length).err().unwrap();
        let expected = if cut < 64 { matches!(error, CompressedError::Foreign) } else { matches!(error, CompressedError::Torn { .. }) };
        assert!(expected, "{cut}: {error}");
    }
    let grown = [whole.as_slice(), b"x"].concat();
    assert!(matches!(unfold(&file_of(&grown), length), Err(CompressedError::Torn { .. })));
    // One that was never finished has no beginning.
    let unfinished = [&[0; 64], &whole[64..]].concat();
    assert!(matches!(unfold(&file_of(&unfinished), length), Err(CompressedError::Foreign)));
}

/// A file with this table and these frames, whose checksums are right.
fn claims(length: u64, entries: &[(u32, u32)], frames: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    let table: Vec<u8> = entries.iter().flat_map(|(stored, sum)| [stored.to_le_bytes(), sum.to_le_bytes()].concat()).collect();
    file.write_all_at(frames, (HEADER + table.len()) as u64).unwrap();
    write_header(&file, Unfolded { length, data: 0 }, &table).unwrap();
    file
}

#[test]
fn nothing_is_made_of_what_a_file_claims() {
    // As much memory as there is nowhere.
    let file = claims(u64::MAX, &[(0, 0)], b"");
    assert!(matches!(Compressed::open(&file, MIB), Err(CompressedError::Other { .. })));
    assert!(matches!(Compressed::open(&file, u64::MAX), Err(CompressedError::Torn { .. })));
    // A frame that takes more than it holds.
    let file = claims(MIB, &[(FRAME as u32 + 1, 0)], &vec![0; FRAME + 1]);
    assert!(matches!(Compressed::open(&file, MIB), Err(CompressedError::Table)));
    let file = claims(MIB, &[(u32::MAX, 0)], b"");
    assert!(matches!(Compressed::open(&file, MIB), Err(CompressedError::Table)));
    // One that unfolds to more, or less, than its place holds; and one that is no frame at all.
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    let short = zstd::bulk::compress(&[1; 100], 1).unwrap();
    for (frame, sum) in [(&bomb[..], 0), (&short, crc32fast::hash(&[1; 100])), (b"no frame", 0), (b"", 7)] {
        let file = claims(MIB, &[(frame.len() as u32, sum)], frame);
        let compressed = Compressed::open(&file, MIB).unwrap();
        let target = tempfile::tempfile().unwrap();
        match compressed.unfold(&target) {
            Err(CompressedError::Frame { mebibyte: 0 }) => {}
            Ok(()) => assert!(frame.is_empty() && bytes(&target).iter().all(|byte| *byte == 0)),
            Err(error) => panic!("{error}"),
        }
        assert_eq!(target.metadata().unwrap().len(), MIB);
    }
    let (packed, _) = pack(&sparse());
    assert!(matches!(Compressed::open(&packed, MIB), Err(CompressedError::Other { expected: MIB, .. })));
}

#[test]
fn it_can_be_ended_at_every_frame_and_says_how_far_it_is() {
    let source = sparse();
    let mut told = Vec::new();
    write(&source, &tempfile::tempfile().unwrap(), |done| {
        told.push(done);
        Ok(())
    })
    .unwrap();
    assert_eq!(told, [0, MIB, 2 * MIB, 3 * MIB, 4 * MIB, 5 * MIB, 6 * MIB, 7 * MIB, 7 * MIB + 4096]);
    for end in told {
        let target = tempfile::tempfile().unwrap();
        let ended = write(&source, &target, |done| if done == end { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) });
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(matches!(Compressed::open(&target, 7 * MIB + 4096), Err(CompressedError::Foreign)), "{end}");
    }
}

/// A file of `length` bytes with runs of a byte, or of noise, in it: place, length, byte (noise for 255).
fn made_of(length: u64, runs: &[(u64, usize, u8)]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(length).unwrap();
    for (at, count, byte) in runs {
        let at = at % length.max(1);
        let count = usize::try_from(length - at).unwrap().min(*count);
        let bytes = if *byte == u8::MAX { noise(count) } else { vec![*byte; count] };
        file.write_all_at(&bytes, at).unwrap();
    }
    file
}

fn runs() -> impl Strategy<Value = Vec<(u64, usize, u8)>> {
    prop::collection::vec((0..4 * MIB, 1..200_000_usize, prop_oneof![Just(0), Just(1), Just(255)]), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn whatever_it_holds_comes_back(length in 0..4 * MIB, runs in runs()) {
        let source = made_of(length, &runs);
        let (packed, unfolded) = pack(&source);
        prop_assert_eq!(unfolded.length, length);
        let target = unfold(&packed, length).unwrap();
        prop_assert!(bytes(&target) == bytes(&source));
    }

    #[test]
    fn whatever_becomes_of_it_is_found_or_changes_nothing(
        runs in runs(),
        edits in prop::collection::vec((any::<u32>(), any::<u8>()), 1..6),
        keep in 0..=8_u32,
        sums in any::<bool>(),
    ) {
        let length = 3 * MIB + 4096;
        let source = made_of(length, &runs);
        let mut other = bytes(&pack(&source).0);
        for (at, byte) in &edits {
            // Half of them where it says what it is.
            let within = if at % 2 == 0 { 128 } else { other.len() };
            let at = (*at as usize / 2) % within.min(other.len());
            other[at] = *byte;
        }
        other.truncate(other.len() * keep.max(1) as usize / 8);
        if sums && other.len() >= 96 {
            // As somebody would write it who knows how: what it describes is looked at as well.
            let table = crc32fast::hash(&other[HEADER..HEADER + 4 * ENTRY]);
            other[32..36].copy_from_slice(&table.to_le_bytes());
            let own = crc32fast::hash(&other[..HEADER - 4]);
            other[HEADER - 4..HEADER].copy_from_slice(&own.to_le_bytes());
        }
        if let Ok(target) = unfold(&file_of(&other), length) {
            let found = bytes(&target);
            prop_assert_eq!(found.len() as u64, length);
            // A frame that became one of zeros says so with a good checksum.
            prop_assert!(sums || found == bytes(&source));
        }
    }
}
