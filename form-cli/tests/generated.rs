//! The completion scripts, man pages and command reference that are checked in are those of the present command line.

use std::{fs, path::Path, process::Command};

fn tree(root: &Path, below: &str) -> Vec<String> {
    let mut found: Vec<String> =
        fs::read_dir(root.join(below)).unwrap().map(|entry| format!("{below}/{}", entry.unwrap().file_name().to_string_lossy())).collect();
    found.sort();
    found
}

#[test]
fn are_fresh() {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let fresh = tempfile::tempdir().unwrap();
    assert!(Command::new(env!("CARGO_BIN_EXE_form")).arg("generate").arg(fresh.path()).status().unwrap().success());
    for directory in ["completions", "docs/man"] {
        let (there, should) = (tree(project, directory), tree(fresh.path(), directory));
        assert_eq!(there, should, "run `cargo run -p form-cli -- generate .` and remove what is no longer made");
    }
    let files = [tree(fresh.path(), "completions"), tree(fresh.path(), "docs/man"), vec!["docs/cli.md".to_owned()]].concat();
    for file in files {
        let same = fs::read(project.join(&file)).ok() == fs::read(fresh.path().join(&file)).ok();
        assert!(same, "{file} is stale: run `cargo run -p form-cli -- generate .`");
    }
}
