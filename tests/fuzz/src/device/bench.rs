//! Plays an input.

use std::{cell::RefCell, collections::VecDeque, fmt::Debug, rc::Rc, sync::Arc};

use arbitrary::Arbitrary;
use form_vmm::{
    pci::PciDevice,
    virtio::{
        GuestMemory, VirtioDevice,
        pci::{Activations, BAR_SIZE, Host, VirtioPci},
        task::inline,
    },
};

use super::{
    driver::{Driver, Places},
    host::{Bells, Lines},
    input::{Input, Setup, Step},
    memory::Guarded,
    permitted::{Permitted, QueueRegisters},
};

/// Where the device's BAR lies.
const BAR: u64 = 0x80_0000_0000;
/// Longer inputs find nothing that shorter ones do not.
const STEPS_MAX: usize = 48;
const QUEUES_MAX: usize = 3;

/// What a request consists of.
pub struct Parts {
    pub queue: usize,
    pub readable: Vec<u8>,
    pub writable: u32,
}

/// A kind of device.
pub trait Target: Default + 'static {
    type Request: for<'a> Arbitrary<'a> + Debug + 'static;
    type Event: for<'a> Arbitrary<'a> + Debug + 'static;

    /// Whether the device writes to guest memory only where a chain says so.
    const WRITES_CHAINS_ONLY: bool = true;

    /// A new device.
    fn device(&mut self, variant: u8) -> Box<dyn VirtioDevice>;

    fn parts(&self, request: &Self::Request) -> Parts;

    /// Something happens at the host's end.
    fn event(&mut self, event: &Self::Event);

    /// Looks whether the host's end is as it has to be.
    fn check(&mut self) {}
}

/// What the guest and the host's end do while the device works.
struct World<T: Target> {
    memory: Rc<RefCell<Guarded>>,
    driver: Driver,
    permitted: Permitted,
    registers: Vec<QueueRegisters>,
    bells: Arc<Bells>,
    target: T,
    steps: VecDeque<Step<T::Request, T::Event>>,
    /// Whether steps may be taken when the device has nothing to do.
    live: bool,
}

impl<T: Target> World<T> {
    /// Takes steps until one needs the transport. `true` when something was done that the device may look at.
    fn advance(&mut self) -> bool {
        let mut acted = false;
        while self.live && self.steps.front().is_some_and(Step::is_concurrent) {
            let Some(step) = self.steps.pop_front() else { break };
            let woke = self.act(&step);
            acted = true;
            if woke {
                break;
            }
        }
        self.note();
        acted
    }

    /// Does one step; `true` when it woke the device.
    fn act(&mut self, step: &Step<T::Request, T::Event>) -> bool {
        let memory = &mut *self.memory.borrow_mut();
        match step {
            Step::Request { request, shape } => {
                let parts = self.target.parts(request);
                self.driver.request(memory, parts.queue, &parts.readable, parts.writable, shape);
                self.bells.ring(parts.queue);
                return true;
            }
            Step::Host(event) => {
                self.target.event(event);
                return true;
            }
            Step::Kick { queue } => {
                self.bells.ring(usize::from(*queue) % QUEUES_MAX);
                return true;
            }
            Step::Descriptor { queue, index, descriptor } => {
                self.driver.set_descriptor(memory, usize::from(*queue), u16::from(*index), &descriptor.bytes());
            }
            Step::Offer { queue, head } => self.driver.offer(memory, usize::from(*queue), *head),
            Step::Available { queue, index } => self.driver.set_available(memory, usize::from(*queue), *index),
            Step::Suppress { queue, flags, event } => self.driver.suppress(memory, usize::from(*queue), *flags, *event),
            Step::Write { at, bytes } => memory.write(at.address(), bytes),
            Step::Pause | Step::Set(_) | Step::Get(_) | Step::Config { .. } | Step::Setup(_) => {}
        }
        false
    }

    /// Notes what the device may write from now on.
    fn note(&mut self) {
        let memory = self.memory.borrow();
        for queue in &self.registers {
            self.permitted.add(&memory, *queue);
        }
    }
}

thread_local! {
    /// Mapped once: a mapping for each input would take longer than the input.
    static MEMORY: Rc<RefCell<Guarded>> = Rc::default();
}

/// Plays `input` on a device of `T`.
///
/// # Panics
/// When the device does what it must not.
pub fn run<T: Target>(input: Input<T::Request, T::Event>) {
    let memory = MEMORY.with(Rc::clone);
    memory.borrow_mut().clear();
    let mut target = T::default();
    let device = target.device(input.setup.variant);
    let bells = Arc::new(Bells::default());
    let sizes = device.queue_sizes().to_vec();
    let offered = device.features();
    let activations = Arc::new(Activations::new().expect("an eventfd"));
    let host = Host {
        memory: GuestMemory::new(memory.borrow().memory()),
        router: Arc::new(Lines::default()),
        doorbells: Arc::clone(&bells) as _,
        activations: Arc::clone(&activations),
        kernel: Arc::default(),
    };
    let transport = VirtioPci::new(0, device, BAR, host).expect("eventfds");
    let steps = input.steps.into_iter().take(STEPS_MAX).collect();
    let world = World {
        memory,
        driver: Driver::default(),
        permitted: Permitted::default(),
        registers: Vec::new(),
        bells,
        target,
        steps,
        live: false,
    };
    let world = Rc::new(RefCell::new(world));
    let at_idle = Rc::clone(&world);
    inline::set_idle(move || at_idle.borrow_mut().advance());
    let mut bench = Bench { transport, world, activations, sizes, offered };
    bench.set_up(&input.setup);
    bench.play();
    bench.finish();
    inline::clear_idle();
}

