//! One host and its agent under real faults. Runs as root where /dev/kvm runs guests: `tests/kvm-host` makes such a place.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use form_tests::programs::{Programs, Ran};
use serde_json::Value;

/// An agent with everything it has below one directory.
struct Host {
    programs: Programs,
    directory: tempfile::TempDir,
    agent: Option<Child>,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut host = Self { programs: Programs::new(directory.path().join("home")), directory, agent: None };
        host.start_agent();
        host
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("host")
    }

    fn socket(&self) -> PathBuf {
        self.root().join("run/formation/agent.sock")
    }

    fn start_agent(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.directory.path().join("agent.log")).unwrap();
        let root = self.root();
        let mut command = self.programs.command("form-agent", ["--root".as_ref(), root.as_os_str(), "run".as_ref()]);
        let agent = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        self.agent = Some(agent);
        wait("the agent answers", || self.form(&["host", "show"]).code == Some(0));
    }

    /// SIGKILL: no chance to tidy up.
    fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    fn form_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.programs.command("form", arguments);
        command.env("FORM_HOST", format!("unix:{}", self.socket().display()));
        command
    }

    fn form(&self, arguments: &[&str]) -> Ran {
        self.programs.run(self.form_command(arguments))
    }

    fn vm(&self, name: &str) -> Value {
        let vms = self.form(&["ps", "-o", "json"]).ok().json();
        let found = vms.as_array().unwrap().iter().find(|vm| vm["name"] == name).cloned();
        found.unwrap_or(Value::Null)
    }

    fn process(&self, vm: &Value) -> (PathBuf, u32) {
        let directory = self.root().join("run/form-vm").join(vm["id"].as_str().unwrap());
        let record: Value = serde_json::from_slice(&fs::read(directory.join("process.json")).unwrap()).unwrap();
        (directory, record["pid"].as_u64().unwrap() as u32)
    }

    /// An image of one static program: busybox, which serves one page.
    fn app(&self, name: &str, entrypoint: &str, host_port: u16) -> String {
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

    fn agent_log(&self) -> String {
        fs::read_to_string(self.directory.path().join("agent.log")).unwrap_or_default()
    }

    /// The host has nothing left that its agent made for a VM.
    fn is_clean(&self) {
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

const SERVE: &str = r#"["/bin/busybox", "httpd", "-f", "-v", "-p", "80", "-h", "/www"]"#;

fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not in two minutes");
        std::thread::sleep(Duration::from_millis(300));
    }
}

fn answers(port: u16) -> bool {
    let exchange = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    exchange().is_ok_and(|text| text.contains("it works"))
}

fn is_alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_a_vm_outlives_its_agent_and_comes_back_when_its_process_is_killed() {
    let mut host = Host::new();
    let web = host.app("web", SERVE, 18081);
    let _ = host.form(&["deploy", &web, "-y"]).ok();
    assert!(answers(18081));
    let (_, pid) = host.process(&host.vm("web"));

    host.kill_agent();
    assert!(is_alive(pid) && answers(18081), "the VM goes on without its agent");
    host.start_agent();
    wait("the VM is adopted", || host.vm("web")["ready"] == true);
    assert_eq!(host.process(&host.vm("web")).1, pid, "the same process");
    let exec = host.form(&["exec", "web", "--", "/bin/busybox", "echo", "still here"]).ok();
    assert_eq!(exec.stdout, "still here\n");

    Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    wait("it is started again", || {
        let vm = host.vm("web");
        vm["ready"] == true && vm["restarts"].as_u64() >= Some(1)
    });
    wait("it answers again", || answers(18081));

    let _ = host.form(&["vm", "stop", "web"]).ok();
    assert_eq!(host.vm("web")["state"], "stopped");
    assert!(!answers(18081));
    let _ = host.form(&["vm", "start", "web"]).ok();
    wait("it answers after its start", || answers(18081));

    let _ = host.form(&["destroy", "web", "-y"]).ok();
    host.is_clean();
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_an_agent_killed_in_the_middle_of_a_deploy_finishes_it() {
    let mut host = Host::new();
    let web = host.app("web", SERVE, 18082);
    for step in ["the state is written", "the VM boots"] {
        let mut deploy = host.form_command(&["deploy", &web, "-y"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        match step {
            "the state is written" => wait(step, || host.agent_log().contains("deploy vm/web")),
            _ => wait(step, || host.agent_log().contains("waiting for the guest to start")),
        }
        host.kill_agent();
        let _ = deploy.kill();
        let _ = deploy.wait();
        host.start_agent();
        wait("the operation ends", || {
            let operations = host.form(&["op", "ls", "-o", "json"]).ok().json();
            let deploys: Vec<_> = operations.as_array().unwrap().iter().filter(|operation| operation["kind"] == "deploy").collect();
            deploys.iter().all(|operation| ["completed", "failed"].contains(&operation["status"].as_str().unwrap()))
        });
        let _ = host.form(&["deploy", &web, "-y"]).ok();
        wait("it answers", || answers(18082));
        let _ = host.form(&["destroy", "web", "-y"]).ok();
        host.is_clean();
    }
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/kvm-host"]
fn kvm_what_cannot_work_is_refused_or_taken_back_with_its_reason() {
    let host = Host::new();
    let web = host.app("web", SERVE, 18083);
    let _ = host.form(&["deploy", &web, "-y"]).ok();

    let other = host.app("other", SERVE, 18083);
    let taken = host.form(&["deploy", &other, "-y"]).exits(5);
    assert!(taken.stderr.contains("18083") && taken.stderr.contains("web"), "{}", taken.stderr);

    let greedy = fs::read_to_string(&other).unwrap().replace("MEM 128", "MEM 200G").replace("18083", "18084");
    fs::write(&other, greedy).unwrap();
    let _ = host.form(&["deploy", &other, "-y"]).exits(1);

    // The new version ends at once: the old one is put back.
    let _ = host.app("web", r#"["/bin/busybox", "sh", "-c", "echo broken on purpose; exit 9"]"#, 18083);
    let broken = host.form(&["deploy", &web, "-y"]).exits(1);
    assert!(broken.stderr.contains("broken on purpose"), "{}", broken.stderr);
    wait("the old version answers", || answers(18083));

    // A first version that ends at once stays, failed, until it is mended or removed.
    let never = host.app("never", r#"["/bin/busybox", "false"]"#, 18085);
    let _ = host.form(&["deploy", &never, "-y"]).exits(1);
    let _ = host.form(&["destroy", "never", "-y"]).ok();
    let _ = host.form(&["destroy", "web", "-y"]).ok();
    let _ = host.form(&["destroy", "web", "-y"]).exits(3);
    host.is_clean();
}
