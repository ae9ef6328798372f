//! An agent with everything it has below one directory, to be killed and started again.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::{fd::AsFd, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use crate::programs::{Programs, Ran};

/// How long anything that a test waits for may take; a host in software emulation is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not in two minutes.
pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not in two minutes");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Serves the page of [`Host::app`].
pub const SERVE: &str = r#"["/bin/busybox", "httpd", "-f", "-v", "-p", "80", "-h", "/www"]"#;

/// The whole answer of an HTTP server on this machine, head included.
///
/// # Errors
/// When there is no server, or it breaks off.
pub fn get(port: u16, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: test\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Whether the page of [`Host::app`] is there.
pub fn answers(port: u16) -> bool {
    get(port, "/").is_ok_and(|text| text.contains("it works"))
}

pub fn is_alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

pub struct Host {
    pub programs: Programs,
    /// Removed with the host.
    pub directory: tempfile::TempDir,
    agent: Option<Child>,
}

impl Host {
    /// A host whose agent has not been started.
    ///
    /// # Panics
    /// Without a place for temporary files.
    pub fn new() -> Self {
        Self::of(Programs::new)
    }

    /// As [`Host::new`], with the programs of VMs that are in `library`.
    ///
    /// # Panics
    /// As [`Host::new`].
    pub fn with_library(library: &Path) -> Self {
        Self::of(|home| Programs::new(home).with_library(library))
    }

    fn of(programs: impl FnOnce(PathBuf) -> Programs) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { programs: programs(directory.path().join("home")), directory, agent: None }
    }

    /// A host with its agent.
    ///
    /// # Panics
    /// When the agent does not start.
    pub fn start() -> Self {
        let mut host = Self::new();
        host.start_agent();
        host
    }

    /// A place for the test's own files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn root(&self) -> PathBuf {
        self.path("host")
    }

    pub fn socket(&self) -> PathBuf {
        self.root().join("run/formation/agent.sock")
    }

    /// Settles what the agent's `agent.yaml` says; from its next start on.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn configure(&self, yaml: &str) {
        let etc = self.root().join("etc/formation");
        fs::create_dir_all(&etc).unwrap();
        fs::write(etc.join("agent.yaml"), yaml).unwrap();
    }

    /// VMs that are there and do not run. Their deploys end before a guest reports, whether this machine runs one or not: the agent has been
    /// configured with [`Host::IMPATIENT`].
    ///
    /// # Panics
    /// When one cannot be deployed or stopped.
    pub fn stopped_vms(&self, names: &[&str]) {
        for (port, name) in (18090..).zip(names) {
            let formfile = self.app(name, SERVE, port);
            let _ = self.form(&["deploy", &formfile, "-y"]);
            let _ = self.form(&["vm", "stop", name]).ok();
        }
    }

    /// A configuration with which no guest is waited for.
    pub const IMPATIENT: &'static str = "boot_timeout_seconds: 1\n";

    /// Starts the agent, to be killed where `failpoint` says, and waits until it answers or is dead.
    ///
    /// # Panics
    /// When it does neither.
    pub fn start_agent_with(&mut self, failpoint: Option<&str>) {
        assert!(self.agent.is_none(), "an agent runs already");
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("agent.log")).unwrap();
        let root = self.root();
        let mut command = self.programs.command("form-agent", ["--root".as_ref(), root.as_os_str(), "run".as_ref()]);
        if let Some(failpoint) = failpoint {
            command.env("FORM_FAILPOINT", failpoint);
        }
        self.agent = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
        wait("the agent answers", || self.has_died() || self.answers());
    }

    /// # Panics
    /// When it does not answer.
    pub fn start_agent(&mut self) {
        self.start_agent_with(None);
        assert!(!self.has_died(), "the agent does not start:\n{}", self.agent_log());
    }

    fn answers(&self) -> bool {
        std::os::unix::net::UnixStream::connect(self.socket()).is_ok()
    }

    /// Whether the agent is gone, whoever ended it.
    ///
    /// # Panics
    /// When none was started.
    pub fn has_died(&mut self) -> bool {
        self.agent.as_mut().expect("an agent").try_wait().unwrap().is_some()
    }

    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.as_ref().map(Child::id)
    }

    /// SIGKILL: no chance to tidy up.
    ///
    /// # Panics
    /// When none runs.
    pub fn kill_agent(&mut self) {
        let mut agent = self.agent.take().expect("an agent");
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// Waits until the agent has died of its failpoint. `false` when it still lives once `is_over` says that it will not come there.
    ///
    /// # Panics
    /// When it ended in another way.
    pub fn dies_at(&mut self, failpoint: &str, mut is_over: impl FnMut(&Self) -> bool) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while !self.has_died() {
            if is_over(self) && !self.has_died() {
                return false;
            }
            assert!(Instant::now() < deadline, "the agent has not come to {failpoint}");
            std::thread::sleep(Duration::from_millis(50));
        }
        let status: ExitStatus = self.agent.take().expect("an agent").wait().unwrap();
        assert_eq!(status.signal(), Some(9), "the agent ended by itself: {status}\n{}", self.agent_log());
        assert!(self.agent_log().contains(&format!("killed at the failpoint {failpoint}")), "it was killed elsewhere");
        true
    }

    pub fn form_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.programs.command("form", arguments);
        command.env("FORM_HOST", format!("unix:{}", self.socket().display()));
        command
    }

    pub fn form(&self, arguments: &[&str]) -> Ran {
        self.programs.run(self.form_command(arguments))
    }

    /// Makes the host this test's, as a user does, and starts the agent: from then on [`Host::remote`] works.
    ///
    /// # Panics
    /// When it cannot be claimed.
    pub fn claim(&mut self) {
        let root = self.root();
        let token = self.programs.run(self.programs.command("form-agent", ["--root".as_ref(), root.as_os_str(), "init".as_ref()])).ok();
        let token = token.stdout.lines().find_map(|line| line.split("--token ").nth(1)).expect("a token").to_owned();
        self.start_agent();
        let _ = self.remote(&["host", "add", "127.0.0.1", "--token", &token]).ok();
    }

    pub fn remote_command(&self, arguments: &[&str]) -> Command {
        self.programs.command("form", arguments)
    }

    /// `form` over the network, signed with the key that owns the host.
    pub fn remote(&self, arguments: &[&str]) -> Ran {
        self.programs.run(self.remote_command(arguments))
    }

    /// A VM as `form ps` shows it; `null` when there is none.
    ///
    /// # Panics
    /// When the agent does not answer.
    pub fn vm(&self, name: &str) -> Value {
        let vms = self.form(&["ps", "-o", "json"]).ok().json();
        vms.as_array().unwrap().iter().find(|vm| vm["name"] == name).cloned().unwrap_or(Value::Null)
    }

    /// The runtime directory and the process of a VM.
    ///
    /// # Panics
    /// When it has none.
    pub fn process(&self, vm: &Value) -> (PathBuf, u32) {
        let directory = self.root().join("run/form-vm").join(vm["id"].as_str().unwrap());
        let record: Value = serde_json::from_slice(&fs::read(directory.join("process.json")).unwrap()).unwrap();
        (directory, record["pid"].as_u64().unwrap() as u32)
    }

    /// The operations, the newest first.
    ///
    /// # Panics
    /// When the agent does not answer.
    pub fn operations(&self) -> Vec<Value> {
        self.form(&["op", "ls", "-o", "json"]).ok().json().as_array().unwrap().clone()
    }

    pub fn no_operation_is_under_way(&self) -> bool {
        self.operations().iter().all(|operation| ["completed", "failed"].contains(&operation["status"].as_str().unwrap_or_default()))
    }

    pub fn agent_log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// Everything that lies around and should not when there is no VM: files, taps, cgroups, firewall rules, processes, half-made things.
    ///
    /// # Panics
    /// When the agent does not answer.
    pub fn leftovers(&self) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        let doctor = self.form(&["doctor", "-o", "json"]);
        assert!(matches!(doctor.code, Some(0 | 1)), "{doctor:?}");
        for check in doctor.json().as_array().unwrap() {
            if check["name"].as_str().unwrap_or_default().starts_with("leftover") {
                found.push(check.to_string());
            }
        }
        for directory in ["run/form-vm", "var/log/formation", "var/lib/formation/vms"] {
            found.extend(entries(&self.root().join(directory)).into_iter().map(|entry| format!("{directory}/{entry}")));
        }
        // Not /sys/class/net: that shows the network that /sys was mounted in.
        let links = output("ip", &["-o", "link"]);
        found.extend(links.lines().filter(|line| line.split(' ').nth(1).is_some_and(|name| name.starts_with("form"))).map(str::to_owned));
        found.extend(processes_of(&self.programs.vmm()).iter().map(|pid| format!("the process {pid}")));
        for group in entries(Path::new("/sys/fs/cgroup")).into_iter().filter(|name| name.starts_with("form-")) {
            found.push(format!("the cgroup {group}"));
        }
        // A published port leads to its VM by DNAT; so do questions of names to the agent, which go to no port of a VM.
        let rules = output("nft", &["list", "ruleset"]);
        found.extend(rules.lines().filter(|line| line.contains("dnat") && line.contains(" 10.")).map(|line| line.trim().to_owned()));
        found
    }

    /// Waits until nothing is left of any VM.
    ///
    /// # Panics
    /// When something is.
    pub fn is_clean(&self) {
        let deadline = Instant::now() + PATIENCE;
        let mut found = self.leftovers();
        // An operation may end a moment before the last line of the driver.
        while !found.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(300));
            found = self.leftovers();
        }
        assert_eq!(found, Vec::<String>::new());
    }

    /// An image of one static program, busybox, that serves one page. Gives the path of its Formfile.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn app(&self, name: &str, entrypoint: &str, host_port: u16) -> String {
        let context = self.path(name);
        fs::create_dir_all(&context).unwrap();
        fs::copy("/bin/busybox", context.join("busybox")).unwrap();
        fs::write(context.join("index.html"), "it works\n").unwrap();
        let formfile = format!(
            "NAME {name}\nFROM scratch\nMEM 128\nCOPY --chmod=755 busybox /bin/busybox\nCOPY --chmod=755 busybox /bin/sh\n\
             COPY index.html /www/index.html\nENTRYPOINT {entrypoint}\nEXPOSE {host_port}:80\n\
             HEALTHCHECK --interval=2s --timeout=5s --start-period=30s http 80 /\n"
        );
        fs::write(context.join("Formfile"), formfile).unwrap();
        context.join("Formfile").to_str().unwrap().to_owned()
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- the agent's log\n{}", self.agent_log());
        }
        if let Some(agent) = &mut self.agent {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        // VMs outlive their agent; a test's must not outlive the test.
        for pid in processes_of(&self.programs.vmm()) {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn entries(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    // What an agent makes half is cleared at its next start, and lies in a place of its own until then.
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name != ".tmp").collect()
}

/// Processes of this very program file. These tests run one at a time.
fn processes_of(program: &Path) -> Vec<u32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program)).collect()
}

/// Moves this thread, and what it starts from now on, into a network of its own with nothing but a loopback interface.
///
/// # Panics
/// Without root.
pub fn enter_own_network() {
    // A namespace lives as long as something is in it: nothing is left of it however the test ends.
    let script = "ip link set lo up && echo up && exec sleep 60";
    let mut holder = Command::new("unshare").args(["--net", "sh", "-ec", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let mut out = std::io::BufReader::new(holder.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut out, &mut said).unwrap();
    assert_eq!(said, "up\n", "these tests need root: a network namespace cannot be made");
    let namespace = fs::File::open(format!("/proc/{}/ns/net", holder.id())).unwrap();
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    let _ = holder.kill();
    let _ = holder.wait();
}
