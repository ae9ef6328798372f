//! The built programs, as `make build` lays them out, run the way a user runs them.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// `bin/` and `lib/formation/` below `DIST`.
pub struct Programs {
    dist: PathBuf,
    /// Where `form-vmm` and `form-guest` are.
    library: PathBuf,
    /// HOME of every command: what a test leaves behind is in it.
    home: PathBuf,
}

/// What a command said and how it ended.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    line: String,
}

impl Programs {
    /// # Panics
    /// Without `DIST`: `make test-system` sets it.
    pub fn new(home: impl Into<PathBuf>) -> Self {
        let dist: PathBuf = std::env::var_os("DIST").expect("DIST names the programs; run `make test-system`").into();
        Self { library: dist.join("lib/formation"), dist, home: home.into() }
    }

    /// With the programs of VMs that are in `library` instead of those that belong to the agent's build.
    #[must_use]
    pub fn with_library(mut self, library: impl Into<PathBuf>) -> Self {
        self.library = library.into();
        self
    }

    /// The program of a VM process.
    pub fn vmm(&self) -> PathBuf {
        self.library.join("form-vmm")
    }

    pub fn dist(&self) -> &Path {
        &self.dist
    }

    pub fn form<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Ran {
        self.run(self.command("form", arguments))
    }

    /// Where a program for users is.
    pub fn path(&self, program: &str) -> PathBuf {
        self.dist.join("bin").join(program)
    }

    pub fn command<I: AsRef<OsStr>>(&self, program: &str, arguments: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new(self.path(program));
        command.args(arguments);
        self.prepare(command)
    }

    /// A line for bash, in the same surroundings.
    pub fn shell(&self, line: &str) -> Command {
        let mut command = Command::new("bash");
        command.args(["-c", line]);
        self.prepare(command)
    }

    fn prepare(&self, mut command: Command) -> Command {
        command
            .env("FORM_LIBRARY", &self.library)
            .env("XDG_CONFIG_HOME", self.home.join("config"))
            .env("XDG_DATA_HOME", self.home.join("data"))
            .env("NO_COLOR", "1")
            .stdin(std::process::Stdio::null());
        command
    }

    /// # Panics
    /// When the program cannot be started.
    pub fn run(&self, mut command: Command) -> Ran {
        let line = format!("{command:?}").split(' ').skip_while(|word| word.contains('=')).collect::<Vec<_>>().join(" ");
        let Output { status, stdout, stderr } = command.output().expect("the program starts");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let ran = Ran { code: status.code(), stdout: text(stdout), stderr: text(stderr), line };
        // Shown by the test runner when the test fails, and read by a person then.
        println!("$ {}\n{}{}[exit {:?}]", ran.line, ran.stdout, ran.stderr, ran.code);
        ran
    }
}

impl Ran {
    /// # Panics
    /// When the command failed.
    #[must_use]
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// # Panics
    /// When it exited otherwise.
    #[must_use]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}{}", self.line, self.stdout, self.stderr);
        self
    }

    /// Standard output as JSON.
    ///
    /// # Panics
    /// When it is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{}: {error}\n{}", self.line, self.stdout))
    }
}
