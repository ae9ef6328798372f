//! Imports run one way (docs/architecture.md): which crate of ours may use which.

use std::{collections::BTreeMap, process::Command};

const ALLOWED: &[(&str, &[&str])] = &[
    ("form-cli", &["form-image", "form-api", "form-archive", "form-bundle", "form-nbd", "formfile", "form-types"]),
    ("form-image", &["form-bundle", "formfile", "form-types"]),
    (
        "form-agent",
        &["form-api", "form-bundle", "form-vmm", "form-nbd", "form-net", "form-state", "form-store", "form-guest", "form-types"],
    ),
    ("form-store", &["form-bundle", "form-nbd", "form-types"]),
    ("form-api", &["form-types"]),
    ("form-net", &["form-types"]),
    ("form-state", &["form-types"]),
    ("form-guest", &["form-archive", "form-types"]),
    ("form-bundle", &["form-types"]),
    ("formfile", &["form-types"]),
    ("form-vmm", &[]),
    ("form-archive", &[]),
    ("form-nbd", &[]),
    ("form-types", &[]),
    ("form-tests", &[]),
];

#[test]
fn crates_use_only_what_the_architecture_allows() {
    let output =
        Command::new(env!("CARGO")).args(["metadata", "--no-deps", "--format-version", "1", "--offline"]).output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let packages = metadata["packages"].as_array().expect("packages");
    assert_eq!(packages.len(), ALLOWED.len(), "a member is missing in the table");
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        let may_use = allowed.get(name).unwrap_or_else(|| panic!("{name} is not in the table"));
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let used = dependency["name"].as_str().expect("a name");
            // Test-only edges (kind "dev") do not shape the programs.
            if !allowed.contains_key(used) || dependency["kind"] == "dev" {
                continue;
            }
            assert!(may_use.contains(&used), "{name} uses {used}: see docs/architecture.md");
        }
    }
}

#[test]
fn no_source_file_is_over_800_lines() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let output = Command::new("git").args(["ls-files", "*.rs"]).current_dir(root).output().expect("git runs");
    let files = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(files.lines().count() > 100, "git lists the sources");
    for file in files.lines() {
        let Ok(text) = std::fs::read_to_string(root.join(file)) else { continue };
        assert!(text.lines().count() <= 800, "{file} is over 800 lines: split it along what it does");
    }
}

/// A test that is ignored runs only where `tests/run-system` names its program.
#[test]
fn every_program_of_ignored_tests_is_run() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let script = std::fs::read_to_string(format!("{root}/tests/run-system")).expect("tests/run-system");
    let mut ignoring = 0;
    for entry in std::fs::read_dir(format!("{root}/tests/tests")).expect("tests/tests") {
        let path = entry.expect("an entry").path();
        let text = std::fs::read_to_string(&path).expect("a test program");
        let program = path.file_stem().expect("a name").to_string_lossy().into_owned();
        for ignored in text.split("#[ignore").skip(1) {
            let name = ignored.split_once("fn ").map_or("", |(_, rest)| rest).split('(').next().unwrap_or_default();
            let run = match name.split('_').next() {
                Some("system") => format!("--test {program} "),
                Some("kvm") => format!("binary form-tests {program})"),
                _ => continue,
            };
            ignoring += 1;
            assert!(script.contains(&run), "nothing runs {name} of {program}");
        }
    }
    assert!(ignoring >= 20, "only {ignoring} tests are ignored: is this looking in the right place?");
}
