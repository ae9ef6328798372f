//! Layers made here: sound ones, damaged ones, and ones made to do harm.

use std::{fs, io::Write, path::Path};

use tar::EntryType;

use super::*;
use crate::{
    OciDigest,
    diff::{EPOCH, Kind},
    oci::Defaults,
};

/// What an archive holds: type, path, content or target.
type Item<'a> = (EntryType, &'a [u8], &'a [u8]);

/// A tar archive of these, whatever they are called: the header's fields are filled as they come.
fn archive(items: &[Item<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut builder = tar::Builder::new(&mut bytes);
    for (kind, path, content) in items {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o4755);
        header.set_uid(1000);
        header.set_gid(65534);
        header.set_mtime(4_000_000_000);
        let is_file = *kind == EntryType::Regular;
        header.set_size(if is_file { content.len() as u64 } else { 0 });
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        if matches!(kind, EntryType::Link | EntryType::Symlink) {
            header.as_old_mut().linkname[..content.len()].copy_from_slice(content);
        }
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(content[0].into()).unwrap();
            header.set_device_minor(content[1].into()).unwrap();
        }
        header.set_cksum();
        builder.append(&header, if is_file { *content } else { &[] }).unwrap();
    }
    builder.finish().unwrap();
    drop(builder);
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Layers, each with what it is as a blob and unpacked.
fn unpack_all(directory: &Path, layers: &[(Compression, Vec<u8>, OciDigest)], limit_gib: u64) -> Result<Diff, UnpackError> {
    let blobs = layers.iter().enumerate().map(|(index, (compression, packed, diff_id))| {
        let path = directory.join(format!("blob{index}"));
        fs::write(&path, packed).unwrap();
        LayerBlob { path, compression: *compression, diff_id: *diff_id }
    });
    let fetched = Fetched { manifest: OciDigest::of(b""), defaults: Defaults::default(), layers: blobs.collect() };
    let spool = Spool::create(directory.join("spool")).unwrap();
    unpack(&fetched, &spool, limit_gib, &Cancel::new())
}

