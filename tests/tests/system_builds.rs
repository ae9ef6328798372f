//! Builds by the built programs, on their bad days: killed, two at once, by an ordinary user, without a mirror, with other packages.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use form_tests::{
    host::wait,
    programs::{Programs, Ran},
};
use rustix::process::{Pid, Signal, kill_process};

/// A build context and a cache of its own. The base is one static busybox.
struct Project {
    directory: tempfile::TempDir,
    form: Programs,
}

impl Project {
    fn new(steps: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let form = Programs::new(directory.path().join("home"));
        let project = Self { directory, form };
        let bin = project.context().join("root/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::copy("/bin/busybox", bin.join("busybox")).expect("the package busybox-static is installed");
        for name in ["sh", "echo", "sleep", "seq", "id", "chown", "touch"] {
            symlink("busybox", bin.join(name)).unwrap();
        }
        project.write(steps);
        project
    }

    fn context(&self) -> PathBuf {
        self.directory.path().join("context")
    }

    fn write(&self, steps: &str) {
        fs::write(self.context().join("Formfile"), format!("NAME app\nFROM ./root\n{steps}")).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let context = self.context();
        let words = ["build", context.to_str().unwrap()];
        let mut command = self.form.command("form", words.iter().chain(arguments));
        command.env("XDG_CACHE_HOME", self.directory.path().join("cache"));
        command
    }

    /// A build that is to say what it built as JSON.
    fn build(&self, arguments: &[&str]) -> Ran {
        let mut command = self.command(arguments);
        command.args(["-o", "json"]);
        self.form.run(command)
    }

    /// A build as a person starts it, which fails.
    fn fails(&self) -> String {
        self.form.run(self.command(&[])).exits(1).stderr
    }

    /// Starts a build and waits until it has said `word`.
    fn begin(&self, word: &str) -> Child {
        let log = self.directory.path().join("log");
        let mut command = self.command(&[]);
        let child = command.stdout(Stdio::null()).stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
        wait("the build is at that step", || fs::read_to_string(&log).unwrap().lines().any(|line| line.trim() == word));
        child
    }

    fn has_no_leftovers(&self) {
        let layers = self.directory.path().join("cache/form/layers");
        let names: Vec<String> = fs::read_dir(layers).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert!(names.iter().all(|name| !name.starts_with("tmp-")), "{names:?}");
    }
}

/// A process of the machine that was started with this word.
fn running(word: &str) -> Option<i32> {
    fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let found = line.split(|byte| *byte == 0).any(|part| part == word.as_bytes());
        if found { entry.file_name().to_str()?.parse().ok() } else { None }
    })
}

fn is_running(word: &str) -> bool {
    running(word).is_some()
}

#[test]
fn system_a_killed_build_takes_its_steps_with_it_and_the_next_goes_on() {
    let project = Project::new("RUN echo one > /one\nRUN echo up; sleep 77123; echo two > /two\n");
    let mut build = project.begin("up");
    wait("the step sleeps", || is_running("77123"));
    build.kill().unwrap();
    build.wait().unwrap();
    wait("what ran in the step is gone", || !is_running("77123"));
    project.write("RUN echo one > /one\nRUN echo up; echo two > /two\n");
    let next = project.build(&[]).ok();
    assert_eq!(next.stderr.matches(": cached").count(), 2, "what was finished stays: {}", next.stderr);
    project.has_no_leftovers();
}

#[test]
fn system_of_two_builds_of_one_image_the_second_waits_and_finds_everything() {
    let project = Project::new("RUN echo up; sleep 77124; echo one > /one\n");
    let mut first = project.begin("up");
    let log = project.directory.path().join("second");
    let mut command = project.command(&["-o", "json"]);
    let second = command.stdout(Stdio::piped()).stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
    let said = || fs::read_to_string(&log).unwrap();
    wait("the second waits", || said().contains("waiting for another build to end"));
    // Only now the first may go on.
    wait("the step sleeps", || running("77124").is_some());
    let sleeps = Pid::from_raw(running("77124").unwrap()).unwrap();
    kill_process(sleeps, Signal::KILL).unwrap();
    assert!(first.wait().unwrap().success());
    let second = second.wait_with_output().unwrap();
    assert!(second.status.success(), "{}", said());
    let built: serde_json::Value = serde_json::from_slice(&second.stdout).unwrap();
    assert_eq!((&built["version"], &built["unchanged"]), (&1.into(), &true.into()), "{built}");
    assert_eq!(said().matches(": cached").count(), 2, "{}", said());
    project.has_no_leftovers();
}

#[test]
fn system_a_failing_step_says_where_how_and_what_it_said_last() {
    let project = Project::new("RUN echo fine\nRUN for i in $(seq 30); do echo line $i; done; exit 3\n");
    let said = project.fails();
    assert!(said.contains("line 4: ") && said.contains("failed with exit code 3"), "{said}");
    let tail = said.split("--- last lines of the step").nth(1).unwrap_or_else(|| panic!("{said}"));
    assert!(tail.contains("line 11\n") && tail.contains("line 30\n") && !tail.contains("line 10\n"), "the last twenty: {tail}");
    project.has_no_leftovers();
}

