use form_types::Digest;
use proptest::prelude::*;

use super::*;
use crate::index::Index;

fn path(text: &str) -> TreePath {
    TreePath::parse(text.as_bytes()).unwrap()
}

fn entry(text: &str, kind: Kind) -> Entry {
    Entry { path: path(text), meta: Meta::new(0o755, 0, 0), kind }
}

fn file(text: &str, content: &str) -> Entry {
    entry(text, Kind::File { size: content.len() as u64, digest: Digest::of(content.as_bytes()) })
}

fn directory(text: &str) -> Entry {
    entry(text, Kind::Directory { opaque: false })
}

fn symlink(text: &str, target: &str) -> Entry {
    entry(text, Kind::Symlink { target: XattrValue(target.as_bytes().to_vec()) })
}

fn hard(text: &str, target: &str) -> Entry {
    entry(text, Kind::Link { target: path(target) })
}

fn try_merge(layers: Vec<Vec<Entry>>) -> Result<Diff, BuildError> {
    let mut merger = Merger::new(1000);
    for layer in layers {
        merger.begin_layer();
        for entry in layer {
            merger.add(entry)?;
        }
    }
    Ok(merger.finish())
}

/// Each path with what it is, in order: `/a/`, `/f=x`, `/l->f`, `/s~>target`.
fn merge(layers: Vec<Vec<Entry>>) -> Vec<String> {
    let diff = try_merge(layers).unwrap();
    let mut normal = diff.clone();
    normal.normalise();
    assert_eq!(normal, diff, "what is merged is in normal form");
    let contents = ["x", "y", "z", ""];
    let shown = |entry: &Entry| match &entry.kind {
        Kind::Directory { .. } => format!("{}/", entry.path),
        Kind::File { digest, .. } => {
            let content = contents.iter().find(|content| Digest::of(content.as_bytes()) == *digest).unwrap();
            format!("{}={content}", entry.path)
        }
        Kind::Link { target } => format!("{}->{target}", entry.path),
        Kind::Symlink { target } => format!("{}~>{}", entry.path, String::from_utf8_lossy(&target.0)),
        other => format!("{}:{other:?}", entry.path),
    };
    diff.entries.iter().map(shown).collect()
}

#[test]
fn upper_layers_add_and_replace() {
    let lower = vec![directory("d"), file("d/a", "x"), file("d/b", "x"), directory("gone"), file("gone/in", "x"), file("f", "x")];
    let upper = vec![file("d/b", "y"), file("gone", "y"), directory("f"), file("f/in", "z")];
    assert_eq!(merge(vec![lower, upper]), ["/d/", "/d/a=x", "/d/b=y", "/f/", "/f/in=z", "/gone=y"]);
}

#[test]
fn a_directory_keeps_what_is_in_it_and_takes_new_attributes() {
    let mut upper = directory("d");
    upper.meta = Meta::new(0o700, 5, 6);
    let diff = try_merge(vec![vec![directory("d"), file("d/a", "x")], vec![upper.clone()]]).unwrap();
    assert_eq!(diff.entries, [upper, file("d/a", "x")]);
}

#[test]
fn whiteouts_remove_from_lower_layers_alone_in_any_order() {
    let lower = || vec![directory("d"), directory("d/sub"), file("d/sub/in", "x"), file("d/a", "x"), file("d/ab", "x"), file("d/a-b", "x")];
    assert_eq!(merge(vec![lower(), vec![file("d/.wh.sub", ""), file("d/.wh.a", "")]]), ["/d/", "/d/a-b=x", "/d/ab=x"]);
    for upper in [vec![file("d/.wh.a", ""), file("d/a", "y")], vec![file("d/a", "y"), file("d/.wh.a", "")]] {
        assert!(merge(vec![lower(), upper]).contains(&"/d/a=y".to_owned()));
    }
    // A directory that is made anew.
    for upper in [
        vec![file("d/.wh.sub", ""), directory("d/sub"), file("d/sub/new", "y")],
        vec![directory("d/sub"), file("d/sub/new", "y"), file("d/.wh.sub", "")],
    ] {
        let found = merge(vec![lower(), upper]);
        assert!(found.contains(&"/d/sub/new=y".to_owned()) && !found.contains(&"/d/sub/in=x".to_owned()), "{found:?}");
    }
    assert_eq!(merge(vec![vec![file("a", "x")], vec![file(".wh.none", ""), file("no/where/.wh.none", "")]]), ["/a=x"]);
    assert_eq!(merge(vec![vec![file("a", "x")], vec![file(".wh..wh.plnk", ""), directory(".wh..wh.orph")]]), ["/a=x"]);
    for name in [".wh.", ".wh...", ".wh.."] {
        let error = try_merge(vec![vec![file("a", "x")], vec![file(name, "")]]).unwrap_err().to_string();
        assert!(error.contains("names nothing"), "{name}: {error}");
    }
}