/// The message that one plain layer is refused with.
fn refused(plain: Vec<u8>) -> String {
    let directory = tempfile::tempdir().unwrap();
    let digest = OciDigest::of(&plain);
    match unpack_all(directory.path(), &[(Compression::None, plain, digest)], 1) {
        Err(UnpackError::Image(error)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn layers_of_each_kind_become_one_tree() {
    let directory = tempfile::tempdir().unwrap();
    let first = archive(&[
        (EntryType::Directory, b"./dev/", b""),
        (EntryType::Char, b"dev/null", &[1, 3]),
        (EntryType::Regular, b"etc/one", b"first"),
        (EntryType::Regular, b"etc/two", b"first"),
        (EntryType::Link, b"etc/three", b"/etc/two"),
    ]);
    let second = archive(&[(EntryType::Regular, b"etc/.wh.one", b""), (EntryType::Symlink, b"etc/out", b"../../../../../etc/shadow")]);
    let third = archive(&[(EntryType::Regular, b"etc/two", b"third")]);
    let layers = [
        (Compression::Gzip, gzip(&first), OciDigest::of(&first)),
        (Compression::Zstd, zstd::encode_all(second.as_slice(), 1).unwrap(), OciDigest::of(&second)),
        (Compression::None, third.clone(), OciDigest::of(&third)),
    ];
    let diff = unpack_all(directory.path(), &layers, 1).unwrap();
    let paths: Vec<String> = diff.entries.iter().map(|entry| entry.path.to_string()).collect();
    assert_eq!(paths, ["/dev", "/dev/null", "/etc", "/etc/out", "/etc/three", "/etc/two"]);
    assert_eq!(diff.entries[1].kind, Kind::Char { major: 1, minor: 3 });
    let meta = &diff.entries[4].meta;
    assert_eq!((meta.mode, meta.uid, meta.gid, meta.mtime), (0o4755, 1000, 65534, EPOCH));
    let content = |index: usize| match &diff.entries[index].kind {
        Kind::File { digest, .. } => fs::read(directory.path().join("spool").join(digest.to_string())).unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!((content(4), content(5)), (b"first".to_vec(), b"third".to_vec()));
}

#[test]
fn attributes_of_a_layer_are_those_of_the_image() {
    let mut bytes = Vec::new();
    let mut builder = tar::Builder::new(&mut bytes);
    let pairs: [(&str, &[u8]); 4] = [
        ("SCHILY.xattr.security.capability", b"\x01\n\x00\x02"),
        ("SCHILY.xattr.user.note", b"kept"),
        ("SCHILY.xattr.user.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
    ];
    builder.append_pax_extensions(pairs).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    builder.append_data(&mut header, "f", io::empty()).unwrap();
    builder.finish().unwrap();
    drop(builder);
    let directory = tempfile::tempdir().unwrap();
    let digest = OciDigest::of(&bytes);
    let diff = unpack_all(directory.path(), &[(Compression::None, bytes, digest)], 1).unwrap();
    assert_eq!(diff.entries[0].meta.xattrs.keys().collect::<Vec<_>>(), ["security.capability", "user.note"]);
}

#[test]
fn names_that_leave_the_image_are_refused() {
    for item in [
        (EntryType::Regular, b"../escape".as_slice(), b"x".as_slice()),
        (EntryType::Regular, b"a/../../escape", b"x"),
        (EntryType::Link, b"l", b"../../etc/shadow"),
        (EntryType::Directory, b"a/..", b""),
    ] {
        let message = refused(archive(&[item]));
        assert!(message.contains("layer 1") && message.contains("no path inside an image"), "{message}");
    }
    // An absolute name is one of the image; a link to a file of this machine leads nowhere.
    let message = refused(archive(&[(EntryType::Regular, b"/inside", b"x"), (EntryType::Link, b"l", b"/etc/passwd")]));
    assert!(message.contains("hard link /l leads to /etc/passwd"), "{message}");
    // What a link to a link to itself leads to.
    let message = refused(archive(&[(EntryType::Symlink, b"l", b"l"), (EntryType::Regular, b"l/in", b"x")]));
    assert!(message.contains("no directory of the image"), "{message}");
}

#[test]
fn a_bomb_ends_at_the_size_of_the_disk() {
    // Two MiB that unpack to more than a GiB; written to a spool of two files at most.
    let (mut encoder, zeroes) = (zstd::Encoder::new(Vec::new(), 1).unwrap(), vec![0; 1 << 20]);
    let mut header = tar::Header::new_gnu();
    header.set_path("zeroes").unwrap();
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(6 << 30);
    header.set_cksum();
    encoder.write_all(header.as_bytes()).unwrap();
    for _ in 0..1100 {
        encoder.write_all(&zeroes).unwrap();
    }
    let packed = encoder.finish().unwrap();
    assert!(packed.len() < 2 << 20);
    let directory = tempfile::tempdir().unwrap();
    let error = unpack_all(directory.path(), &[(Compression::Zstd, packed, OciDigest::of(b""))], 1).unwrap_err();
    assert!(matches!(error, UnpackError::Image(OciError::DiskBudget { limit_gib: 1 })), "{error:?}");
    // Behind the end of the archive too.
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    for _ in 0..1100 {
        encoder.write_all(&zeroes).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let error = unpack_all(directory.path(), &[(Compression::Zstd, encoder.finish().unwrap(), OciDigest::of(b""))], 1).unwrap_err();
    assert!(matches!(error, UnpackError::Image(OciError::DiskBudget { .. })), "{error:?}");
}

#[test]
fn a_file_that_claims_more_than_it_has_is_refused() {
    let mut plain = archive(&[(EntryType::Regular, b"f", b"x")]);
    let mut header = tar::Header::from_byte_slice(&plain[..512]).clone();
    header.set_size(7 << 30);
    header.set_cksum();
    plain[..512].copy_from_slice(header.as_bytes());
    let message = refused(plain);
    assert!(message.contains("layer 1 cannot be used"), "{message}");
}

#[test]
fn damaged_layers_are_refused() {
    let plain = archive(&[(EntryType::Regular, b"f", b"content")]);
    let digest = OciDigest::of(&plain);
    let directory = tempfile::tempdir().unwrap();
    let unpacked = |compression, bytes: Vec<u8>, digest| unpack_all(directory.path(), &[(compression, bytes, digest)], 1);
    let message = |result: Result<Diff, UnpackError>| match result {
        Err(UnpackError::Image(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let wrong = message(unpacked(Compression::None, plain.clone(), OciDigest::of(b"other")));
    assert!(wrong.contains("layer 1, unpacked, should have digest sha256:"), "{wrong}");
    for (compression, packed) in [(Compression::Gzip, gzip(&plain)), (Compression::Zstd, zstd::encode_all(plain.as_slice(), 1).unwrap())] {
        let cut = packed[..packed.len() - 9].to_vec();
        assert!(message(unpacked(compression, cut, digest)).contains("layer 1 cannot be used"));
        assert!(message(unpacked(compression, plain.clone(), digest)).contains("layer 1 cannot be used"));
    }
    assert!(message(unpacked(Compression::None, b"no archive".repeat(100), digest)).contains("layer 1 cannot be used"));
    assert!(unpacked(Compression::None, plain, digest).is_ok());
}

#[test]
fn files_with_holes_are_refused_and_not_garbled() {
    let mut bytes = Vec::new();
    let mut builder = tar::Builder::new(&mut bytes);
    builder.append_pax_extensions([("GNU.sparse.major", b"1".as_slice())]).unwrap();
    builder.finish().unwrap();
    drop(builder);
    assert!(refused(bytes).contains("pax header"));
}
