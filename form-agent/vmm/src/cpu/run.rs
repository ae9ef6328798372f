//! The threads that run the vCPUs, and the gate that lets them run, holds them and ends them.

use std::cell::Cell;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::state::{self, VcpuState, VcpuStateError};
use crate::bus::Bus;
use crate::control::ExitReason;
use crate::exit::ExitSlot;

const HOLD: u8 = 0;
const RUN: u8 = 1;

/// Handling an exit needs little stack; a default one of 2 MiB can cost a huge page each.
const STACK: usize = 128 * 1024;

#[derive(Default)]
struct Held {
    /// How many vCPUs stand at the gate.
    count: usize,
    /// Raised for each request to save; a vCPU that stands at the gate answers with its state.
    save_round: u64,
    states: Vec<Option<Result<VcpuState, VcpuStateError>>>,
    answers: usize,
    msr_indices: Arc<[u32]>,
}

struct Gate {
    target: AtomicU8,
    held: Mutex<Held>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> bool {
        self.target.load(Ordering::Acquire) == RUN
    }

    /// Stands at the gate until it opens. A vCPU that has ended (`stay`) never leaves.
    fn stand(&self, vcpu: &VcpuFd, id: usize, stay: bool) {
        let mut held = self.lock();
        let mut seen = held.save_round;
        held.count += 1;
        self.changed.notify_all();
        while stay || !self.open() {
            if held.save_round != seen {
                seen = held.save_round;
                let indices = Arc::clone(&held.msr_indices);
                let saved = state::save(vcpu, &indices);
                held.states[id] = Some(saved);
                held.answers += 1;
                self.changed.notify_all();
            }
            held = self.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.count -= 1;
        drop(held);
        // Tells a guest with kvm-clock that it was stopped, so that its watchdogs keep quiet. Refused when it has none.
        let _ = vcpu.kvmclock_ctrl();
    }
}

thread_local! {
    /// `kvm_run.immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

/// Makes the next KVM_RUN return at once: without it a kick that arrives just before KVM_RUN would be lost.
extern "C" fn on_kick(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|flag| {
        let flag = flag.get();
        if !flag.is_null() {
            // SAFETY: the pointer was set by this thread and leads into the mapping of its own VcpuFd, which lives until the
            // thread has cleared the pointer; a byte store is atomic.
            unsafe { flag.write_volatile(1) };
        }
    });
}

/// All vCPUs of a VM.
pub struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    gate: Arc<Gate>,
    exits: Arc<Vec<AtomicU64>>,
}

/// What every vCPU thread needs.
#[derive(Clone)]
pub struct Surroundings {
    pub bus: Arc<Bus>,
    pub exit: Arc<ExitSlot>,
}