#[test]
fn system_a_locked_build_refuses_other_packages() {
    let project = Project::new("RUN echo fine\n");
    let status = project.context().join("root/var/lib/dpkg/status");
    let install = |version: &str| {
        fs::create_dir_all(status.parent().unwrap()).unwrap();
        fs::write(&status, format!("Package: tool\nStatus: install ok installed\nVersion: {version}\n\n")).unwrap();
    };
    install("1.0");
    let missing = project.build(&["--locked"]).exits(1);
    assert!(missing.stderr.contains("build once without --locked"), "{}", missing.stderr);
    let first = project.build(&[]).ok().json();
    let lock = project.context().join("Formfile.lock");
    let locked = fs::read_to_string(&lock).unwrap();
    assert!(locked.contains(r#""tool": "1.0""#), "{locked}");
    assert_eq!(project.build(&["--locked"]).ok().json()["digest"], first["digest"]);
    install("1.1");
    let refused = project.build(&["--locked"]).exits(1);
    assert!(refused.stderr.contains("tool is 1.1 now but locked to 1.0"), "{}", refused.stderr);
    assert_eq!(fs::read_to_string(&lock).unwrap(), locked, "a refused build writes no lock");
    let _ = project.build(&[]).ok();
    assert!(fs::read_to_string(&lock).unwrap().contains(r#""tool": "1.1""#));
}

/// An account of this machine, removed with everything it has.
struct Account(&'static str);

impl Account {
    fn new(name: &'static str) -> Self {
        let account = Self(name);
        account.remove();
        assert!(Command::new("useradd").args(["--create-home", "--shell", "/bin/sh", name]).status().unwrap().success());
        account
    }

    fn remove(&self) {
        // It says so when there is none.
        let _ = Command::new("userdel").args(["--force", "--remove", self.0]).output();
    }

    fn home(&self) -> PathBuf {
        Path::new("/home").join(self.0)
    }

    /// The program as this user, in a clean environment.
    fn run(&self, form: &Programs, program: &Path, arguments: &[&str]) -> Ran {
        let mut command = Command::new("runuser");
        command.args(["-u", self.0, "--", "env", "-i", "PATH=/usr/bin:/bin", "NO_COLOR=1"]);
        command.arg(format!("HOME={}", self.home().display())).arg(program).args(arguments).stdin(Stdio::null());
        form.run(command)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.remove();
    }
}

#[test]
fn system_an_ordinary_user_builds_the_same_image_as_root() {
    let project = Project::new("RUN id -u > /who; touch /mine; chown 33:44 /mine\nCOPY --chown=7:8 Formfile /srv/\n");
    let by_root = project.build(&[]).ok().json();

    let account = Account::new("form-test-user");
    // Where the user can read it, and not where root built.
    let context = account.home().join("project");
    assert!(Command::new("cp").arg("-r").arg(project.context()).arg(&context).status().unwrap().success());
    assert!(Command::new("chown").arg("-R").arg(account.0).arg(&context).status().unwrap().success());
    let program = project.directory.path().join("form");
    fs::copy(project.form.path("form"), &program).unwrap();
    let build = || account.run(&project.form, &program, &["build", context.to_str().unwrap(), "-o", "json"]);
    let by_user = build().ok().json();
    assert_eq!(by_user["digest"], by_root["digest"]);
    assert!(account.home().join(".cache/form/images/app/1.json").exists(), "the cache is in the user's home");
    assert_eq!(build().ok().json()["unchanged"], true);

    // Without a range of ids there is no sandbox, and the way to one is named.
    for list in ["subuid", "subgid"] {
        let path = Path::new("/etc").join(list);
        let kept: String =
            fs::read_to_string(&path).unwrap().lines().filter(|line| !line.starts_with(account.0)).flat_map(|line| [line, "\n"]).collect();
        fs::write(&path, kept).unwrap();
    }
    let refused = build().exits(1);
    assert!(refused.stderr.contains("usermod --add-subuids"), "{}", refused.stderr);
}

#[test]
fn system_a_download_that_breaks_off_is_a_failed_step_that_can_be_repeated() {
    // A mirror that promises much and hangs up.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nhalf");
        }
    });
    let directory = tempfile::tempdir().unwrap();
    let form = Programs::new(directory.path().join("home"));
    let write = |steps: &str| fs::write(directory.path().join("Formfile"), format!("NAME broken-off\nFROM debian:12\n{steps}")).unwrap();
    let apt = directory.path().join("apt.conf");
    let nothing = "Dir::Etc::main \"/dev/null\";\nDir::Etc::parts \"/nonexistent\";\nAcquire::Retries \"0\";\n";
    fs::write(&apt, format!("{nothing}Acquire::http::Proxy \"http://127.0.0.1:{port}\";\n")).unwrap();
    let build = |broken: bool| {
        let mut command = form.command("form", ["build", directory.path().to_str().unwrap()]);
        if broken {
            command.env("APT_CONFIG", &apt);
        }
        form.run(command)
    };
    // Whichever build comes first makes the base.
    write("");
    let _ = build(false).ok();
    write("INSTALL ncal\n");
    let failed = build(true).exits(1);
    assert!(failed.stderr.contains("line 3: `INSTALL ncal` failed with exit code 100"), "{}", failed.stderr);
    assert!(failed.stderr.contains("--- last lines of the step"), "{}", failed.stderr);
    let _ = build(false).ok();
    let _ = form.form(["image", "rm", "--local", "broken-off", "-y"]).ok();
}
