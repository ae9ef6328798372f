//! `form-agent bench`: what a VM and an agent cost on this host.
//!
//! Everything is measured on the programs that are installed, in a directory of its own that is removed again: VM processes are
//! started and jailed as the agent starts them, agents run as throw-away agents in network namespaces of their own. What is
//! measured, and how, is in docs/bench.md.

mod agents;
mod devices;
mod first_program;
mod guests;
mod machine;
mod nbd;
mod queries;
mod row;
mod smaps;
mod state;

use std::{
    cell::Cell,
    fs, io,
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use form_api::bench::{BenchRow, MAX_RUNS, Measurement, Unit};

use crate::config::{Config, Paths};
use guests::Kernel;
use machine::{Guest, Machine, Saved, Setup, Spent};
use row::{Line, megabytes};

/// Behind the uids of VMs: their range is shorter than this.
const UID_OFFSET: u32 = 65_000;

/// What the peer needs on the host of docs/bench.md: millions of instructions, and megabytes.
const PEER_FIRST_INSTRUCTION: f64 = 22.2;
const PEER_GUEST_INIT: f64 = 1592.0;
/// Milliseconds from the start to the first tick of a guest whose memory file is mapped.
const PEER_RESTORE: f64 = 42.0;
const PEER_MEMORY: f64 = 4.0;
const PEER_ANONYMOUS: f64 = 0.3;
const PEER_PROGRAM: f64 = 3.0;
/// Starting may cost a tenth more than with the peer.
const WITHIN: f64 = 1.1;
/// Copies of a VM that start at once, and the number of the first of them.
const COPIES: u8 = 10;
const COPIES_FROM: u8 = 200;
/// How many times as long a VM of 2 GiB may stand for its snapshot as one of 256 MiB.
const PAUSE_GROWTH: f64 = 1.5;

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("cannot {what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("the VM process did not do it: {0}")]
    Machine(String),
    #[error("the guest {what} before its line; it said: {words}")]
    Guest { what: &'static str, words: String },
    #[error(transparent)]
    Smaps(#[from] smaps::SmapsError),
    #[error("its tap: {0}")]
    Tap(#[from] form_net::NetError),
    #[error("{0}")]
    Missing(String),
    #[error("the throw-away agent: {0}")]
    Agent(String),
    #[error("the state: {0}")]
    State(String),
    #[error("interrupted")]
    Stopped,
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> BenchError {
    let what = what.into();
    move |source| BenchError::Io { what, source }
}

/// Set when somebody wants the measuring to end.
#[derive(Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn check(&self) -> Result<(), BenchError> {
        if self.0.load(Ordering::Acquire) { Err(BenchError::Stopped) } else { Ok(()) }
    }
}

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How often each is repeated
    #[arg(long, default_value_t = form_api::bench::DEFAULT_RUNS, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RUNS)))]
    pub runs: u32,
    /// Only this (may be repeated): first-instruction, guest-init, vmm-memory, vmm-program, hotplug, pause, restore, state, agent-memory, ps, queries, nbd, fork, disk, network
    #[arg(long, value_name = "MEASUREMENT")]
    pub only: Vec<Measurement>,
    /// A kernel bundle's directory (vmlinux, kernel.json, modules); without it the newest of this host
    #[arg(long, value_name = "DIR")]
    pub kernel: Option<PathBuf>,
    /// This processor does one instruction a nanosecond (QEMU's -icount): its time counts instructions, and is compared with the peer's
    #[arg(long)]
    pub instruction_clock: bool,
    /// One JSON object a line, as each value is there
    #[arg(long)]
    pub json: bool,
}

/// Measures and prints; whether everything was measured and is within the budgets.
///
/// # Errors
/// When it cannot begin, or standard output is closed.
pub fn run(paths: &Paths, options: &Options, stop: &Stop) -> Result<bool, BenchError> {
    let directory = tempfile::Builder::new().prefix("form-bench.").tempdir().map_err(io_error("make a temporary directory"))?;
    let config = Config::load(&paths.config()).map_err(|error| BenchError::Missing(error.to_string()))?;
    let bench = Bench { paths, config, options, directory: directory.path(), stop };
    let wanted = |measurement: &Measurement| options.only.is_empty() || options.only.contains(measurement);
    let mut good = true;
    if !options.json {
        print(&format!("{:28}  {:>9}  {:>9}  {:>9}  {:14}  {:>7}  {:>7}", "", "min", "median", "max", "", "budget", "peer"))?;
    }
    for measurement in Measurement::ALL.iter().filter(|measurement| wanted(measurement)) {
        for row in bench.measure(*measurement) {
            stop.check()?;
            good &= row.is_good();
            let json = || serde_json::to_string(&row).map_err(|error| BenchError::State(error.to_string()));
            print(&if options.json { json()? } else { text(&row) })?;
        }
    }
    Ok(good)
}

fn print(line: &str) -> Result<(), BenchError> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(io_error("write to standard output"))
}

fn text(row: &BenchRow) -> String {
    if let Some(fault) = &row.fault {
        return format!("{:28}  not measured: {fault}", row.name);
    }
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
    let peer = row.peer.as_ref().map(|peer| peer.value);
    let line = format!(
        "{:28}  {:>9.3}  {:>9.3}  {:>9.3}  {:14}  {:>7}  {:>7}",
        row.name,
        row.min,
        row.median,
        row.max,
        row.unit.as_str(),
        number(row.budget),
        number(peer)
    );
    format!("{}{}", line.trim_end(), if row.over { "  OVER BUDGET" } else { "" })
}

struct Bench<'a> {
    paths: &'a Paths,
    config: Config,
    options: &'a Options,
    directory: &'a Path,
    stop: &'a Stop,
}

