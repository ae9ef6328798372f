//! Streams and file systems that mean harm.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
};

use proptest::prelude::*;
use tar::EntryType::{self, Directory, Fifo, GNUSparse, Link, Regular, Symlink};

use super::{tests::names, *};

pub fn stream_of(make: impl FnOnce(&mut tar::Builder<Vec<u8>>)) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    make(&mut builder);
    builder.into_inner().unwrap()
}

fn raw_header(name: &str, kind: EntryType, link: &str) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    // As the crate's own setters refuse to write it.
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o6755);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header.set_cksum();
    header
}

pub fn raw_entry(builder: &mut tar::Builder<Vec<u8>>, name: &str, kind: EntryType, link: &str, content: &[u8]) {
    let mut header = raw_header(name, kind, link);
    header.set_size(content.len() as u64);
    header.set_cksum();
    builder.append(&header, content).unwrap();
}

/// A directory, something outside, and a target that is not there yet.
struct Setting {
    place: tempfile::TempDir,
    outside: PathBuf,
    target: PathBuf,
}

impl Setting {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let (outside, target) = (place.path().join("outside"), place.path().join("target"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "s").unwrap();
        Self { place, outside, target }
    }

    fn unpack(&self, stream: impl Read) -> Result<Summary, ArchiveError> {
        unpack(stream, &Target::Path(self.target.clone()), Owner::Mine, false)
    }

    /// What is beside `outside`, which is as it was.
    fn left(&self) -> Vec<String> {
        assert_eq!(names(&self.outside), ["secret"]);
        assert_eq!(fs::read_to_string(self.outside.join("secret")).unwrap(), "s");
        names(self.place.path()).into_iter().filter(|name| name != "outside").collect()
    }
}

#[test]
fn a_stream_reaches_nothing_outside_its_target() {
    let setting = Setting::new();
    let link = setting.outside.to_str().unwrap();
    let streams = [
        stream_of(|stream| raw_entry(stream, "../outside/new", Regular, "", b"x")),
        stream_of(|stream| {
            raw_entry(stream, "t", Directory, "", b"");
            raw_entry(stream, "t/../../outside/new", Regular, "", b"x");
        }),
        stream_of(|stream| raw_entry(stream, &format!("{link}/new"), Regular, "", b"x")),
        stream_of(|stream| {
            raw_entry(stream, "t", Directory, "", b"");
            raw_entry(stream, "t/way", Symlink, link, b"");
            raw_entry(stream, "t/way/new", Regular, "", b"x");
        }),
        stream_of(|stream| {
            raw_entry(stream, "t", Directory, "", b"");
            raw_entry(stream, "t/d", Directory, "", b"");
            raw_entry(stream, "t/d/a", Regular, "", b"x");
            raw_entry(stream, "t/e", Symlink, link, b"");
            raw_entry(stream, "t/e", Directory, "", b"");
        }),
        stream_of(|stream| {
            raw_entry(stream, "t", Directory, "", b"");
            raw_entry(stream, "t/way", Symlink, link, b"");
            raw_entry(stream, "t/hard", Link, "t/way/secret", b"");
        }),
        stream_of(|stream| {
            raw_entry(stream, "t", Directory, "", b"");
            raw_entry(stream, "t/hard", Link, &format!("{link}/secret"), b"");
        }),
    ];
    for (number, stream) in streams.iter().enumerate() {
        let into = setting.place.path().join("into");
        fs::create_dir(&into).unwrap();
        for target in [Target::Path(setting.target.clone()), Target::Exactly(setting.target.clone()), Target::Into(into.clone())] {
            let error = unpack(stream.as_slice(), &target, Owner::Mine, false).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{number}: {error}");
        }
        fs::remove_dir_all(into).unwrap();
        assert!(setting.left().is_empty(), "{number}");
    }
}

/// Whatever a stream is made of, nothing outside is touched, and nothing is left of one that fails.
#[derive(Clone, Debug)]
struct Piece(String, EntryType, String, Vec<u8>);

