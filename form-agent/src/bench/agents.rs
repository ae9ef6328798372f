//! Throw-away agents: what one needs when it has nothing to do, what each recorded VM adds, and how fast it answers.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use form_api::bench::{BenchRow, Unit};
use rustix::process::{Pid, Signal, kill_process};

use super::{
    Bench, BenchError, Stop, io_error,
    row::{Line, megabytes},
    state::RECORDED,
};
use crate::config::Paths;

/// Budgets: megabytes, megabytes a VM, milliseconds.
const IDLE: f64 = 30.0;
const EACH_VM: f64 = 1.0;
const PS: f64 = 20.0;

/// The longest wait for an agent to answer, and to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// After its start an agent looks at what there is; then it is idle.
const SETTLE: Duration = Duration::from_secs(3);

/// An agent in a network namespace of its own, with everything it has below one directory. It ends with this program.
pub(super) struct ThrowAway<'a> {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    stop: &'a Stop,
}

impl Bench<'_> {
    pub(super) fn throw_away(&self, root: &Path) -> Result<ThrowAway<'_>, BenchError> {
        let paths = Paths::new(root);
        paths.create_all().map_err(io_error("make the agent's directories"))?;
        let library = self.config.program("form-vmm").map_err(|error| BenchError::Missing(error.to_string()))?;
        let library = library.parent().unwrap_or(Path::new("/"));
        let config = serde_json::json!({ "listen": "[::]:0", "library": library });
        // JSON is YAML.
        fs::write(paths.config(), config.to_string()).map_err(io_error("write the agent's configuration"))?;
        let log = root.join("agent.log");
        let output = fs::File::create(&log).map_err(io_error("make the agent's log"))?;
        let program = std::env::current_exe().map_err(io_error("find this program"))?;
        let child = Command::new("unshare")
            .args(["--net", "--", "setpriv", "--pdeathsig", "KILL", "--"])
            .arg(program)
            .arg("--root")
            .arg(root)
            .arg("run")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            .spawn()
            .map_err(io_error("start an agent (unshare and setpriv are of the package util-linux)"))?;
        let mut agent = ThrowAway { child, socket: paths.socket(), log, stop: self.stop };
        agent.wait_until_it_answers()?;
        Ok(agent)
    }

    pub(super) fn agent_memory(&self) -> Vec<BenchRow> {
        let idle = Line::new("agent-memory", "resident memory of an agent without VMs", Unit::Megabytes).budget(IDLE);
        let each = Line::new("agent-memory/vm", "what one more recorded VM adds to it", Unit::Megabytes).budget(EACH_VM);
        let mut samples: (Vec<f64>, Vec<f64>) = Default::default();
        for run in 0..self.runs() {
            match self.agent_memory_once(run) {
                Ok((empty, full)) => {
                    samples.0.push(megabytes(empty));
                    samples.1.push((megabytes(full) - megabytes(empty)) / f64::from(RECORDED));
                }
                Err(error) => return vec![idle.failed(error.to_string())],
            }
        }
        vec![idle.measured(&samples.0), each.measured(&samples.1)]
    }

    fn agent_memory_once(&self, run: u32) -> Result<(u64, u64), BenchError> {
        let empty = self.throw_away(&self.directory.join(format!("empty-{run}")))?.resident_when_idle()?;
        let root = self.directory.join(format!("full-{run}"));
        // Closed again before the agent opens it.
        drop(self.fill(&Paths::new(&root), RECORDED)?);
        Ok((empty, self.throw_away(&root)?.resident_when_idle()?))
    }

    pub(super) fn ps(&self) -> Vec<BenchRow> {
        let line = Line::new("ps", "one `form ps` of an agent with 100 recorded VMs", Unit::Milliseconds).budget(PS);
        vec![match self.ps_times() {
            Ok(times) => line.measured(&times),
            Err(error) => line.failed(error.to_string()),
        }]
    }

    fn ps_times(&self) -> Result<Vec<f64>, BenchError> {
        let form = form_program()?;
        let root = self.directory.join("ps");
        drop(self.fill(&Paths::new(&root), RECORDED)?);
        let agent = self.throw_away(&root)?;
        agent.settle()?;
        let once = || -> Result<f64, BenchError> {
            self.stop.check()?;
            let begun = Instant::now();
            let output = Command::new(&form)
                .args(["ps", "-o", "name"])
                .env("FORM_HOST", format!("unix:{}", agent.socket.display()))
                .env("XDG_CONFIG_HOME", &root)
                .env("XDG_DATA_HOME", &root)
                .stdin(Stdio::null())
                .output()
                .map_err(io_error("start form"))?;
            let took = begun.elapsed().as_secs_f64() * 1e3;
            let vms = output.stdout.iter().filter(|byte| **byte == b'\n').count();
            if vms == RECORDED as usize {
                Ok(took)
            } else {
                Err(BenchError::Agent(format!("`form ps` names {vms} VMs: {}", String::from_utf8_lossy(&output.stderr).trim())))
            }
        };
        // The first one reads the program from the disk.
        once()?;
        (0..self.runs() * 10).map(|_| once()).collect()
    }
}

/// The `form` that is installed beside this program.
pub(super) fn form_program() -> Result<PathBuf, BenchError> {
    let form = std::env::current_exe().map_err(io_error("find this program"))?.with_file_name("form");
    if form.is_file() {
        Ok(form)
    } else {
        Err(BenchError::Missing(format!("{} is not there: install `form` beside the agent", form.display())))
    }
}

impl ThrowAway<'_> {
    fn wait_until_it_answers(&mut self) -> Result<(), BenchError> {
        let begun = Instant::now();
        while UnixStream::connect(&self.socket).is_err() {
            self.stop.check()?;
            let ended = self.child.try_wait().map_err(io_error("wait for an agent"))?;
            if ended.is_some() || begun.elapsed() > PATIENCE {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                let last = log.lines().rev().take(5).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("; ");
                return Err(BenchError::Agent(format!("it did not start: {last}")));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn settle(&self) -> Result<(), BenchError> {
        let begun = Instant::now();
        while begun.elapsed() < SETTLE {
            self.stop.check()?;
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// `Rss` of all its mappings, in bytes.
    fn resident_when_idle(&self) -> Result<u64, BenchError> {
        self.settle()?;
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.id())).map_err(io_error("read the agent's memory"))?;
        let kilobytes = text.lines().find_map(|line| line.strip_prefix("Rss:")?.split_ascii_whitespace().next()?.parse::<u64>().ok());
        kilobytes.map(|kilobytes| kilobytes << 10).ok_or_else(|| BenchError::Agent("its memory cannot be read".to_owned()))
    }
}

impl Drop for ThrowAway<'_> {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid.filter(|_| matches!(self.child.try_wait(), Ok(None))) {
            // Not collected yet, so the pid is still this child's.
            let _ = kill_process(pid, Signal::TERM);
        }
        let begun = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