struct Bench<T: Target> {
    transport: VirtioPci,
    world: Rc<RefCell<World<T>>>,
    activations: Arc<Activations>,
    /// The largest of each queue.
    sizes: Vec<u16>,
    offered: u64,
}

impl<T: Target> Bench<T> {
    fn play(&mut self) {
        loop {
            let next = self.world.borrow().steps.front().map(Step::is_concurrent);
            match next {
                None => break,
                Some(true) => self.work(),
                Some(false) => {
                    let step = self.world.borrow_mut().steps.pop_front();
                    if let Some(step) = step {
                        self.control(&step);
                    }
                }
            }
        }
        self.work();
    }

    /// Lets the device work while the guest goes on, as long as there are steps that need no transport.
    fn work(&mut self) {
        self.look();
        {
            let mut world = self.world.borrow_mut();
            world.live = true;
            world.advance();
        }
        self.transport.pause();
        // What is left was not taken because the device does not work: it has no effect but on memory.
        {
            let mut world = self.world.borrow_mut();
            while world.advance() {}
            world.live = false;
        }
        self.transport.activate();
    }

    fn control(&mut self, step: &Step<T::Request, T::Event>) {
        self.look();
        match step {
            Step::Pause => self.work(),
            Step::Set(register) => self.transport.write_memory(register.at(), &register.value.to_le_bytes()[..register.width()]),
            Step::Get(register) => {
                let at = register.at().min(BAR_SIZE - 8);
                self.transport.read_memory(at, &mut [0; 8][..register.width()]);
            }
            Step::Config { offset, width, value } => {
                let length = [1, 2, 4][usize::from(width % 3)].min(4 - usize::from(offset % 4));
                self.transport.write_config(u16::from(*offset), &value.to_le_bytes()[..length]);
            }
            Step::Setup(setup) => self.set_up(setup),
            _ => {}
        }
        self.start();
    }

    fn start(&mut self) {
        if !self.activations.take().is_empty() {
            self.transport.activate();
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.transport.write_memory(offset, bytes);
    }

    fn read(&mut self, offset: u64, width: usize) -> u64 {
        let mut bytes = [0; 8];
        self.transport.read_memory(offset, &mut bytes[..width]);
        u64::from_le_bytes(bytes)
    }

    /// Resets the device and brings it up as a driver does, but for what `setup` does otherwise.
    fn set_up(&mut self, setup: &Setup) {
        self.write(20, &[0]);
        self.transport.write_config(4, &[6, 0]);
        self.write(20, &[1 | 2]);
        let accepted = self.offered & !setup.refused;
        for word in 0..2_u32 {
            self.write(8, &word.to_le_bytes());
            self.write(12, &((accepted >> (32 * word)) as u32).to_le_bytes());
        }
        self.write(20, &[1 | 2 | 8]);
        let mut sizes = Vec::new();
        for (index, (&largest, shift)) in self.sizes.clone().iter().zip(setup.sizes).enumerate() {
            // From one to the largest, which the common zero stands for.
            let size = (largest >> (shift % 9)).max(1);
            let places = Places::of(index);
            self.write(22, &(index as u16).to_le_bytes());
            self.write(24, &size.to_le_bytes());
            self.write(32, &places.table.to_le_bytes());
            self.write(40, &places.available.to_le_bytes());
            self.write(48, &places.used.to_le_bytes());
            sizes.push(size);
        }
        for register in &setup.registers {
            self.write(register.at(), &register.value.to_le_bytes()[..register.width()]);
        }
        for index in 0..sizes.len() {
            self.write(22, &(index as u16).to_le_bytes());
            self.write(28, &1_u16.to_le_bytes());
        }
        {
            let world = &mut *self.world.borrow_mut();
            world.driver.set_up(&mut world.memory.borrow_mut(), &sizes);
        }
        self.look();
        self.write(20, &[1 | 2 | 4 | 8]);
        self.start();
    }

    /// Looks where the queues are now, and what the device may write.
    fn look(&mut self) {
        let selected = self.read(22, 2) as u16;
        let mut registers = Vec::new();
        for index in 0..self.sizes.len() as u16 {
            self.write(22, &index.to_le_bytes());
            let size = self.read(24, 2) as u16;
            let (table, available, used) = (self.read(32, 8), self.read(40, 8), self.read(48, 8));
            registers.push(QueueRegisters { size, table, available, used });
        }
        self.write(22, &selected.to_le_bytes());
        let mut world = self.world.borrow_mut();
        world.registers = registers;
        world.note();
    }

    fn finish(mut self) {
        self.transport.pause();
        let world = &mut *self.world.borrow_mut();
        let memory = &mut *world.memory.borrow_mut();
        memory.check_surroundings();
        if T::WRITES_CHAINS_ONLY
            && let Some(permitted) = world.permitted.ranges()
        {
            memory.check_writes(&permitted);
        }
        world.target.check();
    }
}