fn piece() -> impl Strategy<Value = Piece> {
    let part = || prop::sample::select(vec!["t", "a", "b", "..", ".", "", "outside", "secret", "target"]);
    let path = || prop::collection::vec(part(), 1..5).prop_map(|parts| parts.join("/"));
    let link = prop_oneof![path(), Just("../outside".to_owned()), Just("../../outside/secret".to_owned())];
    let kind = prop::sample::select(vec![Directory, Directory, Regular, Symlink, Link, Fifo, EntryType::Char, EntryType::Continuous]);
    (path(), kind, link, prop::collection::vec(any::<u8>(), 0..700))
        .prop_map(|(path, kind, link, content)| Piece(path, kind, link, content))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn nothing_outside_is_touched_whatever_the_stream_holds(pieces in prop::collection::vec(piece(), 1..10), is_there in any::<bool>(), exact in any::<bool>()) {
        let setting = Setting::new();
        let stream = stream_of(|stream| {
            raw_entry(stream, "t", Directory, "", b"");
            for Piece(path, kind, link, content) in &pieces {
                let content: &[u8] = if *kind == Regular { content } else { b"" };
                raw_entry(stream, path, *kind, link, content);
            }
        });
        if is_there {
            fs::create_dir(&setting.target).unwrap();
            symlink(&setting.outside, setting.target.join("a")).unwrap();
        }
        let target = if exact { Target::Exactly(setting.target.clone()) } else { Target::Path(setting.target.clone()) };
        let result = unpack(stream.as_slice(), &target, Owner::Mine, false);
        let expected: &[&str] = if is_there || result.is_ok() { &["target"] } else { &[] };
        prop_assert_eq!(setting.left(), expected);
        let temporary = walk(setting.place.path()).into_iter().find(|path| path.to_string_lossy().contains("form-copy"));
        prop_assert_eq!(temporary, None);
    }

    #[test]
    fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..3000), at in 0_usize..1500, other in any::<u8>()) {
        let setting = Setting::new();
        let mut stream = stream_of(|stream| {
            raw_entry(stream, "t", Directory, "", b"");
            raw_entry(stream, "t/a", Regular, "", b"hello");
        });
        if let Some(byte) = stream.get_mut(at) {
            *byte = other;
        }
        stream.append(&mut bytes);
        let _ = setting.unpack(stream.as_slice());
        prop_assert_eq!(names(&setting.outside), ["secret"]);
    }
}

fn walk(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.symlink_metadata().unwrap().is_dir() {
            found.extend(walk(&path));
        }
        found.push(path);
    }
    found
}

/// A stream during which something happens, when so much of it has been read.
struct Acting<'a, F: FnMut()> {
    stream: &'a [u8],
    until: usize,
    act: F,
}

impl<F: FnMut()> Read for Acting<'_, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.until == 0 {
            (self.act)();
            self.until = usize::MAX;
        }
        let count = buffer.len().min(self.until).min(self.stream.len());
        buffer[..count].copy_from_slice(&self.stream[..count]);
        self.stream = &self.stream[count..];
        self.until -= count;
        Ok(count)
    }
}

#[test]
fn a_directory_that_somebody_replaces_with_a_link_meanwhile_leads_nowhere() {
    // The same with a file in it before, so that the way to it is known already.
    for known in [false, true] {
        let setting = Setting::new();
        let stream = stream_of(|stream| {
            raw_entry(stream, "t", Directory, "", b"");
            raw_entry(stream, "t/d", Directory, "", b"");
            if known {
                raw_entry(stream, "t/d/before", Regular, "", b"");
            }
            raw_entry(stream, "t/d/new", Regular, "", b"x");
            raw_entry(stream, "t/d/e", Directory, "", b"");
        });
        fs::create_dir_all(setting.target.join("t/d")).unwrap();
        let swap = || {
            fs::rename(setting.target.join("t/d"), setting.target.join("t/moved")).unwrap();
            symlink(&setting.outside, setting.target.join("t/d")).unwrap();
        };
        let _ = setting.unpack(Acting { stream: &stream, until: if known { 3 * 512 } else { 2 * 512 }, act: swap });
        assert_eq!(setting.left(), ["target"], "{known}");
    }
}

/// Does something when so many bytes have been written.
struct Watching<F: FnMut()> {
    until: usize,
    act: F,
}

