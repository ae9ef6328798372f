//! Runs the built program in a place of its own.

use std::{
    path::PathBuf,
    process::{Command, Output, Stdio},
};

pub struct Place {
    directory: tempfile::TempDir,
}

/// What a run gave.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

#[allow(dead_code, reason = "each test file uses its part")]
impl Place {
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_form"));
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("FORM_") {
                command.env_remove(variable);
            }
        }
        command
            .args(args)
            .current_dir(self.directory.path())
            .env("HOME", self.path("home"))
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("XDG_CACHE_HOME")
            .env_remove("COLUMNS")
            .env_remove("DOCKER_CONFIG")
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        ran(self.command(args).output().unwrap())
    }

    /// As on a terminal of so many columns.
    pub fn run_narrow(&self, columns: usize, args: &[&str]) -> Ran {
        ran(self.command(args).env("COLUMNS", columns.to_string()).output().unwrap())
    }
}

pub fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}
