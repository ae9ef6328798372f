//! Images as files: written, read on another machine (another cache), damaged on the way.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use form_image::{BuildError, BuildEvent, BuildOptions, Builder, BuiltImage, CachePaths, Cancel};

/// A machine: its build cache, and a place for files.
struct Machine {
    directory: tempfile::TempDir,
}

fn silent(_: BuildEvent<'_>) {}

impl Machine {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn builder(&self) -> Builder {
        Builder::new(CachePaths::new(self.path("cache")))
    }

    /// An image with some files of which `text` is one.
    fn build(&self, text: &str) -> BuiltImage {
        let context = self.path("context");
        fs::create_dir_all(&context).unwrap();
        fs::write(context.join("text"), text).unwrap();
        let noise: Vec<u8> = (0..200_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        fs::write(context.join("noise"), noise).unwrap();
        let formfile = "NAME web\nFROM scratch\nCOPY noise /noise\nCOPY text /text\nENTRYPOINT /noise\nUSER username:ada passwd:hunter2\n";
        let spec = formfile::check("Formfile", formfile, &formfile::LowerOptions::default()).spec.unwrap();
        self.builder().build(&spec, &context, &BuildOptions::default(), &mut silent).unwrap()
    }

    fn export(&self, image: &str, to: &Path) -> Result<form_image::Exported, BuildError> {
        let is_directory = to.extension().is_none();
        let original = self.builder().original(&image.parse().unwrap())?;
        self.builder().export(&original, to, is_directory, &Cancel::new(), &mut silent)
    }

    fn import(&self, from: &Path, name: Option<&str>) -> Result<BuiltImage, BuildError> {
        let name = name.map(|name| name.parse().unwrap());
        self.builder().import(from, name.as_ref(), &Cancel::new(), &mut silent)
    }

    /// Why a file is not taken in; after that nothing of it is here.
    fn refuses(&self, from: &Path) -> String {
        let before = files(&self.path("cache/blocks"));
        let error = self.import(from, None).unwrap_err();
        assert!(matches!(error, BuildError::Artifact { .. } | BuildError::Io { .. }), "{error:?}");
        assert_eq!(files(&self.path("cache/blocks")), before, "{error}");
        assert_eq!(self.builder().store().list().unwrap().len(), 0);
        error.to_string()
    }
}

/// Every file below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut found: Vec<PathBuf> = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

#[test]
fn an_image_is_the_same_on_another_machine() {
    let (here, there) = (Machine::new(), Machine::new());
    let image = here.build("one");
    let exported = here.export("web", &here.path("web.tar")).unwrap();
    assert_eq!((exported.version, exported.digest), (1, image.digest));
    let imported = there.import(&here.path("web.tar"), None).unwrap();
    assert_eq!((imported.digest, imported.version, imported.unchanged), (image.digest, 1, false));
    assert_eq!(imported.manifest, image.manifest);
    assert!(there.builder().store().verify(&"web".parse().unwrap()).unwrap().bad.is_empty());

    // Once more it is there already; under another name it is another image of the same blocks.
    assert!(there.import(&here.path("web.tar"), None).unwrap().unchanged);
    let blocks = files(&there.path("cache/blocks")).len();
    let shop = there.import(&here.path("web.tar"), Some("shop")).unwrap();
    assert_eq!((shop.name.as_str(), shop.manifest.config.name.as_str(), shop.version), ("shop", "shop", 1));
    assert_ne!(shop.digest, image.digest);
    assert_eq!((shop.manifest.rootfs.clone(), files(&there.path("cache/blocks")).len()), (image.manifest.rootfs.clone(), blocks));

    // As a directory the blobs are the same, from either machine.
    here.export("web:1", &here.path("layout")).unwrap();
    let again = there.export("web", &there.path("layout")).unwrap();
    assert_eq!((again.artifact, again.size), (exported.artifact, exported.size));
    let names = |machine: &Machine| files(&machine.path("layout/blobs")).into_iter().map(|path| path.file_name().unwrap().to_owned());
    assert!(names(&here).eq(names(&there)));
    assert_eq!(Machine::new().import(&here.path("layout"), None).unwrap().digest, image.digest);
    // No password is in it.
    assert!(files(&here.path("layout")).iter().all(|path| !fs::read(path).unwrap().windows(7).any(|bytes| bytes == b"hunter2")));

    // Built upon, it has the blocks that it has where it was made.
    let upon = |machine: &Machine| {
        let context = machine.path("upon");
        fs::create_dir_all(&context).unwrap();
        fs::write(context.join("more"), "more").unwrap();
        let formfile = "NAME next\nFROM image:web:1\nCOPY more /etc/more\nWORKDIR /srv\nENTRYPOINT /noise\n";
        let spec = formfile::check("Formfile", formfile, &formfile::LowerOptions::default()).spec.unwrap();
        machine.builder().build(&spec, &context, &BuildOptions::default(), &mut silent).unwrap()
    };
    let (ours, theirs) = (upon(&here), upon(&there));
    assert_eq!((ours.manifest.history.len(), theirs.manifest.history.len()), (6, 3));
    assert!(ours.manifest.rootfs == theirs.manifest.rootfs);
    assert!(upon(&there).unchanged);

    // Of the next version only what changed is new.
    here.build("two");
    here.export("web:2", &here.path("second")).unwrap();
    let old: Vec<_> = names(&here).collect();
    let new = files(&here.path("second/blobs")).iter().filter(|path| !old.contains(&path.file_name().unwrap().to_owned())).count();
    assert_eq!(new, 3, "the manifest of the artifact, ours, and one pack");
}

#[test]
fn what_is_there_is_not_written_over() {
    let machine = Machine::new();
    machine.build("one");
    fs::write(machine.path("taken.tar"), "mine").unwrap();
    fs::create_dir(machine.path("full")).unwrap();
    fs::write(machine.path("full/file"), "mine").unwrap();
    for taken in ["taken.tar", "full"] {
        assert!(matches!(machine.export("web", &machine.path(taken)), Err(BuildError::Exists { .. })), "{taken}");
    }
    assert_eq!((fs::read_to_string(machine.path("taken.tar")).unwrap(), files(&machine.path("full")).len()), ("mine".into(), 1));
    fs::create_dir(machine.path("empty")).unwrap();
    machine.export("web", &machine.path("empty")).unwrap();
    assert!(machine.path("empty/index.json").exists());
    assert!(machine.export("web:7", &machine.path("x.tar")).is_err());
    assert!(machine.export("web", &machine.path("nowhere/x.tar")).is_err());

    // Interrupted, and with a damaged block: nothing is left.
    let before = fs::read_dir(machine.directory.path()).unwrap().count();
    let cancel = Cancel::new();
    cancel.cancel();
    let original = machine.builder().original(&"web".parse().unwrap()).unwrap();
    let stopped = machine.builder().export(&original, &machine.path("y.tar"), false, &cancel, &mut silent);
    assert!(matches!(stopped, Err(BuildError::Interrupted)), "{stopped:?}");
    fs::write(&files(&machine.path("cache/blocks"))[0], "damaged").unwrap();
    for target in ["y.tar", "y"] {
        assert!(matches!(machine.export("web", &machine.path(target)), Err(BuildError::Block(_))), "{target}");
    }
    assert_eq!(fs::read_dir(machine.directory.path()).unwrap().count(), before);
}

#[test]
fn what_is_damaged_is_refused_and_leaves_nothing() {
    let (here, there) = (Machine::new(), Machine::new());
    here.build("one");
    here.export("web", &here.path("web.tar")).unwrap();
    here.export("web", &here.path("layout")).unwrap();
    let whole = fs::read(here.path("web.tar")).unwrap();
    let damaged = there.path("damaged.tar");

    // Cut off anywhere.
    for part in [0, 100, 700, whole.len() / 3, whole.len() / 2, whole.len() - 4000] {
        fs::write(&damaged, &whole[..part]).unwrap();
        there.refuses(&damaged);
    }
    // A flipped bit in every region of the file; the padding between its parts means nothing.
    for step in 1..25 {
        let at = whole.len() * step / 25;
        fs::write(&damaged, &whole).unwrap();
        File::options().write(true).open(&damaged).unwrap().write_all_at(&[whole[at] ^ 1], at as u64).unwrap();
        match there.import(&damaged, None) {
            Err(_) => drop(there.refuses(&damaged)),
            Ok(image) => {
                assert!(whole[at] == 0, "byte {at} is not looked at");
                assert!(there.builder().store().verify(&"web".parse().unwrap()).unwrap().bad.is_empty());
                there.builder().store().remove(&"web".parse().unwrap()).unwrap();
                there.builder().prune(&mut silent).unwrap();
                drop(image);
            }
        }
    }
    // Garbage, something else, nothing.
    fs::write(&damaged, &whole[1000..9000]).unwrap();
    assert!(there.refuses(&damaged).contains("no tar file"));
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&whole[..2000]).unwrap();
    fs::write(&damaged, packed.finish().unwrap()).unwrap();
    assert!(there.refuses(&damaged).contains("gunzip"));
    assert!(there.refuses(here.path("context").as_path()).contains("oci-layout is missing"));
    assert!(matches!(there.import(&here.path("none.tar"), None), Err(BuildError::Io { .. })));

    // A blob is missing; a blob of another image is in its place.
    let largest = files(&here.path("layout/blobs")).into_iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let pack = fs::read(&largest).unwrap();
    fs::remove_file(&largest).unwrap();
    assert!(there.refuses(&here.path("layout")).contains("is missing"));
    fs::write(&largest, [&pack[..], b"more"].concat()).unwrap();
    assert!(there.refuses(&here.path("layout")).contains("longer than it should be"));
    // A pipe in its place is not waited for.
    fs::remove_file(&largest).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &largest, rustix::fs::Mode::RWXU).unwrap();
    assert!(there.refuses(&here.path("layout")).contains("no ordinary file"));
    fs::remove_file(&largest).unwrap();
    fs::write(&largest, &pack).unwrap();

    // Somebody else's layout.
    let index = here.path("layout/index.json");
    let sound = fs::read_to_string(&index).unwrap();
    fs::write(&index, r#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
    assert!(there.refuses(&here.path("layout")).contains("no image that `form image export` wrote"));
    fs::write(&index, sound).unwrap();
    there.import(&here.path("layout"), None).unwrap();
}

#[test]
fn an_interrupted_import_leaves_what_was_there() {
    let (here, there) = (Machine::new(), Machine::new());
    here.build("one");
    here.export("web", &here.path("web.tar")).unwrap();
    there.build("another");
    let before = files(&there.path("cache/blocks"));
    let cancel = Cancel::new();
    let stop = cancel.clone();
    let mut observer = move |event: BuildEvent<'_>| {
        if matches!(event, BuildEvent::Output { .. }) {
            stop.cancel();
        }
    };
    let stopped = there.builder().import(&here.path("web.tar"), Some(&"copy".parse().unwrap()), &cancel, &mut observer);
    assert!(matches!(stopped, Err(BuildError::Interrupted | BuildError::Cancelled)), "{stopped:?}");
    assert_eq!(files(&there.path("cache/blocks")), before);
    assert!(there.builder().store().verify(&"web".parse().unwrap()).unwrap().bad.is_empty());

    // A block that was damaged here is mended by an import of an image that has it.
    let imported = there.import(&here.path("web.tar"), Some("copy")).unwrap();
    let digest = imported.manifest.rootfs.blocks.digests().into_iter().next().unwrap().to_string();
    fs::write(there.path("cache/blocks").join(&digest[..2]).join(&digest), "damaged").unwrap();
    there.import(&here.path("web.tar"), Some("copy")).unwrap();
    assert!(there.builder().store().verify(&"copy".parse().unwrap()).unwrap().bad.is_empty());
}