impl Vcpus {
    /// Starts a thread a vCPU. All of them enter their jail and stand at the gate when this returns.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn start(vcpus: Vec<VcpuFd>, msr_indices: Vec<u32>, around: &Surroundings) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), on_kick).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        let count = vcpus.len();
        let held = Held { msr_indices: msr_indices.into(), states: (0..count).map(|_| None).collect(), ..Held::default() };
        let gate = Arc::new(Gate { target: AtomicU8::new(HOLD), held: Mutex::new(held), changed: Condvar::new() });
        let exits = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect::<Vec<_>>());
        let mut threads = Vec::with_capacity(count);
        for (id, vcpu) in vcpus.into_iter().enumerate() {
            let runner = Runner { vcpu, id, gate: Arc::clone(&gate), around: around.clone(), exits: Arc::clone(&exits) };
            threads.push(Builder::new().name(format!("vcpu{id}")).stack_size(STACK).spawn(move || runner.run())?);
        }
        let vcpus = Vcpus { threads, gate, exits };
        vcpus.wait_until_held();
        Ok(vcpus)
    }

    pub fn resume(&self) {
        let _held = self.gate.lock();
        self.gate.target.store(RUN, Ordering::Release);
        self.gate.changed.notify_all();
    }

    /// Stops all vCPUs between two instructions, with no I/O half done.
    pub fn pause(&self) {
        self.gate.target.store(HOLD, Ordering::Release);
        for thread in &self.threads {
            // A thread that ended already needs no kick.
            let _ = thread.kill(SIGRTMIN());
        }
        self.wait_until_held();
    }

    /// The state of each vCPU. Call only while paused.
    ///
    /// # Errors
    /// When KVM does not give it.
    pub fn save(&self) -> Result<Vec<VcpuState>, VcpuStateError> {
        let mut held = self.gate.lock();
        held.answers = 0;
        held.save_round += 1;
        self.gate.changed.notify_all();
        while held.answers < self.threads.len() {
            held = self.gate.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.states.iter_mut().filter_map(Option::take).collect()
    }

    /// Exits to this program since boot.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.exits.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    fn wait_until_held(&self) {
        let mut held = self.gate.lock();
        while held.count < self.threads.len() {
            held = self.gate.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

struct Runner {
    vcpu: VcpuFd,
    id: usize,
    gate: Arc<Gate>,
    around: Surroundings,
    exits: Arc<Vec<AtomicU64>>,
}

/// How one turn of KVM_RUN ended.
enum Turn {
    /// An exit was handled; go on.
    Handled,
    /// A kick, or KVM asks to try again.
    Interrupted,
    /// This VM has ended.
    Ended(ExitReason, Option<String>),
}

impl Runner {
    fn run(mut self) {
        let flag = &raw mut self.vcpu.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.set(flag);
        crate::jail::enter_vcpu();
        loop {
            self.gate.stand(&self.vcpu, self.id, false);
            if let Some((reason, message)) = self.run_until_held() {
                self.around.exit.report(reason, message);
                self.gate.stand(&self.vcpu, self.id, true);
            }
        }
    }

    fn run_until_held(&mut self) -> Option<(ExitReason, Option<String>)> {
        while self.gate.open() {
            if let Turn::Ended(reason, message) = self.turn() {
                return Some((reason, message));
            }
        }
        // An access that this program has answered is completed by the next KVM_RUN: without it the saved registers would lie.
        loop {
            self.vcpu.set_kvm_immediate_exit(1);
            match self.turn() {
                Turn::Handled => {}
                Turn::Interrupted => return None,
                Turn::Ended(reason, message) => return Some((reason, message)),
            }
        }
    }

    /// Where the guest met it: one that crashed so can be told from one that chose this way to restart.
    fn triple_fault(&self) -> String {
        let place = self.vcpu.get_regs().map_or_else(|error| error.to_string(), |regs| format!("{:#x}", regs.rip));
        format!("vCPU {} met a triple fault at {place}", self.id)
    }

    fn turn(&mut self) -> Turn {
        let bus = &self.around.bus;
        let ended = match self.vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => bus.write_port(port, data),
            Ok(VcpuExit::IoIn(port, data)) => {
                bus.read_port(port, data);
                None
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.read_memory(address, data);
                None
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.write_memory(address, data);
                None
            }
            // A triple fault is how many systems restart.
            Ok(VcpuExit::Shutdown) => return Turn::Ended(ExitReason::Reset, Some(self.triple_fault())),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => None,
            Ok(other) => {
                let message = format!("vCPU {} stopped: {other:?}", self.id);
                return Turn::Ended(ExitReason::Failed, Some(message));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                self.vcpu.set_kvm_immediate_exit(0);
                return Turn::Interrupted;
            }
            Err(error) => {
                let message = format!("cannot run vCPU {}: {error}", self.id);
                return Turn::Ended(ExitReason::Failed, Some(message));
            }
        };
        self.exits[self.id].fetch_add(1, Ordering::Relaxed);
        match ended {
            Some(reason) => Turn::Ended(reason, None),
            None => Turn::Handled,
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(null_mut());
    }
}
