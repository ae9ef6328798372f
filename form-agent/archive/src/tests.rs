use std::{
    fs,
    io::{self, Read},
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    time::{Duration, UNIX_EPOCH},
};

use super::{
    hostile::{raw_entry, stream_of},
    *,
};

const SOON: Duration = Duration::from_secs(60);

fn packed(path: &Path, name: &str) -> Vec<u8> {
    let mut stream = Vec::new();
    pack(path, name.as_ref(), &mut stream).unwrap();
    stream
}

fn at(path: &Path) -> Target {
    Target::Path(path.to_owned())
}

fn unpacked(stream: &[u8], path: &Path) -> Result<Summary, ArchiveError> {
    unpack(stream, &at(path), Owner::Mine, false)
}

fn set_time(path: &Path, seconds: u64) {
    fs::File::open(path).unwrap().set_times(fs::FileTimes::new().set_modified(UNIX_EPOCH + Duration::from_secs(seconds))).unwrap();
}

pub fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A directory with one of each.
fn tree(parent: &Path) -> std::path::PathBuf {
    let tree = parent.join("tree");
    fs::create_dir_all(tree.join("sub/empty")).unwrap();
    fs::write(tree.join("run"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(tree.join("run"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(tree.join("sub").join("n".repeat(150)), vec![7; 100_000]).unwrap();
    symlink("run", tree.join("link")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, tree.join("pipe"), rustix::fs::Mode::RUSR).unwrap();
    set_time(&tree.join("run"), 1_000_000_000);
    set_time(&tree.join("sub"), 1_100_000_000);
    tree
}

#[test]
fn a_tree_comes_out_as_it_went_in() {
    let place = tempfile::tempdir().unwrap();
    let tree = tree(place.path());
    assert_eq!(measure(&tree, SOON).unwrap(), Tree { is_directory: true, bytes: Some(100_010) });
    let mut stream = Vec::new();
    assert_eq!(pack(&tree, "tree".as_ref(), &mut stream).unwrap(), Summary { files: 2, bytes: 100_010, skipped: 1 });
    let copy = place.path().join("copy");
    assert_eq!(unpacked(&stream, &copy).unwrap(), Summary { files: 2, bytes: 100_010, skipped: 0 });
    assert_eq!(names(&copy), ["link", "run", "sub"]);
    assert_eq!(names(&copy.join("sub")), ["empty".to_owned(), "n".repeat(150)]);
    let run = fs::metadata(copy.join("run")).unwrap();
    assert_eq!((run.mode() & 0o7777, run.mtime()), (0o755, 1_000_000_000));
    assert_eq!(fs::metadata(copy.join("sub")).unwrap().mtime(), 1_100_000_000);
    assert_eq!(fs::read_link(copy.join("link")).unwrap(), Path::new("run"));
    assert_eq!(names(place.path()), ["copy", "tree"], "nothing else is left");
    // Once more: now the directory is there, and the copy goes below it; the third merges.
    for _ in 0..2 {
        unpacked(&stream, &copy).unwrap();
        assert_eq!(names(&copy), ["link", "run", "sub", "tree"]);
        assert_eq!(names(&copy.join("tree")), ["link", "run", "sub"]);
    }
}

#[test]
fn a_file_goes_where_cp_would_put_it() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("a");
    fs::write(&file, "hello").unwrap();
    let stream = packed(&file, "a");
    let directory = place.path().join("d");
    fs::create_dir(&directory).unwrap();
    unpacked(&stream, &directory).unwrap();
    unpacked(&stream, &directory.join("b")).unwrap();
    unpacked(&stream, &directory.join("b")).unwrap();
    assert_eq!(names(&directory), ["a", "b"]);
    assert_eq!(fs::read_to_string(directory.join("b")).unwrap(), "hello");
    for (target, words) in [("no/such", "there is no"), ("new/", "there is no"), ("a/below", "is no directory")] {
        let error = unpacked(&stream, &place.path().join(target)).unwrap_err();
        assert!(error.to_string().contains(words), "{target}: {error}");
    }
    fs::create_dir(directory.join("a2")).unwrap();
    fs::create_dir(directory.join("a2/a")).unwrap();
    let error = unpacked(&stream, &directory.join("a2")).unwrap_err();
    assert!(error.to_string().contains("is a directory"), "{error}");
    let error = unpacked(&packed(&directory, "d"), &file).unwrap_err();
    assert!(error.to_string().contains("is no directory"), "{error}");
    assert_eq!(pack(&place.path().join("gone"), "gone".as_ref(), io::sink()).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(measure(&place.path().join("gone"), SOON).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn what_the_kernel_makes_up_has_content() {
    let place = tempfile::tempdir().unwrap();
    let copy = place.path().join("version");
    unpacked(&packed(Path::new("/proc/version"), "version"), &copy).unwrap();
    assert!(fs::read_to_string(copy).unwrap().starts_with("Linux"));
}

/// A stream that breaks off after so many bytes.
struct Broken<'a>(&'a [u8], usize);

impl Read for Broken<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.1);
        if count == 0 {
            return Err(io::Error::other("the line is dead"));
        }
        self.1 -= count;
        self.0.read(&mut buffer[..count])
    }
}

#[test]
fn what_breaks_off_leaves_nothing_half() {
    let place = tempfile::tempdir().unwrap();
    let stream = packed(&tree(place.path()), "tree");
    let copy = place.path().join("copy");
    // Also after the last entry: only the end of the stream says that it was all.
    for length in [0, 100, 512, 5000, 60_000, stream.len() - 1024, stream.len() - 1] {
        let error = unpack(Broken(&stream, length), &at(&copy), Owner::Mine, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Stream, "{length}: {error}");
        assert_eq!(names(place.path()), ["tree"], "{length}");
    }
    let file = place.path().join("file");
    fs::write(&file, "before").unwrap();
    let large = place.path().join("large");
    fs::write(&large, vec![1; 50_000]).unwrap();
    let stream = packed(&large, "large");
    unpack(Broken(&stream, 30_000), &at(&file), Owner::Mine, false).unwrap_err();
    assert_eq!(fs::read_to_string(&file).unwrap(), "before");
    assert_eq!(names(place.path()), ["file", "large", "tree"]);
}

#[test]
fn a_stream_of_many_goes_into_a_directory() {
    let place = tempfile::tempdir().unwrap();
    let stream = stream_of(|stream| {
        raw_entry(stream, "./", tar::EntryType::Directory, "", b"");
        raw_entry(stream, "./a", tar::EntryType::Regular, "", b"one");
        raw_entry(stream, "d/b", tar::EntryType::Regular, "", b"two");
        raw_entry(stream, "d/c", tar::EntryType::Link, "a", b"");
    });
    let into = place.path().join("into");
    let error = unpack(stream.as_slice(), &Target::Into(into.clone()), Owner::Mine, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    fs::create_dir(&into).unwrap();
    unpack(stream.as_slice(), &Target::Into(into.clone()), Owner::Mine, true).unwrap();
    assert_eq!((names(&into), names(&into.join("d"))), (vec!["a".to_owned(), "d".to_owned()], vec!["b".to_owned(), "c".to_owned()]));
    assert_eq!(fs::metadata(into.join("d/c")).unwrap().ino(), fs::metadata(into.join("a")).unwrap().ino());
}