/// A host that has the image of `Machine`, and how many blocks it has given.
struct Giver<'a> {
    machine: &'a Machine,
    image: &'a BuiltImage,
    given: usize,
    /// It breaks off after so many.
    most: usize,
    damaged: Option<u64>,
}

impl Giver<'_> {
    fn give(&mut self, blocks: &[u64]) -> Result<Vec<form_image::Frame>, BuildError> {
        let store = self.machine.builder().store();
        let map = &self.image.manifest.rootfs.blocks;
        let mut frames = Vec::new();
        for block in blocks {
            if self.given == self.most {
                return Err(BuildError::Host("the host is away".into()));
            }
            self.given += 1;
            let mut plain = store.read_block(map.get(*block).unwrap())?;
            if self.damaged == Some(*block) {
                plain[0] ^= 1;
            }
            frames.push((form_types::Digest::of(&plain), form_bundle::blocks::compress(&plain).unwrap()));
        }
        Ok(frames)
    }

    fn exported(&mut self, by: &Machine, to: &Path) -> Result<form_image::Exported, BuildError> {
        let text = fs::read(self.machine.path("cache/images/web/1.json")).unwrap();
        let image = form_image::HostImage { name: self.image.name.clone(), version: 7, digest: self.image.digest, text };
        let builder = by.builder();
        let original = builder.fetched(image, 4, &mut |blocks| self.give(blocks), &Cancel::new(), &mut silent)?;
        let exported = builder.export(&original, to, false, &Cancel::new(), &mut silent)?;
        original.arrived()?;
        Ok(exported)
    }
}

