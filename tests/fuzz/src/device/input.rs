//! What an input says: how the driver sets the device up, and what it does then. Mostly plausible, so that inputs reach past
//! the first check; everything can be anything.

use arbitrary::Arbitrary;

use super::{
    driver::{AREA, BUFFERS},
    memory::{HIGH, HIGH_SIZE, LOW_SIZE},
};

#[derive(Arbitrary, Debug)]
pub struct Input<R, E> {
    pub setup: Setup,
    pub steps: Vec<Step<R, E>>,
}

#[derive(Arbitrary, Clone, Debug)]
pub struct Setup {
    /// Which kind of device.
    pub variant: u8,
    /// Offered features that the driver does not take.
    pub refused: u64,
    /// Sizes of the queues, as powers of two.
    pub sizes: [u8; 3],
    /// Written after the queues were set up and before DRIVER_OK.
    pub registers: Vec<Register>,
}

/// An access to the device's BAR.
#[derive(Arbitrary, Clone, Debug)]
pub struct Register {
    pub area: u8,
    pub offset: u8,
    pub width: u8,
    pub value: u64,
}

impl Register {
    /// Where in the BAR: mostly the beginning of one of its areas.
    pub fn at(&self) -> u64 {
        u64::from(self.area % 8) * 0x1000 + u64::from(self.offset)
    }

    pub fn width(&self) -> usize {
        [1, 2, 4, 8][usize::from(self.width % 4)]
    }
}

/// An address of the guest's choice.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    Buffer(u16),
    Ring(u16),
    LowEnd(i8),
    HighStart(i8),
    HighEnd(i8),
    Any(u64),
}

impl Place {
    pub fn address(self) -> u64 {
        match self {
            Self::Buffer(offset) => BUFFERS + u64::from(offset),
            Self::Ring(offset) => AREA + u64::from(offset % 0x6000),
            Self::LowEnd(offset) => (LOW_SIZE as u64).wrapping_add_signed(i64::from(offset)),
            Self::HighStart(offset) => HIGH.wrapping_add_signed(i64::from(offset)),
            Self::HighEnd(offset) => (HIGH + HIGH_SIZE as u64).wrapping_add_signed(i64::from(offset)),
            Self::Any(address) => address,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Length {
    Small(u8),
    Medium(u16),
    Entries(u8),
    Any(u32),
}

impl Length {
    pub fn bytes(self) -> u32 {
        match self {
            Self::Small(length) => u32::from(length),
            Self::Medium(length) => u32::from(length),
            Self::Entries(count) => u32::from(count) * 16,
            Self::Any(length) => length,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct HostileDescriptor {
    pub address: Place,
    pub length: Length,
    /// The lowest three bits are NEXT, WRITE, INDIRECT.
    pub flags: u8,
    pub next: u8,
    /// The rest of `flags` and `next`, when it is to be odd.
    pub odd: Option<(u16, u16)>,
}

impl HostileDescriptor {
    pub fn bytes(&self) -> [u8; 16] {
        let (flags, next) = self.odd.unwrap_or((u16::from(self.flags % 8), u16::from(self.next)));
        super::driver::descriptor(self.address.address(), self.length.bytes(), flags, next)
    }
}

/// How a request is put into descriptors.
#[derive(Arbitrary, Clone, Debug)]
pub struct Shape {
    /// Where the readable bytes are cut.
    pub readable: [u8; 2],
    /// Where the writable bytes are cut, in 1/256 of them.
    pub writable: [u8; 2],
    pub indirect: bool,
    /// One descriptor as it should not be.
    pub spoiled: Option<(u8, HostileDescriptor)>,
    /// Where the buffers lie, when not where there is room.
    pub place: Option<Place>,
}

#[derive(Arbitrary, Debug)]
pub enum Step<R, E> {
    /// A request as the device expects it, put into the ring and kicked.
    Request {
        request: R,
        shape: Shape,
    },
    /// Something happens at the host's end.
    Host(E),
    Descriptor {
        queue: u8,
        index: u8,
        descriptor: HostileDescriptor,
    },
    Offer {
        queue: u8,
        head: u16,
    },
    /// Claims that the available ring stands there.
    Available {
        queue: u8,
        index: u16,
    },
    /// The available ring's flags, or where the driver wants the next interrupt.
    Suppress {
        queue: u8,
        flags: u16,
        event: u16,
    },
    Write {
        at: Place,
        bytes: [u8; 8],
    },
    Kick {
        queue: u8,
    },
    /// The device is paused, which is when it works here, and goes on.
    Pause,
    Set(Register),
    Get(Register),
    /// Writes to configuration space.
    Config {
        offset: u8,
        width: u8,
        value: u32,
    },
    /// Negotiates and sets all queues up anew, as after a reset.
    Setup(Setup),
}

impl<R, E> Step<R, E> {
    /// Whether the step needs no transport, and so can happen while the device works.
    pub fn is_concurrent(&self) -> bool {
        !matches!(self, Self::Pause | Self::Set(_) | Self::Get(_) | Self::Config { .. } | Self::Setup(_))
    }
}