#[test]
fn opaque_directories_hide_lower_layers_in_any_order() {
    let lower = || vec![directory("d"), directory("d/sub"), file("d/sub/old", "x"), file("d/old", "x"), file("d-e", "x")];
    for upper in [
        vec![directory("d"), file("d/.wh..wh..opq", ""), file("d/new", "y"), file("d/sub/new", "y")],
        vec![directory("d"), file("d/new", "y"), file("d/sub/new", "y"), file("d/.wh..wh..opq", "")],
        // Without the directory itself.
        vec![file("d/new", "y"), file("d/.wh..wh..opq", ""), file("d/sub/new", "y")],
    ] {
        assert_eq!(merge(vec![lower(), upper]), ["/d/", "/d-e=x", "/d/new=y", "/d/sub/", "/d/sub/new=y"]);
    }
}

#[test]
fn hard_links_lead_across_layers() {
    // To a lower layer; then each name goes its own way.
    let lower = || vec![file("a", "x"), hard("b", "a")];
    assert_eq!(merge(vec![lower(), vec![hard("c", "b")]]), ["/a=x", "/b->/a", "/c->/a"]);
    assert_eq!(merge(vec![lower(), vec![file("a", "y")]]), ["/a=y", "/b=x"]);
    assert_eq!(merge(vec![lower(), vec![file(".wh.a", "")], vec![hard("0", "b")]]), ["/0=x", "/b->/0"]);
    assert_eq!(merge(vec![lower(), vec![file("a", "y"), hard("d", "a")]]), ["/a=y", "/b=x", "/d->/a"]);
    for (layer, culprit) in [
        (vec![hard("l", "none")], "/l"),
        (vec![hard("a", "a")], "/a"),
        (vec![directory("dir"), hard("l", "dir")], "/l"),
        (vec![file(".wh.a", ""), hard("l", "a")], "/l"),
        (vec![directory("dir"), file("dir/in", "y"), hard("dir", "dir/in")], "/dir"),
    ] {
        let error = try_merge(vec![lower(), layer]).unwrap_err().to_string();
        assert!(error.contains(&format!("hard link {culprit} leads")), "{error}");
    }
}

#[test]
fn files_below_links_stay_inside_the_image() {
    let lower =
        || vec![directory("usr"), directory("usr/lib"), symlink("lib", "usr/lib"), symlink("up", "../../../etc"), symlink("abs", "/usr")];
    let found = merge(vec![lower(), vec![file("lib/a", "x"), file("up/passwd", "y"), file("abs/lib/b", "z"), hard("lib/c", "lib/a")]]);
    let expected = [
        "/abs~>/usr",
        "/etc/",
        "/etc/passwd=y",
        "/lib~>usr/lib",
        "/up~>../../../etc",
        "/usr/",
        "/usr/lib/",
        "/usr/lib/a=x",
        "/usr/lib/b=z",
        "/usr/lib/c->/usr/lib/a",
    ];
    assert_eq!(found, expected);
    // In one layer too, and a directory takes the place of a link.
    assert_eq!(merge(vec![vec![symlink("l", "d"), file("l/in", "x")]]), ["/d/", "/d/in=x", "/l~>d"]);
    assert_eq!(merge(vec![lower(), vec![directory("lib"), file("lib/a", "x")]])[1..3], ["/lib/", "/lib/a=x"]);
    // No entry lies below anything but a directory.
    for layer in [
        vec![file("f", "x"), file("f/in", "y")],
        vec![symlink("l", "l"), file("l/in", "y")],
        vec![file("f", "x"), symlink("l", "f"), file("l/in", "y")],
    ] {
        let error = try_merge(vec![layer]).unwrap_err().to_string();
        assert!(error.contains("no directory of the image"), "{error}");
    }
}