impl Bench<'_> {
    fn runs(&self) -> u32 {
        self.options.runs
    }

    fn measure(&self, measurement: Measurement) -> Vec<BenchRow> {
        match measurement {
            Measurement::FirstInstruction => self.first_instruction(),
            Measurement::GuestInit => self.guest_init(),
            Measurement::VmmMemory => self.vmm_memory(),
            Measurement::VmmProgram => self.vmm_program(),
            Measurement::Hotplug => self.hotplug(),
            Measurement::Pause => self.pause(),
            Measurement::Restore => self.restore(),
            Measurement::State => self.state(),
            Measurement::AgentMemory => self.agent_memory(),
            Measurement::Ps => self.ps(),
            Measurement::Queries => self.queries(),
            Measurement::Nbd => self.nbd(),
            Measurement::Fork => self.fork(),
            Measurement::Disk => self.disk(),
            Measurement::Network => self.network(),
        }
    }

    fn setup(&self) -> Result<Setup<'_>, BenchError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io_error("start"))?;
        let program = self.config.program("form-vmm").map_err(|error| BenchError::Missing(error.to_string()))?;
        let uid = self.config.vm_uid_base.saturating_add(UID_OFFSET);
        Ok(Setup { program, directory: self.directory, uid, stop: self.stop, started: Cell::new(0), runtime })
    }

    fn kernel(&self) -> Result<Kernel, BenchError> {
        match &self.options.kernel {
            Some(directory) => Kernel::open(directory),
            None => Kernel::newest(&self.paths.data().join("kernel")),
        }
    }

    /// Starts `guest` as often as wanted and looks at it each time when it has said `line`.
    fn starts<T>(
        &self,
        guest: &Guest,
        line: &str,
        look: impl Fn(&mut Machine<'_>, Spent) -> Result<T, BenchError>,
    ) -> Result<Vec<T>, BenchError> {
        if !crate::machine::virtualises() {
            return Err(BenchError::Missing("this processor cannot run guests; `form doctor` says more".to_owned()));
        }
        let setup = self.setup()?;
        let start = |_| {
            let mut machine = Machine::start(&setup, guest)?;
            let spent = machine.wait_for(line)?;
            look(&mut machine, spent)
        };
        (0..self.runs()).map(start).collect()
    }

    /// The rows of processor time, with what the peer needs on the instruction clock, and of time.
    fn start_rows(&self, names: [&'static str; 2], what: &'static str, peer: f64, spent: Result<Vec<Spent>, BenchError>) -> Vec<BenchRow> {
        let cpu = self.cpu_line(names[0], what);
        let cpu = if self.options.instruction_clock { cpu.budget(peer * WITHIN).peer(peer) } else { cpu };
        self.rows(cpu, names[1], spent)
    }

    fn cpu_line(&self, name: &'static str, what: &'static str) -> Line {
        let unit = if self.options.instruction_clock { Unit::MillionInstructions } else { Unit::CpuMilliseconds };
        Line::new(name, what, unit)
    }

    /// The row `cpu` of processor time, and one of time with the name `time`.
    fn rows(&self, cpu: Line, time: &'static str, spent: Result<Vec<Spent>, BenchError>) -> Vec<BenchRow> {
        let what = cpu.what;
        let names = [cpu.name, time];
        let time = Line::new(names[1], what, Unit::Milliseconds);
        match spent {
            Ok(spent) => {
                let milliseconds =
                    |take: fn(&Spent) -> std::time::Duration| spent.iter().map(|one| take(one).as_secs_f64() * 1e3).collect();
                let (cpus, times): (Vec<f64>, Vec<f64>) = (milliseconds(|one| one.cpu), milliseconds(|one| one.time));
                vec![cpu.measured(&cpus), time.measured(&times)]
            }
            Err(error) => vec![cpu.failed(error.to_string())],
        }
    }

    fn first_instruction(&self) -> Vec<BenchRow> {
        let spent = guests::first_program(self.directory).and_then(|guest| self.starts(&guest, first_program::LINE, |_, spent| Ok(spent)));
        let what = "from the start of a VM process to its guest's first instructions";
        self.start_rows(["first-instruction", "first-instruction/time"], what, PEER_FIRST_INSTRUCTION, spent)
    }

    fn guest_init(&self) -> Vec<BenchRow> {
        let spent = self
            .kernel()
            .and_then(|kernel| guests::linux(&kernel, self.directory, false))
            .and_then(|guest| self.starts(&guest, guests::LINE, |_, spent| Ok(spent)));
        let what = "from the start of a VM process to process 1 of a Linux guest without devices";
        self.start_rows(["guest-init", "guest-init/time"], what, PEER_GUEST_INIT, spent)
    }

    fn vmm_memory(&self) -> Vec<BenchRow> {
        let what = "resident memory of a VM process outside its guest's, with all devices in use";
        let total = Line::new("vmm-memory", what, Unit::Megabytes).budget(PEER_MEMORY).peer(PEER_MEMORY);
        let what = "the part of it that belongs to no file";
        let anonymous = Line::new("vmm-memory/anonymous", what, Unit::Megabytes).peer(PEER_ANONYMOUS);
        let resident = self
            .kernel()
            .and_then(|kernel| guests::linux(&kernel, self.directory, true))
            .and_then(|guest| self.starts(&guest, guests::LINE, |machine, _| machine.memory()));
        match resident {
            Ok(resident) => {
                let part = |take: fn(&smaps::Resident) -> u64| resident.iter().map(|one| megabytes(take(one))).collect::<Vec<f64>>();
                vec![total.measured(&part(|one| one.total)), anonymous.measured(&part(|one| one.anonymous))]
            }
            Err(error) => vec![total.failed(error.to_string())],
        }
    }

    fn hotplug(&self) -> Vec<BenchRow> {
        let spent = self
            .kernel()
            .and_then(|kernel| guests::linux(&kernel, self.directory, true))
            .and_then(|guest| self.starts(&guest, guests::LINE, |machine, _| machine.hotplug()));
        let attach = self.cpu_line("attach", "from a disk that is given to a VM to the guest's first read of it");
        let detach = self.cpu_line("detach", "from asking a guest for a disk to the end of everything that there was of it");
        match spent {
            Ok(spent) => {
                let (came, went) = spent.into_iter().unzip();
                let mut rows = self.rows(attach, "attach/time", Ok(came));
                rows.extend(self.rows(detach, "detach/time", Ok(went)));
                rows
            }
            Err(error) => [attach, detach].map(|line| line.failed(error.to_string())).to_vec(),
        }
    }

    /// A VM that uses all its memory, small and large: what it stands for a snapshot should not depend on that.
    fn pause(&self) -> Vec<BenchRow> {
        let small = self.cpu_line("pause", "how long a VM stands for its snapshot, with 256 MiB in use");
        let large = self.cpu_line("pause/2g", "the same with 2 GiB in use");
        let growth = Line::new("pause/growth", "how many times as long that is", Unit::Times);
        let growth = if self.options.instruction_clock { growth.budget(PAUSE_GROWTH) } else { growth };
        let stood = |memory_mib| {
            guests::full(self.directory, memory_mib)
                .and_then(|guest| self.starts(&guest, first_program::LINE, |machine, _| machine.pause()))
        };
        let (few, many) = match (stood(256), stood(2048)) {
            (Ok(few), Ok(many)) => (few, many),
            (Err(error), _) | (_, Err(error)) => return vec![small.failed(error.to_string())],
        };
        let times: Vec<f64> = few.iter().zip(&many).map(|(few, many)| many.cpu.as_secs_f64() / few.cpu.as_secs_f64()).collect();
        let mut rows = self.rows(small, "pause/time", Ok(few));
        rows.extend(self.rows(large, "pause/2g/time", Ok(many)));
        rows.push(growth.measured(&times));
        rows
    }

    /// A VM that uses all its memory is saved, and another process goes on with it.
    fn restore(&self) -> Vec<BenchRow> {
        let snapshot = self.cpu_line("snapshot", "from a VM's pause to all of it being written, with 256 MiB in use");
        let what = "the same once more, written upon the first: what a guest that does next to nothing has changed";
        let incremental = self.cpu_line("snapshot/incremental", what);
        let restore = self.cpu_line("restore", "from the start of a VM process to the first line of the guest that it goes on with");
        match self.restores() {
            Ok(spent) => {
                let mut rows = self.rows(snapshot, "snapshot/time", Ok(spent.iter().map(|times| times[0]).collect()));
                let later = spent.iter().map(|times| times[1]).collect();
                rows.extend(self.rows(incremental, "snapshot/incremental/time", Ok(later)));
                let restored = spent.iter().map(|times| times[2]).collect();
                rows.extend(self.rows(restore, "restore/time", Ok(restored)));
                if let Some(time) = rows.last_mut().filter(|row| self.options.instruction_clock && row.fault.is_none()) {
                    time.peer = Some(row::peer(PEER_RESTORE, time.median));
                }
                rows
            }
            Err(error) => [snapshot, incremental, restore].map(|line| line.failed(error.to_string())).to_vec(),
        }
    }

    /// What each took: all of it written, what had changed, restored.
    fn restores(&self) -> Result<Vec<[Spent; 3]>, BenchError> {
        let guest = guests::ticking(self.directory, machine::MEMORY_MIB as u32)?;
        let saved = self.starts(&guest, first_program::LINE, |machine, _| {
            let (saved, all) = machine.save(guest.memory_mib, true)?;
            let changed = machine.save_upon(&saved)?;
            Ok((saved, all, changed))
        })?;
        let setup = self.setup()?;
        let restore = |(saved, all, changed): (Saved, Spent, Spent)| {
            let restored = Machine::restore(&setup, &saved)?.wait_for(first_program::TICK)?;
            Ok([all, changed, restored])
        };
        saved.into_iter().map(restore).collect()
    }

    /// A VM is saved while it goes on, and many others go on from there at once.
    fn fork(&self) -> Vec<BenchRow> {
        let fork = self.cpu_line("fork/10", "from a VM's pause to the first line of the last of ten copies that go on where it stood");
        let spent = guests::ticking(self.directory, machine::MEMORY_MIB as u32).and_then(|guest| {
            self.starts(&guest, first_program::LINE, |machine, _| {
                let begun = Instant::now();
                let (saved, took) = machine.save(guest.memory_mib, false)?;
                let setup = self.setup()?;
                // The VM and its files: each copy is told apart from all of them.
                setup.started.set(COPIES_FROM);
                let mut copies = (0..COPIES).map(|_| Machine::restore(&setup, &saved)).collect::<Result<Vec<_>, _>>()?;
                let cpu =
                    copies.iter_mut().try_fold(took.cpu, |sum, copy| Ok::<_, BenchError>(sum + copy.wait_for(first_program::TICK)?.cpu))?;
                Ok(Spent { time: begun.elapsed(), cpu })
            })
        });
        self.rows(fork, "fork/10/time", spent)
    }

    fn vmm_program(&self) -> Vec<BenchRow> {
        let line = Line::new("vmm-program", "size of the program form-vmm", Unit::Megabytes).budget(PEER_PROGRAM).peer(PEER_PROGRAM);
        let size = self.setup().and_then(|setup| fs::metadata(&setup.program).map_err(io_error(setup.program.display().to_string())));
        vec![match size {
            Ok(size) => line.measured(&[megabytes(size.len())]),
            Err(error) => line.failed(error.to_string()),
        }]
    }
}