impl<F: FnMut()> Write for Watching<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.until > 0 && self.until <= bytes.len() {
            (self.act)();
        }
        self.until = self.until.saturating_sub(bytes.len());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_vanishes_while_it_is_copied_was_not_there() {
    let setting = Setting::new();
    let tree = setting.place.path().join("tree");
    fs::create_dir_all(tree.join("c/d")).unwrap();
    fs::write(tree.join("a"), vec![1; 10_000]).unwrap();
    fs::write(tree.join("b"), "b").unwrap();
    let gone = || {
        fs::remove_file(tree.join("b")).unwrap();
        fs::remove_dir_all(tree.join("c")).unwrap();
    };
    let summary = pack(&tree, "tree".as_ref(), Watching { until: 5000, act: gone }).unwrap();
    assert_eq!((summary.files, summary.bytes), (1, 10_000));
}

#[test]
fn a_stream_that_ends_too_early_is_not_whole_and_leaves_no_half_file() {
    let setting = Setting::new();
    let stream = stream_of(|stream| raw_entry(stream, "a", Regular, "", &[7; 2000]));
    fs::create_dir(&setting.target).unwrap();
    fs::write(setting.target.join("a"), "before").unwrap();
    // Nothing at all, half a header, half a file, a file without its padding, no end.
    for length in [0, 100, 1500, 512 + 2000, 512 + 2048] {
        let error = setting.unpack(&stream[..length]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Stream | ErrorKind::Invalid), "{length}: {error}");
        let into = unpack(&stream[..length], &Target::Into(setting.target.clone()), Owner::Mine, false);
        assert!(into.is_err(), "{length}");
        assert_eq!(names(&setting.target), ["a"], "{length}");
        let content = fs::read(setting.target.join("a")).unwrap();
        // The last of them lack only what comes behind the file.
        assert!(content == b"before" || (length >= 2512 && content == [7; 2000]), "{length}");
    }
    let error = setting.unpack(&b"this is no tar stream at all"[..]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
}

struct Counting<'a, R>(R, &'a mut u64);

impl<R: Read> Read for Counting<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(buffer)?;
        *self.1 += count as u64;
        Ok(count)
    }
}

#[test]
fn a_name_that_does_not_end_is_given_up_soon() {
    for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader] {
        let setting = Setting::new();
        let mut header = raw_header("././@LongLink", kind, "");
        header.set_size(64 << 20);
        header.set_cksum();
        let mut taken = 0;
        let stream = header.as_bytes().as_slice().chain(io::repeat(b'a').take(64 << 20));
        let error = setting.unpack(Counting(stream, &mut taken)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(taken < 4 << 20, "{kind:?}: {taken} bytes were kept");
        assert!(setting.left().is_empty());
    }
}

#[test]
fn trees_that_are_too_deep_are_refused_at_both_ends() {
    let setting = Setting::new();
    let stream = stream_of(|stream| {
        let mut header = raw_header("", Regular, "");
        let name = vec!["d"; 2000].join("/");
        stream.append_data(&mut header, name, io::empty()).unwrap();
    });
    let error = setting.unpack(stream.as_slice()).unwrap_err();
    assert!(error.to_string().contains("deeper than"), "{error}");
    assert!(setting.left().is_empty());
    let mut deep = setting.place.path().join("deep");
    for _ in 0..300 {
        deep.push("d");
    }
    fs::create_dir_all(&deep).unwrap();
    let deep = setting.place.path().join("deep");
    // With the stack that a thread of a guest has.
    let packing = std::thread::Builder::new().stack_size(2 << 20);
    let errors = packing
        .spawn(move || {
            let measured = measure(&deep, std::time::Duration::from_secs(60)).unwrap_err();
            [measured.to_string(), pack(&deep, "deep".as_ref(), io::sink()).unwrap_err().to_string()]
        })
        .unwrap()
        .join()
        .unwrap();
    assert!(errors.iter().all(|error| error.contains("deeper than")), "{errors:?}");
}

