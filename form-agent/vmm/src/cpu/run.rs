//! The threads that run the vCPUs, and the gate that lets them run, holds them, and keeps back those that the guest has let go. KVM
//! cannot take a vCPU from a VM: its thread stands at the gate until it is plugged again.

use std::cell::Cell;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_mp_state};
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
    /// Which vCPUs stand at the gate, by id.
    standing: Vec<bool>,
    /// Raised for each request to save; a vCPU that stands at the gate answers with its state.
    save_round: u64,
    states: Vec<Option<Result<VcpuState, VcpuStateError>>>,
    answers: usize,
    msr_indices: Arc<[u32]>,
}

struct Gate {
    target: AtomicU8,
    /// vCPUs that the guest has let go, by id.
    parked: Vec<AtomicBool>,
    held: Mutex<Held>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, id: usize) -> bool {
        self.target.load(Ordering::Acquire) == RUN && !self.is_parked(id)
    }

    fn is_parked(&self, id: usize) -> bool {
        self.parked[id].load(Ordering::Acquire)
    }

    /// Stands at the gate until it opens. A vCPU that has ended (`stay`) never leaves.
    fn stand(&self, vcpu: &VcpuFd, id: usize, stay: bool) {
        let mut held = self.lock();
        let mut seen = held.save_round;
        held.standing[id] = true;
        self.changed.notify_all();
        while stay || !self.open(id) {
            if self.is_parked(id) {
                // The guest starts it from the beginning when it comes again.
                if let Err(error) = vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_UNINITIALIZED }) {
                    eprintln!("form-vmm: cannot put vCPU {id} into its first state: {error}");
                }
                while self.is_parked(id) {
                    // Of what the guest does not have nothing is saved.
                    seen = held.save_round;
                    held = self.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
                }
                continue;
            }
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
        held.standing[id] = false;
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

/// All vCPUs of a VM: those that it has, and those that it had.
pub struct Vcpus {
    /// By id; none for one that was never there.
    threads: Vec<Option<JoinHandle<()>>>,
    gate: Arc<Gate>,
    exits: Arc<Vec<AtomicU64>>,
    around: Surroundings,
}

/// What every vCPU thread needs.
#[derive(Clone)]
pub struct Surroundings {
    pub bus: Arc<Bus>,
    pub exit: Arc<ExitSlot>,
}

impl Vcpus {
    /// Starts a thread a vCPU, each with its id, of a VM that can have `most`. All of them enter their jail and stand at the gate when
    /// this returns.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn start(vcpus: Vec<(u8, VcpuFd)>, most: u8, msr_indices: Vec<u32>, around: Surroundings) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), on_kick).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        let most = usize::from(most);
        let held = Held {
            standing: vec![false; most],
            msr_indices: msr_indices.into(),
            states: (0..most).map(|_| None).collect(),
            ..Held::default()
        };
        let parked = (0..most).map(|_| AtomicBool::new(false)).collect();
        let gate = Arc::new(Gate { target: AtomicU8::new(HOLD), parked, held: Mutex::new(held), changed: Condvar::new() });
        let exits = Arc::new((0..most).map(|_| AtomicU64::new(0)).collect::<Vec<_>>());
        let mut all = Vcpus { threads: (0..most).map(|_| None).collect(), gate, exits, around };
        for (id, vcpu) in vcpus {
            all.add(id, vcpu)?;
        }
        all.wait_until_held();
        Ok(all)
    }

    /// A further vCPU, which runs when the others do.
    ///
    /// # Errors
    /// When its thread cannot be made.
    pub fn add(&mut self, id: u8, vcpu: VcpuFd) -> io::Result<()> {
        let id = usize::from(id);
        let place = self.threads.get_mut(id).filter(|place| place.is_none()).ok_or(io::ErrorKind::InvalidInput)?;
        let (gate, exits) = (Arc::clone(&self.gate), Arc::clone(&self.exits));
        let runner = Runner { vcpu, id, gate, around: self.around.clone(), exits };
        *place = Some(Builder::new().name(format!("vcpu{id}")).stack_size(STACK).spawn(move || runner.run())?);
        Ok(())
    }

    /// Has a vCPU that was let go run again when the others do, from its first state; false when there never was one.
    pub fn plug_again(&self, id: u8) -> bool {
        if !self.was_added(id) {
            return false;
        }
        let _held = self.gate.lock();
        self.gate.parked[usize::from(id)].store(false, Ordering::Release);
        self.gate.changed.notify_all();
        true
    }

    /// Keeps back a vCPU that the guest has let go. It stands at the gate when this returns.
    pub fn park(&self, id: u8) {
        let index = usize::from(id);
        let Some(Some(thread)) = self.threads.get(index) else { return };
        {
            let _held = self.gate.lock();
            self.gate.parked[index].store(true, Ordering::Release);
            self.gate.changed.notify_all();
        }
        // A thread that ended already needs no kick.
        let _ = thread.kill(SIGRTMIN());
        let mut held = self.gate.lock();
        while !held.standing[index] {
            held = self.gate.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn was_added(&self, id: u8) -> bool {
        self.threads.get(usize::from(id)).is_some_and(Option::is_some)
    }

    fn added(&self) -> impl Iterator<Item = (usize, &JoinHandle<()>)> {
        self.threads.iter().enumerate().filter_map(|(id, thread)| thread.as_ref().map(|thread| (id, thread)))
    }

    pub fn resume(&self) {
        let _held = self.gate.lock();
        self.gate.target.store(RUN, Ordering::Release);
        self.gate.changed.notify_all();
    }

    /// Stops all vCPUs between two instructions, with no I/O half done.
    pub fn pause(&self) {
        self.gate.target.store(HOLD, Ordering::Release);
        for (_, thread) in self.added() {
            // A thread that ended already needs no kick.
            let _ = thread.kill(SIGRTMIN());
        }
        self.wait_until_held();
    }

    /// The state of each vCPU that the guest has, in the order of their ids. Call only while paused.
    ///
    /// # Errors
    /// When KVM does not give it.
    pub fn save(&self) -> Result<Vec<VcpuState>, VcpuStateError> {
        let mut held = self.gate.lock();
        let asked = self.added().filter(|(id, _)| !self.gate.is_parked(*id)).count();
        held.answers = 0;
        held.states.fill_with(|| None);
        held.save_round += 1;
        self.gate.changed.notify_all();
        while held.answers < asked {
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
        while self.added().any(|(id, _)| !held.standing[id]) {
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
        while self.gate.open(self.id) {
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
