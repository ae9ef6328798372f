//! The fuzz targets are a workspace of their own (tests/fuzz), but fuzz what is released: the same versions of everything.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Versions by package, of what comes from a registry.
fn versions(lock: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let text = std::fs::read_to_string(lock).expect("a lock file");
    let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in text.split("[[package]]").skip(1) {
        let value = |key: &str| package.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"'));
        if let (Some(name), Some(version), Some(_)) = (value("name"), value("version"), value("source")) {
            versions.entry(name.to_owned()).or_default().insert(version.to_owned());
        }
    }
    versions
}

#[test]
fn what_is_fuzzed_has_the_versions_of_what_is_released() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let released = versions(&root.join("Cargo.lock"));
    let fuzzed = versions(&root.join("tests/fuzz/Cargo.lock"));
    assert!(fuzzed.len() > 50 && fuzzed.contains_key("libfuzzer-sys"), "{} packages", fuzzed.len());
    for (name, versions) in &fuzzed {
        if let Some(of_release) = released.get(name) {
            assert!(versions.is_subset(of_release), "{name}: fuzzed is {versions:?}, released {of_release:?}: run `tests/run-fuzz --lock`");
        }
    }
}
