//! How much the tar reader takes, and whether it was the input that failed.

use std::{
    cell::Cell,
    io::{self, Read},
};

use crate::ArchiveError;

/// Headers, long names and padding between two entries, in bytes. The reader keeps names in memory, whatever length they announce.
const MAX_BETWEEN: u64 = 1 << 20;

#[derive(Debug, Default)]
pub struct Gauge {
    /// Taken so far.
    taken: Cell<u64>,
    /// What may still be taken.
    left: Cell<u64>,
    failed: Cell<bool>,
}

impl Gauge {
    pub fn taken(&self) -> u64 {
        self.taken.get()
    }

    /// From now on headers are read.
    pub fn headers(&self) {
        self.left.set(MAX_BETWEEN);
    }

    /// From now on content is read.
    pub fn content(&self) {
        self.left.set(u64::MAX);
    }

    /// The reader's error as what it is: the input's own, or one about what the input holds.
    pub fn judge(&self, error: io::Error) -> ArchiveError {
        if self.failed.get() {
            ArchiveError::Stream(error)
        } else {
            ArchiveError::Invalid(format!("the tar stream makes no sense: {error}"))
        }
    }
}

pub struct Gauged<'a, R> {
    pub input: R,
    pub gauge: &'a Gauge,
}

impl<R: Read> Read for Gauged<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let gauge = self.gauge;
        let limit = buffer.len().min(usize::try_from(gauge.left.get()).unwrap_or(usize::MAX));
        if limit == 0 && !buffer.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("names and headers of more than {MAX_BETWEEN} bytes")));
        }
        match self.input.read(buffer.get_mut(..limit).unwrap_or_default()) {
            Ok(count) => {
                gauge.taken.set(gauge.taken.get() + count as u64);
                gauge.left.set(gauge.left.get() - count as u64);
                Ok(count)
            }
            Err(error) => {
                gauge.failed.set(error.kind() != io::ErrorKind::Interrupted);
                Err(error)
            }
        }
    }
}
