//! What `form-agent bench` asks of `form-guest measure`, word by word on its command line, and what is on the disks.

use std::fmt;

/// The first byte of a connection: that many bytes come.
pub const TO_GUEST: u8 = b't';
/// The first byte of a connection: send that many bytes.
pub const FROM_GUEST: u8 = b'f';

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Sequential,
    Random,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Read,
    Write,
}

/// A disk to be read or written, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    pub direction: Direction,
    pub serial: String,
    /// In bytes.
    pub size: u64,
    pub access: Access,
    /// Bytes of a request.
    pub request: usize,
    /// Requests at once.
    pub depth: u16,
    /// Requests in all.
    pub count: u64,
}

impl Disk {
    /// The opposite of its text.
    #[must_use]
    pub fn parse(words: &[&str]) -> Option<Self> {
        let [direction, serial, size, access, request, depth, count] = words else { return None };
        let direction = match *direction {
            "read" => Direction::Read,
            "write" => Direction::Write,
            _ => return None,
        };
        let access = match *access {
            "sequential" => Access::Sequential,
            "random" => Access::Random,
            _ => return None,
        };
        let disk = Self {
            direction,
            serial: (*serial).to_owned(),
            size: size.parse().ok()?,
            access,
            request: request.parse().ok()?,
            depth: depth.parse().ok()?,
            count: count.parse().ok()?,
        };
        // A word at least, and no place behind the end.
        (disk.request >= 8 && disk.requests() > 0).then_some(disk)
    }

    fn requests(&self) -> u64 {
        self.size / self.request as u64
    }

    /// Where request `number` begins.
    #[must_use]
    pub fn offset(&self, number: u64) -> u64 {
        let place = match self.access {
            Access::Sequential => number,
            Access::Random => mixed(number),
        };
        place % self.requests() * self.request as u64
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = match self.access {
            Access::Sequential => "sequential",
            Access::Random => "random",
        };
        let direction = match self.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        write!(formatter, "{direction} {} {} {access} {} {} {}", self.serial, self.size, self.request, self.depth, self.count)
    }
}

/// What the eight bytes at `offset` of a measured disk are, the low byte first: no two blocks are alike, and none compresses well.
#[must_use]
pub const fn word(offset: u64) -> u64 {
    mixed(offset / 8)
}

/// The finaliser of MurmurHash3: neighbours have nothing in common.
#[must_use]
pub const fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    mixed ^ (mixed >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_reads_back_what_it_says() {
        for direction in [Direction::Read, Direction::Write] {
            let disk =
                Disk { direction, serial: "a".to_owned(), size: 1 << 20, access: Access::Random, request: 4096, depth: 32, count: 10 };
            let text = disk.to_string();
            assert_eq!(Disk::parse(&text.split(' ').collect::<Vec<_>>()), Some(disk));
        }
        for text in [
            "",
            "read a 1048576 random 4096 32",
            "read a 4095 random 4096 32 10",
            "read a 1048576 upwards 4096 1 1",
            "write a 1048576 random 4 1 1",
            "trim a 1048576 random 4096 1 1",
        ] {
            assert_eq!(Disk::parse(&text.split(' ').collect::<Vec<_>>()), None, "{text}");
        }
    }

    #[test]
    fn requests_stay_on_the_disk_and_random_ones_are_spread() {
        let direction = Direction::Read;
        let disk = |access| Disk { direction, serial: "a".to_owned(), size: 1 << 20, access, request: 4096, depth: 1, count: 256 };
        let sequential = disk(Access::Sequential);
        assert_eq!([0, 1, 255, 256].map(|number| sequential.offset(number)), [0, 4096, 255 * 4096, 0]);
        let random = disk(Access::Random);
        let places: std::collections::BTreeSet<u64> = (0..256).map(|number| random.offset(number)).collect();
        assert!(places.len() > 128 && places.iter().all(|place| place % 4096 == 0 && *place < 1 << 20));
    }
}