#[test]
fn an_image_of_a_host_is_exported_without_becoming_one_of_this_machine() {
    let (here, there) = (Machine::new(), Machine::new());
    let image = here.build("one");
    here.export("web", &here.path("web.tar")).unwrap();
    let count = image.manifest.rootfs.blocks.digests().len();
    let mut host = Giver { machine: &here, image: &image, given: 0, most: 6, damaged: None };

    // It breaks off: no file, and what came need not come again.
    let to = there.path("web.tar");
    assert!(matches!(host.exported(&there, &to), Err(BuildError::Host(_))));
    assert!(!to.exists() && files(&there.path("cache/passing")).len() == 4);
    host.most = usize::MAX;
    let exported = host.exported(&there, &to).unwrap();
    assert_eq!((exported.version, exported.digest, host.given), (7, image.digest, 6 + count - 4));
    assert!(fs::read(&to).unwrap() == fs::read(here.path("web.tar")).unwrap(), "it is another file than the one that its builder writes");
    assert!(files(&there.path("cache/passing")).is_empty());
    assert!(there.builder().store().list().unwrap().is_empty() && files(&there.path("cache/blocks")).is_empty());

    // What is here is not asked for; what is damaged there is named, and makes no file.
    there.import(&to, None).unwrap();
    host.given = 0;
    host.exported(&there, &there.path("again.tar")).unwrap();
    assert_eq!(host.given, 0);
    let other = Machine::new();
    let last = image.manifest.rootfs.blocks.iter().last().unwrap().0;
    host.damaged = Some(last);
    let error = host.exported(&other, &other.path("web.tar")).unwrap_err();
    assert!(matches!(&error, BuildError::HostBlock { image, index } if image == "web:7" && *index == last), "{error:?}");
    assert!(!other.path("web.tar").exists());
    // What is left of it goes with the rest that nothing needs.
    assert!(!files(&other.path("cache/passing")).is_empty());
    other.builder().prune(&mut silent).unwrap();
    assert!(files(&other.path("cache/passing")).is_empty());
}