#[test]
fn links_that_make_paths_too_long_are_refused() {
    let long = "n".repeat(250);
    let target = vec![long.as_str(); 15].join("/");
    let layer = |to: &str| vec![vec![symlink("l", &target), symlink(&format!("{target}/m"), to), file("l/m/in", "x")]];
    assert!(try_merge(layer(&format!("/{target}"))).is_ok());
    // Below itself it is twice as long.
    assert!(try_merge(layer(&target)).is_err());
    assert!(try_merge(vec![vec![symlink("l", &"n".repeat(256)), file("l/in", "x")]]).is_err());
}

#[test]
fn parents_that_no_layer_has_are_made() {
    assert_eq!(merge(vec![vec![file("a/b/c", "x")]]), ["/a/", "/a/b/", "/a/b/c=x"]);
    let diff = try_merge(vec![vec![file("a/b", "x")]]).unwrap();
    assert_eq!(diff.entries[0].meta, Meta::new(0o755, 0, 0));
}

#[test]
fn files_are_counted() {
    let mut merger = Merger::new(3);
    merger.begin_layer();
    merger.add(file("a", "x")).unwrap();
    merger.add(file("b", "x")).unwrap();
    assert!(!merger.is_too_many());
    merger.add(file("c", "x")).unwrap();
    assert!(merger.is_too_many());
    assert!(merger.add(file("d", "x")).is_err());
}

/// Any entry: few names, so that they meet.
fn any_entry() -> impl Strategy<Value = Entry> {
    let part = prop::sample::select(vec!["a", "b", "c", ".wh.a", ".wh.b", ".wh..wh..opq"]);
    let path = prop::collection::vec(part, 1..4).prop_map(|parts| parts.join("/"));
    let target = prop::sample::select(vec!["a", "b", "a/b", "/b/c", "../../a", ".", "c/../b"]);
    (path, 0..5, target).prop_map(|(path, kind, target)| match kind {
        0 => directory(&path),
        1 => symlink(&path, target),
        2 => TreePath::parse(target.as_bytes()).map_or_else(|_| file(&path, "y"), |_| hard(&path, target)),
        _ => file(&path, "x"),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    /// Whatever the layers are: everything lies in a directory, and what comes out is a base like any other.
    #[test]
    fn any_layers_make_a_tree(layers in prop::collection::vec(prop::collection::vec(any_entry(), 0..12), 1..4)) {
        let mut merger = Merger::new(1000);
        for layer in layers {
            merger.begin_layer();
            for entry in layer {
                // What leads nowhere is refused and leaves the tree as it was, or with a directory more.
                let _ = merger.add(entry);
            }
        }
        let diff = merger.finish();
        let mut normal = diff.clone();
        normal.normalise();
        prop_assert_eq!(&normal, &diff);
        let mut index = Index::new();
        index.apply(&diff);
        for entry in &diff.entries {
            prop_assert!(index.get(&entry.path).is_some(), "{:?} is lost", entry);
            let parent = entry.path.parent().unwrap();
            prop_assert!(index.get(&parent).is_some_and(|node| node.is_directory()), "{:?} lies in no directory", entry);
            let is_mark = entry.path.name().starts_with(WHITEOUT) && !matches!(entry.kind, Kind::Directory { .. });
            prop_assert!(!is_mark, "{:?} is no file", entry);
        }
    }
}
