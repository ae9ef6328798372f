//! A host of a test's own: an agent with everything it has below one directory, and the built programs that talk to it.
//!
//! Runs as root where /dev/kvm runs guests: `tests/kvm-host` makes such a place.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::programs::{Programs, Ran};

/// An agent with everything it has below one directory.
pub struct Host {
    programs: Programs,
    /// Removed with the host.
    pub directory: tempfile::TempDir,
    agent: Option<Child>,
}

impl Host {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut host = Self { programs: Programs::new(directory.path().join("home")), directory, agent: None };
        host.start_agent();
        host
    }

    pub fn root(&self) -> PathBuf {
        self.directory.path().join("host")
    }

    pub fn socket(&self) -> PathBuf {
        self.root().join("run/formation/agent.sock")
    }

    pub fn start_agent(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.directory.path().join("agent.log")).unwrap();
        let root = self.root();
        let mut command = self.programs.command("form-agent", ["--root".as_ref(), root.as_os_str(), "run".as_ref()]);
        let agent = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        self.agent = Some(agent);
        wait("the agent answers", || self.form(&["host", "show"]).code == Some(0));
    }

    /// SIGKILL: no chance to tidy up.
    pub fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    pub fn form_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.programs.command("form", arguments);
        command.env("FORM_HOST", format!("unix:{}", self.socket().display()));
        command
    }

    pub fn form(&self, arguments: &[&str]) -> Ran {
        self.programs.run(self.form_command(arguments))
    }

    pub fn vm(&self, name: &str) -> Value {
        let vms = self.form(&["ps", "-o", "json"]).ok().json();
        let found = vms.as_array().unwrap().iter().find(|vm| vm["name"] == name).cloned();
        found.unwrap_or(Value::Null)
    }

    pub fn process(&self, vm: &Value) -> (PathBuf, u32) {
        let directory = self.root().join("run/form-vm").join(vm["id"].as_str().unwrap());
        let record: Value = serde_json::from_slice(&fs::read(directory.join("process.json")).unwrap()).unwrap();
        (directory, record["pid"].as_u64().unwrap() as u32)
    }

    /// An image of one static program: busybox, which serves one page.
    pub fn app(&self, name: &str, entrypoint: &str, host_port: u16) -> String {
        let context = self.directory.path().join(name);
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

    pub fn agent_log(&self) -> String {
        fs::read_to_string(self.directory.path().join("agent.log")).unwrap_or_default()
    }

    /// The host has nothing left that its agent made for a VM.
    pub fn is_clean(&self) {
        let doctor = self.form(&["doctor", "-o", "json"]).ok().json();
        assert!(!doctor.to_string().contains("leftover"), "{doctor}");
        assert_eq!(fs::read_dir(self.root().join("run/form-vm")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(self.root().join("var/log/formation")).unwrap().count(), 0);
        let links = fs::read_dir("/sys/class/net").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
        assert_eq!(links.filter(|name| name.starts_with("form")).collect::<Vec<_>>(), Vec::<String>::new());
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
        for entry in fs::read_dir(self.root().join("run/form-vm")).into_iter().flatten().flatten() {
            let record = fs::read(entry.path().join("process.json")).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
            if let Some(pid) = record.and_then(|record| record["pid"].as_u64()) {
                let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
            }
        }
    }
}

pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not in two minutes");
        std::thread::sleep(Duration::from_millis(300));
    }
}

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