#[test]
fn a_few_bytes_do_not_fill_a_disk() {
    let setting = Setting::new();
    let mut header = raw_header("t", GNUSparse, "");
    header.set_size(0);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.realsize.copy_from_slice(b"00400000000\0");
    gnu.sparse[0].offset.copy_from_slice(b"00400000000\0");
    gnu.sparse[0].numbytes.copy_from_slice(b"00000000000\0");
    header.set_cksum();
    let stream = stream_of(|stream| stream.append(&header, io::empty()).unwrap());
    let error = setting.unpack(stream.as_slice()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    assert!(setting.left().is_empty());
    // Of a user's own stream it is a file with 64 MiB of zeros.
    fs::create_dir(&setting.target).unwrap();
    unpack(stream.as_slice(), &Target::Into(setting.target.clone()), Owner::Mine, false).unwrap();
    assert_eq!(fs::metadata(setting.target.join("t")).unwrap().len(), 64 << 20);

    // What the pax format makes of one would come out as another file.
    let pax = stream_of(|stream| {
        raw_entry(stream, "x", EntryType::XHeader, "", b"22 GNU.sparse.major=1\n");
        raw_entry(stream, "p", Regular, "", b"x");
    });
    let error = unpack(pax.as_slice(), &Target::Into(setting.target.clone()), Owner::Mine, false).unwrap_err();
    assert!(error.to_string().contains("--format=gnu"), "{error}");
    assert_eq!(names(&setting.target), ["t"]);
}

#[test]
fn only_a_file_or_a_directory_is_the_top_of_a_copy() {
    for kind in [Symlink, Link, Fifo, EntryType::Char, EntryType::Block] {
        let setting = Setting::new();
        let stream = stream_of(|stream| raw_entry(stream, "t", kind, "outside/secret", b""));
        let error = setting.unpack(stream.as_slice()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{kind:?}: {error}");
        // Nor does a second one take the first one's place.
        let twice = stream_of(|stream| {
            raw_entry(stream, "t", Regular, "", b"x");
            raw_entry(stream, "t", kind, "outside/secret", b"");
        });
        let error = setting.unpack(twice.as_slice()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{kind:?}: {error}");
        assert!(fs::symlink_metadata(&setting.target).is_ok_and(|there| there.is_file()));
        assert_eq!(setting.left(), ["target"]);
    }
}

#[test]
fn devices_pipes_and_what_leads_to_them_are_not_replaced() {
    let setting = Setting::new();
    let file = stream_of(|stream| raw_entry(stream, "t", Regular, "", b"x"));
    let tree = stream_of(|stream| {
        raw_entry(stream, "t", Directory, "", b"");
        raw_entry(stream, "t/pipe", Regular, "", b"x");
    });
    rustix::fs::mkfifoat(rustix::fs::CWD, &setting.target, rustix::fs::Mode::RUSR).unwrap();
    for stream in [&file, &tree] {
        let error = setting.unpack(stream.as_slice()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(fs::symlink_metadata(&setting.target).unwrap().file_type().is_fifo());
    }
    fs::remove_file(&setting.target).unwrap();
    symlink("/dev/null", &setting.target).unwrap();
    let error = setting.unpack(file.as_slice()).unwrap_err();
    assert!(error.to_string().contains("leads to what is no file"), "{error}");
    assert!(setting.target.is_symlink());
    fs::remove_file(&setting.target).unwrap();
    fs::create_dir_all(setting.target.join("t")).unwrap();
    let pipe = setting.target.join("t/pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR).unwrap();
    let error = setting.unpack(tree.as_slice()).unwrap_err();
    assert!(error.to_string().contains("is a device, a pipe or a socket"), "{error}");
    assert!(fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
    assert_eq!(names(&setting.target.join("t")), ["pipe"]);
    // A link to a file gives way itself, the file stays.
    fs::remove_dir_all(&setting.target).unwrap();
    symlink(setting.outside.join("secret"), &setting.target).unwrap();
    setting.unpack(file.as_slice()).unwrap();
    assert_eq!((setting.left(), fs::read_to_string(&setting.target).unwrap()), (vec!["target".to_owned()], "x".to_owned()));
}

#[test]
fn directories_that_were_there_keep_mode_and_time() {
    let setting = Setting::new();
    let old = setting.target.join("t");
    fs::create_dir_all(&old).unwrap();
    fs::set_permissions(&old, fs::Permissions::from_mode(0o700)).unwrap();
    let stream = stream_of(|stream| {
        raw_entry(stream, "t", Directory, "", b"");
        // Its entry comes only after something in it.
        raw_entry(stream, "t/new/a", Regular, "", b"x");
        raw_entry(stream, "t/new", Directory, "", b"");
    });
    setting.unpack(stream.as_slice()).unwrap();
    let (old, new) = (fs::metadata(&old).unwrap(), fs::metadata(old.join("new")).unwrap());
    assert_eq!((old.mode() & 0o7777, old.mtime() != 0), (0o700, true));
    assert_eq!((new.mode() & 0o7777, new.mtime()), (0o755, 0));
}

#[test]
fn set_id_bits_are_for_those_who_granted_them() {
    let setting = Setting::new();
    let stream = stream_of(|stream| raw_entry(stream, "sh", Regular, "", b"x"));
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    for (owner, mode) in [(Owner::Mine, 0o755), (Owner::Of { uid, gid }, 0o755)] {
        unpack(stream.as_slice(), &Target::Path(setting.target.clone()), owner, false).unwrap();
        assert_eq!(fs::metadata(&setting.target).unwrap().mode() & 0o7777, mode, "{owner:?}");
    }
    let mut header = raw_header("sh", Regular, "");
    header.set_uid(uid.into());
    header.set_gid(gid.into());
    header.set_cksum();
    let kept = stream_of(|stream| stream.append(&header, io::empty()).unwrap());
    unpack(kept.as_slice(), &Target::Path(setting.target.clone()), Owner::Kept, false).unwrap();
    assert_eq!(fs::metadata(&setting.target).unwrap().mode() & 0o7777, 0o6755);
    // Numbers that are no owner, or that mean "leave it" to the kernel.
    for id in [u64::from(u32::MAX), 1 << 40] {
        header.set_uid(id);
        header.set_cksum();
        let stream = stream_of(|stream| stream.append(&header, io::empty()).unwrap());
        let error = unpack(stream.as_slice(), &Target::Path(setting.target.clone()), Owner::Kept, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
}

#[test]
fn a_link_to_itself_leaves_nothing_beside_it() {
    let setting = Setting::new();
    let stream = stream_of(|stream| {
        raw_entry(stream, "t", Directory, "", b"");
        raw_entry(stream, "t/a", Regular, "", b"x");
        raw_entry(stream, "t/a", Link, "t/a", b"");
    });
    setting.unpack(stream.as_slice()).unwrap();
    assert_eq!((names(&setting.target), setting.left()), (vec!["a".to_owned()], vec!["target".to_owned()]));
}

#[test]
fn odd_but_harmless_streams_are_taken() {
    let setting = Setting::new();
    let name = OsStr::from_bytes(b"\xff\xfe");
    let stream = stream_of(|stream| {
        // As `git archive` begins.
        raw_entry(stream, "pax_global_header", EntryType::XGlobalHeader, "", b"");
        let mut header = raw_header("", Directory, "");
        header.set_mtime(u64::MAX >> 1);
        stream.append_data(&mut header, "t", io::empty()).unwrap();
        stream.append_data(&mut header.clone(), Path::new("t").join(name), io::empty()).unwrap();
    });
    setting.unpack(stream.as_slice()).unwrap();
    assert_eq!(fs::read_dir(&setting.target).unwrap().next().unwrap().unwrap().file_name(), name);
}

#[test]
fn the_name_is_the_one_that_was_asked_for() {
    let setting = Setting::new();
    let stream = stream_of(|stream| {
        raw_entry(stream, ".ssh", Directory, "", b"");
        raw_entry(stream, "bin/authorized_keys", Regular, "", b"x");
    });
    unpack(stream.as_slice(), &Target::Exactly(setting.target.clone()), Owner::Mine, false).unwrap();
    assert_eq!((setting.left(), names(&setting.target)), (vec!["target".to_owned()], vec!["authorized_keys".to_owned()]));
    // Once more: into the same directory, not below it.
    unpack(stream.as_slice(), &Target::Exactly(setting.target.clone()), Owner::Mine, false).unwrap();
    assert_eq!(names(&setting.target), ["authorized_keys"]);
}
